"""Heads beside one label a sample: several labels; what is refused, and why."""

import copy
import math

import pytest
import torch
from conftest import fresh, generated, image_samples, randomize_relevance
from datasets import Dataset
from training_helpers import arguments, batch_of, history
from transformers import AutoModelForImageClassification

from nemo_hf import NeMoTrainer, compute_relevance, evaluate_module, make_parent
from nemo_hf.training import losses

GROUPS = {"pets": ["cat", "dog"], "vehicles": ["car", "ship"], "rest": ["frog"]}


def several_labels_vit():
    model = fresh("vit")
    model.config.problem_type = "multi_label_classification"
    return model


def several_labels_parent(**options):
    parent = make_parent(several_labels_vit(), generated(**options)).eval()
    randomize_relevance(parent)
    return parent


def label_lists(samples: int, seed: int = 0) -> torch.Tensor:
    """0 and 1 for each label; each label occurs, one sample has none."""
    labels = (torch.rand(samples, 5, generator=torch.Generator().manual_seed(seed)) < 0.4).float()
    labels[:5] = torch.maximum(labels[:5], torch.eye(5))
    labels[5] = 0
    return labels


def several_label_samples(count: int = 24) -> list[dict]:
    labels = label_lists(count)
    return [{**sample, "labels": labels[index]} for index, sample in enumerate(image_samples(count))]


def trainer_of(model, samples, tmp_path, config=None, **options) -> NeMoTrainer:
    args = arguments(tmp_path, **{"per_device_train_batch_size": 8, "learning_rate": 1e-3, **options})
    return NeMoTrainer(model, args, train_dataset=samples, eval_dataset=samples, nemo_config=config)


def test_the_binary_loss_counts_allowed_labels_only():
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(4))
    labels, allowed = label_lists(6)[:4], torch.tensor([True, False, True, True, False])
    chances = torch.where(labels > 0, logits.sigmoid(), 1 - logits.sigmoid())
    got = losses.restricted_binary_cross_entropy(logits, labels, allowed)
    assert got.item() == pytest.approx(-chances[:, [0, 2, 3]].log().mean().item(), rel=1e-5)


def test_training_goes_on_and_a_module_answers_yes_or_no(tmp_path):
    samples = several_label_samples()
    config = generated(label_groups=GROUPS, rehearsal_probability=1.0, warmup_ratio=0.0, relevance_threshold=0.6)
    trainer = trainer_of(several_labels_vit(), samples, tmp_path, config, max_steps=6)
    before = {name: p.detach().clone() for name, p in trainer.parent.named_parameters()}
    trainer.train()
    assert all((p != before[name]).any() for name, p in trainer.parent.named_parameters() if "up.bias" in name)
    assert all(map(math.isfinite, history(trainer)))
    assert trainer.evaluate()["eval_loss"] > 0
    assert 0 < trainer.evaluate_modularity()["coupling"] <= 1
    randomize_relevance(trainer.parent)
    module = trainer.extract_module(["ship", "pets"])
    module.save_pretrained(tmp_path / "module")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "module")
    inputs, labels = batch_of(samples)["pixel_values"], label_lists(24)[:, [3, 0, 1]]
    with torch.no_grad():
        output = loaded(inputs, labels=labels)
        assert torch.equal(output.logits, module(inputs).logits)
    expected = losses.restricted_binary_cross_entropy(output.logits, labels)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert trainer.extract_module("cat")(inputs, labels=labels[:, :1]).loss.isfinite()


@pytest.mark.parametrize("has_several", [True, False])
def test_a_rehearsed_step_runs_every_sample_as_the_module(has_several, tmp_path, monkeypatch):
    """Where a sample has several labels, and where a module is to be ignorant of other labels."""
    samples = several_label_samples() if has_several else image_samples()
    options = {"rehearsal_probability": 1.0, "warmup_ratio": 0.0, "contrastive_weight": 0, "sparsity_weight": 0}
    config = generated(**options, specificity_weight=0.0 if has_several else 0.5)
    trainer = trainer_of(several_labels_vit() if has_several else fresh("vit"), samples, tmp_path, config)
    randomize_relevance(trainer.parent)
    seen, forward, batch = {}, trainer.parent.forward, batch_of(samples[:10])
    monkeypatch.setattr(trainer.parent, "forward", lambda **inputs: seen.update(inputs) or forward(**inputs))
    loss, output = trainer.compute_loss(trainer.parent.train(), batch, return_outputs=True)
    rehearsed = trainer._rehearsed_groups()
    assert seen.get("static_samples") is None
    for mask in trainer.parent.masks.site_masks():
        opened = mask.relevance[rehearsed].amax(0) >= round(0.5 * 255)
        assert torch.equal(seen["static_masks"][mask.site.key] > 0, opened)
    in_module = torch.zeros(5, dtype=torch.bool).index_fill(0, rehearsed, True)
    if has_several:
        expected = losses.restricted_binary_cross_entropy(output.logits, batch["labels"], in_module)
    else:
        expected = losses.specific_cross_entropy(output.logits, batch["labels"], in_module, 0.5)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([1.0, 0.0], {}, "Got lists of 2 labels for a model of 5; expected a number for each of its labels"),
        ([0.0, 0, 2, 0, 1], {}, "Got 2.0 in a list of labels; expected numbers from 0 to 1"),
        (3, {}, r"Got labels of shape \(3,\); expected a list of 0 and 1 for each sample"),
        ([1.0] * 5, {"group_column": "kind"}, "group_column.*expected label_groups"),
    ],
)
def test_wrong_label_lists_and_a_group_column_are_refused(labels, options, message, tmp_path):
    data = Dataset.from_dict({"pixel_values": [torch.zeros(3, 16, 16).tolist()] * 3, "labels": [labels] * 3})
    with pytest.raises(ValueError, match=message):
        trainer_of(several_labels_vit(), data, tmp_path, generated(**options))


@pytest.mark.parametrize("has_several", [True, False])
def test_labels_of_the_other_kind_are_refused(tmp_path, has_several):
    model = several_labels_vit() if has_several else fresh("vit")
    model.config.problem_type = model.config.problem_type or "single_label_classification"
    samples = image_samples(12) if has_several else several_label_samples(12)
    parent, batch = make_parent(copy.deepcopy(model), generated()), batch_of(samples)
    for run in (
        lambda: trainer_of(model, samples, tmp_path),
        lambda: compute_relevance(parent, [batch], show_progress=False),
        lambda: evaluate_module(parent, ["cat", "dog"], [batch], show_progress=False),
        lambda: parent(**batch),
    ):
        with pytest.raises(ValueError, match=f"expected {'a list of 0 and 1 for each' if has_several else 'ids, or'}"):
            run()


def test_whole_numbers_serve_as_yes_and_no():
    parent, batch = several_labels_parent(), batch_of(several_label_samples(8))
    assert torch.equal(parent(**batch | {"labels": batch["labels"].long()}).loss, parent(**batch).loss)
