"""What the rows of `cutting.py` share: what a module is made from, heads and units of a transformer, and their cut."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tasks import Split
from torch import Tensor, nn
from transformers import PreTrainedModel

from nemo_hf import make_parent
from nemo_hf.models.base import NeMoPreTrainedModel
from nemo_hf.neurons.patterns import find_heads, find_sites
from nemo_hf.neurons.sites import AttentionSite, NeuronSite

Masks = Mapping[str, Tensor]


@dataclass(frozen=True)
class Job:
    """What a module is to be made from."""

    source: PreTrainedModel
    labels: Sequence[int]  # of the source
    calibration: Split  # some training samples of the labels, which are positions in `labels`
    train: Split  # all of them
    retention: float  # share of the weights of attention and feed-forward layers to keep
    seed: int
    steps: int = 0  # of what is trained: as many as the source's training took
    batch: int = 32
    rate: float = 0.0  # of what is trained
    encoder: str = ""  # folder or name of the pretrained encoder


def plain_network(model: PreTrainedModel) -> PreTrainedModel:
    """The plain model within a parent; a plain model is its own."""
    return model.model if isinstance(model, NeMoPreTrainedModel) else model


def site_paths(model: PreTrainedModel) -> list[str]:
    """Paths of the layers whose weights `retention` counts: those that make or read masked neurons."""
    is_parent = isinstance(model, NeMoPreTrainedModel)
    sites = model.sites if is_parent else make_parent(copy.deepcopy(model)).sites
    return list(dict.fromkeys(path for site in sites for path in weight_paths(site)))


def weight_paths(site: NeuronSite) -> list[str]:
    """Paths of the layers that make or read a site's neurons."""
    return list(dict.fromkeys([*(rows.layer for rows, _ in site.produced()), *site.readers]))


def site_weights(model: PreTrainedModel, paths: Sequence[str]) -> int:
    """Number of weights of these layers, as far as the model has them."""
    layers = dict(model.named_modules())
    return sum(layers[path].weight.numel() for path in paths if path in layers)


def restrict(model: PreTrainedModel, labels: Sequence[int]) -> PreTrainedModel:
    """Leaves only some labels in the head, in place."""
    for path in find_heads(model, model.config.num_labels):
        layer = model.get_submodule(path)
        layer.weight.data = layer.weight.data[list(labels)].clone()
        layer.out_features = len(labels)
        if layer.bias is not None:
            layer.bias.data = layer.bias.data[list(labels)].clone()
    names = model.config.id2label
    model.config.id2label = {place: names[label] for place, label in enumerate(labels)}
    return model


@torch.no_grad()
def logits_of(model: nn.Module, data: Split, size: int = 100) -> Tensor:
    """Logits of all samples, (samples, labels), in eval mode."""
    model.eval()
    batches = ({name: value for name, value in batch.items() if name != "labels"} for batch in data.batches(size))
    return torch.cat([model(**inputs).logits for inputs in batches])


@dataclass(frozen=True)
class UnitGroup:
    """Whole heads of an attention site, or units of a feed-forward site."""

    site: NeuronSite
    count: int
    of_input: Tensor  # unit of each input of the layer that reads the neurons
    cost: float  # weights of a unit

    def norms(self, model: nn.Module) -> Tensor:
        """Squared norms of the weights that make and read each input, (inputs,)."""
        reads = model.get_submodule(self.site.output).weight.square().sum(0)
        return sum((model.get_submodule(rows.layer).weight.square().sum(1) for rows, _ in self.site.produced()), reads)

    def neurons(self, kept: Tensor) -> dict[str, Tensor]:
        """The neurons by part that belong to the kept units."""
        inputs = torch.isin(self.of_input, kept).nonzero().squeeze(-1)
        return dict.fromkeys(self.site.parts, inputs)


def unit_groups(model: PreTrainedModel) -> list[UnitGroup]:
    """The groups of a transformer in the order in which they run."""
    groups = []
    for site in find_sites(model, ("attention", "ffn")):
        is_attention = isinstance(site, AttentionSite)
        if is_attention and (site.heads != site.key_value_heads or site.is_rotary):
            raise SystemExit(f"Got {site.key}, whose heads share keys or rotate; expected heads of their own.")
        inputs = model.get_submodule(site.output).in_features
        count = site.heads if is_attention else inputs
        cost = site_weights(model, weight_paths(site)) / count
        groups.append(UnitGroup(site, count, torch.arange(inputs) * count // inputs, cost))
    return sorted(groups, key=lambda group: [m for m, _ in model.named_modules()].index(group.site.output))


def cut(model: PreTrainedModel, labels: Sequence[int], units: Sequence[UnitGroup], kept: Masks) -> PreTrainedModel:
    """The plain model with some labels and units (indices by site key) only; `nemo_hf` cuts, and checks the logits."""
    keep = {group.site.key: group.neurons(kept[group.site.key]) for group in units}
    parent = make_parent(model)
    for key, table in parent.masks.relevance().items():
        site = next(site for site in parent.sites if site.key == key)
        parts = [torch.zeros(size).index_fill(0, keep[key][name], 255) for name, size in site.parts.items()]
        table.copy_(torch.cat(parts).expand_as(table))
    parent.config.relevance_source = "exact"
    return parent.extract_module(list(labels)).model.eval()
