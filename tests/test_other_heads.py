"""Heads beside one label a sample: several labels, pairs of texts; what is refused, and why."""

import math

import pytest
import torch
from conftest import NAMES, TEXT, fresh, image_samples, randomize_relevance, text_samples
from datasets import Dataset
from transformers import (
    AutoModelForImageClassification,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    TrainingArguments,
    ViTForImageClassification,
)

from nemo_hf import NeMoConfig, NeMoTrainer, compute_relevance, evaluate_module, make_parent, nemo_loss
from nemo_hf.evaluation.metrics import cohesion_and_coupling, jaccard_indices
from nemo_hf.models.extraction import make_plan
from nemo_hf.models.labels import group_indices, group_membership, shares_group
from nemo_hf.training.losses import mask_objective, restricted_binary_cross_entropy

GROUPS = {"pets": ["cat", "dog"], "vehicles": ["car", "ship"], "rest": ["frog"]}


def several_labels_vit() -> ViTForImageClassification:
    model = fresh("vit")
    model.config.problem_type = "multi_label_classification"
    return model


def label_lists(samples: int, seed: int = 0) -> torch.Tensor:
    """0 and 1 for each label; each label occurs, one sample has none."""
    labels = (torch.rand(samples, 5, generator=torch.Generator().manual_seed(seed)) < 0.4).float()
    labels[:5] = torch.maximum(labels[:5], torch.eye(5))
    labels[5] = 0
    return labels


def several_label_samples(count: int = 24) -> list[dict]:
    labels = label_lists(count)
    return [{**sample, "labels": labels[index]} for index, sample in enumerate(image_samples(count))]


def batches(samples: list[dict], size: int = 8) -> list[dict]:
    return [
        {
            key: torch.stack([torch.as_tensor(sample[key]) for sample in samples[start : start + size]])
            for key in samples[0]
        }
        for start in range(0, len(samples), size)
    ]


def trainer_of(model, samples, tmp_path, config=None, **options) -> NeMoTrainer:
    args = {"per_device_train_batch_size": 8, "max_steps": 4, "learning_rate": 1e-3, "report_to": "none"}
    args = TrainingArguments(str(tmp_path), **{**args, **options}, use_cpu=True, disable_tqdm=True)
    return NeMoTrainer(model, args, train_dataset=samples, eval_dataset=samples, nemo_config=config)


def test_membership_is_that_of_any_label():
    groups = torch.tensor([0, 0, 1, 1, 2])
    labels = label_lists(12)
    expected = [[any(labels[i, j] for j in range(5) if groups[j] == g) for g in range(3)] for i in range(12)]
    assert group_membership(labels, groups, 3).tolist() == expected
    ids = torch.tensor([4, 0, 3])
    assert group_membership(ids, groups, 3).tolist() == [[g == groups[i] for g in range(3)] for i in ids]


def test_the_contrastive_loss_over_membership_is_that_of_a_double_loop():
    generator = torch.Generator().manual_seed(1)
    masks = [torch.rand(10, width, generator=generator) for width in (7, 3)]
    member = group_membership(label_lists(10), torch.tensor([0, 0, 1, 1, 2]), 3)
    total = 0.0
    for mask in masks:
        unit = mask / (mask.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        anchors = []
        for i in range(10):
            similar = [float(unit[i] @ unit[k]) / 0.2 for k in range(10)]
            positives = [j for j in range(10) if j != i and bool((member[i] & member[j]).any())]
            if positives:
                all_others = math.log(sum(math.exp(similar[k]) for k in range(10) if k != i))
                anchors.append(-sum(similar[j] - all_others for j in positives) / len(positives))
        total += sum(anchors) / len(anchors)
    assert mask_objective(torch.cat(masks, -1), [7, 3], member).item() == pytest.approx(total / 2, rel=1e-5)


def test_with_one_group_a_sample_membership_changes_nothing():
    groups = torch.tensor([0, 1, 2, 0, 1, 1])
    member = torch.nn.functional.one_hot(groups, 3).bool()
    mask = torch.rand(6, 9, generator=torch.Generator().manual_seed(2))
    assert torch.equal(shares_group(groups), shares_group(member))
    assert torch.equal(mask_objective(mask, [9], groups), mask_objective(mask, [9], member))
    assert cohesion_and_coupling(mask > 0.5, groups) == cohesion_and_coupling(mask > 0.5, member)


def test_cohesion_counts_pairs_that_share_a_group_and_coupling_the_others():
    member = group_membership(label_lists(9), torch.tensor([0, 0, 1, 1, 2]), 3)
    masks = torch.rand(9, 12, generator=torch.Generator().manual_seed(3)) < 0.5
    indices = jaccard_indices(masks)
    pairs = [(i, j) for i in range(9) for j in range(9) if i != j]
    shared = [indices[i, j].item() for i, j in pairs if (member[i] & member[j]).any()]
    apart = [indices[i, j].item() for i, j in pairs if not (member[i] & member[j]).any()]
    expected = (sum(shared) / len(shared), sum(apart) / len(apart))
    assert cohesion_and_coupling(masks, member) == pytest.approx(expected)


def test_the_binary_loss_counts_allowed_labels_only():
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(4))
    labels = label_lists(6)[:4]
    allowed = torch.tensor([True, False, True, True, False])
    expected = [
        -math.log(torch.sigmoid(logits[i, j] if labels[i, j] else -logits[i, j]).item())
        for i in range(4)
        for j in (0, 2, 3)
    ]
    assert restricted_binary_cross_entropy(logits, labels, allowed).item() == pytest.approx(
        sum(expected) / 12, rel=1e-5
    )


def test_nemo_loss_takes_several_labels_a_sample():
    logits, labels = torch.randn(6, 5, generator=torch.Generator().manual_seed(5)), label_lists(6)
    member = group_membership(labels, torch.arange(5), 5)
    mask = torch.rand(6, 1, 8, generator=torch.Generator().manual_seed(6))
    expected = restricted_binary_cross_entropy(logits, labels) + 0.5 * mask_objective(mask[:, 0], [8], member)
    assert torch.allclose(nemo_loss(logits, labels, {"a": mask}, member), expected)


def test_relevance_counts_a_sample_in_each_of_its_groups():
    torch.manual_seed(0)
    parent = make_parent(several_labels_vit(), NeMoConfig(label_groups=GROUPS)).eval()
    samples = several_label_samples()
    with torch.no_grad():  # close about half of the neurons
        for mask in parent.masks.site_masks():
            mask.generator.up.bias.copy_(
                torch.randn(mask.site.neurons, generator=torch.Generator().manual_seed(7)) * 0.1
            )
            mask.generator.up.weight.normal_(std=2.0, generator=torch.Generator().manual_seed(8))
    compute_relevance(parent, batches(samples), show_progress=False)
    member = group_membership(label_lists(24), group_indices(parent), 3)
    inputs = torch.stack([sample["pixel_values"] for sample in samples])
    with torch.no_grad():
        masks = parent(inputs, output_neuron_masks=True).neuron_masks
    counted = 0
    for mask in parent.masks.site_masks():
        opened = (masks[mask.site.key] > 0).any(1).float()
        for group in range(3):
            expected = (opened[member[:, group]].mean(0) * 255).round()
            assert (mask.relevance[group].float() - expected).abs().max() <= 1  # batches round alike but for ties
            counted += int((expected % 255 != 0).sum())
    assert counted > 50  # shares that are neither 0 nor 1


def test_training_goes_on_and_a_module_answers_yes_or_no(tmp_path):
    samples = several_label_samples()
    config = NeMoConfig(label_groups=GROUPS, rehearsal_probability=1.0, warmup_ratio=0.0, relevance_threshold=0.6)
    trainer = trainer_of(several_labels_vit(), samples, tmp_path, config, max_steps=6, logging_steps=1)
    before = {name: p.detach().clone() for name, p in trainer.parent.named_parameters()}
    trainer.train()
    assert all((p != before[name]).any() for name, p in trainer.parent.named_parameters() if "up.bias" in name)
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    assert trainer.evaluate()["eval_loss"] > 0
    assert 0 < trainer.evaluate_modularity()["coupling"] <= 1
    randomize_relevance(trainer.parent)
    module = trainer.extract_module(["ship", "pets"])
    assert module.config.problem_type == "multi_label_classification"
    module.save_pretrained(tmp_path / "module")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "module")
    inputs, labels = torch.stack([s["pixel_values"] for s in samples]), label_lists(24)[:, [3, 0, 1]]
    with torch.no_grad():
        output = loaded(inputs, labels=labels)
        assert torch.equal(output.logits, module(inputs).logits)
    assert output.loss.item() == pytest.approx(restricted_binary_cross_entropy(output.logits, labels).item(), rel=1e-5)


def test_a_module_of_one_label_has_a_loss_too(tmp_path):
    parent = make_parent(several_labels_vit())
    randomize_relevance(parent)
    module = parent.extract_module("cat")
    inputs = torch.stack([sample["pixel_values"] for sample in several_label_samples(6)])
    assert module(inputs, labels=label_lists(6)[:, :1]).loss.isfinite()


def test_a_rehearsed_step_runs_every_sample_as_the_module(tmp_path, monkeypatch):
    samples = several_label_samples()
    config = NeMoConfig(rehearsal_probability=1.0, warmup_ratio=0.0, contrastive_weight=0, sparsity_weight=0)
    trainer = trainer_of(several_labels_vit(), samples, tmp_path, config)
    randomize_relevance(trainer.parent)
    seen = {}
    forward = trainer.parent.forward
    monkeypatch.setattr(trainer.parent, "forward", lambda **inputs: seen.update(inputs) or forward(**inputs))
    trainer.parent.train()
    batch = batches(samples)[0]
    loss, output = trainer.compute_loss(trainer.parent, batch, return_outputs=True)
    rehearsed = trainer._rehearsed_groups()
    assert seen.get("static_samples") is None
    for mask in trainer.parent.masks.site_masks():
        opened = mask.relevance[rehearsed].amax(0) >= round(0.5 * 255)
        assert torch.equal(seen["static_masks"][mask.site.key] > 0, opened)
    allowed = torch.zeros(5, dtype=torch.bool).index_fill(0, rehearsed, True)
    task = restricted_binary_cross_entropy(output.logits, batch["labels"], allowed)
    assert loss.item() == pytest.approx(task.item(), rel=1e-5)


def test_the_report_counts_answers_to_each_label():
    parent = make_parent(several_labels_vit(), NeMoConfig(relevance_threshold=0.6)).eval()
    randomize_relevance(parent)
    samples = several_label_samples()
    report = evaluate_module(parent, ["ship", "cat"], batches(samples), show_progress=False)
    inputs, labels = torch.stack([s["pixel_values"] for s in samples]), label_lists(24)[:, [3, 0]]
    with torch.no_grad():
        static = make_plan(parent, ["ship", "cat"]).static
        module = parent(inputs, static_masks=static).logits[:, [3, 0]]
        whole = parent(inputs).logits[:, [3, 0]]
    assert report.samples == 24
    assert report.accuracy == pytest.approx(((module > 0) == (labels > 0)).float().mean().item())
    assert report.parent_restricted_accuracy == pytest.approx(((whole > 0) == (labels > 0)).float().mean().item())


@pytest.mark.parametrize(
    ("labels", "got"), [([1.0, 0.0], r"\[1\.0, 0\.0\]"), ([0.0, 0, 2, 0, 1], "2"), (3, "Got the labels 3")]
)
def test_labels_that_are_no_list_of_yes_and_no_are_refused(tmp_path, labels, got):
    data = Dataset.from_dict({"pixel_values": [torch.zeros(3, 16, 16).tolist()], "labels": [labels]})
    with pytest.raises(ValueError, match=f"{got}.*expected a list of 5 zeros and ones"):
        trainer_of(several_labels_vit(), data, tmp_path)


def test_a_label_without_a_sample_is_refused(tmp_path):
    labels = [[1.0, 1, 1, 1, 0]] * 3
    data = Dataset.from_dict({"pixel_values": [torch.zeros(3, 16, 16).tolist()] * 3, "labels": labels})
    with pytest.raises(ValueError, match="without a sample of \\['frog'\\]"):
        trainer_of(several_labels_vit(), data, tmp_path)


def test_a_group_column_is_refused_with_several_labels(tmp_path):
    with pytest.raises(ValueError, match=r"group_column.*expected label_groups"):
        trainer_of(several_labels_vit(), several_label_samples(), tmp_path, NeMoConfig(group_column="kind"))


def test_the_second_text_of_a_pair_counts(tmp_path):
    """Sentence pairs: token_type_ids say which text a token is of, in training, in the parent and in a module."""
    samples = text_samples(20)
    for sample in samples:
        sample["token_type_ids"] = (torch.arange(12) >= 4).long()
    data = Dataset.from_list([{k: v.tolist() if k != "labels" else v for k, v in s.items()} for s in samples])
    trainer = trainer_of(fresh("bert"), data, tmp_path, NeMoConfig(relevance_threshold=0.6))
    seen = []
    trainer.parent.model.register_forward_pre_hook(
        lambda _, args, kw: seen.append(kw.get("token_type_ids")), with_kwargs=True
    )
    trainer.train()
    assert seen
    assert all(ids is not None and ids.any() for ids in seen)
    randomize_relevance(trainer.parent)
    module = trainer.parent.eval().extract_module(["cat", "ship"])
    inputs = {key: torch.stack([s[key] for s in samples]) for key in ("input_ids", "attention_mask", "token_type_ids")}
    static = make_plan(trainer.parent, ["cat", "ship"]).static
    with torch.no_grad():
        expected = trainer.parent(**inputs, static_masks=static).logits[:, [0, 3]]
        assert torch.allclose(module(**inputs).logits, expected, atol=1e-5)
        as_one_text = {**inputs, "token_type_ids": torch.zeros_like(inputs["token_type_ids"])}
        assert (module(**as_one_text).logits - expected).abs().max() > 1e-3


def test_labels_of_tokens_are_refused_with_the_reason():
    model = BertForTokenClassification(BertConfig(**TEXT))
    with pytest.raises(TypeError, match=r"BertForTokenClassification; expected .* a mask is of a whole sample"):
        make_parent(model)


def test_regression_is_refused_with_the_reason():
    text = {key: value for key, value in TEXT.items() if key not in NAMES}
    for options in ({"num_labels": 1}, {"num_labels": 3, "problem_type": "regression"}):
        model = BertForSequenceClassification(BertConfig(**text, **options))
        with pytest.raises(ValueError, match="expected single-label or multi-label classification with at least 2"):
            make_parent(model)


@pytest.mark.parametrize("has_several", [True, False])
def test_labels_of_the_other_kind_are_refused(tmp_path, has_several):
    model = several_labels_vit() if has_several else fresh("vit")
    samples = image_samples(12) if has_several else several_label_samples(12)
    expected = f"expected {'a list' if has_several else 'an id'} for each sample"
    trainer = trainer_of(model, samples, tmp_path)
    with pytest.raises(ValueError, match=expected):
        trainer.train()
    batch = batches(samples)
    with pytest.raises(ValueError, match=expected):
        compute_relevance(trainer.parent, batch, show_progress=False)
    with pytest.raises(ValueError, match=expected):
        evaluate_module(trainer.parent, ["cat", "dog"], batch, show_progress=False)
    with pytest.raises(ValueError, match=expected):
        trainer.parent(**batch[0])


def test_whole_numbers_serve_as_yes_and_no():
    parent = make_parent(several_labels_vit()).eval()
    batch = batches(several_label_samples(8))[0]
    expected = parent(**batch).loss
    assert torch.equal(parent(**{**batch, "labels": batch["labels"].long()}).loss, expected)
