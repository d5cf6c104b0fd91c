"""Operations and latency of a module, beside the plain model inside its parent."""

import copy
import platform
import re
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
Seconds = tuple[float, float]  # that passed, and in which this process computed
Clock = Callable[[], Seconds]
LATENCY_BATCHES = (1, 8, 32)
LATENCY_THREADS = 1
_TIMED = threading.RLock()  # threads that take times, or change the number of torch's threads, wait for each other
WARM_UP_RUNS = 3
RUNS_A_TURN = 3  # of which the first finds the weights of another model in the cache
LATENCY_TURNS = 12
FEWEST_TURNS = 4
LATENCY_SECONDS = 3.0  # for the runs of one batch size; it ends them once there are `FEWEST_TURNS`
PATIENCE = 4  # times as many turns, or as long, until figures that don't hold are left out
LARGEST_SPREAD = 1.05  # of ratios in both halves of the runs, and of the time over that in which the process computes
LARGEST_DRIFT = 1.2  # of times in both halves


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


def _seconds() -> Seconds:
    return time.perf_counter(), time.process_time()


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
    runners: Runners, sample: Mapping[str, Tensor], batch_sizes: Sequence[int], clock: Clock = _seconds
) -> Latency:
    """Times callables in turn, on batches of the first sample repeated, so that a busy moment meets all of them.

    A turn is some runs of each, most of which find their weights in the cache, as when a model runs alone. Turns go on
    until both halves of them give the same ratios between callables, and this process has computed nearly all the time
    (on a CPU). Batch sizes at which that fails are left out for all callables, since they are compared.
    """
    device = next(iter(sample.values())).device
    milliseconds: dict[str, dict[str, float]] = {name: {} for name in runners}
    unsteady = []
    for size in batch_sizes:
        inputs = {name: value[:1].expand(size, *value.shape[1:]).contiguous() for name, value in sample.items()}
        times, doubt = _timed(runners, inputs, device, clock)
        if doubt is not None:
            unsteady.append(f"batch size {size} ({doubt})")
            continue
        for name, runs in times.items():
            milliseconds[name][str(size)] = round(1000 * _lower_quartile(runs), 4)
    note = f"Left out, since runs disagree or other processes disturb them: {', '.join(unsteady)}."
    return Latency(device_name(device, LATENCY_THREADS), milliseconds, note if unsteady else None)


def _timed(
    runners: Runners, inputs: Mapping[str, Tensor], device: torch.device, clock: Clock
) -> tuple[Mapping[str, list[Seconds]], str | None]:
    """The times of the runs of each runner, and what speaks against them in the end."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None

    def timed(runner: Callable[..., Any]) -> Seconds:
        start = clock()
        runner(**inputs)
        wait()
        end = clock()
        return end[0] - start[0], end[1] - start[1] if device.type == "cpu" else end[0] - start[0]

    for runner in runners.values():
        for _ in range(WARM_UP_RUNS):
            runner(**inputs)
        wait()
    times: dict[str, list[Seconds]] = {name: [] for name in runners}
    started, doubt = clock()[0], None
    for turn in range(1, PATIENCE * LATENCY_TURNS + 1):
        for name, runner in runners.items():
            times[name] += [timed(runner) for _ in range(RUNS_A_TURN)]
        spent = max(turn / LATENCY_TURNS, (clock()[0] - started) / LATENCY_SECONDS if turn >= FEWEST_TURNS else 0.0)
        if spent >= 1:
            doubt = _doubt(times)
            if doubt is None or spent >= PATIENCE:
                break
    return times, doubt


def _doubt(times: Mapping[str, Sequence[Seconds]]) -> str | None:
    """Why the runs give no figures, if so: other processes held them up, or their halves differ."""
    base: tuple[float, float] | None = None
    for name, runs in times.items():
        seconds, own = map(sum, zip(*sorted(runs)[: -(-len(runs) // 2)], strict=True))
        if seconds > LARGEST_SPREAD * own:
            return f"{name}: computes in {own / seconds:.0%} of its time, the rest goes to other processes"
        early, late = (1000 * _lower_quartile(half) for half in (runs[: len(runs) // 2], runs[len(runs) // 2 :]))
        if not early <= late * LARGEST_DRIFT or not late <= early * LARGEST_DRIFT:
            return f"{name}: {early:.3g} ms, then {late:.3g} ms"
        base = base or (early, late)
        ratios = sorted((base[0] / early, base[1] / late))
        if not ratios[1] <= LARGEST_SPREAD * ratios[0]:
            first = next(iter(times))
            return f"{name}: {base[0] / early:.3g} times as fast as {first}, then {base[1] / late:.3g} times"
    return None


def _lower_quartile(runs: Sequence[Seconds]) -> float:
    return float(torch.tensor([seconds for seconds, _ in runs], dtype=torch.float64).quantile(0.25))
