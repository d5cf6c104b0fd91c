"""From relevance to a module's plan: which neurons of each site stay. Pure functions of tensors."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nemo_hf.neurons.masks import NeuronMasks
from nemo_hf.neurons.sites import AttentionSite, NeuronSite

LARGEST_MULTIPLE = 100_000  # that widths are filled up to
RELEVANCE_SCALE = 255
"""Relevance is stored as round(255 f), where f is the share of a group's samples that open a neuron, known to 1/510.

A lower share, such as one sample of 10,000, counts as never open, and one above 1 - 1/510 as always open.
"""

Plan = Mapping[str, Mapping[str, Tensor]]  # site key to part to kept neurons: sorted indices, int64


def is_relevant(relevance: Tensor, threshold: float) -> Tensor:
    """Whether stored relevances (uint8) reach a threshold in (0, 1], rounded as they were; 0 reaches none."""
    stored = int((torch.tensor(threshold, dtype=torch.float32) * RELEVANCE_SCALE).round())
    return relevance >= max(1, stored)


def plan_module(
    sites: Sequence[NeuronSite],
    relevance: Mapping[str, Tensor],
    groups: Sequence[int],
    threshold: float,
    round_to: int | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Chooses the neurons that reach the threshold in any of some groups (indices), as NeMo (arXiv 2508.11348) does.

    `relevance` maps site keys to uint8 of shape (groups, neurons). `round_to` fills widths up to multiples of it with
    the next most relevant neurons; empty sites and empty heads stay empty. Raises ValueError if no neuron is kept.
    """
    if round_to is not None and not (type(round_to) is int and 1 <= round_to <= LARGEST_MULTIPLE):
        raise ValueError(
            f"Got round_to={round_to!r}; expected None or a positive integer up to {LARGEST_MULTIPLE}, such as 8 or 16."
        )
    plan = {}
    for site in sites:
        scores = relevance[site.key][list(groups)].amax(0).to("cpu", torch.int64)
        parts = dict(zip(site.parts, scores.split(list(site.parts.values())), strict=True))
        kept = {name: is_relevant(part, threshold) for name, part in parts.items()}
        if isinstance(site, AttentionSite):
            # Without values a head adds nothing, whatever it attends to.
            alive = kept["value"].view(site.key_value_heads, -1).any(-1, keepdim=True)
            alive = alive.any(0, keepdim=True) if site.is_rotary else alive
            kept["query_key"] = (kept["query_key"].view(site.query_key_heads, -1) & alive).flatten()
        if round_to:
            _fill(site, kept, parts, round_to)
        plan[site.key] = {name: part.nonzero().squeeze(-1) for name, part in kept.items()}
    if not any(len(index) for keep in plan.values() for index in keep.values()):
        raise ValueError(
            f"Got a relevance that opens no neuron at the threshold {threshold}; expected at least one. "
            "Lower the threshold, or train with a smaller sparsity_weight."
        )
    return plan


def _fill(site: NeuronSite, kept: dict[str, Tensor], scores: Mapping[str, Tensor], round_to: int) -> None:
    if not isinstance(site, AttentionSite) or site.cut_by.is_scattered:
        for name, part in kept.items():
            kept[name] = _most_relevant(part, scores[name], _rounded(int(part.sum()), round_to, len(part)))
        return
    # Dense heads are padded to the widest one: fill them with neurons instead, all to one rounded width.
    heads = {"query_key": site.query_key_heads, "value": site.key_value_heads}
    by_head = {name: part.view(heads[name], -1).clone() for name, part in kept.items()}
    alive = by_head["value"].any(-1).nonzero().flatten().tolist()
    if not alive:
        return
    # A frequency of a rotary head is two of its dimensions, and the same in all heads.
    dims = {"query_key": 2 if site.is_rotary else 1, "value": 1}
    open_heads = {name: alive if count == site.key_value_heads else [0] for name, count in heads.items()}
    widest = max(dims[name] * int(part[open_heads[name]].sum(-1).max()) for name, part in by_head.items())
    width = _rounded(widest, math.lcm(round_to, dims["query_key"]), site.head_dim)
    for name, part in by_head.items():
        for head in open_heads[name]:
            part[head] = _most_relevant(part[head], scores[name].view_as(part)[head], width // dims[name])
        kept[name] = part.flatten()


def _rounded(count: int, multiple: int, most: int) -> int:
    return min(most, -(-count // multiple) * multiple)


def _most_relevant(kept: Tensor, scores: Tensor, count: int) -> Tensor:
    """The kept neurons and the next most relevant ones, `count` in all; ties go to the lower index."""
    order = torch.where(kept, scores + RELEVANCE_SCALE + 1, scores).argsort(descending=True, stable=True)
    return torch.zeros_like(kept).index_fill(0, order[:count], True)


def static_masks(sites: Sequence[NeuronSite], plan: Plan) -> dict[str, Tensor]:
    """Turns a plan into the static masks that a module computes under: 0/1, float32, shape (neurons,) by site key."""
    parts = {
        site.key: [torch.zeros(size).index_fill(0, plan[site.key][name], 1.0) for name, size in site.parts.items()]
        for site in sites
    }
    return {key: torch.cat(masks) for key, masks in parts.items()}


def retained_neurons(sites: Sequence[NeuronSite], plan: Plan) -> float:
    """Neuron retention rate of a plan: kept neurons over all neurons that masks reach."""
    return sum(len(index) for keep in plan.values() for index in keep.values()) / sum(site.neurons for site in sites)


def module_masks(masks: NeuronMasks, groups: Tensor | slice, threshold: float) -> dict[str, Tensor]:
    """Static masks, 0/1, of the module that some groups of a parent would have now; `groups` indexes the relevance."""
    return {key: is_relevant(table[groups].amax(0), threshold).float() for key, table in masks.relevance().items()}
