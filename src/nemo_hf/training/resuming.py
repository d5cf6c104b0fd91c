"""The checkpoint to resume training from: written to its end, and of the same model under the same options."""

import json
import logging
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.trainer_utils import sort_checkpoints

from nemo_hf.config import NeMoConfig
from nemo_hf.models.base import NeMoPreTrainedModel
from nemo_hf.models.configuration import NeMoModelConfig
from nemo_hf.models.files import read_json
from nemo_hf.models.labels import is_settled

logger = logging.getLogger(__name__)

# The optimizer's state brings the rate of the checkpoint back, so that another one would have no effect.
FIXED_OPTIONS = ("generator_rank", "hard_masks", "sites", "mask_learning_rate")
RESOLVED_OPTIONS = ("targets", "label_groups", "group_column")  # what they led to is compared in their place


def whole_checkpoint(output_dir: str, given: str | bool) -> str:
    """The checkpoint to resume from: `given`, or if that is `True` the last one that was written to its end."""
    found = sort_checkpoints(output_dir) if given is True else [str(given)]
    for folder in reversed(found):
        with suppress(OSError, ValueError):
            json.loads(Path(folder, "trainer_state.json").read_text(encoding="utf-8"))
            return folder
    raise ValueError(
        f"Got {[Path(folder).name for folder in found]} to resume from; expected a checkpoint with trainer_state.json, "
        "which is written last. Name another one, or leave resume_from_checkpoint out to start anew."
    )


def check_checkpoint(folder: str, parent: NeMoPreTrainedModel) -> None:
    """Refuses a checkpoint of another model, labels, groups or sites, or of options that shape masks, by their names.

    Other options may change from one run to the next: a warning names those that do.
    """
    path = Path(folder, "config.json")
    kind = read_json(path).get("model_type") if path.is_file() else None
    saved = NeMoModelConfig.from_pretrained(folder) if kind == NeMoModelConfig.model_type else None
    if saved is None or saved.role != "parent":
        raise ValueError(
            f"Got {folder!r} to resume from, a checkpoint of {saved.role if saved else f'model type {kind!r}'}; "
            "expected one of a parent. Resume it with transformers.Trainer, or leave resume_from_checkpoint out."
        )
    before, given = NeMoConfig.from_dict(saved.nemo_config or {}), parent.nemo_config
    differing = _differences(_facts(saved, before), _facts(parent.config, given))
    if before.has_generators != given.has_generators:
        differing["objective"] = (before.objective, given.objective)
    if is_settled(parent) and saved.problem_type != parent.config.problem_type:  # if not, the first batch decides
        differing["problem_type"] = (saved.problem_type, parent.config.problem_type)
    keys = [[entry["key"] for entry in config.sites or []] for config in (saved, parent.config)]
    if not differing and keys[0] != keys[1]:
        targets = (before.targets, given.targets)
        differing = {"targets": targets} if targets[0] != targets[1] else _differences(*({"sites": k} for k in keys))
    if differing:
        raise ValueError(
            f"Got {_listed(differing, 1)} for a checkpoint trained with {_listed(differing, 0)}; expected the same. "
            f"Take the options of model and NeMoConfig from {path.as_posix()!r}, or leave resume_from_checkpoint out."
        )
    free = sorted({field.name for field in fields(NeMoConfig)} - {*FIXED_OPTIONS, *RESOLVED_OPTIONS})
    changed = _differences(*({name: getattr(config, name) for name in free} for config in (before, given)))
    if changed:
        logger.warning("Training goes on with %s; so far it was %s.", _listed(changed, 1), _listed(changed, 0))


def _facts(config: NeMoModelConfig, options: NeMoConfig) -> dict[str, Any]:
    """What a checkpoint and the parent that goes on from it must share, by the names that users know."""
    assert isinstance(config.base_config, PreTrainedConfig)
    base = config.base_config.to_dict()
    sizes = {name: value for name, value in base.items() if type(value) is int and not name.endswith("_id")}
    return {
        "base_class": config.base_class,
        **sizes,
        "id2label": config.names,
        "label_groups": [(name, sorted(labels)) for name, labels in config.groups.items()],
        **{name: getattr(options, name) for name in FIXED_OPTIONS},
    }


def _differences(before: dict[str, Any], given: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Entries that differ, by name, of which lists and mappings show what is not the same in both."""
    pairs = {name: (before.get(name), given.get(name)) for name in {**before, **given}}
    return {name: (_rest(*pair), _rest(*pair[::-1])) for name, pair in pairs.items() if pair[0] != pair[1]}


def _rest(own: Any, other: Any) -> Any:
    if isinstance(own, dict) and isinstance(other, dict):
        return {key: value for key, value in own.items() if other.get(key) != value}
    if isinstance(own, list) and isinstance(other, list):
        return [value for index, value in enumerate(own) if other[index : index + 1] != [value]]
    return own


def _listed(differing: dict[str, tuple[Any, Any]], which: int) -> str:
    return ", ".join(f"{name}={_shortened(pair[which])}" for name, pair in differing.items())


def _shortened(value: Any, most: int = 300) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
