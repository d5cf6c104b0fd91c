"""A directory with the models and data that README, the pages of docs/ and the command line are tried on.

The names are those of the Hub: there, `google/vit-base-patch16-224-in21k` is a tiny ViT and `org/animals` 60 images.
"""

import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import LABELS, fresh, generated, image_processor, image_samples, randomize_relevance, tokenizer
from PIL import Image

from nemo_hf import make_parent

datasets.disable_progress_bars()
SPLITS = {"train": 30, "validation": 20, "test": 10}
GROUPS = {"animals": ["cat", "dog", "frog"], "vehicles": ["car", "ship"]}


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    directory = tmp_path_factory.mktemp("stage")
    write_stage(directory)
    return directory


@pytest.fixture
def stage(template, tmp_path, monkeypatch):
    """Makes a copy of the directory the current one, with a cache of data sets of its own."""
    shutil.copytree(template, tmp_path / "stage")
    monkeypatch.chdir(tmp_path / "stage")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "stage"


def write_stage(directory: Path) -> None:
    """Writes models, data sets, a parent `parent` and a module `cat-dog` of it."""
    vit, bert = directory / "google/vit-base-patch16-224-in21k", directory / "google-bert/bert-base-uncased"
    fresh("vit").save_pretrained(vit)
    image_processor().save_pretrained(vit)
    fresh("bert").save_pretrained(bert)
    tokenizer().save_pretrained(bert)
    write_animals(directory / "org/animals")
    write_texts(directory / "org/texts")
    parent = make_parent(fresh("vit"), generated())
    randomize_relevance(parent)
    parent.attach_processor(image_processor())
    parent.save_pretrained(directory / "parent")
    parent.extract_module(["cat", "dog"]).save_pretrained(directory / "cat-dog")


def write_animals(folder: Path) -> None:
    """Writes 16x16 images with columns `image` and `label`."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=LABELS)})
    for seed, (split, count) in enumerate(SPLITS.items()):
        samples = image_samples(count, seed)
        pixels = [(sample["pixel_values"].clamp(-2, 2) * 63 + 127).byte().permute(1, 2, 0) for sample in samples]
        rows = {"image": [Image.fromarray(np.asarray(image)) for image in pixels]}
        rows["label"] = [sample["labels"] for sample in samples]
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}-0.parquet")


def write_texts(folder: Path) -> None:
    """Writes texts with columns `text`, `intent` and `domain`."""
    classes = {"intent": datasets.ClassLabel(names=LABELS), "domain": datasets.ClassLabel(names=list(GROUPS))}
    features = datasets.Features(text=datasets.Value("string"), **classes)
    owner = [next(g for g, names in enumerate(GROUPS.values()) if name in names) for name in LABELS]
    for split in ("train", "test"):
        labels = [index % 5 for index in range(40)]
        texts = [f"w{index % 5} w{index % 7} w3" for index in range(40)]
        rows = {"text": texts, "intent": labels, "domain": [owner[label] for label in labels]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}-0.parquet")
