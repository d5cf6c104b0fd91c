"""Turns a plain model into a parent, and finds by trial cuts which pruning mode is exact for each of its sites.

Layer names only suggest sites. A site that the model never runs is left out. Sites in layers of one class take the
first pruning mode under which a random cut passes the equivalence check, on a copy of the model with random weights.
"""

import copy
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nemo_hf.config import TARGETS, LabelLike, NeMoConfig
from nemo_hf.neurons.channel_tracing import ChannelSearch, find_channels
from nemo_hf.neurons.patterns import check_found, find_heads, find_sites
from nemo_hf.neurons.sites import AttentionSite, NeuronSite, UnsupportedArchitectureError, with_pruning_modes
from nemo_hf.neurons.trial_calls import check_runs, first_line, on_device, reached_sites, rectified_sites
from nemo_hf.neurons.trial_inputs import trial_inputs
from nemo_hf.neurons.user_sites import model_sites
from nemo_hf.pruning.plan import static_masks

from .attach import attach_masks
from .base import NeMoPreTrainedModel
from .equivalence import EFFECT_FACTOR, EQUIVALENCE_TOLERANCE, EquivalenceError, check_equivalence, exact_float32
from .extraction import CutSource, ModulePlan, build_module, read_tensor
from .finiteness import check_finite, check_outputs
from .head_outputs import answers, difference, labels_last
from .plain_checks import check_built, check_computed, check_plain

logger = logging.getLogger(__name__)

ROUNDING_SHARE = 0.1  # of the tolerance: smaller differences are rounding, however little a mask does
CLEAR_SHARE = 3e-5  # of the mask's effect: a pruning mode with a smaller difference is taken at once
LARGEST_SHARE = 1e-2  # of the mask's effect: a larger difference is an error; between the two the least one counts
ROUNDING_FACTOR = 10  # differences of pruning modes that differ by less than this count as equal
POOLED_TOLERANCE = 1e-5  # largest difference of a sample's soft masks in two batches
SPREADS = (0.85, 1.2, 1.7, 2.4)  # of random weights, relative to the inverse root of a layer's inputs
VECTOR_SPREAD = 0.35


def make_parent(
    model: PreTrainedModel,
    nemo_config: NeMoConfig | None = None,
    label_groups: Mapping[str, Sequence[LabelLike]] | None = None,
    inputs: Mapping[str, Tensor] | None = None,
) -> NeMoPreTrainedModel:
    """Attaches masks to a plain model and finds, by random trial cuts, the pruning modes that are exact.

    No other thread may use the plain model meanwhile.

    Args:
        model: A classification model of `transformers`; it becomes part of the parent.
        nemo_config: The options; `None` takes the defaults.
        label_groups: Groups in place of `nemo_config.label_groups`.
        inputs: A few samples for the trials; `None` draws random ones.

    Returns:
        The parent.

    Raises:
        TypeError: If `model` is not such a model.
        ValueError: If it has masks already, PEFT adapters, quantized weights or another head, differs from what its
            configuration builds (by parametrizations, hooks, wrapped or shared layers), or does not run on the inputs.
        UnsupportedArchitectureError: If it has no sites, or one that no pruning mode cuts exactly.
    """
    nemo_config = nemo_config or NeMoConfig()
    check_plain(model, nemo_config)
    check_built(model)
    find_heads(model, model.config.num_labels or 0)
    inputs = trial_inputs(model, inputs)
    check_finite(model)
    logits = labels_last(check_runs(model, inputs))
    check_outputs(model, inputs, logits, list((model.config.id2label or {}).values()))
    channels = ChannelSearch()
    if nemo_config.sites is not None:
        found = model_sites(model, nemo_config)
    else:
        found = find_sites(model, nemo_config.targets)
        if "conv" in nemo_config.targets:
            channels = find_channels(model, inputs, found)
        found = check_found(model, [*found, *channels.sites], nemo_config.targets, channels.explanation)
    try:
        parent = _try_sites(model, nemo_config, label_groups, inputs, found)
    except UnsupportedArchitectureError as error:
        check_computed(model, inputs)
        left_out = [site for site in channels.sites if not _is_exact_alone(model, nemo_config, inputs, site)]
        if not left_out:
            raise
        logger.warning("Got channels that can't be cut exactly (%s); %d stay whole.", error, len(left_out))
        found = [site for site in found if site not in left_out]
        check_found(model, found, nemo_config.targets, channels.explanation)
        parent = _try_sites(model, nemo_config, label_groups, inputs, found)
    gated = [site.key for site in parent.sites if site.pruning_mode == "scatter-gated" and not site.is_gated_only]
    if nemo_config.sites is not None and gated:
        logger.warning(
            "Got descriptions of which %s are exact only where masks also close neurons at their source. Unless "
            "something between source and output reads them all, look for a layer in the wrong place.",
            gated,
        )
    # No model has all kinds of neurons: a warning is due where kinds that were found, or asked for, are missing.
    expected = {site.kind for site in found} if nemo_config.has_generators else parent.kinds
    if tuple(nemo_config.targets) != TARGETS:
        expected = set(nemo_config.targets)
    if parent.kinds != expected:
        kinds = " and ".join(sorted(parent.kinds))
        logger.warning("Got a model in which only %s neurons were found; the rest stays whole.", kinds)
    return parent


def _try_sites(
    model: PreTrainedModel,
    nemo_config: NeMoConfig,
    label_groups: Mapping[str, Sequence[LabelLike]] | None,
    inputs: Mapping[str, Tensor],
    found: Sequence[NeuronSite],
) -> NeMoPreTrainedModel:
    """The parent with those of the sites that the model runs, and with pruning modes that are exact."""
    reached = reached_sites(model, found, inputs)
    if not reached:
        raise UnsupportedArchitectureError(
            f"Got model type {model.config.model_type!r}, which reads the weights of {found[0].name!r} and the like "
            "without calling these layers. Choose another architecture."
        )
    if nemo_config.objective == "moda" and nemo_config.masks == "generated":
        reached = rectified_sites(model, reached, inputs)
    parent = attach_masks(model, nemo_config, label_groups, reached)
    try:
        randomized = _randomized_copy(parent, inputs)
        _find_pruning_modes(randomized, inputs)
        _check_samples(randomized, inputs)
        parent.set_sites(randomized.sites)
        share, failure = _trial(parent, inputs, parent.sites)
        if share > LARGEST_SHARE:
            raise _refusal(parent, parent.sites[0], f"the model's own weights show an error ({failure})")
    except BaseException:  # also when the user interrupts: the plain model is given back as it was
        parent.detach_masks()
        raise
    return parent


def _is_exact_alone(
    model: PreTrainedModel, nemo_config: NeMoConfig, inputs: Mapping[str, Tensor], site: NeuronSite
) -> bool:
    """Whether the neurons of one site can be cut when nothing else is."""
    parent = attach_masks(model, nemo_config, None, [site])
    try:
        return _trial(_randomized_copy(parent, inputs), inputs, parent.sites)[0] <= LARGEST_SHARE
    finally:
        parent.detach_masks()


def _randomized_copy(parent: NeMoPreTrainedModel, inputs: Mapping[str, Tensor]) -> NeMoPreTrainedModel:
    """A copy with weights so large that all neurons move the logits visibly: fresh norms, say, would hide errors."""
    randomized: NeMoPreTrainedModel = copy.deepcopy(parent).float()
    effects: dict[float, float] = {}
    for spread in SPREADS:
        _draw_weights(randomized, spread)
        effects[spread] = _smallest_effect(randomized, inputs)
        if effects[spread] > EFFECT_FACTOR:
            return randomized
    _draw_weights(randomized, max(SPREADS, key=effects.__getitem__))
    return randomized


def _draw_weights(parent: NeMoPreTrainedModel, spread: float) -> None:
    # In training mode models drop what they keep of their weights (LeViT's position biases).
    parent.train()
    generator = torch.Generator().manual_seed(0)
    for parameter in parent.model.parameters():
        scale = spread * (parameter[0].numel() ** -0.5 if parameter.ndim > 1 else VECTOR_SPREAD)
        parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))
    parent.eval()


def _half_closed(parent: NeMoPreTrainedModel) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """For each kind and part of neurons: the kind, and static masks that close about half of that part."""
    for kind, part in dict.fromkeys((site.kind, part) for site in parent.sites for part in site.parts):
        chosen = {site.key for site in parent.sites if site.kind == kind}
        yield kind, static_masks(parent.sites, random_keep(parent.sites, chosen, part))


@torch.no_grad()
def _smallest_effect(parent: NeMoPreTrainedModel, inputs: Mapping[str, Tensor]) -> float:
    """Least that closing half of a part does to the logits, in tolerances of the equivalence check."""
    masks = [parent.parent_masks().open_masks(), *(static for _, static in _half_closed(parent))]
    opened, *masked = _answers(parent, inputs, *masks)
    tolerance = EQUIVALENCE_TOLERANCE * max(1.0, opened.abs().max().item())
    effects = [difference(found, opened, parent.task) / tolerance for found in masked]
    return min(effect if math.isfinite(effect) else 0.0 for effect in effects)


def _find_pruning_modes(parent: NeMoPreTrainedModel, inputs: Mapping[str, Tensor]) -> None:
    """Sets the pruning modes that are exact; the first ones are tried all together before any is tried alone."""
    kinds = {site.kind for site in parent.sites}
    # By kind as well, if there are several: the effect of one kind could hide an error of another.
    parts = [[s for s in parent.sites if s.kind == kind] for kind in sorted(kinds)] if len(kinds) > 1 else []
    if all(_trial(parent, inputs, part)[0] < CLEAR_SHARE for part in (*parts, parent.sites)):
        return
    groups: dict[Any, list[NeuronSite]] = {}  # sites in layers of one class share a pruning mode
    for site in parent.sites:
        layer = type(parent.model.get_submodule(site.name))
        groups.setdefault((site.kind, layer, site.pruning_modes), []).append(site)
    for part in groups.values():
        trials = []
        for pruning_mode in part[0].pruning_modes:
            parent.set_sites(with_pruning_modes(parent.sites, {site.key: pruning_mode.name for site in part}))
            trials.append((*_trial(parent, inputs, part), pruning_mode.name))
            if trials[-1][0] < CLEAR_SHARE:
                break
        least, failure, _ = min(trials)
        if least > LARGEST_SHARE:
            raise _refusal(parent, part[0], f"no pruning mode cuts them exactly ({failure})")
        # Of those with about the same rounding error, the one with the smallest modules.
        name = next(name for share, _, name in trials if share <= max(CLEAR_SHARE, ROUNDING_FACTOR * least))
        parent.set_sites(with_pruning_modes(parent.sites, {site.key: name for site in part}))


def _trial(
    parent: NeMoPreTrainedModel, inputs: Mapping[str, Tensor], sites: Sequence[NeuronSite], part: str | None = None
) -> tuple[float, str]:
    """Cuts about half of some sites' neurons (or only `part`); returns the error as a share of the masks' effect."""
    keep = random_keep(parent.sites, {site.key for site in sites if part is None or part in site.parts}, part)
    static = static_masks(parent.sites, keep)
    if not parent.nemo_config.hard_masks:
        generator = torch.Generator().manual_seed(1)
        static = {key: mask * (0.5 + 0.5 * torch.rand(mask.shape, generator=generator)) for key, mask in static.items()}
    ids = list(parent.config.names)
    # The last label before the first: a cut head shows whether it is the head.
    plan = ModulePlan([ids[-1], ids[0]], [], keep, static, 1.0, None, 0.5, {site.key: [] for site in parent.sites})
    read = partial(read_tensor, parent.model.state_dict())
    try:
        module = build_module(type(parent), CutSource.of_parent(parent), plan, read)
        module.to(parent.device)  # type: ignore[arg-type]
        check = check_equivalence(parent, module, plan.static, inputs)
    except EquivalenceError as error:
        return math.inf, first_line(error)
    if len(sites) == len(parent.sites) and part is None:
        parent.config.equivalence = asdict(check)
    # A mask without effect shows nothing; the status of the check then says so.
    wrong = max(0.0, check.difference - ROUNDING_SHARE * check.tolerance)
    share = wrong / check.effect if check.effect else math.inf if wrong else 0.0
    found = share, f"{check.difference:.1e} of {check.effect:.1e}"
    # Of attention, q and k are tried alone as well: v has a larger effect, which could hide an error of theirs.
    if part is None and all(isinstance(site, AttentionSite) for site in sites):
        return max(found, _trial(parent, inputs, sites, "query_key"))
    return found


def random_keep(sites: Sequence[NeuronSite], chosen: set[str], part: str | None = None) -> dict[str, dict[str, Tensor]]:
    """Draws about half of the `chosen` sites' neurons (or only of `part`), the same in each call, by site and part."""
    generator = torch.Generator().manual_seed(0)
    keep: dict[str, dict[str, Tensor]] = {}
    for site in sites:
        kept = {name: torch.rand(size, generator=generator) < 0.5 for name, size in site.parts.items()}
        if isinstance(site, AttentionSite):
            _close_heads(site, kept)
            if part == "query_key":  # every other one, in turn from head to head, so that no neighbours are closed
                order = torch.arange(site.parts[part])
                kept[part] = order % 2 != order // site.query_key_dims % 2
        whole = [name for name in kept if site.key not in chosen or part not in (None, name)]
        kept.update({name: torch.ones_like(kept[name]) for name in whole})
        keep[site.key] = {name: mask.nonzero().squeeze(-1) for name, mask in kept.items()}
    return keep


def _close_heads(site: AttentionSite, kept: dict[str, Tensor]) -> None:
    """Closes the first head, if there are several, and one dimension of each: a whole head's width shows nothing."""
    if site.key_value_heads > 1:
        kept["value"][: site.value_dim] = False
        if not site.is_rotary:
            kept["query_key"][: site.query_key_dims] = False
    for head in range(site.key_value_heads):
        kept["value"][head * site.value_dim + head % site.value_dim] = False
    for head in range(site.query_key_heads):
        kept["query_key"][head * site.query_key_dims + head % site.query_key_dims] = False


@torch.no_grad()
def _check_samples(parent: NeMoPreTrainedModel, inputs: Mapping[str, Tensor]) -> None:
    """Refuses models whose masks do nothing, or in which the mask of one sample reaches the logits of another."""
    samples = len(next(iter(inputs.values())))
    if samples == 1:
        return
    first = {site.kind: site for site in reversed(parent.sites)}
    is_masked = torch.arange(samples) == 0
    effects: dict[str, float] = {}
    for kind, static in _half_closed(parent):
        mixed = {key: torch.where(is_masked[:, None], mask, 1.0) for key, mask in static.items()}
        masked, opened, got = _answers(parent, inputs, static, parent.parent_masks().open_masks(), mixed)
        expected = torch.cat([masked[:1], opened[1:]])
        effect = difference(masked, opened, parent.task)
        effects[kind] = max(effects.get(kind, 0.0), effect)
        rounding = EQUIVALENCE_TOLERANCE * max(1.0, opened.abs().max().item())
        if not difference(got, expected, parent.task) <= max(LARGEST_SHARE * effect, rounding):  # also NaN
            raise _refusal(parent, first[kind], "the mask of one sample reaches the logits of another")
    # Sites whose pooled input mixes samples: the mask of one then depends on the others.
    given = on_device(parent, inputs)
    others = {name: torch.cat([value[:1], value[1:].flip(0)]) for name, value in given.items()}
    masks, changed = (
        parent(**batch, output_neuron_masks=True, return_dict=True).neuron_masks for batch in (given, others)
    )
    for site in parent.sites if masks else ():
        own = masks[site.key][0]
        if not (own - changed[site.key][0]).abs().max().item() <= POOLED_TOLERANCE * max(1.0, own.max().item()):
            raise _refusal(parent, site, "the mask of one sample depends on the others that it is pooled with")
    for kind, effect in effects.items():
        if effect == 0 and bool((opened != opened[:1]).any()):
            raise _refusal(parent, first[kind], "closing half of them leaves all logits as they are")


def _answers(parent: NeMoPreTrainedModel, inputs: Mapping[str, Tensor], *masks: Mapping[str, Tensor]) -> list[Tensor]:
    with exact_float32(parent) as (exact,):
        batch = on_device(exact, inputs)
        return [answers(exact(**batch, static_masks=static, return_dict=True)) for static in masks]


def _refusal(parent: NeMoPreTrainedModel, site: NeuronSite, reason: str) -> UnsupportedArchitectureError:
    other = sorted(parent.kinds - {site.kind})
    model_type = parent.model.config.model_type
    return UnsupportedArchitectureError(
        f"Got model type {model_type!r}, whose {site.kind} neurons in {site.name!r} can't be cut: {reason}. "
        + (f"Leave them whole with NeMoConfig(targets={other})." if other else "Choose another architecture.")
    )
