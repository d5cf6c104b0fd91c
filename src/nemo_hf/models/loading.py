"""Checks of what is loaded, before memory is taken for it and after: configuration, headers, every tensor."""

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import PreTrainedConfig
from transformers.initialization import meta_device_safe_creation_ops, no_init_weights
from transformers.utils import logging as transformers_logging

from nemo_hf.pruning.resize import RotaryAngles, ScatterLinear

from .config_checks import REMEDY
from .configuration import NeMoModelConfig
from .files import WeightFiles
from .remote_files import LARGEST_JSON, find_file

FOREIGN_FILES = ("adapter_config.json",)
"""Files by which `transformers` would load other weights than those beside the configuration."""
SPARE_BYTES = 256 * 2**20
"""What a model may take beyond the size of its files: tables that are computed, and a little damage."""
SPARE_ENTRIES = 10_000
ENTRIES_PER_TENSOR = 20


def open_model(
    source: str | Path,
    hub_options: Mapping[str, Any],
    config: Any = None,
    variant: str | None = None,
    kind: type[PreTrainedConfig] = NeMoModelConfig,
) -> tuple[Any, WeightFiles]:
    """Reads the configuration of a parent or module and the headers of its weights.

    Args:
        source: Directory or Hub repository.
        hub_options: Options of the Hub, such as `revision`.
        config: The configuration, if it is loaded already.
        variant: Variant of the weights, as in `from_pretrained`.
        kind: Class of the configuration.

    Returns:
        A configuration of its own, and the opened weights.

    Raises:
        OSError: If a file is missing or damaged.
        ValueError: If it holds another model, or the configuration is wrong.
    """
    if config is None:
        path = find_file(source, "config.json", hub_options)
        if path and path.stat().st_size > LARGEST_JSON:
            raise OSError(
                f"Got {str(path)!r} of {path.stat().st_size} bytes; expected at most {LARGEST_JSON}. {REMEDY}"
            )
        check_model_type(source, hub_options, kind)
        config = kind.from_pretrained(source, **hub_options)
    for name in FOREIGN_FILES:
        if find_file(source, name, hub_options):
            raise ValueError(
                f"Got {str(source)!r} with {name}, by which transformers would load weights from elsewhere; expected "
                "a parent or module alone. Remove that file."
            )
    folder = Path(source, hub_options.get("subfolder") or "")
    if folder.is_dir() and any(folder.glob("shard-*-model-*.safetensors")):
        raise ValueError(
            f"Got {str(source)!r} with a distributed checkpoint; expected weights as save_pretrained writes them. "
            "Save the model again."
        )
    return copy.deepcopy(config), WeightFiles(source, hub_options, variant)


def check_model_type(
    source: str | Path, hub_options: Mapping[str, Any], kind: type[PreTrainedConfig] = NeMoModelConfig
) -> None:
    """Checks that a directory or repository holds a parent or module.

    Args:
        source: Directory or Hub repository.
        hub_options: Options of the Hub, such as `revision`.
        kind: Class of the configuration that is expected.

    Raises:
        ValueError: If it holds another model, or its configuration is nested too deep to be read.
    """
    try:
        config, _ = kind.get_config_dict(source, **hub_options)
        model_type = config.get("model_type")
    except (RecursionError, AttributeError, TypeError) as error:  # nested too deep, or no mapping
        raise ValueError(
            f"Got a config.json in {str(source)!r} that can't be read ({error}); expected that of a parent or module. "
            f"{REMEDY}"
        ) from error
    if model_type != kind.model_type:
        expected = "a parent or module" if kind is NeMoModelConfig else "modules that were joined"
        raise ValueError(
            f"Got {str(source)!r} of model type {model_type!r}; expected {expected} of nemo_hf. "
            "Load it with the Auto class for its task; a plain model is trained with NeMoTrainer first."
        )


@contextmanager
def _bounded_build(most: int) -> Iterator[None]:
    """Stops a model that has more layers, parameters and buffers than its files can hold, in this thread."""
    thread, count = threading.get_ident(), 0

    def register(module: nn.Module, name: str, entry: Any) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > most:
            raise ValueError(
                f"Got a config.json of a model with over {most} layers and parameters; expected what its weight files "
                f"hold. {REMEDY}"
            )

    hooks = [
        torch_module.register_module_parameter_registration_hook(register),
        torch_module.register_module_buffer_registration_hook(register),
        torch_module.register_module_module_registration_hook(register),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def build_on_meta(kind: Any, config: Any, weights: WeightFiles) -> Any:
    """Builds a model without memory for its weights, and compares it with what its files hold.

    Args:
        kind: Class of the parent or module.
        config: Its configuration; it becomes the model's.
        weights: Its opened weights.

    Returns:
        The model on the meta device.

    Raises:
        UnsupportedArchitectureError: If the class of the plain model is unknown.
        ValueError: If the configuration builds no model, or one far larger than the files.
    """
    try:
        with (
            torch.device("meta"),
            meta_device_safe_creation_ops(),
            no_init_weights(),
            _bounded_build(SPARE_ENTRIES + ENTRIES_PER_TENSOR * len(weights)),
        ):
            model = kind(config)
    except (ImportError, OSError, ValueError):
        raise
    except Exception as error:  # of whatever kind the plain model raises
        name = getattr(config, "base_class", kind.__name__)
        raise ValueError(
            f"Got a config.json that builds no {name} ({type(error).__name__}: {error}); expected that of the saved "
            f"weights. {REMEDY}"
        ) from error
    for part in getattr(model, "parts", [model]):
        _check_labels(part)
    tensors = [*model.parameters(), *model.buffers()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if size > 2 * weights.size + SPARE_BYTES:
        raise ValueError(
            f"Got a config.json of a model of {size} bytes beside weight files of {weights.size}; expected one of "
            f"about their size. {REMEDY}"
        )
    weights.check_dtypes({name: tensor.dtype for name, tensor in model.state_dict().items()})
    return model


def _check_labels(model: Any) -> None:
    """Checks that labels, groups and the plain model's head belong together."""
    config: NeMoModelConfig = model.config
    count, outputs = len(config.names), model.model.config.num_labels
    own = list(range(count)) if model.is_parent else config.label_ids or []
    members = sorted(label for labels in config.groups.values() for label in labels)
    if (
        len(own) != count
        or (model.is_parent and (outputs != count or members != own))
        or not set(own) <= set(members)
        or not set(members) <= set(range(outputs))
    ):
        raise ValueError(
            f"Got a config.json of a {config.role} with {count} labels, the ids {own[:12]} and groups of the labels "
            f"{members[:12]}, on a plain model of {outputs}; expected each label in a group. {REMEDY}"
        )


def check_values(model: Any) -> None:
    """Checks loaded tensors that steer where others are read or written.

    Args:
        model: A parent or module.

    Raises:
        ValueError: If an index is out of range, or a mean mask holds something else than shares.
    """
    for path, layer in model.named_modules():
        if isinstance(layer, ScatterLinear):
            _check_indices(f"{path}.input_indices", layer.input_indices, layer.full_inputs, is_increasing=True)
            _check_indices(f"{path}.output_indices", layer.output_indices, layer.full_outputs, is_increasing=True)
        elif isinstance(layer, RotaryAngles):
            _check_indices(f"{path}.angle_indices", layer.angle_indices, layer.full_dim)
    if model.is_parent:
        check_mean_masks([mask.mean_mask for mask in model.masks.site_masks()])


def check_mean_masks(mean_masks: Sequence[Tensor | None]) -> None:
    """Checks that the mean masks of a parent's sites, where they are kept, hold numbers in [0, 1] alone."""
    for index, mean in enumerate(mean_masks):
        if mean is not None and not mean.is_meta and not bool(((mean >= 0) & (mean <= 1)).all()):
            raise ValueError(
                f"Got masks.{index}.mean_mask with values outside [0, 1]; expected shares. The weights are damaged: "
                "save or download them again."
            )


def _check_indices(name: str, indices: Tensor | None, size: int | None, is_increasing: bool = False) -> None:
    if indices is None or size is None or indices.is_meta or not len(indices):
        return
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= size or (is_increasing and not bool((indices.diff() > 0).all())):
        raise ValueError(
            f"Got the tensor {name!r} with indices from {low} to {high}; expected "
            f"{'increasing ' * is_increasing}ones from 0 to {size - 1}. The weights are damaged: save or download them "
            "again."
        )


def check_loaded(source: str, info: Mapping[str, Any]) -> None:
    """Checks that a model got exactly the tensors that it has.

    Args:
        source: Directory or Hub repository, for the message.
        info: What `from_pretrained(..., output_loading_info=True)` returned of the loading.

    Raises:
        ValueError: If a tensor is missing, unexpected or of another shape.
    """
    if info["mismatched_keys"]:
        name, got, expected = sorted(info["mismatched_keys"])[0]
        raise ValueError(
            f"Got the tensor {name!r} of shape {tuple(got)} in {source!r}; expected {tuple(expected)}. "
            "The weights and config.json are not of the same model: save or download them again."
        )
    for kind in ("missing", "unexpected"):
        if info[f"{kind}_keys"]:
            raise ValueError(
                f"Got weights in {source!r} with {len(info[f'{kind}_keys'])} {kind} tensors, such as "
                f"{sorted(info[f'{kind}_keys'])[0]!r}; expected exactly those of the configuration. "
                "Save or download them again."
            )
    if info["error_msgs"]:
        raise ValueError(f"Got weights in {source!r} that don't load: {info['error_msgs'][0]}")


@contextmanager
def hidden_progress() -> Iterator[None]:
    """Hides the progress bar of loading, for weights that are at hand already."""
    shows = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shows:
            transformers_logging.enable_progress_bar()
