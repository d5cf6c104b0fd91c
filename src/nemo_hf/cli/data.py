"""Data sets as the command line reads them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from transformers import AutoImageProcessor, AutoTokenizer, DataCollatorWithPadding, default_data_collator


@dataclass(frozen=True)
class LoadedData:
    """Data sets ready for a trainer.

    Args:
        task: `"image-classification"` or `"text-classification"`.
        processor: Image processor or tokenizer.
        splits: Split name to data with model inputs and `labels`.
        collator: Makes batches of samples.
        names: Label names by id.
    """

    task: str
    processor: Any
    splits: dict[str, Any]
    collator: Callable[[list[Any]], dict[str, Any]]
    names: list[str]

    def label_options(self) -> dict[str, Any]:
        """Returns `id2label` and `label2id` for a model's `from_pretrained`."""
        return {"id2label": dict(enumerate(self.names)), "label2id": {name: i for i, name in enumerate(self.names)}}


def load_data(
    source: str,
    model: str,
    splits: Sequence[str],
    label_column: str = "label",
    input_column: str | None = None,
    keep: Sequence[str] = (),
    names: Sequence[str] | None = None,
) -> LoadedData:
    """Loads a classification data set of images or texts and prepares it for a model.

    Args:
        source: Hub data set or local folder, as `datasets.load_dataset` takes it.
        model: Model whose image processor or tokenizer prepares the inputs.
        splits: Splits to load.
        label_column: Column of the labels: class labels, strings or integers.
        input_column: Column of the images or texts; `None` finds the only one.
        keep: Further columns to keep, such as one of groups.
        names: Label names by id that the labels are mapped to by name, such as those of a trained model;
            `None` takes the names of the first split.

    Returns:
        The data.

    Raises:
        ValueError: If a split or column is missing, or there is no single column of images or texts.
    """
    loaded = datasets.load_dataset(source)
    missing = [split for split in splits if split not in loaded]
    if missing:
        raise ValueError(f"Got the split {missing[0]!r} of {source!r}; expected one of {sorted(loaded)}.")
    parts = {split: loaded[split] for split in dict.fromkeys(splits)}
    first = next(iter(parts.values()))
    if label_column not in first.column_names:
        raise ValueError(f"Got label_column={label_column!r} for {source!r}; expected one of {first.column_names}.")
    if names is None:
        feature = first.features[label_column]
        named = feature.names if isinstance(feature, datasets.ClassLabel) else sorted(set(first.unique(label_column)))
        names = [str(name) for name in named]
    parts = {split: _with_label_ids(part, label_column, names) for split, part in parts.items()}
    first = next(iter(parts.values()))
    column = input_column or _input_column(first, (label_column, *keep))
    is_image = isinstance(first.features[column], datasets.Image)
    prepare = _prepare_images if is_image else _prepare_texts
    processor = (AutoImageProcessor if is_image else AutoTokenizer).from_pretrained(model)
    prepared = {split: prepare(part, column, label_column, processor, keep) for split, part in parts.items()}
    collator = default_data_collator if is_image else DataCollatorWithPadding(processor)
    task = "image-classification" if is_image else "text-classification"
    return LoadedData(task, processor, prepared, collator, list(names))


def _with_label_ids(dataset: Any, column: str, names: Sequence[str]) -> Any:
    """Turns labels into ids of the given names: splits and models may number the same names differently."""
    feature = dataset.features[column]
    own = feature.names if isinstance(feature, datasets.ClassLabel) else None
    if own == list(names):
        return dataset
    ids = {name: index for index, name in enumerate(names)}
    labels = [own[value] if own else str(value) for value in dataset[column]]
    unknown = sorted(set(labels) - set(ids))
    if unknown:
        raise ValueError(
            f"Got the labels {unknown[:12]} in the column {column!r}; expected some of {list(names)[:12]}. "
            "Remove these samples, or rename their labels."
        )
    values = [ids[label] for label in labels]
    return (
        dataset.remove_columns(column)
        .add_column(column, values)
        .cast_column(column, datasets.ClassLabel(names=list(names)))
    )


def _input_column(dataset: Any, others: Sequence[str]) -> str:
    features = {name: feature for name, feature in dataset.features.items() if name not in others}
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    texts = [name for name, feature in features.items() if getattr(feature, "dtype", None) == "string"]
    found = images or texts
    if len(found) != 1:
        raise ValueError(
            f"Got the columns {dataset.column_names}, of which {found} could be the input; expected one of images or "
            "texts. Name it as input_column."
        )
    return str(found[0])


def _prepare_images(dataset: Any, column: str, label_column: str, processor: Any, keep: Sequence[str]) -> Any:
    def transform(batch: Mapping[str, Any]) -> dict[str, Any]:
        pixels = processor(images=[image.convert("RGB") for image in batch[column]], return_tensors="pt")
        return {"pixel_values": pixels["pixel_values"], "labels": batch["labels"]}

    renamed = dataset if label_column == "labels" else dataset.rename_column(label_column, "labels")
    return renamed.select_columns([column, "labels", *keep]).with_transform(transform)


def _prepare_texts(dataset: Any, column: str, label_column: str, processor: Any, keep: Sequence[str]) -> Any:
    renamed = dataset if label_column == "labels" else dataset.rename_column(label_column, "labels")
    return renamed.map(
        lambda batch: processor(batch[column], truncation=True),
        batched=True,
        remove_columns=[name for name in renamed.column_names if name not in ("labels", *keep)],
    )
