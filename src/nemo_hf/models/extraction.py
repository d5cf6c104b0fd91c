"""Cuts a stand-alone module out of a parent, in memory or straight from the parent's files."""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nemo_hf.config import LabelLike, NeMoConfig, resolve_labels
from nemo_hf.neurons.patterns import find_heads
from nemo_hf.neurons.sites import NeuronSite
from nemo_hf.neurons.trial_calls import check_runs
from nemo_hf.neurons.trial_inputs import trial_inputs
from nemo_hf.pruning.layer_cuts import TensorCut, cut_tensor, site_cut, tensor_cuts
from nemo_hf.pruning.plan import is_relevant, plan_module, retained_neurons, static_masks

from .base import NeMoPreTrainedModel, configured_sites
from .configuration import NeMoModelConfig, task_of
from .equivalence import EFFECT_FACTOR, check_equivalence
from .files import read_companions
from .finiteness import check_finite
from .labels import settle_labels, warn_of_no_rest
from .load_options import open_configured
from .loading import HUB_OPTIONS, build_on_meta, check_labels, check_mean_masks, hidden_progress
from .plain_checks import check_built
from .privacy import hub_name
from .weight_files import WeightFiles

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=NeMoPreTrainedModel)
COUNTED_GROUPS = 1000  # up to which a module records how many neurons each of its groups uses
CUT_OPTIONS = {*HUB_OPTIONS, "config", "variant", "dtype", "torch_dtype", "attn_implementation", "device_map",
               "output_loading_info", "use_safetensors", "low_cpu_mem_usage", "weights_only", "adapter_kwargs",
               "trust_remote_code", "_from_auto", "_from_pipeline"}  # fmt: skip
Reader = Callable[[str, TensorCut | None], Tensor]


@dataclass(frozen=True)
class CutSource:
    """What a cut needs of a parent, in memory or saved; `plain` may be on the meta device.

    `relevance` (uint8) and, with soft masks, `mean_masks` map site keys to tensors of shape (groups, neurons).
    """

    config: NeMoModelConfig
    options: NeMoConfig
    plain: PreTrainedModel
    sites: Sequence[NeuronSite]
    relevance: Mapping[str, Tensor]
    mean_masks: Mapping[str, Tensor]

    @classmethod
    def of_parent(cls, parent: NeMoPreTrainedModel) -> "CutSource":
        """Takes what a cut needs from a parent in memory; a module is refused with a `ValueError`."""
        masks = parent.parent_masks()
        settle_labels(parent.config)
        means = {mask.site.key: mask.mean_mask for mask in masks.site_masks() if mask.mean_mask is not None}
        return cls(parent.config, parent.nemo_config, parent.model, parent.sites, masks.relevance(), means)


@dataclass(frozen=True)
class ModulePlan:
    """What a module keeps: labels, neurons, and `static`, the masks under which it computes what the parent does.

    `counts` holds, by site, how many neurons each of its groups uses (of up to 1,000 groups) and how many it keeps.
    """

    label_ids: list[int]
    groups: list[str]
    keep: dict[str, dict[str, Tensor]]
    static: dict[str, Tensor]
    threshold: float | None
    round_to: int | None
    retained: float
    counts: dict[str, list[int]]


def make_plan(
    source: NeMoPreTrainedModel | CutSource,
    labels: LabelLike | Sequence[LabelLike],
    threshold: float | None = None,
    round_to: int | None = None,
) -> ModulePlan:
    """Plans a module without cutting it; arguments as in `extract_module`."""
    source = source if isinstance(source, CutSource) else CutSource.of_parent(source)
    config = source.config
    label_ids, names = resolve_labels(labels, config.groups, config.names)
    unseen = set(config.unseen_labels or ())
    if unknown := [name for name in names if unseen >= set(config.groups[name])]:
        raise ValueError(
            f"Got the label groups {unknown[:12]}, of which the data of the relevance had no sample; expected others. "
            "Leave them out, or call compute_relevance(parent, batches) first, with samples of all labels."
        )
    warn_of_no_rest(config, task_of(type(source.plain)), label_ids)
    threshold = source.options.relevance_threshold if threshold is None else threshold
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 < threshold <= 1:
        raise ValueError(f"Got threshold={threshold!r}; expected a number above 0, up to 1.")
    if config.relevance_source == "initial":
        logger.warning(
            "This parent's relevance was never measured, so its modules keep every neuron. Train it with NeMoTrainer, "
            "or call compute_relevance(parent, dataloader) first."
        )
    places = {name: index for index, name in enumerate(config.groups)}
    indices = [places[name] for name in names]
    keep = plan_module(source.sites, source.relevance, indices, threshold, round_to)
    static = static_masks(source.sites, keep)
    for key, mean in source.mean_masks.items():
        static[key] *= mean[indices].mean(0).cpu()
    used = {key: is_relevant(rows[indices], threshold).sum(-1).tolist() for key, rows in source.relevance.items()}
    counted = used if len(indices) <= COUNTED_GROUPS else {}
    counts = {key: [*counted.get(key, ()), sum(len(part) for part in parts.values())] for key, parts in keep.items()}
    retained = retained_neurons(source.sites, keep)
    return ModulePlan(label_ids, names, keep, static, threshold, round_to, retained, counts)


def _warn_untrained(options: NeMoConfig) -> None:
    """Warns of a cut by relevance where training left modules to reconstruction."""
    if not options.trains_modules:
        logger.warning(
            "No module was trained beside this parent, so one that is cut without samples loses much. Pass "
            "calibration=..., by which it is reconstructed, or train with NeMoConfig(plain_ratio=0.5)."
        )


def read_tensor(state: Mapping[str, Tensor], name: str, cut: TensorCut | None) -> Tensor:
    """Reads a module's tensor from its parent's state in memory; it shares no memory with it."""
    if cut is None:
        return state[name].clone()
    return cut.constant.clone() if cut.constant is not None else cut_tensor(state[name].cpu().index_select, cut)


def extract_module(
    parent: Model,
    labels: LabelLike | Sequence[LabelLike],
    threshold: float | None = None,
    round_to: int | None = None,
    inputs: Mapping[str, Tensor] | None = None,
) -> Model:
    """Does what `NeMoClassifier.extract_module` says, as a function of the parent."""
    source = CutSource.of_parent(parent)
    check_built(parent.model)  # layers may have been changed since it was made
    check_finite(parent)
    if inputs is not None:
        inputs = trial_inputs(parent, inputs)
        check_runs(parent, inputs)
    state = parent.model.state_dict()
    plan = make_plan(source, labels, threshold, round_to)
    _warn_untrained(source.options)
    module = build_module(type(parent), source, plan, partial(read_tensor, state))
    module.to(parent.device)  # type: ignore[arg-type]
    check_module(parent, module, plan, inputs)
    restore_dtypes(module, {name: tensor.dtype for name, tensor in state.items()})
    module.processor_files = dict(parent.processor_files)
    return module


def check_module(parent: Model, module: Model, plan: ModulePlan, inputs: Mapping[str, Tensor] | None = None) -> None:
    """Compares a module that is still in float32 with its parent, and records the result in its configuration."""
    check = check_equivalence(parent, module, plan.static, inputs)
    if check.status == "unverified" and plan.retained < 1:
        message = "The module is unverified: its mask moves the parent's logits by only %.1e; a check needs over %.1e."
        logger.warning(message, check.effect, EFFECT_FACTOR * check.tolerance)
    module.config.equivalence = asdict(check)


def build_module(
    cls: type[Model], source: CutSource, plan: ModulePlan, read: Reader, base_model: PreTrainedModel | None = None
) -> Model:
    """Builds a module in float32 (float64 stays), in eval mode, without checking it.

    `read` returns the tensor of a name in the plain model, cut. `base_model` on the meta device becomes the module's.
    """
    has_means = bool(source.mean_masks)
    cuts = [site_cut(site, plan.keep[site.key], plan.static[site.key] if has_means else None) for site in source.sites]
    config = _module_config(source, plan, [cut.widths for cut in cuts])
    heads = find_heads(source.plain, source.plain.config.num_labels or 0)
    count = len(source.config.names)  # of parents
    kept = {head: torch.tensor([*plan.label_ids, *range(count, count + others)]) for head, others in heads.items()}
    by_name = tensor_cuts(source.plain, cuts, kept)
    names = [*source.plain.state_dict(), *(name for name, cut in by_name.items() if cut.constant is not None)]
    state = {f"model.{name}": _at_least_float32(read(name, by_name.get(name))) for name in names}
    dtype = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    with hidden_progress():
        kwargs = {"config": config, "state_dict": state, "dtype": dtype}
        module: Model = cls.from_pretrained(None, base_model, source.sites, **kwargs)
    module.name_or_path = module.config.name_or_path = ""  # "None" otherwise
    module.drop_stale_results()  # from here on changes of the weights count
    return module


def _at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision would round the scales that a cut multiplies weights by."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def restore_dtypes(module: NeMoPreTrainedModel, dtypes: Mapping[str, torch.dtype]) -> None:
    """Gives a module's tensors the precision of the parent's."""
    for name, tensor in module.model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtypes[name])


def _module_config(source: CutSource, plan: ModulePlan, widths: Sequence[Mapping[str, int]]) -> NeMoModelConfig:
    parent = source.config
    config: NeMoModelConfig = copy.deepcopy(parent)
    config.role, config.save_identity = "module", None
    config.id2label = {index: parent.names[label] for index, label in enumerate(plan.label_ids)}
    config.label2id = {name: index for index, name in config.names.items()}
    config.label_ids, config.unseen_labels = list(plan.label_ids), None
    config.label_groups = [{"name": name, "labels": parent.groups[name]} for name in plan.groups]
    if not parent.has_several_labels:
        config.problem_type = "single_label_classification" if len(plan.label_ids) > 1 else None
    config.relevance_threshold = plan.threshold
    config.round_to = plan.round_to
    config.parent, config.repository = parent.repository, None  # type: ignore[misc]
    config.retained_neurons = plan.retained
    config.sites = [
        {**site.entry, "widths": dict(width), "kept": plan.counts[site.key]}
        for site, width in zip(source.sites, widths, strict=True)
    ]
    return config


def cut_on_load(
    cls: type[Model],
    source: str | Path,
    labels: LabelLike | Sequence[LabelLike],
    threshold: float | None = None,
    round_to: int | None = None,
    verify: bool = False,
    verify_files: bool = False,
    **kwargs: Any,
) -> Model:
    """Does what `NeMoClassifier.from_pretrained` says for `labels=`: reads only the rows and columns that are kept."""
    hub_options = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
    config, weights = open_configured(cls, source, hub_options, kwargs, verify_files)
    config.repository = hub_name(source)
    is_given = {name: value is not None and value is not False for name, value in kwargs.items()}
    if strange := sorted(name for name in kwargs.keys() - CUT_OPTIONS if is_given[name]):
        known = sorted(name for name in CUT_OPTIONS if name[0] != "_")
        raise ValueError(
            f"Got {strange} with labels; expected some of {known}, or what the configuration of the plain model has. "
            "Leave them out, and move or change the module after the cut."
        )
    device = _cut_device(kwargs.get("device_map"))
    if config.role == "module":
        raise ValueError(f"Got {str(source)!r}, which is a module; expected a parent. Load it without labels=.")
    if kwargs.get("attn_implementation"):
        config._attn_implementation = kwargs["attn_implementation"]
    hub_options["force_download"] = False  # what is here now was checked
    saved = _saved_source(config, weights)
    settle_labels(config)  # options may have renamed them
    plan = make_plan(saved, labels, threshold, round_to)
    _warn_untrained(saved.options)
    stored = {name: weights.float_dtype(f"model.{name}") for name in saved.plain.state_dict()}
    module = build_module(cls, saved, plan, lambda name, cut: weights.read(f"model.{name}", cut), saved.plain)
    module.processor_files, _ = read_companions(source, hub_options, config.processor_files)
    # Checked when the parent was made, on another cut of the same structure.
    module.config.equivalence = {**config.equivalence, "source": "parent"} if config.equivalence else None
    if verify:
        check_module(cls.from_pretrained(source, **hub_options), module, plan)
    restore_dtypes(module, {name: dtype for name, dtype in stored.items() if dtype is not None})
    dtype = kwargs.get("torch_dtype") if kwargs.get("dtype") is None else kwargs["dtype"]
    if dtype not in (None, "auto"):
        module.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        module.config.dtype = module.dtype
    check_finite(module)
    if device is not None:
        module.to(device)  # type: ignore[arg-type]
    if not kwargs.get("output_loading_info"):
        return module
    # As transformers answers where every tensor is found.
    info: dict[str, Any] = {f"{kind}_keys": set() for kind in ("missing", "unexpected", "mismatched")}
    return module, info | {"error_msgs": []}  # type: ignore[return-value]


def _cut_device(device_map: Any) -> torch.device | None:
    """The one device that a `device_map` names; others are refused with a `ValueError`."""
    place = device_map[""] if isinstance(device_map, Mapping) and list(device_map) == [""] else device_map
    try:
        return None if place is None else torch.device(place)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"Got device_map={str(device_map)[:200]} with labels; expected one device, such as 'cuda:0'. Leave it out, "
            "and distribute the module after the cut."
        ) from error


def _saved_source(config: NeMoModelConfig, weights: WeightFiles) -> CutSource:
    """Reads what a cut needs apart from the weights: structure, relevance and mean masks."""
    plain = build_on_meta(config.build_plain, weights, "model.")
    check_labels(config, plain.config.num_labels or 0)
    sites = configured_sites(plain, config)
    weights.find_tied({f"model.{name}": f"model.{other}" for name, other in plain.all_tied_weights_keys.items()})
    options = NeMoConfig.from_dict(config.nemo_config or {})
    has_means = not options.hard_masks
    shapes = {f"model.{name}": tuple(tensor.shape) for name, tensor in plain.state_dict().items()}
    for name, dtype in {"relevance": torch.uint8, **({"mean_mask": torch.float32} if has_means else {})}.items():
        read = {f"masks.{index}.{name}": (len(config.groups), site.neurons) for index, site in enumerate(sites)}
        weights.check_dtypes(dict.fromkeys(read, dtype))
        shapes |= read
    weights.check_shapes(shapes, ("masks.sparsity_level", *(f"masks.{index}." for index in range(len(sites)))))
    relevance = {site.key: weights.read(f"masks.{index}.relevance") for index, site in enumerate(sites)}
    means = {site.key: weights.read(f"masks.{index}.mean_mask") for index, site in enumerate(sites) if has_means}
    check_mean_masks(list(means.values()))
    return CutSource(config, options, plain, sites, relevance, means)
