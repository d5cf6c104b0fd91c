"""Proposes `NeMoConfig(sites=...)` for an unknown architecture, from what changes when one output is perturbed.

A perturbed unit changes one input of the next linear layer that reads it, at the same token; a value one (for each
query head) at other tokens too; a query a whole head at the same token; a key a whole head at others too. Other layers
could look the same: widths must fit, and the equivalence check decides whether the layers are cut exactly.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from nemo_hf.config import LAYOUTS

from .builders import ModelLayers
from .trial_calls import evaluating, on_device
from .trial_inputs import trial_inputs
from .user_sites import PATHS, build_user_sites, shared_parts, with_paths

PERTURBATION = 3.0  # large, so that it shows behind a softmax
SMALLEST_CHANGE = 1e-5  # that counts, relative to the largest input


@dataclass(frozen=True)
class Reading:
    """The first layer whose input a perturbation changes: which of its inputs, and whether at other tokens too."""

    reader: str
    inputs: tuple[int, ...]
    changes_others: bool

    @property
    def role(self) -> str:
        """What the perturbed output seems to be: `"unit"`, `"query"`, `"key"` or `"value"`."""
        is_block = any(after - before == 1 for before, after in zip(self.inputs, self.inputs[1:], strict=False))
        if not is_block:
            return "value" if self.changes_others else "unit"
        return "key" if self.changes_others else "query"


def propose_sites(model: PreTrainedModel, inputs: Mapping[str, Tensor] | None = None) -> list[dict[str, Any]]:
    """Proposes descriptions for `NeMoConfig(sites=...)` from a model's linear layers and some forward passes.

    Args:
        model: A plain classification model of any architecture.
        inputs: A few samples, of several tokens each; `None` draws random ones.

    Returns:
        Descriptions of feed-forward and attention sites, one for all blocks of the same structure; none if
        nothing looks like one. `make_parent` checks them.
    """
    inputs = trial_inputs(model, inputs)
    layers = ModelLayers(model)
    readers: dict[str, dict[str, list[tuple[str, Reading]]]] = {}
    with _Perturbed(model, layers, inputs).running() as perturbed:
        for layer in perturbed.order:
            for role, reading in _roles(perturbed, layer).items():
                readers.setdefault(reading.reader, {}).setdefault(role, []).append((layer, reading))
    found = [site for output, roles in readers.items() if (site := _description(layers.linear, output, roles))]
    return _merged(model, [site for site in found if _site_keys(model, site)])


class _Perturbed:
    """Runs a model on the same inputs again and again, and keeps the inputs of its linear layers."""

    def __init__(self, model: PreTrainedModel, layers: ModelLayers, inputs: Mapping[str, Tensor]) -> None:
        self.model, self.layers, self.inputs = model, layers, on_device(model, inputs)
        self.order: list[str] = []
        self.reads: dict[str, Tensor] = {}
        self.plain: dict[str, Tensor] = {}
        self.target: tuple[str, int] | None = None  # a layer and the one of its outputs that is perturbed

    @contextmanager
    def running(self) -> Iterator["_Perturbed"]:
        """Attaches the hooks and runs once without a perturbation."""
        paths = [path for path in self.layers.linear if path in self.layers.unique]  # each layer once
        handles = [self.layers.by_path[path].register_forward_hook(partial(self._note, path)) for path in paths]
        with evaluating(self.model, handles):
            self.model(**self.inputs)
            self.plain = dict(self.reads)
            samples = len(next(iter(self.inputs.values())))
            self.order = [name for name, read in self.plain.items() if read.shape[0] % samples == 0]
            yield self

    def _note(self, name: str, layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        self.reads[name] = arguments[0]
        if self.target is None or self.target[0] != name:
            return output
        changed = output.clone()
        changed.view(len(changed), -1, changed.shape[-1])[0, self._token(output), self.target[1]] += PERTURBATION
        return changed

    @staticmethod
    def _token(hidden_states: Tensor) -> int:
        return hidden_states[0].numel() // hidden_states.shape[-1] // 2

    def reading(self, layer: str, output: int) -> Reading | None:
        """The first layer that reads a change when one output is perturbed, or `None` if none does."""
        self.target, self.reads = (layer, output), {}
        self.model(**self.inputs)
        for name in self.order[self.order.index(layer) + 1 :]:
            before, after = self.plain[name], self.reads[name]
            moved = (after - before)[0].abs() > SMALLEST_CHANGE * max(1.0, before.abs().max().item())
            moved = moved.view(-1, moved.shape[-1])
            if bool(moved.any()):
                tokens = moved.any(-1).nonzero().flatten().tolist()
                return Reading(name, tuple(moved.any(0).nonzero().flatten().tolist()), tokens != [self._token(before)])
        return None


def _roles(perturbed: _Perturbed, layer: str) -> dict[str, Reading]:
    """Roles of a layer's outputs; one that makes q, k and v at once has the role `"fused"` or `"fused by head"`."""
    outputs = perturbed.layers.linear[layer][1]
    first = perturbed.reading(layer, 1) if outputs >= 4 else None
    if first is None:
        return {}
    width = perturbed.layers.linear[first.reader][0]
    if first.role == "query" and outputs > width:
        last, end = perturbed.reading(layer, outputs - 1), perturbed.reading(layer, width - 1)
        if last and end and last.role == "value" and last.reader == first.reader:
            # The last of all queries changes the last head, unless keys and values lie in between.
            is_apart = end.role == "query" and end.inputs[-1] == width - 1
            return {"fused" if is_apart else "fused by head": first}
    return {first.role: first}


def _description(
    linear: Mapping[str, tuple[int, int]], output: str, roles: Mapping[str, Sequence[tuple[str, Reading]]]
) -> dict[str, Any] | None:
    width, outputs = linear[output]
    for role, layout in zip(("fused", "fused by head"), LAYOUTS, strict=True):
        if role in roles:
            layer, reading = roles[role][0]
            heads = width // len(reading.inputs)
            return {"kind": "attention", "fused": layer, "layout": layout, "output": output, "heads": heads}
    if {"query", "key", "value"} <= set(roles):
        paths = {role: roles[role][0][0] for role in ("query", "key", "value")}
        heads = width // len(roles["query"][0][1].inputs)
        return {"kind": "attention", **paths, "output": output, "heads": heads}
    # A feed-forward part returns to the width that it came from; other pairs of layers rarely do.
    units = [path for path, one in roles.get("unit", []) if one.inputs == (1,) and linear[path][0] == outputs]
    return {"kind": "ffn", "producers": units, "output": output} if units else None


def _site_keys(model: PreTrainedModel, description: Mapping[str, Any]) -> set[str]:
    """Keys of the sites that a description gives; none if its layers don't fit."""
    try:
        return {site.key for site in build_user_sites(model, description)}
    except ValueError:
        return set()


def _merged(model: PreTrainedModel, descriptions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Joins descriptions that differ only in the numbers of their blocks, if `"*"` stands for these and no others."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for description in descriptions:
        groups.setdefault(json.dumps(_starred(description)), []).append(description)
    merged = []
    for starred, members in groups.items():
        joined: dict[str, Any] = json.loads(starred)
        keys = {key for member in members for key in _site_keys(model, member)}
        merged.extend([joined] if _site_keys(model, joined) == keys else members)
    return merged


def _starred(description: Mapping[str, Any]) -> dict[str, Any]:
    """A description with `"*"` for the numbers in the part that all of its paths share."""
    paths = [*(description[key] for key in PATHS if key in description), *description.get("producers", [])]
    shared = len(shared_parts(paths))

    def star(path: str) -> str:
        parts = path.split(".")
        return ".".join("*" if part.isdigit() and place < shared else part for place, part in enumerate(parts))

    return with_paths(description, star)
