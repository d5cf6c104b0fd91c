"""Cutting layers by the indices of what is kept, values preserved.

Two pruning modes. *Dense* makes every layer smaller; attention heads are padded with zero rows to one width,
or dropped when nothing of their values is left. *Scatter* computes the kept outputs and puts them at their
old places, so that whatever happens between the layers keeps its shape (rotary attention).
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from nemo_hf.neurons.sites import PAD, AttentionSite, ChannelSite, FeedForwardSite, NeuronSite, Rows

from .resize import ScatterLinear as ScatterLinear
from .resize import close_layer, resize_layer

Keep = Mapping[str, Tensor]
"""Kept neurons of a site by part: sorted indices, int64."""

ROTARY_NAME = "nemo_rotary"
"""Name under which a dense rotary attention layer holds its `RotaryAngles`."""


@dataclass(frozen=True)
class LayerCut:
    """What stays of one linear layer.

    Args:
        outputs: Kept outputs, `PAD` for a zero; `None` keeps all. `inputs` likewise.
        is_scattered: Whether the layer keeps its outer shape and the indices become buffers.
        output_scale: Factor of each output of the old layer; `None` for 1. `input_scale` likewise.
    """

    outputs: Tensor | None = None
    inputs: Tensor | None = None
    is_scattered: bool = False
    output_scale: Tensor | None = None
    input_scale: Tensor | None = None


@dataclass(frozen=True)
class SiteCut:
    """What stays of one site.

    Args:
        widths: The new widths by name, which with the site determine every shape.
        layers: Path of each linear layer that is cut.
        head_tensors: Kept heads of other parameters' last dimension.
        constants: Tensors that a module has and its parent has not, by name.
    """

    widths: dict[str, int]
    layers: dict[str, LayerCut]
    head_tensors: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)


class RotaryAngles(nn.Module):
    """Picks the cosines and sines of the frequencies that an attention layer keeps.

    Args:
        head_dim: New width of a head.
        full_dim: Its width in the parent.
    """

    angle_indices: Tensor

    def __init__(self, head_dim: int, full_dim: int) -> None:
        super().__init__()
        self.full_dim = full_dim
        self.register_buffer("angle_indices", torch.zeros(head_dim, dtype=torch.long))

    def narrow(
        self, layer: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Replaces the `position_embeddings` of a call, cosines and sines of shape (..., full head width)."""
        if "position_embeddings" in kwargs:
            return inputs, {**kwargs, "position_embeddings": self._picked(kwargs["position_embeddings"])}
        place = list(inspect.signature(layer.forward).parameters).index("position_embeddings")
        return (*inputs[:place], self._picked(inputs[place]), *inputs[place + 1 :]), kwargs

    def _picked(self, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return tuple(angle.index_select(-1, self.angle_indices) for angle in angles)


def site_cut(site: NeuronSite, keep: Keep, static: Tensor | None = None) -> SiteCut:
    """Works out what stays of a site's layers when only some neurons are kept.

    Args:
        site: The site.
        keep: Kept neurons by part, as `NeuronSite.parts` names and counts them.
        static: Value of each neuron's static mask, shape (neurons,), where it is not 1 for the kept ones
            (soft masks); the layers' weights take it up.

    Returns:
        The cut; applying it gives the function of the site under a static mask of the kept neurons.
    """
    if site.cut_by.is_scattered:
        cut = _scattered_cut(site, keep)
    elif isinstance(site, AttentionSite):
        cut = _dense_attention(site, keep)
    elif isinstance(site, ChannelSite):
        cut = _dense_channels(site, keep)
    else:
        cut = _dense_feed_forward(site, keep)
    for rows, part in site.produced():
        scale = torch.ones(rows.size)
        if static is not None and (part == "query" or site.cut_by.is_gated):
            scale = scale * site.part_mask(part, static)
        if part == "query" and site.cut_by.rescales:
            assert isinstance(site, AttentionSite)
            scale = scale * (cut.widths["head_dim"] / site.head_dim) ** 0.5
        if not bool((scale == 1).all()):
            _scale_outputs(cut, rows.layer, rows.spread(scale))
    if static is not None:
        for reader in site.readers:
            cut.layers[reader] = replace(cut.layers[reader], input_scale=site.input_scale(reader, static))
    return cut


def _scale_outputs(cut: SiteCut, layer: str, scale: Tensor) -> None:
    before = cut.layers[layer].output_scale
    cut.layers[layer] = replace(cut.layers[layer], output_scale=scale if before is None else before * scale)


def _dense_feed_forward(site: NeuronSite, keep: Keep) -> SiteCut:
    assert isinstance(site, FeedForwardSite)
    kept = keep["intermediate"]
    if len(kept) < site.least_width:
        kept = _padded(kept, site.least_width)
    layers = _by_layer([(rows, kept) for rows in site.producers])
    return SiteCut({"intermediate": len(kept)}, {**layers, site.output: LayerCut(inputs=kept)})


def _dense_channels(site: ChannelSite, keep: Keep) -> SiteCut:
    kept = _padded(keep["channels"], max(site.least_width, len(keep["channels"])))
    layers = {path: LayerCut(outputs=_shares(kept, each)) for path, each in site.outputs.items()}
    for path, each in site.inputs.items():  # a layer may add to the channels that it reads
        layers[path] = replace(layers.get(path, LayerCut()), inputs=_shares(kept, each))
    return SiteCut({"channels": len(kept)}, layers)


def _shares(kept: Tensor, each: int) -> Tensor:
    """Indices of kept neurons' consecutive outputs or inputs, `each` of a neuron."""
    places = kept[:, None] * each + torch.arange(each)
    return torch.where(kept[:, None] == PAD, PAD, places).flatten()


def _dense_attention(site: AttentionSite, keep: Keep) -> SiteCut:
    query_key = _by_head(keep["query_key"], site.query_key_heads, site.query_key_dims)
    value = _by_head(keep["value"], site.key_value_heads, site.value_dim)
    # A head without value dimensions adds nothing. One head stays where none has any: its zeros cost
    # next to nothing, and the attention layer can't view a tensor of no heads.
    heads = range(site.key_value_heads)
    kept_heads = [h for h in heads if len(value[h]) or not site.cut_by.drops_heads] or [0]
    query_key = query_key * (site.key_value_heads // len(query_key))
    paired = 2 if site.is_rotary else 1
    head_dim = max(1, *(max(paired * len(query_key[head]), len(value[head])) for head in kept_heads))
    head_dim = -(-head_dim // paired) * paired
    dims = {head: _head_rows(site, query_key[head], head_dim) for head in kept_heads}
    sharing = site.heads // site.key_value_heads
    rows = {"query": [], "key": [], "value": [], "output": []}  # type: dict[str, list[Tensor]]
    for head in kept_heads:
        shared = range(head * sharing, (head + 1) * sharing)
        rows["key"].append(_moved(dims[head], head * site.head_dim))
        rows["value"].append(_moved(_padded(value[head], head_dim), head * site.head_dim))
        rows["query"].extend(_moved(dims[head], q * site.head_dim) for q in shared)
        rows["output"].extend(_moved(_padded(value[head], head_dim), q * site.head_dim) for q in shared)
    joined = {name: torch.cat(parts) for name, parts in rows.items()}
    layers = _by_layer([(part, joined[name]) for part, name in site.produced()])
    layers[site.output] = LayerCut(inputs=joined["output"])
    query_heads = torch.tensor([head * sharing + q for head in kept_heads for q in range(sharing)])
    constants = {}
    if site.is_rotary:
        constants[f"{site.name}.{ROTARY_NAME}.angle_indices"] = dims[kept_heads[0]].clamp(
            min=0
        )  # any angle does for zeros
    widths = {"key_value_heads": len(kept_heads), "head_dim": head_dim}
    return SiteCut(widths, layers, dict.fromkeys(site.head_tensors, query_heads), constants)


def _head_rows(site: AttentionSite, kept: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k within a head; of a rotary one first the kept frequencies' one half, then the other."""
    if not site.is_rotary:
        return _padded(kept, head_dim)
    half = _padded(kept, head_dim // 2)
    return torch.cat([half, _moved(half, site.head_dim // 2)])


def _scattered_cut(site: NeuronSite, keep: Keep) -> SiteCut:
    if isinstance(site, AttentionSite):
        static = torch.cat([_indicator(size, keep[name]) for name, size in site.parts.items()])
        kept = {part: site.part_mask(part, static).nonzero().squeeze(-1) for _, part in site.produced()}
        read = site.read_mask(static).nonzero().squeeze(-1)
        widths = {name: len(index) for name, index in kept.items()} | {"output": len(read)}
    else:
        read = keep["intermediate"]
        kept, widths = {"units": read}, {"intermediate": len(read)}
    produced = [(rows, kept[part]) for rows, part in site.produced()]
    layers = {}
    for path, cut in _by_layer(produced).items():
        outputs = cut.outputs
        assert outputs is not None
        own = [rows for rows, _ in produced if rows.layer == path]
        ours = torch.cat([rows.indices(torch.arange(rows.size)) for rows in own])
        others = 1 - _indicator(own[0].layer_outputs, ours)  # outputs that are no neurons stay
        layers[path] = LayerCut(torch.cat([outputs, others.nonzero().squeeze(-1)]).sort().values, is_scattered=True)
    layers[site.output] = LayerCut(inputs=read, is_scattered=True)
    return SiteCut(widths, layers)


def _indicator(size: int, kept: Tensor) -> Tensor:
    return torch.zeros(size).index_fill(0, kept, 1.0)


def _by_head(kept: Tensor, heads: int, dims: int) -> list[Tensor]:
    return [kept[kept // dims == head] % dims for head in range(heads)]


def _padded(index: Tensor, width: int) -> Tensor:
    return torch.cat([index, index.new_full((width - len(index),), PAD)])


def _moved(index: Tensor, by: int) -> Tensor:
    return torch.where(index == PAD, PAD, index + by)


def _by_layer(kept: Sequence[tuple[Rows, Tensor]]) -> dict[str, LayerCut]:
    """Kept outputs of each layer; a fused one gets its shares one after another."""
    by_layer: dict[str, list[Tensor]] = {}
    for rows, index in kept:
        by_layer.setdefault(rows.layer, []).append(rows.indices(index))
    return {layer: LayerCut(torch.cat(shares)) for layer, shares in by_layer.items()}


def check_widths(site: NeuronSite, widths: Mapping[str, int]) -> None:
    """Checks widths read from a file.

    Args:
        site: The site that they are for.
        widths: Widths by name, as `SiteCut.widths`.

    Raises:
        ValueError: If a width is missing, unknown or outside what the site has.
    """
    most = _largest_widths(site)
    if not isinstance(widths, Mapping) or set(widths) != set(most):
        raise ValueError(
            f"Got the widths {widths!r} for {site.key!r}; expected one for each of {sorted(most)}. "
            "The config.json is damaged or belongs to another base model: save or download the module again."
        )
    is_dense = not site.cut_by.is_scattered
    least = max(site.least_width, int(isinstance(site, AttentionSite))) if is_dense else 0
    for name, width in widths.items():
        if isinstance(width, bool) or not isinstance(width, int) or not least <= width <= most[name]:
            raise ValueError(
                f"Got the width {name}={width!r} for {site.key!r}; expected an integer from {least} to {most[name]}. "
                "The config.json is damaged or belongs to another base model: save or download the module again."
            )


def _largest_widths(site: NeuronSite) -> dict[str, int]:
    if isinstance(site, AttentionSite):
        if not site.cut_by.is_scattered:
            return {"key_value_heads": site.key_value_heads, "head_dim": site.head_dim}
        sizes = {part: rows.size for rows, part in site.produced()}
        return {**sizes, "output": site.heads * site.value_dim}
    return dict(site.parts)


def resize(model: nn.Module, site: NeuronSite, widths: Mapping[str, int]) -> None:
    """Gives a site's layers the shapes of a cut, in place; the new weights are not filled in.

    Args:
        model: A plain model whose layers have their full width.
        site: One of its sites.
        widths: The widths of the cut, as `SiteCut.widths`.

    Raises:
        ValueError: If the widths are not those of this site.
    """
    check_widths(site, widths)
    is_scattered = site.cut_by.is_scattered
    if isinstance(site, ChannelSite):
        for path, each in site.outputs.items():
            resize_layer(model, path, outputs=widths["channels"] * each)
        for path, each in site.inputs.items():
            resize_layer(model, path, inputs=widths["channels"] * each)
        return
    if isinstance(site, AttentionSite) and not is_scattered:
        _resize_dense(model, site, widths["key_value_heads"], widths["head_dim"])
        return
    read = widths["output" if isinstance(site, AttentionSite) else "intermediate"]
    counts: dict[str, int] = {}
    for rows, part in site.produced():
        others = 0 if rows.layer in counts or not is_scattered else rows.layer_outputs
        kept = widths["intermediate"] if part == "units" else widths[part]
        counts[rows.layer] = counts.get(rows.layer, others) + kept - (rows.size if is_scattered else 0)
    for path, count in counts.items():
        resize_layer(model, path, outputs=count, is_scattered=is_scattered)
    resize_layer(model, site.output, inputs=read, is_scattered=is_scattered)


def close_attention(model: nn.Module, site: NeuronSite) -> None:
    """Spares a module the work of attention that no value is left of; its output is the bias alone.

    Args:
        model: A plain model that was resized; the weights that the site's layers get must be those of a cut.
        site: A site of attention without values.
    """
    if not site.cut_by.is_scattered:
        for path in dict.fromkeys([*(rows.layer for rows, _ in site.produced()), site.output]):
            close_layer(model, path)


def _resize_dense(model: nn.Module, site: AttentionSite, key_value_heads: int, head_dim: int) -> None:
    heads = key_value_heads * (site.heads // site.key_value_heads)
    counts: dict[str, int] = {}
    for rows, part in site.produced():
        count = heads if part == "query" else key_value_heads
        counts[rows.layer] = counts.get(rows.layer, 0) + count * head_dim
    for path, count in counts.items():
        resize_layer(model, path, outputs=count)
    resize_layer(model, site.output, inputs=heads * head_dim)
    attention = model.get_submodule(site.name)
    if site.head_dim_attribute is not None:
        setattr(attention, site.head_dim_attribute, head_dim)
    for attribute in site.width_attributes:
        setattr(attention, attribute, heads * head_dim)
    for path in site.head_tensors:
        owner, _, name = path.rpartition(".")
        parameter = model.get_parameter(path)
        smaller = torch.empty(*parameter.shape[:-1], heads, dtype=parameter.dtype, device=parameter.device)
        setattr(model.get_submodule(owner), name, nn.Parameter(smaller))
    if site.is_rotary:
        angles = RotaryAngles(head_dim, site.head_dim).to(next(attention.parameters()).device)
        attention.add_module(ROTARY_NAME, angles)
        attention.register_forward_pre_hook(angles.narrow, with_kwargs=True)


def resize_head(model: nn.Module, path: str, num_labels: int) -> None:
    """Gives the head at `path` one output a label, in place; the new weights are not filled in."""
    resize_layer(model, path, outputs=num_labels)
