"""What becomes of models that were changed after they were built: they work, or the change and its remedy are named."""

import copy
import re
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import LABELS, NAMES, SIZES, fresh, generated, hooks_of, logits_of, parent_of, randomize, tiny
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import AutoModelForSequenceClassification

from nemo_hf import UnsupportedArchitectureError, evaluate_module, make_parent
from nemo_hf.neurons.trial_inputs import random_inputs

UNITS = "bert.encoder.layer.0.intermediate.dense"
FEW = generated(targets=["ffn"])  # few trials
WORDS = "bert.embeddings.word_embeddings"
LAYERS = {"units": UNITS, "query": "bert.encoder.layer.1.attention.self.query", "head": "classifier",
          "pooler": "bert.pooler.dense", "embeddings": WORDS}  # fmt: skip
ADDITIONS = {
    "spectral norm": (parametrizations.spectral_norm, r"a parametrization of its weight \(SpectralNorm\)"),
    "weight norm": (parametrizations.weight_norm, r"a parametrization of its weight \(WeightNorm\)"),
    "orthogonal": (parametrizations.orthogonal, r"a parametrization of its weight \(Orthogonal\)"),
    "old spectral norm": (nn.utils.spectral_norm, "a SpectralNorm of its weight"),
    "old weight norm": (nn.utils.weight_norm, "a WeightNorm of its weight"),
    "pruning": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), r"a pruning mask of its weight \(L1Unstr"),
}


def remedy(model, message: str) -> None:
    """Runs the call that a message ends with."""
    exec(re.search(r"Run[^:]*: (.*)$", message, re.DOTALL)[1], {"torch": torch, "copy": copy, "model": model})


def assert_cuts(model) -> None:
    """Whether a model makes a parent that computes the same, of which a module is cut."""
    inputs = random_inputs(model)
    expected = logits_of(model, **inputs)
    parent = make_parent(model, FEW)
    assert parent.config.equivalence["status"] == "verified"
    opened = parent.masks.open_masks()
    torch.testing.assert_close(logits_of(parent, **inputs, static_masks=opened), expected, rtol=1e-5, atol=1e-5)
    assert logits_of(parent.extract_module(["dog", "cat"]), **inputs).shape == (len(expected), 2)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    ("place", "addition"),
    [*((place, "pruning") for place in LAYERS), *(("units", name) for name in ADDITIONS), ("head", "spectral norm")],
)
def test_what_was_added_to_a_layer_is_named_and_the_remedy_works(bert, place, addition):
    path, (add, named) = LAYERS[place], ADDITIONS[addition]
    add(bert.get_submodule(path))
    bert.eval()
    bert(**random_inputs(bert))
    kind = "Embedding" if place == "embeddings" else "Linear"
    match = (
        rf"^Got '{re.escape(path)}' with {named}.*; expected the {kind} that the model's configuration builds\. Run: "
    )
    with pytest.raises(ValueError, match=match) as refused:
        make_parent(bert, FEW)
    assert not isinstance(refused.value, UnsupportedArchitectureError)
    remedy(bert, str(refused.value))
    assert_cuts(bert)


def test_several_layers_are_counted_and_a_bias_is_named(bert):
    for path in (UNITS, "classifier"):
        prune.random_unstructured(bert.get_submodule(path), "bias", 0.5)
    with pytest.raises(ValueError, match=rf"^Got '{UNITS}' and 1 more with a pruning mask of its bias.* 'bias'\)$"):
        make_parent(bert, FEW)


def test_a_module_of_a_parent_whose_layers_were_changed_since_names_them(bert):
    parent = make_parent(bert, FEW)
    prune.l1_unstructured(parent.model.get_submodule(UNITS), "weight", 0.5)
    with pytest.raises(ValueError, match=rf"^Got '{UNITS}' with a pruning mask") as refused:
        parent.extract_module("cat")
    remedy(parent.model, str(refused.value))
    assert parent.extract_module("cat").config.equivalence["difference"] < 1e-5


def test_a_weight_norm_that_the_configuration_builds_stays():
    sizes = {**SIZES, "conv_dim": [16, 16], "conv_kernel": [10, 3], "conv_stride": [5, 2], "classifier_proj_size": 16}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    model = randomize(tiny("Wav2Vec2ForSequenceClassification", **sizes, **positions))
    assert any("parametrizations" in name for name in model.state_dict())
    assert_cuts(model)


class Adapter(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.down = layer, nn.Linear(layer.in_features, 2)
        self.up = nn.Linear(2, layer.out_features)

    def forward(self, hidden_states):
        return self.layer(hidden_states) + self.up(self.down(hidden_states))


def wrapped(model, path, wrap):
    model.set_submodule(path, wrap(model.get_submodule(path)))
    return model


def quantized(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def with_layer(model):
    model.auxiliary_head = nn.Linear(32, 3)
    return model


def shared(model):
    model.bert.encoder.layer[1] = model.bert.encoder.layer[0]
    return model


def tied(model):
    first, second = model.bert.encoder.layer
    second.intermediate.dense.weight = first.intermediate.dense.weight  # no plain Trainer could save it
    return model


def with_head(model, outputs):
    model.classifier = nn.Linear(32, outputs)
    return model


def compiled(model):
    model.compile(backend="eager")
    return model


CHANGED = {
    "adapter": (lambda m: wrapped(m, UNITS, Adapter), rf"'{UNITS}' of the class \S+Adapter; .*Linear .*Merge adapters"),
    "quantized": (quantized, r"'\S+query' and 13 more of the class torch.ao.nn.quantized.*quantize the module"),
    "another layer": (with_layer, r"'BertForSequenceClassification' with other tensors \(auxiliary_head.weight"),
    "embeddings": (
        lambda m: wrapped(m, WORDS, lambda _: nn.Embedding(9, 32)),
        rf"'{WORDS}.weight' of .* Set model.conf",
    ),
    "shared": (shared, "'bert.encoder.layer.1' in several places; expected one of its own in each"),
    "tied": (tied, "'bert.encoder.layer.1.intermediate.dense.weight' in several places; expected one of its own"),
    "head": (
        lambda m: with_head(m, 7),
        r"'classifier.weight' of shape \(7, 32\); expected \(5, 32\).*num_labels = 7 for",
    ),
    "compiled layer": (lambda m: wrapped(m, UNITS, torch.compile), f"'{UNITS}' with torch.compile around it"),
    "compiled in place": (compiled, r"compile\(\) called on 'all of it'.* Load it again"),
    "meta": (lambda m: m.to("meta"), "41 weights on the meta device, such as .*; expected all in memory"),
    "mixed": (lambda m: m.to(torch.bfloat16) and with_head(m, 5), "BertFor.* one precision, not bfloat16 .* float32"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("change", CHANGED)
def test_layers_that_the_configuration_does_not_build_are_named(bert, change):
    build, message = CHANGED[change]
    changed = build(bert)
    with pytest.raises(ValueError, match=f"^Got .*{message}") as refused:
        make_parent(changed, FEW)
    assert not isinstance(refused.value, UnsupportedArchitectureError)
    if "Run: " in str(refused.value):
        remedy(bert, str(refused.value))
        assert_cuts(bert)


def test_a_head_of_other_labels_works_once_the_configuration_says_so(bert):
    bert.classifier = nn.Linear(32, 7)
    bert.config.num_labels = 7
    randomize(bert)
    assert make_parent(bert, FEW).extract_module([6, 0]).config.num_labels == 2


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda model: SimpleNamespace(module=model)])
def test_wrapped_models_are_refused_with_the_way_to_the_plain_one(bert, wrap):
    with pytest.raises(
        TypeError, match=r"^Got a (compiled|wrapped) model.* Pass model\.(_orig_mod|module);"
    ) as refused:
        make_parent(wrap(bert), generated())
    inner = re.search(r"Pass model\.(\w+)", str(refused.value))[1]
    assert make_parent(getattr(wrap(bert), inner), FEW).is_parent


def doubled(layer, inputs, output):
    return 2 * output


def relu(model):
    model.bert.encoder.layer[0].intermediate.intermediate_act_fn = nn.ReLU()


def own_forward(model):
    layer = model.get_submodule(UNITS)
    layer.forward = lambda hidden_states: 2 * nn.functional.linear(hidden_states, layer.weight, layer.bias)


def other_config(model):
    model.config.hidden_act = "relu"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda model: model.get_submodule(UNITS).register_forward_hook(doubled), f"'{UNITS}' .with the hook doubled"),
        (relu, r"'bert.encoder.layer.0.intermediate.intermediate_act_fn' \(a ReLU in place of a GELUActivation\)"),
        (own_forward, rf"'{UNITS}' \(another forward\)"),
        (
            other_config,
            r"'bert.encoder.layer.0.intermediate.intermediate_act_fn' \(a GELUActivation in place of a ReLU",
        ),
    ],
    ids=["hook", "activation", "forward", "configuration"],
)
def test_a_model_that_computes_something_else_than_its_configuration_says_is_refused(bert, change, found):
    change(bert)
    before = hooks_of(bert)
    match = rf"^Got a BertFor\w+ that computes something else .*; expected .* Remove hooks .*Found: {found}"
    with pytest.raises(ValueError, match=match) as refused:
        make_parent(bert, FEW)
    assert not isinstance(refused.value, UnsupportedArchitectureError)
    assert hooks_of(bert) == before


@pytest.mark.parametrize("kind", [ZeroDivisionError, ValueError, RuntimeError])
def test_an_error_of_ones_own_hook_is_raised_as_it_is(bert, kind):
    def hook(layer, inputs):
        raise kind("of the hook")

    bert.classifier.register_forward_pre_hook(hook)
    with pytest.raises(kind, match="of the hook"):
        make_parent(bert, FEW)


TOKENS = torch.randint(4, 100, (2, 6))
NO_SAMPLES = r"^Got the inputs .*; expected tensors by name.* Pass what the model's tokenizer"
NOT_RUN = r"^Got \w+, which does not run on \w+ of shape .*; expected inputs that it takes"


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, NO_SAMPLES),
        ([TOKENS], NO_SAMPLES),
        ({"input_ids": TOKENS.tolist()}, NO_SAMPLES),
        ({"input_ids": TOKENS[:0]}, NO_SAMPLES),
        ({"input_ids": TOKENS, "return_dict": True}, NO_SAMPLES),
        ({"input_ids": TOKENS + 500}, NOT_RUN),
        ({"pixel_values": torch.zeros(2, 3, 4, 4)}, NOT_RUN),
        ({"input_ids": TOKENS, "attention_mask": None, "labels": torch.zeros(2)}, None),
    ],
    ids=["nothing", "list", "lists", "no samples", "option", "unknown tokens", "images", "with labels"],
)
def test_inputs_of_trials_are_samples_that_the_model_takes(inputs, message):
    parent = parent_of("bert")
    make, cut = partial(make_parent, fresh("bert"), FEW), partial(parent.extract_module, [0])
    for use in (make, cut):
        with pytest.raises(ValueError, match=message) if message else nullcontext():
            use(inputs=inputs)


def test_a_model_in_half_precision_that_casts_no_images_is_cut_and_measured():
    model = tiny("ResNetForImageClassification", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]).bfloat16()
    parent = make_parent(model, generated())
    assert parent.config.equivalence["status"] == "verified"
    batch = {"pixel_values": torch.randn(4, 3, 16, 16).bfloat16(), "labels": torch.arange(4)}
    assert evaluate_module(parent, [0, 1], [batch], show_progress=False).samples == 2
    with pytest.raises(ValueError, match="ForImageClassification does not support activation checkpointing"):
        parent.activation_checkpointing_enable()


def watched(model):
    model.get_submodule(UNITS).register_forward_hook(lambda layer, inputs, output: None)
    return model


@pytest.mark.parametrize(
    "change",
    [watched, lambda m: m.requires_grad_(False), lambda m: m.half(), lambda m: m.double(), lambda m: m.train()],
    ids=["hook that changes nothing", "frozen", "half", "double", "training"],
)
def test_what_files_can_hold_is_no_obstacle(bert, change, tmp_path):
    model = change(bert)
    model.eval()
    if model.dtype == torch.float16:
        assert make_parent(model, FEW).extract_module("cat").dtype == torch.float16
    else:
        assert_cuts(model)


@pytest.mark.parametrize(
    ("id2label", "shown"),
    [
        ({1: "a", 2: "b", 3: "c", 4: "d", 5: "e"}, "[1, 2, 3, 4, 5]"),
        ({0: "a", 1: "b", 2: "c", 3: "d", 5: "e"}, "[0, 1, 2, 3, 5]"),
        ({"cat": 0, "dog": 1, "car": 2, "ship": 3, "frog": 4}, "['cat', 'dog', 'car', 'ship', 'frog']"),
    ],
)
@pytest.mark.parametrize("targets", [None, ["attention"]])
def test_label_ids_that_are_not_places_of_logits_are_refused(bert, id2label, shown, targets):
    bert.config.id2label = id2label
    match = rf"^Got id2label with the ids {re.escape(shown)}; expected names by the ids 0 to 4, .* Number them from 0"
    with pytest.raises(ValueError, match=match):
        make_parent(bert, FEW)


@pytest.mark.parametrize(
    ("id2label", "names"),
    [
        ({str(index): name for index, name in enumerate(LABELS)}, LABELS),
        (dict(reversed(NAMES["id2label"].items())), LABELS),
        (dict(enumerate(["a", "b", "a", "c", "d"])), ["a", "b", "a", "c", "d"]),
    ],
    ids=["ids as strings", "another order", "a name twice"],
)
def test_label_ids_may_be_strings_in_any_order_and_names_may_repeat(bert, id2label, names, tmp_path):
    bert.config.id2label = id2label
    parent = make_parent(bert, FEW)
    assert [parent.config.names[index] for index in range(5)] == names
    parent.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, labels=[2, 0])
    assert list(loaded.config.names.values()) == [names[2], names[0]]
    if names.count("a") > 1:
        with pytest.raises(ValueError, match=r"Got the label name 'a', which the labels \[0, 2\] share"):
            parent.extract_module("a")
