"""What a configuration names (the plain model's class, its task, its labels), and what passes it by on loading."""

import inspect
import json

import pytest
import transformers
from conftest import IMAGE, LABELS, TEXT, fresh, generated, randomize_relevance
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from nemo_hf import NeMoConfig, NeMoModelConfig, UnsupportedArchitectureError, compose, make_parent
from nemo_hf.models.attach import attach_masks
from nemo_hf.models.configuration import MODEL_OPTIONS, TASKS, SavedConfig, find_base_class, task_of


class OwnConfig(ViTConfig):
    model_type = "own-vit"


class OwnViT(ViTForImageClassification):
    """A user's class, whose name tells no task."""

    config_class = OwnConfig


class MyForImageClassification(ViTForImageClassification):
    """Its name tells its task, but nobody would know it when it is loaded."""

    config_class = OwnConfig


class OwnTextConfig(BertConfig):
    """Writes its labels under a name of its own and reads them in `from_dict` only, as that of timm's wrapper does."""

    model_type = "own-bert"

    def to_dict(self):
        data = super().to_dict()
        del data["label2id"]
        return data | {"label_names": list(data.pop("id2label").values())}

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        data = dict(config_dict)
        return super().from_dict(data | {"id2label": dict(enumerate(data.pop("label_names")))}, **kwargs)


class OwnBert(BertForSequenceClassification):
    config_class = OwnTextConfig


@pytest.mark.parametrize("task", ["Image", "Audio"])
def test_a_registered_class_has_the_task_of_its_auto_class(registered, task):
    registered(OwnConfig, getattr(transformers, f"AutoModelFor{task}Classification"), OwnViT)
    assert task_of(OwnViT) == f"{task.lower()}-classification"
    assert find_base_class("OwnViT", OwnConfig()) is OwnViT
    with pytest.raises(UnsupportedArchitectureError, match="'OwnViT'"):
        find_base_class("OwnViT", ViTConfig())  # another configuration's


@pytest.mark.parametrize("name", ["OwnViT", "Trainer", "ViTConfig", "__doc__", ""])
def test_a_missing_class_is_refused_with_how_to_register_it(name):
    message = (
        rf"^Got the model class '{name}'; expected one of transformers {transformers.__version__} or one that is "
        rf"registered\. .* AutoConfig\.register\('own-vit', OwnConfig\) and .*\.register\(OwnConfig, {name}\)"
    )
    with pytest.raises(UnsupportedArchitectureError, match=message):
        find_base_class(name, OwnConfig())


def test_a_model_whose_class_could_not_be_found_again_gets_no_masks(registered):
    model = OwnViT(OwnConfig(**IMAGE))
    with pytest.raises(TypeError, match=r"^Got a OwnViT; "):
        make_parent(model, generated())
    named = MyForImageClassification(OwnConfig(**IMAGE))
    with pytest.raises(UnsupportedArchitectureError, match=r"^Got the model class 'MyForImageClass\w+'; expected"):
        make_parent(named, generated())
    registered(OwnConfig, AutoModelForImageClassification, MyForImageClassification)
    with pytest.raises(TypeError, match=r"^Got a OwnViT; "):
        make_parent(model, generated())
    impostor = type("ViTForImageClassification", (ViTForImageClassification,), {})  # its name means another in files
    with pytest.raises(UnsupportedArchitectureError, match="files mean by this name"):
        make_parent(impostor(ViTConfig(**IMAGE)), generated())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())


def test_a_model_of_ones_own_class_survives_saving_and_is_cut_on_load(registered, tmp_path):
    registered(OwnTextConfig, AutoModelForSequenceClassification, OwnBert)
    model = OwnBert(OwnTextConfig(**TEXT))
    model.load_state_dict(fresh("bert").state_dict())
    parent = attach_masks(model.eval())
    randomize_relevance(parent)
    parent.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert (type(loaded.model), type(loaded.config.base_config)) == (OwnBert, OwnTextConfig)
    assert loaded.config.base_config.id2label == dict(enumerate(LABELS))
    cut = AutoModelForSequenceClassification.from_pretrained(tmp_path, labels=["cat", "dog"], verify=True)
    assert (type(cut.model), cut.config.equivalence["status"]) == (OwnBert, "verified")


def test_labels_without_names_are_numbered(vit, tmp_path):
    sizes = {"depths": [1, 1], "hidden_sizes": [16, 16], "num_attention_heads": [2, 2], "image_size": 16}
    sizes |= {"patch_sizes": [4, 2], "strides": [4, 2], "mlp_ratios": [2, 2], "sequence_reduction_ratios": [2, 1]}
    config = transformers.PvtConfig(**sizes, num_encoder_blocks=2, num_labels=5)
    model = transformers.PvtForImageClassification(config).eval()
    assert not model.config.id2label
    parent = attach_masks(model)
    names = {index: f"LABEL_{index}" for index in range(5)}
    assert parent.config.names == names
    assert parent.config.groups == {name: [index] for index, name in names.items()}
    parent.save_pretrained(tmp_path)
    assert NeMoModelConfig.from_pretrained(tmp_path).names == names
    assert parent.extract_module(["LABEL_3", 1]).config.names == {0: "LABEL_3", 1: "LABEL_1"}
    assert list(attach_masks(vit).config.names.values()) == LABELS


def test_the_configuration_survives_the_file(tmp_path):
    options = generated(temperature=0.5, targets=["ffn"], label_groups={"b": ["cat", 1], "a": [2, "ship", "frog"]})
    groups = {f"group {index}": [index] for index in reversed(range(12))}  # the rows of the relevance have this order
    said = {
        "role": "module",
        "nemo_config": options.to_dict(),
        "label_groups": [{"name": name, "labels": ids} for name, ids in groups.items()],
        "label_ids": [3, 1],
        "sites": [{"key": "layer:ffn", "pruning_mode": "dense", "widths": {"intermediate": 3}}],
        "relevance_source": "exact",
        "unseen_labels": [0, 7],
        "relevance_threshold": 0.5,
        "id2label": {index: f"label {index}" for index in range(12)},
    }
    NeMoModelConfig(base_config=ViTConfig(hidden_size=64), **said).save_pretrained(tmp_path)
    loaded = NeMoModelConfig.from_pretrained(tmp_path)
    assert (type(loaded.base_config), loaded.base_config.hidden_size) == (ViTConfig, 64)
    assert {name: getattr(loaded, name) for name in said} == json.loads(json.dumps(said)) | {"id2label": loaded.names}
    assert list(loaded.groups.items()) == list(groups.items())
    assert list(loaded.names.items()) == list(said["id2label"].items())
    assert NeMoConfig.from_dict(loaded.nemo_config) == options


# Arguments of a model's from_pretrained come through the configuration's, if an Auto class is asked.


@pytest.fixture
def parent(vit, tmp_path):
    parent = attach_masks(vit.eval())
    randomize_relevance(parent)
    parent.save_pretrained(tmp_path / "parent")
    return parent


def test_the_options_that_pass_are_those_of_the_model(parent):
    parameters = inspect.signature(parent.from_pretrained).parameters.values()
    assert {each.name for each in parameters if each.kind is each.KEYWORD_ONLY} == MODEL_OPTIONS


@pytest.mark.parametrize("options", [{"round_to": 16}, {"threshold": 0.9}], ids=str)
def test_options_of_a_cut_reach_it_through_the_auto_classes(parent, tmp_path, options):
    """Any entry of a config.json becomes an attribute, and arguments of the same name would end there."""
    path = tmp_path / "parent" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "labels": [3], "threshold": 0.1, "verify": 0}))
    usual, expected = (parent.extract_module(["cat", "dog"], **given) for given in ({}, options))
    for verify in (False, True):
        given = {"labels": ["cat", "dog"], "verify": verify, **options}
        cut = AutoModelForImageClassification.from_pretrained(path.parent, **given)
        assert cut.config.sites == expected.config.sites != usual.config.sites
        assert cut.config.round_to == options.get("round_to")
        assert cut.config.relevance_threshold == options.get("threshold", 0.5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["classifiers", pytest.param("all", marks=pytest.mark.sweep)])
def test_default_configurations_of_all_families_are_read_as_they_were_written(tmp_path, kind):
    found = CONFIG_MAPPING.values() if kind == "all" else {each for _, task in TASKS.values() for each in task}
    unread = []
    for config_class in found:
        try:
            base = config_class()
        except (ValueError, StrictDataclassError):  # has no default
            continue
        if isinstance(base, SavedConfig):
            continue
        NeMoModelConfig(base_config=base).to_json_file(tmp_path / "config.json", use_diff=False)
        try:
            read = NeMoModelConfig.from_pretrained(tmp_path).base_config
        except ValueError as error:
            unread.append(f"{config_class.__name__}: {error}")
        else:
            assert read.to_dict() == config_class.from_dict(base.to_dict()).to_dict()
    assert not unread


def test_arguments_do_not_change_what_a_file_says_of_the_weights(parent, tmp_path):
    directory = tmp_path / "parent"
    options = {"role": "module", "round_to": 8, "training": {"processes": 1}, "parent": "me/x", "labels": [1]}
    config, unused = transformers.AutoConfig.from_pretrained(directory, return_unused_kwargs=True, **options)
    assert {name: unused[name] for name in options} == options
    assert config.to_dict() == transformers.AutoConfig.from_pretrained(directory).to_dict()
    with pytest.raises(TypeError, match="'parent'"):
        AutoModelForImageClassification.from_pretrained(directory, parent="me/x")
    compose([parent.extract_module([0]), parent.extract_module([1])]).save_pretrained(tmp_path / "two")
    options = {"scales": [2.0, 2.0], "parts": [], "round_to": 8, "labels": [1]}
    config, unused = transformers.AutoConfig.from_pretrained(tmp_path / "two", return_unused_kwargs=True, **options)
    assert {name: unused[name] for name in options} == options
    assert config.scales == [1.0, 1.0]
    for wrong in (3, [3], ["../vocab.txt"]):
        with pytest.raises(ValueError, match="'processor_files'"):
            type(config).from_dict({**config.to_dict(), "processor_files": wrong})
