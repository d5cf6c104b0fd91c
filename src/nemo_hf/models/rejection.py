"""Rejection scores: how likely an input has none of a module's labels, from the energy of its logits."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

REJECTED_LABEL = "none of these"
CERTAIN = 50.0  # log-odds beyond which a chance is 0 or 1 in float32


def energy(logits: Tensor, has_several: bool = False) -> Tensor:
    """Negative energy of logits (batch, labels), high for inputs of a module's own labels: (batch,), float32.

    As in arXiv 2010.03759; for multi-label models (`has_several`) as in arXiv 2111.14506.
    """
    logits = logits.float()
    return F.softplus(logits).sum(-1) if has_several else logits.logsumexp(-1)


def rejection_scores(energies: Tensor, rejection: Mapping[str, float]) -> Tensor:
    """Probability that inputs of these energies have none of a module's labels, calibrated by `rejection`: (batch,)."""
    return torch.sigmoid(-(rejection["weight"] * energies + rejection["bias"]))


def with_rejected(logits: Tensor, rejection: Mapping[str, float], has_several: bool = False) -> Tensor:
    """Logits (batch, labels) and one more for inputs that have none of the labels, so that all clients see it.

    By how much the log-odds of the score are over those of the threshold, the new logit is over the largest one: so it
    is the largest of all just where the score is over the threshold, and its softmax grows with the score. Of
    multi-label models it is that difference itself: its sigmoid is over 1/2 just where the score is over the threshold.
    """
    threshold = rejection["threshold"]
    odds = math.log(threshold / (1 - threshold)) if 0 < threshold < 1 else math.copysign(math.inf, threshold - 0.5)
    found = -(rejection["weight"] * energy(logits, has_several) + rejection["bias"])
    margin = (found - odds).clamp(-CERTAIN, CERTAIN)
    added = margin if has_several else logits.float().amax(-1) + margin
    return torch.cat([logits, added[..., None]], -1)  # in float32 at least


def add_rejection(output: Any, config: Any, is_in_eval: bool) -> None:
    """Adds rejection scores to a calibrated module's output, and in eval mode the logit of its `rejected_label`."""
    if fit := config.rejection:  # read once: another thread may find that it is stale
        logits, has_several = output.logits, config.has_several_labels
        output.rejection_scores = rejection_scores(energy(logits, has_several), fit)
        if is_in_eval and config.rejected_label is not None:
            output.logits = with_rejected(logits, fit, has_several)
