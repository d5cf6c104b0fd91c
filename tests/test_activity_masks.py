"""Activity of rectified units in place of masks: what counts as active, that cuts are exact, and what is refused."""

import copy
import functools

import pytest
import torch
from conftest import NAMES, TEXT, example_script, generated, hooks_of, image_samples, logits_of, randomize, tiny
from training_helpers import arguments, batch_of
from transformers import AutoModelForImageClassification

from nemo_hf import NeMoTrainer, UnsupportedArchitectureError, make_parent
from nemo_hf.models.extraction import make_plan
from nemo_hf.training.relevance import compute_relevance

paper = example_script("paper", "models")


MODA = {"objective": "moda", "contrastive_weight": 1.0, "sparsity_weight": 0.3, "retention_target": None,
        "rehearsal_probability": 0.0, "warmup_ratio": 0.0, "relevance_threshold": 0.9}  # fmt: skip


def plain_model(name):
    if name == "bert":
        dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return randomize(tiny("BertForSequenceClassification", **TEXT, hidden_act="relu", **dropouts))
    return randomize(paper.PaperCNNForImageClassification(paper.PaperCNNConfig(architecture=name, width=4, **NAMES)))


@functools.cache
def built_parent(name):
    return make_parent(plain_model(name), generated(**MODA))


def parent_of(name):
    return copy.deepcopy(built_parent(name))


def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def samples():
    return [{**sample, "pixel_values": sample["pixel_values"].repeat(1, 2, 2)} for sample in image_samples(10)]


def masks_of(parent, *inputs, **named):
    with torch.no_grad():
        return parent(*inputs, **named, output_neuron_masks=True).neuron_masks


def test_the_model_inside_a_parent_gets_no_second_masks():
    with pytest.raises(ValueError, match=r"Got the model inside a parent.*detach_masks"):
        make_parent(parent_of("bert").model, generated())


@pytest.mark.parametrize("name", paper.ARCHITECTURES)
def test_a_parent_computes_what_the_plain_model_does_and_has_no_more_parameters(name):
    plain, parent = plain_model(name), parent_of(name)
    assert torch.equal(logits_of(parent, pixel_values=images()), logits_of(plain, pixel_values=images()))
    assert parent.num_parameters() == plain.num_parameters()
    assert parent.config.equivalence["status"] == "verified"


def test_the_activity_of_a_channel_is_its_mean_over_positions():
    parent, seen = parent_of("simcnn"), {}
    readers = {parent.model.get_submodule(site.readers[0]): site.key for site in parent.sites}
    for layer in readers:
        layer.register_forward_pre_hook(lambda layer, inputs: seen.update({readers[layer]: inputs[0]}), prepend=True)
    masks = masks_of(parent, images())
    for key, read in seen.items():
        batch, calls, neurons = masks[key].shape
        assert calls == 1
        values = read.reshape(batch, neurons, -1)  # a flattened channel is as many inputs side by side
        torch.testing.assert_close(masks[key][:, 0], values.abs().mean(-1))
        assert torch.equal(masks[key][:, 0] > 0, (values != 0).any(-1))
    assert {tuple(read.shape[2:]) for read in seen.values()} >= {(), (2, 2), (32, 32)}


def test_padding_is_not_active():
    parent = parent_of("bert")
    assert {site.kind for site in parent.sites} == {"ffn"}
    ids = torch.tensor([[5, 6, 7, 8, 0, 0]])
    padded, alone = masks_of(parent, ids, attention_mask=(ids > 0).long()), masks_of(parent, ids[:, :4])
    torch.testing.assert_close(padded, alone)


@pytest.mark.parametrize("name", ["vgg16", "resnet18", "bert"])
def test_units_that_a_sample_leaves_at_0_can_be_closed_for_it(name):
    parent = parent_of(name)
    inputs = torch.tensor([[5, 6, 7]]) if name == "bert" else torch.rand(1, 3, 32, 32)
    own = {key: (mask > 0).any(1)[0].float() for key, mask in masks_of(parent, inputs).items()}
    assert any((mask == 0).any() for mask in own.values())
    with torch.no_grad():
        logits = parent(inputs).logits
        closed = parent(inputs, static_masks=own).logits
        static, twice = {key: 1 - mask for key, mask in own.items()}, torch.cat([inputs, inputs])
        other = parent(inputs, static_masks=static).logits
        mixed = parent(twice, static_masks=static, static_samples=torch.tensor([True, False])).logits
    torch.testing.assert_close(closed, logits)
    assert (other - logits).abs().max() > 1e-3
    torch.testing.assert_close(mixed, torch.cat([other, logits]))


def test_relevance_is_the_share_of_samples_in_which_a_unit_is_active_and_modules_are_exact(tmp_path):
    parent = parent_of("rescnn")
    batch = batch_of(samples())
    compute_relevance(parent, [batch], show_progress=False)
    masks = masks_of(parent, batch["pixel_values"])
    for mask in parent.masks.site_masks():
        is_active = (masks[mask.site.key] > 0).any(1)
        for group in range(len(parent.config.groups)):
            share = is_active[batch["labels"] == group].float().mean(0)
            assert torch.equal(mask.relevance[group], (share * 255).round().to(torch.uint8))
    labels, given = [2, 0], {"pixel_values": batch["pixel_values"]}
    module = parent.extract_module(labels, inputs=given)
    parent.save_pretrained(tmp_path)
    expected = logits_of(parent, **given, static_masks=make_plan(parent, labels).static)[:, labels]
    cut = AutoModelForImageClassification.from_pretrained(tmp_path, labels=labels)
    assert torch.equal(logits_of(cut, **given), logits_of(module, **given))
    torch.testing.assert_close(logits_of(module, **given), expected, atol=1e-4, rtol=1e-4)
    assert module.config.retained_neurons < 1


@pytest.mark.parametrize("rehearsal", [0.0, 1.0])
def test_training_moves_weights_and_saves_a_parent(rehearsal, tmp_path):
    config = generated(**{**MODA, "rehearsal_probability": rehearsal, "relevance_threshold": 0.5})
    args = arguments(tmp_path, per_device_train_batch_size=5)
    trainer = NeMoTrainer(plain_model("simcnn"), args, train_dataset=samples(), nemo_config=config)
    before = {name: parameter.clone() for name, parameter in trainer.parent.named_parameters()}
    trainer.train()
    for name, parameter in trainer.parent.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    assert trainer.parent.config.relevance_source == "exact"
    assert all(0 < entry["nemo/loss_contrastive"] < 2 for entry in trainer.state.log_history if "loss" in entry)
    trainer.save_model()
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    expected = logits_of(trainer.parent.eval(), pixel_values=images())
    assert torch.equal(logits_of(again, pixel_values=images()), expected)


def test_networks_without_rectified_units_are_refused(vit):
    with pytest.raises(UnsupportedArchitectureError, match=r"model type 'vit'.*expected a network with ReLU"):
        make_parent(vit, generated(**MODA))
    assert hooks_of(vit) == 0


def test_streams_that_a_pooling_reads_are_rectified_too():
    stages = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 2], "layer_type": "basic"}
    model = tiny("ResNetForImageClassification", **stages)
    sites = make_parent(copy.deepcopy(model), generated(**MODA)).sites
    assert [site.key for site in sites] == [site.key for site in make_parent(model, generated()).sites]


def test_soft_masks_and_a_change_of_kind_are_refused():
    with pytest.raises(ValueError, match="hard_masks=False with objective='moda'"):
        generated(objective="moda", hard_masks=False)
    parent = parent_of("simcnn")
    with pytest.raises(ValueError, match="has_generators=True for a parent trained with False"):
        parent.set_nemo_config(generated())
    parent.set_nemo_config(generated(**{**MODA, "sparsity_weight": 0.1}))
    assert parent.nemo_config.sparsity_weight == 0.1
