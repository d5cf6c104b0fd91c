"""Rejection of inputs that have none of a module's labels: calibrated and measured."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from nemo_hf.models.base import NeMoPreTrainedModel
from nemo_hf.models.label_checks import check_label_shape
from nemo_hf.models.rejection import energy, score_energies


def own_samples(module: NeMoPreTrainedModel, labels: Tensor) -> Tensor:
    """Tells which samples have one of a module's labels.

    Args:
        module: The module.
        labels: The parent's label ids, shape (batch,), any other number for samples of no label; or 0 and 1
            for each label of the parent, shape (batch, labels).

    Returns:
        Boolean, shape (batch,).
    """
    own = torch.tensor(module.config.label_ids, device=labels.device)
    return torch.isin(labels, own) if labels.ndim == 1 else (labels[:, own] > 0).any(-1)


@torch.no_grad()
def calibrate_rejection(
    module: NeMoPreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    accepted: float = 0.95,
    show_progress: bool = True,
) -> dict[str, float]:
    """Lets a module score how likely an input has none of its labels, and says from which score to reject.

    From then on the module's output has `rejection_scores`; `config.rejection` keeps the fit and is saved with
    the module. The scores come from the energy of the logits, so that a module of one label has them too.

    Args:
        module: The module.
        batches: Batches of model inputs with `labels`, the parent's label ids, of validation data: samples of the
            module's labels and of others.
        accepted: Share of the module's own samples, in (0, 1), that the threshold shall let through.
        show_progress: Whether to show a progress bar.

    Returns:
        `weight` and `bias` of the score, its `threshold`, and the shares of own samples `accepted` and of others
        `rejected` at that threshold on these data.

    Raises:
        ValueError: If `module` is a parent, `accepted` is out of range, or samples of one kind are missing.

    References:
        Energy as in arXiv 2010.03759, calibrated by logistic regression.
    """
    if module.is_parent:
        raise ValueError("Got a parent; expected a module, which lacks labels. Cut one with extract_module first.")
    if isinstance(accepted, bool) or not isinstance(accepted, (int, float)) or not 0 < accepted < 1:
        raise ValueError(f"Got accepted={accepted!r}; expected a share of the module's own samples in (0, 1).")
    was_training = module.training
    module.train(False)
    try:
        energies, is_own = _energies(module, tqdm(batches, desc="Rejection", disable=not show_progress))
    finally:
        module.train(was_training)
    if not bool(is_own.any()) or bool(is_own.all()):
        raise ValueError(
            f"Got {int(is_own.sum())} samples with the module's labels {module.config.label_ids} and "
            f"{int((~is_own).sum())} others; expected some of both. Pass the parent's whole validation data, with the "
            "parent's label ids."
        )
    module.config.rejection = fit_rejection(energies, is_own, accepted)
    return module.config.rejection


def _energies(module: NeMoPreTrainedModel, batches: Iterable[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
    """Energies of all samples, and which of them have a label of the module; both on the CPU."""
    has_several = module.config.has_several_labels
    energies, is_own = [torch.zeros(0)], [torch.zeros(0, dtype=torch.bool)]
    for batch in batches:
        inputs = {k: v.to(module.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        if (labels := inputs.pop("labels", None)) is None:
            raise ValueError(
                f"Got a batch with {sorted(inputs)}; expected 'labels' in it. Add a label column to the data."
            )
        check_label_shape(labels, has_several)
        energies.append(energy(module(**inputs).logits, has_several).cpu())
        is_own.append(own_samples(module, labels).cpu())
    return torch.cat(energies), torch.cat(is_own)


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
