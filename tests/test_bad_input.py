"""What can't work is refused early, and the message says what was got, what was expected and what to do."""

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


def told(error: type[Exception] | tuple[type[Exception], ...], got: str, expected: str = "", do: str = ""):
    """Expects an error that says what was got, what was expected and, where given, what to do."""
    remedy = rf"\. (?:.*)(?:{do})" if do else ""
    return pytest.raises(error, match=rf"(?s)^Got .*(?:{got}).*expected .*(?:{expected}).*{remedy}")


# Options


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("targets", []),
        ("targets", ["embeddings"]),
        ("generator_rank", 0),
        ("generator_rank", -4),
        ("contrastive_weight", -0.1),
        ("contrastive_weight", float("inf")),
        ("contrastive_weight", float("nan")),
        ("sparsity_weight", -1),
        ("temperature", 0),
        ("temperature", -0.2),
        ("temperature", float("nan")),
        ("mask_learning_rate", -1e-3),
        ("warmup_ratio", 1.1),
        ("warmup_ratio", -0.1),
        ("rehearsal_probability", 1.5),
        ("rehearsal_probability", -0.5),
        ("relevance_threshold", 0),
        ("relevance_threshold", 1.01),
        ("label_groups", {}),
        ("label_groups", {"a": []}),
        ("label_groups", {"a": "cat"}),
    ],
)
def test_an_option_outside_its_range_is_refused(option, value):
    with told(ValueError, f"{option}|group"):
        NeMoConfig(**{option: value})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("targets", 5),
        ("targets", "ffn"),
        ("generator_rank", 2.5),
        ("generator_rank", "8"),
        ("generator_rank", True),
        ("contrastive_weight", "0.5"),
        ("contrastive_weight", None),
        ("sparsity_weight", True),
        ("temperature", None),
        ("hard_masks", "yes"),
        ("hard_masks", 1),
        ("detach_pooled", "no"),
        ("mask_learning_rate", "fast"),
        ("warmup_ratio", [0.1]),
        ("rehearsal_probability", False),
        ("relevance_threshold", None),
        ("label_groups", [["cat"], ["dog"]]),
        ("label_groups", {1: ["cat"]}),
        ("label_groups", {"a": 3}),
        ("group_column", 3),
    ],
)
def test_an_option_of_the_wrong_type_is_refused(option, value):
    with told((TypeError, ValueError), f"{option}|group"):
        NeMoConfig(**{option: value})


def test_options_that_nobody_knows_are_refused(tmp_path):
    with told(ValueError, r"unknown options \['alpha'\]", "contrastive_weight", "Correct the name"):
        NeMoConfig.from_dict({"alpha": 0.5})
    path = tmp_path / "nemo.json"
    path.write_text(json.dumps({**NeMoConfig().to_dict(), "beta": 1}))
    with told(ValueError, r"unknown options \['beta'\]"):
        NeMoConfig.from_json_file(path)


def test_groups_are_either_given_or_read():
    with told(ValueError, "both label_groups and group_column", "at most one", "Drop group_column"):
        NeMoConfig(label_groups={"a": ["cat"]}, group_column="domain")


# Labels and groups


@pytest.mark.parametrize("label", ["cow", "Cat", "", "0"])
def test_an_unknown_label_is_refused(label):
    with told(ValueError, f"unknown label '{label}'", "one of 'cat', 'dog'"):
        label_id(label, NAMES)
    with told(ValueError, f"unknown label '{label}'", "'cat', 'dog'.*'animals', 'vehicles'"):
        resolve_labels([label], GROUPS, NAMES)


@pytest.mark.parametrize("label", [5, -1, 10**9])
def test_an_unknown_label_id_is_refused(label):
    with told(ValueError, f"label id {label}", "0 to 4", "Pass an id"):
        label_id(label, NAMES)
    with told(ValueError, f"label id {label}", "0 to 4"):
        resolve_labels(["cat", label], GROUPS, NAMES)


@pytest.mark.parametrize("label", [1.0, True, None, ["cat"], torch.tensor(1)])
def test_a_label_of_another_type_is_refused(label):
    with told(TypeError, "the label", r"a label id \(int\) or name \(str\)"):
        resolve_labels([label], GROUPS, NAMES)


def test_no_label_at_all_is_refused():
    with told(ValueError, "an empty set of labels", "at least one"):
        resolve_labels([], GROUPS, NAMES)
    with told((TypeError, ValueError), "None", "label"):
        resolve_labels(None, GROUPS, NAMES)


@pytest.mark.parametrize("labels", [["cat", "cat"], ["cat", 0], ["animals", "dog"], ["vehicles", "vehicles"], [1, 1]])
def test_labels_are_asked_for_once(labels):
    with told(ValueError, r"the labels \[.*\] more than once", "each label once", "Remove the repeats"):
        resolve_labels(labels, GROUPS, NAMES)


def test_a_name_that_two_labels_share_is_ambiguous():
    with told(ValueError, r"'crane', which the labels \[0, 2\] share", do="Pass an id"):
        label_id("crane", {0: "crane", 1: "dog", 2: "crane"})


def test_a_name_of_a_label_and_of_another_group_is_ambiguous():
    groups = {"cat": [1, 4], "rest": [0, 2, 3]}
    with told(ValueError, "'cat', which names both the label 0 and a group of 2 labels", do="Pass label ids"):
        resolve_labels("cat", groups, NAMES)
    assert resolve_labels([0], groups, NAMES) == ([0], ["rest"])


def test_groups_that_overlap_are_refused():
    groups = {"pets": ["cat", "dog"], "rest": ["car", "ship", "frog", 1]}
    with told(ValueError, "the label 'dog' in the groups 'pets' and 'rest'", "one group", "Remove it"):
        resolve_groups(groups, NAMES)
    with told(ValueError, "the label 'cat'"):
        resolve_groups({"twice": ["cat", 0, "dog", "car", "ship", "frog"]}, NAMES)


def test_groups_that_miss_labels_are_refused():
    with told(ValueError, "without 'car', 'ship', 'frog'", "each of the 5 labels", "Add them"):
        resolve_groups({"pets": ["cat", "dog"]}, NAMES)


def test_groups_of_unknown_labels_are_refused():
    with told(ValueError, "unknown label 'cow'", "'cat'"):
        resolve_groups({"pets": ["cow"], "rest": LABELS}, NAMES)


@pytest.mark.parametrize("groups", [{"pets": ["cat", "cow"]}, {"pets": ["cat"]}, {"a": LABELS, "b": ["cat"]}])
def test_a_model_is_left_alone_by_groups_that_don_t_fit(vit, groups):
    with pytest.raises(ValueError, match=r"^Got .*expected"):
        make_parent(vit, NeMoConfig(label_groups=groups))
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in vit.modules())


# Models


def test_a_regression_head_is_refused():
    model = ViTForImageClassification(
        ViTConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1, num_labels=1)
    )
    with told(ValueError, "1 labels", "classification with at least 2 labels", "Load the model with num_labels"):
        make_parent(model)


def test_other_problems_than_labels_of_a_sample_are_refused(vit):
    vit.config.problem_type = "regression"
    with told(ValueError, "problem_type='regression'", "single-label or multi-label", "Load the model with"):
        make_parent(vit)


def test_a_model_without_sites_is_refused():
    model = BitForImageClassification(
        BitConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_groups=4, num_labels=3)
    )
    sites = "'bit', in which no neuron sites"
    reason = "'bit.embedder.convolution' are read by .*BitGroupNorm.*, which mixes"
    with told(UnsupportedArchitectureError, sites, "attention", f"{reason}.*NeMoConfig.sites=.*choose a"):
        make_parent(model)


@pytest.mark.parametrize("attach", [attach_masks, make_parent])
def test_masks_are_attached_once(vit, attach):
    parent = attach_masks(vit)
    with told(ValueError, "nemo_hf model", "a plain one", "detach_masks"):
        attach(parent)


@pytest.mark.parametrize("attach", [attach_masks, make_parent])
def test_the_model_inside_a_parent_has_masks_too(vit, attach):
    parent = attach_masks(vit)
    hooks = [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in vit.modules()]
    with told(ValueError, "mask", "plain", "detach_masks"):
        attach(parent.model)
    assert hooks == [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in vit.modules()]
    assert attach(parent.detach_masks()).is_parent


def test_a_module_gets_no_masks(module):
    with told(ValueError, "nemo_hf model", "a plain one"):
        make_parent(module)


def test_adapters_are_refused(vit):
    with told(ValueError, "PEFT", "a plain one", "merge_and_unload"):
        make_parent(SimpleNamespace(peft_config={}))
    vit.peft_config = {}
    with told(ValueError, "PEFT"):
        make_parent(vit)


def test_quantized_weights_are_refused(vit):
    vit.is_quantized = True
    with told(ValueError, "a quantized model", "plain weights", "without quantization_config"):
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
    with told(TypeError, f"a {got}"):
        make_parent(model())


# Asking a model for what it hasn't


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


@pytest.mark.parametrize("threshold", [0, 1.01, -0.5, True, "0.5", float("nan")])
def test_a_threshold_outside_its_range_is_refused(parent, threshold):
    with told(ValueError, f"threshold={threshold!r}", "a number above 0, up to 1"):
        parent.extract_module("cat", threshold=threshold)


@pytest.mark.parametrize("round_to", [0, -8, 2.5, True])
def test_a_multiple_that_is_none_is_refused(parent, round_to):
    with told(ValueError, f"round_to={round_to!r}", "None or a positive integer"):
        parent.extract_module("cat", round_to=round_to)


def test_a_parent_that_keeps_nothing_has_no_module(parent):
    for mask in parent.masks.site_masks():
        mask.relevance.zero_()
    with told(ValueError, "opens no neuron at the threshold 0.5", "at least one", "Lower the threshold"):
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
        with told(ValueError, "a module", "a parent", "Load the parent"):
            request()


def test_relevance_needs_labels_and_samples_of_each(parent):
    batch = {"pixel_values": torch.zeros(2, 3, 16, 16)}
    before = {key: relevance.clone() for key, relevance in parent.masks.relevance().items()}
    with told(ValueError, r"a batch with \['pixel_values'\]", "'labels'", "Add a label column"):
        compute_relevance(parent, [batch], show_progress=False)
    with told(ValueError, r"without a sample of \['car', 'ship', 'frog'\]", "at least one of each", "Add samples"):
        compute_relevance(parent, [{**batch, "labels": torch.tensor([0, 1])}], show_progress=False)
    assert all(torch.equal(relevance, before[key]) for key, relevance in parent.masks.relevance().items())


def test_evaluation_needs_samples_of_the_labels(parent):
    batch = {"pixel_values": torch.zeros(2, 3, 16, 16), "labels": torch.tensor([0, 1])}
    with told(ValueError, r"without a sample of the labels", "at least one", "Pass data"):
        evaluate_module(parent, ["ship"], [batch], show_progress=False)


def test_a_single_label_can_t_be_trained(parent):
    module = parent.extract_module("cat")
    with told(ValueError, "a model of one label", "at least 2", "Cut a module for more"):
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
TENSORS = [
    "model.classifier.weight",
    "model.vit.layers.0.mlp.fc1.weight",
    "model.vit.layers.1.attention.o_proj.weight",
    "model.vit.layernorm.weight",
    "masks.0.relevance",
]


@loads
@pytest.mark.parametrize("name", TENSORS)
def test_a_missing_tensor_is_named(saved, tmp_path, name, options):
    directory = damaged_weights(saved / "parent", tmp_path / "out", lambda tensors: tensors.pop(name))
    with told(ValueError, re.escape(name), do="Save or download"):
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
    with told(ValueError, rf"{re.escape(name)}' of shape \(", r"\d+", "[Ss]ave or download"):
        NeMoForImageClassification.from_pretrained(directory, **options)


@loads
def test_the_directory_of_a_bad_tensor_is_named(saved, tmp_path, options):
    name = "model.vit.layernorm.weight"
    directory = damaged_weights(
        saved / "parent", tmp_path / "out", lambda tensors: tensors.update({name: torch.zeros(3)})
    )
    with told(ValueError, re.escape(str(directory)), r"\(32,\)", "[Ss]ave or download"):
        NeMoForImageClassification.from_pretrained(directory, **options)


@loads
@pytest.mark.parametrize("length", [0, 100, -100])
def test_truncated_weights_are_named(saved, tmp_path, length, options):
    directory = shutil.copytree(saved / "parent", tmp_path / "out")
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with told(OSError, re.escape(str(directory)), "safetensors", "Save or download"):
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


def test_a_tensor_that_nobody_knows_is_named(saved, tmp_path):
    directory = damaged_weights(
        saved / "module", tmp_path / "out", lambda tensors: tensors.update(extra=torch.zeros(1))
    )
    with told(ValueError, "1 unexpected tensors, such as 'extra'", "exactly those", "Save or download"):
        NeMoForImageClassification.from_pretrained(directory)


@pytest.mark.parametrize(
    "widths",
    [{"intermediate": w} for w in (10**12, 49, -1, "3", True, 2.0, None)] + [{}, {"head_dim": 3}, None, 7, [3]],
    ids=str,
)
def test_absurd_widths_of_a_module_are_refused(saved, tmp_path, widths):
    directory = damaged_config(
        saved / "module", tmp_path / "out", lambda config: config["sites"][1].update(widths=widths)
    )
    with told(ValueError, "width.*'vit.layers.0.mlp:ffn'"):
        NeMoForImageClassification.from_pretrained(directory)


def test_widths_of_another_module_are_refused(saved, tmp_path):
    directory = damaged_config(
        saved / "module", tmp_path / "out", lambda config: config["sites"][1].update(widths={"intermediate": 2})
    )
    with told(ValueError, r"'model.vit.layers.0.mlp.fc1\.\w+' of shape", r"\(2,", "save or download"):
        NeMoForImageClassification.from_pretrained(directory)


@pytest.mark.parametrize(
    ("kind", "sites"),
    [("module", None), ("module", []), ("parent", []), ("module", "rename the first"), ("parent", "rename the first")],
)
def test_sites_that_are_not_the_model_s_are_refused(saved, tmp_path, kind, sites):
    def change(config):
        if sites == "rename the first":
            config["sites"][0]["key"] = "os.system:attention"
        else:
            config["sites"] = sites

    directory = damaged_config(saved / kind, tmp_path / "out", change)
    got = r"with the sites \['os\.system:attention', 'vit" if sites else r"with the sites \[\]"
    with told(ValueError, got, "some of .'vit.layers.0", "save the model again"):
        NeMoForImageClassification.from_pretrained(directory)


def test_a_module_s_missing_site_is_told_by_its_weights(saved, tmp_path):
    directory = damaged_config(saved / "module", tmp_path / "out", lambda config: config["sites"].pop())
    with told(ValueError, r"'model.vit.layers.1.mlp.fc1\.\w+' of shape", r"\(48,", "save or download"):
        NeMoForImageClassification.from_pretrained(directory)


@loads
@pytest.mark.parametrize("kept", [slice(1, None), slice(0, 3), slice(2, None)], ids=str)
def test_a_parent_s_missing_site_is_told_by_its_masks(tmp_path, kept, options):
    # At a given rank the masks of one layer fit another: the relevance of what is missing must not be read for it.
    parent = attach_masks(fresh("vit"), NeMoConfig(generator_rank=4))
    randomize_relevance(parent)
    parent.save_pretrained(tmp_path / "parent")
    directory = damaged_config(
        tmp_path / "parent", tmp_path / "out", lambda config: config.update(sites=config["sites"][kept])
    )
    with told(ValueError, r"masks\.\d", do="[Ss]ave or download"):
        NeMoForImageClassification.from_pretrained(directory, **options)


@pytest.mark.parametrize("kind", ["parent", "module"])
def test_a_back_end_that_doesn_t_exist_is_refused(saved, tmp_path, kind):
    directory = damaged_config(saved / kind, tmp_path / "out", lambda c: c["sites"][0].update(pruning_mode="warp"))
    with told(ValueError, "the pruning mode 'warp' for 'vit.layers.0.attention", "'dense'", "config.json"):
        NeMoForImageClassification.from_pretrained(directory)


@loads
@pytest.mark.parametrize("base_class", ["Trainer", "os", "ViTForEverything", "__doc__", "ViTConfig", ""])
def test_a_base_class_that_is_no_model_is_refused(saved, tmp_path, base_class, options):
    directory = damaged_config(saved / "parent", tmp_path / "out", lambda c: c.update(base_class=base_class))
    with told(
        UnsupportedArchitectureError,
        f"the model class '{base_class}'",
        "one of transformers .* or one that is registered",
        "Update transformers, or run before: AutoConfig.register",
    ):
        NeMoForImageClassification.from_pretrained(directory, **options)


@loads
def test_a_role_that_doesn_t_exist_is_refused(saved, tmp_path, options):
    directory = damaged_config(saved / "parent", tmp_path / "out", lambda c: c.update(role="parasite"))
    with told(ValueError, "role.*parasite", "parent"):
        NeMoForImageClassification.from_pretrained(directory, **options)


@loads
def test_options_of_a_newer_version_are_refused(saved, tmp_path, options):
    directory = damaged_config(saved / "parent", tmp_path / "out", lambda c: c["nemo_config"].update(beta=1))
    with told(ValueError, r"unknown options \['beta'\]", "temperature", "update nemo-hf"):
        NeMoForImageClassification.from_pretrained(directory, **options)


def test_labels_are_cut_from_parents_alone(saved):
    with told(ValueError, "which is a module", "a parent", "Load it without labels="):
        NeMoForImageClassification.from_pretrained(saved / "module", labels=["cat"])


@loads
def test_a_plain_model_s_directory_is_no_parent(saved, options):
    with told((OSError, ValueError), re.escape(str(saved / "plain")), "parent", "make_parent|NeMoTrainer|AutoModel"):
        NeMoForImageClassification.from_pretrained(saved / "plain", **options)


@loads
def test_a_parent_of_another_task_is_refused(saved, options):
    with told((TypeError, ValueError), "ViTForImageClassification", "NeMoForImageClassification|[Ii]mage"):
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
    with told(NotADirectoryError, "out', which is a file", "a directory", "Pass another path"):
        parent.save_pretrained(tmp_path / "out")
    assert contents(tmp_path) == {"out": b"mine"}
