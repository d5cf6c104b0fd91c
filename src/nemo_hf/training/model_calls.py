"""The calls of a model within the loss of a micro-batch, whoever computes it: static masks added, masks kept."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class MicroBatch:
    """What the loss of a micro-batch needs to know besides its inputs."""

    real: int  # samples before those that fill up a process's last batch
    share: Tensor | float = 1.0  # weight of this process's mean
    in_module: Tensor | None = None  # the labels of the module that is rehearsed, boolean, (labels,)
    has_own_loss: bool = True  # whether a subclass computes the task loss without ours


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
