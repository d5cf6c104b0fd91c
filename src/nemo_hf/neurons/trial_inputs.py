"""Inputs of trial runs: those of a caller, or random ones of the kind and shape that a model takes."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

TEXT_TOKENS = 16
WAVEFORM_SAMPLES = 4000
FRAMES = 30


def trial_inputs(model: PreTrainedModel, given: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """The samples that a caller gave, checked and without labels; `None` draws random ones."""
    if given is None:
        return random_inputs(model)
    entries = given.items() if isinstance(given, Mapping) else ()
    inputs = {name: value for name, value in entries if name != "labels" and value is not None}
    if not inputs or not all(isinstance(value, Tensor) and value.ndim and len(value) for value in inputs.values()):
        shown = {name: tuple(v.shape) if isinstance(v, Tensor) else v for name, v in entries} or type(given).__name__
        raise ValueError(
            f"Got the inputs {str(shown)[:200]}; expected tensors by name, of one sample or more. Pass what the "
            "model's tokenizer or image processor returns with return_tensors='pt'."
        )
    return inputs


def random_inputs(model: PreTrainedModel, samples: int = 4) -> dict[str, Tensor]:
    """Draws inputs for a plain model, parent or module (texts with padding); always the same ones."""
    config = getattr(model.config, "base_config", model.config)
    assert isinstance(config, PreTrainedConfig)
    generator = torch.Generator().manual_seed(0)
    name = model.main_input_name
    if name == "inputs":  # Perceiver's, of any kind
        is_image = "ForImage" in str(getattr(model.config, "base_class", type(model).__name__))
        name = "pixel_values" if hasattr(config, "image_size") and is_image else "input_ids"
    if name == "pixel_values":
        return _images(config, samples, generator)
    if name == "input_ids":
        return _texts(config, samples, generator)
    shape: tuple[int, ...]
    if name == "input_values":
        is_spectrogram = hasattr(config, "num_mel_bins") and hasattr(config, "max_length")
        shape = (config.max_length, config.num_mel_bins) if is_spectrogram else (WAVEFORM_SAMPLES,)
    elif name == "input_features" and hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        shape = (config.num_mel_bins, 2 * config.max_source_positions)  # Whisper's encoder halves the frames
    elif name == "input_features":
        shape = (FRAMES, _first(config, ("feature_projection_input_dim", "num_mel_bins"), 80))
    else:
        raise ValueError(
            f"Got a model whose main input is {name!r}; expected pixel_values, input_ids, input_values or "
            "input_features. Pass a few samples: make_parent(model, inputs=...)."
        )
    return {name: torch.randn(samples, *shape, generator=generator)}


def _images(config: PreTrainedConfig, samples: int, generator: torch.Generator) -> dict[str, Tensor]:
    vision = getattr(config, "vision_config", None) or config
    channels = _first(vision, ("num_channels", "stem_num_channels"), 3)
    size = _first(vision, ("image_size", "input_size", "anchor_image_size", "eval_size"), None)
    patches = _first(vision, ("num_patches",), None)
    if size is None and patches is not None:  # images cut into patches beforehand (SigLIP 2)
        side = math.isqrt(patches)
        return {
            "pixel_values": torch.randn(samples, side * side, channels * vision.patch_size**2, generator=generator),
            "pixel_attention_mask": torch.ones(samples, side * side, dtype=torch.long),
            "spatial_shapes": torch.full((samples, 2), side),
        }
    height, width = size if isinstance(size, (list, tuple)) else (size or 224, size or 224)
    return {"pixel_values": torch.randn(samples, channels, height, width, generator=generator)}


def _texts(config: PreTrainedConfig, samples: int, generator: torch.Generator) -> dict[str, Tensor]:
    text = config.get_text_config()
    vocabulary = _first(text, ("vocab_size", "entity_vocab_size"), 256)
    longest = _first(text, ("max_position_embeddings",), 0)  # -1 where there is no limit (XLNet)
    tokens = min(TEXT_TOKENS, longest - 4) if longest > 4 else TEXT_TOKENS
    pad, ends = getattr(text, "pad_token_id", None), _special(config, text)
    plain = torch.tensor([i for i in range(min(4, vocabulary - 1), vocabulary) if i != pad and i not in ends])
    ids = plain[torch.randint(len(plain), (samples, tokens), generator=generator)]
    if pad is None:
        return {"input_ids": ids[:1]}  # models without a padding token take one sequence at a time
    mask = torch.ones_like(ids)
    mask[samples // 2 :, tokens // 2 :] = 0
    if getattr(text, "is_encoder_decoder", False) and text.eos_token_id is not None:
        # Encoder-decoders classify at the end-of-sequence token, of which each sample has one.
        ids[torch.arange(samples), mask.sum(1) - 1] = text.eos_token_id
    return {"input_ids": torch.where(mask.bool(), ids, pad), "attention_mask": mask}


def _special(*configs: PreTrainedConfig) -> set[int]:
    """Ids of tokens that are not text."""
    ids: set[int] = set()
    for config in configs:
        for name, value in config.to_dict().items():
            if name.endswith(("_token_id", "_token_index", "_token_ids")) and value is not None:
                ids.update(value if isinstance(value, (list, tuple)) else [value])
    return ids


def _first(config: Any, names: tuple[str, ...], default: Any) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), default)
