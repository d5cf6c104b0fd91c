"""The calls of a model within the loss of a micro-batch, whoever computes it: static masks added, masks kept."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nemo_hf.models.base import NeMoPreTrainedModel


@dataclass
class MicroBatch:
    """What the loss of a micro-batch needs to know besides its inputs."""

    real: int  # samples before those that fill up a process's last batch
    share: Tensor | float = 1.0  # weight of this process's mean over samples
    labelled_share: Tensor | float = 1.0  # weight of its mean over those that have a label
    in_module: Tensor | None = None  # the labels of the module that is rehearsed, boolean, (labels,)
    has_own_loss: bool = True  # whether a subclass computes the task loss without ours


@contextmanager
def replaced_method(owner: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Sets a method of one object for a while; one that it had of its own comes back."""
    attributes = vars(owner)
    before = attributes.get(name)
    attributes[name] = method
    try:
        yield
    finally:
        del attributes[name]
        if before is not None:
            attributes[name] = before


@contextmanager
def calls_of(model: nn.Module, arguments: Mapping[str, Any]) -> Iterator[list[Any]]:
    """Adds arguments to every call of a model, and lists the outputs of those with gradients."""
    outputs: list[Any] = []

    def add(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, **arguments}

    def keep(_: nn.Module, args: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            outputs.append(output)

    # First of all, since hooks of FSDP2 convert arguments and those of users may look at them.
    handles = [model.register_forward_pre_hook(add, prepend=True, with_kwargs=True), model.register_forward_hook(keep)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def neuron_masks_of(outputs: Sequence[Any], samples: int) -> dict[str, Tensor]:
    """The masks of a micro-batch's samples, from the first of the model's outputs."""
    masks: dict[str, Tensor] | None = next((getattr(output, "neuron_masks", None) for output in outputs), None)
    found = len(next(iter(masks.values()))) if masks else 0
    if masks is None or found != samples:
        raise ValueError(
            f"Got a compute_loss that calls the model with {found} of {samples} samples, so that no mask is trained; "
            "expected outputs = model(**inputs) in it. Call it so, or pass NeMoTrainer a compute_loss_func instead."
        )
    return masks


def check_own_loss(name: str, parent: NeMoPreTrainedModel) -> None:
    """Refuses a task loss of the user's where rehearsal decides which answers count."""
    config = parent.nemo_config
    decides = config.specificity_weight > 0 or parent.config.has_several_labels
    is_rehearsed = config.rehearsal_probability > 0 and config.masks != "assigned"  # whose modules learn apart
    if is_rehearsed and decides:
        raise ValueError(
            f"Got {name} and module rehearsal, which decides here which answers count; expected one of them. Set "
            "rehearsal_probability=0 in its NeMoConfig."
        )


def check_scaling(is_scaled: bool | None) -> None:
    """Refuses a subclass whose loss is scaled for gradient accumulation already."""
    if is_scaled is not False:
        raise ValueError(
            f"Got loss_is_scaled_for_ga={is_scaled!r}; expected False, since all terms are means over a micro-batch. "
            "Leave it out, and let your loss be such a mean."
        )
