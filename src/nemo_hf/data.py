"""What training data says about labels and groups before a step is taken."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .config import LabelLike


def column_values(dataset: Any, names: Sequence[str]) -> list[Any] | None:
    """A column of a `datasets.Dataset` without transforms, or `None` for other data."""
    columns = getattr(dataset, "column_names", None)
    name = next((name for name in names if columns is not None and name in columns), None)
    if name is None or not hasattr(dataset, "with_format"):
        return None
    return list(dataset.with_format(None)[name])


def groups_from_column(
    dataset: Any, column: str, labels: Sequence[int] | None, id2label: Mapping[int, str]
) -> dict[str, list[LabelLike]]:
    """Reads label groups from a column that names each sample's group.

    Args:
        dataset: A `datasets.Dataset` to train on.
        column: Name of the column; its values are strings, or integers, which stand for the names of a
            `ClassLabel` if the column has them.
        labels: The label ids of the data set.
        id2label: The labels.

    Returns:
        Group name to label ids, in the order of the labels.

    Raises:
        ValueError: If there is no such column, or it is no function of the label.
    """
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


def check_labels(labels: Sequence[int], names: Mapping[int, str]) -> None:
    """Refuses training data whose label ids are not the model's, each at least once.

    Args:
        labels: The label ids of the data set.
        names: The labels.

    Raises:
        ValueError: If an id is too large, or some label has no sample.
    """
    counts = torch.bincount(torch.tensor(labels), minlength=len(names))
    if len(counts) > len(names):
        raise ValueError(
            f"Got the label id {len(counts) - 1} in the training data; expected 0 to {len(names) - 1}. "
            f"Load the model with num_labels={len(counts)}."
        )
    check_label_counts(counts.tolist(), names)


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
