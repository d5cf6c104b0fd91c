"""Checks that a model is plain: one that its configuration builds, whose weights are here, and that has no masks yet.

Files hold a configuration and tensors by name. A layer that was wrapped or changed after the model was built would not
come back from them, nor be in a module; so it is named before anything is tried.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import PreTrainedModel
from transformers.initialization import meta_device_safe_creation_ops, no_init_weights

from nemo_hf.config import NeMoConfig
from nemo_hf.neurons.mask_hooks import SiteMask
from nemo_hf.neurons.patterns import HEAD_NAMES
from nemo_hf.neurons.sites import UnsupportedArchitectureError
from nemo_hf.neurons.trial_calls import evaluating, on_device

from .base import NeMoPreTrainedModel
from .configuration import PLACE_TASKS, SEVERAL_LABELS, find_base_class, task_of
from .head_outputs import answers, difference
from .label_options import check_label_ids
from .loading import PROCESS_SETTINGS

OLD_NORMS = {"WeightNorm": "remove_weight_norm", "SpectralNorm": "remove_spectral_norm"}  # of torch.nn.utils
MOST_NAMED = 3
COMPUTED_SHARE, HALF_SHARE = 1e-5, 1e-2  # of the largest logit: larger differences are no rounding


def check_plain(model: PreTrainedModel, nemo_config: NeMoConfig) -> None:
    """Refuses models to which masks can't be attached: of another kind or head, with masks, adapters or quantized."""
    _check_kind(model)
    registered = find_base_class(type(model).__name__, model.config)
    if registered is not type(model):
        raise UnsupportedArchitectureError(
            f"Got a {type(model).__name__} of {type(model).__module__!r}; expected that of {registered.__module__!r}, "
            "which config.json files mean by this name. Give your class another name."
        )
    _check_memory(model)
    check_masks(model, nemo_config)
    if not nemo_config.hard_masks and model.dtype != torch.float32:
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
    label_names(model)


def check_masks(model: PreTrainedModel, nemo_config: NeMoConfig) -> None:
    """Refuses masks of whole samples for a model that labels parts of these (`ValueError`)."""
    if nemo_config.masks != "static" and task_of(type(model)) in PLACE_TASKS:
        raise ValueError(
            f"Got a {type(model).__name__} to train with masks, which are of a whole sample, while its labels are of "
            "tokens, pixels or boxes; expected a classifier of whole samples. Train it with transformers.Trainer, and "
            "then cut it: make_parent(model, NeMoConfig(masks='static')).extract_module(labels)."
        )


def label_names(model: PreTrainedModel) -> dict[int, str]:
    """Label names of a plain model by id; ids other than 0, 1, 2 and so on are a `ValueError`."""
    count = model.config.num_labels or 0
    id2label = model.config.id2label or {index: f"LABEL_{index}" for index in range(count)}
    check_label_ids(id2label)
    return {int(index): str(name) for index, name in id2label.items()}


def check_trained_masks(model: Any, nemo_config: NeMoConfig) -> None:
    """Refuses models and options whose masks can't be trained (`ValueError`)."""
    if isinstance(model, PreTrainedModel):
        check_masks(model, nemo_config)
    if nemo_config.masks == "static":
        raise ValueError(
            "Got masks='static', of which none is trained; expected 'assigned' or 'generated'. Train the plain "
            "model with transformers.Trainer, and then cut it with extract_module."
        )


def _check_kind(model: Any) -> None:
    for attribute, what in (("_orig_mod", "compiled"), ("module", "wrapped")):
        inner = getattr(model, attribute, None)
        if isinstance(inner, PreTrainedModel) and not isinstance(model, PreTrainedModel):
            raise TypeError(
                f"Got a {what} model ({type(model).__name__}); expected the plain one inside. Pass model.{attribute}; "
                "compile or wrap the parent or the module, or leave that to the trainer."
            )
    if hasattr(model, "peft_config") or type(model).__name__.startswith("Peft"):
        do = "Merge its adapters first: model = model.merge_and_unload()."
        if isinstance(model, PreTrainedModel):  # adapters that transformers itself loaded, which it can't merge
            do = "Merge its adapters first: model = peft.PeftModel.from_pretrained(plain, adapters).merge_and_unload()."
        raise ValueError(f"Got a PEFT model; expected a plain one. {do}")
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            "Got a quantized model; expected plain weights. Load it without quantization_config, or if it was saved "
            "quantized, run: model = model.dequantize()."
        )
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"Got a {type(model).__name__}; expected a model of transformers (PreTrainedModel).")
    if isinstance(model, NeMoPreTrainedModel):
        raise ValueError("Got a nemo_hf model; expected a plain one. Call parent.detach_masks() first.")
    if any(map(_has_mask, model.modules())):
        raise ValueError("Got the model inside a parent, with masks; expected a plain one. Call detach_masks() first.")
    task_of(type(model))


def _has_mask(layer: nn.Module) -> bool:
    """Whether the mask of a site acts on a layer, by a hook or in place of its `forward`."""
    calls = [*layer._forward_hooks.values(), *layer._forward_pre_hooks.values(), layer.__dict__.get("forward")]
    return any(isinstance(getattr(getattr(call, "func", call), "__self__", None), SiteMask) for call in calls)


def _check_memory(model: PreTrainedModel) -> None:
    """Refuses weights that are elsewhere, and compiled layers, which would not run hooks that are added later."""
    tensors = dict(model.named_parameters())
    if away := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise ValueError(
            f"Got {len(away)} weights on the meta device, such as {away[0]!r}: offloaded, or not loaded yet; expected "
            "all in memory. Load the model with from_pretrained, without device_map and offloading."
        )
    if len(devices := sorted({str(tensor.device) for tensor in tensors.values()})) > 1:
        raise ValueError(
            f"Got a model on the devices {devices}; expected one. Load it without device_map, and move it with to(...)."
        )
    compiled = [name for name, layer in model.named_modules() if layer._compiled_call_impl is not None]
    if compiled:
        raise ValueError(
            f"Got a model with compile() called on {compiled[0] or 'all of it'!r}; expected one that is not compiled. "
            "Load it again, and compile the parent or the module instead."
        )


def check_built(model: PreTrainedModel) -> None:
    """Refuses a model with other layers or tensors than its configuration builds; says how to get the plain ones."""
    with PROCESS_SETTINGS, torch.device("meta"), meta_device_safe_creation_ops(), no_init_weights():
        built = type(model)(copy.deepcopy(model.config))
    built.tie_weights()
    # Quantized layers keep other things than tensors in their state, which have no shape.
    got, expected = ({n: tuple(getattr(t, "shape", ())) for n, t in m.state_dict().items()} for m in (model, built))
    if other := [name for name in {**expected, **got} if name not in got or name not in expected]:
        raise ValueError(_changed_layers(model, built, other))
    if name := next((name for name, shape in expected.items() if got[name] != shape), None):
        do = "Set model.config to its sizes, or change these by methods such as resize_token_embeddings."
        if HEAD_NAMES.search(name.rpartition(".")[0]):
            do = f"Load the model with num_labels=, or set model.config.num_labels = {got[name][0]} for this head."
        raise ValueError(
            f"Got {name!r} of shape {got[name]}; expected {expected[name]}, as the model's configuration says. {do}"
        )
    if path := next(_shared(model, built), None):
        owner, _, name = path.rpartition(".")
        get = "get_submodule" if path in dict(model.named_modules(remove_duplicate=False)) else "get_parameter"
        raise ValueError(
            f"Got {path!r} in several places; expected one of its own in each, as the model's configuration builds "
            f"them. Run: setattr(model.get_submodule({owner!r}), {name!r}, copy.deepcopy(model.{get}({path!r})))"
        )


def check_computed(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> None:
    """Refuses a model that computes something else than one of the same configuration and weights."""
    with PROCESS_SETTINGS, no_init_weights():
        built = type(model)(copy.deepcopy(model.config))
    built.load_state_dict(model.state_dict(), assign=True)
    built.tie_weights()
    built.to(model.device)  # type: ignore[arg-type]
    batch = on_device(model, inputs)
    with evaluating(model), evaluating(built):
        found, others = (answers(each(**batch, return_dict=True)) for each in (model, built))
    if not bool(found.isfinite().all()):
        return  # nothing that a comparison could tell
    share = COMPUTED_SHARE if found.dtype in (torch.float32, torch.float64) else HALF_SHARE
    if difference(found, others, task_of(type(model))) <= share * max(1.0, found.abs().max().item()):
        return
    named = [f"{path or 'the model'!r} ({what})" for path, what in _strange_layers(model, built)]
    raise ValueError(
        f"Got a {type(model).__name__} that computes something else than its configuration and weights alone do; "
        "expected the same, since files and modules hold no more than these. Remove hooks and undo changes of layers, "
        f"functions and model.config. Found: {', '.join(named[:MOST_NAMED]) or 'no layer with a hook of yours'}."
    )


def _strange_layers(model: nn.Module, built: nn.Module) -> Iterator[tuple[str, str]]:
    """Layers that differ from those that the configuration builds, by their class, a method or a hook."""
    plain = dict(built.named_modules())
    for path, layer in model.named_modules():
        hooks = (*layer._forward_hooks.values(), *layer._forward_pre_hooks.values())
        own = [hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith("transformers.")]
        if path in plain and type(layer) is not type(plain[path]):
            yield path, f"a {type(layer).__name__} in place of a {type(plain[path]).__name__}"
        elif "forward" in layer.__dict__:
            yield path, "another forward"
        elif own:
            yield path, f"with the hook {getattr(own[0], '__qualname__', type(own[0]).__name__)}"


def _layer_around(name: str, *models: Mapping[str, nn.Module]) -> str:
    """Path of the innermost layer around a tensor that all models, given as their layers by path, have."""
    while not all(name in layers for layers in models):
        name = name.rpartition(".")[0]
    return name


def _changed_layers(model: nn.Module, built: nn.Module, names: Sequence[str]) -> str:
    """What to say of tensors that only one of a model and the one that its configuration builds has."""
    layers, plain = (dict(each.named_modules(remove_duplicate=False)) for each in (model, built))
    paths = list(dict.fromkeys(_layer_around(name, layers, plain) for name in names))
    path, layer, others = paths[0], layers[paths[0]], len(paths) - 1
    listed = f"{path or type(model).__name__!r}" + f" and {others} more" * (others > 0)
    expected = f"expected the {type(plain[path]).__name__} that the model's configuration builds"
    for what, call in _additions(layer, path):
        alike = " (and the same for the others)" * (others > 0)
        return f"Got {listed} with {what}; {expected}. Run{alike}: {call}"
    kind = f"{type(layer).__module__}.{type(layer).__name__}"
    is_other = type(layer) is not type(plain[path])
    got = f"of the class {kind}" if is_other else f"with other tensors ({', '.join(names[:MOST_NAMED])})"
    return (
        f"Got {listed} {got}; {expected}, since files hold no more than that. Merge adapters, remove wrappers, and "
        "quantize the module and not its parent; for layers of your own, register a configuration and a model class "
        "that builds them."
    )


def _additions(layer: nn.Module, path: str) -> Iterator[tuple[str, str]]:
    """What was added to a layer, and the call that removes it."""
    place = f"model.get_submodule({path!r})"
    for name, parametrizations in getattr(layer, "parametrizations", {}).items():
        kinds = ", ".join(type(each).__name__.strip("_") for each in parametrizations)
        call = f"torch.nn.utils.parametrize.remove_parametrizations({place}, {name!r})"
        yield f"a parametrization of its {name} ({kinds})", call
    hooks: Iterable[Any] = layer._forward_pre_hooks.values()
    for hook in hooks:
        kind = type(hook).__name__
        if isinstance(hook, prune.BasePruningMethod):
            call = f"torch.nn.utils.prune.remove({place}, {hook._tensor_name!r})"
            yield f"a pruning mask of its {hook._tensor_name} ({kind})", call
        elif kind in OLD_NORMS and type(hook).__module__.startswith("torch.nn.utils."):
            yield f"a {kind} of its {hook.name}", f"torch.nn.utils.{OLD_NORMS[kind]}({place}, {hook.name!r})"
    if hasattr(layer, "_orig_mod"):
        yield "torch.compile around it", f"model.set_submodule({path!r}, {place}._orig_mod)"


def _shared(model: nn.Module, built: nn.Module) -> Iterator[str]:
    """Paths of layers and parameters that are in another place as well, although the configuration builds two."""
    for entries in ("named_modules", "named_parameters"):
        place: dict[int, str] = {}
        own = dict(getattr(built, entries)(remove_duplicate=False))
        for path, entry in getattr(model, entries)(remove_duplicate=False):
            first = place.setdefault(id(entry), path)
            is_empty = isinstance(entry, nn.Module) and next(entry.parameters(), None) is None
            if first != path and own.get(first) is not own.get(path) and not is_empty:
                yield path
