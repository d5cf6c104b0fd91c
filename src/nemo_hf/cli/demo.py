"""The demo: training, cutting and measuring on scikit-learn's digits, offline, on a CPU."""

import copy
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.models.vit import ViTConfig, ViTForImageClassification

from nemo_hf.config import NeMoConfig
from nemo_hf.evaluation.controls import cut_beside_controls, measure_answers
from nemo_hf.evaluation.latency import one_thread, time_runs
from nemo_hf.evaluation.report import aligned, evaluate_module
from nemo_hf.hub.page_facts import Measured, page_facts
from nemo_hf.hub.pictures import draw_curves
from nemo_hf.hub.report_page import PAGE_NAME, page_words, write_page
from nemo_hf.models.atomic_writes import write_json
from nemo_hf.models.base import NeMoPreTrainedModel, base_parameters
from nemo_hf.training.trainer import NeMoTrainer

from .models import load

MODULES: tuple[tuple[int, ...], ...] = ((0, 1), (3, 8, 9), (0, 1, 2, 3, 4))
RETENTIONS = [0.2, 0.1, 0.05]
SAMPLES = 150  # most calibration samples of a module
EPOCHS = 40  # of the plain model; half as many beside modules
SOURCES = {"plain": "Cut from the plain model", "parent": "Cut after modules were trained, too"}
MEASURED = {"restricted": "whole model", "accuracy": "module", "raw": "before reconstruction",
            "random": "random neurons", "other": "module of other labels"}  # fmt: skip
PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn"}
OPTIONS = NeMoConfig(plain_ratio=0.0, retention_target=0.1)


class Digits(torch.utils.data.Dataset[dict[str, Any]]):
    """Prepared images of shape (samples, channels, height, width) with their digits."""

    def __init__(self, pixel_values: Tensor, labels: Sequence[int]) -> None:
        self.pixel_values, self.labels = pixel_values, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.pixel_values[index], "labels": int(self.labels[index])}


@one_thread()
def run_demo(output_dir: str | Path, seed: int = 0, epochs: int = EPOCHS) -> dict[str, Any]:
    """Trains a small ViT, cuts modules out of it, trains modules, too, and cuts them again; returns a report.

    Runs on one CPU thread; `output_dir` gets `plain/`, `parent/`, `modules/`, `report.json`, `modules.png` and
    `report.html`.
    """
    start, output = time.perf_counter(), Path(output_dir)
    processor = _processor()
    train, test, test_indices = load_digits_split(processor, seed)
    plain = digits_trainer(Trainer, train, test, seed, epochs)
    plain.train()
    mask_epochs = max(1, epochs // 2)
    options = {"nemo_config": OPTIONS, "processing_class": processor, "model": copy.deepcopy(plain.model)}
    trainer = digits_trainer(NeMoTrainer, train, test, seed, mask_epochs, **options)
    trainer.train()
    report: dict[str, Any] = {"seed": seed, "epochs": epochs, "mask_epochs": mask_epochs, "samples": SAMPLES}
    report |= {"test_indices": test_indices, "modules": []}
    for name, each in {"plain": plain, "parent": trainer}.items():
        model = each.model.eval()
        numbers = {"parameters": base_parameters(trainer.parent), "all_parameters": model.num_parameters()}
        report[name] = {"accuracy": each.evaluate()["eval_accuracy"], **numbers}
        for labels in MODULES:
            report["modules"] += _modules(name, model, labels, train, test, processor, output, seed)
        model.save_pretrained(output / name)
    processor.save_pretrained(output / "plain")
    report["seconds"] = round(time.perf_counter() - start, 1)
    draw_curves(_curves(report["modules"]), output / "modules.png")
    write_json(output / "report.json", report)
    _write_page(trainer.parent, report["modules"], test, output, seed)
    return report


def _processor() -> Any:
    """The image processor of the digits; missing packages of the demo are an `ImportError`."""
    if missing := [name for module, name in PACKAGES.items() if find_spec(module) is None]:
        raise ImportError(
            f"Got no {' and no '.join(missing)}; the demo needs these packages. Run: pip install 'nemo-hf[demo]'"
        )
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    half = [0.5] * 3
    return ViTImageProcessorPil(do_resize=False, size={"height": 8, "width": 8}, image_mean=half, image_std=half)


def _write_page(parent: Any, rows: Sequence[Mapping[str, Any]], test: Digits, output: Path, seed: int) -> None:
    """Writes a page about the parent and the largest of its modules."""
    own = [row for row in rows if row["source"] == "parent" and tuple(row["labels"]) == MODULES[-1]]
    module, batches = load(own[0]["path"]), torch.utils.data.DataLoader(test, batch_size=SAMPLES)
    evaluate_module(parent, own[0]["labels"], batches, module, show_progress=False)
    points = [{"megabytes": row["bytes"] / 1e6, **row} for row in own]
    points = [{key: row.get(key) for key in ("megabytes", "retention", *MEASURED)} for row in points]
    about = {"dataset": "scikit-learn's digits", "split": "test", "seed": seed}
    measured = Measured(module, measure_answers(module, {}, batches), points, 0, about, is_reported=True)
    words = page_words(parent, parent, {"model": str(output / "parent"), "title": "Demo: handwritten digits"})
    write_page(page_facts(parent, parent, measured, words), output / PAGE_NAME)


def load_digits_split(processor: Any, seed: int) -> tuple[Digits, Digits, list[int]]:
    """Splits the 1,797 digits by class; returns training data, test data and the latter's places in `load_digits()`."""
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = [Image.fromarray((image * (255 / 16)).astype(np.uint8)).convert("RGB") for image in digits.images]
    pixel_values = processor(images=images, return_tensors="pt")["pixel_values"]
    options = {"test_size": 0.2, "stratify": digits.target, "random_state": seed}
    chosen, held_out = train_test_split(np.arange(len(images)), **options)
    parts = [Digits(pixel_values[indices], digits.target[indices].tolist()) for indices in (chosen, held_out)]
    return parts[0], parts[1], [int(index) for index in held_out]


def digits_trainer(
    kind: Any, train: Digits, test: Digits, seed: int, epochs: int, model: PreTrainedModel | None = None, **options: Any
) -> Any:
    """Builds a `Trainer` or `NeMoTrainer` of a small ViT, new or given; `options` are further arguments of `kind`."""
    set_seed(seed)
    names = [str(digit) for digit in range(10)]
    model = model or ViTForImageClassification(ViTConfig(
        image_size=8, patch_size=2, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(names)), label2id={name: index for index, name in enumerate(names)},
    ))  # fmt: skip
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(), save_strategy="no", logging_strategy="no", report_to=[],
        num_train_epochs=epochs, learning_rate=1e-3, seed=seed, use_cpu=True, dataloader_pin_memory=False,
        per_device_train_batch_size=64, per_device_eval_batch_size=512,
    )  # fmt: skip
    return kind(model, arguments, train_dataset=train, eval_dataset=test, compute_metrics=accuracy, **options)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of right answers, for `compute_metrics`."""
    answers = np.asarray(prediction.predictions).argmax(-1)
    return {"accuracy": float((answers == prediction.label_ids).mean())}


def _modules(
    name: str, source: Any, labels: Sequence[int], train: Digits, test: Digits, processor: Any, output: Path, seed: int
) -> list[dict[str, Any]]:
    """Cuts modules of some labels, at each retention and beside their controls, and measures them."""
    chosen, options = list(labels), {"max_samples": SAMPLES, "batch_size": SAMPLES, "processing_class": processor}
    cuts = cut_beside_controls(source, chosen, train, RETENTIONS, seed, **options)
    path = (output / "modules" / name / "-".join(map(str, labels))).resolve()
    cuts[0]["accuracy"].save_pretrained(path)
    is_parent = isinstance(source, NeMoPreTrainedModel)
    plain = copy.deepcopy(source).detach_masks().eval() if is_parent else source
    rows = []
    for place, answering in enumerate(cuts):
        module = answering["accuracy"]
        done: Any = module.config.extraction
        times = time_runs({"module": module.model, "source": plain}, {"pixel_values": test.pixel_values[:1]}, [1])
        rows.append({
            "source": name, "labels": chosen, "retention": RETENTIONS[place], "path": None if place else str(path),
            **{key: done[key] for key in ("weights", "neurons", "samples", "seconds", "bytes", "source_bytes")},
            "parameters": base_parameters(module), "restricted": _accuracy(source, test, chosen, chosen),
            **{key: _accuracy(model.model, test, chosen) for key, model in answering.items()},
            "latency_ms": times.milliseconds["module"].get("1"),  # None where the runs disagree
            "source_latency_ms": times.milliseconds["source"].get("1"), "latency_note": times.note,
        })  # fmt: skip
    return rows


@torch.no_grad()
def _accuracy(model: Any, test: Digits, labels: Sequence[int], columns: Sequence[int] | None = None) -> float:
    """Share of right answers on the test samples of some labels; `columns` are the logits that count."""
    truth, wanted = torch.tensor(test.labels), torch.tensor(labels)
    own = torch.isin(truth, wanted)
    logits = model(pixel_values=test.pixel_values[own], return_dict=True).logits
    answers = (logits if columns is None else logits[:, list(columns)]).argmax(-1)
    return float((wanted[answers] == truth[own]).double().mean())


def _curves(modules: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """By source and kind of model, pairs of the share of weights kept and the accuracy, means over the modules."""
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name, title in SOURCES.items():
        rows = [row for row in modules if row["source"] == name]
        at = {share: [row for row in rows if row["retention"] == share] for share in RETENTIONS}
        curves[title] = {
            text: [(fmean(row["weights"] for row in own), fmean(row[key] for row in own)) for own in at.values()]
            for key, text in MEASURED.items()
        }
    return curves


def format_demo(report: Mapping[str, Any]) -> str:
    """Renders the demo's report for a terminal: the modules of both models side by side."""
    by_key: dict[Any, dict[str, Any]] = {}
    for row in report["modules"]:
        by_key.setdefault((tuple(row["labels"]), row["retention"]), {})[row["source"]] = row
    names = ["whole" if name == "restricted" else "module" if name == "accuracy" else name for name in MEASURED]
    rows = [["labels", "weights", "MB", "ms", *names, f"| {names[0]}", *names[1:]]]
    for (labels, _), found in by_key.items():
        row, own = found["plain"], [f"{found[name][key]:.3f}" for name in SOURCES for key in MEASURED]
        times = [f"{ms:.1f}" if ms else "-" for ms in (row["latency_ms"], row["source_latency_ms"])]
        size = f"{row['bytes'] / 1e6:.2f} of {row['source_bytes'] / 1e6:.2f}"
        own[len(MEASURED)] = f"| {own[len(MEASURED)]}"
        rows.append([",".join(map(str, labels)), f"{row['weights']:.2f}", size, " of ".join(times), *own])
    plain, parent = ([report[name]["accuracy"], report[name]["parameters"]] for name in SOURCES)
    return (
        f"plain model, {report['epochs']} epochs: accuracy {plain[0]:.3f}, {plain[1]:,} parameters\n"
        f"trained on beside its modules, {report['mask_epochs']} epochs: accuracy {parent[0]:.3f}\n\n"
        f"Accuracies of modules cut from the plain model, left, and from the one trained on, right, on up to\n"
        f"{report['samples']} samples. whole: the model they are cut from, choosing among their labels; raw: before\n"
        "reconstruction; random: other neurons, reconstructed; other: a module of other labels with this head.\n\n"
        f"{aligned(rows)}"
    )
