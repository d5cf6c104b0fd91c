"""Options survive files; labels and groups have one meaning wherever they are named."""

import pytest
from conftest import LABELS

from nemo_hf import NeMoConfig
from nemo_hf.config import label_id, resolve_groups, resolve_labels

NAMES = dict(enumerate(LABELS))
ANIMALS = {"animals": ["cat", "dog", "frog"], "vehicles": ["car", "ship"]}
RESOLVED = {"animals": [0, 1, 4], "vehicles": [2, 3]}
OTHER_THAN_DEFAULT = {
    "targets": ["ffn"],
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


def test_options_that_are_missing_take_their_defaults():
    assert NeMoConfig.from_dict({}) == NeMoConfig()
    assert NeMoConfig.from_dict({"temperature": 0.5}) == NeMoConfig(temperature=0.5)


def test_options_don_t_share_the_caller_s_lists():
    groups = {"a": ["cat"]}
    config = NeMoConfig(label_groups=groups)
    groups["a"].append("dog")
    config.to_dict()["label_groups"]["a"].append("car")
    assert config.label_groups == {"a": ["cat"]}


def test_labels_have_an_id_and_a_name():
    assert [label_id(name, NAMES) for name in LABELS] == [label_id(index, NAMES) for index in NAMES] == list(NAMES)


def test_without_groups_each_label_is_its_own():
    assert resolve_groups(None, NAMES) == {name: [index] for index, name in NAMES.items()}
    groups = resolve_groups(None, {0: "crane", 1: "dog", 2: "crane"})  # of one name, but groups of two
    assert sorted(groups.values()) == [[0], [1], [2]]


def test_groups_by_name_and_id_are_the_same():
    assert resolve_groups(ANIMALS, NAMES) == RESOLVED
    assert resolve_groups({"animals": [0, "dog", 4], "vehicles": [2, "ship"]}, NAMES) == RESOLVED


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
    assert resolve_labels(labels, RESOLVED, NAMES) == (ids, groups)


def test_a_name_of_a_label_and_of_its_own_group_is_no_conflict():
    assert resolve_labels("cat", resolve_groups(None, NAMES), NAMES) == ([0], ["cat"])
