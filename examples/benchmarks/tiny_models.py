"""Tiny random models of every classification family in transformers, of the sizes in tiny_models.json."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

TASKS = {
    "text": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "image": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "audio": modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
}
DATA = json.loads(Path(__file__).with_suffix(".json").read_text())
LABELS = ("cat", "dog", "car", "ship", "frog")


def families() -> Iterator[tuple[str, str, str]]:
    """Yields (task, model type, class name) of every classification class."""
    for task, names in TASKS.items():
        for model_type, classes in names.items():
            for name in (classes,) if isinstance(classes, str) else classes:
                yield task, model_type, name


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A tiny configuration of a family, with five labels."""
    config_class = CONFIG_MAPPING[model_type]
    config = config_class(**arguments(config_class, DATA["families"].get(model_type, {})))
    config.id2label = dict(enumerate(LABELS))
    config.label2id = {name: index for index, name in config.id2label.items()}
    if "num_labels" in config.to_dict():  # some families store it beside id2label
        config.num_labels = len(LABELS)
    return config


def arguments(config_class: type[PreTrainedConfig], own: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a configuration and its parts: the common sizes that they have, and the family's own."""
    default = config_class()
    stored, aliases = default.to_dict(), getattr(config_class, "attribute_map", {})
    given = {}
    for name, value in DATA["sizes"].items():
        old = getattr(default, name, None) if name in aliases else stored.get(name)
        is_one_number = old is not None and not isinstance(old, (list, tuple))
        if (name in stored or name in aliases) and (name.endswith("_id") or is_one_number):
            given[name] = value
    for name in stored:
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig):
            given[name] = type(part)(**arguments(type(part), own.get(name, {})))
    return {**given, **{name: value for name, value in own.items() if not isinstance(value, dict) or name not in given}}


def tiny_model(model_type: str, class_name: str, spread: float | None = 0.15) -> PreTrainedModel:
    """A tiny model in eval mode, whose matrices have the standard deviation `spread`, vectors twice that.

    This is larger than at initialisation, so that masks move its logits; `None` leaves the family's own weights.
    """
    torch.manual_seed(0)
    model = getattr(transformers, class_name)(tiny_config(model_type))
    for parameter in model.parameters() if spread is not None else ():
        torch.nn.init.normal_(parameter, std=spread if parameter.ndim > 1 else 2 * spread)
    return model.eval()
