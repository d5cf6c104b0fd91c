"""Traps of `transformers.Trainer` (5.23) that change the training of a wrapped model silently.

They are: loss under gradient accumulation (C1) and label smoothing (C2), unused columns (C4), outputs at evaluation
(C5), activation checkpointing (C6), parameters without a gradient (C7) and weights that a resumed or best model does
not get back (C8). The type of the loss (C3) depends on class names: tests/test_public_api.py pins them.
"""

import copy

import datasets
import pytest
import torch
from conftest import image_samples, text_samples
from safetensors.torch import load_file
from torch.nn import functional as F
from training_helpers import (
    REHEARSED,
    SAMPLES,
    TASK_ALONE,
    Recorder,
    arguments,
    assert_same_state,
    batch_of,
    history,
    recorded,
    state,
    varied_parent,
    without_dropout,
)
from transformers import EarlyStoppingCallback, Trainer

from nemo_hf import NeMoForImageClassification, NeMoTrainer, compute_relevance

FAMILIES = pytest.mark.parametrize("family", ["bert", "vit"])
SMOOTHING = pytest.mark.parametrize("smoothing", [0.0, 0.1])


def all_labels_module(family):
    """A module for all labels, each of them with the parent's id."""
    return without_dropout(varied_parent(family).extract_module([0, 1, 2, 3, 4], threshold=0.9))


def accumulated(trainer_class, model, directory, size, steps, samples, loss=None, **options):
    args = arguments(
        directory, per_device_train_batch_size=size, gradient_accumulation_steps=steps, optim="sgd", learning_rate=0.05,
        **options,
    )  # fmt: skip
    trainer = trainer_class(copy.deepcopy(model), args, train_dataset=samples, compute_loss_func=loss)
    trainer.train()
    return trainer


def assert_same_training(got, expected, names=("loss", "grad_norm")):
    for name in names:
        assert history(expected, name)
        assert history(got, name) == pytest.approx(history(expected, name), rel=1e-5), name
    weights = dict(expected.model.named_parameters())
    assert_same_state(dict(got.model.named_parameters()), weights, rtol=0, atol=2e-6)


class TestC1AccumulationAndC2Smoothing:
    @pytest.mark.parametrize(
        ("kind", "smoothing"), [("parent", 0.0), ("parent", 0.1), ("parent", None), ("module", 0.0), ("module", 0.1)]
    )
    @FAMILIES
    def test_micro_batches_train_as_their_batch(self, family, kind, smoothing, tmp_path):
        parent = varied_parent(family, warmup_ratio=0, **TASK_ALONE)
        model = parent if kind == "parent" else all_labels_module(family)
        trainer_class, samples = NeMoTrainer if kind == "parent" else Trainer, SAMPLES[family](16)
        with torch.no_grad():
            batch = batch_of(samples[:8])
            logits = copy.deepcopy(model).train()(**{k: v for k, v in batch.items() if k != "labels"}).logits
        expected = F.cross_entropy(logits, batch["labels"], label_smoothing=smoothing or 0).item()
        options = {"label_smoothing_factor": smoothing or 0, "train_sampling_strategy": "sequential"}
        if smoothing is None:  # an own loss function
            expected *= 2
            options["loss"] = lambda output, labels, num_items_in_batch: 2 * F.cross_entropy(output.logits, labels)
        whole, parts = (
            accumulated(trainer_class, model, tmp_path, size, steps, samples, **options)
            for size, steps in ((8, 1), (2, 4))
        )
        assert history(whole)[0] == pytest.approx(expected, rel=1e-5)
        assert_same_training(parts, whole)

    @pytest.mark.parametrize("rehearsal", [0.0, 1.0])
    def test_every_term_over_equal_micro_batches(self, rehearsal, tmp_path):
        samples = image_samples(15)
        options = {"max_steps": 1, "train_sampling_strategy": "sequential"}
        parent = varied_parent("vit", rehearsal_probability=rehearsal, warmup_ratio=0)
        whole, parts = (
            accumulated(NeMoTrainer, parent, tmp_path, 15, steps, samples * steps, **options) for steps in (1, 2)
        )
        names = ("loss", "grad_norm", "nemo/loss_task", "nemo/loss_contrastive", "nemo/neuron_retention_rate")
        assert_same_training(parts, whole, names)
        assert history(whole, "nemo/loss_contrastive")[0] > 0


class TestC4Columns:
    def dataset(self):
        more = {"text": "words", "token_type_ids": [0] * 6 + [1] * 6, "domain": "pet"}
        samples = [{name: torch.as_tensor(value).tolist() for name, value in s.items()} for s in text_samples(20)]
        return datasets.Dataset.from_list([sample | more for sample in samples]).rename_column("labels", "label")

    @pytest.mark.parametrize("run", ["train", "list", "evaluate", "module"])
    def test_columns_of_the_base_model_are_kept_and_others_dropped(self, run, tmp_path):
        trainer_class, model = NeMoTrainer, varied_parent("bert")
        if run == "module":
            trainer_class, model = Trainer, all_labels_module("bert")
        args = arguments(tmp_path, max_steps=1)
        data = self.dataset()
        data = data.rename_column("label", "labels").with_format("torch").to_list() if run == "list" else data
        trainer = trainer_class(model, args, train_dataset=data, eval_dataset=data)
        calls = []
        model.model.register_forward_pre_hook(lambda layer, _, given: calls.append(given), with_kwargs=True)
        (trainer.evaluate if run == "evaluate" else trainer.train)()
        assert calls
        for call in calls:
            assert call["token_type_ids"][0].tolist() == [0] * 6 + [1] * 6
            assert not {"text", "domain", "label", "labels"} & set(call)


class TestC5Evaluation:
    @SMOOTHING
    def test_loss_is_that_of_trainer_on_the_task(self, smoothing, tmp_path):
        samples = image_samples(10)
        parent = varied_parent("vit", **REHEARSED)
        args = arguments(tmp_path, label_smoothing_factor=smoothing, per_device_eval_batch_size=10)
        got, plain = (kind(parent, args, eval_dataset=samples).evaluate() for kind in (NeMoTrainer, Trainer))
        batch = batch_of(samples)
        with torch.no_grad():
            logits = parent.eval()(**batch).logits
        expected = F.cross_entropy(logits, batch["labels"], label_smoothing=smoothing).item()
        assert [got["eval_loss"], plain["eval_loss"]] == pytest.approx([expected] * 2, rel=1e-6)

    def test_predictions_are_logits_only_and_masks_an_output_of_training(self, tmp_path):
        samples, shapes = image_samples(20), []
        parent = varied_parent("vit", **REHEARSED)
        args = arguments(tmp_path, eval_strategy="steps", eval_steps=1)
        data = {"train_dataset": samples, "eval_dataset": samples[:7]}
        NeMoTrainer(parent, args, **data, compute_metrics=lambda p: shapes.append(p.predictions.shape) or {}).train()
        assert shapes == [(7, 5), (7, 5)]
        assert parent.train()(**batch_of(samples)).neuron_masks is not None
        assert list(parent.eval()(**batch_of(samples))) == ["loss", "logits"]


class TestC6ActivationCheckpointing:
    @pytest.mark.parametrize(("family", "rehearsal"), [("vit", 0.0), ("bert", 1.0)])
    def test_same_loss_and_gradients(self, family, rehearsal, tmp_path):
        runs, calls = [], []
        for replays in (False, True):
            parent = varied_parent(family, warmup_ratio=0, rehearsal_probability=rehearsal)
            first = parent.get_submodule(f"model.{parent.sites[0].output}")
            first.register_forward_hook(lambda layer, *_, replays=replays: calls.append((replays, layer.training)))
            args = arguments(tmp_path, optim="sgd", learning_rate=0.05, activation_checkpointing=replays)
            runs.append(recorded(parent, args, train_dataset=SAMPLES[family]()))
        assert calls.count((True, True)) == 2 * calls.count((False, True))
        (plain, plain_recorder), (trainer, recorder) = runs
        assert_same_training(trainer, plain, ("loss", "grad_norm", "nemo/loss_task", "nemo/loss_contrastive"))
        for got, expected in zip(recorder.relevance, plain_recorder.relevance, strict=True):
            assert_same_state(got, expected, rtol=0, atol=0)


class TestC7UnusedParameters:
    @pytest.mark.parametrize("weight", [0.0, 0.5])
    def test_generators_get_a_gradient_where_all_samples_are_rehearsed(self, weight, tmp_path, monkeypatch):
        parent = varied_parent("vit", contrastive_weight=weight, sparsity_weight=weight, **REHEARSED)
        trainer = NeMoTrainer(parent, arguments(tmp_path), train_dataset=image_samples(10))
        monkeypatch.setattr(trainer, "_rehearsed_groups", lambda: torch.tensor([0, 1]))
        recorder = Recorder(parent)
        batch = batch_of([sample for sample in image_samples(20) if sample["labels"] < 2])
        parent.train()
        trainer.compute_loss(parent, batch).backward()
        assert recorder.calls[0]["static_samples"].all()
        for name, parameter in parent.masks.named_parameters():
            assert parameter.grad is not None, name
            assert bool(parameter.grad.any()) == bool(weight), name


class TestC8ResumeAndBestModel:
    @pytest.mark.parametrize("steps", [1, 2])
    def test_resumed_in_mid_epoch_from_a_whole_checkpoint(self, steps, tmp_path):
        def run(seed, **given):
            args = arguments(
                tmp_path, per_device_train_batch_size=8 // steps, gradient_accumulation_steps=steps, max_steps=6,
                save_strategy="steps", save_steps=3,
            )  # fmt: skip
            recorder = Recorder(varied_parent("vit", seed, **REHEARSED))
            trainer = NeMoTrainer(recorder.parent, args, train_dataset=image_samples(), callbacks=[recorder])
            trainer.train(**given)
            return trainer, recorder

        whole, whole_recorder = run(0)
        for step in (3, 6):
            files = {file.name for file in (tmp_path / f"checkpoint-{step}").iterdir()}
            assert {"config.json", "model.safetensors"} <= files
            assert "training_args.bin" not in files
        loaded = NeMoForImageClassification.from_pretrained(tmp_path / "checkpoint-3")
        assert loaded.config.training["arguments"]["per_device_train_batch_size"] == 8 // steps
        assert_same_state(loaded.masks.relevance(), whole_recorder.relevance[2], rtol=0, atol=0)
        (tmp_path / "checkpoint-6" / "trainer_state.json").unlink()  # as if the process had died before
        with pytest.raises(ValueError, match=r"checkpoint-6.*trainer_state\.json, which is written last"):
            run(1, resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
        # Other weights and another relevance to begin with.
        resumed, recorder = run(1, resume_from_checkpoint=True)
        assert [call["step"] for call in recorder.calls] == [step for step in (3, 4, 5) for _ in range(steps)]
        for call, expected in zip(recorder.calls, whole_recorder.calls[3 * steps :], strict=True):
            assert torch.equal(call["pixel_values"], expected["pixel_values"])
            assert torch.equal(call["static_samples"], expected["static_samples"])
            assert_same_state(call["static_masks"], expected["static_masks"], rtol=0, atol=0)
        for relevance, expected in zip(recorder.relevance, whole_recorder.relevance[3:], strict=True):
            assert_same_state(relevance, expected, rtol=0, atol=0)
        for name in ("loss", "grad_norm", "nemo/loss_task", "nemo/loss_contrastive", "nemo/neuron_retention_rate"):
            assert history(resumed, name) == pytest.approx(history(whole, name), abs=1e-6), name
        assert_same_state(resumed.parent.state_dict(), whole.parent.state_dict(), rtol=0, atol=1e-6)

    def test_the_best_model_is_loaded_at_the_end_and_after_an_early_stop(self, tmp_path):
        scores = iter([1.0, 3.0, 2.0, 1.0, 0.0])
        args = arguments(
            tmp_path, max_steps=9, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
            load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True,
        )  # fmt: skip
        trainer = NeMoTrainer(
            varied_parent("vit"), args, train_dataset=image_samples(), eval_dataset=image_samples(10),
            compute_metrics=lambda prediction: {"score": next(scores)}, callbacks=[EarlyStoppingCallback(2)],
        )  # fmt: skip
        trainer.train()
        assert (trainer.state.global_step, trainer.parent.config.relevance_source) == (4, "exact")
        assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
        assert trainer.parent.report is None  # it was of the last model
        counted = NeMoForImageClassification.from_pretrained(tmp_path / "checkpoint-2")
        compute_relevance(counted, [batch_of(image_samples())], show_progress=False)
        assert_same_state(trainer.parent.masks.relevance(), counted.masks.relevance(), rtol=0, atol=0)
        parameters = {name: tensor for name, tensor in state(trainer.parent).items() if "relevance" not in name}
        best, last = (load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in (2, 4))
        for name, tensor in parameters.items():
            assert torch.equal(tensor, best[name]), name
            assert not tensor.is_floating_point() or not torch.equal(tensor, last[name]), name
