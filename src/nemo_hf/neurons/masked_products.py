"""Products of hidden states with masks that keep no more for the backward pass than a plain model does."""

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .sites import spread

SMALL_PRODUCT = 2**19
"""Numbers of a product from which on it is summed in pieces."""

MOST_PIECES = 8
"""Pieces at most: on a GPU each has kernels of its own to start."""


def token_sum(first: Tensor, second: Tensor) -> Tensor:
    """Sums a product over tokens without holding the whole product.

    Args:
        first: Shape (batch, tokens, neurons).
        second: As `first`.

    Returns:
        Shape (batch, neurons).
    """
    pieces = min(MOST_PIECES, 1 + first.numel() // SMALL_PRODUCT)
    return torch.cat([(a * b).sum(1) for a, b in zip(first.chunk(pieces), second.chunk(pieces), strict=True)])


class _MaskedLinear(torch.autograd.Function):
    """A linear layer of masked hidden states, which are computed again in the backward pass instead of kept."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(hidden_states, mask, weight)
        return F.linear(hidden_states * mask[:, None], weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden_states, mask, weight = ctx.saved_tensors
        of_hidden, of_mask, of_weight, of_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, 1)
        grads: list[Tensor | None] = [None] * 4
        if of_weight:
            grads[2] = rows.mT @ (hidden_states * mask[:, None]).flatten(0, 1)
        if of_bias:
            grads[3] = rows.sum(0)
        if of_hidden or of_mask:
            inner = gradient @ weight
            grads[1] = token_sum(inner, hidden_states) if of_mask else None
            if of_hidden:  # in place, unless this pass is to be differentiated itself
                grads[0] = inner * mask[:, None] if torch.is_grad_enabled() else inner.mul_(mask[:, None])
        return tuple(grads)


def for_all(hidden_states: Tensor, mask: Tensor, dim: int = -1) -> Tensor:
    """Repeats a mask for a sample's windows, and for the inputs that share a neuron.

    Args:
        hidden_states: Shape (batch or windows, ..., inputs), or with the inputs in dimension `dim`.
        mask: Shape (batch, neurons).
        dim: Dimension that counts the neurons.

    Returns:
        Shape (batch or windows, inputs), of the hidden states' type.
    """
    windows = hidden_states.shape[0] // mask.shape[0]
    if windows > 1:
        mask = mask.repeat_interleave(windows, 0)
    return spread(mask, hidden_states.shape[dim]).to(hidden_states.dtype)


def times(hidden_states: Tensor, mask: Tensor, dim: int = -1) -> Tensor:
    """Multiplies hidden states by a mask; the arguments are those of `for_all`."""
    mask = for_all(hidden_states, mask, dim)
    shape = [1] * hidden_states.ndim
    shape[0], shape[dim] = mask.shape
    return hidden_states * mask.view(shape)


class ForwardHandle:
    """Takes the place of a layer's `forward` until it is removed.

    Args:
        layer: The layer.
        forward: What runs instead.
    """

    def __init__(self, layer: nn.Module, forward: Callable[..., Any]) -> None:
        self._layer = layer
        layer.__dict__["forward"] = forward

    def remove(self) -> None:
        """Gives the layer its own `forward` back."""
        self._layer.__dict__.pop("forward", None)


def can_be_masked(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether `masked_linear` may run in place of a layer: it is plain, and nobody else changed what it does."""
    return type(layer) is nn.Linear and "forward" not in layer.__dict__


def masked_linear(hidden_states: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Applies a linear layer to masked hidden states.

    Args:
        hidden_states: Shape (batch, ..., neurons).
        mask: Shape (batch, neurons).
        weight: Shape (outputs, neurons).
        bias: Shape (outputs,), or `None`.

    Returns:
        Shape (batch, ..., outputs).
    """
    kind = hidden_states.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    tokens = hidden_states.reshape(len(mask), -1, mask.shape[-1])
    with torch.autocast(kind, enabled=False):
        product: Tensor = _MaskedLinear.apply(tokens, mask.to(tokens.dtype), weight, bias)
    return product.view(*hidden_states.shape[:-1], len(weight))
