"""How much faster modules are: latency beside the parent's, and beside what their operations promise.

    python examples/benchmarks/module_latency.py

Module and plain parent alternate in one process. "ideal" is the parent's multiply-accumulates over the module's,
"reached" the speedup over that. Writes module_latency.json beside this script. Runs on one CPU thread, or on a GPU if
there is one; needs onnx, onnxscript and onnxruntime for the ONNX rows and a C++ compiler for the compiled ones. About
twenty minutes on a CPU.
"""

import argparse
import copy
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from relevance import device, parent_of
from timing import alternating, made_with
from torch import Tensor
from training_step import minilm, vit
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from nemo_hf.evaluation.latency import count_macs
from nemo_hf.models.base import NeMoPreTrainedModel
from nemo_hf.models.files import write_json
from nemo_hf.neurons.trial_inputs import random_inputs

HERE = Path(__file__).parent
MODELS = {"ViT-S/4": lambda: vit(384, 12, 6), "MiniLM": minilm}
KEPT = (0.5, 0.25)
BATCHES = (1, 8, 32, 128)
TOKENS = 32
Runner = Callable[..., object]


def sample_of(model: NeMoPreTrainedModel) -> dict[str, Tensor]:
    """Inputs of one sample; texts have 32 tokens."""
    if model.main_input_name == "input_ids":
        tokens = torch.arange(5, 5 + TOKENS)[None]
        ones = torch.ones_like(tokens)
        return {"input_ids": tokens, "attention_mask": ones, "token_type_ids": 0 * ones}
    return {name: value[:1] for name, value in random_inputs(model).items()}


def times(runners: Mapping[str, Runner], sample: Mapping[str, Tensor], batches, rounds: int, ideal: float) -> list:
    """One row a batch size: medians of both, the speedup, and how much of the ideal it reaches."""
    rows = []
    for batch in batches:
        inputs = {name: value.repeat(batch, *[1] * (value.ndim - 1)).to(device()) for name, value in sample.items()}
        bound = {name: lambda run=run, own=inputs: run(**own) for name, run in runners.items()}
        seconds = alternating(bound, rounds, warm_up=2)
        parent, module = (statistics.median(seconds[name]) for name in ("parent", "module"))
        speedup = parent / module
        rows.append({"batch": batch, "parent_ms": round(1000 * parent, 3), "module_ms": round(1000 * module, 3),
                     "speedup": round(speedup, 3), "reached": round(speedup / ideal, 3)})  # fmt: skip
    return rows


def in_bfloat16(model: torch.nn.Module) -> Runner:
    """The model with weights and images in bfloat16."""
    half = copy.deepcopy(model).to(torch.bfloat16)

    def run(**inputs: Tensor) -> object:
        return half(**{k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in inputs.items()})

    return run


def onnx_session(model: NeMoPreTrainedModel) -> Runner:
    """The module's ONNX file in onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        model.export_onnx(folder)
        session = onnxruntime.InferenceSession(f"{folder}/model.onnx", options, providers=["CPUExecutionProvider"])
    return lambda **inputs: session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})


@torch.no_grad()
def measure(name: str, kept: float, rounds: int, ways: list[str]) -> dict:
    """One model at one share of neurons."""
    set_seed(0)
    parent = parent_of(MODELS[name](), kept)
    module = parent.extract_module([0], round_to=8)
    whole = parent_of(MODELS[name](), 1.0)  # a module of all neurons is the plain model, and can be exported
    everything = whole.extract_module(list(range(parent.config.num_labels)))
    plain = {"parent": everything.model.eval(), "module": module.model.eval()}
    ideal = count_macs(parent) / count_macs(module)
    row = {"model": name, "kept": kept, "neurons": module.config.retained_neurons, "ideal": round(ideal, 3)}
    sample, rest = sample_of(module), {"rounds": rounds, "ideal": ideal}
    if "eager" in ways:
        row["eager"] = times(plain, sample, BATCHES, **rest)
    if "bfloat16" in ways:
        row["bfloat16"] = times({k: in_bfloat16(m) for k, m in plain.items()}, sample, BATCHES[:3], **rest)
    if "onnx" in ways and device().type == "cpu":
        exported = {"parent": onnx_session(everything), "module": onnx_session(module)}
        row["onnx"] = times(exported, sample, BATCHES[:3], **rest)
    if "compiled" in ways:
        compiled = {k: torch.compile(m, dynamic=False) for k, m in plain.items()}
        row["compiled"] = times(compiled, sample, BATCHES[2:3], **rest)
    return row


@torch.no_grad()
def empty_attention(rounds: int) -> dict:
    """What attention without neurons still costs: modules of ViT-S with and without it, FFN whole."""
    set_seed(0)
    runners: dict[str, Runner] = {}
    for name in ("empty", "skipped"):
        parent = parent_of(vit(384, 12, 6), 1.0)
        for mask in parent.masks.site_masks():
            if mask.site.kind == "attention":
                mask.relevance.zero_()
        model = parent.extract_module([0]).model.eval()
        if name == "skipped":
            for layer in model.vit.layers:
                bias = layer.attention.o_proj.bias
                layer.attention.forward = lambda states, *rest, own=bias, **more: (own.expand_as(states), None)
        runners[name] = model
    whole = parent_of(vit(384, 12, 6), 1.0)
    runners["whole"] = whole.extract_module([0]).model.eval()
    inputs = {"pixel_values": torch.randn(32, 3, 32, 32, device=device())}
    seconds = alternating({name: lambda run=run: run(**inputs) for name, run in runners.items()}, rounds)
    return {name: round(1000 * statistics.median(own), 3) for name, own in seconds.items()}


def main() -> None:
    """Measures all models and shares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ways = ["eager", "bfloat16", "onnx", "compiled"]
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--ways", nargs="+", choices=ways, default=ways)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=HERE / "module_latency.json")
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    found: dict[str, object] = {"empty attention, ViT-S/4, batch 32, ms": empty_attention(options.rounds)}
    print(json.dumps(found), flush=True)
    result = {**made_with("module_latency", sys.argv[1:]), "rounds": options.rounds, **found, "rows": []}
    for name in options.models:
        for kept in KEPT:
            result["rows"].append(measure(name, kept, options.rounds, options.ways))
            print(json.dumps(result["rows"][-1]), flush=True)
            write_json(options.output, result)


if __name__ == "__main__":
    main()
