"""What `NeMoTrainer` does: data and groups, losses and logs, rehearsal, refusals, starting points, saving."""

import copy
import gc
import json
import logging
import random
import re

import datasets
import numpy as np
import pytest
import tokenizers
import torch
from conftest import LABELS, build, fresh, image_samples, randomize_relevance, text_samples
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTImageProcessor,
)

import nemo_hf.training.trainer
from nemo_hf import NeMoConfig, NeMoForImageClassification, NeMoTrainer, make_parent
from nemo_hf.evaluation.metrics import cohesion_and_coupling
from nemo_hf.training.losses import contrastive_loss, site_masks, sparsity_loss
from nemo_hf.training.relevance import RUNNING_WINDOW

SAMPLES = {"vit": image_samples, "bert": text_samples, "albert": text_samples}
DOMAINS = ["pet", "pet", "vehicle", "vehicle", "pet"]


@pytest.fixture(autouse=True, scope="module")
def quick_collection():
    """`Trainer.train` ends with a collection of garbage: 0.2 s over all of torch, unless that is set aside."""
    gc.freeze()
    yield
    gc.unfreeze()


def arguments(directory, **options):
    defaults = {
        "output_dir": str(directory),
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
        "per_device_train_batch_size": 20,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "max_steps": 2,
    }
    return TrainingArguments(**{**defaults, **options})


def without_dropout(model):
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    return model


_LIVELY = {}


def lively_parent(family, seed=0, **options):
    """A parent without dropout whose masks differ by sample, some of them closed, and with a random relevance."""
    key = (family, seed, repr(options))
    if key not in _LIVELY:
        parent = without_dropout(make_parent(build(family, seed), NeMoConfig(**options)))
        generator = torch.Generator().manual_seed(seed)
        for mask in parent.masks.site_masks():
            for weight in (mask.generator.down.weight, mask.generator.up.weight):
                torch.nn.init.normal_(weight, std=0.5, generator=generator)
            torch.nn.init.zeros_(mask.generator.up.bias)
        randomize_relevance(parent, seed)
        _LIVELY[key] = parent
    return copy.deepcopy(_LIVELY[key])


def batch_of(samples):
    return {name: torch.stack([torch.as_tensor(sample[name]) for sample in samples]) for name in samples[0]}


def history(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(got, expected, **tolerance):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def check_message(error, *words):
    message = str(error.value)
    assert re.fullmatch(r"Got .+; expected .+\. [A-Z].+", message), message
    for word in words:
        assert word in message


class Recorder(TrainerCallback):
    """Keeps what the parent was called with in training, and its relevance after each optimizer step."""

    def __init__(self, parent):
        self.calls, self.outputs, self.relevance, self.substeps = [], [], [], []
        self.parent = parent
        parent.register_forward_pre_hook(self._on_call, with_kwargs=True)
        parent.register_forward_hook(self._on_output)

    def _on_call(self, model, args, kwargs):
        if model.training:
            self.calls.append({**kwargs, "step": self.step})

    def _on_output(self, model, args, output):
        if model.training:
            self.outputs.append(output)

    def _relevance(self):
        return {key: relevance.clone() for key, relevance in self.parent.masks.relevance().items()}

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step

    def on_substep_end(self, args, state, control, **kwargs):
        self.substeps.append(self._relevance())

    def on_step_end(self, args, state, control, **kwargs):
        self.relevance.append(self._relevance())


def recorded(parent, args, **kwargs):
    recorder = Recorder(parent)
    trainer = NeMoTrainer(parent, args, callbacks=[recorder], **kwargs)
    trainer.train()
    return trainer, recorder


def stripes(pixel_values):
    """The labels of `image_samples`, read off the images."""
    return pixel_values[:, :, :15].mean((1, 3)).view(-1, 5, 3).mean(-1).argmax(-1)


def text_dataset(**columns):
    samples = text_samples(20)
    data = {
        "input_ids": [sample["input_ids"].tolist() for sample in samples],
        "attention_mask": [sample["attention_mask"].tolist() for sample in samples],
        "label": [sample["labels"] for sample in samples],
    }
    return datasets.Dataset.from_dict({**data, **columns})


def domain_column(count=20):
    return [DOMAINS[index % 5] for index in range(count)]


def tiny_tokenizer():
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *(f"w{index}" for index in range(118))])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]")


class TestSameAsTrainer:
    @pytest.mark.parametrize("detach_pooled", [True, False])
    @pytest.mark.parametrize(("family", "optim"), [("vit", "sgd"), ("bert", "adamw_torch")])
    def test_base_weights_are_those_of_trainer(self, family, optim, detach_pooled, tmp_path):
        config = NeMoConfig(
            contrastive_weight=0, sparsity_weight=0, rehearsal_probability=0, mask_learning_rate=0.0,
            detach_pooled=detach_pooled,
        )  # fmt: skip
        # Generators have gradients too, which count in the norm that clips.
        args = arguments(tmp_path, optim=optim, weight_decay=0.1, max_steps=3, max_grad_norm=0)
        trainer = NeMoTrainer(without_dropout(fresh(family)), args, train_dataset=SAMPLES[family](), nemo_config=config)
        if not detach_pooled:
            for mask in trainer.parent.masks.site_masks():
                # Far in the saturation of tanh, where an open mask passes no gradient to the layers below it.
                torch.nn.init.constant_(mask.generator.up.bias, 50.0)
        trainer.train()
        assert history(trainer, "neuron_retention_rate") == [1.0] * 3
        plain = Trainer(without_dropout(fresh(family)), args, train_dataset=SAMPLES[family]())
        before = state(plain.model)
        plain.train()
        assert_same_state(trainer.parent.model.state_dict(), state(plain.model), rtol=0, atol=1e-6)
        assert history(trainer) == pytest.approx(history(plain), abs=1e-6)
        assert any(not torch.equal(before[name], tensor) for name, tensor in plain.model.state_dict().items())

    def test_takes_positional_arguments_in_the_same_order(self, vit, tmp_path):
        train, test = image_samples(20), image_samples(10, seed=1)
        trainer = NeMoTrainer(vit, arguments(tmp_path), None, train, test)
        assert trainer.train_dataset is train
        assert trainer.eval_dataset is test

    def test_evaluates_without_training_data(self, tmp_path):
        trainer = NeMoTrainer(lively_parent("vit"), arguments(tmp_path), eval_dataset=image_samples(10))
        assert trainer.evaluate()["eval_loss"] > 0

    def test_evaluates_and_predicts_without_labels(self, vit, tmp_path):
        unlabelled = [{"pixel_values": sample["pixel_values"]} for sample in image_samples(10)]
        trainer = NeMoTrainer(vit, arguments(tmp_path), train_dataset=image_samples())
        output = trainer.predict(unlabelled)
        assert output.predictions.shape == (10, 5)
        assert output.label_ids is None
        assert "eval_loss" not in trainer.evaluate(unlabelled)

    def test_an_own_loss_function_is_used_without_rehearsal(self, tmp_path):
        def twice(outputs, labels, num_items_in_batch=None):
            return 2 * F.cross_entropy(outputs.logits, labels)

        config = {"rehearsal_probability": 0, "contrastive_weight": 0, "sparsity_weight": 0}
        samples = image_samples(10)
        args = arguments(tmp_path, per_device_train_batch_size=10, max_steps=1)
        parent = lively_parent("vit", **config)
        with torch.no_grad():
            expected = 2 * parent.train()(**batch_of(samples)).loss.item()
        trainer = NeMoTrainer(parent, args, train_dataset=samples, compute_loss_func=twice)
        trainer.train()
        assert history(trainer) == pytest.approx([expected], rel=1e-5)


class TestOptimizer:
    def test_only_generators_get_the_mask_learning_rate(self, vit, tmp_path):
        args = arguments(tmp_path, learning_rate=1e-3, weight_decay=0.1)
        config = NeMoConfig(mask_learning_rate=0.5)
        trainer = NeMoTrainer(vit, args, train_dataset=image_samples(), nemo_config=config)
        names = {id(parameter): name for name, parameter in trainer.parent.named_parameters()}
        decayed = trainer.get_decay_parameter_names(trainer.parent)
        seen = []
        for group in trainer.create_optimizer().param_groups:
            for parameter in group["params"]:
                name = names[id(parameter)]
                seen.append(name)
                assert group["lr"] == (0.5 if ".generator." in name else 1e-3), name
                assert group["weight_decay"] == (0.1 if name in decayed else 0.0), name
        assert sorted(seen) == sorted(names.values())

    def test_generators_learn_three_times_as_fast_by_default(self, vit, tmp_path):
        trainer = NeMoTrainer(vit, arguments(tmp_path, learning_rate=1e-3), train_dataset=image_samples())
        optimizer = trainer.create_optimizer()
        generators = {id(parameter) for parameter in trainer.parent.masks.parameters()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assert group["lr"] == pytest.approx(3e-3 if id(parameter) in generators else 1e-3)
        assert trainer.create_optimizer() is optimizer

    def test_an_own_optimizer_is_kept(self, tmp_path):
        parent = lively_parent("vit", mask_learning_rate=0.5)
        optimizer = torch.optim.SGD(parent.parameters(), lr=0.1)
        args = arguments(tmp_path, max_steps=1)
        trainer = NeMoTrainer(parent, args, train_dataset=image_samples(20), optimizers=(optimizer, None))
        trainer.train()
        assert [group["initial_lr"] for group in optimizer.param_groups] == [0.1]

    @pytest.mark.parametrize("family", ["vit", "bert"])
    def test_every_parameter_moves(self, family, tmp_path):
        trainer = NeMoTrainer(fresh(family), arguments(tmp_path), train_dataset=SAMPLES[family]())
        before = state(trainer.parent)
        trainer.train()
        still = [n for n, parameter in trainer.parent.named_parameters() if torch.equal(parameter, before[n])]
        assert still == []


class TestLossesAndLogs:
    config = {"rehearsal_probability": 0, "warmup_ratio": 0, "contrastive_weight": 0.7, "sparsity_weight": 0.3}

    @pytest.mark.parametrize("family", ["vit", "bert", "albert"])
    def test_terms_of_one_step_recomputed(self, family, tmp_path):
        samples = SAMPLES[family](15)
        parent = lively_parent(family, **self.config)
        batch = batch_of(samples)
        with torch.no_grad():
            outputs = parent.train()(**batch)
        masks = site_masks(outputs.neuron_masks)
        task = F.cross_entropy(outputs.logits, batch["labels"]).item()
        contrast = contrastive_loss(masks, batch["labels"], 0.2).item()
        retained = np.mean([(mask > 0).float().mean().item() for mask in masks])
        args = arguments(tmp_path, per_device_train_batch_size=15, max_steps=1)
        trainer = NeMoTrainer(parent, args, train_dataset=samples)
        trainer.train()
        assert history(trainer, "loss_task") == pytest.approx([task], abs=2e-6)
        assert history(trainer, "loss_contrastive") == pytest.approx([contrast], abs=2e-6)
        assert history(trainer, "neuron_retention_rate") == pytest.approx([retained], abs=2e-6)
        assert 0.2 < retained < 0.8
        assert history(trainer) == pytest.approx([task + 0.7 * contrast + 0.3 * sparsity_loss(masks).item()], rel=1e-5)

    def test_contrast_is_over_groups(self, tmp_path):
        groups = {"a": [0, 1], "b": [2, 3, 4]}
        samples = image_samples(10)
        parent = lively_parent("vit", label_groups=groups, **self.config)
        batch = batch_of(samples)
        with torch.no_grad():
            masks = site_masks(parent.train()(**batch).neuron_masks)
        expected = contrastive_loss(masks, (batch["labels"] > 1).long(), 0.2).item()
        trainer = NeMoTrainer(parent, arguments(tmp_path, max_steps=1), train_dataset=samples)
        trainer.train()
        assert history(trainer, "loss_contrastive") == pytest.approx([expected], abs=2e-6)

    def test_logs_are_means_since_the_last_log(self, tmp_path):
        runs = []
        for every in (1, 3):
            args = arguments(tmp_path, max_steps=6, logging_steps=every, gradient_accumulation_steps=2)
            trainer = NeMoTrainer(lively_parent("vit", **self.config), args, train_dataset=image_samples())
            trainer.train()
            runs.append(trainer)
        for name in ("loss", "loss_task", "loss_contrastive", "neuron_retention_rate"):
            each = np.array(history(runs[0], name))
            assert history(runs[1], name) == pytest.approx(each.reshape(2, 3).mean(1).tolist(), abs=2e-6), name

    def test_a_second_training_logs_only_its_own_steps(self, tmp_path):
        config = {**self.config, "contrastive_weight": 0, "sparsity_weight": 0}
        args = arguments(tmp_path, max_steps=3, logging_steps=2)
        trainer = NeMoTrainer(lively_parent("vit", **config), args, train_dataset=image_samples())
        trainer.train()
        trainer.train()
        assert history(trainer, "loss_task") == pytest.approx(history(trainer), abs=2e-6)

    def test_mask_terms_grow_over_the_warm_up(self, tmp_path):
        config = {**self.config, "warmup_ratio": 0.5, "sparsity_weight": 0}
        args = arguments(tmp_path, max_steps=4)
        trainer = NeMoTrainer(lively_parent("vit", **config), args, train_dataset=image_samples())
        trainer.train()
        terms = zip(history(trainer), history(trainer, "loss_task"), history(trainer, "loss_contrastive"), strict=True)
        strengths = [(loss - task) / (0.7 * contrast) for loss, task, contrast in terms]
        assert strengths == pytest.approx([1 / 3, 2 / 3, 1, 1], abs=1e-4)

    def test_evaluation_logs_are_not_mixed_with_training(self, tmp_path):
        args = arguments(tmp_path, eval_strategy="steps", eval_steps=1)
        trainer = NeMoTrainer(lively_parent("vit"), args, train_dataset=image_samples(), eval_dataset=image_samples(10))
        trainer.train()
        evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
        assert len(evaluations) == 2
        assert all("loss_task" not in entry for entry in evaluations)

    def test_a_batch_without_positives_is_told_once(self, tmp_path, caplog):
        args = arguments(tmp_path, per_device_train_batch_size=5, train_sampling_strategy="sequential")
        trainer = NeMoTrainer(lively_parent("vit"), args, train_dataset=image_samples(10))
        with caplog.at_level(logging.WARNING, logger="nemo_hf"):
            trainer.train()
        warnings = [record.getMessage() for record in caplog.records if "two of one group" in record.getMessage()]
        assert len(warnings) == 1
        assert re.fullmatch(r"Got a batch of 5 samples of 5 groups; expected .+\. Raise .+\.", warnings[0])
        assert history(trainer, "loss_contrastive") == [0.0, 0.0]

    def test_batches_with_positives_are_not_warned_about(self, tmp_path, caplog):
        trainer = NeMoTrainer(lively_parent("vit"), arguments(tmp_path), train_dataset=image_samples(20))
        with caplog.at_level(logging.WARNING, logger="nemo_hf"):
            trainer.train()
        assert caplog.records == []

    def test_mixed_precision_trains(self, tmp_path):
        trainer = NeMoTrainer(lively_parent("vit"), arguments(tmp_path, bf16=True), train_dataset=image_samples(20))
        before = state(trainer.parent)
        trainer.train()
        assert np.isfinite(history(trainer)).all()
        assert np.isfinite(history(trainer, "grad_norm")).all()
        after = trainer.parent.state_dict()
        assert all(after[name].dtype == tensor.dtype for name, tensor in before.items())

    @pytest.mark.parametrize("run", ["train", "evaluate"])
    def test_modules_are_cut_after_mixed_precision(self, run, tmp_path):
        samples = image_samples(20)
        args = arguments(tmp_path, bf16=True)
        trainer = NeMoTrainer(lively_parent("vit"), args, train_dataset=samples, eval_dataset=samples)
        getattr(trainer, run)()
        # The equivalence check runs in float32, whatever precision the trainer ran in.
        assert trainer.extract_module(["cat", "dog"]).config.equivalence["status"] == "verified"


class TestEvaluation:
    @pytest.mark.parametrize("with_metrics", [False, True])
    def test_adds_cohesion_and_coupling(self, with_metrics, tmp_path):
        samples = image_samples(20)
        parent = lively_parent("vit")
        metrics = (lambda prediction: {"accuracy": 0.5}) if with_metrics else None
        args = arguments(tmp_path, per_device_eval_batch_size=8)
        got = NeMoTrainer(parent, args, eval_dataset=samples, compute_metrics=metrics).evaluate()
        batch = batch_of(samples)
        with torch.no_grad():
            masks = parent.eval()(**batch, output_neuron_masks=True).neuron_masks
        opened = torch.cat([(mask > 0).any(1) for mask in masks.values()], -1)
        cohesion, coupling = cohesion_and_coupling(opened, batch["labels"])
        assert got.get("eval_cohesion") == pytest.approx(cohesion, abs=1e-6)
        assert got.get("eval_coupling") == pytest.approx(coupling, abs=1e-6)
        assert got.get("eval_modularity_samples") == 20
        assert 0 < coupling < cohesion < 1

    def test_cohesion_and_coupling_are_in_the_log(self, tmp_path):
        args = arguments(tmp_path, eval_strategy="steps", eval_steps=2)
        trainer = NeMoTrainer(
            lively_parent("vit"), args, train_dataset=image_samples(20), eval_dataset=image_samples(10),
            compute_metrics=lambda prediction: {"accuracy": 0.5},
        )  # fmt: skip
        trainer.train()
        assert len(history(trainer, "eval_cohesion")) == len(history(trainer, "eval_coupling")) == 1
        assert history(trainer, "eval_accuracy") == [0.5]

    def test_are_of_samples_spread_over_the_data(self, tmp_path, monkeypatch):
        monkeypatch.setattr(nemo_hf.training.trainer, "MODULARITY_SAMPLES", 7)
        samples = image_samples(20)
        parent = lively_parent("vit")
        metrics = {"compute_metrics": lambda prediction: {}}
        args = arguments(tmp_path, per_device_eval_batch_size=4)
        got = NeMoTrainer(parent, args, eval_dataset=samples, **metrics).evaluate()
        first = NeMoTrainer(parent, args, eval_dataset=samples[::3], **metrics).evaluate()
        assert got["eval_modularity_samples"] == 7
        assert [got[f"eval_{n}"] for n in ("cohesion", "coupling")] == [
            first[f"eval_{n}"] for n in ("cohesion", "coupling")
        ]

    def test_take_the_names_of_several_data_sets(self, tmp_path):
        sets = {"a": image_samples(10), "b": image_samples(10, seed=1)}
        trainer = NeMoTrainer(
            lively_parent("vit"), arguments(tmp_path), eval_dataset=sets, compute_metrics=lambda prediction: {}
        )
        got = trainer.evaluate()
        assert {"eval_a_cohesion", "eval_b_cohesion", "eval_a_coupling", "eval_b_coupling"} <= got.keys()
        assert "test_cohesion" in trainer.evaluate(sets["a"], metric_key_prefix="test")

    def test_coupling_is_left_out_where_there_is_one_group(self, tmp_path):
        samples = [sample for sample in image_samples(20) if sample["labels"] == 3]
        trainer = NeMoTrainer(
            lively_parent("vit"), arguments(tmp_path), eval_dataset=samples, compute_metrics=lambda prediction: {}
        )
        got = trainer.evaluate()
        assert "eval_cohesion" in got
        assert "eval_coupling" not in got

    def test_prediction_adds_nothing(self, tmp_path):
        trainer = NeMoTrainer(lively_parent("vit"), arguments(tmp_path))
        assert not [name for name in trainer.predict(image_samples(10)).metrics if "coupling" in name]

    def test_module_report_is_of_the_evaluation_data(self, tmp_path):
        trainer = NeMoTrainer(lively_parent("vit"), arguments(tmp_path), eval_dataset=image_samples(20))
        report = trainer.evaluate_module(["dog", "cat"])
        assert report.labels == ["dog", "cat"]
        assert report.samples == 8
        assert trainer.evaluate_module(["dog", "cat"], image_samples(10)).samples == 4


class TestRehearsal:
    config = {"rehearsal_probability": 1.0, "warmup_ratio": 0.0}

    def drawn(self, call):
        """The labels that a batch of all labels shows as rehearsed."""
        labels = stripes(call["pixel_values"])
        rehearsed = set(labels[call["static_samples"]].tolist())
        assert rehearsed.isdisjoint(labels[~call["static_samples"]].tolist())
        return rehearsed

    def test_micro_batches_of_a_step_share_the_groups(self, tmp_path):
        args = arguments(
            tmp_path, per_device_train_batch_size=10, gradient_accumulation_steps=4, max_steps=4,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        _, recorder = recorded(lively_parent("vit", **self.config), args, train_dataset=image_samples(40))
        drawn = [self.drawn(call) for call in recorder.calls]
        assert len(drawn) == 16
        steps = [drawn[index : index + 4] for index in range(0, 16, 4)]
        assert all(groups == micro[0] for micro in steps for groups in micro)
        assert len({frozenset(micro[0]) for micro in steps}) > 1

    def test_groups_depend_on_seed_and_step_only(self, tmp_path):
        def drawn(seed, noise, batch):
            random.seed(noise)
            torch.manual_seed(noise)
            args = arguments(tmp_path, max_steps=4, seed=seed, data_seed=noise, per_device_train_batch_size=batch)
            _, recorder = recorded(lively_parent("vit", **self.config), args, train_dataset=image_samples())
            return [self.drawn(call) for call in recorder.calls]

        first = drawn(0, noise=1, batch=40)
        assert drawn(0, noise=2, batch=40) == first
        assert drawn(7, noise=1, batch=40) != first

    @pytest.mark.parametrize(("label_groups", "least", "most"), [(None, 1, 4), ({"a": [0, 1], "b": [2, 3, 4]}, 1, 1)])
    def test_draws_some_but_not_all_groups(self, label_groups, least, most, tmp_path):
        parent = lively_parent("vit", label_groups=label_groups, rehearsal_probability=0.5, warmup_ratio=0)
        trainer = NeMoTrainer(parent, arguments(tmp_path), train_dataset=image_samples(10))
        sizes = []
        for step in range(300):
            trainer.state.global_step = step
            drawn = trainer._rehearsed_groups()
            sizes.append(0 if drawn is None else len(drawn.unique()))
        used = [size for size in sizes if size]
        assert 0.4 < len(used) / 300 < 0.6
        assert (min(used), max(used)) == (least, most)

    def test_of_two_labels_one_is_rehearsed(self, tmp_path):
        parent = make_parent(two_label_vit(), NeMoConfig(**self.config))
        samples = [sample for sample in image_samples(20) if sample["labels"] < 2]
        _, recorder = recorded(parent, arguments(tmp_path), train_dataset=samples)
        assert {len(self.drawn(call)) for call in recorder.calls} == {1}

    def test_one_group_leaves_nothing_to_rehearse(self, tmp_path):
        parent = lively_parent("vit", label_groups={"all": [0, 1, 2, 3, 4]}, **self.config)
        _, recorder = recorded(parent, arguments(tmp_path), train_dataset=image_samples(20))
        assert all(call.get("static_masks") is None for call in recorder.calls)

    def test_waits_for_the_end_of_the_warm_up(self, tmp_path):
        parent = lively_parent("vit", rehearsal_probability=1.0, warmup_ratio=0.5)
        _, recorder = recorded(parent, arguments(tmp_path, max_steps=4), train_dataset=image_samples())
        assert [call.get("static_masks") is not None for call in recorder.calls] == [False, False, True, True]

    def test_does_not_run_when_switched_off(self, tmp_path):
        parent = lively_parent("vit", rehearsal_probability=0.0, warmup_ratio=0.0)
        _, recorder = recorded(parent, arguments(tmp_path), train_dataset=image_samples())
        assert all(call.get("static_masks") is None for call in recorder.calls)

    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_task_loss_of_a_step_by_hand(self, smoothing, tmp_path):
        samples = image_samples(15)
        batch = batch_of(samples)
        parent = lively_parent("vit", relevance_threshold=0.5, **self.config)
        before = copy.deepcopy(parent)
        args = arguments(tmp_path, max_steps=1, label_smoothing_factor=smoothing)
        trainer, recorder = recorded(parent, args, train_dataset=samples)
        chosen = sorted(self.drawn(recorder.calls[0]))
        static = {
            key: (relevance[chosen].amax(0) >= 0.5 * 255).float() for key, relevance in before.masks.relevance().items()
        }
        assert 0 < sum(mask.mean() for mask in static.values()) < len(static)
        losses = []
        for image, label in zip(batch["pixel_values"], batch["labels"], strict=True):
            with torch.no_grad():
                masks = {"static_masks": static} if int(label) in chosen else {}
                logits = before(pixel_values=image[None], output_neuron_masks=True, **masks).logits
            losses.append(F.cross_entropy(logits, label[None], label_smoothing=smoothing).item())
        assert history(trainer, "loss_task") == pytest.approx([np.mean(losses)], abs=1e-5)

    def test_a_group_is_rehearsed_with_all_its_labels(self, tmp_path):
        groups = {"a": [0, 1], "b": [2, 3], "c": [4]}
        parent = lively_parent("vit", label_groups=groups, **self.config)
        _, recorder = recorded(parent, arguments(tmp_path, max_steps=4), train_dataset=image_samples())
        for call in recorder.calls:
            drawn = self.drawn(call)
            assert all(drawn >= set(members) or drawn.isdisjoint(members) for members in groups.values())


class TestRunningRelevance:
    config = {"rehearsal_probability": 0.0}

    def test_moves_towards_the_counts_of_the_groups_present(self, tmp_path):
        samples = [sample for sample in image_samples(20) if sample["labels"] in (1, 3)]
        parent = lively_parent("vit", **self.config)
        before = copy.deepcopy(parent)
        batch = batch_of(samples)
        with torch.no_grad():
            masks = before.train()(**batch).neuron_masks
        args = arguments(tmp_path, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=4)
        _, recorder = recorded(parent, args, train_dataset=samples, relevance_dataset=image_samples(20))
        for key, start in before.masks.relevance().items():
            assert all(torch.equal(relevance[key], start) for relevance in recorder.substeps)
            moved = recorder.relevance[0][key]
            for group in (0, 2, 4):
                assert torch.equal(moved[group], start[group])
            for group in (1, 3):
                opened = (masks[key][batch["labels"] == group] > 0).any(1).float().mean(0)
                weight = 1 - (1 - 1 / RUNNING_WINDOW) ** 4
                expected = start[group] / 255 + weight * (opened - start[group] / 255)
                assert (moved[group] - expected * 255).abs().max() < 1
                assert not torch.equal(moved[group], start[group])
        assert len(recorder.substeps) == 3

    def test_is_the_same_for_micro_batches(self, tmp_path):
        runs = []
        for size, steps in ((20, 1), (5, 4)):
            args = arguments(
                tmp_path, max_steps=2, per_device_train_batch_size=size, gradient_accumulation_steps=steps,
                learning_rate=0.0, train_sampling_strategy="sequential",
            )  # fmt: skip
            _, recorder = recorded(lively_parent("vit", **self.config), args, train_dataset=image_samples())
            runs.append(recorder.relevance)
        for whole, parts in zip(*runs, strict=True):
            assert all(torch.equal(whole[key], parts[key]) for key in whole)

    def test_evaluation_counts_nothing(self, tmp_path):
        parent = lively_parent("vit", **self.config)
        trainer = NeMoTrainer(parent, arguments(tmp_path), eval_dataset=image_samples(10))
        before = state(parent)
        trainer.evaluate()
        trainer.predict(image_samples(10))
        assert_same_state(parent.state_dict(), before, rtol=0, atol=0)


class TestLabelGroups:
    def groups(self, tmp_path, dataset, **options):
        config = NeMoConfig(**options)
        return NeMoTrainer(fresh("bert"), arguments(tmp_path), train_dataset=dataset, nemo_config=config).parent.config

    def test_each_label_by_default(self, tmp_path):
        config = self.groups(tmp_path, text_dataset())
        assert config.groups == {name: [index] for index, name in enumerate(LABELS)}

    @pytest.mark.parametrize(
        "label_groups",
        [
            {"pet": ["cat", "dog", "frog"], "vehicle": ["car", "ship"]},
            {"pet": [0, 1, 4], "vehicle": [2, 3]},
            {"pet": ["cat", 1, "frog"], "vehicle": ["car", 3]},
        ],
    )
    def test_from_names_and_ids(self, label_groups, tmp_path):
        config = self.groups(tmp_path, text_dataset(), label_groups=label_groups)
        assert config.groups == {"pet": [0, 1, 4], "vehicle": [2, 3]}

    def test_from_a_column_of_strings(self, tmp_path):
        config = self.groups(tmp_path, text_dataset(domain=domain_column()), group_column="domain")
        assert config.groups == {"pet": [0, 1, 4], "vehicle": [2, 3]}

    def test_from_a_column_of_class_labels(self, tmp_path):
        names = ["vehicle", "pet"]
        dataset = text_dataset(domain=[names.index(name) for name in domain_column()])
        dataset = dataset.cast_column("domain", datasets.ClassLabel(names=names))
        config = self.groups(tmp_path, dataset, group_column="domain")
        assert config.groups == {"pet": [0, 1, 4], "vehicle": [2, 3]}

    def test_from_a_column_of_a_formatted_data_set(self, tmp_path):
        dataset = text_dataset(domain=domain_column()).with_format("torch")
        config = self.groups(tmp_path, dataset, group_column="domain")
        assert config.groups == {"pet": [0, 1, 4], "vehicle": [2, 3]}

    def test_train_and_are_saved(self, tmp_path):
        trainer = NeMoTrainer(
            fresh("bert"), arguments(tmp_path), train_dataset=text_dataset(domain=domain_column()),
            nemo_config=NeMoConfig(group_column="domain"),
        )  # fmt: skip
        trainer.train()
        assert all(len(relevance) == 2 for relevance in trainer.parent.masks.relevance().values())
        trainer.save_model(tmp_path / "parent")
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "parent")
        assert loaded.config.groups == {"pet": [0, 1, 4], "vehicle": [2, 3]}
        assert list(loaded.extract_module("vehicle").config.id2label.values()) == ["car", "ship"]

    def test_a_column_that_is_no_function_of_the_label_is_refused(self, tmp_path):
        domains = domain_column()
        domains[5] = "vehicle"
        with pytest.raises(ValueError, match="one group a label") as error:
            self.groups(tmp_path, text_dataset(domain=domains), group_column="domain")
        check_message(error, "'cat'", "'pet'", "'vehicle'", "'domain'")

    def test_an_unknown_column_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="group_column") as error:
            self.groups(tmp_path, text_dataset(), group_column="domain")
        check_message(error, "'domain'", "input_ids")

    def test_a_column_of_other_data_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="group_column") as error:
            self.groups(tmp_path, text_samples(10), group_column="domain")
        check_message(error, "datasets.Dataset")


class TestRefusals:
    def test_a_data_set_without_labels(self, bert, tmp_path):
        with pytest.raises(ValueError, match="label") as error:
            NeMoTrainer(bert, arguments(tmp_path), train_dataset=text_dataset().remove_columns("label"))
        check_message(error, "input_ids", "rename_column")

    def test_batches_without_labels(self, vit, tmp_path):
        unlabelled = [{"pixel_values": sample["pixel_values"]} for sample in image_samples(10)]
        trainer = NeMoTrainer(vit, arguments(tmp_path), train_dataset=unlabelled)
        with pytest.raises(ValueError, match="'labels'") as error:
            trainer.train()
        check_message(error, "pixel_values")

    @pytest.mark.parametrize(
        "make_model", [lambda: fresh("bert"), lambda: lively_parent("bert")], ids=["plain", "parent"]
    )
    def test_a_label_without_a_training_sample(self, make_model, tmp_path):
        dataset = text_dataset().filter(lambda sample: sample["label"] not in (1, 3))
        with pytest.raises(ValueError, match="without a sample") as error:
            NeMoTrainer(make_model(), arguments(tmp_path), train_dataset=dataset)
        check_message(error, "'dog'", "'ship'")

    def test_a_label_without_a_sample_in_other_data(self, vit, tmp_path):
        samples = [sample for sample in image_samples(20) if sample["labels"] != 2]
        trainer = NeMoTrainer(vit, arguments(tmp_path, max_steps=1), train_dataset=samples)
        with pytest.raises(ValueError, match="without a sample") as error:
            trainer.train()
        check_message(error, "'car'")

    @pytest.mark.parametrize(
        "make_model", [lambda: fresh("bert"), lambda: lively_parent("bert")], ids=["plain", "parent"]
    )
    def test_a_label_id_that_is_too_large(self, make_model, tmp_path):
        dataset = text_dataset(label=[index % 7 for index in range(20)])
        with pytest.raises(ValueError, match="label id 6") as error:
            NeMoTrainer(make_model(), arguments(tmp_path), train_dataset=dataset)
        check_message(error, "num_labels=7")

    def test_a_negative_label_id(self, bert, tmp_path):
        dataset = text_dataset(label=[index % 5 if index < 19 else -1 for index in range(20)])
        with pytest.raises(ValueError, match="label id -1") as error:
            NeMoTrainer(bert, arguments(tmp_path), train_dataset=dataset)
        check_message(error)

    def test_labels_by_name(self, bert, tmp_path):
        dataset = text_dataset(label=[LABELS[index % 5] for index in range(20)])
        with pytest.raises(ValueError, match="Got") as error:
            NeMoTrainer(bert, arguments(tmp_path), train_dataset=dataset)
        check_message(error, "'cat'")

    @pytest.mark.parametrize("kind", ["torch", "datasets"])
    def test_a_stream_without_relevance_data(self, kind, tmp_path):
        stream = Stream(text_samples(20)) if kind == "torch" else text_dataset().to_iterable_dataset()
        with pytest.raises(ValueError, match="iterable") as error:
            NeMoTrainer(fresh("bert"), arguments(tmp_path), train_dataset=stream)
        check_message(error, "relevance_dataset=")

    def test_an_own_loss_function_where_the_module_says_which_answers_count(self, vit, tmp_path):
        given = {"train_dataset": image_samples(), "compute_loss_func": lambda *args: 0}
        with pytest.raises(ValueError, match="compute_loss_func") as error:
            NeMoTrainer(vit, arguments(tmp_path), nemo_config=NeMoConfig(specificity_weight=1.0), **given)
        check_message(error, "rehearsal_probability=0")

    def test_a_module(self, tmp_path):
        module = lively_parent("vit").extract_module(["cat", "dog"])
        with pytest.raises(ValueError, match="module") as error:
            NeMoTrainer(module, arguments(tmp_path), train_dataset=image_samples())
        check_message(error, "transformers.Trainer")

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("targets", ["ffn"]),
            ("generator_rank", 3),
            ("hard_masks", False),
            ("label_groups", {"a": [0, 1], "b": [2, 3, 4]}),
            ("group_column", "domain"),
        ],
    )
    def test_a_parent_of_another_structure(self, name, value, tmp_path):
        with pytest.raises(ValueError, match=name) as error:
            NeMoTrainer(
                lively_parent("vit"), arguments(tmp_path), train_dataset=image_samples(),
                nemo_config=NeMoConfig(**{name: value}),
            )  # fmt: skip
        check_message(error)

    def test_more_than_one_gpu_in_one_process(self, vit, tmp_path, monkeypatch):
        args = arguments(tmp_path)
        monkeypatch.setattr(args, "_n_gpu", 2)
        with pytest.raises(ValueError, match="2 GPUs") as error:
            NeMoTrainer(vit, args, train_dataset=image_samples())
        check_message(error, "accelerate launch --num_processes 2")

    def test_a_model_on_several_gpus_of_one_process(self, vit, tmp_path):
        wrapped = torch.nn.DataParallel(vit)
        with pytest.raises(ValueError, match=r"nn\.DataParallel") as error:
            NeMoTrainer(wrapped, arguments(tmp_path), train_dataset=image_samples())
        check_message(error, "accelerate launch --num_processes")

    def test_a_replica_of_a_parent_does_not_run(self, tmp_path):
        replica = lively_parent("vit")._replicate_for_data_parallel()
        with pytest.raises(ValueError, match=r"nn\.DataParallel") as error:
            replica(pixel_values=batch_of(image_samples(2))["pixel_values"])
        check_message(error, "accelerate launch --num_processes")

    def test_extraction_of_an_unknown_label(self, tmp_path):
        trainer = NeMoTrainer(lively_parent("vit"), arguments(tmp_path))
        with pytest.raises(ValueError, match="'cow'"):
            trainer.extract_module(["cow"])


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, samples):
        self.samples, self.reads = samples, 0

    def __iter__(self):
        for sample in self.samples:
            self.reads += 1
            yield sample


class TestStreams:
    def test_train_with_relevance_data(self, tmp_path):
        samples = image_samples(20)
        trainer = NeMoTrainer(
            lively_parent("vit"), arguments(tmp_path), train_dataset=Stream(samples * 3), relevance_dataset=samples
        )
        trainer.train()
        assert trainer.parent.config.relevance_source == "exact"

    def test_are_not_read_before_training(self, tmp_path):
        reads = []

        def generate():
            for sample in text_samples(20):
                reads.append(sample)
                yield {"input_ids": sample["input_ids"].tolist(), "label": sample["labels"]}

        features = datasets.Features(
            {"input_ids": datasets.List(datasets.Value("int64")), "label": datasets.Value("int64")}
        )
        stream = datasets.IterableDataset.from_generator(generate, features=features)
        NeMoTrainer(fresh("bert"), arguments(tmp_path), train_dataset=stream, relevance_dataset=text_samples(20))
        assert len(reads) == 0


def two_label_vit():
    model = fresh("vit")
    config = copy.deepcopy(model.config)
    config.id2label, config.label2id = {0: "cat", 1: "dog"}, {"cat": 0, "dog": 1}
    return type(model)(config)


def hooks(parent):
    return sum(len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in parent.model.modules())


class TestStartingPoints:
    def test_a_plain_model(self, vit, tmp_path):
        weights = state(vit)
        trainer = NeMoTrainer(vit, arguments(tmp_path), train_dataset=image_samples())
        assert isinstance(trainer.model, NeMoForImageClassification)
        assert trainer.parent is trainer.model
        assert trainer.parent.model is vit
        assert trainer.parent.config.relevance_source == "initial"
        assert_same_state(vit.state_dict(), weights, rtol=0, atol=0)

    def test_a_saved_parent_is_trained_on_and_not_wrapped_again(self, tmp_path):
        first = NeMoTrainer(
            fresh("vit"), arguments(tmp_path), train_dataset=image_samples(), nemo_config=NeMoConfig(temperature=0.3)
        )
        first.train()
        first.save_model(tmp_path / "parent")
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "parent")
        count = hooks(loaded)
        trainer = NeMoTrainer(loaded, arguments(tmp_path), train_dataset=image_samples())
        assert trainer.parent is loaded
        assert hooks(loaded) == count == hooks(first.parent)
        assert trainer.nemo_config.temperature == 0.3
        assert_same_state(loaded.state_dict(), first.parent.state_dict(), rtol=0, atol=0)
        trainer.train()
        assert any(not torch.equal(a, b) for a, b in zip(loaded.parameters(), first.parent.parameters(), strict=True))

    def test_a_parent_takes_new_options_of_the_same_structure(self, tmp_path):
        parent = lively_parent("vit", label_groups={"a": [0, 1], "b": (2, 3, 4)})
        relevance = state(parent.masks)
        config = NeMoConfig(label_groups={"a": (0, 1), "b": [2, 3, 4]}, sparsity_weight=0.1, relevance_threshold=0.9)
        trainer = NeMoTrainer(parent, arguments(tmp_path), train_dataset=image_samples(), nemo_config=config)
        assert trainer.nemo_config == config
        assert_same_state(parent.masks.state_dict(), relevance, rtol=0, atol=0)

    @pytest.mark.parametrize("detach_pooled", [True, False])
    def test_a_new_option_of_a_parent_takes_effect(self, detach_pooled, tmp_path):
        parent = lively_parent("vit", detach_pooled=not detach_pooled)
        config = NeMoConfig(detach_pooled=detach_pooled, contrastive_weight=0, rehearsal_probability=0)
        trainer = NeMoTrainer(parent, arguments(tmp_path), train_dataset=image_samples(), nemo_config=config)
        gradients = []
        for model in (trainer.parent, lively_parent("vit", **config.to_dict())):
            trainer.compute_loss(model.train(), batch_of(image_samples(10))).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.model.vit.embeddings.parameters()]))
        torch.testing.assert_close(*gradients)

    def test_model_init(self, tmp_path):
        trainer = NeMoTrainer(
            args=arguments(tmp_path), train_dataset=image_samples(), model_init=lambda: fresh("vit"),
            nemo_config=NeMoConfig(targets=["ffn"]),
        )  # fmt: skip
        trainer.train()
        assert trainer.parent.config.relevance_source == "exact"
        assert {site.kind for site in trainer.parent.sites} == {"ffn"}
        first = state(trainer.parent)
        trainer.train()  # begins again from the plain model
        assert_same_state(trainer.parent.state_dict(), first, rtol=0, atol=0)

    def test_model_init_keeps_the_processor(self, tmp_path):
        trainer = NeMoTrainer(
            args=arguments(tmp_path, max_steps=1), train_dataset=image_samples(20), model_init=lambda: fresh("vit"),
            processing_class=ViTImageProcessor(size={"height": 16, "width": 16}),
        )  # fmt: skip
        trainer.train()
        trainer.save_model(tmp_path / "parent")
        assert (tmp_path / "parent" / "preprocessor_config.json").exists()

    def test_generators_depend_on_the_seed_of_the_arguments(self, tmp_path):
        parents = []
        for noise in (1, 2):
            torch.manual_seed(noise)
            trainer = NeMoTrainer(fresh("vit"), arguments(tmp_path, seed=0), train_dataset=image_samples())
            parents.append(trainer.parent)
        assert_same_state(parents[0].state_dict(), parents[1].state_dict(), rtol=0, atol=0)


class TestSaving:
    def test_a_parent_loads_with_the_same_logits_and_processor(self, vit, tmp_path):
        processor = ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.1, 0.2, 0.3])
        trainer = NeMoTrainer(vit, arguments(tmp_path), train_dataset=image_samples(), processing_class=processor)
        trainer.train()
        trainer.save_model(tmp_path / "parent")
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "parent")
        batch = batch_of(image_samples(10))
        with torch.no_grad():
            assert torch.equal(loaded(**batch).logits, trainer.parent.eval()(**batch).logits)
        assert loaded.config.relevance_source == "exact"
        assert_same_state(loaded.state_dict(), trainer.parent.state_dict(), rtol=0, atol=0)
        assert AutoImageProcessor.from_pretrained(tmp_path / "parent").image_mean == processor.image_mean

    @pytest.mark.parametrize("given_as", ["processing_class", "data_collator"])
    def test_a_parent_and_its_modules_carry_the_tokenizer(self, given_as, tmp_path):
        tokenizer = tiny_tokenizer()
        given = tokenizer if given_as == "processing_class" else DataCollatorWithPadding(tokenizer)
        parent = lively_parent("bert")
        trainer = NeMoTrainer(parent, arguments(tmp_path), train_dataset=text_samples(20), **{given_as: given})
        trainer.save_model(tmp_path / "parent")
        trainer.extract_module(["cat", "ship"]).save_pretrained(tmp_path / "module")
        expected = tokenizer("w3 w5 unknown", "w7")["input_ids"]
        for name in ("parent", "module"):
            loaded = AutoTokenizer.from_pretrained(tmp_path / name)
            assert loaded("w3 w5 unknown", "w7")["input_ids"] == expected
        reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "parent")
        batch = batch_of(text_samples(10))
        with torch.no_grad():
            assert torch.equal(reloaded(**batch).logits, parent.eval()(**batch).logits)

    def test_saves_into_the_output_directory_by_default(self, tmp_path):
        NeMoTrainer(lively_parent("vit"), arguments(tmp_path / "out")).save_model()
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["model_type"] == "nemo_hf"
        assert (tmp_path / "out" / "model.safetensors").exists()
        assert not list((tmp_path / "out").glob("*.bin"))

    def test_extraction_is_that_of_the_parent(self, tmp_path):
        parent = lively_parent("vit")
        module = NeMoTrainer(parent, arguments(tmp_path)).extract_module(["ship", 0], threshold=0.8, round_to=4)
        expected = parent.extract_module(["ship", 0], threshold=0.8, round_to=4)
        assert module.config.to_dict() == expected.config.to_dict()
        assert list(module.config.id2label.values()) == ["ship", "cat"]
        assert_same_state(module.state_dict(), expected.state_dict(), rtol=0, atol=0)

    def test_a_module_is_fine_tuned_by_trainer(self, vit, tmp_path):
        torch.manual_seed(0)
        parent = make_parent(type(vit)(vit.config))
        randomize_relevance(parent)
        before = state(parent)
        module = parent.extract_module(["cat", "dog"])
        samples = [sample for sample in image_samples(60) if sample["labels"] < 2]
        args = arguments(tmp_path, max_steps=8, learning_rate=5e-3)
        trainer = Trainer(module, args, train_dataset=samples, eval_dataset=samples)
        start = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < 0.6 * start
        assert_same_state(parent.state_dict(), before, rtol=0, atol=0)
        trainer.save_model(tmp_path / "module")
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "module")
        batch = batch_of(samples[:4])
        with torch.no_grad():
            assert torch.equal(loaded(**batch).logits, module.eval()(**batch).logits)
