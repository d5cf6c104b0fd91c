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
from PIL import Image
from stage import write_stage

EXAMPLES = Path(__file__).parents[1] / "examples"
COMMON = ["--max_steps", "4", "--save_strategy", "no", "--report_to", "none", "--use_cpu", "--disable_tqdm", "true"]


def run(script, words, cwd, launcher=(sys.executable,)):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(cwd / "home")}
    command = [*launcher, str(EXAMPLES / script), *words.split(), *COMMON]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def of_out(cwd, name):
    return json.loads((cwd / "out" / name).read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "launch"), [("image", None), ("image", "fsdp2"), ("text", None), ("text", "ddp")])
def test_training_examples(kind, launch, tmp_path):
    write_stage(tmp_path)
    if kind == "image":
        words = "--output_dir out --modules cat+ship dog+cat --dataset org/animals --hidden_size 32 --layers 2"
    else:
        words = "--output_dir out --modules vehicles car+dog --dataset org/texts --model google-bert/bert-base-uncased"
        words += " --label_column intent --group_column domain"
    launcher = [sys.executable]
    if launch is not None:
        more = {"image": "--bf16 true --activation_checkpointing true", "text": "--remove_unused_columns true"}
        words = f"{words} {more[kind]}"
        config = EXAMPLES / "accelerate_configs" / f"{launch}.yaml"
        launcher += ["-m", "accelerate.commands.launch", f"--config_file={config}", "--num_processes=2"]
        launcher += ["--main_process_port=0"]
    table = run(f"train_{kind}_classification.py", words, tmp_path, launcher)
    results = of_out(tmp_path, "results.json")
    expected = {"image": [["cat", "ship"], ["dog", "cat"]], "text": [["car", "ship"], ["car", "dog"]]}[kind]
    assert [module["labels"] for module in results["modules"]] == expected
    assert results["modules"][0]["samples"] == {"image": 4, "text": 16}[kind]
    assert results["command"][:2] == ["python", f"examples/train_{kind}_classification.py"]
    assert table.count(",".join(expected[0])) == 1
    assert of_out(tmp_path, "config.json")["training"]["processes"] == (1 if launch is None else 2)


def test_the_accelerate_configurations_are_read():
    for file in sorted((EXAMPLES / "accelerate_configs").iterdir()):
        config = ClusterConfig.from_yaml_file(yaml_file=str(file))
        assert config.mixed_precision == "bf16"
        assert config.num_processes == 8 * config.num_machines
    assert config.fsdp_config["fsdp_version"] == 2
    assert config.fsdp_config["fsdp_cpu_ram_efficient_loading"] is False


@pytest.mark.slow
def test_the_custom_model_comes_apart(tmp_path):
    printed = run("custom_model.py", "--output_dir out", tmp_path)
    assert '"query": "body.*.asks"' in printed
    assert "'body.0.back:ffn': 'dense'" in printed
    assert "['0', '1'] cut on load" in printed
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "objective", "dataset"),
    [("simcnn", "ours", "cifar10"), ("rescnn", "plain", "cifar10"), ("resnet18", "moda", "svhn")],
)
def test_the_papers_models_are_trained_on_local_files(model, objective, dataset, tmp_path):
    generator, column = np.random.default_rng(0), {"cifar10": "img", "svhn": "image"}[dataset]
    features = datasets.Features({column: datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog", "ship"])})
    for split, count in (("train", 40), ("test", 12)):
        pictures = [Image.fromarray(pixels) for pixels in generator.integers(0, 255, (count, 32, 32, 3), np.uint8)]
        rows = {column: pictures, "label": [index % 3 for index in range(count)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}-00000.parquet")
    words = f"--model {model} --objective {objective} --width 4 --output_dir out --dataset {dataset} --data {tmp_path}"
    table = run("paper/train.py", f"{words} --modules cat+dog --learning_rate 1e-3", tmp_path)
    results = of_out(tmp_path, "results.json")
    assert 0 <= results["metrics"]["eval_accuracy"] <= 1
    assert len(results["modules"]) == (objective != "plain")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert ("cat,dog" in table) == (objective != "plain")


@pytest.mark.slow
def test_tags_of_words_come_from_rules_and_modules_are_measured(tmp_path):
    write_stage(tmp_path)
    texts = ["w1 w2 on march 3rd", "pay 20 dollars to w4", "w7 w3 tomorrow at 5 pm"]
    for split, count in (("train", 24), ("test", 6)):
        rows = {"text": [texts[index % 3] for index in range(count)]}
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "queries" / f"{split}-0.parquet")
    words = "--output_dir out --dataset queries --model google-bert/bert-base-uncased --samples 8 --retention 0.5"
    printed = run("token_classification.py", words, tmp_path)
    results = of_out(tmp_path, "results.json")
    assert [row["tags"] for row in results["test"]] == [15, 5, 5, 5, 15, 15]
    assert all(row["words"] == 32 and row["entities"] == 6 for row in results["test"])
    assert printed.count("entity F1") == 6
    assert {folder.name for folder in (tmp_path / "out" / "modules").iterdir()} == {"5-tags", "15-tags"}
