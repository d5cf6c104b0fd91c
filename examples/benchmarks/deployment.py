"""Measures modules and their source in the formats that they are deployed in: cut, quantized, both or neither.

    python examples/benchmarks/deployment.py --data path/to/clinc150 --source CLASSIFIER --work FOLDER
    python examples/benchmarks/deployment.py --data path/to/clinc150 --source CLASSIFIER --work FOLDER --times
    python examples/benchmarks/deployment.py --data path/to/clinc150 --source CLASSIFIER --work FOLDER --rejection

The first command cuts a domain of CLINC150 out of a MiniLM that `cutting.py` trained, writes each model in each format
into FOLDER/DOMAIN, and measures accuracy on the test queries of the domain, in batches of 32 as long as their longest,
and the bytes of the model's files (not the tokenizer's). The second times the first domain's files on one CPU thread,
all in turn, on 32 of its test queries: one by one, in batches of 8 and together. It needs a quiet machine. The third
calibrates rejection on validation queries of all domains. Test queries choose nothing: calibration samples come from
the training queries. Needs onnx, onnxscript, onnxruntime and openvino; the rows of torchao need that as well.
"""

import argparse
import copy
import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import compact
import torch
from safetensors.torch import save
from tasks import Task, clinc150
from timing import alternating
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

import nemo_hf
from nemo_hf.export.onnx import ONNX_NAME, OnnxRunner
from nemo_hf.export.openvino import OPENVINO_NAME, OpenVinoRunner
from nemo_hf.models.rejection_calibration import auroc

FEWER = {"vocabulary": "shared", "max_positions": 64}
MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "source": (300, {"retention": 1.0, "reconstruct": False}),
    "0.2": (300, {"retention": 0.2}),
    "0.1": (300, {"retention": 0.1}),
    "0.2, fewer tokens": (300, {"retention": 0.2, **FEWER}),
    "0.1, fewer tokens": (300, {"retention": 0.1, **FEWER}),
    "0.22, fewer tokens, all queries": (1500, {"retention": 0.22, **FEWER}),
}
"""Calibration samples and options of `extract_module`, by name; the source is restricted to the labels, and exact."""
ONNX_FORMATS = {"onnx": None, "onnx int8": "int8", "onnx int4": "int4"}
OPENVINO_FORMATS = {"openvino": None, "openvino int8": "int8"}
FORMATS = ("torch", *ONNX_FORMATS, *OPENVINO_FORMATS, *(("torchao int8",) if find_spec("torchao") else ()))
QUERIES, BATCHES, ROUNDS = 32, (1, 8, 32), 8
Runner = Callable[[Mapping[str, Tensor]], Tensor]


class Bench:
    """The source, its data and the domain that is measured."""

    def __init__(self, given: argparse.Namespace, domain: int) -> None:
        task: Task = clinc150(given.data, str(given.source))
        self.train, self.validation, self.test = task.splits(given.seed)
        self.name, self.labels = list(task.groups.items())[domain]
        self.seed, self.source = given.seed, given.source
        self.folder = given.work / self.name
        self.own = self.test.part(self.labels)

    def calibration(self, count: int) -> list[dict[str, Tensor]]:
        """Unlabelled training queries of the domain, drawn by the seed."""
        own = self.train.part(self.labels)
        order = torch.randperm(len(own), generator=torch.Generator().manual_seed(self.seed))
        return [unlabelled(batch) for batch in own.rows(order[:count]).batches(50)]

    def module(self, model: str) -> Any:
        """Cuts a module, or loads the one that was cut before."""
        folder = self.folder / model / "module"
        if not folder.exists():
            count, options = MODELS[model]
            plain = AutoModelForSequenceClassification.from_pretrained(self.source).eval()
            nemo_hf.extract_module(
                plain, self.labels, calibration=self.calibration(count), max_samples=count, show_progress=False,
                processing_class=AutoTokenizer.from_pretrained(self.source), **options,
            ).save_pretrained(folder)  # fmt: skip
        return nemo_hf.NeMoForSequenceClassification.from_pretrained(folder).eval()


def unlabelled(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch without its labels."""
    return {name: value for name, value in batch.items() if name != "labels"}


def in_torchao(module: Any) -> Any:
    """The module with linear layers of torchao: 8-bit weights, and inputs that are rounded as they come."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantized = copy.deepcopy(module.model)
    quantize_(quantized, Int8DynamicActivationInt8WeightConfig())
    return quantized


def write(bench: Bench, model: str, form: str, module: Any) -> None:
    """Writes a module in a format; the calibration samples are compared, and nothing is refused."""
    folder = bench.folder / model / form
    options = {"calibration": bench.calibration(300), "min_agreement": 0.0}
    if form in ONNX_FORMATS:
        module.export_onnx(folder, quantize=ONNX_FORMATS[form], **options)
    elif form in OPENVINO_FORMATS:
        module.export_openvino(folder, quantize=OPENVINO_FORMATS[form], **options)


def runner(bench: Bench, model: str, form: str, module: Any) -> Runner:
    """What gives logits for a batch."""
    folder = bench.folder / model / form
    if form in ONNX_FORMATS:
        run: Any = OnnxRunner(folder / ONNX_NAME, 1)
    elif form in OPENVINO_FORMATS:
        run = OpenVinoRunner(folder / OPENVINO_NAME, 1)
    else:
        network = in_torchao(module) if form == "torchao int8" else module.model
        return torch.inference_mode()(lambda batch: network(**batch).logits)
    return lambda batch: run(**batch)[0]


def size(bench: Bench, model: str, form: str, module: Any) -> int | None:
    """Bytes of the model's files; torchao's have no files here."""
    if form == "torchao int8":
        return None
    if form == "torch":
        return len(save({name: value.contiguous() for name, value in module.model.state_dict().items()}))
    files = (bench.folder / model / form).glob(f"{Path(ONNX_NAME if 'onnx' in form else OPENVINO_NAME).stem}*")
    return sum(file.stat().st_size for file in files)


def measure(bench: Bench, model: str, form: str, module: Any) -> dict[str, Any]:
    """Accuracy and bytes of one model in one format."""
    if form in ONNX_FORMATS or form in OPENVINO_FORMATS:
        write(bench, model, form, module)
    run = runner(bench, model, form, module)
    right = sum(int((run(unlabelled(b)).argmax(-1) == b["labels"]).sum()) for b in bench.own.batches(32))
    agreement = None
    if form not in ("torch", "torchao int8"):
        (record,) = json.loads((bench.folder / model / form / "config.json").read_text())["export"].values()
        agreement = record["agreement"]
    return {"accuracy": right / len(bench.own), "bytes": size(bench, model, form, module), "agreement": agreement}


def accuracies(given: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Means over the domains of each model in each format; a work file keeps what was measured."""
    known = {tuple(row[:3]): row[3] for row in map(json.loads, work.read_text().splitlines())} if work.exists() else {}
    for domain in given.domains:
        bench = Bench(given, domain)
        for model in given.models:
            missing = [form for form in given.formats if (bench.name, model, form) not in known]
            module = bench.module(model) if missing else None
            for form in missing:
                known[bench.name, model, form] = found = measure(bench, model, form, module)
                print(bench.name, model, form, found, flush=True)
                with work.open("a") as file:
                    file.write(json.dumps([bench.name, model, form, found]) + "\n")
    return summary(known)


def summary(known: Mapping[tuple[str, str, str], dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of means; losses are points to the source in torch, restricted to the labels."""
    rows = []
    for model, form in dict.fromkeys((model, form) for _, model, form in known):
        own = {domain: row for (domain, *rest), row in known.items() if rest == [model, form]}
        whole = {domain: known[domain, "source", "torch"]["accuracy"] for domain in own}
        losses = [100 * (whole[domain] - row["accuracy"]) for domain, row in own.items()]
        row = {"model": model, "format": form, "domains": len(own), "accuracy": mean(own.values(), "accuracy")}
        row |= {
            "loss": statistics.fmean(losses),
            "worst_loss": max(losses),
            "agreement": mean(own.values(), "agreement"),
        }
        row["bytes"] = None if form == "torchao int8" else max(each["bytes"] for each in own.values())
        rows.append(row)
    return rows


def mean(rows: Iterable[dict], name: str) -> float | None:
    """Mean of a column, `None` without one."""
    values = [row[name] for row in rows if row[name] is not None]
    return statistics.fmean(values) if values else None


def times(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds a call, lower quartiles, of the first domain's models, all in turn on the same queries."""
    bench = Bench(given, given.domains[0])
    order = torch.randperm(len(bench.own), generator=torch.Generator().manual_seed(given.seed))[:QUERIES]
    queries = bench.own.rows(order)
    runs = {}
    for model in given.models:
        module = bench.module(model)
        runs |= {(model, form): runner(bench, model, form, module) for form in given.formats}
    rows = []
    for size in BATCHES:
        batches = [unlabelled(batch) for batch in queries.batches(size)]
        bound = {key: lambda run=run, own=batches: [run(batch) for batch in own] for key, run in runs.items()}
        seconds = alternating(bound, ROUNDS, warm_up=2)
        quartiles = {key: 1000 * statistics.quantiles(own, n=4)[0] / len(batches) for key, own in seconds.items()}
        tokens = statistics.fmean(batch["input_ids"].shape[1] for batch in batches)
        for (model, form), ms in quartiles.items():
            rows.append({"model": model, "format": form, "batch": size, "tokens": tokens, "ms": ms,
                         "to_source_in_format": quartiles["source", form] / ms,
                         "to_source_in_torch": quartiles["source", "torch"] / ms})  # fmt: skip
    return rows


def rejection(given: argparse.Namespace, model: str = "0.1, fewer tokens") -> list[dict[str, Any]]:
    """Shares of own and other test queries that are rejected, and the AUROC, by format: means over the domains."""
    rows = []
    for domain in given.domains:
        bench = Bench(given, domain)
        module = bench.module(model)
        nemo_hf.calibrate_rejection(module, bench.validation.batches(50), show_progress=False)
        threshold = module.config.rejection["threshold"]
        is_own = torch.isin(bench.test.labels, torch.tensor(bench.labels))
        for form, width in ONNX_FORMATS.items():
            folder = bench.folder / model / f"{form}, rejecting"
            found = module.export_onnx(folder, quantize=width, calibration=bench.calibration(300), min_agreement=0.0)
            run = OnnxRunner(folder / ONNX_NAME, 1)
            scores = torch.cat([run(**unlabelled(batch))[1] for batch in bench.test.batches(32)])
            rejected = (scores > threshold).float()
            rows.append({"model": model, "format": form, "domain": bench.name, "agreement": found.agreement.agreement,
                         "own_rejected": rejected[is_own].mean().item(), "auroc": auroc(-scores, is_own),
                         "others_rejected": rejected[~is_own].mean().item()})  # fmt: skip
            print(rows[-1], flush=True)
    return [{"model": model, "format": form, "domains": len(own),
             **{name: compact.mean(own, name) for name in ("agreement", "own_rejected", "others_rejected", "auroc")}}
            for form, own in compact.grouped(rows, "format").items()]  # fmt: skip


def main() -> None:
    """Measures what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="Folder of parquet files.")
    parser.add_argument("--source", type=Path, required=True, help="Folder of a trained plain classifier.")
    parser.add_argument("--work", type=Path, required=True, help="Folder for the files.")
    parser.add_argument("--domains", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--times", action="store_true", help="Time the files, on a quiet machine, and nothing else.")
    parser.add_argument("--rejection", action="store_true", help="Measure rejection, and nothing else.")
    given = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    given.work.mkdir(parents=True, exist_ok=True)
    about = {**compact.load(output), "command": COMMAND, "seed": given.seed, "queries": QUERIES}
    if given.times:
        compact.update(output, about, "times", times(given), "model", "format", "batch")
    elif given.rejection:
        compact.update(output, about, "rejection", rejection(given), "model", "format")
    else:
        compact.update(output, about, "accuracies", accuracies(given, given.work / "rows.jsonl"), "model", "format")


output = compact.RESULTS / "deployment.json"
COMMAND = "python examples/benchmarks/deployment.py --data DATA --source SOURCE --work FOLDER"


if __name__ == "__main__":
    main()
