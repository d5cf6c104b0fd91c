"""Multiplying hidden states by masks, with no more memory for the backward pass than the plain model takes."""

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .sites import spread

SMALL_PRODUCT = 2**19  # numbers of a product above which it is summed in pieces
MOST_PIECES = 8  # since on a GPU each piece starts kernels of its own


def token_sum(first: Tensor, second: Tensor) -> Tensor:
    """Sums a product of (batch, tokens, neurons) over tokens, without holding all of it: (batch, neurons)."""
    pieces = min(MOST_PIECES, 1 + first.numel() // SMALL_PRODUCT)
    return torch.cat([(a * b).sum(1) for a, b in zip(first.chunk(pieces), second.chunk(pieces), strict=True)])


class _MaskedLinear(torch.autograd.Function):
    """A linear layer of masked hidden states, which the backward pass computes again instead of keeping them."""

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


def expand_mask(hidden_states: Tensor, mask: Tensor, dim: int = -1) -> Tensor:
    """Repeats a mask (batch, neurons) for each window of a sample and input of a neuron: (windows, size of `dim`)."""
    windows = hidden_states.shape[0] // mask.shape[0]
    if windows > 1:
        mask = mask.repeat_interleave(windows, 0)
    return spread(mask, hidden_states.shape[dim]).to(hidden_states.dtype)


def apply_mask(hidden_states: Tensor, mask: Tensor, dim: int = -1) -> Tensor:
    """Multiplies hidden states by a mask; the arguments are those of `expand_mask`."""
    mask = expand_mask(hidden_states, mask, dim)
    shape = [1] * hidden_states.ndim
    shape[0], shape[dim] = mask.shape
    return hidden_states * mask.view(shape)


class ReplacedForward:
    """Replaces a layer's `forward` until `remove` is called, as the handle of a hook does."""

    def __init__(self, layer: nn.Module, forward: Callable[..., Any]) -> None:
        self._layer = layer
        layer.__dict__["forward"] = forward

    def remove(self) -> None:
        """Restores the layer's own `forward`."""
        self._layer.__dict__.pop("forward", None)


def is_replaceable(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether `masked_linear` may replace a layer's `forward`: a plain linear layer that nothing else has changed."""
    return type(layer) is nn.Linear and "forward" not in layer.__dict__


def masked_linear(hidden_states: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Applies a linear layer to (batch, ..., neurons) hidden states times a mask (batch, neurons)."""
    kind = hidden_states.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    tokens = hidden_states.reshape(len(mask), -1, mask.shape[-1])
    with torch.autocast(kind, enabled=False):
        product: Tensor = _MaskedLinear.apply(tokens, mask.to(tokens.dtype), weight, bias)
    return product.view(*hidden_states.shape[:-1], len(weight))
