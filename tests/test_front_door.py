"""The ways to cut on calibration samples: of a model, a parent, a trainer, a saved model; all give one module."""

import inspect

import pytest
import torch
from conftest import LABELS, fresh, generated, image_processor, image_samples, logits_of, randomize_relevance, tokenizer
from transformers import AutoModelForImageClassification, TrainingArguments

import nemo_hf
from nemo_hf.models.configuration import CUT_OPTIONS, MODEL_OPTIONS

OPTIONS = {"retention": 0.5, "show_progress": False}
PIXELS = torch.stack([sample["pixel_values"] for sample in image_samples(6, seed=5)])
TEXTS = [f"w{index % 7} w{index % 11} w{index % 5}" for index in range(24)]


@pytest.fixture
def parent(vit):
    parent = nemo_hf.make_parent(vit, generated())
    randomize_relevance(parent)
    parent.attach_processor(image_processor())
    return parent


def same(module, other):
    """Whether two modules are one: widths, labels and answers."""
    assert module.config.sites == other.config.sites
    assert module.config.names == other.config.names
    assert torch.allclose(logits_of(module, pixel_values=PIXELS), logits_of(other, pixel_values=PIXELS), atol=1e-5)
    return True


def test_the_options_that_pass_an_auto_class_are_those_of_the_function():
    parameters = inspect.signature(nemo_hf.extract_module).parameters
    assert {"model", *MODEL_OPTIONS, *CUT_OPTIONS} - {"threshold", "round_to", "verify"} == set(parameters)


def test_parents_trainers_and_saved_parents_cut_as_the_function_does(parent, tmp_path):
    data = image_samples()
    expected = nemo_hf.extract_module(parent, ["cat", "dog"], data, **OPTIONS)
    assert same(parent.extract_module(["cat", "dog"], calibration=data, **OPTIONS), expected)
    parent.save_pretrained(tmp_path)
    for kind in (AutoModelForImageClassification, nemo_hf.NeMoForImageClassification):
        given = {"labels": ["cat", "dog"], "calibration": data, **OPTIONS}
        loaded = kind.from_pretrained(tmp_path, **given)
        assert same(loaded, expected)
        assert sorted(loaded.processor_files) == sorted(parent.processor_files)
        raw = kind.from_pretrained(tmp_path, **given, reconstruct=False, rejection=False)
        assert raw.config.extraction.keys().isdisjoint({"layers", "distance"})
    args = TrainingArguments(tmp_path / "out", use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = nemo_hf.NeMoTrainer(parent, args, train_dataset=data)
    assert same(trainer.extract_module(["cat", "dog"], retention=0.5), expected)
    assert same(trainer.extract_module(["cat", "dog"], data, 0.5), expected)
    assert same(trainer.extract_module(["cat", "dog"]), parent.extract_module(["cat", "dog"]))


def test_a_saved_plain_model_is_cut_with_its_tokenizer(tmp_path):
    model = fresh("bert")
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    expected = nemo_hf.extract_module(model, [3, "cat"], TEXTS, processing_class=tokenizer(), **OPTIONS)
    kind = nemo_hf.NeMoForSequenceClassification
    module = kind.from_pretrained(tmp_path, labels=[3, "cat"], calibration=TEXTS, vocabulary="calibration", **OPTIONS)
    assert module.config.names == {0: "ship", 1: "cat"}
    assert module.config.extraction["vocabulary"]["tokens"] < 120
    assert "tokenizer.json" in module.processor_files
    ids = {"input_ids": tokenizer()(TEXTS[:4], return_tensors="pt")["input_ids"]}
    module = kind.from_pretrained(tmp_path, labels=[3, "cat"], calibration=TEXTS, **OPTIONS)
    assert torch.allclose(logits_of(module, **ids), logits_of(expected, **ids), atol=1e-5)
    module.save_pretrained(tmp_path / "module")
    again = kind.from_pretrained(tmp_path / "module")
    assert torch.equal(logits_of(again, **ids), logits_of(module, **ids))
    assert again.config.extraction == module.config.extraction


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"retention": 0.5}, r"Got \['retention'\] without labels; expected labels"),
        ({"calibration": TEXTS, "threshold": 0.5}, r"\['calibration', 'threshold'\] without labels"),
        ({"labels": ["cat"], "retention": 0.5}, "Got no calibration samples; expected some hundreds"),
        ({"labels": ["cat"], "calibration": TEXTS, "threshold": 0.5}, r"Got \['threshold'\] beside calibration"),
        ({"labels": ["cat"], "calibration": TEXTS, "retention": [0.5, 0.2]}, r"Got retention=\[0.5, 0.2\]"),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused(given, message, tmp_path):
    fresh("bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        nemo_hf.NeMoForSequenceClassification.from_pretrained(tmp_path, **given)


def test_a_parent_takes_options_of_one_way_to_cut(parent):
    for given in ({"threshold": 0.5}, {"round_to": 8}, {"inputs": {"pixel_values": PIXELS}}):
        with pytest.raises(ValueError, match=rf"Got \['{next(iter(given))}'\] beside calibration samples"):
            parent.extract_module(LABELS[:2], calibration=image_samples(), **given)
    with pytest.raises(ValueError, match="Got no calibration samples"):
        parent.extract_module(LABELS[:2], cost="operations")
    with pytest.raises(TypeError, match="unexpected keyword argument 'retain'"):
        parent.extract_module(LABELS[:2], calibration=image_samples(), retain=0.2)
