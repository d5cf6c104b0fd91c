"""What `NeMoTrainer` does: data and groups, losses and logs, rehearsal, refusals, starting points, saving."""

import copy
import logging
import random
import shutil

import datasets
import numpy as np
import pytest
import torch
from conftest import fresh, generated, image_processor, image_samples, text_samples, tokenizer
from torch.nn import functional as F
from training_helpers import (
    DOMAINS,
    REHEARSED,
    SAMPLES,
    TASK_ALONE,
    arguments,
    assert_same_state,
    batch_of,
    check_message,
    history,
    recorded,
    state,
    text_table,
    varied_parent,
    without_dropout,
)
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
)
from transformers.trainer_utils import default_compute_objective

import nemo_hf.training.trainer
from nemo_hf import NeMoForImageClassification, NeMoTrainer
from nemo_hf.cli.demo import accuracy
from nemo_hf.evaluation.metrics import cohesion_and_coupling
from nemo_hf.training.losses import flatten_masks, mask_objective, sparsity_loss


class TestSameAsTrainer:
    @pytest.mark.parametrize(("family", "optim"), [("vit", "sgd"), ("bert", "adamw_torch")])
    def test_base_weights_are_those_of_trainer(self, family, optim, tmp_path):
        config = generated(**TASK_ALONE, mask_learning_rate=0.0)
        # Generators have gradients too, which count in the norm that clips.
        args = arguments(tmp_path, optim=optim, weight_decay=0.1, max_steps=3, max_grad_norm=0)
        trainer = NeMoTrainer(without_dropout(fresh(family)), args, train_dataset=SAMPLES[family](), nemo_config=config)
        trainer.train()
        assert history(trainer, "nemo/neuron_retention_rate") == [1.0] * 3
        plain = Trainer(without_dropout(fresh(family)), args, train_dataset=SAMPLES[family]())
        before = state(plain.model)
        plain.train()
        assert_same_state(trainer.parent.model.state_dict(), state(plain.model), rtol=0, atol=1e-6)
        assert history(trainer) == pytest.approx(history(plain), abs=1e-6)
        assert any(not torch.equal(before[name], tensor) for name, tensor in plain.model.state_dict().items())

    def test_evaluates_and_predicts_without_training_data_or_labels(self, tmp_path):
        unlabelled = [{"pixel_values": sample["pixel_values"]} for sample in image_samples(10)]
        trainer = NeMoTrainer(varied_parent("vit"), arguments(tmp_path))
        output = trainer.predict(unlabelled)
        assert output.predictions.shape == (10, 5)
        assert output.label_ids is None
        assert "eval_loss" not in trainer.evaluate(unlabelled)
        assert trainer.evaluate(image_samples(10))["eval_loss"] > 0
        with pytest.raises(ValueError, match="expected 'labels'"):
            trainer.evaluate_modularity(unlabelled)


class TestOptimizer:
    @pytest.mark.parametrize(("given", "rate"), [(0.5, 0.5), (None, 3e-3)])
    def test_only_generators_get_the_mask_learning_rate(self, given, rate, vit, tmp_path):
        args = arguments(tmp_path, learning_rate=1e-3, weight_decay=0.1)
        config = generated(mask_learning_rate=given)
        trainer = NeMoTrainer(vit, args, train_dataset=image_samples(), nemo_config=config)
        decayed, rates = trainer.get_decay_parameter_names(trainer.parent), {}
        for group in trainer.create_optimizer().param_groups:
            rates |= dict.fromkeys(group["params"], (group["lr"], group["weight_decay"]))
        assert len(rates) == len(list(trainer.parent.parameters()))
        for name, parameter in trainer.parent.named_parameters():
            expected = (rate if ".generator." in name else 1e-3, 0.1 if name in decayed else 0.0)
            assert rates[parameter] == pytest.approx(expected), name
        own = torch.optim.SGD(trainer.parent.parameters(), lr=0.1)  # is kept
        assert NeMoTrainer(trainer.parent, args, optimizers=(own, None)).create_optimizer() is own


class TestLossesAndLogs:
    config = {"rehearsal_probability": 0, "warmup_ratio": 0, "contrastive_weight": 0.7, "sparsity_weight": 0.3}

    @pytest.mark.parametrize(
        ("family", "label_groups"), [("vit", {"a": [0, 1], "b": [2, 3, 4]}), ("bert", None), ("albert", None)]
    )
    def test_terms_of_one_step_recomputed(self, family, label_groups, tmp_path):
        samples = SAMPLES[family](15)
        parent = varied_parent(family, label_groups=label_groups, **self.config)
        batch = batch_of(samples)
        with torch.no_grad():
            outputs = parent.train()(**batch)
        masks, widths = flatten_masks(outputs.neuron_masks)
        task = F.cross_entropy(outputs.logits, batch["labels"]).item()
        groups = (batch["labels"] > 1).long() if label_groups else batch["labels"]
        contrast = mask_objective(masks, widths, groups).item()
        retained = np.mean([(mask > 0).float().mean().item() for mask in masks.split(widths, -1)])
        args = arguments(tmp_path, per_device_train_batch_size=15, max_steps=1)
        trainer = NeMoTrainer(parent, args, train_dataset=samples)
        trainer.train()
        assert history(trainer, "nemo/loss_task") == pytest.approx([task], abs=2e-6)
        assert history(trainer, "nemo/loss_contrastive") == pytest.approx([contrast], abs=2e-6)
        assert history(trainer, "nemo/neuron_retention_rate") == pytest.approx([retained], abs=2e-6)
        assert 0.2 < retained < 0.8
        expected = task + 0.7 * contrast + 0.3 * sparsity_loss(masks, widths).item()
        assert history(trainer) == pytest.approx([expected], rel=1e-5)

    def test_logs_are_means_since_the_last_log(self, tmp_path):
        runs = []
        for every in (1, 3):
            args = arguments(tmp_path, max_steps=6, logging_steps=every, gradient_accumulation_steps=2)
            trainer = NeMoTrainer(varied_parent("vit", **self.config), args, train_dataset=image_samples())
            trainer.train()
            runs.append(trainer)
        for name in ("loss", "nemo/loss_task", "nemo/loss_contrastive", "nemo/neuron_retention_rate"):
            each = np.array(history(runs[0], name))
            assert history(runs[1], name) == pytest.approx(each.reshape(2, 3).mean(1).tolist(), abs=2e-6), name
        again = NeMoTrainer(varied_parent("vit", **TASK_ALONE), arguments(tmp_path, max_steps=3, logging_steps=2),
                            train_dataset=image_samples())  # fmt: skip
        for _ in range(2):  # a second training logs its own steps alone
            again.train()
            assert history(again, "nemo/loss_task") == pytest.approx(history(again), abs=2e-6)

    def test_mask_terms_grow_over_the_warm_up(self, tmp_path):
        config = {**self.config, "warmup_ratio": 0.5, "sparsity_weight": 0}
        args = arguments(tmp_path, max_steps=4)
        trainer = NeMoTrainer(varied_parent("vit", **config), args, train_dataset=image_samples())
        trainer.train()
        logged = (history(trainer, name) for name in ("loss", "nemo/loss_task", "nemo/loss_contrastive"))
        terms = zip(*logged, strict=True)
        strengths = [(loss - task) / (0.7 * contrast) for loss, task, contrast in terms]
        assert strengths == pytest.approx([1 / 3, 2 / 3, 1, 1], abs=1e-4)

    @pytest.mark.parametrize("batch", [5, 20])
    def test_batches_without_two_samples_of_a_group_are_warned_about_once(self, batch, tmp_path, caplog):
        args = arguments(tmp_path, per_device_train_batch_size=batch, train_sampling_strategy="sequential")
        trainer = NeMoTrainer(varied_parent("vit"), args, train_dataset=image_samples(20))
        with caplog.at_level(logging.WARNING, logger="nemo_hf"):
            trainer.train()
        warnings = [record.getMessage() for record in caplog.records]
        assert [message[:23] for message in warnings] == (["No two of the 5 samples"] if batch == 5 else [])
        assert [loss > 0 for loss in history(trainer, "nemo/loss_contrastive")] == [batch == 20] * 2

    def test_mixed_precision_trains_and_modules_are_verified_in_float32(self, tmp_path):
        samples = image_samples(20)
        args = arguments(tmp_path, bf16=True, max_steps=1)
        trainer = NeMoTrainer(varied_parent("vit"), args, train_dataset=samples, eval_dataset=samples)
        trainer.train()
        assert np.isfinite(history(trainer) + history(trainer, "grad_norm")).all()
        assert {parameter.dtype for parameter in trainer.parent.parameters()} == {torch.float32}
        trainer.evaluate()
        assert trainer.extract_module(["cat", "dog"]).config.equivalence["status"] == "verified"


class TestEvaluation:
    def test_returns_what_trainer_returns(self, tmp_path):
        samples = image_samples(20)
        args = arguments(tmp_path, max_steps=1, learning_rate=0.0, eval_strategy="steps", eval_steps=1)
        given = {"train_dataset": samples, "eval_dataset": samples, "compute_metrics": accuracy}
        trainer = NeMoTrainer(varied_parent("vit"), args, **given)
        trainer.train()
        plain = Trainer(trainer.parent, args, **given)
        plain.train()
        got, expected = trainer.evaluate(), plain.evaluate()
        assert got.keys() == expected.keys()
        assert default_compute_objective(got) == default_compute_objective(expected) == expected["eval_accuracy"]
        for entry in trainer.state.log_history:
            assert "eval_loss" not in entry or not {"nemo/loss_task", "eval_cohesion"} & set(entry)

    def test_the_report_holds_all_data_sets_until_training_goes_on(self, tmp_path):
        sets = {"a": image_samples(10), "b": image_samples(10, seed=1)}
        args = arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
        trainer = NeMoTrainer(varied_parent("vit"), args, train_dataset=image_samples(20), eval_dataset=sets)
        step, during = trainer.training_step, []
        trainer.training_step = lambda *given: (step(*given), during.append(trainer.parent.report))[0]
        trainer.train()
        assert during == [None, None]
        assert trainer.parent.report is None  # the exact relevance is another one than was evaluated with
        got = trainer.evaluate()
        alone = trainer.evaluate(sets["a"], metric_key_prefix="test")
        assert {"eval_a_loss", "eval_b_loss"} <= got.keys()
        assert trainer.parent.report == {"metrics": got | alone}
        trainer.save_model(tmp_path / "parent")
        loaded = NeMoForImageClassification.from_pretrained(tmp_path / "parent")
        assert loaded.report["metrics"]["eval_b_loss"] == got["eval_b_loss"]

    def test_modularity_is_measured_on_request(self, tmp_path, monkeypatch):
        samples = image_samples(20)
        parent = varied_parent("vit")
        trainer = NeMoTrainer(parent, arguments(tmp_path, per_device_eval_batch_size=8), eval_dataset=samples)
        parent.train()
        got = trainer.evaluate_modularity()
        assert parent.training
        batch = batch_of(samples)
        with torch.no_grad():
            masks = parent.eval()(**batch, output_neuron_masks=True).neuron_masks
        opened = torch.cat([(mask > 0).any(1) for mask in masks.values()], -1)
        cohesion, coupling = cohesion_and_coupling(opened, batch["labels"])
        expected = {"cohesion": cohesion, "coupling": coupling, "modularity_samples": 20}
        assert got == pytest.approx(expected, abs=1e-6)
        assert 0 < coupling < cohesion < 1
        assert parent.report["metrics"] == got
        assert trainer.evaluate_modularity([s for s in samples if s["labels"] == 3])["coupling"] is None
        monkeypatch.setattr(nemo_hf.training.trainer, "MODULARITY_SAMPLES", 7)  # spread over the data
        assert trainer.evaluate_modularity() == trainer.evaluate_modularity(samples[::3])
        for data in ({"a": samples}, []):
            with pytest.raises(ValueError, match="data set"):
                trainer.evaluate_modularity(data)

    def test_module_report_is_of_the_evaluation_data(self, tmp_path):
        trainer = NeMoTrainer(varied_parent("vit"), arguments(tmp_path), eval_dataset=image_samples(20))
        assert trainer.evaluate_module(["dog", "cat"]).samples == 8
        assert trainer.evaluate_module(["dog", "cat"], image_samples(10)).samples == 4


def drawn_labels(call):
    """The labels that a batch of all labels shows as rehearsed, read off the images of `image_samples`."""
    labels = call["pixel_values"][:, :, :15].mean((1, 3)).view(-1, 5, 3).mean(-1).argmax(-1)
    rehearsed = set(labels[call["static_samples"]].tolist())
    assert rehearsed.isdisjoint(labels[~call["static_samples"]].tolist())
    return rehearsed


class TestRehearsal:
    def test_micro_batches_of_a_step_share_the_groups_with_all_their_labels(self, tmp_path):
        args = arguments(
            tmp_path, per_device_train_batch_size=10, gradient_accumulation_steps=4, max_steps=4,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        groups = {"a": [0, 1], "b": [2, 3], "c": [4]}
        parent = varied_parent("vit", label_groups=groups, **REHEARSED)
        _, recorder = recorded(parent, args, train_dataset=image_samples(40))
        drawn = [drawn_labels(call) for call in recorder.calls]
        assert len(drawn) == 16
        assert all(labels == drawn[index // 4 * 4] for index, labels in enumerate(drawn))
        assert len(set(map(frozenset, drawn))) > 1
        for labels in drawn:
            assert all(labels >= set(members) or labels.isdisjoint(members) for members in groups.values())

    @pytest.mark.parametrize(("label_groups", "least", "most"), [(None, 1, 4), ({"a": [0, 1], "b": [2, 3, 4]}, 1, 1)])
    def test_draws_some_but_not_all_groups_by_seed_and_step_only(self, label_groups, least, most, tmp_path):
        parent = varied_parent("vit", label_groups=label_groups, rehearsal_probability=0.5, warmup_ratio=0)

        def drawn(seed, noise):
            random.seed(noise)
            torch.manual_seed(noise)
            trainer = NeMoTrainer(parent, arguments(tmp_path, seed=seed), train_dataset=image_samples(10))
            for step in range(300):
                trainer.state.global_step = step
                groups = trainer._rehearsed_groups()
                yield [] if groups is None else groups.tolist()

        first = list(drawn(0, noise=1))
        used = [len(set(groups)) for groups in first if groups]
        assert 0.4 < len(used) / 300 < 0.6
        assert (min(used), max(used)) == (least, most)
        assert list(drawn(0, noise=2)) == first
        assert list(drawn(7, noise=1)) != first

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"warmup_ratio": 0.5}, [False, False, True, True]),
            ({"rehearsal_probability": 0.0}, [False] * 4),
            ({"label_groups": {"all": [0, 1, 2, 3, 4]}}, [False] * 4),
        ],
    )
    def test_steps_without(self, options, expected, tmp_path):
        args, options = arguments(tmp_path, max_steps=4), REHEARSED | options
        _, recorder = recorded(varied_parent("vit", **options), args, train_dataset=image_samples())
        assert [call.get("static_masks") is not None for call in recorder.calls] == expected

    def test_task_loss_of_a_step_by_hand(self, tmp_path):
        samples = image_samples(15)
        batch = batch_of(samples)
        parent = varied_parent("vit", relevance_threshold=0.5, **REHEARSED)
        before = copy.deepcopy(parent)
        args = arguments(tmp_path, max_steps=1, label_smoothing_factor=0.1)
        trainer, recorder = recorded(parent, args, train_dataset=samples)
        chosen = sorted(drawn_labels(recorder.calls[0]))
        static = {key: (table[chosen].amax(0) >= 128).float() for key, table in before.masks.relevance().items()}
        assert 0 < sum(mask.mean() for mask in static.values()) < len(static)
        with torch.no_grad():
            own = before(**batch, output_neuron_masks=True).logits
            rehearsed = before(**batch, static_masks=static).logits
        is_rehearsed = torch.isin(batch["labels"], torch.tensor(chosen))
        expected = torch.where(is_rehearsed[:, None], rehearsed, own)
        expected = F.cross_entropy(expected, batch["labels"], label_smoothing=0.1).item()
        assert history(trainer, "nemo/loss_task") == pytest.approx([expected], abs=1e-5)


class TestGroupColumn:
    def test_names_the_groups(self, tmp_path):
        strings = text_table(domain=DOMAINS * 4)
        class_labels = strings.cast_column("domain", datasets.ClassLabel(names=["vehicle", "pet"]))
        for dataset in (strings, class_labels, strings.with_format("torch")):
            config = generated(group_column="domain")
            parent = NeMoTrainer(fresh("bert"), arguments(tmp_path), train_dataset=dataset, nemo_config=config).parent
            assert parent.config.groups == {"pet": [0, 1, 4], "vehicle": [2, 3]}
            assert all(len(relevance) == 2 for relevance in parent.masks.relevance().values())

    def test_is_refused(self, tmp_path):
        config, model = generated(group_column="domain"), fresh("bert")
        two_groups = text_table(domain=["vehicle", *(DOMAINS * 4)[1:]])
        for dataset, words in (
            (two_groups, ["'cat'", "'pet'", "'vehicle'", "'domain'"]),
            (text_table(), ["'domain'", "input_ids"]),
            (text_samples(10), ["datasets.Dataset"]),
        ):
            with pytest.raises(ValueError, match="Got") as error:
                NeMoTrainer(model, arguments(tmp_path), train_dataset=dataset, nemo_config=config)
            check_message(error, *words)


def test_a_stream_is_not_read_before_training(tmp_path):
    reads, samples, dataset = [], text_samples(20), text_table()
    stream = dataset.to_iterable_dataset().map(lambda sample: reads.append(1) or sample, features=dataset.features)
    trainer = NeMoTrainer(fresh("bert"), arguments(tmp_path), train_dataset=stream, relevance_dataset=samples)
    assert len(reads) == 0
    trainer.train()
    assert reads
    assert trainer.parent.config.relevance_source == "assigned"


class TestRefusals:
    def test_of_modules_and_of_loss_functions_with_a_specificity_weight(self, vit, tmp_path):
        args, given = arguments(tmp_path), {"train_dataset": image_samples()}
        with pytest.raises(ValueError, match="module") as error:
            NeMoTrainer(varied_parent("vit").extract_module(["cat", "dog"]), args, **given)
        check_message(error, "transformers.Trainer")
        given |= {"compute_loss_func": lambda *args: 0, "nemo_config": generated(specificity_weight=1.0)}
        with pytest.raises(ValueError, match="compute_loss_func") as error:
            NeMoTrainer(vit, args, **given)
        check_message(error, "rehearsal_probability=0")

    def test_a_parent_of_another_structure(self, tmp_path):
        options = {"targets": ["ffn"], "generator_rank": 3, "hard_masks": False, "group_column": "domain"}
        parent, given = varied_parent("vit"), {"train_dataset": image_samples()}
        for name, value in (options | {"label_groups": {"a": [0, 1], "b": [2, 3, 4]}}).items():
            with pytest.raises(ValueError, match=name) as error:
                NeMoTrainer(parent, arguments(tmp_path), nemo_config=generated(**{name: value}), **given)
            check_message(error)

    def test_several_gpus_of_one_process(self, vit, tmp_path, monkeypatch):
        args = arguments(tmp_path)
        monkeypatch.setattr(args, "_n_gpu", 2)
        for run in (
            lambda: NeMoTrainer(torch.nn.DataParallel(vit)),
            lambda: NeMoTrainer(vit, args, train_dataset=image_samples()),
            lambda: varied_parent("vit")._replicate_for_data_parallel()(image_samples(1)[0]["pixel_values"][None]),
        ):
            with pytest.raises(ValueError, match=r"nn\.DataParallel") as error:
                run()
            check_message(error, "accelerate launch --num_processes")


class TestStartingPoints:
    def test_a_plain_model_keeps_its_weights_and_generators_depend_on_the_seed(self, tmp_path):
        states, plain = [], fresh("vit")
        for noise in (1, 2):
            torch.manual_seed(noise)
            parent = NeMoTrainer(fresh("vit"), arguments(tmp_path, seed=0), train_dataset=image_samples()).parent
            states.append(state(parent))
        assert parent.config.relevance_source == "initial"
        assert_same_state(states[0], states[1], rtol=0, atol=0)
        assert_same_state(parent.model.state_dict(), plain.state_dict(), rtol=0, atol=0)

    @pytest.mark.parametrize("detach_pooled", [True, False])
    def test_a_parent_takes_new_options_of_the_same_structure(self, detach_pooled, tmp_path):
        parent = varied_parent("vit", detach_pooled=not detach_pooled, label_groups={"a": [0, 1], "b": (2, 3, 4)})
        options = {"detach_pooled": detach_pooled, "label_groups": {"a": (0, 1), "b": [2, 3, 4]}}
        config = generated(**options, contrastive_weight=0, rehearsal_probability=0)
        trainer = NeMoTrainer(parent, arguments(tmp_path), train_dataset=image_samples(), nemo_config=config)
        assert trainer.parent is parent
        gradients = []
        for model in (parent, varied_parent("vit", **config.to_dict())):
            trainer.compute_loss(model.train(), batch_of(image_samples(10))).backward()
            gradients.append([p.grad for p in model.model.vit.embeddings.parameters()])
        torch.testing.assert_close(*gradients)

    def test_model_init_begins_anew_and_keeps_processor_and_training_record(self, tmp_path):
        trainer = NeMoTrainer(
            args=arguments(tmp_path), train_dataset=image_samples(), model_init=lambda: fresh("vit"),
            nemo_config=generated(targets=["ffn"]), processing_class=image_processor(), eval_dataset=image_samples(10),
        )  # fmt: skip
        trainer.train()
        assert trainer.parent.config.relevance_source == "exact"
        assert {site.kind for site in trainer.parent.sites} == {"ffn"}
        first = state(trainer.parent)
        trainer.model = trainer.model_wrapped = None  # as a hyperparameter search leaves it between two trials
        trainer.args.weight_decay = 1e-9
        trainer.train()
        assert_same_state(trainer.parent.state_dict(), first, rtol=0, atol=1e-6)
        assert trainer.evaluate()["eval_loss"] > 0
        trainer.save_model(tmp_path / "parent")
        assert (tmp_path / "parent" / "preprocessor_config.json").exists()
        training = NeMoForImageClassification.from_pretrained(tmp_path / "parent").config.training
        assert (training["samples"], training["arguments"]["weight_decay"]) == (40, 1e-9)


def test_a_parent_and_its_modules_carry_the_tokenizer(tmp_path):
    own = tokenizer()
    expected = own("w3 w5 unknown", "w7")["input_ids"]
    for given in ({"processing_class": own}, {"data_collator": DataCollatorWithPadding(own)}):
        trainer = NeMoTrainer(varied_parent("bert"), arguments(tmp_path), **given)
        trainer.save_model(tmp_path / "parent")
        trainer.extract_module(["cat", "ship"]).save_pretrained(tmp_path / "module")
        for name in ("parent", "module"):
            loaded = AutoTokenizer.from_pretrained(tmp_path / name)
            assert loaded("w3 w5 unknown", "w7")["input_ids"] == expected
        shutil.rmtree(tmp_path)
