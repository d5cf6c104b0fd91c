"""Results of a model stay with the weights that they were measured of: train() and eval() change none of them."""

import copy

import pytest
import torch
from conftest import fresh, generated, image_samples, randomize_relevance
from transformers import AutoModelForImageClassification

from nemo_hf import calibrate_rejection, make_parent

FIT = {"weight": 1.0, "bias": 0.0, "threshold": 0.5}
REPORT = {"metrics": {"eval_accuracy": 0.5}}


@pytest.fixture(scope="module")
def built():
    parent = make_parent(fresh("vit"), generated()).eval()
    randomize_relevance(parent)
    return parent, parent.extract_module(["cat", "dog", "car"])


@pytest.fixture
def module(built):
    module = copy.deepcopy(built[1])
    module.config.rejection, module.report = dict(FIT), REPORT
    return module


def batch():
    samples = [sample for sample in image_samples(24) if sample["labels"] < 3]
    pixels = torch.stack([sample["pixel_values"] for sample in samples])
    return {"pixel_values": pixels, "labels": torch.tensor([sample["labels"] for sample in samples])}


def state_of(module):
    return module.config.equivalence, module.config.is_tuned, module.config.rejection, module.report


def step(module, make=torch.optim.AdamW):
    optimizer = make(module.parameters(), lr=1e-3)
    module.train()(**batch()).loss.backward()
    optimizer.step()
    module.eval()


def in_place(module):
    with torch.no_grad():
        module.model.classifier.bias.add_(1.0)


CHANGES = {
    "AdamW": step,
    "fused AdamW": lambda module: step(module, lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True)),
    "SGD": lambda module: step(module, torch.optim.SGD),
    "load_state_dict": lambda module: module.load_state_dict({k: v + 1 for k, v in module.state_dict().items()}),
    "in place": in_place,
}
NO_CHANGES = {
    "train and eval": lambda module: module.train().eval(),
    "a forward pass in training mode": lambda module: module.train()(**batch()) and module.eval(),
    "half and back": lambda module: module.half().float(),
    "freezing": lambda module: module.requires_grad_(False).requires_grad_(True),
}


@pytest.mark.parametrize("change", NO_CHANGES.values(), ids=NO_CHANGES)
def test_what_leaves_the_weights_alone_leaves_the_results(module, change, tmp_path):
    before = state_of(module)
    assert before[0]["status"] == "verified"
    change(module)
    assert module(**batch()).rejection_scores is not None
    assert state_of(module) == state_of(copy.deepcopy(module)) == before
    module.save_pretrained(tmp_path)
    assert state_of(AutoModelForImageClassification.from_pretrained(tmp_path)) == before


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_the_weights_drops_what_was_measured(module, change, tmp_path):
    change(module)
    assert module(**batch()).rejection_scores is None
    assert state_of(module) == state_of(copy.deepcopy(module)) == (None, True, None, None)
    calibrate_rejection(module, [{**batch(), "labels": torch.arange(len(batch()["labels"])) % 5}], show_progress=False)
    module.report = REPORT
    module.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert state_of(loaded) == (None, True, module.config.rejection, REPORT)


@pytest.mark.parametrize("saves_first", [True, False])
def test_a_loaded_module_knows_its_weights(module, tmp_path, saves_first):
    module.save_pretrained(tmp_path / "one")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "one")
    in_place(loaded)
    if saves_first:
        loaded.save_pretrained(tmp_path / "two")
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "two")
    loaded.drop_stale_results()
    assert state_of(loaded) == (None, True, None, None)


def test_a_parent_s_report_goes_with_its_weights(built, tmp_path):
    parent = copy.deepcopy(built[0])
    parent.report = REPORT
    parent.train().eval()
    assert parent.report == REPORT
    parent.save_pretrained(tmp_path)
    with torch.no_grad():
        next(parent.masks.site_masks()).relevance.zero_()  # other masks give other answers
    assert parent.report is None
    parent.save_pretrained(tmp_path)
    assert not (tmp_path / "report.json").exists()
    assert parent.config.equivalence["status"] == "verified"
