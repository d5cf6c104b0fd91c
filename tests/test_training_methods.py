"""The benchmark of training methods: data, trainings that go on, measured modules and the tables made of them."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import benchmark_script, fresh, image_samples, randomize_relevance
from torch.utils.data import DataLoader, default_collate
from transformers import TrainerCallback

from nemo_hf import NeMoConfig, make_parent
from nemo_hf.models.extraction import make_plan

cutting = benchmark_script("cutting")
tasks, methods, sources = (benchmark_script(name) for name in ("tasks", "training_methods", "image_sources"))
GROUPS = {name: [label] for label, name in enumerate("abcde")}
SETS = {"pairs": [(3, 1), (0, 4)]}


@pytest.fixture(scope="module")
def split():
    batch = default_collate(image_samples(40))
    return tasks.Split({"pixel_values": batch["pixel_values"]}, batch["labels"])


@pytest.fixture(scope="module")
def images(split):
    pixels = (split.inputs["pixel_values"] * 60 + 100).clamp(0, 255).to(torch.uint8)
    return tasks.Images({"pixel_values": pixels}, split.labels, size=16)


@pytest.fixture(scope="module")
def task(split):
    trainer = partial(tasks.build_trainer, lambda: fresh("vit"), {})
    known = {"plain": None, "nemo": tasks.PAPER, "generated": {}}
    return tasks.Task("stripes", lambda seed: [split] * 3, trainer, 1, SETS, 20, 1e-3, GROUPS, methods=known)


def parent_of(options, seed=0):
    parent = make_parent(fresh("vit"), NeMoConfig(**options)).eval()
    randomize_relevance(parent, seed)
    return parent


def cuts_of(task, split, model):
    return methods.Cuts(task, model, [split] * 3, split, 0, "")


def test_digits_are_split_into_disjoint_parts():
    parts = tasks.digits_splits(1)
    assert [len(part) for part in parts] == [1150, 287, 360]
    assert len({row.numpy().tobytes() for part in parts for row in part.inputs["pixel_values"]}) == 1797


def test_images_come_in_whole_batches_that_only_training_shifts(images):
    train = tasks.replace(images, is_augmented=True)
    torch.manual_seed(0)
    (batch,) = DataLoader(train, batch_size=40, collate_fn=tasks.collate)
    (whole,) = images.batches()
    assert batch["pixel_values"].shape == whole["pixel_values"].shape == (40, 3, 16, 16)
    assert torch.equal(batch["labels"], whole["labels"])
    assert not torch.equal(batch["pixel_values"], whole["pixel_values"])
    assert torch.equal(next(iter(train.batches()))["pixel_values"], whole["pixel_values"])
    assert torch.equal(images[7]["pixel_values"], whole["pixel_values"][7])
    assert torch.equal((whole["pixel_values"] + 1).mul(127.5).round(), images.inputs["pixel_values"].float())


def paper_cnn(sizes):
    return sources.PaperCNNForImageClassification(sources.PaperCNNConfig(**sizes))


class Stop(TrainerCallback):
    """Stops behind the first checkpoint."""

    def on_save(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["plain", "moda"])
def test_a_training_that_was_stopped_ends_as_an_uninterrupted_one(images, method, tmp_path):
    sizes = {"architecture": "simcnn", "width": 4, "image_size": 16, **tasks.label_names("abcde")}
    options = {"bf16": True, "remove_unused_columns": False, "per_device_train_batch_size": 8}
    trainers = []

    def trainer(*arguments, **more):
        made = tasks.build_trainer(partial(paper_cnn, sizes), options, *arguments, **more)
        trainers.append(made)
        if len(trainers) == 1:
            made.add_callback(Stop())
        return made

    train = tasks.replace(images, is_augmented=True)
    parts = (train, images, images)
    own = tasks.Task("", lambda seed: parts, trainer, 2, SETS, 8, 1e-3, GROUPS, methods=tasks.CNN_METHODS)
    run = partial(methods.trained, own, "stripes", method, 0, 2)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped")
    found, _ = run(tmp_path / "stopped")
    expected, _ = run(tmp_path / "whole")
    assert len(trainers) == 3
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, atol=0, rtol=0)
    assert len([entry for entry in trainers[1].state.log_history if "cpu_seconds" in entry]) == 2
    assert [path.name for path in (tmp_path / "stopped").glob("*/checkpoints")] == []
    assert run(tmp_path / "whole")[1]["cpu_seconds"] >= 0
    assert len(trainers) == 3
    with pytest.raises(SystemExit, match="of another training"):
        methods.trained(own, "stripes", method, 0, 3, tmp_path / "whole")


def test_a_static_parent_computes_what_the_parent_does_under_mean_masks(split):
    parent = parent_of(tasks.PAPER)
    static = methods.static_parent(parent, [3, 1])
    means = {mask.site.key: mask.mean_mask[[3, 1]].mean(0) for mask in parent.masks.site_masks()}
    batch = {"pixel_values": split.inputs["pixel_values"]}
    expected = parent(**batch, static_masks=means).logits[:, [3, 1]]
    torch.testing.assert_close(static(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    for key, table in static.masks.relevance().items():
        assert torch.equal(table[0], parent.masks.relevance()[key][[3, 1]].amax(0))


def test_a_control_has_the_neurons_of_other_labels():
    parent = parent_of(tasks.PAPER)
    stranger = methods.with_masks_of(parent, (3, 1), (0, 4))
    expected = make_plan(parent, [0, 4])
    found = make_plan(stranger, [3, 1])
    assert all(torch.equal(found.static[key], mask) for key, mask in expected.static.items())
    assert not all(torch.equal(make_plan(parent, [3, 1]).static[key], mask) for key, mask in expected.static.items())


@pytest.mark.parametrize("options", [tasks.PAPER, {}])
def test_raw_modules_of_a_parent_are_by_relevance(task, split, options):
    cuts = cuts_of(task, split, parent_of(options))
    (module,) = cuts.cut("raw", (3, 1), 0, [0.5])
    assert cuts.share(module.model) == pytest.approx(0.5, abs=0.1)
    assert module.config.extraction["scores"] == "relevance"


def asked(**changes):
    given = {"ways": list(methods.WAYS), "sets": ["pairs"], "retention": [0.6, 0.4], "own": True, "limit": None}
    return SimpleNamespace(**{**given, **changes})


@pytest.mark.parametrize("method", ["plain", "nemo"])
def test_rows_are_what_models_do_and_are_measured_once(task, split, method, tmp_path, monkeypatch):
    monkeypatch.setitem(methods.WAYS, "fine-tuned", {"refine_epochs": 1})
    monkeypatch.setitem(methods.WAYS, "fine-tuned, relevance", {"refine_epochs": 1, "scores": "relevance"})
    monkeypatch.setattr(methods, "TUNING_EPOCHS", 1)
    model, cost = methods.trained(task, "stripes", method, 0, 1, tmp_path)
    cuts, about = cuts_of(task, split, model), {"method": method, "seed": 0, "model": "a1", "data": "test"}
    work = methods.Work(tmp_path / "work.jsonl")
    methods.measure(cuts, asked(), about, cost, work)
    ways = 3 if method == "plain" else 5
    assert len(work.asked) == 1 + ways * 2 * 2 + 2
    row = next(row for row in work.asked if row.get("way") == "reconstructed" and row["groups"] == [0, 4])
    own = split.part([0, 4])
    logits = methods.logits_of(cuts.cut("reconstructed", (0, 4), 0, [0.6, 0.4])[0], own)
    assert row["retention"] == 0.6
    assert row["module"] == row["validation"] == pytest.approx(cutting.accuracy(logits, own.labels))
    again = methods.Work(tmp_path / "work.jsonl")
    cuts.cut = None  # nothing is left to be cut
    methods.measure(cuts, asked(), about, cost, again)
    assert again.asked == work.asked
    found = methods.tables(work.asked)
    assert [len(found[name]) for name in ("methods", "modules", "own")] == [1, ways * 2, 1]
    assert found["methods"][0]["lost"] == (0 if method == "plain" else None)
