"""A size target steers the weight of sparsity, and modules of other labels can be kept ignorant."""

import logging
import math

import pytest
import torch
from conftest import fresh, image_samples
from test_convolutions import paper
from transformers import TrainingArguments

from nemo_hf import NeMoConfig, NeMoTrainer, make_parent
from nemo_hf.training.losses import specific_cross_entropy
from nemo_hf.training.relevance import STEERING, size_over_target, sparsity_pressure, steer_size, warn_of_one_core


def trainer_of(tmp_path, config, **options) -> NeMoTrainer:
    args = {"per_device_train_batch_size": 10, "max_steps": 4, "learning_rate": 1e-3, "report_to": "none", "seed": 3}
    args = TrainingArguments(str(tmp_path), **{**args, **options}, use_cpu=True, disable_tqdm=True)
    return NeMoTrainer(fresh("vit"), args, train_dataset=image_samples(), nemo_config=config)


@pytest.mark.parametrize(("kept", "direction"), [(255, 1), (0, -1)])
def test_too_large_modules_raise_the_weight_and_too_small_ones_lower_it(vit, kept, direction):
    config = NeMoConfig(retention_target=0.4, warmup_ratio=0.2)
    parent = make_parent(vit, config)
    for mask in parent.masks.site_masks():
        mask.relevance.fill_(kept)
    assert parent.masks.sparsity_factor == 1
    for _ in range(3):
        steer_size(parent.masks, config, steps=100)
    assert parent.masks.sparsity_factor.item() == pytest.approx(math.exp(direction * 3 * STEERING / 80), rel=1e-4)


def test_modules_of_the_right_size_leave_the_weight_alone(vit):
    config = NeMoConfig(retention_target=0.5)
    parent = make_parent(vit, config)
    for mask in parent.masks.site_masks():
        mask.relevance.zero_()
        mask.relevance[:, : mask.site.neurons // 2] = 255
    steer_size(parent.masks, config, steps=10)
    assert parent.masks.sparsity_factor == 1


@pytest.mark.parametrize(
    ("shared", "weight", "is_told"), [(1.0, 0.5, True), (0.97, 0.5, True), (0.9, 0.5, False), (1.0, 0.0, False)]
)
def test_groups_that_keep_the_same_neurons_are_told(vit, shared, weight, is_told, caplog):
    parent = make_parent(vit)
    for mask in parent.masks.site_masks():
        mask.relevance.zero_()
        first = mask.site.neurons // 2
        mask.relevance[:, :first] = 255
        mask.relevance[1:, : round(first * (1 - shared) * 10 / 9)] = 0  # these are kept by one group of ten
    with caplog.at_level(logging.WARNING, logger="nemo_hf"):
        warn_of_one_core(parent.masks, NeMoConfig(contrastive_weight=weight))
    assert [f"({weight} now)" in record.getMessage() for record in caplog.records] == [True] * is_told


def test_channels_count_by_the_weights_between_them():
    parent = make_parent(paper.PaperCNNForImageClassification(paper.PaperCNNConfig(architecture="simcnn", width=4)))
    for mask in parent.masks.site_masks():
        mask.relevance.zero_()
        mask.relevance[:, : mask.site.neurons // 2] = 255
    assert size_over_target(parent.masks, NeMoConfig(retention_target=0.25)) == pytest.approx(0, abs=1e-6)
    assert size_over_target(parent.masks, NeMoConfig(retention_target=0.0625)) == pytest.approx(1, abs=1e-6)
    module = parent.extract_module([0])
    kept, whole = (
        sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Conv2d))
        for model in (module, parent.model)
    )
    assert kept / whole == pytest.approx(0.25, abs=0.01)  # only the first layer reads whole images


@pytest.mark.parametrize(("over", "share"), [(1.5, 1.0), (1.0, 1.0), (0.95, 0.5), (0.9, 0.0), (0.6, 0.0)])
def test_the_weight_fades_below_the_target(vit, over, share):
    parent = make_parent(vit)
    parent.masks.steer(torch.tensor(0.5))
    for mask in parent.masks.site_masks():
        mask.relevance.zero_()
        mask.relevance[:, : mask.site.neurons // 2] = 255
    config = NeMoConfig(retention_target=0.5 / over, sparsity_weight=0.3)
    assert float(sparsity_pressure(parent.masks, config)) == pytest.approx(0.3 * math.exp(0.5) * share, abs=1e-5)


def test_without_a_target_the_weight_is_the_option(vit):
    parent = make_parent(vit)
    assert sparsity_pressure(parent.masks, NeMoConfig(sparsity_weight=0.3, retention_target=None)) == 0.3


def test_the_weight_survives_files_and_casts(vit, tmp_path):
    parent = make_parent(vit)
    parent.masks.steer(torch.tensor(-1.25))
    parent.save_pretrained(tmp_path)
    loaded = type(parent).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(loaded.masks.sparsity_factor, parent.masks.sparsity_factor)
    assert parent.masks.sparsity_factor.item() == pytest.approx(math.exp(-1.25), rel=1e-5)


def test_training_steers_after_the_warm_up_and_resumes_as_if_never_stopped(tmp_path):
    config = NeMoConfig(retention_target=0.05, warmup_ratio=0.25)
    whole = trainer_of(tmp_path / "whole", config, max_steps=8)
    whole.train()
    assert whole.parent.masks.sparsity_factor.item() > 1
    first = trainer_of(tmp_path / "part", config, max_steps=8, save_steps=4, save_strategy="steps")
    first.train()
    resumed = trainer_of(tmp_path / "part", config, max_steps=8, save_steps=4, save_strategy="steps")
    resumed.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-4"))
    for trainer in (first, resumed):
        assert torch.equal(trainer.parent.masks.sparsity_level, whole.parent.masks.sparsity_level)
        for name, tensor in whole.parent.state_dict().items():
            assert torch.allclose(trainer.parent.state_dict()[name].float(), tensor.float(), atol=1e-6), name


def test_without_a_target_the_weight_stays(tmp_path):
    trainer = trainer_of(tmp_path, NeMoConfig(warmup_ratio=0.0, retention_target=None))
    trainer.train()
    assert trainer.parent.masks.sparsity_level == 0


def test_a_step_that_keeps_others_ignorant_runs_every_sample_as_the_module(tmp_path, monkeypatch):
    config = NeMoConfig(rehearsal_probability=1.0, warmup_ratio=0.0, specificity_weight=0.5)
    trainer = trainer_of(tmp_path, config)
    samples = image_samples(10)
    batch = {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "labels": torch.tensor([sample["labels"] for sample in samples]),
    }
    seen = {}
    forward = trainer.parent.forward
    monkeypatch.setattr(trainer.parent, "forward", lambda **inputs: seen.update(inputs) or forward(**inputs))
    trainer.parent.train()
    loss, output = trainer.compute_loss(trainer.parent, batch, return_outputs=True)
    assert seen["static_masks"] is not None
    assert seen.get("static_samples") is None
    in_module = torch.zeros(5, dtype=torch.bool).index_fill(0, trainer._rehearsed_groups(), True)
    task = specific_cross_entropy(output.logits, batch["labels"], in_module, 0.5)
    terms = trainer._mask_terms(output.neuron_masks, batch["labels"], len(batch["labels"]), task, 1.0)
    assert loss.item() == pytest.approx((task + terms).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retention_target": 0.0}, r"retention_target=0\.0; expected a number in \(0, 1\]"),
        ({"retention_target": 1.5}, r"retention_target=1\.5; expected a number in \(0, 1\]"),
        ({"specificity_weight": -1}, r"specificity_weight=-1; expected a number in \[0"),
        ({"coupling_weight": -1}, r"coupling_weight=-1; expected a number in \[0"),
        ({"objective": "mask"}, "objective='mask'; expected one of"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        NeMoConfig(**options)
