"""Cuts a module on calibration samples out of a saved model: a parent, or a plain classifier with its processor."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from nemo_hf.config import LabelLike

from .calibrated_cut import extract_module
from .calibration_inputs import input_kind
from .configuration import CUT_OPTIONS, NeMoModelConfig
from .loading import HUB_OPTIONS
from .processors import PROCESSORS

Load = Callable[..., PreTrainedModel]


def cut_saved(
    load_parent: Load, load_plain: Load, source: str | Path, labels: LabelLike | Sequence[LabelLike],
    samples: Mapping[str, Any], kwargs: Mapping[str, Any],
) -> Any:  # fmt: skip
    """Loads a model and cuts it; `samples` are arguments of `extract_module`, `kwargs` further ones and of loading."""
    if isinstance(samples.get("retention"), Sequence):
        raise ValueError(
            f"Got retention={samples['retention']!r} to load a module; expected one number. Load the model and call "
            "nemo_hf.extract_module(model, ...) for several modules."
        )
    options = {name: kwargs[name] for name in CUT_OPTIONS if name in kwargs}
    kwargs = {name: value for name, value in kwargs.items() if name not in CUT_OPTIONS}
    hub_options = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
    said, _ = PreTrainedConfig.get_config_dict(source, **hub_options)
    if said.get("model_type") == NeMoModelConfig.model_type:
        return extract_module(load_parent(source, **kwargs), labels, **samples, **options)
    model = load_plain(source, **kwargs)
    if options.get("processing_class") is None:
        options["processing_class"] = saved_processor(model, source, hub_options)
    return extract_module(model, labels, **samples, **options)


def saved_processor(model: PreTrainedModel, source: str | Path, hub_options: Mapping[str, Any] | None = None) -> Any:
    """The tokenizer, image processor or feature extractor beside a saved model, or `None`."""
    try:
        return PROCESSORS[input_kind(model)][2].from_pretrained(source, **(hub_options or {}))
    except (OSError, ValueError):  # there is none: then the samples are prepared ones, or reading them says what lacks
        return None
