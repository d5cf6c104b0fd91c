"""What callers do with a Trainer, done with `NeMoTrainer`: the same happens, or an error says what to do."""

import sys
import types

import datasets
import pytest
import torch
from conftest import LABELS, TEXT, fresh, generated, randomize, text_samples, tiny
from torch.nn import functional as F
from training_helpers import (
    REHEARSED,
    TASK_ALONE,
    Stream,
    arguments,
    assert_same_state,
    check_message,
    history,
    recorded,
    state,
    text_table,
    varied_parent,
    without_dropout,
)
from transformers import Trainer, TrainerCallback
from transformers.hyperparameter_search import HyperParamSearchBackendBase
from transformers.trainer_utils import BestRun, HPSearchBackend

from nemo_hf import NeMoTrainer, make_parent

WEIGHTS = torch.tensor([1.0, 2.0, 1.0, 0.5, 3.0])


def run(trainer_class, directory, model=None, options=None, **kwargs):
    """A trainer of the tiny text model after two steps."""
    args = arguments(directory, **{"per_device_train_batch_size": 10, **(options or {})})
    trainer = trainer_class(model or varied_parent("bert", **REHEARSED), args, train_dataset=text_samples(), **kwargs)
    trainer.train()
    return trainer


def weighted(logits, labels, **options):
    return F.cross_entropy(logits, labels, WEIGHTS, **options)


class Documented(NeMoTrainer):
    """As transformers' documentation shows it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = weighted(outputs.get("logits").view(-1, self.model.config.num_labels), labels.view(-1))
        return (loss, outputs) if return_outputs else loss


class Explicit(NeMoTrainer):
    """Passes what it knows of the inputs, calls the model twice, and divides a sum by the number of items."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels, given = inputs["labels"], {"attention_mask": inputs["attention_mask"]}
        with torch.no_grad():
            model(inputs["input_ids"], **given)
        outputs = model(inputs["input_ids"], **given)
        model(inputs["input_ids"], **given)
        loss = weighted(outputs.logits, labels, reduction="none").sum() / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


class Added(NeMoTrainer):
    """Adds to what the trainer computes."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        loss = loss + outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss


def documented_loss(outputs, labels, num_items_in_batch=None):
    return weighted(outputs.logits, labels)


def summed_loss(outputs, labels, num_items_in_batch):
    return weighted(outputs.logits, labels, reduction="none").sum() / num_items_in_batch


def added_loss(outputs, labels, **kwargs):
    return F.cross_entropy(outputs.logits, labels) + outputs.logits.square().mean()


class TestComputeLoss:
    @pytest.mark.parametrize(
        ("trainer_class", "loss"), [(Documented, documented_loss), (Explicit, summed_loss), (Added, added_loss)]
    )
    def test_an_overridden_one_trains_as_the_same_loss_function(self, trainer_class, loss, tmp_path):
        options = {"gradient_accumulation_steps": 2, "max_steps": 3}
        own = run(trainer_class, tmp_path, options=options, eval_dataset=text_samples(20, 1))
        passed = run(NeMoTrainer, tmp_path, options=options, eval_dataset=text_samples(20, 1), compute_loss_func=loss)
        assert_same_state(own.parent.state_dict(), passed.parent.state_dict(), rtol=0, atol=1e-6)
        for name in ("loss", "nemo/loss_task", "nemo/loss_contrastive", "nemo/neuron_retention_rate", "grad_norm"):
            assert history(own, name) == pytest.approx(history(passed, name), abs=1e-5), name
        assert own.evaluate()["eval_loss"] == pytest.approx(passed.evaluate()["eval_loss"], abs=1e-6)

    def test_it_is_of_one_trainer_or_of_its_class(self, tmp_path):
        trainer = NeMoTrainer(varied_parent("bert"), arguments(tmp_path), train_dataset=text_samples())
        own = trainer.compute_loss = types.MethodType(Documented.compute_loss, trainer)
        trainer.train()
        assert trainer.compute_loss is own
        expected = run(Documented, tmp_path, varied_parent("bert"), {"per_device_train_batch_size": 20})
        assert history(trainer) == history(expected)

    def test_the_calls_of_a_step_run_as_the_module_that_is_rehearsed(self, tmp_path):
        args, data = arguments(tmp_path), text_samples(20)
        _, ours = recorded(varied_parent("bert", **REHEARSED), args, train_dataset=data)
        other = varied_parent("bert", **REHEARSED)
        calls = []
        other.register_forward_pre_hook(lambda model, args, kwargs: calls.append(kwargs), with_kwargs=True)
        Explicit(other, args, train_dataset=data).train()
        calls = [call for call in calls if "static_samples" in call]
        assert len(calls) == 3 * len(ours.calls)
        for index, call in enumerate(calls):
            assert torch.equal(call["static_samples"], ours.calls[index // 3]["static_samples"])

    @pytest.mark.parametrize(
        ("body", "config", "words"),
        [
            (lambda model, inputs: torch.zeros((), requires_grad=True), {}, ["0 of 10", "compute_loss_func"]),
            (lambda model, inputs: model(inputs["input_ids"][:4]).logits.sum(), {}, ["4 of 10", "model(**inputs)"]),
            (lambda model, inputs: model(**inputs, return_dict=False)[0].sum(), {}, ["compute_loss_func"]),
            (
                lambda model, inputs: model(**inputs).loss,
                {"specificity_weight": 0.5},
                ["compute_loss of your own", "rehearsal_probability=0"],
            ),
        ],
    )
    def test_is_refused_before_a_step_where_masks_would_not_be_trained(self, body, config, words, tmp_path):
        class Own(NeMoTrainer):
            def compute_loss(self, model, inputs, **kwargs):
                return body(model, inputs)

        parent = varied_parent("bert", **config)
        before = state(parent)
        with pytest.raises(ValueError, match="compute_loss") as error:
            run(Own, tmp_path, parent)
        check_message(error, *words)
        assert_same_state(parent.state_dict(), before, rtol=0, atol=0)


def test_other_hooks_that_would_leave_masks_out_are_refused(tmp_path):
    class OwnStep(NeMoTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = self.compute_loss(model.train(), self._prepare_inputs(inputs))
            self.accelerator.backward(loss)
            return loss.detach()

    class Scaled(NeMoTrainer):
        loss_is_scaled_for_ga = True

    class OwnOptimizer(NeMoTrainer):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.SGD(self.model.model.parameters(), lr=0.1)
            return self.optimizer

    for trainer_class, word in ((OwnStep, "training_step"), (Scaled, "loss_is_scaled_for_ga"), (OwnOptimizer, "16")):
        with pytest.raises(ValueError, match=word) as error:
            run(trainer_class, tmp_path)
        check_message(error)


class TestOptimizers:
    def test_one_of_the_plain_model_alone_is_refused_with_remedies_that_work(self, tmp_path):
        args, plain = arguments(tmp_path), fresh("bert")
        optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
        with pytest.raises(ValueError, match="without 16 parameters of the mask generators") as error:
            NeMoTrainer(
                plain, args, train_dataset=text_samples(), optimizers=(optimizer, None), nemo_config=generated()
            )
        check_message(error, "make_parent", "optimizer_cls_and_kwargs")
        parent = make_parent(fresh("bert"), generated())
        optimizer = torch.optim.AdamW(parent.parameters(), lr=1e-2)
        for model, given in (
            (parent, {"optimizers": (optimizer, None)}),
            (
                fresh("bert"),
                {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"lr": 1e-2}), "nemo_config": generated()},
            ),
        ):
            trainer = NeMoTrainer(model, args, train_dataset=text_samples(), **given)
            before = [parameter.clone() for parameter in trainer.parent.masks.parameters()]
            trainer.train()
            after = list(trainer.parent.masks.parameters())
            assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))

    def test_masks_learn_at_three_times_the_rate_of_a_given_class(self, tmp_path):
        trainer = run(NeMoTrainer, tmp_path, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}))
        rates = {id(p): group["initial_lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
        for name, parameter in trainer.parent.named_parameters():
            assert rates[id(parameter)] == pytest.approx(0.3 if ".generator." in name else 0.1)

    def test_a_mask_learning_rate_beside_an_optimizer_is_warned_about(self, tmp_path, caplog):
        parent = varied_parent("bert", mask_learning_rate=0.5)
        optimizer = torch.optim.SGD(parent.parameters(), lr=0.1)
        NeMoTrainer(parent, arguments(tmp_path), train_dataset=text_samples(), optimizers=(optimizer, None))
        assert "mask_learning_rate has no effect" in caplog.text


@pytest.fixture(scope="module")
def evaluating(tmp_path_factory):
    """A trainer with several evaluation sets, and calls that take one."""
    sets = {"seen": text_samples(20), "new": text_samples(30, 1), "empty": []}
    trainer = NeMoTrainer(varied_parent("bert"), arguments(tmp_path_factory.mktemp("sets")), eval_dataset=sets)
    module = trainer.extract_module(["cat", "dog"])

    def evaluate(given):
        return [value for name, value in trainer.evaluate(given).items() if name.endswith("loss")]

    def evaluate_module(given):
        report = trainer.evaluate_module(["cat", "dog"], given)
        return report.accuracy, report.controls, report.samples, report.rejection

    def calibrate_rejection(given):
        return dict(trainer.calibrate_rejection(module, given))

    calls = (evaluate, evaluate_module, calibrate_rejection, trainer.evaluate_modularity)
    return trainer, {call.__name__: call for call in calls}


class TestEvaluationSets:
    @pytest.mark.parametrize("name", ["evaluate", "evaluate_module", "evaluate_modularity", "calibrate_rejection"])
    def test_a_name_stands_for_its_data_set(self, name, evaluating):
        trainer, calls = evaluating
        call = calls[name]
        assert call("new") == call(trainer.eval_dataset["new"]) != call("seen")
        both = datasets.DatasetDict(a=datasets.Dataset.from_list([]), b=datasets.Dataset.from_list([]))
        refused = [("old", ["'old'", "'seen'", "'new'"]), ([], ["empty"]), ("empty", ["empty"]), ({}, ["empty"])]
        if name != "evaluate":  # which takes several
            refused += [(None, ["'seen'", "eval_dataset='seen'"]), (both, ["['a', 'b']", "data['a']"])]
        for given, words in refused:
            with pytest.raises(ValueError, match="Got") as error:
                call(given)
            check_message(error, *words)

    def test_several_sets_at_once_are_evaluated_as_by_trainer(self, evaluating, tmp_path):
        trainer, _ = evaluating
        data = datasets.DatasetDict(a=datasets.Dataset.from_list(text_samples(10)))
        plain = Trainer(trainer.parent, arguments(tmp_path))
        loss = plain.evaluate(data)["eval_a_loss"]
        assert trainer.evaluate(data)["eval_a_loss"] == pytest.approx(loss)
        no_names = NeMoTrainer(trainer.parent, arguments(tmp_path), eval_dataset=text_samples())
        with pytest.raises(ValueError, match="no names") as error:
            no_names.evaluate("new")
        check_message(error)


def renamed(names):
    model = fresh("bert")
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    return model


def other_bert(**sizes):
    return randomize(tiny("BertForSequenceClassification", **{**TEXT, **sizes}))


SHAPES = {"generator_rank": 2, "label_groups": {"a": [0, 1], "b": [2, 3, 4]}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Output directories of a trainer of ours and of the plain one, with checkpoints."""
    saving, found = {"save_strategy": "steps", "save_steps": 1}, {}
    for kind, given in ((NeMoTrainer, {"nemo_config": generated(**SHAPES)}), (Trainer, {})):
        found[kind] = tmp_path_factory.mktemp(kind.__name__)
        run(kind, found[kind], fresh("bert"), saving, **given)
    return found


class TestResuming:
    @pytest.mark.parametrize(
        ("make_model", "options", "words"),
        [
            (fresh, {"generator_rank": 3}, ["Got generator_rank=3 ", "generator_rank=2"]),
            (fresh, {"hard_masks": False}, ["hard_masks=False", "hard_masks=True"]),
            (fresh, {"label_groups": {"a": [0, 2], "b": [1, 3, 4]}}, ["[0, 2]", "[0, 1]"]),
            (fresh, {"label_groups": {"b": [2, 3, 4], "a": [0, 1]}}, ["label_groups=[('b'", "label_groups=[('a'"]),
            (fresh, {"label_groups": None}, ["('cat', [0])", "('a', [0, 1])"]),
            (fresh, {"targets": ["ffn"]}, ["targets=('ffn',)", "'attention'"]),
            (lambda _: other_bert(hidden_act="relu"), {"objective": "moda"}, ["objective='moda'", "'contrastive'"]),
            (fresh, {"mask_learning_rate": 0.1}, ["mask_learning_rate=0.1", "mask_learning_rate=None"]),
            (lambda _: renamed(["dog", "cat", *LABELS[2:]]), {}, ["id2label={0: 'dog', 1: 'cat'}", "{0: 'cat'"]),
            (lambda _: other_bert(intermediate_size=64), {}, ["Got intermediate_size=64 for", "intermediate_size=48"]),
            (lambda _: other_bert(num_hidden_layers=3), {}, ["num_hidden_layers=3", "num_hidden_layers=2"]),
            (lambda _: fresh("distilbert"), {}, ["DistilBertFor", "BertForSequenceClassification'"]),
        ],
    )
    def test_of_another_model_or_masks_is_refused_by_name(self, make_model, options, words, folders, tmp_path):
        model = make_model("bert")
        config = generated(**{**SHAPES, **options})
        trainer = NeMoTrainer(model, arguments(tmp_path), train_dataset=text_samples(), nemo_config=config)
        before = state(trainer.parent)
        with pytest.raises(ValueError, match="Got") as error:
            trainer.train(resume_from_checkpoint=str(folders[NeMoTrainer] / "checkpoint-1"))
        check_message(error, *words)
        assert_same_state(trainer.parent.state_dict(), before, rtol=0, atol=0)

    def test_of_a_plain_model_or_module_is_refused(self, folders, tmp_path):
        module = folders[Trainer] / "checkpoint-2"
        for kind in ("model type 'bert'", "module"):
            with pytest.raises(ValueError, match=kind) as error:
                NeMoTrainer(fresh("bert"), arguments(tmp_path), train_dataset=text_samples()).train(str(module))
            check_message(error, "transformers.Trainer")
            varied_parent("bert").extract_module(["cat"]).save_pretrained(module)

    def test_the_same_options_in_other_words_and_weights_of_losses_may_change(self, folders, tmp_path, caplog):
        groups = {"a": ["dog", "cat"], "b": [4, 3, "car"]}
        for changed in ({}, {"contrastive_weight": 0.25, "objective": "cohesion-coupling"}):
            config = generated(**{**SHAPES, "label_groups": groups, **changed})
            args = arguments(tmp_path, per_device_train_batch_size=10)
            trainer = NeMoTrainer(fresh("bert"), args, train_dataset=text_samples(), nemo_config=config)
            trainer.train(resume_from_checkpoint=str(folders[NeMoTrainer] / "checkpoint-1"))
            for name, value in changed.items():
                assert f"{name}={value!r}" in caplog.text
                assert f"{name}={getattr(generated(), name)!r}" in caplog.text
            assert ("Training goes on with" in caplog.text) == bool(changed)
            assert trainer.parent.config.nemo_config["contrastive_weight"] == config.contrastive_weight


class GridBackend(HyperParamSearchBackendBase):
    """Tries learning rates in turn and drops the model after each, as the backends of transformers do."""

    name = "wandb"
    is_available = staticmethod(lambda: True)

    def run(self, trainer, n_trials, direction):
        found = []
        trainer.model = None  # Ray Tune begins so
        for number in range(n_trials):
            values = trainer.hp_space(number)
            trainer.objective = None
            trainer.train(trial=values)
            if trainer.objective is None:
                trainer.objective = trainer.compute_objective(trainer.evaluate())
            found.append(BestRun(str(number), trainer.objective, values))
            trainer.model = trainer.model_wrapped = None
            trainer.accelerator.clear()
        return min(found, key=lambda best: best.objective)


class Trials(TrainerCallback):
    def __init__(self):
        self.records = []

    def on_train_end(self, args, state, control, model, **kwargs):
        self.records.append((model.nemo_config, model.config.training["arguments"]["learning_rate"]))


RATES = (1e-5, 1e-2)


@pytest.fixture(params=["grid", "optuna"])
def backend(request, monkeypatch):
    """Arguments that choose a backend, and a function that lets it choose a learning rate."""
    if request.param == "optuna":
        optuna = pytest.importorskip("optuna")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        given = {"backend": "optuna", "sampler": optuna.samplers.GridSampler({"learning_rate": RATES})}
        return given, lambda trial: trial.suggest_categorical("learning_rate", RATES)
    monkeypatch.setattr("transformers.integrations.hp_params", dict)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(run=types.SimpleNamespace(id=0)))
    backends = {HPSearchBackend.WANDB: GridBackend}
    monkeypatch.setattr("transformers.trainer.ALL_HYPERPARAMETER_SEARCH_BACKENDS", backends)
    return {"backend": "wandb"}, lambda trial: RATES[trial]


class TestHyperparameterSearch:
    @pytest.mark.parametrize("metrics", [None, lambda prediction: {"score": float(prediction.predictions.std())}])
    def test_trials_have_their_options_and_the_objective_is_the_users(self, backend, metrics, tmp_path, caplog):
        given, rate_of = backend
        trials, data = Trials(), {"train_dataset": text_samples(20), "eval_dataset": text_samples(20, 1)}
        trainer = NeMoTrainer(
            None, arguments(tmp_path), model_init=lambda: varied_parent("bert"), callbacks=[trials],
            nemo_config=generated(temperature=0.3), compute_metrics=metrics, **data,
        )  # fmt: skip

        def space(trial):
            return {"learning_rate": rate_of(trial), "contrastive_weight": rate_of(trial) * 10}

        best = trainer.hyperparameter_search(space, n_trials=2, **given)
        assert "no corresponding field" not in caplog.text
        assert sorted(rate for _, rate in trials.records) == list(RATES)
        for config, rate in trials.records:
            assert (config.contrastive_weight, config.temperature) == (rate * 10, 0.3)
        for use in (
            lambda: trainer.parent, lambda: trainer.nemo_config, trainer.evaluate, trainer.save_model,
            trainer.evaluate_modularity, trainer.update_relevance, trainer.create_model_card,
            lambda: trainer.extract_module(["cat"]), lambda: trainer.evaluate_module(["cat"]),
            lambda: trainer.predict(text_samples(4)),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=r"no model.*search") as error:
                use()
            check_message(error, "trainer.args")
        trainer.log({"loss": 1.0})
        trainer.args.learning_rate = best.hyperparameters["learning_rate"]  # as the message says
        trainer.train()
        assert trainer.nemo_config == generated(temperature=0.3)
        found = []
        for rate in RATES:
            args, config = (
                arguments(tmp_path, learning_rate=rate),
                generated(contrastive_weight=rate * 10, temperature=0.3),
            )
            alone = NeMoTrainer(varied_parent("bert"), args, nemo_config=config, compute_metrics=metrics, **data)
            alone.train()
            measured = alone.evaluate()
            found.append((measured["eval_score" if metrics else "eval_loss"], rate))
        assert (best.objective, best.hyperparameters["learning_rate"]) == pytest.approx(min(found), abs=1e-6)

    def test_model_init_gets_the_trial_and_may_make_another_parent(self, backend, tmp_path):
        given, rate_of = backend
        seen, trials = [], Trials()

        def model_init(trial):
            seen.append(trial)
            return make_parent(fresh("bert"), generated(targets=["ffn"] if len(seen) % 2 else ["attention"]))

        data = {"train_dataset": text_samples(20), "eval_dataset": text_samples(20)}
        trainer = NeMoTrainer(None, arguments(tmp_path), model_init=model_init, callbacks=[trials], **data)
        space = lambda trial: {"learning_rate": rate_of(trial), "temperature": 0.7}  # noqa: E731
        trainer.hyperparameter_search(space, n_trials=2, **given)
        assert [trial is None for trial in seen] == [True, False, False]
        assert [config.targets for config, _ in trials.records] == [("attention",), ("ffn",)]
        assert {config.temperature for config, _ in trials.records} == {0.7}


class Events(TrainerCallback):
    """Notes the events and the models they come with."""

    def __init__(self):
        self.seen = {}

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)
        return lambda args, state, control, **kwargs: self.seen.setdefault(name, []).append(kwargs.get("model"))


class TestCallbacks:
    def test_all_events_come_with_the_parent(self, tmp_path):
        events = {}
        for kind in (Trainer, NeMoTrainer):
            callback = Events()
            options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
            args = arguments(tmp_path, per_device_train_batch_size=10, gradient_accumulation_steps=2, **options)
            model_init = {Trainer: lambda: fresh("bert"), NeMoTrainer: lambda: varied_parent("bert")}[kind]
            given = {"model_init": model_init, "callbacks": [callback], "eval_dataset": text_samples(10)}
            trainer = kind(None, args, train_dataset=text_samples(), **given)
            trainer.train()
            trainer.evaluate()
            trainer.predict(text_samples(4))
            events[kind] = {name: len(models) for name, models in callback.seen.items()}
            last = {id(models[-1]) for name, models in callback.seen.items() if name != "on_init_end"}
            assert last == {id(trainer.model)}
        assert events[NeMoTrainer] == events[Trainer]

    def test_evaluation_within_a_step_changes_nothing(self, tmp_path):
        class Evaluates(TrainerCallback):
            def on_step_end(self, args, state, control, model, **kwargs):
                assert self.trainer.evaluate(text_samples(10))["eval_loss"] > 0
                self.trainer.evaluate_modularity(text_samples(10))
                assert self.trainer.extract_module(["cat"]).config.role == "module"

        callback = Evaluates()
        options = {"per_device_train_batch_size": 10}
        trainer = NeMoTrainer(
            varied_parent("bert", **REHEARSED), arguments(tmp_path, **options), train_dataset=text_samples(),
            callbacks=[callback],
        )  # fmt: skip
        callback.trainer = trainer
        trainer.train()
        expected = run(NeMoTrainer, tmp_path)
        assert_same_state(trainer.parent.state_dict(), expected.parent.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("own_streams", [True, False])
def test_streams_train_as_in_trainer(own_streams, tmp_path):
    stream = Stream(text_samples(20)) if own_streams else text_table().to_iterable_dataset()
    config = generated(**TASK_ALONE, mask_learning_rate=0.0)
    args = arguments(tmp_path, per_device_train_batch_size=8, max_steps=5, max_grad_norm=0, optim="sgd")
    given = {"nemo_config": config, "relevance_dataset": text_samples(20)}
    trainer = NeMoTrainer(without_dropout(fresh("bert")), args, train_dataset=stream, eval_dataset=stream, **given)
    trainer.train()
    plain = Trainer(without_dropout(fresh("bert")), args, train_dataset=stream, eval_dataset=stream)
    plain.train()
    assert_same_state(trainer.parent.model.state_dict(), state(plain.model), rtol=0, atol=1e-6)
    assert trainer.parent.config.relevance_source == "exact"
    assert trainer.parent.config.training["samples"] is None
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], abs=1e-6)
    assert trainer.evaluate_module(["cat", "dog"]).samples == 8
    assert trainer.evaluate_modularity()["modularity_samples"] == 20
