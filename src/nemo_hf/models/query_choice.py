"""Lets a module of a detector look at the queries that its source chooses, so that the two can be compared.

RT-DETR and its kin rank all places of an image and go on with the best. A module that ranks near ties in another order
has other queries at the same number, and all that is behind them would be compared with something else.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel


class _Choice(TorchFunctionMode):
    """Notes which queries a source chooses for each batch; a module then chooses the same."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count, self.known = count, dict[int, Tensor]()
        self.batch, self.is_source = 0, True

    def before(self, is_source: bool, layer: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Notes which model runs on which images; parts of a batch, from its start, count as that batch."""
        self.batch, self.is_source = kwargs["pixel_values"].data_ptr(), is_source

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not torch.topk or args[1:2] != (self.count,):
            return result
        if self.is_source:
            self.known[self.batch] = result.indices
            return result
        indices = self.known[self.batch][: len(result.indices)]
        return torch.return_types.topk((args[0].gather(1, indices), indices))


@contextmanager
def same_queries(
    source: PreTrainedModel, module: PreTrainedModel, batches: Sequence[Mapping[str, Any]]
) -> Iterator[None]:
    """While open, a module's forward passes on these batches choose the queries that its source chooses on them."""
    count = getattr(source.config, "num_queries", None)
    if count is None:
        yield
        return
    choice = _Choice(count)
    with ExitStack() as stack:
        for model, is_source in ((source, True), (module, False)):
            hook = model.register_forward_pre_hook(partial(choice.before, is_source), with_kwargs=True)
            stack.callback(hook.remove)
        with choice:
            for inputs in batches:
                source(**inputs, return_dict=True)
                if not choice.known:
                    break  # all queries are learnt ones
        if choice.known:
            stack.enter_context(choice)
        yield
