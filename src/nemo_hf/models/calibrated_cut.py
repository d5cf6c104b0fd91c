"""Cuts modules of any classifier on calibration samples: scores of its neurons, a cut, and reconstruction."""

import copy
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from nemo_hf.config import LabelLike, NeMoConfig, resolve_groups, resolve_labels
from nemo_hf.neurons.sites import AttentionSite, NeuronSite
from nemo_hf.neurons.trial_calls import on_device
from nemo_hf.pruning.budget import masked_weights, plan_budget
from nemo_hf.pruning.head_bases import change_query_key, change_value, query_key_basis, value_basis
from nemo_hf.pruning.layer_edits import layer_weight, scale_inputs, scale_rows
from nemo_hf.pruning.plan import module_masks, retained_neurons, static_masks
from nemo_hf.pruning.reconstruct import Reconstruction
from nemo_hf.pruning.scores import activity_scores
from nemo_hf.pruning.statistics import SiteStatistics, measure_sites

from .attach import attach_masks
from .base import NeMoPreTrainedModel
from .calibration import read_calibration
from .equivalence import sharing_copy
from .extraction import CutSource, ModulePlan, build_module, check_module, read_tensor
from .plain_checks import label_names
from .pruning_modes import make_parent

logger = logging.getLogger(__name__)

Keep = Mapping[str, Mapping[str, Tensor]]
Inputs = dict[str, Any]
Advance = Callable[[str], None]  # says which phase a step belonged to
Score = Literal["activity", "fisher", "magnitude", "relevance"]
TRIAL_SAMPLES = 4
BASIS_TOLERANCE = 1e-4  # of the largest logit: weights are rounded once more

_SITES: "WeakKeyDictionary[PreTrainedModel, tuple[Any, list[NeuronSite]]]" = WeakKeyDictionary()


def restricted(logits: Tensor, label_ids: Sequence[int]) -> Tensor:
    """Logits of some labels."""
    return logits[..., list(label_ids)]


@dataclass
class Source:
    """A copy of a model, in float32 and eval mode, that shares its tensors, with what was measured of it."""

    plain: PreTrainedModel
    sites: list[NeuronSite]
    batches: list[Inputs]
    logits: list[Tensor]
    scores: dict[str, dict[str, Tensor]]


def find_static_sites(model: PreTrainedModel, plain: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[NeuronSite]:
    """The sites of a plain model with their pruning modes; those of a model that was cut before are known."""
    shapes = {name: tuple(tensor.shape) for name, tensor in plain.state_dict().items()}
    known = _SITES.get(model)
    if known is not None and known[0] == shapes:
        return known[1]
    parent = make_parent(plain, NeMoConfig(masks="static"), inputs=inputs)
    sites = list(parent.sites)
    parent.detach_masks()
    _SITES[model] = (shapes, sites)
    return sites


def change_head_bases(
    source: PreTrainedModel,
    sites: Sequence[NeuronSite],
    statistics: Mapping[str, SiteStatistics],
    scores: dict[str, dict[str, Tensor]],
    inputs: Inputs,
) -> None:
    """Gives heads the bases of `head_bases`, for v and for q.k, if the logits stay what they are; updates the scores."""
    expected = source(**inputs, return_dict=True).logits
    tolerance = BASIS_TOLERANCE * max(1.0, expected.abs().max().item())
    for part, change in (("value", _change_value), ("query_key", _change_query_key)):
        own = [site for site in sites if isinstance(site, AttentionSite) and (part == "value" or _has_free_keys(site))]
        before = {path: dict(source.get_submodule(path)._parameters) for site in own for path in site.layers}
        energies = {site.key: change(source, site, statistics[site.key]) for site in own}
        if (source(**inputs, return_dict=True).logits - expected).abs().max().item() <= tolerance:
            for key, energy in energies.items():
                scores[key][part] = energy.flatten().cpu()
        else:  # something else looks at single dimensions
            for path, parameters in before.items():
                source.get_submodule(path)._parameters.update(parameters)


def _has_free_keys(site: AttentionSite) -> bool:
    """Whether nothing between q, k and their product looks at single dimensions."""
    return not (site.is_rotary or site.is_gated_only or site.cut_by.is_gated)


def _change_value(source: PreTrainedModel, site: AttentionSite, statistics: SiteStatistics) -> Tensor:
    layer = source.get_submodule(site.output)
    of_value, of_output, energies = value_basis(site, statistics, layer_weight(layer))
    change_value(source, site, of_value, of_output)
    return energies


def _change_query_key(source: PreTrainedModel, site: AttentionSite, statistics: SiteStatistics) -> Tensor:
    of_query, of_key, energies = query_key_basis(site, statistics)
    change_query_key(source, site, of_query, of_key)
    return energies


def plain_source(model: PreTrainedModel) -> PreTrainedModel:
    """A plain model that computes in eval mode what a plain model or parent does; it shares the tensors that it can."""
    if not isinstance(model, NeMoPreTrainedModel):
        plain = sharing_copy(model).eval()
        return plain if plain.dtype == torch.float32 else copy.deepcopy(plain).float()
    masks = model.parent_masks()
    options = model.nemo_config
    if options.has_generators and not (options.static_evaluation and options.hard_masks):
        raise ValueError(
            "Got a parent whose every input opens its own neurons, and calibration samples; expected one mask for all "
            "inputs. Leave calibration out, or set static_evaluation=True in the parent's nemo_config."
        )
    closed = module_masks(masks, slice(None), model.config.relevance_threshold or options.relevance_threshold)
    copied = sharing_copy(model).eval()
    plain = copied.detach_masks()
    plain = plain if plain.dtype == torch.float32 else copy.deepcopy(plain).float()
    if options.has_generators:
        for site in model.sites:
            _close(plain, site, closed[site.key])
    return plain


def _close(plain: PreTrainedModel, site: NeuronSite, mask: Tensor) -> None:
    """Closes the neurons of a mask (neurons,) for good."""
    for rows, part in site.produced():
        if part == "query" or site.cut_by.is_gated:
            scale_rows(plain.get_submodule(rows.layer), rows, site.part_mask(part, mask))
    for path in site.readers:
        scale_inputs(plain.get_submodule(path), site.input_scale(path, mask))


def prepare_source(
    model: PreTrainedModel, batches: Sequence[Inputs], label_ids: Sequence[int], score: Score, advance: Advance
) -> Source:
    """Measures a model on calibration batches and scores its neurons; the model stays as it is."""
    plain = plain_source(model)
    first = {name: value[:TRIAL_SAMPLES] for name, value in batches[0].items()}
    sites = list(model.sites) if isinstance(model, NeMoPreTrainedModel) else find_static_sites(model, plain, first)
    batches = [on_device(plain, batch) for batch in batches]
    logits: list[Tensor] = []

    def keep(outputs: Any) -> None:
        logits.append(outputs.logits.cpu())
        advance("Measuring")

    statistics = measure_sites(plain, sites, batches, keep)
    scores = activity_scores(plain, sites, statistics)
    if score == "activity":
        change_head_bases(plain, sites, statistics, scores, batches[0])
    else:
        scores = SCORES[score](plain, sites, batches, label_ids)
    return Source(plain, sites, batches, logits, scores)


def cut_module(model: PreTrainedModel, source: Source, task: "Task", keep: Keep) -> NeMoPreTrainedModel:
    """Cuts a module, in float32, of a source with the bases that its heads have now, and checks that it is exact."""
    parent = attach_masks(source.plain, task.options, task.groups, source.sites)
    try:
        if isinstance(model, NeMoPreTrainedModel):
            parent.config.base_model, parent.config.repository = model.config.base_model, model.config.repository
        static = static_masks(source.sites, keep)
        counts = {key: [sum(len(index) for index in parts.values())] for key, parts in keep.items()}
        retained = retained_neurons(source.sites, keep)
        plan = ModulePlan(task.label_ids, task.names, keep, static, None, None, retained, counts)
        read = partial(read_tensor, source.plain.state_dict())
        module = build_module(type(parent), CutSource.of_parent(parent), plan, read)
        module.to(source.plain.device)  # type: ignore[arg-type]
        check_module(parent, module, plan, {name: value[:TRIAL_SAMPLES] for name, value in source.batches[0].items()})
    finally:
        parent.detach_masks()
    return module


@torch.no_grad()
def distance(module: NeMoPreTrainedModel, source: Source, label_ids: Sequence[int]) -> float:
    """Mean square by which a module's logits differ from the source's of the same labels, on the calibration samples."""
    total, numbers = 0.0, 0
    for batch, logits in zip(source.batches, source.logits, strict=True):
        got = module.model(**batch, return_dict=True).logits.cpu()
        difference = got - restricted(logits, label_ids)
        total, numbers = total + difference.double().square().sum().item(), numbers + difference.numel()
    return total / numbers if math.isfinite(total) else math.inf


def reconstruct_module(
    module: NeMoPreTrainedModel, source: Source, task: "Task", keep: Keep, advance: Advance
) -> dict[str, Any]:
    """Reconstructs a module in place, unless that makes its answers worse; returns what was done."""
    raw = distance(module, source, task.label_ids)
    state = {name: tensor.clone() for name, tensor in module.model.state_dict().items()}
    batches = list(enumerate(source.batches))
    heads = dict.fromkeys(module.heads, torch.tensor(task.label_ids))
    reconstruction = Reconstruction(source.plain, module.model, source.sites, keep, heads, batches)
    errors = reconstruction.run(on_layer=lambda path: advance("Reconstructing"))
    after = distance(module, source, task.label_ids)
    report: dict[str, Any] = {
        "distance": after,
        "raw_distance": raw,
        "layers": {p: asdict(e) for p, e in errors.items()},
    }
    if not after <= raw:
        module.model.load_state_dict(state)
        report |= {
            "refused": f"the module's answers would differ from the source's by {after:.2g} instead of {raw:.2g}"
        }
        logger.warning("The module is not reconstructed: %s. Pass more calibration samples.", report["refused"])
    return report


@dataclass(frozen=True)
class Task:
    """What a module is for: label ids, names of their groups, the source's groups, and the options of its sites."""

    label_ids: list[int]
    names: list[str]
    groups: dict[str, list[int]]
    options: NeMoConfig

    @classmethod
    def of(
        cls, model: PreTrainedModel, labels: LabelLike | Sequence[LabelLike],
        label_groups: Mapping[str, Sequence[LabelLike]] | None, options: NeMoConfig | None,
    ) -> "Task":  # fmt: skip
        """Finds the labels and groups that are asked for."""
        if isinstance(model, NeMoPreTrainedModel):
            options, groups, known = model.nemo_config, model.config.groups, model.config.names
        else:
            known = label_names(model)
            options = options or NeMoConfig()
            groups = resolve_groups(label_groups or options.label_groups, known)
        options = replace(options, masks="static", hard_masks=True, objective="contrastive")
        label_ids, names = resolve_labels(labels, groups, known)
        return cls(label_ids, names, groups, options)


def extract_module(
    model: PreTrainedModel,
    labels: LabelLike | Sequence[LabelLike],
    calibration: Any = None,
    retention: float | Sequence[float] = 0.2,
    *,
    processing_class: Any = None,
    label_groups: Mapping[str, Sequence[LabelLike]] | None = None,
    nemo_config: NeMoConfig | None = None,
    scores: Score = "activity",
    reconstruct: bool = True,
    max_samples: int = 1000,
    batch_size: int = 32,
    show_progress: bool = True,
) -> Any:
    """TODO"""
    start = time.perf_counter()
    task = Task.of(model, labels, label_groups, nemo_config)
    samples = read_calibration(model, calibration, processing_class, batch_size, max_samples, task.label_ids)
    own, others = [], []
    for inputs, given in samples:
        is_own = own_rows(given, task.label_ids, len(next(iter(inputs.values()))))
        for chosen, part in ((is_own, own), (~is_own, others)):
            if bool(chosen.any()):
                part.append({name: value[chosen] for name, value in inputs.items()})
    retentions = list(retention) if isinstance(retention, Sequence) else [retention]
    with tqdm(disable=not show_progress) as bar:

        def advance(phase: str) -> None:
            bar.set_description(phase)
            bar.update()

        with torch.no_grad():
            source = prepare_source(model, own, task.label_ids, scores, advance)
            modules = []
            for each in retentions:
                keep = plan_budget(source.plain, source.sites, source.scores, each)
                module = cut_module(model, source, task, keep)
                report = reconstruct_module(module, source, task, keep, advance) if reconstruct else {}
                weights = masked_weights(source.plain, source.sites, keep) / masked_weights(source.plain, source.sites)
                module.extraction = {"weights": weights, "seconds": time.perf_counter() - start, **report}
                modules.append(module)
    return modules if isinstance(retention, Sequence) else modules[0]


def own_rows(labels: Tensor | None, label_ids: Sequence[int], samples: int) -> Tensor:
    """Which samples have one of some labels, (batch,); all, where that is not known."""
    if labels is None or labels.ndim != 1:
        return torch.ones(samples, dtype=torch.bool)
    return torch.isin(labels, torch.tensor(label_ids))
