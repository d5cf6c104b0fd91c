"""What a model card records of a training: its arguments and command, without paths of a machine and without tokens."""

import re
from dataclasses import MISSING, fields
from importlib.metadata import version
from typing import Any

from transformers import TrainingArguments

from nemo_hf.models.privacy import clean

ALWAYS = ("num_train_epochs", "learning_rate", "per_device_train_batch_size", "seed")
WITHOUT_EFFECT = re.compile(
    r"(output_dir|log|report_to|run_name|project|trackio|disable_tqdm|eval_|per_device_eval|prediction_loss|include_"
    r"|batch_eval|save_|enable_jit|push_to_hub|hub_|restore_callback|ignore_data_skip|use_cpu|dataloader_(?!drop_last)"
    r"|accelerator_config|remove_unused|ddp_|debug|skip_memory|do_|resume|local_rank|torch_empty|torch_compile_).*"
)
"""Arguments that say where and how often something is written, and not what is trained."""


def training_record(args: TrainingArguments, base_model: str | None, samples: int | None) -> dict[str, Any]:
    """Records how a parent is trained: `arguments`, `processes`, `samples`, `base_model` (Hub only) and `versions`.

    Arguments are those of `ALWAYS`, and others that differ from the defaults and affect what is trained.
    """
    kept = {}
    for field in fields(TrainingArguments):
        value = getattr(args, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        value, default = (getattr(each, "value", each) for each in (value, default))  # of an enumeration
        is_default = value == default or not (value or default)
        if field.name in ALWAYS or not (is_default or WITHOUT_EFFECT.fullmatch(field.name)):
            kept[field.name] = value if isinstance(value, (str, int, float, bool, list, dict)) else str(value)
    about = {"processes": args.world_size, "samples": samples, "base_model": base_model}
    return clean({"arguments": kept, **about, "versions": versions()})  # type: ignore[no-any-return]


def versions() -> dict[str, str]:
    """Versions of the packages that a model depends on."""
    return {name: version(name) for name in ("nemo-hf", "transformers", "torch", "safetensors")}
