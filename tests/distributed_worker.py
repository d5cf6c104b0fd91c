"""What each of two processes runs for tests/test_distributed.py, and one process runs to compare with."""

import os
import signal
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, reduce
from conftest import build, image_samples
from training_helpers import Spoiled, Stream, arguments, batch_of, history, state, varied_parent, without_dropout

from nemo_hf import NeMoConfig, NeMoTrainer
from nemo_hf.cli.demo import accuracy

RANK, PROCESSES = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
SETTINGS = {
    "plain": {"rehearsal_probability": 0.0},
    "specific": {"rehearsal_probability": 1.0, "specificity_weight": 0.5},
    "cohesion": {"rehearsal_probability": 1.0, "objective": "cohesion-coupling"},
    "authors": {"rehearsal_probability": 0.0, "objective": "contrastive-authors"},
    "soft": {"rehearsal_probability": 1.0, "hard_masks": False},
    "unlabelled": {"rehearsal_probability": 1.0},
    "unlabelled authors": {"rehearsal_probability": 0.0, "objective": "contrastive-authors"},
    "within": {"rehearsal_probability": 0.0, "gather_across_devices": False},
}
MICRO_BATCHES = {"accumulated": [(4, 4), (6, 3)], "one left": [(5, 1)], "one each": [(1, 1)]}
"""Samples of each of two processes, one pair a micro-batch."""
EVALUATED = 11


def own_part(values, split):
    """This process's part of all samples; all of them where there is one process."""
    if PROCESSES == 1:
        return values[: sum(split)]
    return values[sum(split[:RANK]) : sum(split[: RANK + 1])]


def gradients_of(setting, splits, directory):
    """Losses of an optimizer step's micro-batches and the gradient of every parameter."""
    parent = varied_parent("vit", warmup_ratio=0.0, **SETTINGS[setting])
    args = arguments(directory, per_device_train_batch_size=9 // PROCESSES + 2)
    trainer = NeMoTrainer(parent, args, train_dataset=image_samples(10))
    trainer.state.max_steps, trainer.state.global_step = 10, 3
    model = trainer.accelerator.prepare_model(trainer.model)
    model.train()
    samples, losses = image_samples(40), []
    if setting.startswith("unlabelled"):
        samples = [{**sample, "labels": sample["labels"] if i % 3 else -100} for i, sample in enumerate(samples)]
    for split in splits:
        batch, samples = batch_of(own_part(samples, split)), samples[sum(split) :]
        with nullcontext() if split is splits[-1] or PROCESSES == 1 else model.no_sync():
            loss = trainer.compute_loss(model, batch) / len(splits)
            loss.backward()
        losses.append(reduce(loss.detach(), "mean"))
    found = {name: parameter.grad for name, parameter in parent.named_parameters()}
    return {"losses": torch.stack(losses), **found}


def counted(directory):
    """Where the relevance is from after training on spoiled data, and what it is after a stream was counted."""
    args = arguments(directory, max_steps=1, per_device_eval_batch_size=2, ddp_backend="gloo")
    spoiled = Spoiled(image_samples(13), OSError("no such image"))
    trainer = NeMoTrainer(varied_parent("vit"), args, train_dataset=image_samples(20), relevance_dataset=spoiled)
    trainer.train()
    source = trainer.parent.config.relevance_source
    trainer.update_relevance(Stream(image_samples(13)))
    return {"source": source, "parent": state(trainer.parent)}


def assigned(directory):
    """The parent after two plain steps, the assignment, and two steps with taught modules."""
    backend = {"ddp_backend": "gloo"} if "RANK" in os.environ else {}
    args = arguments(directory, per_device_train_batch_size=10 // PROCESSES, max_steps=4, optim="sgd", **backend)
    config = NeMoConfig(plain_ratio=0.5, retention_target=0.4, specificity_weight=0.2)
    model = without_dropout(build("vit"))
    trainer = NeMoTrainer(model, args, train_dataset=image_samples(63), nemo_config=config)
    trainer.train()
    return {"losses": history(trainer, "nemo/loss_module"), "state": state(trainer.parent)}


class ShardedTrainer(NeMoTrainer):
    """FSDP2 on CPUs, where accelerate leaves it out."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        accelerator_state = self.accelerator.state
        accelerator_state.distributed_type = DistributedType.FSDP
        accelerator_state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        self.is_fsdp_enabled = True


class DyingTrainer(NeMoTrainer):
    """One process is killed while the second checkpoint is being written."""

    def _save_rng_state(self, output_dir):
        if self.state.global_step == 4 and RANK == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_rng_state(output_dir)


def trained(directory, resumes_from=None, evaluates=False, trainer_class=NeMoTrainer, **options):
    """A run of steps of 2 x 10 of 63 samples: losses, state, evaluation and a module's report."""
    parent = varied_parent("vit", warmup_ratio=0.0, rehearsal_probability=0.5, retention_target=0.3)
    args = arguments(
        directory, per_device_train_batch_size=10 // PROCESSES, per_device_eval_batch_size=2, max_steps=4, optim="sgd",
        gradient_accumulation_steps=2, ddp_backend="gloo" if "RANK" in os.environ else None, **options,
    )  # fmt: skip
    trainer = trainer_class(
        parent, args, train_dataset=image_samples(63), eval_dataset=image_samples(EVALUATED, seed=1),
        relevance_dataset=image_samples(13), compute_metrics=accuracy,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resumes_from if resumes_from in (True, None) else str(resumes_from))
    names = ("loss", "nemo/loss_task", "nemo/loss_contrastive", "nemo/neuron_retention_rate", "grad_norm")
    run_losses = {name: torch.tensor(history(trainer, name)) for name in names}
    found = {"losses": run_losses, "state": state(trainer._whole_parent())}
    if evaluates:
        metrics = trainer.evaluate() | trainer.evaluate_modularity()
        report = trainer.evaluate_module([1, 3]).to_dict()
        names = ("accuracy", "parent_restricted_accuracy", "samples", "parameters", "neuron_retention_rate")
        found["eval"] = {name: metrics[name] for name in ("eval_loss", "eval_accuracy", "cohesion", "coupling")}
        found["report"] = {**{name: report[name] for name in names}, **report["controls"]}
    return found


SAVED = {"save_strategy": "steps", "save_steps": 2}
SHARDED = {"trainer_class": ShardedTrainer, "fsdp": True}


def replicated(out):
    """Gradients and runs under DDP."""
    found = {}
    for setting in SETTINGS:
        for name, splits in MICRO_BATCHES.items():
            found[f"{setting} {name}"] = gradients_of(setting, splits, out)
    found["trained"] = trained(out / "two", evaluates=True, **SAVED)
    found["resumed"] = trained(out / "two again", out / "one" / "checkpoint-2")
    found["checkpointing"] = trained(out / "replayed", activation_checkpointing=True)
    found["counted"] = counted(out / "counted")
    found["assigned"] = assigned(out / "assigned")
    found["bf16"] = trained(out / "bf16", bf16=True)
    return found


def sharded(out):
    """Runs under FSDP2."""
    found = {"trained": trained(out / "sharded", evaluates=True, **SHARDED, **SAVED)}
    found["resumed"] = trained(out / "sharded again", out / "sharded" / "checkpoint-2", **SHARDED)
    replaying = {"fsdp_config": {"activation_checkpointing": True}}
    found["checkpointing"] = trained(out / "sharded replayed", **SHARDED, **replaying)
    return found


def resharded(out):
    """Goes on under FSDP2 on another number of processes."""
    return {"resumed": trained(out / "resharded", out / "sharded" / "checkpoint-2", **SHARDED)}


def dying(out):
    """A run that loses a process."""
    return trained(out / "dying", trainer_class=DyingTrainer, **SAVED)


def run(name, out):
    """Runs a function by its name and writes what it found."""
    torch.distributed.init_process_group("gloo")
    torch.save(globals()[name](out), out / f"{name}-{RANK}.pt")
    torch.distributed.destroy_process_group()


def forked(rank, name, out, port):
    """The same in a copy of a process that has imported everything already."""
    global RANK, PROCESSES
    RANK, PROCESSES = rank, 2
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in places.items()}}
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    warnings.simplefilter("ignore")  # which pytest made errors
    run(name, out)


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]))
