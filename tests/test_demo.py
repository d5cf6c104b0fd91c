"""The demo, five steps of it: its files, its report, and the modules that it writes."""

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


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo") / "out"
    split = demo.load_digits_split

    def few(processor, seed):
        train, test, indices = split(processor, seed)
        return demo.Digits(train.pixel_values[:320], train.labels[:320]), test, indices

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "load_digits_split", few)  # fewer to train on
        assert main(["demo", "--output-dir", str(directory), "--epochs", "1", "--seed", "3"]) == 0
    return directory


@pytest.fixture(scope="module")
def report(output):
    return json.loads((output / "report.json").read_text())


def test_the_directory_and_the_report_are_as_documented(output, report):
    with Image.open(output / "modules.png") as picture:
        assert min(picture.size) > 300
    assert {path.name for path in output.iterdir()} == {"parent", "modules", "report.json", "modules.png"}
    assert {"accuracy", "parameters", "generator_parameters", "coupling", "cohesion"} <= set(report["parent"])
    assert report["parent"]["generator_parameters"] <= 0.1 * report["parent"]["parameters"]
    assert [module["labels"] for module in report["modules"]] == [[0, 1], [3, 8, 9], [0, 1, 2, 3, 4]]
    for module in report["modules"]:
        for name in ("latency_ms", "parent_latency_ms"):  # None where the runs disagree
            assert module[name] == module[f"{name}_by_batch"].get("1")
    # The test indices are a fifth of the digits, stratified.
    indices = report["test_indices"]
    assert len(set(indices)) == len(indices) == 360
    assert torch.bincount(torch.tensor(load_digits().target[indices])).min() >= 34


def test_reloaded_modules_reach_the_reported_accuracy(report):
    for module in report["modules"]:
        model = AutoModelForImageClassification.from_pretrained(module["path"])
        _, test, _ = demo.load_digits_split(ViTImageProcessorPil.from_pretrained(module["path"]), report["seed"])
        chosen = [index for index, label in enumerate(test.labels) if label in module["labels"]]
        with torch.no_grad():
            answers = model(test.pixel_values[chosen]).logits.argmax(-1).tolist()
        right = sum(module["labels"][a] == test.labels[i] for a, i in zip(answers, chosen, strict=True))
        assert math.isclose(right / len(chosen), module["accuracy"])
        stored = load_file(f"{module['path']}/model.safetensors")
        assert sum(tensor.numel() for tensor in stored.values()) == module["parameters"]
    answers = pipeline("image-classification", model=report["modules"][1]["path"])(Image.new("L", (8, 8)))
    assert {answer["label"] for answer in answers} == {"3", "8", "9"}
