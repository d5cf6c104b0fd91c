"""What training in several processes needs: gathered masks, the samples that count, sharded parents, refusals."""

import copy
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from torch import distributed as dist
from transformers.trainer_utils import sort_checkpoints

from nemo_hf.auto_classes import NeMoClassifier

from .losses import GatheredMasks

logger = logging.getLogger(__name__)

STATE_NAME = "trainer_state.json"
"""File that is written last into a checkpoint."""

# torch 2.13 renames both. Its own all_gather with a gradient is deprecated in favour of one in a private module.
_ALL_GATHER = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class _Gather(torch.autograd.Function):
    """Rows of all processes one after another; backward sums the gradients of all processes for the own rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:  # (capacity, width) -> (processes * capacity, width)
        gathered = rows.new_empty(dist.get_world_size() * len(rows), *rows.shape[1:])
        _ALL_GATHER(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        own = gradient.new_empty(len(gradient) // dist.get_world_size(), *gradient.shape[1:])
        _REDUCE_SCATTER(own, gradient.contiguous())
        return own


def gather_masks(masks: Tensor, groups: Tensor, capacity: int) -> GatheredMasks:
    """Gathers the flat masks of all processes' samples, with gradient; all processes must call it.

    Batches are filled up to `capacity` rows, the same in all processes, so that no process has to wait on the host for
    the others' batch sizes. A larger batch is a ValueError.
    """
    batch = len(groups)
    if batch > capacity:
        raise ValueError(
            f"Got a batch of {batch} samples where per_device_train_batch_size is {capacity}; expected at most that, "
            "since all processes gather as many masks. Raise it, or set NeMoConfig(gather_across_devices=False)."
        )
    filled = (0, 0, 0, capacity - batch)
    columns = groups[:, None] if groups.ndim == 1 else groups
    known = torch.cat([torch.ones_like(columns[:, :1]), columns], -1).long()
    known = _Gather.apply(nn.functional.pad(known, filled))
    everyone = _Gather.apply(nn.functional.pad(masks.float(), filled))
    found = known[:, 1] if groups.ndim == 1 else known[:, 1:].bool()
    return GatheredMasks(everyone, found, known[:, 0].bool(), dist.get_rank() * capacity)


def real_samples(batch: int, gradient_state: Any, rank: int, processes: int) -> int:
    """Number of first samples of a process's batch that count.

    Accelerate fills the last batches of all processes up with samples from the start of the data.
    """
    if processes == 1 or not gradient_state.end_of_dataloader:
        return batch
    remainder = int(gradient_state.remainder)
    if remainder < 0:
        remainder = _remainder_after_resuming(gradient_state.active_dataloader)
    return min(batch, max(0, remainder - rank * batch)) if remainder > 0 else batch


def _remainder_after_resuming(loader: Any) -> int:
    """Samples in the last batches of all processes, which a loader that skips batches does not know itself."""
    shard = getattr(getattr(loader, "batch_sampler", None), "batch_sampler", None)
    if shard is None or not hasattr(shard, "num_processes") or shard.drop_last:
        return -1
    return int(len(loader.dataset) % (shard.batch_size * (1 if shard.split_batches else shard.num_processes)))


def is_sharded(model: nn.Module) -> bool:
    """Whether the parameters are spread over the processes (FSDP2), so that all must call the model together."""
    # By its name, since the import takes long; parameters are whole tensors between a forward and a backward pass.
    return "FSDPModule" in {ancestor.__name__ for ancestor in type(model).__mro__}


def in_step(batches: Iterable[Mapping[str, Any]], model: nn.Module) -> Iterator[tuple[Mapping[str, Any], bool]]:
    """Yields a process's batches and whether they count.

    With a sharded model, a process that is through early repeats its last batch, which does not count, until all are
    through. A process without any batch is then a ValueError.
    """
    if not is_sharded(model):
        yield from ((batch, True) for batch in batches)
        return
    iterator, last = iter(batches), None
    device = next(model.parameters()).device
    while True:
        batch = next(iterator, None)
        if not bool(reduce(torch.tensor(float(batch is not None), device=device)) > 0):
            return
        last = last if batch is None else batch
        if last is None:
            raise ValueError(
                "Got fewer samples than processes; expected at least one a process, since all call a sharded model "
                "together. Use fewer processes."
            )
        yield last, batch is not None


def sharded_layers(model: Any) -> list[str]:
    """Sorted class names of the layers that become units of FSDP2.

    Those that the model names, except one around its input embeddings, which accelerate makes a unit of its own:
    parameters can't be sharded twice.
    """
    embeddings = model.get_input_embeddings()
    names = set()
    for name in model._no_split_modules or ():
        layers = [layer for layer in model.modules() if type(layer).__name__ == name]
        if layers and not any(embeddings is inner for layer in layers for inner in layer.modules()):
            names.add(name)
    return sorted(names)


def whole_state(model: nn.Module, to_first_process: bool = False) -> dict[str, Any]:
    """State of a sharded model with whole tensors; all processes must call it together.

    `to_first_process` collects it in the main memory of that process alone; the others get nothing.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict  # takes long

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=to_first_process))


def whole_copy(parent: NeMoClassifier) -> NeMoClassifier:
    """A copy of a sharded parent with whole parameters, in eval mode; all processes must call it together."""
    plain_class = type(parent).__bases__[-1]  # `fully_shard` puts a class of its own before it
    copied: NeMoClassifier = plain_class(copy.deepcopy(parent.config))
    copied.load_state_dict(whole_state(parent), assign=True)
    copied.processor_files, copied.report = parent.processor_files, parent.report
    copied.to(parent.device)  # type: ignore[arg-type]
    copied.eval()
    return copied


def whole_checkpoint(output_dir: str, given: str | bool) -> str:
    """The checkpoint to resume from: `given`, or if that is `True` the last one that was written to its end."""
    found = sort_checkpoints(output_dir) if given is True else [str(given)]
    for folder in reversed(found):
        with suppress(OSError, ValueError):
            json.loads(Path(folder, STATE_NAME).read_text(encoding="utf-8"))
            return folder
    raise ValueError(
        f"Got {[Path(folder).name for folder in found]} to resume from; expected a checkpoint with {STATE_NAME}, "
        "which is written last. Name another checkpoint, or start anew."
    )


def check_start(model: Any) -> None:
    """Refuses a model in `nn.DataParallel`, and a start in which only one process reads the weights."""
    names = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    if all(os.environ.get(name, "").lower() in ("1", "true") for name in names):
        raise ValueError(
            "Got fsdp_cpu_ram_efficient_loading: true, under which only one process reads the weights; expected false, "
            "since every process finds the neurons and tries cuts. Set it in the accelerate configuration."
        )
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "Got a model in nn.DataParallel; expected the model itself and one process a GPU, since masks are one "
            f"state a process. Launch with: accelerate launch --num_processes {max(1, len(model.device_ids))} "
            "your_script.py"
        )


def check_parallelism(args: Any, accelerator: Any) -> None:
    """Refuses ways to spread a model under which the masks would be wrong or lost, naming the one to use instead."""
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
        logger.warning("accelerate does not use FSDP on CPUs: every process holds the whole model.")
    split = getattr(accelerator, "parallelism_config", None)
    named = [n for n in ("tp", "cp", "sp") if split is not None and getattr(split, f"{n}_enabled", False)]
    if getattr(accelerator.state, "deepspeed_plugin", None) is not None:
        named.append("DeepSpeed")
    if named:
        raise ValueError(
            f"Got {' and '.join(named)} to spread the model; expected DDP or FSDP2, under which every process runs "
            "whole layers of its own samples. Use a configuration of examples/accelerate_configs/."
        )
