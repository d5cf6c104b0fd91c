"""The quality harness: its data, its rivals and its tables, on the real code of the benchmark."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import image_samples, randomize_relevance
from test_convolutions import parent_of as parent_of_channels

from nemo_hf import NeMoConfig, make_parent
from nemo_hf.models.extraction import make_plan

FOLDER = Path(__file__).parents[1] / "examples" / "benchmarks"


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(FOLDER))
    try:
        names = ("quality_tasks", "quality_variants", "quality", "quality_tables")
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture
def split(scripts):
    samples = image_samples(40)
    pixels = torch.stack([sample["pixel_values"] for sample in samples])
    return scripts["quality_tasks"].Split({"pixel_values": pixels}, torch.tensor([s["labels"] for s in samples]))


@pytest.fixture
def parent(vit):
    parent = make_parent(vit, NeMoConfig()).eval()
    randomize_relevance(parent)
    return parent


def test_parts_keep_the_order_and_count_labels_by_position(split):
    part = split.part([3, 1])
    chosen = [index for index, label in enumerate(split.labels.tolist()) if label in (3, 1)]
    assert torch.equal(part.inputs["pixel_values"], split.inputs["pixel_values"][chosen])
    assert part.labels.tolist() == [[3, 1].index(split.labels[index]) for index in chosen]


def test_digits_are_split_into_disjoint_parts(scripts):
    parts = scripts["quality_tasks"].digits_splits(1)
    assert [len(part) for part in parts] == [1150, 287, 360]
    images = [{row.numpy().tobytes() for row in part.inputs["pixel_values"]} for part in parts]
    assert not images[0] & images[1] | images[0] & images[2] | images[1] & images[2]


def test_sets_are_fixed_and_different(scripts):
    sets = scripts["quality_tasks"].digits().sets
    assert {kind: len(found) for kind, found in sets.items()} == {
        "singles": 10,
        "pairs": 45,
        "triples": 10,
        "fives": 10,
    }
    assert all(len(set(found)) == len(found) for found in sets.values())
    assert sets == scripts["quality_tasks"].digits().sets


def test_a_measured_set_is_what_its_module_does(scripts, parent, split):
    quality = scripts["quality"]
    task = scripts["quality_tasks"].Task("", None, None, 1, {}, [], 8, 1e-3, {str(i): [i] for i in range(5)})
    whole = quality.answers(parent, split)
    found = quality.measured_set(task, parent, split, whole, None, (3, 1))
    module = parent.extract_module([3, 1])
    own = split.part([3, 1])
    logits = quality.answers(module, own)
    assert found["module"] == pytest.approx((logits.argmax(-1) == own.labels).float().mean().item())
    assert found["neurons"] == pytest.approx(module.config.retained_neurons)
    restricted = quality.answers(parent, own)[:, [3, 1]].argmax(-1)
    assert found["restricted"] == pytest.approx((restricted == own.labels).float().mean().item())


def test_the_share_of_weights_counts_rows_and_columns(scripts, parent):
    keep = make_plan(parent, [0, 4]).keep
    kept = total = 0
    for site in parent.sites:
        for name, size in site.parts.items():  # q and k, v and o, up and down: each neuron has two vectors of 32
            kept, total = kept + 2 * 32 * len(keep[site.key][name]), total + 2 * 32 * size
    assert scripts["quality"].attention_and_ffn(parent, keep) == pytest.approx(kept / total)
    assert scripts["quality"].attention_and_ffn(parent, every_neuron(parent)) == 1.0


@pytest.fixture
def channels():
    parent = parent_of_channels("simcnn")
    randomize_relevance(parent)
    return parent


def test_the_weights_of_a_cnn_are_those_of_the_whole_module(scripts, channels):
    keep = make_plan(channels, [0, 4]).keep
    module = channels.extract_module([0, 4])
    expected = module.model.num_parameters() / channels.model.num_parameters()
    assert scripts["quality"].kept_weights(channels, [0, 4], keep) == pytest.approx(expected)
    assert 0 < expected < 1


def test_pruning_a_cnn_keeps_the_channels_with_the_largest_filters(scripts, channels):
    keep = make_plan(channels, [0, 4]).keep
    masks = scripts["quality"].by_magnitude(channels, keep)
    for site in channels.sites:
        layers = [channels.model.get_submodule(path).weight for path in site.producers]
        norms = [sum(weight[neuron].norm().item() for weight in layers) for neuron in range(site.neurons)]
        kept = {index for index, value in enumerate(masks[site.key].tolist()) if value}
        count = len(keep[site.key]["channels"])
        assert kept == set(sorted(range(site.neurons), key=lambda index: -norms[index])[:count])


def test_a_patched_label_is_measured_as_its_definition_says(scripts):
    answered, right = torch.tensor([1, 1, 0, 2, 1, 0]), torch.tensor([1, 0, 0, 2, 1, 1])
    found = importlib.import_module("patching").of_label(answered, right, 1)
    assert found == pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "accuracy on others": 2 / 3})


def every_neuron(parent):
    return {site.key: {name: torch.arange(size) for name, size in site.parts.items()} for site in parent.sites}


def test_pruning_keeps_as_many_neurons_of_each_part_and_the_largest(scripts, parent):
    keep = make_plan(parent, [0, 4]).keep
    masks = scripts["quality"].by_magnitude(parent, keep)
    for site in parent.sites:
        parts = dict(zip(site.parts, masks[site.key].split(list(site.parts.values())), strict=True))
        assert {name: int(part.sum()) for name, part in parts.items()} == {n: len(keep[site.key][n]) for n in parts}
    site = next(site for site in parent.sites if "intermediate" in site.parts)
    rows = parent.model.get_submodule(next(iter(site.produced()))[0].layer).weight.norm(dim=1)
    scores = rows * parent.model.get_submodule(site.output).weight.norm(dim=0)
    mask = masks[site.key] > 0
    assert scores[mask].min() >= scores[~mask].max()


@pytest.mark.parametrize("variant", ["balanced batches", "distilled modules", "advantage", "q and k open"])
def test_variants_train(scripts, split, vit, variant, tmp_path):
    from transformers import TrainingArguments

    kind = scripts["quality_variants"].VARIANTS[variant]
    args = TrainingArguments(str(tmp_path), max_steps=3, report_to="none", use_cpu=True, disable_tqdm=True)
    config = NeMoConfig(rehearsal_probability=1.0, warmup_ratio=0.0, specificity_weight=0.2)
    trainer = kind(vit, args, scripts["quality_tasks"].collate, split, nemo_config=config)
    assert trainer.train().training_loss > 0


def test_tables_are_those_of_the_results(scripts):
    tables = scripts["quality_tables"]
    assert tables.page(tables.stored_results) == (FOLDER / "quality.md").read_text()


def test_every_result_says_how_it_was_made():
    stored = {path.name: json.loads(path.read_text()) for path in FOLDER.glob("quality_*.json")}
    assert stored
    for results in stored.values():
        for row in results["rows"]:
            assert {"row", "options", "seed", "epochs", "accuracy", "command"} <= set(row)
