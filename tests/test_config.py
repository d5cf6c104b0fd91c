"""Options are checked once and survive files; labels and groups are named one way."""

import pytest
from conftest import LABELS
from transformers import ViTConfig

from nemo_hf import NeMoConfig, NeMoModelConfig
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


def test_every_option_survives_json(tmp_path):
    config = NeMoConfig(**OTHER_THAN_DEFAULT)
    config.to_json_file(tmp_path / "nemo.json")
    assert NeMoConfig.from_json_file(tmp_path / "nemo.json") == config
    assert config != NeMoConfig()
    assert list(config.to_dict()["label_groups"]) == ["b", "a"]


def test_a_group_column_survives_json(tmp_path):
    NeMoConfig(group_column="domain").to_json_file(tmp_path / "nemo.json")
    assert NeMoConfig.from_json_file(tmp_path / "nemo.json").group_column == "domain"


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
    assert [label_id(name, NAMES) for name in LABELS] == list(NAMES)
    assert [label_id(index, NAMES) for index in NAMES] == list(NAMES)


def test_without_groups_each_label_is_its_own():
    assert resolve_groups(None, NAMES) == {name: [index] for index, name in NAMES.items()}


def test_labels_of_one_name_are_groups_of_two_names():
    groups = resolve_groups(None, {0: "crane", 1: "dog", 2: "crane"})
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


@pytest.mark.parametrize("count", [5, 12])
def test_the_order_of_groups_and_labels_survives_the_file(tmp_path, count):
    # The rows of the relevance follow the order of the groups.
    groups = {f"group {index}": [index] for index in reversed(range(count))}
    names = {index: f"label {index}" for index in range(count)}
    entries = [{"name": name, "labels": ids} for name, ids in groups.items()]
    config = NeMoModelConfig(base_config=ViTConfig(id2label=names), label_groups=entries, id2label=names)
    assert list(config.groups.items()) == list(groups.items())
    config.save_pretrained(tmp_path)
    loaded = NeMoModelConfig.from_pretrained(tmp_path)
    assert list(loaded.names.items()) == list(names.items())
    assert list(loaded.groups.items()) == list(groups.items())


def test_the_configuration_survives_the_file(tmp_path):
    sites = [{"key": "layer:ffn", "pruning_mode": "dense", "widths": {"intermediate": 3}}]
    config = NeMoModelConfig(
        base_config=ViTConfig(hidden_size=64),
        role="module",
        nemo_config=NeMoConfig(**OTHER_THAN_DEFAULT).to_dict(),
        label_ids=[3, 1],
        sites=sites,
        relevance_source="exact",
        relevance_threshold=0.5,
    )
    config.save_pretrained(tmp_path)
    loaded = NeMoModelConfig.from_pretrained(tmp_path)
    assert isinstance(loaded.base_config, ViTConfig)
    assert loaded.base_config.hidden_size == 64
    assert loaded.sites == sites
    assert loaded.label_ids == [3, 1]
    assert (loaded.role, loaded.relevance_source, loaded.relevance_threshold) == ("module", "exact", 0.5)
    assert NeMoConfig.from_dict(loaded.nemo_config) == NeMoConfig(**OTHER_THAN_DEFAULT)
