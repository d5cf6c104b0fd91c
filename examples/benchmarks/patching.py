"""Patches one label of a weak model with the module of a stronger one, as CNNSplitter and MODA do.

    python examples/benchmarks/patching.py --data path/to/cifar10 --keep trained --rows moda

The strong models are those of `training_methods.py cifar10-vgg16`, the weak one is its plain model after one epoch. For
each label, `compose` joins the strong model's module of that label with the weak model cut without it, calibrated on
validation data. Measured on test data: precision and recall of the label, and accuracy on samples of the others. The
control calibrates the weak model's own module in place of the strong one. Writes results/patching.json.
"""

import argparse
from pathlib import Path

import compact
import torch
from cutting_units import logits_of
from tasks import TASKS
from torch import Tensor
from training_methods import trained
from transformers.utils import logging as transformers_logging

from nemo_hf import NeMoConfig, compose, make_parent


def of_label(answers: Tensor, labels: Tensor, label: int) -> dict[str, float]:
    """Precision and recall of one label, and accuracy on samples of the others."""
    answered, own = answers == label, labels == label
    hits = (answered & own).sum().item()
    return {
        "precision": hits / max(1, answered.sum().item()),
        "recall": hits / own.sum().item(),
        "others": (answers == labels)[~own].float().mean().item(),
    }


def main() -> None:
    """Patches each label."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", nargs="+", default=["generated", "moda"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, required=True, help="Folder of trained models, as of training_methods.py.")
    given = parser.parse_args()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    task = TASKS["cifar10-vgg16"](given.data, "")
    splits, names = task.splits(given.seed), list(task.groups)
    weak = trained(task, "cifar10-vgg16-weak", "plain", given.seed, 1, given.keep)[0]
    weak = make_parent(weak, NeMoConfig(masks="static")).eval()
    test = splits[2]
    weak_answers = logits_of(weak, test).argmax(-1)
    about = {"command": "python examples/benchmarks/patching.py --data DATA", "task": task.text, "seed": given.seed}
    for row in given.rows:
        strong, _ = trained(task, "cifar10-vgg16", row, given.seed, task.epochs, given.keep)
        for label, name in enumerate(names):
            rest = weak.extract_module([other for other in names if other != name])
            joined = [
                compose([rest, source.extract_module([name])], names, list(splits[1].batches()))
                for source in (weak, strong)
            ]
            answers = [weak_answers, *(logits_of(model, test).argmax(-1) for model in joined)]
            kinds = ("weak", "weak, calibrated alike", "patched")
            found = [
                {"strong": row, "label": name, "model": kind, **of_label(own, test.labels, label)}
                for kind, own in zip(kinds, answers, strict=True)
            ]
            print(row, name, *(f"{each['recall']:.3f}" for each in found), flush=True)
            compact.update(compact.RESULTS / "patching.json", about, "labels", found, "strong", "label", "model")


if __name__ == "__main__":
    main()
