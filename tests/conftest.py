"""Tiny random models of ten families, parents of them, and small data; everything offline."""

import copy
import functools
import gc
import importlib
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

import nemo_hf.evaluation.latency
from nemo_hf import NeMoConfig, make_parent

torch.set_num_threads(1)  # the models are too small to share out
os.fsync = lambda descriptor: None  # nobody pulls the plug
nemo_hf.evaluation.latency.LATENCY_TURNS = 1  # no test looks at how fast anything is
nemo_hf.evaluation.latency.LARGEST_SPREAD = nemo_hf.evaluation.latency.LARGEST_DRIFT = float("inf")
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

LABELS = ["cat", "dog", "car", "ship", "frog"]
NAMES = {"id2label": dict(enumerate(LABELS)), "label2id": {name: index for index, name in enumerate(LABELS)}}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {"vocab_size": 120, **SIZES, "max_position_embeddings": 40, "pad_token_id": 0, **NAMES}
IMAGE = {**SIZES, "image_size": 16, "patch_size": 4, **NAMES}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}
DISTILBERT = {"vocab_size": 120, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
GPT2 = {"vocab_size": 120, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "pad_token_id": 0, **SPECIAL}
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
FAMILIES = {
    "vit": ("ViTForImageClassification", IMAGE),
    "deit": ("DeiTForImageClassification", IMAGE),
    "deit-teacher": ("DeiTForImageClassificationWithTeacher", IMAGE),
    "bert": ("BertForSequenceClassification", TEXT),
    "distilbert": ("DistilBertForSequenceClassification", DISTILBERT),
    "roberta": ("RobertaForSequenceClassification", TEXT),
    "albert": ("AlbertForSequenceClassification", {**TEXT, "embedding_size": 16}),
    "gpt2": ("GPT2ForSequenceClassification", GPT2),
    "llama": ("LlamaForSequenceClassification", {**TEXT, "num_key_value_heads": 2, **SPECIAL}),
    "swin": ("SwinForImageClassification", SWIN),
}
SIMILAR_FAMILIES = ("deit", "distilbert", "roberta", "vit")  # whose layers are arranged as those of another one here


def tiny(class_name: str, **sizes) -> PreTrainedModel:
    """A model of a class of transformers with five labels, as its configuration initialises it."""
    torch.manual_seed(0)
    model_class = getattr(transformers, class_name)
    return model_class(model_class.config_class(**{**sizes, **NAMES})).eval()


def randomize(model: PreTrainedModel, spread: float = 0.15, seed: int = 0) -> PreTrainedModel:
    """Draws larger weights than at initialisation, so that masks move the logits; the model in eval mode."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=spread if parameter.ndim > 1 else 0.3)
    return model.eval()


def generated(**options) -> NeMoConfig:
    """Options of masks that generators make by sample."""
    return NeMoConfig(**{"masks": "generated", **options})


def build(family: str, seed: int = 0) -> PreTrainedModel:
    """A tiny model of a family, randomized."""
    class_name, sizes = FAMILIES[family]
    return randomize(tiny(class_name, **sizes), seed=seed)


@functools.cache
def _built(family: str) -> PreTrainedModel:
    return build(family)


def fresh(family: str) -> PreTrainedModel:
    """A copy of the family's model, built once a session."""
    return copy.deepcopy(_built(family))


@pytest.fixture(autouse=True, scope="module")
def quick_collection():
    """`Trainer.train` ends with a collection of garbage: 0.2 s over all of torch, unless that is set aside."""
    gc.freeze()
    yield
    gc.unfreeze()


_PARENTS: dict[str, PreTrainedModel] = {}


def parent_of(family: str, **options) -> PreTrainedModel:
    """A copy of the family's parent in eval mode with a random relevance; trial cuts run once a session.

    `options` are those of `NeMoConfig`; the threshold is 0.6 unless they say otherwise.
    """
    config = generated(**{"relevance_threshold": 0.6, **options})
    key = family + repr(config.to_dict())
    if key not in _PARENTS:
        _PARENTS[key] = make_parent(fresh(family), config).eval()
        randomize_relevance(_PARENTS[key])
    return copy.deepcopy(_PARENTS[key])


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.sweep if name in SIMILAR_FAMILIES else ()) for name in FAMILIES]
)
def family(request) -> str:
    return request.param


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


def rewrite_weights(path: Path, tensors: dict[str, torch.Tensor], target: Path | None = None) -> None:
    """Writes other tensors into a weight file, or into another one, as of the same save."""
    with safe_open(path, "pt") as weights:
        metadata = weights.metadata()
    save_file(tensors, target or path, metadata)


def randomize_relevance(parent, seed: int = 0) -> None:
    """Gives a parent a random relevance, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for mask in parent.masks.site_masks():
        mask.relevance.copy_(torch.randint(0, 256, mask.relevance.shape, generator=generator))
        if mask.mean_mask is not None:
            mask.mean_mask.copy_(torch.rand(mask.mean_mask.shape, generator=generator))
    parent.config.relevance_source = "exact"


def random_static(parent, share: float = 0.5, seed: int = 0) -> dict[str, torch.Tensor]:
    """Static masks that keep about a share of the neurons."""
    generator = torch.Generator().manual_seed(seed)
    return {site.key: (torch.rand(site.neurons, generator=generator) < share).float() for site in parent.sites}


@torch.no_grad()
def without(model: PreTrainedModel, parent, static: dict[str, torch.Tensor]) -> PreTrainedModel:
    """A copy of a plain model in which the rows and columns of closed neurons are zeros."""
    reference = copy.deepcopy(model)
    for site in parent.sites:
        for rows, part in site.produced():
            # Units and values are closed where they are read: their activation may not be 0 at 0.
            if part in ("query", "key"):
                closed = rows.indices((site.part_mask(part, static[site.key]) == 0).nonzero().squeeze(-1))
                for parameter in reference.get_submodule(rows.layer).parameters():
                    parameter[closed] = 0.0
        for path in site.readers:
            reference.get_submodule(path).weight[:, site.input_scale(path, static[site.key]) == 0] = 0.0
    return reference


def hooks_of(model) -> int:
    return sum(len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in model.modules())


def logits_of(model, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


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
    """Of the tiny text models: words w0 to w106, and the pieces of more of them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *(f"w{index}" for index in range(107)), "w", *(f"##{digit}" for digit in range(10))]
    inner = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")


def example_script(folder: str, name: str):
    """A script in a folder of examples, as a module."""
    folder = str(Path(__file__).parents[1] / "examples" / folder)
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)


benchmark_script = functools.partial(example_script, "benchmarks")
