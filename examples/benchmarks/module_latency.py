"""How much faster modules are than their parent, beside the ratio of their operations.

    python examples/benchmarks/module_latency.py

Module and plain parent alternate in one process. Writes results/module_latency.json. Runs on one CPU thread, or on a
GPU if there is one; the ONNX rows need onnx, onnxscript and onnxruntime, the compiled ones a C++ compiler. About
twenty minutes on a CPU.
"""

import argparse
import copy
import itertools
import statistics
import tempfile
from collections.abc import Callable

import compact
import torch
from relevance import device, parent_of
from timing import alternating
from torch import Tensor
from training_step import minilm, texts, vit
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from nemo_hf.evaluation.latency import count_macs
from nemo_hf.models.base import NeMoPreTrainedModel
from nemo_hf.neurons.trial_inputs import random_inputs

MODELS = {"ViT-S/4": lambda: vit(384, 12, 6), "MiniLM": minilm}
KEPT = (0.5, 0.25)
Runner = Callable[..., object]


def bfloat16(model: NeMoPreTrainedModel) -> Runner:
    """The model with weights and images in bfloat16."""
    half = copy.deepcopy(model.model).to(torch.bfloat16)
    return lambda **inputs: half(**{k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in inputs.items()})


def onnx(model: NeMoPreTrainedModel) -> Runner:
    """The model's ONNX file in onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        model.export_onnx(folder)
        session = onnxruntime.InferenceSession(f"{folder}/model.onnx", options, providers=["CPUExecutionProvider"])
    return lambda **inputs: session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})


RUNTIMES = {
    "eager": (lambda model: model.model.eval(), (1, 8, 32, 128)),
    "bfloat16": (bfloat16, (1, 8, 32)),
    "onnx": (onnx, (1, 8, 32)),
    "compiled": (lambda model: torch.compile(model.model, dynamic=False), (32,)),
}
"""Builder and batch sizes of each."""


def sample_of(model: NeMoPreTrainedModel) -> dict[str, Tensor]:
    """Inputs of one sample; texts have 32 tokens."""
    if model.main_input_name != "input_ids":
        return {name: value[:1] for name, value in random_inputs(model).items()}
    sample = {name: value for name, value in texts(1).items() if name != "labels"}
    return {**sample, "token_type_ids": torch.zeros_like(sample["input_ids"])}


@torch.no_grad()
def measure(name: str, kept: float, rounds: int, runtime: str) -> list[dict]:
    """One row for each batch size, of one model at one share of neurons."""
    set_seed(0)
    parent = parent_of(MODELS[name](), kept)
    module = parent.extract_module([0], round_to=8)
    whole = parent_of(MODELS[name](), 1.0)  # a module of all neurons is the plain model, and can be exported
    everything = whole.extract_module(list(range(parent.config.num_labels)))
    build, sizes = RUNTIMES[runtime]
    runners = {"parent": build(everything), "module": build(module)}
    row = {"model": name, "kept": kept, "neurons": module.config.retained_neurons}
    row |= {"operations": count_macs(parent) / count_macs(module), "runtime": runtime}
    rows = []
    for batch in sizes:
        sample = sample_of(module).items()
        inputs = {name: value.repeat(batch, *[1] * (value.ndim - 1)).to(device()) for name, value in sample}
        bound = {name: lambda run=run, own=inputs: run(**own) for name, run in runners.items()}
        seconds = alternating(bound, rounds, warm_up=2)
        medians = {f"{name}_ms": 1000 * statistics.median(own) for name, own in seconds.items()}
        rows.append({**row, "batch": batch, **medians, "speedup": medians["parent_ms"] / medians["module_ms"]})
    return rows


def main() -> None:
    """Measures all models, shares and runtimes, or those that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--runtimes", nargs="+", choices=list(RUNTIMES), default=list(RUNTIMES))
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    output = compact.RESULTS / "module_latency.json"
    about = {"command": "python examples/benchmarks/module_latency.py", "rounds": given.rounds}
    for name, kept, runtime in itertools.product(given.models, KEPT, given.runtimes):
        found = measure(name, kept, given.rounds, runtime)
        print(*found, sep="\n", flush=True)
        compact.update(output, about, "times", found, "model", "kept", "runtime", "batch")


if __name__ == "__main__":
    main()
