"""Data sets: what they say about labels and groups, and how the command line reads them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch.utils.data import IterableDataset
from transformers import AutoImageProcessor, AutoTokenizer, DataCollatorWithPadding, default_data_collator

from .config import LabelLike


def check_columns(dataset: Any, is_counted: bool) -> None:
    """Refuses training data on which relevance can't be counted, or without labels.

    Args:
        dataset: Training data.
        is_counted: Whether the exact relevance is counted on these data too.

    Raises:
        ValueError: If they are a stream that would have to end, or have no column of labels.
    """
    if isinstance(dataset, IterableDataset) and is_counted:
        raise ValueError(
            "Got an iterable data set to train on; expected a finite one for the exact relevance after training. "
            "Pass NeMoTrainer(..., relevance_dataset=...), for example a part of the stream as a Dataset."
        )
    columns = getattr(dataset, "column_names", None)
    if columns is not None and not {"label", "labels", "label_ids"} & set(columns):
        raise ValueError(
            f"Got training data with the columns {list(columns)}; expected a 'label' or 'labels' column. "
            "Rename it with dataset.rename_column(..., 'label')."
        )


def column_values(dataset: Any, names: Sequence[str]) -> list[Any] | None:
    """A column of a `datasets.Dataset` without transforms, or `None` for other data."""
    if not isinstance(dataset, datasets.Dataset):
        return None  # a stream must not be read before training
    name = next((name for name in names if name in dataset.column_names), None)
    if name is None:
        return None
    return list(dataset.with_format(None)[name])


def groups_from_column(
    dataset: Any,
    column: str,
    labels: Sequence[int] | None,
    id2label: Mapping[int, str],
    has_several_labels: bool = False,
) -> dict[str, list[LabelLike]]:
    """Reads label groups from a column that names each sample's group.

    Args:
        dataset: A `datasets.Dataset` to train on.
        column: Name of the column; its values are strings, or integers, which stand for the names of a
            `ClassLabel` if the column has them.
        labels: The label ids of the data set.
        id2label: The labels.
        has_several_labels: Whether a sample may have several labels.

    Returns:
        Group name to label ids, in the order of the labels.

    Raises:
        ValueError: If there is no such column, it is no function of the label, or samples have several labels.
    """
    if has_several_labels:
        raise ValueError(
            "Got group_column for a model whose samples have several labels; expected label_groups, since such a "
            "column names one group a sample. Pass NeMoConfig(label_groups={...})."
        )
    values = column_values(dataset, (column,))
    if values is None or labels is None:
        raise ValueError(
            f"Got group_column={column!r}; expected a column of a datasets.Dataset to train on, which has "
            f"{getattr(dataset, 'column_names', 'no columns')}. Name one of them, or pass label_groups."
        )
    feature = getattr(dataset, "features", {}).get(column)
    names = getattr(feature, "names", None)
    groups: dict[str, list[LabelLike]] = {}
    owner: dict[int, str] = {}
    for label, value in zip(labels, values, strict=True):
        group = str(names[value]) if names and isinstance(value, int) else str(value)
        if owner.setdefault(label, group) != group:
            raise ValueError(
                f"Got the label {id2label[label]!r} in the groups {owner[label]!r} and {group!r} of the column "
                f"{column!r}; expected one group a label. Correct the data, or pass label_groups."
            )
    for label in sorted(owner):
        groups.setdefault(owner[label], []).append(label)
    return groups


def check_labels(labels: Sequence[Any], names: Mapping[int, str], has_several: bool = False) -> None:
    """Refuses training data whose labels are not the model's, each at least once.

    Args:
        labels: The label ids of the data set; with several labels a sample, lists of 0 and 1.
        names: The labels.
        has_several: Whether a sample may have several labels.

    Raises:
        ValueError: If an id is too large, a list has another length, or some label has no sample.
    """
    if has_several:
        _check_label_lists(labels, names)
        return
    strange = next((label for label in labels if isinstance(label, bool) or not isinstance(label, int)), None)
    if strange is not None:
        raise ValueError(
            f"Got the label {strange!r} in the training data; expected label ids from 0 to {len(names) - 1}. "
            "Turn names into ids with dataset.class_encode_column('label')."
        )
    if min(labels, default=0) < 0:
        raise ValueError(
            f"Got the label id {min(labels)} in the training data; expected 0 to {len(names) - 1}. "
            "Remove samples without a label."
        )
    counts = torch.bincount(torch.tensor(labels), minlength=len(names))
    if len(counts) > len(names):
        raise ValueError(
            f"Got the label id {len(counts) - 1} in the training data; expected 0 to {len(names) - 1}. "
            f"Load the model with num_labels={len(counts)}."
        )
    check_label_counts(counts.tolist(), names)


def check_label_shape(labels: torch.Tensor, has_several: bool) -> None:
    """Refuses a batch whose labels are not of the kind that the model is for.

    Args:
        labels: Labels of a batch.
        has_several: Whether a sample may have several labels.

    Raises:
        ValueError: Naming the option that says so.
    """
    if (labels.ndim == 2) != has_several:
        kind = "a list of zeros and ones" if labels.ndim == 2 else "one label id"
        problem = "multi_label_classification" if labels.ndim == 2 else "single_label_classification"
        raise ValueError(
            f"Got labels of shape {tuple(labels.shape)}, {kind} a sample; expected "
            f"{'a list' if has_several else 'an id'}, "
            f"as the model's problem_type says. Load the model with problem_type={problem!r}."
        )


def _check_label_lists(labels: Sequence[Any], names: Mapping[int, str]) -> None:
    for value in labels:
        if not isinstance(value, Sequence) or len(value) != len(names) or not set(value) <= {0, 1}:
            raise ValueError(
                f"Got the labels {value!r} in the training data; expected a list of {len(names)} zeros and ones, one "
                "for each label, as floats. Turn label names into such a list, or load the model without "
                "problem_type='multi_label_classification'."
            )
    check_label_counts([sum(column) for column in zip(*labels, strict=True)], names)


def check_label_counts(counts: Sequence[float], id2label: Mapping[int, str]) -> None:
    """Refuses training data in which some label has no sample.

    Args:
        counts: Number of samples by label id.
        id2label: The labels.

    Raises:
        ValueError: Naming the labels.
    """
    missing = [id2label[index] for index, count in enumerate(counts) if not count]
    if missing:
        raise ValueError(
            f"Got training data without a sample of {missing[:12]}; expected at least one of each of the "
            f"{len(counts)} labels, or their modules would be empty. Add samples, or load the model with fewer labels."
        )


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
