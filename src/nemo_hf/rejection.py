"""Rejection of inputs that have none of a module's labels, from the energy of its logits, as pure functions."""

import math
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


def fit_rejection(energies: Tensor, is_own: Tensor, accepted: float) -> dict[str, float]:
    """Calibrates scores on samples that have a module's labels and on samples that have none.

    Args:
        energies: Energies of the samples, shape (samples,).
        is_own: Which samples have a label of the module, boolean, shape (samples,), some of each kind.
        accepted: Share of the module's own samples, in (0, 1), that the threshold shall let through.

    Returns:
        `weight` and `bias` of the logistic function of the energy, fitted as if both kinds were equally
        frequent; the `threshold` of the scores; and the shares of own samples `accepted` and of others
        `rejected` at it.

    References:
        Platt scaling with its smoothed targets; Guo et al. (arXiv 1706.04599) on why scores need it.
    """
    energies = energies.double()
    center, scale = energies.mean(), energies.std().clamp(min=1e-6)
    units = (energies - center) / scale
    counts = torch.stack([(~is_own).sum(), is_own.sum()]).double()
    targets = torch.where(is_own, (counts[1] + 1) / (counts[1] + 2), 1 / (counts[0] + 2))
    weights = torch.where(is_own, 0.5 / counts[1], 0.5 / counts[0])
    line = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([line], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(line[0] * units + line[1], targets, weights, reduction="sum")
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    weight, bias = line.detach()
    rejection = {"weight": (weight / scale).item(), "bias": (bias - weight * center / scale).item()}
    own = score_energies(energies[is_own], rejection).sort().values
    last = own[math.ceil(accepted * len(own)) - 1]  # the last sample to be accepted; others compute it in float32
    rejection["threshold"] = last.item() * (1 + 1e-4)
    is_rejected = score_energies(energies, rejection) > rejection["threshold"]
    rejection["accepted"] = 1 - is_rejected[is_own].double().mean().item()
    rejection["rejected"] = is_rejected[~is_own].double().mean().item()
    return rejection


def auroc(scores: Tensor, is_positive: Tensor) -> float | None:
    """Chance that a positive sample scores above another one, ties counting half.

    Args:
        scores: Shape (samples,).
        is_positive: Boolean, shape (samples,).

    Returns:
        A number in [0, 1], or `None` where one of the two kinds has no sample.
    """
    positive, negative = scores[is_positive], scores[~is_positive]
    if not len(positive) or not len(negative):
        return None
    order = negative.sort().values
    below = torch.searchsorted(order, positive) + torch.searchsorted(order, positive, right=True)
    return (below.double().mean() / 2 / len(negative)).item()
