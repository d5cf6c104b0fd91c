"""What the tests of cutting on calibration samples share."""

import copy
import logging
import random
from functools import partial

import numpy as np
import torch
from conftest import hooks_of, image_samples, text_samples
from training_helpers import batch_of

from nemo_hf import extract_module

IMAGES = ("vit", "deit", "deit-teacher", "swin")


def batches_of(samples, size=16):
    unlabelled = [{name: value for name, value in sample.items() if name != "labels"} for sample in samples]
    return [batch_of(unlabelled[start : start + size]) for start in range(0, len(samples), size)]


def batches_for(family, count=64, seed=0, size=16):
    return batches_of((image_samples if family in IMAGES else text_samples)(count, seed), size)


def cut(model, batches, retention=0.4, labels=(3, 1), **options):
    return extract_module(model, list(labels), batches, retention, show_progress=False, **options)


def distance(module, source, batches, labels=(3, 1)):
    with torch.no_grad():
        missing = [module(**batch).logits - source(**batch).logits[:, list(labels)] for batch in batches]
    return torch.cat(missing).square().mean().item()


def assert_same_weights(module, other, rtol=0.0, atol=0.0):
    state = other.state_dict()
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=rtol, atol=atol, msg=lambda text, name=name: name + text)


def seen_by(model, batches):
    """What each layer reads and returns, admitted tokens alone: path to (rows, features)."""
    read, made, mask = {}, {}, None

    def hook(path, layer, args, kwargs, output):
        for found, value in ((read, args[0] if args else None), (made, output)):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                value = value.movedim(1, -1) if isinstance(layer, torch.nn.Conv2d) else value
                has_tokens = mask is not None and value.shape[:2] == mask.shape
                found.setdefault(path, []).append(value[mask.bool()] if has_tokens else value.flatten(0, -2))

    handles = [
        layer.register_forward_hook(partial(hook, path), with_kwargs=True) for path, layer in model.named_modules()
    ]
    with torch.no_grad():
        for batch in batches:
            mask = batch.get("attention_mask")
            model(**batch)
    for handle in handles:
        handle.remove()
    return tuple({path: torch.cat(parts) for path, parts in found.items()} for found in (read, made))


def everything_about(model):
    """What a cut may not change: tensors and their places, hooks, flags, configuration, gradients, random numbers."""
    layers = dict(model.named_modules())
    tensors = model.state_dict(keep_vars=True)
    return {
        "values": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "places": {name: (tensor.data_ptr(), id(tensor)) for name, tensor in tensors.items()},
        "flags": [(p.requires_grad, p.grad is None, p.dtype) for p in model.parameters()],
        "training": [layer.training for layer in layers.values()],
        "attributes": [sorted(vars(layer)) for layer in layers.values()],
        "checkpointing": [getattr(layer, "gradient_checkpointing", None) for layer in layers.values()],
        "hooks": hooks_of(model),
        "config": copy.deepcopy(model.config.to_dict()),
        "random": (torch.get_rng_state(), random.getstate(), repr(np.random.get_state())),  # noqa: NPY002
        "modes": (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_float32_matmul_precision()),
        "threads": torch.get_num_threads(),
        "logging": logging.getLogger().level,
    }


def assert_untouched(model, before):
    after = everything_about(model)
    for name in before:
        if name in ("values", "random"):
            continue
        assert after[name] == before[name], name
    assert all(torch.equal(tensor, before["values"][name]) for name, tensor in after["values"].items())
    assert torch.equal(after["random"][0], before["random"][0])
    assert after["random"][1:] == before["random"][1:]


def words(count=40):
    """Texts for the tokenizer of the tiny models, with labels."""
    samples = text_samples(count)
    return [
        {
            "text": " ".join(f"w{token - 2}" for token in sample["input_ids"].tolist() if token > 1),
            "label": sample["labels"],
        }
        for sample in samples
    ]


EVERYTHING = {"processing_class": None, "refine_epochs": 1, "vocabulary": "shared", "max_positions": 20}


def cut_everything(model, **options):
    return extract_module(model, ["dog", "ship"], words(), 0.4, **(EVERYTHING | options), show_progress=False)
