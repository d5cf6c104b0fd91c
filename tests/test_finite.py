"""NaN and infinity are refused by name wherever a model is trained, measured, calibrated, cut, joined or written."""

import copy
import logging
import re

import pytest
import torch
from conftest import fresh, generated, image_samples, parent_of, randomize_relevance, rewrite_weights
from safetensors.torch import load_file
from training_helpers import arguments, assert_same_state, batch_of, state

from nemo_hf import (
    NeMoForImageClassification,
    NeMoTrainer,
    UnsupportedArchitectureError,
    calibrate_rejection,
    compose,
    compute_relevance,
    make_parent,
)
from nemo_hf.evaluation.metrics import cohesion_and_coupling
from nemo_hf.evaluation.report import evaluate_module, measure_modularity
from nemo_hf.models.equivalence import EquivalenceError, check_equivalence
from nemo_hf.models.extraction import make_plan
from nemo_hf.models.finiteness import infinite_tensors
from nemo_hf.models.rejection_calibration import auroc, fit_rejection

NAN, INF = float("nan"), float("inf")
LABELS = ["cat", "dog"]
HEAD = "model.classifier.weight"


def spoiled(model, name=HEAD, value=NAN, dtype=None):
    """A copy of a model with another first number in one tensor."""
    model = copy.deepcopy(model).to(dtype or model.dtype)
    with torch.no_grad():
        dict(model.state_dict(keep_vars=True))[name].view(-1)[0] = value
    return model


def batches(samples, dtype=torch.float32):
    joined = batch_of(samples)
    joined["pixel_values"] = joined["pixel_values"].to(dtype)
    return [{name: value[start : start + 10] for name, value in joined.items()} for start in range(0, len(samples), 10)]


def samples_with(value, number=17):
    samples = image_samples(40)
    samples[3]["labels"] = samples[4]["labels"] = -100  # they count as samples in messages
    samples[number]["pixel_values"] = torch.full((3, 16, 16), value)
    return samples


@pytest.fixture(scope="module")
def parent():
    return parent_of("vit")


@pytest.fixture(scope="module")
def module(parent):
    return parent.extract_module(LABELS)


def quiet(function):
    return lambda *args, **kwargs: function(*args, show_progress=False, **kwargs)


# What is done with a parent and its module, given batches and a directory
OF_PARENTS = {
    "count": lambda p, m, b, d: quiet(compute_relevance)(p, b),
    "measure masks": lambda p, m, b, d: measure_modularity(p, b, 100),
    "measure": lambda p, m, b, d: quiet(evaluate_module)(p, LABELS, b, module=m),
}
OF_MODULES = {
    "measure": OF_PARENTS["measure"],
    "calibrate": lambda p, m, b, d: quiet(calibrate_rejection)(m, b),
    "join": lambda p, m, b, d: compose(
        [m, p.extract_module(["car"])],
        batches=[{**c, "labels": c["labels"].where(c["labels"] < 0, c["labels"] % 3)} for c in b],
    ),
}
WITHOUT_DATA = {
    "cut": (lambda p, m, b, d: p.extract_module(LABELS), "parent"),
    "save a parent": (lambda p, m, b, d: p.save_pretrained(d), "parent"),
    "save": (lambda p, m, b, d: m.save_pretrained(d), "module"),
    "export plain": (lambda p, m, b, d: m.save_plain(d), "module"),
    "export ONNX": (lambda p, m, b, d: m.export_onnx(d), "module"),
    "join without data": (lambda p, m, b, d: compose([m, p.extract_module(["car"])]), "module"),
}  # fmt: skip
WITH_DATA = {
    f"{name} {kind}": (call, kind)
    for kind, calls in (("parent", OF_PARENTS), ("module", OF_MODULES))
    for name, call in calls.items()
}
USES, READERS = (
    pytest.mark.parametrize(("call", "kind"), list(uses.values()), ids=list(uses))
    for uses in ({**WITH_DATA, **WITHOUT_DATA}, WITH_DATA)
)


@pytest.mark.parametrize("value", [NAN, -INF])
@USES
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_written_or_changed(
    parent, module, call, kind, value, tmp_path
):
    models = {"parent": copy.deepcopy(parent), "module": copy.deepcopy(module)}
    models[kind] = spoiled(models[kind], value=value)
    before = {name: state(model) for name, model in models.items()}
    with pytest.raises(ValueError, match=rf"^Got NaN or infinite .*{re.escape(HEAD)}; expected finite ones\. [A-Z]"):
        call(models["parent"], models["module"], batches(image_samples(40)), tmp_path / "new")
    assert not list(tmp_path.iterdir())
    for name, model in models.items():
        assert_same_state(state(model), before[name], equal_nan=True)
        assert model.report is None
        assert model.config.rejection is None


@pytest.mark.parametrize("value", [NAN, INF])
@READERS
def test_a_sample_that_is_not_finite_is_named_by_its_number(parent, module, call, kind, value, tmp_path):
    message = r"logits of cat.* for the samples 17 \(counted from 0\), whose pixel_values are not finite either;"
    with pytest.raises(ValueError, match=message):
        call(copy.deepcopy(parent), copy.deepcopy(module), batches(samples_with(value)), tmp_path)


@READERS
def test_logits_too_large_for_half_precision_are_so_called_and_the_remedy_works(parent, module, call, kind, tmp_path):
    models = {"parent": copy.deepcopy(parent), "module": copy.deepcopy(module)}
    for model in models.values():
        with torch.no_grad():
            model.model.classifier.weight *= 60_000 / model.model.classifier.weight.abs().max()
            model.model.vit.layernorm.bias.fill_(50.0)
    call(*copy.deepcopy(list(models.values())), batches(image_samples(40)), tmp_path)
    halves = [copy.deepcopy(model).half() for model in models.values()]
    with pytest.raises(
        ValueError, match=r"number grew too large for torch.float16 .* Load it with dtype=torch.float32"
    ):
        call(*halves, batches(image_samples(40), torch.float16), tmp_path)


def test_what_is_infinite_on_purpose_passes(parent):
    model = copy.deepcopy(parent)
    model.register_buffer("bias", torch.full((2, 2), -INF).triu(1))
    model.register_buffer("lowest", torch.full((2,), torch.finfo(torch.float32).min))
    model.register_buffer("running_var", torch.ones(2))
    assert infinite_tensors(model) == []
    model.bias[0, 0] = NAN
    model.running_var[0] = INF
    assert infinite_tensors(model) == ["bias", "running_var"]
    assert infinite_tensors(model, {"bias": model.lowest, HEAD: torch.tensor([INF])}) == [HEAD]
    assert infinite_tensors(torch.nn.Linear(2, 2, device="meta")) == []
    huge = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(huge.weight, torch.finfo(torch.float32).max)  # whose sum is infinite
    assert infinite_tensors(huge) == []


def test_a_plain_model_is_not_given_masks(vit):
    before = state(spoiled(vit, "classifier.weight"))
    model = spoiled(vit, "classifier.weight")
    with pytest.raises(ValueError, match=r"^Got NaN .*classifier\.weight; expected finite"):
        make_parent(model, generated())
    assert_same_state(state(model), before, equal_nan=True)
    with pytest.raises(ValueError, match="whose pixel_values are not finite either"):
        make_parent(vit, generated(), inputs={"pixel_values": torch.full((4, 3, 16, 16), NAN)})


def test_a_cut_on_load_reads_and_checks_only_what_stays(parent, tmp_path):
    parent.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    saved[HEAD][4] = NAN  # of another label
    rewrite_weights(tmp_path / "model.safetensors", saved)
    cut = NeMoForImageClassification.from_pretrained(tmp_path, labels=LABELS)
    assert_same_state(state(cut), state(parent.extract_module(LABELS)))
    with pytest.raises(ValueError, match=re.escape(HEAD)):
        NeMoForImageClassification.from_pretrained(tmp_path, labels=["frog"])
    saved[HEAD][4] = 1e6
    rewrite_weights(tmp_path / "model.safetensors", saved)
    with pytest.raises(ValueError, match=rf"{re.escape(HEAD)}; .* Load it with dtype=torch.float32"):
        NeMoForImageClassification.from_pretrained(tmp_path, labels=["frog"], dtype="float16")


# Training


@pytest.mark.parametrize("options", [{"logging_steps": 1}, {"logging_strategy": "no"}, {"logging_steps": 500}])
def test_training_on_a_nan_sample_ends_in_an_error_at_the_next_log_or_the_end(options, tmp_path):
    trainer = NeMoTrainer(
        fresh("vit"), arguments(tmp_path, max_steps=6, **options), train_dataset=samples_with(NAN)[:20]
    )
    with pytest.raises(ValueError, match=r"^Got NaN .* and \d+ more; expected finite ones\. Go back to weights from"):
        trainer.train()
    assert trainer.state.global_step == (1 if options == {"logging_steps": 1} else 6)


def test_checkpoints_of_before_stay_and_training_goes_on_from_them(tmp_path):
    samples = image_samples(40)
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "logging_strategy": "no"}
    args = arguments(tmp_path, max_steps=6, **options)

    class Spoils(NeMoTrainer):
        is_spoiled = True

        def training_step(self, *args, **kwargs):
            if self.is_spoiled and self.state.global_step == 3:
                with torch.no_grad():
                    self.parent.model.classifier.bias.fill_(NAN)
            return super().training_step(*args, **kwargs)

    trainer = Spoils(fresh("vit"), args, train_dataset=samples)
    with pytest.raises(ValueError, match=r"safetensors\.torch\.save_model\(model, path\)"):
        trainer.train()
    assert infinite_tensors(NeMoForImageClassification.from_pretrained(tmp_path / "checkpoint-3")) == []
    trainer.is_spoiled = False
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert trainer.state.global_step == 6
    assert trainer.parent.config.relevance_source == "assigned"


def test_a_parent_of_nan_is_neither_trained_on_nor_evaluated(parent, tmp_path):
    trainer = NeMoTrainer(
        spoiled(parent), arguments(tmp_path), train_dataset=image_samples(), eval_dataset=image_samples()
    )
    for call in (trainer.train, trainer.evaluate):
        with pytest.raises(ValueError, match=re.escape(HEAD)):
            call()
    assert trainer.state.global_step == 0


def test_a_loss_of_nan_with_finite_weights_is_a_warning(tmp_path, caplog):
    """As under a gradient scaler, which leaves such steps out."""
    config = generated(rehearsal_probability=0)

    def loss(outputs, labels, num_items_in_batch=None):
        return outputs.logits.sum() * 0 + NAN

    args = arguments(tmp_path, max_steps=1)
    trainer = NeMoTrainer(fresh("vit"), args, train_dataset=image_samples(), nemo_config=config, compute_loss_func=loss)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "Got NaN or infinite loss_task since the last log; the weights are finite still." in caplog.text


# Numbers as such


def test_measures_of_nan_are_refused():
    scores, own = torch.tensor([0.1, NAN, 0.3]), torch.tensor([True, False, False])
    for call in (lambda: auroc(scores, own), lambda: fit_rejection(scores, own, 0.9),
                 lambda: cohesion_and_coupling(scores[:, None], own.long())):  # fmt: skip
        with pytest.raises(ValueError, match=r"^Got .* NaN or infinite; expected finite numbers\. [A-Z]"):
            call()


@pytest.mark.parametrize("bias", [1e4, 1e6, -1e8])
def test_another_labels_huge_bias_does_not_loosen_the_equivalence_check(bias):
    model = fresh("vit")
    with torch.no_grad():
        model.classifier.bias[4] = bias
    parent = make_parent(model, generated(relevance_threshold=0.6))
    randomize_relevance(parent)
    module = parent.extract_module(LABELS)
    check = module.config.equivalence
    assert check["status"] == "verified"
    with torch.no_grad():
        static = make_plan(parent, LABELS).static
        check_equivalence(parent, module, static)
        module.model.classifier.weight[0, 0] += 1e-3
        with pytest.raises(EquivalenceError):
            check_equivalence(parent, module, static)


def test_logits_that_overflow_with_all_neurons_open_fail_the_equivalence_check(parent):
    parent = copy.deepcopy(parent)
    site = next(site for site in parent.sites if site.kind == "ffn")
    closed = make_plan(parent, LABELS).static[site.key] == 0
    with torch.no_grad():
        parent.model.get_submodule(site.readers[0]).weight[:, closed] = 3e38
    with pytest.raises(EquivalenceError, match=r"^Got NaN or infinite logits of .*, from finite weights"):
        parent.extract_module(LABELS)


def test_the_tolerance_goes_with_the_largest_logit_of_the_own_labels(parent):
    inputs = {"pixel_values": batch_of(image_samples(6))["pixel_values"]}
    scaled = copy.deepcopy(parent)
    with torch.no_grad():
        scaled.model.classifier.weight *= 50
        static = make_plan(scaled, LABELS).static
        expected = scaled(**inputs, static_masks=static).logits[:, :2].abs().max().item()
    found = scaled.extract_module(LABELS, inputs=inputs).config.equivalence
    assert expected > 1
    assert found["tolerance"] == pytest.approx(1e-5 * expected, rel=1e-4)


def test_a_module_of_nan_never_equals_its_parent(parent, module):
    with pytest.raises(EquivalenceError, match="nan"):
        check_equivalence(parent, spoiled(module), make_plan(parent, LABELS).static)
    with pytest.raises(EquivalenceError, match="pixel_values are not finite"):
        parent.extract_module(LABELS, inputs={"pixel_values": torch.full((4, 3, 16, 16), NAN)})


def test_rejection_scores_of_an_onnx_file_are_compared_however_large_logits_are(module, monkeypatch, tmp_path):
    module = copy.deepcopy(module)
    with torch.no_grad():
        module.model.classifier.bias.fill_(1e5)
    calibrate_rejection(module, batches(image_samples(40)), show_progress=False)

    def run(**inputs):
        with torch.no_grad():
            outputs = module(**inputs)
        return [outputs.logits, (outputs.rejection_scores + error).clamp(0, 1)]

    monkeypatch.setattr("nemo_hf.export.onnx.trace", lambda *arguments: (tmp_path / "any").touch())
    monkeypatch.setattr("nemo_hf.export.onnx.OnnxRunner", lambda path, threads: run)
    error = 0.0
    assert module.export_onnx(tmp_path / "onnx").difference == 0
    error = 0.01
    with pytest.raises(UnsupportedArchitectureError, match=r"whose rejection_scores differ .* by 1\.00e-02;"):
        module.export_onnx(tmp_path / "wrong")
