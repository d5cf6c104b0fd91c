"""Forward passes that try a plain model: whether it runs on some samples, and which of its layers are called."""

import itertools
import math
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .sites import NeuronSite, UnsupportedArchitectureError

SHAPE_ERRORS = (IndexError, RuntimeError, ValueError)  # what models raise whose layers don't fit together
# What models raise on inputs of the wrong names, shapes or kinds; other errors are not about the inputs.
RUN_ERRORS = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


@contextmanager
def evaluating(model: PreTrainedModel, handles: Sequence[RemovableHandle] = ()) -> Iterator[None]:
    """Puts a model into eval mode without gradients; afterwards layers have their modes again, and lose the hooks."""
    training = [layer for layer in model.modules() if layer.training]
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for layer in training:  # these alone: others may have been frozen
            layer.training = True
        for handle in handles:
            handle.remove()


def on_device(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs on the model's device, numbers with a point in its precision."""
    given = {name: value.to(model.device) for name, value in inputs.items()}
    return {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in given.items()}


def check_runs(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Checks that a plain model runs on some samples, and returns its logits, the same from call to call."""
    try:
        with evaluating(model):
            given = on_device(model, inputs)
            outputs, again = (model(**given, return_dict=True) for _ in range(2))
    except RUN_ERRORS as error:
        if is_out_of_memory(error) or _is_of_hook(model, error):
            raise
        shapes = ", ".join(f"{name} of shape {tuple(value.shape)}" for name, value in inputs.items())
        reason = f"{type(error).__name__}: {first_line(error).rstrip('.')}"
        dtypes = {p.dtype: name for name, p in model.named_parameters() if p.is_floating_point()}
        expected = "inputs that it takes. Pass a few samples of your data, as in make_parent(model, inputs=...)."
        if len(dtypes) > 1:
            listed = " and ".join(f"{str(dtype).removeprefix('torch.')} ({name!r})" for dtype, name in dtypes.items())
            expected = f"weights of one precision, not {listed}. Convert it: model.to({next(iter(dtypes))})."
        raise ValueError(
            f"Got {type(model).__name__}, which does not run on {shapes} ({reason}); expected {expected}"
        ) from error
    if not hasattr(outputs, "logits"):
        fault = f"output {list(outputs)} has no logits; expected logits. Wrap the model so that it returns logits."
    elif not torch.allclose(outputs.logits, again.logits, rtol=0, atol=0, equal_nan=True):
        fault = "logits differ from call to call in eval mode; expected the same. Choose a model without sampling."
    else:
        return outputs.logits  # type: ignore[no-any-return]
    raise UnsupportedArchitectureError(f"Got {type(model).__name__}, whose {fault}")


def reached_sites(
    model: PreTrainedModel, sites: Sequence[NeuronSite], inputs: Mapping[str, Tensor]
) -> list[NeuronSite]:
    """The sites whose layers all run on some samples; a text model with an image encoder may run without it."""
    called: set[str] = set()
    samples = len(next(iter(inputs.values())))
    paths = {path for site in sites for path in site.layers}

    def note(path: str, layer: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        values = output if isinstance(output, (tuple, list)) else [output]
        tensors = [value for value in values if isinstance(value, Tensor)]
        # Not what all samples share, such as relative positions.
        if not tensors or tensors[0].shape[0] % samples == 0:
            called.add(path)

    with evaluating(model, [model.get_submodule(path).register_forward_hook(partial(note, path)) for path in paths]):
        model(**on_device(model, inputs))
    return [site for site in sites if site.layers <= called]


def rectified_sites(
    model: PreTrainedModel, sites: Sequence[NeuronSite], inputs: Mapping[str, Tensor]
) -> list[NeuronSite]:
    """The sites of rectified units, whose readers' inputs are 0 in places and nowhere negative; there must be one."""
    least: dict[str, float] = {}

    def note(path: str, layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        least[path] = min(least.get(path, math.inf), arguments[0].min().item() if arguments else -math.inf)

    paths = {path for site in sites for path in site.readers}
    handles = [model.get_submodule(path).register_forward_pre_hook(partial(note, path)) for path in paths]
    with evaluating(model, handles):
        model(**on_device(model, inputs))
    # Of several readers one may see a mean over positions, which is seldom 0.
    found = [site for site in sites if min(least[path] for path in site.readers) == 0]
    if not found:
        raise UnsupportedArchitectureError(
            f"Got objective='moda' for model type {model.config.model_type!r}, none of whose neurons are rectified; "
            "expected a network with ReLU. Choose another objective."
        )
    return found


def _is_of_hook(model: nn.Module, error: Exception) -> bool:
    """Whether an error was raised in a hook of a layer, and not by the model itself."""
    hooks = [[*layer._forward_hooks.values(), *layer._forward_pre_hooks.values()] for layer in model.modules()]
    codes = {getattr(hook, "__code__", None) for hook in itertools.chain.from_iterable(hooks)}
    return any(frame.f_code in codes for frame, _ in traceback.walk_tb(error.__traceback__))


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of torch says that no memory is left, on a CPU or an accelerator."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)


def first_line(error: Exception) -> str:
    """First line of an error's message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
