"""Assigns the neurons of a model to label groups before training: a core that all share, and neurons of their own."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .sites import AttentionSite, NeuronSite


def assign_neurons(
    sites: Sequence[NeuronSite], groups: int, retention: float, core_share: float, seed: int = 0
) -> dict[str, Tensor]:
    """Draws for each site which neurons each group keeps: site key to booleans, (groups, neurons).

    Every group keeps the share `retention` of each part of a site, of channels its square root, since these are cut on
    both sides, and at least one neuron; `core_share` of them are those of all groups. The others are private as far as
    there are enough: else few groups share each. Attention heads keep equally many dimensions each, as dense layers
    need it.
    """
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for place, site in enumerate(sites):
        share = math.sqrt(retention) if site.kind == "conv" else retention
        parts = []
        for part, size in site.parts.items():
            heads = _heads(site, part)
            drawn = [_draw(size // heads, groups, share, core_share, place + head, generator) for head in range(heads)]
            parts.append(torch.cat(drawn, -1))
        found[site.key] = torch.cat(parts, -1)
    return found


def _heads(site: NeuronSite, part: str) -> int:
    if not isinstance(site, AttentionSite):
        return 1
    return site.query_key_heads if part == "query_key" else site.key_value_heads


def _draw(size: int, groups: int, share: float, core_share: float, first: int, generator: torch.Generator) -> Tensor:
    """Which of `size` neurons each group keeps: (groups, size); `first` is the group that chooses first."""
    kept = max(1, round(share * size))
    core = min(kept, round(core_share * kept))
    order = torch.randperm(size, generator=generator)
    chosen = torch.zeros(groups, size, dtype=torch.bool)
    chosen[:, order[:core]] = True
    rest = order[core:]
    for turn in range(groups):
        own = torch.arange(turn * (kept - core), (turn + 1) * (kept - core)) % max(1, len(rest))
        chosen[(first + turn) % groups, rest[own]] = True
    return chosen
