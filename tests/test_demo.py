"""The demo, five steps of it: its files, its report, and the modules that it writes."""

import itertools
import json
import math

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from transformers import AutoModelForImageClassification, pipeline
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from nemo_hf.cli import demo, main
from nemo_hf.models.rejection import REJECTED_LABEL

MODULES, RETENTIONS, SAMPLES = demo.MODULES[:2], [0.2, 0.1], 32


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo") / "out"
    split = demo.load_digits_split

    def few(processor, seed):
        train, test, indices = split(processor, seed)
        return demo.Digits(train.pixel_values[:320], train.labels[:320]), test, indices

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "load_digits_split", few)  # fewer to train on
        patch.setattr(demo, "MODULES", MODULES)
        patch.setattr(demo, "RETENTIONS", RETENTIONS)
        patch.setattr(demo, "SAMPLES", SAMPLES)
        assert main(["demo", "--output-dir", str(directory), "--epochs", "1", "--seed", "3"]) == 0
    return directory


@pytest.fixture(scope="module")
def report(output):
    return json.loads((output / "report.json").read_text())


def test_the_directory_and_the_report_are_as_documented(output, report):
    with Image.open(output / "modules.png") as picture:
        assert min(picture.size) > 300
    assert {path.name for path in output.iterdir()} == {
        "plain",
        "parent",
        "modules",
        "report.json",
        "modules.png",
        "report.html",
    }
    assert (report["epochs"], report["mask_epochs"]) == (1, 1)
    assert report["parent"]["all_parameters"] == report["parent"]["parameters"]  # no mask generators
    rows = report["modules"]
    kinds = [(row["source"], tuple(row["labels"]), row["retention"]) for row in rows]
    assert kinds == list(itertools.product(demo.SOURCES, MODULES, RETENTIONS))
    for row in rows:
        assert all(0 <= row[name] <= 1 for name in demo.MEASURED)
        assert row["weights"] <= row["retention"]
        assert row["samples"] <= SAMPLES
        assert row["bytes"] < row["source_bytes"]
    assert len(demo.format_demo(report).splitlines()) == 9 + len(rows) // 2
    # The test indices are a fifth of the digits, stratified.
    indices = report["test_indices"]
    assert len(set(indices)) == len(indices) == 360
    assert torch.bincount(torch.tensor(load_digits().target[indices])).min() >= 34


def test_reloaded_modules_reach_the_reported_accuracy(report):
    saved = [row for row in report["modules"] if row["path"]]
    assert len(saved) == 4
    for row in saved:
        model = AutoModelForImageClassification.from_pretrained(row["path"])
        _, test, _ = demo.load_digits_split(ViTImageProcessorPil.from_pretrained(row["path"]), report["seed"])
        chosen = [index for index, label in enumerate(test.labels) if label in row["labels"]]
        with torch.no_grad():
            answers = model.own_logits(pixel_values=test.pixel_values[chosen]).argmax(-1).tolist()
        right = sum(row["labels"][a] == test.labels[i] for a, i in zip(answers, chosen, strict=True))
        assert math.isclose(right / len(chosen), row["accuracy"])
        stored = load_file(f"{row['path']}/model.safetensors")
        assert sum(tensor.numel() for tensor in stored.values()) == row["parameters"]
    answers = pipeline("image-classification", model=saved[1]["path"])(Image.new("L", (8, 8)))
    assert {answer["label"] for answer in answers} == {"3", "8", "9", REJECTED_LABEL}
