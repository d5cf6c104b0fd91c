"""A size target steers the weight of sparsity."""

import importlib
import logging
import math
from pathlib import Path

import pytest
import torch
from conftest import generated, image_samples
from training_helpers import arguments, assert_same_state, varied_parent

from nemo_hf import NeMoTrainer, make_parent
from nemo_hf.training.relevance import STEERING, size_over_target, sparsity_pressure, steer_size, warn_of_one_core


def parent_that_keeps(share, model):
    """A parent whose groups all keep the first neurons of each site."""
    parent = make_parent(model, generated())
    for mask in parent.masks.site_masks():
        mask.relevance.zero_()
        mask.relevance[:, : round(mask.site.neurons * share)] = 255
    return parent


@pytest.mark.parametrize(("kept", "direction"), [(1.0, 1), (0.0, -1), (0.5, 0)])
def test_too_large_modules_raise_the_weight_and_too_small_ones_lower_it(vit, kept, direction):
    config = generated(retention_target=0.4 if direction else 0.5, warmup_ratio=0.2)
    parent = parent_that_keeps(kept, vit)
    assert parent.masks.sparsity_factor == 1
    for _ in range(3):
        steer_size(parent.masks, config, steps=100)
    assert parent.masks.sparsity_factor.item() == pytest.approx(math.exp(direction * 3 * STEERING / 80), rel=1e-4)


@pytest.mark.parametrize(
    ("shared", "weight", "warns"), [(1.0, 0.5, True), (0.97, 0.5, True), (0.9, 0.5, False), (1.0, 0.0, False)]
)
def test_groups_that_keep_the_same_neurons_are_warned_about(vit, shared, weight, warns, caplog):
    parent = parent_that_keeps(0.5, vit)
    for mask in parent.masks.site_masks():
        mask.relevance[1:, : round(mask.site.neurons // 2 * (1 - shared) * 10 / 9)] = 0  # kept by one group of ten
    with caplog.at_level(logging.WARNING, logger="nemo_hf"):
        warn_of_one_core(parent.masks, generated(contrastive_weight=weight))
    messages = [record.getMessage() for record in caplog.records]
    assert [f"contrastive_weight ({weight} now)" in message for message in messages] == [True] * warns


def test_channels_count_by_the_weights_between_them(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples" / "paper"))
    paper = importlib.import_module("models")
    model = paper.PaperCNNForImageClassification(paper.PaperCNNConfig(architecture="simcnn", width=4))
    parent = parent_that_keeps(0.5, model)
    assert size_over_target(parent.masks, generated(retention_target=0.25)) == pytest.approx(0, abs=1e-6)
    assert size_over_target(parent.masks, generated(retention_target=0.0625)) == pytest.approx(1, abs=1e-6)
    module = parent.extract_module([0])
    kept, whole = (
        sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Conv2d))
        for model in (module, parent.model)
    )
    assert kept / whole == pytest.approx(0.25, abs=0.01)  # only the first layer reads whole images


@pytest.mark.parametrize(("over", "share"), [(1.5, 1.0), (0.95, 0.5), (0.9, 0.0), (0.6, 0.0)])
def test_the_weight_fades_below_the_target(vit, over, share):
    parent = parent_that_keeps(0.5, vit)
    parent.masks.steer(torch.tensor(0.5))
    config = generated(retention_target=0.5 / over, sparsity_weight=0.3)
    assert float(sparsity_pressure(parent.masks, config)) == pytest.approx(0.3 * math.exp(0.5) * share, abs=1e-5)
    assert sparsity_pressure(parent.masks, generated(sparsity_weight=0.3, retention_target=None)) == 0.3


def test_the_steered_weight_survives_files_and_casts(vit, tmp_path):
    parent = make_parent(vit, generated())
    parent.masks.steer(torch.tensor(-1.25))
    parent.save_pretrained(tmp_path)
    loaded = type(parent).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(loaded.masks.sparsity_factor, parent.masks.sparsity_factor)
    assert parent.masks.sparsity_factor.item() == pytest.approx(math.exp(-1.25), rel=1e-5)


def test_training_steers_after_the_warm_up_and_resumes_as_if_never_stopped(tmp_path):
    def run(target, **given):
        parent = varied_parent("vit", retention_target=target, warmup_ratio=0.25)
        args = arguments(tmp_path, max_steps=8, save_steps=4, save_strategy="steps")
        trainer = NeMoTrainer(parent, args, train_dataset=image_samples())
        trainer.train(**given)
        return trainer.parent

    whole = run(0.05)
    assert whole.masks.sparsity_factor.item() > 1
    resumed = run(0.05, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same_state(resumed.state_dict(), whole.state_dict(), rtol=0, atol=1e-6)
    assert run(None).masks.sparsity_level == 0


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("retention_target", 0.0, r"a number in \(0, 1\]"),
        ("retention_target", 1.5, r"a number in \(0, 1\]"),
        ("specificity_weight", -1, r"a number in \[0"),
        ("coupling_weight", -1, r"a number in \[0"),
        ("objective", "mask", "one of"),
    ],
)
def test_options_out_of_range_are_refused(name, value, expected):
    with pytest.raises(ValueError, match=f"{name}={value!r}; expected {expected}"):
        generated(**{name: value})
