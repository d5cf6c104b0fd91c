"""`NeMoTrainer`: `transformers.Trainer` that trains a classifier from which modules are cut."""

import inspect
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import TrainOutput

from nemo_hf.auto_classes import NeMoClassifier
from nemo_hf.config import LabelLike, NeMoConfig
from nemo_hf.evaluation.report import ModuleReport, evaluate_module, measure_modularity
from nemo_hf.hub.publish import CardOptions
from nemo_hf.models.finiteness import check_finite, check_training
from nemo_hf.models.plain_checks import check_trained_masks
from nemo_hf.models.pruning_modes import make_parent
from nemo_hf.models.rejection import REJECTED_LABEL
from nemo_hf.models.rejection_calibration import calibrate_rejection

from . import data, distributed, hub_pushes
from .callbacks import PhaseNames, TrainingChecks
from .evaluation_sets import one_dataset, spread_samples
from .model_calls import check_own_loss, check_scaling, replaced_method
from .optimizers import check_optimizer, split_mask_parameters
from .relevance import compute_relevance, warn_of_one_core
from .resuming import check_checkpoint, whole_checkpoint
from .search import training_arguments, trial_config
from .step_loss import StepLoss, counted_items, named_scalars

logger = logging.getLogger(__name__)

MODULARITY_SAMPLES = 1000  # most samples over which cohesion and coupling are measured


class NeMoTrainer(Trainer):
    """Trains a classification model from which modules are cut, in place of `transformers.Trainer`.

    The plain model becomes part of a parent (`trainer.model`). By default it trains as under `Trainer`, and then label
    groups get their neurons; with `NeMoConfig(plain_ratio=...)` below 1 it teaches modules in the steps that are left.
    `NeMoConfig(masks="generated")` adds to the cross-entropy a contrastive and a sparsity term over masks by sample
    and, in a share of the steps, runs the samples of random groups as their module would (module rehearsal). All that
    is logged of masks starts with `nemo/`: `nemo/loss_task` and others.

    Args:
        model: A plain model, or a parent to train on.
        args: `TrainingArguments`.
        data_collator: As in `Trainer`, to which `trainer_args` and `trainer_kwargs` go as well.
        train_dataset: Training data with labels.
        nemo_config: The options; `None` takes the defaults, or those of the parent.
        relevance_dataset: Finite data on which relevance is counted after training; `None` takes `train_dataset`.

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
        data.check_data_sets(train_dataset, relevance_dataset, data_collator)
        self._training_data, self._given_collator = train_dataset, data_collator
        self._relevance_dataset, self._reads_groups = relevance_dataset, False
        self._step_loss = StepLoss(self)
        set_seed(args.seed if args is not None else TrainingArguments.seed)  # the generators' weights are drawn here
        parent = None if model is None else self._as_parent(model)
        super().__init__(parent, args, data_collator, train_dataset, *trainer_args, **trainer_kwargs)
        check_scaling(self.loss_is_scaled_for_ga)
        if self.compute_loss_func is not None:
            check_own_loss("compute_loss_func", self.parent)
        if self.optimizer is not None:
            check_optimizer(self.optimizer, self.parent)
            if self.nemo_config.mask_learning_rate is not None:
                logger.warning("mask_learning_rate has no effect: the optimizer that you pass has rates of its own.")
        self._attach_processor(self.parent)
        self.add_callback(TrainingChecks(self))
        self.add_callback(PhaseNames(self))

    @property
    def parent(self) -> NeMoClassifier:
        """The parent in training, without the wrappers of distributed training."""
        model: Any = self.model
        if model is None:
            raise ValueError(
                "Got no model, since a hyperparameter search drops each trial's; expected a trained one. Set the best "
                "trial's values in trainer.args and call trainer.train()."
            )
        if not isinstance(model, NeMoClassifier):  # unwrapping walks through all layers
            model = self.accelerator.unwrap_model(model)
        return model  # type: ignore[no-any-return]

    @property
    def nemo_config(self) -> NeMoConfig:
        """The options of this run."""
        return self.parent.nemo_config

    @property
    def _counted_data(self) -> Any:
        """What the relevance is counted on after training."""
        return self.train_dataset if self._relevance_dataset is None else self._relevance_dataset

    def _attach_processor(self, parent: NeMoClassifier) -> None:
        processor = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if processor is not None:
            parent.attach_processor(processor)

    def call_model_init(self, trial: Any = None) -> Any:
        """Builds the plain model and attaches masks to it; as in `Trainer`. A trial's values may be NeMo options."""
        model, given = super().call_model_init(trial), self._given_config
        self._given_config = trial_config(self, model, trial, given)
        try:
            parent = self._as_parent(model)
        finally:
            self._given_config = given
        if hasattr(self, "processing_class"):  # not yet within Trainer.__init__
            self._attach_processor(parent)
        return parent

    def _hp_search_setup(self, trial: Any) -> None:
        space: Any = getattr(self, "hp_space", None)
        if space is not None:
            self.hp_space = lambda trial: training_arguments(space(trial))
        try:
            super()._hp_search_setup(training_arguments(trial) if isinstance(trial, dict) else trial)
        finally:
            self._trial, self.hp_space = trial, space

    def _as_parent(self, model: Any) -> Any:
        config = self._given_config
        if isinstance(model, NeMoClassifier) and not model.is_parent:
            raise ValueError(
                "Got a module to train with masks; expected a plain model or a parent. "
                "Fine-tune the module with transformers.Trainer."
            )
        check_trained_masks(model, config or getattr(model, "nemo_config", None) or NeMoConfig())
        data.check_label_names(self._training_data, self._given_collator, model)
        if (labels := data.seen_labels(self._training_data, self._given_collator)) is not None:
            data.check_labels(labels, model)
        if isinstance(model, NeMoClassifier):
            if config is not None:
                model.set_nemo_config(config)
            return model
        config, groups = config or NeMoConfig(), None
        if config.group_column is not None:
            self._reads_groups = True
            groups = data.groups_from_column(self._training_data, config.group_column, model)
        return make_parent(model, config, groups)

    def _whole_parent(self) -> NeMoClassifier:
        return distributed.whole_copy(self.parent) if distributed.is_sharded(self.parent) else self.parent

    def create_accelerator_and_postprocess(self) -> None:
        """Creates the accelerator and refuses ways to spread the model under which masks would be wrong."""
        super().create_accelerator_and_postprocess()
        distributed.check_parallelism(self.args, self.accelerator)

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        distributed.prepare_sharding(getattr(self.accelerator.state, "fsdp_plugin", None), self.parent)
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
        trained = self.parent if model is None else model
        masks = [parameter for name, parameter in trained.named_parameters() if ".generator." in name]
        split_mask_parameters(optimizer, masks, self.nemo_config.mask_learning_rate, self.args.learning_rate)
        return optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in `Trainer`, and counts the exact relevance at the end; resumes from complete checkpoints only.

        If the relevance can't be counted, a warning says why: the parent then has the running one of its last steps.
        """
        if resume_from_checkpoint:
            resume_from_checkpoint = whole_checkpoint(str(self.args.output_dir), resume_from_checkpoint)
        result: TrainOutput = super().train(resume_from_checkpoint, *args, **kwargs)
        check_finite(self.parent)
        try:
            self.update_relevance()
        except Exception as error:  # whatever the data, the collator or the device raises: the training is not lost
            logger.warning(
                "Training is complete, but the exact relevance could not be counted (%s: %s), so the parent has the "
                "running one of the last steps, or of assigned masks none. Call trainer.update_relevance(dataset) with "
                "other data, or after lowering args.per_device_eval_batch_size if memory was short, before you save it "
                "or cut modules.",
                *(type(error).__name__, error), exc_info=error,
            )  # fmt: skip
        warn_of_one_core(self.parent.parent_masks(), self.nemo_config)
        return result

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        check_checkpoint(resume_from_checkpoint, self.parent)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Runs a micro-batch; the last one of an optimizer step moves the running relevance."""
        # Trainer goes backward from what compute_loss returns, maybe that of a subclass, so the terms are added there.
        with replaced_method(self, "compute_loss", partial(self._step_loss.whole, self.compute_loss)):
            loss: Tensor = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self._step_loss.finish_step()
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, Any]:
        """Computes the training loss, or in eval mode the task loss alone; as in `Trainer`.

        That of a subclass computes the task loss from `model(**inputs)`: the training step adds the terms of the masks.
        """
        if self._step_loss.micro_batch is None and model.training:
            own = partial(NeMoTrainer.compute_loss, self)
            return self._step_loss.whole(own, model, inputs, return_outputs=return_outputs)
        loss, outputs = self._step_loss.task(model, inputs)
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        # Losses are means over a micro-batch here; in training its own number replaces this one.
        labels = batch_samples[-1].get("labels") if batch_samples else None
        return counted_items(labels) if isinstance(labels, Tensor) else None

    def _rehearsed_groups(self) -> Tensor | None:
        """Draws some but not all groups for this optimizer step, or none."""
        unseen = set(self.parent.config.unseen_labels or ())
        groups = [index for index, own in enumerate(self.parent.config.groups.values()) if not unseen >= set(own)]
        draw = self._step_loss.draws()
        is_due = self._step_loss.warmup >= 1 and draw.random() < self.nemo_config.rehearsal_probability
        if not (is_due or self.nemo_config.masks == "assigned") or len(groups) < 2:
            return None
        chosen = sorted(draw.sample(groups, draw.randint(1, len(groups) - 1)))
        return torch.tensor(chosen, device=self.parent.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs as `Trainer` does; with the training loss go the means of its terms since the last time."""
        terms = self._step_loss.take_means() if "loss" in logs and self.model is not None else {}
        if terms:
            terms["dead_neuron_rate"] = round(self.parent.parent_masks().dead_share(), 6)
            check_training(self.parent, {**logs, **terms})
            logs.update(named_scalars(terms))
        super().log(logs, start_time)

    def update_relevance(self, dataset: Any = None) -> None:
        """Replaces the parent's relevance by the exact one, counted in a pass over a data set: see `compute_relevance`.

        Args:
            dataset: Finite data with labels, without augmentation; `None` takes `relevance_dataset`, or without it
                `train_dataset`.

        Raises:
            ValueError: If there are no such data, or their labels are not those of the model.
        """
        if (counted := self._counted_data if dataset is None else dataset) is None:
            raise ValueError("Got no data set; expected one to count the relevance on. Pass update_relevance(dataset).")
        batches = data.sample_loader(self, counted, is_shared=True)
        compute_relevance(self.parent, batches, self.accelerator, show_progress=not self.args.disable_tqdm)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluates as `Trainer` does; the parent's report keeps the metrics of all data sets until it trains on."""
        if eval_dataset is not None and not (eval_dataset and isinstance(eval_dataset, dict)):
            one_dataset(eval_dataset, self.eval_dataset)
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
        dataset = spread_samples(one_dataset(eval_dataset, self.eval_dataset), MODULARITY_SAMPLES)
        measured = measure_modularity(self.parent, data.sample_loader(self, dataset), MODULARITY_SAMPLES)
        self._report(known := {name: value for name, value in measured.items() if value is not None})
        self.log(named_scalars(known))
        return measured

    def extract_module(self, labels: Any, calibration: Any = None, retention: Any = None, **kwargs: Any) -> Any:
        """Cuts a module out of the parent: see `parent.extract_module`, to which all arguments go.

        With `retention` or `max_loss` the calibration samples are those of the training data, unless others are given:
        of `relevance_dataset` or else of `train_dataset`, through the trainer's collator. Assigned masks take
        `retention_target` for a retention that is not given: what training leaves to do, reconstruction does.
        """
        options = data.calibration_options(self, self._counted_data, calibration, {"retention": retention, **kwargs})
        return self._whole_parent().extract_module(labels, **options)

    def evaluate_module(
        self, labels: LabelLike | Sequence[LabelLike], eval_dataset: Any = None, **kwargs: Any
    ) -> ModuleReport:
        """Measures a module on the evaluation data, or other data: see `nemo_hf.evaluate_module`.

        Where training left modules to reconstruction, it is that of `extract_module(labels)`, unless `module` is given,
        or `threshold` or `round_to`, which cut by relevance.
        """
        is_given = any(kwargs.get(name) is not None for name in ("module", "threshold", "round_to"))
        if not self.nemo_config.trains_modules and not is_given:
            kwargs["module"] = self.extract_module(labels)
        kwargs.setdefault("show_progress", not self.args.disable_tqdm)
        batches = data.sample_loader(self, one_dataset(eval_dataset, self.eval_dataset))
        return evaluate_module(self._whole_parent(), labels, batches, **kwargs)

    def calibrate_rejection(
        self, module: NeMoClassifier, eval_dataset: Any = None, accepted: float = 0.95,
        rejected_label: str | None = REJECTED_LABEL,
    ) -> dict[str, float]:  # fmt: skip
        """Calibrates a module on the evaluation data, or other data: see `nemo_hf.calibrate_rejection`."""
        batches = data.sample_loader(self, one_dataset(eval_dataset, self.eval_dataset))
        return calibrate_rejection(module, batches, accepted, not self.args.disable_tqdm, rejected_label)

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
            distributed.save_parent(self.parent, str(output_dir or self.args.output_dir), state_dict)

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
