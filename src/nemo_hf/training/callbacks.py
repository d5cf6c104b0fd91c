"""What a trainer does when a training begins and before each optimizer step, and the names of its progress bars."""

from typing import Any

import torch
from transformers import ProgressCallback, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from nemo_hf.hub.provenance import training_record
from nemo_hf.models.finiteness import check_finite

from .data import check_before_training
from .optimizers import check_optimizer
from .relevance import forget_assignment, has_assignment
from .step_loss import StepLoss


class TrainingChecks(TrainerCallback):
    """Starts and records a training once model and arguments are final (in trials, too), or refuses it."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Checks the model and its data, and records how it is trained."""
        trainer = self._trainer
        parent, samples = trainer.parent, trainer.train_dataset
        trainer._step_loss = StepLoss(trainer)
        check_finite(parent)
        check_optimizer(trainer.optimizer, parent)
        base_model = (parent.config.training or {}).get("base_model") or parent.config.base_model
        parent.config.training = training_record(args, base_model, len(samples) if has_length(samples) else None)
        parent.report = None
        if parent.nemo_config.masks == "assigned":  # those of a checkpoint may have been read into it
            if state.global_step == 0 and parent.nemo_config.plain_ratio > 0:
                forget_assignment(parent.masks)  # it is made anew, by the options and weights of this training
            parent.config.relevance_source = "assigned" if has_assignment(parent.masks) else "initial"
        check_before_training(trainer, trainer._counted_data)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Assigns the neurons to label groups when their time has come, if they are to be assigned."""
        trainer = self._trainer
        is_done = trainer.nemo_config.masks != "assigned" or trainer.parent.config.relevance_source == "assigned"
        if is_done or trainer._step_loss.is_plain:
            return
        with torch.random.fork_rng(devices=[]):  # the order of the training data stays what it was
            trainer.update_relevance()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Checks that the masks have been trained."""
        if not self._trainer._step_loss.is_counted:
            raise ValueError(
                "Got a training_step of a subclass that leaves out the one of NeMoTrainer, by which masks are trained; "
                "expected super().training_step(...) in it. Call it, or override compute_loss alone."
            )
        self._trainer._step_loss.is_counted = False


class PhaseNames(TrainerCallback):
    """Names the progress bars of a trainer, which `transformers` leaves without; `before` stands before the names."""

    def __init__(self, trainer: Any, before: str = "") -> None:
        self._trainer, self._before = trainer, before

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Names the bar of the training."""
        self._name("training_bar", "Training")

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        """Names the bar of an evaluation or prediction."""
        self._name("prediction_bar", "Evaluation")

    def _name(self, attribute: str, name: str) -> None:
        for callback in self._trainer.callback_handler.callbacks:
            bar = getattr(callback, attribute, None) if isinstance(callback, ProgressCallback) else None
            if bar is not None and not bar.desc:
                bar.set_description(f"{self._before}{name}")
