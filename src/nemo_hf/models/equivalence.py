"""The equivalence check: a module's logits equal the parent's under the same static mask.

It holds because a closed neuron adds exactly nothing to what reads it, attention keeps its scale, and the residual
stream its width. Families in which one of these fails would fail silently, so every extraction is checked.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_hf.neurons.trial_inputs import random_inputs

from .base import NeMoPreTrainedModel
from .finiteness import check_outputs

EQUIVALENCE_TOLERANCE = 1e-5
EFFECT_FACTOR = 100


class EquivalenceError(RuntimeError):
    """A module's logits differ from the parent's under the same static mask."""


@dataclass(frozen=True)
class EquivalenceCheck:
    """Largest `difference` between a module's and the parent's logits, and `effect` of the mask on the latter.

    Of a mask that hardly moves the logits equal logits prove nothing: the status is then `"unverified"`.
    """

    status: str
    difference: float
    tolerance: float
    effect: float
    samples: int


def check_equivalence(
    parent: NeMoPreTrainedModel,
    module: NeMoPreTrainedModel,
    static: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor] | None = None,
) -> EquivalenceCheck:
    """Compares a module's logits with the parent's under the module's static mask, in float32 and eval mode, TF32 off.

    `static` maps site keys to masks of shape (neurons,); `inputs` are model inputs, `None` draws a few random ones.
    Logits that differ by more than the tolerance, or are not finite, are an `EquivalenceError`.
    """
    inputs = random_inputs(parent) if inputs is None else {k: v for k, v in inputs.items() if k != "labels"}
    assert parent.masks is not None
    with torch.no_grad(), exact_float32(parent, module) as (exact_parent, exact_module):
        batch = {name: value.to(exact_parent.device) for name, value in inputs.items()}
        batch = {name: value.float() if value.is_floating_point() else value for name, value in batch.items()}
        opened = exact_parent(**batch, static_masks=parent.masks.open_masks()).logits[:, module.config.label_ids]
        expected = exact_parent(**batch, static_masks=static).logits[:, module.config.label_ids]
        got = exact_module(**batch).logits
    difference = (got - expected).abs().max().item()
    tolerance = EQUIVALENCE_TOLERANCE * max(1.0, expected.abs().max().item())
    effect = (opened - expected).abs().max().item()
    if not difference <= tolerance:  # also when it is not a number
        try:
            check_outputs(exact_parent, batch, expected, list(module.config.names.values()))
        except ValueError as error:
            raise EquivalenceError(str(error)) from error
        raise EquivalenceError(
            f"Got a module of {parent.config.base_class} whose logits differ from the parent's under the same mask by "
            f"{difference:.2e}; expected at most {tolerance:.2e}. This architecture can't be cut exactly here: mask "
            "less of it, such as NeMoConfig(targets=['ffn']), and report the model type."
        )
    status = "verified" if effect > EFFECT_FACTOR * tolerance else "unverified"
    return EquivalenceCheck(status, difference, tolerance, effect, len(next(iter(batch.values()))))


@contextmanager
def as_saved(*models: NeMoPreTrainedModel) -> Iterator[None]:
    """Lets models run as they would when loaded: in eval mode, in the precision of their weights."""
    training = [model.training for model in models]
    # Accelerate puts an autocast around the forward of a model that it prepared, as an attribute of the object.
    wrapped = [model.__dict__.pop("forward", None) for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, was_training, forward in zip(models, training, wrapped, strict=True):
            model.train(was_training)
            if forward is not None:
                model.__dict__["forward"] = forward


@contextmanager
def exact_float32(*models: NeMoPreTrainedModel) -> Iterator[list[NeMoPreTrainedModel]]:
    """Yields models as saved, in float32 (copies, if they have another dtype), with TF32 off."""
    precision = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with as_saved(*models):
            yield [model if model.dtype == torch.float32 else copy.deepcopy(model).float() for model in models]
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = convolutions
