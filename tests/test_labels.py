"""Labels of every kind train and measure as with a plain Trainer, or are refused with a remedy that works."""

import copy
import logging
import random
import re

import datasets
import numpy as np
import pytest
import torch
from conftest import LABELS, fresh, generated, parent_of, text_samples
from test_relevance import assert_relevance, naive_relevance
from torch.nn import functional as F
from torch.utils.data import Subset
from training_helpers import (
    DOMAINS,
    TASK_ALONE,
    Spoiled,
    Stream,
    arguments,
    assert_same_state,
    batch_of,
    check_message,
    history,
    state,
    text_table,
    varied_parent,
)  # fmt: skip
from transformers import AutoModelForSequenceClassification, Trainer, default_data_collator

from nemo_hf import NeMoTrainer, calibrate_rejection, compute_relevance, evaluate_module
from nemo_hf.training.losses import mask_objective, specific_cross_entropy

SINGLE, SEVERAL = "single_label_classification", "multi_label_classification"


def hot(ids):
    return F.one_hot(ids, 5)


def several(ids):
    return hot(ids) + hot((ids + 1) % 5)


def mixed(ids):
    return 0.7 * hot(ids) + 0.3 * hot(ids.flip(0))


def collator(kind):
    """Makes labels of a kind from those of the samples."""
    return lambda samples: (batch := default_data_collator(samples)) | {"labels": kind(batch["labels"])}


def with_labels(make, samples):
    return [{**sample, "labels": make(sample["labels"])} for sample in samples]


IDS = [index % 5 for index in range(20)]
# Labels from ids, the problem type, whether a plain model takes them, and the problem type that it then writes.
KINDS = {
    "int64": (lambda ids: ids, None, True, SINGLE),
    "int32": (lambda ids: ids.int(), None, False, SINGLE),
    "uint8": (lambda ids: ids.byte(), SINGLE, True, SINGLE),
    "uint8 without a problem type": (lambda ids: ids.byte(), None, False, SINGLE),
    "int16": (lambda ids: ids.short(), SINGLE, False, SINGLE),
    "one column": (lambda ids: ids[:, None], None, True, SINGLE),
    "a list": (lambda ids: ids.tolist(), None, False, SINGLE),
    "an array": (lambda ids: ids.numpy(), None, False, SINGLE),
    "some without": (lambda ids: ids.masked_fill(ids == 2, -100), None, True, SINGLE),
    "chances": (mixed, SINGLE, False, SINGLE),
    "chances in half precision": (lambda ids: mixed(ids).half(), SINGLE, False, SINGLE),
    "float lists": (lambda ids: several(ids).float(), None, True, SEVERAL),
    "mixed": (mixed, None, True, SEVERAL),
    "float lists of a known type": (lambda ids: several(ids).float(), SEVERAL, True, SEVERAL),
    "integer lists": (several, SEVERAL, False, SEVERAL),
    "boolean lists": (lambda ids: several(ids).bool(), SEVERAL, False, SEVERAL),
}


def as_loss_takes(labels, problem):
    labels = torch.as_tensor(labels)
    if problem == SEVERAL or labels.is_floating_point():
        return labels.float()
    return labels.flatten().long()


def naive_loss(logits, labels, problem):
    targets = as_loss_takes(labels, problem)
    one = F.binary_cross_entropy_with_logits if problem == SEVERAL else F.cross_entropy
    counted = [row for row in zip(logits, targets, strict=True) if row[1].ndim or row[1] >= 0]
    return torch.stack([one(*row) for row in counted]).mean().item()


def as_samples(samples, labels, problem):
    """Each sample with one label or the labels that count for it; without those that have none."""
    targets = as_loss_takes(labels, problem)
    if problem == SEVERAL:
        targets = (targets >= 0.5).long()
    elif targets.ndim == 2:
        targets = targets.argmax(-1)
    kept = zip(samples, targets, strict=True)
    return [{**sample, "labels": label} for sample, label in kept if label.ndim or label >= 0]


@pytest.mark.parametrize("name", KINDS)
def test_labels_train_and_measure_as_they_are(name, tmp_path):
    kind, given, _, problem = KINDS[name]
    samples, parent = text_samples(20), varied_parent("bert", **TASK_ALONE)
    parent.model.config.problem_type = given
    parent.config.problem_type = given or SINGLE
    labels = kind(batch_of(samples)["labels"])
    inputs = {key: value for key, value in batch_of(samples).items() if key != "labels"}
    with torch.no_grad():
        trained = copy.deepcopy(parent).train()(**inputs).logits
    args = arguments(tmp_path, max_steps=1, learning_rate=0.0, train_sampling_strategy="sequential",
                     per_device_eval_batch_size=20)  # fmt: skip
    trainer = NeMoTrainer(parent, args, collator(kind), Subset(samples, range(20)))
    trainer.train()
    assert history(trainer, "nemo/loss_task") == pytest.approx([naive_loss(trained, labels, problem)], abs=1e-5)
    counted = as_samples(samples, labels, problem)
    expected = naive_relevance(parent, counted)
    assert_relevance(parent, expected)
    assert [parent.config.problem_type, parent.model.config.problem_type] == [problem, given or problem]
    with torch.no_grad():
        logits = parent.eval()(**inputs).logits
    whole = {**inputs, "labels": torch.as_tensor(labels)}
    assert parent(**whole).loss.item() == pytest.approx(naive_loss(logits, labels, problem), abs=1e-3)
    if isinstance(labels, torch.Tensor):
        assert trainer.evaluate(samples)["eval_loss"] == pytest.approx(naive_loss(logits, labels, problem), abs=1e-5)
    assert trainer.evaluate_modularity(samples)["modularity_samples"] == len(counted)
    if name not in ("uint8", "some without", "chances", "float lists", "boolean lists"):
        return
    own = [any(sample["labels"][:2]) if problem == SEVERAL else int(sample["labels"]) < 2 for sample in counted]
    report = trainer.evaluate_module(["cat", "dog"], samples)
    assert report.samples == (len(counted) if problem == SEVERAL else sum(own))
    if not all(own):
        rejection = trainer.calibrate_rejection(trainer.extract_module(["cat", "dog"]), samples, accepted=0.5)
        assert 0.5 <= rejection["accepted"] <= 1


@pytest.mark.parametrize("name", KINDS)
def test_the_loss_is_that_of_a_plain_model_where_it_takes_such_labels(name, tmp_path):
    kind, given, is_plain, problem = KINDS[name]
    samples, args = text_samples(20), arguments(tmp_path, per_device_eval_batch_size=20)
    plain, ours = fresh("bert"), parent_of("bert", static_evaluation=False)  # whose masks are open
    plain.config.problem_type = ours.model.config.problem_type = given
    ours.config.problem_type = given or SINGLE
    got, like = (cls(m, args, collator(kind)) for cls, m in ((NeMoTrainer, ours), (Trainer, plain)))
    if is_plain:
        assert got.evaluate(samples)["eval_loss"] == pytest.approx(like.evaluate(samples)["eval_loss"], abs=1e-5)
        assert plain.config.problem_type == problem
    else:
        with pytest.raises((ValueError, RuntimeError, AttributeError, TypeError)):
            like.evaluate(samples)


def test_mixed_labels_and_a_loss_function_that_takes_them(tmp_path):
    seen = []

    def loss(outputs, labels, num_items_in_batch=None):
        seen.append(labels)
        return F.cross_entropy(outputs.logits, labels)

    for model in (fresh("bert"), varied_parent("bert", rehearsal_probability=1.0, warmup_ratio=0)):
        args = arguments(tmp_path)
        trainer = NeMoTrainer(model, args, collator(mixed), text_samples(20), compute_loss_func=loss)
        trainer.train()
        assert trainer.parent.config.relevance_source == ("exact" if model is trainer.parent else "assigned")
        assert trainer.parent.config.problem_type == SINGLE
    assert all(labels.shape == (20, 5) and labels.is_floating_point() for labels in seen)
    hopeless = {"data_collator": collator(lambda ids: several(ids).float()), "compute_loss_func": loss}
    with pytest.raises(ValueError, match="compute_loss_func") as error:
        NeMoTrainer(fresh("bert"), args, train_dataset=text_samples(20), nemo_config=generated(), **hopeless).train()
    check_message(error, "rehearsal_probability=0")
    config = generated(rehearsal_probability=0)
    NeMoTrainer(fresh("bert"), args, train_dataset=text_samples(20), nemo_config=config, **hopeless).train()


@pytest.mark.parametrize("objective", ["contrastive", "contrastive-authors", "cohesion-coupling"])
def test_samples_without_a_label_count_in_no_loss(objective):
    torch.manual_seed(0)
    masks, labels = torch.rand(6, 9).requires_grad_(), torch.tensor([0, -100, 1, 0, 1, -100])
    groups = labels.clamp(min=-1)
    loss = mask_objective(masks, [4, 5], groups, objective)
    alone = masks.detach()[labels >= 0].requires_grad_()
    expected = mask_objective(alone, [4, 5], labels[labels >= 0], objective)
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(loss, masks)[0], torch.autograd.grad(expected, alone)[0]
    torch.testing.assert_close(gradients[0][labels >= 0], gradients[1])
    assert not gradients[0][labels < 0].any()
    nobody = mask_objective(masks, [4, 5], torch.full((6,), -1), objective)
    assert nobody == 0
    assert not torch.autograd.grad(nobody, masks)[0].any()
    logits, known, own = torch.randn(6, 3), labels >= 0, torch.tensor([True, False, False])
    specific = [specific_cross_entropy(logits[part], labels[part], own, 0.3, 0.1) for part in (labels > -999, known)]
    torch.testing.assert_close(*specific)


@pytest.mark.parametrize("problem", [None, SINGLE])
def test_label_smoothing_of_lists_counts_or_is_warned_about(problem, tmp_path, caplog):
    model = fresh("bert")
    model.config.problem_type = problem
    args, losses_of = arguments(tmp_path, max_steps=1), []
    for args.label_smoothing_factor in (0.0, 0.3):
        trainer = NeMoTrainer(copy.deepcopy(model), args, collator(mixed), text_samples(20))
        trainer.train()
        losses_of += history(trainer, "nemo/loss_task")
    has_warned = "label_smoothing_factor has no effect" in caplog.text
    assert (losses_of[0] == losses_of[1]) == (problem is None) == has_warned


def test_a_batch_without_labels_leaves_the_weights_finite(tmp_path, caplog):
    parent = varied_parent("bert", warmup_ratio=0)
    trainer = NeMoTrainer(parent, arguments(tmp_path), collator(lambda ids: ids * 0 - 100), text_samples(20))
    with caplog.at_level(logging.WARNING, logger="nemo_hf"):
        assert trainer.train().training_loss is not None
    assert "without a sample of any label" in caplog.text
    assert all(bool(parameter.isfinite().all()) for parameter in parent.parameters())


REFUSED = {
    "ids from 1": (lambda ids: ids + 1, None, ["label 5", "num_labels=6"]),
    "no label": (lambda ids: ids.masked_fill(ids == 3, -1), None, ["label -1", "-100"]),
    "names": (lambda ids: [LABELS[index] for index in ids], None, ["'cat'", "ids"]),
    "float ids": (lambda ids: ids.float(), None, ["float32", "cast_column"]),
    "integer lists": (several, None, [", 5)", f"problem_type='{SEVERAL}'"]),
    "lists that sum to 2": (lambda ids: several(ids).float(), SINGLE, ["sums to 2", f"problem_type='{SEVERAL}'"]),
    "ids for lists": (lambda ids: ids, SEVERAL, [",)", f"problem_type='{SINGLE}'"]),
    "lists of three": (lambda ids: hot(ids)[:, :3], None, ["3 labels", "num_labels=3"]),
    "-100 in a list": (lambda ids: several(ids) * -100, SEVERAL, ["-100", "0 to 1"]),
    "not a number": (lambda ids: several(ids) * float("nan"), SEVERAL, ["nan", "0 to 1"]),
    "nothing": (lambda ids: None, None, ["input_ids", "'labels'"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_labels_are_refused_before_the_first_step(name, tmp_path):
    kind, given, words = REFUSED[name]
    parent = varied_parent("bert")
    parent.model.config.problem_type = given
    parent.config.problem_type = given or SINGLE
    before = state(parent)
    trainer = NeMoTrainer(parent, arguments(tmp_path), collator(kind), Subset(text_samples(20), range(20)))
    batch = collator(kind)(text_samples(20))
    for run in (trainer.train, lambda: trainer.update_relevance(text_samples(20)),
                lambda: evaluate_module(parent, "cat", [batch], show_progress=False)):  # fmt: skip
        with pytest.raises(ValueError, match="Got") as error:
            run()
        check_message(error, *words)
        assert_same_state(state(parent), before, rtol=0, atol=0)


# Columns of labels, what the message names, and what its remedy makes of data and model.
REMEDIES = {
    "names": (
        [LABELS[label] for label in IDS], "{'label': model.config.label2id.get(sample['label'])}",
        lambda data, model: data.map(lambda sample: {"label": model.config.label2id.get(sample["label"])}),
    ),
    "numbers as texts": (
        [str(label) for label in IDS], "dataset.map(lambda sample: {'label': int(sample['label'])})",
        lambda data, model: data.map(lambda sample: {"label": int(sample["label"])}),
    ),
    "NaN": (
        [float("nan"), *map(float, IDS[1:])], f"label is NaN {-100}",
        lambda data, model: data.map(
            lambda sample: {"number": -100 if sample["label"] != sample["label"] else int(sample["label"])},
            remove_columns="label",
        ).rename_column("number", "label"),
    ),
    "other names": (
        ["abcde"[label] for label in IDS], "class_encode_column('label')",
        lambda data, model: data.class_encode_column("label"),
    ),
    "null": (
        [None, *IDS[1:]], f"the label {-100}",
        lambda data, model: data.map(lambda sample: {"label": -100 if sample["label"] is None else sample["label"]}),
    ),
    "ids from 1": (
        [label + 1 for label in IDS], "num_labels=6",
        lambda data, model: model.config.update({"num_labels": 6}) or setattr(
            model, "classifier", torch.nn.Linear(32, 6)) or setattr(model, "num_labels", 6) or data,
    ),
    "lists": (
        several(torch.tensor(IDS)).tolist(), f"problem_type='{SEVERAL}'",
        lambda data, model: model.config.update({"problem_type": SEVERAL}) or data,
    ),
    "numbers with a point": (
        [float(label) for label in IDS], "dataset.cast_column('label', datasets.Value('int64'))",
        lambda data, model: data.cast_column("label", datasets.Value("int64")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REMEDIES)
def test_the_remedy_of_a_column_works(name, tmp_path):
    labels, word, remedy = REMEDIES[name]
    model, data, args = fresh("bert"), text_table(label=labels), arguments(tmp_path, max_steps=1)
    with pytest.raises(ValueError, match=re.escape(word)) as error:
        NeMoTrainer(model, args, train_dataset=data)
    check_message(error, word)
    trainer = NeMoTrainer(model, args, train_dataset=remedy(data, model))
    trainer.train()
    assert trainer.parent.config.relevance_source == "assigned"


def test_class_labels_in_another_order_are_refused_in_training_and_evaluation(tmp_path):
    model, args = fresh("bert"), arguments(tmp_path, max_steps=1)
    data = text_table(label=IDS).cast_column("label", datasets.ClassLabel(names=LABELS[::-1]))
    trainer = NeMoTrainer(model, args, train_dataset=data.align_labels_with_mapping(model.config.label2id, "label"))
    assert trainer.train_dataset["label"][:] == [4 - label for label in IDS]
    for run in (lambda: NeMoTrainer(fresh("bert"), args, train_dataset=data),
                lambda: trainer.evaluate_module("cat", data), lambda: trainer.update_relevance(data)):  # fmt: skip
        with pytest.raises(ValueError, match="calls the label 0 'frog', which is 4 in the model") as error:
            run()
        check_message(error, "dataset.align_labels_with_mapping(model.config.label2id, 'label')")


def test_labels_that_a_transform_or_collator_makes(tmp_path):
    def tensors(batch):
        return {name: [torch.tensor(row) for row in batch[name]] for name in ("input_ids", "attention_mask")}

    stars = text_table(label=[label + 1 for label in IDS]).with_transform(
        lambda b: tensors(b) | {"labels": [i - 1 for i in b["label"]]}
    )
    names = text_table(label=[LABELS[label] for label in IDS]).with_transform(
        lambda b: tensors(b) | {"labels": [LABELS.index(name) for name in b["label"]]}
    )
    fine = text_table(fine_label=IDS).remove_columns("label")
    both = text_table(fine_label=IDS).rename_column("label", "unused")

    def collate(rows):
        batch = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "attention_mask")}
        return {**batch, "labels": torch.tensor([row["fine_label"] for row in rows])}

    expected = None
    for data, given in ((stars, None), (names, None), (fine, collate), (both, collate), (text_table(), None)):
        args = arguments(tmp_path, remove_unused_columns=False)
        trainer = NeMoTrainer(varied_parent("bert"), args, given, data)
        trainer.train()
        expected = expected or state(trainer.parent)
        assert_same_state(state(trainer.parent), expected, rtol=0, atol=0)  # and no random state was used up


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (Stream([]), ["iterable", "relevance_dataset"]),
        (datasets.DatasetDict(train=text_table(label=IDS)), ["DatasetDict", "data['train']"]),
        (text_table(label=[-100] * 20), ["without a sample of any label"]),
        (text_table(label=[*IDS[1:], 5]), ["label 5"]),
        (text_table(label=[*IDS[1:], None]), ["None"]),
    ],
    ids=["stream", "several", "ignored", "wrong", "null"],
)
def test_data_that_take_the_place_of_others_are_checked_before_the_first_step(data, words, tmp_path):
    trainer = NeMoTrainer(varied_parent("bert"), arguments(tmp_path), train_dataset=text_table(label=IDS))
    trainer.train_dataset, before = data, state(trainer.parent)
    with pytest.raises(ValueError, match="Got") as error:
        trainer.train()
    check_message(error, *words)
    assert_same_state(state(trainer.parent), before, rtol=0, atol=0)


class WithoutLength:
    def __getitem__(self, index):
        return text_samples(20)[index]


@pytest.mark.parametrize("kind", ["list", "columns", "transform", "torch", "stream"])
def test_a_label_without_a_sample(kind, tmp_path, caplog):
    known = [sample for sample in text_samples(40) if sample["labels"] not in (1, 3)]
    columns = datasets.Dataset.from_list([{name: torch.as_tensor(v).tolist() for name, v in s.items()} for s in known])
    data = {
        "list": known, "columns": columns, "torch": Subset(known, range(len(known))), "stream": Stream(known),
        "transform": columns.with_transform(lambda rows: {k: [torch.tensor(v) for v in vs] for k, vs in rows.items()}),
    }[kind]  # fmt: skip
    groups = {"animals": ["cat", "dog", "frog"], "car": ["car"], "ship": ["ship"]}
    parent = varied_parent("bert", label_groups=groups)
    args = arguments(tmp_path, remove_unused_columns=False)
    more = {"relevance_dataset": known} if kind == "stream" else {}
    trainer = NeMoTrainer(parent, args, train_dataset=data, **more)
    with caplog.at_level(logging.WARNING, logger="nemo_hf"):
        result = trainer.train()
    assert "['dog', 'ship']" in caplog.text
    assert result.global_step == 2
    assert parent.config.unseen_labels == [1, 3]
    expected = naive_relevance(parent, [*known, *(s for s in text_samples(40) if s["labels"] == 3)])
    for key, relevance in parent.masks.relevance().items():
        assert torch.equal(relevance[:2], expected[key][:2])
        assert not relevance[2].any()
    assert trainer.extract_module(["cat", "dog"]).config.names == {0: "cat", 1: "dog"}
    assert evaluate_module(parent, "car", [batch_of(known)], show_progress=False).controls["other"] is not None
    trainer.save_model(tmp_path / "parent")
    load = AutoModelForSequenceClassification.from_pretrained
    for cut in (parent.extract_module, lambda labels: load(tmp_path / "parent", labels=labels)):
        for labels in ("ship", ["car", "ship"]):
            with pytest.raises(ValueError, match=r"\['ship'\].*no sample") as error:
                cut(labels)
            check_message(error, "compute_relevance")
    loaded = load(tmp_path / "parent")
    compute_relevance(loaded, [batch_of(text_samples(40))], show_progress=False)
    trainer.update_relevance(text_samples(40))
    for model in (loaded, parent):
        assert model.config.unseen_labels is None
        assert model.extract_module("ship").config.names == {0: "ship"}


def test_groups_without_samples_have_no_part_in_training(tmp_path):
    """A model of two more labels that no sample has trains as one without them."""
    samples = [sample for sample in text_samples(40) if sample["labels"] < 3]
    options = {"rehearsal_probability": 1.0, "warmup_ratio": 0, "retention_target": 0.3, "sparsity_weight": 0.1}
    args = arguments(tmp_path, max_steps=4, optim="sgd")
    parent = varied_parent("bert", **options)
    trainer = NeMoTrainer(parent, args, train_dataset=samples)
    drawn = []
    own = trainer._rehearsed_groups
    trainer._rehearsed_groups = lambda: drawn.append(own()) or drawn[-1]
    trainer.train()
    assert {group for groups in drawn for group in groups.tolist()} <= {0, 1, 2}
    other = varied_parent("bert", label_groups={**{name: [name] for name in LABELS[:2]}, "rest": LABELS[2:]}, **options)
    for mask, reference in zip(other.masks.site_masks(), varied_parent("bert").masks.site_masks(), strict=True):
        mask.relevance.copy_(reference.relevance[:3])
    again = NeMoTrainer(other, args, train_dataset=samples)
    again.train()
    assert history(trainer) == pytest.approx(history(again), rel=1e-5)
    for key, relevance in other.masks.relevance().items():
        assert torch.equal(parent.masks.relevance()[key][:3], relevance)


def train(*args, **kwargs):
    NeMoTrainer(*args, **kwargs).train()


def own_loader(trainer_class):
    def loader(self):
        return self.accelerator.prepare(torch.utils.data.DataLoader(text_samples(20), batch_size=10))

    return type("Own", (trainer_class,), {"get_train_dataloader": loader})


class TestBeforeTheFirstStep:
    @pytest.mark.parametrize(
        ("data", "words"),
        [
            (
                lambda: datasets.DatasetDict(train=text_table(), test=text_table()),
                ["train", "test", "train_dataset=data['train']"],
            ),
            (lambda: {"a": text_samples(20)}, ["train_dataset=data['a']"]),
            (lambda: text_table().remove_columns("label"), ["input_ids", "rename_column"]),
            (lambda: text_table().to_iterable_dataset(), ["iterable", "relevance_dataset="]),
            (lambda: Stream(text_samples(20)), ["iterable", "relevance_dataset="]),
            (WithoutLength, ["without a length", "relevance_dataset="]),
        ],
        ids=["splits", "a dictionary", "no label", "a table read as a stream", "a stream", "no length"],
    )
    def test_data_that_can_not_be_counted_are_refused(self, data, words, tmp_path):
        for model in (fresh("bert"), varied_parent("bert")):
            with pytest.raises(ValueError, match="Got") as error:
                NeMoTrainer(model, arguments(tmp_path), train_dataset=data())
            check_message(error, *words)

    @pytest.mark.parametrize(
        ("data", "words"),
        [
            (WithoutLength, ["without a length", "__len__"]),
            (lambda: {"a": text_samples(20)}, ["relevance_dataset=data['a']"]),
            (list, ["empty"]),
            (lambda: [{"input_ids": torch.ones(4, dtype=torch.long)}] * 3, ["'labels'"]),
            (lambda: with_labels(lambda label: label + 7, text_samples(20)), ["label 7"]),
        ],
        ids=["no length", "a dictionary", "empty", "no labels", "other labels"],
    )
    def test_relevance_data_that_can_not_be_counted_are_refused(self, data, words, tmp_path):
        parent = varied_parent("bert")
        given, before = {"train_dataset": text_samples(20), "relevance_dataset": data()}, state(parent)
        with pytest.raises(ValueError, match="Got") as error:
            train(parent, arguments(tmp_path), **given)
        check_message(error, *words)
        assert_same_state(state(parent), before, rtol=0, atol=0)

    def test_relevance_data_are_of_the_kind_of_the_training_data(self, tmp_path):
        lists = with_labels(lambda label: several(torch.tensor(label)).float(), text_samples(20))
        for data in (lists, Subset(lists, range(20))):
            parent = varied_parent("bert")
            train(parent, arguments(tmp_path), train_dataset=data, relevance_dataset=lists[:10])
            assert parent.config.problem_type == SEVERAL
            assert_relevance(parent, naive_relevance(parent, lists[:10]))

    def test_an_own_loader_needs_relevance_data(self, tmp_path):
        own, args = own_loader(NeMoTrainer), arguments(tmp_path)
        with pytest.raises(ValueError, match="get_train_dataloader") as error:
            own(varied_parent("bert"), args).train()
        check_message(error, "relevance_dataset=")
        finite = text_table().to_iterable_dataset().take(20)
        for counted in (text_samples(20), finite, Stream(text_samples(20))):
            trainer = own(varied_parent("bert"), args, relevance_dataset=counted)
            trainer.train()
            assert_relevance(trainer.parent, naive_relevance(trainer.parent, text_samples(20)))


class TestAfterTheLastStep:
    @pytest.mark.parametrize(
        "error", [OSError("no such image"), torch.OutOfMemoryError("memory"), RuntimeError("collate")]
    )
    def test_training_ends_well_if_relevance_can_not_be_counted(self, error, tmp_path, caplog):
        parent, reference = varied_parent("bert"), varied_parent("bert")
        args = arguments(tmp_path, save_strategy="steps", save_steps=2, per_device_eval_batch_size=4)
        trainer = NeMoTrainer(
            parent, args, train_dataset=text_samples(20), relevance_dataset=Spoiled(text_samples(20), error)
        )
        with caplog.at_level(logging.WARNING, logger="nemo_hf"):
            assert trainer.train().global_step == 2
        assert type(error).__name__ in caplog.text
        assert "trainer.update_relevance(dataset)" in caplog.text
        assert parent.config.relevance_source == "running"
        saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-2")
        assert_same_state(state(parent), state(saved), rtol=0, atol=0)
        trainer.update_relevance(text_samples(20))
        assert_relevance(parent, naive_relevance(parent, text_samples(20)))
        whole = NeMoTrainer(reference, args, train_dataset=text_samples(20))
        whole.train()
        assert_same_state(state(parent), state(reference), rtol=0, atol=0)

    def test_an_interruption_is_passed_on_and_writes_nothing(self, tmp_path):
        parent = varied_parent("bert")
        trainer = NeMoTrainer(
            parent, arguments(tmp_path, per_device_eval_batch_size=4), train_dataset=text_samples(20),
            relevance_dataset=Spoiled(text_samples(20), KeyboardInterrupt()),
        )  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert parent.config.relevance_source == "running"


def test_looking_at_data_uses_up_no_random_numbers(tmp_path):
    """Training behind a collator or transform that draws random numbers begins as without a look at its labels."""

    def noisy(rows):
        batch = default_data_collator(rows)
        drawn = [random.random(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002
        return {**batch, "attention_mask": batch["attention_mask"] * int(sum(drawn) < 2.9)}

    states = []
    for data in (text_samples(20), Subset(text_samples(20), range(20))):  # labels of the second are not looked at
        trainer = NeMoTrainer(
            varied_parent("bert"), arguments(tmp_path), noisy, data, relevance_dataset=text_samples(20, 1)
        )
        trainer.train()
        states.append((state(trainer.parent), torch.rand(3), random.random(), np.random.rand()))  # noqa: NPY002
    assert_same_state(states[0][0], states[1][0], rtol=0, atol=0)
    assert torch.equal(states[0][1], states[1][1])
    assert states[0][2:] == states[1][2:]


class TestGroupColumn:
    def test_of_labels_without_samples_and_samples_without_labels(self, tmp_path):
        labels = [label if label not in (1, 3) else -100 for label in IDS]
        data = text_table(label=labels, domain=DOMAINS * 4)
        trainer = NeMoTrainer(fresh("bert"), arguments(tmp_path, max_steps=1), train_dataset=data,
                              nemo_config=generated(group_column="domain"))  # fmt: skip
        trainer.train()
        assert trainer.parent.config.groups == {"pet": [0, 4], "vehicle": [2], "dog": [1], "ship": [3]}
        assert trainer.parent.config.unseen_labels == [1, 3]

    @pytest.mark.parametrize("shift", [1, 0])
    def test_behind_a_transform_is_used_only_if_labels_are_those_of_the_column(self, shift, tmp_path):
        def transform(batch):
            made = {name: [torch.tensor(row) for row in batch[name]] for name in ("input_ids", "attention_mask")}
            return {**made, "labels": [(label + shift) % 5 for label in batch["label"]]}

        data = text_table(domain=DOMAINS * 4).with_transform(transform)
        args = arguments(tmp_path, max_steps=1, remove_unused_columns=False)
        trainer = NeMoTrainer(fresh("bert"), args, train_dataset=data, nemo_config=generated(group_column="domain"))
        if shift:
            with pytest.raises(ValueError, match="group_column") as error:
                trainer.train()
            check_message(error, "label_groups")
        else:
            trainer.train()
            assert trainer.parent.config.groups == {"pet": [0, 1, 4], "vehicle": [2, 3]}
            again = collator(lambda ids: 4 - ids)  # the parent has its groups, whatever the column of other data says
            NeMoTrainer(trainer.parent, args, again, text_samples(20)).train()

    @pytest.mark.parametrize(
        ("data", "words"),
        [
            (text_table(label=IDS, domain=[None, *DOMAINS[1:]] * 4), ["without a group", "'domain'"]),
            (text_table(label=IDS, domain=[*"\0\0", "", *"\0\0"] * 4), ["without a group", "'domain'"]),
            (text_table(label=IDS, domain=DOMAINS * 4).to_iterable_dataset(), ["a stream", "label_groups={...}"]),
        ],
        ids=["null", "empty", "stream"],
    )
    def test_without_groups_is_refused(self, data, words, tmp_path):
        config, more = generated(group_column="domain"), {"relevance_dataset": text_table(label=IDS)}
        with pytest.raises(ValueError, match="Got") as error:
            NeMoTrainer(fresh("bert"), arguments(tmp_path), train_dataset=data, nemo_config=config, **more)
        check_message(error, *words)


def test_modules_and_composed_models_take_labels_of_every_width():
    parent, batch = varied_parent("bert"), batch_of(text_samples(20))
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    module = parent.extract_module(list(range(5)))
    expected = F.cross_entropy(module(**inputs).logits, batch["labels"]).item()
    for kind in ("int32", "uint8", "int16", "one column", "a list"):
        assert module(**inputs, labels=KINDS[kind][0](batch["labels"])).loss.item() == pytest.approx(expected, abs=1e-6)
    chances = mixed(batch["labels"])
    assert module(**inputs, labels=chances).loss.item() == pytest.approx(
        F.cross_entropy(module(**inputs).logits, chances).item(), abs=1e-6
    )
    with pytest.raises(ValueError, match="sums to 2") as error:
        module(**inputs, labels=several(batch["labels"]).float())
    check_message(error, SEVERAL)
    small = parent.extract_module(["cat", "dog"])
    for labels in (batch["labels"].byte(), batch["labels"][:, None], batch["labels"].tolist()):
        got = calibrate_rejection(small, [{**inputs, "labels": labels}], 0.9, show_progress=False)
        assert got == calibrate_rejection(small, [batch], 0.9, show_progress=False)
