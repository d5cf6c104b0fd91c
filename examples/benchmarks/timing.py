"""What the timed benchmarks share: runs that alternate in one process, and peak memory."""

import ctypes
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

MEBIBYTE = 2**20
Made = TypeVar("Made")


def alternating(runs: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 3) -> dict[str, list[float]]:
    """Seconds of each call by name; runs take turns, in reverse order every other round, to share the noise."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warm_up + rounds):
        names = list(runs) if turn % 2 else list(runs)[::-1]
        for name in names:
            synchronize()
            start = time.perf_counter()
            runs[name]()
            synchronize()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(seconds: list[float], base: list[float]) -> dict[str, float]:
    """Median in milliseconds, ratio of the medians, and quartiles of the ratios of one round."""
    pairs = [a / b for a, b in zip(seconds, base, strict=True)]
    low, _, high = statistics.quantiles(pairs, n=4)
    median = statistics.median(seconds)
    return {"ms": 1000 * median, "ratio": median / statistics.median(base), "low": low, "high": high}


def fresh_process(script: str, *arguments: str) -> str:
    """Runs a script in a process that returns freed memory at once; returns its last line of output."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, script, *arguments]
    found = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)  # noqa: S603
    return found.stdout.splitlines()[-1]


def peak_memory(build: Callable[[], Callable[[], object]], calls: int = 3) -> float:
    """Peak memory in MiB, of the GPU if there is one, while what `build` returns runs, above that before `build`."""
    on_gpu = torch.cuda.is_available()
    before = torch.cuda.memory_allocated() / MEBIBYTE if on_gpu else _resident("VmRSS")
    run = build()
    gc.collect()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present value
    for _ in range(calls):
        run()
    highest = torch.cuda.max_memory_allocated() / MEBIBYTE if on_gpu else _resident("VmHWM")
    return round(highest - before, 1)


def made_within(build: Callable[[], Made]) -> tuple[Made, float]:
    """What `build` returns, and the peak memory in MiB above that before it, on a CPU with glibc."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed before counts
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    made = build()
    return made, round(_resident("VmHWM") - before, 1)


def _resident(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024
