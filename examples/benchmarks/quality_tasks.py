"""Data sets, models and label sets of `quality.py`: digits, CLINC150 and CIFAR-10."""

import itertools
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from nemo_hf import NeMoForImageClassification, NeMoForSequenceClassification
from nemo_hf.cli.demo import MODULES, digits_trainer, load_digits_split

sys.path.append(str(Path(__file__).parents[1] / "paper"))
from models import PaperCNNConfig, PaperCNNForImageClassification
from objectives import MODA, MWT, NEMO, NEMO_AUTHORS, PAPER

METHODS: dict[str, dict | None] = {
    "plain": None,
    "mwt": {**PAPER, "objective": "cohesion-coupling"},
    "nemo": PAPER,
    "nemo-authors": {**PAPER, "objective": "contrastive-authors"},
    "ours": {},
    "ours, no contrast": {"contrastive_weight": 0.0},
    "ours, no sparsity": {"sparsity_weight": 0.0, "retention_target": None},
    "ours, soft masks": {"hard_masks": False},
    "ours, no rehearsal": {"rehearsal_probability": 0.0},
    "ours, less contrast": {"contrastive_weight": 0.2},
    "ours, specific": {"specificity_weight": 0.2, "contrastive_weight": 0.5, "rehearsal_probability": 0.5},
}
"""Options of `NeMoConfig` by method; `None` trains without masks."""


@dataclass(frozen=True)
class Split(torch.utils.data.Dataset):
    """Samples in memory: inputs by name, each of shape (samples, ...), and labels, shape (samples,)."""

    inputs: Mapping[str, Tensor]
    labels: Tensor
    is_augmented: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = {name: values[index] for name, values in self.inputs.items()}
        if "attention_mask" in sample:
            sample = {name: values[: sample["attention_mask"].sum()] for name, values in sample.items()}
        if self.is_augmented:
            sample["pixel_values"] = shifted(sample["pixel_values"])
        return {**sample, "labels": self.labels[index]}

    def rows(self, chosen: Tensor) -> "Split":
        """Some of the samples, by index or by a boolean mask."""
        inputs = {name: values[chosen] for name, values in self.inputs.items()}
        return replace(self, inputs=inputs, labels=self.labels[chosen])

    def batches(self, size: int = 250) -> Iterator[dict[str, Tensor]]:
        """All samples in order, without augmentation, padded to the longest of a batch."""
        for indices in torch.arange(len(self)).split(size):
            own = self.rows(indices)
            end = int(own.inputs["attention_mask"].sum(-1).max()) if "attention_mask" in own.inputs else None
            yield {**{k: v[:, :end] if v.ndim == 2 else v for k, v in own.inputs.items()}, "labels": own.labels}

    def part(self, labels: Sequence[int]) -> "Split":
        """The samples of some labels; their labels become positions in `labels`."""
        own = self.rows(torch.isin(self.labels, torch.tensor(labels)))
        places = torch.full((max(labels) + 1,), -1).index_put((torch.tensor(labels),), torch.arange(len(labels)))
        return replace(own, labels=places[own.labels])


def shifted(pixels: Tensor, margin: int = 4) -> Tensor:
    """One image (channels, height, width), shifted by up to `margin` pixels and perhaps mirrored."""
    size = pixels.shape[-1]
    padded = torch.nn.functional.pad(pixels, (margin,) * 4, mode="reflect")
    top, left, flips = torch.randint(0, 2 * margin + 1, (3,)).tolist()
    pixels = padded[:, top : top + size, left : left + size]
    return pixels.flip(-1) if flips % 2 else pixels


def collate(samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of samples; texts are padded with zeros."""
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
    modules: Sequence[tuple[int, ...]]  # sets whose modules are cut, tuned and compared at the same size, with seed 0
    batch: int  # when a module is trained
    rate: float  # when a module is trained from scratch; fine-tuning takes a third
    groups: Mapping[str, Sequence[int]]  # label ids by name of the group
    options: Mapping[str, object] = field(default_factory=dict)  # of `NeMoConfig`, for all methods
    strangers: Callable[[], Split] | None = None  # inputs that have no label
    draws: int = 2  # masks of the random control
    methods: Mapping[str, dict] = field(default_factory=dict)  # in addition to `METHODS`, or in place of them
    model_class: type = NeMoForImageClassification  # reads saved parents


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
        trainer=digits_trainer,
        epochs=60,
        options={"contrastive_weight": 0.4, "rehearsal_probability": 0.3, "retention_target": 0.1},
        sets={
            "singles": [(label,) for label in range(10)],
            "pairs": list(itertools.combinations(range(10), 2)),
            "triples": drawn_sets(10, 3, 10, MODULES[1:2]),
            "fives": drawn_sets(10, 5, 10, MODULES[2:3]),
        },
        modules=MODULES,
        batch=64,
        rate=1e-3,
        groups={str(label): [label] for label in range(10)},
        draws=5,
    )


def build_trainer(
    build: Callable[[], PreTrainedModel], arguments: Mapping[str, object],
    kind: type[Trainer], train: Split, validation: Split, seed: int, epochs: int, **options,
) -> Trainer:  # fmt: skip
    """A trainer of the model that `build` makes; exact relevance is counted without augmentation."""
    set_seed(seed)
    own = {"output_dir": tempfile.gettempdir(), "save_strategy": "no", "logging_strategy": "no", "report_to": []}
    args = TrainingArguments(**own, **arguments, num_train_epochs=epochs, seed=seed, disable_tqdm=True, use_cpu=True)
    if "nemo_config" in options:
        options["relevance_dataset"] = replace(train, is_augmented=False)
    return kind(build(), args, collate, train, validation, **options)


def label_names(names: Sequence[str]) -> dict[str, dict]:
    """The label options of a model's configuration."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def clinc150(data: str, model: str) -> Task:
    """All 15,000 training queries of CLINC150 and a pretrained MiniLM; a group is a domain of 15 intents."""
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

    parts = tuple(split(loaded[name], list(loaded[name]["intent"])) for name in ("train", "validation", "test"))
    load = AutoModelForSequenceClassification.from_pretrained
    build = partial(load, model, ignore_mismatched_sizes=True, **label_names(intents))
    arguments = {"per_device_train_batch_size": 32, "per_device_eval_batch_size": 128, "learning_rate": 2e-4,
                 "lr_scheduler_type": "cosine", "train_sampling_strategy": "group_by_length"}  # fmt: skip
    return Task(
        text="CLINC150, all-MiniLM-L6-v2 pretrained; 15,000 queries train, 3,000 choose, 4,500 test; by domain",
        splits=lambda seed: parts,
        trainer=partial(build_trainer, build, arguments),
        options={"contrastive_weight": 0.1, "rehearsal_probability": 0.5, "retention_target": 0.2},
        epochs=10,
        sets={
            "singles": [(group,) for group in range(10)],
            "pairs": drawn_sets(10, 2, 5),
            "fours": drawn_sets(10, 4, 5),
        },
        modules=[(0,)],
        batch=32,
        rate=2e-4,
        groups={name: [i for i in domain_of if domain_of[i] == group] for group, name in enumerate(domains)},
        strangers=strangers,
        model_class=NeMoForSequenceClassification,
    )


def cifar10_splits(data: str) -> tuple[tuple[Split, Split, Split], list[str]]:
    """10,000 augmented training images of CIFAR-10, 1,000 validation and 2,000 test images, and the label names."""
    files = {name: [str(path) for path in sorted(Path(data).glob(f"{name}-*.parquet"))] for name in ("train", "test")}
    loaded = load_dataset("parquet", data_files=files)

    def split(name: str, start: int, count: int, is_augmented: bool = False) -> Split:
        part = loaded[name].shuffle(seed=0).select(range(start, start + count))
        images = np.stack([np.asarray(image.convert("RGB")) for image in part["img"]])
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        return Split({"pixel_values": pixels}, torch.tensor(part["label"]), is_augmented)

    names = loaded["train"].features["label"].names
    return (split("train", 0, 10000, True), split("train", 10000, 1000), split("test", 0, 2000)), names


def cifar10_task(data: str, text: str, build: Callable[..., PreTrainedModel], epochs: int, **options) -> Task:
    """A model on part of CIFAR-10; `build` makes it from the label options of its configuration."""
    parts, names = cifar10_splits(data)
    arguments = {"per_device_train_batch_size": 64, "per_device_eval_batch_size": 250, "learning_rate": 1e-3,
                 "lr_scheduler_type": "cosine", "warmup_steps": 0.1}  # fmt: skip
    return Task(
        text=f"CIFAR-10, {text} from scratch; 10,000 images train, 1,000 choose, 2,000 test",
        splits=lambda seed: parts,
        trainer=partial(build_trainer, partial(build, **label_names(names)), arguments),
        epochs=epochs,
        sets={
            "singles": [(label,) for label in range(10)],
            "pairs": [(3, 5), (0, 8), (1, 9), (2, 4), (6, 7)],
            "triples": drawn_sets(10, 3, 3),
            "fives": drawn_sets(10, 5, 3),
        },
        modules=[(3, 5)],
        batch=64,
        rate=1e-3,
        groups={name: [index] for index, name in enumerate(names)},
        **options,
    )


def cifar10_vit(data: str) -> Task:
    """A ViT of 192 x 6."""

    def build(**labels) -> PreTrainedModel:
        return ViTForImageClassification(ViTConfig(
            image_size=32, patch_size=4, hidden_size=192, num_hidden_layers=6, num_attention_heads=6,
            intermediate_size=768, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **labels,
        ))  # fmt: skip

    return cifar10_task(data, "ViT of 192 x 6", build, 6)


def cifar10_cnn(data: str, architecture: str, width: int = 16) -> Task:
    """A convolutional model of examples/paper with `width` channels in its first stage (64 in the paper)."""

    def build(**labels) -> PreTrainedModel:
        config = PaperCNNConfig(architecture=architecture, width=width, **labels)
        return PaperCNNForImageClassification(config).to(memory_format=torch.channels_last)

    methods = {"mwt": MWT, "nemo": NEMO, "nemo-authors": NEMO_AUTHORS, "moda": MODA,
               "ours, half the weights": {"retention_target": 0.5}}  # fmt: skip
    return cifar10_task(data, f"{architecture} of {width} channels in the first stage", build, 10, methods=methods)


TASKS: dict[str, Callable[[str, str], Task]] = {
    "digits": lambda data, model: digits(),
    "clinc150": clinc150,
    "cifar10": lambda data, model: cifar10_vit(data),
    "cifar10-resnet18": lambda data, model: cifar10_cnn(data, "resnet18"),
    "cifar10-vgg16": lambda data, model: cifar10_cnn(data, "vgg16"),
}
"""Tasks by name, from the folder of the data and the name of a pretrained model."""
