"""Checks of labels, and the label groups that labels and samples belong to."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def group_membership(labels: Tensor, group_of_label: Tensor, groups: int) -> Tensor:
    """Marks the groups of each sample, boolean, (batch, groups); `group_of_label` has shape (labels,).

    `labels` are ids, shape (batch,), or 0 and 1 for each label, shape (batch, labels).
    """
    of_label = F.one_hot(group_of_label, groups)
    return of_label[labels].bool() if labels.ndim == 1 else (labels.float() @ of_label.float()) > 0


def shares_group(groups: Tensor, others: Tensor | None = None) -> Tensor:
    """Marks which samples share a group with which others (`None`: the same), boolean, shape (batch, samples).

    Both are the group of each sample, shape (batch,), or membership, boolean, shape (batch, groups).
    """
    others = groups if others is None else others
    return groups[:, None] == others if groups.ndim == 1 else (groups.float() @ others.float().T) > 0


def group_indices(parent: Any) -> Tensor:
    """Returns the index of each label's group, shape (labels,), on the parent's device."""
    indices = torch.zeros(len(parent.config.names), dtype=torch.long)
    for index, members in enumerate(parent.config.groups.values()):
        indices[list(members)] = index
    return indices.to(parent.device)


def sample_groups(parent: Any, labels: Tensor, group_of_label: Tensor) -> Tensor:
    """Returns the group of each sample, shape (batch,), or where it may have several labels its `group_membership`."""
    several = labels.ndim == 2
    return group_membership(labels, group_of_label, len(parent.config.groups)) if several else group_of_label[labels]


def check_label_shape(labels: Tensor, has_several: bool) -> None:
    """Refuses a batch with one label per sample where the model is for several, or the other way round."""
    if (labels.ndim == 2) != has_several:
        wanted, problem = ("a list of 0 and 1", "single_label") if has_several else ("an id", "multi_label")
        raise ValueError(
            f"Got labels of shape {tuple(labels.shape)}; expected {wanted} for each sample, as the model's "
            f"problem_type says. Correct the labels, or load the model with problem_type='{problem}_classification'."
        )


def check_known_labels(labels: Tensor, count: int) -> None:
    """Refuses a batch with ids of labels, shape (batch,), that a model of `count` labels has not."""
    if labels.ndim == 1 and bool((wrong := (labels < 0) | (labels >= count)).any()):
        raise ValueError(
            f"Got the label {labels[wrong][0].item()}; expected ids from 0 to {count - 1}. Number the labels of the "
            "data as the model does, and leave samples without one of them out."
        )


def check_label_counts(counts: Sequence[float], id2label: Mapping[int, str]) -> None:
    """Refuses data without a sample of some label; `counts` are numbers of samples by label id."""
    if missing := [id2label[index] for index, count in enumerate(counts) if not count]:
        raise ValueError(
            f"Got training data without a sample of {missing[:12]}; expected at least one of each of the {len(counts)} "
            "labels. Add samples, or load the model with fewer labels."
        )
