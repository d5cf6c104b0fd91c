"""What a module costs to run: operations and latency, beside the plain model inside its parent."""

import copy
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nemo_hf.models.base import NeMoPreTrainedModel
from nemo_hf.neurons.trial_inputs import random_inputs

LATENCY_BATCHES = (1, 8, 32)
LATENCY_RUNS = 15


def device_name(device: torch.device) -> str:
    """Names a device as its maker does, a CPU with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if device.type == "cpu" and info.is_file():
        models = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8"), re.MULTILINE)
        name = models[0] if models else name
    threads = torch.get_num_threads()
    return f"{device.type} ({name}, {threads} thread{'' if threads == 1 else 's'})"


def count_macs(model: NeMoPreTrainedModel) -> int:
    """Counts multiply-accumulates of linear layers, convolutions and attention for one sample.

    Args:
        model: A parent, which counts as the plain model inside, or a module.

    Returns:
        Half the floating-point operations that torch's counter sees for one random sample.
    """
    inputs = {name: value[:1] for name, value in random_inputs(model).items()}
    # The counter sees attention's products in the plain implementation, not in fused CPU kernels.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _plain_call(model, inputs)
    return int(counter.get_total_flops()) // 2


def _plain_call(model: NeMoPreTrainedModel, inputs: Mapping[str, Tensor]) -> None:
    """Runs the plain model inside, whose masks would cost time that a user of it does not spend."""
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    if model.masks is None:
        model.model(**inputs)
    else:
        with model.masks.disabled():
            model.model(**inputs)


@torch.no_grad()
def measure_latency(
    parent: NeMoPreTrainedModel, module: NeMoPreTrainedModel, batch_sizes: Sequence[int] = LATENCY_BATCHES
) -> tuple[dict[str, float], dict[str, float]]:
    """Times a module and the plain model inside its parent, alternating in one process.

    Args:
        parent: The parent; its masks are off.
        module: The module.
        batch_sizes: Sizes of the random batches.

    Returns:
        Median milliseconds by batch size, of the module and of the parent.
    """
    plain = copy.deepcopy(parent).detach_masks().eval()
    module.eval()
    sample = {name: value.to(parent.device) for name, value in random_inputs(module).items()}
    medians = median_times({"module": module.model, "parent": plain}, sample, batch_sizes)
    return medians["module"], medians["parent"]


@torch.no_grad()
def median_times(
    runners: Mapping[str, Callable[..., Any]], sample: Mapping[str, Tensor], batch_sizes: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Times callables in turn on the same batches, so that a busy moment of the machine meets all of them.

    Args:
        runners: What to time, by name; takes model inputs by name.
        sample: Model inputs, of which the first sample is repeated.
        batch_sizes: Sizes of the batches.

    Returns:
        Name to median milliseconds by batch size.
    """
    medians: dict[str, dict[str, float]] = {name: {} for name in runners}
    for size in batch_sizes:
        inputs = {name: value[:1].expand(size, *value.shape[1:]).contiguous() for name, value in sample.items()}
        times: dict[str, list[float]] = {name: [] for name in runners}
        for run in range(LATENCY_RUNS + 3):
            for name, runner in runners.items():
                elapsed = _timed(runner, inputs)
                if run >= 3:  # the first runs warm caches up
                    times[name].append(elapsed)
        for name, elapsed_times in times.items():
            medians[name][str(size)] = round(statistics.median(elapsed_times) * 1000, 4)
    return medians


def _timed(runner: Callable[..., Any], inputs: Mapping[str, Tensor]) -> float:
    is_cuda = next(iter(inputs.values())).is_cuda
    if is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    runner(**inputs)
    if is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
