"""Models and requests that can't work are refused early: the message says what was got, expected and to be done."""

from types import SimpleNamespace

import pytest
import torch
from conftest import TEXT, fresh, randomize_relevance
from transformers import (
    BertConfig,
    BertForTokenClassification,
    BertModel,
    BitConfig,
    BitForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from nemo_hf import UnsupportedArchitectureError, compute_relevance, evaluate_module, make_parent
from nemo_hf.models.attach import attach_masks


def refused(error: type[Exception], got: str, expected: str = "", do: str = ""):
    """Expects an error that says what was got, what was expected and, where given, what to do."""
    remedy = rf"\. (?:.*)(?:{do})" if do else ""
    return pytest.raises(error, match=rf"(?s)^Got .*(?:{got}).*expected .*(?:{expected}).*{remedy}")


def test_heads_other_than_classification_are_refused(vit):
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1}
    with refused(ValueError, "1 labels", "classification with at least 2 labels", "Load the model with num_labels"):
        make_parent(ViTForImageClassification(ViTConfig(**sizes, num_labels=1)))
    vit.config.problem_type = "regression"
    with refused(ValueError, "problem_type='regression'", "single-label or multi-label", "Load the model with"):
        make_parent(vit)


def test_a_model_without_sites_is_refused():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_groups": 4}
    reason = "'bit.embedder.convolution' are read by .*BitGroupNorm.*, which mixes"
    with refused(
        UnsupportedArchitectureError,
        "'bit', in which no neuron sites",
        "attention",
        f"{reason}.*NeMoConfig.sites=.*choose a",
    ):
        make_parent(BitForImageClassification(BitConfig(**sizes, num_labels=3)))


@pytest.mark.parametrize("attach", [attach_masks, make_parent])
def test_masks_are_attached_once(vit, attach):
    parent = attach_masks(vit)
    hooks = [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in vit.modules()]
    for model in (parent, parent.model):
        with refused(ValueError, "nemo_hf model|mask", "a plain one", "detach_masks"):
            attach(model)
    assert hooks == [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in vit.modules()]
    assert attach(parent.detach_masks()).is_parent


def test_adapters_and_quantized_weights_are_refused(vit):
    vit.is_quantized = True
    with refused(ValueError, "a quantized model", "plain weights", "without quantization_config"):
        make_parent(vit)
    vit.peft_config = {}
    for model in (vit, SimpleNamespace(peft_config={})):
        with refused(ValueError, "PEFT", "a plain one", "merge_and_unload"):
            make_parent(model)


@pytest.mark.parametrize(
    ("model", "got"),
    [
        (lambda: BertForTokenClassification(BertConfig(**TEXT)), "BertForTokenClassification"),
        (lambda: BertModel(BertConfig(**TEXT)), "BertModel"),
        (lambda: torch.nn.Linear(2, 2), "Linear"),
        (lambda: "google/vit-base-patch16-224", "str"),
        (lambda: None, "NoneType"),
    ],
    ids=["token classification", "no head", "a layer", "a name", "none"],
)
def test_other_classes_are_refused(model, got):
    with refused(TypeError, f"a {got}"):
        make_parent(model())


@pytest.fixture
def parent():
    parent = attach_masks(fresh("vit"))
    randomize_relevance(parent)
    return parent


PIXELS = {"pixel_values": torch.zeros(2, 3, 16, 16)}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        *(({"threshold": value}, "a number above 0, up to 1") for value in (0, 1.01, True, "0.5", float("nan"))),
        *(({"round_to": value}, "None or a positive integer") for value in (0, 2.5, True)),
    ],
    ids=str,
)
def test_options_of_a_cut_outside_their_range_are_refused(parent, options, expected):
    ((name, value),) = options.items()
    with refused(ValueError, f"{name}={value!r}", expected):
        parent.extract_module("cat", **options)


def test_a_parent_that_keeps_nothing_has_no_module(parent):
    for mask in parent.masks.site_masks():
        mask.relevance.zero_()
    with refused(ValueError, "opens no neuron at the threshold 0.5", "at least one", "Lower the threshold"):
        parent.extract_module("cat")


def test_a_module_is_no_parent(parent):
    module = parent.extract_module("cat")
    masks = {site.key: torch.ones(site.neurons) for site in module.sites}
    requests = [
        lambda: module.extract_module("cat"),
        lambda: module.detach_masks(),
        lambda: module(**PIXELS, static_masks=masks),
        lambda: module(**PIXELS, static_masks={}),
        lambda: compute_relevance(module, []),
        lambda: evaluate_module(module, "cat", []),
    ]
    for request in requests:
        with refused(ValueError, "a module", "a parent", "Load the parent"):
            request()
    with refused(ValueError, "nemo_hf model", "a plain one"):
        make_parent(module)


def test_a_module_of_one_label_classifies_but_does_not_train(parent):
    module = parent.extract_module("cat")
    assert module(**PIXELS).logits.shape == (2, 1)
    with refused(ValueError, "a model of one label", "at least 2", "Cut a module for more"):
        module(**PIXELS, labels=torch.tensor([0, 0]))


def test_relevance_and_evaluation_need_samples_of_the_labels(parent):
    batch = {**PIXELS, "labels": torch.tensor([0, 1])}
    before = {key: relevance.clone() for key, relevance in parent.masks.relevance().items()}
    with refused(ValueError, r"a batch with \['pixel_values'\]", "'labels'", "Add a label column"):
        compute_relevance(parent, [PIXELS], show_progress=False)
    with refused(ValueError, r"without a sample of \['car', 'ship', 'frog'\]", "at least one of each", "Add samples"):
        compute_relevance(parent, [batch], show_progress=False)
    assert all(torch.equal(relevance, before[key]) for key, relevance in parent.masks.relevance().items())
    with refused(ValueError, r"without a sample of the labels", "at least one", "Pass data"):
        evaluate_module(parent, ["ship"], [batch], show_progress=False)
