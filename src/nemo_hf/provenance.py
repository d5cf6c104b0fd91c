"""What is recorded of a training for its model card, and kept out of it: paths of a machine, and tokens."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id
from transformers import TrainingArguments

PACKAGES = ("nemo-hf", "transformers", "torch", "safetensors")
ALWAYS = ("num_train_epochs", "learning_rate", "per_device_train_batch_size", "seed")
RECORDED = (
    *ALWAYS,
    *("max_steps", "gradient_accumulation_steps", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim"),
    *("adam_beta1", "adam_beta2", "max_grad_norm", "label_smoothing_factor", "bf16", "fp16", "gradient_checkpointing"),
)
TOKEN = re.compile(r"hf_[A-Za-z0-9]{8,}|(?<=token=)\S+", re.IGNORECASE)


def training_record(args: TrainingArguments, base_model: str | None, samples: int | None) -> dict[str, Any]:
    """Records how a parent is trained.

    Args:
        args: Arguments of the training.
        base_model: Name that the plain model was loaded by; kept only if it is one of the Hub.
        samples: Number of training samples, if it is known.

    Returns:
        `arguments` (those that say how it is trained, if they are not the defaults, and always epochs, learning rate,
        batch size and seed), `processes`, `samples`, `base_model` and `versions`.
    """
    defaults = {field.name: field.default for field in fields(TrainingArguments)}
    values = {name: getattr(args, name, None) for name in RECORDED}
    plain = {name: getattr(value, "value", value) for name, value in values.items()}
    kept = {
        name: value
        for name, value in plain.items()
        if name in ALWAYS or value not in (defaults.get(name), getattr(defaults.get(name), "value", None), None)
    }
    return {
        "arguments": kept,
        "processes": args.world_size,
        "samples": samples,
        "base_model": hub_name(base_model),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that a model depends on."""
    return {name: version(name) for name in PACKAGES}


def hub_name(source: str | None) -> str | None:
    """Returns the name of a Hub repository as it is, and `None` for anything that may be a local path."""
    if not source or Path(source).exists():
        return None
    try:
        validate_repo_id(source)
    except HFValidationError:
        return None
    return source


def safe_command(words: Sequence[str]) -> str:
    """Joins the words of a command line, without tokens.

    Args:
        words: The command's words.

    Returns:
        One line that a shell reads as these words; the values of options with "token" in their name are replaced.
    """
    kept: list[str] = []
    for word in words:
        is_secret = bool(kept) and kept[-1].startswith("--") and "token" in kept[-1] and "=" not in kept[-1]
        kept.append("TOKEN" if is_secret else TOKEN.sub("TOKEN", word))
    return shlex.join(kept)
