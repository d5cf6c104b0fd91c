"""Checks of what is loaded: the plain model's class, the kind of repository, and every tensor."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from .configuration import NeMoModelConfig


def check_model_type(source: str | Path, hub_options: Mapping[str, Any]) -> None:
    """Checks that a directory or repository holds a parent or module.

    Args:
        source: Directory or Hub repository.
        hub_options: Options of the Hub, such as `revision`.

    Raises:
        ValueError: If it holds another model.
    """
    config, _ = NeMoModelConfig.get_config_dict(source, **hub_options)
    model_type = config.get("model_type")
    if model_type != NeMoModelConfig.model_type:
        raise ValueError(
            f"Got {str(source)!r} of model type {model_type!r}; expected a parent or module of nemo_hf. "
            "Load a plain model with the Auto classes and train it with NeMoTrainer."
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
