"""The main job, one epoch of it: files, fields and their agreement."""

import json
import math

import pytest
import torch
from conftest import randomize_relevance
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, pipeline

from nemo_hf import make_parent
from nemo_hf.cli.demo import load_digits_split
from nemo_hf.cli.main import main


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo") / "out"
    assert main(["demo", "--output-dir", str(directory), "--epochs", "1", "--seed", "3"]) == 0
    return directory


@pytest.fixture(scope="module")
def report(output):
    return json.loads((output / "report.json").read_text())


def test_the_report_has_the_fields_it_promises(report):
    assert report["seed"] == 3
    assert set(report["plain"]) == {"accuracy", "parameters"}
    assert {"accuracy", "parameters", "generator_parameters", "coupling", "cohesion"} <= set(report["parent"])
    assert [module["labels"] for module in report["modules"]] == [[0, 1], [3, 8, 9], [0, 1, 2, 3, 4]]
    for module in report["modules"]:
        assert set(module["controls"]) == {"random", "other", "empty"}
        for name in ("accuracy", "parent_restricted_accuracy", "neuron_retention_rate", "weight_retention_rate"):
            assert 0 <= module[name] <= 1
        assert module["latency_ms"] > 0
        assert module["parent_latency_ms"] > 0
    assert report["parent"]["generator_parameters"] <= 0.1 * report["parent"]["parameters"]


def test_the_test_indices_are_a_fifth_of_the_digits_and_stratified(report):
    from sklearn.datasets import load_digits

    indices = report["test_indices"]
    assert len(set(indices)) == len(indices) == 360
    counts = torch.bincount(torch.tensor(load_digits().target[indices]))
    assert counts.min() >= 34


def test_reloaded_modules_reach_the_reported_accuracy(report):
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    for module in report["modules"]:
        model = AutoModelForImageClassification.from_pretrained(module["path"])
        processor = ViTImageProcessorPil.from_pretrained(module["path"])
        _, test, _ = load_digits_split(processor, report["seed"])
        chosen = [index for index, label in enumerate(test.labels) if label in module["labels"]]
        with torch.no_grad():
            answers = model(test.pixel_values[chosen]).logits.argmax(-1).tolist()
        right = sum(module["labels"][a] == test.labels[i] for a, i in zip(answers, chosen, strict=True))
        assert math.isclose(right / len(chosen), module["accuracy"])
        stored = load_file(f"{module['path']}/model.safetensors")
        assert sum(tensor.numel() for tensor in stored.values()) == module["parameters"]


def test_a_pipeline_runs_on_a_module_of_the_demo(report):
    from PIL import Image

    answers = pipeline("image-classification", model=report["modules"][1]["path"])(Image.new("L", (8, 8)))
    assert {answer["label"] for answer in answers} == {"3", "8", "9"}


def test_the_picture_is_a_picture(output):
    from PIL import Image

    with Image.open(output / "modules.png") as picture:
        assert min(picture.size) > 300
    assert {path.name for path in output.iterdir()} == {"parent", "modules", "report.json", "modules.png"}


def test_extract_and_inspect_and_push_work_on_the_demos_files(output, tmp_path, capsys):
    parent = str(output / "parent")
    assert main(["extract", "--parent", parent, "--labels", "7", "2", "--output_dir", str(tmp_path / "m")]) == 0
    assert "['7', '2']" in capsys.readouterr().out
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "m")
    assert model.config.id2label == {0: "7", 1: "2"}
    for source in (parent, str(tmp_path / "m")):
        assert main(["inspect", source]) == 0
        table = capsys.readouterr().out
        assert "vit.layers.3.mlp" in table
        assert "dense" in table
    assert main(["push", str(tmp_path / "m"), "--repo_id", "me/seven-two", "--dry_run", "true"]) == 0
    card = (tmp_path / "m" / "README.md").read_text()
    assert "library_name: nemo-hf" in card
    assert f"{sum(p.numel() for p in model.model.parameters()):,}" in card


def test_the_command_takes_the_threshold_and_prefers_names_to_ids(vit, tmp_path, capsys):
    vit.config.id2label = {index: str(index + 1) for index in range(5)}
    vit.config.label2id = {name: index for index, name in vit.config.id2label.items()}
    parent = make_parent(vit)
    randomize_relevance(parent)
    parent.save_pretrained(tmp_path / "parent")
    shares = []
    for threshold in ("0.2", "0.9"):
        words = ["extract", "--parent", str(tmp_path / "parent"), "--labels", "1", "2", "--threshold", threshold]
        assert main([*words, "--output_dir", str(tmp_path / threshold)]) == 0
        assert "['1', '2']" in capsys.readouterr().out
        shares.append(AutoModelForImageClassification.from_pretrained(tmp_path / threshold).config.retained_neurons)
    assert shares[1] < 0.5 < shares[0]


def test_wrong_words_end_with_a_message_and_no_files(output, tmp_path, capsys):
    target = tmp_path / "m"
    words = ["extract", "--parent", str(output / "parent"), "--labels", "eleven", "--output_dir", str(target)]
    assert main(words) == 2
    assert "unknown label 'eleven'" in capsys.readouterr().err
    assert not target.exists()
    assert main(["cut"]) == 2
    assert main([]) == 0
    assert "usage: nemo-hf" in capsys.readouterr().out
