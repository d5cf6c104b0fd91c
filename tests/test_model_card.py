"""Cards say what they are handed, whatever characters the labels have."""

import pytest
import yaml

from nemo_hf.model_card import render_model_card

REPORT = {
    "megabytes": 1.5,
    "parent_megabytes": 6.0,
    "neuron_retention_rate": 0.25,
    "weight_retention_rate": 0.5,
    "latency_ms": {"1": 2.0, "8": 4.0},
    "parent_latency_ms": {"1": 3.0, "8": 9.0},
    "device": "cpu",
    "accuracy": 0.9876,
    "parent_restricted_accuracy": 0.9912,
    "controls": {"random": 0.5432, "other": None, "empty": 0.3333},
    "samples": 123,
}


def card(labels=("cat", "dog"), report=REPORT, role="module"):
    return render_model_card(
        "me/cat-dog", "image-classification", role, labels, "ViTForImageClassification", 1_234_567, report, "me/parent"
    )


def header(text):
    return yaml.safe_load(text.split("---")[1])


def test_the_header_finds_the_card():
    found = header(card())
    assert found["library_name"] == "nemo-hf"
    assert found["pipeline_tag"] == "image-classification"
    assert found["base_model"] == "me/parent"
    assert "nemo-hf" in found["tags"]


def test_numbers_are_those_handed_in():
    text = card()
    for shown in ("1,234,567", "0.9876", "0.9912", "0.5432", "0.3333", "25.0%", "50.0%", "1: 2.0, 8: 4.0", "123"):
        assert shown in text
    assert "another group" not in text


def test_a_card_without_a_report_has_no_results():
    text = card(report=None, role="parent")
    assert "## Results" not in text
    assert "comes apart into modules" in text


@pytest.mark.parametrize("label", ["a|b", "---", "[x](http://y)", "# h", "line\nbreak", "q: 'z'", "<b>", "été ✓"])
def test_labels_of_any_characters_break_nothing(label):
    text = card(labels=[label, "dog"])
    assert header(text)["library_name"] == "nemo-hf"
    assert len(text.split("## Labels")[1].split("##")[0].strip().splitlines()) == 2
