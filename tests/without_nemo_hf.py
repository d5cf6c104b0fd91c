"""Runs in an environment without nemo_hf: loads modules by the code beside them and tells what they compute.

`python without_nemo_hf.py FOLDER`: each folder in FOLDER with an inputs.pt holds a module; outputs.pt is written there.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.utils import logging

AUTO_CLASSES = {
    "image": AutoModelForImageClassification,
    "text": AutoModelForSequenceClassification,
    "audio": AutoModelForAudioClassification,
}
PIPELINES = {"image": "image-classification", "text": "text-classification"}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        import nemo_hf  # noqa: F401
    except ImportError:
        pass
    else:
        raise AssertionError("nemo_hf is here")
    for file in sorted(folder.glob("*/inputs.pt")):
        given = torch.load(file, weights_only=True)
        torch.save(answers(file.parent, **given), file.with_name("outputs.pt"))
    assert not any(name.split(".")[0] == "nemo_hf" for name in sys.modules)


def answers(folder: Path, kind: str, inputs: dict, labels: torch.Tensor, sample, steps: int) -> dict:
    auto_class, module_folder = AUTO_CLASSES[kind], folder / "module"
    found = {"refused": ""}
    try:
        auto_class.from_pretrained(module_folder, trust_remote_code=False)
    except ValueError as error:
        found["refused"] = str(error)
    config = AutoConfig.from_pretrained(module_folder, trust_remote_code=True)
    model = auto_class.from_pretrained(module_folder, trust_remote_code=True)
    with torch.no_grad():
        output = model(**inputs, labels=labels)
        eager = auto_class.from_pretrained(module_folder, trust_remote_code=True, attn_implementation="eager")
        found |= {
            "logits": output.logits,
            "loss": output.loss,
            "rejection_scores": output.rejection_scores,
            "eager": eager(**inputs).logits,
            "names": list(config.id2label.values()),
            "state": list(model.state_dict()),
            "class": type(model).__name__,
        }
        model.save_pretrained(folder / "again")
        again = auto_class.from_pretrained(folder / "again", trust_remote_code=True)
        found["again"] = again(**inputs).logits
    if sample is not None:
        sample = sample if isinstance(sample, str) else str(folder / "picture.png")
        pipe = pipeline(PIPELINES[kind], model=str(module_folder), trust_remote_code=True, top_k=None)
        (found["pipeline"],) = pipe([sample])
    if steps:
        found["trained"] = train(model, inputs, labels, folder, steps)
        model.save_pretrained(folder / "trained")
    return found


def train(model, inputs: dict, labels: torch.Tensor, folder: Path, steps: int) -> dict:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = [{**{name: value[i] for name, value in inputs.items()}, "labels": labels[i]} for i in range(len(labels))]
    args = TrainingArguments(
        str(folder / "run"), max_steps=steps, report_to="none", use_cpu=True, disable_tqdm=True, learning_rate=1e-2,
        per_device_train_batch_size=len(data), per_device_eval_batch_size=len(data), gradient_accumulation_steps=2,
    )  # fmt: skip
    shapes = []
    trainer = Trainer(model, args, train_dataset=data * 2, eval_dataset=data,
                      compute_metrics=lambda p: shapes.append(p.predictions.shape) or {})  # fmt: skip
    loss = trainer.evaluate()["eval_loss"]
    trainer.train()
    trainer.save_model(str(folder / "run" / "last"))
    unmoved = [name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])]
    return {
        "loss": loss,
        "log": trainer.state.log_history[0],
        "shapes": shapes,
        "unmoved": unmoved,
        "rejection": model.config.rejection,
        "files": sorted(file.name for file in (folder / "run" / "last").iterdir()),
        "config": json.loads((folder / "run" / "last" / "config.json").read_text())["auto_map"],
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
