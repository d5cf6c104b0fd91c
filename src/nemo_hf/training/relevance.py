"""Relevance, the share of a group's samples that open each neuron: counted exactly, or as a running average."""

import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from nemo_hf.config import NeMoConfig
from nemo_hf.models.base import NeMoPreTrainedModel
from nemo_hf.models.batches import checked_batch
from nemo_hf.models.finiteness import check_finite, check_outputs
from nemo_hf.models.labels import group_indices, group_membership
from nemo_hf.neurons.assignment import assign_neurons
from nemo_hf.neurons.masks import NeuronMasks
from nemo_hf.neurons.trial_calls import evaluating
from nemo_hf.pruning.plan import RELEVANCE_SCALE, is_relevant
from nemo_hf.pruning.scores import activity_factors

from .distributed import in_step, is_sharded, raise_together, whole_copy

logger = logging.getLogger(__name__)

STEERING = 8.0  # largest change of the logarithm of the sparsity weight over a training with a size target
BRAKE = 0.1  # how far below the size target, relative to it, the sparsity weight has faded to 0
ONE_CORE = 0.95  # share of the groups that keep a kept neuron, on average, above which modules hardly differ
RUNNING_WINDOW = 64  # samples of a group over which the running relevance averages, roughly


class OpenCounts:
    """Numbers of samples that open a neuron, by group and neuron; `group_of_label` has shape (labels,)."""

    def __init__(self, masks: NeuronMasks, group_of_label: Tensor) -> None:
        self._masks = list(masks.site_masks())
        self._group_of_label = group_of_label
        self._label_ids = torch.arange(len(group_of_label), device=group_of_label.device)
        self._neurons = [mask.site.neurons for mask in self._masks]
        zeros, groups, width = group_of_label.float().new_zeros, len(self._masks[0].relevance), sum(self._neurons)
        self.samples, self.labels = zeros(groups), zeros(len(group_of_label))
        self.opened, self.values = zeros(groups, width), zeros(groups, 0 if self._masks[0].mean_mask is None else width)

    @torch.no_grad()
    def add(self, neuron_masks: Mapping[str, Tensor], labels: Tensor) -> None:
        """Counts a batch's first samples, as many as `label_ids`, whose masks have shape (batch, calls, neurons)."""
        own = [neuron_masks[mask.site.key][: len(labels)] for mask in self._masks]
        member = group_membership(labels, self._group_of_label, len(self.samples)).T.to(own[0].dtype)
        self.samples += member.sum(-1)
        self.labels += (labels[:, None] == self._label_ids if labels.ndim == 1 else labels).sum(0)
        self._sum(own, member)

    def _sum(self, neuron_masks: Sequence[Tensor], member: Tensor) -> None:
        """Counts the neurons that soft masks open in any call; `member` has shape (groups, batch)."""
        soft = torch.cat([masks.amax(1) for masks in neuron_masks], -1)
        self.opened += member @ (soft > 0).to(soft.dtype)
        if self.values.numel():
            self.values += member @ soft

    def reduce(self, accelerator: Any) -> None:
        """Adds up the counts of all processes."""
        for counts in (self.samples, self.labels, self.opened, self.values):
            if counts.numel():
                counts.copy_(accelerator.reduce(counts, reduction="sum"))

    def write(self, parent: NeMoPreTrainedModel) -> None:
        """Replaces the relevance of a parent by the counted shares."""
        parent.config.relevance_source = "exact"
        total = self.samples.clamp(min=1)[:, None]
        self._store((self.opened / total * RELEVANCE_SCALE).round(), torch.ones_like(self.samples, dtype=torch.bool))
        means = (self.values / total).split(self._neurons, -1) if self.values.numel() else []
        for mask, mean in zip(self._masks, means, strict=False):
            assert mask.mean_mask is not None
            mask.mean_mask.copy_(mean)

    def blend(self, step: int) -> None:
        """Moves the masks' relevance towards the counted shares, of the groups that were counted.

        A sample weighs 1/`RUNNING_WINDOW`; c samples at once weigh as much as c one after another. Changes below the
        stored 1/255 are rounded at random, with the optimizer step as seed: all processes and a resumed run agree.
        """
        share = self.opened / self.samples.clamp(min=1)[:, None]
        weight = 1 - (1 - 1 / RUNNING_WINDOW) ** self.samples[:, None]
        before = torch.cat([mask.relevance for mask in self._masks], -1).float() / RELEVANCE_SCALE
        after = before + weight * (share - before)
        noise = torch.rand(after.shape, generator=torch.Generator(after.device).manual_seed(step), device=after.device)
        self._store((after * RELEVANCE_SCALE + noise).floor().clamp(0, RELEVANCE_SCALE), self.samples > 0)

    def _store(self, relevance: Tensor, groups: Tensor) -> None:
        for mask, part in zip(self._masks, relevance.to(torch.uint8).split(self._neurons, -1), strict=True):
            mask.relevance.copy_(torch.where(groups[:, None], part, mask.relevance))


class ActivitySums(OpenCounts):
    """Sums of what neurons do for the samples of each group, by which they are assigned."""

    def _sum(self, neuron_masks: Sequence[Tensor], member: Tensor) -> None:
        """Adds what `AssignedMask` measured."""
        self.opened += member @ torch.cat([squares.sum(1) for squares in neuron_masks], -1)

    def write(self, parent: NeMoPreTrainedModel) -> None:
        """Assigns the neurons of a parent to the groups that have samples."""
        config, seen = parent.nemo_config, self.samples.cpu() > 0
        assert config.retention_target is not None
        whole: Any = whole_copy(parent) if is_sharded(parent) else parent  # type: ignore[arg-type]
        means = (self.opened / self.samples.clamp(min=1)[:, None]).split(self._neurons, -1)
        sites = [mask.site for mask in self._masks]
        scores = {
            site.key: mean.double().cpu()[seen] * activity_factors(whole.model, site)
            for site, mean in zip(sites, means, strict=True)
        }
        assigned = assign_neurons(sites, scores, config.retention_target, config.core_share)
        for mask in self._masks:
            table = torch.zeros_like(mask.relevance, device="cpu")
            table[seen] = assigned[mask.site.key]
            mask.relevance.copy_(table)
        parent.config.relevance_source = "assigned"


def has_assignment(masks: NeuronMasks) -> bool:
    """Whether some group does without a neuron; masks start with all neurons for all groups."""
    return any(int(table.min()) < RELEVANCE_SCALE for table in masks.relevance().values())


def forget_assignment(masks: NeuronMasks) -> None:
    """Gives all groups all neurons again, as masks start."""
    for table in masks.relevance().values():
        table.fill_(RELEVANCE_SCALE)


def start_relevance(parent: NeMoPreTrainedModel, unseen: Collection[int]) -> None:
    """Closes all neurons of groups that training has no sample of: rehearsal, size and evaluation leave them out."""

    def groups(labels: Collection[int]) -> set[int]:
        return {index for index, own in enumerate(parent.config.groups.values()) if set(own) <= set(labels)}

    closed = groups(unseen)
    reopened = groups(parent.config.unseen_labels or ()) - closed
    is_assigned = parent.nemo_config.masks == "assigned"
    for mask in parent.parent_masks().site_masks() if not is_assigned else ():
        mask.relevance[sorted(closed)] = 0
        mask.relevance[sorted(reopened)] = RELEVANCE_SCALE
    note_unseen(parent, unseen)


def note_unseen(parent: NeMoPreTrainedModel, unseen: Collection[int]) -> None:
    """Records the labels without a sample, and warns of them."""
    parent.config.unseen_labels = sorted(unseen) or None
    if unseen:
        names = [parent.config.names[index] for index in sorted(unseen)]
        logger.warning(
            "The data have no sample of %d of %d labels: %s. A label group without samples has no module until "
            "compute_relevance counts some.",
            *(len(names), len(parent.config.names), names[:12]),
        )


def _kept(masks: NeuronMasks, config: NeMoConfig) -> tuple[Tensor, Tensor]:
    """1 for the neurons that the module of each group keeps, 0 for others, shape (groups, neurons).

    With it the number of groups over that of groups that open any neuron, a scalar: the others have no sample.
    """
    tables = list(masks.relevance().values())
    kept = torch.cat([is_relevant(relevance, config.relevance_threshold) for relevance in tables], -1).float()
    is_open = torch.stack([relevance.amax(-1) > 0 for relevance in tables]).any(0)
    return kept, len(kept) / is_open.sum().clamp(min=1)


def warn_of_one_core(masks: NeuronMasks, config: NeMoConfig) -> None:
    """Warns if all groups keep nearly the same neurons although the contrastive term was to separate them."""
    if config.masks == "assigned":
        return
    kept, scale = _kept(masks, config)
    users = kept.mean(0) * scale
    shared = users[users > 0].mean().nan_to_num(0.0).item()
    if shared > ONE_CORE and config.contrastive_weight > 0 and len(kept) > 1:
        logger.warning(
            "All label groups keep nearly the same neurons (%.0f %% of the groups share a kept neuron on average), so "
            "modules hardly differ in theirs. Train longer, or raise contrastive_weight (%g now).",
            *(100 * shared, config.contrastive_weight),
        )


def size_over_target(masks: NeuronMasks, config: NeMoConfig) -> Tensor:
    """Relative excess in size of the modules of one group on average: kept / wanted neurons - 1, a scalar."""
    assert config.retention_target is not None
    # A weight between two groups of channels stays if both its channels do.
    target = config.retention_target
    sites = [mask.site for mask in masks.site_masks()]
    wanted = sum((math.sqrt(target) if site.kind == "conv" else target) * site.neurons for site in sites)
    kept, scale = _kept(masks, config)
    return kept.mean() * scale / (wanted / sum(site.neurons for site in sites)) - 1


def steer_size(masks: NeuronMasks, config: NeMoConfig, steps: int) -> None:
    """Moves the sparsity weight to meet the size target; `steps` is the number of optimizer steps of the training."""
    error = size_over_target(masks, config)
    masks.steer(error.clamp(-1, 1) * STEERING / max(1.0, (1 - config.warmup_ratio) * steps))


def sparsity_pressure(masks: NeuronMasks, config: NeMoConfig) -> Tensor | float:
    """The sparsity weight of this step, as steered so far where there is a size target.

    It fades to 0 below the target: a neuron that is closed for every sample gets no gradient to open again.
    """
    if config.retention_target is None:
        return config.sparsity_weight
    brake = (1 + size_over_target(masks, config) / BRAKE).clamp(0, 1)
    return config.sparsity_weight * masks.sparsity_factor * brake


def compute_relevance(
    parent: NeMoPreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    accelerator: Any = None,
    show_progress: bool = True,
) -> None:
    """Replaces a parent's relevance by the exact one, counted over a data set in eval mode.

    With `NeMoConfig(masks="assigned")` it assigns the neurons, by what they do for the samples of each group, anew
    unless modules are trained with those that were assigned (`plain_ratio` below 1).

    Other threads may classify with the parent meanwhile, but not train it or cut modules out of it.

    Args:
        parent: The parent; its masks' `relevance` is written. Its report is dropped: it was measured before.
        batches: Batches of model inputs with `labels`, of the training data without augmentation.
        accelerator: An `accelerate.Accelerator` whose processes each pass a share of the data, or `None`.
        show_progress: Whether to show a progress bar.

    Raises:
        ValueError: If `parent` is a module, a batch has no labels or other ones, no sample has a label, or weights or
            logits are not finite. Labels without a sample are warned about; of their groups no module can be cut.
    """
    if parent.masks is None:
        raise ValueError("Got a module; expected a parent. Load the parent that the module was cut from.")
    is_assigned = parent.nemo_config.masks == "assigned"
    if is_assigned and parent.nemo_config.trains_modules and has_assignment(parent.masks):
        return
    check_finite(parent)
    counts: OpenCounts = (ActivitySums if is_assigned else OpenCounts)(parent.masks, group_indices(parent))
    with parent.masks.measuring():
        _count(parent, batches, counts, accelerator, show_progress)
    counts.write(parent)
    parent.report = None
    note_unseen(parent, [index for index, count in enumerate(counts.labels.tolist()) if not count])


def _count(
    parent: NeMoPreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    counts: OpenCounts,
    accelerator: Any,
    show_progress: bool,
) -> None:
    """Runs the parent in eval mode over all batches, whose neuron masks are counted, in all processes together."""
    seen, names = 0, list(parent.config.names.values())
    failed: Exception | None = None
    try:
        with evaluating(parent):
            batches = tqdm(batches, desc="Relevance", disable=not show_progress)
            for batch, is_counted in in_step(batches, parent):
                inputs, labels = checked_batch(parent, batch)
                outputs = parent(**inputs, output_neuron_masks=True, return_dict=True)
                numbers = range(seen, seen + len(labels))
                check_outputs(parent, inputs, outputs.logits, names, numbers, outputs.neuron_masks)
                if is_counted:
                    counts.add(outputs.neuron_masks, labels)
                    seen += len(labels)
    except Exception as error:
        if accelerator is None or is_sharded(parent):
            raise
        failed = error
    if accelerator is not None:
        raise_together(failed, accelerator)  # or the other processes would wait for this one for ever
        counts.reduce(accelerator)
    if not bool(counts.labels.any()):
        raise ValueError("Got data without a sample of any label; expected at least one. Pass data with labels.")
