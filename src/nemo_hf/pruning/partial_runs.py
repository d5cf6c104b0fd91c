"""Forward passes that end at a layer, over the same batches again and again, without repeating the blocks before it."""

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nemo_hf.neurons.sites import NeuronSite
from nemo_hf.neurons.trial_calls import SHAPE_ERRORS

REMEMBERED_BYTES = 2**28  # most memory for the results of blocks, of each of the two models


class StopForwardError(Exception):
    """Ends a forward pass at a layer; no fault."""


def stop() -> None:
    """Called in a hook: ends the forward pass that `PartialRuns` runs."""
    raise StopForwardError


@dataclass
class _Memory:
    """What one batch left: the result of the last final block, and shapes of the results before."""

    number: int = -1
    output: Any = None
    size: int = 0
    shapes: list[Any] = field(default_factory=list)


class PartialRuns:
    """Runs a model, in eval mode, on numbered batches; blocks whose layers are final are computed once for each batch.

    Only the result of the last final block is kept, the others are stood in for by zeros, which `try_out` finds out to
    be without effect. Batches that don't fit into `most_bytes` are computed from the start each time.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], most_bytes: int = REMEMBERED_BYTES) -> None:
        self.model, self.blocks, self.most_bytes = model, list(blocks), most_bytes
        self._memories: dict[int, _Memory] = {}
        self._current, self._final = _Memory(), 0

    def try_out(self, inputs: Mapping[str, Any]) -> None:
        """Forgets the blocks if skipping them changes the logits of some inputs."""
        if not self.blocks:
            return
        with self.attached():
            expected = self.model(**inputs, return_dict=True).logits
            self._memories[-1] = _Memory()
            try:
                for final in range(1, len(self.blocks) + 1):
                    got = self._logits(-1, inputs, final)
                is_equal = bool(torch.equal(got, expected))
            except SHAPE_ERRORS:
                is_equal = False
        self._memories.clear()
        if not is_equal:
            self.blocks = []

    def _logits(self, batch: int, inputs: Mapping[str, Any], final: int) -> Tensor:
        self._current, self._final = self._memories.setdefault(batch, _Memory()), final
        return self.model(**inputs, return_dict=True).logits  # type: ignore[no-any-return]

    def run(self, batch: int, inputs: Mapping[str, Any], final: int) -> Any:
        """Runs a batch until a hook stops it; the first `final` blocks will not change any more."""
        try:
            return self._logits(batch, inputs, final)
        except StopForwardError:
            return None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Watches the blocks; afterwards they are as they were."""
        layers = [self.model.get_submodule(path) for path in self.blocks]
        for number, layer in enumerate(layers):
            layer.__dict__["forward"] = partial(self._forward, number, layer.forward)
        try:
            yield
        finally:
            for layer in layers:
                layer.__dict__.pop("forward", None)

    def _forward(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        memory = self._current
        if number < memory.number:
            return _mapped(lambda shape: shape.new_zeros(()).expand(shape.shape), memory.shapes[number])
        if number == memory.number:
            return _mapped(Tensor.clone, memory.output)
        output = forward(*args, **kwargs)
        if number < self._final and number == memory.number + 1:
            self._remember(memory, number, output)
        return output

    def _remember(self, memory: _Memory, number: int, output: Any) -> None:
        size = 0

        def measured(tensor: Tensor) -> Tensor:
            nonlocal size
            size += tensor.numel() * tensor.element_size()
            return tensor.detach().clone()

        kept = _mapped(measured, output)
        if sum(each.size for each in self._memories.values()) - memory.size + size > self.most_bytes:
            return
        memory.shapes.append(_mapped(lambda tensor: tensor[:0].new_empty(()).expand(tensor.shape), output))
        memory.number, memory.output, memory.size = number, kept, size


def _mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Applies a function to each tensor in a layer's result."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, MutableMapping):
        made = copy.copy(value)
        for key, each in value.items():
            made[key] = _mapped(function, each)
        return made
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(function, each) for each in value)
    return value


def enclosing_blocks(model: nn.Module, sites: Sequence[NeuronSite]) -> list[str]:
    """Paths of the blocks of sites: elements of lists of layers, of each site the innermost that has all its layers."""
    lists = {path for path, layer in model.named_modules() if isinstance(layer, (nn.ModuleList, nn.Sequential))}
    found: dict[str, None] = {}
    for site in sites:
        names = min(site.layers).split(".")
        around = [".".join(names[:end]) for end in range(len(names), 0, -1)]
        blocks = [path for path in around if path.rpartition(".")[0] in lists]
        whole = [block for block in blocks if all(f"{path}.".startswith(f"{block}.") for path in site.layers)]
        found |= dict.fromkeys(whole[:1])
    return list(found)
