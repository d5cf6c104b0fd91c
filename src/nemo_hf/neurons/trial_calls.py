"""Forward passes that try a plain model: whether it runs on some samples, and which of its layers are called."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .sites import NeuronSite, UnsupportedArchitectureError


@contextmanager
def evaluating(model: PreTrainedModel, handles: Sequence[RemovableHandle] = ()) -> Iterator[None]:
    """Puts a model into eval mode without gradients; afterwards it has its mode again, and the hooks are removed."""
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()


def on_device(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs on the model's device."""
    return {name: value.to(model.device) for name, value in inputs.items()}


def check_runs(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Checks that a plain model runs on some samples, and returns its logits, the same from call to call."""
    try:
        with evaluating(model):
            given = on_device(model, inputs)
            outputs, again = model(**given), model(**given)
    except Exception as error:
        shapes = ", ".join(f"{name} of shape {tuple(value.shape)}" for name, value in inputs.items())
        raise ValueError(
            f"Got {type(model).__name__}, which does not run on {shapes} ({first_line(error).rstrip('.')}); expected "
            "inputs that it takes. Pass a few samples: NeMoTrainer(make_parent(model, inputs=...), ...)."
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


def first_line(error: Exception) -> str:
    """First line of an error's message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
