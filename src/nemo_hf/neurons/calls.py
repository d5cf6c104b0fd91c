"""The call of a parent that a layer runs in: each thread has its own, and a replayed layer that of its first pass."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

FrameMask = Callable[[int, Tensor], Tensor]  # makes an attention mask of samples one of so many frames

NO_BACKWARD = -1  # as torch says where no backward pass runs


@dataclass(eq=False)
class MaskedCall:
    """What the masks of one forward call depend on, and what they are."""

    batch_size: int = 0
    attention_mask: Tensor | None = None
    frame_mask: FrameMask | None = None
    static_masks: Mapping[str, Tensor] | None = None
    static_samples: Tensor | None = None
    is_hard: bool = True
    detaches_pooled: bool = True
    is_enabled: bool = True
    collected: dict[str, list[Tensor]] | None = None  # `None` after the call, so that replays add nothing
    current: dict[str, Tensor] = field(default_factory=dict)
    backward: int = NO_BACKWARD  # id of the backward pass in which it runs
    is_replay: bool = False
    replays: dict[int, "MaskedCall"] = field(default_factory=dict)  # by the id of the backward pass that replays layers

    def replayed(self, backward: int) -> "MaskedCall":
        """Returns a call with the same inputs, for a replay, whose masks are its own."""
        return replace(self, collected=None, current={}, backward=backward, is_replay=True, replays={})

    def mark(self, owner: "Calls", tensor: Tensor) -> None:
        """Lets the graph behind a tensor name this call, for replays that don't say which they belong to."""
        # A replay holds its masks, which would hold the graph that holds the replay.
        node: Any = None if torch.compiler.is_dynamo_compiling() or self.is_replay else tensor.grad_fn
        if node is not None:
            node.metadata[owner] = self


MASKS_OFF = MaskedCall(is_enabled=False)
# Parents whose masks are off, each with the backward pass in which they were switched off. It follows asyncio tasks.
_OFF: ContextVar[tuple[tuple["Calls", int], ...]] = ContextVar("_OFF", default=())


class _Running(threading.local):
    """The innermost call of one parent in this thread; `is_off` says what `_OFF` does, which no compiler can read."""

    def __init__(self) -> None:
        self.call: MaskedCall | None = None
        self.is_off = False


def running_backward() -> int:
    """The id of the backward pass that runs in this thread, as torch's own checkpointing reads it."""
    return NO_BACKWARD if torch.compiler.is_dynamo_compiling() else torch._C._current_graph_task_id()


class Calls:
    """The running calls of one parent; a copy of the parent has none."""

    def __init__(self) -> None:
        self._running = _Running()

    def __reduce__(self) -> tuple[Any, ...]:
        return Calls, ()

    def running(self) -> MaskedCall | None:
        """The call that runs in this thread, or that a backward pass replays; `None` if there is none."""
        call = self._running.call
        if torch.compiler.is_dynamo_compiling():
            return MASKS_OFF if call is None and self._running.is_off else call
        backward: int = torch._C._current_graph_task_id()
        if call is not None and call.backward == backward:
            return call
        if (self, backward) in _OFF.get():
            return MASKS_OFF
        return None if backward == NO_BACKWARD else self._replayed(backward)

    def get(self) -> MaskedCall:
        """The call that runs in this thread; refuses layers outside one, whose masks nobody knows."""
        if (call := self.running()) is not None:
            return call
        if running_backward() == NO_BACKWARD:
            raise RuntimeError(
                "Got a call of the base model inside a parent; expected one of the parent, which sets the masks. "
                "Call parent(...), or run parent.model within `parent.masks.disabled()`."
            )
        raise RuntimeError(
            "Got a backward pass that runs a layer again (activation checkpointing) without a trace of the call that "
            "made it; expected its masks. Call parent.activation_checkpointing_enable(), or pass use_reentrant=False."
        )

    def is_off(self) -> bool:
        """Whether new calls have no masks."""
        call = self.running()
        return call is not None and not call.is_enabled

    @contextmanager
    def entered(self, call: MaskedCall) -> Iterator[MaskedCall]:
        """Makes a call the one that runs in this thread."""
        before, self._running.call = self._running.call, call
        try:
            yield call
        finally:
            self._running.call = before
            call.collected = None
            call.current.clear()

    @contextmanager
    def off(self) -> Iterator[None]:
        """Lets the model run without masks, in this thread or asyncio task."""
        running = self._running
        before, running.call, was_off, running.is_off = running.call, None, running.is_off, True
        token = _OFF.set((*_OFF.get(), (self, running_backward())))
        try:
            yield
        finally:
            _OFF.reset(token)
            running.call, running.is_off = before, was_off

    def checkpointed(self, checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        """Does what `checkpoint` does, and replays the function in the call in which it runs now."""
        call = self.running()
        if call is None or torch.compiler.is_dynamo_compiling():
            return checkpoint(function, *args, **kw)
        first = call  # in the closure, as it is a call for sure

        def run(*args: Any, **kw: Any) -> Any:
            backward = running_backward()
            if self._running.call is first and first.backward == backward:
                return function(*args, **kw)
            with self.entered(first.replayed(backward)):
                return function(*args, **kw)

        return checkpoint(run, *args, **kw)

    def _replayed(self, backward: int) -> MaskedCall | None:
        """The call of a layer that somebody else's checkpointing replays: the nearest one that the graph names."""
        call = self._marked(torch._C._current_autograd_node())
        if call is None or not call.is_enabled:
            return call
        if backward not in call.replays:
            call.replays[backward] = call.replayed(backward)

            def forget() -> None:  # lest its masks keep a graph alive
                del call.replays[backward]

            torch.autograd.Variable._execution_engine.queue_callback(forget)
        return call.replays[backward]

    def _marked(self, node: Any) -> MaskedCall | None:
        """The first call that one of the nodes names whose results a node of the graph needs, nearest ones first."""
        nodes = [] if node is None else [node]
        seen = set(nodes)
        for node in nodes:  # it grows
            if (call := node.metadata.get(self)) is not None:
                return call  # type: ignore[no-any-return]
            found = [before for before, _ in node.next_functions if before is not None and before not in seen]
            nodes.extend(found)
            seen.update(found)
        return None
