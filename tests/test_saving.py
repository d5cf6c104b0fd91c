"""A process that dies while it saves leaves the old files or the new ones, and mixtures of saves are refused."""

import errno
import json
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import image_samples, logits_of, parent_of
from hub_server import hub as hub
from killed import operations
from safetensors.torch import load_file, save_file
from saving_helpers import contents, without_drawing, without_tracing
from transformers import AutoConfig, AutoModelForImageClassification, TrainingArguments

from nemo_hf import NeMoForImageClassification, NeMoTrainer, compose
from nemo_hf.hub.publish import CardOptions, write_companions
from nemo_hf.models import atomic_writes
from nemo_hf.models.atomic_writes import replaced_directory, write_text

FULL_DISK = OSError(errno.ENOSPC, "No space left on device")
ENDINGS = pytest.mark.parametrize(
    "error", [None, pytest.param(FULL_DISK, marks=pytest.mark.sweep)], ids=["killed", "full-disk"]
)


def written(directory: Path, files: dict[str, str], stale=("shard-*", "single")) -> None:
    with replaced_directory(directory, stale) as temporary:
        for name, text in files.items():
            (temporary / name).write_text(text)


OLD = {"config.json": "old", "shard-1": "old", "shard-2": "old", "vocab.txt": "old"}
NEW = {"config.json": "new", "single": "new", "vocab.txt": "new"}
MINE = {"notes.md": b"mine", "checkpoint-3/optimizer.pt": b"mine", "checkpoint-3/deep/state.json": b"mine"}


@pytest.fixture
def saved(tmp_path):
    """An old save with files of the user beside it."""
    written(tmp_path / "out", OLD)
    (tmp_path / "out" / "checkpoint-3" / "deep").mkdir(parents=True)
    for name, content in MINE.items():
        (tmp_path / "out" / name).write_bytes(content)
    return tmp_path / "out"


def own(directory: Path) -> dict[str, str]:
    return {name: content.decode() for name, content in contents(directory).items() if name not in MINE}


@ENDINGS
def test_whoever_stops_a_save_finds_the_old_files_or_the_new_ones(saved, tmp_path, error):
    found = []
    for _ in operations(lambda: written(saved, NEW), tmp_path, error):
        found.append(own(saved))
        assert found[-1] in (OLD, NEW)
        assert {name: content for name, content in contents(saved).items() if name in MINE} == MINE
        written(saved, OLD)
        assert own(saved) == OLD
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert found.count(OLD) > 10
    assert found.count(NEW) > 5


@ENDINGS
@pytest.mark.parametrize(
    "reason", ["no call", *(pytest.param(name, marks=pytest.mark.sweep) for name in ("mount point", "works inside"))]
)
def test_where_directories_cannot_be_exchanged_it_is_old_new_or_refused(saved, tmp_path, error, reason, monkeypatch):
    """Refused: without the configuration, which is removed first and written last."""
    if reason == "works inside":
        monkeypatch.chdir(saved / "checkpoint-3")
    elif reason == "mount point":
        monkeypatch.setattr(os.path, "ismount", lambda path: True)
    else:
        monkeypatch.setattr(atomic_writes.ctypes, "CDLL", lambda *args, **options: None)
    inode, found = saved.stat().st_ino, []
    for _ in operations(lambda: written(saved, NEW), tmp_path, error):
        found.append(own(saved))
        assert found[-1] in (OLD, NEW) or (error is None and "config.json" not in found[-1])
        assert {name: content for name, content in contents(saved).items() if name in MINE} == MINE
        written(saved, OLD)
        assert own(saved) == OLD
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert found.count(OLD) > 3
    assert NEW in found or error is not None
    assert saved.stat().st_ino == inode


def test_a_save_waits_until_all_new_files_are_on_the_disk(saved, monkeypatch):
    synced, exchanged = [], []
    monkeypatch.setattr(os, "fsync", lambda opened: synced.append(os.fstat(opened).st_ino))
    found = atomic_writes._exchange_call()

    def exchange(*paths):
        exchanged.append(set(synced))
        found(*paths)

    monkeypatch.setattr(atomic_writes, "_exchange_call", lambda: exchange)
    written(saved, NEW)
    assert {path.stat().st_ino for path in (saved, *(saved / name for name in NEW))} <= exchanged[0]
    assert saved.parent.stat().st_ino in synced


def test_links_directory_rights_and_running_saves_stay_as_they_are(saved, tmp_path):
    saved.chmod(0o2750)
    (tmp_path / "link").symlink_to("out")
    (saved / "there").symlink_to("nowhere")
    with replaced_directory(tmp_path / "link") as running:
        (running / "a").write_text("1")
        with replaced_directory(saved) as other:  # takes nobody's running save for one of a killed process
            (other / "b").write_text("2")
        (saved / "checkpoint-3" / "late.json").write_text("mine")
        assert running.is_dir()
    assert (tmp_path / "link").readlink() == Path("out")
    assert saved.stat().st_mode & 0o7777 == 0o2750
    assert (saved / "there").readlink() == Path("nowhere")
    assert own(saved) == {**OLD, "a": "1", "b": "2", "checkpoint-3/late.json": "mine"}


def test_threads_that_save_to_one_directory_leave_the_files_of_one(saved, tmp_path):
    def save(name: str) -> None:
        for _ in range(10):
            written(saved, {"config.json": name, f"own-{name}": name}, stale=("*shard-*", "vocab.txt", "own-*"))

    (tmp_path / ".nemo_hf-00000000-aaaaaaaa").write_text("mine")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(save, "abcd"))
    name = own(saved)["config.json"]
    assert own(saved) == {"config.json": name, f"own-{name}": name}
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".nemo_hf-00000000-aaaaaaaa"}


def test_what_appears_in_the_old_directory_meanwhile_is_taken_over(saved, monkeypatch):
    found = atomic_writes._exchange_call()

    def late(*paths):
        (saved / "checkpoint-4").mkdir()
        for name, text in {"notes.md": "changed", "checkpoint-4/a": "added", "checkpoint-3/b": "added"}.items():
            (saved / "new").write_text(text)
            (saved / "new").replace(saved / name)  # another inode
        found(*paths)

    monkeypatch.setattr(atomic_writes, "_exchange_call", lambda: late)
    written(saved, NEW)
    late_files = {"notes.md": b"changed", "checkpoint-4/a": b"added", "checkpoint-3/b": b"added"}
    assert contents(saved) == {**MINE, **{name: text.encode() for name, text in NEW.items()}, **late_files}


@ENDINGS
def test_a_file_is_replaced_whole_and_a_link_is_not_followed(tmp_path, error):
    (tmp_path / "shell").write_text("mine")
    for _ in operations(lambda: write_text(tmp_path / "README.md", "new"), tmp_path, error):
        write_text(tmp_path / "README.md", "old")
        assert contents(tmp_path) == {"README.md": b"old", "shell": b"mine"}
        assert len(list(tmp_path.iterdir())) == 2
        (tmp_path / "README.md").unlink()
        (tmp_path / "README.md").symlink_to("shell")
    assert (tmp_path / "shell").read_text() == "mine"


# Models


def described(parent, place: int):
    """A parent, module or composed model with a processor and a report of its own."""
    parent.processor_files = {"vocab.txt": b"ab"[place : place + 1] * 9}
    parent.report = {"metrics": {"place": place}}
    return parent


def two_modules():
    parent = parent_of("vit")
    for mask in parent.masks.site_masks():
        mask.relevance.fill_(255)  # both keep all neurons, so that each fits the other's configuration
    return [described(parent.extract_module(labels), i) for i, labels in enumerate((["cat", "dog"], ["car", "ship"]))]


def two_parents():
    return [described(parent_of("vit", relevance_threshold=threshold), i) for i, threshold in enumerate((0.5, 0.6))]


def two_composed():
    parts = [parent_of("vit").extract_module([label]) for label in ("cat", "dog", "car")]
    return [described(compose(pair), place) for place, pair in enumerate((parts[:2], parts[1:]))]


def saves(models, *options):
    pairs = zip(models, options or ({}, {}), strict=True)
    return [lambda path, model=model, given=given: model.save_pretrained(path, **given) for model, given in pairs]


def two_cards(monkeypatch):
    without_drawing(monkeypatch)
    return [lambda path, model=m: write_companions(model, path, "me/m", CardOptions(), None) for m in two_parents()]


def two_onnx(monkeypatch):
    without_tracing(monkeypatch)
    return [module.export_onnx for module in two_modules()]


LOADS = (NeMoForImageClassification.from_pretrained, AutoModelForImageClassification.from_pretrained)
NAMES = ("config.json", "model.safetensors", "vocab.txt", "report.json")
SMALL, LARGE = {"max_shard_size": "40KB"}, {"max_shard_size": "1GB"}
KINDS = {
    "parent": lambda patch: saves(two_parents()),
    "module": lambda patch: saves(two_modules()),
    "to-one-file": lambda patch: saves(two_modules(), SMALL, LARGE),
    "to-shards": lambda patch: saves(two_modules(), LARGE, SMALL),
    "from-variant": lambda patch: saves(two_modules(), {"variant": "fp16", **SMALL}, {}),
    "composed": lambda patch: saves(two_composed()),
    "plain": lambda patch: [module.save_plain for module in two_modules()],
    "onnx": two_onnx,
    "card": two_cards,
}


@ENDINGS
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "to-one-file" else pytest.mark.sweep) for kind in KINDS]
)
def test_a_model_that_is_saved_over_another_is_old_or_new(tmp_path, kind, error, monkeypatch):
    old, new = KINDS[kind](monkeypatch)
    old(tmp_path / "old")
    new(tmp_path / "new")
    wanted = [contents(tmp_path / name) for name in ("old", "new")]
    assert wanted[0] != wanted[1]
    place, found = tmp_path / "run" / "out", []
    shutil.copytree(tmp_path / "old", place)
    for _ in operations(lambda: new(place), place.parent, error):
        found.append(wanted.index(contents(place)))
        if found[-1] == 1:
            shutil.rmtree(place)
            shutil.copytree(tmp_path / "old", place)
    new(place)
    assert contents(place) == wanted[1]
    assert [path.name for path in place.parent.iterdir()] == ["out"]
    assert found.count(0) > 10
    assert found.count(1) > 3


@pytest.mark.parametrize("taken", ["config.json", "model.safetensors", "shards", "index", "one shard", "report.json"])
def test_files_of_different_saves_are_refused_and_another_report_is_left_out(tmp_path, taken, caplog):
    old, new = two_modules()
    options = SMALL if taken in ("shards", "index", "one shard") else LARGE
    for name, model in (("a", old), ("b", new)):
        model.save_pretrained(tmp_path / name, **options)
    patterns = {"shards": "model-*.safetensors", "index": "*.index.json", "one shard": "model-00002-*.safetensors"}
    names = [path.name for path in (tmp_path / "b").glob(patterns.get(taken, taken))]
    assert names
    for name in names:
        shutil.copy(tmp_path / "b" / name, tmp_path / "a" / name)
    for load in LOADS:
        if taken == "report.json":
            assert load(tmp_path / "a").report is None
            assert "is of another save than config.json" in caplog.text
        else:
            with pytest.raises(OSError, match=r"^Got 'config.json' and '.*model.*' of different saves in .*/a'"):
                load(tmp_path / "a")


def test_a_cut_from_files_of_different_saves_is_refused(tmp_path):
    for name, model in zip("ab", two_parents(), strict=True):
        model.save_pretrained(tmp_path / name)
    shutil.copy(tmp_path / "b" / "config.json", tmp_path / "a" / "config.json")
    with pytest.raises(OSError, match=r"^Got 'config.json' and 'model.safetensors' of different saves"):
        AutoModelForImageClassification.from_pretrained(tmp_path / "a", labels=["cat"])


def test_a_configuration_of_another_save_is_read_again_or_refused(tmp_path):
    old, new = two_modules()
    old.save_pretrained(tmp_path)
    read, changed = (AutoConfig.from_pretrained(tmp_path, output_hidden_states=True) for _ in range(2))
    changed.problem_type = None
    new.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, config=read)
    assert (loaded.config.names, loaded.config.output_hidden_states) == (new.config.names, True)
    with pytest.raises(OSError, match=r"^Got a configuration of another save .* set config\.save_identity = None"):
        AutoModelForImageClassification.from_pretrained(tmp_path, config=changed)
    changed.save_identity = None
    assert AutoModelForImageClassification.from_pretrained(tmp_path, config=changed).config.problem_type is None
    assert AutoModelForImageClassification.from_pretrained(tmp_path, config=new.config).config.names == new.config.names


def test_a_configuration_may_be_edited_and_a_save_has_the_identity_of_its_content(tmp_path):
    module = two_modules()[0]
    module.save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    config = json.loads(path.read_text())
    first, config["id2label"], config["label2id"] = config["save_identity"], {"0": "kitten", "1": "dog"}, None
    path.write_text(json.dumps(config))
    loaded = NeMoForImageClassification.from_pretrained(tmp_path / "a")
    assert loaded.config.names == {0: "kitten", 1: "dog"}
    loaded.save_pretrained(tmp_path / "b")
    assert loaded.config.save_identity["id"] != first["id"]
    NeMoForImageClassification.from_pretrained(tmp_path / "b", verify_files=True)
    module.save_pretrained(tmp_path / "c")
    assert module.config.save_identity == first


def test_an_identity_in_some_files_only_is_none_of_theirs(tmp_path):
    parent = two_parents()[0]
    parent.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["save_identity"]
    path.write_text(json.dumps(config))
    with pytest.raises(OSError, match=r"^Got 'config.json' and 'model.safetensors' of different saves"):
        NeMoForImageClassification.from_pretrained(tmp_path)
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors", {"format": "pt"})
    loaded = NeMoForImageClassification.from_pretrained(tmp_path)  # none has any, as in files made by hand
    assert loaded.report is None
    assert loaded.config.save_identity is None
    with pytest.raises(OSError, match=r"^Got "):
        NeMoForImageClassification.from_pretrained(tmp_path, verify_files=True)
    assert parent.extract_module(["cat"]).config.save_identity is None  # its tensors are in no file


@pytest.mark.parametrize("options", [LARGE, SMALL], ids=["one-file", "shards"])
def test_flipped_bytes_and_missing_files_are_found_if_asked_for(tmp_path, options):
    two_modules()[0].save_pretrained(tmp_path, **options)
    for load in LOADS:
        load(tmp_path, verify_files=True)
    for path in list(tmp_path.iterdir()):
        content = path.read_bytes()
        if path.name == "model.safetensors.index.json":
            continue  # it holds no numbers, and each tensor is looked for
        for place in range(len(content) // 2, len(content), 1 + len(content) // 5):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with pytest.raises((OSError, ValueError), match=r"^Got "):
                NeMoForImageClassification.from_pretrained(tmp_path, verify_files=True)
        path.unlink()
        if path.name != "report.json":  # the model is whole without it
            with pytest.raises((OSError, ValueError), match=r"^Got |not appear to have a file"):
                NeMoForImageClassification.from_pretrained(tmp_path, verify_files=True)
        path.write_bytes(content)
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(OSError, match=r"^Got no file 'vocab\.txt'"):
        NeMoForImageClassification.from_pretrained(tmp_path, verify_files=True)


def test_flipped_bytes_of_a_parent_are_found_before_a_cut(tmp_path):
    two_parents()[0].save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    for flip in (0, 1):
        path.write_bytes(content[:-9] + bytes([content[-9] ^ flip]) + content[-8:])
        AutoModelForImageClassification.from_pretrained(tmp_path, labels=["cat"])
        if not flip:
            AutoModelForImageClassification.from_pretrained(tmp_path, labels=["cat"], verify_files=True)
    with pytest.raises(OSError, match=r"^Got 'model\.safetensors' with the digest .*; expected the digest"):
        AutoModelForImageClassification.from_pretrained(tmp_path, labels=["cat"], verify_files=True)


def test_a_reader_beside_a_writer_gets_one_save(tmp_path):
    modules, inputs = two_modules(), torch.stack([sample["pixel_values"] for sample in image_samples(2)])
    logits = [logits_of(module, pixel_values=inputs) for module in modules]
    modules[0].save_pretrained(tmp_path / "out")
    if (writer := os.fork()) == 0:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            for module in modules:
                module.save_pretrained(tmp_path / "out")
        os._exit(0)
    found, end = [], time.monotonic() + 2
    try:
        while time.monotonic() < end or len(found) < 6:
            model = LOADS[len(found) % 2](tmp_path / "out")
            place = model.report["metrics"]["place"]
            assert model.config.names == modules[place].config.names
            assert model.processor_files == modules[place].processor_files
            assert torch.equal(logits_of(model, pixel_values=inputs), logits[place])
            found.append(place)
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
    assert len(found) >= 6


def trained(tmp_path, **options) -> NeMoTrainer:
    args = TrainingArguments(
        tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=1, report_to=[], use_cpu=True,
        per_device_train_batch_size=8, disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = NeMoTrainer(parent_of("vit"), args, train_dataset=image_samples(16))
    trainer.train()
    return trainer


@pytest.mark.sweep
@ENDINGS
def test_a_checkpoint_that_is_written_again_is_whole_or_not_resumed_from(tmp_path, error):
    """The model in it is old or new; `trainer_state.json`, by which it counts as whole, isn't the old one then."""
    trainer = trained(tmp_path)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    shutil.copytree(checkpoint, tmp_path / "kept")
    old = NeMoForImageClassification.from_pretrained(checkpoint).state_dict()
    trainer.parent.model.classifier.bias.data.fill_(7.0)
    states = []
    for _ in operations(lambda: trainer._save_checkpoint(trainer.model, None), tmp_path, error):
        bias = NeMoForImageClassification.from_pretrained(checkpoint).model.classifier.bias
        is_new = bool((bias == 7).all())
        assert is_new or torch.equal(bias, old["model.classifier.bias"])
        states.append((is_new, (checkpoint / "trainer_state.json").exists()))
        shutil.rmtree(checkpoint)
        shutil.copytree(tmp_path / "kept", checkpoint)
    assert {state for state in states if not state[0]} >= {(False, True), (False, False)}
    assert (True, False) in states
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"checkpoint-1", "checkpoint-2"}


@pytest.mark.sweep
@ENDINGS
def test_a_push_from_a_checkpoint_leaves_old_or_new_files_in_the_output_directory(tmp_path, error, hub, monkeypatch):
    without_drawing(monkeypatch)
    trainer = trained(tmp_path, push_to_hub=True, hub_model_id="me/x", hub_strategy="end")
    out = tmp_path / "out"
    trainer.parent.save_pretrained(out)
    trainer.create_model_card()
    monkeypatch.setattr("nemo_hf.training.hub_pushes.upload", lambda *given: None)
    trainer.args.hub_strategy = "every_save"
    shutil.copytree(out, tmp_path / "kept")
    model = ("config.json", "model.safetensors")
    old = [(out / name).read_bytes() for name in model]
    new = [(out / "checkpoint-1" / name).read_bytes() for name in model]
    found = []
    for _ in operations(lambda: trainer._push_from_checkpoint(str(out / "checkpoint-1")), tmp_path, error):
        found.append([old, new].index([(out / name).read_bytes() for name in model]))
        assert contents(out / "checkpoint-2") == contents(tmp_path / "kept" / "checkpoint-2")
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "kept", out)
    assert set(found) == {0, 1}


@pytest.mark.sweep
@ENDINGS
def test_a_push_that_dies_leaves_an_old_or_a_new_commit(tmp_path, error, hub, monkeypatch):
    without_drawing(monkeypatch)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    old, new = two_modules()
    new.push_to_hub("me/b")
    old.push_to_hub("me/a")
    wanted = [{name: hub.files(f"me/{repo}")[name] for name in NAMES} for repo in "ab"]
    found = []
    for _ in operations(lambda: new.push_to_hub("me/a"), tmp_path, error):
        found.append(wanted.index({name: hub.files("me/a")[name] for name in NAMES}))
        if found[-1] == 1:
            old.push_to_hub("me/a")
    assert set(found) == {0, 1}
    assert not list(tmp_path.iterdir())


def test_an_export_to_onnx_leaves_the_configuration_of_other_weights_alone(tmp_path, monkeypatch):
    without_tracing(monkeypatch)
    module = two_modules()[0]
    module.save_pretrained(tmp_path / "a")
    before = contents(tmp_path / "a")
    with pytest.raises(ValueError, match=r"^Got .*/a', .* with another config.json \(model.safetensors\); expected"):
        module.export_onnx(tmp_path / "a")
    assert contents(tmp_path / "a") == before
    module.save_plain(tmp_path / "b")
    module.export_onnx(tmp_path / "b")
    assert {"model.onnx", "model.safetensors"} <= set(contents(tmp_path / "b"))


def test_no_save_replaces_the_configuration_of_exported_files(tmp_path, monkeypatch):
    without_tracing(monkeypatch)
    module, other = two_modules()
    module.export_onnx(tmp_path)
    before = contents(tmp_path)
    for save in (other.save_pretrained, module.save_pretrained, parent_of("vit").save_pretrained):
        with pytest.raises(ValueError, match=r"where model.onnx need the config.json .*expected a directory without"):
            save(tmp_path)
    with pytest.raises(ValueError, match=r"another config.json \(model.onnx\)"):
        other.save_plain(tmp_path)
    assert contents(tmp_path) == before
