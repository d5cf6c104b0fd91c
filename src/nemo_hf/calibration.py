"""Calibrates when a module says that an input has none of its labels."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .data import check_label_shape
from .modeling import NeMoPreTrainedModel
from .rejection import energy, fit_rejection


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
