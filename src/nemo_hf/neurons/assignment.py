"""Assigns the neurons of a model to label groups: a core that all share, and neurons of their own. Pure functions."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .sites import AttentionSite, NeuronSite

LEAST = 128  # stored relevance of the last neuron that a group keeps; that of the first is 255
TURNS = 16  # most turns in which a group chooses neurons of its own


def assign_neurons(
    sites: Sequence[NeuronSite], scores: Mapping[str, Tensor], retention: float, core_share: float
) -> dict[str, Tensor]:
    """Chooses for each site which neurons each group keeps: site key to stored relevance, uint8, (groups, neurons).

    Every group keeps the share `retention` of each part of a site, of channels its square root, since these are cut on
    both sides, and at least one neuron. `core_share` of them are those of all groups: the best on average. Then the
    groups choose in turn among those that fewest have, so that none is shared while there are enough. Attention heads
    keep equally many dimensions each, as dense layers need it.

    The relevance falls from 255 to `LEAST` in the order of choice, so that a higher threshold makes a smaller module of
    the same proportions; 0 is not kept.

    Args:
        sites: The sites.
        scores: What each neuron does for each group, at least 0, (groups, neurons) by site key.
        retention: Share of the weights that the module of one group keeps, in (0, 1].
        core_share: Share of a group's neurons, in [0, 1].
    """
    found = {}
    for place, site in enumerate(sites):
        share = math.sqrt(retention) if site.kind == "conv" else retention
        parts = []
        for (part, size), own in zip(
            site.parts.items(), scores[site.key].double().cpu().split(list(site.parts.values()), -1), strict=True
        ):
            heads = _heads(site, part)
            kept = max(1, round(share * (size // heads)))
            chosen = [_choose(head, kept, core_share, place + index) for index, head in enumerate(own.chunk(heads, -1))]
            parts.append(torch.cat(chosen, -1))
        found[site.key] = torch.cat(parts, -1)
    return found


def _heads(site: NeuronSite, part: str) -> int:
    if not isinstance(site, AttentionSite):
        return 1
    return site.query_key_heads if part == "query_key" else site.key_value_heads


def _choose(scores: Tensor, kept: int, core_share: float, first: int) -> Tensor:
    """Stored relevance of the neurons of one part or head, (groups, neurons); the group `first` chooses first."""
    scores = scores / scores.sum(-1, keepdim=True).clamp(min=1e-30)
    groups, size = scores.shape
    core = min(kept, round(core_share * kept))
    relevance = torch.zeros(groups, size, dtype=torch.uint8)
    shared = scores.mean(0).argsort(descending=True, stable=True)[:core]
    relevance[:, shared] = _falling(core)
    order, block = _falling(kept - core), max(1, -(-(kept - core) // TURNS))
    owners = torch.zeros(size, dtype=torch.float64).index_fill(0, shared, math.inf)
    preference = scores / scores.amax(-1, keepdim=True).clamp(min=1e-30) / 2  # below one owner more or less
    for turn, start in enumerate(range(0, kept - core, block)):
        for each in range(groups):
            group = (first + turn + each) % groups
            cost = (owners - preference[group]).masked_fill(relevance[group] > 0, math.inf)
            best = cost.argsort(stable=True)[: min(block, kept - core - start)]
            relevance[group, best] = order[start : start + len(best)]
            owners[best] += 1
    return relevance


def _falling(count: int) -> Tensor:
    """Stored relevance of neurons in the order in which they were chosen, (count,)."""
    return (255 - torch.arange(count) * (256 - LEAST) // max(1, count)).to(torch.uint8)
