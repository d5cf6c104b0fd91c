"""Cards say what they are handed, whatever characters the labels have."""

import copy
import dataclasses
import importlib
import shlex
from pathlib import Path

import pytest
import yaml
from conftest import image_samples

from nemo_hf import extract_module, make_parent
from nemo_hf.config import NeMoConfig
from nemo_hf.hub.model_card import CardFacts, render_model_card
from nemo_hf.hub.publish import CardOptions, card_facts
from nemo_hf_cli import build_parser

REPORT = {
    "megabytes": 1.5, "parent_megabytes": 6.0, "macs": 1_111, "parent_macs": 4_444, "weight_retention_rate": 0.5,
    "latency_ms": {"1": 2.0, "8": 4.0}, "parent_latency_ms": {"1": 3.0, "8": 9.0}, "latency_note": None,
    "device": "cpu (X, 1 thread)", "input_shape": [3, 16, 16], "accuracy": 0.9876, "parent_restricted_accuracy": 0.9912,
    "controls": {"random": 0.5432, "other": None, "empty": 0.3333}, "samples": 123, "seed": 7,
    "rejection": {"auroc": 0.8765, "accepted": 0.951, "rejected": 0.777},
}  # fmt: skip
TRAINING = {
    "arguments": {"num_train_epochs": 3.0, "learning_rate": 0.001, "per_device_train_batch_size": 16, "seed": 5},
    "processes": 2, "samples": 10_000, "base_model": "org/base", "versions": {"torch": "9.9"},
    "command": "nemo-hf train --model org/base",
}  # fmt: skip
COMMON = {
    "task": "image-classification", "base_class": "ViTForImageClassification", "parameters": 1_234_567,
    "megabytes": 1.5, "license": "mit", "datasets": ["org/data"], "measured_on": "org/data", "split": "test",
    "tags": ["small"], "training": TRAINING, "nemo_config": {"retention_target": 0.1}, "versions": {"torch": "9.9"},
    "equivalence": {"status": "verified", "difference": 1.5e-7, "tolerance": 1e-5, "effect": 0.5, "samples": 4},
    "picture": "neurons.png",
}  # fmt: skip
OF_MODULE = {"retained_neurons": 0.25, "threshold": 0.5, "round_to": 8, "rejection": {"threshold": 0.4321}}
MODULE = CardFacts(
    "me/cat-dog", role="module", labels=["cat", "dog"], label_ids=[3, 5], parent="me/parent", report=REPORT,
    **OF_MODULE, **COMMON,
)  # fmt: skip
PARENT = CardFacts(
    "me/parent", role="parent", labels=["cat", "dog", "car"], base_model="org/base", generator_parameters=76_543,
    groups=[{"name": "pets", "labels": ["cat", "dog"]}, {"name": "others", "labels": ["car"]}],
    report={"metrics": {"eval_accuracy": 0.9321, "eval_coupling": 0.4, "eval_samples": 7000, "eval_runtime": 8.5}},
    **COMMON,
)  # fmt: skip


def card(base=MODULE, **changes):
    return render_model_card(dataclasses.replace(base, **changes))


def header(text):
    return yaml.safe_load(text.split("---\n")[1])


@pytest.mark.parametrize(("base", "origin", "accuracy"), [(MODULE, "me/parent", 0.9876), (PARENT, "org/base", 0.9321)])
def test_the_header_finds_the_card(base, origin, accuracy):
    found = header(card(base))
    (result,) = found.pop("model-index")[0]["results"]
    assert found == {
        "library_name": "nemo-hf",
        "pipeline_tag": "image-classification",
        "base_model": origin,
        "license": "mit",
        "datasets": ["org/data"],
        "tags": ["nemo-hf", base.role, "small"],
    }
    assert result["metrics"][0]["value"] == accuracy
    assert (result["dataset"]["type"], result["dataset"]["split"]) == ("org/data", "test")
    assert "model-index" not in header(card(base, measured_on=None))


def missing(text, words):
    return [word for word in words if word not in text]


def test_numbers_are_those_handed_in():
    shown = ("1,234,567", "0.9876", "0.9912", "0.5432", "0.3333", "25.0%", "50.0%", "1,111 (parent: 4,444)", " 123 ")
    shown += ("| 2.0 | 4.0 |", "| 3.0 | 9.0 |", "0.8765", "0.4321", "95.1%", "77.7%", "1.5e-07", "9.9")
    assert missing(card(), shown) == []
    assert "other label groups" not in card()
    shown = ("76,543", "0.9321", "0.4000", "| 7,000 |", "pets: cat, dog", "seed 5", "2 processes", "10,000 sampl")
    assert missing(card(PARENT), shown) == []
    assert "8.5" not in card(PARENT)
    text = card(report={**REPORT, "metrics": {"f1": 0.91, "n": 3}, "parent_metrics": {"f1": 0.92, "n": 4}})
    assert "| `f1` | 0.9100 | 0.9200 |\n| `n` | 3 | 4 |" in text
    assert text.count("## Results") == 1


NOTE = {"latency_note": "Left out, since runs disagree: batch size 1."}
SOME = {"latency_ms": {"8": 4.0}, "parent_latency_ms": {"8": 9.0}}
FORMATS = {"device": "cpu", "latency_ms": {"module": {"1": 1.25, "8": 5.5}, "onnx": {"8": 0.5}}}


@pytest.mark.parametrize(
    ("changes", "rows", "noted"),
    [
        ({}, [r"on cpu \(X, 1 thread\)", "lower quartile"], False),
        ({**SOME, **NOTE}, ["| this module | 4.0 |"], True),
        ({"latency_ms": {}, "parent_latency_ms": {}, **NOTE}, [], True),
        ({"formats": FORMATS}, ["| this module | 1.2 | 5.5 |", "onnxruntime (`export_onnx`) | - | 0.5 |"], False),
        ({"formats": {**FORMATS, "latency_ms": {"module": {}}, **NOTE}}, ["| 2.0 | 4.0 |"], False),
    ],
)
def test_latencies_have_a_note_where_some_are_left_out(changes, rows, noted):
    text = card(report={**REPORT, **changes})
    assert missing(text, rows) == []
    assert ("Milliseconds" in text) == bool(rows)
    assert (r"Latencies: left out, since runs disagree\: batch size 1" in text) == noted


def test_nothing_is_said_that_was_not_handed_in():
    bare = CardFacts("me/x", "text-classification", "module", "BertForSequenceClassification", ["a", "b"], 10, 0.1)
    text = render_model_card(bare)
    assert set(header(text)) == {"library_name", "tags", "pipeline_tag"}
    assert "Trained with torch 9.9.\nSaved with torch 10.0." in card(versions={"torch": "10.0"})
    absent = ("## Results", "Milliseconds", "## Inputs of other labels", "Saved with", "seed", "![")
    assert missing(text, absent) == list(absent)


def test_commands_and_options_read_back():
    line = next(line for line in card().splitlines() if line.startswith("nemo-hf cut"))
    assert shlex.split(line) == [
        *("nemo-hf", "cut", "me/parent", "--labels", "cat", "dog", "--threshold", "0.5"),
        *("--round-to", "8", "--output-dir", "cat-dog"),
    ]
    options = {
        "retention_target": 0.1,
        "sites": [{"kind": "attention", "query": "q", "key": "k", "value": "v", "output": "o"}],
    }
    code = card(nemo_config=options).split("```python\n")[2].split("```")[0]
    auto = type("Auto", (), {"from_pretrained": lambda *given: given})
    names = {"NeMoTrainer": dict, "AutoModelForImageClassification": auto, "NeMoConfig": NeMoConfig}
    found = eval(code.replace(", ...)", ")"), {**names, "TrainingArguments": lambda directory, **given: given})
    assert found["args"] == TRAINING["arguments"]
    assert found["nemo_config"] == NeMoConfig(**options)


NASTY = ["a|b", "---", "[x](http://y)", "# h", "line\nbreak", "q: 'z'", "<b>", "été ✓", "```", "{{ x }}", "", " ", "\0"]


@pytest.mark.parametrize("label", [*NASTY, "'; rm -rf"])
def test_labels_of_any_characters_break_nothing(label):
    text = card(labels=[label, "dog"])
    assert header(text) == header(card())
    assert len(text.split("## Labels")[1].split("##")[0].strip().splitlines()) == 2
    fence = "`" * max(3, label.count("`") + 1)
    assert text.count(fence) == card().count("```")
    words = shlex.split(text.split(f"{fence}bash\n")[1].split(fence)[0])
    assert words[words.index("--labels") + 1] in ({label} if label.isprintable() and label.strip("- ") else {"3"})
    parent = card(PARENT, labels=[label, "dog"], groups=[{"name": label, "labels": [label, "dog"]}])
    assert header(parent) == header(card(PARENT))
    code = parent.split("labels = ")[1].splitlines()[0]
    assert eval(code) == [label, "dog"]
    part = {**dataclasses.asdict(MODULE), "labels": [label, "dog"], "parent": label or "x", "scale": 1.0, "bias": 0.0}
    table = card(role="composed", parts=[part])
    assert table.split("## Modules inside")[1].split("Logits")[0].strip().count("\n") == 2


def test_committed_cards_are_those_of_the_facts(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    cards = importlib.import_module("model_cards")
    rendered = cards.rendered()
    assert list(rendered) == [cards.PARENT, cards.MODULE]
    for folder, text in rendered.items():
        assert (cards.CARDS / folder / "README.md").read_text(encoding="utf-8") == text
        assert (cards.CARDS / folder / "neurons.png").is_file()


def test_a_parent_whose_modules_need_samples_says_so(vit):
    parents = [make_parent(copy.deepcopy(vit), NeMoConfig(plain_ratio=ratio)) for ratio in (1.0, 0.5)]
    texts = [render_model_card(card_facts(parent, "me/p", CardOptions(), None)) for parent in parents]
    words = ["are reconstructed on samples", "from_pretrained('me/p', labels=labels, calibration=samples)"]
    assert [missing(text, words) for text in texts] == [[], words]
    assert missing(card(PARENT), ["trained so that each label group uses few"]) == []
    assert "few neurons of its own" not in card(PARENT, needs_samples=True)


def test_a_module_that_was_cut_on_samples_says_how(vit):
    data = image_samples()
    asked = {"retention": 0.5, "refine_epochs": 1, "drop_parts": 1}
    module = extract_module(vit, ["cat", "dog"], data, **asked, show_progress=False)
    text = render_model_card(
        card_facts(module, "me/m", CardOptions(parent="me/plain", datasets=("org/animals",)), None)
    )
    assert missing(text, ["| Weights kept | ", "chosen on 16 calibration samples", "| Reconstruction | layers"]) == []
    line = next(line for line in text.splitlines() if line.startswith("nemo-hf cut"))
    options = build_parser().parse_args(shlex.split(line)[1:])
    assert (options.model, options.labels, options.dataset) == ("me/plain", ["cat", "dog"], "org/animals")
    assert (options.retention, options.refine_epochs, options.no_reconstruct) == ([0.5], 1, False)
    assert options.drop_parts == 1
    asked = {"reconstruct": False, "scores": "magnitude", "stream": 0.75}
    raw = extract_module(vit, ["cat", "dog"], data, **asked, show_progress=False)
    text = render_model_card(card_facts(raw, "me/m", CardOptions(), None))
    line = "nemo-hf cut MODEL --labels cat dog --dataset DATA --retention 0.2 --scores magnitude"
    assert f"{line} --no-reconstruct --stream 0.75" in text
    assert "Reconstruction" not in text


@pytest.mark.parametrize(
    ("report", "kind"), [({"tokens": 9, "token_rows": 5}, "shared"), ({"tokens": 5, "tokens_before": 9}, "calibration")]
)
def test_the_command_of_a_cut_names_the_kind_of_vocabulary(vit, report, kind):
    module = extract_module(vit, [1, 0], image_samples(8), 0.2, show_progress=False)
    module.config.extraction = {**module.config.extraction, "vocabulary": report}
    text = render_model_card(card_facts(module, "me/cut", CardOptions(), None))
    words = shlex.split(next(line for line in text.splitlines() if line.startswith("nemo-hf cut")))
    assert build_parser().parse_args(words[1:]).vocabulary == kind
