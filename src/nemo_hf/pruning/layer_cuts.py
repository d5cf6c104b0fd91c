"""Which rows and columns of each layer, and slices of each tensor, stay when a site keeps only some neurons.

*Dense* modes make every layer smaller; attention heads are padded with zero rows to one width, or dropped without
values. *Scatter* modes put the kept outputs at their old positions: what lies between layers sees the old shapes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nemo_hf.neurons.sites import CHANNEL_NORMS, PAD, AttentionSite, ChannelSite, NeuronSite

Keep = Mapping[str, Tensor]  # part of a site to kept neurons: sorted indices, int64
NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")  # one number for each channel; some norms have none
ROTARY_NAME = "nemo_rotary"  # name under which a dense rotary attention layer holds its `RotaryAngles`


@dataclass(frozen=True)
class LayerCut:
    """What stays of one layer: kept outputs and inputs (`PAD`: zeros, `None`: all), and factors of the old ones."""

    outputs: Tensor | None = None
    inputs: Tensor | None = None
    is_scattered: bool = False
    output_scale: Tensor | None = None
    input_scale: Tensor | None = None


@dataclass(frozen=True)
class SiteCut:
    """What stays of one site; `widths` by name determine, with the site, the shape of every layer."""

    widths: dict[str, int]
    layers: dict[str, LayerCut]  # by path
    head_tensors: dict[str, Tensor] = field(default_factory=dict)  # kept heads of other parameters' last dimension
    constants: dict[str, Tensor] = field(default_factory=dict)  # tensors that do not come from the parent, by name


def site_cut(site: NeuronSite, keep: Keep, static: Tensor | None = None) -> SiteCut:
    """The cut that computes what the site does under a mask of the kept neurons, soft ones with values `static`."""
    if site.cut_by.is_scattered:
        cut = _scattered_cut(site, keep)
    elif isinstance(site, AttentionSite):
        cut = _dense_attention(site, keep)
    elif isinstance(site, ChannelSite):
        cut = _dense_channels(site, keep)
    else:
        kept = _padded(keep["intermediate"], site.least_width)
        layers = {**_producer_cuts(site, {"units": kept}), site.output: LayerCut(inputs=kept)}
        cut = SiteCut({"intermediate": len(kept)}, layers)
    for rows, part in site.produced():
        scale = torch.ones(rows.size)
        if static is not None and (part == "query" or site.cut_by.is_gated):
            scale = scale * site.part_mask(part, static)
        if part == "query" and site.cut_by.rescales:
            assert isinstance(site, AttentionSite)
            scale = scale * (cut.widths["head_dim"] / site.head_dim) ** 0.5
        if not bool((scale == 1).all()):
            layer, scale = cut.layers[rows.layer], rows.spread(scale)
            scale = scale if layer.output_scale is None else layer.output_scale * scale
            cut.layers[rows.layer] = replace(layer, output_scale=scale)
    if static is not None:
        for reader in site.readers:
            cut.layers[reader] = replace(cut.layers[reader], input_scale=site.input_scale(reader, static))
    return cut


def _dense_channels(site: ChannelSite, keep: Keep) -> SiteCut:
    kept = _padded(keep["channels"], site.least_width)
    layers = {path: LayerCut(outputs=_repeated(kept, each)) for path, each in site.outputs.items()}
    for path, each in site.inputs.items():  # a layer may add to the channels that it reads
        layers[path] = replace(layers.get(path, LayerCut()), inputs=_repeated(kept, each))
    return SiteCut({"channels": len(kept)}, layers)


def _dense_attention(site: AttentionSite, keep: Keep) -> SiteCut:
    query_key = _by_head(keep["query_key"], site.query_key_heads, site.query_key_dims)
    query_key = query_key * (site.key_value_heads // len(query_key))
    value = _by_head(keep["value"], site.key_value_heads, site.value_dim)
    # A head without value dimensions adds nothing. One head stays where none has any: its zeros cost
    # next to nothing, and the attention layer can't view a tensor of no heads.
    kept_heads = [h for h, dims in enumerate(value) if len(dims) or not site.cut_by.drops_heads] or [0]
    paired = 2 if site.is_rotary else 1  # dimensions of a q.k neuron
    head_dim = max(1, *(max(paired * len(query_key[head]), len(value[head])) for head in kept_heads))
    head_dim = -(-head_dim // paired) * paired
    # Kept dimensions within each kept head, (kept heads, head_dim). Those of a rotary head are the kept frequencies'
    # first half, then their second.
    query_key_dims = torch.stack([_padded(query_key[head], head_dim // paired) for head in kept_heads])
    if site.is_rotary:
        query_key_dims = torch.cat([query_key_dims, _moved(query_key_dims, site.head_dim // 2)], -1)
    value_dims = torch.stack([_padded(value[head], head_dim) for head in kept_heads])
    heads, sharing = torch.tensor(kept_heads), site.heads // site.key_value_heads
    query_heads = _repeated(heads, sharing)

    def rows(dims: Tensor, heads: Tensor) -> Tensor:
        return _moved(dims.repeat_interleave(len(heads) // len(dims), 0), heads[:, None] * site.head_dim).flatten()

    kept = {"query": rows(query_key_dims, query_heads), "key": rows(query_key_dims, heads)}
    layers = _producer_cuts(site, {**kept, "value": rows(value_dims, heads)})
    layers[site.output] = LayerCut(inputs=rows(value_dims, query_heads))
    constants = {}
    if site.is_rotary:  # any angle does for zeros
        constants[f"{site.name}.{ROTARY_NAME}.angle_indices"] = query_key_dims[0].clamp(min=0)
    widths = {"key_value_heads": len(kept_heads), "head_dim": head_dim}
    return SiteCut(widths, layers, dict.fromkeys(site.head_tensors, query_heads), constants)


def _scattered_cut(site: NeuronSite, keep: Keep) -> SiteCut:
    if isinstance(site, AttentionSite):
        static = torch.cat([_indicator(size, keep[name]) for name, size in site.parts.items()])
        kept = {part: site.part_mask(part, static).nonzero().squeeze(-1) for _, part in site.produced()}
        read = site.read_mask(static).nonzero().squeeze(-1)
        widths = {name: len(index) for name, index in kept.items()} | {"output": len(read)}
    else:
        read = keep["intermediate"]
        kept, widths = {"units": read}, {"intermediate": len(read)}
    layers = {}
    for path, cut in _producer_cuts(site, kept).items():
        assert cut.outputs is not None
        own = [rows for rows, _ in site.produced() if rows.layer == path]
        ours = torch.cat([rows.indices(torch.arange(rows.size)) for rows in own])
        others = 1 - _indicator(own[0].layer_outputs, ours)  # outputs that are not neurons stay
        outputs = torch.cat([cut.outputs, others.nonzero().squeeze(-1)]).sort().values
        layers[path] = LayerCut(outputs, is_scattered=True)
    layers[site.output] = LayerCut(inputs=read, is_scattered=True)
    return SiteCut(widths, layers)


def _producer_cuts(site: NeuronSite, kept: Keep) -> dict[str, LayerCut]:
    """Kept outputs of each producing layer; those of a fused layer follow each other."""
    by_layer: dict[str, list[Tensor]] = {}
    for rows, part in site.produced():
        by_layer.setdefault(rows.layer, []).append(rows.indices(kept[part]))
    return {layer: LayerCut(torch.cat(parts)) for layer, parts in by_layer.items()}


def _by_head(kept: Tensor, heads: int, dims: int) -> list[Tensor]:
    return [kept[kept // dims == head] % dims for head in range(heads)]


def _indicator(size: int, kept: Tensor) -> Tensor:
    return torch.zeros(size).index_fill(0, kept, 1.0)


def _padded(index: Tensor, width: int) -> Tensor:
    return torch.cat([index, index.new_full((max(0, width - len(index)),), PAD)])


def _moved(index: Tensor, by: int | Tensor) -> Tensor:
    return torch.where(index == PAD, PAD, index + by)


def _repeated(kept: Tensor, each: int) -> Tensor:
    """Indices of the `each` consecutive outputs or inputs that belong to each kept neuron."""
    return torch.where(kept[:, None] == PAD, PAD, kept[:, None] * each + torch.arange(each)).flatten()


@dataclass(frozen=True)
class TensorCut:
    """How one tensor of a module is made from the parent's tensor of the same name."""

    indices: Mapping[int, Tensor] = field(default_factory=dict)  # kept ones by dimension, `PAD` for zeros
    scales: Mapping[int, Tensor] = field(default_factory=dict)  # factor of each kept index, by dimension
    is_transposed: bool = False  # after the cut: a `Conv1D` that becomes scattered
    constant: Tensor | None = None  # the tensor itself, if it does not come from the parent (indices of a layer)


def tensor_cuts(model: nn.Module, cuts: Sequence[SiteCut], heads: Mapping[str, Tensor]) -> dict[str, TensorCut]:
    """Translates the cuts of sites and classification heads (path to kept label ids) into cuts of named tensors."""
    tensors: dict[str, TensorCut] = {}
    layer_cuts = [item for cut in cuts for item in cut.layers.items()]
    layer_cuts += [(path, LayerCut(outputs=index)) for path, index in heads.items()]
    for path, layer_cut in layer_cuts:
        for name, new in _layer_tensors(model, path, layer_cut).items():
            # A layer that reads the neurons of one site and makes those of another is cut on both sides.
            old = tensors.get(name, TensorCut())
            tensors[name] = replace(new, indices={**old.indices, **new.indices}, scales={**old.scales, **new.scales})
    for cut in cuts:
        for path, index in cut.head_tensors.items():
            tensors[path] = TensorCut({model.get_parameter(path).ndim - 1: index})
        tensors.update({name: TensorCut(constant=tensor) for name, tensor in cut.constants.items()})
    return tensors


def _layer_tensors(model: nn.Module, path: str, cut: LayerCut) -> dict[str, TensorCut]:
    layer = model.get_submodule(path)
    if isinstance(layer, CHANNEL_NORMS):
        assert cut.outputs is not None
        names = [name for name in NORM_TENSORS if getattr(layer, name) is not None]
        return {f"{path}.{name}": TensorCut({0: cut.outputs}) for name in names}
    is_transposed = isinstance(layer, Conv1D)  # its weight is (inputs, outputs)
    output_dim, input_dim = (1, 0) if is_transposed else (0, 1)
    sides = ((output_dim, cut.outputs, cut.output_scale), (input_dim, cut.inputs, cut.input_scale))
    indices = {dim: index for dim, index, _ in sides if index is not None}
    scales = {dim: scale[index] for dim, index, scale in sides if index is not None and scale is not None}
    tensors = {f"{path}.weight": TensorCut(indices, scales, is_transposed and cut.is_scattered)}
    if layer.bias is not None and cut.outputs is not None:
        bias_scale = {} if cut.output_scale is None else {0: cut.output_scale[cut.outputs]}
        tensors[f"{path}.bias"] = TensorCut({0: cut.outputs}, bias_scale)
    if cut.is_scattered:
        for name, index in (("output_indices", cut.outputs), ("input_indices", cut.inputs)):
            if index is not None:
                tensors[f"{path}.{name}"] = TensorCut(constant=index)
    return tensors


def cut_tensor(read: Callable[[int, Tensor], Tensor], cut: TensorCut) -> Tensor:
    """Makes a module's tensor, contiguous; `read` returns the parent's at some indices of a dimension."""
    if cut.constant is not None:
        return cut.constant.clone()
    for dim, index in cut.indices.items():
        tensor = _with_zeros(read(dim, index[index != PAD]), dim, index)
        read = tensor.index_select
    if cut.scales and tensor.element_size() < 4:  # half precision would round the product
        tensor = tensor.float()
    for dim, scale in cut.scales.items():
        tensor = tensor * _along(dim, scale, tensor)
    return (tensor.T if cut.is_transposed else tensor).contiguous()


def uncut_tensor(tensor: Tensor, cut: TensorCut, shape: Sequence[int]) -> Tensor:
    """Returns a tensor of the parent's shape that a cut (of indices and nonzero scales) turns into `tensor`, else 0."""
    tensor = tensor.T if cut.is_transposed else tensor
    for dim, scale in cut.scales.items():
        tensor = tensor / _along(dim, scale, tensor)
    for dim, index in cut.indices.items():
        kept = (index != PAD).nonzero().squeeze(-1)
        wider = [*tensor.shape[:dim], shape[dim], *tensor.shape[dim + 1 :]]
        tensor = tensor.new_zeros(wider).index_copy(dim, index[kept], tensor.index_select(dim, kept))
    return tensor.contiguous()


def _along(dim: int, scale: Tensor, tensor: Tensor) -> Tensor:
    return scale.to(tensor.dtype).view(-1, *(1,) * (tensor.ndim - 1 - dim))


def _with_zeros(kept: Tensor, dim: int, index: Tensor) -> Tensor:
    if not bool((index == PAD).any()):
        return kept
    shape = (*kept.shape[:dim], len(index), *kept.shape[dim + 1 :])
    return kept.new_zeros(shape).index_copy(dim, (index != PAD).nonzero().squeeze(-1), kept)
