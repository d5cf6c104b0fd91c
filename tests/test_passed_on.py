"""Public methods with `**kwargs` hand each keyword of the function behind them on, as it was given."""

import importlib
import inspect

import pytest
import torch
from conftest import LABELS, image_samples, parent_of
from training_helpers import arguments

import nemo_hf
from nemo_hf import NeMoTrainer, compose

IMAGES = {"pixel_values": torch.rand(2, 3, 16, 16)}
LIKE_TRANSFORMERS = {"forward", "save_pretrained", "train", "training_step", "create_model_card", "push_to_hub"}
"""Methods whose keywords go to those of the same name in `transformers`, or to the plain model."""


def trainer_of(tmp_path):
    return NeMoTrainer(parent_of("vit"), arguments(tmp_path), eval_dataset=image_samples(8))


def saved(tmp_path):
    parent_of("vit").save_pretrained(tmp_path)
    return lambda **options: nemo_hf.NeMoForImageClassification.from_pretrained(tmp_path, **options)


METHODS = {
    "NeMoTrainer.evaluate_module": (
        lambda tmp_path: trainer_of(tmp_path).evaluate_module, "nemo_hf.training.trainer.evaluate_module",
    ),
    "NeMoTrainer.extract_module": (
        lambda tmp_path: trainer_of(tmp_path).extract_module, "nemo_hf.auto_classes.cut_on_samples",
    ),
    "NeMoClassifier.extract_module": (
        lambda tmp_path: parent_of("vit").extract_module, "nemo_hf.auto_classes.cut_on_samples",
    ),
    "NeMoClassifier.from_pretrained": (saved, "nemo_hf.models.cut_saved.extract_module"),
}  # fmt: skip
FILLED = {"parent", "batches", "model"}  # by the method: it is what they are about


@pytest.mark.parametrize("name", METHODS)
def test_each_keyword_of_the_function_behind_arrives_as_it_was_given(name, tmp_path, monkeypatch):
    prepare, behind = METHODS[name]
    method, (place, _, attribute) = prepare(tmp_path), behind.rpartition(".")
    signature, arrived = inspect.signature(getattr(importlib.import_module(place), attribute)), []
    monkeypatch.setattr(behind, lambda *args, **kwargs: arrived.append(signature.bind(*args, **kwargs).arguments))
    names = signature.parameters.keys() - FILLED
    assert {"labels", "show_progress"} <= names
    base = {"labels": LABELS[:2]} | ({"calibration": [], "retention": 0.5} if "retention" in names else {})
    for keyword in sorted(names):
        given = [LABELS[2]] if keyword == "labels" else object()
        method(**{**base, keyword: given})
        assert arrived.pop()[keyword] is given, keyword


def test_no_public_method_with_keywords_of_another_is_left_out():
    known = {name.rpartition(".")[2] for name in METHODS} | LIKE_TRANSFORMERS | {"own_logits", "part_logits"}
    found = set()
    for each in (getattr(nemo_hf, name) for name in nemo_hf.__all__):
        for kind in each.__mro__ if inspect.isclass(each) else ():
            if kind.__module__.startswith("nemo_hf") and "config" not in kind.__module__:
                own = {name: getattr(kind, name) for name in vars(kind) if name[0] != "_"}
                found |= {name for name, method in own.items() if inspect.isroutine(method) and takes_more(method)}
    assert {"extract_module", "evaluate_module", "own_logits", "forward"} <= found <= known


def takes_more(method):
    kinds = {each.kind for each in inspect.signature(method).parameters.values()}
    return inspect.Parameter.VAR_KEYWORD in kinds


@pytest.mark.parametrize("more", [{"return_dict": False}, {"return_dict": True}, {"output_hidden_states": True}])
def test_own_logits_take_what_the_forward_pass_takes(more):
    parent = parent_of("vit")
    modules = [parent.extract_module(labels) for labels in (LABELS[:2], LABELS[2:3])]
    for model in (parent, modules[0]):
        assert torch.equal(model.own_logits(**IMAGES, **more), model(**IMAGES).logits)
    if "return_dict" in more:
        expected = torch.cat([module(**IMAGES).logits for module in modules], -1)
        assert torch.equal(compose(modules).part_logits(**IMAGES, **more), expected)
