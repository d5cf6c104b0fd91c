"""Cards say what they are handed, whatever characters the labels have."""

import dataclasses
import importlib
import shlex
from pathlib import Path

import pytest
import yaml

from nemo_hf.config import NeMoConfig
from nemo_hf.hub.model_card import KEPT_BELOW, CardFacts, license_of, own_text, render_model_card

ROOT = Path(__file__).parents[1]
REPORT = {
    "megabytes": 1.5,
    "parent_megabytes": 6.0,
    "macs": 1_111,
    "parent_macs": 4_444,
    "neuron_retention_rate": 0.25,
    "weight_retention_rate": 0.5,
    "latency_ms": {"1": 2.0, "8": 4.0},
    "parent_latency_ms": {"1": 3.0, "8": 9.0},
    "device": "cpu",
    "input_shape": [3, 16, 16],
    "accuracy": 0.9876,
    "parent_restricted_accuracy": 0.9912,
    "controls": {"random": 0.5432, "other": None, "empty": 0.3333},
    "samples": 123,
    "seed": 7,
    "rejection": {"auroc": 0.8765, "accepted": 0.951, "rejected": 0.777},
}
TRAINING = {
    "arguments": {"num_train_epochs": 3.0, "learning_rate": 0.001, "per_device_train_batch_size": 16, "seed": 5},
    "processes": 2,
    "samples": 10_000,
    "base_model": "org/base",
    "versions": {"torch": "9.9"},
    "command": "nemo-hf train --model org/base",
}
MODULE = CardFacts(
    repo_id="me/cat-dog",
    task="image-classification",
    role="module",
    base_class="ViTForImageClassification",
    labels=["cat", "dog"],
    label_ids=[3, 5],
    parameters=1_234_567,
    megabytes=1.5,
    parent="me/parent",
    license="mit",
    datasets=["org/data"],
    measured_on="org/data",
    split="test",
    tags=["small"],
    retained_neurons=0.25,
    threshold=0.5,
    round_to=8,
    equivalence={"status": "verified", "difference": 1.5e-7, "tolerance": 1e-5, "effect": 0.5, "samples": 4},
    rejection={"threshold": 0.4321},
    report=REPORT,
    training=TRAINING,
    nemo_config={"retention_target": 0.1},
    versions={"torch": "9.9"},
    picture="neurons.png",
)
PARENT = dataclasses.replace(
    MODULE,
    repo_id="me/parent",
    role="parent",
    parent=None,
    base_model="org/base",
    retained_neurons=None,
    threshold=None,
    round_to=None,
    rejection=None,
    generator_parameters=76_543,
    groups=[{"name": "pets", "labels": ["cat", "dog"]}, {"name": "others", "labels": ["car"]}],
    labels=["cat", "dog", "car"],
    report={"metrics": {"eval_accuracy": 0.9321, "eval_coupling": 0.4, "eval_runtime": 8.5}},
)


def card(base=MODULE, **changes):
    return render_model_card(dataclasses.replace(base, **changes))


def header(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_the_header_finds_the_card():
    found = header(card())
    assert {name: found[name] for name in ("library_name", "pipeline_tag", "base_model", "license", "datasets")} == {
        "library_name": "nemo-hf",
        "pipeline_tag": "image-classification",
        "base_model": "me/parent",
        "license": "mit",
        "datasets": ["org/data"],
    }
    assert found["tags"] == ["nemo-hf", "module", "small"]
    (result,) = found["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == 0.9876
    assert (result["dataset"]["type"], result["dataset"]["split"]) == ("org/data", "test")
    assert header(card(PARENT))["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.9321
    assert header(card(PARENT))["base_model"] == "org/base"


def test_numbers_are_those_handed_in():
    text = card()
    shown = ("1,234,567", "0.9876", "0.9912", "0.5432", "0.3333", "25.0%", "50.0%", "1,111 (parent: 4,444)", " 123 ")
    shown += ("| 2.0 | 4.0 |", "| 3.0 | 9.0 |", "on cpu", "0.8765", "0.4321", "95.1 %", "77.7 %", "1.5e-07", "9.9")
    for number in shown:
        assert number in text, number
    assert "the neurons of as many other groups" not in text
    text = card(PARENT)
    for number in ("76,543", "0.9321", "0.4000", "pets: cat, dog", "seed 5", "2 processes", "10,000 samples"):
        assert number in text, number
    assert "8.5" not in text


def test_nothing_is_said_that_was_not_handed_in():
    bare = CardFacts("me/x", "text-classification", "module", "BertForSequenceClassification", ["a", "b"], 10, 0.1)
    text = render_model_card(bare)
    assert set(header(text)) == {"library_name", "tags", "pipeline_tag"}
    for absent in ("## Results", "Milliseconds", "## Inputs of other labels", "Versions", "seed", "!["):
        assert absent not in text, absent
    assert "model-index" not in header(card(measured_on=None))


def test_what_was_trained_further_says_so():
    assert "without retraining" in card()
    tuned = card(is_tuned=True)
    assert "without" not in tuned.split("## Labels")[0]
    assert "trained further since" in tuned
    assert "without fine-tuning" not in tuned.split("## How it was made")[0]


def test_versions_of_training_and_of_writing_are_told_apart():
    text = card(versions={"torch": "10.0"})
    assert "Trained with torch 9.9." in text
    assert "Written and tried with torch 10.0." in text


def test_the_extraction_command_reads_back_as_its_words():
    line = next(line for line in card().splitlines() if line.startswith("nemo-hf extract"))
    assert shlex.split(line) == [
        *("nemo-hf", "extract", "--parent", "me/parent", "--labels", "cat", "dog", "--threshold", "0.5"),
        *("--round_to", "8", "--output_dir", "cat-dog"),
    ]


def test_the_training_reads_back_as_options():
    code = card().split("```python\n")[2].split("```")[0]
    names = {
        "NeMoTrainer": lambda **given: given,
        "AutoModelForImageClassification": type("Auto", (), {"from_pretrained": lambda *given: given}),
        "TrainingArguments": lambda directory, **given: given,
        "NeMoConfig": NeMoConfig,
    }
    found = eval(code.replace(", ...)", ")"), names)
    assert found["args"] == TRAINING["arguments"]
    assert found["nemo_config"] == NeMoConfig(retention_target=0.1)


def test_text_of_the_owner_is_found():
    text = card()
    assert text.endswith(f"{KEPT_BELOW}\n")
    assert own_text(text) == ""
    assert own_text(f"{text}\nMine.\n") == "Mine."
    assert own_text("---\nlicense: mit\n---\n# A card of another kind\n") == "# A card of another kind"
    assert license_of("---\nlicense: mit\n---\n# X") == "mit"
    assert license_of("# X") is None


NASTY = [
    "a|b",
    "---",
    "[x](http://y)",
    "# h",
    "line\nbreak",
    "q: 'z'",
    "<b>",
    "été ✓",
    "```",
    "{{ x }}",
    "",
    " ",
    "\0",
    "'; rm -rf",
]


@pytest.mark.parametrize("label", NASTY)
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


def test_stored_cards_are_those_of_the_facts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    cards = importlib.import_module("model_cards")
    rendered = cards.rendered()
    assert len(rendered) > 3
    for folder, text in rendered.items():
        assert (cards.CARDS / folder / "README.md").read_text(encoding="utf-8") == text
        if "neurons.png" in text:
            assert (cards.CARDS / folder / "neurons.png").is_file()
