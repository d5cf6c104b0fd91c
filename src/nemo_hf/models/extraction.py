"""From a parent to a stand-alone module, in memory or straight from the parent's files."""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from nemo_hf.config import LabelLike, resolve_labels
from nemo_hf.pruning.layer_cuts import site_cut
from nemo_hf.pruning.plan import is_relevant, plan_module, retained_neurons, static_masks
from nemo_hf.pruning.tensor_slices import TensorCut, cut_tensor, tensor_cuts

from .base import NeMoPreTrainedModel
from .configuration import NeMoModelConfig
from .equivalence import EFFECT_FACTOR, check_equivalence
from .loading import HUB_OPTIONS, build_on_meta, check_mean_masks, hidden_progress, open_model
from .remote_files import hub_name, read_companions

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=NeMoPreTrainedModel)
CUT_OPTIONS = {*HUB_OPTIONS, "dtype", "attn_implementation", "adapter_kwargs", "trust_remote_code", "_from_auto"}
Reader = Callable[[str, TensorCut | None], Tensor]


@dataclass(frozen=True)
class ModulePlan:
    """What a module keeps: labels, neurons and, with soft masks, the mean mask of each kept neuron.

    `counts` holds, by site, how many neurons each of its groups uses and how many it keeps in all.
    """

    label_ids: list[int]
    groups: list[str]
    keep: dict[str, dict[str, Tensor]]
    static: dict[str, Tensor]
    threshold: float
    round_to: int | None
    retained: float
    counts: dict[str, list[int]]


def make_plan(
    parent: NeMoPreTrainedModel,
    labels: LabelLike | Sequence[LabelLike],
    threshold: float | None = None,
    round_to: int | None = None,
) -> ModulePlan:
    """Plans a module without cutting it.

    Args:
        parent: The parent; its weights may be on the meta device, its relevance may not.
        labels: Labels or groups, as `extract_module` takes them.
        threshold: As in `extract_module`.
        round_to: As in `extract_module`.

    Returns:
        The plan. Its `static` masks are what the module computes under.

    Raises:
        ValueError: If the labels, the threshold or the relevance allow no module.
    """
    if parent.masks is None:
        raise ValueError("Got a module; expected a parent. Load the parent that the module was cut from.")
    groups = parent.config.groups
    label_ids, names = resolve_labels(labels, groups, parent.config.names)
    threshold = parent.nemo_config.relevance_threshold if threshold is None else threshold
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 < threshold <= 1:
        raise ValueError(f"Got threshold={threshold!r}; expected a number above 0, up to 1.")
    if parent.config.relevance_source == "initial":
        logger.warning(
            "This parent's relevance was never measured, so its modules keep every neuron. "
            "Train it with NeMoTrainer, or call compute_relevance(parent, dataloader) first."
        )
    indices = [list(groups).index(name) for name in names]
    keep = plan_module(parent.sites, parent.masks.relevance(), indices, threshold, round_to)
    static = static_masks(parent.sites, keep)
    for mask in parent.masks.site_masks():
        if mask.mean_mask is not None:
            static[mask.site.key] *= mask.mean_mask[indices].mean(0).cpu()
    counts = {
        key: [
            *is_relevant(relevance[indices], threshold).sum(-1).tolist(),
            sum(len(part) for part in keep[key].values()),
        ]
        for key, relevance in parent.masks.relevance().items()
    }
    retained = retained_neurons(parent.sites, keep)
    return ModulePlan(label_ids, names, keep, static, threshold, round_to, retained, counts)


def read_tensor(state: Mapping[str, Tensor], name: str, cut: TensorCut | None) -> Tensor:
    """Reads a module's tensor from its parent's state in memory, as `build_module` wants it read."""
    if cut is None:
        return state[name].clone()  # nothing is shared: training the module must not change the parent
    if cut.constant is not None:
        return cut.constant.clone()
    tensor = state[name].cpu()
    return cut_tensor(tensor.index_select, cut)


def extract_module(
    parent: Model,
    labels: LabelLike | Sequence[LabelLike],
    threshold: float | None = None,
    round_to: int | None = None,
    inputs: Mapping[str, Tensor] | None = None,
) -> Model:
    """Does what `NeMoPreTrainedModel.extract_module` says, as a function of the parent."""
    plan = make_plan(parent, labels, threshold, round_to)
    module = build_module(type(parent), parent, plan, partial(read_tensor, parent.model.state_dict()))
    module.to(parent.device)  # type: ignore[arg-type]
    check = check_equivalence(parent, module, plan.static, inputs)
    if check.status == "unverified":
        logger.warning(
            "Got a module whose mask moves the parent's logits by %.1e only; expected over %.1e to check the cut. "
            "Equal logits prove little here.",
            check.effect,
            EFFECT_FACTOR * check.tolerance,
        )
    module.config.equivalence = asdict(check)
    module.processor_files = dict(parent.processor_files)
    return module


def build_module(cls: type[Model], parent: NeMoPreTrainedModel, plan: ModulePlan, read: Reader) -> Model:
    """Builds a module without checking it.

    Args:
        cls: Class of the module.
        parent: The parent; its weights may be on the meta device.
        plan: What the module keeps.
        read: Returns the tensor of a name, cut.

    Returns:
        The module in eval mode.
    """
    assert parent.masks is not None
    is_hard = parent.masks.state.is_hard
    cuts = [site_cut(site, plan.keep[site.key], None if is_hard else plan.static[site.key]) for site in parent.sites]
    config = _module_config(parent.config, plan, parent, [cut.widths for cut in cuts])
    heads = dict.fromkeys(parent.heads, torch.tensor(plan.label_ids, dtype=torch.long))
    by_name = tensor_cuts(parent.model, cuts, heads)
    state = {}
    for name in [*parent.model.state_dict(), *(name for name, cut in by_name.items() if cut.constant is not None)]:
        state[f"model.{name}"] = read(name, by_name.get(name))
    dtype = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    with hidden_progress():
        module: Model = cls.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    return module


def _module_config(
    parent: NeMoModelConfig, plan: ModulePlan, model: NeMoPreTrainedModel, widths: Sequence[Mapping[str, int]]
) -> NeMoModelConfig:
    id2label = {index: parent.names[label] for index, label in enumerate(plan.label_ids)}
    config: NeMoModelConfig = copy.deepcopy(parent)
    config.role = "module"
    config.id2label = id2label
    config.label2id = {name: index for index, name in id2label.items()}
    config.label_ids = list(plan.label_ids)
    config.label_groups = [{"name": name, "labels": parent.groups[name]} for name in plan.groups]
    if not parent.has_several_labels:
        config.problem_type = "single_label_classification" if len(id2label) > 1 else None
    config.relevance_threshold = plan.threshold
    config.round_to = plan.round_to
    config.parent = hub_name(parent.name_or_path)
    config.retained_neurons = plan.retained
    config.sites = [
        {**site.entry, "widths": dict(width), "kept": plan.counts[site.key]}
        for site, width in zip(model.sites, widths, strict=True)
    ]
    return config


def cut_on_load(
    cls: type[Model],
    source: str | Path,
    labels: LabelLike | Sequence[LabelLike],
    threshold: float | None = None,
    round_to: int | None = None,
    verify: bool = False,
    config: NeMoModelConfig | None = None,
    **kwargs: Any,
) -> Model:
    """Loads only a module from a saved parent: reads the relevance, then the rows and columns it needs.

    Args:
        cls: Class of the parent and the module.
        source: Directory or Hub repository of the parent.
        labels: Labels or groups, as `extract_module` takes them.
        threshold: As in `extract_module`.
        round_to: As in `extract_module`.
        verify: Whether to load the parent too and check the equivalence check.
        config: The parent's configuration, if it is loaded already.
        **kwargs: Options of `from_pretrained`; those of the Hub, `dtype` and `attn_implementation` count.

    Returns:
        The module in eval mode, as `extract_module` on the loaded parent would return it.

    Raises:
        ValueError: If `source` is a module, or a tensor is missing or too small.
        OSError: If a file is missing or damaged.
    """
    strange = sorted(name for name, value in kwargs.items() if value and name not in CUT_OPTIONS)
    if strange:
        raise ValueError(
            f"Got {strange} together with labels; expected some of {sorted(CUT_OPTIONS)}. Cut the module first, and "
            "then move or change it."
        )
    hub_options = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
    config, weights = open_model(source, hub_options, config if isinstance(config, NeMoModelConfig) else None)
    if config.role == "module":
        raise ValueError(
            f"Got {str(source)!r}, which is a module; expected a parent to cut labels from. "
            "Load it without labels=, or name the parent's repository."
        )
    if kwargs.get("attn_implementation"):
        config._attn_implementation = kwargs["attn_implementation"]
    hub_options["force_download"] = False  # what is here now was checked
    parent: Model = build_on_meta(cls, config, weights)
    weights.find_tied(parent.all_tied_weights_keys)
    weights.check_shapes({name: tensor.shape for name, tensor in parent.state_dict().items()})
    assert parent.masks is not None
    for index, mask in enumerate(parent.masks.site_masks()):
        mask.relevance = weights.read(f"masks.{index}.relevance")
        if mask.mean_mask is not None:
            mask.mean_mask = weights.read(f"masks.{index}.mean_mask")
    check_mean_masks([mask.mean_mask for mask in parent.masks.site_masks()])
    plan = make_plan(parent, labels, threshold, round_to)
    module = build_module(cls, parent, plan, lambda name, cut: weights.read(f"model.{name}", cut))
    if isinstance(kwargs.get("dtype"), (str, torch.dtype)) and kwargs["dtype"] != "auto":
        dtype = kwargs["dtype"]
        module.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    module.processor_files, _ = read_companions(source, hub_options, config.processor_files)
    # Checked when the parent was made, on another cut of the same structure.
    module.config.equivalence = {**config.equivalence, "source": "parent"} if config.equivalence else None
    if verify:
        whole = cls.from_pretrained(source, **hub_options)
        module.config.equivalence = asdict(check_equivalence(whole, module, plan.static))
    return module
