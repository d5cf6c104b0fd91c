"""`NeMoTrainer`: `transformers.Trainer` that trains neuron masks with the model."""

import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import PreTrainedModel, TrainingArguments, set_seed
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from nemo_hf.auto_classes import NeMoClassifier
from nemo_hf.config import LabelLike, NeMoConfig
from nemo_hf.evaluation.rejection import calibrate_rejection
from nemo_hf.evaluation.report import ModuleReport, evaluate_module, measure_modularity
from nemo_hf.hub.provenance import training_record
from nemo_hf.models.configuration import SEVERAL_LABELS
from nemo_hf.models.label_checks import check_label_shape
from nemo_hf.models.label_groups import group_indices, sample_groups, shares_group
from nemo_hf.models.pruning_modes import make_parent
from nemo_hf.neurons.masks import NeuronMasks
from nemo_hf.pruning.plan import module_masks

from .data import check_columns, check_labels, column_values, groups_from_column
from .device_trainer import DeviceTrainer, refuse_data_parallel, refuse_empty_weights
from .distributed import gather_masks, mean_over_processes, processes, share_of_samples
from .losses import (
    cross_entropy,
    mask_objective,
    restricted_binary_cross_entropy,
    site_masks,
    sparsity_loss,
    specific_cross_entropy,
)
from .rehearsal import draw_groups
from .relevance import OpenCounts, compute_relevance, sparsity_pressure, steer_size, warn_of_one_core

logger = logging.getLogger(__name__)

MASK_LEARNING_RATE_FACTOR = 3

WATCHED_STEPS = 10
"""First steps in which batches without any pair of a group are looked for: it needs the host to wait."""

MODULARITY_SAMPLES = 1000
"""Samples of the evaluation data over which cohesion and coupling are measured at most."""


class NeMoTrainer(DeviceTrainer):
    """Trains a classification model together with neuron masks, in place of `transformers.Trainer`.

    The plain model becomes part of a parent (`trainer.model`), from which modules are cut. Training adds to
    the cross-entropy a contrastive and a sparsity term over the masks and, in a share of the steps, runs the
    samples of a random set of groups as the module for these groups would (module rehearsal). The log gets
    `loss_task`, `loss_contrastive` and `neuron_retention_rate`; evaluation gets cohesion and coupling.

    Args:
        model: A plain model, or a parent to train on.
        args: `TrainingArguments`.
        data_collator: As in `Trainer`; all arguments that are not listed here likewise.
        train_dataset: Training data with labels.
        *trainer_args: Further positional arguments of `Trainer`.
        nemo_config: The options; `None` takes the defaults, or those of the parent.
        relevance_dataset: Finite data without augmentation on which the exact relevance is counted after
            training; `None` takes `train_dataset`.
        **trainer_kwargs: Further arguments of `Trainer`.

    Raises:
        ValueError: If the data, the model or the options can't work together; the message says what to do.

    References:
        NeMo (arXiv 2508.11348), modularizing-while-training; rehearsal and hard masks are ours.
    """

    # Every term is a mean over the samples of a micro-batch (transformers 5.23, Trainer.training_step).
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        *trainer_args: Any,
        nemo_config: NeMoConfig | None = None,
        relevance_dataset: Any = None,
        **trainer_kwargs: Any,
    ) -> None:
        refuse_empty_weights()
        refuse_data_parallel(model)
        self._given_config = nemo_config
        self._relevance_dataset = train_dataset if relevance_dataset is None else relevance_dataset
        check_columns(train_dataset, is_counted=self._relevance_dataset is train_dataset)
        self._training_data = train_dataset
        set_seed(args.seed if args is not None else TrainingArguments.seed)  # the generators' weights are drawn here
        parent = None if model is None else self._as_parent(model)
        super().__init__(parent, args, data_collator, train_dataset, *trainer_args, **trainer_kwargs)
        chooses = self.nemo_config.specificity_weight > 0 or self.parent.config.has_several_labels
        if self.compute_loss_func is not None and self.nemo_config.rehearsal_probability > 0 and chooses:
            raise ValueError(
                "Got compute_loss_func together with module rehearsal; expected one of them, since which answers count "
                "depends on the rehearsed module here. Set NeMoConfig(rehearsal_probability=0)."
            )
        self._attach_processor(self.parent)
        self._open_counts: OpenCounts | None = None
        self._groups: Tensor | None = None
        self._logged: dict[str, Tensor] = {}
        self._logged_steps = 0
        self._warned_no_positive = False

    @property
    def parent(self) -> NeMoClassifier:
        """The parent in training, without the wrappers of distributed training."""
        if isinstance(self.model, NeMoClassifier):  # unwrapping walks through all layers
            return self.model
        model = self.accelerator.unwrap_model(self.model)
        assert isinstance(model, NeMoClassifier)
        return model

    @property
    def _masks(self) -> NeuronMasks:
        masks = self.parent.masks
        assert masks is not None
        return masks

    @property
    def nemo_config(self) -> NeMoConfig:
        """The options of this run."""
        return self.parent.nemo_config

    @property
    def _group_of_label(self) -> Tensor:
        if self._groups is None or self._groups.device != self.parent.device:
            self._groups = group_indices(self.parent)
        return self._groups

    def _attach_processor(self, parent: NeMoClassifier) -> None:
        processor = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if processor is not None:
            parent.attach_processor(processor)

    def call_model_init(self, trial: Any = None) -> NeMoClassifier:
        """Builds the plain model and attaches masks to it."""
        model = super().call_model_init(trial)
        assert isinstance(model, PreTrainedModel)
        parent = self._as_parent(model)
        if hasattr(self, "processing_class"):  # not yet within Trainer.__init__
            self._attach_processor(parent)
        return parent

    def _as_parent(self, model: PreTrainedModel) -> NeMoClassifier:
        config = self._given_config
        names = {int(index): str(name) for index, name in (model.config.id2label or {}).items()}
        labels = column_values(self._training_data, ("label", "labels", "label_ids"))
        if labels is not None:
            check_labels(labels, names, model.config.problem_type == SEVERAL_LABELS)
        if isinstance(model, NeMoClassifier):
            if not model.is_parent:
                raise ValueError(
                    "Got a module to train with masks; expected a plain model or a parent. "
                    "Fine-tune the module with transformers.Trainer."
                )
            if config is not None:
                model.set_nemo_config(config)
            return model
        config = config or NeMoConfig()
        groups = None
        if config.group_column is not None:
            has_several = model.config.problem_type == SEVERAL_LABELS
            groups = groups_from_column(self._training_data, config.group_column, labels, names, has_several)
        parent = make_parent(model, config, groups)
        assert isinstance(parent, NeMoClassifier)
        return parent

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            names = inspect.signature(self.parent.model.forward).parameters
            columns: Any = self._signature_columns  # declared as None in transformers
            self._signature_columns = list(dict.fromkeys([*columns, *names]))  # type: ignore[assignment]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Creates the optimizer; the generators' parameters get `NeMoConfig.mask_learning_rate`."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        rate = self.nemo_config.mask_learning_rate
        if rate is None:
            rate = MASK_LEARNING_RATE_FACTOR * self.args.learning_rate
        assert self.parent.masks is not None
        trained = self.parent if model is None else model
        masks = {id(p) for name, p in trained.named_parameters() if ".generator." in name}
        for group in list(optimizer.param_groups):
            chosen = [p for p in group["params"] if id(p) in masks]
            if chosen:
                group["params"] = [p for p in group["params"] if id(p) not in masks]
                optimizer.add_param_group({**group, "params": chosen, "lr": rate})
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Computes the training loss, or in eval mode the task loss alone; as in `Trainer`."""
        inputs = dict(inputs)
        labels = inputs.pop("labels", None)
        if labels is None:
            raise ValueError(
                f"Got a batch with {sorted(inputs)}; expected 'labels' in it. Add a label column to the data."
            )
        check_label_shape(labels, self.parent.config.has_several_labels)
        if not model.training:
            outputs = model(**inputs)
            loss = self._task_loss(outputs, labels, None, self._real_samples(len(labels), is_training=False))
            return (loss, outputs) if return_outputs else loss
        rehearsed, in_module = self._rehearsed_groups(), None
        if rehearsed is not None:
            in_module = torch.isin(self._group_of_label, rehearsed)
            inputs["static_masks"] = module_masks(self._masks, rehearsed, self.nemo_config.relevance_threshold)
            # With several labels a module must say no to samples of none of its own, so it sees all of them.
            if labels.ndim == 1 and self.nemo_config.specificity_weight == 0:
                inputs["static_samples"] = in_module[labels]
        outputs = model(**inputs)
        kept = self._real_samples(len(labels), is_training=True)
        share = share_of_samples(kept, labels.device)
        loss = share * self._task_loss(outputs, labels, in_module, kept)
        self._count_open({key: mask[:kept] for key, mask in outputs.neuron_masks.items()}, labels[:kept])
        total = loss + self._mask_terms(outputs.neuron_masks, labels, kept, loss, share)
        return (total, outputs) if return_outputs else total

    def _task_loss(self, outputs: Any, labels: Tensor, in_module: Tensor | None, kept: int) -> Tensor:
        """Loss of the first `kept` answers; `in_module` tells the labels of the module that is rehearsed, if any."""
        if kept < len(labels):  # of none the mean would be no number: it weighs nothing then
            outputs, labels = type(outputs)(logits=outputs.logits[: max(1, kept)]), labels[: max(1, kept)]
        if self.compute_loss_func is not None:
            loss: Tensor = self.compute_loss_func(outputs, labels, num_items_in_batch=None)
            return loss
        if self.parent.config.has_several_labels:
            return restricted_binary_cross_entropy(outputs.logits, labels, in_module)
        smoothing, weight = self.args.label_smoothing_factor, self.nemo_config.specificity_weight
        if in_module is None or weight == 0:
            return cross_entropy(outputs.logits, labels, smoothing)
        return specific_cross_entropy(outputs.logits, labels, in_module, weight, smoothing)

    def _mask_terms(
        self, neuron_masks: Mapping[str, Tensor], labels: Tensor, kept: int, task_loss: Tensor, share: Tensor | float
    ) -> Tensor:
        config, groups = self.nemo_config, sample_groups(self.parent, labels[:kept], self._group_of_label)
        masks = [mask[: max(1, kept)] for mask in site_masks(neuron_masks)]
        own = [mask[:kept] for mask in masks]
        gathered, everyone = None, groups
        if processes() > 1 and config.gather_across_devices:
            gathered = gather_masks(own, groups, self._train_batch_size)
            everyone = gathered.groups
        watches = self.state.global_step < WATCHED_STEPS and not self._warned_no_positive
        if watches and not bool(shares_group(everyone).triu(1).any()):
            self._warned_no_positive = True
            logger.warning(
                "Got a batch of %d samples of %d groups; expected two of one group, without which the contrastive "
                "loss is 0. Raise per_device_train_batch_size, or use larger label groups.",
                len(everyone),
                len(everyone),
            )
        options = (config.temperature, config.coupling_weight, gathered, mean_over_processes)
        contrast = mask_objective(config.objective, own, groups, *options)
        retained = share * torch.stack([(mask > 0).float().mean() for mask in masks]).mean()
        self._log_later(loss_task=task_loss, loss_contrastive=contrast, neuron_retention_rate=retained)
        strength = self._warmup()
        sparsity = sparsity_pressure(self._masks, config) * share * sparsity_loss(masks)
        return strength * (config.contrastive_weight * contrast + sparsity)

    def _warmup(self) -> float:
        """Share of the mask terms' weights that counts at this step."""
        steps = self.nemo_config.warmup_ratio * self.state.max_steps
        return min(1.0, (self.state.global_step + 1) / (steps + 1))

    def _rehearsed_groups(self) -> Tensor | None:
        """Draws the groups of this optimizer step, equal for its micro-batches and on all ranks, or none."""
        config, groups = self.nemo_config, self.parent.config.groups
        if self._warmup() < 1:
            return None
        chosen = draw_groups(groups, config.rehearsal_probability, f"{self.args.seed} {self.state.global_step}")
        return None if chosen is None else torch.tensor(chosen, device=self.parent.device)

    def _count_open(self, neuron_masks: Mapping[str, Tensor], labels: Tensor) -> None:
        if self._open_counts is None:
            self._open_counts = OpenCounts(self._masks, self._group_of_label)
        self._open_counts.add(neuron_masks, labels)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Runs a micro-batch; the last one of an optimizer step moves the running relevance."""
        loss: Tensor = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients and self._open_counts is not None:
            for tensor in self._open_counts.tensors():
                tensor.copy_(self.accelerator.reduce(tensor, reduction="sum"))
            self._open_counts.blend(self.state.global_step)
            self._open_counts.reset()
            if self.nemo_config.retention_target is not None and self._warmup() >= 1:
                steer_size(self._masks, self.nemo_config, self.state.max_steps)
            self.parent.config.relevance_source = "running"
        return loss

    def _log_later(self, **values: Tensor) -> None:
        for name, value in values.items():
            self._logged[name] = self._logged.get(name, torch.zeros_like(value.detach())) + value.detach()
        self._logged_steps += 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs as `Trainer` does; with the training loss go the means of its terms since the last time."""
        if "loss" in logs and self._logged_steps:
            for name, total in self._logged.items():
                logs[name] = round(mean_over_processes(total / self._logged_steps).item(), 6)
            logs["dead_neuron_rate"] = round(self._masks.dead_share(), 6)
            self._logged, self._logged_steps = {}, 0
        super().log(logs, start_time)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trains as `Trainer` does, then counts the exact relevance of the model that it ends with."""
        self._open_counts = None
        self._logged, self._logged_steps = {}, 0
        samples = len(self._training_data) if hasattr(self._training_data, "__len__") else None
        base_model = (self.parent.config.training or {}).get("base_model") or self.parent.model.name_or_path
        self.parent.config.training = training_record(self.args, base_model, samples)
        result = super().train(*args, **kwargs)
        self.update_relevance()
        warn_of_one_core(self._masks, self.nemo_config)
        return result

    def update_relevance(self) -> None:
        """Replaces the parent's relevance by the exact one over `relevance_dataset`."""
        batches = self._loader(self._relevance_dataset, is_shared=True)
        compute_relevance(self.parent, batches, self.accelerator, show_progress=not self.args.disable_tqdm)

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluates as `Trainer` does; adds cohesion and coupling over at most 1,000 samples."""
        output: EvalLoopOutput = super().evaluation_loop(dataloader, description, *args, **kwargs)
        if output.metrics is None or description != "Evaluation":
            return output
        self.parent.report = {"metrics": output.metrics}  # saved with the model until it trains on
        prefix = kwargs.get("metric_key_prefix", args[2] if len(args) > 2 else "eval")
        dataset = dataloader.dataset
        if hasattr(dataset, "__len__"):  # spread, since data are often sorted by label
            indices = range(0, len(dataset), -(-len(dataset) // MODULARITY_SAMPLES))
            dataset = dataset.select(indices) if isinstance(dataset, datasets.Dataset) else Subset(dataset, indices)
        batches = (self._prepare_inputs(batch) for batch in self._loader(dataset, is_shared=False))
        measured = measure_modularity(self.parent, batches, MODULARITY_SAMPLES)
        output.metrics.update({f"{prefix}_{name}": value for name, value in measured.items() if value is not None})
        return output

    def extract_module(self, labels: LabelLike | Sequence[LabelLike], **kwargs: Any) -> NeMoClassifier:
        """Cuts a module out of the parent: see `parent.extract_module`, to which all arguments go."""
        return self._whole_parent().extract_module(labels, **kwargs)

    def evaluate_module(
        self, labels: LabelLike | Sequence[LabelLike], eval_dataset: Any = None, **kwargs: Any
    ) -> ModuleReport:
        """Measures the module for some labels beside its controls, on the evaluation data.

        Args:
            labels: Label ids, label names or group names.
            eval_dataset: Data in place of the trainer's `eval_dataset`.
            **kwargs: Options of `evaluate_module`.

        Returns:
            The report.
        """
        batches = self._loader(self._one_dataset(eval_dataset), is_shared=False)
        return evaluate_module(
            self._whole_parent(), labels, batches, show_progress=not self.args.disable_tqdm, **kwargs
        )

    def calibrate_rejection(
        self, module: NeMoClassifier, eval_dataset: Any = None, accepted: float = 0.95
    ) -> dict[str, float]:
        """Calibrates a module on the evaluation data, or other data: see `nemo_hf.calibrate_rejection`."""
        batches = self._loader(self._one_dataset(eval_dataset), is_shared=False)
        return calibrate_rejection(module, batches, accepted, show_progress=not self.args.disable_tqdm)
