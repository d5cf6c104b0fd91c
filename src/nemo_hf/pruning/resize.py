"""Resizing the layers of a model, in place; their new weights are filled in afterwards."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nemo_hf.neurons.sites import CHANNEL_NORMS, AttentionSite, ChannelSite, NeuronSite

from .closed_attention import ClosedConfig
from .layer_cuts import NORM_TENSORS, ROTARY_NAME


class ScatterLinear(nn.Module):
    """A linear layer that reads some of `full_inputs` and computes some of `full_outputs` (others: 0); `None`: all."""

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


class ClosedLinear(nn.Linear):
    """A linear layer of which only the bias matters: its weights are zeros, or what it reads is."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Returns the bias, or zeros, for each input (..., in_features)."""
        if self.training:  # a parameter without a gradient would stop DDP
            return super().forward(hidden_states)
        bias = hidden_states.new_zeros(1) if self.bias is None else self.bias.to(hidden_states.dtype)
        return bias.expand(*hidden_states.shape[:-1], self.out_features)


class RotaryAngles(nn.Module):
    """Picks the cosines and sines of the frequencies that an attention layer keeps of `full_dim` dimensions."""

    angle_indices: Tensor

    def __init__(self, head_dim: int, full_dim: int) -> None:
        super().__init__()
        self.full_dim = full_dim
        self.register_buffer("angle_indices", torch.zeros(head_dim, dtype=torch.long))

    def narrow(
        self, layer: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook: narrows the `position_embeddings` of a call, cosines and sines of the full head width."""
        if "position_embeddings" in kwargs:
            return inputs, {**kwargs, "position_embeddings": self._picked(kwargs["position_embeddings"])}
        position = list(inspect.signature(layer.forward).parameters).index("position_embeddings")
        return (*inputs[:position], self._picked(inputs[position]), *inputs[position + 1 :]), kwargs

    def _picked(self, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return tuple(angle.index_select(-1, self.angle_indices) for angle in angles)


def check_widths(site: NeuronSite, widths: Mapping[str, int]) -> None:
    """Raises a ValueError if widths read from a file are not such as `SiteCut.widths` can be for a site."""
    is_scattered = site.cut_by.is_scattered
    most, least = dict(site.parts), 0 if is_scattered else site.least_width
    if isinstance(site, AttentionSite) and is_scattered:
        most = {part: rows.size for rows, part in site.produced()} | {"output": site.heads * site.value_dim}
    elif isinstance(site, AttentionSite):
        most, least = {"key_value_heads": site.key_value_heads, "head_dim": site.head_dim}, 1
    is_complete = isinstance(widths, Mapping) and set(widths) == set(most)
    if not is_complete or not all(type(width) is int and least <= width <= most[n] for n, width in widths.items()):
        raise ValueError(
            f"Got the widths {widths!r} for {site.key!r}; expected integers from {least} to {most}. The config.json is "
            "damaged or belongs to another base model: save or download the module again."
        )


def resize(model: nn.Module, site: NeuronSite, widths: Mapping[str, int]) -> None:
    """Gives the layers of a site, at full width until now, the shapes of a cut with these `SiteCut.widths`."""
    check_widths(site, widths)
    if isinstance(site, ChannelSite):
        for path, each in site.outputs.items():
            resize_layer(model, path, outputs=widths["channels"] * each)
        for path, each in site.inputs.items():
            resize_layer(model, path, inputs=widths["channels"] * each)
        return
    is_scattered = site.cut_by.is_scattered
    if isinstance(site, AttentionSite) and not is_scattered:
        heads = widths["key_value_heads"] * (site.heads // site.key_value_heads)
        read, of_values = heads * widths["head_dim"], widths["key_value_heads"] * widths["head_dim"]
        kept: Mapping[str, int] = {"query": read, "key": of_values, "value": of_values}
        _resize_heads(model, site, heads, widths["head_dim"])
    else:
        read = widths["output" if isinstance(site, AttentionSite) else "intermediate"]
        kept = {**widths, "units": read}
    counts: dict[str, int] = {}
    for rows, part in site.produced():
        # A scattered layer may compute more than neurons.
        others, cut = (rows.layer_outputs, rows.size) if is_scattered else (0, 0)
        counts[rows.layer] = counts.get(rows.layer, others) + kept[part] - cut
    for path, count in counts.items():
        resize_layer(model, path, outputs=count, is_scattered=is_scattered)
    resize_layer(model, site.output, inputs=read, is_scattered=is_scattered)


def _resize_heads(model: nn.Module, site: AttentionSite, heads: int, head_dim: int) -> None:
    """Adapts all that depends on the heads of an attention layer, except its linear layers."""
    attention = model.get_submodule(site.name)
    if site.head_dim_attribute is not None:
        setattr(attention, site.head_dim_attribute, head_dim)
    for attribute in site.width_attributes:
        setattr(attention, attribute, heads * head_dim)
    for path in site.head_tensors:
        owner, _, name = path.rpartition(".")
        old = model.get_parameter(path)
        setattr(model.get_submodule(owner), name, nn.Parameter(old.new_empty(*old.shape[:-1], heads)))
    if site.is_rotary:
        with next(model.get_submodule(site.output).parameters()).device:
            angles = RotaryAngles(head_dim, site.head_dim)
        attention.add_module(ROTARY_NAME, angles)
        attention.register_forward_pre_hook(angles.narrow, with_kwargs=True)


def resize_layer(
    model: nn.Module, path: str, outputs: int | None = None, inputs: int | None = None, is_scattered: bool = False
) -> None:
    """Gives a linear layer, a convolution or a norm other widths; `None` keeps one."""
    layer = model.get_submodule(path)
    old = next(iter((*layer.parameters(), *layer.buffers())), torch.empty(0))
    with old.device:
        if isinstance(layer, (nn.Conv2d, *CHANNEL_NORMS)):
            _resize_in_place(layer, outputs, inputs)
        else:
            layer = _resized_linear(layer, outputs, inputs, is_scattered)
    model.set_submodule(path, layer.to(old.device, old.dtype).train(model.get_submodule(path).training))


def close_attention(model: nn.Module, site: NeuronSite) -> None:
    """Skips the work of a resized attention block of which no value is kept; its output is the bias alone."""
    if not site.cut_by.is_scattered:
        for path in {site.output, *(rows.layer for rows, _ in site.produced())}:
            layer = model.get_submodule(path)
            if type(layer) is nn.Linear:
                layer.__class__ = ClosedLinear
        attention: Any = model.get_submodule(site.name)
        if hasattr(attention, "config"):
            attention.config = ClosedConfig(attention.config)


def _resize_in_place(layer: nn.Module, outputs: int | None, inputs: int | None) -> None:
    # The class of a convolution may be one of a model family, with a padding of its own.
    if isinstance(layer, nn.Conv2d):
        if layer.groups > 1 and outputs is not None:  # as many channels in as out, in groups of one width
            layer.groups = outputs * layer.groups // layer.out_channels
            inputs = outputs
        layer.out_channels = layer.out_channels if outputs is None else outputs
        layer.in_channels = layer.in_channels if inputs is None else inputs
        weight = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
        shapes: dict[str, tuple[int, ...]] = {"weight": weight, "bias": (layer.out_channels,)}
    else:
        assert isinstance(layer, CHANNEL_NORMS)
        layer.num_features = layer.num_features if outputs is None else outputs
        shapes = dict.fromkeys(NORM_TENSORS, (layer.num_features,))
    for name, shape in shapes.items():
        old = getattr(layer, name)
        if old is not None:
            empty = torch.empty(shape)
            setattr(layer, name, nn.Parameter(empty) if isinstance(old, nn.Parameter) else empty)


def _resized_linear(layer: nn.Module, outputs: int | None, inputs: int | None, is_scattered: bool) -> nn.Module:
    is_transposed = isinstance(layer, Conv1D)
    names = ("nx", "nf") if is_transposed else ("in_features", "out_features")
    full_inputs, full_outputs = getattr(layer, names[0]), getattr(layer, names[1])
    in_features = full_inputs if inputs is None else inputs
    out_features = full_outputs if outputs is None else outputs
    has_bias = layer.bias is not None
    if is_scattered:
        computes, reads = None if outputs is None else full_outputs, None if inputs is None else full_inputs
        return ScatterLinear(in_features, out_features, computes, reads, has_bias)
    # Made at width 1 and given empty weights: torch warns when it initialises a layer of no neurons.
    made = Conv1D(1, 1) if is_transposed else nn.Linear(1, 1, bias=has_bias)
    setattr(made, names[0], in_features)
    setattr(made, names[1], out_features)
    shape = (in_features, out_features) if is_transposed else (out_features, in_features)
    made.weight = nn.Parameter(torch.empty(shape))
    if has_bias:
        made.bias = nn.Parameter(torch.empty(out_features))
    return made
