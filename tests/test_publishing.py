"""Repositories on a Hub: what a push leaves there loads, says what it is, and can be repeated."""

import functools
import io
import json
import re

import pytest
import torch
import yaml
from conftest import LABELS, fresh, generated, image_processor, image_samples, parent_of
from hub_server import hub as hub
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from safetensors.torch import load
from saving_helpers import without_drawing
from transformers import AutoModelForImageClassification, TrainingArguments

from nemo_hf import NeMoTrainer, compose, evaluate_module, make_parent
from nemo_hf.hub.provenance import training_record
from nemo_hf.hub.publish import CardOptions, module_repositories, push_modules, repository_name, settled_report
from nemo_hf.models.privacy import hub_name

FORMATS = {"device": "cpu", "latency_ms": {"module": {"1": 1.0}, "onnx": {"1": 0.5}}}
KINDS = ("parent", "module", "composed")
RECORD = {"arguments": {"seed": 1}, "processes": 1, "samples": 5, "base_model": None, "versions": {"torch": "9.9"}}


@pytest.fixture(autouse=True)
def quick_pictures(request, monkeypatch):
    """One test draws."""
    if "arrives_whole" not in request.node.name:
        without_drawing(monkeypatch)


@pytest.fixture
def parent():
    parent = parent_of("vit", relevance_threshold=0.5)
    parent.attach_processor(image_processor())
    return parent


@pytest.fixture
def built(parent):
    """Makes one of the three kinds of models; cutting is not always needed."""

    def build(kind):
        if kind == "parent":
            return parent
        if kind == "module":
            return parent.extract_module(["dog", "cat"])
        return compose([parent.extract_module(["dog", "cat"]), parent.extract_module(["ship"])], ["cat", "ship", "dog"])

    return functools.cache(build)


@functools.cache
def batches(count=20):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % len(LABELS)
    return [{"pixel_values": torch.randn(count, 3, 16, 16, generator=generator), "labels": labels}]


def card_of(hub, repo):
    text = hub.files(repo)["README.md"].decode()
    return text, yaml.safe_load(text.split("---\n")[1])


def add_to_card(hub, repo):
    """What an owner writes below the last line."""
    content = hub.files(repo)["README.md"] + "\nMine: é.\n".encode()
    HfApi().upload_file(repo_id=repo, path_in_repo="README.md", path_or_fileobj=content)


def trainer_for(tmp_path, max_steps=1, **options):
    options |= {"report_to": [], "use_cpu": True, "hub_token": "hf_me", "hub_model_id": "me/p", "max_steps": max_steps}
    args = TrainingArguments(str(tmp_path / "out"), per_device_train_batch_size=10, **options)
    data = image_samples(20)
    return NeMoTrainer(fresh("vit"), args, train_dataset=data, eval_dataset=data, processing_class=image_processor())


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_arrives_whole_and_its_snippet_runs(hub, built, kind, tmp_path, monkeypatch, capsys):
    model = built(kind)
    assert "me/x" in model.push_to_hub("me/x", license="mit", datasets=["org/animals"], tags=["small"])
    assert len(hub.commits("me/x")) == 2  # the first makes the repository
    files = hub.files("me/x")
    picture = {"neurons.png"} if kind != "composed" else set()
    always = {".gitattributes", "README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    assert set(files) == always | picture
    text, metadata = card_of(hub, "me/x")
    assert {metadata["library_name"], metadata["license"], *metadata["datasets"]} == {"nemo-hf", "mit", "org/animals"}
    assert metadata["tags"] == ["nemo-hf", kind, "small"]
    tensors = load(files["model.safetensors"]).items()
    sizes = {name: tensor.numel() for name, tensor in tensors if tensor.is_floating_point()}
    generators = sum(size for name, size in sizes.items() if "generator" in name)
    assert f"| {sum(sizes.values()) - generators:,} " in text
    assert (kind == "parent") == (f" {generators:,} of mask generators" in text)
    for content in [files[name] for name in picture]:
        with Image.open(io.BytesIO(content)) as opened:
            assert min(opened.size) > 300
    loaded = AutoModelForImageClassification.from_pretrained("me/x")
    with torch.no_grad():
        logits = [each(batches()[0]["pixel_values"]).logits for each in (loaded, model.eval())]
    assert torch.equal(*logits)
    Image.new("RGB", (20, 30)).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(import nemo_hf.*?)```", text, re.DOTALL)[1], {})
    assert "'label': 'dog'" in capsys.readouterr().out


def test_the_card_of_a_composed_model_says_what_it_was_joined_from(hub, parent):
    parent.push_to_hub("me/parent")
    first = AutoModelForImageClassification.from_pretrained("me/parent", labels=["car", "frog"])
    composed = compose([first, make_parent(fresh("deit"), generated()).extract_module(["cat"])])
    composed.config.scales, composed.config.biases = [1.5, 0.75], [0.25, -2.0]
    composed.push_to_hub("me/joined")
    text, metadata = card_of(hub, "me/joined")
    assert metadata["base_model"] == ["me/parent"]
    own = f" {first.model.num_parameters():,} "
    for row, values in (
        ("| car, frog", ("me/parent", "`ViTFor", own, "| 1.5 | 0.25 |")),
        ("| cat ", ("not known", "`DeiTFor", "100.0%", "| 0.75 | -2 |")),
    ):
        (line,) = (line for line in text.splitlines() if line.startswith(row))
        assert [value for value in values if value not in line] == []
    assert "fitted on validation data" in text


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_push_changes_nothing_and_keeps_what_the_owner_wrote(hub, built, kind):
    model = built(kind)
    HfApi().create_repo("me/x")
    own = {"README.md": b"---\nlicense: mit\n---\n# Hand written\n", "notes.txt": b"mine", "report.json": b"{}"}
    for name, content in own.items():
        HfApi().upload_file(repo_id="me/x", path_in_repo=name, path_or_fileobj=content)
    model.push_to_hub("me/x", max_shard_size="20KB")
    assert "model.safetensors.index.json" in hub.files("me/x")
    add_to_card(hub, "me/x")
    model.push_to_hub("me/x", commit_message="Again", commit_description="Whole", create_pr=False)
    files, commits = hub.files("me/x"), hub.commits("me/x")
    assert (commits[0].title, commits[0].message) == ("Again", "Whole")
    assert [name for name in files if name.startswith(("model", "report"))] == ["model.safetensors"]
    assert files["notes.txt"] == b"mine"
    text, metadata = card_of(hub, "me/x")
    assert metadata["license"] == "mit"
    assert text.endswith("\n# Hand written\n\nMine: é.\n")
    assert (text.count("# Hand written"), text.count("Mine")) == (1, 1)
    model.push_to_hub("me/x")
    model.push_to_hub("me/x", revision="next", license="bsd")  # on a branch, which this makes
    assert hub.commits("me/x") == commits
    assert b"license: bsd" in hub.files("me/x", "next")["README.md"]


def test_a_card_follows_measurements_and_further_training(hub, parent):
    parent.config.training = {**RECORD, "datasets": ["org/train"]}
    module = parent.extract_module(["dog", "cat"])
    evaluate_module(parent, ["dog", "cat"], batches(), module, show_progress=False)
    module.push_to_hub("me/m")
    metadata = card_of(hub, "me/m")[1]
    assert metadata["datasets"] == ["org/train"]
    assert "model-index" not in metadata
    module.push_to_hub("me/m", datasets=["org/test"])
    assert card_of(hub, "me/m")[1]["model-index"][0]["results"][0]["dataset"]["type"] == "org/test"
    with torch.no_grad():
        module.model.classifier.bias.add_(0.1)
    module.push_to_hub("me/m")
    text = card_of(hub, "me/m")[0]
    assert "trained further" in text
    assert "verified" not in text
    assert "report.json" not in hub.files("me/m")
    assert AutoModelForImageClassification.from_pretrained("me/m").config.is_tuned
    compose([module, parent.extract_module(["ship"])]).push_to_hub("me/c")
    assert "trained further" in card_of(hub, "me/c")[0]


@pytest.mark.parametrize("kind", ["parent", "composed"])
def test_save_pretrained_pushes_the_same_from_the_main_process_only(hub, built, kind, tmp_path):
    options = {"private": True, "commit_message": "First", "license": "mit", "token": "hf_me", "repo_id": "me/m"}
    built(kind).save_pretrained(tmp_path / "m", push_to_hub=True, is_main_process=False, **options)
    assert not (tmp_path / "m").exists()
    assert hub.log == []
    built(kind).save_pretrained(tmp_path / "m", push_to_hub=True, **options)
    assert HfApi().model_info("me/m").private
    assert hub.commits("me/m")[0].title == "First"
    assert card_of(hub, "me/m")[1].items() >= {"license": "mit", "library_name": "nemo-hf"}.items()
    assert hub.files("me/m")["model.safetensors"] == (tmp_path / "m" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "rule",
    [
        {"method": "GET", "path": "README.md", "kind": "status"},  # or text of the owner would be lost
        {"method": "PUT", "kind": "status"},
        {"method": "POST", "path": "/commit/", "kind": "cut"},
        {"method": "POST", "path": "/preupload/", "kind": "status", "status": 401},
    ],
)
def test_a_push_that_fails_leaves_what_was_there_and_can_be_repeated(hub, parent, rule):
    parent.extract_module(["dog", "cat"]).push_to_hub("me/m")
    before = hub.files("me/m")
    other = parent.extract_module(["car", "cat"])
    broken = hub.misbehave(**rule, times=None)
    with pytest.raises((HfHubHTTPError, OSError)):
        other.push_to_hub("me/m")
    hub.rules.remove(broken)
    assert hub.files("me/m") == before or rule["kind"] == "cut"
    other.push_to_hub("me/m")
    assert AutoModelForImageClassification.from_pretrained("me/m").config.names == {0: "car", 1: "cat"}


def test_an_error_before_the_upload_is_not_blamed_on_the_connection(hub, parent, monkeypatch):
    def save_pretrained(*args, **kwargs):
        raise RuntimeError("tensors that share memory")

    monkeypatch.setattr(parent, "save_pretrained", save_pretrained)
    with pytest.raises(RuntimeError, match="tensors that share memory"):
        parent.push_to_hub("me/animals")
    assert hub.repos == {}


def test_a_report_that_differs_in_times_only_stays_as_it_was_pushed(parent):
    report = evaluate_module(parent, ["dog", "cat"], batches(), show_progress=False).to_dict()
    slower = {**report, "latency_ms": {"1": 1e6}}
    assert settled_report(slower, json.dumps(report)) == report
    changed = (json.dumps({**report, "accuracy": 0.123}), json.dumps({**report, "formats": None}))
    for text in (*changed, None, "", "{", "[]"):
        assert settled_report(report, text) is report


def test_a_collection_ties_a_parent_and_its_modules(hub, parent, monkeypatch):
    modules, options = {"cat": ["cat"], "cat+dog": ["cat", "dog"]}, CardOptions(license="mit")
    hub.misbehave(method="POST", path="me/cat-dog/commit/", kind="status")
    monkeypatch.setattr("nemo_hf.hub.publish.compare_latency", lambda module, parent: FORMATS)
    given = ("me", "animals", batches(), batches(), options, 0.4, None, True)
    push = functools.partial(push_modules, parent, modules, *given)
    with pytest.raises(HfHubHTTPError):
        push(private=True)
    commits = {repo: len(hub.commits(repo)) for repo in ("me/animals", "me/cat")}
    pushed = push(private=True)  # the same call finishes what the first left undone, and does nothing twice
    assert {repo: len(hub.commits(repo)) for repo in commits} == commits
    assert list(pushed.items())[:3] == [("parent", "me/animals"), ("cat", "me/cat"), ("cat+dog", "me/cat-dog")]
    (collection,) = HfApi().list_collections(owner="me")
    items = [item.item_id for item in HfApi().get_collection(collection.slug).items]
    assert sorted(items) == ["me/animals", "me/cat", "me/cat-dog"]
    assert (collection.url, collection.private) == (pushed["collection"], True)
    assert HfApi().model_info("me/cat-dog").private
    report = json.loads(hub.files("me/cat-dog")["report.json"])
    assert (report["samples"], report["threshold"]) == (8, 0.4)
    card, metadata = card_of(hub, "me/cat-dog")
    assert f"{report['accuracy']:.4f}" in card
    assert "onnxruntime" in card
    assert (metadata["license"], metadata["base_model"]) == ("mit", "me/animals")


def test_names_of_repositories_are_safe_and_differ():
    assert repository_name(["cat", "dog"]) == "cat-dog"
    for labels in (["../../etc"], ["a/b", "c\\d"], ["été"], ["\0"], ["✓"], ["x" * 500], [""], ["--"], ["a.lock"]):
        assert re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?", repository_name(labels)), labels
    assert repository_name(["✓"]) != repository_name(["✗"])
    long = [f"label {i}" for i in range(41)]
    assert repository_name(long) != repository_name(long[:40])
    for modules in ({"one": ["a b"], "two": ["a-b"]}, {"one": ["p"]}):
        with pytest.raises(ValueError, match="would both be me/"):
            module_repositories("me", "p", modules)


@pytest.mark.parametrize("strategy", [pytest.param("end", marks=pytest.mark.sweep), "checkpoint", "all_checkpoints"])
def test_trainers_pushes_are_loadable_parents_without_pickles_of_arguments(hub, tmp_path, strategy):
    options = {"push_to_hub": True, "hub_strategy": strategy, "save_steps": 1, "hub_always_push": True}
    trainer = trainer_for(tmp_path, 2, **options)
    trainer.train()
    trainer.push_to_hub()
    add_to_card(hub, "me/p")
    trainer.push_to_hub(license="mit", dataset_tags="org/animals")
    files = hub.files("me/p")
    assert not [name for name in files if name.endswith("training_args.bin")]
    folders = {name.split("/")[0] for name in files if "/" in name}
    expected = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-1", "checkpoint-2"}}
    assert folders == expected.get(strategy, set())
    text, metadata = card_of(hub, "me/p")
    assert text.count("Mine") == 1
    assert (metadata["library_name"], metadata["license"], metadata["datasets"]) == ("nemo-hf", "mit", ["org/animals"])
    assert not [name for name, content in files.items() if b"hf_me" in content]
    assert "report.json" not in files
    loaded = AutoModelForImageClassification.from_pretrained("me/p")
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in trainer.parent.state_dict().items())
    assert loaded.config.training["arguments"]["seed"] == 42


def test_only_names_that_are_no_directories_are_repositories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert [hub_name(name) for name in (str(tmp_path), "models/mine", "./x", "/no/x", "a/b/c", "", None)] == [None] * 7
    assert hub_name("org/model") == "org/model"


def test_a_training_is_recorded_whole(tmp_path):
    given = {"adam_epsilon": 1e-4, "lr_scheduler_type": "cosine", "data_seed": 7, "warmup_steps": 3, "bf16": True}
    args = TrainingArguments(str(tmp_path), **given, save_steps=7, logging_steps=3, hub_token="hf_me", use_cpu=True)
    record = training_record(args, None, 5)
    always = {"num_train_epochs": 3.0, "learning_rate": 5e-5, "per_device_train_batch_size": 8, "seed": 42}
    assert record["arguments"] == {**always, **given}
    assert record == json.loads(json.dumps(record))
