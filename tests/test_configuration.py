"""What a configuration names: the class of the plain model, its task, its labels and its sites."""

import pytest
import transformers
from conftest import IMAGE, LABELS, TEXT, fresh, randomize_relevance
from transformers import (
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DeiTForImageClassificationWithTeacher,
    PvtConfig,
    PvtForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2ForSequenceClassification,
    WhisperForAudioClassification,
)

from nemo_hf import NeMoModelConfig, UnsupportedArchitectureError, make_parent
from nemo_hf.models.attach import attach_masks
from nemo_hf.models.configuration import find_base_class, task_of


class OwnConfig(ViTConfig):
    model_type = "own-vit"


class OwnViT(ViTForImageClassification):
    """A user's class, whose name tells no task."""

    config_class = OwnConfig


class OtherViT(ViTForImageClassification):
    config_class = OwnConfig


class OwnTextConfig(BertConfig):
    model_type = "own-bert"


class OwnBert(BertForSequenceClassification):
    config_class = OwnTextConfig


TASKS = {
    ViTForImageClassification: "image-classification",
    DeiTForImageClassificationWithTeacher: "image-classification",
    BertForSequenceClassification: "text-classification",
    Wav2Vec2ForSequenceClassification: "audio-classification",
    WhisperForAudioClassification: "audio-classification",
}


@pytest.mark.parametrize(("base_class", "task"), TASKS.items(), ids=lambda value: getattr(value, "__name__", value))
def test_a_class_of_transformers_has_its_task_and_is_found_by_its_name(base_class, task):
    assert task_of(base_class) == task
    assert find_base_class(base_class.__name__, base_class.config_class()) is base_class


@pytest.mark.parametrize("base_class", [BertModel, BertForTokenClassification, OwnViT], ids=lambda kind: kind.__name__)
def test_a_class_of_no_task_is_refused(base_class):
    with pytest.raises(TypeError, match=rf"^Got a {base_class.__name__}; expected a class for image, "):
        task_of(base_class)


@pytest.mark.parametrize(
    ("auto_class", "task"),
    [
        (AutoModelForImageClassification, "image-classification"),
        (AutoModelForSequenceClassification, "text-classification"),
        (AutoModelForAudioClassification, "audio-classification"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_registered_class_has_the_task_of_its_auto_class(registered, auto_class, task):
    registered(OwnConfig, auto_class, OwnViT)
    assert task_of(OwnViT) == task
    assert find_base_class("OwnViT", OwnConfig()) is OwnViT
    with pytest.raises(UnsupportedArchitectureError, match="'OwnViT'"):
        find_base_class("OwnViT", ViTConfig())  # another configuration's
    with pytest.raises(UnsupportedArchitectureError, match="'OwnBert'"):
        find_base_class("OwnBert", OwnConfig())


@pytest.mark.parametrize("name", ["OwnViT", "Trainer", "ViTConfig", "AutoModel", "os", "__doc__", ""])
def test_a_class_that_is_not_there_is_told_how_to_register(name):
    message = (
        rf"^Got the model class '{name}'; expected one of transformers {transformers.__version__} or one that is "
        rf"registered\. .* AutoConfig\.register\('own-vit', OwnConfig\) and .*\.register\(OwnConfig, {name}\)"
    )
    with pytest.raises(UnsupportedArchitectureError, match=message):
        find_base_class(name, OwnConfig())


def test_a_model_whose_class_can_t_be_found_again_gets_no_masks(registered):
    model = OwnViT(OwnConfig(**IMAGE))
    with pytest.raises(TypeError, match=r"^Got a OwnViT; "):
        make_parent(model)
    registered(OwnConfig, AutoModelForImageClassification, OtherViT)
    with pytest.raises(TypeError, match=r"^Got a OwnViT; "):
        make_parent(model)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())


class MyForImageClassification(ViTForImageClassification):
    """Its name tells its task, but nobody would know it when it is loaded."""

    config_class = OwnConfig


def test_a_class_of_a_telling_name_must_be_registered_as_well(registered):
    model = MyForImageClassification(OwnConfig(**IMAGE))
    with pytest.raises(UnsupportedArchitectureError, match=r"^Got the model class 'MyForImageClass\w+'; expected"):
        make_parent(model)
    registered(OwnConfig, AutoModelForImageClassification, MyForImageClassification)
    assert make_parent(model).config.base_class == "MyForImageClassification"


def test_a_model_of_ones_own_class_survives_saving_and_is_cut_on_load(registered, tmp_path):
    registered(OwnTextConfig, AutoModelForSequenceClassification, OwnBert)
    model = OwnBert(OwnTextConfig(**TEXT))
    model.load_state_dict(fresh("bert").state_dict())
    parent = make_parent(model.eval())
    randomize_relevance(parent)
    parent.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded.model) is OwnBert
    assert type(loaded.config.base_config) is OwnTextConfig
    cut = AutoModelForSequenceClassification.from_pretrained(tmp_path, labels=["cat", "dog"], verify=True)
    assert cut.config.equivalence["status"] == "verified"
    assert type(cut.model) is OwnBert


def test_a_file_of_a_class_that_is_not_registered_says_so(registered, tmp_path):
    registered(OwnTextConfig, AutoModelForSequenceClassification, OwnBert)
    attach_masks(OwnBert(OwnTextConfig(**TEXT))).save_pretrained(tmp_path)
    config = NeMoModelConfig.from_pretrained(tmp_path)
    config.base_class = "OwnViT"
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedArchitectureError, match=r"^Got the model class 'OwnViT'; expected .*'own-bert'"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_labels_without_names_are_numbered(tmp_path):
    sizes = {"depths": [1, 1], "hidden_sizes": [16, 16], "num_attention_heads": [2, 2], "image_size": 16}
    sizes |= {"patch_sizes": [4, 2], "strides": [4, 2], "mlp_ratios": [2, 2], "sequence_reduction_ratios": [2, 1]}
    sizes |= {"num_encoder_blocks": 2}
    model = PvtForImageClassification(PvtConfig(**sizes, num_labels=5)).eval()
    assert not model.config.id2label
    parent = attach_masks(model)
    names = {index: f"LABEL_{index}" for index in range(5)}
    assert parent.config.names == names
    assert parent.config.label2id == {name: index for index, name in names.items()}
    assert parent.config.groups == {name: [index] for index, name in names.items()}
    parent.save_pretrained(tmp_path)
    assert NeMoModelConfig.from_pretrained(tmp_path).names == names
    module = parent.extract_module(["LABEL_3", 1])
    assert module.config.names == {0: "LABEL_3", 1: "LABEL_1"}


def test_labels_with_names_keep_them(vit):
    assert list(attach_masks(vit).config.names.values()) == LABELS


def test_a_class_of_the_same_name_as_another_is_refused(vit):
    """A file names the class: another one of that name would be loaded in its place."""

    class Impostor(type(vit)):
        pass

    Impostor.__name__ = type(vit).__name__
    with pytest.raises(UnsupportedArchitectureError, match="which this name stands for in files"):
        make_parent(Impostor(vit.config))


class NamedConfig(ViTConfig):
    """Writes its labels under a name of its own and reads them in `from_dict` only, as that of timm's wrapper does."""

    model_type = "named-vit"

    def to_dict(self):
        data = super().to_dict()
        data["label_names"] = [self.id2label[index] for index in range(len(self.id2label))]
        return {name: value for name, value in data.items() if name not in ("id2label", "label2id")}

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        names = config_dict["label_names"]
        config_dict = {name: value for name, value in config_dict.items() if name != "label_names"}
        return super().from_dict({**config_dict, "id2label": dict(enumerate(names))}, **kwargs)


class NamedViT(ViTForImageClassification):
    config_class = NamedConfig


def test_the_plain_models_configuration_is_read_by_its_own_method(registered, tmp_path):
    registered(NamedConfig, AutoModelForImageClassification, NamedViT)
    parent = make_parent(NamedViT(NamedConfig(**IMAGE)))
    randomize_relevance(parent)
    parent.extract_module([1, 3]).save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.base_config.id2label == parent.config.base_config.id2label
    assert loaded.config.label_ids == [1, 3]
