# /// script
# dependencies = ["nemo-hf[demo]"]
# ///
"""Trains a convolutional model of the NeMo paper on CIFAR-10 or SVHN, with or without masks, and measures modules.

    python examples/paper/train.py --model vgg16 --dataset cifar10 --objective ours --output_dir vgg16-ours \
        --num_train_epochs 30 --learning_rate 1e-3 --per_device_train_batch_size 128

`--data` names a local folder of parquet files in place of the Hub. Writes the model, `results.json`, and prints a
table. The objectives: `plain` trains no masks; `mwt` (arXiv 2306.09376) and `nemo` (arXiv 2508.11348) as in the
papers: soft masks, no rehearsal, modules cut at .9; `moda` (arXiv 2411.01074) has no masks: it trains the activity of
ReLU units, with the weights of its authors' code; `ours` are the defaults of `NeMoConfig`.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Image, load_dataset
from models import ARCHITECTURES, PaperCNNConfig, PaperCNNForImageClassification
from objectives import MODA, MWT, NEMO
from torch import Tensor
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed

from nemo_hf import NeMoConfig, NeMoTrainer
from nemo_hf.evaluation.report import format_table
from nemo_hf.models.atomic_writes import write_json

DATASETS = {"cifar10": ("uoft-cs/cifar10", None), "svhn": ("ufldl-stanford/svhn", "cropped_digits")}
"""Name on the Hub, and of the configuration."""
OBJECTIVES = {"plain": None, "mwt": MWT, "nemo": NEMO, "moda": MODA, "ours": {}}


@dataclass
class Options:
    """Model, data and objective."""

    model: str = field(default="vgg16", metadata={"choices": list(ARCHITECTURES)})
    dataset: str = field(default="cifar10", metadata={"choices": list(DATASETS)})
    objective: str = field(default="ours", metadata={"choices": list(OBJECTIVES)})
    data: str | None = field(default=None, metadata={"help": "Local folder with train-*.parquet and test-*.parquet."})
    width: int = field(default=64, metadata={"help": "Channels of the first stage; 64 in the paper."})
    nemo_config: str = field(default="{}", metadata={"help": "More options of NeMoConfig as JSON."})
    modules: list[str] = field(default_factory=list, metadata={"help": "Labels joined by '+'; each label if left out."})
    train_samples: int | None = field(default=None, metadata={"help": "Train on this many images only."})
    test_samples: int | None = field(default=None, metadata={"help": "Test on this many images only."})


class Images(torch.utils.data.Dataset):
    """Images in memory, (samples, 3, 32, 32) uint8, and labels; perhaps randomly shifted and mirrored."""

    def __init__(self, pixels: Tensor, labels: Tensor, is_shifted: bool = False, is_flipped: bool = False) -> None:
        self.pixels, self.labels = pixels, labels
        self.is_shifted, self.is_flipped = is_shifted, is_flipped

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        pixels = self.pixels[index].float() / 127.5 - 1
        if self.is_shifted:
            size, (top, left) = pixels.shape[-1], torch.randint(0, 9, (2,)).tolist()
            pixels = torch.nn.functional.pad(pixels, (4, 4, 4, 4))[:, top : top + size, left : left + size]
            pixels = pixels.flip(-1) if self.is_flipped and torch.rand(()) < 0.5 else pixels
        return {"pixel_values": pixels, "labels": self.labels[index]}


def load(options: Options) -> tuple[Images, Images, Images, list[str]]:
    """Training images with and without augmentation, test images, and label names."""
    name, configuration = DATASETS[options.dataset]
    parts = []
    for split, count in (("train", options.train_samples), ("test", options.test_samples)):
        if options.data is None:
            data = load_dataset(name, configuration, split=split)
        else:
            files = [str(path) for path in sorted(Path(options.data).glob(f"{split}-*.parquet"))]
            data = load_dataset("parquet", data_files=files, split="train")
        if count is not None:
            data = data.shuffle(seed=0).select(range(min(count, len(data))))
        columns = {type(feature): column for column, feature in data.features.items()}
        pictures = np.stack([np.asarray(picture.convert("RGB")) for picture in data[columns[Image]]])
        labels = torch.tensor(list(data[columns[ClassLabel]]))
        parts.append((torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), labels))
        names = data.features[columns[ClassLabel]].names
    train, test = parts
    flips = options.dataset == "cifar10"  # not SVHN: a mirrored digit is no digit
    return Images(*train, is_shifted=True, is_flipped=flips), Images(*train), Images(*test), names


def main() -> None:
    """Trains, evaluates, cuts and saves."""
    options, arguments = HfArgumentParser((Options, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(arguments.seed)
    augmented, train, test, names = load(options)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    config = PaperCNNConfig(architecture=options.model, width=options.width, **labels)
    model = PaperCNNForImageClassification(config)
    shared = dict(
        args=arguments, train_dataset=augmented, eval_dataset=test,
        compute_metrics=lambda p: {"accuracy": float((np.argmax(p.predictions, -1) == p.label_ids).mean())},
    )  # fmt: skip
    chosen = OBJECTIVES[options.objective]
    if chosen is None:
        trainer = Trainer(model, **shared)
    else:
        nemo_config = NeMoConfig(**{**chosen, **json.loads(options.nemo_config)})
        trainer = NeMoTrainer(model, nemo_config=nemo_config, relevance_dataset=train, **shared)
    trained = trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    metrics = trainer.evaluate() | ({} if chosen is None else trainer.evaluate_modularity())
    metrics |= {"training_seconds": round(trained.metrics["train_runtime"]), "seed": arguments.seed}
    trainer.save_model()
    sets = [] if chosen is None else [word.split("+") for word in options.modules] or [[name] for name in names]
    reports = [trainer.evaluate_module(labels).to_dict() for labels in sets]
    if trainer.is_world_process_zero():
        command = ["python", "examples/paper/train.py", *sys.argv[1:]]
        write_json(
            Path(arguments.output_dir, "results.json"), {"command": command, "metrics": metrics, "modules": reports}
        )
        print(json.dumps(metrics, indent=2), format_table(reports) if reports else "", sep="\n")


if __name__ == "__main__":
    main()
