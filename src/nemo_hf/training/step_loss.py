"""The loss of a micro-batch in training: the task's, under module rehearsal in some steps, and the masks' terms."""

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nemo_hf.models.batches import select_samples
from nemo_hf.models.labels import group_indices, label_ids, labelled_cross_entropy, sample_groups, shares_group
from nemo_hf.pruning.plan import module_masks

from . import data, distributed, losses
from .assigned_modules import SIZES, own_norm_statistics, taught_loss, taught_samples
from .model_calls import MicroBatch, calls_of, check_own_loss, neuron_masks_of
from .relevance import OpenCounts, sparsity_pressure, steer_size

logger = logging.getLogger(__name__)

WATCHED_STEPS = 10  # first steps in which values of batches are looked at: the host has to wait for a GPU


def named_scalars(values: Mapping[str, float]) -> dict[str, float]:
    """Numbers as they are logged: under one prefix, by which trackers show them together."""
    return {f"nemo/{name}": value for name, value in values.items()}


def counted_items(labels: Tensor) -> Tensor:
    """Number of labels that count, as `Trainer` passes it to loss functions, of one micro-batch."""
    return labels.ne(-100).sum()


class StepLoss:
    """Computes the losses of a trainer's micro-batches, and collects what is logged and counted of them.

    Each training starts with a new one; evaluation leaves what it has collected alone.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._sums: dict[str, Any] = {}  # of logged terms, since the last log
        self._steps = 0  # micro-batches in them
        self._open_counts: OpenCounts | None = None  # of the current optimizer step
        self._group_of_label: Tensor | None = None  # (labels,)
        self._has_warned = False  # of a batch without two samples of a group
        self.is_counted = False  # whether the training step of this optimizer step moved the relevance
        self.micro_batch: MicroBatch | None = None  # while its loss is computed

    @property
    def warmup(self) -> float:
        """Share of the mask terms' weights that counts at this step."""
        state, ratio = self._trainer.state, self._trainer.nemo_config.warmup_ratio
        return min(1.0, float((state.global_step + 1) / (ratio * state.max_steps + 1)))

    @property
    def is_plain(self) -> bool:
        """Whether this step, of assigned masks, is one in which the network trains as a plain model does."""
        state: Any = self._trainer.state
        return bool(state.global_step < self._trainer.nemo_config.plain_ratio * state.max_steps)

    @property
    def group_of_label(self) -> Tensor:
        """Index of each label's group, shape (labels,)."""
        if self._group_of_label is None:
            self._group_of_label = group_indices(self._trainer.parent)
        return self._group_of_label

    def draws(self, what: str = "") -> random.Random:
        """Random choices of this optimizer step, equal in its micro-batches and processes."""
        trainer = self._trainer
        return random.Random(f"{trainer.args.seed} {trainer.state.global_step}{what}")  # noqa: S311 - no secrets

    def whole(
        self, compute_loss: Callable[..., Any], model: nn.Module, inputs: dict[str, Any], **kwargs: Any
    ) -> Tensor | tuple[Tensor, Any]:
        """Adds the terms of the masks to what `compute_loss` returns for a micro-batch."""
        trainer = self._trainer
        inputs, given, _, labels = self._read_batch(model, inputs)
        real = self._real_samples(labels, is_last=trainer.accelerator.gradient_state.sync_gradients)
        is_assigned = trainer.nemo_config.masks == "assigned"
        in_module, static = (None, {}) if is_assigned else self._rehearsal(labels)
        share, labelled = distributed.sample_weights(labels[:real], trainer.args, self.mean_over_processes)
        current = self.micro_batch = MicroBatch(real, share, labelled, in_module)
        try:
            with calls_of(model, static) as outputs:
                kwargs["num_items_in_batch"] = counted_items(labels)
                found = compute_loss(model, {**inputs, "labels": given}, **kwargs)
        finally:
            self.micro_batch = None
        task, *others = found if isinstance(found, tuple) else (found,)
        if current.has_own_loss:
            check_own_loss("a compute_loss of your own", trainer.parent)
        if is_assigned:
            loss = task + self._taught_module(model, inputs, outputs, labels, current)
        else:
            loss = task + self._mask_terms(neuron_masks_of(outputs, len(labels)), labels[:real], current)
        self._collect(loss_task=task)
        self._steps += 1
        return (loss, *others) if others else loss

    def task(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """Calls the model for the task loss alone, which it returns with the outputs."""
        inputs, given, targets, labels = self._read_batch(model, inputs)
        current = self.micro_batch or MicroBatch(self._real_samples(labels, is_last=True))
        current.has_own_loss = False
        outputs = model(**inputs, return_dict=True)
        return current.labelled_share * self._task_loss(outputs, targets, given, current), outputs

    def finish_step(self) -> None:
        """Moves the running relevance by the samples of an optimizer step, and the sparsity towards a size target."""
        trainer, counts = self._trainer, self._open_counts
        if counts is None:
            return
        counts.reduce(trainer.accelerator)
        counts.blend(trainer.state.global_step)
        self._open_counts, self.is_counted = None, True
        parent, config = trainer.parent, trainer.nemo_config
        if config.retention_target is not None and self.warmup >= 1:
            steer_size(parent.parent_masks(), config, trainer.state.max_steps)
        parent.config.relevance_source, parent.report = "running", None

    def take_means(self) -> dict[str, float]:
        """The means of the collected terms since this was last called; all processes must call it."""
        means = {name: self.mean_over_processes(total / self._steps).item() for name, total in self._sums.items()}
        self._sums, self._steps = {}, 0
        return {name: round(mean, 6) for name, mean in means.items()}

    def mean_over_processes(self, values: Tensor) -> Tensor:
        """The mean of a tensor of this process and those of the others."""
        mean: Tensor = self._trainer.accelerator.reduce(values.detach(), reduction="mean")
        return mean

    def _collect(self, **terms: Tensor) -> None:
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()

    def _read_batch(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, Any], Any, Tensor, Tensor]:
        is_watched = not model.training or self._trainer.state.global_step < WATCHED_STEPS
        return data.read_batch(self._trainer, inputs, is_watched)

    def _real_samples(self, labels: Tensor, is_last: bool) -> int:
        """Number of samples that are no fillers; all micro-batches of a step are read before its first one."""
        args, state = self._trainer.args, self._trainer.accelerator.gradient_state
        count = len(labels)
        return distributed.real_samples(count, state, args.process_index, args.world_size) if is_last else count

    def _task_loss(self, outputs: Any, targets: Tensor, given: Any, current: MicroBatch) -> Tensor:
        """Mean loss of a micro-batch's real samples; `given` are the labels as the batch holds them.

        A batch without real samples weighs nothing, but the mean over none would be NaN: one sample stands in.
        """
        trainer, config, in_module = self._trainer, self._trainer.nemo_config, current.in_module
        if current.real < len(targets):
            first = slice(max(1, current.real))
            outputs, targets, given = type(outputs)(logits=outputs.logits[first]), targets[first], given[first]
        has_several = trainer.parent.config.has_several_labels
        if trainer.compute_loss_func is not None:
            items = counted_items(label_ids(targets, has_several))
            own: Tensor = trainer.compute_loss_func(outputs, given, num_items_in_batch=items)
            return own
        if has_several:
            return losses.restricted_binary_cross_entropy(outputs.logits, targets, in_module)
        smoothing, weight = trainer.args.label_smoothing_factor, config.specificity_weight
        if in_module is None or weight == 0:
            return labelled_cross_entropy(outputs.logits, targets, smoothing)
        return losses.specific_cross_entropy(outputs.logits, targets, in_module, weight, smoothing)

    def _mask_terms(self, neuron_masks: dict[str, Tensor], labels: Tensor, current: MicroBatch) -> Tensor:
        """The weighted contrastive and sparsity term of a micro-batch, whose samples are counted for the relevance."""
        parent, config = self._trainer.parent, self._trainer.nemo_config
        self._open_counts = self._open_counts or OpenCounts(parent.parent_masks(), self.group_of_label)
        self._open_counts.add(neuron_masks, labels)
        masks, widths = losses.flatten_masks(neuron_masks)  # (batch, neurons)
        masks = masks[: len(labels)]
        contrast = self._contrast(masks, widths, sample_groups(labels, self.group_of_label, len(parent.config.groups)))
        sparsity = current.share * losses.sparsity_loss(masks, widths)
        retained = current.share * losses.sparsity_loss(masks > 0, widths)
        self._collect(loss_contrastive=contrast, neuron_retention_rate=retained)
        pressure = sparsity_pressure(parent.parent_masks(), config)
        terms: Tensor = config.contrastive_weight * contrast + pressure * sparsity
        return self.warmup * terms

    def _taught_module(
        self, model: nn.Module, inputs: dict[str, Any], outputs: Sequence[Any], labels: Tensor, current: MicroBatch
    ) -> Tensor:
        """Loss of the module of random groups on half of a micro-batch, taught by the whole network."""
        trainer, self.is_counted = self._trainer, True
        groups = trainer._rehearsed_groups()
        if groups is None or self.is_plain or trainer.parent.config.relevance_source != "assigned":
            return torch.zeros((), device=labels.device)
        logits = next((output.logits for output in outputs if len(output.logits) == len(labels)), None)
        if logits is None:
            raise ValueError(
                "Got a compute_loss that does not call the model on a whole batch; expected outputs = model(**inputs) "
                "in it, by which modules are taught. Call it so, or pass NeMoTrainer a compute_loss_func instead."
            )
        in_module = torch.isin(self.group_of_label, groups)
        chosen = taught_samples(labels[: current.real], in_module)
        threshold = 1 - (1 - trainer.nemo_config.relevance_threshold) * self.draws("size").choice(SIZES)
        static = module_masks(trainer.parent.parent_masks(), groups, threshold)
        with own_norm_statistics(trainer.parent.model):
            found = model(**select_samples(inputs, chosen), static_masks=static, return_dict=True)
        specificity = trainer.nemo_config.specificity_weight
        loss = current.share * taught_loss(found.logits, logits[chosen], labels[chosen], in_module, specificity)
        self._collect(loss_module=loss)
        return loss

    def _contrast(self, masks: Tensor, widths: Sequence[int], groups: Tensor) -> Tensor:
        """The objective over masks of shape (batch, neurons), compared over all processes if the options say so."""
        trainer, config, gathered = self._trainer, self._trainer.nemo_config, None
        is_alone = trainer.args.world_size == 1
        if config.gather_across_devices and not is_alone:
            gathered = distributed.gather_masks(masks, groups, trainer._train_batch_size)
        if trainer.state.global_step < WATCHED_STEPS and not self._has_warned:
            everyone = groups if gathered is None else gathered.groups[gathered.is_sample]
            self._has_warned = not bool(shares_group(everyone).triu(1).any())
            if self._has_warned:
                logger.warning(
                    "No two of the %d samples of a batch are of one label group, so the contrastive loss is 0. Raise "
                    "per_device_train_batch_size, or use larger label groups.", len(everyone),
                )  # fmt: skip
        options = (config.objective, config.temperature, config.coupling_weight, gathered)
        return losses.mask_objective(masks, widths, groups, *options, None if is_alone else self.mean_over_processes)

    def _rehearsal(self, labels: Tensor) -> tuple[Tensor | None, dict[str, Any]]:
        """Marks the labels of the module that this step rehearses, (labels,), and gives its static masks as inputs."""
        groups = self._trainer._rehearsed_groups()
        if groups is None:
            return None, {}
        config = self._trainer.nemo_config
        in_module = torch.isin(self.group_of_label, groups)
        static_masks = module_masks(self._trainer.parent.parent_masks(), groups, config.relevance_threshold)
        given: dict[str, Any] = {"static_masks": static_masks}
        # With several labels a module must say no to samples of none of its own, so it sees all of them.
        if labels.ndim == 1 and config.specificity_weight == 0:
            given["static_samples"] = in_module[labels.clamp(min=0)] & (labels >= 0)
        return in_module, given
