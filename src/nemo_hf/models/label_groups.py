"""Which label groups the labels and the samples of a batch belong to."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import NeMoPreTrainedModel


def group_membership(labels: Tensor, group_of_label: Tensor, groups: int) -> Tensor:
    """Marks the groups of each sample, boolean, shape (batch, groups).

    `labels` are ids, shape (batch,), or 0 and 1 for each label, shape (batch, labels), where a sample may have several
    labels or none; `group_of_label` is the group of each label, shape (labels,).
    """
    of_label = F.one_hot(group_of_label, groups)
    if labels.ndim == 1:
        return of_label[labels].bool()
    return (labels.to(torch.float32) @ of_label.to(torch.float32)) > 0


def shares_group(groups: Tensor, others: Tensor | None = None) -> Tensor:
    """Marks which samples share a group with which others (`None`: the same), boolean, shape (batch, samples).

    Both are the group of each sample, shape (batch,), or membership, boolean, shape (batch, groups).
    """
    others = groups if others is None else others
    if groups.ndim == 1:
        return groups[:, None] == others[None, :]
    return (groups.float() @ others.float().T) > 0


def group_indices(parent: NeMoPreTrainedModel) -> Tensor:
    """Returns the index of each label's group, shape (labels,), on the parent's device."""
    indices = torch.zeros(len(parent.config.names), dtype=torch.long)
    for index, members in enumerate(parent.config.groups.values()):
        indices[list(members)] = index
    return indices.to(parent.device)


def sample_groups(parent: NeMoPreTrainedModel, labels: Tensor, group_of_label: Tensor) -> Tensor:
    """Returns the group of each sample, shape (batch,), or where it may have several labels its `group_membership`."""
    if labels.ndim == 1:
        return group_of_label[labels]
    return group_membership(labels, group_of_label, len(parent.config.groups))
