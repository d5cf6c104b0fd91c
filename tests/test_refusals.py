"""Models and requests that can't work are refused early: the message says what was got, expected and to be done."""

from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import LABELS, TEXT, fresh, generated, logits_of, parent_of, randomize_relevance
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    BertConfig,
    BertForQuestionAnswering,
    BertModel,
    BitConfig,
    BitForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from nemo_hf import (
    NeMoConfig,
    UnsupportedArchitectureError,
    calibrate_rejection,
    compose,
    compute_relevance,
    evaluate_module,
    make_parent,
)
from nemo_hf.auto_classes import NeMoForImageClassification
from nemo_hf.models.attach import attach_masks


def refused(error: type[Exception], got: str, expected: str = "", do: str = ""):
    """Expects an error that says what was got, what was expected and, where given, what to do."""
    remedy = rf"\. (?:.*)(?:{do})" if do else ""
    return pytest.raises(error, match=rf"(?s)^Got .*(?:{got}).*expected .*(?:{expected}).*{remedy}")


def test_heads_other_than_classification_are_refused(vit):
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1}
    with refused(ValueError, "1 labels", "classification with at least 2 labels", "Load the model with num_labels"):
        make_parent(ViTForImageClassification(ViTConfig(**sizes, num_labels=1)), generated())
    vit.config.problem_type = "regression"
    with refused(ValueError, "problem_type='regression'", "single-label or multi-label", "Load the model with"):
        make_parent(vit, generated())


def test_a_model_without_sites_is_refused():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_groups": 4}
    reason = "'bit.embedder.convolution' are read by .*BitGroupNorm.*, which mixes"
    with refused(
        UnsupportedArchitectureError,
        "'bit', in which no neuron sites",
        "attention",
        f"{reason}.*NeMoConfig.sites=.*choose a",
    ):
        make_parent(BitForImageClassification(BitConfig(**sizes, num_labels=3)), generated())


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
        make_parent(vit, generated())
    vit.peft_config = {}
    for model, call in ((vit, r"PeftModel.from_pretrained\(.*\)"), (SimpleNamespace(peft_config={}), "= model")):
        with refused(ValueError, "PEFT", "a plain one", rf"{call}.merge_and_unload\(\)"):
            make_parent(model, generated())


@pytest.mark.parametrize(
    ("model", "got"),
    [
        (lambda: BertForQuestionAnswering(BertConfig(**TEXT)), "BertForQuestionAnswering"),
        (lambda: BertModel(BertConfig(**TEXT)), "BertModel"),
        (lambda: torch.nn.Linear(2, 2), "Linear"),
        (lambda: "google/vit-base-patch16-224", "str"),
        (lambda: None, "NoneType"),
    ],
    ids=["question answering", "no head", "a layer", "a name", "none"],
)
def test_other_classes_are_refused(model, got):
    with refused(TypeError, f"a {got}"):
        make_parent(model(), generated())


@pytest.fixture
def parent():
    parent = attach_masks(fresh("vit"), generated())
    randomize_relevance(parent)
    return parent


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved parent of five labels, a module of two and the three of joined modules."""
    root, parent = tmp_path_factory.mktemp("saved"), parent_of("vit")
    module = parent.extract_module(["cat", "dog"])
    for name, model in {
        "parent": parent,
        "module": module,
        "joined": compose([module, parent.extract_module(2)]),
    }.items():
        model.save_pretrained(root / name)
    return root


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
        make_parent(module, generated())


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
    assert all(torch.equal(relevance, before[key]) for key, relevance in parent.masks.relevance().items())
    with refused(ValueError, r"without a sample of the labels", "at least one", "Pass data"):
        evaluate_module(parent, ["ship"], [batch], show_progress=False)


@pytest.mark.parametrize("label", [-1, 5, 99])
def test_labels_that_the_parent_has_not_are_named_with_the_allowed_range(parent, label):
    images = torch.zeros(6, 3, 16, 16)
    batch = {"pixel_values": images, "labels": torch.tensor([0, 1, 2, 3, 4, label])}
    module, before = parent.extract_module("cat"), parent.masks.relevance()
    for request in (
        lambda: compute_relevance(parent, [batch], show_progress=False),
        lambda: evaluate_module(parent, "cat", [batch], show_progress=False),
        lambda: calibrate_rejection(module, [batch], show_progress=False),
    ):
        with pytest.raises(ValueError, match=rf"^Got the label {label}; expected ids from 0 to 4\. [A-Z]"):
            request()
    assert (module.report, module.config.rejection) == (None, None)
    assert all(torch.equal(relevance, before[key]) for key, relevance in parent.masks.relevance().items())


@pytest.mark.parametrize("batches", [[], iter([]), DataLoader([])], ids=["list", "iterator", "loader"])
def test_data_without_a_batch_are_refused(parent, batches):
    module = parent.extract_module(["cat", "dog"])
    for request in (
        lambda: compute_relevance(parent, batches, show_progress=False),
        lambda: evaluate_module(parent, ["cat", "dog"], batches, module, show_progress=False),
        lambda: calibrate_rejection(module, batches, show_progress=False),
    ):
        with refused(ValueError, "without a sample of|0 samples with", "at least one|some of both", "Add|Pass"):
            request()


LABELS_ASKED_FOR = [  # what was asked for, and the names of the module's labels or the error
    (1, ["dog"]),
    (np.int64(1), ["dog"]),
    ([np.int32(3), np.uint8(0)], ["ship", "cat"]),
    ((4, "cat"), ["frog", "cat"]),
    (range(2), ["cat", "dog"]),
    (np.str_("car"), ["car"]),
    (True, (TypeError, "Got the label True; expected a label id")),
    ([True, False], (TypeError, "Got the label True; expected a label id")),
    ([np.bool_(True)], (TypeError, "Got the label np.True_; expected a label id")),
    (1.0, (TypeError, r"Got labels=1\.0; expected a list")),
    ([0.0], (TypeError, r"Got the label 0\.0; expected a label id")),
    ([None], (TypeError, "Got the label None; expected a label id")),
    ([[0, 1]], (TypeError, r"Got the label \[0, 1\]; expected a label id")),
    (torch.tensor([0, 1]), (TypeError, r"Got labels=tensor.*; expected a list .* with labels\.tolist\(\)")),
    (np.array([0, 1]), (TypeError, r"Got labels=array.*; expected a list .* with labels\.tolist\(\)")),
    ({"cat": 0}, (TypeError, r"Got labels=\{'cat': 0\}; expected a list .* list\(labels\)")),
    ({"cat"}, (TypeError, r"Got labels=\{'cat'\}; expected a list")),
    (b"cat", (TypeError, "Got labels=b'cat'; expected a list")),
    ([], (ValueError, "Got an empty set of labels; expected at least one")),
    ("", (ValueError, "Got the unknown label ''; expected one of")),
    ([0, "cat"], (ValueError, r"Got the labels \['cat'\] more than once")),
    (7, (ValueError, "Got the label id 7; expected 0 to 4")),
]


@pytest.mark.parametrize(("labels", "outcome"), LABELS_ASKED_FOR, ids=[repr(labels) for labels, _ in LABELS_ASKED_FOR])
def test_labels_of_a_module_are_ids_or_names_in_a_list(parent, labels, outcome, saved):
    data = [{"pixel_values": torch.zeros(5, 3, 16, 16), "labels": torch.arange(5)}]
    requests = [
        lambda: list(parent.extract_module(labels).config.names.values()),
        lambda: list(
            AutoModelForImageClassification.from_pretrained(saved / "parent", labels=labels).config.names.values()
        ),
        lambda: evaluate_module(parent, labels, data, show_progress=False).labels,
    ]
    for request in requests:
        if isinstance(outcome, list):
            assert request() == outcome
        else:
            with pytest.raises(outcome[0], match=f"(?s)^{outcome[1]}"):
                request()


def test_groups_of_numpy_ids_are_saved(vit, tmp_path):
    options = generated(label_groups={"first": list(np.arange(2)), "rest": [np.int64(2), 3, "frog"]})
    attach_masks(vit, options).save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.groups == {"first": [0, 1], "rest": [2, 3, 4]}
    options.to_json_file(tmp_path / "options.json")
    assert NeMoConfig.from_json_file(tmp_path / "options.json") == options


SEVEN = {"num_labels": 7, "ignore_mismatched_sizes": True}
NEW_NAMES, SEVEN_NAMES = dict(enumerate("abcde")), dict(enumerate("abcdefg"))


@pytest.mark.parametrize("options", [SEVEN, {"num_labels": 7}, {"id2label": dict(enumerate("abcdefg"))}, "config"])
@pytest.mark.parametrize("kind", [AutoModelForImageClassification, NeMoForImageClassification])
def test_a_head_of_other_labels_is_not_loaded(options, kind, saved):
    for role, count, way in (("parent", 5, "detach_masks"), ("module", 2, "save_plain")):
        asked = options
        if options == "config":
            asked = {"config": AutoConfig.from_pretrained(saved / role)}
            asked["config"].num_labels = 7
        match = rf"^Got 7 .* for a {role} of {count} labels; expected {count}, .*{way}.*num_labels=7, ignore_mism"
        with pytest.raises(ValueError, match=match):
            kind.from_pretrained(saved / role, **asked)


def test_a_head_of_other_labels_comes_from_the_plain_model(parent, tmp_path):
    parent.extract_module(["cat", "dog"]).save_plain(tmp_path / "module")
    parent.detach_masks().save_pretrained(tmp_path / "parent")
    for name in ("module", "parent"):
        plain = AutoModelForImageClassification.from_pretrained(tmp_path / name, **SEVEN)
        assert logits_of(plain, **PIXELS).shape == (2, 7)
        assert make_parent(plain, generated()).config.num_labels == 7


def test_joined_modules_keep_their_labels(saved):
    assert AutoModelForImageClassification.from_pretrained(saved / "joined", num_labels=3).config.num_labels == 3
    with pytest.raises(ValueError, match=r"^Got 7 as num_labels for modules that were joined of 3 labels; .* compose"):
        AutoModelForImageClassification.from_pretrained(saved / "joined", **SEVEN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"id2label": {1: "a", 2: "b", 3: "c", 4: "d", 5: "e"}}, r"id2label with the ids \[1, 2, 3, 4, 5\]; .* Number"),
        ({"id2label": ["a", "b", "c", "d", "e"]}, "id2label with .*; expected names by the ids"),
        ({"id2label": {"a": 0}}, r"id2label with the ids \['a'\]; expected names by the ids 0 to 0"),
        ({"problem_type": "regression"}, "problem_type='regression' for a parent; expected one of"),
        ({"num_labels": "7"}, "'7' as num_labels for a parent of 5 labels; expected 5"),
        ({"num_labels": 0}, "0 as num_labels for a parent of 5 labels; expected 5"),
    ],
)
@pytest.mark.parametrize("kind", [AutoModelForImageClassification, NeMoForImageClassification])
def test_wrong_labels_at_loading_are_named(saved, options, message, kind):
    with pytest.raises(ValueError, match=f"^Got {message}"):
        kind.from_pretrained(saved / "parent", **options)


@pytest.mark.parametrize("kind", [AutoModelForImageClassification, NeMoForImageClassification])
def test_labels_are_renamed_at_loading(saved, kind):
    for options in ({"num_labels": 5}, {"ignore_mismatched_sizes": True}):
        assert list(kind.from_pretrained(saved / "parent", **options).config.names.values()) == LABELS
    loaded = kind.from_pretrained(saved / "parent", id2label=NEW_NAMES)
    assert loaded.config.names == NEW_NAMES
    assert loaded.config.label2id == {name: index for index, name in NEW_NAMES.items()}
    assert list(loaded.extract_module([3, "a"]).config.names.values()) == ["d", "a"]


@contextmanager
def largest_file(size):
    """A disk that takes no more than `size` bytes of each file; safetensors and Python meet it as a full one."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


WRITERS = {
    "parent": lambda parent, module: parent.save_pretrained,
    "shards": lambda parent, module: partial(parent.save_pretrained, max_shard_size="50KB"),
    "module": lambda parent, module: module.save_pretrained,
    "joined": lambda parent, module: compose([module, parent.extract_module("frog")]).save_pretrained,
    "plain": lambda parent, module: module.save_plain,
}


@pytest.mark.parametrize("size", [1_000, 20_000])  # less than config.json, or than the weights
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_an_os_error_and_leaves_what_was_there(parent, writer, size, tmp_path):
    module = parent.extract_module(["cat", "dog"])
    write, old, new = WRITERS[writer](parent, module), tmp_path / "old", tmp_path / "new"
    module.save_pretrained(old)
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    for directory in (old, new):
        with largest_file(size), pytest.raises(OSError, match=r"File too large"):
            write(directory)
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before
    assert not new.exists()
    loaded = AutoModelForImageClassification.from_pretrained(old)
    assert torch.equal(logits_of(loaded, **PIXELS), logits_of(module, **PIXELS))
    write(new)  # once there is room
    assert (new / "config.json").exists()
