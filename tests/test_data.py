"""How the command line reads data sets."""

import datasets
import pytest
from conftest import fresh, image_processor, tokenizer

from nemo_hf.cli.data import load_data


@pytest.fixture
def text_model(tmp_path):
    tokenizer().save_pretrained(tmp_path / "model")
    fresh("bert").config.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def saved(tmp_path, rows, features=None):
    folder = tmp_path / "data"
    folder.mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train-0.parquet")
    return str(folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_texts_with_labels_by_name(tmp_path, text_model):
    source = saved(tmp_path, {"text": ["w1 w2", "w3", "w4"], "label": ["dog", "cat", "dog"], "rest": [1, 2, 3]})
    data = load_data(source, text_model, ["train"])
    assert data.task == "text-classification"
    assert data.names == ["cat", "dog"]
    assert data.label_options() == {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
    assert data.splits["train"]["labels"] == [1, 0, 1]
    assert "rest" not in data.splits["train"].column_names
    batch = data.collator([data.splits["train"][0], data.splits["train"][1]])
    assert batch["input_ids"].tolist() == [[3, 4], [5, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_images_are_prepared_when_they_are_read(tmp_path):
    from PIL import Image

    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    pictures = [Image.new("L", (20, 10), value) for value in (0, 255)]
    source = saved(tmp_path, {"img": pictures, "label": [0, 1]}, features)
    image_processor().save_pretrained(tmp_path / "model")
    fresh("vit").config.save_pretrained(tmp_path / "model")
    data = load_data(source, str(tmp_path / "model"), ["train"])
    assert data.task == "image-classification"
    batch = data.collator([data.splits["train"][index] for index in (0, 1)])
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [-1.0, 1.0]
    assert batch["labels"].tolist() == [0, 1]


@pytest.mark.parametrize("is_class_label", [False, True])
def test_labels_are_numbered_as_the_model_numbers_them(is_class_label, tmp_path, text_model):
    features, values = None, ["dog", "ant", "dog"]
    if is_class_label:
        features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["dog", "ant"])}
        features, values = datasets.Features(features), [0, 1, 0]
    source = saved(tmp_path, {"text": ["w1", "w2", "w3"], "label": values}, features)
    data = load_data(source, text_model, ["train"], names=["ant", "bee", "cat", "dog"])
    assert data.splits["train"]["labels"] == [3, 0, 3]
    with pytest.raises(ValueError, match=r"Got the labels \['ant'\].*expected some of"):
        load_data(source, text_model, ["train"], names=["dog", "bee"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"splits": ["test"]}, r"Got the split 'test'.*expected one of \['train'\]"),
        ({"label_column": "intent"}, r"label_column='intent'.*expected one of"),
        ({}, "expected one of images or"),
    ],
)
def test_what_is_missing_is_named(tmp_path, text_model, options, message):
    source = saved(tmp_path, {"text": ["w1"], "title": ["w2"], "label": [0]})
    with pytest.raises(ValueError, match=message):
        load_data(source, text_model, **{"splits": ["train"], **options})


def test_the_input_column_can_be_named(tmp_path, text_model):
    source = saved(tmp_path, {"text": ["w1"], "title": ["w2 w3"], "label": [0]})
    data = load_data(source, text_model, ["train"], input_column="title")
    assert data.splits["train"][0]["input_ids"] == [4, 5]
