"""Options survive files; labels and groups have one meaning wherever they are named; wrong ones are refused."""

import re

import pytest
import torch
from conftest import LABELS

from nemo_hf import NeMoConfig, make_parent
from nemo_hf.config import label_id, resolve_groups, resolve_labels

NAMES = dict(enumerate(LABELS))
GROUPS = {"animals": [0, 1, 4], "vehicles": [2, 3]}
OTHER_THAN_DEFAULT = {
    "targets": ["ffn"],
    "masks": "generated",
    "generator_rank": 3,
    "contrastive_weight": 0.0,
    "temperature": 0.5,
    "gather_across_devices": False,
    "sparsity_weight": 2,
    "hard_masks": False,
    "detach_pooled": False,
    "mask_learning_rate": 1e-3,
    "warmup_ratio": 1.0,
    "rehearsal_probability": 1,
    "relevance_threshold": 1.0,
    "label_groups": {"b": ["cat", 1], "a": [2, "ship", "frog"]},
}


@pytest.mark.parametrize("options", [OTHER_THAN_DEFAULT, {"group_column": "domain"}], ids=["most", "group_column"])
def test_options_survive_json(tmp_path, options):
    config = NeMoConfig(**options)
    config.to_json_file(tmp_path / "nemo.json")
    loaded = NeMoConfig.from_json_file(tmp_path / "nemo.json")
    assert loaded == config != NeMoConfig()
    assert list(loaded.label_groups or {}) == list(options.get("label_groups", {}))


def test_options_don_t_share_the_caller_s_lists():
    groups = {"a": ["cat"]}
    config = NeMoConfig(label_groups=groups)
    groups["a"].append("dog")
    config.to_dict()["label_groups"]["a"].append("car")
    assert config.label_groups == {"a": ["cat"]}


WRONG_OPTIONS = {
    "targets": ([], ["embeddings"], 5, "ffn"),
    "generator_rank": (0, 2.5, "8", True),
    "contrastive_weight": (-0.1, float("inf"), float("nan"), "0.5", None),
    "temperature": (0, float("nan"), None),
    "mask_learning_rate": (-1e-3, "fast"),
    "warmup_ratio": (1.1, -0.1, [0.1]),
    "rehearsal_probability": (1.5, False),
    "relevance_threshold": (0, 1.01, None),
    "hard_masks": ("yes", 1),
    "label_groups": ({}, {"a": []}, {"a": "cat"}, [["cat"], ["dog"]], {1: ["cat"]}, {"a": 3}),
    "group_column": (3,),
    "alpha": (0.5,),
}


@pytest.mark.parametrize("option", list(WRONG_OPTIONS))
def test_an_option_of_the_wrong_name_type_or_range_is_refused(option):
    for value in WRONG_OPTIONS[option]:
        with pytest.raises((TypeError, ValueError), match=rf"^Got .*({option}|group).*expected "):
            NeMoConfig.from_dict({option: value})


def test_groups_are_given_in_one_place():
    with pytest.raises(ValueError, match="both label_groups and group_column; expected at most one"):
        NeMoConfig(label_groups={"a": ["cat"]}, group_column="domain")


def test_without_groups_each_label_is_its_own():
    assert resolve_groups(None, NAMES) == {name: [index] for index, name in NAMES.items()}
    groups = resolve_groups(None, {0: "crane", 1: "dog", 2: "crane"})  # of one name, but groups of two
    assert sorted(groups.values()) == [[0], [1], [2]]


def test_groups_by_name_and_id_are_the_same():
    assert resolve_groups({"animals": ["cat", "dog", "frog"], "vehicles": ["car", "ship"]}, NAMES) == GROUPS
    assert resolve_groups({"animals": [0, "dog", 4], "vehicles": [2, "ship"]}, NAMES) == GROUPS


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"pets": ["cat", "dog"], "rest": ["car", "ship", "frog", 1]}, "'dog' in the groups 'pets' and 'rest'"),
        ({"twice": ["cat", 0, "dog", "car", "ship", "frog"]}, "the label 'cat'.* one group"),
        ({"pets": ["cat", "dog"]}, "without 'car', 'ship', 'frog'.*each of the 5 labels"),
        ({"pets": ["cow"], "rest": LABELS}, "unknown label 'cow'.*'cat'"),
    ],
    ids=["overlap", "repeat", "missing", "unknown"],
)
def test_groups_that_are_no_partition_are_refused_and_the_model_is_left_alone(vit, groups, message):
    with pytest.raises(ValueError, match=message):
        make_parent(vit, NeMoConfig(label_groups=groups))
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in vit.modules())


@pytest.mark.parametrize(
    ("labels", "ids", "groups"),
    [
        (["dog", "cat"], [1, 0], ["animals"]),
        ([3, "cat"], [3, 0], ["animals", "vehicles"]),
        ("vehicles", [2, 3], ["vehicles"]),
        (["vehicles", "cat"], [2, 3, 0], ["animals", "vehicles"]),
        (2, [2], ["vehicles"]),
        (("frog",), [4], ["animals"]),
    ],
)
def test_a_module_is_asked_for_by_labels_and_groups(labels, ids, groups):
    assert resolve_labels(labels, GROUPS, NAMES) == (ids, groups)


UNKNOWN = r"the unknown label '{}'; expected one of 'cat', 'dog'.*, or a group: 'animals', 'vehicles'"
WRONG_LABELS = [
    *(([name], ValueError, UNKNOWN.format(name)) for name in ("cow", "Cat", "", "0")),
    *(([index], ValueError, f"the label id {index}; expected 0 to 4") for index in (5, -1)),
    *(
        ([label], TypeError, r"the label .*a label id \(int\) or name \(str\)")
        for label in (1.0, True, None, ["cat"], torch.tensor(1))
    ),
    *(
        (labels, ValueError, r"the labels \[.*\] more than once")
        for labels in (["cat", "cat"], ["cat", 0], ["animals", "dog"], ["vehicles", "vehicles"])
    ),
    ([], ValueError, "an empty set of labels"),
    (None, TypeError, "labels=None"),
]


@pytest.mark.parametrize(("labels", "error", "message"), WRONG_LABELS)
def test_labels_that_are_unknown_repeated_or_of_another_type_are_refused(labels, error, message):
    with pytest.raises(error, match=f"^Got {message}"):
        resolve_labels(labels, GROUPS, NAMES)


INTENTS = {0: "change_pin", 1: "pin_change", 2: "balance", 3: "What's up?"}


@pytest.mark.parametrize(
    ("label", "meant"),
    [
        ("change pin", "Did you mean 'change_pin'?"),
        ("Change_PIN", "Did you mean 'change_pin'?"),
        ("pin", "See model.config.id2label for all names."),
        ("balances", "Did you mean 'balance'?"),
        ("bankng", "Did you mean 'banking'?"),
        ("xyz", "See model.config.id2label for all names."),
    ],
)
def test_an_unknown_label_brings_up_the_names_that_are_like_it(label, meant):
    with pytest.raises(ValueError, match=f" {re.escape(meant)}$"):
        resolve_labels([label], {"banking": [0, 1, 2], "rest": [3]}, INTENTS)


def test_an_ambiguous_name_is_refused():
    with pytest.raises(ValueError, match=re.escape("'crane', which the labels [0, 2] share")):
        label_id("crane", {0: "crane", 1: "dog", 2: "crane"})
    groups = {"cat": [1, 4], "rest": [0, 2, 3]}
    with pytest.raises(ValueError, match="'cat', which names both the label 0 and a group of 2 labels"):
        resolve_labels("cat", groups, NAMES)
    assert resolve_labels([0], groups, NAMES) == ([0], ["rest"])
    assert resolve_labels("cat", resolve_groups(None, NAMES), NAMES) == ([0], ["cat"])  # the group of that label
