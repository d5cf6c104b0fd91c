"""The case study of repaired labels: its data, its ways, and a whole run on tiny models."""

import copy
from functools import partial

import pytest
import torch
from conftest import LABELS, benchmark_script, example_script, fresh, image_samples, randomize
from sklearn.metrics import precision_score, recall_score
from torch.utils.data import default_collate

import nemo_hf

tasks, sources = benchmark_script("tasks"), benchmark_script("image_sources")
repair = example_script("case_studies", "repair")
GROUPS = {"cat": [0], "vehicles": [2, 3], "dog": [1], "frog": [4]}


@pytest.fixture(scope="module")
def parts():
    """Training, validation and test images with labels in no order."""
    found = []
    for seed, count in enumerate((60, 40, 50)):
        batch = default_collate(image_samples(count, seed))
        labels = batch["labels"][torch.randperm(count, generator=torch.Generator().manual_seed(seed))]
        found.append(tasks.Split({"pixel_values": batch["pixel_values"]}, labels))
    return found


@pytest.fixture(scope="module")
def task(parts):
    trainer = partial(tasks.build_trainer, lambda: fresh("vit"), {"per_device_train_batch_size": 20})
    known = {"plain": None}
    return tasks.Task("stripes", lambda seed: parts, trainer, 1, {}, 20, 1e-3, GROUPS, methods=known)


@pytest.fixture
def own(task, parts):
    """A repair of two labels, whose weak and strong models are random."""
    strong = randomize(fresh("vit"), seed=1)
    return repair.Repair(task, fresh("vit"), strong, [2, 3], parts[0], *repair.halves(parts[1], 0), 0)


def test_figures_of_labels_are_those_of_sklearn():
    answers, right = torch.randint(0, 5, (2, 200), generator=torch.Generator().manual_seed(0))
    found = repair.of_labels(answers, right, [3])
    assert found["precision"] == pytest.approx(precision_score(right == 3, answers == 3))
    assert found["recall"] == pytest.approx(recall_score(right == 3, answers == 3))
    assert found["accuracy"] == pytest.approx((answers == right).float().mean().item())
    several = repair.of_labels(answers, right, [1, 3])
    pairs = list(zip(answers.tolist(), right.tolist(), strict=True))
    hits = sum(answer == label for answer, label in pairs if label in (1, 3))
    assert several["recall"] == pytest.approx(hits / sum(label in (1, 3) for _, label in pairs))
    assert several["precision"] == pytest.approx(hits / sum(answer in (1, 3) for answer, _ in pairs))
    others = [answer == label for answer, label in pairs if label not in (1, 3)]
    assert several["others"] == pytest.approx(sum(others) / len(others))


def test_scarce_labels_keep_few_samples_and_others_all(parts):
    whole = parts[0]
    found = [repair.scarce(whole, [2, 3], 2, seed) for seed in (0, 0, 1)]
    before, after = (each.labels.bincount(minlength=5).tolist() for each in (whole, found[0]))
    assert after == [2 if label in (2, 3) else count for label, count in enumerate(before)]
    assert torch.equal(found[0].inputs["pixel_values"], found[1].inputs["pixel_values"])
    assert not torch.equal(found[0].inputs["pixel_values"], found[2].inputs["pixel_values"])


def test_halves_share_no_sample(parts):
    images = [image.numpy().tobytes() for half in repair.halves(parts[1], 3) for image in half.inputs["pixel_values"]]
    assert sorted(images) == sorted(image.numpy().tobytes() for image in parts[1].inputs["pixel_values"])


def test_a_repaired_model_answers_as_its_two_parts(own):
    model = own.repaired(own.strong, 0.5, "all")
    module = own.module(own.strong, "all", 0.5)
    config = model.config
    assert list(config.id2label.values()) == LABELS
    with torch.no_grad():
        inputs = {"pixel_values": own.choice.inputs["pixel_values"]}
        found, weak = model(**inputs).logits, own.weak(**inputs).logits
        for scale, bias, logits, labels in zip(
            config.scales,
            config.biases,
            (weak[:, [0, 1, 4]], module(**inputs).logits),
            ([0, 1, 4], [2, 3]),
            strict=True,
        ):
            torch.testing.assert_close(found[:, labels], logits * scale + bias, atol=1e-4, rtol=1e-4)


def test_samples_of_a_cut_are_of_its_labels_or_of_all(own, monkeypatch):
    monkeypatch.setattr(repair, "SAMPLES", 10)
    assert set(own.samples("own").labels.tolist()) == {2, 3}
    assert len(own.samples("own")) == 10
    assert set(own.samples("all").labels.tolist()) == set(range(5))
    assert len(own.samples("all")) == 20


def test_the_best_is_chosen_on_its_half_of_the_validation_data(own):
    models = {seed: randomize(fresh("vit"), seed=seed) for seed in range(4)}
    option, model, _ = repair.best(own, list(models), models.get)
    scores = {}
    for seed, each in models.items():
        with torch.no_grad():
            answers = each(pixel_values=own.choice.inputs["pixel_values"]).logits.argmax(-1)
        scores[seed] = (answers == own.choice.labels).float().mean().item()
    assert scores[option] == max(scores.values()) > min(scores.values())
    assert model is models[option]


def test_training_on_leaves_the_weak_model_as_it_is(own):
    before = copy.deepcopy(own.weak.state_dict())
    model = own.trained_on(own.train, 1, 1e-2)
    for name, tensor in own.weak.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not torch.equal(model.classifier.weight, before["classifier.weight"])


def test_a_network_with_channels_can_take_its_own_module_back():
    """Its layers read another number of channels in the module than in the rest."""
    torch.manual_seed(0)
    sizes = {"architecture": "simcnn", "width": 4, "image_size": 16, **tasks.label_names(LABELS)}
    network = sources.PaperCNNForImageClassification(sources.PaperCNNConfig(**sizes)).eval()
    rest = nemo_hf.make_parent(copy.deepcopy(network)).extract_module(["dog", "car", "ship", "frog"])
    pixels = torch.randn(40, 3, 16, 16)
    module = nemo_hf.extract_module(network, ["cat"], [{"pixel_values": pixels}], retention=0.3, show_progress=False)
    joined = nemo_hf.compose([rest, module], LABELS)
    with torch.no_grad():
        found = joined(pixel_values=pixels).logits
        torch.testing.assert_close(found[:, 1:], network(pixels).logits[:, 1:], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found[:, :1], module(pixel_values=pixels).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_whole_run_on_tiny_models(task, parts, tmp_path, monkeypatch):
    plan = repair.Plan(1, {"undertrained": 1, "scarce": 1}, 3, ("cat", "vehicles"))
    monkeypatch.setitem(repair.PLANS, "stripes", plan)
    monkeypatch.setitem(repair.TASKS, "stripes", lambda data, model: task)
    words = ["stripes", "--data", "data", "--keep", tmp_path / "keep", "--output", tmp_path / "found.json"]
    repair.main([*map(str, words), "--train-only"])
    assert not (tmp_path / "found.json").exists()
    repair.main(list(map(str, words)))
    rows = repair.compact.load(tmp_path / "found.json")["repairs"]
    ways = ["weak", "repaired", "repaired, uncut", "own module", "trained on, same samples", "strong",
            "trained on, all data"]  # fmt: skip
    runs = repair.compact.grouped(rows, "weakness", "labels")
    assert list(runs) == [
        ("undertrained", "cat"),
        ("undertrained", "vehicles"),
        ("scarce", "cat"),
        ("scarce", "vehicles"),
    ]
    assert [[row["model"] for row in own] for own in runs.values()] == [ways] * 4
    weak = repair.trained(task, "stripes-undertrained", "plain", 0, 1, tmp_path / "keep")[0]
    with torch.no_grad():
        answers = weak(pixel_values=parts[2].inputs["pixel_values"]).logits.argmax(-1)
    expected = repair.of_labels(answers, parts[2].labels, [2, 3])
    stored = runs["undertrained", "vehicles"][0]
    assert {name: stored[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    assert (
        "3 samples of each label of cat" in (tmp_path / "keep" / "stripes-cat-scarce-plain-0/training.json").read_text()
    )
