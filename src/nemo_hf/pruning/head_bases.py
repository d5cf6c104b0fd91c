"""Turns the dimensions of attention heads into directions that matter more and less, without changing the model.

The product of q and k, and that of values and output projection, stay the same under any invertible matrix between the
two. In the bases taken here dimensions are uncorrelated on the calibration samples, and the first r of a head are the
best approximation of rank r: of the attention scores (up to what the softmax ignores), and of what the head adds to the
stream. Whatever is cut afterwards cuts these directions instead of single dimensions.
"""

import torch
from torch import Tensor, nn

from nemo_hf.neurons.sites import AttentionSite

from .layer_edits import change_rows, layer_weight, set_weight
from .statistics import SiteStatistics

DAMPING = 1e-4  # of the mean variance of a head's dimensions, so that all matrices can be inverted


def query_key_basis(site: AttentionSite, statistics: SiteStatistics) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices for q and k, (key/value heads, dims, dims), and the mean squared score of each new dimension."""
    query = statistics.query.second().unflatten(0, (site.key_value_heads, -1)).mean(1)
    query_root, query_inverse = _roots(query)
    key_root, key_inverse = _roots(statistics.key.covariance())  # the softmax ignores what all keys share
    left, values, right = torch.linalg.svd(query_root @ key_root)
    spread = values.clamp(min=values.amax() * 1e-12 + 1e-30).sqrt()[:, None, :]
    return query_inverse @ left * spread, key_inverse @ right.mT * spread, values.square()


def value_basis(site: AttentionSite, statistics: SiteStatistics, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices for v and for what reads it, (key/value heads, dims, dims), and the mean square of what each dim adds.

    `weight` is that of the output projection, (outputs, heads * dims).
    """
    shared = (site.key_value_heads, -1)
    context = statistics.read[site.output].second().unflatten(0, shared).mean(1)
    read = weight.double().unflatten(1, (site.heads, -1)).movedim(1, 0)
    gram = (read.mT @ read).unflatten(0, shared).sum(1)
    root, inverse = _roots(context)
    values, vectors = torch.linalg.eigh(root @ gram @ root)
    vectors = vectors.flip(-1)
    return inverse @ vectors, root @ vectors, values.flip(-1).clamp(min=0)


def change_query_key(model: nn.Module, site: AttentionSite, of_query: Tensor, of_key: Tensor) -> None:
    """Gives the projections of q and k new bases."""
    each = site.heads // site.key_value_heads
    change_rows(model.get_submodule(site.query.layer), site.query, of_query.repeat_interleave(each, 0))
    change_rows(model.get_submodule(site.key_rows.layer), site.key_rows, of_key)


def change_value(model: nn.Module, site: AttentionSite, of_value: Tensor, of_output: Tensor) -> None:
    """Gives the projections of v and of the output new bases."""
    change_rows(model.get_submodule(site.value.layer), site.value, of_value)
    layer = model.get_submodule(site.output)
    weight = layer_weight(layer)
    by_head = weight.unflatten(1, (site.heads, -1)).movedim(1, 0)  # (heads, outputs, dims)
    bases = of_output.repeat_interleave(site.heads // site.key_value_heads, 0)
    set_weight(layer, (by_head @ bases.to(weight)).movedim(0, 1).flatten(1))


def _roots(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square roots of damped covariances (heads, dims, dims), and their inverses."""
    mean = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    damping = torch.where(mean > 0, DAMPING * mean, torch.ones_like(mean))
    values, vectors = torch.linalg.eigh(covariance + damping * torch.eye(covariance.shape[-1]).to(covariance))
    root = values.clamp(min=damping[:, 0] * 1e-3).sqrt()[:, None, :]
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT
