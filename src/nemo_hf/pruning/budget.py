"""Spreads a budget of weights over the sites of a model: which neurons stay, given a score of each. Pure functions."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nemo_hf.neurons.sites import AttentionSite, NeuronSite

from .layer_cuts import LayerCut, site_cut
from .layer_edits import weight_shape
from .plan import Plan

STEPS = 12  # of the bisection: shares are found to 1/4096


def masked_weights(model: nn.Module, sites: Sequence[NeuronSite], plan: Plan | None = None) -> float:
    """Number of weights of the layers that sites name, all of them or those that a plan keeps, padding included."""
    by_key = {site.key: site for site in sites}
    whole: dict[str, tuple[float, float]] = {}
    for site in sites:
        for path in {*site.readers, *(rows.layer for rows, _ in site.produced())}:
            whole[path] = (1.0, 1.0)
    for key, kept in (plan or {}).items():
        for path, cut in site_cut(by_key[key], kept).layers.items():
            if path in whole:
                outputs, inputs = _kept_shares(model.get_submodule(path), cut)
                whole[path] = (whole[path][0] * outputs, whole[path][1] * inputs)
    sizes = {path: math.prod(weight_shape(model.get_submodule(path))) for path in whole}
    return sum(sizes[path] * share[0] * share[1] for path, share in whole.items())


def _kept_shares(layer: nn.Module, cut: LayerCut) -> tuple[float, float]:
    outputs, inputs = weight_shape(layer)[:2]
    of_outputs = 1.0 if cut.outputs is None else len(cut.outputs) / outputs
    return of_outputs, 1.0 if cut.inputs is None else len(cut.inputs) / inputs


def plan_budget(
    model: nn.Module,
    sites: Sequence[NeuronSite],
    scores: Mapping[str, Mapping[str, Tensor]],
    retention: float,
) -> dict[str, dict[str, Tensor]]:
    """Keeps the neurons of the highest scores, the same share of each part, within a share of the layers' weights.

    Every site keeps a neuron at least. Returns site key to part to kept neurons: sorted indices.
    """
    limit = retention * masked_weights(model, sites)
    low, high = 0.0, 1.0
    if masked_weights(model, sites, _keep_share(sites, scores, high)) <= limit:
        return _keep_share(sites, scores, high)
    for _ in range(STEPS):
        middle = (low + high) / 2
        fits = masked_weights(model, sites, _keep_share(sites, scores, middle)) <= limit
        low, high = (middle, high) if fits else (low, middle)
    return _keep_share(sites, scores, low)


def _keep_share(
    sites: Sequence[NeuronSite], scores: Mapping[str, Mapping[str, Tensor]], share: float
) -> dict[str, dict[str, Tensor]]:
    plan = {}
    for site in sites:
        if isinstance(site, AttentionSite):
            plan[site.key] = _attention(site, scores[site.key], share)
        else:
            plan[site.key] = {name: _best(score, share * len(score)) for name, score in scores[site.key].items()}
    return plan


def _best(score: Tensor, count: float) -> Tensor:
    kept = max(1, min(len(score), math.floor(count + 1e-9)))
    return score.argsort(descending=True, stable=True)[:kept].sort().values


def _attention(site: AttentionSite, scores: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Chooses heads, and one number of dimensions for all of them, as dense layers need it; all in one step.

    Among all numbers of heads and dimensions of this size the one whose heads keep most of what they add, each weighted
    by the share of its attention scores that its dimensions keep.
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
    own = min(site.query_key_dims, max(1, width // paired))
    of_query = chosen if site.query_key_heads == heads else torch.arange(site.query_key_heads)
    keep_value = value.indices[chosen, :width] + chosen[:, None] * dims
    keep_query = query_key.indices[of_query, :own] + of_query[:, None] * site.query_key_dims
    return {
        "query_key": keep_query.flatten().sort().values,
        "value": keep_value.flatten().sort().values,
    }
