"""Tiny random models of the nine families, and small data; everything offline."""

import copy
import gc
import importlib
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoConfig,
    BertConfig,
    BertForSequenceClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.utils import logging as transformers_logging

import nemo_hf.evaluation.latency

torch.set_num_threads(1)  # the models are too small to share out
nemo_hf.evaluation.latency.LATENCY_RUNS = 2  # no test looks at how fast anything is
nemo_hf.evaluation.latency.LARGEST_SPREAD = float("inf")
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

LABELS = ["cat", "dog", "car", "ship", "frog"]
NAMES = {"id2label": dict(enumerate(LABELS)), "label2id": {name: index for index, name in enumerate(LABELS)}}
TEXT = {
    "vocab_size": 120,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    **NAMES,
}
IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
    **NAMES,
}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**IMAGE)),
    "deit": lambda: DeiTForImageClassification(DeiTConfig(**IMAGE)),
    "deit-teacher": lambda: DeiTForImageClassificationWithTeacher(DeiTConfig(**IMAGE)),
    "bert": lambda: BertForSequenceClassification(BertConfig(**TEXT)),
    "distilbert": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=120, dim=32, n_layers=2, n_heads=4, hidden_dim=48, **NAMES)
    ),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**TEXT)),
    "albert": lambda: AlbertForSequenceClassification(AlbertConfig(**TEXT, embedding_size=16)),
    "gpt2": lambda: GPT2ForSequenceClassification(
        GPT2Config(vocab_size=120, n_embd=32, n_layer=2, n_head=4, n_inner=48, pad_token_id=0, **SPECIAL, **NAMES)
    ),
    "llama": lambda: LlamaForSequenceClassification(LlamaConfig(**TEXT, num_key_value_heads=2, **SPECIAL)),
    "swin": lambda: SwinForImageClassification(
        SwinConfig(image_size=16, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, **NAMES)
    ),
}


def build(family: str, seed: int = 0) -> PreTrainedModel:
    """A model with larger weights than at initialisation, so that masks move its logits."""
    torch.manual_seed(seed)
    model = FAMILIES[family]()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15 if parameter.ndim > 1 else 0.3)
    return model.eval()


_BUILT: dict[str, PreTrainedModel] = {}


def fresh(family: str) -> PreTrainedModel:
    """A copy of the family's model, built once a session."""
    if family not in _BUILT:
        _BUILT[family] = build(family)
    return copy.deepcopy(_BUILT[family])


@pytest.fixture(autouse=True, scope="module")
def quick_collection():
    """`Trainer.train` ends with a collection of garbage: 0.2 s over all of torch, unless that is set aside."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(params=list(FAMILIES))
def plain(request) -> PreTrainedModel:
    return fresh(request.param)


@pytest.fixture
def vit() -> PreTrainedModel:
    return fresh("vit")


@pytest.fixture
def bert() -> PreTrainedModel:
    return fresh("bert")


@pytest.fixture
def registered():
    """Registers a configuration and a model class of one's own with the Auto classes, for one test."""
    ours = []

    def register(config_class, auto_class, model_class) -> None:
        AutoConfig.register(config_class.model_type, config_class)
        auto_class.register(config_class, model_class)
        ours.append((config_class, auto_class))

    yield register
    for config_class, auto_class in ours:
        del CONFIG_MAPPING._extra_content[config_class.model_type]
        del auto_class._model_mapping._extra_content[config_class]


def randomize_relevance(parent, seed: int = 0) -> None:
    """Gives a parent a random relevance, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for mask in parent.masks.site_masks():
        mask.relevance.copy_(torch.randint(0, 256, mask.relevance.shape, generator=generator))
        if mask.mean_mask is not None:
            mask.mean_mask.copy_(torch.rand(mask.mean_mask.shape, generator=generator))
    parent.config.relevance_source = "exact"


def image_samples(count: int = 40, seed: int = 0) -> list[dict]:
    """Images of 16x16 whose label is the brightest of five stripes."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for index in range(count):
        image = torch.randn(3, 16, 16, generator=generator) * 0.3
        image[:, 3 * (index % 5) : 3 * (index % 5) + 3] += 1.5
        samples.append({"pixel_values": image, "labels": index % 5})
    return samples


def text_samples(count: int = 40, seed: int = 0) -> list[dict]:
    """Token sequences of unequal lengths whose label is told by their tokens."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for index in range(count):
        length = int(torch.randint(4, 12, (1,), generator=generator))
        ids = 10 + 20 * (index % 5) + torch.randint(0, 20, (length,), generator=generator)
        padded = torch.cat([ids, torch.zeros(12 - length, dtype=torch.long)])
        samples.append({"input_ids": padded, "attention_mask": (padded != 0).long(), "labels": index % 5})
    return samples


def image_processor():
    """Of the tiny image models."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    return ViTImageProcessorPil(size={"height": 16, "width": 16})


def tokenizer():
    """Of the tiny text models: words w0 to w117."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *(f"w{index}" for index in range(118))]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")


def benchmark_script(name: str):
    """A script of examples/benchmarks, as a module."""
    folder = str(Path(__file__).parents[1] / "examples" / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)
