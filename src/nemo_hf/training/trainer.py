"""`NeMoTrainer`: `transformers.Trainer` that trains a classifier together with its neuron masks."""

import inspect
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import TrainOutput

from nemo_hf.auto_classes import NeMoClassifier
from nemo_hf.config import LabelLike, NeMoConfig
from nemo_hf.evaluation.rejection import calibrate_rejection, inputs_and_labels
from nemo_hf.evaluation.report import ModuleReport, evaluate_module, measure_modularity
from nemo_hf.hub.provenance import training_record
from nemo_hf.hub.publish import CardOptions
from nemo_hf.models.configuration import SEVERAL_LABELS
from nemo_hf.models.finiteness import check_finite, check_training
from nemo_hf.models.labels import group_indices, sample_groups, shares_group
from nemo_hf.models.pruning_modes import make_parent
from nemo_hf.neurons.masks import NeuronMasks
from nemo_hf.pruning.plan import module_masks

from . import distributed, hub_pushes, losses
from .data import LABEL_COLUMNS, check_columns, check_labels, column_values, groups_from_column
from .relevance import OpenCounts, compute_relevance, sparsity_pressure, steer_size, warn_of_one_core

logger = logging.getLogger(__name__)

MASK_LEARNING_RATE_FACTOR = 3
WATCHED_STEPS = 10  # first steps in which batches are searched for pairs of a group: the host has to wait for it
MODULARITY_SAMPLES = 1000  # most samples over which cohesion and coupling are measured


@dataclass
class TrainingState:
    """What training steps collect; each training starts with a new one, and evaluation leaves it alone."""

    sums: dict[str, Any] = field(default_factory=dict)  # of logged terms, since the last log
    steps: int = 0  # micro-batches in `sums`
    open_counts: OpenCounts | None = None  # of the current optimizer step
    group_of_label: Tensor | None = None  # (labels,)
    has_warned: bool = False  # of a batch without two samples of a group


class _TrainingStart(TrainerCallback):
    """Starts a new state and records how the parent is trained, once model and arguments are final (in trials, too)."""

    def __init__(self, trainer: "NeMoTrainer") -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        self.trainer._run = TrainingState()
        check_finite(self.trainer.parent)
        parent, data = self.trainer.parent, self.trainer._training_data
        base_model = (parent.config.training or {}).get("base_model") or parent.model.name_or_path
        parent.config.training = training_record(args, base_model, len(data) if hasattr(data, "__len__") else None)
        parent.report = None


class NeMoTrainer(Trainer):
    """Trains a classification model together with neuron masks, in place of `transformers.Trainer`.

    The plain model becomes part of a parent (`trainer.model`), from which modules are cut. Training adds to
    the cross-entropy a contrastive and a sparsity term over the masks and, in a share of the steps, runs the
    samples of a random set of groups as the module for these groups would (module rehearsal). The log gets
    `loss_task`, `loss_contrastive`, `neuron_retention_rate` and `dead_neuron_rate`.

    Args:
        model: A plain model, or a parent to train on.
        args: `TrainingArguments`.
        data_collator: As in `Trainer`, to which `trainer_args` and `trainer_kwargs` go as well.
        train_dataset: Training data with labels.
        nemo_config: The options; `None` takes the defaults, or those of the parent.
        relevance_dataset: Finite data without augmentation on which the exact relevance is counted after
            training; `None` takes `train_dataset`.

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
        distributed.check_start(model)
        self._given_config = nemo_config
        self._relevance_dataset = train_dataset if relevance_dataset is None else relevance_dataset
        check_columns(train_dataset, is_counted=self._relevance_dataset is train_dataset)
        self._training_data = train_dataset
        self._run = TrainingState()
        set_seed(args.seed if args is not None else TrainingArguments.seed)  # the generators' weights are drawn here
        parent = None if model is None else self._as_parent(model)
        super().__init__(parent, args, data_collator, train_dataset, *trainer_args, **trainer_kwargs)
        chooses = self.nemo_config.specificity_weight > 0 or self.parent.config.has_several_labels
        if self.compute_loss_func is not None and self.nemo_config.rehearsal_probability > 0 and chooses:
            raise ValueError(
                "Got compute_loss_func and module rehearsal, which decides here which answers count; expected one of "
                "them. Set NeMoConfig(rehearsal_probability=0)."
            )
        self._attach_processor(self.parent)
        self.add_callback(_TrainingStart(self))

    @property
    def parent(self) -> NeMoClassifier:
        """The parent in training, without the wrappers of distributed training."""
        model: Any = self.model
        if not isinstance(model, NeMoClassifier):  # unwrapping walks through all layers
            model = self.accelerator.unwrap_model(model)
        return model  # type: ignore[no-any-return]

    @property
    def nemo_config(self) -> NeMoConfig:
        """The options of this run."""
        return self.parent.nemo_config

    @property
    def _masks(self) -> NeuronMasks:
        masks = self.parent.masks
        assert masks is not None
        return masks

    @property
    def _group_of_label(self) -> Tensor:
        if self._run.group_of_label is None:
            self._run.group_of_label = group_indices(self.parent)
        return self._run.group_of_label

    def _attach_processor(self, parent: NeMoClassifier) -> None:
        processor = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if processor is not None:
            parent.attach_processor(processor)

    def call_model_init(self, trial: Any = None) -> Any:
        """Builds the plain model and attaches masks to it; as in `Trainer`."""
        parent = self._as_parent(super().call_model_init(trial))
        if hasattr(self, "processing_class"):  # not yet within Trainer.__init__
            self._attach_processor(parent)
        return parent

    def _as_parent(self, model: Any) -> Any:
        config, data = self._given_config, self._training_data
        names = {int(index): str(name) for index, name in (model.config.id2label or {}).items()}
        labels, has_several = column_values(data, LABEL_COLUMNS), model.config.problem_type == SEVERAL_LABELS
        if labels is not None:
            check_labels(labels, names, has_several)
        if isinstance(model, NeMoClassifier):
            if not model.is_parent:
                raise ValueError(
                    "Got a module to train with masks; expected a plain model or a parent. "
                    "Fine-tune the module with transformers.Trainer."
                )
            if config is not None:
                model.set_nemo_config(config)
            return model
        config, groups = config or NeMoConfig(), None
        if config.group_column is not None:
            groups = groups_from_column(data, config.group_column, labels, names, has_several)
        return make_parent(model, config, groups)

    def _whole_parent(self) -> NeMoClassifier:
        return distributed.whole_copy(self.parent) if distributed.is_sharded(self.parent) else self.parent

    def create_accelerator_and_postprocess(self) -> None:
        """Creates the accelerator and refuses ways to spread the model under which masks would be wrong."""
        super().create_accelerator_and_postprocess()
        distributed.check_parallelism(self.args, self.accelerator)

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.transformer_cls_names_to_wrap is None:
            plugin.transformer_cls_names_to_wrap = distributed.sharded_layers(self.parent)
        if plugin is not None and "FULL_STATE_DICT" in str(plugin.state_dict_type):
            # The whole parent is saved besides, and accelerate 1.15 waits forever when it resumes from this kind.
            plugin.state_dict_config = plugin.optim_state_dict_config = None  # they belong to the kind
            plugin.set_state_dict_type("SHARDED_STATE_DICT")
        wrapped: nn.Module = super()._wrap_model(model, *args, **kwargs)
        return wrapped

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
        given = self.nemo_config.mask_learning_rate
        rate = MASK_LEARNING_RATE_FACTOR * self.args.learning_rate if given is None else given
        trained = self.parent if model is None else model
        masks = {id(p) for name, p in trained.named_parameters() if ".generator." in name}
        for group in list(optimizer.param_groups):
            if chosen := [p for p in group["params"] if id(p) in masks]:
                group["params"] = [p for p in group["params"] if id(p) not in masks]
                optimizer.add_param_group({**group, "params": chosen, "lr": rate})
        return optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in `Trainer`, and counts the exact relevance at the end; resumes from complete checkpoints only."""
        if resume_from_checkpoint:
            resume_from_checkpoint = distributed.whole_checkpoint(str(self.args.output_dir), resume_from_checkpoint)
        result: TrainOutput = super().train(resume_from_checkpoint, *args, **kwargs)
        check_finite(self.parent)
        self.update_relevance()
        warn_of_one_core(self._masks, self.nemo_config)
        return result

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Runs a micro-batch; the last one of an optimizer step moves the running relevance."""
        loss: Tensor = super().training_step(*args, **kwargs)
        counts = self._run.open_counts
        if self.accelerator.sync_gradients and counts is not None:
            counts.reduce(self.accelerator)
            counts.blend(self.state.global_step)
            self._run.open_counts = None
            if self.nemo_config.retention_target is not None and self._warmup() >= 1:
                steer_size(self._masks, self.nemo_config, self.state.max_steps)
            self.parent.config.relevance_source, self.parent.report = "running", None
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, Any]:
        """Computes the training loss, or in eval mode the task loss alone; as in `Trainer`."""
        inputs, labels = inputs_and_labels(self.parent, inputs)
        real, state = len(labels), self.accelerator.gradient_state
        if state.sync_gradients or not model.training:  # all micro-batches of a step are read before its first one
            real = distributed.real_samples(real, state, self.args.process_index, self.args.world_size)
        if not model.training:
            outputs = model(**inputs)
            loss = self._task_loss(outputs, labels, None, real)
            return (loss, outputs) if return_outputs else loss

        config = self.nemo_config
        in_module = self._rehearse(inputs, labels)
        outputs = model(**inputs)
        share = self._share_of_samples(real)
        task = share * self._task_loss(outputs, labels, in_module, real)

        labels = labels[:real]
        run = self._run
        run.open_counts = run.open_counts or OpenCounts(self._masks, self._group_of_label)
        run.open_counts.add(outputs.neuron_masks, labels)
        masks, widths = losses.flatten_masks(outputs.neuron_masks)  # (batch, neurons)
        masks = masks[:real]
        contrast = self._contrast(masks, widths, sample_groups(self.parent, labels, self._group_of_label))
        sparsity = share * losses.sparsity_loss(masks, widths)
        retained = share * losses.sparsity_loss(masks > 0, widths)
        terms = {"loss_task": task, "loss_contrastive": contrast, "neuron_retention_rate": retained}
        run.sums = {name: run.sums.get(name, 0) + value.detach() for name, value in terms.items()}
        run.steps += 1

        mask_terms = config.contrastive_weight * contrast + sparsity_pressure(self._masks, config) * sparsity
        loss = task + self._warmup() * mask_terms
        return (loss, outputs) if return_outputs else loss

    def _share_of_samples(self, real: int) -> Tensor | float:
        """Weight of this process's mean with which the mean over processes is the mean over all samples."""
        if self.args.world_size == 1:
            return 1.0
        own = torch.full((), float(real), device=self.parent.device)  # a copy from the host would wait
        return own / self._mean_over_processes(own).clamp(min=1 / self.args.world_size)

    def _mean_over_processes(self, values: Tensor) -> Tensor:
        mean: Tensor = self.accelerator.reduce(values.detach(), reduction="mean")
        return mean

    def _task_loss(self, outputs: Any, labels: Tensor, in_module: Tensor | None, real: int) -> Tensor:
        """Mean loss of the first `real` answers; `in_module` marks the labels of the module that is rehearsed, if any.

        A batch without real samples weighs nothing, but the mean over none would be NaN: one sample stands in.
        """
        if real < len(labels):
            outputs, labels = type(outputs)(logits=outputs.logits[: max(1, real)]), labels[: max(1, real)]
        if self.compute_loss_func is not None:
            return self.compute_loss_func(outputs, labels, num_items_in_batch=None)  # type: ignore[no-any-return]
        if self.parent.config.has_several_labels:
            return losses.restricted_binary_cross_entropy(outputs.logits, labels, in_module)
        smoothing, weight = self.args.label_smoothing_factor, self.nemo_config.specificity_weight
        if in_module is None or weight == 0:
            return F.cross_entropy(outputs.logits.float(), labels, label_smoothing=smoothing)
        return losses.specific_cross_entropy(outputs.logits, labels, in_module, weight, smoothing)

    def _warmup(self) -> float:
        """Share of the mask terms' weights that counts at this step."""
        steps = self.nemo_config.warmup_ratio * self.state.max_steps
        return min(1.0, (self.state.global_step + 1) / (steps + 1))

    def _rehearsed_groups(self) -> Tensor | None:
        """Draws some but not all groups for this optimizer step, equal in its micro-batches and processes, or none."""
        count = len(self.parent.config.groups)
        draw = random.Random(f"{self.args.seed} {self.state.global_step}")  # noqa: S311 - not for cryptography
        if self._warmup() < 1 or draw.random() >= self.nemo_config.rehearsal_probability or count < 2:
            return None
        chosen = sorted(draw.sample(range(count), draw.randint(1, count - 1)))
        return torch.tensor(chosen, device=self.parent.device)

    def _rehearse(self, inputs: dict[str, Any], labels: Tensor) -> Tensor | None:
        """Adds to the inputs the static masks of the module that this step rehearses; marks its labels, (labels,)."""
        groups = self._rehearsed_groups()
        if groups is None:
            return None
        in_module = torch.isin(self._group_of_label, groups)
        inputs["static_masks"] = module_masks(self._masks, groups, self.nemo_config.relevance_threshold)
        # With several labels a module must say no to samples of none of its own, so it sees all of them.
        if labels.ndim == 1 and self.nemo_config.specificity_weight == 0:
            inputs["static_samples"] = in_module[labels]
        return in_module

    def _contrast(self, masks: Tensor, widths: Sequence[int], groups: Tensor) -> Tensor:
        """The objective over masks of shape (batch, neurons), compared over all processes if the options say so."""
        config, is_alone, gathered = self.nemo_config, self.args.world_size == 1, None
        if config.gather_across_devices and not is_alone:
            gathered = distributed.gather_masks(masks, groups, self._train_batch_size)
        if self.state.global_step < WATCHED_STEPS and not self._run.has_warned:
            everyone = groups if gathered is None else gathered.groups[gathered.is_sample]
            self._run.has_warned = not bool(shares_group(everyone).triu(1).any())
            if self._run.has_warned:
                logger.warning(
                    "No two of the %d samples of a batch are of one label group, so the contrastive loss is 0. Raise "
                    "per_device_train_batch_size, or use larger label groups.", len(everyone),
                )  # fmt: skip
        options = (config.objective, config.temperature, config.coupling_weight, gathered)
        mean_counts = None if is_alone else self._mean_over_processes
        return losses.mask_objective(masks, widths, groups, *options, mean_counts)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs as `Trainer` does; with the training loss go the means of its terms since the last time."""
        if "loss" in logs and self._run.steps:
            for name, total in self._run.sums.items():
                logs[name] = round(self._mean_over_processes(total / self._run.steps).item(), 6)
            logs["dead_neuron_rate"] = round(self._masks.dead_share(), 6)
            self._run.sums, self._run.steps = {}, 0
            check_training(self.parent, logs)
        super().log(logs, start_time)

    def update_relevance(self) -> None:
        """Replaces the parent's relevance by the exact one over `relevance_dataset`."""
        batches = self._loader(self._relevance_dataset, is_shared=True)
        compute_relevance(self.parent, batches, self.accelerator, show_progress=not self.args.disable_tqdm)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluates as `Trainer` does; the parent's report keeps the metrics of all data sets until it trains on."""
        check_finite(self.parent)
        metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self._report(metrics)
        return metrics

    def _report(self, metrics: dict[str, Any]) -> None:
        before = (self.parent.report or {}).get("metrics", {})
        self.parent.report = {"metrics": {**before, **metrics}}

    def evaluate_modularity(self, eval_dataset: Any = None) -> dict[str, float | int | None]:
        """Measures how alike the masks of samples are, over at most 1,000 samples spread over the evaluation data.

        Args:
            eval_dataset: Data with labels in place of the trainer's `eval_dataset`.

        Returns:
            `cohesion`, the mean Jaccard index of the open neurons of two samples that share a label group; `coupling`,
            that of two samples that share none (`None` without such pairs); and the number of `modularity_samples`.
            The parent's report keeps them beside the metrics.
        """
        dataset = self._one_dataset(eval_dataset)
        if hasattr(dataset, "__len__"):  # spread, since data are often sorted by label
            indices = range(0, len(dataset), -(-len(dataset) // MODULARITY_SAMPLES))
            dataset = dataset.select(indices) if isinstance(dataset, datasets.Dataset) else Subset(dataset, indices)
        measured = measure_modularity(self.parent, self._loader(dataset), MODULARITY_SAMPLES)
        self._report({name: value for name, value in measured.items() if value is not None})
        return measured

    def extract_module(self, labels: LabelLike | Sequence[LabelLike], **kwargs: Any) -> NeMoClassifier:
        """Cuts a module out of the parent: see `parent.extract_module`, to which all arguments go."""
        return self._whole_parent().extract_module(labels, **kwargs)

    def evaluate_module(
        self, labels: LabelLike | Sequence[LabelLike], eval_dataset: Any = None, **kwargs: Any
    ) -> ModuleReport:
        """Measures a module on the evaluation data, or other data: see `nemo_hf.evaluate_module`."""
        batches, progress = self._loader(self._one_dataset(eval_dataset)), not self.args.disable_tqdm
        return evaluate_module(self._whole_parent(), labels, batches, show_progress=progress, **kwargs)

    def calibrate_rejection(
        self, module: NeMoClassifier, eval_dataset: Any = None, accepted: float = 0.95
    ) -> dict[str, float]:
        """Calibrates a module on the evaluation data, or other data: see `nemo_hf.calibrate_rejection`."""
        batches = self._loader(self._one_dataset(eval_dataset))
        return calibrate_rejection(module, batches, accepted, show_progress=not self.args.disable_tqdm)

    def _one_dataset(self, given: Any) -> Any:
        dataset = self.eval_dataset if given is None else given
        if dataset is None or isinstance(dataset, dict) or (hasattr(dataset, "__len__") and not len(dataset)):
            raise ValueError("Got no single evaluation data set with samples; expected one. Pass eval_dataset=...")
        return dataset

    def _loader(self, dataset: Any, is_shared: bool = False) -> DataLoader[Any]:
        """Each sample of a data set, or of this process's share of it, once; unlike `get_eval_dataloader`."""
        collator = self.data_collator
        if isinstance(dataset, datasets.Dataset):
            dataset = self._remove_unused_columns(dataset, description="evaluation")
        else:
            collator = self._get_collator_with_removed_columns(collator, description="evaluation")
        if is_shared and self.args.world_size > 1:
            dataset = Subset(dataset, range(self.args.process_index, len(dataset), self.args.world_size))
        workers = self.args.dataloader_num_workers
        return DataLoader(dataset, batch_size=self.args.eval_batch_size, collate_fn=collator, num_workers=workers)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.args.world_size > 1:  # what is written next says that the checkpoint is whole
            self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the whole parent, sharded or not; all processes must call it. As in `Trainer`."""
        if not distributed.is_sharded(self.parent):
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir, distributed.whole_state(self.parent, to_first_process=not self.args.save_on_each_node))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # Trainer would write training_args.bin, a pickle; the processor goes with the model.
        if self.args.should_save:
            self.parent.save_pretrained(Path(str(output_dir or self.args.output_dir)), state_dict=state_dict)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`, with a picture; it uses `license`, `tags`, `model_name` and `dataset_tags` alone."""
        given = inspect.signature(super().create_model_card).bind(*args, **kwargs).arguments
        if self.is_world_process_zero():
            listed = [given.get(name) or () for name in ("dataset_tags", "tags")]
            data, tags = ((names,) if isinstance(names, str) else tuple(names) for names in listed)
            options = CardOptions(license=given.get("license"), datasets=data, tags=tags)
            hub_pushes.write_card(self, self.parent, given.get("model_name"), options)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in `Trainer`, with report, card and picture; deletes files of older pushes."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        folder: Any = self.args.output_dir
        return hub_pushes.upload(self, folder, commit_message, blocking=blocking, token=token, revision=revision)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # That of `transformers` uploads training_args.bin, a pickle, and no card.
        hub_pushes.push_checkpoint(self, self.parent, Path(checkpoint_folder))
