"""Cutting layers by the indices of what is kept, values preserved.

Two back ends. *Dense* makes every layer smaller; attention heads are padded with zero rows to one width,
or dropped when nothing of their values is left. *Scatter* computes the kept outputs and puts them at their
old places, so that whatever happens between the layers keeps its shape (rotary attention).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .neurons import AttentionSite, FeedForwardSite, NeuronSite, layer_features

Keep = Mapping[str, Tensor]
"""Kept neurons of a site by part: sorted indices, int64."""

PAD = -1
"""Index of a row or column of zeros."""


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
    """

    widths: dict[str, int]
    layers: dict[str, LayerCut]
    head_tensors: dict[str, Tensor] = field(default_factory=dict)


class ScatterLinear(nn.Module):
    """A linear layer that reads some inputs and writes some outputs of a layer of the old outer shape.

    Args:
        in_features: Number of inputs that are read.
        out_features: Number of outputs that are computed.
        full_outputs: Width of the result, zeros elsewhere; `None` if all outputs are computed.
        reads_some: Whether `input_indices` says which inputs are read.
        has_bias: Whether there is a bias.
    """

    input_indices: Tensor | None
    output_indices: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, full_outputs: int | None, reads_some: bool, has_bias: bool
    ) -> None:
        super().__init__()
        self.full_outputs = full_outputs
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if has_bias else None
        self.register_buffer("input_indices", torch.zeros(in_features, dtype=torch.long) if reads_some else None)
        computes_some = full_outputs is not None
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
    cut = _unscaled_cut(site, keep)
    if static is not None:
        cut.layers[site.output] = replace(cut.layers[site.output], input_scale=site.read_mask(static))
        if isinstance(site, AttentionSite):
            query = site.query_mask(static)
            others = sum(r.size for r in (site.key_rows, site.value) if r.layer == site.query.layer)
            scale = torch.cat([query, query.new_ones(others)])  # q comes first in a fused projection
            cut.layers[site.query.layer] = replace(cut.layers[site.query.layer], output_scale=scale)
    return cut


def _unscaled_cut(site: NeuronSite, keep: Keep) -> SiteCut:
    if isinstance(site, FeedForwardSite):
        kept = keep["intermediate"]
        if len(kept) < site.least_width:
            kept = _padded(kept, site.least_width)
        layers = {rows.layer: LayerCut(outputs=kept) for rows in site.producers}
        return SiteCut({"intermediate": len(kept)}, {**layers, site.output: LayerCut(inputs=kept)})
    if not isinstance(site, AttentionSite):
        raise TypeError(f"Got {type(site).__name__}; expected a FeedForwardSite or an AttentionSite.")
    return _dense_attention(site, keep) if site.back_end == "dense" else _scatter_attention(site, keep)


def _dense_attention(site: AttentionSite, keep: Keep) -> SiteCut:
    query_key = _by_head(keep["query_key"], site.key_value_heads, site.query_key_dims)
    value = _by_head(keep["value"], site.key_value_heads, site.head_dim)
    # A head without value dimensions adds nothing. One head stays where none has any: its zeros cost
    # next to nothing, and the attention layer can't view a tensor of no heads.
    kept_heads = [head for head in range(site.key_value_heads) if len(value[head])] or [0]
    head_dim = max(1, *(max(len(query_key[head]), len(value[head])) for head in kept_heads))
    sharing = site.heads // site.key_value_heads
    rows = {"query": [], "key": [], "value": [], "output": []}  # type: dict[str, list[Tensor]]
    for head in kept_heads:
        shared = range(head * sharing, (head + 1) * sharing)
        rows["key"].append(_padded(query_key[head] + head * site.head_dim, head_dim))
        rows["value"].append(_padded(value[head] + head * site.head_dim, head_dim))
        rows["query"].extend(_padded(query_key[head] + q * site.head_dim, head_dim) for q in shared)
        rows["output"].extend(_padded(value[head] + q * site.head_dim, head_dim) for q in shared)
    joined = {name: torch.cat(parts) for name, parts in rows.items()}
    layers = {
        layer: LayerCut(outputs=index)
        for layer, index in _by_layer(site, joined["query"], joined["key"], joined["value"]).items()
    }
    layers[site.output] = LayerCut(inputs=joined["output"])
    heads = torch.tensor([head * sharing + q for head in kept_heads for q in range(sharing)])
    return SiteCut(
        {"key_value_heads": len(kept_heads), "head_dim": head_dim},
        layers,
        dict.fromkeys(site.head_tensors, heads),
    )


def _scatter_attention(site: AttentionSite, keep: Keep) -> SiteCut:
    sharing = site.heads // site.key_value_heads
    head, dim = keep["query_key"] // site.query_key_dims, keep["query_key"] % site.query_key_dims
    dims = torch.cat([dim, dim + site.head_dim // 2]) if site.is_rotary else dim
    heads = torch.cat([head, head]) if site.is_rotary else head
    key = (heads * site.head_dim + dims).sort().values
    query = _shared_rows(heads, dims, sharing, site.head_dim)
    value = keep["value"]
    output = _shared_rows(value // site.head_dim, value % site.head_dim, sharing, site.head_dim)
    by_layer = _by_layer(site, query, key, value)
    layers = {layer: LayerCut(outputs=index, is_scattered=True) for layer, index in by_layer.items()}
    layers[site.output] = LayerCut(inputs=output, is_scattered=True)
    return SiteCut({"query": len(query), "key": len(key), "value": len(value), "output": len(output)}, layers)


def _shared_rows(heads: Tensor, dims: Tensor, sharing: int, head_dim: int) -> Tensor:
    """Rows of the query heads that share the given key/value heads, at the given dimensions."""
    query_heads = heads[:, None] * sharing + torch.arange(sharing)
    return (query_heads * head_dim + dims[:, None]).flatten().sort().values


def _by_head(kept: Tensor, heads: int, dims: int) -> list[Tensor]:
    return [kept[kept // dims == head] % dims for head in range(heads)]


def _padded(index: Tensor, width: int) -> Tensor:
    return torch.cat([index, index.new_full((width - len(index),), PAD)])


def _by_layer(site: AttentionSite, query: Tensor, key: Tensor, value: Tensor) -> dict[str, Tensor]:
    """Kept outputs of each projection layer; a fused one gets the three shares one after another."""
    by_layer: dict[str, list[Tensor]] = {}
    for rows, index in ((site.query, query), (site.key_rows, key), (site.value, value)):
        by_layer.setdefault(rows.layer, []).append(torch.where(index == PAD, PAD, index + rows.start))
    return {layer: torch.cat(shares) for layer, shares in by_layer.items()}


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
    least = site.least_width if isinstance(site, FeedForwardSite) else int(site.back_end == "dense")
    for name, width in widths.items():
        if isinstance(width, bool) or not isinstance(width, int) or not least <= width <= most[name]:
            raise ValueError(
                f"Got the width {name}={width!r} for {site.key!r}; expected an integer from {least} to {most[name]}. "
                "The config.json is damaged or belongs to another base model: save or download the module again."
            )


def _largest_widths(site: NeuronSite) -> dict[str, int]:
    if isinstance(site, AttentionSite):
        if site.back_end == "dense":
            return {"key_value_heads": site.key_value_heads, "head_dim": site.head_dim}
        sizes = {"query": site.query.size, "key": site.key_rows.size, "value": site.value.size}
        return {**sizes, "output": site.heads * site.head_dim}
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
    if isinstance(site, FeedForwardSite):
        for rows in site.producers:
            _replace(model, rows.layer, partial(_resized, outputs=widths["intermediate"]))
        _replace(model, site.output, partial(_resized, inputs=widths["intermediate"]))
        return
    assert isinstance(site, AttentionSite)
    if site.back_end == "dense":
        _resize_dense(model, site, widths["key_value_heads"], widths["head_dim"])
        return
    counts: dict[str, int] = {}
    for rows, name in ((site.query, "query"), (site.key_rows, "key"), (site.value, "value")):
        counts[rows.layer] = counts.get(rows.layer, 0) + widths[name]
    for path, count in counts.items():
        _replace(model, path, partial(_scattered, outputs=count))
    _replace(model, site.output, partial(_scattered, inputs=widths["output"]))


def _resize_dense(model: nn.Module, site: AttentionSite, key_value_heads: int, head_dim: int) -> None:
    heads = key_value_heads * (site.heads // site.key_value_heads)
    counts: dict[str, int] = {}
    for rows, count in ((site.query, heads), (site.key_rows, key_value_heads), (site.value, key_value_heads)):
        counts[rows.layer] = counts.get(rows.layer, 0) + count * head_dim
    for path, count in counts.items():
        _replace(model, path, partial(_resized, outputs=count))
    _replace(model, site.output, partial(_resized, inputs=heads * head_dim))
    attention = model.get_submodule(site.name)
    assert site.head_dim_attribute is not None
    # The softmax scale was fixed from the old width when the layer was built, as exactness requires.
    setattr(attention, site.head_dim_attribute, head_dim)
    for attribute in site.width_attributes:
        setattr(attention, attribute, heads * head_dim)
    for path in site.head_tensors:
        owner, _, name = path.rpartition(".")
        parameter = model.get_parameter(path)
        smaller = torch.empty(*parameter.shape[:-1], heads, dtype=parameter.dtype, device=parameter.device)
        setattr(model.get_submodule(owner), name, nn.Parameter(smaller))


def resize_head(model: nn.Module, path: str, num_labels: int) -> None:
    """Gives the head at `path` one output a label, in place; the new weights are not filled in."""
    _replace(model, path, partial(_resized, outputs=num_labels))


def _replace(model: nn.Module, path: str, make: Callable[[nn.Module], nn.Module]) -> None:
    layer = model.get_submodule(path)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    with weight.device:
        made = make(layer)
    model.set_submodule(path, made.to(weight.device, weight.dtype).train(layer.training))


def _resized(layer: nn.Module, outputs: int | None = None, inputs: int | None = None) -> nn.Module:
    old_inputs, old_outputs = _features(layer)
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


def _features(layer: nn.Module) -> tuple[int, int]:
    features = layer_features(layer)
    assert features is not None
    return features


def _scattered(layer: nn.Module, outputs: int | None = None, inputs: int | None = None) -> nn.Module:
    full_inputs, full_outputs = _features(layer)
    return ScatterLinear(
        full_inputs if inputs is None else inputs,
        full_outputs if outputs is None else outputs,
        full_outputs=None if outputs is None else full_outputs,
        reads_some=inputs is not None,
        has_bias=layer.bias is not None,
    )
