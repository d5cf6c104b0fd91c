# /// script
# dependencies = ["nemo-hf[demo]"]
# ///
"""Trains a ViT from scratch (or any pretrained image classifier) with neuron masks and measures modules.

    python examples/train_image_classification.py --dataset uoft-cs/cifar10 --output_dir cifar10 \
        --modules cat+dog airplane+ship --num_train_epochs 4 --learning_rate 1e-3 --per_device_train_batch_size 64

`accelerate launch` runs the same line on many devices. Writes parent, modules and results.json, prints a table.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Image, load_dataset
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    set_seed,
)

from nemo_hf import NeMoConfig, NeMoTrainer
from nemo_hf.evaluation.report import format_table
from nemo_hf.models.atomic_writes import write_json


@dataclass
class Options:
    """What to train on and what to cut."""

    dataset: str = field(metadata={"help": "Hub data set or local folder with images and class labels."})
    modules: list[str] = field(default_factory=list, metadata={"help": "Modules, as labels joined by '+'."})
    model: str | None = field(default=None, metadata={"help": "Pretrained model; a small ViT if left out."})
    nemo_config: str = field(default="{}", metadata={"help": "Options of NeMoConfig as JSON."})
    plain: bool = field(default=False, metadata={"help": "Train the plain model instead, as a baseline."})
    hidden_size: int = field(default=96, metadata={"help": "Width of the small ViT, a multiple of 32."})
    layers: int = field(default=4, metadata={"help": "Depth of the small ViT."})
    smoke: bool = field(default=False, metadata={"help": "Use 200 samples of each split, to try the script."})


def model_and_processor(options: Options, names: list[str], size: int):
    """The pretrained model, or a small ViT for images of this size."""
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    if options.model:
        model = AutoModelForImageClassification.from_pretrained(options.model, ignore_mismatched_sizes=True, **labels)
        return model, AutoImageProcessor.from_pretrained(options.model)
    config = ViTConfig(
        image_size=size, patch_size=size // 8, hidden_size=options.hidden_size, num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // 32, intermediate_size=4 * options.hidden_size,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **labels,
    )  # fmt: skip
    return ViTForImageClassification(config), ViTImageProcessor(size={"height": size, "width": size})


def augmented(pixels: torch.Tensor) -> torch.Tensor:
    """Random shifts of up to an eighth of the image, and flips; (batch, channels, height, width)."""
    size, room = pixels.shape[-1], pixels.shape[-1] // 8
    padded = torch.nn.functional.pad(pixels, (room,) * 4, mode="reflect")
    images = []
    for image, (top, left) in zip(padded, torch.randint(0, 2 * room + 1, (len(padded), 2)).tolist(), strict=True):
        crop = image[:, top : top + size, left : left + size]
        images.append(crop.flip(-1) if torch.rand(()) < 0.5 else crop)
    return torch.stack(images)


def main() -> None:
    """Trains, evaluates, cuts and saves."""
    options, arguments = HfArgumentParser((Options, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(arguments.seed)
    data = load_dataset(options.dataset)
    kinds = {type(feature): name for name, feature in data["train"].features.items()}
    image, label = kinds[Image], kinds[ClassLabel]
    names, size = data["train"].features[label].names, data["train"][0][image].size[0]
    model, processor = model_and_processor(options, names, size)

    def prepared(split: str, is_augmented: bool = False):
        def transform(batch):
            pictures = [picture.convert("RGB") for picture in batch[image]]
            pixels = processor(pictures, return_tensors="pt")["pixel_values"]
            return {"pixel_values": augmented(pixels) if is_augmented else pixels, "labels": batch["labels"]}

        part = data[split].rename_column(label, "labels").shuffle(seed=0)
        return part.select(range(min(200, len(part)) if options.smoke else len(part))).with_transform(transform)

    arguments.remove_unused_columns = False  # the inputs are made when a sample is read
    shared = dict(
        args=arguments, train_dataset=prepared("train", is_augmented=True), eval_dataset=prepared("test"),
        processing_class=processor,
        compute_metrics=lambda p: {"accuracy": float((np.argmax(p.predictions, -1) == p.label_ids).mean())},
    )  # fmt: skip
    config = NeMoConfig(**json.loads(options.nemo_config))
    nemo = {"nemo_config": config, "relevance_dataset": prepared("train")}
    trainer = Trainer(model, **shared) if options.plain else NeMoTrainer(model, **nemo, **shared)
    trained = trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    seconds = round(trained.metrics["train_runtime"])
    metrics = trainer.evaluate() | {"training_seconds": seconds, "seed": arguments.seed}
    trainer.save_model()
    modules = {} if options.plain else {word: trainer.extract_module(word.split("+")) for word in options.modules}
    reports = [trainer.evaluate_module(word.split("+"), module=m).to_dict() for word, m in modules.items()]
    if trainer.is_world_process_zero():
        for word, module in modules.items():
            module.save_pretrained(Path(arguments.output_dir, "modules", word))
        command = ["python", "examples/train_image_classification.py", *sys.argv[1:]]
        results = {"command": command, "metrics": metrics, "modules": reports}
        write_json(Path(arguments.output_dir, "results.json"), results)
        print(json.dumps(metrics, indent=2), format_table(reports) if reports else "", sep="\n")


if __name__ == "__main__":
    main()
