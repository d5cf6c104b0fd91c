"""Checks of training data, and the label groups that one of its columns names."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import torch
from torch.utils.data import IterableDataset

from nemo_hf.config import LabelLike
from nemo_hf.models.labels import check_label_counts

LABEL_COLUMNS = ("label", "labels", "label_ids")


def check_columns(dataset: Any, is_counted: bool) -> None:
    """Refuses training data without a column of labels, and a stream if relevance `is_counted` on it."""
    if isinstance(dataset, IterableDataset) and is_counted:
        raise ValueError(
            "Got an iterable data set to train on; expected a finite one to count the relevance on. Pass a part of it "
            "as NeMoTrainer(..., relevance_dataset=...)."
        )
    columns = getattr(dataset, "column_names", None)
    if columns is not None and not set(LABEL_COLUMNS) & set(columns):
        raise ValueError(
            f"Got training data with the columns {list(columns)}; expected a 'label' or 'labels' column. "
            "Rename it with dataset.rename_column(..., 'label')."
        )


def column_values(dataset: Any, names: Sequence[str]) -> list[Any] | None:
    """The first of some columns that a `datasets.Dataset` has, without transforms; `None` for other data."""
    if not isinstance(dataset, datasets.Dataset):
        return None  # a stream must not be read before training
    name = next((name for name in names if name in dataset.column_names), None)
    return None if name is None else list(dataset.with_format(None)[name])


def groups_from_column(
    dataset: Any, column: str, labels: Sequence[int] | None, id2label: Mapping[int, str], has_several: bool = False
) -> dict[str, list[LabelLike]]:
    """Reads label groups, name to label ids, from a column of the groups' names or of a `ClassLabel`'s integers."""
    if has_several:
        raise ValueError(
            "Got group_column for a model whose samples have several labels; expected label_groups. Pass "
            "NeMoConfig(label_groups={...})."
        )
    values = column_values(dataset, (column,))
    if values is None or labels is None:
        raise ValueError(
            f"Got group_column={column!r}; expected a column of the datasets.Dataset to train on, which has "
            f"{getattr(dataset, 'column_names', 'no columns')}. Name one of them, or pass label_groups."
        )
    names = getattr(dataset.features[column], "names", None)
    groups: dict[str, list[LabelLike]] = {}
    owner: dict[int, str] = {}
    for label, value in zip(labels, values, strict=True):
        group = str(names[value]) if names and isinstance(value, int) else str(value)
        if owner.setdefault(label, group) != group:
            raise ValueError(
                f"Got the label {id2label[label]!r} in the groups {owner[label]!r} and {group!r} of the column "
                f"{column!r}; expected one group per label. Correct the data, or pass label_groups."
            )
    for label in sorted(owner):
        groups.setdefault(owner[label], []).append(label)
    return groups


def check_labels(labels: Sequence[Any], names: Mapping[int, str], has_several: bool = False) -> None:
    """Refuses labels, ids or lists of 0 and 1, that are not those of the model, `names`, each at least once."""
    if has_several:
        wrong = [v for v in labels if not isinstance(v, Sequence) or len(v) != len(names) or not set(v) <= {0, 1}]
        if wrong:
            raise ValueError(
                f"Got the labels {wrong[0]!r} in the training data; expected a list of {len(names)} zeros and ones. "
                "Turn label names into such lists, or load the model without problem_type='multi_label_classification'."
            )
        check_label_counts([sum(column) for column in zip(*labels, strict=True)], names)
        return
    is_id = [isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(names) for label in labels]
    if not all(is_id):
        raise ValueError(
            f"Got the label {labels[is_id.index(False)]!r} in the training data; expected ids from 0 to "
            f"{len(names) - 1}. Use dataset.class_encode_column('label') for names, remove samples without a label, or "
            "load the model with another num_labels."
        )
    counts = torch.bincount(torch.tensor(labels, dtype=torch.long), minlength=len(names))
    check_label_counts(counts.tolist(), names)
