"""Rejection scores: how likely an input has none of a module's labels, from the energy of its logits."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F


def energy(logits: Tensor, has_several: bool = False) -> Tensor:
    """Negative energy of logits (batch, labels), high for inputs of a module's own labels: (batch,), float32.

    It is the logarithm of the sum of e^logit over the labels, or, where each label is a yes or no of its own
    (`has_several`), the sum of log(1 + e^logit).

    References:
        Liu et al., Energy-based out-of-distribution detection (arXiv 2010.03759); for several labels Wang et al.
        (arXiv 2111.14506).
    """
    logits = logits.float()
    return F.softplus(logits).sum(-1) if has_several else logits.logsumexp(-1)


def rejection_scores(logits: Tensor, rejection: Mapping[str, float], has_several: bool = False) -> Tensor:
    """Calibrated probability that inputs have none of a module's labels: (batch,), float32, in [0, 1].

    `rejection` is what `fit_rejection` returned; inputs that score over its `threshold` are to be rejected.
    """
    return score_energies(energy(logits, has_several), rejection)


def score_energies(energies: Tensor, rejection: Mapping[str, float]) -> Tensor:
    """The same from energies, shape (batch,)."""
    return torch.sigmoid(-(rejection["weight"] * energies + rejection["bias"]))
