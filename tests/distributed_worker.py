"""What each of two processes runs for tests/test_distributed.py, and one process runs to compare with."""

import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from conftest import image_samples
from test_trainer import arguments, batch_of, history, lively_parent, state

from nemo_hf import NeMoTrainer
from nemo_hf.config import OBJECTIVES
from nemo_hf.models.label_groups import group_membership
from nemo_hf.training.distributed import gather_masks, mean_over_processes, processes
from nemo_hf.training.losses import mask_objective

RANK = int(os.environ.get("RANK", "0"))
SPLITS = {"even": (4, 4), "uneven": (6, 3), "lonely": (5, 1)}
"""Samples of each of two processes."""
GROUPS = torch.tensor(
    [0, 0, 1, 1, 0, 2, 2, 1, 3]
)  # the third group lies with one process alone, the last has one sample
SETTINGS = {
    "plain": {"rehearsal_probability": 0.0},
    "rehearsed": {"rehearsal_probability": 1.0},
    "specific": {"rehearsal_probability": 1.0, "specificity_weight": 0.5},
    "cohesion": {"rehearsal_probability": 0.0, "objective": "cohesion-coupling"},
    "authors": {"rehearsal_probability": 0.0, "objective": "contrastive-authors"},
    "within": {"rehearsal_probability": 0.0, "gather_across_devices": False},
}
EVALUATED = 11


def own_part(values, split):
    """This process's part of all samples; all of them where there is one process."""
    if processes() == 1:
        return values[: sum(split)]
    return values[sum(split[:RANK]) : sum(split[: RANK + 1])]


def objective_of(objective, split, has_several):
    """Loss of masks and its gradient, both as the mean over processes."""
    generator = torch.Generator().manual_seed(3)
    samples = sum(split)
    whole = [torch.rand(samples, width, generator=generator).sub(0.3).relu() for width in (7, 4)]
    masks = [own_part(mask, split).requires_grad_() for mask in whole]
    groups = GROUPS[:samples]
    if has_several:
        lists = (torch.rand(samples, 5, generator=generator) > 0.6).long()
        groups = group_membership(lists, torch.tensor([0, 0, 1, 2, 2]), 3)
    groups = own_part(groups, split)
    gathered = gather_masks(masks, groups, 6) if processes() > 1 else None
    loss = mask_objective(objective, masks, groups, 0.2, 0.7, gathered, mean_over_processes)
    loss.backward()
    return {
        "loss": mean_over_processes(loss),
        "masks": torch.cat([mask.grad / processes() for mask in masks], -1),
    }


def gradients_of(setting, splits, directory):
    """Losses of an optimizer step's micro-batches and the gradient of every parameter."""
    parent = lively_parent("vit", warmup_ratio=0.0, **SETTINGS[setting])
    args = arguments(directory, per_device_train_batch_size=6 if processes() > 1 else 9)
    trainer = NeMoTrainer(parent, args, train_dataset=image_samples(10))
    trainer.state.max_steps, trainer.state.global_step = 10, 3
    model = trainer.accelerator.prepare_model(trainer.model)
    model.train()
    samples, losses, start = image_samples(40), [], 0
    for index, split in enumerate(splits):
        batch = batch_of(own_part(samples[start:], split))
        start += sum(split)
        is_last = index == len(splits) - 1
        with nullcontext() if is_last or processes() == 1 else model.no_sync():
            loss = trainer.compute_loss(model, batch) / len(splits)
            loss.backward()
        losses.append(mean_over_processes(loss))
    found = {name: parameter.grad for name, parameter in parent.named_parameters()}
    return {"losses": torch.stack(losses), **found}


class ShardedTrainer(NeMoTrainer):
    """FSDP2 on CPUs, where accelerate leaves it out."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        self.is_fsdp_enabled = True


class DyingTrainer(NeMoTrainer):
    """One process is killed while the second checkpoint is being written."""

    def _save_rng_state(self, output_dir):
        if self.state.global_step == 4 and RANK == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_rng_state(output_dir)


def trainer_of(directory, batch, trainer_class=NeMoTrainer, **options):
    parent = lively_parent("vit", warmup_ratio=0.0, rehearsal_probability=0.5, retention_target=0.3)
    args = arguments(
        directory,
        per_device_train_batch_size=batch // processes(),
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=2,
        optim="sgd",
        ddp_backend="gloo" if "RANK" in os.environ else None,
        **{"max_steps": 4, **options},
    )
    return trainer_class(
        parent,
        args,
        train_dataset=image_samples(63),
        eval_dataset=image_samples(EVALUATED, seed=1),
        relevance_dataset=image_samples(13),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )


def losses_of(trainer):
    names = ("loss", "loss_task", "loss_contrastive", "neuron_retention_rate", "grad_norm")
    return {name: torch.tensor(history(trainer, name)) for name in names}


def trained(directory, **options):
    """A run with everything in it: losses, the exact relevance at its end, evaluation and a module's report."""
    trainer = trainer_of(directory, 10, **options)
    trainer.train()
    metrics = trainer.evaluate()
    report = trainer.evaluate_module([1, 3]).to_dict()
    names = ("accuracy", "parent_restricted_accuracy", "samples", "parameters", "neuron_retention_rate")
    return {
        "losses": losses_of(trainer),
        "state": state(trainer._whole_parent()),
        "eval": {name: metrics[f"eval_{name}"] for name in ("loss", "accuracy", "cohesion", "coupling")},
        "report": {**{name: report[name] for name in names}, **report["controls"]},
    }


def resumed(directory, checkpoint, **options):
    trainer = trainer_of(directory, 10, **options)
    trainer.train(resume_from_checkpoint=checkpoint if checkpoint is True else str(checkpoint))
    return {"losses": losses_of(trainer), "state": state(trainer._whole_parent())}


def replicated(out):
    """Objectives, gradients and runs under DDP."""
    found = {}
    for objective in OBJECTIVES:
        for name, split in SPLITS.items():
            for has_several in (False, True):
                found[f"{objective} {name} {has_several}"] = objective_of(objective, split, has_several)
    for setting in SETTINGS:
        found[f"{setting} accumulated"] = gradients_of(setting, [(4, 4), (6, 3)], out)
    found["one sample"] = gradients_of("plain", [(5, 1)], out)
    found["trained"] = trained(out / "two", save_strategy="steps", save_steps=2)
    found["resumed"] = resumed(out / "two again", out / "one" / "checkpoint-2")
    found["checkpointing"] = trained(out / "replayed", activation_checkpointing=True)
    found["bf16"] = trained(out / "bf16", bf16=True)
    return found


def sharded(out):
    """Runs under FSDP2."""
    options = {"trainer_class": ShardedTrainer, "fsdp": True}
    saved = {"save_strategy": "steps", "save_steps": 2}
    found = {"trained": trained(out / "sharded", **options, **saved)}
    found["resumed"] = resumed(out / "sharded again", out / "sharded" / "checkpoint-2", **options)
    replaying = {"fsdp_config": {"activation_checkpointing": True}}
    found["checkpointing"] = trained(out / "sharded replayed", **options, **replaying)
    return found


def resharded(out):
    """Goes on under FSDP2 on another number of processes."""
    options = {"trainer_class": ShardedTrainer, "fsdp": True}
    return {"resumed": resumed(out / "resharded", out / "sharded" / "checkpoint-2", **options)}


def dying(out):
    """A run that loses a process."""
    trainer_of(out / "dying", 10, DyingTrainer, save_strategy="steps", save_steps=2).train()
    return {}


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    name, out = sys.argv[1], Path(sys.argv[2])
    found = {"replicated": replicated, "sharded": sharded, "resharded": resharded, "dying": dying}[name](out)
    torch.save(found, out / f"{name}-{RANK}.pt")
    torch.distributed.destroy_process_group()
