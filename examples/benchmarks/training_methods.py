"""Compares methods of training: what they cost the whole model, and what modules cut from it are worth.

    python examples/benchmarks/training_methods.py digits --keep trained --seeds 0 1 2
    python examples/benchmarks/training_methods.py clinc150-2000 --data path/to/clinc150 --keep trained --sets pairs
    python examples/benchmarks/training_methods.py cifar10-vgg16 --data path/to/cifar10 --keep trained --methods moda

Each method is trained, or read from `--keep`; images are checkpointed there, so that a training that was stopped goes
on. Every measured row is a line of a work file; what is there is not measured again. At the end
results/training_TASK.json gets three tables: "methods", a row a method and seed; "modules", means over sets and seeds
by method, way and size; with `--own` also the modules that a method's own threshold gives (of the plain model the
reconstructed fifth), raw and after ten epochs of supervised fine-tuning on all training samples of their labels, as the
papers of these methods do.

Modules are cut on 300 unlabelled training samples of their labels. What is reconstructed, and teaches in refinement, is
what serves a method best: of the plain model, `moda` and `assigned` the whole network; of `generated` the network with
the neurons of all its modules, which it is in eval mode; of parents with soft masks (`mwt`, `nemo`, `nemo-authors`) the
network whose neurons are scaled by the masks' means over training samples of the module's labels. "restricted" is
always the model as it was trained, choosing among the same labels; "other" a module of other labels with this head, or
where the head reads neurons that are cut, the module of these labels by the scores and samples of other labels.
Test data choose nothing: between ways the column "validation" may; `--validation` measures on it, and only prints.
"""

import argparse
import copy
import hashlib
import itertools
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import compact
import torch
from cutting import Bench, accuracy, append, key_of, other_set, stored_rows, summary, with_head
from cutting_units import logits_of, plain_network, site_weights
from sklearn.metrics import roc_auc_score
from tasks import TASKS, CountedSeconds, Task
from timing import made_within
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging as transformers_logging

import nemo_hf
from nemo_hf import NeMoConfig, NeMoTrainer, make_parent
from nemo_hf.evaluation.report import measure_modularity
from nemo_hf.models.atomic_writes import write_text
from nemo_hf.models.base import NeMoPreTrainedModel
from nemo_hf.pruning.plan import RELEVANCE_SCALE

WAYS: dict[str, dict] = {
    "raw": {"reconstruct": False},
    "reconstructed": {},
    "reconstructed, relevance": {"scores": "relevance"},
    "fine-tuned": {"refine_epochs": 10},
    "fine-tuned, relevance": {"refine_epochs": 10, "scores": "relevance"},
}
"""Options of `nemo_hf.extract_module` by way. Raw modules of parents are by relevance, too, which plain models lack."""
RETENTIONS = (0.5, 0.3, 0.2, 0.1, 0.05)
SAMPLES = 300  # calibration samples
STRANGERS = 1000  # most samples of other labels that rejection is measured on
MODULARITY_SAMPLES = 1000
OWN_RETENTION, TUNING_EPOCHS = 0.2, 10
KEYS = ("table", "model", "data", "way", "kind", "groups", "retention")
"""What makes a row of the work file another one."""
TABLE_KEYS = {
    "methods": ("method", "seed"),
    "modules": ("method", "way", "kind", "retention"),
    "own": ("method", "kind"),
}
"""What makes a row of the results another one."""
STATIC = NeMoConfig(masks="static")


def trained(task: Task, name: str, method: str, seed: int, epochs: int, keep: Path) -> tuple[PreTrainedModel, dict]:
    """The trained model of a method, and what its training cost.

    It is saved in `keep`. A training that was stopped goes on after its last whole epoch if the task makes checkpoints.
    """
    options = json.loads(method) if method[:1] == "{" else task.methods[method]
    if options is not None and any(len(labels) > 1 for labels in task.groups.values()):
        options = {**options, "label_groups": task.groups}
    run = json.loads(json.dumps({"task": task.text, "options": options, "seed": seed, "epochs": epochs}))
    shown = hashlib.sha256(method.encode()).hexdigest()[:12] if method[:1] == "{" else method
    folder = keep / f"{name}-{shown}-{seed}"
    about, checkpoints = folder / "training.json", folder / "checkpoints"
    if not about.exists():
        train, validation, _ = task.splits(seed)
        more = {} if options is None else {"nemo_config": NeMoConfig(**options)}
        kind = Trainer if options is None else NeMoTrainer
        trainer = task.trainer(kind, train, validation, seed, epochs, folder=checkpoints, **more)
        trainer.add_callback(CountedSeconds())
        is_started = any(checkpoints.glob("checkpoint-*"))
        _, peak = made_within(lambda: trainer.train(resume_from_checkpoint=is_started or None))
        seconds = sum(entry.get("cpu_seconds", 0) for entry in trainer.state.log_history)
        model = trainer.model if options is None else trainer.parent
        model.save_pretrained(folder)
        write_text(about, json.dumps({"run": run, "cost": {"cpu_seconds": round(seconds), "peak_mib": peak}}) + "\n")
        shutil.rmtree(checkpoints, ignore_errors=True)
    known = json.loads(about.read_text())
    if known["run"] != run:
        raise SystemExit(f"Got {folder} of another training, {known['run']}; expected {run}. Choose another --keep.")
    return task.auto_class.from_pretrained(folder).eval(), known["cost"]


class Cuts(Bench):
    """A trained model, plain or a parent, and the modules that were cut from it last."""

    @property
    def parent(self) -> NeMoPreTrainedModel | None:
        """The model, if it is one."""
        return self.source if isinstance(self.source, NeMoPreTrainedModel) else None

    @property
    def network(self) -> PreTrainedModel:
        """The model without masks."""
        return plain_network(self.source)

    def cut(
        self, way: str, groups: tuple[int, ...], seed: int, retentions: Sequence[float], others: tuple[int, ...] = ()
    ) -> list[NeMoPreTrainedModel]:
        """The modules of some groups by size, or those that `others` would make of these groups' labels."""
        key = (way, groups, others)
        if key not in self.kept:
            while len(self.kept) >= 3:  # a set's, its control's and those of the set before
                del self.kept[next(iter(self.kept))]
            labels, samples = self.labels(groups), self.job(others or groups, 0, SAMPLES, seed).calibration
            source = self.source
            if self.parent is not None:
                source = with_masks_of(self.parent, groups, others) if others else source
                if source.nemo_config.has_generators and not source.nemo_config.hard_masks:
                    source, labels = static_parent(source, labels), list(range(len(labels)))
            batches = [{name: v for name, v in batch.items() if name != "labels"} for batch in samples.batches(50)]
            options = {"max_samples": len(samples), "show_progress": False, **WAYS[way]}
            if way == "raw" and self.parent is not None:
                options["scores"] = "relevance"
            modules = nemo_hf.extract_module(source, labels, batches, list(retentions), **options)
            self.kept[key] = [module.eval() for module in modules]
        return self.kept[key]

    def share(self, model: PreTrainedModel) -> float:
        """Share of the weights of the layers that are cut."""
        return site_weights(model, self.paths) / site_weights(self.network, self.paths)

    def has_own_head(self, model: PreTrainedModel) -> bool:
        """Whether the head reads neurons that were cut, so that no other module can have it."""
        widths = [[net.get_submodule(path).weight.shape[1] for path in self.heads] for net in (model, self.network)]
        return widths[0] != widths[1]

    def restricted(self, labels: Sequence[int]) -> float:
        """Accuracy of the whole model among some labels."""
        inside = torch.isin(self.measured.labels, torch.tensor(labels))
        return accuracy(self.logits[inside][:, labels], self.measured.part(labels).labels)


def with_masks_of(parent: NeMoPreTrainedModel, groups: Sequence[int], others: Sequence[int]) -> NeMoPreTrainedModel:
    """A copy of a parent in which some groups have the relevance and the mean masks of others."""
    parent = copy.deepcopy(parent)
    for mask in parent.parent_masks().site_masks():
        mask.relevance[list(groups)] = mask.relevance[list(others)].amax(0)
        if mask.mean_mask is not None:
            mask.mean_mask[list(groups)] = mask.mean_mask[list(others)].mean(0)
    return parent


def static_parent(parent: NeMoPreTrainedModel, labels: Sequence[int]) -> NeMoPreTrainedModel:
    """A parent of some labels whose neurons are scaled by the mean masks of these in place of masks by sample."""
    whole = copy.deepcopy(parent)
    for mask in whole.parent_masks().site_masks():
        mask.relevance.clamp_(min=1)  # so that no neuron is cut
    network = whole.extract_module(list(labels), threshold=1 / RELEVANCE_SCALE).model
    network.config.id2label = {place: parent.config.names[label] for place, label in enumerate(labels)}
    static = make_parent(network, STATIC)
    own = [place for place, group in enumerate(parent.config.groups.values()) if set(group) & set(labels)]
    relevance = parent.parent_masks().relevance()
    for key, table in static.parent_masks().relevance().items():
        table.copy_(relevance[key][own].amax(0).expand_as(table))
    static.config.relevance_source = "exact"
    return static


def measure_method(cuts: Cuts, cost: Mapping) -> dict:
    """What a method does to the whole model."""
    row = {"accuracy": accuracy(cuts.logits, cuts.measured.labels), **cost}
    if cuts.parent is not None:
        step = max(1, len(cuts.measured) // MODULARITY_SAMPLES)
        data = cuts.measured.rows(torch.arange(0, len(cuts.measured), step))
        found = measure_modularity(cuts.parent, data.batches(), len(data))
        row |= {name: found[name] for name in ("cohesion", "coupling")}
    return row


def measure_module(cuts: Cuts, way: str, kind: str, groups: tuple[int, ...], seed: int, sizes: Sequence[float],
                   place: int) -> dict:  # fmt: skip
    """A module of one of the sizes beside its controls."""
    labels, data = cuts.labels(groups), cuts.measured
    inside = torch.isin(data.labels, torch.tensor(labels))
    own, validation = data.part(labels), cuts.splits[1].part(labels)
    outside = (~inside).nonzero().squeeze(-1)
    outside = data.rows(outside[:: max(1, len(outside) // STRANGERS)])
    model = cuts.cut(way, groups, seed, sizes)[place].model
    logits = [logits_of(model, part) for part in (own, outside)]
    energies = torch.cat(logits).logsumexp(-1)
    row = {"restricted": cuts.restricted(labels), "module": accuracy(logits[0], own.labels)}
    row["validation"] = accuracy(logits_of(model, validation), validation.labels)
    row["rejection"] = roc_auc_score(torch.arange(len(energies)) < len(own), energies)
    row["weights"] = cuts.share(model)
    other = other_set(cuts.task.sets[kind], groups, len(cuts.task.groups))
    if other is not None:
        if cuts.has_own_head(model):
            stranger = cuts.cut(way, groups, seed, sizes, other)[place].model
        else:
            stranger = with_head(cuts.cut(way, other, seed, sizes)[place].model, model, cuts.heads)
        row["other"] = accuracy(logits_of(stranger, own), own.labels)
    return row


def measure_own(cuts: Cuts, groups: tuple[int, ...], seed: int) -> dict:
    """The module that a method itself makes of some groups, raw and after supervised fine-tuning."""
    labels = cuts.labels(groups)
    if cuts.parent is None:
        module = cuts.cut("reconstructed", groups, seed, [OWN_RETENTION])[0]
    else:
        module = cuts.parent.extract_module(labels)
    train, validation, _ = (part.part(labels) for part in cuts.splits)
    own = cuts.measured.part(labels)
    row = {"restricted": cuts.restricted(labels), "module": accuracy(logits_of(module, own), own.labels)}
    row["weights"] = cuts.share(module.model)
    trainer = cuts.task.trainer(Trainer, train, validation, seed, TUNING_EPOCHS, model=module)
    trainer.args.learning_rate /= 3
    trainer.train()
    return {**row, "tuned": accuracy(logits_of(trainer.model, own), own.labels)}


class Work:
    """The rows measured so far, in memory and in a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.known, self.asked = path, stored_rows(path, KEYS), []

    def row(self, about: Mapping, measure: Callable[[], dict]) -> None:
        """Measures a row if there is none yet."""
        key = key_of(about, KEYS)
        if key not in self.known:
            self.known[key] = {**about, **measure()}
            append(self.path, self.known[key])
            values = list(self.known[key].values())
            print(*(f"{value:.4g}" if isinstance(value, float) else value for value in values), flush=True)
        self.asked.append(self.known[key])


def measure(cuts: Cuts, given: argparse.Namespace, about: Mapping, cost: Mapping, work: Work) -> None:
    """All rows of a trained model."""
    seed, sizes = about["seed"], given.retention
    work.row({"table": "methods", **about}, partial(measure_method, cuts, cost))
    ways = [way for way in given.ways if cuts.parent is not None or "relevance" not in way]
    sets = [(kind, groups) for kind in given.sets for groups in cuts.task.sets[kind][: given.limit]]
    for way, (kind, groups) in itertools.product(ways, sets):
        for place, size in enumerate(sizes):
            row = {"table": "modules", **about, "way": way, "kind": kind, "groups": list(groups), "retention": size}
            work.row(row, partial(measure_module, cuts, way, kind, groups, seed, sizes, place))
    for kind, groups in sets if given.own else ():
        cuts.kept.clear()
        row = {"table": "own", **about, "kind": kind, "groups": list(groups)}
        work.row(row, partial(measure_own, cuts, groups, seed))


def tables(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """The tables of the results."""
    found = compact.grouped(rows, "table")
    plain = {row["seed"]: row["accuracy"] for row in found["methods"] if row["method"] == "plain"}
    methods = []
    for row in found["methods"]:
        lost = 100 * (plain[row["seed"]] - row["accuracy"]) if row["seed"] in plain else None
        methods.append(
            {name: value for name, value in row.items() if name not in ("table", "model", "data")} | {"lost": lost}
        )
    means = ("restricted", "module", "validation", "other", "rejection", "weights")
    modules = summary(found.get("modules", []), TABLE_KEYS["modules"], means)
    own = summary(found.get("own", []), TABLE_KEYS["own"], ("restricted", "module", "tuned", "weights"))
    return {"methods": methods, "modules": modules, "own": own}


def arguments() -> argparse.Namespace:
    """What to measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", help="All of the task if left out; or options of NeMoConfig as JSON.")
    parser.add_argument("--ways", nargs="*", choices=list(WAYS), default=list(WAYS), help="None: train only.")
    parser.add_argument("--sets", nargs="+", help="Kinds of sets of label groups; all of the task if left out.")
    parser.add_argument("--retention", nargs="+", type=float, default=list(RETENTIONS))
    parser.add_argument("--own", action="store_true", help="Also the modules of a method's own size, fine-tuned.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--limit", type=int, help="Only the first sets of each kind.")
    parser.add_argument("--epochs", type=int, help="In place of the task's own; needs --output or --validation.")
    parser.add_argument("--data", default="", help="Folder of parquet files, for clinc150 and cifar10.")
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="Pretrained, for clinc150.")
    parser.add_argument("--keep", type=Path, required=True, help="Folder for trained models and checkpoints.")
    parser.add_argument("--validation", action="store_true", help="Measure on validation data and only print.")
    parser.add_argument("--work", type=Path, help="Work file; by default in --keep.")
    parser.add_argument("--output", type=Path, help="In place of results/training_TASK.json.")
    given = parser.parse_args()
    if given.epochs and not (given.output or given.validation):
        parser.error("got --epochs without --output, which would replace the results of the task's own epochs")
    return given


def main() -> None:
    """Measures the rows that are asked for."""
    given = arguments()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("nemo_hf").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    task = TASKS[given.task](given.data, given.model)
    given.sets = given.sets or list(task.sets)
    work = Work(given.work or given.keep / f"{given.task}.work.jsonl")
    epochs, data = given.epochs or task.epochs, "validation" if given.validation else "test"
    for seed, method in itertools.product(given.seeds, given.methods or task.methods):
        model, cost = trained(task, given.task, method, seed, epochs, given.keep)
        splits = task.splits(seed)
        cuts = Cuts(task, model, splits, splits[1 if given.validation else 2], 0, "")
        about = {"method": method, "seed": seed, "model": cuts.fingerprint, "data": data}
        measure(cuts, given, about, cost, work)
    found = tables(work.asked)
    if given.validation:
        print(*(row for rows in found.values() for row in rows), sep="\n")
        return
    output = given.output or compact.RESULTS / f"training_{given.task}.json"
    options = " --data DATA" if given.data else ""
    command = f"python examples/benchmarks/training_methods.py {given.task}{options} --keep KEEP --own"
    about = {"command": command, "task": task.text, "epochs": epochs}
    for name, keys in TABLE_KEYS.items():
        compact.update(output, {**compact.load(output), **about}, name, found[name], *keys)


if __name__ == "__main__":
    main()
