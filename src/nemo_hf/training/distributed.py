"""Several processes as one: gathered masks, means over all samples, and what sharded models need."""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from .losses import GatheredMasks

logger = logging.getLogger(__name__)


def processes() -> int:
    """Number of processes that train together; 1 without `torch.distributed`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_processes(values: Tensor) -> Tensor:
    """Returns the mean of a tensor over all processes, without gradient; all processes must call it."""
    if processes() == 1:
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total / processes()


# torch 2.13 renames both.
_ALL_GATHER = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class _Gather(torch.autograd.Function):
    """Rows of all processes one after another; backward sums what all processes' losses say of the own rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:  # (capacity, width) -> (processes * capacity, width)
        gathered = rows.new_empty(processes() * len(rows), *rows.shape[1:])
        _ALL_GATHER(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        own = gradient.new_empty(len(gradient) // processes(), *gradient.shape[1:])
        _REDUCE_SCATTER(own, gradient.contiguous())
        return own


def gather_masks(masks: Sequence[Tensor], groups: Tensor, capacity: int) -> GatheredMasks:
    """Gathers the masks of all processes' samples, with gradient; all processes must call it.

    Shorter batches are filled up with rows that `is_sample` tells apart, so that no size has to be asked of the other
    processes, for which the host would wait.

    Args:
        masks: Soft masks, one tensor a site, each of shape (batch, neurons).
        groups: Group of each sample, shape (batch,), or membership, boolean, shape (batch, groups).
        capacity: Largest number of samples of a process's batch, the same in all processes.

    Returns:
        The masks, the groups and the samples of all processes.

    Raises:
        ValueError: If the batch is larger than `capacity`.
    """
    batch = len(groups)
    if batch > capacity:
        raise ValueError(
            f"Got a batch of {batch} samples where per_device_train_batch_size is {capacity}; expected at most that, "
            "since all processes gather as many masks. Raise it, or set NeMoConfig(gather_across_devices=False)."
        )
    filled = (0, 0, 0, capacity - batch)
    flat = nn.functional.pad(torch.cat([mask.float() for mask in masks], -1), filled)
    columns = groups[:, None] if groups.ndim == 1 else groups
    known = torch.cat([torch.ones_like(columns[:, :1]), columns], -1)
    known = _Gather.apply(nn.functional.pad(known.long(), filled))
    everyone = _Gather.apply(flat).split([mask.shape[-1] for mask in masks], -1)
    found = known[:, 1] if groups.ndim == 1 else known[:, 1:].bool()
    return GatheredMasks(everyone, found, known[:, 0].bool(), dist.get_rank() * capacity)


def share_of_samples(batch: int, device: torch.device) -> Tensor | float:
    """Weight of a process's mean over its samples, so that the mean over all processes is that over all samples.

    Args:
        batch: Number of samples in the batch of this process.
        device: Where to compute.

    Returns:
        Number of samples times processes over the number of all processes' samples; 1 without other processes.
    """
    if processes() == 1:
        return 1.0
    own = torch.full((), float(batch), device=device)
    return own / mean_over_processes(own)


def real_samples(batch: int, gradient_state: Any, rank: int) -> int:
    """Number of samples of a pass's last batch that are no repetition.

    Accelerate fills the last batches of all processes up with samples from the start.

    Args:
        batch: Number of samples in the batch of this process.
        gradient_state: The accelerator's, which knows the running data loader.
        rank: Index of this process.

    Returns:
        The number of first samples that count.
    """
    if processes() == 1 or not gradient_state.end_of_dataloader:
        return batch
    remainder = int(gradient_state.remainder)
    if remainder < 0:
        remainder = _remainder_after_resuming(gradient_state.active_dataloader)
    return min(batch, max(0, remainder - rank * batch)) if remainder > 0 else batch


def _remainder_after_resuming(loader: Any) -> int:
    """Samples of a pass's last batch over all processes, which a loader that skips batches does not know itself."""
    shard = getattr(getattr(loader, "batch_sampler", None), "batch_sampler", None)
    if shard is None or not hasattr(shard, "num_processes") or shard.drop_last:
        return -1
    return int(len(loader.dataset) % (shard.batch_size * (1 if shard.split_batches else shard.num_processes)))


def is_sharded(model: nn.Module) -> bool:
    """Whether the parameters are spread over the processes (FSDP2), so that all must call the model together."""
    # By its name, since the import takes long; parameters are whole tensors between a forward and a backward pass.
    return "FSDPModule" in {ancestor.__name__ for ancestor in type(model).__mro__}


def in_step(batches: Iterable[Mapping[str, Any]], model: nn.Module) -> Iterator[tuple[Mapping[str, Any], bool]]:
    """Iterates over a process's batches; with a sharded model until all processes have gone through theirs.

    Args:
        batches: Batches of this process.
        model: The model that will be called with each batch.

    Yields:
        A batch and whether it counts: a process that is through early repeats its last one for the others' sake.

    Raises:
        ValueError: If the model is sharded and this process has no batch at all.
    """
    if not is_sharded(model):
        yield from ((batch, True) for batch in batches)
        return
    iterator, last = iter(batches), None
    device = next(model.parameters()).device
    while True:
        batch = next(iterator, None)
        are_left = torch.tensor(float(batch is not None), device=device)
        if not bool(mean_over_processes(are_left) > 0):
            return
        last = last if batch is None else batch
        if last is None:
            raise ValueError(
                "Got fewer samples than processes; expected at least one a process, since all call a sharded model "
                "together. Use fewer processes."
            )
        yield last, batch is not None


def sharded_layers(model: Any) -> list[str]:
    """Names of the classes of layers that become units of FSDP2.

    Those that the model names, but for the one around its input embeddings, which accelerate makes a unit of its
    own: parameters can't be spread twice.

    Args:
        model: A model of `transformers`.

    Returns:
        Sorted class names.
    """
    embeddings = model.get_input_embeddings()
    names = set()
    for name in model._no_split_modules or ():
        layers = [layer for layer in model.modules() if type(layer).__name__ == name]
        if layers and not any(embeddings is inner for layer in layers for inner in layer.modules()):
            names.add(name)
    return sorted(names)


def whole_state(model: nn.Module, is_wanted: bool = True) -> dict[str, Tensor]:
    """Returns the state of a sharded model with whole tensors in main memory; all processes must call it together.

    Args:
        model: The model.
        is_wanted: Whether this process wants the tensors; if not, it only sends its parts.

    Returns:
        Name to tensor; nothing if they are not wanted. On the device there is one whole tensor at a time.
    """
    state = {}
    for name, value in model.state_dict().items():
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        if is_wanted:
            state[name] = whole.detach().cpu()
    return state


def check_parallelism(args: Any, accelerator: Any) -> None:
    """Refuses ways to spread a model under which the masks would be wrong or lost.

    Args:
        args: `TrainingArguments`.
        accelerator: The trainer's `Accelerator`.

    Raises:
        ValueError: Naming the way to use instead.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"Got {args.n_gpu} GPUs in one process, which nn.DataParallel would use; expected one process a GPU, since "
            f"masks are one state a process. Launch with: accelerate launch --num_processes {args.n_gpu} "
            "your_script.py"
        )
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and getattr(plugin, "fsdp_version", 1) != 2:
        raise ValueError(
            "Got FSDP of version 1, which flattens the generators into one parameter; expected version 2. Set "
            "fsdp_version: 2 in the accelerate configuration, as examples/accelerate_configs/fsdp2.yaml does."
        )
    if plugin is None and (args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")):
        logger.warning("Got FSDP on CPUs, which accelerate leaves out there: every process holds the whole model.")
    split = getattr(accelerator, "parallelism_config", None)
    named = [n for n in ("tp", "cp", "sp") if split is not None and getattr(split, f"{n}_enabled", False)]
    if getattr(accelerator.state, "deepspeed_plugin", None) is not None:
        named.append("DeepSpeed")
    if named:
        raise ValueError(
            f"Got {' and '.join(named)} to spread the model; expected DDP or FSDP2, under which every process runs "
            "whole layers of its own samples. Use a configuration of examples/accelerate_configs/."
        )
