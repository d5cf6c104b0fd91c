"""Training in several processes: gathered masks, samples that count, sharded parents, checks of the setup."""

import copy
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from torch import distributed as dist
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from nemo_hf.auto_classes import NeMoClassifier

from .losses import GatheredMasks, have_labels

logger = logging.getLogger(__name__)

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

    Batches are filled up to `capacity` rows, so that no process waits on the host for the others' batch sizes.
    """
    batch = len(groups)
    if batch > capacity:
        raise ValueError(
            f"Got a batch of {batch} samples; expected at most {capacity}, as per_device_train_batch_size says. Raise "
            "it, or set NeMoConfig(gather_across_devices=False)."
        )
    filled = (0, 0, 0, capacity - batch)
    columns = groups[:, None] if groups.ndim == 1 else groups
    known = torch.cat([have_labels(groups)[:, None], columns], -1).long()
    known = _Gather.apply(nn.functional.pad(known, filled))
    everyone = _Gather.apply(nn.functional.pad(masks.float(), filled))
    found = known[:, 1] if groups.ndim == 1 else known[:, 1:].bool()
    return GatheredMasks(everyone, found, known[:, 0].bool(), dist.get_rank() * capacity)


def real_samples(batch: int, gradient_state: Any, rank: int, processes: int) -> int:
    """How many first samples of a process's batch count: accelerate fills last batches up with others."""
    if processes == 1 or not gradient_state.end_of_dataloader:
        return batch
    remainder, loader = int(gradient_state.remainder), gradient_state.active_dataloader
    shard: Any = getattr(getattr(loader, "batch_sampler", None), "batch_sampler", None)
    if remainder < 0 and hasattr(shard, "num_processes") and not shard.drop_last:
        # After resuming, a loader that skips batches does not know how many samples its last batches have.
        remainder = len(loader.dataset) % (shard.batch_size * (1 if shard.split_batches else shard.num_processes))
    return min(batch, max(0, remainder - rank * batch)) if remainder > 0 else batch


def is_sharded(model: nn.Module) -> bool:
    """Whether the parameters are spread over the processes (FSDP2), so that all must call the model together."""
    # By its name, since the import takes long; parameters are whole tensors between a forward and a backward pass.
    return "FSDPModule" in {ancestor.__name__ for ancestor in type(model).__mro__}


def in_step(batches: Iterable[Mapping[str, Any]], model: nn.Module) -> Iterator[tuple[Mapping[str, Any], bool]]:
    """Yields a process's batches and whether they count.

    With a sharded model, a process that finishes early repeats its last batch, uncounted, until all have finished.
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
                "Got fewer samples than processes; expected one for each with a sharded model. Use fewer processes."
            )
        yield last, batch is not None


def raise_together(error: Exception | None, accelerator: Any) -> None:
    """Raises an error in all processes if one of them has it; all must call it."""
    count = torch.tensor(float(error is not None), device=accelerator.device)
    is_any = bool(accelerator.reduce(count, reduction="sum") > 0)
    if error is not None:
        raise error
    if is_any:
        raise RuntimeError("Another process failed; its message says why.")


def sample_weights(labels: Tensor, args: Any, mean: Callable[[Tensor], Tensor]) -> tuple[Tensor | float, ...]:
    """Weights of this process's means, over samples and over those that have a label.

    With them the mean over processes is the mean over the samples of all.
    """
    if args.world_size == 1:
        return 1.0, 1.0
    counted = have_labels(labels)
    own = torch.stack([torch.ones_like(counted).sum(), counted.sum()]).float()  # copies from the host would wait
    return tuple(own / mean(own).clamp(min=1 / args.world_size))


def sharded_layers(model: Any) -> list[str]:
    """Sorted class names of the layers that become units of FSDP2: those that the model names.

    One around the input embeddings is left out: accelerate shards these, and parameters can't be sharded twice.
    """
    embeddings, names = model.get_input_embeddings(), set(model._no_split_modules or ())
    layers = [layer for layer in model.modules() if type(layer).__name__ in names]
    outer = {type(layer) for layer in layers if any(embeddings is inner for inner in layer.modules())}
    return sorted({type(layer).__name__ for layer in layers if type(layer) not in outer})


def prepare_sharding(plugin: Any, parent: NeMoClassifier) -> None:
    """Sets in accelerate's plugin for FSDP2, if there is one, which layers are units and how checkpoints are kept."""
    if plugin is None:
        return
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = sharded_layers(parent)
    if "FULL_STATE_DICT" in str(plugin.state_dict_type):
        # The whole parent is saved besides, and accelerate 1.15 waits forever when it resumes from this kind.
        plugin.state_dict_config = plugin.optim_state_dict_config = None  # they belong to the kind
        plugin.set_state_dict_type("SHARDED_STATE_DICT")


def whole_state(model: nn.Module, to_first_process: bool = False) -> dict[str, Any]:
    """Whole tensors of a sharded model, or only in the first process's main memory; all processes must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict  # takes long

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=to_first_process))


def whole_copy(parent: NeMoClassifier) -> NeMoClassifier:
    """A copy of a sharded parent with whole parameters, in eval mode; all processes must call it together."""
    plain_class = type(parent).__bases__[-1]  # `fully_shard` puts a class of its own before it
    copied: NeMoClassifier = plain_class(copy.deepcopy(parent.config))
    copied.load_state_dict(whole_state(parent), assign=True)
    copied.processor_files, copied.report = parent.processor_files, parent.report
    copied.to(parent.device)  # type: ignore[arg-type]
    return copied.eval()  # type: ignore[no-any-return]


def save_parent(parent: NeMoClassifier, folder: str, state_dict: dict[str, Any] | None) -> None:
    """Saves a parent; an older checkpoint there counts as whole again only when all its files are written anew."""
    path = Path(folder)
    if path.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
        (path / "trainer_state.json").unlink(missing_ok=True)
    parent.save_pretrained(path, state_dict=state_dict)


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true")


def check_start(model: Any) -> None:
    """Refuses a model in `nn.DataParallel`, and a start in which only one process reads the weights."""
    if _is_set("ACCELERATE_USE_FSDP") and _is_set("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ValueError(
            "Got fsdp_cpu_ram_efficient_loading: true, under which one process reads the weights for all; expected "
            "false. Set it in the accelerate configuration."
        )
    if isinstance(model, nn.DataParallel):
        raise _data_parallel_error(max(1, len(model.device_ids)))


def _data_parallel_error(count: int) -> ValueError:
    return ValueError(
        "Got several GPUs in one process, for nn.DataParallel; expected one process per GPU. Launch with: "
        f"accelerate launch --num_processes {count} your_script.py"
    )


def check_parallelism(args: Any, accelerator: Any) -> None:
    """Refuses ways to spread a model under which the masks would be wrong or lost."""
    if args.n_gpu > 1:
        raise _data_parallel_error(args.n_gpu)
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and getattr(plugin, "fsdp_version", 1) != 2:
        raise ValueError(
            "Got FSDP of version 1, which flattens the generators into one parameter; expected version 2. Set "
            "fsdp_version: 2 in the accelerate configuration, as examples/accelerate_configs/fsdp2.yaml does."
        )
    if plugin is None and (args.fsdp or _is_set("ACCELERATE_USE_FSDP")):
        logger.warning("accelerate does not use FSDP on CPUs: every process holds the whole model.")
    split = getattr(accelerator, "parallelism_config", None)
    named = [name for name in ("tp", "cp", "sp") if getattr(split, f"{name}_enabled", False)]
    if getattr(accelerator.state, "deepspeed_plugin", None) is not None:
        named.append("DeepSpeed")
    if named:
        raise ValueError(
            f"Got {' and '.join(named)} to spread the model; expected DDP or FSDP2, where a process runs whole layers. "
            "Use a configuration of examples/accelerate_configs/."
        )
