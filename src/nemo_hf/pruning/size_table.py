"""The number of parameters of every module that a model can have, as a table that needs no model: it fits a web page.

A layer that makes or reads neurons has outputs and inputs that are affine in a few widths, such as the kept units of a
feed-forward part. So the table says, for each layer, how its parameters follow from the widths; and for each site, how
the widths follow from the neurons that are kept.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from nemo_hf.neurons.sites import CHANNEL_NORMS, AttentionSite, NeuronSite

from .layer_cuts import LayerCut, site_cut

Affine = list[int]  # a constant, then the index of a width and its factor, and so on
LABELS = 0  # index of the width that counts the labels


def size_table(model: nn.Module, sites: Sequence[NeuronSite], heads: Mapping[str, int], labels: int) -> dict[str, Any]:
    """Describes how many parameters a module has: `fixed`, `layers`, `sites`, `neurons`, as data for JSON.

    A module has `fixed` parameters and, of each entry `[weight, bias, outputs, inputs]` of `layers`, weight * outputs *
    inputs + bias * outputs, where outputs and inputs are affine in the widths (`None`: 1). Width 0 is the number of
    labels; each entry of `sites` tells its neurons by part, and the index of its first width. `heads` are the paths of
    classification heads with the number of outputs that are not labels.
    """
    by_path: dict[str, dict[str, Affine]] = {head: {"outputs": [others, LABELS, 1]} for head, others in heads.items()}
    tensors: list[tuple[int, Affine]] = []
    described: list[dict[str, Any]] = []
    first = LABELS + 1
    for site in sites:
        widths = _probes(site)
        full = site_cut(site, _keep(site, site.parts)).layers
        for path in full:
            for side in ("outputs", "inputs"):
                if (affine := _affine(site, path, side, widths, first)) is not None:
                    by_path.setdefault(path, {})[side] = affine
        if isinstance(site, AttentionSite) and site.head_tensors:
            sharing = site.heads // site.key_value_heads
            per_head = [model.get_parameter(path).numel() // site.heads for path in site.head_tensors]
            tensors += [(each, [0, first + 1, sharing]) for each in per_head]
        described.append(_described(site, first))
        first += max(2, len(widths))
    values = full_widths(sites, labels)
    layers = [_layer(model.get_submodule(path), sides, values) for path, sides in by_path.items()]
    layers += [[each, 0, affine, None] for each, affine in tensors]
    table = {"layers": layers, "sites": described, "neurons": sum(site.neurons for site in sites)}
    whole = sum(parameter.numel() for parameter in dict.fromkeys(model.parameters()))
    return {"fixed": whole - parameters_at({"fixed": 0, **table}, values), **table}


def parameters_at(table: Mapping[str, Any], widths: Mapping[int, int]) -> int:
    """Parameters of a module with these widths, by index."""
    rows = [(w, b, _value(outputs, widths), _value(inputs, widths)) for w, b, outputs, inputs in table["layers"]]
    return int(table["fixed"] + sum(w * outputs * inputs + b * outputs for w, b, outputs, inputs in rows))


def _value(affine: Affine | None, widths: Mapping[int, int]) -> int:
    if affine is None:
        return 1
    return affine[0] + sum(widths[place] * affine[at + 1] for at, place in enumerate(affine) if at % 2)


def _keep(site: NeuronSite, parts: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """All neurons of some parts and none of the others."""
    return {part: torch.arange(size if part in parts else 0) for part, size in site.parts.items()}


def _probes(site: NeuronSite) -> list[tuple[Mapping[str, int], int]]:
    """The widths of a site: which parts to keep for it to be largest, and how large it is then."""
    if site.cut_by.is_scattered:
        return [({part: size}, size) for part, size in site.parts.items()]
    if isinstance(site, AttentionSite):
        return [(site.parts, site.key_value_heads * site.head_dim)]
    return [(site.parts, site.neurons)]


def _affine(
    site: NeuronSite, path: str, side: str, widths: Sequence[tuple[Mapping[str, int], int]], first: int
) -> Affine | None:
    """How many outputs or inputs of a layer stay, by the widths of a site; `None` if the site doesn't cut them."""

    def count(parts: Mapping[str, int]) -> int | None:
        kept = getattr(site_cut(site, _keep(site, parts)).layers.get(path, LayerCut()), side)
        return None if kept is None else len(kept)

    if count(site.parts) is None:
        return None
    constant = (count({}) or 0) if site.cut_by.is_scattered else 0
    affine = [constant]
    for place, (parts, largest) in enumerate(widths):
        factor, rest = divmod((count(parts) or 0) - constant, largest)
        assert rest == 0
        affine += [first + place, factor] if factor else []
    return affine


def _layer(layer: nn.Module, sides: Mapping[str, Affine], widths: Mapping[int, int]) -> list[Any]:
    """Parameters of a layer per pair of outputs and inputs, and per output, with both."""
    outputs, inputs = sides.get("outputs"), sides.get("inputs")
    full = {side: _value(affine, widths) for side, affine in sides.items()}
    sizes = {name: parameter.numel() for name, parameter in layer.named_parameters(recurse=False)}
    if isinstance(layer, CHANNEL_NORMS):
        return [sum(sizes.values()) // full["outputs"], 0, outputs, None]
    weight = sizes["weight"] // math.prod(full.values())
    return [weight, sizes.get("bias", 0) // full["outputs"] if outputs else 0, outputs, inputs]


def full_widths(sites: Sequence[NeuronSite], labels: int) -> dict[int, int]:
    """The widths of the whole model, by index."""
    values, first = {LABELS: labels}, LABELS + 1
    for site in sites:
        widths = _probes(site)
        values |= {first + place: largest for place, (_, largest) in enumerate(widths)}
        if isinstance(site, AttentionSite) and not site.cut_by.is_scattered:
            values[first + 1] = site.key_value_heads
        first += max(2, len(widths))
    return values


def _described(site: NeuronSite, first: int) -> dict[str, Any]:
    """Parts of a site and what makes widths of kept neurons: heads share a width where they are cut densely."""
    parts = list(site.parts.values())
    about: dict[str, Any] = {"parts": parts, "width": first}
    if not site.cut_by.is_scattered:
        about["least"] = site.least_width
    if isinstance(site, AttentionSite):
        about["heads"] = [site.query_key_heads, site.key_value_heads]
        if not site.cut_by.is_scattered:
            about |= {"per_neuron": 2 if site.is_rotary else 1, "drops": site.cut_by.drops_heads}
    return about
