"""Builds neuron sites from the paths of layers: how q, k, v and units lie in the outputs of these layers."""

import inspect
import re
import sys
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .sites import CHANNEL_NORMS, AttentionSite, ChannelSite, FeedForwardSite, Rows, layer_features

Projections = tuple[Rows, Rows, Rows, int]  # of q, k and v, and the number of query heads

HEAD_DIM_ATTRIBUTES = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size", "d_head", "depth")
HEAD_COUNT_ATTRIBUTES = ("num_attention_heads", "num_heads", "n_heads", "n_head", "num_head")
WIDTH_ATTRIBUTES = ("all_head_size", "split_size", "inner_dim")
LATENT_ATTRIBUTES = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
HEAD_NORM = re.compile(r"([qk](uery|ey)?_?(layer_?)?norm)|(norm_[qk])")


class ModelLayers:
    """A model's layers by path, collected once: `unique` names each once, `linear` says (inputs, outputs)."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.config: PreTrainedConfig = model.config
        self.unique = dict(model.named_modules())
        self.by_path = dict(model.named_modules(remove_duplicate=False))
        self.linear = {path: size for path, layer in self.by_path.items() if (size := layer_features(layer))}


def channel_site(
    layers: ModelLayers, producers: Sequence[str], passing: Sequence[str], readers: Sequence[str]
) -> ChannelSite | None:
    """Builds the site of a convolution's channels, or returns `None` if the layers' widths are not those of one."""
    widths = {path: _channels(layers.by_path[path]) for path in (*producers, *passing, *readers)}
    channels = widths[producers[0]][1]
    same = {*(widths[path][1] for path in producers), *(widths[path][2] for path in passing)}
    mixed = [widths[path][3] for path in passing]
    group = max(mixed, default=1)
    read_by = [(path, widths[path][0]) for path in readers]
    if channels < 1 or same != {channels} or any(group % each for each in mixed):
        return None
    if any(read < 1 or read % channels for _, read in read_by):
        return None
    return ChannelSite(
        name=producers[0],
        pooled=readers[0],
        in_features=channels,
        output=readers[0],
        least_width=1,  # torch has no convolution without outputs
        channels=channels,
        size=channels // group,
        producers=tuple(producers),
        passing=tuple(passing),
        read_by=tuple(read_by),
    )


def _channels(layer: nn.Module) -> tuple[int, int, int, int]:
    """Numbers of channels that a layer reads, makes and passes on (0: none), and of those that it mixes."""
    if isinstance(layer, CHANNEL_NORMS):
        return 0, 0, layer.num_features, 1
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        passed = layer.out_channels if layer.in_channels == layer.out_channels else 0
        return 0, 0, passed, layer.out_channels // layer.groups
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels, 0, 1
    inputs, outputs = (isinstance(layer, nn.Linear) and layer_features(layer)) or (0, 0)
    return inputs, outputs, 0, 1


def feed_forward_site(
    layers: ModelLayers,
    name: str,
    producers: Sequence[str],
    output: str,
    pooled: str | None = None,
    pooled_output: bool = False,
) -> FeedForwardSite | None:
    """Builds the site of a feed-forward part of one layer or a GLU, or returns `None` if the widths don't fit."""
    width = layers.linear[output][0]
    widths = [layers.linear[path][1] for path in producers]
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
        in_features=layers.linear[producers[0]][0],
        output=output,
        # Conv1D views its input as (-1, width), which torch can't do at width 0.
        least_width=int(isinstance(layers.by_path[output], Conv1D)),
        producers=rows,
    )


def attention_site(
    layers: ModelLayers,
    name: str,
    output: str,
    projections: Projections,
    pooled: str | None = None,
    is_rotary: bool | None = None,
) -> AttentionSite:
    """Builds the site of the attention layer `name`; `is_rotary=None` takes what its signature suggests."""
    query, key, value, heads = projections
    layer = layers.by_path[name]
    head_dim = query.size // heads
    rotation = _rotation(layers.config, layer) if is_rotary is None else "whole" if is_rotary else "none"
    return AttentionSite(
        name=name,
        pooled=pooled or query.layer,
        in_features=layers.linear[query.layer][0],
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
        head_tensors=_head_tensors(name, layer, {query.layer, key.layer, value.layer, output}, heads),
    )


def head_count(config: PreTrainedConfig, layer: nn.Module, width: int) -> int | None:
    """Number of query heads as the layer or else the configuration says it, if it divides `width`; else `None`."""
    for attribute in HEAD_DIM_ATTRIBUTES:
        head_dim = getattr(layer, attribute, None)
        if isinstance(head_dim, int) and head_dim > 0 and width % head_dim == 0:
            return width // head_dim
    for owner in (layer, config.get_text_config()):
        for attribute in HEAD_COUNT_ATTRIBUTES:
            heads = getattr(owner, attribute, None)
            if isinstance(heads, int) and heads > 0 and width % heads == 0:
                return heads
    return None


def separate_rows(layers: ModelLayers, paths: Sequence[str], output: str, heads: int | None) -> Projections | None:
    """Rows of q, k and v in layers of their own; q may have a gate of each head's output beside it."""
    query, key, value = paths
    q_width, k_width, v_width = (layers.linear[path][1] for path in paths)
    width = layers.linear[output][0]
    if heads is None or width % heads or q_width % heads:
        return None
    has_gate = q_width == 2 * width
    query_rows = Rows(query, 0, width, q_width, shares=heads) if has_gate else Rows(query, 0, q_width)
    head_dim = query_rows.size // heads
    if k_width % head_dim or heads % (k_width // head_dim) or v_width * heads != width * (k_width // head_dim):
        return None
    return query_rows, Rows(key, 0, k_width), Rows(value, 0, v_width), heads


def fused_rows(layers: ModelLayers, path: str, layout: str, output: str, heads: int | None) -> Projections | None:
    """Rows of q, k and v in one layer, which lie one after another or side by side for each key/value head."""
    width, all_outputs = layers.linear[output][0], layers.linear[path][1]
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


def latent_rows(layers: ModelLayers, paths: Sequence[str], name: str, output: str) -> Projections | None:
    """Rows of latent attention: q, and k beside v, of each head without the dimensions that are rotated."""
    dims = [getattr(layers.by_path[name], attribute, None) for attribute in LATENT_ATTRIBUTES]
    if not all(isinstance(dim, int) for dim in dims):
        return None
    query, key_value = paths
    q_width, kv_width = (layers.linear[path][1] for path in paths)
    plain, rotated, value_dim = (int(dim or 0) for dim in dims)
    heads = layers.linear[output][0] // value_dim
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


def _rotation(config: PreTrainedConfig, layer: nn.Module) -> str:
    """Which dimensions of q and k are rotated, judged by names: "none", the "whole" head or a "partial" one."""
    if "position_embeddings" not in inspect.signature(layer.forward).parameters:
        return "none"
    # Detectors add what they call so; where q and k are rotated, something is named for it.
    code = getattr(inspect.unwrap(type(layer).forward), "__code__", None)
    names = {*vars(sys.modules[type(layer).__module__]), *(code.co_names if code else ())}
    if not any("rota" in name.lower() for name in names):
        return "none"
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    factor = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0))
    return "whole" if factor in (None, 1.0) else "partial"
