"""Proposes sites for an architecture that is not known by name, from what moves when one output is nudged.

1. Nudge one output of a linear layer at one token, and look at what the next linear layer that notices reads.
2. A unit moves one of its inputs, at that token. A value moves one (or one for each query head that shares it)
   at other tokens too. A query moves a whole head at that token, a key a whole head at others too.
3. This could mistake other layers for these. So the widths must fit, and the equivalence check decides whether they
   are cut exactly; that they are what they are called is only likely.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nemo_hf.config import LAYOUTS

from .sites import layer_features
from .trial_inputs import random_inputs
from .user_sites import build_user_sites

NUDGE = 3.0
"""Change of an output; large, so that it shows behind a softmax."""
NOTICED = 1e-5
"""Smallest change that counts, relative to the largest input."""


@dataclass(frozen=True)
class Reading:
    """What the first layer that notices a nudge reads: which of its inputs move, and whether other tokens do."""

    reader: str
    inputs: tuple[int, ...]
    moves_others: bool

    @property
    def role(self) -> str:
        """`"unit"`, `"query"`, `"key"` or `"value"`, as far as this reading tells."""
        steps = {after - before for before, after in zip(self.inputs, self.inputs[1:], strict=False)}
        is_block = 1 in steps
        if not is_block:
            return "value" if self.moves_others else "unit"
        return "key" if self.moves_others else "query"


def propose_sites(model: PreTrainedModel, inputs: Mapping[str, Tensor] | None = None) -> list[dict[str, Any]]:
    """Proposes descriptions for `NeMoConfig(sites=...)` from a model's linear layers and a numeric probe.

    Args:
        model: A plain classification model of any architecture.
        inputs: A few samples, of several tokens each; `None` draws random ones.

    Returns:
        Descriptions of feed-forward and attention sites, one for all blocks that are alike; none if nothing
        looks like one. `make_parent` checks them.
    """
    inputs = random_inputs(model) if inputs is None else {k: v for k, v in inputs.items() if k != "labels"}
    readers: dict[str, dict[str, list[tuple[str, Reading]]]] = {}
    with _Trace(model, inputs).running() as trace:
        for layer in trace.order:
            for role, reading in _roles(trace, layer).items():
                readers.setdefault(reading.reader, {}).setdefault(role, []).append((layer, reading))
    found = [site for output, roles in readers.items() if (site := _description(model, output, roles))]
    return _merged(model, [site for site in found if _fits(model, site)])


class _Trace:
    """Runs a model on the same inputs again and again, and notes what its linear layers read."""

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> None:
        self.model = model
        self.inputs = {name: value.to(model.device) for name, value in inputs.items()}
        self.samples = len(next(iter(inputs.values())))
        self.order: list[str] = []
        self.reads: dict[str, Tensor] = {}
        self.plain: dict[str, Tensor] = {}
        self.nudged: tuple[str, int] | None = None

    @contextmanager
    def running(self) -> Iterator["_Trace"]:
        """Attaches the hooks and runs once without a nudge."""
        layers = {name: layer for name, layer in self.model.named_modules() if layer_features(layer)}
        handles = [layer.register_forward_hook(partial(self._note, name)) for name, layer in layers.items()]
        was_training = self.model.training
        try:
            self.run()
            self.plain = dict(self.reads)
            self.order = [name for name, read in self.plain.items() if read.shape[0] % self.samples == 0]
            yield self
        finally:
            self.model.train(was_training)
            for handle in handles:
                handle.remove()

    def _note(self, name: str, layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        self.reads[name] = arguments[0]
        if self.nudged is None or self.nudged[0] != name:
            return output
        changed = output.clone()
        changed.view(len(changed), -1, changed.shape[-1])[0, self._token(output), self.nudged[1]] += NUDGE
        return changed

    @staticmethod
    def _token(hidden_states: Tensor) -> int:
        tokens = hidden_states[0].numel() // hidden_states.shape[-1]
        return tokens // 2

    @torch.no_grad()
    def run(self, nudged: tuple[str, int] | None = None) -> None:
        """Runs the model; `nudged` is a layer and one of its outputs."""
        self.nudged, self.reads = nudged, {}
        self.model.eval()(**self.inputs)

    def reading(self, layer: str, output: int) -> Reading | None:
        """What the first layer that notices a nudge reads, or `None` if none does."""
        self.run((layer, output))
        for name in self.order[self.order.index(layer) + 1 :]:
            before, after = self.plain[name], self.reads[name]
            moved = (after - before)[0].abs() > NOTICED * max(1.0, before.abs().max().item())
            moved = moved.view(-1, moved.shape[-1])
            if bool(moved.any()):
                tokens = moved.any(-1).nonzero().flatten().tolist()
                return Reading(name, tuple(moved.any(0).nonzero().flatten().tolist()), tokens != [self._token(before)])
        return None


def _roles(trace: _Trace, layer: str) -> dict[str, Reading]:
    """Roles of a layer's outputs; one that makes q, k and v at once has the role `"fused"` or `"fused by head"`."""
    features = layer_features(trace.model.get_submodule(layer))
    assert features is not None
    outputs = features[1]
    if outputs < 4:
        return {}
    first = trace.reading(layer, 1)
    if first is None:
        return {}
    read = layer_features(trace.model.get_submodule(first.reader))
    assert read is not None
    if first.role == "query" and outputs > read[0]:
        last, end = trace.reading(layer, outputs - 1), trace.reading(layer, read[0] - 1)
        if last and end and last.role == "value" and last.reader == first.reader:
            # The last of all queries looks at the last head, unless keys and values lie in between.
            is_apart = end.role == "query" and end.inputs[-1] == read[0] - 1
            return {"fused" if is_apart else "fused by head": first}
    return {first.role: first}


def _description(
    model: PreTrainedModel, output: str, roles: Mapping[str, Sequence[tuple[str, Reading]]]
) -> dict[str, Any] | None:
    features = layer_features(model.get_submodule(output))
    assert features is not None
    for role, layout in zip(("fused", "fused by head"), LAYOUTS, strict=True):
        if role in roles:
            layer, reading = roles[role][0]
            heads = features[0] // len(reading.inputs)
            return {"kind": "attention", "fused": layer, "layout": layout, "output": output, "heads": heads}
    if {"query", "key", "value"} <= set(roles):
        query, key, value = (roles[role][0][0] for role in ("query", "key", "value"))
        heads = features[0] // len(roles["query"][0][1].inputs)
        return {
            "kind": "attention", "query": query, "key": key, "value": value, "output": output, "heads": heads,
        }  # fmt: skip
    producers = [layer for layer, reading in roles.get("unit", []) if reading.inputs == (1,)]
    # A feed-forward part returns to the width that it came from; other pairs of layers rarely do.
    alike = [p for p in producers if (layer_features(model.get_submodule(p)) or (0,))[0] == features[1]]
    return {"kind": "ffn", "producers": alike, "output": output} if alike else None


def _fits(model: PreTrainedModel, description: Mapping[str, Any]) -> bool:
    try:
        return bool(build_user_sites(model, description))
    except ValueError:
        return False


def _merged(model: PreTrainedModel, descriptions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Joins descriptions that differ only in the numbers of their blocks, where `"*"` says just the same."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for description in descriptions:
        groups.setdefault(json.dumps(_starred(description)), []).append(description)
    merged = []
    for starred, members in groups.items():
        joined: dict[str, Any] = json.loads(starred)
        apart = {site.key for member in members for site in build_user_sites(model, member)}
        is_same = _fits(model, joined) and {site.key for site in build_user_sites(model, joined)} == apart
        merged.extend([joined] if is_same else members)
    return merged


def _starred(description: Mapping[str, Any]) -> dict[str, Any]:
    paths = [v for k, v in description.items() if isinstance(v, str) and k not in ("kind", "layout")]
    paths += description.get("producers", [])
    shared = 0
    for parts in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        shared += 1

    def star(path: str) -> str:
        parts = path.split(".")
        return ".".join("*" if part.isdigit() and place < shared else part for place, part in enumerate(parts))

    starred = {k: star(v) if isinstance(v, str) and k not in ("kind", "layout") else v for k, v in description.items()}
    if "producers" in starred:
        starred["producers"] = [star(path) for path in description["producers"]]
    return starred
