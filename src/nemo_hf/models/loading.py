"""Checks a saved model while it is loaded: its structure on the meta device first, then every tensor."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.initialization import meta_device_safe_creation_ops
from transformers.utils import logging as transformers_logging

from nemo_hf.pruning.resize import RotaryAngles, ScatterLinear
from nemo_hf.pruning.shared_rows import SharedEmbedding

from .config_checks import damaged
from .configuration import NeMoModelConfig
from .weight_files import WeightFiles, other_shape, other_tensors, size_in_bytes

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
SPARE_BYTES = 256 * 2**20  # what a model may take beyond the size of its files: tables that are computed
SPARE_ENTRIES, ENTRIES_PER_TENSOR = 10_000, 6
# Held while a thread changes what all threads share: how transformers and torch build models, progress bars, precision.
PROCESS_SETTINGS = threading.RLock()


@contextmanager
def _bounded_build(most: int) -> Iterator[None]:
    """Stops a model that has more layers, parameters and buffers than its files can hold, in this thread."""
    thread, count = threading.get_ident(), 0

    def register(module: nn.Module, name: str, entry: Any) -> None:
        nonlocal count
        if threading.get_ident() != thread:
            return
        count += 1
        if count > most:
            raise damaged(f"a config.json of over {most} layers and parameters", "about those in its weight files")

    with (
        torch_module.register_module_parameter_registration_hook(register),
        torch_module.register_module_buffer_registration_hook(register),
        torch_module.register_module_module_registration_hook(register),
    ):
        yield


def build_on_meta(make: Callable[[], Any], weights: WeightFiles, prefix: str = "") -> Any:
    """Makes a model without memory for its weights, and compares its size and kinds of numbers with its files.

    The files' names of its tensors start with `prefix`.
    """
    most = SPARE_ENTRIES + ENTRIES_PER_TENSOR * len(weights)
    try:
        with PROCESS_SETTINGS, torch.device("meta"), meta_device_safe_creation_ops(), _bounded_build(most):
            model = make()
    except (ImportError, MemoryError, OSError):
        raise
    except Exception as error:  # of whatever kind the plain model raises
        if isinstance(error, ValueError) and str(error).startswith("Got "):  # an error of ours
            raise
        raise damaged(
            f"a config.json that builds no model ({type(error).__name__}: {error})", "that of the weights"
        ) from error
    size = size_in_bytes((*model.parameters(), *model.buffers()))
    if size > 2 * weights.size + SPARE_BYTES:
        raise damaged(f"a config.json of a model of {size} bytes", f"about {weights.size}, as its weight files have")
    weights.check_dtypes({f"{prefix}{name}": tensor.dtype for name, tensor in model.state_dict().items()})
    return model


def check_labels(config: NeMoModelConfig, outputs: int) -> None:
    """Checks that labels, groups and the number of outputs of the plain model's head belong together."""
    count, is_parent = len(config.names), config.role == "parent"
    own = list(range(count)) if is_parent else config.label_ids or []
    members = sorted(label for labels in config.groups.values() for label in labels)
    is_parents = outputs == count and members == own
    if len(own) != count or not set(own) <= set(members) <= set(range(outputs)) or (is_parent and not is_parents):
        labels = f"{count} labels, the ids {own[:12]} and groups of the labels {members[:12]}"
        raise damaged(f"a config.json with {labels}, on a plain model of {outputs}", "each label in a group")


def check_values(model: Any) -> None:
    """Checks the tensors of a parent or module that steer where others are read or written."""
    for path, layer in model.named_modules():
        if isinstance(layer, ScatterLinear):
            _check_indices(f"{path}.input_indices", layer.input_indices, layer.full_inputs, is_increasing=True)
            _check_indices(f"{path}.output_indices", layer.output_indices, layer.full_outputs, is_increasing=True)
        elif isinstance(layer, RotaryAngles):
            _check_indices(f"{path}.angle_indices", layer.angle_indices, layer.full_dim)
        elif isinstance(layer, SharedEmbedding):
            _check_indices(f"{path}.row_of_token", layer.row_of_token, layer.num_embeddings)
    if model.is_parent:
        check_mean_masks([mask.mean_mask for mask in model.masks.site_masks()])


def check_mean_masks(mean_masks: Sequence[Tensor | None]) -> None:
    """Checks that the mean masks of a parent's sites, where they are kept, hold numbers in [0, 1] alone."""
    for index, mean in enumerate(mean_masks):
        if mean is not None and not mean.is_meta and not bool(((mean >= 0) & (mean <= 1)).all()):
            raise damaged(f"masks.{index}.mean_mask with values outside [0, 1]", "a share for each neuron")


def _check_indices(name: str, indices: Tensor | None, size: int | None, is_increasing: bool = False) -> None:
    if indices is None or size is None or indices.is_meta or not len(indices):
        return
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= size or (is_increasing and not bool((indices.diff() > 0).all())):
        expected = f"{'increasing ' * is_increasing}ones from 0 to {size - 1}"
        raise damaged(f"the tensor {name!r} with indices from {low} to {high}", expected)


def check_loaded(source: str, info: Mapping[str, Any]) -> None:
    """Checks from the loading info of `transformers` that a model got exactly the tensors that it has."""
    if info["mismatched_keys"]:
        name, got, expected = sorted(info["mismatched_keys"])[0]
        raise other_shape(source, name, got, expected)
    for kind in ("missing", "unexpected"):
        if info[f"{kind}_keys"]:
            raise other_tensors(source, kind, info[f"{kind}_keys"])
    if info["error_msgs"]:
        raise damaged(f"weights in {source!r} that don't load ({info['error_msgs'][0]})", "those of the configuration")


@contextmanager
def hidden_progress() -> Iterator[None]:
    """Hides the progress bar of loading, for weights that are in memory."""
    with PROCESS_SETTINGS:
        shows = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            if shows:
                transformers_logging.enable_progress_bar()
