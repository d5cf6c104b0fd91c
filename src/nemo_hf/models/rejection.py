"""Rejection scores: how likely an input has none of a module's labels, from the energy of its logits."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F


def energy(logits: Tensor, has_several: bool = False) -> Tensor:
    """Negative energy of logits (batch, labels), high for inputs of a module's own labels: (batch,), float32.

    As in arXiv 2010.03759; for multi-label models (`has_several`) as in arXiv 2111.14506.
    """
    logits = logits.float()
    return F.softplus(logits).sum(-1) if has_several else logits.logsumexp(-1)


def rejection_scores(energies: Tensor, rejection: Mapping[str, float]) -> Tensor:
    """Probability that inputs of these energies have none of a module's labels, calibrated by `rejection`: (batch,)."""
    return torch.sigmoid(-(rejection["weight"] * energies + rejection["bias"]))
