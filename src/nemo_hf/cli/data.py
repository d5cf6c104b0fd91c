"""Loads a data set of images, texts or audio for the commands that train, measure or cut."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedConfig,
    default_data_collator,
)

from nemo_hf.config import closest

LABEL_COLUMN = "label"
TEXT_TYPES = ("string", "large_string")
FEATURES: dict[str, Callable[[Any], bool]] = {
    "image": lambda feature: isinstance(feature, datasets.Image),
    "text": lambda feature: getattr(feature, "dtype", None) in TEXT_TYPES,
    "audio": lambda feature: isinstance(feature, datasets.Audio),
}
"""How a column of samples of a kind is recognised."""


@dataclass(frozen=True)
class LoadedData:
    """Data sets ready for a trainer, with the image processor or tokenizer that prepares them."""

    task: str
    processor: Any
    splits: dict[str, Any]
    collator: Callable[[list[Any]], dict[str, Any]]
    names: list[str]  # of the labels, by id


def load_data(
    source: str,
    model: str,
    splits: Sequence[str],
    label_column: str = LABEL_COLUMN,
    input_column: str | None = None,
    keep: Sequence[str] = (),
    names: Sequence[str] | None = None,
    task: str | None = None,
    max_length: int | None = None,
) -> LoadedData:
    """Loads a Hub data set or local folder and prepares it for the model at `model`.

    Without `input_column` it takes the only column of images or texts; with `names` labels get ids in their order; with
    `task` it must be data for that. `max_length` truncates texts, and is the tokenizer's own from then on.
    """
    parts = _splits(source, splits, [label_column, input_column, *keep])
    first = next(iter(parts.values()))
    column = input_column or _input_column(first, (label_column, *keep))
    for split, part in parts.items():
        _check_samples(part, split, label_column, column)
    if names is None:
        feature = first.features[label_column]
        named = feature.names if isinstance(feature, datasets.ClassLabel) else sorted(set(first.unique(label_column)))
        names = [str(name) for name in named]
    is_image = isinstance(first.features[column], datasets.Image)
    found = "image-classification" if is_image else "text-classification"
    if task not in (None, found):
        raise ValueError(
            f"Got the column {column!r} for {found} and a model for {task}; expected data of the same kind. Name "
            "another data set or --input-column."
        )
    processor = (AutoImageProcessor if is_image else AutoTokenizer).from_pretrained(model)
    if max_length is not None:
        _limit_length(processor, AutoConfig.from_pretrained(model), max_length, is_image)

    def images(batch: Mapping[str, Any]) -> dict[str, Any]:
        pixels = processor(images=[image.convert("RGB") for image in batch[column]], return_tensors="pt")
        return {"pixel_values": pixels["pixel_values"], "labels": batch["labels"]}

    def texts(batch: Mapping[str, Any]) -> Any:
        return processor(batch[column], truncation=True)

    for split, part in parts.items():
        part = _with_label_ids(part, label_column, names).select_columns([column, "labels", *keep])
        parts[split] = part.with_transform(images) if is_image else part.map(texts, batched=True, remove_columns=column)
    collator = default_data_collator if is_image else DataCollatorWithPadding(processor)
    return LoadedData(found, processor, parts, collator, list(names))


def _limit_length(processor: Any, config: PreTrainedConfig, max_length: int, is_image: bool) -> None:
    """Makes a number of tokens the most that a tokenizer returns."""
    if is_image:
        raise ValueError(f"Got --max-length {max_length} with images; expected texts. Leave it out.")
    most = min(processor.model_max_length, getattr(config, "max_position_embeddings", max_length))
    if max_length > most:
        raise ValueError(
            f"Got --max-length {max_length}; expected at most {most} tokens, which is what the model takes. Lower it."
        )
    processor.model_max_length = max_length


def spread_samples(dataset: Any, most: int | None, first: Sequence[int] = ()) -> Any:
    """At most so many samples of a data set with `labels`, as evenly of all labels as there are; `None`: all.

    Those of the labels `first` come first, and a quarter is of others, as far as there are so many.
    """
    if most is None or most >= len(dataset):
        return dataset
    seen: Counter[int] = Counter()
    ranked: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    for row, label in enumerate(dataset.with_format(None)["labels"]):
        ranked[label in first].append((seen[label], row))
        seen[label] += 1
    own, others = (sorted(ranked[is_first]) for is_first in (True, False))
    count = min(len(others), max(most - len(own), most // 4))
    return dataset.select(sorted(row for _, row in own[: most - count] + others[:count]))


def load_samples(
    source: str,
    split: str,
    kind: str,
    names: Sequence[str],
    label_column: str | None = None,
    input_column: str | None = None,
) -> Any:
    """Loads a split as raw samples of a kind (`"text"`, `"image"` or `"audio"`) for a model whose labels are `names`.

    The result has the column of inputs and, if the data have labels, `labels`, the model's ids. Without `label_column`
    that of the usual name is taken, if there is one.
    """
    dataset = _splits(source, [split], [label_column, input_column])[split]
    label = label_column or (LABEL_COLUMN if LABEL_COLUMN in dataset.column_names else None)
    column = input_column or _input_column(dataset, (label,), [kind])
    if label is None:
        return dataset.select_columns([column])
    _check_samples(dataset, split, label, column)
    return _with_label_ids(dataset, label, names).select_columns([column, "labels"])


def _splits(source: str, splits: Sequence[str], columns: Sequence[str | None]) -> dict[str, Any]:
    """Splits of a data set, which have the columns that are named."""
    loaded = datasets.load_dataset(source)
    if missing := [split for split in splits if split not in loaded]:
        raise ValueError(f"Got the split {missing[0]!r} of {source!r}; expected one of {sorted(loaded)}.")
    parts = {split: loaded[split] for split in dict.fromkeys(splits)}
    known = next(iter(parts.values())).column_names
    for column in columns:
        if column is not None and column not in known:
            raise ValueError(f"Got no column {column!r} in {source!r}; expected one of {known}. Name one.")
    return parts


def _check_samples(dataset: Any, split: str, label_column: str, column: str) -> None:
    """Refuses samples without a label or an input, and labels that are neither names nor ids, such as lists."""
    for name in (label_column, column):
        if empty := dataset.data.column(name).null_count:
            got = f"Got {empty} samples of the split {split!r} without a value in the column {name!r}"
            raise ValueError(f"{got}; expected one in each. Remove these samples, or name another column.")
    feature = dataset.features[label_column]
    kind = getattr(feature, "dtype", type(feature).__name__)
    if "int" not in kind and kind not in ("string", "large_string", "bool"):
        raise ValueError(
            f"Got labels of type {kind} in the column {label_column!r} of the split {split!r}; expected a name or an "
            "id for each sample. Name another column with --label-column."
        )


def _with_label_ids(dataset: Any, column: str, names: Sequence[str]) -> Any:
    """Makes `labels` of ids of the given names: splits and models may number the same names differently."""
    feature = dataset.features[column]
    own = feature.names if isinstance(feature, datasets.ClassLabel) else None
    if own and list(names) == [f"LABEL_{index}" for index in range(len(own))]:
        own = list(names)  # a model without names of its labels: only their ids are known
    ids = {name: index for index, name in enumerate(names)}
    labels = [own[value] if own else str(value) for value in dataset[column]]
    if unknown := sorted(set(labels) - set(ids)):
        named = f"Got the labels {unknown[:12]} in the column {column!r}; expected some of {list(names)[:12]}."
        close = closest(unknown[0], names)
        mean = f"{unknown[0]!r} may be {close!r}. " if close else ""
        raise ValueError(f"{named} {mean}Remove these samples, or rename their labels.")
    renumbered = dataset.remove_columns(column).add_column("labels", [ids[label] for label in labels])
    return renumbered.cast_column("labels", datasets.ClassLabel(names=list(names)))


def _input_column(dataset: Any, others: Sequence[str | None], kinds: Sequence[str] = ("image", "text")) -> str:
    """The only column with samples of the first of some kinds that the data have."""
    features = {name: feature for name, feature in dataset.features.items() if name not in others}
    by_kind = [[name for name, feature in features.items() if FEATURES[kind](feature)] for kind in kinds]
    found = next(filter(None, by_kind), [])
    if len(found) != 1:
        what = {"image": "images", "text": "texts", "audio": "audio"}
        wanted = " or ".join(what[kind] for kind in kinds)
        raise ValueError(f"Got the columns {found} of {wanted}; expected one. Name it with --input-column.")
    return str(found[0])
