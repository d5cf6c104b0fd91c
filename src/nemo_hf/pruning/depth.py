"""How much the answers owe to each attention and feed-forward part of a model, as a whole, on calibration samples."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nemo_hf.neurons.sites import AttentionSite, FeedForwardSite, NeuronSite

from .statistics import SiteStatistics

Batches = Sequence[tuple[Mapping[str, Any], Tensor]]  # inputs, with the answers to them


@torch.no_grad()
def part_means(
    model: nn.Module, sites: Sequence[NeuronSite], statistics: Mapping[str, SiteStatistics]
) -> dict[str, Tensor]:
    """By path of a part's last layer the mean of what it adds to the stream, (outputs,); parts may lack neurons."""
    means = {}
    for site in sites:
        if isinstance(site, (AttentionSite, FeedForwardSite)) and not site.least_width:
            layer, moments = model.get_submodule(site.output), statistics[site.key].read[site.output]
            read = torch.as_tensor(moments.total) / max(1, moments.rows)
            means[site.output] = layer(read.flatten().to(next(layer.parameters())))
    return means


@torch.no_grad()
def part_scores(
    model: nn.Module, means: Mapping[str, Tensor], batches: Batches, answers: Callable[[Any], Tensor]
) -> dict[str, float]:
    """Mean squared change of the answers, over their variance, when the mean of a part's last layer takes its place.

    Both by path of that layer, the lowest scores first. `answers` makes answers of the model's outputs.
    """
    known = torch.cat([expected.flatten(0, -2) for _, expected in batches]).double()
    variance = (known - known.mean(0)).square().mean().clamp(min=1e-30)
    scores = {}
    for path, mean in means.items():
        handle = model.get_submodule(path).register_forward_hook(partial(_replaced, mean))
        try:
            changes = [answers(model(**inputs, return_dict=True)).cpu() - expected for inputs, expected in batches]
        finally:
            handle.remove()
        change = torch.cat([each.flatten() for each in changes]).double()
        scores[path] = (change.square().mean() / variance).item()
    return dict(sorted(scores.items(), key=lambda item: item[1]))


def _replaced(mean: Tensor, layer: nn.Module, args: Any, output: Tensor) -> Tensor:
    return mean.expand_as(output)
