"""What a plain model calls: whether it runs on some samples at all, and which of its layers do."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .sites import NeuronSite, UnsupportedArchitectureError


def check_runs(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> None:
    """Checks that a model runs on some samples, and that its logits can be compared.

    Args:
        model: A plain classification model.
        inputs: A few samples.

    Raises:
        ValueError: If it does not run on them.
        UnsupportedArchitectureError: If it returns no logits, or others from call to call.
    """
    was_training = model.training
    try:
        with torch.no_grad():
            given = {name: value.to(model.device) for name, value in inputs.items()}
            outputs, again = model.eval()(**given), model(**given)
    except Exception as error:
        raise ValueError(
            f"Got {type(model).__name__}, which does not run on {_shapes(inputs)}: {first_line(error)}. Expected a "
            "few samples as it takes them: pass NeMoTrainer the parent make_parent(model, inputs=...)."
        ) from error
    finally:
        model.train(was_training)
    if not hasattr(outputs, "logits"):
        raise UnsupportedArchitectureError(
            f"Got {type(model).__name__}, whose output has {list(outputs)} and no logits; expected logits, which "
            "modules are compared by. Wrap the model so that it returns an output with logits."
        )
    if not torch.equal(outputs.logits, again.logits):
        raise UnsupportedArchitectureError(
            f"Got {type(model).__name__}, whose logits differ from call to call in eval mode; expected the same, or no "
            "cut can be checked. Choose an architecture without random hashing or sampling."
        )


def reached_sites(
    model: PreTrainedModel, sites: Sequence[NeuronSite], inputs: Mapping[str, Tensor]
) -> list[NeuronSite]:
    """Finds the sites all of whose layers run; a text model with an image encoder runs without it, for example.

    Args:
        model: A plain classification model.
        sites: Some of its sites.
        inputs: A few samples that it runs on.

    Returns:
        Those of the sites whose layers are called, with results that belong to samples.
    """
    called: set[str] = set()
    samples = len(next(iter(inputs.values())))
    paths = {path for site in sites for path in site.layers}

    def note(path: str, layer: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        values = output if isinstance(output, (tuple, list)) else [output]
        tensors = [value for value in values if isinstance(value, Tensor)]
        # Not what all samples share, such as relative positions.
        if not tensors or tensors[0].shape[0] % samples == 0:
            called.add(path)

    handles = [model.get_submodule(path).register_forward_hook(partial(note, path)) for path in paths]
    _run_watched(model, inputs, handles)
    return [site for site in sites if site.layers <= called]


def rectified_sites(
    model: PreTrainedModel, sites: Sequence[NeuronSite], inputs: Mapping[str, Tensor]
) -> list[NeuronSite]:
    """Finds the sites whose neurons are rectified units: what is read of them is 0 in places and nowhere negative.

    Args:
        model: A plain classification model.
        sites: Some of its sites.
        inputs: A few samples that it runs on.

    Returns:
        Those of the sites.

    Raises:
        UnsupportedArchitectureError: If there is none.
    """
    least: dict[str, float] = {}

    def note(path: str, layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        least[path] = min(least.get(path, math.inf), arguments[0].min().item() if arguments else -math.inf)

    paths = {path for site in sites for path in site.readers}
    handles = [model.get_submodule(path).register_forward_pre_hook(partial(note, path)) for path in paths]
    _run_watched(model, inputs, handles)
    # A mean over positions is seldom 0; another layer reads the same units before it.
    found = [site for site in sites if min(least[path] for path in site.readers) == 0]
    if not found:
        raise UnsupportedArchitectureError(
            f"Got objective='moda' for model type {model.config.model_type!r}, none of whose neurons are rectified "
            "units, which are 0 for some samples; expected a network with ReLU. Choose another objective."
        )
    return found


def _run_watched(model: PreTrainedModel, inputs: Mapping[str, Tensor], handles: Sequence[RemovableHandle]) -> None:
    """Runs a model once in eval mode and removes the hooks that watched it."""
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(**{name: value.to(model.device) for name, value in inputs.items()})
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()


def first_line(error: Exception) -> str:
    """First line of an error's message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _shapes(inputs: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} of shape {tuple(value.shape)}" for name, value in inputs.items())
