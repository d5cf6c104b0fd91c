"""What cutting a classifier on calibration samples starts from: a copy that shares its tensors, measured and scored."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nemo_hf.config import LabelLike, NeMoConfig, resolve_groups, resolve_labels
from nemo_hf.neurons.sites import AttentionSite, NeuronSite
from nemo_hf.neurons.trial_calls import on_device
from nemo_hf.pruning.budget import Cost, layer_operations, layer_weights
from nemo_hf.pruning.depth import part_means
from nemo_hf.pruning.head_bases import change_query_key, change_value, query_key_basis, value_basis
from nemo_hf.pruning.layer_edits import layer_weight, scale_inputs, scale_rows
from nemo_hf.pruning.plan import module_masks
from nemo_hf.pruning.reconstruct import Targets
from nemo_hf.pruning.scores import activity_scores, fisher_scores, magnitude_scores, relevance_scores
from nemo_hf.pruning.statistics import SiteStatistics, measure_sites

from .attach import attach_masks
from .base import NeMoPreTrainedModel
from .equivalence import sharing_copy
from .finiteness import check_finite, check_outputs
from .head_outputs import answers
from .plain_checks import check_built, check_plain, label_names
from .pruning_modes import make_parent

Inputs = dict[str, Any]
Advance = Callable[[str], None]  # says which phase a step belonged to
Score = Literal["activity", "fisher", "magnitude", "relevance"]
TRIAL_SAMPLES = 4
BASIS_TOLERANCE = 1e-4  # of the largest logit: weights are rounded once more

_SITES: "WeakKeyDictionary[PreTrainedModel, tuple[Any, list[NeuronSite]]]" = WeakKeyDictionary()


@dataclass(frozen=True)
class CutTask:
    """What a module is for: label ids, names of their groups, the source's groups, and the options of its sites."""

    label_ids: list[int]
    names: list[str]
    groups: dict[str, list[int]]
    options: NeMoConfig
    count: int  # labels of the source

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        labels: LabelLike | Sequence[LabelLike],
        label_groups: Mapping[str, Sequence[LabelLike]] | None,
        options: NeMoConfig | None,
    ) -> "CutTask":
        """Finds the labels and groups that are asked for."""
        if isinstance(model, NeMoPreTrainedModel):
            options, groups, known = model.nemo_config, model.config.groups, model.config.names
        else:
            known = label_names(model)
            options = options or NeMoConfig()
            groups = resolve_groups(label_groups or options.label_groups, known)
        label_ids, names = resolve_labels(labels, groups, known)
        options = replace(options, masks="static", hard_masks=True, objective="contrastive")
        return cls(label_ids, names, groups, options, len(known))


@dataclass
class Source:
    """A copy of a model that shares its tensors, in float32 and eval mode, and its answers among the task's labels."""

    plain: PreTrainedModel
    sites: list[NeuronSite]
    batches: list[Inputs]
    answers: list[Tensor]
    likeliest: list[Tensor]  # ids among all the model's labels, where it answers once a sample
    scores: dict[str, dict[str, Tensor]]
    costs: dict[Cost, dict[str, float]]  # of the layers that make or read neurons, by path
    means: dict[str, Tensor]  # of what whole parts add to the stream, by path of their last layer
    targets: dict[int, Targets] | None = None  # by number of samples, where several modules are fitted to them


def check_calibrated(model: PreTrainedModel, calibration: Any) -> None:
    """Refuses models that can't be cut on calibration samples, before any sample is read."""
    if isinstance(model, NeMoPreTrainedModel):
        model.parent_masks()
        check_built(model.model)
    else:
        check_plain(model, NeMoConfig(masks="static"))
        check_built(model)
    if calibration is None:
        raise ValueError(
            "Got no calibration samples; expected some hundreds, which need no labels. Pass calibration=, such as a "
            "data set, batches, or a list of texts with processing_class=tokenizer."
        )
    check_finite(model)


def find_static_sites(
    model: PreTrainedModel, plain: PreTrainedModel, options: NeMoConfig, inputs: Mapping[str, Tensor] | None = None
) -> list[NeuronSite]:
    """The sites of a plain model with their pruning modes; those of a model that was cut before are known."""
    shapes = {name: tuple(tensor.shape) for name, tensor in plain.state_dict().items()}
    asked = (options.targets, options.sites, shapes)
    known = _SITES.get(model)
    if known is not None and known[0] == asked:
        return known[1]
    parent = make_parent(plain, options, inputs=inputs)
    sites = list(parent.sites)
    parent.detach_masks()
    _SITES[model] = (asked, sites)
    return sites


def static_parent(model: PreTrainedModel) -> NeMoPreTrainedModel:
    """A parent with static masks that shares the tensors of a plain model, which stays as it is."""
    plain, options = sharing_copy(model), NeMoConfig(masks="static")
    return attach_masks(plain, options, sites=find_static_sites(model, plain, options))


def change_head_bases(
    source: PreTrainedModel,
    sites: Sequence[NeuronSite],
    statistics: Mapping[str, SiteStatistics],
    scores: dict[str, dict[str, Tensor]],
    inputs: Inputs,
) -> None:
    """Gives heads the bases of `head_bases`, for v and for q.k, if the logits stay as they are; updates the scores."""
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
        return _in_float32(sharing_copy(model).eval())
    masks = model.parent_masks()
    options = model.nemo_config
    if options.has_generators and not (options.static_evaluation and options.hard_masks):
        raise ValueError(
            "Got a parent whose every input opens its own neurons, and calibration samples; expected one mask for all "
            "inputs. Leave calibration out, or set static_evaluation=True in the parent's nemo_config."
        )
    closed = module_masks(masks, slice(None), model.config.relevance_threshold or options.relevance_threshold)
    plain = _in_float32(sharing_copy(model).eval().detach_masks())
    if options.has_generators:
        for site in model.sites:
            _close(plain, site, closed[site.key])
    return plain


def _in_float32(plain: PreTrainedModel) -> PreTrainedModel:
    is_usable = plain.dtype == torch.float32 and not any(
        tensor.is_inference() for tensor in plain.state_dict().values()
    )
    wide: PreTrainedModel = plain if is_usable else copy.deepcopy(plain).float()
    return wide


def _close(plain: PreTrainedModel, site: NeuronSite, mask: Tensor) -> None:
    """Closes the neurons of a mask (neurons,) for good."""
    for rows, part in site.produced():
        if part == "query" or site.cut_by.is_gated:
            scale_rows(plain.get_submodule(rows.layer), rows, site.part_mask(part, mask))
    for path in site.readers:
        scale_inputs(plain.get_submodule(path), site.input_scale(path, mask))


def prepare_source(
    model: PreTrainedModel, batches: Sequence[Inputs], task: CutTask, kind: Score, advance: Advance
) -> Source:
    """Measures a model on calibration batches and scores its neurons; the model stays as it is."""
    plain = plain_source(model)
    first = {name: value[:TRIAL_SAMPLES] for name, value in batches[0].items()}
    if isinstance(model, NeMoPreTrainedModel):
        sites = list(model.sites)
    else:
        sites = find_static_sites(model, plain, task.options, first)
    batches = [on_device(plain, batch) for batch in batches]
    expected: list[Tensor] = []
    likeliest: list[Tensor] = []

    def keep(outputs: Any) -> None:
        expected.append(answers(outputs, task.label_ids, task.count).cpu())
        likeliest.extend([outputs.logits.argmax(-1).cpu()] if outputs.logits.ndim == 2 else [])
        check_outputs(plain, {}, outputs.logits, list((plain.config.id2label or {}).values()))
        advance("Measuring")

    statistics = measure_sites(plain, sites, batches, keep)
    scores, means = activity_scores(plain, sites, statistics), part_means(plain, sites, statistics)
    costs: dict[Cost, dict[str, float]] = {
        "weights": layer_weights(plain, sites),
        "operations": layer_operations(plain, sites, batches[0]),
    }
    if kind == "relevance":
        relevance = relevance_of(model, task)
        scores = relevance_scores(sites, relevance, scores)
        return Source(plain, sites, batches, expected, likeliest, scores, costs, means)
    change_head_bases(plain, sites, statistics, scores, batches[0])
    if kind == "fisher":
        scores = fisher_scores(plain, sites, batches, task.label_ids)
    elif kind == "magnitude":
        scores = magnitude_scores(plain, sites)
    return Source(plain, sites, batches, expected, likeliest, scores, costs, means)


def relevance_of(model: PreTrainedModel, task: CutTask) -> dict[str, Tensor]:
    """The relevance of a parent's neurons for the groups of a task: site key to (neurons,)."""
    if not isinstance(model, NeMoPreTrainedModel) or model.config.relevance_source == "initial":
        raise ValueError(
            "Got scores='relevance' for a model without measured relevance; expected a parent that NeMoTrainer "
            "trained. Take scores='activity'."
        )
    rows = [list(task.groups).index(name) for name in task.names]
    return {key: table[rows].amax(0) for key, table in model.parent_masks().relevance().items()}
