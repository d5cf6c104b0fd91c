"""What dropping whole parts and narrowing the residual stream buy at equal bytes, beside cutting neurons alone.

    python examples/benchmarks/training_methods.py digits --keep trained --methods plain --seeds 0 1 2
    python examples/benchmarks/depth_and_width.py digits --source trained/digits-plain-{seed} --seeds 0 1 2
    python examples/benchmarks/depth_and_width.py cifar10 --data CIFAR10 --source cifar10-vit --sets pairs fives
    python examples/benchmarks/depth_and_width.py clinc150 --data CLINC150 --source SOURCE --model ENCODER

Modules of every set of labels are cut from a trained classifier on calibration samples of its training data, at the
same share of the weights of attention and feed-forward layers, and measured on test data, which choose nothing. Every
module is a line of a work file as soon as it is measured; a run that was interrupted goes on. At the end
results/depth_and_width.json gets the means over sets and seeds. A cut takes seconds, `parts` five times as long.
"""

import argparse
import itertools
import statistics
from collections.abc import Mapping
from pathlib import Path

import compact
import torch
from cutting import Bench, accuracy, append, build, key_of, stored_rows, tensors_of
from cutting_units import logits_of
from safetensors.torch import save
from tasks import digits
from transformers import AutoModelForImageClassification
from transformers.utils import logging as transformers_logging

import nemo_hf

WAYS: dict[str, dict] = {
    "neurons": {},
    "parts": {"drop_parts": "auto"},
    "width 3/4": {"stream": 0.75},
    "width 1/2": {"stream": 0.5},
    "width 1/3": {"stream": 1 / 3},
    "parts, width 1/2": {"drop_parts": "auto", "stream": 0.5},
}
"""Options of `nemo_hf.extract_module` by the name of the row."""
KEYS = ("task", "way", "kind", "groups", "retention", "samples", "seed")
MEANS = ("restricted", "module", "bytes", "weights", "operations", "distance", "dropped", "lost_variance")


def measure(bench: Bench, way: str, groups: tuple[int, ...], retention: float, samples: int, seed: int) -> dict:
    """One row of the work file."""
    job = bench.job(groups, retention, samples, seed)
    batches = [{k: v for k, v in batch.items() if k != "labels"} for batch in job.calibration.batches(50)]
    module = nemo_hf.extract_module(
        job.source, list(job.labels), batches, retention, max_samples=samples, show_progress=False, **WAYS[way]
    )
    own, done = bench.measured.part(job.labels), module.config.extraction
    inside = torch.isin(bench.measured.labels, torch.tensor(job.labels))
    return {
        "restricted": accuracy(bench.logits[inside][:, job.labels], own.labels),
        "module": accuracy(logits_of(module.model, own), own.labels),
        "bytes": len(save(tensors_of(module.model))),
        **{name: done[name] for name in ("weights", "operations", "distance", "seconds")},
        "dropped": len(done.get("dropped", {})),
        "lost_variance": done.get("stream", {}).get("lost_variance", 0.0),
    }


def opened(given: argparse.Namespace, seed: int, work: Path) -> Bench:
    """The task and its source, of digits that of a seed."""
    folder = Path(str(given.source).format(seed=seed))
    if given.task != "digits":
        return build(argparse.Namespace(**{**vars(given), "source": folder}), work)
    task, source = digits(), AutoModelForImageClassification.from_pretrained(folder).eval()
    splits = task.splits(seed)
    return Bench(task, source, splits, splits[2], 0, "")


def run(given: argparse.Namespace, work: Path) -> list[dict]:
    """Measures the rows that the work file has not; returns all that were asked for."""
    known, found = stored_rows(work, KEYS), []
    for seed in given.seeds:
        bench = opened(given, seed, work)
        for kind, way, retention in itertools.product(given.sets, given.ways, given.retention):
            for groups in bench.task.sets[kind][: given.limit]:
                row = {"task": given.task, "way": way, "kind": kind, "groups": list(groups), "retention": retention}
                row |= {"samples": given.samples, "seed": seed}
                if key_of(row, KEYS) not in known:
                    row |= measure(bench, way, groups, retention, given.samples, seed)
                    append(work, row)
                    known[key_of(row, KEYS)] = row
                    print(
                        *(f"{value:.4g}" if isinstance(value, float) else value for value in row.values()), flush=True
                    )
                found.append(known[key_of(row, KEYS)])
    return found


def summary(rows: list[Mapping]) -> list[dict]:
    """Means over sets and seeds, and the largest loss, in points, of a module to the restricted source."""
    lines, keys = [], ("task", "kind", "retention", "way", "samples")
    for values, own in compact.grouped(rows, *keys).items():
        line = {**dict(zip(keys, values, strict=True)), "seeds": sorted({row["seed"] for row in own}), "rows": len(own)}
        line |= {name: statistics.fmean(row[name] for row in own) for name in MEANS}
        line["bytes"] = round(line["bytes"])
        losses = [100 * (row["restricted"] - row["module"]) for row in own]
        lines.append(line | {"loss": statistics.fmean(losses), "worst_loss": max(losses)})
    return lines


def arguments() -> argparse.Namespace:
    """What to measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=["digits", "cifar10", "clinc150"])
    parser.add_argument("--source", required=True, help="Folder of a trained plain classifier; {seed} stands for it.")
    parser.add_argument("--data", default="", help="Folder of parquet files.")
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="Pretrained, for clinc150.")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--sets", nargs="+", default=["fives"], help="Kinds of sets of label groups.")
    parser.add_argument("--retention", nargs="+", type=float, default=[0.4, 0.2, 0.1, 0.05])
    parser.add_argument("--samples", type=int, default=300, help="Calibration samples.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--limit", type=int, help="Only the first sets of each kind.")
    parser.add_argument("--work", type=Path, help="Work file; by default beside the output.")
    parser.add_argument("--output", type=Path, default=compact.RESULTS / "depth_and_width.json")
    return parser.parse_args()


def main() -> None:
    """Measures the rows that are asked for."""
    given = arguments()
    given.validation = False
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    work = given.work or given.output.with_suffix(".work.jsonl")
    about = {
        **compact.load(given.output),
        "command": "python examples/benchmarks/depth_and_width.py TASK --source SOURCE",
    }
    keys = ("task", "kind", "retention", "way", "samples")
    compact.update(given.output, about, "modules", summary(run(given, work)), *keys)


if __name__ == "__main__":
    main()
