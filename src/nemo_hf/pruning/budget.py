"""Spreads a budget of weights over the sites of a model: which neurons stay, given a score of each. Pure functions."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nemo_hf.neurons.sites import AttentionSite, NeuronSite

from .layer_cuts import LayerCut, site_cut
from .layer_edits import weight_shape
from .plan import Plan

Cost = Literal["weights", "operations"]
Keep = dict[str, dict[str, Tensor]]
GRAIN, HEAD_GRAIN = 16, 4  # of feed-forward widths (the widest vectors of a CPU have 16 floats) and of heads
STEPS = 12  # of the bisection: shares are found to 1/4096, and so are the gains of channels


def layer_weights(model: nn.Module, sites: Sequence[NeuronSite]) -> dict[str, float]:
    """Number of weights of each layer that makes or reads neurons, by path."""
    paths = dict.fromkeys(path for site in sites for path in _layers(site))
    return {path: float(math.prod(weight_shape(model.get_submodule(path)))) for path in paths}


@torch.no_grad()
def layer_operations(model: nn.Module, sites: Sequence[NeuronSite], inputs: Mapping[str, Any]) -> dict[str, float]:
    """Multiplications of a batch with the weights of each of these layers, by path; padding counts as well."""
    weights = layer_weights(model, sites)
    found = dict.fromkeys(weights, 0.0)

    def count(path: str, layer: nn.Module, args: Any, output: Tensor) -> None:
        found[path] += weights[path] * output.numel() / weight_shape(layer)[0]

    with ExitStack() as stack:
        for path in weights:
            stack.callback(model.get_submodule(path).register_forward_hook(partial(count, path)).remove)
        model(**inputs, return_dict=True)
    return found


def kept_share(model: nn.Module, sites: Sequence[NeuronSite], costs: Mapping[str, float], plan: Plan) -> float:
    """What is left of the costs of layers, by path, with the neurons that a plan keeps, padding included."""
    by_key = {site.key: site for site in sites}
    left = dict(costs)
    for key, kept in plan.items():
        for path, cut in site_cut(by_key[key], kept).layers.items():
            if path in left:
                outputs, inputs = _kept_shares(model.get_submodule(path), cut)
                left[path] *= outputs * inputs
    return sum(left.values()) / (sum(costs.values()) or 1.0)


def _layers(site: NeuronSite) -> list[str]:
    return [*site.readers, *(rows.layer for rows, _ in site.produced())]


def _kept_shares(layer: nn.Module, cut: LayerCut) -> tuple[float, float]:
    outputs, inputs = weight_shape(layer)[:2]
    of_outputs = 1.0 if cut.outputs is None else len(cut.outputs) / outputs
    return of_outputs, 1.0 if cut.inputs is None else len(cut.inputs) / inputs


def plan_budget(
    model: nn.Module,
    sites: Sequence[NeuronSite],
    scores: Mapping[str, Mapping[str, Tensor]],
    costs: Mapping[str, float],
    retention: float,
    dropped: Collection[str] = (),
) -> dict[str, dict[str, Tensor]]:
    """Keeps the neurons of the highest scores within a share of the costs of their layers.

    Attention and feed-forward neurons: the same share of each part; then feed-forward widths are rounded down to
    multiples at which products are fast, widths of heads are rounded up, attention gets what is left, and feed-forward
    parts get what is too little for a further dimension of all heads. Channels of convolutions, whose layers cost very
    differently: those which add most, for their costs, to the logarithm of what their layer keeps of its scores, so
    that no layer starves. Every site keeps a neuron at least, except those whose keys are `dropped`, which keep none.
    Returns site key to part to kept neurons: sorted indices.
    """
    plan: dict[str, dict[str, Tensor]] = {}
    for has_channels in (False, True):
        own = [site for site in sites if (site.kind == "conv") == has_channels]
        paths = {path for site in own for path in _layers(site)}
        own_costs = {path: cost for path, cost in costs.items() if path in paths}

        def fits(found: Plan, own: Any = own, own_costs: Any = own_costs) -> bool:
            return kept_share(model, own, own_costs, found) <= retention

        if has_channels:
            found, _ = _largest(_keep_gains(own, scores, own_costs), fits)
        else:
            found, share = _largest(partial(_keep_share, own, scores, dropped), fits)
            if share < 1:
                found, of_attention = _largest(partial(_keep_share, own, scores, dropped, share), fits, share)
                rest = partial(_keep_share, own, scores, dropped, of_attention=of_attention)
                found, _ = _largest(rest, fits, share)
        plan |= found
    return {site.key: plan[site.key] for site in sites}


def _largest(keep: Callable[[float], Keep], fits: Callable[[Keep], bool], low: float = 0.0) -> tuple[Keep, float]:
    """What the largest share that fits keeps, and this share; the lowest one is taken to fit."""
    high = 1.0
    if fits(keep(high)):
        return keep(high), high
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(keep(middle)) else (low, middle)
    return keep(low), low


def _keep_share(
    sites: Sequence[NeuronSite], scores: Mapping[str, Mapping[str, Tensor]], dropped: Collection[str],
    share: float, of_attention: float | None = None,
) -> dict[str, dict[str, Tensor]]:  # fmt: skip
    """Keeps a share of each part; where attention has one of its own, the others' widths are rounded down."""
    plan = {}
    for site in sites:
        if site.key in dropped:
            plan[site.key] = dict.fromkeys(site.parts, torch.empty(0, dtype=torch.long))
        elif isinstance(site, AttentionSite):
            plan[site.key] = _attention(site, scores[site.key], share if of_attention is None else of_attention)
        else:
            counts = {name: share * len(score) for name, score in scores[site.key].items()}
            if of_attention is not None:
                counts = {name: _downwards(count) for name, count in counts.items()}
            plan[site.key] = {name: _best(score, counts[name]) for name, score in scores[site.key].items()}
    return plan


def _downwards(count: float) -> float:
    """Rounds a width down to a multiple of a power of two: `GRAIN`, or less where that takes over a sixteenth away."""
    grain = 1 << math.floor(math.log2(max(1.0, min(GRAIN, count / 16))))
    return math.floor(count / grain + 1e-9) * grain


def _upwards(width: int, most: int) -> int:
    """Rounds the width of a head of `most` dimensions up to a multiple of four, or of less for narrow heads."""
    grain = max(1, min(HEAD_GRAIN, most // 8)) if width > HEAD_GRAIN // 2 else 1
    return min(most, -(-width // grain) * grain)


def _keep_gains(
    sites: Sequence[NeuronSite], scores: Mapping[str, Mapping[str, Tensor]], costs: Mapping[str, float]
) -> Callable[[float], dict[str, dict[str, Tensor]]]:
    """Returns what keeps, of all parts of the sites together, a share of the neurons: those of the largest gains."""
    gains: dict[tuple[str, str], Tensor] = {}
    for site in sites:
        cost = max(1.0, sum(costs[path] for path in set(_layers(site))) / site.neurons)
        for name, score in scores[site.key].items():
            ordered = score.double().clamp(min=0).sort(descending=True).values
            gains[site.key, name] = ordered / ordered.cumsum(0).clamp(min=1e-300) / cost
    ranked = torch.cat([*gains.values(), torch.zeros(1)]).sort(descending=True).values

    def keep(share: float) -> dict[str, dict[str, Tensor]]:
        least = ranked[math.floor(share * (len(ranked) - 1))]
        return {
            site.key: {name: _best(score, int((gains[site.key, name] > least).sum()) if share < 1 else len(score))
                       for name, score in scores[site.key].items()}
            for site in sites
        }  # fmt: skip

    return keep


def _best(score: Tensor, count: float) -> Tensor:
    kept = max(1, min(len(score), math.floor(count + 1e-9)))
    return score.argsort(descending=True, stable=True)[:kept].sort().values


def _attention(site: AttentionSite, scores: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Chooses heads, and one number of dimensions for all of them, as dense layers need it; all in one step.

    Among all numbers of heads and dimensions of this size the one whose heads keep most of what they add, each weighted
    by the share of its attention scores that its dimensions keep; dimensions are then rounded up.
    """
    heads, dims = site.key_value_heads, site.value_dim
    value = scores["value"].view(heads, dims).sort(-1, descending=True)
    query_key = scores["query_key"].view(site.query_key_heads, site.query_key_dims).sort(-1, descending=True)
    paired = 2 if site.is_rotary else 1
    budget = share * heads * dims
    best: tuple[float, int, Tensor] | None = None
    total = query_key.values.sum(-1).clamp(min=1e-30)
    for width in range(1, dims + 1):
        count = min(heads, math.floor(budget / width + 1e-9))
        own = min(site.query_key_dims, max(1, width // paired))
        if count < 1:
            break
        kept = value.values[:, :width].sum(-1) * (query_key.values[:, :own].sum(-1) / total)
        chosen = kept.topk(count).indices
        worth = kept[chosen].sum().item()
        if best is None or worth > best[0]:
            best = (worth, width, chosen.sort().values)
    if best is None:
        best = (0.0, 1, value.values[:, 0].topk(1).indices)
    _, width, chosen = best
    width = _upwards(width, dims)
    own = min(site.query_key_dims, max(1, width // paired))
    of_query = chosen if site.query_key_heads == heads else torch.arange(site.query_key_heads)
    keep_value = value.indices[chosen, :width] + chosen[:, None] * dims
    keep_query = query_key.indices[of_query, :own] + of_query[:, None] * site.query_key_dims
    return {
        "query_key": keep_query.flatten().sort().values,
        "value": keep_value.flatten().sort().values,
    }
