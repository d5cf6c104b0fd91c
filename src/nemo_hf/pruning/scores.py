"""How much the neurons of a model matter on calibration samples: one number each, by site and part. Pure functions.

Scores of one part of a site can be compared with each other: dimensions of q and k by what they add to the squared
attention scores, all others by the mean square of what they add to the layers that read them.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nemo_hf.neurons.sites import AttentionSite, NeuronSite, neuron_dim

from .layer_edits import layer_weight
from .statistics import SiteStatistics

TIE = 0.5  # of one step of relevance, which is stored in whole numbers
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


def activity_factors(model: nn.Module, site: NeuronSite) -> Tensor:
    """What mean squares of neurons are multiplied by to get their activity scores, (neurons,), float64.

    For dimensions of q.k, of which q is measured, that is the squared norm of the weights that make k.
    """
    factors = _read_norms(model, site, {})
    if isinstance(site, AttentionSite):
        layer = model.get_submodule(site.key_rows.layer)
        norms = layer_weight(layer).cpu().flatten(1).square().sum(1)
        own = norms[site.key_rows.indices(torch.arange(site.key_rows.size))]
        factors[: site.parts["query_key"]] = _to_neurons(site, "key", own)
    return factors


def relevance_scores(sites: Sequence[NeuronSite], relevance: Mapping[str, Tensor], activity: Scores) -> Scores:
    """The relevance that training with masks gave each neuron, (neurons,) by site key; ties go by activity."""
    scores: Scores = {}
    for site in sites:
        parts = _by_part(site, relevance[site.key].double().cpu())
        ties = {name: score / (score.amax() + 1e-30) for name, score in activity[site.key].items()}
        scores[site.key] = {name: part + TIE * ties[name] for name, part in parts.items()}
    return scores


def fisher_scores(
    model: nn.Module, sites: Sequence[NeuronSite], batches: Iterable[Mapping[str, Any]], label_ids: Sequence[int]
) -> Scores:
    """Mean squared gradient of the loss with respect to a mask on each neuron, as in Kwon et al. (arXiv 2204.09656).

    The loss is the cross-entropy of the model's own answers among some labels (of one among all), a batch at a time.
    """
    totals = {site.key: torch.zeros(site.neurons, dtype=torch.float64) for site in sites}
    by_key = {site.key: site for site in sites}
    with ExitStack() as stack, torch.enable_grad():
        seen: list[tuple[str, str, Tensor, Tensor]] = []  # one entry a call

        def on_read(key: str, path: str, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            zeros = torch.zeros_like(args[0], requires_grad=True)
            seen.append((key, path, args[0].detach(), zeros))
            return (args[0] + zeros, *args[1:])

        def on_query(key: str, layer: nn.Module, args: Any, output: Tensor) -> Tensor:
            zeros = torch.zeros_like(output, requires_grad=True)
            seen.append((key, "", output.detach(), zeros))
            return output + zeros

        for site in sites:
            for path in site.readers:
                hook = model.get_submodule(path).register_forward_pre_hook(partial(on_read, site.key, path))
                stack.callback(hook.remove)
            if isinstance(site, AttentionSite):
                hook = model.get_submodule(site.query.layer).register_forward_hook(partial(on_query, site.key))
                stack.callback(hook.remove)
        for inputs in batches:
            seen.clear()
            logits = _labels_among(model(**inputs, return_dict=True).logits, label_ids).flatten(0, -2)
            loss = F.cross_entropy(logits, logits.detach().argmax(-1), reduction="sum")
            gradients = torch.autograd.grad(loss, [zeros for *_, zeros in seen])
            samples = len(next(iter(inputs.values())))
            by_sample = {key: torch.zeros(samples, site.neurons, dtype=torch.float64) for key, site in by_key.items()}
            for (key, path, values, _), gradient in zip(seen, gradients, strict=True):
                by_sample[key] += _mask_gradients(model, by_key[key], path, values * gradient, samples)
            for key, summed in by_sample.items():
                totals[key] += summed.square().sum(0)
    return {site.key: _by_part(site, totals[site.key]) for site in sites}


def _labels_among(logits: Tensor, label_ids: Sequence[int]) -> Tensor:
    """Logits (..., labels) of some labels, of all if it is only one, since its loss would be 0."""
    logits = logits.movedim(1, -1) if logits.ndim == 4 else logits
    return logits[..., list(label_ids)] if len(label_ids) > 1 else logits


def _mask_gradients(model: nn.Module, site: NeuronSite, path: str, product: Tensor, samples: int) -> Tensor:
    """Gradient of each neuron's mask by sample, (samples, neurons), from values times their gradients."""
    last = product.movedim(1, -1) if path != "" and neuron_dim(model.get_submodule(path)) == 1 else product
    by_sample = last.reshape(samples, -1, last.shape[-1])
    summed = by_sample.double().sum(1).cpu()
    places = torch.arange(site.neurons, dtype=torch.float64)
    if path == "":
        assert isinstance(site, AttentionSite)
        summed = summed[:, site.query.indices(torch.arange(site.query.size))]
        owners = site.part_mask("query", places).long()
    else:
        owners = site.input_scale(path, places).long()
    return torch.zeros(samples, site.neurons, dtype=torch.float64).index_add_(1, owners, summed)


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
    """For each neuron the squared norm of the weights that read it, times the mean square of what they read."""
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
