"""Reconstructs a module, judged by its answers on samples that it was not fitted on."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_hf.pruning.plan import Plan
from nemo_hf.pruning.reconstruct import LayerError, Reconstruction
from nemo_hf.pruning.statistics import admitted_tokens

from .base import NeMoPreTrainedModel
from .batches import one_of, sample_count, select_samples
from .cut_source import Advance, CutTask, Inputs, Source
from .head_outputs import answers
from .query_choice import same_queries

logger = logging.getLogger(__name__)

RIDGES = (1e-2, 1e-1, 1.0)  # the first with which the module comes nearer; of the mean square of what a layer reads
HELD_OUT = 8  # one sample of so many judges
FEW_SAMPLES, MORE_HELD_OUT = 200, 4  # of fewer than these more judge, and the layers are then fitted again, to all
ROUNDING = 1e-12  # of the mean square of the answers: what float32 leaves of equal ones

Answered = list[tuple[Inputs, Tensor]]  # batches, with the source's answers


def reconstruct_module(
    module: NeMoPreTrainedModel,
    source: Source,
    task: CutTask,
    keep: Plan,
    advance: Advance,
    basis: Tensor | None = None,
) -> dict[str, Any]:
    """Reconstructs a module in place, unless its answers on held-out samples get worse; returns what was done.

    `basis` is that of a narrower stream.
    """
    samples = list(zip(source.batches, source.answers, strict=True))
    are_few = sum(sample_count(inputs) for inputs, _ in samples) < FEW_SAMPLES
    every = MORE_HELD_OUT if are_few else HELD_OUT
    fitted, judging = list(_part(samples, every, False)), list(_part(samples, every, True)) or samples
    state = {name: tensor.clone() for name, tensor in module.model.state_dict().items()}
    heads = {
        head: torch.tensor([*task.label_ids, *range(task.count, task.count + others)])
        for head, others in module.heads.items()
    }

    def undo() -> None:
        for name, tensor in module.model.state_dict().items():
            tensor.data.copy_(state[name])

    def fit(samples: Answered, ridge: float) -> dict[str, LayerError]:
        undo()
        batches = list(enumerate(inputs for inputs, _ in samples))
        count = sum(sample_count(inputs) for _, inputs in batches)
        targets = None if source.targets is None else source.targets.setdefault(count, {})
        about = (source.sites, keep, heads, batches, basis, targets)
        reconstruction = Reconstruction(source.plain, module.model, *about)
        return reconstruction.run(ridge, on_layer=lambda path: advance("Reconstructing"))

    every_batch = [inputs for part in (fitted, judging, samples) for inputs, _ in part]
    with same_queries(source.plain, module.model, every_batch):
        raw = _distance(module, judging)
        if raw <= ROUNDING * torch.cat([expected.flatten() for _, expected in judging]).double().square().mean().item():
            return {"cut_distance": raw, "distance": raw}  # nothing that the answers depend on was cut
        for ridge in RIDGES:
            errors = fit(fitted, ridge)
            if (found := _distance(module, judging)) <= raw:
                break
        refused = None if found <= raw else f"the answers would differ by {found:.3g} in place of {raw:.3g}"
        if refused is not None:
            undo()
            found = raw
        elif are_few and judging is not samples:
            errors = fit(samples, ridge)
    return {
        "cut_distance": raw,
        "distance": found,
        "ridge": ridge,
        "layers": {path: [error.before, error.after] for path, error in errors.items()},
        "scarce_layers": sum(error.is_scarce for error in errors.values()),
        **({"refused": refused} if refused is not None else {}),
    }


def warn_of_fit(done: Mapping[str, Any]) -> None:
    """Warns where a module that is kept stays as it was cut, and of few samples for its layers."""
    if done.get("refused"):
        logger.warning("The module is not reconstructed: %s (mean square). Pass more samples.", done["refused"])
    elif done.get("scarce_layers"):
        logger.warning(
            "Got few calibration samples for the width of %d layers, which are held nearer to their old weights. Pass "
            "more, some hundreds.",
            done["scarce_layers"],
        )


def _part(samples: Answered, every: int, is_held: bool) -> Iterator[tuple[Inputs, Tensor]]:
    """One sample of so many, which judge, or the others; of fewer than four none judges."""
    seen = 0
    for inputs, expected in samples:
        chosen = one_of(every, seen, sample_count(inputs)) == is_held
        seen += len(chosen)
        if chosen.all():
            yield inputs, expected
        elif chosen.any():
            yield select_samples(inputs, chosen), expected[chosen]


def _distance(module: NeMoPreTrainedModel, samples: Sequence[tuple[Inputs, Tensor]]) -> float:
    """Mean square by which a module's answers differ from the source's of the same labels, not counting padding."""
    total, numbers = 0.0, 0
    for inputs, expected in samples:
        missing = answers(module.model(**inputs, return_dict=True)).cpu() - expected
        tokens = admitted_tokens(inputs)
        if tokens is not None and missing.shape[:-1] == tokens.shape:
            missing = missing[tokens.bool().cpu()]
        total, numbers = total + missing.double().square().sum().item(), numbers + missing.numel()
    return total / numbers if math.isfinite(total) else math.inf
