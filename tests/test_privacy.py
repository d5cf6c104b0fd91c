"""Nothing of the machine that trains, saves and pushes gets into what is written: no paths, no tokens, no names."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import build, generated, image_processor, image_samples, tokenizer
from hub_server import hub as hub
from hypothesis import given, settings
from hypothesis import strategies as st
from saving_helpers import contents, without_drawing, without_tracing
from transformers import AutoModelForImageClassification, AutoTokenizer, TrainingArguments

from nemo_hf import NeMoForImageClassification, NeMoTrainer, compose, evaluate_module, make_parent
from nemo_hf.cli import main
from nemo_hf.hub.provenance import training_record
from nemo_hf.hub.publish import CardOptions, write_companions
from nemo_hf.models.privacy import clean, clean_command, clean_text, hub_name

MARKER = "private-marker"
TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"


def found(files: dict[str, bytes], words: list[str]) -> list[tuple[str, str]]:
    """Names of files with some of the words in their names or contents."""
    return [(name, word) for name, data in files.items() for word in words if word.encode() in data or word in name]


@pytest.fixture
def private(tmp_path, monkeypatch) -> Path:
    """The current directory, below one whose name is private."""
    directory = tmp_path / MARKER / "work"
    directory.mkdir(parents=True)
    monkeypatch.chdir(directory)
    return directory


WORDS = [MARKER, TOKEN, "hunter2", str(Path.home()) + "/", str(Path(__file__).parents[1])]


def trained(private: Path, **options) -> NeMoTrainer:
    """A trainer of a model loaded from a directory, whose options name paths and secrets."""
    build("vit").save_pretrained(private / "base")
    model = AutoModelForImageClassification.from_pretrained(private / "base")
    model.config.note = str(private / "notes")
    secrets = {"num_cycles": 1, "path": str(private / "x y" / "schedule"), "hub_token": TOKEN, "password": "hunter2"}
    options = {"lr_scheduler_type": "cosine_with_restarts", "use_cpu": True, "max_steps": 2, **options}
    args = TrainingArguments(str(private / "out"), per_device_train_batch_size=10, report_to=[], **options)
    args.lr_scheduler_kwargs = {"num_cycles": 1}
    data = image_samples(20)
    processor = image_processor()
    processor.name_or_path = processor._name_or_path = str(private / "base")
    trainer = NeMoTrainer(model, args, train_dataset=data, eval_dataset=data, processing_class=processor)
    trainer.train()
    args.lr_scheduler_kwargs = secrets
    trainer.parent.config.training = training_record(args, None, 20)
    trainer.evaluate()
    return trainer


def test_nothing_private_is_saved_or_exported(private, monkeypatch):
    without_tracing(monkeypatch)  # test_exporting.py looks into a graph
    trainer = trained(private)
    parent = trainer.parent
    command = ["nemo-hf", "train", "--model", str(private), f"--deepspeed={private}/a b/ds.json", "--hub-token", TOKEN]
    parent.config.training |= {"command": clean_command(command)}
    out = private / "saved"
    parent.save_pretrained(out / "parent", max_shard_size="20KB")
    loaded = NeMoForImageClassification.from_pretrained(str(out / "parent"))
    module = loaded.extract_module(["cat", "dog"])
    batches = [{"pixel_values": torch.randn(10, 3, 16, 16), "labels": torch.arange(10) % 5}]
    evaluate_module(loaded, ["cat", "dog"], batches, module, show_progress=False)
    module.save_pretrained(out / "module")
    module.save_plain(out / "plain")
    module.export_onnx(out / "onnx")
    joined = compose([module, loaded.extract_module(["ship"])])
    joined.save_pretrained(out / "joined")
    write_companions(joined, out / "joined", "me/x", CardOptions(), None)
    for name in ("parent", "module"):
        assert main(["push", str(out / name), "--repo-id", "me/x", "--dry-run"]) == 0
    files = contents(out)
    assert len(files) > 20
    assert found(files, WORDS) == []
    assert "--deepspeed=ds.json" in files["parent/README.md"].decode()
    assert parent.model.name_or_path == str(private / "base")  # in memory it stays
    assert loaded.config.base_model is None
    assert module.config.parent is None


@pytest.mark.parametrize("strategy", ["checkpoint", pytest.param("end", marks=pytest.mark.sweep)])
def test_nothing_private_is_pushed(hub, private, strategy, monkeypatch):
    without_drawing(monkeypatch)
    options = {"push_to_hub": True, "hub_strategy": strategy, "eval_strategy": "steps"}
    options |= {"save_steps": 1, "eval_steps": 1}
    options |= {"hub_always_push": True, "load_best_model_at_end": True, "hub_token": "hf_me", "hub_model_id": "me/p"}
    trainer = trained(private, **options)
    trainer.save_state()
    events = private / "out" / "runs" / "events.out.tfevents.1.machine"
    events.parent.mkdir()
    events.write_bytes(MARKER.encode())
    trainer.push_to_hub()
    trainer.parent.extract_module(["cat", "dog"]).push_to_hub("me/m")
    files = {**hub.files("me/p"), **hub.files("me/m")}
    assert found(files, [*WORDS, "hf_me", "tfevents"]) == []
    states = [name for name in files if name.endswith("trainer_state.json")]
    assert len(states) == (2 if strategy == "checkpoint" else 1)
    own = json.loads((private / "out" / "trainer_state.json").read_text())
    assert own["best_model_checkpoint"].startswith(str(private))  # where the trainer looks for it
    assert not [path for path in private.rglob("*") if path.name.startswith("tmp")]


def test_only_what_came_from_the_hub_is_credited(hub, private, vit, monkeypatch):
    without_drawing(monkeypatch)
    assert [hub_name(name) for name in (str(private), "./x", "/no/x", "a/b/c", "", None)] == [None] * 6
    assert hub_name("org/model") == "org/model"
    make_parent(vit, generated()).push_to_hub("me/parent")
    build("vit").save_pretrained("me/base")
    build("vit").push_to_hub("me/real")
    local = AutoModelForImageClassification.from_pretrained("me/base")
    credited = AutoModelForImageClassification.from_pretrained("me/real")
    parent = make_parent(local, generated())
    parent.save_pretrained("runs/parent")
    by_path = NeMoForImageClassification.from_pretrained("runs/parent")
    cut = {"labels": ["cat", "dog"]}
    modules = [NeMoForImageClassification.from_pretrained("runs/parent", **cut)]
    (private / "away").mkdir()
    Path("me").rename("gone")
    Path("runs").rename("left")
    modules += [by_path.extract_module(["cat"]), parent.extract_module(["cat"])]
    assert [module.config.parent for module in modules] == [None] * 3
    assert make_parent(local.__class__.from_pretrained("gone/base"), generated()).config.base_model is None
    local.name_or_path = local.config.name_or_path = "me/base"
    assert make_parent(parent.detach_masks(), generated()).config.base_model is None  # of a directory that is gone
    parent = make_parent(credited, generated())
    assert parent.config.base_model == "me/real"
    parent.save_pretrained("again")
    assert NeMoForImageClassification.from_pretrained("again").config.base_model == "me/real"
    real = NeMoForImageClassification.from_pretrained("me/parent")
    assert real.extract_module(["cat"]).config.parent == "me/parent"
    assert NeMoForImageClassification.from_pretrained("me/parent", **cut).config.parent == "me/parent"


TEXTS = {
    "/home/me/x": "PATH",
    "~/x/ds.json": "ds.json",
    "see '/tmp/a b/c' and /var/log/x, ok": "see 'PATH' and PATH, ok",
    r"C:\Users\me\f.json": "f.json",
    r"at D:\me and \\server\share\me": "at PATH and PATH",
    "file:///home/me/a": "PATH",
    "PATH=/a/b:/c/d -I/home/me/x": "PATH=PATH:PATH -IPATH",
    f"https://me:{TOKEN}@host/x": "https://TOKEN@host/x",
    f"clone https://{TOKEN}@host/x": "clone https://TOKEN@host/x",
    "https://host/x?token=abc&y=1": "https://host/x?token=TOKEN&y=1",
    "{'hub_token': 'abc'}": "{'hub_token': 'TOKEN'}",
    "export HF_TOKEN=abc; WANDB_API_KEY=x": "export HF_TOKEN=TOKEN; WANDB_API_KEY=TOKEN",
    "run --api-key abc -p 1": "run --api-key TOKEN -p 1",
    "cc -I/opt/x FILE:///a/b": "cc -IPATH PATH",
    "s3://host/x?Signature=abc": "s3://host/x?Signature=TOKEN",
    "eyJhbGciOiJIUzI1.eyJzdWIi.abc": "TOKEN",
}
KEPT = ["https://host/org/x", "a/b/c and/or 1/2/3", "</s> [/INST] <|/x|>", "org/model", "cpu (X, 1 thread)", "gelu"]
KEPT += ["hf_transfer", "tokens: 3", "torch 2.13.0+cpu", "vit.layers.0.mlp:ffn", "a ~ b", "0.5/0.9", "/b/", "//"]


@pytest.mark.parametrize(("text", "expected"), [*TEXTS.items(), *((text, text) for text in KEPT)])
def test_paths_and_tokens_in_texts_are_replaced(text, expected):
    assert clean_text(text) == expected
    assert clean_text(expected) == expected


def test_headers_lose_what_they_carry():
    for text in ("Authorization: Bearer abc.def", "-H 'authorization: Basic YWJj'", '{"Authorization": "Bearer abc"}'):
        assert not re.search("abc|YWJj", clean_text(text))


def test_nested_options_lose_secrets_by_their_names():
    options = {
        "hub_token": "a", "apiKey": "a", "secret": {"x": "a"}, "deep": [{"password": "a", "n": [1, "/a/b"]}],
        "max_tokens": 5, "token_count": 3, "average_tokens_across_devices": True, "pad_token_id": 0, "labels": ["/m/1"],
    }  # fmt: skip
    assert clean(options) == {
        "hub_token": "TOKEN", "apiKey": "TOKEN", "secret": "TOKEN", "deep": [{"password": "TOKEN", "n": [1, "PATH"]}],
        "max_tokens": 5, "token_count": 3, "average_tokens_across_devices": True, "pad_token_id": 0, "labels": ["/m/1"],
    }  # fmt: skip
    config = {"sites": [{"key": "a.key:ffn"}], "mask_token": "[MASK]", "_name_or_path": "x", "sub": {"auto_map": {}}}
    assert clean(config, is_config=True) == {"sites": [{"key": "a.key:ffn"}], "mask_token": "[MASK]", "sub": {}}


def test_keys_that_become_equal_stay_apart():
    assert clean({"/a/b": 1, "/a/c": 2, "/b/": 3}) == {"PATH": 1, "PATH #2": 2, "/b/": 3}


@pytest.mark.parametrize("is_config", [True, False])
def test_json_in_texts_is_cleaned(is_config):
    text = json.dumps({"a": json.dumps([{"hub_token": "x", "b": "/a/b"}])})
    assert clean(text, "note", is_config) == json.dumps({"a": json.dumps([{"hub_token": "TOKEN", "b": "PATH"}])})
    assert clean('{"a":  1}', "note", is_config) == '{"a":  1}'


def test_a_configuration_loses_paths_in_home_directories_only():
    config = {"note": "see /home/me/x", "/home/me/y": 1, "act": "a /b/c", "sep": "/b/", "x": ["/opt/x", "~"]}
    cleaned = {"note": "see PATH", "PATH": 1, "act": "a /b/c", "sep": "/b/", "x": ["PATH", "~"]}
    assert clean(config, is_config=True) == cleaned


COMMANDS = [
    (["--output_dir", "/home/me/out", "--dataset=/me/data"], "--output_dir PATH --dataset=PATH"),
    (["--x=/a b/c", "/me/y.json"], "--x=PATH y.json"),
    (["--d", '{"a": "/home/me/x", "api_key": "k", "n": 3}'], """--d '{"a": "PATH", "api_key": "TOKEN", "n": 3}'"""),
    (["HF_TOKEN=q", "nemo-hf", "--password", "p"], "HF_TOKEN=TOKEN nemo-hf --password TOKEN"),
    (["-H", "Authorization: Bearer qq"], "-H 'Authorization: TOKEN TOKEN'"),
    (
        ["nemo-hf", "train", "--push-to-hub-token", "x", "--hub_token=x", "hf_ABCDEFGHIJKL", "--model", "org/m"],
        "nemo-hf train --push-to-hub-token TOKEN --hub_token=TOKEN TOKEN --model org/m",
    ),
    (
        ["--include_tokens_per_second", "--learning_rate", "1e-3", "--include_num_input_tokens_seen", "all"],
        "--include_tokens_per_second --learning_rate 1e-3 --include_num_input_tokens_seen all",
    ),
    (["--nested", '["/a/b", {"token": "x"}]'], """--nested '["PATH", {"token": "TOKEN"}]'"""),
]  # fmt: skip


@pytest.mark.parametrize(("words", "expected"), COMMANDS)
def test_commands_lose_paths_and_secrets(words, expected):
    assert clean_command(words) == expected


SEGMENT = st.text("abcdefgh", min_size=1, max_size=5)
PLACES = st.lists(SEGMENT, min_size=1, max_size=3).map(lambda parts: "/" + "/".join([MARKER, *parts]))
LEAVES = st.one_of(PLACES, PLACES.map(lambda path: f"x {path!r} y"), st.just(TOKEN), st.integers(), st.just("gelu"))
NESTED = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SEGMENT, inner, max_size=3))


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(NESTED)
def test_no_nesting_hides_a_path_or_a_token(data):
    cleaned = clean(data)
    assert not [word for word in (MARKER, TOKEN) if word in json.dumps(cleaned)]
    assert clean(cleaned) == cleaned


def test_a_tokenizer_that_is_saved_reads_alike(tmp_path, bert):
    """Also where its tokens look like paths and secrets."""
    own = tokenizer()
    special = {"pad_token": "~", "cls_token": "/b/", "sep_token": "//", "mask_token": "/a/c"}
    own.add_special_tokens({**special, "additional_special_tokens": ["/INST", "C:\\x", TOKEN]})
    own.chat_template = "/opt/x C:\\x https://a@b/{{ messages[0].content }}"
    parent = make_parent(bert, generated())
    parent.attach_processor(own)
    parent.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = f"~ /b/ a // /a/c /INST C:\\x {TOKEN} 1/2 and/or"
    assert loaded(text).input_ids == own(text).input_ids
    assert loaded.special_tokens_map == own.special_tokens_map
    messages = [{"role": "user", "content": "a"}]
    templates = [each.apply_chat_template(messages, tokenize=False) for each in (loaded, own)]
    assert templates[0] == templates[1]


def test_a_processor_s_files_lose_the_machine_s_paths(tmp_path, bert):
    own = tokenizer()
    own.init_kwargs |= {"vocab_file": f"/{MARKER}/vocab.txt", "cache": f"/{MARKER}/cache", "hf_token": TOKEN}
    parent = make_parent(bert, generated())
    parent.attach_processor(own)
    parent.save_pretrained(tmp_path)
    assert found(contents(tmp_path), [MARKER, TOKEN]) == []
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["pad_token"] == "[PAD]"
