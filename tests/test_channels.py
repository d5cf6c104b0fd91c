"""Channels of convolutions: which are found, that masks close them, that cuts are exact, and what stays whole."""

import copy
import json
import logging
import re
from functools import cache

import pytest
import torch
from conftest import (
    NAMES,
    example_script,
    generated,
    logits_of,
    random_static,
    randomize,
    randomize_relevance,
    tiny,
    without,
)
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from nemo_hf import make_parent
from nemo_hf.evaluation.latency import count_macs
from nemo_hf.hub.pictures import draw_neurons
from nemo_hf.models.extraction import make_plan
from nemo_hf.models.weight_files import WeightFiles
from nemo_hf.neurons.channel_tracing import find_channels
from nemo_hf.neurons.sites import UnsupportedArchitectureError
from nemo_hf.neurons.user_sites import build_user_sites

paper = example_script("paper", "models")

STAGES = {"embedding_size": 8, "hidden_sizes": [12, 16], "depths": [1, 2]}
MODELS = {
    "resnet": {"class_name": "ResNetForImageClassification", **STAGES, "layer_type": "basic"},
    "regnet": {"class_name": "RegNetForImageClassification", **STAGES, "layer_type": "y", "groups_width": 4},
    "mobilenet": {"class_name": "MobileNetV1ForImageClassification", "image_size": 32, "depth_multiplier": 0.25},
}
SITES = {
    "resnet": 6,  # the stem, three blocks' inner channels, two streams
    "regnet": 9,  # a grouped convolution is one with the layer before it; squeeze-and-excite has its own channels
    "mobilenet": 14,  # depthwise convolutions
    "resnet18": 12,  # eight blocks' inner channels, four streams
    "simcnn": 15,  # flattened before the linear layers
    "vgg16": 15,  # 13 convolutions, two hidden linear layers
    "rescnn": 9,  # three plain ones, three blocks' inner channels, three streams
}
ASKED = ["ship", "dog"]


def randomized(model: PreTrainedModel) -> PreTrainedModel:
    """Weights with which a channel far from the logits still moves them, and norms that do something."""
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.weight.data.normal_(std=(2 / layer.weight[0].numel()) ** 0.5, generator=generator)
            if layer.bias is not None:
                layer.bias.data.normal_(std=0.2, generator=generator)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.weight.data.normal_(1.0, 0.2, generator=generator)
            for tensor in (layer.bias.data, layer.running_mean):
                tensor.normal_(std=0.3, generator=generator)
            layer.running_var.uniform_(0.3, 1.0, generator=generator)
    return model.eval()


@cache
def _built(name: str) -> PreTrainedModel:
    if name in MODELS:
        return randomized(tiny(**MODELS[name]))
    config = paper.PaperCNNConfig(architecture=name, width=4, **NAMES)
    return randomized(paper.PaperCNNForImageClassification(config))


def built(name: str) -> PreTrainedModel:
    return copy.deepcopy(_built(name))


GENERATOR = torch.Generator().manual_seed(3)
INPUTS = torch.randn(3, 3, 32, 32, generator=GENERATOR) + torch.randn(3, 3, 1, 1, generator=GENERATOR)
INPUTS = {"pixel_values": INPUTS}


@cache
def _parent(name: str, is_hard: bool) -> PreTrainedModel:
    config = generated(relevance_threshold=0.6, hard_masks=is_hard, generator_rank=4)
    parent = make_parent(built(name), config, inputs=INPUTS).eval()
    randomize_relevance(parent)
    return parent


def parent_of(name: str, is_hard: bool = True) -> PreTrainedModel:
    """A copy of the model's parent, made once a session."""
    return copy.deepcopy(_parent(name, is_hard))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.sweep if name in ("vgg16", "rescnn") else ()) for name in SITES]
)
def test_channels_are_found_closed_and_cut(name):
    plain, parent = built(name), parent_of(name)
    assert {(site.kind, site.pruning_mode) for site in parent.sites} == {("conv", "dense")}
    assert len(parent.sites) == SITES[name]
    assert parent.config.equivalence["status"] == "verified"
    inputs, static = INPUTS, random_static(parent, 0.7)
    opened = logits_of(parent, **inputs, static_masks=parent.masks.open_masks())
    got = logits_of(parent, **inputs, static_masks=static)
    expected = logits_of(without(plain, parent, static), **inputs)
    assert torch.equal(opened, logits_of(plain, **inputs))
    torch.testing.assert_close(got, expected, atol=1e-5 * max(1, expected.abs().max().item()), rtol=1e-5)
    assert (got - opened).abs().max() > 1e-2
    plan, module = make_plan(parent, ASKED), parent.extract_module(ASKED, inputs=inputs)
    got, expected = logits_of(module, **inputs), logits_of(parent, **inputs, static_masks=plan.static)[:, [3, 1]]
    torch.testing.assert_close(got, expected, atol=1e-5 * max(1, expected.abs().max().item()), rtol=0)
    assert module.config.equivalence["status"] == "verified"
    assert module.model.num_parameters() < 0.8 * plain.num_parameters()
    for site in parent.sites:  # every layer is as narrow as the plan says
        kept = max(1, len(plan.keep[site.key]["channels"])) * site.channels // site.neurons
        for path in (*site.producers, *site.passing):
            layer = module.model.get_submodule(path)
            assert len(layer.weight) == kept
            assert getattr(layer, "groups", 1) == 1 or layer.in_channels == kept


def test_a_generator_sees_the_mean_of_each_channel_over_positions_before_channels_are_closed():
    parent, seen = parent_of("simcnn"), {}
    for site in parent.sites:
        parent.model.get_submodule(site.readers[0]).register_forward_pre_hook(
            lambda layer, inputs, site=site: seen.update({site.key: inputs[0].reshape(3, site.channels, -1).mean(-1)}),
            prepend=True,
        )
    with torch.no_grad():
        masks = parent(**INPUTS, output_neuron_masks=True).neuron_masks
        for mask in parent.masks.site_masks():
            torch.testing.assert_close(masks[mask.site.key][:, 0], mask.generator(seen[mask.site.key]))
    # Where channels are flattened, a layer reads four positions of each side by side.
    assert next(site for site in parent.sites if site.output == "hidden.0").inputs == {"hidden.0": 4}


@pytest.mark.parametrize(("name", "is_hard"), [("regnet", True), ("simcnn", False)])
def test_files_hold_parent_module_and_plain_model_and_a_cut_on_load_is_the_same(name, is_hard, tmp_path, monkeypatch):
    parent, inputs = parent_of(name, is_hard), INPUTS
    module = parent.extract_module(ASKED, inputs=inputs)
    parent.save_pretrained(tmp_path / "parent")
    module.save_pretrained(tmp_path / "module")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "parent")
    assert again.sites == parent.sites
    if name in MODELS:  # a class of transformers
        module.save_plain(tmp_path / "plain")
        plain = AutoModelForImageClassification.from_pretrained(tmp_path / "plain")
        assert type(plain) is type(parent.model)
        torch.testing.assert_close(logits_of(plain, **inputs), logits_of(module, **inputs), atol=1e-5, rtol=1e-5)
    assert draw_neurons(module, tmp_path / "neurons.png")
    assert count_macs(module) < count_macs(parent)
    read, original = [], WeightFiles.read

    def counting(self, name, cut=None):
        read.append(original(self, name, cut))
        return read[-1]

    monkeypatch.setattr(WeightFiles, "read", counting)
    cut = AutoModelForImageClassification.from_pretrained(tmp_path / "parent", labels=ASKED)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "module")
    # Loaded weights lie where they lie in the file; some processors round a convolution by the alignment of its
    # weights. A copy is aligned like the model that it is compared with.
    again, loaded, cut = (copy.deepcopy(model) for model in (again, loaded, cut))
    assert torch.equal(logits_of(again, **inputs), logits_of(parent, **inputs))
    for model in (loaded, cut):
        assert torch.equal(logits_of(model, **inputs), logits_of(module, **inputs))
    masks = [tensor for mask in parent.masks.site_masks() for tensor in (mask.relevance, mask.mean_mask)]
    needed = [*module.state_dict().values(), *(tensor for tensor in masks if tensor is not None)]
    assert sum(tensor.nbytes for tensor in read) == sum(tensor.nbytes for tensor in needed)


def test_a_site_without_channels_costs_one_that_is_zero():
    parent = parent_of("resnet")
    empty = next(site for site in parent.sites if site.producers[0].endswith("stages.0.layers.0.layer.0.convolution"))
    next(mask for mask in parent.masks.site_masks() if mask.site is empty).relevance.zero_()
    module = parent.extract_module(ASKED, inputs=INPUTS)
    weight = module.model.get_submodule(empty.producers[0]).weight
    assert weight.shape[0] == 1
    assert not weight.any()
    assert module.config.equivalence["status"] == "verified"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"producers": ["nowhere"]}, "which the model does not have"),
        ({"passing": ["features.8"]}, "the same number of channels"),
        ({"readers": ["features.1"]}, "the same number of channels"),
    ],
)
def test_other_layers_than_those_of_the_same_channels_are_refused(change, message):
    model = built("vgg16")
    description = {"kind": "conv", "producers": ["features.0"], "passing": ["features.1"], "readers": ["features.3"]}
    assert build_user_sites(model, description)[0].channels == 4
    with pytest.raises(ValueError, match=message):
        build_user_sites(model, {**description, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "expected some of"),
        ({"kind": "pooling"}, "expected a mapping with 'kind'"),
        ({"readers": ["classifier.weight"]}, "does not have|no layer has"),
        ({"readers": ["*" * 30]}, "one whole part of a path"),
        ({"readers": ["features.8.body.0"]}, "two sites of the channels that 'features.8.body.0' .* reads"),
    ],
)
def test_a_damaged_list_of_sites_is_refused(change, message, tmp_path):
    parent_of("resnet18").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    site = config["sites"][0].pop("site")
    config["sites"][0] |= {"site": site | change} if change else {}
    path.write_text(json.dumps(config))
    with pytest.raises((ValueError, RuntimeError), match=message):
        AutoModelForImageClassification.from_pretrained(tmp_path)


def test_targets_that_a_model_does_not_have_make_no_difference(vit):
    parent = make_parent(vit, generated(targets=["attention", "ffn"]))
    assert all(set(entry) == {"key", "pruning_mode"} for entry in parent.config.sites)
    parent.set_nemo_config(generated(warmup_ratio=0.3))
    with pytest.raises(UnsupportedArchitectureError, match=r"no neuron sites of kind \['attention', 'ffn'\]"):
        make_parent(built("resnet"), generated(targets=["attention", "ffn"]), inputs=INPUTS)


def test_channels_and_other_neurons_live_in_one_model():
    sizes = {"hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1], "key_dim": [4, 4, 4]}
    model = randomize(tiny("LevitForImageClassification", **sizes, image_size=32), 0.3)
    parent = make_parent(model, generated(relevance_threshold=0.6)).eval()
    kinds = [site.kind for site in parent.sites]
    assert (kinds.count("conv"), kinds.count("ffn")) == (3, 5)
    randomize_relevance(parent)
    assert parent.extract_module(ASKED).config.equivalence["status"] == "verified"


class OddConfig(PreTrainedConfig):
    model_type = "odd_cnn"
    kind: str = ""
    image_size: int = 16
    num_channels: int = 3


class OddForImageClassification(PreTrainedModel):
    """Convolutions, with something between the first two that may keep channels from being cut."""

    config_class = OddConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.stem, self.norm = nn.Conv2d(3, 8, 3), KINDS[config.kind][0]()
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        inputs, groups = 16 if config.kind == "concatenation" else 8, 2 if config.kind == "groups" else 1
        self.body, self.last = nn.Conv2d(inputs, 12, 3, groups=groups), nn.Conv2d(12, 6, 3)
        self.classifier = nn.Linear(6, config.num_labels)

    def forward(self, pixel_values, return_dict=True):
        x = self.norm(self.stem(pixel_values)).relu()
        if self.config.kind == "concatenation":
            x = torch.cat([x, x], 1)
        if self.config.kind == "shuffle":
            x = x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)
        if self.config.kind == "weights":
            x = x * self.scale
        return ImageClassifierOutput(logits=self.classifier(self.last(self.body(x).relu()).mean((2, 3))))


MIXED, BESIDE = "are read by the grouped convolution 'body', which has other groups", "are read by 'body' beside others"
KINDS = {  # the layer behind the stem, and why its channels stay whole
    "groups": (lambda: nn.BatchNorm2d(8), MIXED),
    "concatenation": (lambda: nn.BatchNorm2d(8), BESIDE),
    "shuffle": (lambda: nn.BatchNorm2d(8), f"{BESIDE} .concatenated., or after a change of their order"),
    "softmax": (lambda: nn.Softmax(1), BESIDE),
    "response": (lambda: nn.LocalResponseNorm(3), BESIDE),
    "norm": (lambda: nn.GroupNorm(2, 8), r"are read by 'norm' \(GroupNorm\), which mixes channels"),
    # What works channel by channel is passed.
    "plain": (lambda: nn.BatchNorm2d(8), ""),
    "affine instance": (lambda: nn.InstanceNorm2d(8, affine=True), ""),
    "weights": (lambda: nn.BatchNorm2d(8), "can't be cut exactly"),  # which only the trial cuts show
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_channels_that_are_not_read_one_by_one_stay_whole(kind, registered, caplog):
    registered(OddConfig, AutoModelForImageClassification, OddForImageClassification)
    model = randomized(OddForImageClassification(OddConfig(kind=kind, **NAMES)))
    explanation, reason = find_channels(model).explanation, KINDS[kind][1]
    with caplog.at_level(logging.WARNING, "nemo_hf"):
        parent = make_parent(model, generated())  # the others are cut
    assert {"body", "last"} <= {path for site in parent.sites for path in site.producers} or reason == MIXED
    assert any("stem" in site.producers for site in parent.sites) == (not reason)
    if kind == "weights":
        assert reason in caplog.text
        assert not model.stem._forward_pre_hooks
    else:
        assert re.match(
            f"Channels of convolutions stay whole: those of 'stem' {reason}" if reason else "$", explanation
        )
    assert parent.config.equivalence["status"] == "verified"
