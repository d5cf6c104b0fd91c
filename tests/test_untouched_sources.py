"""A source stays as it is while modules are cut from it, also when that ends in the middle, and in several threads."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import fresh, parent_of, tokenizer
from cutting_helpers import assert_same_weights, assert_untouched, batches_for, cut, cut_everything, everything_about

from nemo_hf.models import calibrated_cut

PHASES = ["Measuring", "Reconstructing", "Refining", "Vocabulary", "Rejection"]


def in_use(family):
    """A model as in the middle of training: some layers frozen, some in eval mode, with checkpointing."""
    model = parent_of("bert", static_evaluation=True) if family == "parent" else fresh(family)
    model.train()
    model.activation_checkpointing_enable()
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.LayerNorm)]
    layers[0].eval()
    layers[1].weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("phase", [None, *PHASES])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_source_stays_as_it_is_also_when_the_cut_ends_in_the_middle(phase, error, monkeypatch):
    model = in_use("bert")
    seen = []

    class Bar:
        def __init__(self, **options): ...
        def __enter__(self):
            return self

        def __exit__(self, *_): ...
        def update(self): ...
        def set_description_str(self, name):
            seen.append(name)
            if name == phase and seen.count(name) == (2 if name == "Reconstructing" else 1):
                raise error("in the middle")

    monkeypatch.setattr(calibrated_cut, "tqdm", Bar)
    before = everything_about(model)
    if phase is None:
        cut_everything(model, processing_class=tokenizer())
        assert set(PHASES) <= set(seen)
    else:
        with pytest.raises(error, match="in the middle"):
            cut_everything(model, processing_class=tokenizer())
    assert_untouched(model, before)


@pytest.mark.parametrize("family", ["vit", "llama", "swin", "albert", "parent"])
def test_no_source_is_touched(family):
    model = in_use(family) if family in ("vit", "parent") else fresh(family)
    before = everything_about(model)
    cut(model, batches_for(family), [0.5, 0.2])
    assert_untouched(model, before)


def test_threads_cut_modules_from_one_model_at_once():
    model = fresh("bert")
    batches = batches_for("bert")
    asked = [(0,), (1, 2), (3,), (4, 0)]
    expected = [cut(model, batches, labels=labels) for labels in asked]
    shared = fresh("bert")
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(lambda labels: cut(shared, batches, labels=labels), asked)]
    for module, other in zip(found, expected, strict=True):
        assert_same_weights(module, other)
