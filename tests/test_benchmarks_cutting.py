"""The benchmark of cuts of a plain classifier: its rows, its baselines, and runs that go on after an interruption."""

import copy
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import LABELS, benchmark_script, build
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

tasks, cutting = benchmark_script("tasks"), benchmark_script("cutting")
units_of, fisher = benchmark_script("cutting_units"), benchmark_script("cutting_fisher")
baselines = benchmark_script("cutting_baselines")
GROUPS = {name: [label] for label, name in enumerate(LABELS)}


@pytest.fixture(scope="module")
def split():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 10, (60,), generator=generator)
    mask = (torch.arange(10) < lengths[:, None]).long()
    labels = torch.arange(60) % len(LABELS)
    ids = torch.randint(1, 120, (60, 10), generator=generator)
    ids[:, 1] = 1 + labels  # so that there is something to learn
    return tasks.Split({"input_ids": ids * mask, "attention_mask": mask}, labels)


@pytest.fixture(scope="module")
def source():
    return build("bert")


@pytest.fixture(scope="module")
def encoder(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    source.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def job(source, split, encoder):
    train = split.part([3, 1])
    options = {"steps": 3, "batch": 8, "rate": 1e-3, "encoder": encoder}
    return units_of.Job(source, [3, 1], train.rows(torch.arange(12)), train, 0.5, 0, **options)


@pytest.fixture
def bench(source, split, encoder, monkeypatch):
    trainer = partial(tasks.build_trainer, partial(copy.deepcopy, source), {})
    sets = {"pairs": [(3, 1), (0, 4), (2, 3)]}
    task = tasks.Task("stripes", lambda seed: [split] * 3, trainer, 1, sets, 20, 1e-3, GROUPS)
    monkeypatch.setattr(cutting, "clinc150", lambda data, model: task)
    return cutting.Bench(task, source, [split] * 3, split, 3, encoder)


def asked(**changes):
    given = {"validation": False, "methods": ["fisher", "truncated, 2 layers"], "sets": ["pairs"], "samples": [12],
             "retention": [0.5], "seeds": [0], "limit": None}  # fmt: skip
    return SimpleNamespace(**{**given, **changes})


def without_times(rows):
    return [{name: value for name, value in row.items() if name not in ("seconds", "peak_mib")} for row in rows]


@pytest.mark.parametrize("name", ["fisher", "fisher, mask tuning", "truncated", "student", "student, calibration"])
def test_a_baseline_answers_for_the_labels_with_its_share_of_the_weights(job, name):
    before = copy.deepcopy(job.source.state_dict())
    model = baselines.BASELINES[name](job)
    assert units_of.logits_of(model, job.train).shape == (len(job.train), 2)
    paths = units_of.site_paths(job.source)
    share = units_of.site_weights(model, paths) / units_of.site_weights(job.source, paths)
    assert 0.4 < share <= 0.5 + 1e-9
    assert all(torch.equal(tensor, before[key]) for key, tensor in job.source.state_dict().items())


@pytest.mark.parametrize("importance", ["norm", "taylor"])
def test_torch_pruning_leaves_its_share_of_the_weights(job, importance):
    pytest.importorskip("torch_pruning")
    model = baselines.BASELINES[f"torch-pruning, {importance}"](job)
    assert units_of.logits_of(model, job.train).shape == (len(job.train), 2)
    paths = units_of.site_paths(job.source)
    assert units_of.site_weights(model, paths) == 0.5 * units_of.site_weights(job.source, paths)


def test_a_cut_of_all_units_is_the_restricted_source(job):
    units = units_of.unit_groups(job.source)
    whole = {group.site.key: torch.arange(group.count) for group in units}
    model = units_of.cut(copy.deepcopy(job.source), job.labels, units, whole)
    expected = units_of.logits_of(job.source, job.train)[:, job.labels]
    torch.testing.assert_close(units_of.logits_of(model, job.train), expected, atol=1e-5, rtol=1e-5)


def test_a_cut_computes_what_the_masked_source_does(job):
    units = units_of.unit_groups(job.source)
    masks = {group.site.key: (torch.arange(group.count) % 3 > 0).float() for group in units}
    kept = {key: mask.nonzero().squeeze(-1) for key, mask in masks.items()}
    model = units_of.cut(copy.deepcopy(job.source), job.labels, units, kept)
    with fisher.masked(job.source, units, masks):
        expected = units_of.logits_of(job.source, job.train)[:, job.labels]
    torch.testing.assert_close(units_of.logits_of(model, job.train), expected, atol=1e-5, rtol=1e-5)


def test_mask_gradients_are_those_of_single_samples(job):
    units = units_of.unit_groups(job.source)
    found = fisher.mask_gradients(job, units)
    sample = next(job.calibration.rows(torch.tensor([5])).batches())
    label = sample.pop("labels")
    masks = {group.site.key: torch.ones(group.count, requires_grad=True) for group in units}
    with fisher.masked(job.source, units, masks):
        nn.functional.cross_entropy(job.source(**sample).logits[:, job.labels], label).backward()
    for key, mask in masks.items():
        torch.testing.assert_close(found[key][5], mask.grad, atol=1e-5, rtol=1e-3)


def test_training_without_the_embeddings_of_unused_tokens_changes_nothing(job):
    model = baselines.truncated(job, 2)
    plain = copy.deepcopy(model)
    baselines.train(model, job.train, job, job.rate)
    baselines.set_seed(job.seed)
    optimizer = torch.optim.AdamW(plain.parameters(), job.rate, weight_decay=0.0)
    schedule = baselines.get_cosine_schedule_with_warmup(optimizer, 0, job.steps)
    plain.train()
    for _, indices in zip(range(job.steps), baselines.shuffled(job.train, job.batch), strict=False):
        batch = tasks.collate([job.train[index] for index in indices.tolist()])
        plain(**batch).loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("damp", [0.0, 1.0])
def test_mask_tuning_is_a_least_squares_fit_of_what_the_units_add(damp):
    torch.manual_seed(0)
    tokens, width, of_input = 40, 6, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    read, weight = torch.randn(tokens, 8), torch.randn(width, 8)
    stream, source = torch.randn(2, tokens, width)
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0])
    halves = [(read[part], stream[part], source[part]) for part in (slice(0, 15), slice(15, tokens))]
    found = fisher.tuned_mask(iter(halves), weight, of_input, mask, damp)
    kept = [0, 2, 3]
    columns = [(read[:, of_input == unit] @ weight[:, of_input == unit].T).flatten() for unit in kept]
    system = torch.cat([torch.stack(columns, 1), damp * torch.eye(3)])
    missing = torch.cat([(source - stream).flatten(), torch.zeros(3)])
    scales = 1 + torch.linalg.lstsq(system, missing[:, None])[0][:, 0]
    expected = torch.zeros(4).index_copy(0, torch.tensor(kept), scales)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_mask_tuning_brings_the_stream_nearer_to_the_source(job):
    group, *units = units_of.unit_groups(job.source)
    units = [group, *units]
    opened = {each.site.key: torch.ones(each.count) for each in units}
    masks = {**opened, group.site.key: torch.arange(group.count).remainder(2).float()}

    def behind(own):
        batches = fisher.streams(job.source, [group], units, own, job.calibration)
        return [batch[group.site.key] for batch in batches]

    whole = behind(opened)
    triples = [(*pair, source) for pair, (_, source) in zip(behind(masks), whole, strict=True)]
    weight = job.source.get_submodule(group.site.output).weight.detach()
    tuned = fisher.tuned_mask(iter(triples), weight, group.of_input, masks[group.site.key])
    distances = [
        sum((a - b).square().sum() for (_, a), (_, b) in zip(behind(own), whole, strict=True))
        for own in (masks, {**masks, group.site.key: tuned})
    ]
    assert distances[1] < distances[0]


def test_rearranged_masks_close_as_many_units_and_lose_no_more():
    torch.manual_seed(0)
    gradients = torch.randn(20, 9)
    gradients[:, 8] = -3 * gradients[:, 0]
    mask = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    smallest = gradients.square().sum(0).argsort()[:4]
    found = fisher.rearrange(mask, gradients)
    assert found.sum() == mask.sum()
    assert gradients[:, found == 0].sum(1).norm() <= gradients[:, smallest].sum(1).norm() + 1e-6


def test_the_search_loses_least_within_the_budget(job):
    units = units_of.unit_groups(job.source)
    torch.manual_seed(0)
    scores = {group.site.key: torch.rand(group.count) for group in units}
    budget = 0.4 * sum(group.cost * group.count for group in units)
    masks = fisher.search(scores, units, budget)
    assert sum(masks[group.site.key].sum() * group.cost for group in units) <= budget
    for kind in ("attention", "ffn"):
        keys = [group.site.key for group in units if group.site.kind == kind]
        kept, flat = torch.cat([masks[key] for key in keys]), torch.cat([scores[key] for key in keys])
        assert not kept.any() or kept.all() or flat[kept > 0].min() >= flat[kept == 0].max()


def test_a_resumed_run_finds_what_an_uninterrupted_one_does(bench, tmp_path):
    work = tmp_path / "cutting.work.jsonl"
    whole = cutting.run(bench, asked(), tmp_path / "other.jsonl")
    bench.kept.clear()
    cutting.run(bench, asked(methods=["fisher"], limit=2), work)
    with work.open("a") as file:
        file.write('{"source": "cut o')  # a line that a kill left
    bench.kept.clear()
    resumed = cutting.run(bench, asked(), work)
    assert without_times(resumed) == without_times(whole)
    lines = work.read_text().splitlines()
    rates = [json.loads(line) for line in lines if '"rates"' in line]
    assert [row["rate"] for row in rates] == list(baselines.RATES)
    assert len([line for line in lines if line.endswith("}")]) - len(rates) == len(whole) == 6
    bench.make = None  # nothing is left to be made
    assert cutting.run(bench, asked(), work) == resumed


def test_a_row_is_what_its_model_does(bench, split, tmp_path):
    row = cutting.run(bench, asked(methods=["truncated, 2 layers"], limit=1), tmp_path / "work.jsonl")[0]
    bench.rate = row["rate"]
    model = bench.make("truncated, 2 layers", (3, 1), None, 12, 0)
    own = split.part([3, 1])
    logits = units_of.logits_of(model, own)
    assert row["module"] == pytest.approx(cutting.accuracy(logits, own.labels))
    assert row["parameters"] == model.num_parameters()
    assert row["bytes"] > 4 * row["parameters"]
    restricted = units_of.logits_of(bench.source, own)[:, [3, 1]]
    assert row["restricted"] == pytest.approx(cutting.accuracy(restricted, own.labels))
    assert 0 <= row["rejection"] <= 1


def test_other_sets_are_disjoint_and_as_large():
    sets = [(0, 1), (2, 3), (1, 2)]
    assert [cutting.other_set(sets, groups, 5) for groups in sets[1:2]] == [(0, 1)]
    for groups in sets:
        other = cutting.other_set(sets, groups, 5)
        assert len(other) == 2
        assert not set(other) & set(groups)
    assert cutting.other_set([(0, 1, 2)], (0, 1, 2), 5) is None


def test_the_script_writes_means_over_sets_and_keeps_the_other_table(bench, encoder, tmp_path, monkeypatch):
    output = tmp_path / "cutting_stripes.json"
    cutting.compact.write(
        output,
        {"latency": [{"method": "fisher", "kind": "pairs", "retention": 0.5, "batch": 8, "ms": 7.25, "seconds": 3.0}]},
    )
    options = "--methods fisher --sets pairs --retention .5 --samples 12".split()  # noqa: SIM905
    options += ["--model", encoder, "--source", encoder, "--output", str(output)]
    monkeypatch.setattr("sys.argv", ["cutting.py", "clinc150", *options])
    cutting.main()
    stored = cutting.compact.load(output)
    (row,) = stored["modules"]
    rows = [json.loads(line) for line in output.with_suffix(".work.jsonl").read_text().splitlines()]
    assert row["sets"] == len(rows) == 3
    assert row["module"] == pytest.approx(sum(each["module"] for each in rows) / 3, abs=1e-3)
    losses = [100 * (each["restricted"] - each["module"]) for each in rows]
    assert row["worst_loss"] == pytest.approx(max(losses), rel=1e-3, abs=1e-3)
    assert stored["latency"][0]["ms"] == 7.25
    table = benchmark_script("readme_tables").cutting_page(stored)
    assert f"| {row['module']:.3f} |" in table
    assert "| ms, batch 8 |" in table
    assert "| 7.2 |" in table
    assert f"{row['bytes'] / 1e6:.1f} |" in table


@pytest.mark.parametrize(("widths", "is_same"), [((8, 8), True), ((8, 6), False)])
def test_a_control_gets_the_head_if_it_reads_as_many_neurons(widths, is_same):
    models = [torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.Linear(width, 2)) for width in widths]
    found = cutting.with_head(models[0], models[1], ["1"])
    assert (found is not None) == is_same
    if found is not None:
        assert torch.equal(found[1].weight, models[1][1].weight)
        assert torch.equal(found[0].weight, models[0][0].weight)


def test_parts_and_widths_are_measured_and_a_run_goes_on(tmp_path, monkeypatch):
    script = benchmark_script("depth_and_width")
    folder, output = tmp_path / "source-0", tmp_path / "found.json"
    names = {"id2label": {place: str(place) for place in range(10)}, "label2id": {str(p): p for p in range(10)}}
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    config = ViTConfig(**sizes, **names, num_attention_heads=2)
    ViTForImageClassification(config).save_pretrained(folder)
    words = [
        "digits",
        "--source",
        str(tmp_path / "source-{seed}"),
        "--sets",
        "pairs",
        "--limit",
        "2",
        "--samples",
        "16",
    ]
    words += ["--retention", "0.5", "--ways", "neurons", "width 1/2", "--output", str(output)]
    monkeypatch.setattr("sys.argv", ["depth_and_width.py", *words])
    script.main()
    rows = [json.loads(line) for line in output.with_suffix(".work.jsonl").read_text().splitlines()]
    stored = script.compact.load(output)["modules"]
    assert [row["way"] for row in stored] == ["neurons", "width 1/2"]
    assert stored[1]["bytes"] < stored[0]["bytes"]
    for row in stored:
        own = [each for each in rows if each["way"] == row["way"]]
        assert len(own) == row["rows"] == 2
        assert row["module"] == pytest.approx(sum(each["module"] for each in own) / 2, abs=1e-3)
    monkeypatch.setattr(script, "measure", None)  # all rows are there
    script.main()
