"""Files beside exported weights: a plain `config.json` with the module's labels, and the processor's."""

import copy
import json
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from transformers import PreTrainedConfig

from nemo_hf.models.base import NeMoPreTrainedModel
from nemo_hf.models.files import EXPORTED_FILES, clean_companion, read_json
from nemo_hf.models.labels import settle_labels
from nemo_hf.models.privacy import clean

WEIGHTS = ("*.onnx", "*.xml", "*.safetensors")
OTHER_WAYS = "Use save_pretrained, whose files nemo_hf loads, or {}."


def check_is_module(module: NeMoPreTrainedModel) -> None:
    """Refuses parents, which have masks, with a `ValueError`."""
    if module.is_parent:
        raise ValueError("Got a parent; expected a module. Call extract_module(labels) or detach_masks().")


def plain_config(module: NeMoPreTrainedModel) -> PreTrainedConfig:
    """The plain model's configuration with the module's labels."""
    settle_labels(module.config)
    config = copy.deepcopy(module.config.base_config)
    assert isinstance(config, PreTrainedConfig)
    for name in ("export", "rejection"):  # of files that the source was loaded beside
        vars(config).pop(name, None)
    names = module.config.names
    config.id2label = names
    config.label2id = {name: index for index, name in names.items()}
    config.problem_type = module.config.problem_type
    if "num_labels" in config.to_dict():  # kept apart from id2label in some families
        config.num_labels = len(names)
    config.architectures = [module.config.base_class]
    return config


def write_processor(module: NeMoPreTrainedModel, directory: Path) -> None:
    """Writes the files of the module's processor into a directory."""
    for name, content in module.processor_files.items():
        (directory / name).write_bytes(clean_companion(name, content))


def clean_written_config(directory: Path) -> None:
    """Takes origins, paths, tokens and names of code out of a plain `config.json` that was just written."""
    path = directory / "config.json"
    text = json.dumps(clean(read_json(path), is_config=True), indent=2, sort_keys=True)
    path.write_text(f"{text}\n", encoding="utf-8")


def write_companions(module: NeMoPreTrainedModel, config: PreTrainedConfig, directory: Path) -> None:
    """Writes a plain configuration and the processor's files into a directory."""
    config.save_pretrained(directory)
    clean_written_config(directory)
    write_processor(module, directory)


def check_place(directory: Path, config: PreTrainedConfig, replaced: Sequence[str]) -> None:
    """Refuses a directory with the weights of another config.json, and keeps what this one says of exports that stay.

    Files whose names match a pattern in `replaced` are about to go.
    """
    path = directory / "config.json"
    found = {file.name for pattern in WEIGHTS for file in directory.glob(pattern)}
    staying = sorted(name for name in found if not any(fnmatch(name, pattern) for pattern in replaced))
    if not path.is_file() or not staying:
        return
    there, ours = ({**data} for data in (read_json(path), clean(json.loads(config.to_json_string()), is_config=True)))
    records = there.get("export")
    if "rejection" not in there:  # beside a plain model, which has none
        ours.pop("rejection", None)
    for data in (there, ours):
        for name in ("export", "dtype", "architectures", "transformers_version"):
            data.pop(name, None)
    if there != ours:
        raise ValueError(
            f"Got {str(directory)!r}, which holds weights with another config.json ({', '.join(staying)}); expected a "
            "directory without. Export to a directory of its own."
        )
    known = records if isinstance(records, dict) else {}
    if kept := {form: known[form] for form, name in EXPORTED_FILES.items() if name in staying and form in known}:
        config.export = kept
