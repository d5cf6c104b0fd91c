"""The main job on embedded data: scikit-learn's digits, offline, on a CPU."""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForImageClassification,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from nemo_hf.config import NeMoConfig
from nemo_hf.evaluation.report import evaluate_module, format_table
from nemo_hf.hub.pictures import draw_neurons
from nemo_hf.models.base import base_parameters
from nemo_hf.models.files import write_json
from nemo_hf.training.trainer import NeMoTrainer

MODULES: tuple[tuple[int, ...], ...] = ((0, 1), (3, 8, 9), (0, 1, 2, 3, 4))
TEST_SHARE = 0.2
EPOCHS = 60
BATCH_SIZE = 64
LEARNING_RATE = 1e-3
OPTIONS = NeMoConfig(contrastive_weight=0.4, rehearsal_probability=0.3, retention_target=0.1)


class Digits(torch.utils.data.Dataset[dict[str, Any]]):
    """Images of scikit-learn's digits as a processor prepares them.

    Args:
        pixel_values: Shape (samples, channels, height, width).
        labels: Digits, shape (samples,).
    """

    def __init__(self, pixel_values: Tensor, labels: Sequence[int]) -> None:
        self.pixel_values, self.labels = pixel_values, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.pixel_values[index], "labels": int(self.labels[index])}


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps torch to one thread, lest results and times depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def run_demo(output_dir: str | Path, seed: int = 0, epochs: int = EPOCHS) -> dict[str, Any]:
    """Trains a small ViT on digits, plain and with masks, and cuts, saves, reloads and measures modules.

    Runs on one CPU thread.

    Args:
        output_dir: Gets `parent/`, `modules/`, `report.json` and `modules.png`.
        seed: Seed of the split, the models and the training.
        epochs: Epochs of each of the two trainings.

    Returns:
        The report, as written to `report.json`.

    Raises:
        ImportError: If the extra `demo` is not installed.
    """
    start = time.perf_counter()
    output = Path(output_dir)
    processor = ViTImageProcessorPil(
        do_resize=False, size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    train, test, test_indices = load_digits_split(processor, seed)
    plain = digits_trainer(Trainer, train, test, seed, epochs)
    plain.train()
    plain_accuracy = plain.evaluate()["eval_accuracy"]
    trainer = digits_trainer(
        NeMoTrainer,
        train,
        test,
        seed,
        epochs,
        nemo_config=OPTIONS,
        processing_class=processor,
    )
    assert isinstance(trainer, NeMoTrainer)
    trainer.train()
    measured = trainer.evaluate() | trainer.evaluate_modularity()
    parent = trainer.parent
    trainer.save_model(str(output / "parent"))
    modules = [_module(trainer, labels, output) for labels in MODULES]
    assert parent.masks is not None
    report = {
        "seed": seed,
        "epochs": epochs,
        "seconds": round(time.perf_counter() - start, 1),
        "plain": {"accuracy": plain_accuracy, "parameters": _count(plain.model)},
        "parent": {
            "accuracy": measured["eval_accuracy"],
            "parameters": base_parameters(parent),
            "generator_parameters": _count(parent.masks),
            "cohesion": measured["cohesion"],
            "coupling": measured["coupling"],
        },
        "test_indices": test_indices,
        "modules": modules,
    }
    draw_neurons(parent, output / "modules.png")
    write_json(output / "report.json", report)
    return report


def load_digits_split(processor: Any, seed: int) -> tuple[Digits, Digits, list[int]]:
    """Splits scikit-learn's 1,797 digits into training and test data.

    Args:
        processor: Image processor.
        seed: Seed of the split, which is stratified by digit.

    Returns:
        Training data, test data, and the test samples' indices in `load_digits()`.

    Raises:
        ImportError: If scikit-learn or Pillow is missing.
    """
    try:
        from PIL import Image
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError(
            f"Got no {error.name}; expected the packages of the demo. Install them with: pip install nemo-hf[demo]"
        ) from error
    digits = load_digits()
    images = [Image.fromarray((image * (255 / 16)).astype(np.uint8)).convert("RGB") for image in digits.images]
    pixel_values = processor(images=images, return_tensors="pt")["pixel_values"]
    chosen, held_out = train_test_split(
        np.arange(len(images)), test_size=TEST_SHARE, stratify=digits.target, random_state=seed
    )
    parts = [Digits(pixel_values[indices], digits.target[indices].tolist()) for indices in (chosen, held_out)]
    return parts[0], parts[1], [int(index) for index in held_out]


def digits_trainer(kind: type[Trainer], train: Digits, test: Digits, seed: int, epochs: int, **options: Any) -> Trainer:
    """Builds the trainer of a small ViT on digits.

    Args:
        kind: `Trainer` or `NeMoTrainer`.
        train: Training data.
        test: Data to evaluate on.
        seed: Seed of the model and the training.
        epochs: Epochs of the training.
        **options: Further arguments of `kind`.

    Returns:
        The trainer, not run yet.
    """
    set_seed(seed)
    names = [str(digit) for digit in range(10)]
    model = ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=2,
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=256,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
        )
    )
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),  # nothing is saved there: save_strategy
        num_train_epochs=epochs,
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=512,
        learning_rate=LEARNING_RATE,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=seed,
    )
    return kind(model, arguments, train_dataset=train, eval_dataset=test, compute_metrics=accuracy, **options)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of right answers, for `compute_metrics`."""
    answers = np.asarray(prediction.predictions).argmax(-1)
    return {"accuracy": float((answers == prediction.label_ids).mean())}


def _count(layers: torch.nn.Module | None) -> int:
    assert layers is not None
    return sum(parameter.numel() for parameter in layers.parameters())


def _module(trainer: NeMoTrainer, labels: Sequence[int], output: Path) -> dict[str, Any]:
    """Cuts a module, saves it, loads it back and measures what was loaded."""
    path = (output / "modules" / "-".join(map(str, labels))).resolve()
    module = trainer.extract_module(list(labels))
    module.save_pretrained(path)
    loaded = AutoModelForImageClassification.from_pretrained(path)
    report = evaluate_module(
        trainer.parent, list(labels), trainer.get_eval_dataloader(), module=loaded, show_progress=False
    ).to_dict()
    loaded.save_pretrained(path)
    by_batch, parent_by_batch = report.pop("latency_ms"), report.pop("parent_latency_ms")
    return {
        **report,
        "labels": list(labels),
        "path": str(path),
        "latency_ms": by_batch["1"],
        "parent_latency_ms": parent_by_batch["1"],
        "latency_ms_by_batch": by_batch,
        "parent_latency_ms_by_batch": parent_by_batch,
        "equivalence": loaded.config.equivalence,
    }


def format_demo(report: Mapping[str, Any]) -> str:
    """Renders the demo's report for a terminal."""
    plain, parent = report["plain"], report["parent"]
    table = format_table(
        [
            {
                **module,
                "latency_ms": module["latency_ms_by_batch"],
                "parent_latency_ms": module["parent_latency_ms_by_batch"],
            }
            for module in report["modules"]
        ]
    )
    return (
        f"plain model   accuracy {plain['accuracy']:.3f}   {plain['parameters']:,} parameters\n"
        f"parent        accuracy {parent['accuracy']:.3f}   {parent['parameters']:,} parameters "
        f"+ {parent['generator_parameters']:,} of mask generators   coupling {parent['coupling']:.2f}\n\n{table}"
    )
