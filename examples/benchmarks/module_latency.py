"""How much faster modules are than their source, beside the ratio of their operations, and where the time goes.

    python examples/benchmarks/module_latency.py clinc150 --data DATA --source SOURCE --modules FOLDER
    python examples/benchmarks/module_latency.py cifar10 --data DATA --source SOURCE --modules FOLDER

A source as in cutting.py; modules of its first set of labels are cut on 300 samples, unless the folder has them from
an earlier call. Source and modules take turns in one process, on one CPU thread; figures that do not repeat are left
out with the reason. Writes results/module_latency.json. The ONNX rows need onnx, onnxscript and onnxruntime, the
compiled ones a C++ compiler. The cuts take a minute or two, the times two minutes on a quiet machine.
"""

import argparse
import itertools
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import compact
import torch
from cutting import Bench, build, median_sample
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils import logging as transformers_logging

import nemo_hf
from nemo_hf.evaluation.latency import LARGEST_SPREAD, LATENCY_BATCHES, LATENCY_THREADS, one_thread, time_runs
from nemo_hf.export.onnx import ONNX_NAME, OnnxRunner

KEPT = (1.0, 0.5, 0.2)  # retention; with 1 the module is the source
SETS = {"clinc150": "singles", "cifar10": "pairs"}  # kinds of sets of labels
SAMPLES, TOKENS = 300, 32
TRIES = 3  # until a batch size is left out
PROFILED, PROFILES = 32, 12  # samples of a batch, and batches
KINDS = {
    "aten::addmm": "linear",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
    "aten::gelu": "activation",
    "aten::native_layer_norm": "norms",
    "aten::add": "sums",
    "aten::copy_": "copies",
}
"""Kinds of operations in the profile, other than "other"; copies are mostly of the bias that a product adds to."""
Modules = Mapping[float, torch.nn.Module]


def modules_of(bench: Bench, kind: str, folder: Path) -> Modules:
    """The modules by retention: cut into a folder, or read from it."""
    class_ = nemo_hf.NeMoForSequenceClassification if bench.encoder else nemo_hf.NeMoForImageClassification
    if not folder.exists():
        job = bench.job(bench.task.sets[kind][0], 1.0, SAMPLES, 0)
        batches = [{k: v for k, v in batch.items() if k != "labels"} for batch in job.calibration.batches(50)]
        made = nemo_hf.extract_module(
            job.source, list(job.labels), batches, list(KEPT), rejection=False, show_progress=False
        )
        for module, kept in zip(made, KEPT, strict=True):
            module.save_pretrained(folder / str(kept))
    return {kept: class_.from_pretrained(folder / str(kept)).eval() for kept in KEPT}


def samples_of(bench: Bench) -> dict[str, dict[str, Tensor]]:
    """One sample by its name: of texts one of median length, and one of 32 tokens."""
    batch = next(iter(bench.measured.rows(median_sample(bench.measured)).batches()))
    sample = {name: values for name, values in batch.items() if name != "labels"}
    if not bench.encoder:
        return {"image": sample}
    longer = {name: values.repeat(1, TOKENS)[:, :TOKENS] for name, values in sample.items()}
    return {f"{inputs['input_ids'].shape[1]} tokens": inputs for inputs in (sample, longer)}


@torch.no_grad()
def operations(module: torch.nn.Module, sample: Mapping[str, Tensor]) -> int:
    """Multiply-accumulates of linear layers, convolutions and attention."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        module(**sample)
    return counter.get_total_flops() // 2


def onnx(module: torch.nn.Module) -> Callable[..., object]:
    """The module's ONNX file in onnxruntime."""
    with tempfile.TemporaryDirectory() as folder:
        module.export_onnx(folder)
        return OnnxRunner(Path(folder, ONNX_NAME), LATENCY_THREADS)


RUNTIMES: dict[str, tuple[Callable[..., Callable[..., object]], tuple[int, ...]]] = {
    "eager": (lambda module: module.model, LATENCY_BATCHES),
    "compiled": (lambda module: torch.compile(module.model, dynamic=False), LATENCY_BATCHES[-1:]),
    "onnx": (onnx, LATENCY_BATCHES),
}
"""What runs a module, and batch sizes."""


def times(bench: Bench, modules: Modules, runtime: str) -> list[dict]:
    """A row for each module, input and batch size; without times where these do not repeat."""
    build_runner, sizes = RUNTIMES[runtime]
    runners = {str(kept): build_runner(module) for kept, module in modules.items()}
    rows = []
    for (name, sample), batch in itertools.product(samples_of(bench).items(), sizes):
        for _ in range(TRIES):
            found = time_runs(runners, sample, [batch])
            if found.note is None:
                break
        whole = operations(modules[1.0].model, sample)
        for kept in KEPT[1:]:
            row = {"model": bench.source.config.model_type, "input": name, "runtime": runtime, "batch": batch}
            row |= {"kept": kept, "operations": whole / operations(modules[kept].model, sample), "note": found.note}
            if found.note is None:
                source, own = (found.milliseconds[str(each)][str(batch)] for each in (1.0, kept))
                row |= {"source_ms": source, "ms": own, "speedup": source / own}
            rows.append(row)
            print(row, flush=True)
    return rows


@one_thread()
@torch.no_grad()
def parts(bench: Bench, modules: Modules) -> list[dict]:
    """Milliseconds of a batch by kind of operation, and the share of speedup that the source's rate of products gives.

    No rows where other processes took a part of the time.
    """
    name, sample = list(samples_of(bench).items())[-1]
    inputs = {key: value.repeat(PROFILED, *[1] * (value.ndim - 1)) for key, value in sample.items()}
    found: dict[float, Counter] = {kept: Counter(dict.fromkeys([*KINDS.values(), "other"], 0.0)) for kept in modules}
    started = time.perf_counter(), time.process_time()
    for _, (kept, module) in itertools.product(range(PROFILES), modules.items()):
        module.model(**inputs)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            module.model(**inputs)
        for event in profiled.key_averages():
            found[kept][KINDS.get(event.key, "other")] += event.self_cpu_time_total / 1000 / PROFILES
    seconds, own_seconds = time.perf_counter() - started[0], time.process_time() - started[1]
    rows, source = [], found[1.0]
    for kept, own in found.items():
        ratio = operations(modules[1.0].model, sample) / operations(modules[kept].model, sample)
        rest = own.total() - own["linear"]
        row = {"model": bench.source.config.model_type, "input": name, "batch": PROFILED, "kept": kept, **own}
        rows.append({**row, "bound": source.total() / (source["linear"] / ratio + rest) / ratio})
        print(rows[-1], flush=True)
    return rows if seconds <= LARGEST_SPREAD * own_seconds else []


def main() -> None:
    """Takes all times, or those that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=list(SETS))
    parser.add_argument("--data", default="", help="Folder of parquet files.")
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="Pretrained, for clinc150.")
    parser.add_argument("--source", type=Path, required=True, help="Folder of a trained plain classifier.")
    parser.add_argument("--modules", type=Path, required=True, help="Folder to keep the modules in.")
    parser.add_argument("--runtimes", nargs="*", choices=list(RUNTIMES), default=list(RUNTIMES))
    parser.set_defaults(seeds=[0], validation=False)
    given = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    bench = build(given, given.modules)
    modules = modules_of(bench, SETS[given.task], given.modules)
    output = compact.RESULTS / "module_latency.json"
    about = {
        "command": "python examples/benchmarks/module_latency.py TASK --data DATA --source SOURCE --modules FOLDER"
    }

    def store(table: str, rows: list[dict], keys: tuple[str, ...]) -> None:
        compact.update(output, {**compact.load(output), **about}, table, rows, *keys)

    for runtime in given.runtimes:
        store("times", times(bench, modules, runtime), ("model", "input", "runtime", "batch", "kept"))
    store("parts", parts(bench, modules), ("model", "input", "batch", "kept"))


if __name__ == "__main__":
    main()
