"""The traps of `transformers.Trainer` (5.23) into which a wrapped model falls silently, one class for each.

They are: loss under gradient accumulation (C1) and label smoothing (C2), the type of the loss (C3), unused columns
(C4), outputs at evaluation (C5), activation checkpointing (C6), parameters without a gradient (C7) and weights that
a resumed or best model does not get back (C8).
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from conftest import image_samples, text_samples
from safetensors.torch import load_file
from test_trainer import (
    SAMPLES,
    Recorder,
    arguments,
    assert_same_state,
    batch_of,
    history,
    lively_parent,
    quick_collection,  # noqa: F401 - a fixture
    recorded,
    state,
    without_dropout,
)
from torch.nn import functional as F
from transformers import Trainer

from nemo_hf import (
    NeMoForAudioClassification,
    NeMoForImageClassification,
    NeMoForSequenceClassification,
    NeMoTrainer,
    make_parent,
)

FAMILIES = pytest.mark.parametrize("family", ["bert", "vit"])
SMOOTHING = pytest.mark.parametrize("smoothing", [0.0, 0.1])
PLAIN = {"contrastive_weight": 0, "rehearsal_probability": 0, "warmup_ratio": 0}
REHEARSED = {"rehearsal_probability": 1.0, "warmup_ratio": 0.0}


def lively_module(family):
    """A module for all labels, each of them with the parent's id."""
    return without_dropout(lively_parent(family).extract_module([0, 1, 2, 3, 4], threshold=0.9))


def accumulated(trainer_class, model, directory, size, steps, samples, **options):
    args = arguments(
        directory,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=steps,
        optim="sgd",
        learning_rate=0.05,
        **options,
    )
    trainer = trainer_class(model, args, train_dataset=samples, eval_dataset=samples)
    trainer.train()
    return trainer


def assert_same_training(got, expected, names=("loss", "grad_norm")):
    for name in names:
        assert history(expected, name)
        assert history(got, name) == pytest.approx(history(expected, name), rel=1e-5), name
    weights = dict(expected.model.named_parameters())
    assert_same_state(dict(got.model.named_parameters()), weights, rtol=0, atol=2e-6)


class TestC1AccumulationAndC2Smoothing:
    @SMOOTHING
    @FAMILIES
    def test_parent(self, family, smoothing, tmp_path):
        whole, parts = (
            accumulated(
                NeMoTrainer, lively_parent(family, **PLAIN), tmp_path, size, steps, SAMPLES[family](),
                label_smoothing_factor=smoothing,
            )
            for size, steps in ((8, 1), (2, 4))
        )  # fmt: skip
        assert_same_training(parts, whole, ("loss", "grad_norm", "loss_task", "neuron_retention_rate"))

    @SMOOTHING
    @FAMILIES
    def test_module_under_trainer(self, family, smoothing, tmp_path):
        module, samples = lively_module(family), SAMPLES[family]()
        whole, parts = (
            accumulated(
                Trainer, copy.deepcopy(module), tmp_path, size, steps, samples, label_smoothing_factor=smoothing
            )
            for size, steps in ((8, 1), (2, 4))
        )
        assert_same_training(parts, whole)

    @FAMILIES
    def test_loss_is_the_smoothed_mean_over_the_batch(self, family, tmp_path):
        samples = SAMPLES[family](8)
        batch = batch_of(samples)
        for trainer_class, model in (
            (NeMoTrainer, lively_parent(family, sparsity_weight=0, **PLAIN)),
            (Trainer, lively_module(family)),
        ):
            with torch.no_grad():
                logits = model.train()(**{k: v for k, v in batch.items() if k != "labels"}).logits
            expected = F.cross_entropy(logits, batch["labels"], label_smoothing=0.1).item()
            trainer = accumulated(
                trainer_class, model, tmp_path, 2, 4, samples, label_smoothing_factor=0.1, max_steps=1,
                train_sampling_strategy="sequential",
            )  # fmt: skip
            assert history(trainer) == pytest.approx([expected], rel=1e-5), trainer_class

    @pytest.mark.parametrize("rehearsal", [0.0, 1.0])
    def test_every_term_over_equal_micro_batches(self, rehearsal, tmp_path):
        samples = image_samples(15)
        options = {"max_steps": 1, "train_sampling_strategy": "sequential"}
        runs = []
        for steps in (1, 2):
            parent = lively_parent("vit", rehearsal_probability=rehearsal, warmup_ratio=0)
            runs.append(accumulated(NeMoTrainer, parent, tmp_path, 15, steps, samples * steps, **options))
        names = ("loss", "grad_norm", "loss_task", "loss_contrastive", "neuron_retention_rate")
        assert_same_training(runs[1], runs[0], names)
        assert history(runs[0], "loss_contrastive")[0] > 0

    def test_an_own_loss_function(self, tmp_path):
        def mean(outputs, labels, num_items_in_batch=None):
            return F.cross_entropy(outputs.logits, labels)

        class WithLoss(NeMoTrainer):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, compute_loss_func=mean, **kwargs)

        whole, parts = (
            accumulated(WithLoss, lively_parent("vit", **PLAIN), tmp_path, size, steps, image_samples())
            for size, steps in ((8, 1), (2, 4))
        )
        assert_same_training(parts, whole)


class TestC3LossType:
    @pytest.mark.parametrize(
        ("model_class", "name"),
        [
            (NeMoForImageClassification, "ForImageClassification"),
            (NeMoForSequenceClassification, "ForSequenceClassification"),
            (NeMoForAudioClassification, "ForAudioClassification"),
        ],
    )
    def test_class_names(self, model_class, name):
        assert model_class.__name__.endswith(name)

    @FAMILIES
    def test_loss_is_cross_entropy(self, family):
        batch = batch_of(SAMPLES[family](10))
        for model in (lively_parent(family), lively_module(family)):
            assert model.loss_type in ("ForImageClassification", "ForSequenceClassification")
            for outputs in (model.train()(**batch), model.eval()(**batch)):
                expected = F.cross_entropy(outputs.logits, batch["labels"])
                torch.testing.assert_close(outputs.loss, expected)


class TestC4Columns:
    def dataset(self):
        samples = text_samples(20)
        return datasets.Dataset.from_dict(
            {
                "text": ["words"] * 20,
                "input_ids": [sample["input_ids"].tolist() for sample in samples],
                "attention_mask": [sample["attention_mask"].tolist() for sample in samples],
                "token_type_ids": [[0] * 6 + [1] * 6 for _ in samples],
                "domain": ["pet"] * 20,
                "label": [sample["labels"] for sample in samples],
            }
        )

    def seen_by_base(self, trainer, run):
        calls = []
        handle = trainer.model.model.register_forward_pre_hook(
            lambda layer, args, kwargs: calls.append(dict(kwargs)), with_kwargs=True
        )
        run()
        handle.remove()
        assert calls
        return calls

    @pytest.mark.parametrize("make_trainer", [NeMoTrainer, Trainer])
    def test_labels_are_found(self, make_trainer, tmp_path):
        for model in (lively_parent("bert"), lively_module("bert")):
            if make_trainer is Trainer or model.is_parent:
                assert make_trainer(model, arguments(tmp_path)).label_names == ["labels"]

    @pytest.mark.parametrize("run", ["train", "evaluate"])
    def test_columns_of_the_base_model_are_kept(self, run, tmp_path):
        args = arguments(tmp_path, max_steps=1)
        trainer = NeMoTrainer(lively_parent("bert"), args, train_dataset=self.dataset(), eval_dataset=self.dataset())
        for call in self.seen_by_base(trainer, getattr(trainer, run)):
            assert call["token_type_ids"][0].tolist() == [0] * 6 + [1] * 6
            assert not {"text", "domain", "label", "labels"} & set(call)

    def test_a_module_under_trainer_sees_them_too(self, tmp_path):
        trainer = Trainer(lively_module("bert"), arguments(tmp_path, max_steps=1), train_dataset=self.dataset())
        for call in self.seen_by_base(trainer, trainer.train):
            assert "token_type_ids" in call
            assert not {"text", "domain", "label", "labels"} & set(call)

    def test_columns_of_other_data_are_dropped(self, tmp_path):
        samples = [{**sample, "path": "a.png"} for sample in image_samples(20)]
        trainer = NeMoTrainer(lively_parent("vit"), arguments(tmp_path, max_steps=1), train_dataset=samples)
        for call in self.seen_by_base(trainer, trainer.train):
            assert "path" not in call


class TestC5Evaluation:
    @SMOOTHING
    def test_loss_is_that_of_trainer_on_the_task(self, smoothing, tmp_path):
        samples = image_samples(10)
        parent = lively_parent("vit", **REHEARSED)
        args = arguments(tmp_path, label_smoothing_factor=smoothing, per_device_eval_batch_size=10)
        got = NeMoTrainer(parent, args, eval_dataset=samples).evaluate()["eval_loss"]
        batch = batch_of(samples)
        with torch.no_grad():
            logits = parent.eval()(**batch).logits
        assert got == pytest.approx(
            F.cross_entropy(logits, batch["labels"], label_smoothing=smoothing).item(), rel=1e-6
        )
        assert got == pytest.approx(Trainer(parent, args, eval_dataset=samples).evaluate()["eval_loss"], rel=1e-6)

    def test_predictions_are_logits_only(self, tmp_path):
        shapes = []
        samples = image_samples(20)

        def keep_shape(prediction):
            shapes.append(prediction.predictions.shape)
            return {}

        parent = lively_parent("vit", **REHEARSED)
        args = arguments(tmp_path, eval_strategy="steps", eval_steps=1)
        trainer = NeMoTrainer(parent, args, train_dataset=samples, eval_dataset=samples[:7], compute_metrics=keep_shape)
        trainer.train()
        assert shapes == [(7, 5), (7, 5)]
        output = trainer.predict(samples)
        assert output.predictions.shape == (20, 5)
        with torch.no_grad():
            expected = parent.eval()(pixel_values=batch_of(samples)["pixel_values"]).logits
        torch.testing.assert_close(torch.from_numpy(output.predictions), expected)

    def test_masks_are_an_output_of_training_only(self):
        parent, batch = lively_parent("vit"), batch_of(image_samples(4))
        assert parent.eval()(**batch).neuron_masks is None
        assert parent.train()(**batch).neuron_masks is not None
        assert list(parent.eval()(**batch)) == ["loss", "logits"]


class TestC6ActivationCheckpointing:
    def run(self, family, directory, checkpointing, **config):
        parent = lively_parent(family, warmup_ratio=0, **config)
        calls = []
        first = next(parent.get_submodule(f"model.{site.output}") for site in parent.sites)
        first.register_forward_hook(lambda *ignored: calls.append(parent.training))
        args = arguments(
            directory, optim="sgd", learning_rate=0.05, max_steps=2, activation_checkpointing=checkpointing
        )
        trainer, recorder = recorded(parent, args, train_dataset=SAMPLES[family]())
        return trainer, recorder, sum(calls)

    @pytest.mark.parametrize("rehearsal", [0.0, 1.0])
    @FAMILIES
    def test_same_loss_and_gradients(self, family, rehearsal, tmp_path):
        plain, plain_recorder, plain_calls = self.run(family, tmp_path, False, rehearsal_probability=rehearsal)
        trainer, recorder, calls = self.run(family, tmp_path, True, rehearsal_probability=rehearsal)
        assert calls == 2 * plain_calls  # the layers were replayed
        assert_same_training(trainer, plain, ("loss", "grad_norm", "loss_task", "loss_contrastive"))
        for outputs, plain_outputs in zip(recorder.outputs, plain_recorder.outputs, strict=True):
            shapes = {key: mask.shape for key, mask in outputs.neuron_masks.items()}
            assert shapes == {key: mask.shape for key, mask in plain_outputs.neuron_masks.items()}
            assert {shape[:2] for shape in shapes.values()} == {(20, 1)}
        for got, expected in zip(recorder.relevance, plain_recorder.relevance, strict=True):
            assert all(torch.equal(got[key], expected[key]) for key in expected)
        assert any(call.get("static_masks") is not None for call in recorder.calls) == bool(rehearsal)


class TestC7UnusedParameters:
    @pytest.mark.parametrize("weight", [0.0, 0.5])
    def test_generators_get_a_gradient_where_all_samples_are_rehearsed(self, weight, tmp_path, monkeypatch):
        parent = lively_parent("vit", contrastive_weight=weight, sparsity_weight=weight, **REHEARSED)
        trainer = NeMoTrainer(parent, arguments(tmp_path), train_dataset=image_samples(10))
        monkeypatch.setattr(trainer, "_rehearsed_groups", lambda: torch.tensor([0, 1]))
        recorder = Recorder(parent)
        recorder.step = 0
        batch = batch_of([sample for sample in image_samples(20) if sample["labels"] < 2])
        parent.train()
        trainer.compute_loss(parent, batch).backward()
        assert recorder.calls[0]["static_samples"].all()
        for name, parameter in parent.masks.named_parameters():
            assert parameter.grad is not None, name
            assert bool(parameter.grad.any()) == bool(weight), name

    def test_every_parameter_gets_a_gradient_in_a_plain_step(self, tmp_path):
        parent = lively_parent("bert")
        trainer = NeMoTrainer(parent, arguments(tmp_path), train_dataset=text_samples(10))
        parent.train()
        trainer.compute_loss(parent, batch_of(text_samples(10))).backward()
        assert [name for name, parameter in parent.named_parameters() if parameter.grad is None] == []


class TestC8ResumeAndBestModel:
    def trainer(self, directory, seed, steps, **options):
        args = arguments(
            directory,
            per_device_train_batch_size=8 // steps,
            gradient_accumulation_steps=steps,
            max_steps=6,
            save_strategy="steps",
            save_steps=3,
            **options,
        )
        parent = lively_parent("vit", seed, **REHEARSED)
        recorder = Recorder(parent)
        return NeMoTrainer(parent, args, train_dataset=image_samples(), callbacks=[recorder]), recorder

    @pytest.mark.parametrize("steps", [1, 2])
    def test_resumed_in_mid_epoch(self, steps, tmp_path):
        whole, whole_recorder = self.trainer(tmp_path, 0, steps)
        whole.train()
        resumed, recorder = self.trainer(tmp_path, 1, steps)  # other weights and another relevance to begin with
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert [call["step"] for call in recorder.calls] == [step for step in (3, 4, 5) for _ in range(steps)]
        for call, expected in zip(recorder.calls, whole_recorder.calls[3 * steps :], strict=True):
            assert torch.equal(call["pixel_values"], expected["pixel_values"])
            assert torch.equal(call["static_samples"], expected["static_samples"])
            for key, mask in expected["static_masks"].items():
                assert torch.equal(call["static_masks"][key], mask)
        for relevance, expected in zip(recorder.relevance, whole_recorder.relevance[3:], strict=True):
            assert all(torch.equal(relevance[key], expected[key]) for key in expected)
        for name in ("loss", "grad_norm", "loss_task", "loss_contrastive", "neuron_retention_rate"):
            assert history(resumed, name) == pytest.approx(history(whole, name), abs=1e-6), name
        assert_same_state(resumed.parent.state_dict(), whole.parent.state_dict(), rtol=0, atol=1e-6)

    def test_the_best_model_is_loaded_at_the_end(self, tmp_path):
        scores = iter([1.0, 3.0, 2.0])
        args = arguments(
            tmp_path, max_steps=3, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
            load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True,
        )  # fmt: skip
        trainer = NeMoTrainer(
            lively_parent("vit"), args, train_dataset=image_samples(), eval_dataset=image_samples(10),
            compute_metrics=lambda prediction: {"score": next(scores)},
        )  # fmt: skip
        trainer.train()
        assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
        # The relevance was counted anew for the best model.
        parameters = {name: tensor for name, tensor in state(trainer.parent).items() if "relevance" not in name}
        best, last = (load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in (2, 3))
        for name, tensor in parameters.items():
            assert torch.equal(tensor, best[name]), name
            assert not tensor.is_floating_point() or not torch.equal(tensor, last[name]), name

    def test_checkpoints_load_as_parents_and_hold_no_pickled_arguments(self, tmp_path):
        trainer, recorder = self.trainer(tmp_path, 0, 1)
        trainer.train()
        trainer.save_model(tmp_path / "parent")
        for name in ("checkpoint-3", "checkpoint-6", "parent"):
            files = {file.name for file in (tmp_path / name).iterdir()}
            assert {"config.json", "model.safetensors"} <= files
            assert "training_args.bin" not in files
        loaded = NeMoForImageClassification.from_pretrained(tmp_path / "checkpoint-3")
        for key, relevance in recorder.relevance[2].items():
            assert torch.equal(loaded.masks.relevance()[key], relevance)

    def test_a_new_parent_resumes_a_plain_start(self, vit, tmp_path):
        args = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
        whole = NeMoTrainer(make_parent(copy.deepcopy(vit)), args, train_dataset=image_samples())
        whole.train()
        resumed = NeMoTrainer(vit, args, train_dataset=image_samples())  # other generators
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        assert_same_state(resumed.parent.state_dict(), whole.parent.state_dict(), rtol=0, atol=1e-6)


def run_of_one_process(directory, processes=1):
    """Trains on 20 of 63 samples a step, split over the processes; the result should not depend on their number."""
    parent = lively_parent("vit", contrastive_weight=0, **REHEARSED)
    args = arguments(
        directory, per_device_train_batch_size=20 // processes, max_steps=3, optim="sgd",
        ddp_backend="gloo" if processes > 1 else None,
    )  # fmt: skip
    trainer, recorder = recorded(parent, args, train_dataset=image_samples(63))
    running = {f"{step} {key}": mask for step, masks in enumerate(recorder.relevance) for key, mask in masks.items()}
    losses = torch.tensor([history(trainer), history(trainer, "loss_task"), history(trainer, "neuron_retention_rate")])
    return {**state(trainer.parent), **running, "losses": losses}


@pytest.mark.slow  # starts two interpreters
def test_two_processes_train_as_one(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, torch\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_trainer_traps import run_of_one_process\n"
        f"result = run_of_one_process({str(tmp_path)!r}, processes=2)\n"
        f"torch.save(result, os.path.join({str(tmp_path)!r}, os.environ['RANK'] + '.pt'))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, timeout=180, capture_output=True)
    expected = run_of_one_process(tmp_path)
    for rank in range(2):
        assert_same_state(torch.load(tmp_path / f"{rank}.pt"), expected, rtol=0, atol=2e-6)
