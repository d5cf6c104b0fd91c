"""Finds convolution channels that can be pruned, by following marked channels through forward passes.

1. Some channels of one convolution's result are marked with NaN. Activations, pooling, sums, products, norms by channel
   and grouped convolutions pass a mark on; a convolution or linear layer reads it, and its input is cleared of marks.
2. Where a mark appears in another channel, in a layer that mixes channels, or in the logits, the channels stay whole.
3. Layers whose results are read by the same layers, such as those of a residual stream, are one site.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .builders import ModelLayers, channel_site
from .sites import CHANNEL_NORMS, NeuronSite, layer_features, neuron_dim
from .trial_calls import SHAPE_ERRORS, evaluating, is_out_of_memory, on_device
from .trial_inputs import trial_inputs


@dataclass
class Channels:
    """The layers that make the same channels, pass them on and read them, or why the channels can't be cut."""

    layers: list[str]
    passing: list[str] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)
    reason: str = ""


@dataclass(frozen=True)
class ChannelSearch:
    """Channels of a model: the sites that can be cut, and why others, by their first layer, can't."""

    sites: list[NeuronSite] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def explanation(self) -> str:
        """The first reasons as a sentence, "" if there are none."""
        few = [f"those of {path!r} {reason}" for path, reason in list(self.reasons.items())[:3]]
        return f"Channels of convolutions stay whole: {'; '.join(few)}. " if few else ""


def find_channels(
    model: PreTrainedModel, inputs: Mapping[str, Tensor] | None = None, others: Sequence[NeuronSite] = ()
) -> ChannelSearch:
    """Finds channels that can be cut, beside `others`: of convolutions, and of linear layers that read these."""
    convolutions = {path for path, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    if not convolutions:
        return ChannelSearch()
    inputs = trial_inputs(model, inputs)
    made_elsewhere = {rows.layer for site in others for rows, _ in site.produced()}
    read_elsewhere = {path for site in others for path in (site.layers if site.kind == "attention" else site.readers)}
    with _MarkedRuns(model, inputs, read_elsewhere).running() as runs:
        makers = [path for path in runs.order if path in convolutions and not _passes_on(runs.layers[path])]
        groups = _joined([runs.follow(path) for path in makers])
        linear = [p for p in runs.order if isinstance(runs.layers[p], nn.Linear) and p not in made_elsewhere]
        if any(not group.reason and group.readers for group in groups):
            # Linear layers that write into the same channels are found; those that read channels make some.
            groups = _joined([*groups, *(runs.follow(path) for path in linear)])
        groups = _without_tokens(groups, set(linear), runs)
    layers = ModelLayers(model)
    found = [channel_site(layers, g.layers, g.passing, g.readers) for g in groups if g.readers and not g.reason]
    reasons = {g.layers[0]: g.reason for g in groups if g.reason and g.layers[0] in convolutions}
    return ChannelSearch([site for site in found if site], reasons)


def _joined(groups: list[Channels]) -> list[Channels]:
    """Joins channels that pass through or are read by the same layers."""
    joined: list[Channels] = []
    for group in groups:
        same = [o for o in joined if set(o.readers) & set(group.readers) or set(o.passing) & set(group.passing)]
        merged = Channels([])
        for part in (*same, group):
            merged.layers += part.layers
            merged.passing += [path for path in part.passing if path not in merged.passing]
            merged.readers += [path for path in part.readers if path not in merged.readers]
            merged.reason = merged.reason or part.reason
        joined = [other for other in joined if other not in same] + [merged]
    return joined


def _without_tokens(groups: list[Channels], linear: set[str], runs: "_MarkedRuns") -> list[Channels]:
    """Leaves linear layers out, except those that make one vector a sample of channels that are read."""
    flat = {path for path in linear if runs.results[path][1] == 2}
    allowed: set[str] = set()
    grows = True
    while grows:
        sources = [group for group in groups if not group.reason and not set(group.layers) <= linear - allowed]
        read = {path for group in sources for path in group.readers} & flat
        grows, allowed = not read <= allowed, allowed | read
    place = {path: index for index, path in enumerate(runs.order)}
    for group in groups:
        other = next((path for path in group.layers if path in linear - allowed), None)
        if other is not None:
            group.reason = group.reason or f"are added to what {other!r} makes"
        for paths in (group.layers, group.passing, group.readers):
            paths.sort(key=lambda path: place.get(path, len(place)))
    made = [group for group in groups if not set(group.layers) <= linear - allowed]
    return sorted(made, key=lambda group: place[group.layers[0]])


class _MarkedRuns:
    """Runs a model on one sample again and again, with some channels of one layer's result marked."""

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], taken: set[str]) -> None:
        self.model, self.taken = model, taken
        self.layers = dict(model.named_modules())
        self.inputs = on_device(model, {name: value[:1] for name, value in inputs.items()})
        self.order: list[str] = []
        self.results: dict[str, tuple[int, int]] = {}  # channels and dimensions of each layer's result
        self.found: Channels | None = None
        self.marks = torch.zeros(0, dtype=torch.bool)
        self.passes_on: set[str] = set()

    @contextmanager
    def running(self) -> Iterator["_MarkedRuns"]:
        """Attaches the hooks and runs once without marks."""
        handles = []
        for path, layer in self.layers.items():
            if _is_known(layer) or any(True for _ in (*layer.parameters(False), *layer.buffers(False))):
                handles.append(layer.register_forward_pre_hook(partial(self._read, path)))
            if _is_known(layer):
                handles.append(layer.register_forward_hook(partial(self._make, path)))
        with evaluating(self.model, handles):
            self.model(**self.inputs)
            repeated = {path for path in self.order if self.order.count(path) > 1}
            self.order = [path for path in dict.fromkeys(self.order) if path not in repeated]
            yield self

    def follow(self, path: str) -> Channels:
        """Marks some channels of a layer's result and says where the marks go."""
        layer = self.layers[path]
        found = self.found = Channels([path])
        self.passes_on = set()
        channels = self.results[path][0]
        self.marks = torch.rand(channels, generator=torch.Generator().manual_seed(0)) < 0.5
        self.marks[0], self.marks[channels - 1] = True, channels < 2  # some are marked, some are not
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            found.reason = "are made by a grouped convolution with other inputs than outputs"
        try:
            logits = getattr(self.model(**self.inputs, return_dict=True), "logits", None)
        except SHAPE_ERRORS as error:
            if is_out_of_memory(error):
                raise
            self._refuse(f"stop the model when they are marked ({type(error).__name__})")
            logits = None
        reaches_logits = isinstance(logits, Tensor) and bool(logits.isnan().any())
        if reaches_logits and (found.readers or not layer_features(layer)):
            self._refuse("reach the logits through no layer that could be cut")
        self.found = None
        return found

    def _refuse(self, reason: str) -> None:
        assert self.found is not None
        self.found.reason = self.found.reason or reason

    def _read(self, path: str, layer: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.found is None or not arguments or not isinstance(arguments[0], Tensor):
            return None
        given = arguments[0]
        if not given.is_floating_point() or given.ndim < 2 or not bool(given.isnan().any()):
            return None
        if not _is_known(layer):
            kind = type(layer).__name__
            self._refuse(f"are read by {path!r} ({kind}), which mixes channels or holds weights of its own for them")
            return None
        if self._is_marked_alike(layer, given):
            is_passing = isinstance(layer, CHANNEL_NORMS) or _passes_on(layer)
            seen = self.found.passing if is_passing else self.found.readers
            if path not in seen:
                seen.append(path)
            if path in self.taken and not is_passing:
                self._refuse(f"are read by {path!r}, whose inputs are not only channels")
        elif isinstance(layer, nn.Conv2d) and layer.groups > 1:
            self._refuse(f"are read by the grouped convolution {path!r}, which has other groups")
        else:
            self._refuse(f"are read by {path!r} beside others (concatenated), or after a change of their order")
        if isinstance(layer, CHANNEL_NORMS):
            return None
        if _passes_on(layer):
            self.passes_on.add(path)
        return (given.nan_to_num(0.0), *arguments[1:])

    def _is_marked_alike(self, layer: nn.Module, given: Tensor) -> bool:
        """Whether exactly the marked channels have marks; a linear layer may read their positions side by side."""
        if isinstance(layer, nn.Conv2d) and layer.groups > 1 and not _passes_on(layer):
            return False
        dim = 1 if isinstance(layer, CHANNEL_NORMS) else neuron_dim(layer) % given.ndim
        seen = given.isnan().transpose(0, dim).flatten(1).any(1)
        if isinstance(layer, nn.Linear) and given.ndim == 2 and len(seen) % len(self.marks) == 0:
            seen = seen.view(len(self.marks), -1).any(1)
        return torch.equal(seen.cpu(), self.marks)

    def _make(self, path: str, layer: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, Tensor):
            return None
        dim = neuron_dim(layer) % output.ndim
        if self.found is None:
            self.order.append(path)
            self.results[path] = (output.shape[dim], output.ndim)
            return None
        if path not in self.found.layers and path not in self.passes_on:
            return None
        marked = output.clone()
        marked.transpose(0, dim)[self.marks.to(output.device)] = torch.nan
        return marked


def _is_known(layer: nn.Module) -> bool:
    is_linear = isinstance(layer, nn.Linear) and layer_features(layer) is not None
    return isinstance(layer, (nn.Conv2d, *CHANNEL_NORMS)) or is_linear


def _passes_on(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups > 1 and layer.in_channels == layer.out_channels
