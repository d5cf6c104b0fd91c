"""Building sites from layers that are found: how q, k, v and units lie in the outputs of their layers."""

import inspect
import re
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .sites import CHANNEL_NORMS, AttentionSite, ChannelSite, FeedForwardSite, Rows, layer_features

Projections = tuple[Rows, Rows, Rows, int]
"""Rows of q, k and v, and the number of query heads."""

HEAD_DIM_ATTRIBUTES = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size", "d_head", "depth")
HEAD_COUNT_ATTRIBUTES = ("num_attention_heads", "num_heads", "n_heads", "n_head", "num_head")
WIDTH_ATTRIBUTES = ("all_head_size", "split_size", "inner_dim")
LATENT_ATTRIBUTES = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
HEAD_NORM = re.compile(r"([qk](uery|ey)?_?(layer_?)?norm)|(norm_[qk])")


def channel_site(
    model: nn.Module, name: str, producers: Sequence[str], passing: Sequence[str], readers: Sequence[str]
) -> ChannelSite | None:
    """Builds the site of a convolution's channels.

    Args:
        model: The model.
        name: Name of the site.
        producers: Paths of the convolutions or linear layers that make the channels.
        passing: Paths of the batch norms and grouped convolutions that they pass through.
        readers: Paths of the convolutions and linear layers that read them, in the order in which they run.

    Returns:
        The site, or `None` if these are other layers, or their widths are not those of the same channels.
    """
    channels, width = (_made(model.get_submodule(producers[0])) or (0, 1))[0], 1
    for path in (*producers, *passing):
        made = _made(model.get_submodule(path), may_be_grouped=path in passing)
        if made is None or made[0] != channels or channels < 1:
            return None
        width = max(width, made[1])
    size = channels // width
    read_by = [(path, _read(model.get_submodule(path))) for path in readers]
    widths = [_made(model.get_submodule(path), may_be_grouped=True) for path in passing]
    if any(width % made[1] for made in widths if made) or any(not read or read % channels for _, read in read_by):
        return None
    return ChannelSite(
        name=name,
        pooled=readers[0],
        in_features=channels,
        output=readers[0],
        least_width=1,  # torch has no convolution without outputs
        channels=channels,
        size=size,
        producers=tuple(producers),
        passing=tuple(passing),
        read_by=tuple(read_by),
    )


def _made(layer: nn.Module, may_be_grouped: bool = False) -> tuple[int, int] | None:
    """Number of channels that a layer makes or passes on, and how many of them it mixes."""
    if isinstance(layer, nn.Conv2d):
        if layer.groups == 1 and not may_be_grouped:
            return layer.out_channels, 1
        if layer.groups > 1 and may_be_grouped and layer.in_channels == layer.out_channels:
            return layer.out_channels, layer.out_channels // layer.groups
        return None
    if isinstance(layer, CHANNEL_NORMS):
        return (layer.num_features, 1) if may_be_grouped else None
    features = layer_features(layer)
    return None if features is None or may_be_grouped or isinstance(layer, Conv1D) else (features[1], 1)


def _read(layer: nn.Module) -> int:
    """Number of inputs of a layer that may read channels, 0 for others."""
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels if layer.groups == 1 else 0
    return (layer_features(layer) or (0, 0))[0] if isinstance(layer, nn.Linear) else 0


def outputs_of(model: nn.Module, path: str) -> int:
    """Number of outputs of the linear layer at `path`."""
    features = layer_features(model.get_submodule(path))
    assert features is not None, path
    return features[1]


def inputs_of(model: nn.Module, path: str) -> int:
    """Number of inputs of the linear layer at `path`."""
    features = layer_features(model.get_submodule(path))
    assert features is not None, path
    return features[0]


def feed_forward_site(
    model: nn.Module,
    name: str,
    producers: Sequence[str],
    output: str,
    pooled: str | None = None,
    pooled_output: bool = False,
) -> FeedForwardSite | None:
    """Builds the site of a feed-forward part.

    Args:
        model: The model.
        name: Name of the site.
        producers: Paths of the linear layers that make the units: one, the two of a GLU, or one that holds
            both of these.
        output: Path of the linear layer that reads the units.
        pooled: Path of the layer at which the input is pooled; `None`: the first producer.
        pooled_output: Whether the output of `pooled` is taken.

    Returns:
        The site, or `None` if the widths are not those of a feed-forward part.
    """
    width = inputs_of(model, output)
    widths = [outputs_of(model, path) for path in producers]
    if widths == [2 * width]:  # a GLU with both projections in one layer
        rows = tuple(Rows(producers[0], start, width, 2 * width) for start in (0, width))
    elif widths == [width] * len(producers):
        rows = tuple(Rows(path, 0, width) for path in producers)
    else:
        return None
    return FeedForwardSite(
        name=name,
        pooled=pooled or producers[0],
        pooled_output=pooled_output,
        in_features=inputs_of(model, producers[0]),
        output=output,
        # Conv1D views its input as (-1, width), which torch can't do at width 0.
        least_width=int(isinstance(model.get_submodule(output), Conv1D)),
        producers=rows,
    )


def attention_site(
    model: PreTrainedModel,
    name: str,
    output: str,
    projections: Projections,
    pooled: str | None = None,
    is_rotary: bool | None = None,
) -> AttentionSite:
    """Builds the site of an attention block.

    Args:
        model: The model.
        name: Path of the attention layer, whose attributes may hold the width of a head.
        output: Path of the output projection.
        projections: Rows of q, k and v.
        pooled: Path of the layer at which the input is pooled; `None`: that of q.
        is_rotary: Whether all dimensions of q and k are rotated; `None`: as the layer's signature tells.

    Returns:
        The site.
    """
    query, key, value, heads = projections
    layer = model.get_submodule(name)
    head_dim = query.size // heads
    rotation = _rotation(model, layer) if is_rotary is None else "whole" if is_rotary else "none"
    layers = {part.layer for part in (query, key, value)} | {output}
    return AttentionSite(
        name=name,
        pooled=pooled or query.layer,
        in_features=inputs_of(model, query.layer),
        output=output,
        query=query,
        key_rows=key,
        value=value,
        heads=heads,
        key_value_heads=key.size // head_dim,
        head_dim=head_dim,
        is_rotary=rotation == "whole",
        is_gated_only=rotation == "partial" or any(HEAD_NORM.fullmatch(child) for child, _ in layer.named_children()),
        head_dim_attribute=next((a for a in HEAD_DIM_ATTRIBUTES if getattr(layer, a, None) == head_dim), None),
        width_attributes=tuple(a for a in WIDTH_ATTRIBUTES if getattr(layer, a, None) == heads * head_dim),
        head_tensors=_head_tensors(name, layer, layers, heads),
    )


def head_count(model: PreTrainedModel, layer: nn.Module, width: int) -> int | None:
    """Number of query heads of an attention layer, or `None` if nothing says it.

    Args:
        model: The model.
        layer: The attention layer.
        width: Number of inputs of its output projection.

    Returns:
        The number by which the layer, or else the configuration, divides the width.
    """
    for attribute in HEAD_DIM_ATTRIBUTES:
        head_dim = getattr(layer, attribute, None)
        if isinstance(head_dim, int) and head_dim > 0 and width % head_dim == 0:
            return width // head_dim
    for owner in (layer, model.config.get_text_config()):
        for attribute in HEAD_COUNT_ATTRIBUTES:
            heads = getattr(owner, attribute, None)
            if isinstance(heads, int) and heads > 0 and width % heads == 0:
                return heads
    return None


def separate_rows(model: nn.Module, paths: Sequence[str], output: str, heads: int | None) -> Projections | None:
    """Rows of q, k and v in layers of their own; q may have a gate of each head's output beside it."""
    query, key, value = paths
    q_width, k_width, v_width = (outputs_of(model, path) for path in paths)
    width = inputs_of(model, output)
    if heads is None or width % heads or q_width % heads:
        return None
    has_gate = q_width == 2 * width
    query_rows = Rows(query, 0, width, q_width, shares=heads) if has_gate else Rows(query, 0, q_width)
    head_dim = query_rows.size // heads
    if k_width % head_dim or heads % (k_width // head_dim) or v_width * heads != width * (k_width // head_dim):
        return None
    return query_rows, Rows(key, 0, k_width), Rows(value, 0, v_width), heads


def fused_rows(model: nn.Module, path: str, layout: str, output: str, heads: int | None) -> Projections | None:
    """Rows of q, k and v in one layer, which lie one after another or side by side for each key/value head."""
    width, all_outputs = inputs_of(model, output), outputs_of(model, path)
    other = (all_outputs - width) // 2
    if heads is None or width % heads or all_outputs != width + 2 * other or other <= 0 or other % (width // heads):
        return None
    if layout == "one after another":
        starts, groups = ((0, width), (width, other), (width + other, other)), 1
    else:
        head_dim, groups = width // heads, other // (width // heads)
        sharing = heads // groups
        starts = ((0, width), (sharing * head_dim, other), ((sharing + 1) * head_dim, other))
    query, key, value = (Rows(path, start, size, all_outputs, shares=groups) for start, size in starts)
    return query, key, value, heads


def latent_rows(model: nn.Module, paths: Sequence[str], layer: nn.Module, output: str) -> Projections | None:
    """Rows of latent attention: q, and k beside v, of each head without what is rotated apart."""
    dims = [getattr(layer, attribute, None) for attribute in LATENT_ATTRIBUTES]
    if not all(isinstance(dim, int) for dim in dims):
        return None
    query, key_value = paths
    q_width, kv_width = (outputs_of(model, path) for path in paths)
    plain, rotated, value_dim = (int(dim or 0) for dim in dims)
    heads = inputs_of(model, output) // value_dim
    if q_width != heads * (plain + rotated) or kv_width != heads * (plain + value_dim):
        return None
    return (
        Rows(query, 0, heads * plain, q_width, shares=heads),
        Rows(key_value, 0, heads * plain, kv_width, shares=heads),
        Rows(key_value, plain, heads * value_dim, kv_width, shares=heads),
        heads,
    )


def _head_tensors(name: str, layer: nn.Module, projections: set[str], heads: int) -> tuple[str, ...]:
    """Parameters of an attention layer, such as a table of position biases, with one column a head."""
    return tuple(
        f"{name}.{path}"
        for path, parameter in layer.named_parameters()
        if f"{name}.{path}".rpartition(".")[0] not in projections
        and (parameter.ndim > 1 or "." not in path)
        and parameter.shape[-1:] == (heads,)
    )


def _rotation(model: PreTrainedModel, layer: nn.Module) -> str:
    """Which dimensions of q and k are rotated, as far as names tell: none, the whole head or a partial one."""
    if "position_embeddings" not in inspect.signature(layer.forward).parameters:
        return "none"
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    factor = rope.get("partial_rotary_factor", getattr(model.config, "partial_rotary_factor", 1.0))
    return "whole" if factor in (None, 1.0) else "partial"
