"""Benchmarks: data splits, measured modules, stored results and the tables made of them."""

from functools import partial

import pytest
from conftest import benchmark_script, fresh, image_samples, randomize_relevance
from torch.utils.data import default_collate

from nemo_hf import NeMoConfig, make_parent
from nemo_hf.models.extraction import make_plan

compact, tables = benchmark_script("compact"), benchmark_script("quality_tables")
tasks, quality = benchmark_script("quality_tasks"), benchmark_script("quality")
GROUPS = {name: [label] for label, name in enumerate("abcde")}


@pytest.fixture(scope="module")
def split():
    batch = default_collate(image_samples(40))
    return tasks.Split({"pixel_values": batch["pixel_values"]}, batch["labels"])


@pytest.fixture(scope="module")
def task(split):
    trainer = partial(tasks.build_trainer, lambda: fresh("vit"), {})
    return tasks.Task("", lambda seed: [split] * 3, trainer, 1, {"pairs": [(3, 1), (0, 4)]}, [(3, 1)], 20, 1e-3, GROUPS)


@pytest.fixture(scope="module", params=["vit", "simcnn"])
def parent(request):
    config = tasks.PaperCNNConfig(architecture="simcnn", width=4, image_size=16, **tasks.label_names("abcde"))
    model = fresh("vit") if request.param == "vit" else tasks.PaperCNNForImageClassification(config)
    parent = make_parent(model, NeMoConfig()).eval()
    randomize_relevance(parent)
    return parent


def test_digits_are_split_into_disjoint_parts():
    parts = tasks.digits_splits(1)
    assert [len(part) for part in parts] == [1150, 287, 360]
    assert len({row.numpy().tobytes() for part in parts for row in part.inputs["pixel_values"]}) == 1797


def test_a_measured_module_is_what_the_cut_module_does(task, parent, split):
    found = quality.measure_module(task, parent, split, quality.logits_of(parent, split), None, (3, 1))
    module, own = parent.extract_module([3, 1]), split.part([3, 1])
    assert own.labels.tolist() == [[3, 1].index(label) for label in split.labels.tolist() if label in (3, 1)]
    assert found["module"] == pytest.approx(quality.accuracy(quality.logits_of(module, own), own.labels))
    assert found["restricted"] == pytest.approx(quality.accuracy(quality.logits_of(parent, own)[:, [3, 1]], own.labels))
    assert found["neurons"] == pytest.approx(module.config.retained_neurons)
    share = module.model.num_parameters() / parent.model.num_parameters()
    assert found["weights"] == pytest.approx(share if parent.kinds == {"conv"} else found["neurons"])


def test_pruning_keeps_as_many_neurons_of_each_part_and_the_largest(parent):
    keep = make_plan(parent, [0, 4]).keep
    for site, mask in zip(parent.sites, quality.masks_by_magnitude(parent, keep).values(), strict=True):
        parts = dict(zip(site.parts, mask.split(list(site.parts.values())), strict=True))
        assert {name: int(part.sum()) for name, part in parts.items()} == {n: len(keep[site.key][n]) for n in parts}
        if site.kind == "ffn":
            scores = parent.model.get_submodule(site.produced()[0][0].layer).weight.norm(dim=1)
            scores = scores * parent.model.get_submodule(site.output).weight.norm(dim=0)
            assert scores[mask > 0].min() >= scores[mask == 0].max()


def test_a_row_is_measured_and_a_rerun_replaces_it(task, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "modularity", lambda parent, data: {"cohesion": 0.6, "coupling": 0.4})
    row, plain = quality.measure_plain(task, 0, 1, False, tmp_path / "parents")
    again, _ = quality.measure_plain(task, 0, 1, False, tmp_path / "parents")  # reads the parent that was kept
    assert again == {**row, "training_seconds": None}
    found = quality.measure(task, quality.options_of("ours, by sample", {"ours": {}}), 0, 1, plain, False, None)
    found["methods"][0] |= {"plain": row["accuracy"], "accuracy": 1 / 3}
    about = {"task": "stripes", "command": "run --rows METHOD --seeds SEED"}
    stored = quality.add(quality.add(about, {"methods": [row]}, "plain", 0), {**found, "methods": [{}]}, "our m", 0)
    compact.write(tmp_path / "quality.json", quality.add(stored, found, "our m", 0))
    stored = compact.load(tmp_path / "quality.json")
    assert [len(stored[name]) for name in ("methods", "sets", "modules")] == [2, 1, 1]
    assert stored["methods"][1]["accuracy"] == 0.3333
    assert f"| {stored['sets'][0]['module']:.3f} |" in tables.kinds_table(stored)
    assert "| our m | 0 | 0.333 | " in tables.methods_table(stored)
    assert "run --rows plain 'our m' --seeds 0" in tables.commands(stored)
    with pytest.raises(SystemExit, match="Got the row 'our'"):
        quality.options_of("our", {"ours": {}})


def test_tables_average_over_kinds_and_seeds():
    row = {"method": "m", "kind": "pairs", "module": 0.8, "restricted": 0.9}
    sets = [{**row, "seed": seed, "other": other} for seed, other in ((0, 0.5), (1, 0.7))]
    sets.append({**row, "seed": 0, "kind": "singles", "restricted": 1.0})  # among one label there is nothing to choose
    own = tables.sets_of({"sets": sets})["m"]
    assert own == sets[:2]
    assert tables.cells(own, "other", "module", "random") == ["0.600", "0.800", "-"]
    assert compact.mean(own, tables.specificity) == pytest.approx(20)
    assert tables.upper_bound([1.0, 2.0, 3.0]) == "2.00 (at most 3.69)"


def test_blocks_are_written_between_markers_and_missing_ones_reported(monkeypatch):
    script = benchmark_script("readme_tables")
    monkeypatch.setattr(script, "BLOCKS", {"results": lambda: "new", "costs": lambda: "more"})
    page = "above\n<!-- results -->\nold\n<!-- /results -->\nbelow <!-- costs -->"
    assert script.rendered(page) == page.replace("old", "new")
    assert script.missing(page, ["results", "costs"]) == ["costs"]
