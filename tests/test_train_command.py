"""The command `train`: its help, what it starts from, what it limits, and what it prints."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import datasets
import pytest
import torch
from conftest import LABELS, generated, image_samples, parent_of
from stage import stage as stage
from stage import template as template
from torch.utils.data import DataLoader
from training_helpers import arguments, varied_parent
from transformers import AutoTokenizer, Trainer, TrainerCallback
from transformers.integrations.integration_utils import rewrite_logs

import nemo_hf_cli
from nemo_hf import NeMoTrainer
from nemo_hf.cli import demo, main, training
from nemo_hf.cli.data import spread_samples
from nemo_hf.cli.dispatch import COMMANDS
from nemo_hf.evaluation.groups import group_means, measure_groups
from nemo_hf.evaluation.report import other_groups
from nemo_hf.models.calibrated_cut import VOCABULARIES
from nemo_hf.models.cut_source import Score
from nemo_hf.models.extraction import make_plan
from nemo_hf.pruning.budget import Cost
from nemo_hf_cli import EVALUATION_BATCH, LEARNING_RATES, STARTING_VALUES, build_parser

BERT, VIT = "google-bert/bert-base-uncased", "google/vit-base-patch16-224-in21k"
QUIET = "--use_cpu --report-to none --disable-tqdm true --save-strategy no --output-dir out"
TEXTS = f"train --model {BERT} --dataset org/texts --label-column intent {QUIET}"
IMAGES = f"train --model {VIT} --dataset org/animals {QUIET}"
HEAVY = ("torch", "transformers", "datasets", "numpy", "nemo_hf")


@pytest.mark.parametrize("words", [["--help"], [], ["cut"], *([command, "--help"] for command in COMMANDS)])
def test_help_and_mistakes_need_no_heavy_library(words):
    code = f"""
import sys, nemo_hf_cli
try:
    nemo_hf_cli.main({words})
except SystemExit:
    pass
sys.exit(str([name for name in {HEAVY} if name in sys.modules] or "") or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          env={"PYTHONPATH": str(nemo_hf_cli.__file__).rpartition("/")[0]})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "nemo-hf" in done.stdout + done.stderr


def test_choices_and_defaults_of_options_are_those_of_the_library():
    assert get_args(Cost) == nemo_hf_cli.COSTS
    assert get_args(Score) == nemo_hf_cli.SCORES
    assert nemo_hf_cli.VOCABULARIES == VOCABULARIES
    assert build_parser().parse_args(["demo", "--output-dir", "m"]).epochs == demo.EPOCHS


def test_help_of_train_shows_its_own_options_alone_or_last(capsys):
    shown = {}
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit, match="0"):
            main(["train", option])
        shown[option] = capsys.readouterr().out
    assert "--label-groups" in shown["--help"]
    assert "--weight_decay" not in shown["--help"]
    assert shown["--help-all"].endswith(shown["--help"])
    assert "--weight_decay" in shown["--help-all"]


class Stopped(Exception):
    pass


@pytest.mark.parametrize("words", [TEXTS, IMAGES])
@pytest.mark.parametrize("given", [{}, {"learning_rate": 3e-3}, {"num_train_epochs": 2.0, "weight_decay": 0.5}])
def test_training_starts_from_values_that_suit_unless_others_are_given(words, given, stage, monkeypatch):
    seen = {}

    def stop(model, arguments, *_, **__):
        seen.update(vars(arguments))
        raise Stopped

    monkeypatch.setattr(training, "NeMoTrainer", stop)
    with pytest.raises(Stopped):
        main([*words.split(), *(f"--{name}={value}" for name, value in given.items())])
    task = "text-classification" if words == TEXTS else "image-classification"
    start = {"per_device_eval_batch_size": EVALUATION_BATCH, "learning_rate": LEARNING_RATES[0], "weight_decay": 0.0}
    expected = {**STARTING_VALUES[task], **start, **given}
    assert {name: seen[name] for name in expected} == expected


def test_the_documented_values_are_those_that_training_starts_from():
    text = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ")[1:] for line in text.splitlines() if re.match(r"\| (texts|images),", line)]
    values = [[own["num_train_epochs"], own["per_device_train_batch_size"]] for own in STARTING_VALUES.values()]
    assert [[float(cell) for cell in row] for row in rows] == [[*own, *LEARNING_RATES] for own in values]
    assert f"up to {nemo_hf_cli.SMALL // 10**6}M parameters" in text
    assert f"per_device_eval_batch_size={EVALUATION_BATCH}" in text


@pytest.mark.parametrize(
    ("more", "relevance", "evaluated"),
    [
        ("--max-steps 1 --per-device-train-batch-size 4", 10, 10),  # two of each label
        ("--max-steps 1 --per-device-train-batch-size 20", 20, 20),  # as many as are trained on
        ("--max-steps 1 --per-device-train-batch-size 4 --max-eval-samples 15", 10, 15),
        ("--max-steps 2 --per-device-train-batch-size 20", 40, 40),  # an epoch
        ("--num-train-epochs 1 --max-relevance-samples 7", 7, 40),
    ],
)
def test_relevance_and_evaluation_of_a_dry_run_are_short(more, relevance, evaluated, stage, capsys, monkeypatch):
    counted = []
    compute = "nemo_hf.training.trainer.compute_relevance"
    monkeypatch.setattr(compute, lambda parent, batches, *_, **__: counted.append(len(batches.dataset)))
    assert main([*TEXTS.split(), *more.split()]) == 0
    rows = capsys.readouterr().out.split("label group")[1].splitlines()[2:-1]
    assert [row.split()[0] for row in rows] == LABELS
    assert (counted, sum(int(row.split()[1]) for row in rows)) == ([relevance], evaluated)


@pytest.mark.parametrize("most", [1, 4, 7, 11, 30, None])
def test_samples_are_spread_over_the_labels(most):
    labels = [0] * 12 + [1] * 3 + [2] * 5
    data = datasets.Dataset.from_dict({"labels": labels, "row": range(20)})
    chosen = spread_samples(data, most)
    counts = [chosen["labels"][:].count(label) for label in range(3)]
    assert len(chosen) == min(20, most or 20)
    assert list(chosen["row"]) == sorted(chosen["row"])
    for own, total in zip(counts, (12, 3, 5), strict=True):
        assert own == total or own >= max(counts) - 1


@pytest.mark.parametrize(("most", "counts"), [(4, [3, 1]), (12, [5, 7]), (18, [5, 13]), (30, [5, 15])])
def test_samples_of_the_labels_asked_for_come_first_and_a_quarter_is_of_others(most, counts):
    data = datasets.Dataset.from_dict({"labels": [0] * 12 + [1] * 3 + [2] * 5, "row": range(20)})
    chosen = spread_samples(data, most, [2])["labels"][:]
    assert [chosen.count(2), len(chosen) - chosen.count(2)] == counts


def test_max_length_truncates_and_is_saved_with_the_tokenizer(stage, capsys):
    assert main([*TEXTS.split(), "--max-steps", "1", "--max-length", "2"]) == 0
    assert len(AutoTokenizer.from_pretrained("out")("w1 w2 w3", truncation=True)["input_ids"]) == 2
    words = "evaluate --parent out --dataset org/texts --label-column intent --labels cat+dog --quick --max-length"
    assert main([*words.split(), "1"]) == 0
    capsys.readouterr()
    for line, message in [
        (f"{TEXTS} --max-length 41", "Got --max-length 41; expected at most 40 tokens"),
        (f"{IMAGES} --max-length 9", "Got --max-length 9 with images; expected texts"),
    ]:
        assert main(line.split()) == 2
        assert message in capsys.readouterr().err


def test_label_groups_are_options(stage, capsys):
    groups = {"pets": ["cat", "dog"], "vehicles": ["car", "ship"], "rest": ["frog"]}
    words = [f"{name}={'+'.join(labels)}" for name, labels in groups.items()]
    assert main([*TEXTS.split(), "--max-steps", "1", "--label-groups", *words]) == 0
    assert json.loads((stage / "out" / "config.json").read_text())["nemo_config"]["label_groups"] == groups
    assert [row.split()[0] for row in capsys.readouterr().out.splitlines()[-4:-1]] == list(groups)
    for more, message in [
        ("--label-groups pets", "Got 'pets' in --label-groups; expected NAME=LABEL+LABEL"),
        ("--label-groups pets=cta", "Did you mean 'cat'?"),
        ("--label-groups pets=cat --group-column domain", "Got both label_groups and group_column"),
        ("--group-column dom", "Got no column 'dom'"),
    ]:
        assert main([*TEXTS.split(), *more.split()]) == 2
        assert message in capsys.readouterr().err


def test_the_command_that_is_shown_cuts_a_module_on_its_own_samples(stage, capsys):
    assert main([*TEXTS.split(), "--max-steps", "1"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("nemo-hf cut "))
    assert main(line.replace("GROUP", "cat").split()[1:]) == 0
    assert "cut on 8 samples" in capsys.readouterr().out


def test_the_plain_model_is_trained_alike_beside_the_parent(stage, capsys):
    assert main([*TEXTS.split(), "--max-steps", "4", "--learning-rate", "0.01", "--baseline"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    found = {}

    class Plain(Trainer):
        def __init__(self, *args, nemo_config, relevance_dataset, **kwargs):
            super().__init__(*args, **kwargs)

        def evaluate(self, *args, **kwargs):
            found.update(super().evaluate(*args, **kwargs))
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "NeMoTrainer", Plain)
        with pytest.raises(Stopped):
            main([*TEXTS.split(), "--max-steps", "4", "--learning-rate", "0.01"])
    assert last.endswith(f"plain model trained alike {found['eval_accuracy']:.4f}")


@pytest.mark.parametrize("groups", [None, {"pets": ["cat", "dog"], "boats": ["ship"], "rest": ["car", "frog"]}])
@torch.no_grad()
def test_groups_are_measured_as_one_by_one(groups):
    parent, samples = parent_of("vit", label_groups=groups), image_samples(40)
    found = measure_groups(parent, DataLoader(samples, batch_size=15), show_progress=False)
    assert list(found) == list(parent.config.groups)

    def naive(own, ids, **masks):
        choices = ids if groups else list(range(5))
        answers = [parent(sample["pixel_values"][None], **masks).logits[0, choices].argmax() for sample in own]
        right = [choices[int(answer)] == sample["labels"] for answer, sample in zip(answers, own, strict=True)]
        return sum(right) / len(right)

    for name, ids in parent.config.groups.items():
        own = [sample for sample in samples if sample["labels"] in ids]
        plan, other = make_plan(parent, ids), make_plan(parent, other_groups(parent, [name], 0))
        module = naive(own, ids, static_masks=plan.static)
        expected = {"samples": len(own), "neurons": plan.retained, "accuracy": module, "parent": naive(own, ids)}
        expected["specificity"] = module - naive(own, ids, static_masks=other.static)
        assert {key: found[name][key] for key in expected} == pytest.approx(expected)
        assert 0 < found[name]["weights"] < 1
    assert group_means(found)["neurons"] == pytest.approx(sum(g["neurons"] for g in found.values()) / len(found))


class Logged(TrainerCallback):
    def __init__(self):
        self.names = set()

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.names |= set(rewrite_logs(logs))


def test_trackers_get_all_that_only_this_trainer_logs_under_one_prefix(tmp_path):
    names = []
    for kind in (Trainer, NeMoTrainer):
        logged, samples = Logged(), image_samples(20)
        trainer = kind(varied_parent("vit"), arguments(tmp_path), train_dataset=samples, callbacks=[logged])
        trainer.train()
        if kind is NeMoTrainer:
            trainer.evaluate_modularity(samples)
        names.append(logged.names)
    own = {name.removeprefix("train/nemo/") for name in names[1] - names[0]}
    assert own >= {"loss_task", "loss_contrastive", "neuron_retention_rate", "dead_neuron_rate", "cohesion", "coupling"}
    assert [name for name in names[1] - names[0] if not name.startswith("train/nemo/")] == []


def test_every_progress_bar_has_a_name(tmp_path, capsys):
    args = arguments(tmp_path, disable_tqdm=False, eval_strategy="steps", eval_steps=1)
    data = {"train_dataset": image_samples(40), "eval_dataset": image_samples(20)}
    trainer = NeMoTrainer(varied_parent("vit"), args, nemo_config=generated(), **data)
    trainer.train()
    trainer.evaluate()
    states = re.split(r"[\r\n]", capsys.readouterr().err)
    assert {state.partition(":")[0] for state in states} >= {"Training", "Evaluation", "Relevance"}
    finished = [state for state in states if re.search(r"100%.* (\d+)/\1 \[", state)]
    assert [state for state in finished if not re.match(r"[A-Z][a-z ]+: ", state)] == []
