"""Least-squares reconstruction: layers that read fewer neurons are fitted to the source, one after another.

With X what such a layer of the module reads, and d what the stream of the source has behind it and that of the module
has not, its weights become W + D, where D minimises |X D - d|^2 + ridge |D|^2. As d holds all that earlier cuts did to
the stream, each layer also mends their damage.
"""

import itertools
from collections import ChainMap, Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from nemo_hf.neurons.sites import PAD, NeuronSite, layer_features

from .layer_cuts import LayerCut, site_cut
from .layer_edits import layer_weight
from .partial_runs import REMEMBERED_BYTES, PartialRuns, enclosing_blocks, stop
from .plan import Plan
from .resize import ScatterLinear
from .statistics import admitted_tokens
from .stream_points import find_stream_points
from .watching import Call, watching_results, watching_stream

SMALLEST_FACTOR = 1e-3  # of the largest one on the way to the stream: channels below it are left as they are
NOTHING = torch.empty(0)
SHARED_BYTES = 2**29  # most memory for streams of the source that several modules of it are fitted to
TRIED = 2  # samples on which skipping blocks is tried
PATCH_NUMBERS = 2**24  # of a convolution's patches that are held at a time
ROWS_PER_FEATURE, LEAST_ROWS = 8, 8192  # positions of images beyond which a sample of them will do

Batches = Sequence[tuple[int, Mapping[str, Any]]]
Targets = dict[tuple[str, int], list[Call]]  # of the source, by the first layer of a step and batch


@dataclass(frozen=True)
class LayerError:
    """Error of one layer in the stream, relative to the variance of its target, before and after; and its ridge."""

    before: float
    after: float
    ridge: float
    is_scarce: bool  # fewer rows than weights of an output


class NormalEquations:
    """Sums of a least-squares problem of (rows, features) and (rows, outputs), as large for any number of rows."""

    def __init__(self, features: int, outputs: int, device: torch.device) -> None:
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.gram, self.cross = zeros(features, features), zeros(features, outputs)
        self.square, self.total, self.reached = zeros(outputs), zeros(outputs), zeros(outputs)
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


class Reconstruction:
    """Reconstructs the linear layers and convolutions of a module from the first one that reads neurons on.

    Those that read neurons are fitted to the source's stream behind them, the others to what the same layer of the
    source says. Source and module are in eval mode and in float32. `batches` are
    numbered model inputs; `plan` says which neurons of the sites the module keeps, `heads` which outputs of the layers
    that make the logits, and `basis`, (source's width, module's width), how a narrower stream comes from the source's.
    `targets` is filled with streams of the source, for further modules of it and of the same batches and heads.
    """

    def __init__(
        self,
        source: nn.Module,
        module: nn.Module,
        sites: Sequence[NeuronSite],
        plan: Plan,
        heads: Mapping[str, Tensor],
        batches: Batches,
        basis: Tensor | None = None,
        targets: Targets | None = None,
    ) -> None:
        self.basis = basis
        self.targets: ChainMap[tuple[str, int], list[Call]] = ChainMap({}, {} if targets is None else targets)
        self.most_shared = 0 if targets is None else SHARED_BYTES
        self.source, self.module, self.batches = source, module, batches
        self.samples = sum(len(next(iter(inputs.values()))) for _, inputs in batches)
        cuts = [layer for site in sites for layer in site_cut(site, plan[site.key]).layers.items()]
        self.cuts = {path: cut for path, cut in cuts if cut.outputs is not None and not cut.is_scattered}
        self.cuts.update({path: LayerCut(outputs=kept) for path, kept in heads.items()})
        readers = {path for site in sites for path in site.readers}
        linear = {path for path, layer in source.named_modules() if path in readers or _is_linear(layer)}
        called = _called(source, sorted(linear), batches[0][1])
        changed = (
            readers if basis is None else {*readers, *(rows.layer for site in sites for rows, _ in site.produced())}
        )
        first = next((place for place, (path, _) in enumerate(called) if path in changed), len(called))
        self.calls = Counter(path for path, _ in called[first:])
        self.steps = _steps(called[first:], readers, self.calls)
        self.points = find_stream_points(source, [path for path in self.calls if path in readers], batches[0][1])
        times = Counter(path for path, _ in _called(source, enclosing_blocks(source, sites), batches[0][1]))
        once = [path for path, count in times.items() if count == 1]
        self.blocks = [path for path in once if not any(other.startswith(f"{path}.") for other in once)]
        self.runs = [PartialRuns(model, self.blocks) for model in (source, module)]

    @torch.no_grad()
    def run(self, ridge: float = 1e-2, on_layer: Callable[[str], None] = lambda path: None) -> dict[str, LayerError]:
        """Changes the module's weights; returns the errors of its layers by path, in the order in which they run."""
        for runs in self.runs:
            runs.try_out({name: value[:TRIED] for name, value in self.batches[0][1].items()})
        errors: dict[str, LayerError] = {}
        with self.runs[0].attached(), self.runs[1].attached():
            for number, paths in enumerate(self.steps):
                later = [path for step in self.steps[number:] for path in step]
                is_open = [any(path.startswith(f"{block}.") for path in later) for block in self.blocks]
                final = [*is_open, True].index(True)
                if (paths[0], self.batches[0][0]) not in self.targets:
                    self._collect_targets(self._same_block(number), final)
                errors |= self._reconstruct(paths, final, ridge)
                on_layer(paths[-1])
        return errors

    def _same_block(self, number: int) -> list[list[str]]:
        """The steps from this one on that lie in the same block."""
        around = next((block for block in self.blocks if self.steps[number][0].startswith(f"{block}.")), None)
        steps = itertools.takewhile(lambda step: around and step[0].startswith(f"{around}."), self.steps[number:])
        return list(steps) or [self.steps[number]]

    def _watching(self, model: nn.Module, paths: Sequence[str], **options: Any) -> Any:
        point, count = self.points.get(paths[0]), sum(self.calls[path] for path in paths)
        if point is None:
            return watching_results(model, paths, count, **options)
        return watching_stream(model, paths[0], point, count, model is self.module, **options)

    def _collect_targets(self, steps: Sequence[Sequence[str]], final: int) -> None:
        """Runs the source once for several steps and keeps its streams, if these are not too large."""
        self.targets.clear()  # those of the last block, but not those that further modules need
        left, size = len(steps), 0

        def on_last() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                stop()

        with ExitStack() as stack:
            watched = [stack.enter_context(self._watching(self.source, paths, on_last=on_last)) for paths in steps]
            for index, inputs in self.batches:
                left = len(steps)
                for seen in watched:
                    seen.clear()
                self.runs[0].run(index, inputs, final)
                for paths, seen in zip(steps, watched, strict=True):
                    self.targets[paths[0], index] = [replace(call, read=NOTHING, result=NOTHING) for call in seen]
                    size += _size(seen)
                if size > REMEMBERED_BYTES:
                    self.targets.clear()
                    return
        own, shared = self.targets.maps
        if size + sum(map(_size, shared.values())) <= self.most_shared:
            shared.update(own)

    def _reconstruct(self, paths: Sequence[str], final: int, ridge: float) -> dict[str, LayerError]:
        """Changes layers that are called one after another with the same input, or one that joins the stream."""
        point = self.points.get(paths[0])
        norm = None if point is None or point.norm is None else self.module.get_submodule(point.norm)
        fits = {path: _Fit(self, path, norm) for path in paths}
        with self._watching(self.source, paths) as of_source, self._watching(self.module, paths) as of_module:
            for index, inputs in self.batches:
                of_module.clear()
                with torch.no_grad():
                    self.runs[1].run(index, inputs, final)
                    if (targets := self.targets.get((paths[0], index))) is None:
                        of_source.clear()
                        self.runs[0].run(index, inputs, final)
                        targets = of_source
                for target, call in zip(targets, of_module, strict=False):
                    fits[call.path].add(target, call, inputs)
        errors = {path: fit.apply(ridge) for path, fit in fits.items()}
        # Layers that nothing was cut from have good weights to stay near to.
        found = {path: error for path, error in errors.items() if error is not None}
        return {path: replace(error, is_scarce=error.is_scarce and point is not None) for path, error in found.items()}


def _size(calls: Sequence[Call]) -> int:
    """Bytes of the streams of some calls."""
    return sum(call.stream.nbytes for call in calls if call.stream is not None)


class _Fit:
    """The least-squares problem of one layer of a module."""

    def __init__(self, of: Reconstruction, path: str, norm: nn.Module | None) -> None:
        self.layer, self.norm, self.samples = of.module.get_submodule(path), norm, of.samples
        self.basis = of.basis
        self.cut, self.outputs = of.cuts.get(path), layer_weight(of.source.get_submodule(path)).shape[0]
        self.has_bias = self.layer.bias is not None or norm is not None
        self.equations: NormalEquations | None = None
        self.is_possible = True
        self.generator = torch.Generator().manual_seed(0)

    def add(self, of_source: Call, of_module: Call, inputs: Mapping[str, Any]) -> None:
        """Adds a call on a batch."""
        if of_source.stream is None or of_module.stream is None:
            return
        target = self._own_outputs(of_source.stream, of_module.stream)
        self.is_possible &= target.shape == of_module.stream.shape  # experts see other tokens
        if not self.is_possible:
            return
        wanted, factors = _wanted(of_module.stream, target, of_module.result)
        rows = self._rows(of_module.read, wanted, of_module.result.detach(), factors, admitted_tokens(inputs))
        if self.equations is None:
            self.equations = NormalEquations(rows[0].shape[1], rows[1].shape[1], rows[0].device)
        self.equations.add(*rows)

    def apply(self, ridge: float) -> LayerError | None:
        """Changes the layer."""
        if self.equations is None or not self.is_possible:
            return None
        change, error = self.equations.solve(ridge)
        weights, bias = (change[:-1], change[-1]) if self.has_bias else (change, None)
        parameter: Any = self.layer.weight
        delta = weights if isinstance(self.layer, Conv1D) else weights.mT
        parameter.data += delta.reshape(parameter.shape).to(parameter)
        own_bias: Any = self.layer.bias
        if bias is not None and own_bias is not None:
            own_bias.data += bias.to(own_bias)
        elif bias is not None:  # a norm subtracts its mean, which does as well
            mean: Any = self.norm.running_mean if self.norm is not None else None
            mean.data -= bias.to(mean)
        return error

    def _own_outputs(self, target: Tensor, stream: Tensor) -> Tensor:
        """The source's stream, in the module's basis, with the outputs that the layer has, and scaled as these are."""
        kept = None if self.cut is None else self.cut.outputs
        basis = None if kept is not None else self.basis  # what is cut itself may have the stream's width, too
        if basis is not None and (target.shape[-1], stream.shape[-1]) == basis.shape:
            return target @ basis.to(target)
        dim = 1 if isinstance(self.layer, nn.Conv2d) else target.ndim - 1
        is_cut = kept is not None and target.shape[dim] == self.outputs and stream.shape[dim] == len(kept)
        if kept is None or self.cut is None or not is_cut:
            return target
        shape = (-1, *(1,) * (target.ndim - 1 - dim))
        places = kept.clamp(min=0).to(target.device)
        scale = torch.ones(self.outputs) if self.cut.output_scale is None else self.cut.output_scale
        scale = torch.where(kept == PAD, 0.0, scale[kept.clamp(min=0)]).to(target)
        return target.index_select(dim, places) * scale.view(shape)

    def _rows(
        self, read: Tensor, wanted: Tensor, result: Tensor, factors: Tensor, admitted: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the least-squares problem: what is read, what is wanted, and the target."""
        layer = self.layer
        if isinstance(layer, nn.Conv2d):
            wanted, result, factors = (tensor.permute(0, 2, 3, 1) for tensor in (wanted, result, factors))
        used = (factors != 0).any(-1).flatten()
        if admitted is not None and admitted.numel() == len(used) and not isinstance(layer, nn.Conv2d):
            used &= admitted.flatten().to(used.device, torch.bool)
        chosen = used.nonzero().squeeze(-1)
        if isinstance(layer, nn.Conv2d):
            most = max(LEAST_ROWS, ROWS_PER_FEATURE * layer.weight[0].numel()) * len(read) // self.samples
            if len(chosen) > most:
                drawn = torch.randperm(len(chosen), generator=self.generator)[: max(1, most)]
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
        if self.has_bias:
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], -1)
        return rows, wanted, result + wanted


def _is_linear(layer: nn.Module) -> bool:
    """Whether a layer is linear in patches or tokens, with nothing of its own around that."""
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and type(layer).forward is nn.Conv2d.forward
    return layer_features(layer) is not None and type(layer).forward in (nn.Linear.forward, Conv1D.forward)


def _called(model: nn.Module, paths: Sequence[str], inputs: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Those of some layers that a forward pass calls, in order, each with its first argument."""
    called: list[tuple[str, Any]] = []

    def note(path: str, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        called.append((path, args[0] if args else None))

    with ExitStack() as stack, torch.no_grad():
        for path in paths:
            stack.callback(model.get_submodule(path).register_forward_hook(partial(note, path)).remove)
        model(**inputs, return_dict=True)
    return called


def _steps(called: Sequence[tuple[str, Any]], readers: set[str], calls: Mapping[str, int]) -> list[list[str]]:
    """Layers in the order of their first calls; those that read the same one after another are done together."""
    steps: list[list[str]] = []
    last: Any = None
    done: set[str] = set()
    for path, read in called:
        if path in done:
            last = None
            continue
        done.add(path)
        is_alone = path in readers or calls[path] > 1
        if not is_alone and last is not None and read is last:
            steps[-1].append(path)
        else:
            steps.append([path])
        last = None if is_alone else read
    return steps


def _wanted(stream: Tensor, target: Tensor, result: Tensor) -> tuple[Tensor, Tensor]:
    """What the layer's result lacks for the stream to be its target, and the factor of each number on the way there."""
    missing = target.to(stream.dtype) - stream.detach()
    if stream is result:
        return missing, torch.ones_like(missing)
    (factors,) = torch.autograd.grad(stream, result, torch.ones_like(stream), retain_graph=True)
    (pulled,) = torch.autograd.grad(stream, result, missing)
    largest = factors.abs().max()
    is_reached = factors.abs() > SMALLEST_FACTOR * largest
    return torch.where(is_reached, pulled / factors.square(), 0.0), torch.where(is_reached, factors, 0.0)


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
