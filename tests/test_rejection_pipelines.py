"""Rejection that clients see without code of ours: pipelines, and whatever takes the largest logit."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import (
    generated,
    image_processor,
    image_samples,
    parent_of,
    randomize,
    randomize_relevance,
    tiny,
    tokenizer,
)
from PIL import Image
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    Wav2Vec2FeatureExtractor,
    pipeline,
)

from nemo_hf import calibrate_rejection, compose, evaluate_module, make_parent
from nemo_hf.hub.model_card import render_model_card
from nemo_hf.hub.publish import CardOptions, card_facts
from nemo_hf.models.rejection import energy, with_rejected
from nemo_hf.models.rejection_calibration import calibrate_on_samples

OWN, OTHER = ["dog", "ship"], "none of these"
SEVERAL = "multi_label_classification"
WAV2VEC2 = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "conv_dim": [16, 16],
    "conv_kernel": [4, 4], "conv_stride": [4, 4], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16,
}  # fmt: skip


def batches(samples=None):
    return DataLoader(image_samples(40) if samples is None else samples, batch_size=10)


def set_fit(module, energies, threshold=0.6):
    """Calibrates a module as if samples of low energy were others."""
    weight = 2 / energies.std().item()
    module.config.rejection = {"weight": weight, "bias": -weight * energies.mean().item(), "threshold": threshold}
    module.config.set_rejected_label(OTHER)
    return module


@pytest.fixture(scope="module")
def calibrated():
    """A vision module that rejects some of its inputs, and these inputs."""
    module = parent_of("vit", relevance_threshold=0.5).extract_module(OWN)
    pixels = torch.stack([sample["pixel_values"] for sample in image_samples(40)])
    with torch.no_grad():
        return set_fit(module, energy(module(pixels).logits)), pixels


@pytest.fixture
def module(calibrated):
    return copy.deepcopy(calibrated[0])


@pytest.fixture
def pixels(calibrated):
    return calibrated[1]


@torch.no_grad()
def logits(model, inputs):
    return model(inputs).logits


@pytest.mark.parametrize("threshold", [1e-4, 0.3, 0.5, 0.999])
@pytest.mark.parametrize("labels", [1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_largest_logit_is_the_rejected_one_just_where_the_score_is_over_the_threshold(threshold, labels, dtype):
    found = (3 * torch.randn(500, labels, generator=torch.Generator().manual_seed(labels))).to(dtype)
    fit = {"weight": 1.5, "bias": -4.0, "threshold": threshold}
    scores = torch.sigmoid(-(fit["weight"] * found.double().logsumexp(-1) + fit["bias"]))
    joined = with_rejected(found, fit).double()
    assert torch.equal(joined[:, :-1], found.double())
    assert torch.equal(joined.argmax(-1) == labels, scores > threshold)
    best, odds = found.double().softmax(-1).amax(-1), threshold / (1 - threshold)
    expected = scores / (1 - scores) / odds * best  # the odds of being rejected that docs/rejection.md says
    assert torch.allclose(joined.softmax(-1)[:, -1], expected / (1 + expected), rtol=1e-3, atol=1e-4)
    several = with_rejected(found, fit, True).double()
    scores = torch.sigmoid(-(fit["weight"] * torch.nn.functional.softplus(found.double()).sum(-1) + fit["bias"]))
    assert torch.equal(several[:, -1].sigmoid() > 0.5, scores > threshold)


@pytest.mark.parametrize(("threshold", "is_rejected"), [(0.0, True), (1.0, False), (1.0001, False)])
def test_a_threshold_that_nothing_or_all_passes_gives_finite_logits(threshold, is_rejected):
    joined = with_rejected(torch.randn(20, 3), {"weight": 2.0, "bias": 0.5, "threshold": threshold})
    assert bool(joined.isfinite().all())
    assert bool(((joined.argmax(-1) == 3) == is_rejected).all())


def image_case(folder, calibrated):
    module = copy.deepcopy(calibrated[0])
    module.attach_processor(image_processor())
    module.save_pretrained(folder)
    images = [Image.fromarray(image) for image in np.random.default_rng(0).integers(0, 255, (12, 16, 16, 3), "uint8")]
    return "image-classification", module, images, lambda run, image: run.image_processor(image, return_tensors="pt")


def text_case(folder, _):
    module = parent_of("bert", relevance_threshold=0.5).extract_module(OWN)
    module.attach_processor(tokenizer())
    module.save_pretrained(folder)
    texts = [f"w{index} w{7 * index % 100} w{3 * index}" for index in range(12)]
    return "text-classification", module, texts, lambda run, text: run.tokenizer(text, return_tensors="pt")


def audio_case(folder, _):
    plain = randomize(tiny("Wav2Vec2ForSequenceClassification", **WAV2VEC2))
    parent = make_parent(plain, generated(relevance_threshold=0.5)).eval()
    randomize_relevance(parent)
    module = parent.extract_module(OWN)
    module.attach_processor(Wav2Vec2FeatureExtractor())
    module.save_pretrained(folder)
    waves = list(np.random.default_rng(0).normal(size=(12, 800)).astype("float32") * np.arange(1, 13)[:, None])
    return (
        "audio-classification",
        module,
        waves,
        lambda run, wave: run.feature_extractor(wave, sampling_rate=16000, return_tensors="pt"),
    )


@pytest.mark.parametrize("case", [text_case, image_case, audio_case])
@pytest.mark.parametrize("several", [False, True])
def test_pipelines_answer_with_the_rejected_label(case, several, calibrated, tmp_path):
    task, module, inputs, processed = case(tmp_path, calibrated)
    run = pipeline(task, model=str(tmp_path), device="cpu")
    if several:
        module.config.problem_type = SEVERAL
    module.config.rejection = None
    with torch.no_grad():
        found = torch.cat([module(**processed(run, each)).logits for each in inputs])
    set_fit(module, energy(found, several)).save_pretrained(tmp_path)
    run = pipeline(task, model=str(tmp_path), device="cpu")
    fit = module.config.rejection
    is_rejected = (torch.sigmoid(-(fit["weight"] * energy(found, several) + fit["bias"])) > 0.6).tolist()
    assert 0 < sum(is_rejected) < len(inputs)
    answers = run(inputs, top_k=3)
    for answer, rejected, own in zip(answers, is_rejected, found, strict=True):
        scores = {entry["label"]: entry["score"] for entry in answer}
        assert set(scores) == {*OWN, OTHER}
        if several:
            assert (scores[OTHER] > 0.5) == rejected
            assert [scores[name] for name in OWN] == pytest.approx(own.sigmoid().tolist(), abs=1e-5)
        else:
            assert (answer[0]["label"] == OTHER) == rejected
            assert sum(scores.values()) == pytest.approx(1, abs=1e-5)
            shares = torch.tensor([scores[name] for name in OWN])
            assert (shares / shares.sum()).tolist() == pytest.approx(own.softmax(-1).tolist(), abs=1e-4)
    best = [answer[0] for answer in run(inputs, top_k=1)]
    assert [entry["label"] for entry in best] == [answer[0]["label"] for answer in answers]
    if task != "audio-classification":
        again = run(inputs, top_k=3, batch_size=4)
        assert [[e["label"] for e in a] for a in again] == [[e["label"] for e in a] for a in answers]
    without = pipeline(task, model=str(tmp_path), device="cpu", model_kwargs={"rejected_label": None})
    assert {entry["label"] for entry in without(inputs[0], top_k=2)} == set(OWN)
    renamed = pipeline(task, model=str(tmp_path), device="cpu", model_kwargs={"rejected_label": "?"})
    assert {entry["label"] for entry in renamed(inputs[0], top_k=3)} == {*OWN, "?"}


def test_a_module_of_one_label_says_yes_or_no(pixels, tmp_path):
    module = parent_of("vit", relevance_threshold=0.5).extract_module(["car"])
    set_fit(module, energy(logits(module, pixels))).attach_processor(image_processor())
    module.save_pretrained(tmp_path)
    run = pipeline("image-classification", model=str(tmp_path), device="cpu")
    image = Image.fromarray(np.zeros((16, 16, 3), "uint8"))
    assert sorted(entry["label"] for entry in run(image)) == ["car", OTHER]
    assert sum(entry["score"] for entry in run(image)) == pytest.approx(1)


def test_files_hold_own_labels_and_loading_chooses_the_name(module, pixels, tmp_path):
    names = {0: "dog", 1: "ship"}
    assert (module.config.id2label, module.config.num_labels) == ({**names, 2: OTHER}, 3)
    assert (module.config.label2id, module.num_labels) == ({"dog": 0, "ship": 1, OTHER: 2}, 2)
    module.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["id2label"], saved["rejected_label"]) == ({"0": "dog", "1": "ship"}, OTHER)
    load = AutoModelForImageClassification.from_pretrained
    assert torch.equal(logits(load(tmp_path), pixels), logits(module, pixels))
    for label, shown in (("oos", {**names, 2: "oos"}), (None, names)):
        for loaded in (
            load(tmp_path, rejected_label=label),
            type(module).from_pretrained(tmp_path, rejected_label=label),
        ):
            assert (loaded.config.id2label, loaded.config.rejected_label) == (shown, label)
            assert torch.equal(logits(loaded, pixels), logits(module, pixels)[:, : len(shown)])
    loaded = load(tmp_path, id2label={0: "Dog", 1: "Ship"})
    assert loaded.config.id2label == {0: "Dog", 1: "Ship", 2: OTHER}
    loaded.config.id2label = {0: "D", 1: "S", 2: "X"}  # both as they are shown
    loaded.config.label2id = {"D": 0, "S": 1, "X": 2}
    loaded.save_pretrained(tmp_path)
    assert load(tmp_path).config.label2id == {"D": 0, "S": 1, "X": 2}


def test_what_counts_labels_counts_the_modules_own(module, pixels, tmp_path):
    bare = copy.deepcopy(module)
    bare.config.rejection = None
    own = logits(bare, pixels)
    assert own.shape == (40, 2)
    parent, labels = parent_of("vit", relevance_threshold=0.5), torch.arange(40) % 5
    data = [{"pixel_values": pixels, "labels": labels}]
    reports = [evaluate_module(parent, OWN, data, each, show_progress=False) for each in (bare, module)]
    assert reports[0].accuracy == reports[1].accuracy
    assert reports[0].rejection["auroc"] == reports[1].rejection["auroc"]
    composed = compose([module, parent.extract_module(["car"])])
    assert torch.equal(logits(composed, pixels)[:, :2], own)
    assert composed.config.num_labels == 3
    targets = labels[:2] * 0
    loss = torch.nn.functional.cross_entropy(own[:2], targets)
    assert module(pixels[:2], labels=targets).loss.item() == pytest.approx(loss.item(), rel=1e-5)
    for model, words in ((module, f"answers with one of its labels, or `{OTHER}`"), (bare, "always answers with one")):
        assert words in render_model_card(card_facts(model, "me/module", CardOptions(), None))
    module.save_plain(tmp_path / "plain")
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "plain")
    assert plain.config.id2label == {0: "dog", 1: "ship"}
    assert torch.allclose(logits(plain, pixels), own, atol=1e-4)
    refit = calibrate_rejection(module, data, show_progress=False, rejected_label=None)
    assert refit == calibrate_rejection(bare, data, show_progress=False)
    assert (module.config.num_labels, bare.config.num_labels) == (2, 3)


def test_training_sees_own_labels_and_ends_the_rejection(module, pixels, tmp_path):
    assert module.train()(pixels[:2]).logits.shape == (2, 2)
    own = [{**s, "labels": [1, 3].index(s["labels"])} for s in image_samples(40) if s["labels"] in (1, 3)]
    args = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
    Trainer(module, args, train_dataset=own).train()
    assert logits(module.eval(), pixels).shape == (40, 2)
    assert module.config.id2label == {0: "dog", 1: "ship"}
    calibrate_rejection(module, batches(), show_progress=False)
    assert logits(module, pixels).shape == (40, 3)


@pytest.mark.parametrize(
    ("label", "words"),
    [("dog", "another name"), ("", "another name"), ("a\nb", "another name"), (3, "another name")],
)
def test_names_that_can_not_be_are_refused(module, label, words, tmp_path):
    before = dict(module.config.rejection)
    with pytest.raises(ValueError, match=words):
        calibrate_rejection(module, batches(), show_progress=False, rejected_label=label)
    assert (module.config.rejection, module.config.rejected_label) == (before, OTHER)
    module.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words):
        AutoModelForImageClassification.from_pretrained(tmp_path, rejected_label=label)
    module.config.rejection = None
    module.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"without calibrated rejection; expected a calibrated module\. Call nemo_hf"):
        AutoModelForImageClassification.from_pretrained(tmp_path, rejected_label="oos")


def test_calibration_samples_calibrate_where_other_labels_are_at_hand(pixels):
    parent = parent_of("vit", relevance_threshold=0.5)
    module, labels = parent.extract_module(OWN), torch.arange(40) % 5
    expected = calibrate_rejection(
        copy.deepcopy(module), [{"pixel_values": pixels, "labels": labels}], show_progress=False
    )
    pairs = [({"pixel_values": pixels[part]}, labels[part]) for part in (slice(25), slice(25, None))]
    bare = [(inputs, None) for inputs, _ in pairs]
    only = [({"pixel_values": pixels[labels == 1]}, labels[labels == 1])]
    for samples in (bare, only, [(only[0][0], only[0][1] * 0)], []):
        assert calibrate_on_samples(module, samples) is None
    assert (module.config.rejection, module.config.rejected_label) == (None, None)
    assert calibrate_on_samples(module, pairs) == module.config.rejection == pytest.approx(expected, rel=1e-4)
    assert module.config.rejected_label == OTHER
