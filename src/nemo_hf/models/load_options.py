"""Opens a saved model, with options of the plain model among the arguments of `from_pretrained`."""

from collections.abc import Mapping, MutableMapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from .config_checks import damaged
from .configuration import NeMoModelConfig, SavedConfig, is_as_read, read_again
from .files import find_file, read_companions, read_json
from .label_options import check_label_options
from .loading import HUB_OPTIONS, build_on_meta
from .save_identity import CONFIG_NAME, check_digests, check_identity, identity_of
from .weight_files import WeightFiles

# Arguments that say how weights are loaded, though a configuration has attributes or options of these names.
OF_LOADING = {*HUB_OPTIONS, "config", "dtype", "torch_dtype", "attn_implementation", "experts_implementation",
              "quantization_config", "fusion_config", "distributed_config", "trust_remote_code"}  # fmt: skip
NOT_STRUCTURE = {"dtype", "transformers_version", "_name_or_path"}


def open_configured(
    cls: Any,
    source: str | Path,
    hub_options: Mapping[str, Any],
    kwargs: MutableMapping[str, Any],
    verify_files: bool = False,
) -> tuple[Any, WeightFiles]:
    """Reads a saved model's configuration, which becomes `kwargs["config"]`, and its weights' headers; all of one save.

    Attributes of the configuration are taken out of `kwargs` and set, as in `transformers`. What would change the
    structure of the saved weights is refused with a `ValueError`. `verify_files` recomputes the digests of the files,
    those of the processor included.
    """
    kind, given = cls.config_class, kwargs.get("config")
    data = _read_config(kind, source, hub_options)
    said = kind._decode_special_floats(data)  # as transformers reads it: {"__float__": "Infinity"} is a number
    if isinstance(given, kind):
        config = _given_config(given, said)
        saved = config if is_as_read(config, said) else kind.from_dict(said)
        if "rejected_label" in kwargs and isinstance(config, NeMoModelConfig):  # a pipeline passes it here as well
            config.set_rejected_label(kwargs.pop("rejected_label"))
    elif isinstance(given, PreTrainedConfig):
        raise TypeError(
            f"Got a {type(given).__name__} as config; expected a {kind.__name__}. Load it with "
            f"{kind.__name__}.from_pretrained(...), and change what it says of the plain model there."
        )
    else:
        passed = [name for name in kwargs if name not in OF_LOADING and name[0] != "_"]
        attributes = {name: kwargs.pop(name) for name in passed}
        config = saved = kind.from_dict(said)
        if attributes or given is not None:
            base = said if given is None else kind.get_config_dict(given, **hub_options)[0]
            config, unused = kind.from_dict(base, return_unused_kwargs=True, **attributes)
            kwargs.update(unused)
    _check_no_other_weights(source, hub_options)
    weights = WeightFiles(source, hub_options, kwargs.get("variant"))
    check_identity(str(source), data, config, weights.identities)
    if verify_files:
        companions, _ = read_companions(source, hub_options, config.processor_files)
        check_digests(data, weights.paths, companions)
    kwargs["config"] = config
    if config is not saved and isinstance(config, NeMoModelConfig):
        _check_structure(cls, saved, config, weights)
    return config, weights


def _read_config(kind: type[SavedConfig], source: str | Path, hub_options: Mapping[str, Any]) -> dict[str, Any]:
    """Reads config.json, which must be one of the class `kind`."""
    path = find_file(source, CONFIG_NAME, hub_options)
    if path is None:
        kind.get_config_dict(source, **hub_options)  # an error that transformers explains
        raise OSError(f"Got {str(source)!r} without {CONFIG_NAME}; expected a saved model. Check the path.")
    data = read_json(path)
    if data.get("model_type") != kind.model_type:
        raise ValueError(
            f"Got {str(source)!r} of model type {data.get('model_type')!r}; expected {kind.describes} of nemo_hf. Load "
            "it with the Auto class for its task; a plain model is trained with NeMoTrainer first."
        )
    return data


def _given_config(given: SavedConfig, data: dict[str, Any]) -> Any:
    """Copies a caller's configuration; one that an Auto class read from files replaced since is read again."""
    if identity_of(given) not in (None, identity_of(data)):
        given = read_again(given, data)
    if isinstance(given, NeMoModelConfig):
        labels = given.label_ids or [label for members in given.groups.values() for label in members]
        check_label_options({"id2label": vars(given)["id2label"]}, len(labels), given.role)
    return deepcopy(given)


def _check_no_other_weights(source: str | Path, hub_options: Mapping[str, Any]) -> None:
    """Refuses files by which `transformers` would load other weights than those that are checked."""
    if find_file(source, "adapter_config.json", hub_options):
        raise ValueError(
            f"Got {str(source)!r} with adapter_config.json, by which transformers would load weights from elsewhere; "
            "expected a parent or module alone. Remove that file."
        )
    folder = Path(source, hub_options.get("subfolder") or "")
    if folder.is_dir() and any(folder.glob("shard-*-model-*.safetensors")):
        raise damaged(f"{str(source)!r} with a distributed checkpoint", "model.safetensors")


def _check_structure(cls: Any, saved: NeMoModelConfig, config: NeMoModelConfig, weights: WeightFiles) -> None:
    """Refuses a configuration with other options of the plain model than the file's, by which other layers are built.

    Numbers of heads leave all shapes as they are, but not the neuron sites.
    """
    before, after = ({**each.base_config.to_dict()} for each in (saved, config))  # type: ignore[union-attr]
    names = (before.keys() | after.keys()) - NOT_STRUCTURE
    changed = {name: after.get(name) for name in sorted(names) if before.get(name) != after.get(name)}
    if not changed:
        return
    old = build_on_meta(partial(cls, deepcopy(saved)), weights)
    refused = ValueError(
        f"Got {str(changed)[:300]} for saved weights; expected options that leave the layers as they are, such as "
        "dropout. Leave these out, or make a new parent of a plain model with them."
    )
    try:
        new = build_on_meta(partial(cls, deepcopy(config)), weights)
    except ValueError as error:
        raise refused from error
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (old, new)]
    if shapes[0] != shapes[1] or old.sites != new.sites:
        raise refused
