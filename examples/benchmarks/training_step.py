"""What masks cost in training: steps of NeMoTrainer beside steps of Trainer.

    python examples/benchmarks/training_step.py

Steps of both alternate in one process: forward and backward pass, clipping of gradients, optimizer. Peak memory is
measured in a process each. Writes results/training_step.json. On one CPU thread, or on a GPU with bf16 if there is
one; about ten minutes on a CPU.
"""

import argparse
import tempfile
from collections.abc import Callable

import compact
import torch
from timing import alternating, fresh_process, peak_memory, ratio
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from nemo_hf import NeMoConfig, NeMoTrainer, compute_relevance

LABELS = 10


def vit(hidden: int, layers: int, heads: int) -> PreTrainedModel:
    """A vision transformer for images of 32 x 32 in patches of 4 x 4."""
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return ViTForImageClassification(
        ViTConfig(image_size=32, patch_size=4, intermediate_size=4 * hidden, num_labels=LABELS, **sizes)
    )


def minilm() -> PreTrainedModel:
    """A model of the shape of all-MiniLM-L6-v2."""
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    return BertForSequenceClassification(BertConfig(num_labels=LABELS, **sizes))


def images(batch: int) -> dict[str, torch.Tensor]:
    """Random images."""
    return {"pixel_values": torch.randn(batch, 3, 32, 32), "labels": torch.arange(batch) % LABELS}


def texts(batch: int) -> dict[str, torch.Tensor]:
    """Random texts of 32 tokens."""
    tokens = torch.randint(5, 30000, (batch, 32))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": torch.arange(batch) % LABELS}


SETTINGS: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[int], dict[str, torch.Tensor]], int]] = {
    "ViT-S/4, batch 16": (lambda: vit(384, 12, 6), images, 16),
    "ViT-S/4, batch 64": (lambda: vit(384, 12, 6), images, 64),
    "ViT 128 x 6, batch 64": (lambda: vit(128, 6, 4), images, 64),
    "MiniLM, batch 32": (minilm, texts, 32),
}
GENERATED = {"masks": "generated", "warmup_ratio": 0.0}
KINDS: dict[str, dict | None] = {
    "plain": None,
    "before assignment": {},
    "taught modules": {"plain_ratio": 0.0},
    "masks": {**GENERATED, "rehearsal_probability": 0.0},
    "masks and rehearsal": {**GENERATED, "rehearsal_probability": 1.0},
}


class Step:
    """One step of a trainer at a time, as its training loop runs it."""

    def __init__(self, setting: str, kind: str) -> None:
        build, draw, batch = SETTINGS[setting]
        set_seed(0)
        has_gpu = torch.cuda.is_available()
        args = TrainingArguments(
            output_dir=tempfile.gettempdir(), report_to=[], use_cpu=not has_gpu, bf16=has_gpu,
            per_device_train_batch_size=batch, max_steps=10**6, disable_tqdm=True,
        )  # fmt: skip
        options, data = KINDS[kind], draw(batch)
        if options is None:
            self.trainer = Trainer(build(), args)
        else:
            self.trainer = NeMoTrainer(build(), args, nemo_config=NeMoConfig(**options))
        if options == KINDS["taught modules"]:
            compute_relevance(self.trainer.parent, [data], show_progress=False)
        model = self.trainer.model.train()
        self.trainer.create_optimizer_and_scheduler(args.max_steps)
        self.model, self.optimizer = self.trainer.accelerator.prepare(model, self.trainer.optimizer)
        self.trainer.model_wrapped = self.model
        self.trainer.current_gradient_accumulation_steps = 1  # its training loop sets these
        self.trainer.state.max_steps = args.max_steps
        self.batch = {name: value.to(args.device) for name, value in data.items()}

    def __call__(self) -> None:
        """Runs a step."""
        self.trainer.training_step(self.model, self.batch)
        self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.model.zero_grad()
        self.trainer.state.global_step += 1


def measure(setting: str, rounds: int) -> list[dict]:
    """One row for each kind of step."""
    steps = {kind: Step(setting, kind) for kind in KINDS}
    seconds = alternating(steps, rounds)
    base = sum(p.numel() for p in steps["plain"].trainer.model.parameters())
    generators = sum(p.numel() for p in steps["masks"].trainer.model.masks.parameters()) / base
    peaks = {kind: float(fresh_process(__file__, "--peak", setting, kind)) for kind in KINDS}
    return [
        {"setting": setting, "step": kind, **ratio(seconds[kind], seconds["plain"]), "peak_mib": peaks[kind],
         "generators": generators if "masks" in (KINDS[kind] or {}) else 0.0}
        for kind in KINDS
    ]  # fmt: skip


def main() -> None:
    """Measures all settings, or those that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--peak", nargs=2, metavar=("SETTING", "STEP"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    if given.peak:
        print(peak_memory(lambda: Step(*given.peak)))
        return
    about = {"command": "python examples/benchmarks/training_step.py", "rounds": given.rounds}
    for setting in given.settings:
        found = measure(setting, given.rounds)
        print(*found, sep="\n", flush=True)
        compact.update(compact.RESULTS / "training_step.json", about, "steps", found, "setting", "step")


if __name__ == "__main__":
    main()
