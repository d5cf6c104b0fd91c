"""Modules cut from plain models on calibration samples: what they keep and say, and what is refused."""

import copy
import functools

import datasets
import pytest
import torch
from conftest import (
    fresh,
    image_samples,
    logits_of,
    parent_of,
    randomize,
    text_samples,
    tiny,
    tokenizer,
)
from cutting_helpers import (
    assert_same_weights,
    assert_untouched,
    batches_for,
    batches_of,
    cut,
    cut_everything,
    distance,
    everything_about,
    words,
)
from training_helpers import batch_of
from transformers import AutoTokenizer

from nemo_hf import NeMoForSequenceClassification, extract_module
from nemo_hf.models import calibrated_cut, held_out_reconstruction

STAGES = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"}


def labelled(family="bert", count=40, size=8, labels=None):
    samples = (text_samples if family == "bert" else image_samples)(count)
    for index, sample in enumerate(samples):
        sample["labels"] = sample["labels"] if labels is None else labels[index]
    return [batch_of(samples[start : start + size]) for start in range(0, count, size)]


def test_the_same_call_gives_the_same_module_whatever_was_drawn_before():
    modules = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = fresh("bert")
        modules.append(cut_everything(model, processing_class=tokenizer()))
    assert_same_weights(*modules)
    first, second = (copy.deepcopy(module.config.extraction) for module in modules)
    assert first.pop("seconds") > 0
    assert second.pop("seconds") > 0
    assert first == second


@functools.cache
def wide_module(family):
    return cut(fresh(family), batches_for(family))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", ["bert", "vit"])
def test_a_module_has_the_precision_of_its_source(family, dtype):
    model = fresh(family).to(dtype)
    before = everything_about(model)
    batches = [
        {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
        for batch in batches_for(family)
    ]
    module = cut(model, batches)
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert_untouched(model, before)
    wide = wide_module(family)
    for batch, other in zip(batches, batches_for(family), strict=True):
        torch.testing.assert_close(logits_of(module, **batch).float(), logits_of(wide, **other), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "around", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)  # fmt: skip
def test_the_module_is_the_same_in_any_mode_of_torch(around):
    expected = wide_module("bert")
    with around():
        module = cut(copy.deepcopy(fresh("bert")), batches_for("bert"))
    assert_same_weights(module, expected)
    assert not any(tensor.is_inference() for tensor in module.state_dict().values())


def test_results_of_earlier_calls_that_a_model_holds_do_no_harm():
    """LeViT keeps its attention biases, with gradients unless these are off."""
    sizes = {"hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1], "key_dim": [8, 8, 8]}
    model = randomize(tiny("LevitForImageClassification", image_size=64, **sizes))
    images = [{"pixel_values": torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(0))}]
    expected = cut(copy.deepcopy(model), images)
    assert model(**images[0]).logits.requires_grad
    assert_same_weights(cut(model, images), expected)


def test_results_stay_with_the_weights_that_they_are_of():
    for family in ("bert", "resnet"):
        model = fresh("bert") if family == "bert" else randomize(tiny("ResNetForImageClassification", **STAGES))
        module = cut(model, batches_for("bert" if family == "bert" else "vit"))
        assert module.config.equivalence["status"] == "verified"
        assert not module.config.is_tuned
        with torch.no_grad():
            next(module.parameters()).add_(0.1)
        module.drop_stale_results()
        assert module.config.equivalence is None
        assert module.config.is_tuned


def test_a_reconstruction_that_makes_it_worse_is_taken_back(monkeypatch, caplog):
    def harm(self, ridge, **options):
        for parameter in self.module.parameters():
            parameter.data += 1
        return {}

    model, batches = fresh("bert"), batches_for("bert")
    raw = cut(model, batches, reconstruct=False)
    monkeypatch.setattr(held_out_reconstruction.Reconstruction, "run", harm)
    module = cut(model, batches)
    assert_same_weights(module, raw)
    assert "would differ" in module.config.extraction["refused"]
    assert module.config.equivalence["status"] == "verified"
    assert "not reconstructed" in caplog.text


def test_what_a_module_says_comes_back_from_its_files(tmp_path):
    module = cut_everything(fresh("bert"), processing_class=tokenizer())
    module.save_pretrained(tmp_path / "module")
    loaded = NeMoForSequenceClassification.from_pretrained(tmp_path / "module")
    assert loaded.config.extraction == module.config.extraction
    assert loaded.config.rejection == module.config.rejection is not None
    batch = batches_of(text_samples(8))[0]
    assert torch.equal(logits_of(copy.deepcopy(loaded), **batch), logits_of(copy.deepcopy(module), **batch))
    found = module.config.extraction
    assert found["samples"] == 16
    assert found["bytes"] < found["source_bytes"]
    assert found["refine_epochs"] == 1


def test_labels_choose_the_samples_and_others_calibrate_rejection(caplog):
    model = fresh("bert")
    module = cut(model, labelled(), labels=(3, 1))
    own = [{k: v for k, v in s.items() if k != "labels"} for s in text_samples(40) if s["labels"] in (3, 1)]
    assert module.config.extraction["samples"] == len(own)
    assert module.config.rejection
    without = cut(model, labelled(), labels=(3, 1), rejection=False)
    assert without.config.rejection is None
    alone = cut(model, batches_of(own, 8), labels=(3, 1))
    assert alone.config.rejection is None
    for batch in batches_for("bert", seed=1):
        expected = logits_of(module, **batch)[:, :2]  # the last one is for what is rejected
        torch.testing.assert_close(logits_of(alone, **batch), expected, rtol=1e-3, atol=1e-3)
    one_hot = torch.nn.functional.one_hot(torch.tensor([s["labels"] for s in text_samples(40)]), 5).float()
    assert_same_weights(cut(model, labelled(labels=[*one_hot]), labels=(3, 1)), module)


def test_samples_of_several_labels_are_own_if_they_have_one_of_the_module():
    model = fresh("bert")
    model.config.problem_type = "multi_label_classification"
    several = torch.rand(40, 5, generator=torch.Generator().manual_seed(0)) < 0.3
    module = cut(model, labelled(labels=[*several.float()]), labels=(3, 1))
    assert module.config.extraction["samples"] == several[:, [3, 1]].any(-1).sum()
    assert module.config.problem_type == "multi_label_classification"


def test_samples_of_other_labels_only_are_said_to_be(caplog):
    module = cut(fresh("bert"), labelled(), labels=(4,))
    assert "other labels only" not in caplog.text
    others = [sample for sample in text_samples(40) if sample["labels"] != 4]
    module = cut(fresh("bert"), [batch_of(others)], labels=(4,))
    assert caplog.text.count("Pass samples") == 1
    assert module.config.extraction["samples"] == len(others)
    assert module.config.rejection is None


def test_labels_that_the_model_does_not_answer_are_warned_about(caplog):
    model, batches = fresh("bert"), batches_for("bert", 40, size=40)
    ids = logits_of(model, **batches[0]).argmax(-1)
    cut(model, [{**batches[0], "labels": ids}], labels=range(5))
    assert "as they are labelled" not in caplog.text
    cut(model, [{**batches[0], "labels": (ids + 1) % 5}], labels=range(5))
    assert "The model answers only 0 of 40 calibration samples as they are labelled" in caplog.text


def test_a_column_of_labels_by_another_name_is_warned_about(caplog):
    names = list(fresh("bert").config.id2label.values())
    rows = {"text": [row["text"] for row in words(20)], "intent": [row["label"] for row in words(20)]}
    data = datasets.Dataset.from_dict(rows).cast_column("intent", datasets.ClassLabel(names=names))
    cut(fresh("bert"), data.rename_column("intent", "label"), processing_class=tokenizer())
    assert "is not read" not in caplog.text
    module = cut(fresh("bert"), data, processing_class=tokenizer())
    assert "rename_column('intent', 'label')" in caplog.text
    assert module.config.extraction["samples"] == 20


@pytest.mark.parametrize("vocabulary", [None, "shared", "calibration"])
def test_samples_of_other_labels_may_be_longer_than_the_positions_that_stay(vocabulary, tmp_path):
    rows = [{**row, "text": " ".join(row["text"].split()[:4])} for row in words(60)]
    rows = [{**row, "text": row["text"] + " w5 w7" * 8} if row["label"] in (0, 2) else row for row in rows]
    module = cut(fresh("bert"), rows, processing_class=tokenizer(), vocabulary=vocabulary, max_positions=12)
    assert module.config.rejection
    module.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.model_max_length == 12
    inputs = loaded([row["text"] for row in rows], truncation=True, padding=True, return_tensors="pt")
    assert logits_of(module, **{name: inputs[name] for name in ("input_ids", "attention_mask")}).isfinite().all()


def test_a_module_that_keeps_all_neurons_has_nothing_to_warn_of(caplog):
    model = fresh("bert")
    module = cut(model, batches_for("bert", 2), retention=1.0)
    assert caplog.text == ""
    assert distance(module, model, batches_for("bert", seed=3)) < 1e-6


def answered(size, count=60):
    """Images in batches, labelled with what the model answers among three of its labels: it is always right."""
    model, images = fresh("vit"), torch.stack([sample["pixel_values"] for sample in image_samples(count)])
    labels = logits_of(model, pixel_values=images)[:, [0, 1, 2]].argmax(-1)
    parts = zip(images.split(size), labels.split(size), strict=True)
    return model, [{"pixel_values": pixels, "labels": own} for pixels, own in parts]


@pytest.mark.parametrize("max_loss", [0, 12.0, 100])
def test_the_smallest_module_within_a_loss(max_loss):
    model, batches = answered(20)
    options = {"labels": (0, 1, 2), "reconstruct": False}
    module = cut(model, batches, None, max_loss=max_loss, validation=batches, **options)

    def loss(module):
        found = [logits_of(module, pixel_values=b["pixel_values"]).argmax(-1) == b["labels"] for b in batches]
        return 100 * (1 - torch.cat(found).double().mean().item())

    assert loss(module) <= max_loss + 1e-9
    weights = module.config.extraction["weights"]
    assert module.config.extraction["retention"] is None
    if max_loss == 100:
        assert weights < 0.1
    else:  # a step below it more is lost
        assert loss(cut(model, batches, 0.9 * weights, **options)) > max_loss


@pytest.mark.parametrize("size", [20, 8, 1])
def test_a_third_of_the_samples_is_held_back_to_measure_the_loss(size, monkeypatch):
    monkeypatch.setattr(calibrated_cut, "HALVINGS", 1)
    model, batches = answered(size, 30)
    module = cut(model, batches, None, labels=(0, 1, 2), max_loss=50, reconstruct=False)
    assert module.config.extraction["samples"] == 20


@pytest.mark.parametrize("scores", ["relevance", "activity"])
def test_a_trained_parent_is_cut_from_what_it_computes(scores):
    parent = parent_of("bert", static_evaluation=True)
    batches = batches_for("bert")
    module = cut(parent, batches, 1.0, scores=scores, reconstruct=False)
    for batch in batches:
        torch.testing.assert_close(
            logits_of(module, **batch), logits_of(parent, **batch)[:, [3, 1]], rtol=1e-4, atol=1e-5
        )
    small, raw = (cut(parent, batches, 0.3, scores=scores, reconstruct=done) for done in (True, False))
    assert distance(small, parent, batches) < distance(raw, parent, batches)


def bad_numbers(model):
    model.classifier.weight.data[0, 0] = float("nan")
    return model


BAD = {
    "nothing": (lambda: {"calibration": None}, "Got no calibration samples.*Pass calibration="),
    "empty": (lambda: {"calibration": []}, "Got no calibration samples; expected some"),
    "unknown": (lambda: {"labels": ["shipp"]}, r"Did you mean 'ship'\?"),
    "no label": (lambda: {"labels": []}, "empty set of labels"),
    **{
        f"retention {value}": (lambda value=value: {"retention": value}, r"Got retention=.*in \(0, 1\]")
        for value in (0, -0.1, 1.01, float("nan"), "0.2", True, [0.2, 2])
    },
    "no retention": (lambda: {"retention": []}, "Got no retention"),
    "both": (lambda: {"max_loss": 1.0}, "Leave one out"),
    "loss": (lambda: {"retention": None, "max_loss": 101}, "points of accuracy from 0 to 100"),
    "no labels": (lambda: {"retention": None, "max_loss": 1.0}, "Got max_loss without labelled samples"),
    "epochs": (lambda: {"refine_epochs": -1}, "whole number of passes"),
    "vocabulary": (lambda: {"vocabulary": "small"}, "expected one of"),
    "scores": (lambda: {"scores": "wanda"}, "Got scores='wanda'"),
    "relevance": (lambda: {"scores": "relevance"}, "Take scores='activity'"),
    "samples": (lambda: {"max_samples": 0}, "Got max_samples=0"),
    "NaN": (lambda: {"model": bad_numbers(fresh("bert"))}, "NaN|finite"),
    "meta": (lambda: {"model": fresh("bert").to("meta")}, "meta"),
    "module": (lambda: {"model": parent_of("bert").extract_module([0, 1])}, "module"),
    "groups": (lambda: {"label_groups": {"pets": ["cat", "dog"]}}, "car"),
    "positions": (lambda: {"max_positions": 3}, "processor|tokenizer"),
    "fewer positions": (lambda: {"max_positions": 3, "processing_class": tokenizer()}, "expected from 12, the"),
    "vocabulary of images": (
        lambda: {"model": fresh("vit"), "calibration": batches_for("vit"), "vocabulary": "shared"},
        "no token ids",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_what_to_do(name):
    change, message = BAD[name]
    options = {
        "model": fresh("bert"),
        "labels": [0, 1],
        "calibration": batches_for("bert"),
        "retention": 0.3,
        **change(),
    }
    with pytest.raises((ValueError, TypeError), match=message):
        extract_module(**options, show_progress=False)


@pytest.mark.parametrize(("family", "length"), [("llama", 16), ("bert", 3), ("bert", 1000), ("bert", 16.0)])
@pytest.mark.parametrize("make", [fresh, parent_of])
def test_positions_that_can_not_be_shortened_are_refused_before_the_cut(make, family, length, monkeypatch):
    monkeypatch.setattr("nemo_hf.models.calibrated_cut.prepare_source", None)
    match = (
        r"Got max_positions=16 for a Llama.* tables \[\]; exp" if family == "llama" else r"Got max_pos.*; expected from"
    )
    with pytest.raises(ValueError, match=match):
        cut(make(family), batches_for(family), processing_class=tokenizer(), max_positions=length)


def test_numbers_in_samples_must_be_finite():
    images = batches_for("vit")
    images[1]["pixel_values"][3, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"Got NaN .*'pixel_values'.*\[19\]"):
        cut(fresh("vit"), images)


def test_too_few_samples_make_the_ridge_grow_and_say_so(caplog):
    model = fresh("bert")
    few = cut(model, batches_for("bert", 2))
    assert few.config.extraction["scarce_layers"] > 0
    assert "Got few calibration samples" in caplog.text
    assert "Pass more" in caplog.text
    one = cut(model, batches_for("bert", 1))
    for module in (few, one):
        assert all(bool(p.isfinite().all()) for p in module.parameters())
    fresh_inputs = batches_for("bert", 64, seed=3)
    raw = cut(model, batches_for("bert", 2), reconstruct=False)
    assert distance(few, model, fresh_inputs) < 2 * distance(raw, model, fresh_inputs)


@pytest.mark.parametrize(
    "options",
    [{"scores": "fisher"}, {"refine_epochs": 1}, {"vocabulary": "shared"}, {"max_positions": 8}, {"validation": []}],
)
def test_options_that_need_samples_are_refused_without_them(options):
    for cut_from in (parent_of("bert"), fresh("bert")):
        with pytest.raises(ValueError, match="Got no calibration samples"):
            extract_module(cut_from, [0, 1], show_progress=False, **options)
