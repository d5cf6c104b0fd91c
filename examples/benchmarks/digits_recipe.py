"""Compares training options on scikit-learn's digits, the demo's model: one row an option set and seed.

    python examples/benchmarks/digits_recipe.py --options '{}' '{"sparsity_weight": 0.3}' --seeds 0 1 2 \
        --output examples/benchmarks/digits_recipe.json

A fifth of the training data is held out to compare on, so that the test data choose nothing. Each row takes about
a minute and a half on two CPU cores. Rows are added to the output file as they come.
"""

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import HfArgumentParser
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from nemo_hf import NeMoConfig, NeMoTrainer
from nemo_hf.demo import MODULES, Digits, digits_trainer, load_digits_split
from nemo_hf.evaluation import evaluate_module
from nemo_hf.files import write_json


@dataclass
class Options:
    """What to compare."""

    options: list[str] = field(default_factory=lambda: ["{}"], metadata={"help": "Options of NeMoConfig as JSON."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds of split, model and training."})
    epochs: int = field(default=60, metadata={"help": "Epochs of each training."})
    plain: bool = field(default=False, metadata={"help": "Train the plain model instead."})
    output: str = field(default="digits_recipe.json", metadata={"help": "JSON file; rows are added."})


def held_out(seed: int) -> tuple[Digits, Digits]:
    """Training and validation data; the test data are left alone."""
    processor = ViTImageProcessorPil(do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    train, _, _ = load_digits_split(processor, seed)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    validation, rest = order[: len(order) // 5], order[len(order) // 5 :]
    parts = [Digits(train.pixel_values[part], [train.labels[i] for i in part]) for part in (rest, validation)]
    return parts[0], parts[1]


def main() -> None:
    """Trains each row and writes it."""
    options = HfArgumentParser(Options).parse_args_into_dataclasses()[0]
    for text in options.options:
        for seed in options.seeds:
            start = time.time()
            train, validation = held_out(seed)
            nemo = {} if options.plain else {"nemo_config": NeMoConfig(**json.loads(text))}
            kind = transformers.Trainer if options.plain else NeMoTrainer
            trainer = digits_trainer(kind, train, validation, seed, options.epochs, **nemo)
            trainer.train()
            metrics = trainer.evaluate()
            row = {"options": "plain" if options.plain else json.loads(text), "seed": seed, "epochs": options.epochs}
            row |= {name: metrics.get(f"eval_{name}") for name in ("accuracy", "cohesion", "coupling")}
            loader = torch.utils.data.DataLoader(validation, batch_size=512)
            for labels in () if options.plain else MODULES:
                report = evaluate_module(trainer.parent, list(labels), loader, show_progress=False).to_dict()
                names = ("accuracy", "parent_restricted_accuracy", "controls", "neuron_retention_rate")
                row["-".join(map(str, labels))] = {name: report[name] for name in names}
            row["seconds"] = round(time.time() - start)
            print(json.dumps(row), flush=True)
            output = Path(options.output)
            stored = json.loads(output.read_text()) if output.exists() else {"rows": []}
            versions = {"torch": torch.__version__, "transformers": transformers.__version__}
            command = "python examples/benchmarks/digits_recipe.py " + " ".join(map(repr, sys.argv[1:]))
            rows = [*stored["rows"], row | {"command": command}]
            write_json(output, {**stored, "versions": versions, "rows": rows})


if __name__ == "__main__":
    main()
