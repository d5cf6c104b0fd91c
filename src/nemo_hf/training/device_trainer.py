"""A trainer's data, files and models where several processes train: each sample once, each file whole."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import datasets
from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from nemo_hf.auto_classes import NeMoClassifier

from .distributed import check_parallelism, is_sharded, processes, real_samples, sharded_layers, whole_state
from .hub_trainer import HubTrainer

STATE_NAME = "trainer_state.json"
"""File that is written last into a checkpoint."""


class DeviceTrainer(HubTrainer):
    """A `Trainer` of parents for one or many processes."""

    def _whole_parent(self) -> NeMoClassifier:
        """The parent, or a copy with whole parameters where they are spread over the processes."""
        return _whole_copy(self.parent) if is_sharded(self.parent) else self.parent

    def _real_samples(self, batch: int, is_training: bool) -> int:
        """Number of a batch's first samples that are no repetition, with which the last batches are filled up."""
        state = self.accelerator.gradient_state
        if is_training and not state.sync_gradients:  # all micro-batches of a step are read before its first one
            return batch
        return real_samples(batch, state, self.args.process_index)

    def _loader(self, dataset: Any, is_shared: bool) -> DataLoader[Any]:
        """Batches of a whole data set, or of this process's share of it: each sample once.

        `get_eval_dataloader` may drop a last batch, keep other data's workers, or repeat samples.
        """
        collator = self.data_collator
        if isinstance(dataset, datasets.Dataset):
            dataset = self._remove_unused_columns(dataset, description="evaluation")
        else:
            collator = self._get_collator_with_removed_columns(collator, description="evaluation")
        if is_shared and self.args.world_size > 1:
            dataset = Subset(dataset, range(self.args.process_index, len(dataset), self.args.world_size))
        return DataLoader(
            dataset,
            batch_size=self.args.eval_batch_size,
            collate_fn=collator,
            num_workers=self.args.dataloader_num_workers,
        )

    def _one_dataset(self, given: Any) -> Any:
        dataset = self.eval_dataset if given is None else given
        if dataset is None or isinstance(dataset, dict):
            raise ValueError("Got no single evaluation data set; expected one. Pass eval_dataset=...")
        return dataset

    def create_accelerator_and_postprocess(self) -> None:
        """Creates the accelerator and refuses ways to spread the model under which masks would be wrong."""
        super().create_accelerator_and_postprocess()
        check_parallelism(self.args, self.accelerator)

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.transformer_cls_names_to_wrap is None:
            plugin.transformer_cls_names_to_wrap = sharded_layers(self.parent)
        if plugin is not None and "FULL_STATE_DICT" in str(plugin.state_dict_type):
            # The whole parent is saved besides, and accelerate 1.15 waits forever when it resumes from this kind.
            plugin.state_dict_config = plugin.optim_state_dict_config = None  # they belong to the kind
            plugin.set_state_dict_type("SHARDED_STATE_DICT")
        wrapped: nn.Module = super()._wrap_model(model, *args, **kwargs)
        return wrapped

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trains as `Trainer` does; resumes only from checkpoints that were written to their end.

        Args:
            resume_from_checkpoint: Directory of a checkpoint; `True` takes the last whole one in `output_dir`.
            *args: As in `Trainer`.
            **kwargs: As in `Trainer`.

        Returns:
            What `Trainer` returns.

        Raises:
            ValueError: If there is no whole checkpoint.
        """
        if resume_from_checkpoint:
            resume_from_checkpoint = str(self._whole_checkpoint(resume_from_checkpoint))
        result: TrainOutput = super().train(resume_from_checkpoint, *args, **kwargs)
        return result

    def _whole_checkpoint(self, given: str | bool) -> Path:
        assert self.args.output_dir is not None
        steps = Path(self.args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        found = sorted(steps, key=_step) if given is True else [Path(str(given))]
        whole = [folder for folder in found if _is_whole(folder)]
        if not whole:
            raise ValueError(
                f"Got {[folder.name for folder in found]} to resume from; expected a checkpoint with {STATE_NAME}, "
                "which is written last. Name another checkpoint, or start anew."
            )
        return whole[-1]

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if processes() > 1:  # what is written next says that the checkpoint is whole
            self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the parent as a whole, however it is spread; all processes must call it.

        Args:
            output_dir: Where to; `None` takes that of the arguments.
            _internal_call: As in `Trainer`.
        """
        if not is_sharded(self.parent):
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir, whole_state(self.parent, is_wanted=self.args.should_save))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # Trainer would write training_args.bin, a pickle; the processor goes with the model.
        if self.args.should_save:
            assert self.args.output_dir is not None
            self.parent.save_pretrained(Path(output_dir or self.args.output_dir), state_dict=state_dict)


def refuse_empty_weights() -> None:
    """Refuses a start in which only one process reads the weights: all of them try cuts of the model.

    Raises:
        ValueError: Naming the setting.
    """
    names = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    if all(os.environ.get(name, "").lower() in ("1", "true") for name in names):
        raise ValueError(
            "Got fsdp_cpu_ram_efficient_loading: true, under which only one process reads the weights; expected false, "
            "since every process finds the neurons and tries cuts. Set it in the accelerate configuration."
        )


def refuse_data_parallel(model: Any) -> None:
    """Refuses a model that runs on several GPUs from one process.

    Args:
        model: What was given to train.

    Raises:
        ValueError: With the line that starts one process a GPU.
    """
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "Got a model in nn.DataParallel; expected the model itself and one process a GPU, since masks are one "
            f"state a process. Launch with: accelerate launch --num_processes {max(1, len(model.device_ids))} "
            "your_script.py"
        )


def _whole_copy(parent: NeMoClassifier) -> NeMoClassifier:
    state = whole_state(parent)
    plain_class = type(parent).__bases__[-1]  # `fully_shard` puts a class of its own before it
    copied: NeMoClassifier = plain_class(copy.deepcopy(parent.config))
    copied.load_state_dict(state, assign=True)
    copied.processor_files, copied.report = parent.processor_files, parent.report
    copied.to(parent.device)  # type: ignore[arg-type]
    copied.eval()
    return copied


def _step(checkpoint: Path) -> int:
    step = checkpoint.name.rpartition("-")[2]
    return int(step) if step.isdigit() else -1


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
