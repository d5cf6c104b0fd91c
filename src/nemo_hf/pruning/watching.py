"""Watches layers in forward passes: what they read, what they return, and the stream that this joins."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .partial_runs import stop
from .stream_points import StreamPoint, tensors_of


@dataclass
class Call:
    """One call of a layer: what it read, its result, and the stream that this joined, `None` until it is reached."""

    path: str
    read: Tensor
    result: Tensor
    stream: Tensor | None = None


@contextmanager
def watching_results(
    model: nn.Module, paths: Sequence[str], calls: int, on_last: Callable[[], None] = stop
) -> Iterator[list[Call]]:
    """Lets forward passes end when layers have been called; the list holds the calls of the last pass."""
    seen: list[Call] = []

    def on_call(path: str, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        goes_on = on_last is not stop  # and may add to the result in place
        seen.append(Call(path, args[0], output, output.clone() if goes_on else output))
        if len(seen) == calls:
            on_last()

    with ExitStack() as stack:
        for path in paths:
            stack.callback(model.get_submodule(path).register_forward_hook(partial(on_call, path)).remove)
        yield seen


@contextmanager
def watching_stream(
    model: nn.Module, path: str, point: StreamPoint, calls: int, with_graph: bool, on_last: Callable[[], None] = stop
) -> Iterator[list[Call]]:
    """Lets forward passes end where the results of a layer join the stream; likewise."""
    seen: list[Call] = []
    since = 0  # calls of the point's layer since that of the reader

    def on_call(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        nonlocal since
        since = 0
        if with_graph:
            torch.set_grad_enabled(True)  # until the pass ends
            output = output.detach().requires_grad_()
        seen.append(Call(path, args[0].detach(), output))
        return output.clone() if with_graph else output  # what comes next may add to it in place

    def before(layer: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal since
        since += 1
        if not point.is_output:
            look((args, kwargs))

    def after(layer: nn.Module, args: Any, output: Any) -> None:
        if point.is_output:
            look(output)

    def look(value: Any) -> None:
        if seen and seen[-1].stream is None and since == point.call:
            stream = list(tensors_of(value))[point.position]
            seen[-1].stream = stream if on_last is stop else stream.clone()  # what comes next may add to it in place
            if len(seen) == calls:
                on_last()

    with ExitStack() as stack:
        layer = model.get_submodule(point.path)
        stack.callback(model.get_submodule(path).register_forward_hook(on_call).remove)
        stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(layer.register_forward_hook(after).remove)
        yield seen
