"""Options of the plain model among the arguments of `from_pretrained`."""

from collections.abc import Mapping, MutableMapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from .configuration import NeMoModelConfig
from .loading import HUB_OPTIONS, build_on_meta, open_model
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
    """Opens a saved model like `open_model`; `kwargs["config"]` becomes its configuration.

    Attributes of the configuration are taken out of `kwargs` and set, as in `transformers`. What would change the
    structure of the saved weights is refused with a `ValueError`.
    """
    kind, given = cls.config_class, kwargs.get("config")
    is_ours = isinstance(given, kind)
    options = (kwargs.get("variant"), kind, verify_files)
    saved, weights = open_model(source, hub_options, given if is_ours else None, *options)
    if is_ours:
        config, saved = saved, kind.from_pretrained(source, **hub_options)
    elif isinstance(given, PreTrainedConfig):
        raise TypeError(
            f"Got a {type(given).__name__} as config; expected a {kind.__name__}. Load it with "
            f"{kind.__name__}.from_pretrained(...), and change what it says of the plain model there."
        )
    else:
        passed = [name for name in kwargs if name not in OF_LOADING and name[0] != "_"]
        attributes = {name: kwargs.pop(name) for name in passed}
        where = source if given is None else given
        config, unused = kind.from_pretrained(where, return_unused_kwargs=True, **hub_options, **attributes)
        kwargs.update(unused)
    kwargs["config"] = config
    if isinstance(config, NeMoModelConfig):
        _check_structure(cls, saved, config, weights)
    return config, weights


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
