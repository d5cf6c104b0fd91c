"""Attaches masks to a plain model, which makes it a parent."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from nemo_hf.config import LabelLike, NeMoConfig, resolve_groups
from nemo_hf.neurons.sites import NeuronSite
from nemo_hf.neurons.user_sites import model_sites

from .base import NeMoPreTrainedModel
from .configuration import NeMoModelConfig, model_class, task_of
from .plain_checks import check_plain, label_names
from .privacy import downloaded_name


def attach_masks(
    model: PreTrainedModel,
    nemo_config: NeMoConfig | None = None,
    label_groups: Mapping[str, Sequence[LabelLike]] | None = None,
    sites: Sequence[NeuronSite] | None = None,
) -> NeMoPreTrainedModel:
    """Attaches masks to a plain model, at all sites that are found or at these; the parent shares its weights."""
    nemo_config = nemo_config or NeMoConfig()
    check_plain(model, nemo_config)
    names = label_names(model)
    groups = resolve_groups(label_groups or nemo_config.label_groups, names)
    sites = model_sites(model, nemo_config) if sites is None else sites
    changed = _stop_cache_and_layer_drop(model)
    try:
        parent = _parent(model, nemo_config, groups, names, sites)
    except BaseException:
        for owner, name, value in changed:
            setattr(owner, name, value)
        raise
    parent.changed_attributes = changed
    return parent


def _parent(
    model: PreTrainedModel,
    nemo_config: NeMoConfig,
    groups: Mapping[str, Sequence[int]],
    names: dict[int, str],
    sites: Sequence[NeuronSite],
) -> NeMoPreTrainedModel:
    base_config = model.config
    config = NeMoModelConfig(
        base_config=base_config,
        base_class=type(model).__name__,
        base_model=downloaded_name(model.name_or_path),
        nemo_config=nemo_config.to_dict(),
        label_groups=[{"name": name, "labels": list(ids)} for name, ids in groups.items()],
        id2label=names,
        label2id={name: index for index, name in names.items()},
        return_dict=base_config.return_dict,
        problem_type=base_config.problem_type or "single_label_classification",  # type: ignore[arg-type]
        # A new composite configuration resets this in its parts (transformers 5.23, PreTrainedConfig).
        attn_implementation={"": base_config._attn_implementation, "base_config": _attention(base_config)},  # type: ignore[call-arg]
    )
    parent: NeMoPreTrainedModel = model_class(task_of(type(model)), NeMoModelConfig)(config, model, sites)
    try:
        parent.parent_masks().to(model.device)
        parent.set_sites(parent.sites)
        parent.check_config()  # before hours of training, not when it is saved
    except BaseException:
        parent.detach_masks()
        raise
    parent.train(model.training)
    return parent


def _attention(config: PreTrainedConfig) -> dict[str, Any]:
    """The attention implementations of a configuration and its parts, such as a backbone that knows only one."""
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    inside = {name: _attention(part) for name, part in parts.items() if isinstance(part, PreTrainedConfig)}
    return {"": config._attn_implementation, **inside}


def _stop_cache_and_layer_drop(model: PreTrainedModel) -> list[tuple[Any, str, Any]]:
    """Switches off the cache and LayerDrop, whose layers have no masks; returns owner, name and value before."""
    changed: list[tuple[Any, str, Any]] = []
    if getattr(model.config, "use_cache", False):
        changed.append((model.config, "use_cache", True))
        model.config.use_cache = False
    for owner in (model.config, *model.modules()):
        for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
            value = getattr(owner, name, None)
            if isinstance(value, float) and value > 0:
                changed.append((owner, name, value))
                setattr(owner, name, 0.0)
    return changed
