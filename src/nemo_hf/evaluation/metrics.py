"""How modular a model is, as pure tensor functions."""

import torch
from torch import Tensor

from nemo_hf.models.label_groups import shares_group


def jaccard_indices(masks: Tensor) -> Tensor:
    """Jaccard index of every two samples' masks.

    Args:
        masks: Open neurons, boolean, shape (samples, neurons).

    Returns:
        Shape (samples, samples), float32, values in [0, 1]; two empty masks count as equal (1).
    """
    opened = masks.float()
    both = opened @ opened.T
    sizes = opened.sum(-1)
    either = sizes[:, None] + sizes[None, :] - both
    return torch.where(either > 0, both / either.clamp(min=1), torch.ones_like(both))


def cohesion_and_coupling(masks: Tensor, groups: Tensor) -> tuple[float | None, float | None]:
    """Mean Jaccard index of masks within groups (cohesion) and between groups (coupling).

    Args:
        masks: Open neurons of each sample before any module mask, boolean, shape (samples, neurons).
        groups: Group of each sample, shape (samples,), or membership, boolean, shape (samples, groups).

    Returns:
        Cohesion over all pairs of different samples that share a group, and coupling over all pairs that
        share none; `None` where there is no such pair.

    References:
        MwT (arXiv 2306.09376), section on cohesion and coupling; NeMo (arXiv 2508.11348).
    """
    indices = jaccard_indices(masks)
    same = shares_group(groups)
    itself = torch.eye(groups.shape[0], dtype=torch.bool, device=groups.device)
    within, between = indices[same & ~itself], indices[~same & ~itself]
    return (
        within.mean().item() if within.numel() else None,
        between.mean().item() if between.numel() else None,
    )
