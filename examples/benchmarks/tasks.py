"""Data sets, models and label sets of `training_methods.py` and `cutting.py`: digits, CLINC150 and CIFAR-10."""

import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from datasets import load_dataset
from image_sources import RECIPES, VALIDATION, as_input, augmented
from image_sources import TASKS as IMAGES
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from nemo_hf.cli.demo import MODULES, accuracy, digits_trainer, load_digits_split

sys.path.append(str(Path(__file__).parents[1] / "paper"))
from objectives import MODA, MWT, NEMO, NEMO_AUTHORS, PAPER

METHODS: dict[str, dict | None] = {
    "plain": None,
    "mwt": {**PAPER, "objective": "cohesion-coupling"},
    "nemo": PAPER,
    "nemo-authors": {**PAPER, "objective": "contrastive-authors"},
    "generated": {"masks": "generated"},
    "assigned": {"plain_ratio": 0.5},
}
"""Options of `NeMoConfig` by method; `None` trains without masks."""
CNN_METHODS = {**METHODS, "mwt": MWT, "nemo": NEMO, "nemo-authors": NEMO_AUTHORS, "moda": MODA}
PAIRS = {
    "cifar10": [(3, 5), (0, 8), (1, 9), (2, 4), (6, 7)],
    "fashion-mnist": [(0, 6), (2, 4), (5, 7), (1, 3), (8, 9)],
}


@dataclass(frozen=True)
class Split(torch.utils.data.Dataset):
    """Samples in memory: inputs by name, each of shape (samples, ...), and labels, shape (samples,)."""

    inputs: Mapping[str, Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = {name: values[index] for name, values in self.inputs.items()}
        if "attention_mask" in sample:
            sample = {name: values[: sample["attention_mask"].sum()] for name, values in sample.items()}
        return {**sample, "labels": self.labels[index]}

    def rows(self, chosen: Tensor) -> "Split":
        """Some of the samples, by index or by a boolean mask."""
        inputs = {name: values[chosen] for name, values in self.inputs.items()}
        return replace(self, inputs=inputs, labels=self.labels[chosen])

    def batches(self, size: int = 250) -> Iterator[dict[str, Tensor]]:
        """All samples in order, padded to the longest of a batch."""
        for indices in torch.arange(len(self)).split(size):
            own = self.rows(indices)
            end = int(own.inputs["attention_mask"].sum(-1).max()) if "attention_mask" in own.inputs else None
            yield {**{k: v[:, :end] if v.ndim == 2 else v for k, v in own.inputs.items()}, "labels": own.labels}

    def part(self, labels: Sequence[int]) -> "Split":
        """The samples of some labels; their labels become positions in `labels`."""
        own = self.rows(torch.isin(self.labels, torch.tensor(labels)))
        places = torch.full((max(labels) + 1,), -1).index_put((torch.tensor(labels),), torch.arange(len(labels)))
        return replace(own, labels=places[own.labels])


@dataclass(frozen=True)
class Images(Split):
    """Images in memory as bytes; models read them between -1 and 1, in their own size, and shifted and flipped."""

    size: int = 32
    is_augmented: bool = False

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A whole batch, which `DataLoader` asks for at once."""
        chosen = torch.as_tensor(indices)
        pixels = self.inputs["pixel_values"][chosen]
        if self.is_augmented:
            pixels = augmented(pixels, torch.rand(len(chosen), 5), hole=0)
        return {"pixel_values": as_input(pixels, self.size), "labels": self.labels[chosen]}

    def batches(self, size: int = 250) -> Iterator[dict[str, Tensor]]:
        """All images in order, without augmentation."""
        own = replace(self, is_augmented=False)
        return map(own.__getitems__, torch.arange(len(self)).split(size))


def collate(samples: Sequence[Mapping[str, Tensor]] | dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch of samples, or one that is a batch already; texts are padded with zeros."""
    if isinstance(samples, dict):
        return samples
    inputs = {name: [sample[name] for sample in samples] for name in samples[0]}
    return {
        name: torch.stack(values) if name in ("labels", "pixel_values") else pad_sequence(values, batch_first=True)
        for name, values in inputs.items()
    }


@dataclass(frozen=True)
class Task:
    """What all methods are measured on."""

    text: str  # data and model, for the tables
    splits: Callable[[int], Sequence[Split]]  # from a seed to training (perhaps augmented), validation and test data
    trainer: Callable[..., Trainer]  # from trainer class, training and validation data, seed, epochs and options
    epochs: int  # of each training
    sets: Mapping[str, Sequence[tuple[int, ...]]]  # sets of label groups by kind; a module is measured for each set
    batch: int  # when a module is trained
    rate: float  # when a module is trained from scratch; fine-tuning takes a third
    groups: Mapping[str, Sequence[int]]  # label ids by name of the group
    methods: Mapping[str, dict | None] = field(default_factory=lambda: METHODS)
    strangers: Callable[[], Split] | None = None  # inputs that have no label
    auto_class: type = AutoModelForImageClassification  # reads saved models


def drawn_sets(groups: int, size: int, count: int, first: Sequence[tuple[int, ...]] = ()) -> list[tuple[int, ...]]:
    """Different sets of groups, always the same: the first ones given, the others drawn."""
    draw = random.Random(size)  # noqa: S311 - not for cryptography
    chosen = list(first)
    while len(chosen) < count:
        if (drawn := tuple(sorted(draw.sample(range(groups), size)))) not in chosen:
            chosen.append(drawn)
    return chosen


def digits_splits(seed: int) -> tuple[Split, Split, Split]:
    """1,150 training, 287 validation and 360 test images; the split depends on the seed."""
    processor = ViTImageProcessorPil(do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    known, test, _ = load_digits_split(processor, seed)
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))
    whole = Split({"pixel_values": known.pixel_values}, torch.tensor(known.labels))
    train, validation = whole.rows(order[len(order) // 5 :]), whole.rows(order[: len(order) // 5])
    return train, validation, Split({"pixel_values": test.pixel_values}, torch.tensor(test.labels))


def digits() -> Task:
    """The task of `nemo-hf demo`."""
    return Task(
        text="scikit-learn's digits, ViT of 64 x 4 from scratch; 1,150 images train, 287 choose, 360 test",
        splits=digits_splits,
        trainer=lambda *arguments, folder=None, **options: digits_trainer(*arguments, **options),
        epochs=60,
        sets={
            "singles": [(label,) for label in range(10)],
            "pairs": drawn_sets(10, 2, 10, MODULES[:1]),
            "fives": drawn_sets(10, 5, 10, MODULES[2:3]),
        },
        batch=64,
        rate=1e-3,
        groups={str(label): [label] for label in range(10)},
    )


class CountedSeconds(TrainerCallback):
    """Keeps the process's seconds of each epoch in the state, which checkpoints hold: evaluation is not in them."""

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        """Starts the clock."""
        self._start = time.process_time()

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        """Stores its time."""
        state.log_history.append({"step": state.global_step, "cpu_seconds": time.process_time() - self._start})


def build_trainer(
    build: Callable[[], PreTrainedModel], arguments: Mapping[str, object], kind: type[Trainer],
    train: Split, validation: Split, seed: int, epochs: int, folder: Path | None = None,
    model: PreTrainedModel | None = None, **options,
) -> Trainer:  # fmt: skip
    """A trainer of the model that `build` makes, with a checkpoint in `folder` after each epoch, if there is one.

    Exact relevance is counted without augmentation.
    """
    set_seed(seed)
    each = "no" if folder is None else "epoch"
    own = {"output_dir": str(folder or tempfile.gettempdir()), "save_total_limit": 1, "report_to": []}
    own |= {"save_strategy": each, "logging_strategy": each, "eval_strategy": each}
    args = TrainingArguments(**own, **arguments, num_train_epochs=epochs, seed=seed, disable_tqdm=True, use_cpu=True)
    if "nemo_config" in options and isinstance(train, Images):
        options["relevance_dataset"] = replace(train, is_augmented=False)
    return kind(model or build(), args, collate, train, validation, compute_metrics=accuracy, **options)


def label_names(names: Sequence[str]) -> dict[str, dict]:
    """The label options of a model's configuration."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def clinc150(data: str, model: str, count: int | None = None) -> Task:
    """CLINC150 and a pretrained MiniLM, or a number of training queries that the seed draws; a group is a domain."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    folder = Path(data)
    files = {path.name.split("-")[0]: str(path) for path in folder.glob("*-00000-of-00001.parquet")}
    loaded = load_dataset("parquet", data_files=files)
    intents, domains = (loaded["train"].features[name].names for name in ("intent", "domain"))
    domain_of = dict(zip(loaded["train"]["intent"], loaded["train"]["domain"], strict=True))

    def split(part, labels: Sequence[int]) -> Split:
        encoded = tokenizer(list(part["text"]), padding=True, truncation=True, return_tensors="pt")
        by_length = encoded["attention_mask"].sum(-1).argsort(stable=True)  # so that batches have little padding
        return Split(dict(encoded), torch.tensor(labels)).rows(by_length)

    def strangers() -> Split:
        part = load_dataset("parquet", data_files=str(folder / "oos-test.parquet"))["train"]
        return split(part, [-1] * len(part))

    train, *others = (split(loaded[name], list(loaded[name]["intent"])) for name in ("train", "validation", "test"))

    def splits(seed: int) -> tuple[Split, ...]:
        drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:count]
        return train.rows(drawn.sort().values), *others

    load = AutoModelForSequenceClassification.from_pretrained
    build = partial(load, model, ignore_mismatched_sizes=True, **label_names(intents))
    arguments = {"per_device_train_batch_size": 32, "per_device_eval_batch_size": 128, "learning_rate": 2e-4,
                 "lr_scheduler_type": "cosine", "train_sampling_strategy": "group_by_length"}  # fmt: skip
    return Task(
        text=f"CLINC150, all-MiniLM-L6-v2 pretrained; {count or len(train):,} queries train, 3,000 choose, 4,500 test",
        splits=splits,
        trainer=partial(build_trainer, build, arguments),
        epochs=8 if count else 10,
        sets={
            "singles": [(group,) for group in range(10)],
            "pairs": drawn_sets(10, 2, 5),
            "fours": drawn_sets(10, 4, 5),
        },
        batch=32,
        rate=2e-4,
        groups={name: [i for i in domain_of if domain_of[i] == group] for group, name in enumerate(domains)},
        strangers=strangers,
        auto_class=AutoModelForSequenceClassification,
    )


RATES = {"vgg16": 3e-3, "resnet18": 3e-3, "simcnn": 3e-3, "rescnn": 3e-3, "vit": 1e-3}
"""Largest learning rate of the models from scratch, chosen on validation data after three epochs."""


def images(data: str, name: str, size: int = 32) -> list[Images]:
    """Training and test images of a data set of `image_sources.py`."""
    parts = (IMAGES[name][0](Path(data), split) for split in ("train", "test"))
    return [Images({"pixel_values": pixels}, labels, size) for pixels, labels in parts]


def image_task(data: str, name: str, model: str, epochs: int = 20) -> Task:
    """One of the models of `image_sources.py` from scratch on all training images of a data set but 5,000."""
    names = IMAGES[name][1]
    known, test = images(data, name)
    train, validation = (known.rows(part) for part in (slice(-VALIDATION), slice(-VALIDATION, None)))
    arguments = {"per_device_train_batch_size": 256, "per_device_eval_batch_size": 500, "learning_rate": RATES[model],
                 "lr_scheduler_type": "cosine", "warmup_steps": 0.2, "weight_decay": 0.05, "bf16": True,
                 "label_smoothing_factor": 0.1, "remove_unused_columns": False}  # fmt: skip
    return Task(
        text=f"{name}, {model} from scratch; {len(train):,} images train, {VALIDATION:,} choose, {len(test):,} test",
        splits=lambda seed: (replace(train, is_augmented=True), validation, test),
        trainer=partial(build_trainer, partial(RECIPES[model].build, label_names(names), None), arguments),
        epochs=epochs,
        sets={"singles": [(label,) for label in range(10)], "pairs": PAIRS[name], "fives": drawn_sets(10, 5, 3)},
        batch=256,
        rate=RATES[model],
        groups={label: [index] for index, label in enumerate(names)},
        methods=METHODS if model == "vit" else CNN_METHODS,
    )


TASKS: dict[str, Callable[[str, str], Task]] = {
    "digits": lambda data, model: digits(),
    "clinc150": clinc150,
    "clinc150-2000": partial(clinc150, count=2000),
    **{f"cifar10-{name}": lambda data, model, name=name: image_task(data, "cifar10", name) for name in RATES},
}
"""Tasks by name, from the folder of the data and the name of a pretrained model."""
