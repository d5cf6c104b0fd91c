"""Measures modules cut from a plain classifier, and what else makes a small model of some of its labels.

    python examples/benchmarks/cutting.py clinc150 --data path/to/clinc150 --methods raw ours --sets singles
    python examples/benchmarks/cutting.py clinc150 --data path/to/clinc150 --latency --methods ours
    python examples/benchmarks/cutting.py cifar10 --data path/to/cifar10 --source path/to/classifier --sets pairs

Every set of labels is a line of a work file as soon as it is measured; lines that are there are not measured again, so
a run can be interrupted and goes on. At the end results/cutting_TASK.json gets the means over sets. Test data choose
nothing: calibration samples and training samples come from the training data, the learning rate of what is trained is
the best on validation data. `--validation` measures on these, and only prints. Without `--source` the classifier of
texts is trained first; those of images come from image_sources.py. On one CPU thread a cut takes seconds, a model
trained on its labels some minutes; the Torch-Pruning rows need `torch-pruning`. `--latency` needs a quiet machine.
"""

import argparse
import copy
import hashlib
import itertools
import json
import random
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import compact
import torch
from cutting_baselines import BASELINES, RATES, TUNED
from cutting_units import Job, logits_of, plain_network, site_paths, site_weights
from image_sources import TASKS as IMAGES
from image_sources import VALIDATION
from safetensors.torch import save
from sklearn.metrics import roc_auc_score
from tasks import PAIRS, Split, Task, clinc150, drawn_sets, images
from timing import made_within
from torch import Tensor
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
)
from transformers.utils import logging as transformers_logging

import nemo_hf
from nemo_hf.evaluation.latency import time_runs
from nemo_hf.neurons.patterns import find_heads

OURS: dict[str, dict] = {
    "raw": {"reconstruct": False},
    "ours": {},
    "ours, refined": {"refine_epochs": 3},
    "ours, fewer tokens": {"vocabulary": "shared", "max_positions": 64},
    "ours, refined, fewer tokens": {"refine_epochs": 3, "vocabulary": "shared", "max_positions": 64},
}
"""Options of `nemo_hf.extract_module` by the name of the row."""
FIXED = {name for name in BASELINES if name.endswith("layers")}  # rows whose size does not follow the retention
EPOCHS = 3  # of the source of texts
LARGE_IMAGES, FEWER_IMAGES = 64, 2000  # images above this size are tested on fewer
KEYS = ("source", "data", "method", "kind", "groups", "retention", "samples", "seed", "rate")
MEANS = ("restricted", "module", "other", "rejection", "weights", "parameters", "bytes", "peak_mib")
BATCHES = (1, 8, 32)  # of latency


@dataclass
class Bench:
    """A task with the plain classifier that modules are cut from."""

    task: Task
    source: PreTrainedModel
    splits: Sequence[Split]  # training, validation, test
    measured: Split  # one of them
    steps: int  # of the source's training
    encoder: str  # folder or name of the pretrained encoder, for texts
    rate: float = 0.0  # of what is trained
    kept: dict[tuple, PreTrainedModel] = field(default_factory=dict)  # the last models made

    def __post_init__(self) -> None:
        self.paths = site_paths(self.source)
        network = plain_network(self.source)
        self.heads = find_heads(network, network.config.num_labels)
        self.logits = logits_of(self.source, self.measured)
        self.fingerprint = hashlib.sha256(save(tensors_of(self.source))).hexdigest()[:12]

    def labels(self, groups: Sequence[int]) -> list[int]:
        """The labels of some groups."""
        return [label for group in groups for label in list(self.task.groups.values())[group]]

    def job(self, groups: Sequence[int], retention: float, samples: int, seed: int) -> Job:
        """What a module of some groups is made from; the calibration samples are drawn by the seed."""
        labels = self.labels(groups)
        train = self.splits[0].part(labels)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        options = {"steps": self.steps, "batch": self.task.batch, "rate": self.rate, "encoder": self.encoder}
        return Job(self.source, labels, train.rows(order[:samples]), train, retention, seed, **options)

    def make(self, method: str, groups: tuple[int, ...], retention: float, samples: int, seed: int) -> PreTrainedModel:
        """Makes a model, or takes it from the last ones made."""
        key = (method, groups, retention, samples, seed, self.rate)
        if key not in self.kept:
            while len(self.kept) >= 2:
                del self.kept[next(iter(self.kept))]
            self.kept[key] = make(method, self.job(groups, retention, samples, seed))
        return self.kept[key]


def make(method: str, job: Job) -> PreTrainedModel:
    """A plain model of the labels, made by a method."""
    return BASELINES[method](job) if method in BASELINES else extract(job, **OURS[method])


def extract(job: Job, **options) -> PreTrainedModel:
    """A module cut by `nemo_hf` from the unlabelled calibration samples: the plain model in it."""
    batches = [{k: v for k, v in batch.items() if k != "labels"} for batch in job.calibration.batches(50)]
    if options.get("vocabulary"):
        options["processing_class"] = AutoTokenizer.from_pretrained(job.encoder)
    module = nemo_hf.extract_module(
        job.source, list(job.labels), calibration=batches, retention=job.retention,
        max_samples=len(job.calibration), show_progress=False, **options,
    )  # fmt: skip
    return module.model.eval()


def tensors_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """What a file of the model holds: each tensor once."""
    own = {tensor.data_ptr(): name for name, tensor in model.state_dict().items()}
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items() if own[tensor.data_ptr()] == name}


def other_set(sets: Sequence[tuple[int, ...]], groups: tuple[int, ...], count: int) -> tuple[int, ...] | None:
    """A set of as many other groups: the last one measured before, if it has none of them, or a drawn one."""
    place = sets.index(groups)
    before = sets[place - 1]
    if not set(before) & set(groups):
        return before
    rest = [group for group in range(count) if group not in groups]
    draw = random.Random(place)  # noqa: S311 - not for cryptography
    return tuple(sorted(draw.sample(rest, len(groups)))) if len(rest) >= len(groups) else None


def with_head(model: PreTrainedModel, own: PreTrainedModel, paths: Sequence[str]) -> PreTrainedModel | None:
    """A copy of a model with the head, of some paths, of another one; `None` if that reads another number of neurons.

    The control of the latter is cut for the labels on the samples of the other ones.
    """
    model = copy.deepcopy(model)
    for path in paths:
        owner, _, name = path.rpartition(".")
        layers = [each.get_submodule(path) for each in (model, own)]
        if layers[0].weight.shape[1:] != layers[1].weight.shape[1:]:
            return None
        setattr(model.get_submodule(owner), name, copy.deepcopy(layers[1]))
    return model


def measure(bench: Bench, method: str, kind: str, groups: tuple[int, ...], retention: float, samples: int, seed: int):
    """One row of the work file."""
    labels, made = bench.labels(groups), (retention, samples, seed)
    key = (method, groups, *made, bench.rate)
    bench.kept.pop(key, None)  # timed, even if it was made as another set's control
    start = time.process_time()  # of one thread: does not depend on what else the machine does
    module, peak = made_within(lambda: bench.make(method, groups, *made))
    seconds = time.process_time() - start
    inside = torch.isin(bench.measured.labels, torch.tensor(labels))
    own = bench.measured.part(labels)
    logits = logits_of(module, bench.measured)
    row = {"seconds": seconds, "peak_mib": peak}
    row["restricted"] = accuracy(bench.logits[inside][:, labels], own.labels)
    row["module"] = accuracy(logits[inside], own.labels)
    row["rejection"] = roc_auc_score(inside, logits.logsumexp(-1))
    row["weights"] = site_weights(module, bench.paths) / site_weights(bench.source, bench.paths)
    row["parameters"] = sum(parameter.numel() for parameter in module.parameters())
    row["bytes"] = len(save(tensors_of(module)))
    other = other_set(bench.task.sets[kind], groups, len(bench.task.groups))
    if other is not None:
        stranger = with_head(bench.make(method, other, *made), module, bench.heads)
        if stranger is None:
            own_job, other_job = (bench.job(each, *made) for each in (groups, other))
            stranger = make(method, replace(own_job, calibration=other_job.calibration))
        row["other"] = accuracy(logits_of(stranger, own), own.labels)
        bench.kept[key] = bench.kept.pop(key)  # the next set's control: the last to be dropped
    return row


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of right answers."""
    return (logits.argmax(-1) == labels).float().mean().item()


def key_of(row: Mapping, names: Sequence[str] = KEYS) -> tuple:
    """What makes a row of the work file another one."""
    return tuple(str(row.get(name)) for name in names)


def stored_rows(path: Path, names: Sequence[str] = KEYS) -> dict[tuple, dict]:
    """The rows of a work file by key; a line that was cut off is left out."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {key_of(row, names): row for row in (json.loads(line) for line in lines if line.endswith("}"))}


def run(bench: Bench, given: argparse.Namespace, work: Path) -> list[dict]:
    """Measures all rows that the work file has not; returns all that were asked for."""
    known, found = stored_rows(work), []
    data = "validation" if given.validation else "test"
    sizes = {method: [None] if method in FIXED else given.retention for method in given.methods}
    jobs = (
        (m, kind, size, n) for kind in given.sets for m in given.methods for size in sizes[m] for n in given.samples
    )
    for method, kind, retention, samples in jobs:
        bench.rate = chosen_rate(bench, TUNED[method], given, work) if method in TUNED else 0.0
        for groups, seed in itertools.product(bench.task.sets[kind][: given.limit], given.seeds):
            row = {"source": bench.fingerprint, "data": data, "method": method, "kind": kind, "groups": list(groups)}
            row |= {"retention": retention, "samples": samples, "seed": seed, "rate": bench.rate}
            if key_of(row) not in known:
                row |= measure(bench, method, kind, groups, retention, samples, seed)
                append(work, row)
                known[key_of(row)] = row
                print(*(f"{value:.4g}" if isinstance(value, float) else value for value in row.values()), flush=True)
            found.append(known[key_of(row)])
    return found


def chosen_rate(bench: Bench, method: str, given: argparse.Namespace, work: Path) -> float:
    """The learning rate of a row that is best on validation data, with the first set and the largest size asked for."""
    kind = next(iter(bench.task.sets))
    groups, seed = bench.task.sets[kind][0], given.seeds[0]
    size = (None if method in FIXED else max(given.retention), max(given.samples))
    own, known, found = bench.splits[1].part(bench.labels(groups)), stored_rows(work), {}
    for bench.rate in RATES:
        row = {"source": bench.fingerprint, "data": "rates", "method": method, "kind": kind, "groups": list(groups)}
        row |= {"retention": size[0], "samples": size[1], "seed": seed, "rate": bench.rate}
        if key_of(row) not in known:
            row["module"] = accuracy(logits_of(make(method, bench.job(groups, *size, seed)), own), own.labels)
            append(work, row)
            print(*row.values(), flush=True)
        found[bench.rate] = known.get(key_of(row), row)["module"]
    return max(found, key=lambda rate: found[rate])


def append(path: Path, row: Mapping) -> None:
    """Adds a line to a work file, behind one that was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        file.seek(0)
        start = "" if file.read()[-1:] in ("", "\n") else "\n"
        file.write(f"{start}{json.dumps(row)}\n")


def summary(
    rows: Iterable[dict], keys: Sequence[str] = ("method", "kind", "retention", "samples", "rate"),
    means: Sequence[str] = MEANS,
) -> list[dict]:  # fmt: skip
    """Means over sets and seeds, and the largest loss, in points, of a module to the restricted source."""
    lines = []
    for values, own in compact.grouped(rows, *keys).items():
        line = {**dict(zip(keys, values, strict=True)), "seeds": sorted({row["seed"] for row in own}), "sets": len(own)}
        for name in means:
            known = [row[name] for row in own if row.get(name) is not None]
            mean = statistics.fmean(known) if known else None
            line[name] = round(mean) if name in ("parameters", "bytes") and known else mean
        losses = [100 * (row["restricted"] - row["module"]) for row in own]
        line |= {"loss": statistics.fmean(losses), "worst_loss": max(losses)}
        has_other = line.get("other") is not None
        lines.append(line | {"specificity": 100 * (line["module"] - line["other"]) if has_other else None})
    return lines


def latency(bench: Bench, given: argparse.Namespace) -> list[dict]:
    """Milliseconds of modules of the first set and of the source, taken in turn; what is trained is left untrained."""
    bench.steps = 0
    sample = {
        k: v for k, v in next(bench.measured.rows(median_sample(bench.measured)).batches()).items() if k != "labels"
    }
    rows = []
    for kind, method in itertools.product(given.sets, given.methods):
        for retention in [None] if method in FIXED else given.retention:
            shown = "ours" if method == "ours, refined" else method
            start = time.thread_time()
            module = bench.make(shown, bench.task.sets[kind][0], retention, given.samples[0], given.seeds[0])
            seconds = time.thread_time() - start
            times = time_runs({"module": module, "source": bench.source.eval()}, sample, BATCHES)
            row = {"method": method, "kind": kind, "retention": retention, "seconds": seconds, "note": times.note}
            rows += [
                {**row, "batch": int(batch), "ms": ms, "source_ms": times.milliseconds["source"][batch],
                 "speedup": times.milliseconds["source"][batch] / ms}
                for batch, ms in times.milliseconds["module"].items()
            ]  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def median_sample(data: Split) -> Tensor:
    """The index of a sample of median length."""
    if "attention_mask" not in data.inputs:
        return torch.tensor([0])
    return data.inputs["attention_mask"].sum(-1).argsort(stable=True)[len(data) // 2 :][:1]


def image_task(name: str, data: str, source: Path) -> Task:
    """Images for a source that `image_sources.py` trained: its training images calibrate; groups are labels."""
    size = json.loads((source / "preprocessor_config.json").read_text())["size"]["height"]
    known, test = images(data, name, size)
    train, validation = (known.rows(part) for part in (slice(-VALIDATION), slice(-VALIDATION, None)))
    if size > LARGE_IMAGES:
        test = test.rows(slice(FEWER_IMAGES))
    counts = f"{len(train)} images train, {len(validation)} choose, {len(test)} test"
    return Task(
        text=f"{name} at {size} x {size}, {source.name}; {counts}",
        splits=lambda seed: (train, validation, test),
        trainer=missing_source,
        epochs=0,
        sets={
            "singles": [(label,) for label in range(10)],
            "pairs": PAIRS[name],
            "triples": drawn_sets(10, 3, 3),
            "fives": drawn_sets(10, 5, 3),
        },
        batch=64,
        rate=1e-3,
        groups={label: [index] for index, label in enumerate(IMAGES[name][1])},
    )


def missing_source(*arguments) -> Trainer:
    """Image sources are trained by another script."""
    raise SystemExit("Got no --source; expected a classifier of image_sources.py. Run that first, and name its folder.")


def build(given: argparse.Namespace, work: Path) -> Bench:
    """The task, with a source that is read, or trained."""
    is_text = given.task == "clinc150"
    folder = given.source or work.with_suffix(".source")
    if is_text:
        task = clinc150(given.data, given.model)
    elif given.source is None:
        missing_source()
    else:
        task = image_task(given.task, given.data, folder)
    splits = task.splits(given.seeds[0])
    if not folder.exists():
        trainer = task.trainer(Trainer, splits[0], splits[1], given.seeds[0], EPOCHS)
        trainer.train()
        trainer.model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(given.model).save_pretrained(folder)
    load = AutoModelForSequenceClassification if is_text else AutoModelForImageClassification
    steps = EPOCHS * -(-len(splits[0]) // task.batch) if is_text else 0
    measured = splits[1 if given.validation else 2]
    source = load.from_pretrained(folder).eval()
    return Bench(task, source, splits, measured, steps, given.model if is_text else "")


def arguments() -> argparse.Namespace:
    """What to measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=["clinc150", *PAIRS])
    parser.add_argument("--data", default="", help="Folder of parquet files.")
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="Pretrained, for clinc150.")
    parser.add_argument("--source", type=Path, help="Folder of a trained plain classifier; else one is trained.")
    parser.add_argument("--methods", nargs="+", choices=[*OURS, *BASELINES], default=[*OURS, *BASELINES])
    parser.add_argument("--sets", nargs="+", default=["singles"], help="Kinds of sets of label groups.")
    parser.add_argument("--retention", nargs="+", type=float, default=[0.3, 0.2, 0.13, 0.1])
    parser.add_argument("--samples", nargs="+", type=int, default=[300], help="Calibration samples.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--limit", type=int, help="Only the first sets of each kind.")
    parser.add_argument("--validation", action="store_true", help="Measure on validation data and only print.")
    parser.add_argument("--latency", action="store_true", help="Take times, on a quiet machine, and nothing else.")
    parser.add_argument("--work", type=Path, help="Work file; by default beside the output.")
    parser.add_argument("--output", type=Path, help="In place of results/cutting_TASK.json, or TASK-SOURCE of images.")
    return parser.parse_args()


def main() -> None:
    """Measures the rows that are asked for."""
    given = arguments()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    is_named = given.source is None or given.task == "clinc150"
    name = given.task if is_named else f"{given.task}-{given.source.name.removeprefix(f'{given.task}-')}"
    output = given.output or compact.RESULTS / f"cutting_{name}.json"
    work = given.work or output.with_suffix(".work.jsonl")
    bench = build(given, work)
    data = " --data DATA" if given.data else ""
    data += "" if given.source is None or given.task == "clinc150" else " --source SOURCE"
    about = {"command": f"python examples/benchmarks/cutting.py {given.task}{data} --methods METHOD --sets KIND"}
    about = {**compact.load(output), **about, "task": bench.task.text, "source": bench.fingerprint}
    if given.latency:
        compact.update(output, about, "latency", latency(bench, given), "method", "kind", "retention", "batch")
        return
    rows = summary(run(bench, given, work))
    if given.validation:
        print(*rows, sep="\n")
    else:
        compact.update(output, about, "modules", rows, "method", "kind", "retention", "samples")


if __name__ == "__main__":
    main()
