"""Calibrates the rejection of inputs that have none of a module's labels, and measures it."""

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from .base import NeMoPreTrainedModel
from .batches import labelled_batches
from .equivalence import as_saved
from .finiteness import check_finite, check_outputs
from .label_options import check_rejected_label
from .labels import has_label
from .rejection import REJECTED_LABEL, energy, rejection_scores

logger = logging.getLogger(__name__)

ACCEPTED = 0.95  # share of own samples that are not rejected
CAUTION = 1.645  # standard errors of that share: one-sided confidence of 95 %
SMALLEST_SPREAD = 1e-5  # of energies, as a share of their mean: a smaller one is rounding in float32
NOT_FINITE = "Got {} that are NaN or infinite; expected finite numbers. Leave samples without finite logits out."


def own_samples(module: NeMoPreTrainedModel, labels: Tensor) -> Tensor:
    """Which samples have one of a module's labels, (batch,), by `label_ids` among those of the parent."""
    own = module.config.label_ids or []
    if labels.ndim == 2 and labels.shape[1] <= max(own):
        raise ValueError(
            f"Got lists of {labels.shape[1]} labels; expected the parent's, among them {own}. Don't leave out those "
            "that the module has not."
        )
    return has_label(labels.bool() if labels.ndim == 2 else labels, own)


def calibrate_rejection(
    module: NeMoPreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    accepted: float = ACCEPTED,
    show_progress: bool = True,
    rejected_label: str | None = REJECTED_LABEL,
) -> dict[str, float]:
    """Calibrates how likely an input has none of a module's labels, and chooses the score above which it is rejected.

    From then on the module's output has `rejection_scores`, and in eval mode its logits have one more, which is the
    largest just where the score is over the threshold: so pipelines, and all else that takes the largest logit, answer
    `rejected_label`. `config.rejection` and `config.rejected_label` hold this and are saved with the module. The scores
    come from the energy of the logits, so that a module of one label has them too.

    Args:
        module: The module.
        batches: Batches of model inputs with `labels`, the parent's label ids, of validation data: samples of the
            module's labels and of others.
        accepted: Share of the module's own samples, in (0, 1), that is to be accepted.
        show_progress: Whether to show a progress bar.
        rejected_label: Name of the answer to inputs that are rejected; `None` leaves logits and labels as they are.

    Returns:
        `weight` and `bias` of the score, its `threshold`, and the shares of own samples `accepted` and of others
        `rejected` at that threshold on these data.

    Raises:
        ValueError: If `module` is a parent, `accepted` is out of range, `rejected_label` is one of its labels, samples
            of one kind are missing, a label is none of the parent's, or weights or logits are not finite.

    References:
        Energy as in arXiv 2010.03759, calibrated by logistic regression.
    """
    if module.is_parent:
        raise ValueError("Got a parent; expected a module, which has only some labels. Cut one with extract_module.")
    if isinstance(accepted, bool) or not isinstance(accepted, (int, float)) or not 0 < accepted < 1:
        raise ValueError(
            f"Got accepted={accepted!r}; expected a share of the module's samples in (0, 1), such as 0.95."
        )
    check_rejected_label(rejected_label, module.config.names.values())
    energies, is_own = _energies(module, tqdm(batches, desc="Rejection", disable=not show_progress))
    if not bool(is_own.any()) or bool(is_own.all()):
        raise ValueError(
            f"Got {int(is_own.sum())} samples with the module's labels {module.config.label_ids} and "
            f"{int((~is_own).sum())} others; expected some of both. Pass the parent's whole validation data."
        )
    return _calibrated(module, energies, is_own, accepted, rejected_label)


def calibrate_on_samples(
    module: NeMoPreTrainedModel, samples: Iterable[tuple[Mapping[str, Any], Tensor | None]], are_new: bool = True
) -> dict[str, float] | None:
    """Does what `calibrate_rejection` does on calibration samples, where some have the module's labels and others not.

    `samples` are pairs of model inputs and labels, ids of the source's or `None`. Unless they `are_new`, the module or
    its source knows them, and the threshold is higher, by the upper confidence limit of the share that is accepted.
    Returns `None`, and changes nothing, where samples of one kind are missing.
    """
    batches = ({**inputs, "labels": labels} for inputs, labels in samples if labels is not None)
    energies, is_own = _energies(module, batches)
    if not bool(is_own.any()) or bool(is_own.all()):
        return None
    error = math.sqrt(ACCEPTED * (1 - ACCEPTED) / int(is_own.sum()))
    accepted = ACCEPTED if are_new else min(1.0, ACCEPTED + CAUTION * error)
    return _calibrated(module, energies, is_own, accepted, REJECTED_LABEL)


@torch.no_grad()
def _energies(module: NeMoPreTrainedModel, batches: Iterable[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
    """Energies of samples that have a label, and which of them have one of the module's: both (samples,)."""
    check_finite(module)
    found, owned = [torch.zeros(0)], [torch.zeros(0, dtype=torch.bool)]
    with as_saved(module) as (saved,):
        for inputs, labels, numbers in labelled_batches(module, batches):
            logits = saved.own_logits(**inputs)
            check_outputs(module, inputs, logits, list(module.config.names.values()), numbers)
            found.append(energy(logits, module.config.has_several_labels).cpu())
            owned.append(own_samples(module, labels).cpu())
    return torch.cat(found), torch.cat(owned)


def _calibrated(
    module: NeMoPreTrainedModel, energies: Tensor, is_own: Tensor, accepted: float, rejected_label: str | None
) -> dict[str, float]:
    """Fits a module's rejection and keeps it in the configuration."""
    found = fit_rejection(energies, is_own, accepted)
    module.config.rejection = found
    module.config.set_rejected_label(rejected_label)
    if found["weight"] <= 0:
        logger.warning(
            "Got samples with the module's labels %s whose energies are no higher than those of others (AUROC %.2f), "
            "so rejection_scores don't tell them apart as they should. Check the labels of the data, or train longer.",
            *(module.config.label_ids, auroc(energies, is_own)),
        )
    return found


def fit_rejection(energies: Tensor, is_own: Tensor, accepted: float) -> dict[str, float]:
    """Fits rejection scores to energies, (samples,), of which `is_own` are of samples with a label of the module.

    Platt scaling with its smoothed targets, as if own and other samples were equally frequent; the threshold is the
    lowest at which a share `accepted` of the own samples is accepted.
    """
    scored, energies = energies.float(), energies.double()
    if not bool(energies.isfinite().all()):
        raise ValueError(NOT_FINITE.format("energies"))
    center, scale = energies.mean(), energies.std()
    if scale <= SMALLEST_SPREAD * center.abs().clamp(min=1):
        scale = torch.full_like(scale, torch.inf)  # equal but for rounding: a weight of 0 tells none of them apart
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
    own = rejection_scores(scored[is_own], rejection).sort().values
    last = own[math.ceil(accepted * len(own)) - 1]  # the last sample to be accepted
    rejection["threshold"] = last.item() * (1 + 1e-4)  # above what it scores in float32
    is_rejected = rejection_scores(scored, rejection) > rejection["threshold"]
    rejection["accepted"] = 1 - is_rejected[is_own].double().mean().item()
    rejection["rejected"] = is_rejected[~is_own].double().mean().item()
    return rejection


def auroc(scores: Tensor, is_positive: Tensor) -> float | None:
    """Probability that a positive sample scores above another one, ties counting half; `None` without one of them."""
    if bool(scores.isnan().any()):
        raise ValueError(NOT_FINITE.format("scores"))
    positive, negative = scores[is_positive], scores[~is_positive]
    if not len(positive) or not len(negative):
        return None
    order = negative.sort().values
    below = torch.searchsorted(order, positive) + torch.searchsorted(order, positive, right=True)
    return (below.double().mean() / 2 / len(negative)).item()
