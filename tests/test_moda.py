"""Activity of rectified units in place of masks: what counts as active, that cuts are exact, and what is refused."""

import copy

import pytest
import torch
from conftest import NAMES, TEXT, image_samples, text_samples
from test_convolutions import images, paper
from training_helpers import arguments
from transformers import (
    AutoModelForImageClassification,
    BertConfig,
    BertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from nemo_hf import NeMoConfig, NeMoTrainer, UnsupportedArchitectureError, make_parent
from nemo_hf.models.extraction import make_plan
from nemo_hf.training.relevance import compute_relevance

MODA = {"objective": "moda", "contrastive_weight": 1.0, "sparsity_weight": 0.3, "retention_target": None,
        "rehearsal_probability": 0.0, "warmup_ratio": 0.0, "relevance_threshold": 0.9}  # fmt: skip


def lively(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1 if parameter.ndim > 1 else 0.5)
    return model.eval()


def cnn(name):
    return lively(paper.PaperCNNForImageClassification(paper.PaperCNNConfig(architecture=name, width=4, **NAMES)))


def rectified_bert():
    return lively(BertForSequenceClassification(BertConfig(**{**TEXT, "hidden_act": "relu"})))


@pytest.mark.parametrize("name", paper.ARCHITECTURES)
def test_a_parent_computes_what_the_plain_model_does_and_has_no_more_parameters(name):
    plain = cnn(name)
    parent = make_parent(copy.deepcopy(plain), NeMoConfig(**MODA))
    given = images(parent)
    with torch.no_grad():
        assert torch.equal(parent(**given).logits, plain(**given).logits)
    assert parent.num_parameters() == plain.num_parameters()
    assert parent.config.equivalence["status"] == "verified"


def test_the_activity_of_a_channel_is_its_mean_over_positions():
    parent = make_parent(cnn("simcnn"), NeMoConfig(**MODA))
    seen, site_of = {}, {site.readers[0]: site for site in parent.sites}
    for path, site in site_of.items():

        def note(layer, arguments, site=site):
            seen[site.key] = arguments[0].detach().clone()

        parent.model.get_submodule(path).register_forward_pre_hook(note, prepend=True)
    with torch.no_grad():
        masks = parent(**images(parent), output_neuron_masks=True).neuron_masks
    for key, read in seen.items():
        got = masks[key]
        assert got.shape[1] == 1
        for sample in range(len(read)):
            for neuron in range(got.shape[-1]):  # a flattened channel is as many inputs side by side
                values = read[sample].reshape(got.shape[-1], -1)[neuron]
                assert got[sample, 0, neuron].item() == pytest.approx(values.abs().mean().item(), rel=1e-4, abs=1e-7)
                assert (got[sample, 0, neuron] > 0) == bool((values != 0).any())
    assert {tuple(read.shape[2:]) for read in seen.values()} >= {(), (2, 2), (32, 32)}


def test_padding_is_not_active():
    parent = make_parent(rectified_bert(), NeMoConfig(**MODA))
    assert {site.kind for site in parent.sites} == {"ffn"}
    ids = torch.tensor([[5, 6, 7, 8, 0, 0]])
    with torch.no_grad():
        padded = parent(ids, attention_mask=(ids > 0).long(), output_neuron_masks=True).neuron_masks
        alone = parent(ids[:, :4], output_neuron_masks=True).neuron_masks
    for key, mask in padded.items():
        torch.testing.assert_close(mask, alone[key])


@pytest.mark.parametrize("name", ["vgg16", "resnet18", "bert"])
def test_units_that_a_sample_leaves_at_0_can_be_closed_for_it(name):
    parent = make_parent(rectified_bert() if name == "bert" else cnn(name), NeMoConfig(**MODA))
    given = {"input_ids": torch.tensor([[5, 6, 7]])} if name == "bert" else {"pixel_values": torch.rand(1, 3, 32, 32)}
    with torch.no_grad():
        outputs = parent(**given, output_neuron_masks=True)
        own = {key: (mask > 0).any(1)[0].float() for key, mask in outputs.neuron_masks.items()}
        assert any((mask == 0).any() for mask in own.values())
        closed = parent(**given, static_masks=own).logits
        other = parent(**given, static_masks={key: 1 - mask for key, mask in own.items()}).logits
    torch.testing.assert_close(closed, outputs.logits)
    assert (other - outputs.logits).abs().max() > 1e-3


def test_relevance_is_the_share_of_samples_in_which_a_unit_is_active_and_modules_are_exact(tmp_path):
    parent = make_parent(cnn("rescnn"), NeMoConfig(**MODA))
    samples = [{**s, "pixel_values": s["pixel_values"].repeat(1, 2, 2)} for s in image_samples(10)]
    batch = {name: torch.stack([torch.as_tensor(s[name]) for s in samples]) for name in samples[0]}
    compute_relevance(parent, [batch], show_progress=False)
    with torch.no_grad():
        masks = parent(batch["pixel_values"], output_neuron_masks=True).neuron_masks
    for mask in parent.masks.site_masks():
        is_active = (masks[mask.site.key] > 0).any(1)
        for group in range(len(parent.config.groups)):
            share = is_active[batch["labels"] == group].float().mean(0)
            assert torch.equal(mask.relevance[group], (share * 255).round().to(torch.uint8))
    labels, given = [2, 0], {"pixel_values": batch["pixel_values"]}
    module = parent.extract_module(labels, inputs=given)
    parent.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = parent(**given, static_masks=make_plan(parent, labels).static).logits[:, labels]
        cut = AutoModelForImageClassification.from_pretrained(tmp_path, labels=labels)
        assert torch.equal(cut(**given).logits, module(**given).logits)
    torch.testing.assert_close(module(**given).logits, expected, atol=1e-4, rtol=1e-4)
    assert module.config.retained_neurons < 1


@pytest.mark.parametrize("rehearsal", [0.0, 1.0])
def test_training_moves_weights_and_saves_a_parent(rehearsal, tmp_path):
    args = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=5, report_to="none", use_cpu=True,
        learning_rate=1e-2, logging_steps=1,
    )  # fmt: skip
    samples = [{**s, "pixel_values": s["pixel_values"].repeat(1, 2, 2)} for s in image_samples(10)]
    config = NeMoConfig(**{**MODA, "rehearsal_probability": rehearsal, "relevance_threshold": 0.5})
    trainer = NeMoTrainer(cnn("simcnn"), args, train_dataset=samples, nemo_config=config)
    before = {name: parameter.clone() for name, parameter in trainer.parent.named_parameters()}
    trainer.train()
    moved = [name for name, parameter in trainer.parent.named_parameters() if not torch.equal(parameter, before[name])]
    assert set(before) == set(moved)
    assert trainer.parent.config.relevance_source == "exact"
    assert all(0 < entry["loss_contrastive"] < 2 for entry in trainer.state.log_history if "loss" in entry)
    trainer.save_model()
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    given = images(trainer.parent)
    with torch.no_grad():
        assert torch.equal(again(**given).logits, trainer.parent.eval()(**given).logits)


@pytest.mark.parametrize("batch", ["first", "last"])
def test_compactness_and_affinity_press_on_the_weights(batch):
    parent = make_parent(cnn("vgg16"), NeMoConfig(**MODA)).train()
    given = images(parent)
    outputs = parent(**given)
    masks = [mask[:, 0] for mask in outputs.neuron_masks.values()]
    mask = masks[0] if batch == "first" else masks[-1]
    mask.mean().backward()
    assert parent.model.features[0].weight.grad.abs().sum() > 0


def test_checkpointed_activations_give_the_same_gradients(tmp_path):
    found = []
    for checkpointing in (False, True):
        parent = make_parent(rectified_bert(), NeMoConfig(**MODA)).train()
        for layer in parent.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.0
        options = {"activation_checkpointing": checkpointing, "max_steps": 1}
        trainer = NeMoTrainer(parent, arguments(tmp_path, **options), train_dataset=text_samples(8))
        trainer.train()
        found.append({name: parameter.detach() for name, parameter in parent.named_parameters()})
    for name, parameter in found[0].items():
        torch.testing.assert_close(found[1][name], parameter, msg=name)


def test_networks_without_rectified_units_are_refused():
    vit = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ViTForImageClassification(ViTConfig(**vit, intermediate_size=24, **NAMES))
    with pytest.raises(UnsupportedArchitectureError, match=r"model type 'vit'.*expected a network with ReLU"):
        make_parent(model, NeMoConfig(**MODA))
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())


def test_streams_that_a_pooling_reads_are_rectified_too():
    stages = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 2], "layer_type": "basic"}
    parents = [
        make_parent(ResNetForImageClassification(ResNetConfig(**stages, **NAMES)), NeMoConfig(**options))
        for options in (MODA, {})
    ]
    assert [site.key for site in parents[0].sites] == [site.key for site in parents[1].sites]


def test_soft_masks_and_a_change_of_kind_are_refused():
    with pytest.raises(ValueError, match="hard_masks=False with objective='moda'"):
        NeMoConfig(objective="moda", hard_masks=False)
    parent = make_parent(cnn("simcnn"), NeMoConfig(**MODA))
    with pytest.raises(ValueError, match="has_generators=True for a parent trained with False"):
        parent.set_nemo_config(NeMoConfig())
    parent.set_nemo_config(NeMoConfig(**{**MODA, "sparsity_weight": 0.1}))
    assert parent.nemo_config.sparsity_weight == 0.1
