"""Operations and latency of a module, beside the plain model inside its parent."""

import copy
import platform
import re
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from nemo_hf.models.base import NeMoPreTrainedModel
from nemo_hf.models.equivalence import as_saved
from nemo_hf.neurons.trial_calls import on_device
from nemo_hf.neurons.trial_inputs import random_inputs

Runners = Mapping[str, Callable[..., Any]]
Clock = Callable[[], float]
LATENCY_BATCHES = (1, 8, 32)
LATENCY_THREADS = 1
_TIMED = threading.RLock()  # threads that take times, or change the number of torch's threads, wait for each other
WARM_UP_RUNS = 3
LATENCY_RUNS = 30
FEWEST_RUNS = 5
LATENCY_SECONDS = 2.0  # for the runs of one batch size; it ends them once there are `FEWEST_RUNS`
LARGEST_SPREAD = 2.0  # upper over lower quartile of the runs, above which a batch size is left out


@dataclass(frozen=True)
class Latency:
    """Lower quartiles of the runs in milliseconds, by what ran and batch size; the note says which are left out."""

    device: str
    milliseconds: dict[str, dict[str, float]]
    note: str | None = None


def device_name(device: torch.device, threads: int | None = None) -> str:
    """Names a device as its maker does, a CPU with its threads; `None` takes those that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if device.type == "cpu" and info.is_file():
        models = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8"), re.MULTILINE)
        name = models[0] if models else name
    threads = threads or torch.get_num_threads()
    return f"{device.type} ({name}, {threads} thread{'' if threads == 1 else 's'})"


class _PlainAttention(TorchFunctionMode):
    """Attention as products that a counter sees, unlike fused CPU kernels; torch's own switch acts on all threads."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_attention_math(*args, **(kwargs or {}))[0]
        return func(*args, **(kwargs or {}))


class _NoTracker(nullcontext[None]):
    """In place of what tells a counter the layers that run, by hooks on the models of all threads."""

    parents = ("Global",)


def count_macs(model: NeMoPreTrainedModel) -> int:
    """Multiply-accumulates of linear layers, convolutions and attention for a sample in eval mode, without masks."""
    inputs = on_device(model, random_inputs(model, samples=1))
    counter: Any = FlopCounterMode(display=False)
    counter.mod_tracker = _NoTracker()
    with as_saved(model) as (saved,), torch.no_grad():
        masks_off = nullcontext() if saved.masks is None else saved.masks.disabled()
        with masks_off, _PlainAttention(), counter:
            saved.model(**inputs)
    return int(counter.get_total_flops()) // 2


def measure_latency(
    parent: NeMoPreTrainedModel, module: NeMoPreTrainedModel, batch_sizes: Sequence[int] = LATENCY_BATCHES
) -> Latency:
    """Times a module (`"module"`) and the plain model inside its parent (`"parent"`), both in eval mode."""
    runners = {"module": module.model, "parent": copy.deepcopy(parent).detach_masks().eval()}
    return time_runs(runners, on_device(module, random_inputs(module)), batch_sizes)


@contextmanager
def one_thread() -> Iterator[None]:
    """Keeps torch to one CPU thread, so that results and times do not depend on the number of cores."""
    with _TIMED:
        threads = torch.get_num_threads()
        torch.set_num_threads(LATENCY_THREADS)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


@one_thread()
@torch.no_grad()
def time_runs(
    runners: Runners, sample: Mapping[str, Tensor], batch_sizes: Sequence[int], clock: Clock = time.perf_counter
) -> Latency:
    """Times callables in turn, on batches of the first sample repeated, so that a busy moment meets all of them.

    Batch sizes at which the runs of one of them disagree are left out for all, since they are compared.
    """
    device = next(iter(sample.values())).device
    milliseconds: dict[str, dict[str, float]] = {name: {} for name in runners}
    unsteady = []
    for size in batch_sizes:
        inputs = {name: value[:1].expand(size, *value.shape[1:]).contiguous() for name, value in sample.items()}
        quartiles = _quartiles(runners, inputs, device, clock)
        worst = max(quartiles, key=lambda name: quartiles[name][2] / quartiles[name][0])
        low, _, high = quartiles[worst]
        if high > LARGEST_SPREAD * low:
            unsteady.append(f"batch size {size} ({worst}: quartiles {low:.3g} and {high:.3g} ms)")
            continue
        for name, (low, *_) in quartiles.items():
            milliseconds[name][str(size)] = round(low, 4)
    note = f"Left out, since runs disagree by more than a factor of {LARGEST_SPREAD:g}: {', '.join(unsteady)}."
    return Latency(device_name(device, LATENCY_THREADS), milliseconds, note if unsteady else None)


def _quartiles(
    runners: Runners, inputs: Mapping[str, Tensor], device: torch.device, clock: Clock
) -> dict[str, list[float]]:
    """The three quartiles of each runner's times, in milliseconds."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None

    def timed(runner: Callable[..., Any]) -> float:
        wait()
        start = clock()
        runner(**inputs)
        wait()
        return 1000 * (clock() - start)

    for _ in range(WARM_UP_RUNS):
        for runner in runners.values():
            runner(**inputs)
    times: dict[str, list[float]] = {name: [] for name in runners}
    started = clock()
    for run in range(LATENCY_RUNS):
        if run >= FEWEST_RUNS and clock() - started >= LATENCY_SECONDS:
            break
        for name, runner in runners.items():
            times[name].append(timed(runner))
    return {name: statistics.quantiles(elapsed, n=4, method="inclusive") for name, elapsed in times.items()}
