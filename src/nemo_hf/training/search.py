"""Options of `NeMoConfig` among the values of a hyperparameter search, whose others are training arguments."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import HPSearchBackend

from nemo_hf.config import NeMoConfig

NAMES = {field.name for field in fields(NeMoConfig)} - {field.name for field in fields(TrainingArguments)}


def trial_config(trainer: Any, model: Any, trial: Any, given: NeMoConfig | None) -> NeMoConfig | None:
    """The options of a trial's parent: those `given`, or the model's own if it has some, with the trial's values."""
    if trial is None or trainer.hp_search_backend is None:
        return given
    values: Any = trainer.hp_space(trial) if trainer.hp_search_backend == HPSearchBackend.OPTUNA else trial
    chosen = {name: value for name, value in values.items() if name in NAMES}
    before = given or getattr(model, "nemo_config", None) or NeMoConfig()
    return replace(before, **chosen) if chosen else given


def training_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a trial that are no options of `NeMoConfig`: `Trainer` would warn that it can't set these."""
    return {name: value for name, value in values.items() if name not in NAMES}
