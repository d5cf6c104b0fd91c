"""How much the neurons of a model matter on calibration samples: one number each, by site and part. Pure functions.

Scores of one part of a site can be compared with each other: dimensions of q and k by what they add to the squared
attention scores, all others by the mean square of what they add to the layers that read them.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nemo_hf.neurons.sites import AttentionSite, NeuronSite

from .layer_edits import layer_weight
from .statistics import SiteStatistics

Scores = dict[str, dict[str, Tensor]]  # site key to part to scores of its neurons, float64


def activity_scores(model: nn.Module, sites: Sequence[NeuronSite], statistics: Mapping[str, SiteStatistics]) -> Scores:
    """Mean square of what a neuron says times the squared norm of the weights that read it.

    This is the score of Wanda (arXiv 2306.11695) for whole neurons; those of q.k are mean products of q and of k.
    """
    return {site.key: _of_site(model, site, statistics[site.key]) for site in sites}


def magnitude_scores(model: nn.Module, sites: Sequence[NeuronSite]) -> Scores:
    """Squared norm of the weights that make a neuron times that of those that read it, without any sample."""
    scores: Scores = {}
    for site in sites:
        made: dict[str, Tensor] = {}
        for rows, part in site.produced():
            layer = model.get_submodule(rows.layer)
            norms = layer_weight(layer).cpu().flatten(1).square().sum(1)[rows.indices(torch.arange(rows.size))]
            made[part] = made[part] + norms if part in made else norms
        own = {part: _to_neurons(site, part, norms) for part, norms in made.items()}
        read = _by_part(site, _read_norms(model, site, {}))
        if isinstance(site, AttentionSite):
            scores[site.key] = {"query_key": own["query"] * own["key"], "value": own["value"] * read["value"]}
        else:
            scores[site.key] = {name: own["units"] * values for name, values in read.items()}
    return scores


def _of_site(model: nn.Module, site: NeuronSite, statistics: SiteStatistics) -> dict[str, Tensor]:
    squares = {path: moments.second() for path, moments in statistics.read.items()}
    flat = {path: (s.diagonal(dim1=1, dim2=2) if s.ndim == 3 else s).flatten() for path, s in squares.items()}
    scores = _by_part(site, _read_norms(model, site, flat))
    if isinstance(site, AttentionSite):
        query = statistics.query.second().diagonal(dim1=1, dim2=2).flatten()
        key = statistics.key.covariance().diagonal(dim1=1, dim2=2).flatten()
        scores["query_key"] = _to_neurons(site, "query", query) * _to_neurons(site, "key", key)
    return scores


def _read_norms(model: nn.Module, site: NeuronSite, squares: Mapping[str, Tensor]) -> Tensor:
    """For each neuron of a site the squared norm of the weights that read it, times the mean square of what they read."""
    scores = torch.zeros(site.neurons, dtype=torch.float64)
    places = torch.arange(site.neurons, dtype=torch.float64)
    for path in site.readers:
        weight = layer_weight(model.get_submodule(path)).cpu()
        norms = weight.movedim(1, 0).flatten(1).square().sum(1)
        if path in squares:
            norms = norms * squares[path].cpu()
        scores.index_add_(0, site.input_scale(path, places).long(), norms)
    return scores


def _to_neurons(site: NeuronSite, part: str, values: Tensor) -> Tensor:
    """Sums over the rows of a part that belong to each neuron."""
    name = {"query": "query_key", "key": "query_key", "units": next(iter(site.parts))}.get(part, part)
    places = site.part_mask(part, torch.arange(site.neurons, dtype=torch.float64)).long()
    offset = 0
    for each, size in site.parts.items():
        if each == name:
            break
        offset += size
    return torch.zeros(site.parts[name], dtype=torch.float64).index_add_(0, places - offset, values.double().cpu())


def _by_part(site: NeuronSite, values: Tensor) -> dict[str, Tensor]:
    return dict(zip(site.parts, values.split(list(site.parts.values())), strict=True))
