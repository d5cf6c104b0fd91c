"""The example scripts run as a user runs them, on small data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from accelerate.commands.config.config_args import ClusterConfig
from conftest import fresh
from PIL import Image
from test_modeling import tokenizer

ROOT = Path(__file__).parents[1]
COMMON = ["--max_steps", "4", "--save_strategy", "no", "--report_to", "none", "--use_cpu", "--disable_tqdm", "true"]


def run(script, *words, cwd, launcher=(sys.executable,)):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(cwd / "home")}
    command = [*launcher, str(ROOT / "examples" / script), *words, *COMMON]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def on_two_processes(name):
    """What starts a script under one of our configurations of accelerate."""
    config = ROOT / "examples" / "accelerate_configs" / f"{name}.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    return [*launch, "--num_processes", "2", "--main_process_port", "0"]


@pytest.fixture
def image_folder(tmp_path):
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for name in ("cat", "dog", "ship"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "data"


@pytest.fixture
def text_folder(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "intent": datasets.ClassLabel(names=["a", "b", "c", "d", "e"]),
            "domain": datasets.ClassLabel(names=["one", "two"]),
        }
    )
    for split in ("train", "test"):
        rows = {
            "text": [f"w{index % 5} w{index % 7} w3" for index in range(40)],
            "intent": [index % 5 for index in range(40)],
            "domain": [int(index % 5 > 2) for index in range(40)],
        }
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}-0.parquet")
    return folder


@pytest.mark.slow
def test_image_example(image_folder, tmp_path):
    words = ["--dataset", str(image_folder), "--output_dir", "out", "--modules", "cat+ship", "dog+cat"]
    table = run("train_image_classification.py", *words, "--hidden_size", "32", "--layers", "1", cwd=tmp_path)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [module["labels"] for module in results["modules"]] == [["cat", "ship"], ["dog", "cat"]]
    assert results["command"][:2] == ["python", "examples/train_image_classification.py"]
    assert "cat,ship" in table
    assert (tmp_path / "out" / "modules" / "dog+cat" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_image_example_on_two_processes(name, image_folder, tmp_path):
    words = ["--dataset", str(image_folder), "--output_dir", "out", "--modules", "cat+ship", "--bf16", "true"]
    words += ["--hidden_size", "32", "--layers", "2", "--activation_checkpointing", "true"]
    table = run("train_image_classification.py", *words, cwd=tmp_path, launcher=on_two_processes(name))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["modules"][0]["samples"] == 12
    assert table.count("cat,ship") == 1
    report = json.loads((tmp_path / "out" / "config.json").read_text())
    assert report["training"]["processes"] == 2


def test_the_accelerate_configurations_are_read():
    for file in sorted((ROOT / "examples" / "accelerate_configs").iterdir()):
        config = ClusterConfig.from_yaml_file(yaml_file=str(file))
        assert config.mixed_precision == "bf16"
        assert config.num_processes == 8 * config.num_machines
    assert config.fsdp_config["fsdp_version"] == 2
    assert config.fsdp_config["fsdp_cpu_ram_efficient_loading"] is False


@pytest.mark.slow
def test_text_example_on_two_processes(text_folder, tmp_path):
    model = fresh("bert")
    model.save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    words = ["--dataset", str(text_folder), "--model", "bert", "--label_column", "intent", "--group_column", "domain"]
    run(
        "train_text_classification.py",
        *words, "--output_dir", "out", "--modules", "two", "--remove_unused_columns", "true",
        cwd=tmp_path, launcher=on_two_processes("ddp"),
    )  # fmt: skip
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["modules"][0]["labels"] == ["d", "e"]
    assert results["modules"][0]["groups"] == ["two"]
    assert results["modules"][0]["samples"] == 16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["training"]["processes"] == 2


@pytest.mark.slow
def test_text_example(text_folder, tmp_path):
    fresh("bert").save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    words = ["--dataset", str(text_folder), "--model", "bert", "--label_column", "intent", "--group_column", "domain"]
    run("train_text_classification.py", *words, "--output_dir", "out", "--modules", "one", cwd=tmp_path)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["modules"][0]["groups"] == ["one"]


def test_train_command_and_evaluate_command(text_folder, tmp_path, capsys, monkeypatch):
    from nemo_hf.cli.main import main

    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    fresh("bert").save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    data = ["--dataset", str(text_folder), "--label_column", "intent", "--input_column", "text"]
    words = ["train", *data, "--model", str(tmp_path / "bert"), "--output_dir", str(tmp_path / "parent"), *COMMON]
    assert main([*words, "--nemo_config", '{"group_column": "domain"}']) == 0
    config = json.loads((tmp_path / "parent" / "config.json").read_text())
    assert config["nemo_config"]["group_column"] == "domain"
    assert config["training"]["command"].startswith("nemo-hf train --dataset")
    assert "eval_accuracy" in json.loads((tmp_path / "parent" / "report.json").read_text())["metrics"]
    capsys.readouterr()
    output = tmp_path / "reports.json"
    words = ["evaluate", *data, "--parent", str(tmp_path / "parent"), "--labels", "one", "a+e", "--output", str(output)]
    assert main(words) == 0
    reports = json.loads(output.read_text())
    assert [report["labels"] for report in reports] == [["a", "b", "c"], ["a", "e"]]
    assert "a,b,c" in capsys.readouterr().out


def test_examples_are_short():
    for script in ("train_image_classification.py", "train_text_classification.py"):
        assert len((ROOT / "examples" / script).read_text().splitlines()) <= 120


def test_the_custom_model_comes_apart(tmp_path):
    printed = run("custom_model.py", "--output_dir", str(tmp_path / "out"), cwd=tmp_path)
    assert '"query": "body.*.asks"' in printed
    assert "'body.0.back:ffn': 'dense'" in printed
    assert "['0', '1'] cut on load" in printed
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("model", "objective", "dataset", "column"),
    [
        ("simcnn", "ours", "cifar10", "img"),
        ("rescnn", "plain", "cifar10", "img"),
        ("resnet18", "moda", "cifar10", "img"),
        ("vgg16", "nemo", "svhn", "image"),
    ],
)
def test_the_papers_models_are_trained_on_local_files(model, objective, dataset, column, tmp_path):
    generator = np.random.default_rng(0)
    features = datasets.Features({column: datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog", "ship"])})
    for split, count in (("train", 40), ("test", 12)):
        pictures = [Image.fromarray(pixels) for pixels in generator.integers(0, 255, (count, 32, 32, 3), np.uint8)]
        rows = {column: pictures, "label": [index % 3 for index in range(count)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}-00000.parquet")
    words = ["--model", model, "--objective", objective, "--width", "4", "--output_dir", "out"]
    words += ["--dataset", dataset, "--data", str(tmp_path)]
    out = run("paper/train.py", *words, "--modules", "cat+dog", "--learning_rate", "1e-3", cwd=tmp_path)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert 0 <= results["metrics"]["eval_accuracy"] <= 1
    assert len(results["modules"]) == (objective != "plain")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert ("cat,dog" in out) == (objective != "plain")
