"""The data, models and sets of labels that `quality.py` measures methods on: digits, CLINC150, CIFAR-10."""

import io
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
from datasets import Image, load_dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from nemo_hf.cli.demo import MODULES, digits_trainer, load_digits_split

sys.path.append(str(Path(__file__).parents[1] / "paper"))
from models import PaperCNNConfig, PaperCNNForImageClassification
from objectives import MODA, MWT, NEMO, NEMO_AUTHORS
from objectives import PAPER as PAPER  # for quality.py, which finds that folder through here


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
        """Some of the samples, by index or as a boolean."""
        inputs = {name: values[chosen] for name, values in self.inputs.items()}
        return replace(self, inputs=inputs, labels=self.labels[chosen])

    def batches(self, size: int = 250) -> Iterator[dict[str, Tensor]]:
        """All samples in order, as they are."""
        for indices in torch.arange(len(self)).split(size):
            own = self.rows(indices)
            yield {**trimmed(own.inputs), "labels": own.labels}

    def part(self, labels: Sequence[int]) -> "Split":
        """The samples of some labels, and their labels by position in `labels`."""
        own = self.rows(torch.isin(self.labels, torch.tensor(labels)))
        places = torch.full((max(labels) + 1,), -1).index_put((torch.tensor(labels),), torch.arange(len(labels)))
        return replace(own, labels=places[own.labels])


def shifted(pixels: Tensor, room: int = 4) -> Tensor:
    """A random shift by up to `room` pixels and a flip of one image, (channels, height, width)."""
    size = pixels.shape[-1]
    padded = torch.nn.functional.pad(pixels, (room,) * 4, mode="reflect")
    top, left, flips = torch.randint(0, 2 * room + 1, (3,)).tolist()
    pixels = padded[:, top : top + size, left : left + size]
    return pixels.flip(-1) if flips % 2 else pixels


def collate(samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Stacks samples; texts are padded with zeros to the longest of them."""
    inputs = {name: [sample[name] for sample in samples] for name in samples[0]}
    return {
        name: torch.stack(values) if name in ("labels", "pixel_values") else pad_sequence(values, batch_first=True)
        for name, values in inputs.items()
    }


def trimmed(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cuts padded texts to the longest of a batch."""
    if "attention_mask" not in batch:
        return dict(batch)
    longest = int(batch["attention_mask"].sum(-1).max())
    return {name: values[:, :longest] if values.ndim == 2 else values for name, values in batch.items()}


@dataclass(frozen=True)
class Task:
    """What a method is measured on.

    Args:
        text: What the data and the model are, for the table.
        splits: From a seed to training data (with augmentation), validation data and test data.
        trainer: From a kind of trainer, training and validation data, seed, epochs and options to a trainer.
        epochs: Epochs of each training.
        sets: Sets of groups by kind, which modules are cut for.
        modules: Sets of groups whose modules are also fine-tuned, trained anew, and pruned, with seed 0.
        batch: Samples a batch of training a set alone. `rate`: its learning rate; fine-tuning takes a third.
        groups: Name of each group and its labels.
        options: Options of `NeMoConfig` that are the task's own, in all rows.
        strangers: Inputs of no label, or `None`.
        draws: Number of masks of the random control.
        own_rows: Rows by name and their options, in place of those of `quality.ROWS` and beside them.
    """

    text: str
    splits: Callable[[int], tuple[Split, Split, Split]]
    trainer: Callable[..., Trainer]
    epochs: int
    sets: Mapping[str, Sequence[tuple[int, ...]]]
    modules: Sequence[tuple[int, ...]]
    batch: int
    rate: float
    groups: Mapping[str, Sequence[int]]
    options: Mapping[str, object] = field(default_factory=dict)
    strangers: Callable[[], Split] | None = None
    draws: int = 5
    own_rows: Mapping[str, dict] = field(default_factory=dict)


def drawn_sets(groups: int, size: int, count: int, first: Sequence[tuple[int, ...]] = ()) -> list[tuple[int, ...]]:
    """Fixed sets of groups: the first ones given, then drawn ones, all different."""
    draw = random.Random(size)  # noqa: S311 - not for cryptography
    chosen = list(first)
    while len(chosen) < count:
        if (drawn := tuple(sorted(draw.sample(range(groups), size)))) not in chosen:
            chosen.append(drawn)
    return chosen


def digits_splits(seed: int) -> tuple[Split, Split, Split]:
    """1,150 images to train, 287 to choose on, 360 to test; the split goes with the seed."""
    processor = ViTImageProcessorPil(do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    known, test, _ = load_digits_split(processor, seed)
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))
    whole = Split({"pixel_values": known.pixel_values}, torch.tensor(known.labels))
    train, validation = whole.rows(order[len(order) // 5 :]), whole.rows(order[: len(order) // 5])
    return train, validation, Split({"pixel_values": test.pixel_values}, torch.tensor(test.labels))


def digits() -> Task:
    """The demo's task."""
    sets = {
        "singles": [(label,) for label in range(10)],
        "pairs": list(itertools.combinations(range(10), 2)),
        "triples": drawn_sets(10, 3, 10, MODULES[1:2]),
        "fives": drawn_sets(10, 5, 10, MODULES[2:3]),
    }
    return Task(
        text="scikit-learn's digits, ViT of 64 x 4 from scratch; 1,150 images train, 287 choose, 360 test",
        splits=digits_splits,
        trainer=digits_trainer,
        epochs=60,
        options={"contrastive_weight": 0.4, "rehearsal_probability": 0.3, "retention_target": 0.1},
        sets=sets,
        modules=MODULES,
        batch=64,
        rate=1e-3,
        groups={str(label): [label] for label in range(10)},
    )


def trainer_of(
    model: Callable[[], torch.nn.Module], arguments: Mapping[str, object],
    kind: type[Trainer], train: Split, validation: Split, seed: int, epochs: int, **options,
) -> Trainer:  # fmt: skip
    """A trainer with one's own model and arguments; the exact relevance is counted without augmentation."""
    set_seed(seed)
    own = {"output_dir": tempfile.gettempdir(), "save_strategy": "no", "logging_strategy": "no", "report_to": []}
    args = TrainingArguments(**own, **arguments, num_train_epochs=epochs, seed=seed, disable_tqdm=True, use_cpu=True)
    if "nemo_config" in options:
        options["relevance_dataset"] = replace(train, is_augmented=False)
    return kind(model(), args, collate, train, validation, **options)


def clinc150(data: str, model: str) -> Task:
    """All 15,000 training queries of CLINC150 and a pretrained MiniLM; a group is a domain of 15 intents."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    folder = Path(data)
    files = {path.name.split("-")[0]: str(path) for path in folder.glob("*-00000-of-00001.parquet")}
    loaded = load_dataset("parquet", data_files=files)
    intents, domains = (loaded["train"].features[name].names for name in ("intent", "domain"))
    owner = dict(zip(loaded["train"]["intent"], loaded["train"]["domain"], strict=True))

    def split(part, labels: Sequence[int]) -> Split:
        encoded = tokenizer(list(part["text"]), padding=True, truncation=True, return_tensors="pt")
        by_length = encoded["attention_mask"].sum(-1).argsort(stable=True)  # so that batches have little padding
        return Split(dict(encoded), torch.tensor(labels)).rows(by_length)

    def strangers() -> Split:
        part = load_dataset("parquet", data_files=str(folder / "oos-test.parquet"))["train"]
        return split(part, [-1] * len(part))

    parts = tuple(split(loaded[name], list(loaded[name]["intent"])) for name in ("train", "validation", "test"))
    labels = {"id2label": dict(enumerate(intents)), "label2id": {name: i for i, name in enumerate(intents)}}
    build = partial(AutoModelForSequenceClassification.from_pretrained, model, ignore_mismatched_sizes=True, **labels)
    arguments = {"per_device_train_batch_size": 32, "per_device_eval_batch_size": 128, "learning_rate": 2e-4,
                 "lr_scheduler_type": "cosine", "train_sampling_strategy": "group_by_length"}  # fmt: skip
    return Task(
        text="CLINC150, all-MiniLM-L6-v2 pretrained; 15,000 queries train, 3,000 choose, 4,500 test; by domain",
        splits=lambda seed: parts,
        trainer=partial(trainer_of, build, arguments),
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
        groups={name: [i for i in owner if owner[i] == group] for group, name in enumerate(domains)},
        strangers=strangers,
        draws=2,
    )


def cifar10_splits(data: str) -> tuple[tuple[Split, Split, Split], list[str]]:
    """10,000 training images of CIFAR-10, shifted and flipped, 1,000 to choose on, 2,000 to test, and the labels."""
    loaded = load_dataset("parquet", data_files={
        name: [str(path) for path in sorted(Path(data).glob(f"{name}-*.parquet"))] for name in ("train", "test")
    })  # fmt: skip
    names = loaded["train"].features["label"].names

    def split(name: str, start: int, count: int, is_augmented: bool = False) -> Split:
        part = loaded[name].shuffle(seed=0).select(range(start, start + count)).cast_column("img", Image(decode=False))
        from PIL import Image as Picture

        images = np.stack([np.asarray(Picture.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in part["img"]])
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        return Split({"pixel_values": pixels}, torch.tensor(part["label"]), is_augmented)

    return (split("train", 0, 10000, True), split("train", 10000, 1000), split("test", 0, 2000)), names


def cifar10_task(data: str, text: str, build: Callable[..., torch.nn.Module], epochs: int, **options) -> Task:
    """A model of one's own, which `build` makes of label names, on part of CIFAR-10."""
    parts, names = cifar10_splits(data)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    arguments = {"per_device_train_batch_size": 64, "per_device_eval_batch_size": 250, "learning_rate": 1e-3,
                 "lr_scheduler_type": "cosine", "warmup_steps": 0.1}  # fmt: skip
    return Task(
        text=f"CIFAR-10, {text} from scratch; 10,000 images train, 1,000 choose, 2,000 test",
        splits=lambda seed: parts,
        trainer=partial(trainer_of, partial(build, **labels), arguments),
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
        draws=2,
        **options,
    )


def cifar10(data: str) -> Task:
    """A ViT of 192 x 6."""

    def build(**labels) -> torch.nn.Module:
        return ViTForImageClassification(ViTConfig(
            image_size=32, patch_size=4, hidden_size=192, num_hidden_layers=6, num_attention_heads=6,
            intermediate_size=768, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **labels,
        ))  # fmt: skip

    return cifar10_task(data, "ViT of 192 x 6", build, 6)


def cifar10_small(data: str) -> Task:
    """A ViT of 128 x 4 with large patches, for sweeps: two to three minutes a row."""

    def build(**labels) -> torch.nn.Module:
        return ViTForImageClassification(ViTConfig(
            image_size=32, patch_size=8, hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
            intermediate_size=512, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **labels,
        ))  # fmt: skip

    return cifar10_task(data, "ViT of 128 x 4 with patches of 8", build, 6)


def cifar10_cnn(data: str, architecture: str, width: int = 16) -> Task:
    """A narrow convolutional model of the NeMo paper, trained on images whose channels lie last in memory.

    Args:
        data: As in `cifar10`.
        architecture: One of `ARCHITECTURES` in examples/paper/models.py.
        width: Channels of the first stage, 64 in the paper.
    """

    def build(**labels) -> torch.nn.Module:
        config = PaperCNNConfig(architecture=architecture, width=width, **labels)
        return PaperCNNForImageClassification(config).to(memory_format=torch.channels_last)

    own_rows = {"mwt": MWT, "nemo": NEMO, "nemo-authors": NEMO_AUTHORS, "moda": MODA,
                "ours, half the weights": {"retention_target": 0.5}}  # fmt: skip
    text = f"{architecture} of {width} channels in the first stage"
    return cifar10_task(data, text, build, 10, own_rows=own_rows)
