"""Finds where the result of a layer next joins the residual stream: there a module is compared with its source."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nemo_hf.neurons.sites import CHANNEL_NORMS

# Operations after which each number still comes from at most one number of the layer's result, times a factor.
AFFINE = {
    "AddBackward0", "SubBackward0", "MulBackward0", "DivBackward0", "NegBackward0", "AliasBackward0", "CatBackward0",
    "CloneBackward0", "ConstantPadNdBackward0", "ContiguousBackward0", "CopyBackwards", "IndexBackward0",
    "IndexSelectBackward0", "NativeBatchNormBackward0", "CudnnBatchNormBackward0", "PermuteBackward0",
    "ReshapeAliasBackward0", "RollBackward0", "SelectBackward0", "SliceBackward0", "SplitBackward0",
    "SqueezeBackward0", "SqueezeBackward1", "TBackward0", "ToCopyBackward0", "TransposeBackward0",
    "UnsafeViewBackward0", "UnsqueezeBackward0", "ViewBackward0",
}  # fmt: skip


@dataclass(frozen=True)
class StreamPoint:
    """A tensor in a forward pass: the `position`-th that a layer reads or returns in its `call`-th call from there."""

    path: str
    is_output: bool
    position: int
    call: int  # counted since the call of the layer whose result is looked at
    norm: str | None = None  # batch norm that reads that layer's result at once


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in what a layer reads or returns."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_of(each)


class _Finder:
    """Watches one forward pass; the results of `readers` carry marks in the graph."""

    def __init__(self, readers: Sequence[str]) -> None:
        self.marks: dict[str, Any] = {}  # of readers whose results are still affine somewhere
        self.left = set(readers)
        self.calls: dict[str, dict[str, int]] = {}
        self.found: dict[str, StreamPoint] = {}
        self.norms: dict[str, str] = {}

    def mark(self, path: str, layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if path not in self.left:
            return output
        self.left.remove(path)  # of several calls the first one counts
        marked = output + torch.zeros_like(output, requires_grad=True)
        self.marks[path], self.calls[path] = marked.grad_fn, {}
        return marked

    def before(self, path: str, layer: nn.Module, args: Any, kwargs: Any) -> None:
        for own in self.calls.values():
            own[path] = own.get(path, 0) + 1
        if isinstance(layer, CHANNEL_NORMS):
            for reader, node in self.marks.items():
                if args and args[0].grad_fn is node:
                    self.norms[reader] = path
        self._look(path, False, (args, kwargs))

    def after(self, path: str, layer: nn.Module, inputs: Any, output: Any) -> None:
        self._look(path, True, output)

    def _look(self, path: str, is_output: bool, value: Any) -> None:
        for position, tensor in enumerate(tensors_of(value)):
            for reader, node in list(self.marks.items()):
                kind = _dependence(tensor.grad_fn, node)
                if kind == "other":
                    del self.marks[reader]
                elif kind == "affine":
                    call = self.calls[reader].get(path, 0)  # 0: a layer around the reader
                    self.found[reader] = StreamPoint(path, is_output, position, call)


def _dependence(node: Any, mark: Any) -> str:
    """How a tensor depends on a marked one: "none", "affine" (see `AFFINE`) or "other"."""
    earliest, known = mark._sequence_nr(), {mark: "affine"}

    def search(node: Any) -> str:
        if node is None or not node.next_functions or node._sequence_nr() < earliest:
            return "affine" if node is mark else "none"
        if node not in known:
            known[node] = "none"
            kinds = [search(before) for before, _ in node.next_functions]
            reaching = [kind for kind in kinds if kind != "none"]
            is_product = node.name() in ("MulBackward0", "DivBackward0")
            if "other" in kinds or (reaching and (node.name() not in AFFINE or (is_product and len(reaching) > 1))):
                known[node] = "other"
            elif reaching:
                known[node] = "affine"
        return known[node]

    return search(node)


def find_stream_points(
    model: nn.Module, readers: Sequence[str], inputs: Mapping[str, Tensor]
) -> dict[str, StreamPoint]:
    """For each layer that reads neurons, the last place at which its result is found unchanged but for sums and scales.

    In a residual block that is the stream after the block's part was added; without one it is the layer's own result,
    or that of the batch norm behind it.
    """
    finder = _Finder(readers)
    with ExitStack() as stack, torch.enable_grad():
        for path in readers:  # before others look at the result
            handle = model.get_submodule(path).register_forward_hook(partial(finder.mark, path))
            stack.callback(handle.remove)
        for path, layer in model.named_modules():
            before = layer.register_forward_pre_hook(partial(finder.before, path), with_kwargs=True)
            after = layer.register_forward_hook(partial(finder.after, path))
            stack.callback(before.remove)
            stack.callback(after.remove)
        model(**inputs, return_dict=True)
    own = {path: StreamPoint(path, True, 0, 0) for path in readers}
    points = {**own, **finder.found}
    return {
        path: StreamPoint(p.path, p.is_output, p.position, p.call, finder.norms.get(path)) for path, p in points.items()
    }
