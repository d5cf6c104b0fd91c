"""Repairs labels of a weak classifier with a module of a stronger one, and compares that with training it on.

    python examples/case_studies/repair.py cifar10-vgg16 --data path/to/cifar10 --keep trained
    python examples/case_studies/repair.py clinc150 --data path/to/clinc150 --keep trained --weakness scarce

Weak models are trained too short ("undertrained") or on few samples of the labels to repair ("scarce"). A module for
these labels is cut from the strong model on training samples without their labels, and `compose` joins it with the weak
model that lacks them, calibrated on one half of the validation data. The other half chooses what may be chosen: whether
the cut sees samples of its own labels or of all, and the learning rate of what is trained on. Test data measure. The
rows beside it: the weak model's own module in place of the strong one's, the strong model's module with all neurons,
the weak model trained on with the samples that the repair saw or with all training data, and the strong model whole.
Writes results/case_repair.json of examples/benchmarks; seconds are those of one CPU thread, whatever else runs.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging as transformers_logging

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import compact
from cutting import accuracy
from cutting_units import logits_of
from tasks import TASKS, Split, Task
from training_methods import trained

import nemo_hf

RESULTS = compact.RESULTS / "case_repair.json"
KEYS = ("task", "weakness", "seed", "labels", "model")
RETENTION = 0.2
SAMPLES = 300  # of a cut
SHORT = 3  # epochs of a training on the samples of the repair
SLOWER = (1, 1 / 3, 1 / 10)  # learning rates to choose from, as shares of the first training's


@dataclass(frozen=True)
class Plan:
    """How the models of a task are trained."""

    strong_epochs: int
    weak_epochs: Mapping[str, int]  # by weakness
    count: int  # samples of each label that is scarce
    groups: Sequence[str]  # of labels, which are repaired unless others are asked for


PLANS = {
    "cifar10-vgg16": Plan(20, {"undertrained": 1, "scarce": 4}, 45, ("cat", "deer", "ship")),
    "clinc150": Plan(3, {"scarce": 1}, 5, ("banking",)),
}


@dataclass(frozen=True)
class Repair:
    """A weak and a strong model, the labels to repair, and the data for it."""

    task: Task
    weak: PreTrainedModel
    strong: PreTrainedModel
    labels: Sequence[int]
    train: Split  # without augmentation
    calibration: Split  # one half of the validation data
    choice: Split  # the other
    seed: int

    def name(self, labels: Sequence[int]) -> list[str]:
        """Names of labels."""
        return [self.weak.config.id2label[label] for label in labels]

    def samples(self, kind: str) -> Split:
        """Training samples for a cut: of the labels to repair ("own"), or twice as many of all labels ("all")."""
        inside = torch.isin(self.train.labels, torch.tensor(self.labels))
        pool = self.train.rows(inside) if kind == "own" else self.train
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(self.seed))
        return pool.rows(order[: SAMPLES if kind == "own" else 2 * SAMPLES])

    def module(self, donor: PreTrainedModel, kind: str, retention: float) -> PreTrainedModel:
        """The donor's module for the labels to repair."""
        samples = self.samples(kind)
        batches = [{k: v for k, v in batch.items() if k != "labels"} for batch in samples.batches(50)]
        options = {"retention": retention, "max_samples": len(samples), "show_progress": False}
        return nemo_hf.extract_module(donor, self.name(self.labels), batches, **options)

    def joined(self, module: PreTrainedModel) -> PreTrainedModel:
        """The weak model without the labels, joined with a module for them."""
        every = range(self.weak.config.num_labels)
        others = [label for label in every if label not in self.labels]
        rest = nemo_hf.make_parent(copy.deepcopy(self.weak)).extract_module(others)
        return nemo_hf.compose([rest, module], self.name(every), list(self.calibration.batches()))

    def repaired(self, donor: PreTrainedModel, retention: float, kind: str) -> PreTrainedModel:
        """The weak model with the donor's module in place of its part for the labels."""
        return self.joined(self.module(donor, kind, retention))

    def score(self, model: PreTrainedModel) -> float:
        """Accuracy on the half of the validation data that chooses."""
        return accuracy(logits_of(model, self.choice), self.choice.labels)

    def trained_on(self, data: Dataset, epochs: int, rate: float) -> PreTrainedModel:
        """The weak model after more training."""
        model = copy.deepcopy(self.weak)
        trainer = self.task.trainer(Trainer, data, self.choice, self.seed, epochs, model=model)
        trainer.args.learning_rate = rate
        trainer.train()
        return trainer.model.cpu().eval()


def of_labels(answers: Tensor, right: Tensor, labels: Sequence[int]) -> dict[str, float]:
    """Precision and recall of some labels together, and accuracy on samples of the others and of all."""
    own, answered = (torch.isin(each, torch.tensor(labels)) for each in (right, answers))
    hits = answers == right
    return {
        "precision": (hits & own).sum().item() / max(1, answered.sum().item()),
        "recall": hits[own].float().mean().item(),
        "others": hits[~own].float().mean().item(),
        "accuracy": hits.float().mean().item(),
    }


def scarce(split: Split, labels: Sequence[int], count: int, seed: int) -> Split:
    """A split with few samples of some labels, which the seed draws, and all of the others."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    kept = torch.ones(len(split), dtype=torch.bool)
    for label in labels:
        kept[order[split.labels[order] == label][count:]] = False
    return split.rows(kept)


def halves(split: Split, seed: int) -> tuple[Split, Split]:
    """Two halves of a split."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    return split.rows(order[: len(order) // 2]), split.rows(order[len(order) // 2 :])


def weak_model(
    task: Task, name: str, weakness: str, plan: Plan, group: str, seed: int, keep: Path
) -> tuple[str, PreTrainedModel]:
    """The weak model and its name, trained or read from `keep`."""
    if weakness == "scarce":
        splits, labels = task.splits, task.groups[group]
        text = f"{task.text}; {plan.count} samples of each label of {group}"
        task = replace(
            task,
            text=text,
            splits=lambda seed: (scarce(splits(seed)[0], labels, plan.count, seed), *splits(seed)[1:]),
        )
        name = f"{name}-{group}"
    name = f"{name}-{weakness}"
    return name, trained(task, name, "plain", seed, plan.weak_epochs[weakness], keep)[0]


def best(repair: Repair, options: Sequence, make: Callable[..., PreTrainedModel]) -> tuple:
    """The option whose model is best on the choosing half, that model, and the seconds of making it alone."""
    found = []
    for option in options:
        start = time.process_time()
        model = make(option)
        found.append((option, model, time.process_time() - start))
    return max(found, key=lambda each: repair.score(each[1]))


def ways(repair: Repair) -> dict[str, tuple]:
    """By name of the way: what was chosen, the model and its seconds."""
    found = {"weak": (None, repair.weak, 0.0)}
    found["repaired"] = best(repair, ("own", "all"), partial(repair.repaired, repair.strong, RETENTION))
    kind = found["repaired"][0]
    found["repaired, uncut"] = best(repair, [kind], partial(repair.repaired, repair.strong, 1.0))
    found["own module"] = best(repair, [kind], partial(repair.repaired, repair.weak, RETENTION))
    seen = [replace(part, is_augmented=True) if hasattr(part, "is_augmented") else part
            for part in (repair.samples(kind), repair.calibration)]  # fmt: skip
    rates = [share * repair.task.rate for share in SLOWER]
    found["trained on, same samples"] = best(repair, rates, partial(repair.trained_on, ConcatDataset(seen), SHORT))
    return found | {"strong": (None, repair.strong, 0.0)}


def measured(repair: Repair, others: Mapping[str, tuple], test: Split, about: Mapping) -> list[dict]:
    """A row for each way, and for others."""
    rows = []
    for name, (chosen, model, seconds) in {**ways(repair), **others}.items():
        row = {**about, "model": name, "chosen": chosen, "validation": repair.score(model)}
        row |= of_labels(logits_of(model, test).argmax(-1), test.labels, repair.labels)
        row |= {"seconds": seconds, "parameters": sum(each.numel() for each in model.parameters())}
        print(*(f"{value:.3f}" if isinstance(value, float) else value for value in row.values()), flush=True)
        rows.append(row)
    return rows


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What to repair."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=list(PLANS))
    parser.add_argument("--data", required=True, help="Folder of parquet files.")
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="Pretrained, for clinc150.")
    parser.add_argument("--strong", type=Path, help="Folder of the strong model; else it is trained.")
    parser.add_argument("--keep", type=Path, required=True, help="Folder of trained models, as of training_methods.py.")
    parser.add_argument("--weakness", nargs="+", choices=["undertrained", "scarce"], help="All of the task's.")
    parser.add_argument("--labels", nargs="+", help="Labels, or domains of clinc150, to repair, each by itself.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--train-only", action="store_true", help="Train the models, for a later run, and stop.")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Repairs what is asked for."""
    given = arguments(words)
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    task, plan = TASKS[given.task](given.data, given.model), PLANS[given.task]
    if given.strong is None:
        strong = trained(task, given.task, "plain", 0, plan.strong_epochs, given.keep)[0]
    else:
        strong = task.auto_class.from_pretrained(given.strong).eval()
    about = {"command": "python examples/case_studies/repair.py TASK --data DATA --keep KEEP"}
    for weakness in given.weakness or plan.weak_epochs:
        for seed in given.seeds:
            train, validation, test = task.splits(seed)
            plain = replace(train, is_augmented=False) if hasattr(train, "is_augmented") else train
            others: dict[str, dict] = {}  # by name of the weak model: they are the same for all labels
            for group in given.labels or plan.groups:
                name, weak = weak_model(task, given.task, weakness, plan, group, seed, given.keep)
                if given.train_only:
                    continue
                repair = Repair(task, weak, strong, task.groups[group], plain, *halves(validation, seed), seed)
                if name not in others:
                    way = best(repair, [SLOWER[1] * task.rate], partial(repair.trained_on, train, 1))
                    others[name] = {"trained on, all data": way}
                row = {"task": task.text, "weakness": weakness, "seed": seed, "labels": group}
                compact.update(given.output, about, "repairs", measured(repair, others[name], test, row), *KEYS)


if __name__ == "__main__":
    main()
