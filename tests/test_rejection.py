"""Rejection scores: energy, its calibration, and how modules carry it."""

import math
import re

import pytest
import torch
from conftest import image_samples, parent_of
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

from nemo_hf import NeMoTrainer, calibrate_rejection, evaluate_module
from nemo_hf.models.rejection import energy, rejection_scores
from nemo_hf.models.rejection_calibration import auroc, fit_rejection, own_samples


def data(count=60, batch=16, labels=range(5)):
    return DataLoader([sample for sample in image_samples(count) if sample["labels"] in labels], batch_size=batch)


@pytest.fixture
def parent():
    return parent_of("vit", relevance_threshold=0.5)


@pytest.mark.parametrize("has_several", [False, True])
def test_energy_is_the_logarithm_of_a_sum(has_several):
    logits = torch.randn(7, 4) * 3
    terms = [[math.exp(value) for value in row] for row in logits.tolist()]
    naive = [sum(math.log1p(t) for t in row) if has_several else math.log(sum(row)) for row in terms]
    assert energy(logits, has_several).tolist() == pytest.approx(naive, rel=1e-5, abs=1e-5)


def test_auroc_counts_pairs():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (40,), generator=generator).float()  # with ties
    positive = torch.rand(40, generator=generator) < 0.4
    pairs = [(p > n) + (p == n) / 2 for p in scores[positive].tolist() for n in scores[~positive].tolist()]
    assert auroc(scores, positive) == pytest.approx(sum(pairs) / len(pairs))
    assert auroc(scores, torch.ones(40, dtype=torch.bool)) is None


@pytest.mark.parametrize(("accepted", "distance"), [(0.5, 2), (0.95, 2), (0.99, 100)])  # the last are separable
def test_the_threshold_accepts_the_share_that_was_asked_for(accepted, distance):
    own = torch.arange(400) < 150
    energies = torch.randn(400, generator=torch.Generator().manual_seed(0)) + distance * own
    fit = fit_rejection(energies, own, accepted)
    shares = (rejection_scores(energies, fit) <= fit["threshold"]).float()
    assert accepted <= shares[own].mean() < accepted + 1 / 150
    assert all(math.isfinite(value) for value in fit.values())
    assert fit["accepted"] == pytest.approx(shares[own].mean().item())
    assert fit["rejected"] == pytest.approx(1 - shares[~own].mean().item())


@pytest.mark.parametrize(
    ("energies", "sign"),
    [
        (torch.full((40,), 3.0), 0),
        (1000 + 1e-4 * torch.randn(40, generator=torch.Generator().manual_seed(0)), 0),  # equal but for rounding
        (torch.arange(40.0), -1),
        (torch.arange(40.0).flip(0), 1),
        (torch.where(torch.arange(40) < 20, -50.0, 50.0), -1),
    ],
    ids=["constant", "rounding", "own below", "own above", "own far below"],
)
def test_what_is_said_of_a_fit_is_what_its_scores_do(energies, sign):
    own = torch.arange(40) < 20
    fit = fit_rejection(energies, own, 0.9)
    assert (fit["weight"] > 0) - (fit["weight"] < 0) == sign
    assert all(math.isfinite(value) for value in fit.values())
    is_rejected = rejection_scores(energies, fit) > fit["threshold"]  # in float32, as modules score
    assert fit["accepted"] == pytest.approx(1 - is_rejected[own].float().mean().item())
    assert fit["rejected"] == pytest.approx(is_rejected[~own].float().mean().item())
    assert fit["accepted"] >= 0.9
    assert sign or fit["rejected"] == 0  # no weight: nothing is told apart


@pytest.mark.parametrize(("case", "auroc"), [("constant", "0.50"), ("wrong way round", "0.00")])
def test_a_module_that_tells_nothing_apart_gets_a_warning(parent, caplog, case, auroc):
    module, batches = parent.extract_module(["dog", "ship"]), list(data(20, 20))
    with torch.no_grad():
        if case == "constant":
            for parameter in module.parameters():
                parameter.zero_()
        else:
            order = energy(module(batches[0]["pixel_values"]).logits).argsort()
            batches[0]["labels"] = torch.full((20,), 1).index_fill(0, order[10:], 0)
    found = calibrate_rejection(module, batches, show_progress=False)
    message = rf"Got samples with the module's labels \[1, 3\] whose energies are no higher .*AUROC {auroc}.* Check the"
    assert [bool(re.match(message, text)) for text in caplog.messages] == [True]
    assert found == module.config.rejection
    assert found["weight"] <= 0
    caplog.clear()
    batches[0]["labels"] = torch.where(batches[0]["labels"] == 1, 0, 1)
    if case != "constant":
        assert calibrate_rejection(module, batches, show_progress=False)["weight"] > 0
        assert caplog.messages == []


def test_scores_are_calibrated_at_even_odds():
    own = torch.arange(40000) < 4000  # ten times as many others
    energies = 5 + 3 * (torch.randn(40000, generator=torch.Generator().manual_seed(1)) + own)
    scores = rejection_scores(energies, fit_rejection(energies, own, 0.95))
    for low in (0.2, 0.4, 0.6):
        chosen = (scores > low) & (scores < low + 0.1)
        strange, known = (chosen & ~own).sum() / 36000, (chosen & own).sum() / 4000
        assert (strange / (strange + known)).item() == pytest.approx(scores[chosen].mean().item(), abs=0.05)


@pytest.mark.parametrize("labels", [["dog", "ship"], ["car"]])
def test_a_calibrated_module_has_scores_that_survive_files_and_a_report(parent, labels, tmp_path):
    module = parent.extract_module(labels)
    batch = next(iter(data(60, 60)))
    assert module(batch["pixel_values"]).rejection_scores is None
    before = evaluate_module(parent, labels, data(), module, show_progress=False).rejection
    found = calibrate_rejection(module, data(30), accepted=0.8, show_progress=False)
    assert module.config.rejection == found
    output = module(batch["pixel_values"])
    scores = output.rejection_scores
    assert torch.allclose(scores, rejection_scores(energy(output.logits[:, : len(labels)]), found))
    module.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(batch["pixel_values"]).rejection_scores, scores)
    after = evaluate_module(parent, labels, data(), module, show_progress=False).rejection
    own = own_samples(module, batch["labels"])
    assert before == {"auroc": after["auroc"], "accepted": None, "rejected": None}
    assert after["auroc"] == pytest.approx(
        auroc(energy(module.own_logits(pixel_values=batch["pixel_values"])), own), abs=1e-6
    )
    assert after["accepted"] == pytest.approx((scores <= found["threshold"])[own].float().mean().item())
    assert after["rejected"] == pytest.approx((scores > found["threshold"])[~own].float().mean().item())


def test_trainers_of_modules_ignore_the_scores_and_fine_tuning_drops_them(parent, tmp_path):
    module = parent.extract_module(["dog", "ship"])
    calibrate_rejection(module, data(), show_progress=False)
    own = [{**s, "labels": [1, 3].index(s["labels"])} for s in image_samples(40) if s["labels"] in (1, 3)]
    args = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
    shapes = []
    trainer = Trainer(module, args, train_dataset=own, eval_dataset=own,
                      compute_metrics=lambda p: shapes.append(p.predictions.shape) or {})  # fmt: skip
    trainer.evaluate()
    assert shapes == [(16, 3)]  # with the answer to inputs that are rejected
    assert module.config.rejection is not None
    trainer.train()
    trainer.save_model(str(tmp_path))
    assert AutoModelForImageClassification.from_pretrained(tmp_path).config.rejection is None


def test_trainers_calibrate_on_their_evaluation_data(parent, tmp_path):
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = NeMoTrainer(parent, args, train_dataset=image_samples(), eval_dataset=image_samples(60))
    module = trainer.extract_module(["cat", "frog"])
    found = trainer.calibrate_rejection(module)
    assert found == pytest.approx(calibrate_rejection(module, data(60, 8), show_progress=False), rel=1e-3)


def test_own_samples_have_one_of_the_modules_labels(parent):
    module = parent.extract_module(["dog", "ship"])
    labels = torch.tensor([[1, 0, 0, 0, 0], [0, 1, 0, 0, 1], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]])
    assert own_samples(module, labels).tolist() == [False, True, True, False]
    assert own_samples(module, torch.tensor([0, 1, 3, -1])).tolist() == [False, True, True, False]


SHARES = (0, 1, -0.5, 95, True, math.nan, "0.9", None)


def test_what_can_not_be_calibrated_is_refused(parent):
    module = parent.extract_module(["dog", "ship"])
    for model, batches, accepted, message in [
        (parent, data(), 0.9, "Got a parent; expected a module"),
        *((module, data(), share, f"accepted={share!r}; expected a share") for share in SHARES),
        (module, data(labels=(1, 3)), 0.9, "expected some of both"),
        (module, data(labels=(0, 2)), 0.9, "expected some of both"),
        (module, [{"pixel_values": torch.randn(2, 3, 16, 16)}], 0.9, "expected 'labels' in it"),
        (module, [{"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.ones(1)}], 0.9, "type torch.float32"),
        (module, [{"pixel_values": torch.randn(2, 3, 16, 16), "labels": [1]}], 0.9, "Got 1 labels for 2 samples"),
        (module, [{"pixel_values": [[0.0]], "labels": [1]}], 0.9, "Got 1 labels for 0 samples in tensors"),
        (module, image_samples(3), 0.9, "Got a sample with one label; expected batches"),
        (module, next(iter(data())), 0.9, "Got a str as batch; expected tensors by name"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            calibrate_rejection(model, batches, accepted, show_progress=False)
    assert module.config.rejection is None
