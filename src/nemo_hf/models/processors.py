"""Texts, images and audio: which a sample holds, and what a processor of `transformers` makes of them."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    SequenceFeatureExtractor,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import is_pil_image

from .atomic_writes import scratch_directory

# By kind of sample: the class of its processor, its name in a processor of several kinds, and its Auto class.
PROCESSORS: dict[str, tuple[type, str, Any]] = {
    "text": (PreTrainedTokenizerBase, "tokenizer", AutoTokenizer),
    "image": (BaseImageProcessor, "image_processor", AutoImageProcessor),
    "audio": (SequenceFeatureExtractor, "feature_extractor", AutoFeatureExtractor),
}
IN_WORDS = {"text": "a tokenizer", "image": "an image processor", "audio": "a feature extractor"}
UNLIMITED = 10**6  # tokens from which a tokenizer's longest text is no limit
SPARE_POSITIONS = 4  # that families such as RoBERTa leave unused


def is_raw(value: Any, kind: str) -> bool:
    """Whether a value is a text, an image (PIL, or an array of 2 or 3 dimensions) or audio (an array, or with rate)."""
    if kind == "text":
        return isinstance(value, str)
    is_array = isinstance(value, (np.ndarray, Tensor))
    if kind == "image":
        return is_pil_image(value) or (is_array and value.ndim in (2, 3))
    return _has_rate(value) or (is_array and value.ndim == 1)


def _has_rate(value: Any) -> bool:
    """Whether audio comes with its sampling rate, as the library `datasets` reads it."""
    return hasattr(value, "get_all_samples") or (isinstance(value, Mapping) and "array" in value)


def part_of(processor: Any, kind: str) -> Any:
    """The tokenizer, image processor or feature extractor that reads samples of a kind; others are a `TypeError`."""
    known, name, auto_class = PROCESSORS[kind]
    part = getattr(processor, name, None) if isinstance(processor, ProcessorMixin) else processor
    others = tuple(other for other, _, _ in PROCESSORS.values() if other is not known)
    if not callable(part) or isinstance(part, others):
        raise TypeError(
            f"Got a {type(processor).__name__} as processing_class for a model of {kind}; expected {IN_WORDS[kind]}. "
            f"Pass that of the model: {auto_class.__name__}.from_pretrained(...)."
        )
    return part


def own_processor(model: PreTrainedModel, kind: str) -> Any:
    """The processor whose files a parent or module carries; without them a `ValueError` asks for one."""
    auto_class = PROCESSORS[kind][2]
    files: Mapping[str, bytes] = getattr(model, "processor_files", None) or {}
    path = model.name_or_path or "the model's repository"
    ask = f"Pass processing_class={auto_class.__name__}.from_pretrained({path!r})."
    if not files:
        raise ValueError(f"Got {kind} samples without processing_class; expected {IN_WORDS[kind]}. {ask}")
    with scratch_directory() as directory:
        for file, content in files.items():
            (directory / file).write_bytes(content)
        try:
            return auto_class.from_pretrained(directory)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"Got {kind} samples, and a model with the files {sorted(files)}, which make no processor of them "
                f"({type(error).__name__}); expected {IN_WORDS[kind]}. {ask}"
            ) from error


def tokenized(tokenizer: Any, texts: Sequence[str], config: Any) -> list[dict[str, Any]]:
    """Token ids and the like of each text, cut to the longest that the tokenizer, or else the model, takes."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or 0
    options = {}
    if getattr(tokenizer, "model_max_length", 0) > UNLIMITED and longest > SPARE_POSITIONS:
        options = {"max_length": longest - SPARE_POSITIONS}
    encoded = tokenizer(list(texts), truncation=bool(options) or tokenizer.model_max_length <= UNLIMITED, **options)
    return [{name: values[index] for name, values in encoded.items()} for index in range(len(texts))]


def pixels(processor: Any, images: Sequence[Any], channels: int) -> Mapping[str, Any]:
    """What an image processor makes of a batch of images."""
    if channels == 3:
        images = [image.convert("RGB") if is_pil_image(image) else image for image in images]
    batch: Mapping[str, Any] = processor(images=list(images), return_tensors="pt")
    return batch


def features(extractor: Any, recordings: Sequence[Any]) -> Mapping[str, Any]:
    """What a feature extractor makes of a batch of recordings; those without a rate count as of the extractor's."""
    expected = getattr(extractor, "sampling_rate", None)
    rates = {audio["sampling_rate"] for audio in recordings if _has_rate(audio)} or {expected}
    if expected is not None and rates != {expected}:
        raise ValueError(
            f"Got audio of {max(rates - {expected})} samples a second for a {type(extractor).__name__} of {expected}; "
            f"expected the same. Resample it: dataset.cast_column('audio', datasets.Audio(sampling_rate={expected}))."
        )
    arrays = [np.asarray(audio["array"] if _has_rate(audio) else audio) for audio in recordings]
    default = inspect.signature(type(extractor).__call__).parameters.get("padding")
    pads = {"padding": True} if default is not None and default.default is False else {}  # others pad to a length
    batch: Mapping[str, Any] = extractor(arrays, sampling_rate=expected, return_tensors="pt", **pads)
    return batch


def padded(processor: Any, samples: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """A batch of prepared samples, padded by a tokenizer or feature extractor."""
    if isinstance(processor, PreTrainedTokenizerBase):
        return DataCollatorWithPadding(processor)([dict(sample) for sample in samples])
    batch: Mapping[str, Any] = processor.pad([dict(sample) for sample in samples], padding=True, return_tensors="pt")
    return batch


def can_pad(processor: Any) -> bool:
    """Whether `padded` works with a processor."""
    if isinstance(processor, PreTrainedTokenizerBase):
        return processor.pad_token is not None
    return isinstance(processor, SequenceFeatureExtractor)


def stacked(name: str, values: Sequence[Any], padding: int | None) -> Tensor:
    """One tensor of samples' values, those of other lengths padded at the end; `padding=None` refuses them."""
    tensors = [value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value)) for value in values]
    shapes = sorted({tuple(tensor.shape) for tensor in tensors})
    if len(shapes) == 1:
        return torch.stack(tensors)
    if padding is None or len({shape[1:] for shape in shapes}) > 1 or not all(shapes):
        raise ValueError(
            f"Got {name!r} of the shapes {shapes[0]} and {shapes[-1]} in two samples; expected one shape. Prepare all "
            "samples in the same way."
        )
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=padding)
