"""The equivalence check: a module's logits (and boxes) equal the parent's under the same static mask.

It holds because a closed neuron adds exactly nothing to what reads it, attention keeps its scale, and the residual
stream its width. Families in which one of these fails would fail silently, so every extraction is checked.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nemo_hf.neurons.trial_calls import SHAPE_ERRORS, evaluating, first_line, is_out_of_memory, on_device
from nemo_hf.neurons.trial_inputs import trial_inputs

from .base import NeMoPreTrainedModel
from .finiteness import check_outputs
from .head_outputs import answers, difference
from .loading import PROCESS_SETTINGS

EQUIVALENCE_TOLERANCE = 1e-5
EFFECT_FACTOR = 100
OTHER_CUTS = (
    "This architecture can't be cut exactly here: mask less of it, such as NeMoConfig(targets=['ffn']), and report the "
    "model type."
)


Model = TypeVar("Model", bound=PreTrainedModel)


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
    inputs, count = trial_inputs(parent, inputs), len(parent.config.names)
    assert parent.masks is not None
    with torch.no_grad(), exact_float32(parent, module) as (exact_parent, exact_module):
        batch = on_device(exact_parent, inputs)
        opened, expected = (
            answers(exact_parent(**batch, static_masks=masks, return_dict=True), module.config.label_ids, count)
            for masks in (parent.masks.open_masks(), static)
        )
        got = _module_answers(exact_module, batch)
    found = difference(got, expected, parent.task)
    tolerance = EQUIVALENCE_TOLERANCE * max(1.0, expected.abs().max().item())
    effect = difference(opened, expected, parent.task)
    if not (found <= tolerance and math.isfinite(effect)):  # also when they are not numbers
        try:
            for logits in (opened, expected):
                check_outputs(exact_parent, batch, logits, list(module.config.names.values()))
        except ValueError as error:
            raise EquivalenceError(str(error)) from error
        raise EquivalenceError(
            f"Got a module of {parent.config.base_class} whose logits differ from the parent's under the same mask by "
            f"{found:.2e}; expected at most {tolerance:.2e}. {OTHER_CUTS}"
        )
    status = "verified" if effect > EFFECT_FACTOR * tolerance else "unverified"
    return EquivalenceCheck(status, found, tolerance, effect, len(next(iter(batch.values()))))


def _module_answers(module: NeMoPreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """What a module answers to inputs that its parent takes; where it doesn't run on these, its shapes don't fit."""
    try:
        return answers(module(**batch, return_dict=True))
    except SHAPE_ERRORS as error:
        if is_out_of_memory(error):
            raise
        raise EquivalenceError(
            f"Got a module of {module.config.base_class} that does not run where its parent does "
            f"({type(error).__name__}: {first_line(error)}); expected the parent's logits. {OTHER_CUTS}"
        ) from error


def sharing_copy(model: Model) -> Model:
    """A copy that shares all tensors, and has no autocast around its forward."""
    memo: dict[int, Any] = {}
    for value in (value for layer in model.modules() for value in vars(layer).values()):
        held = value.values() if isinstance(value, dict) else (value,)  # some layers keep results of earlier calls
        memo |= {id(each): each.detach() if each.grad_fn else each for each in held if isinstance(each, Tensor)}
    copied = memo[id(model)] = copy.copy(model)
    # Accelerate puts an autocast around the forward of a model that it prepared, as an attribute of the object.
    copied.__dict__.pop("forward", None)
    copied.__dict__.update({name: copy.deepcopy(value, memo) for name, value in vars(copied).items()})
    return copied


@contextmanager
def as_saved(*models: NeMoPreTrainedModel) -> Iterator[list[NeMoPreTrainedModel]]:
    """Yields models as they would be when loaded: in eval mode, in the precision of their weights.

    One that is not yet so is copied, without its tensors, as other threads may call it meanwhile; a sharded model
    (FSDP2), which can't be copied, is changed and restored.
    """
    with ExitStack() as stack:
        ready = []
        for model in models:
            is_ready = "forward" not in model.__dict__ and not any(layer.training for layer in model.modules())
            if not is_ready and hasattr(type(model), "__deepcopy__"):
                stack.enter_context(evaluating(model))
                if (forward := model.__dict__.pop("forward", None)) is not None:
                    stack.callback(model.__dict__.update, forward=forward)
                is_ready = True
            ready.append(model if is_ready else sharing_copy(model).eval())
        yield ready


@contextmanager
def exact_float32(*models: NeMoPreTrainedModel) -> Iterator[list[NeMoPreTrainedModel]]:
    """Yields models as saved, in float32 (copies, if they have another dtype), with TF32 off."""
    with PROCESS_SETTINGS, as_saved(*models) as ready:
        precision = torch.get_float32_matmul_precision()
        convolutions = torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        try:
            yield [model if model.dtype == torch.float32 else copy.deepcopy(model).float() for model in ready]
        finally:
            torch.set_float32_matmul_precision(precision)
            torch.backends.cudnn.allow_tf32 = convolutions
