"""Rejection of inputs that have none of a module's labels, from the energy of its logits, as pure functions."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F


def energy(logits: Tensor, has_several: bool = False) -> Tensor:
    """How much a module answers at all, whatever it answers: high for inputs of its own labels.

    Args:
        logits: Shape (batch, labels).
        has_several: Whether each label is a yes or no of its own.

    Returns:
        The logarithm of the sum of e^logit over the labels, or the sum of log(1 + e^logit) where each label is
        a yes or no; shape (batch,), float32. It is the negative of what the source calls energy.

    References:
        Liu et al., Energy-based out-of-distribution detection (arXiv 2010.03759); for several labels Wang et al.
        (arXiv 2111.14506).
    """
    logits = logits.float()
    return F.softplus(logits).sum(-1) if has_several else logits.logsumexp(-1)


def rejection_scores(logits: Tensor, rejection: Mapping[str, float], has_several: bool = False) -> Tensor:
    """Calibrated chance that an input has none of a module's labels.

    Args:
        logits: Shape (batch, labels).
        rejection: What `fit_rejection` returned.
        has_several: As in `energy`.

    Returns:
        Shape (batch,), float32, values in [0, 1]; an input whose score is over `rejection["threshold"]` is
        to be rejected.
    """
    return score_energies(energy(logits, has_several), rejection)


def score_energies(energies: Tensor, rejection: Mapping[str, float]) -> Tensor:
    """The same from energies, shape (batch,)."""
    return torch.sigmoid(-(rejection["weight"] * energies + rejection["bias"]))
