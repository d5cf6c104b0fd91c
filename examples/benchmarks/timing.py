"""What the timed benchmarks share: runs that alternate in one process, peak memory, and what a result was made with."""

import gc
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import transformers

from nemo_hf.evaluation.latency import device_name

MEBIBYTE = 2**20


def alternating(runs: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 3) -> dict[str, list[float]]:
    """Runs functions in turn, so that a slower hour of the machine meets all of them.

    Args:
        runs: Functions by name; the order is turned round every other round.
        rounds: Measured calls of each.
        warm_up: Calls before them.

    Returns:
        Seconds of each call by name.
    """
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


def fresh_process(script: str, *arguments: str) -> str:
    """Runs a script of one's own in a process whose memory goes back as soon as it is freed; returns its last line."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, script, *arguments]
    found = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)  # noqa: S603
    return found.stdout.splitlines()[-1]


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(seconds: list[float], base: list[float]) -> dict[str, float]:
    """Ratio of the medians, and the quartiles of the ratios of calls of one round."""
    pairs = [a / b for a, b in zip(seconds, base, strict=True)]
    low, _, high = statistics.quantiles(pairs, n=4)
    return {
        "milliseconds": round(1000 * statistics.median(seconds), 3),
        "ratio": round(statistics.median(seconds) / statistics.median(base), 4),
        "quartiles": [round(low, 4), round(high, 4)],
    }


def peak_memory(build: Callable[[], Callable[[], object]], calls: int = 3) -> float:
    """Runs what `build` returns a few times.

    Returns:
        The highest memory in MiB while it runs, of the GPU if there is one, over that before it was built.
    """
    on_gpu = torch.cuda.is_available()
    before = torch.cuda.memory_allocated() / MEBIBYTE if on_gpu else _resident("VmRSS")
    run = build()
    gc.collect()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # sets the highest value back to the present one
    for _ in range(calls):
        run()
    highest = torch.cuda.max_memory_allocated() / MEBIBYTE if on_gpu else _resident("VmHWM")
    return round(highest - before, 1)


def _resident(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def made_with(script: str, arguments: list[str]) -> dict[str, object]:
    """Machine, versions and command of a result."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "command": shlex.join(["python", f"examples/benchmarks/{script}.py", *arguments]),
        "device": device_name(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
