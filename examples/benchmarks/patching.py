"""Patches one label of a weak model with the module of a stronger one, and measures it as CNNSplitter and MODA do.

    python examples/benchmarks/patching.py --data path/to/cifar10 --rows ours moda

The strong models are those of `quality.py cifar10-vgg16`, the weak one is its plain model after one epoch. For each
label, `compose` joins the strong model's module of that label with the weak model cut without it, calibrated on
validation data. Precision and recall of the label and accuracy on samples of the others, on test data: of the weak
model, of the patched one, and of a control that joins and calibrates the weak model's own label instead, which shows
what calibration alone does. Writes patching.json beside this script; quality_tables.py renders it.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from quality import ROWS, answers, trained
from quality_tasks import Split, cifar10_cnn
from timing import made_with
from torch import Tensor
from transformers.utils import logging as transformers_logging

from nemo_hf import compose
from nemo_hf.models.base import base_parameters
from nemo_hf.models.files import write_json

HERE = Path(__file__).parent


def of_label(answered: Tensor, right: Tensor, label: int) -> dict[str, float]:
    """Precision and recall of one label, and the share of right answers to samples of the others."""
    said, own = answered == label, right == label
    hits = (said & own).sum().item()
    return {
        "precision": hits / max(1, said.sum().item()),
        "recall": hits / own.sum().item(),
        "accuracy on others": (answered == right)[~own].float().mean().item(),
    }


def joined(weak, strong, label: int, names: list[str], validation: Split):
    """The weak model without a label and the strong model's module of it, calibrated."""
    rest = weak.extract_module([name for name in names if name != names[label]])
    module = strong.extract_module([names[label]])
    return compose([rest, module], names, list(validation.batches())), module


def main() -> None:
    """Patches each label."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", nargs="+", default=["ours", "moda"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="Folder that keeps trained parents, as in quality.py.")
    parser.add_argument("--output", type=Path, default=HERE / "patching.json")
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    task = cifar10_cnn(options.data, "vgg16")
    splits, names = task.splits(options.seed), list(task.groups)
    weak, _ = trained(task, None, splits, options.seed, 1, options.keep)
    test = splits[2]
    before = answers(weak, test).argmax(-1)
    rows = []
    for name in options.rows:
        strong, _ = trained(task, {**ROWS, **task.own_rows}[name], splits, options.seed, task.epochs, options.keep)
        for label in range(len(names)):
            patched, module = joined(weak, strong, label, names, splits[1])
            control, _ = joined(weak, weak, label, names, splits[1])
            row = {"row": name, "label": names[label], "weak": of_label(before, test.labels, label)}
            row["patched"] = of_label(answers(patched, test).argmax(-1), test.labels, label)
            row["calibrated weak"] = of_label(answers(control, test).argmax(-1), test.labels, label)
            row["weights"] = base_parameters(module) / base_parameters(weak)
            row["scales"], row["biases"] = patched.config.scales, patched.config.biases
            rows.append(row)
            print(json.dumps(row), flush=True)
        recalls = [
            statistics.fmean(r[kind]["recall"] for r in rows if r["row"] == name) for kind in ("weak", "patched")
        ]
        print(f"{name}: recall {recalls[0]:.3f} before, {recalls[1]:.3f} after", flush=True)
    made = made_with("patching", ["--data", "DATA", "--rows", *options.rows])
    write_json(options.output, {**made, "task": task.text, "seed": options.seed, "rows": rows})


if __name__ == "__main__":
    main()
