"""Repositories on a Hub: what a push leaves there loads, says what it is, and can be repeated."""

import io
import json
import re
import struct

import pytest
import torch
import yaml
from conftest import LABELS, fresh, image_samples, randomize_relevance
from hub_server import hub as hub
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoModelForImageClassification, TrainingArguments, pipeline
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from nemo_hf import NeMoTrainer, evaluate_module, make_parent
from nemo_hf.cli.main import main
from nemo_hf.hub.collections import module_repositories, push_modules, repository_name
from nemo_hf.hub.provenance import safe_command, training_record
from nemo_hf.hub.publish import CardOptions
from nemo_hf.models.remote_files import hub_name

RECORD = {"arguments": {"seed": 1}, "processes": 1, "samples": 5, "base_model": None, "versions": {"torch": "9.9"}}
PROCESSOR = ViTImageProcessorPil(size={"height": 16, "width": 16})


@pytest.fixture
def parent(vit):
    parent = make_parent(vit)
    randomize_relevance(parent)
    parent.attach_processor(PROCESSOR)
    return parent


def batches(count=20):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % len(LABELS)
    return [{"pixel_values": torch.randn(count, 3, 16, 16, generator=generator), "labels": labels}]


def stored_parameters(content: bytes) -> tuple[int, int]:
    """Number of parameters of the plain model and of the generators, from a file's header alone."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    counts = [0, 0]
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"].startswith(("F", "BF")):
            counts["generator" in name] += torch.Size(entry["shape"]).numel()
    return counts[0], counts[1]


def card_of(hub, repo):
    text = hub.files(repo)["README.md"].decode()
    return text, yaml.safe_load(text.split("---\n")[1])


def numbers(text):
    return {int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", text)}


def test_a_module_arrives_whole(hub, parent):
    module = parent.extract_module(["dog", "cat"])
    address = module.push_to_hub("me/dog-cat", parent="me/parent", license="mit", datasets=["org/animals"])
    assert "me/dog-cat" in address
    found = hub.files("me/dog-cat")
    wanted = {"README.md", "config.json", "model.safetensors", "neurons.png", "preprocessor_config.json"}
    assert set(found) - {".gitattributes"} == wanted
    text, metadata = card_of(hub, "me/dog-cat")
    assert metadata["base_model"] == "me/parent"
    assert metadata["library_name"] == "nemo-hf"
    assert stored_parameters(found["model.safetensors"])[0] in numbers(text)
    from PIL import Image

    with Image.open(io.BytesIO(found["neurons.png"])) as picture:
        assert min(picture.size) > 300
    loaded = AutoModelForImageClassification.from_pretrained("me/dog-cat")
    inputs = batches()[0]["pixel_values"]
    with torch.no_grad():
        assert torch.equal(loaded(inputs).logits, module.eval()(inputs).logits)


def test_a_parent_arrives_whole_and_knows_its_module(hub, parent):
    parent.push_to_hub("me/parent")
    text, metadata = card_of(hub, "me/parent")
    plain, generators = stored_parameters(hub.files("me/parent")["model.safetensors"])
    assert {plain, generators} <= numbers(text)
    assert "parent" in metadata["tags"]
    module = AutoModelForImageClassification.from_pretrained("me/parent", labels=["car", "frog"])
    assert module.config.parent == "me/parent"
    local = parent.extract_module(["car", "frog"])
    for name, tensor in local.state_dict().items():
        assert torch.equal(tensor, module.state_dict()[name]), name
    module.push_to_hub("me/car-frog")
    assert card_of(hub, "me/car-frog")[1]["base_model"] == "me/parent"


def test_the_snippet_of_a_card_runs(hub, parent, tmp_path, monkeypatch, capsys):
    from PIL import Image

    parent.push_to_hub("me/parent")
    parent.extract_module(["ship"]).push_to_hub("me/ship")
    Image.new("RGB", (20, 30)).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    for repo in ("me/parent", "me/ship"):
        for code in re.findall(r"```python\n(import nemo_hf.*?)```", card_of(hub, repo)[0], re.DOTALL):
            exec(code, {})
    assert "'label': 'ship'" in capsys.readouterr().out


def test_pushing_twice_changes_nothing(hub, parent):
    module = parent.extract_module(["dog", "cat"])
    for model, repo in ((module, "me/m"), (parent, "me/p")):
        model.push_to_hub(repo)
        before = hub.files(repo), len(hub.commits(repo))
        model.push_to_hub(repo)
        assert (hub.files(repo), len(hub.commits(repo))) == before


def test_what_the_owner_wrote_stays_and_old_files_go(hub, parent):
    parent.push_to_hub("me/p", max_shard_size="20KB")
    assert "model.safetensors.index.json" in hub.files("me/p")
    card = hub.files("me/p")["README.md"] + b"\nMine: \xc3\xa9.\n"
    HfApi().upload_file(repo_id="me/p", path_in_repo="README.md", path_or_fileobj=card)
    HfApi().upload_file(repo_id="me/p", path_in_repo="notes.txt", path_or_fileobj=b"mine")
    parent.push_to_hub("me/p", license="mit")
    files = hub.files("me/p")
    assert [name for name in files if name.startswith("model")] == ["model.safetensors"]
    assert files["notes.txt"] == b"mine"
    text, metadata = card_of(hub, "me/p")
    assert metadata["license"] == "mit"
    assert text.endswith("\nMine: é.\n")
    assert text.count("Mine") == 1


def test_text_of_the_owner_is_not_lost_when_it_cannot_be_read(hub, parent):
    parent.push_to_hub("me/p")
    card = hub.files("me/p")["README.md"] + b"\nMine.\n"
    HfApi().upload_file(repo_id="me/p", path_in_repo="README.md", path_or_fileobj=card)
    hub.misbehave(method="GET", path="README.md", kind="status", times=None)
    with pytest.raises(OSError):  # noqa: PT011 - the client's own, of several kinds
        parent.push_to_hub("me/p", license="mit")
    assert hub.files("me/p")["README.md"] == card


def test_a_card_of_another_kind_is_not_thrown_away(hub, parent, tmp_path):
    HfApi().create_repo("me/p")
    HfApi().upload_file(
        repo_id="me/p", path_in_repo="README.md", path_or_fileobj=b"---\nlicense: mit\n---\n# Hand written\n"
    )
    for _ in range(2):
        parent.push_to_hub("me/p")
        text, metadata = card_of(hub, "me/p")
        assert text.count("# Hand written") == 1
        assert metadata["license"] == "mit"
    parent.save_pretrained(tmp_path / "p")
    (tmp_path / "p" / "README.md").write_text(text + "\nMine.\n")
    assert main(["push", str(tmp_path / "p"), "--repo_id", "me/p", "--dry-run"]) == 0
    assert "Mine." in (tmp_path / "p" / "README.md").read_text()


def test_a_module_that_was_trained_further_claims_no_law(hub, parent):
    module = parent.extract_module(["dog", "cat"])
    module.train()
    module.push_to_hub("me/m")
    text = card_of(hub, "me/m")[0]
    assert "verified" not in text
    assert "trained further" in text
    assert AutoModelForImageClassification.from_pretrained("me/m").config.is_tuned


def test_a_branch_is_made_when_it_is_missing_and_nothing_before_all_is_written(hub, parent):
    parent.push_to_hub("me/p", revision="next")
    assert "config.json" in hub.files("me/p", "next")
    with pytest.raises(ValueError, match="parent"):
        parent.push_to_hub("me/q", with_code=True)
    assert not HfApi().repo_exists("me/q")


def test_a_module_is_credited_to_the_data_that_measured_it(hub, parent):
    parent.config.training = {**RECORD, "datasets": ["org/train"]}
    module = parent.extract_module(["dog", "cat"])
    evaluate_module(parent, ["dog", "cat"], batches(), module, show_progress=False)
    module.push_to_hub("me/m")
    metadata = card_of(hub, "me/m")[1]
    assert metadata["datasets"] == ["org/train"]
    assert "model-index" not in metadata
    module.push_to_hub("me/m", datasets=["org/test"])
    assert card_of(hub, "me/m")[1]["model-index"][0]["results"][0]["dataset"]["type"] == "org/test"


def test_a_repository_is_private_and_on_a_branch_when_asked(hub, parent):
    module = parent.extract_module(["dog", "cat"])
    module.push_to_hub("me/m", private=True)
    parent.extract_module(["dog", "car"]).push_to_hub("me/m", revision="next")
    assert HfApi().model_info("me/m").private
    names = [AutoModelForImageClassification.from_pretrained("me/m", revision=r).config.names for r in ("main", "next")]
    assert names == [{0: "dog", 1: "cat"}, {0: "dog", 1: "car"}]


def test_save_pretrained_pushes_the_same(hub, parent, tmp_path):
    module = parent.extract_module(["dog", "cat"])
    options = {"private": True, "commit_message": "First", "license": "mit"}
    module.save_pretrained(tmp_path / "m", push_to_hub=True, repo_id="me/m", **options)
    assert HfApi().model_info("me/m").private
    assert hub.commits("me/m")[-1].title == "First" or hub.commits("me/m")[0].title == "First"
    assert card_of(hub, "me/m")[1]["license"] == "mit"
    assert card_of(hub, "me/m")[1]["library_name"] == "nemo-hf"
    assert hub.files("me/m")["model.safetensors"] == (tmp_path / "m" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "rule",
    [
        {"method": "PUT", "kind": "status", "status": 500},
        {"method": "POST", "path": "/commit/", "kind": "status", "status": 500},
        {"method": "POST", "path": "/commit/", "kind": "cut"},
        {"method": "POST", "path": "/preupload/", "kind": "status", "status": 401},
    ],
)
def test_a_push_that_dies_leaves_what_was_there_and_can_be_repeated(hub, parent, rule):
    module = parent.extract_module(["dog", "cat"])
    module.push_to_hub("me/m")
    before = hub.files("me/m")
    other = parent.extract_module(["car", "cat"])
    broken = hub.misbehave(**rule, times=None)
    with pytest.raises((HfHubHTTPError, OSError)):
        other.push_to_hub("me/m")
    hub.rules.remove(broken)
    assert hub.files("me/m") == before or rule["kind"] == "cut"
    other.push_to_hub("me/m")
    loaded = AutoModelForImageClassification.from_pretrained("me/m")
    assert loaded.config.names == {0: "car", 1: "cat"}


def test_a_collection_ties_a_parent_and_its_modules(hub, parent):
    modules = {"cat": ["cat"], "cat+dog": ["cat", "dog"]}
    pushed = push_modules(
        parent,
        modules,
        "me",
        "animals",
        batches(),
        batches(),
        CardOptions(license="mit"),
        threshold=0.4,
        compares_formats=True,
    )
    assert list(pushed) == ["parent", "cat", "cat+dog", "collection"]
    assert [pushed[name] for name in ("parent", "cat", "cat+dog")] == ["me/animals", "me/cat", "me/cat-dog"]
    (collection,) = HfApi().list_collections(owner="me")
    items = [item.item_id for item in HfApi().get_collection(collection.slug).items]
    assert sorted(items) == ["me/animals", "me/cat", "me/cat-dog"]
    report = json.loads(hub.files("me/cat-dog")["report.json"])
    assert report["samples"] == 8
    assert report["threshold"] == 0.4
    card = card_of(hub, "me/cat-dog")[0]
    assert f"{report['accuracy']:.4f}" in card
    assert set(report["formats"]["latency_ms"]) == {"parent", "module", "plain", "onnx"}
    assert f"{report['formats']['latency_ms']['onnx']['8']:.1f}" in card.split("onnxruntime")[1].splitlines()[0]
    assert card_of(hub, "me/cat-dog")[1]["license"] == "mit"
    from PIL import Image

    answers = pipeline("image-classification", model="me/cat-dog")(Image.new("RGB", (16, 16)))
    assert {answer["label"] for answer in answers} == {"cat", "dog"}


def test_a_collection_that_died_half_way_is_finished_by_the_same_call(hub, parent):
    modules = {"cat": ["cat"], "dog": ["dog"]}
    data = batches()
    broken = hub.misbehave(method="POST", path="me/dog/commit/", kind="status", times=None)
    with pytest.raises(HfHubHTTPError):
        push_modules(parent, modules, "me", "animals", data, private=True)
    hub.rules.remove(broken)
    commits = {repo: len(hub.commits(repo)) for repo in ("me/animals", "me/cat")}
    for _ in range(2):
        push_modules(parent, modules, "me", "animals", data, private=True)
        assert {repo: len(hub.commits(repo)) for repo in commits} == commits
        (collection,) = HfApi().list_collections(owner="me")
        assert len(HfApi().get_collection(collection.slug).items) == 3
        assert collection.private
        assert HfApi().model_info("me/animals").private


def test_the_command_line_pushes_parent_and_modules(hub, parent, tmp_path, capsys):
    parent.save_pretrained(tmp_path / "animals")
    words = ["push", "--parent", str(tmp_path / "animals"), "--modules", "cat", "cat+dog", "--namespace", "me"]
    assert main(words) == 0
    assert "cat+dog: me/cat-dog" in capsys.readouterr().out
    assert "config.json" in hub.files("me/animals")
    assert main(["push", str(tmp_path / "animals"), "--repo_id", "me/again"]) == 0
    assert hub.files("me/again")["model.safetensors"] == hub.files("me/animals")["model.safetensors"]
    assert main(["push", "--parent", str(tmp_path / "animals"), "--modules", "cat"]) == 2
    assert "expected one of the two" in capsys.readouterr().err


def test_names_of_repositories_are_safe_and_differ():
    assert repository_name(["cat", "dog"]) == "cat-dog"
    for labels in (["../../etc"], ["a/b", "c\\d"], ["été"], ["\0"], ["✓"], ["x" * 500], [""], ["--"], ["a.lock"]):
        assert re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?", repository_name(labels)), labels
    assert repository_name(["✓"]) != repository_name(["✗"])
    long = [[f"label {i}" for i in range(40)], [f"label {i}" for i in range(41)]]
    assert repository_name(long[0]) != repository_name(long[1])
    with pytest.raises(ValueError, match="would both be me/a-b"):
        module_repositories("me", "p", {"one": ["a b"], "two": ["a-b"]})


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_trainers_pushes_are_loadable_parents_without_pickles_of_arguments(hub, tmp_path, strategy):
    arguments = TrainingArguments(
        str(tmp_path / "out"), push_to_hub=True, hub_model_id="me/p", hub_strategy=strategy, hub_token="hf_me",
        save_steps=2, max_steps=4, report_to=[], use_cpu=True, per_device_train_batch_size=10, hub_always_push=True,
    )  # fmt: skip
    data = image_samples()
    trainer = NeMoTrainer(fresh("vit"), arguments, train_dataset=data, eval_dataset=data, processing_class=PROCESSOR)
    trainer.train()
    trainer.push_to_hub(license="mit", dataset_tags="org/animals")
    files = hub.files("me/p")
    assert not [name for name in files if name.endswith("training_args.bin")]
    folders = {name.split("/")[0] for name in files if "/" in name}
    expected = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-2", "checkpoint-4"}}
    assert folders == expected.get(strategy, set())
    text, metadata = card_of(hub, "me/p")
    assert metadata["library_name"] == "nemo-hf"
    assert metadata["license"] == "mit"
    assert metadata["datasets"] == ["org/animals"]
    assert stored_parameters(files["model.safetensors"])[0] in numbers(text)
    for content in files.values():
        assert b"hf_me" not in content
    assert "report.json" not in files
    loaded = AutoModelForImageClassification.from_pretrained("me/p")
    assert loaded.is_parent
    for name, tensor in trainer.parent.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert loaded.config.training["arguments"]["seed"] == 42


def test_no_token_is_recorded(hub, tmp_path):
    words = ["nemo-hf", "train", "--hub_token", "secret", "--hub_token=hf_abcdefghij", "--model", "org/m"]
    line = safe_command([*words, "hf_ABCDEFGHIJKL", "--x", "token=abc"])
    for secret in ("secret", "hf_abcdefghij", "hf_ABCDEFGHIJKL"):
        assert secret not in line
    assert "--model org/m" in line
    words = ["--include_tokens_per_second", "--learning_rate", "1e-3", "--include_num_input_tokens_seen", "all"]
    assert safe_command(words) == " ".join(words)
    assert safe_command(["--output_dir", "/home/me/out", "--dataset=/me/data"]) == "--output_dir out --dataset=data"
    # An abbreviation would be kept in clear, so there are none.
    words = ["train", "--model", "x", "--dataset", "y", "--output_dir", str(tmp_path), "--hub_tok", "secret"]
    assert main(words) == 2


def test_a_training_is_recorded_whole(tmp_path):
    given = {"adam_epsilon": 1e-4, "lr_scheduler_type": "cosine", "data_seed": 7, "warmup_steps": 3, "bf16": True}
    args = TrainingArguments(str(tmp_path), **given, save_steps=7, logging_steps=3, hub_token="hf_me", use_cpu=True)
    record = training_record(args, None, 5)
    always = {"num_train_epochs": 3.0, "learning_rate": 5e-5, "per_device_train_batch_size": 8, "seed": 42}
    assert record["arguments"] == {**always, **given}
    assert record == json.loads(json.dumps(record))


def test_only_names_of_the_hub_are_recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    for local in (str(tmp_path), "models/mine", "./x", "/nowhere/x", "a/b/c", "", None):
        assert hub_name(local) is None
    assert hub_name("org/model") == "org/model"


def test_a_trainers_second_push_leaves_no_old_report_and_keeps_the_owners_text(hub, tmp_path):
    arguments = TrainingArguments(
        str(tmp_path / "out"), hub_model_id="me/p", hub_token="hf_me", max_steps=1, report_to=[], use_cpu=True,
        save_strategy="no",
    )  # fmt: skip
    data = image_samples()
    trainer = NeMoTrainer(fresh("vit"), arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    trainer.evaluate()
    trainer.push_to_hub()
    assert "report.json" in hub.files("me/p")
    card = hub.files("me/p")["README.md"] + b"\nMine.\n"
    HfApi().upload_file(repo_id="me/p", path_in_repo="README.md", path_or_fileobj=card)
    trainer.train()
    trainer.push_to_hub()
    assert "report.json" not in hub.files("me/p")
    assert card_of(hub, "me/p")[0].count("Mine.") == 1


def test_the_best_checkpoints_weights_go_without_the_last_ones_report(tmp_path):
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=2, eval_strategy="steps", eval_steps=1, save_steps=1, report_to=[],
        use_cpu=True, load_best_model_at_end=True,
    )  # fmt: skip
    data = image_samples()
    trainer = NeMoTrainer(fresh("vit"), arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert trainer.parent.report is None
