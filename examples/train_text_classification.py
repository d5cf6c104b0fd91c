# /// script
# dependencies = ["nemo-hf"]
# ///
"""Fine-tunes a pretrained text classifier with neuron masks, one group of labels per module, and measures modules.

    python examples/train_text_classification.py --dataset path/to/clinc150 --label_column intent \
        --group_column domain --model sentence-transformers/all-MiniLM-L6-v2 --output_dir clinc150 \
        --modules banking travel banking+travel+work+utility --num_train_epochs 5 --learning_rate 2e-4

The data set is any on the Hub or a folder of parquet, csv or json files, here with columns text, intent and domain.
Without a column of groups each label is its own group. `accelerate launch` runs the same line on many devices.
Writes the parent, the modules and results.json, prints a table; about 40 minutes on one CPU core.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from nemo_hf import NeMoConfig, NeMoTrainer
from nemo_hf.evaluation.report import format_table
from nemo_hf.models.atomic_writes import write_json


@dataclass
class Options:
    """What to train on and what to cut."""

    dataset: str = field(metadata={"help": "Hub data set or local folder with texts and class labels."})
    model: str = field(metadata={"help": "Pretrained model."})
    modules: list[str] = field(default_factory=list, metadata={"help": "Modules, as groups or labels joined by '+'."})
    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    label_column: str = field(default="label", metadata={"help": "Column of the labels."})
    group_column: str | None = field(default=None, metadata={"help": "Column of each label's group."})
    nemo_config: str = field(default="{}", metadata={"help": "Options of NeMoConfig as JSON."})
    plain: bool = field(default=False, metadata={"help": "Train the plain model instead, as a baseline."})
    smoke: bool = field(default=False, metadata={"help": "Use 5 samples per label, to try the script."})


def main() -> None:
    """Trains, evaluates, cuts and saves."""
    options, arguments = HfArgumentParser((Options, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(arguments.seed)
    data = load_dataset(options.dataset)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    names = data["train"].features[options.label_column].names
    kept = {"labels", options.group_column}

    def prepared(split: str):
        part = data[split].rename_column(options.label_column, "labels")
        if options.smoke:
            order = np.argsort(part["labels"], kind="stable")
            each = len(order) // len(names)
            part = part.select(np.concatenate([order[i * each : i * each + 5] for i in range(len(names))]))
        dropped = [column for column in part.column_names if column not in kept]
        return part.map(lambda batch: tokenizer(batch[options.text_column], truncation=True), batched=True,
                        remove_columns=dropped)  # fmt: skip

    model = AutoModelForSequenceClassification.from_pretrained(
        options.model,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        ignore_mismatched_sizes=True,
    )
    shared = dict(
        args=arguments, train_dataset=prepared("train"), eval_dataset=prepared("test"),
        data_collator=DataCollatorWithPadding(tokenizer), processing_class=tokenizer,
        compute_metrics=lambda p: {"accuracy": float((np.argmax(p.predictions, -1) == p.label_ids).mean())},
    )  # fmt: skip
    config = NeMoConfig(**{"group_column": options.group_column, **json.loads(options.nemo_config)})
    trainer = Trainer(model, **shared) if options.plain else NeMoTrainer(model, nemo_config=config, **shared)
    trained = trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    seconds = round(trained.metrics["train_runtime"])
    metrics = trainer.evaluate() | {"training_seconds": seconds, "seed": arguments.seed}
    trainer.save_model()
    modules = {} if options.plain else {word: trainer.extract_module(word.split("+")) for word in options.modules}
    reports = [trainer.evaluate_module(word.split("+"), module=m).to_dict() for word, m in modules.items()]
    if trainer.is_world_process_zero():
        for word, module in modules.items():
            module.save_pretrained(Path(arguments.output_dir, "modules", word))
        command = ["python", "examples/train_text_classification.py", *sys.argv[1:]]
        results = {"command": command, "metrics": metrics, "modules": reports}
        write_json(Path(arguments.output_dir, "results.json"), results)
        print(json.dumps(metrics, indent=2), format_table(reports) if reports else "", sep="\n")


if __name__ == "__main__":
    main()
