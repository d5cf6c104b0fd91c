"""Checks of labels, and the label groups that labels and samples belong to."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification")
OTHER_HEADS = {
    "parent": "save the plain model, parent.detach_masks().save_pretrained(...), and load that with",
    "module": "save a plain model, module.save_plain(...), and load that with",
}


def check_label_options(options: Mapping[str, Any], count: int, role: str) -> None:
    """Refuses labels that are asked for while a model of `count` labels is loaded, unless they rename these.

    `options` are some of `num_labels`, `id2label` and `problem_type`; `role` is `"parent"` or `"module"`, or else says
    what is loaded.
    """
    names, problem = options.get("id2label"), options.get("problem_type")
    kind = f"a {role}" if role in OTHER_HEADS else role
    if names is not None:
        check_label_ids(names)
    numbers = {"as num_labels": options.get("num_labels"), "labels in id2label": names if names is None else len(names)}
    for what, number in numbers.items():
        if number not in (None, count):
            way = OTHER_HEADS.get(role, "do so with each module before compose(...): save_plain(...), then load with")
            raise ValueError(
                f"Got {number!r} {what} for {kind} of {count} labels; expected {count}, as its weights and groups "
                f"have. For a new head, {way} num_labels={number!r}, ignore_mismatched_sizes=True."
            )
    if problem not in (None, *PROBLEM_TYPES):
        raise ValueError(f"Got problem_type={problem!r} for {kind}; expected one of {PROBLEM_TYPES}. Leave it out.")


def check_label_ids(id2label: Any) -> None:
    """Refuses names of labels by ids that are not 0, 1, 2 and so on."""
    ids = list(id2label) if isinstance(id2label, Mapping) else None
    if ids is None or sorted(map(str, ids)) != sorted(map(str, range(len(ids)))):
        got, last = (f"the ids {ids[:12]}", len(ids) - 1) if ids is not None else (f"{id2label!r}", "the last")
        raise ValueError(
            f"Got id2label with {got}; expected names by the ids 0 to {last}, the places of the logits. Number them "
            "from 0, in id2label, label2id and the data alike."
        )


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


def check_label_counts(counts: Sequence[float], id2label: Mapping[int, str]) -> None:
    """Refuses data without a sample of some label; `counts` are numbers of samples by label id."""
    if missing := [id2label[index] for index, count in enumerate(counts) if not count]:
        raise ValueError(
            f"Got training data without a sample of {missing[:12]}; expected at least one of each of the {len(counts)} "
            "labels. Add samples, or load the model with fewer labels."
        )
