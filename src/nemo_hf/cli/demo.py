"""The demo: training, cutting and measuring on scikit-learn's digits, offline, on a CPU."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForImageClassification, EvalPrediction, Trainer, TrainingArguments, set_seed
from transformers.models.vit import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from nemo_hf.config import NeMoConfig
from nemo_hf.evaluation.latency import one_thread
from nemo_hf.evaluation.report import format_table
from nemo_hf.hub.pictures import draw_neurons
from nemo_hf.models.atomic_writes import write_json
from nemo_hf.models.base import base_parameters
from nemo_hf.training.trainer import NeMoTrainer

MODULES: tuple[tuple[int, ...], ...] = ((0, 1), (3, 8, 9), (0, 1, 2, 3, 4))
TIMES = ("latency_ms", "parent_latency_ms")
EPOCHS = 60
OPTIONS = NeMoConfig(contrastive_weight=0.4, rehearsal_probability=0.3, retention_target=0.1)


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
    """Trains a small ViT plain and with masks, cuts, saves, reloads and measures modules; returns the report.

    Runs on one CPU thread; `output_dir` gets `parent/`, `modules/`, `report.json` and `modules.png`.
    """
    start, output = time.perf_counter(), Path(output_dir)
    half = [0.5] * 3
    processor = ViTImageProcessorPil(do_resize=False, size={"height": 8, "width": 8}, image_mean=half, image_std=half)
    train, test, test_indices = load_digits_split(processor, seed)
    plain = digits_trainer(Trainer, train, test, seed, epochs)
    plain.train()
    options = {"nemo_config": OPTIONS, "processing_class": processor}
    trainer = digits_trainer(NeMoTrainer, train, test, seed, epochs, **options)
    trainer.train()
    accuracies = [each.evaluate()["eval_accuracy"] for each in (plain, trainer)]
    parent, parameters, modularity = trainer.parent, base_parameters(trainer.parent), trainer.evaluate_modularity()
    trainer.save_model(str(output / "parent"))
    report: dict[str, Any] = {"seed": seed, "epochs": epochs, "test_indices": test_indices}
    for name, reached in zip(("plain", "parent"), accuracies, strict=True):
        report[name] = {"accuracy": reached, "parameters": parameters}
    report["parent"] |= {"generator_parameters": parent.num_parameters() - parameters, **modularity}
    report["modules"] = [_module(trainer, labels, output) for labels in MODULES]
    report["seconds"] = round(time.perf_counter() - start, 1)
    draw_neurons(parent, output / "modules.png")
    write_json(output / "report.json", report)
    return report


def load_digits_split(processor: Any, seed: int) -> tuple[Digits, Digits, list[int]]:
    """Splits the 1,797 digits by class; returns training data, test data and the latter's places in `load_digits()`."""
    try:
        from PIL import Image
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError(f"The demo needs {error.name}. Run: pip install nemo-hf[demo]") from error
    digits = load_digits()
    images = [Image.fromarray((image * (255 / 16)).astype(np.uint8)).convert("RGB") for image in digits.images]
    pixel_values = processor(images=images, return_tensors="pt")["pixel_values"]
    options = {"test_size": 0.2, "stratify": digits.target, "random_state": seed}
    chosen, held_out = train_test_split(np.arange(len(images)), **options)
    parts = [Digits(pixel_values[indices], digits.target[indices].tolist()) for indices in (chosen, held_out)]
    return parts[0], parts[1], [int(index) for index in held_out]


def digits_trainer(kind: Any, train: Digits, test: Digits, seed: int, epochs: int, **options: Any) -> Any:
    """Builds a `Trainer` or `NeMoTrainer` of a small ViT; `options` are further arguments of `kind`."""
    set_seed(seed)
    names = [str(digit) for digit in range(10)]
    model = ViTForImageClassification(ViTConfig(
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


def _module(trainer: NeMoTrainer, labels: Sequence[int], output: Path) -> dict[str, Any]:
    """Cuts a module, saves it, loads it back and measures what was loaded."""
    path = (output / "modules" / "-".join(map(str, labels))).resolve()
    trainer.extract_module(list(labels)).save_pretrained(path)
    loaded = AutoModelForImageClassification.from_pretrained(path)
    report = trainer.evaluate_module(list(labels), module=loaded).to_dict()
    loaded.save_pretrained(path)  # with its report
    for kind in TIMES:
        report |= {kind: report[kind].get("1"), f"{kind}_by_batch": report[kind]}  # None if runs disagree
    return {**report, "labels": list(labels), "path": str(path), "equivalence": loaded.config.equivalence}


def format_demo(report: Mapping[str, Any]) -> str:
    """Renders the demo's report for a terminal."""
    plain, parent = report["plain"], report["parent"]
    modules = [{**module, **{kind: module[f"{kind}_by_batch"] for kind in TIMES}} for module in report["modules"]]
    return (
        f"plain model   accuracy {plain['accuracy']:.3f}   {plain['parameters']:,} parameters\n"
        f"parent        accuracy {parent['accuracy']:.3f}   {parent['parameters']:,} parameters "
        f"+ {parent['generator_parameters']:,} of mask generators   coupling {parent['coupling']:.2f}\n\n"
        f"{format_table(modules)}"
    )
