"""Least-squares reconstruction: layers that read fewer neurons learn to say what the source says, one after another.

With X what such a layer of the module reads, and d what the stream of the source has behind it and that of the module
has not, its weights become W + D, where D minimises |X D - d|^2 + ridge |D|^2. As d holds all that earlier cuts did to
the stream, each layer also mends their damage.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from nemo_hf.neurons.sites import PAD, NeuronSite, layer_features

from .layer_cuts import LayerCut, site_cut
from .partial_runs import PartialRuns, enclosing_blocks, stop
from .plan import Plan
from .resize import ScatterLinear
from .statistics import admitted_tokens
from .stream_points import StreamPoint, find_stream_points, tensors_of

RIDGE = 1e-2  # of the mean square of what a layer reads
SMALLEST_FACTOR = 1e-3  # of the largest one on the way to the stream: channels below it are left as they are
PATCH_NUMBERS = 2**24  # of a convolution's patches that are held at a time
ROWS_PER_FEATURE, LEAST_ROWS = 8, 8192  # positions of images beyond which a sample of them will do

Batches = Sequence[tuple[int, Mapping[str, Any]]]


@dataclass(frozen=True)
class LayerError:
    """Error of one layer in the stream, relative to the variance of its target, before and after; and its ridge."""

    before: float
    after: float
    ridge: float
    is_scarce: bool  # fewer rows than weights of an output


class NormalEquations:
    """Sums of a least-squares problem of (rows, features) and (rows, outputs), of the same size for any number of rows."""

    def __init__(self, features: int, outputs: int, device: torch.device) -> None:
        kind = {"dtype": torch.float64, "device": device}
        self.gram, self.cross = torch.zeros(features, features, **kind), torch.zeros(features, outputs, **kind)
        self.square, self.total, self.reached = (torch.zeros(outputs, **kind) for _ in range(3))
        self.rows = 0

    def add(self, features: Tensor, wanted: Tensor, reached: Tensor) -> None:
        """Adds rows: what is read, what is `wanted` of the change, and the target, which only scales the error."""
        self.gram += features.mT @ features
        self.cross += features.mT @ wanted
        self.square += wanted.double().square().sum(0)
        self.total += reached.double().sum(0)
        self.reached += reached.double().square().sum(0)
        self.rows += len(features)

    def solve(self, ridge: float) -> tuple[Tensor, LayerError]:
        """The change of the weights, (features, outputs), and what it does."""
        strength = ridge * max(1.0, len(self.gram) / max(1, self.rows))  # too few rows say little
        penalty = strength * self.gram.diagonal().mean()
        penalty = torch.where(penalty > 0, penalty, torch.ones_like(penalty))
        damped = self.gram + penalty * torch.eye(len(self.gram), dtype=torch.float64, device=self.gram.device)
        change = torch.linalg.solve(damped, self.cross)
        variance = (self.reached - self.total.square() / max(1, self.rows)).sum().clamp(min=1e-30)
        after = self.square.sum() - 2 * (change * self.cross).sum() + (change * (self.gram @ change)).sum()
        before, after = (value.clamp(min=0).div(variance).item() for value in (self.square.sum(), after))
        return change, LayerError(before, after, strength, self.rows < len(self.gram))


@dataclass
class _Seen:
    """What one run to a stream point saw, one entry a call of the layer."""

    read: list[Tensor] = field(default_factory=list)
    results: list[Tensor] = field(default_factory=list)
    stream: list[Tensor] = field(default_factory=list)
    since: int = 0  # calls of the point's layer since that of the reader


@contextmanager
def _watching(model: nn.Module, reader: str, point: StreamPoint, calls: int, with_graph: bool) -> Iterator[list[_Seen]]:
    """Lets forward passes end at a stream point; what the last one saw is the list's only entry."""
    seen = [_Seen()]

    def on_reader(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        seen[0].since = 0
        seen[0].read.append(args[0].detach())
        seen[0].results.append(output)
        if not with_graph:
            return output
        torch.set_grad_enabled(True)  # until the pass ends
        seen[0].results[-1] = output.detach().requires_grad_()
        return seen[0].results[-1].clone()  # what comes next may add to it in place

    def before(layer: nn.Module, args: Any, kwargs: Any) -> None:
        seen[0].since += 1
        if not point.is_output:
            look((args, kwargs))

    def after(layer: nn.Module, args: Any, output: Any) -> None:
        if point.is_output:
            look(output)

    def look(value: Any) -> None:
        now = seen[0]
        if len(now.results) == len(now.stream) + 1 and now.since == point.call:
            now.stream.append(list(tensors_of(value))[point.position])
            if len(now.stream) == calls:
                stop()

    with ExitStack() as stack:
        layer = model.get_submodule(point.path)
        stack.callback(model.get_submodule(reader).register_forward_hook(on_reader).remove)
        stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(layer.register_forward_hook(after).remove)
        yield seen


class Reconstruction:
    """Reconstructs the linear layers and convolutions of a module from the first one that reads neurons on.

    Those that read neurons are fitted to the source's stream behind them, the others to what the same layer of the
    source says; only projections to q, k and v stay. Source and module are in eval mode and in float32. `batches` are
    numbered model inputs; `plan` says which neurons of the sites the module keeps, and `heads` which outputs of the
    layers that make the logits.
    """

    def __init__(
        self,
        source: nn.Module,
        module: nn.Module,
        sites: Sequence[NeuronSite],
        plan: Plan,
        heads: Mapping[str, Tensor],
        batches: Batches,
    ) -> None:
        self.source, self.module, self.batches = source, module, batches
        self.samples = sum(len(next(iter(inputs.values()))) for _, inputs in batches)
        cuts = [layer for site in sites for layer in site_cut(site, plan[site.key]).layers.items()]
        self.cuts = {path: cut for path, cut in cuts if cut.outputs is not None and not cut.is_scattered}
        self.cuts.update({path: LayerCut(outputs=kept) for path, kept in heads.items()})
        readers = {path for site in sites for path in site.readers}
        attention = {rows.layer for site in sites if site.kind == "attention" for rows, _ in site.produced()}
        linear = {path for path, layer in source.named_modules() if _is_linear(layer)}
        called = _called(source, sorted(readers | (linear - attention)), batches[0][1])
        first = next((place for place, path in enumerate(called) if path in readers), len(called))
        self.calls = Counter(called[first:])
        own = {path: StreamPoint(path, True, 0, 0) for path in self.calls}
        found = find_stream_points(source, [path for path in self.calls if path in readers], batches[0][1])
        self.points = {**own, **found}
        blocks = list(dict.fromkeys(path for path in enclosing_blocks(source, sites).values() if path is not None))
        times = Counter(_called(source, blocks, batches[0][1]))
        once = [path for path, count in times.items() if count == 1]
        self.blocks = [path for path in once if not any(other.startswith(f"{path}.") for other in once)]
        self.runs = [PartialRuns(model, self.blocks) for model in (source, module)]

    @torch.no_grad()
    def run(self, ridge: float = RIDGE, on_layer: Callable[[str], None] = lambda path: None) -> dict[str, LayerError]:
        """Changes the module's weights; returns the errors of its layers by path, in the order in which they run."""
        for runs in self.runs:
            runs.try_out(self.batches[0][1])
        errors: dict[str, LayerError] = {}
        paths = list(self.calls)
        with self.runs[0].attached(), self.runs[1].attached():
            for number, path in enumerate(paths):
                open_blocks = [any(later.startswith(f"{block}.") for later in paths[number:]) for block in self.blocks]
                error = self._reconstruct(path, [*open_blocks, True].index(True), ridge)
                errors |= {} if error is None else {path: error}
                on_layer(path)
        return errors

    def _reconstruct(self, path: str, final: int, ridge: float) -> LayerError | None:
        layer, point = self.module.get_submodule(path), self.points[path]
        norm = None if point.norm is None else self.module.get_submodule(point.norm)
        has_bias = layer.bias is not None or norm is not None
        equations: NormalEquations | None = None
        generator = torch.Generator().manual_seed(0)
        watch = [_watching(m, path, point, self.calls[path], m is self.module) for m in (self.source, self.module)]
        with watch[0] as of_source, watch[1] as of_module:
            for index, inputs in self.batches:
                for seen, runs in ((of_source, self.runs[0]), (of_module, self.runs[1])):
                    seen[0] = _Seen()
                    with torch.no_grad():
                        runs.run(index, inputs, final)
                calls = zip(
                    of_module[0].stream, of_source[0].stream, of_module[0].read, of_module[0].results, strict=False
                )
                for stream, target, read, result in calls:
                    target = _same_outputs(target, stream, self.cuts.get(path))
                    if target.shape != stream.shape:  # as in experts, which see other tokens
                        return None
                    wanted, factors = _wanted(stream, target, result)
                    rows = _rows(layer, read, wanted, result.detach(), factors, admitted_tokens(inputs),
                                 generator, self.samples, has_bias)  # fmt: skip
                    if equations is None:
                        equations = NormalEquations(rows[0].shape[1], rows[1].shape[1], rows[0].device)
                    equations.add(*rows)
        if equations is None:
            return None
        change, error = equations.solve(ridge)
        _apply(layer, norm, change, has_bias)
        return error


def _is_linear(layer: nn.Module) -> bool:
    """Whether a layer is linear in patches or tokens, with nothing of its own around that."""
    is_plain = isinstance(layer, nn.Conv2d) and layer.groups == 1 and type(layer).forward is nn.Conv2d.forward
    return is_plain or layer_features(layer) is not None


def _called(model: nn.Module, paths: Sequence[str], inputs: Mapping[str, Any]) -> list[str]:
    """Those of some layers that a forward pass calls, in order."""
    called: list[str] = []
    with ExitStack() as stack, torch.no_grad():
        for path in paths:
            layer = model.get_submodule(path)
            stack.callback(layer.register_forward_hook(lambda *_, path=path: called.append(path)).remove)
        model(**inputs, return_dict=True)
    return called


def _same_outputs(target: Tensor, stream: Tensor, cut: LayerCut | None) -> Tensor:
    """The source's stream, without the outputs that the layer itself has no more in the module."""
    same = target.ndim == stream.ndim
    other = [dim for dim, size in enumerate(target.shape) if same and stream.shape[dim] != size]
    if len(other) != 1 or cut is None or cut.outputs is None:
        return target
    (dim,), kept = other, cut.outputs
    if stream.shape[dim] != len(kept):
        return target
    found = target.index_select(dim, kept.clamp(min=0).to(target.device))
    is_padding = (kept == PAD).to(target.device).view(-1, *(1,) * (target.ndim - 1 - dim))
    return found.masked_fill(is_padding, 0.0)


def _wanted(stream: Tensor, target: Tensor, result: Tensor) -> tuple[Tensor, Tensor]:
    """What the layer's result lacks for the stream to be its target, and the factor of each number on the way there."""
    missing = target.to(stream.dtype) - stream.detach()
    (factors,) = torch.autograd.grad(stream, result, torch.ones_like(stream), retain_graph=True)
    (pulled,) = torch.autograd.grad(stream, result, missing)
    largest = factors.abs().max()
    is_reached = factors.abs() > SMALLEST_FACTOR * largest
    return torch.where(is_reached, pulled / factors.square(), 0.0), torch.where(is_reached, factors, 0.0)


def _rows(
    layer: nn.Module, read: Tensor, wanted: Tensor, result: Tensor, factors: Tensor, admitted: Tensor | None,
    generator: torch.Generator, samples: int, has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Rows of the least-squares problem: what is read, what is wanted, and the target."""
    is_image = isinstance(layer, nn.Conv2d)
    if is_image:
        wanted, result, factors = (tensor.permute(0, 2, 3, 1) for tensor in (wanted, result, factors))
    used = (factors != 0).any(-1).flatten()
    if admitted is not None and admitted.numel() == len(used) and not is_image:
        used &= admitted.flatten().to(used.device, torch.bool)
    chosen = used.nonzero().squeeze(-1)
    if is_image:
        features = layer.weight[0].numel()
        most = max(LEAST_ROWS, ROWS_PER_FEATURE * features) * len(read) // samples
        if len(chosen) > most:
            drawn = torch.randperm(len(chosen), generator=generator)[: max(1, most)]
            chosen = chosen[drawn.sort().values.to(chosen.device)]
        rows = _patches(layer, read, chosen)
    else:
        rows = read.flatten(0, -2)[chosen]
    wanted, result = wanted.flatten(0, -2)[chosen], result.flatten(0, -2)[chosen]
    if isinstance(layer, ScatterLinear):
        if layer.input_indices is not None:
            rows = rows.index_select(-1, layer.input_indices)
        if layer.output_indices is not None:
            wanted, result = (tensor.index_select(-1, layer.output_indices) for tensor in (wanted, result))
    if has_bias:
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], -1)
    return rows, wanted, result + wanted


def _patches(layer: nn.Conv2d, read: Tensor, chosen: Tensor) -> Tensor:
    """What a convolution reads at some of its output positions, counted over all images: (positions, weights)."""
    size = {"dilation": layer.dilation, "stride": layer.stride}
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    read = F.pad(read, layer._reversed_padding_repeated_twice, mode)
    found, start, step = [], 0, 1
    while start < len(read):
        columns = F.unfold(read[start : start + step], layer.kernel_size, **size).mT  # (images, positions, weights)
        positions = columns.shape[1]
        own = chosen[(chosen >= start * positions) & (chosen < (start + len(columns)) * positions)]
        found.append(columns.flatten(0, 1)[own - start * positions])
        start += len(columns)
        step = max(1, PATCH_NUMBERS // columns[0].numel())
    return torch.cat(found)


def _apply(layer: nn.Module, norm: nn.Module | None, change: Tensor, has_bias: bool) -> None:
    """Adds a change, (features, outputs), the last row of which is the bias's, to a layer's weights."""
    weights, bias = (change[:-1], change[-1]) if has_bias else (change, None)
    parameter = layer.weight
    assert isinstance(parameter, Tensor)
    delta = weights if isinstance(layer, Conv1D) else weights.mT
    parameter.data += delta.reshape(parameter.shape).to(parameter)
    if bias is not None and layer.bias is not None:
        layer.bias.data += bias.to(layer.bias)
    elif bias is not None:  # a norm subtracts its mean, which does as well
        assert norm is not None
        norm.running_mean -= bias.to(norm.running_mean)
