"""Bad input is refused early: the message says what was got, what was expected and what to do."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import LABELS, TEXT, fresh, randomize_relevance
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForTokenClassification,
    BertModel,
    BitConfig,
    BitForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from nemo_hf import (
    NeMoConfig,
    NeMoForImageClassification,
    NeMoForSequenceClassification,
    UnsupportedArchitectureError,
    compute_relevance,
    evaluate_module,
    make_parent,
)
from nemo_hf.config import label_id, resolve_groups, resolve_labels
from nemo_hf.models.attach import attach_masks

NAMES = dict(enumerate(LABELS))
GROUPS = {"animals": [0, 1, 4], "vehicles": [2, 3]}


def refused(error: type[Exception] | tuple[type[Exception], ...], got: str, expected: str = "", do: str = ""):
    """Expects an error that says what was got, what was expected and, where given, what to do."""
    remedy = rf"\. (?:.*)(?:{do})" if do else ""
    return pytest.raises(error, match=rf"(?s)^Got .*(?:{got}).*expected .*(?:{expected}).*{remedy}")


# Options

OPTIONS = [
    *(("targets", value) for value in ([], ["embeddings"], 5, "ffn")),
    *(("generator_rank", value) for value in (0, 2.5, "8", True)),
    *(("contrastive_weight", value) for value in (-0.1, float("inf"), float("nan"), "0.5", None)),
    *(("temperature", value) for value in (0, float("nan"), None)),
    *(("mask_learning_rate", value) for value in (-1e-3, "fast")),
    *(("warmup_ratio", value) for value in (1.1, -0.1, [0.1])),
    *(("rehearsal_probability", value) for value in (1.5, False)),
    *(("relevance_threshold", value) for value in (0, 1.01, None)),
    *(("hard_masks", value) for value in ("yes", 1)),
    *(("label_groups", value) for value in ({}, {"a": []}, {"a": "cat"}, [["cat"], ["dog"]], {1: ["cat"]}, {"a": 3})),
    ("group_column", 3),
]


@pytest.mark.parametrize(("option", "value"), OPTIONS)
def test_an_option_of_the_wrong_type_or_range_is_refused(option, value):
    with refused((TypeError, ValueError), f"{option}|group"):
        NeMoConfig(**{option: value})


def test_unknown_and_contradicting_options_are_refused(tmp_path):
    with refused(ValueError, r"unknown options \['alpha'\]", "contrastive_weight", "Correct the name"):
        NeMoConfig.from_dict({"alpha": 0.5})
    path = tmp_path / "nemo.json"
    path.write_text(json.dumps({**NeMoConfig().to_dict(), "beta": 1}))
    with refused(ValueError, r"unknown options \['beta'\]"):
        NeMoConfig.from_json_file(path)
    with refused(ValueError, "both label_groups and group_column", "at most one", "Drop group_column"):
        NeMoConfig(label_groups={"a": ["cat"]}, group_column="domain")


# Labels and groups


@pytest.mark.parametrize("label", ["cow", "Cat", "", "0", 5, -1])
def test_an_unknown_label_is_refused(label):
    got = f"label id {label}" if isinstance(label, int) else f"unknown label '{label}'"
    with refused(ValueError, got, "0 to 4" if isinstance(label, int) else "one of 'cat', 'dog'"):
        label_id(label, NAMES)
    with refused(ValueError, got, "0 to 4" if isinstance(label, int) else "'cat', 'dog'.*'animals', 'vehicles'"):
        resolve_labels([label], GROUPS, NAMES)


@pytest.mark.parametrize("label", [1.0, True, None, ["cat"], torch.tensor(1)])
def test_a_label_of_another_type_is_refused(label):
    with refused(TypeError, "the label", r"a label id \(int\) or name \(str\)"):
        resolve_labels([label], GROUPS, NAMES)


def test_no_label_at_all_is_refused():
    with refused(ValueError, "an empty set of labels", "at least one"):
        resolve_labels([], GROUPS, NAMES)
    with refused((TypeError, ValueError), "None", "label"):
        resolve_labels(None, GROUPS, NAMES)


@pytest.mark.parametrize("labels", [["cat", "cat"], ["cat", 0], ["animals", "dog"], ["vehicles", "vehicles"]])
def test_a_repeated_label_is_refused(labels):
    with refused(ValueError, r"the labels \[.*\] more than once", "each label once", "Remove the repeats"):
        resolve_labels(labels, GROUPS, NAMES)


def test_an_ambiguous_name_is_refused():
    with refused(ValueError, r"'crane', which the labels \[0, 2\] share", do="Pass an id"):
        label_id("crane", {0: "crane", 1: "dog", 2: "crane"})
    groups = {"cat": [1, 4], "rest": [0, 2, 3]}
    with refused(ValueError, "'cat', which names both the label 0 and a group of 2 labels", do="Pass label ids"):
        resolve_labels("cat", groups, NAMES)
    assert resolve_labels([0], groups, NAMES) == ([0], ["rest"])


@pytest.mark.parametrize(
    ("groups", "got", "expected"),
    [
        ({"pets": ["cat", "dog"], "rest": ["car", "ship", "frog", 1]}, "'dog' in the groups 'pets' and 'rest'", "one"),
        ({"twice": ["cat", 0, "dog", "car", "ship", "frog"]}, "the label 'cat'", "one group"),
        ({"pets": ["cat", "dog"]}, "without 'car', 'ship', 'frog'", "each of the 5 labels"),
        ({"pets": ["cow"], "rest": LABELS}, "unknown label 'cow'", "'cat'"),
    ],
    ids=["overlap", "repeat", "missing", "unknown"],
)
def test_groups_that_are_no_partition_are_refused_and_the_model_is_left_alone(vit, groups, got, expected):
    with refused(ValueError, got, expected):
        resolve_groups(groups, NAMES)
    with refused(ValueError, got, expected):
        make_parent(vit, NeMoConfig(label_groups=groups))
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in vit.modules())


# Models


def test_heads_other_than_classification_are_refused(vit):
    model = ViTForImageClassification(
        ViTConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1, num_labels=1)
    )
    with refused(ValueError, "1 labels", "classification with at least 2 labels", "Load the model with num_labels"):
        make_parent(model)
    vit.config.problem_type = "regression"
    with refused(ValueError, "problem_type='regression'", "single-label or multi-label", "Load the model with"):
        make_parent(vit)


def test_a_model_without_sites_is_refused():
    model = BitForImageClassification(
        BitConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_groups=4, num_labels=3)
    )
    sites = "'bit', in which no neuron sites"
    reason = "'bit.embedder.convolution' are read by .*BitGroupNorm.*, which mixes"
    with refused(UnsupportedArchitectureError, sites, "attention", f"{reason}.*NeMoConfig.sites=.*choose a"):
        make_parent(model)


@pytest.mark.parametrize("attach", [attach_masks, make_parent])
def test_masks_are_attached_once(vit, attach):
    parent = attach_masks(vit)
    with refused(ValueError, "nemo_hf model", "a plain one", "detach_masks"):
        attach(parent)


@pytest.mark.parametrize("attach", [attach_masks, make_parent])
def test_the_model_inside_a_parent_has_masks_too(vit, attach):
    parent = attach_masks(vit)
    hooks = [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in vit.modules()]
    with refused(ValueError, "mask", "plain", "detach_masks"):
        attach(parent.model)
    assert hooks == [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in vit.modules()]
    assert attach(parent.detach_masks()).is_parent


def test_a_module_gets_no_masks(module):
    with refused(ValueError, "nemo_hf model", "a plain one"):
        make_parent(module)


def test_adapters_are_refused(vit):
    with refused(ValueError, "PEFT", "a plain one", "merge_and_unload"):
        make_parent(SimpleNamespace(peft_config={}))
    vit.peft_config = {}
    with refused(ValueError, "PEFT"):
        make_parent(vit)


def test_quantized_weights_are_refused(vit):
    vit.is_quantized = True
    with refused(ValueError, "a quantized model", "plain weights", "without quantization_config"):
        make_parent(vit)


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


# Models and data that lack what is asked for


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Directories of a parent, a module and a plain model."""
    root = tmp_path_factory.mktemp("saved")
    parent = make_parent(fresh("vit"))
    randomize_relevance(parent)
    parent.save_pretrained(root / "parent")
    parent.extract_module(["cat", "dog"]).save_pretrained(root / "module")
    fresh("vit").save_pretrained(root / "plain")
    return root


@pytest.fixture
def parent():
    parent = attach_masks(fresh("vit"))
    randomize_relevance(parent)
    return parent


@pytest.fixture
def module(saved):
    return NeMoForImageClassification.from_pretrained(saved / "module")


@pytest.mark.parametrize("threshold", [0, 1.01, True, "0.5", float("nan")])
def test_a_threshold_outside_its_range_is_refused(parent, threshold):
    with refused(ValueError, f"threshold={threshold!r}", "a number above 0, up to 1"):
        parent.extract_module("cat", threshold=threshold)


@pytest.mark.parametrize("round_to", [0, 2.5, True])
def test_round_to_must_be_a_positive_integer(parent, round_to):
    with refused(ValueError, f"round_to={round_to!r}", "None or a positive integer"):
        parent.extract_module("cat", round_to=round_to)


def test_a_parent_that_keeps_nothing_has_no_module(parent):
    for mask in parent.masks.site_masks():
        mask.relevance.zero_()
    with refused(ValueError, "opens no neuron at the threshold 0.5", "at least one", "Lower the threshold"):
        parent.extract_module("cat")


def test_a_module_is_no_parent(module):
    masks = {site.key: torch.ones(site.neurons) for site in module.sites}
    requests = [
        lambda: module.extract_module("cat"),
        lambda: module.detach_masks(),
        lambda: module(pixel_values=torch.zeros(1, 3, 16, 16), static_masks=masks),
        lambda: compute_relevance(module, []),
        lambda: evaluate_module(module, "cat", []),
    ]
    for request in requests:
        with refused(ValueError, "a module", "a parent", "Load the parent"):
            request()


def test_relevance_needs_labels_and_samples_of_each(parent):
    batch = {"pixel_values": torch.zeros(2, 3, 16, 16)}
    before = {key: relevance.clone() for key, relevance in parent.masks.relevance().items()}
    with refused(ValueError, r"a batch with \['pixel_values'\]", "'labels'", "Add a label column"):
        compute_relevance(parent, [batch], show_progress=False)
    with refused(ValueError, r"without a sample of \['car', 'ship', 'frog'\]", "at least one of each", "Add samples"):
        compute_relevance(parent, [{**batch, "labels": torch.tensor([0, 1])}], show_progress=False)
    assert all(torch.equal(relevance, before[key]) for key, relevance in parent.masks.relevance().items())


def test_evaluation_needs_samples_of_the_labels(parent):
    batch = {"pixel_values": torch.zeros(2, 3, 16, 16), "labels": torch.tensor([0, 1])}
    with refused(ValueError, r"without a sample of the labels", "at least one", "Pass data"):
        evaluate_module(parent, ["ship"], [batch], show_progress=False)


def test_a_single_label_can_t_be_trained(parent):
    module = parent.extract_module("cat")
    with refused(ValueError, "a model of one label", "at least 2", "Cut a module for more"):
        module(pixel_values=torch.zeros(1, 3, 16, 16), labels=torch.tensor([0]))


# Saved directories


def damaged_weights(source: Path, target: Path, change) -> Path:
    """A copy of a saved model with one of its tensors changed."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    return target


def damaged_config(source: Path, target: Path, change) -> Path:
    """A copy of a saved model with its configuration changed."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    change(config)
    (target / "config.json").write_text(json.dumps(config))
    return target


LOADS = {"whole": {}, "cut": {"labels": ["dog", "cat"]}}
loads = pytest.mark.parametrize("options", list(LOADS.values()), ids=list(LOADS))
TENSORS = ["model.vit.layers.0.mlp.fc1.weight", "model.vit.layernorm.weight", "masks.0.relevance"]


@loads
@pytest.mark.parametrize("name", TENSORS)
def test_a_missing_tensor_is_named(saved, tmp_path, name, options):
    directory = damaged_weights(saved / "parent", tmp_path / "out", lambda tensors: tensors.pop(name))
    with refused(ValueError, re.escape(name), do="Save or download"):
        NeMoForImageClassification.from_pretrained(directory, **options)


SHAPES = {
    "one row": lambda tensor: tensor[:1],
    "more rows": lambda tensor: torch.cat([tensor, tensor]),
    "wider": lambda tensor: torch.cat([tensor, tensor], -1),
    "deeper": lambda tensor: tensor[..., None],
}


@loads
@pytest.mark.parametrize("shape", list(SHAPES.values()), ids=list(SHAPES))
@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_of_another_shape_is_named_with_both_shapes(saved, tmp_path, name, shape, options):
    directory = damaged_weights(
        saved / "parent", tmp_path / "out", lambda tensors: tensors.update({name: shape(tensors[name])})
    )
    with refused(
        ValueError, rf"{re.escape(name)}' of shape .*{re.escape(str(directory))}", r"\d+", "[Ss]ave or download"
    ):
        NeMoForImageClassification.from_pretrained(directory, **options)


@loads
@pytest.mark.parametrize("length", [0, 100, -100])
def test_truncated_weights_are_named(saved, tmp_path, length, options):
    directory = shutil.copytree(saved / "parent", tmp_path / "out")
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with refused(OSError, re.escape(str(directory)), "safetensors", "Save or download"):
        NeMoForImageClassification.from_pretrained(directory, **options)


@loads
def test_missing_weights_are_named(saved, tmp_path, options):
    directory = shutil.copytree(saved / "parent", tmp_path / "out")
    (directory / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        NeMoForImageClassification.from_pretrained(directory, **options)


@loads
def test_a_missing_directory_is_named(tmp_path, options):
    with pytest.raises(OSError, match="nowhere"):
        NeMoForImageClassification.from_pretrained(tmp_path / "nowhere", **options)


def test_an_unexpected_tensor_is_named(saved, tmp_path):
    directory = damaged_weights(
        saved / "module", tmp_path / "out", lambda tensors: tensors.update(extra=torch.zeros(1))
    )
    with refused(ValueError, "1 unexpected tensors, such as 'extra'", "exactly those", "Save or download"):
        NeMoForImageClassification.from_pretrained(directory)


@pytest.mark.parametrize(
    "widths",
    [{"intermediate": w} for w in (10**12, 49, -1, "3", True, None)] + [{}, {"head_dim": 3}, None],
    ids=str,
)
def test_absurd_widths_of_a_module_are_refused(saved, tmp_path, widths):
    directory = damaged_config(
        saved / "module", tmp_path / "out", lambda config: config["sites"][1].update(widths=widths)
    )
    with refused(ValueError, "width.*'vit.layers.0.mlp:ffn'"):
        NeMoForImageClassification.from_pretrained(directory)


def test_widths_of_another_module_are_refused(saved, tmp_path):
    directory = damaged_config(
        saved / "module", tmp_path / "out", lambda config: config["sites"][1].update(widths={"intermediate": 2})
    )
    with refused(ValueError, r"'model.vit.layers.0.mlp.fc1\.\w+' of shape", r"\(2,", "save or download"):
        NeMoForImageClassification.from_pretrained(directory)


@pytest.mark.parametrize(
    ("kind", "sites"),
    [("module", None), ("module", []), ("parent", []), ("module", "rename the first"), ("parent", "rename the first")],
)
def test_sites_of_another_model_are_refused(saved, tmp_path, kind, sites):
    def change(config):
        if sites == "rename the first":
            config["sites"][0]["key"] = "os.system:attention"
        else:
            config["sites"] = sites

    directory = damaged_config(saved / kind, tmp_path / "out", change)
    got = r"with the sites \['os\.system:attention', 'vit" if sites else r"with the sites \[\]"
    with refused(ValueError, got, "some of .'vit.layers.0", "save the model again"):
        NeMoForImageClassification.from_pretrained(directory)


def test_a_missing_site_of_a_module_shows_in_its_weights(saved, tmp_path):
    directory = damaged_config(saved / "module", tmp_path / "out", lambda config: config["sites"].pop())
    with refused(ValueError, r"'model.vit.layers.1.mlp.fc1\.\w+' of shape", r"\(48,", "save or download"):
        NeMoForImageClassification.from_pretrained(directory)


@loads
@pytest.mark.parametrize("kept", [slice(1, None), slice(0, 3), slice(2, None)], ids=str)
def test_a_missing_site_of_a_parent_shows_in_its_masks(tmp_path, kept, options):
    # At a given rank the masks of one layer fit another: the relevance of what is missing must not be read for it.
    parent = attach_masks(fresh("vit"), NeMoConfig(generator_rank=4))
    randomize_relevance(parent)
    parent.save_pretrained(tmp_path / "parent")
    directory = damaged_config(
        tmp_path / "parent", tmp_path / "out", lambda config: config.update(sites=config["sites"][kept])
    )
    with refused(ValueError, r"masks\.\d", do="[Ss]ave or download"):
        NeMoForImageClassification.from_pretrained(directory, **options)


@pytest.mark.parametrize("kind", ["parent", "module"])
def test_an_unknown_pruning_mode_is_refused(saved, tmp_path, kind):
    directory = damaged_config(saved / kind, tmp_path / "out", lambda c: c["sites"][0].update(pruning_mode="warp"))
    with refused(ValueError, "the pruning mode 'warp' for 'vit.layers.0.attention", "'dense'", "config.json"):
        NeMoForImageClassification.from_pretrained(directory)


@loads
@pytest.mark.parametrize("base_class", ["Trainer", "ViTForEverything", "__doc__", ""])
def test_a_base_class_that_is_no_model_is_refused(saved, tmp_path, base_class, options):
    directory = damaged_config(saved / "parent", tmp_path / "out", lambda c: c.update(base_class=base_class))
    with refused(
        UnsupportedArchitectureError,
        f"the model class '{base_class}'",
        "one of transformers .* or one that is registered",
        "Update transformers, or run before: AutoConfig.register",
    ):
        NeMoForImageClassification.from_pretrained(directory, **options)


@loads
def test_an_unknown_role_is_refused(saved, tmp_path, options):
    directory = damaged_config(saved / "parent", tmp_path / "out", lambda c: c.update(role="parasite"))
    with refused(ValueError, "role.*parasite", "parent"):
        NeMoForImageClassification.from_pretrained(directory, **options)


@loads
def test_options_of_a_newer_version_are_refused(saved, tmp_path, options):
    directory = damaged_config(saved / "parent", tmp_path / "out", lambda c: c["nemo_config"].update(beta=1))
    with refused(ValueError, r"unknown options \['beta'\]", "temperature", "update nemo-hf"):
        NeMoForImageClassification.from_pretrained(directory, **options)


def test_labels_are_cut_from_parents_alone(saved):
    with refused(ValueError, "which is a module", "a parent", "Load it without labels="):
        NeMoForImageClassification.from_pretrained(saved / "module", labels=["cat"])


@loads
def test_a_plain_model_s_directory_is_no_parent(saved, options):
    with refused((OSError, ValueError), re.escape(str(saved / "plain")), "parent", "make_parent|NeMoTrainer|AutoModel"):
        NeMoForImageClassification.from_pretrained(saved / "plain", **options)


@loads
def test_a_parent_of_another_task_is_refused(saved, options):
    with refused((TypeError, ValueError), "ViTForImageClassification", "NeMoForImageClassification|[Ii]mage"):
        NeMoForSequenceClassification.from_pretrained(saved / "parent", **options)


@pytest.mark.parametrize("labels", [["cow"], [], ["cat", "cat"], [7], [1.5]])
def test_labels_are_checked_before_weights_are_read(saved, labels):
    with pytest.raises((TypeError, ValueError), match=r"^Got .*; expected"):
        NeMoForImageClassification.from_pretrained(saved / "parent", labels=labels)


# Writing


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def unwritable_report(parent):
    parent.report = {"accuracy": {1, 2}}


def unwritable_processor(parent):
    parent.processor_files = {"no/such/folder.json": b""}


@pytest.mark.parametrize("spoil", [unwritable_report, unwritable_processor])
@pytest.mark.parametrize("exists", [True, False])
def test_a_save_that_fails_leaves_the_directory_as_it_was(tmp_path, parent, spoil, exists):
    if exists:
        parent.save_pretrained(tmp_path / "out")
    before = contents(tmp_path)
    torch.nn.init.zeros_(parent.model.classifier.weight)
    spoil(parent)
    with pytest.raises((TypeError, OSError)):
        parent.save_pretrained(tmp_path / "out")
    assert contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == (["out"] if exists else [])


def test_a_file_is_no_place_to_save(tmp_path, parent):
    (tmp_path / "out").write_text("mine")
    with refused(NotADirectoryError, "out', which is a file", "a directory", "Pass another path"):
        parent.save_pretrained(tmp_path / "out")
    assert contents(tmp_path) == {"out": b"mine"}
