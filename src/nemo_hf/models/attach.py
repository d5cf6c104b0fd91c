"""Attaches masks to a plain model, which makes it a parent."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from nemo_hf.config import LabelLike, NeMoConfig, resolve_groups
from nemo_hf.neurons.mask_hooks import SiteMask
from nemo_hf.neurons.sites import NeuronSite, UnsupportedArchitectureError
from nemo_hf.neurons.user_sites import model_sites

from .base import NeMoPreTrainedModel
from .configuration import SEVERAL_LABELS, NeMoModelConfig, find_base_class, model_class, task_of
from .privacy import downloaded_name


def attach_masks(
    model: PreTrainedModel,
    nemo_config: NeMoConfig | None = None,
    label_groups: Mapping[str, Sequence[LabelLike]] | None = None,
    sites: Sequence[NeuronSite] | None = None,
) -> NeMoPreTrainedModel:
    """Attaches masks to a plain model, at all sites that are found or at these; the parent shares its weights."""
    nemo_config = nemo_config or NeMoConfig()
    check_plain(model, nemo_config.hard_masks)
    base_config = model.config
    id2label = base_config.id2label or {index: f"LABEL_{index}" for index in range(base_config.num_labels or 0)}
    names = {int(index): str(name) for index, name in id2label.items()}
    if sorted(names) != list(range(len(names))):
        raise ValueError(
            f"Got id2label with the ids {sorted(names)}; expected 0 to {len(names) - 1}. Number them from 0."
        )
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
        attn_implementation=base_config._attn_implementation,  # type: ignore[call-arg]
    )
    parent: NeMoPreTrainedModel = model_class(task_of(type(model)), NeMoModelConfig)(config, model, sites)
    try:
        parent.parent_masks().to(model.device)
        parent.set_sites(parent.sites)
    except BaseException:
        parent.detach_masks()
        raise
    parent.train(model.training)
    try:
        parent.check_config()  # before hours of training, not when it is saved
    except ValueError:
        parent.detach_masks()
        raise
    return parent


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


def _has_mask(layer: nn.Module) -> bool:
    """Whether the mask of a site acts on a layer, by a hook or in place of its `forward`."""
    calls = [*layer._forward_hooks.values(), *layer._forward_pre_hooks.values(), layer.__dict__.get("forward")]
    return any(isinstance(getattr(getattr(call, "func", call), "__self__", None), SiteMask) for call in calls)


def check_plain(model: PreTrainedModel, hard_masks: bool) -> None:
    """Refuses models to which masks can't be attached: of another kind or head, with masks, adapters or quantized."""
    if hasattr(model, "peft_config") or type(model).__name__.startswith("Peft"):
        raise ValueError("Got a PEFT model; expected a plain one. Call merge_and_unload() on it first.")
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("Got a quantized model; expected plain weights. Load it without quantization_config.")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"Got a {type(model).__name__}; expected a model of transformers (PreTrainedModel).")
    if isinstance(model, NeMoPreTrainedModel):
        raise ValueError("Got a nemo_hf model; expected a plain one. Call parent.detach_masks() first.")
    if any(map(_has_mask, model.modules())):
        raise ValueError("Got the model inside a parent, with masks; expected a plain one. Call detach_masks() first.")
    task_of(type(model))
    registered = find_base_class(type(model).__name__, model.config)
    if registered is not type(model):
        raise UnsupportedArchitectureError(
            f"Got a {type(model).__name__} of {type(model).__module__!r}; expected that of {registered.__module__!r}, "
            "which config.json files mean by this name. Give your class another name."
        )
    if not hard_masks and model.dtype != torch.float32:
        raise ValueError(
            f"Got soft masks with weights in {model.dtype}; expected float32. Load the model with dtype=torch.float32, "
            "or keep hard_masks=True."
        )
    problem = model.config.problem_type
    known = (None, "single_label_classification", SEVERAL_LABELS)
    if problem not in known or (model.config.num_labels or 0) < 2:
        raise ValueError(
            f"Got problem_type={problem!r} with {model.config.num_labels} labels; expected single-label or multi-label "
            "classification with at least 2 labels. Load the model with num_labels= and problem_type=."
        )
