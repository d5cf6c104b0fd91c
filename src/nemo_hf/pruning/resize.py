"""Layers of other widths: in place of linear layers, convolutions and norms, with weights still to be filled in."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nemo_hf.neurons.sites import CHANNEL_NORMS

NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")
"""Tensors of a norm by channel, with one number a channel each; some norms have none of them."""


class ScatterLinear(nn.Module):
    """A linear layer that reads some inputs and writes some outputs of a layer of the old outer shape.

    Args:
        in_features: Number of inputs that are read.
        out_features: Number of outputs that are computed.
        full_outputs: Width of the result, zeros elsewhere; `None` if all outputs are computed.
        full_inputs: Width of what is given, of which `input_indices` says what is read; `None` if all is read.
        has_bias: Whether there is a bias.
    """

    input_indices: Tensor | None
    output_indices: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, full_outputs: int | None, full_inputs: int | None, has_bias: bool
    ) -> None:
        super().__init__()
        self.full_outputs, self.full_inputs = full_outputs, full_inputs
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if has_bias else None
        reads_some, computes_some = full_inputs is not None, full_outputs is not None
        self.register_buffer("input_indices", torch.zeros(in_features, dtype=torch.long) if reads_some else None)
        self.register_buffer("output_indices", torch.zeros(out_features, dtype=torch.long) if computes_some else None)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Maps (..., inputs) to (..., full outputs)."""
        if self.input_indices is not None:
            hidden_states = hidden_states.index_select(-1, self.input_indices)
        outputs = nn.functional.linear(hidden_states, self.weight, self.bias)
        if self.output_indices is None or self.full_outputs is None:
            return outputs
        full = outputs.new_zeros(*outputs.shape[:-1], self.full_outputs)
        return full.index_copy(-1, self.output_indices, outputs)


def resize_layer(
    model: nn.Module, path: str, outputs: int | None = None, inputs: int | None = None, is_scattered: bool = False
) -> None:
    """Gives a layer other widths, in place; the new weights are not filled in.

    Args:
        model: The model that holds the layer.
        path: Path of a linear layer, a convolution or a norm by channel.
        outputs: New number of outputs; of a grouped convolution and a norm that of inputs as well.
        inputs: New number of inputs. `None` keeps either.
        is_scattered: Whether the layer keeps its outer shape and becomes a `ScatterLinear`.
    """
    layer = model.get_submodule(path)
    make: Callable[[nn.Module], nn.Module]
    if isinstance(layer, nn.Conv2d):
        make = partial(_resized_convolution, outputs=outputs, inputs=inputs)
    elif isinstance(layer, CHANNEL_NORMS):
        make = partial(_resized_norm, outputs=outputs)
    else:
        make = partial(_scattered if is_scattered else _resized, outputs=outputs, inputs=inputs)
    tensor = next((tensor for tensor in (*layer.parameters(), *layer.buffers())), torch.empty(0))
    with tensor.device:
        made = make(layer)
    model.set_submodule(path, made.to(tensor.device, tensor.dtype).train(layer.training))


def _resized_convolution(layer: nn.Module, outputs: int | None, inputs: int | None) -> nn.Module:
    # The layer itself with other tensors: its class may be one of a family, with a padding of its own.
    assert isinstance(layer, nn.Conv2d)
    if layer.groups > 1 and outputs is not None:  # as many channels in as out, in groups of one width
        layer.groups = outputs * layer.groups // layer.out_channels
        layer.in_channels = layer.out_channels = outputs
    layer.out_channels = layer.out_channels if outputs is None else outputs
    layer.in_channels = layer.in_channels if inputs is None else inputs
    shape = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    layer.weight = nn.Parameter(torch.empty(shape))
    if layer.bias is not None:
        layer.bias = nn.Parameter(torch.empty(layer.out_channels))
    return layer


def _resized_norm(layer: nn.Module, outputs: int | None) -> nn.Module:
    assert isinstance(layer, CHANNEL_NORMS)
    layer.num_features = layer.num_features if outputs is None else outputs
    for name in NORM_TENSORS:
        before = getattr(layer, name)
        if before is not None:
            empty = torch.empty(layer.num_features)
            setattr(layer, name, nn.Parameter(empty) if isinstance(before, nn.Parameter) else empty)
    return layer


class ClosedLinear(nn.Linear):
    """A linear layer of which only the bias matters: its weights are zeros, or what it reads is."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Returns the bias, or zeros, for each input (..., in_features)."""
        if self.training:  # a parameter without a gradient would stop DDP
            return super().forward(hidden_states)
        shape = (*hidden_states.shape[:-1], self.out_features)
        if self.bias is None:
            return hidden_states.new_zeros(1).expand(shape)
        return self.bias.to(hidden_states.dtype).expand(shape)


def close_layer(model: nn.Module, path: str) -> None:
    """Makes a plain linear layer a `ClosedLinear`; any other layer stays."""
    layer = model.get_submodule(path)
    if type(layer) is nn.Linear:
        layer.__class__ = ClosedLinear


def _resized(layer: nn.Module, outputs: int | None = None, inputs: int | None = None) -> nn.Module:
    old_inputs, old_outputs = _widths(layer)
    inputs, outputs = old_inputs if inputs is None else inputs, old_outputs if outputs is None else outputs
    # Made at width 1 and given empty weights: torch warns when it initialises a layer of no neurons.
    if isinstance(layer, Conv1D):
        conv = Conv1D(1, 1)
        conv.nx, conv.nf = inputs, outputs
        conv.weight, conv.bias = nn.Parameter(torch.empty(inputs, outputs)), nn.Parameter(torch.empty(outputs))
        return conv
    linear = nn.Linear(1, 1, bias=layer.bias is not None)
    linear.in_features, linear.out_features = inputs, outputs
    linear.weight = nn.Parameter(torch.empty(outputs, inputs))
    if layer.bias is not None:
        linear.bias = nn.Parameter(torch.empty(outputs))
    return linear


def _widths(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    assert isinstance(layer, nn.Linear), type(layer)
    return layer.in_features, layer.out_features


def _scattered(layer: nn.Module, outputs: int | None = None, inputs: int | None = None) -> nn.Module:
    full_inputs, full_outputs = _widths(layer)
    return ScatterLinear(
        full_inputs if inputs is None else inputs,
        full_outputs if outputs is None else outputs,
        full_outputs=None if outputs is None else full_outputs,
        full_inputs=None if inputs is None else full_inputs,
        has_bias=layer.bias is not None,
    )
