"""Modules of a model that nemo_hf does not know: propose its sites, train it with masks, cut, save and load.

    python examples/custom_model.py --output_dir custom

The model is a small mixer-like classifier of scikit-learn's digits with layer names of its own and gated units. Half
a minute on a CPU; prints the proposed sites, the pruning modes that are exact and what two modules are worth.
"""

# /// script
# dependencies = ["nemo-hf[demo]"]
# ///

import json

import torch
from datasets import Dataset
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    TrainingArguments,
)  # fmt: skip
from transformers.modeling_outputs import ImageClassifierOutput

from nemo_hf import NeMoConfig, NeMoTrainer, make_parent, propose_sites
from nemo_hf.evaluation.report import format_table


class RowsConfig(PreTrainedConfig):
    """Eight rows of an 8x8 image, each a token."""

    model_type = "row_classifier"
    width: int = 48
    units: int = 96
    blocks: int = 3
    image_size: int = 8
    num_channels: int = 1


class Block(nn.Module):
    """Attention of four heads and gated units, under names that no table lists."""

    def __init__(self, config: RowsConfig) -> None:
        super().__init__()
        self.first_norm, self.second_norm = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.asks, self.offers, self.says, self.merge = (nn.Linear(config.width, config.width) for _ in range(4))
        self.open = nn.Linear(config.width, config.units)
        self.carry = nn.Linear(config.width, config.units)
        self.back = nn.Linear(config.units, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, tokens, width) to the same shape."""
        h = self.first_norm(x)
        q, k, v = (layer(h).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.asks, self.offers, self.says))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, scale=12**-0.5)
        x = x + self.merge(mixed.transpose(1, 2).flatten(2))
        h = self.second_norm(x)
        return x + self.back(nn.functional.silu(self.open(h)) * self.carry(h))


class RowsForImageClassification(PreTrainedModel):
    """Classifies digits from their rows."""

    config_class = RowsConfig
    main_input_name = "pixel_values"

    def __init__(self, config: RowsConfig) -> None:
        super().__init__(config)
        self.embed = nn.Linear(config.image_size, config.width)
        self.position = nn.Parameter(torch.zeros(config.image_size, config.width))
        self.body = nn.Sequential(*(Block(config) for _ in range(config.blocks)))
        self.answer = nn.Linear(config.width, config.num_labels)
        self.post_init()

    def forward(self, pixel_values: Tensor, return_dict: bool = True) -> ImageClassifierOutput:
        """Maps images (batch, 1, 8, 8) to logits."""
        hidden_states = self.body(self.embed(pixel_values.squeeze(1)) + self.position)
        return ImageClassifierOutput(logits=self.answer(hidden_states.mean(1)))


AutoConfig.register("row_classifier", RowsConfig)  # a file names the class; this says where it is
AutoModelForImageClassification.register(RowsConfig, RowsForImageClassification)


def main() -> None:
    """Runs the example."""
    parser = HfArgumentParser(TrainingArguments)
    parser.set_defaults(num_train_epochs=30, learning_rate=2e-3, per_device_train_batch_size=64, save_strategy="no")
    args = parser.parse_args_into_dataclasses()[0]
    digits = load_digits()
    images = torch.tensor(digits.images / 16.0, dtype=torch.float32).unsqueeze(1)
    train, test = train_test_split(range(len(images)), test_size=0.2, random_state=args.seed, stratify=digits.target)
    train, test = (
        Dataset.from_dict({"pixel_values": images[ids], "label": digits.target[ids]}).with_format("torch")
        for ids in (train, test)
    )
    model = RowsForImageClassification(RowsConfig(id2label={i: str(i) for i in range(10)}))
    sites = propose_sites(model)
    print(json.dumps(sites, indent=1))
    parent = make_parent(model, NeMoConfig(sites=sites))
    print({site.key: site.pruning_mode for site in parent.sites}, parent.config.equivalence)
    trainer = NeMoTrainer(parent, args, train_dataset=train, eval_dataset=test)
    trainer.train()
    print(format_table([trainer.evaluate_module(labels).to_dict() for labels in (["0", "1"], ["3", "8", "9"])]))
    trainer.save_model()
    loaded = AutoModelForImageClassification.from_pretrained(args.output_dir, labels=["0", "1"], verify=True)
    print(f"['0', '1'] cut on load: {loaded.num_parameters():,} parameters, {loaded.config.equivalence}")


if __name__ == "__main__":
    main()
