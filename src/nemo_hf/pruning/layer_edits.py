"""Edits of one layer's weights; the old tensors stay as they were for whoever else holds them."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nemo_hf.neurons.sites import Rows


def layer_weight(layer: nn.Module) -> Tensor:
    """The weight of a linear layer or convolution, (outputs, inputs, ...), in float64."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    weight = weight.detach().double()
    return weight.mT if isinstance(layer, Conv1D) else weight


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """The shape of what `layer_weight` returns."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return tuple(weight.mT.shape if isinstance(layer, Conv1D) else weight.shape)


def set_weight(layer: nn.Module, weight: Tensor) -> None:
    """Sets a weight given as `layer_weight` returns it."""
    _set(layer, "weight", weight.mT if isinstance(layer, Conv1D) else weight)


def change_rows(layer: nn.Module, rows: Rows, bases: Tensor) -> None:
    """Replaces the outputs y of each head, (dims,), by y B: `bases` has shape (heads, dims, dims)."""
    places = rows.indices(torch.arange(rows.size))

    def changed(by_output: Tensor) -> Tensor:
        index = places.to(by_output.device)
        own = by_output[index].unflatten(0, (len(bases), -1))
        return by_output.index_copy(0, index, (bases.to(own).mT @ own).flatten(0, 1))

    set_weight(layer, changed(layer_weight(layer)))
    if isinstance(layer.bias, Tensor):
        _set(layer, "bias", changed(layer.bias.detach().double()[:, None])[:, 0])


def scale_rows(layer: nn.Module, rows: Rows, scale: Tensor) -> None:
    """Multiplies those outputs of a layer that `rows` names by (rows,) factors."""
    change_rows(layer, rows, scale[:, None, None])


def scale_inputs(layer: nn.Module, scale: Tensor) -> None:
    """Multiplies what a layer reads by (inputs,) factors."""
    weight = layer_weight(layer)
    set_weight(layer, weight * scale.to(weight).view(-1, *(1,) * (weight.ndim - 2)))


def _set(layer: nn.Module, name: str, value: Tensor) -> None:
    old = getattr(layer, name)
    setattr(layer, name, nn.Parameter(value.to(old.dtype).contiguous(), requires_grad=old.requires_grad))
