"""What a stranger's directory could do: lead out of itself, bring code, make long work; and: what is saved loads."""

import json
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
import yaml
from conftest import fresh, hooks_of
from saving_helpers import without_tracing
from test_files import REPORT
from test_hostile_files import INF, LOADS, NAN, RUN, config_of, damaged, kinds, load, refused, with_entry
from test_hostile_files import saved as saved
from transformers import AutoModelForImageClassification

from nemo_hf import NeMoForImageClassification, NeMoModelConfig
from nemo_hf.cli import main
from nemo_hf.hub.model_card import render_model_card
from nemo_hf.hub.publish import CardOptions, card_facts
from nemo_hf.models.atomic_writes import write_json
from nemo_hf.models.attach import attach_masks

# Links


def linked(source: Path, root: Path, name: str) -> Path:
    """A copy of a directory in which a file is a link to one outside."""
    directory = shutil.copytree(source, root / "clone")
    content = (directory / name).read_bytes() if (directory / name).exists() else b'{"metrics": {}}'
    (root / "outside").write_bytes(content)
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to("../outside")
    return directory


@kinds
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "report.json", "vocab.txt", "tokenizer.json"])
def test_links_out_of_a_directory_are_refused(saved, tmp_path, kind, name):
    directory = linked(saved / kind, tmp_path, name)
    refused(directory, f"'{name}' in .*, a link to a file outside", kind=kind)
    for options in LOADS[kind]:
        with pytest.raises(OSError, match="a link to a file outside"):
            AutoModelForImageClassification.from_pretrained(directory, **options)


@pytest.mark.parametrize("index", [True, False])
def test_links_of_indices_and_shards_are_refused(saved, tmp_path, index):
    NeMoForImageClassification.from_pretrained(saved / "parent").save_pretrained(tmp_path / "a", max_shard_size="20KB")
    name = "model.safetensors.index.json" if index else min(path.name for path in (tmp_path / "a").glob("*-of-*"))
    refused(linked(tmp_path / "a", tmp_path, name), name, "a link to a file outside", kind="parent")


def test_links_within_a_directory_or_the_cache_and_to_a_directory_load(saved, tmp_path):
    inside = shutil.copytree(saved / "module", tmp_path / "a")
    (inside / "model.safetensors").rename(inside / "weights")
    (inside / "model.safetensors").symlink_to("weights")
    cached = tmp_path / "models--me--x" / "snapshots" / ("0" * 40)
    blobs = shutil.copytree(saved / "module", cached.parents[1] / "blobs")
    cached.mkdir(parents=True)
    for path in blobs.iterdir():
        (cached / path.name).symlink_to(f"../../blobs/{path.name}")
    (tmp_path / "b").symlink_to("a")
    expected = load(saved / "module")
    for directory in (inside, tmp_path / "b", cached):
        assert torch.equal(load(directory), expected)
    for directory in (inside, cached.parent):
        (directory / "sub").symlink_to(saved / "module")
        with pytest.raises(OSError, match="a link to a file outside"):
            load(directory, subfolder="sub")


def test_links_are_not_written_through(saved, tmp_path):
    victim, clone = tmp_path / "victim", shutil.copytree(saved / "module", tmp_path / "clone")
    victim.write_text("mine")
    for name in (".README.md.tmp", "neurons.png", ".report.json.tmp", "model.safetensors.tmp"):
        (clone / name).symlink_to("../victim")
    assert main(["push", str(clone), "--repo-id", "me/x", "--dry-run"]) == 0
    assert not (clone / "neurons.png").is_symlink()
    (clone / "README.md").unlink()
    (clone / "README.md").symlink_to("../victim")
    assert main(["push", str(clone), "--repo-id", "me/x", "--dry-run"]) == 2  # its text would go into the card
    write_json(clone / "README.md", {})
    assert victim.read_text() == "mine"


EVIL = {"AutoProcessor": "evil.Own", "AutoTokenizer": ["evil.Own", None], "AutoImageProcessor": "me/evil--evil.Own"}
OPTIONS = {"size": 16, "auto_map": EVIL, "image_processor": {"auto_map": EVIL, "mean": [0.5]}, "vocab_file": "/etc/x"}
OPTIONS |= {"audio_tokenizer": {"audio_tokenizer_class": "X", "audio_tokenizer_name_or_path": "evil/x"}, "a_file": None}
CLEAN_OPTIONS = {"size": 16, "image_processor": {"mean": [0.5]}, "a_file": None}
OPTION_FILES = ("preprocessor_config.json", "processor_config.json", "tokenizer_config.json", "own_config.json")


@pytest.mark.parametrize("name", [*OPTION_FILES, "special_tokens_map.json", "video_preprocessor_config.json"])
def test_processors_files_name_no_code_and_nothing_elsewhere(saved, tmp_path, name, caplog):
    config = {**config_of(saved / "parent"), "processor_files": [name]}
    directory = damaged(saved / "parent", tmp_path / "a", "config.json", config)
    (directory / name).write_text(json.dumps(OPTIONS))
    for options in LOADS["parent"]:
        caplog.clear()
        model = NeMoForImageClassification.from_pretrained(directory, **options)
        assert json.loads(model.processor_files[name]) == CLEAN_OPTIONS
        assert "auto_map" in caplog.text
        model.processor_files = {name: json.dumps(OPTIONS).encode()}  # set by hand, it is not written either
        model.save_pretrained(tmp_path / "b")
        assert json.loads((tmp_path / "b" / name).read_text()) == CLEAN_OPTIONS
    model.save_plain(tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / name).read_text()) == CLEAN_OPTIONS


def test_vocabularies_keep_their_words(saved, tmp_path):
    words = json.dumps({"auto_map": 1, "a_file": 2, "/home/me": 3}).encode()
    files = {"vocab.json": words, "entity_vocab.json": words, "tokenizer.json": b'{"vocab": {"auto_map": 0}}'}
    module = NeMoForImageClassification.from_pretrained(saved / "module")
    module.processor_files = files
    module.save_pretrained(tmp_path / "a")
    assert NeMoForImageClassification.from_pretrained(tmp_path / "a").processor_files == files


def test_code_of_a_processor_is_not_attached(saved, caplog):
    class Own:
        def save_pretrained(self, directory):
            for name, text in {"own.py": "", "a.bin": "", "preprocessor_config.json": json.dumps(OPTIONS)}.items():
                Path(directory, name).write_text(text)

    module = NeMoForImageClassification.from_pretrained(saved / "module")
    module.attach_processor(Own())
    assert list(module.processor_files) == ["preprocessor_config.json"]
    assert json.loads(module.processor_files["preprocessor_config.json"]) == CLEAN_OPTIONS
    assert "own.py" in caplog.text


def test_no_code_is_named_by_what_is_written_from_a_stranger_s_configuration(saved, tmp_path, monkeypatch):
    without_tracing(monkeypatch)
    config = config_of(saved / "module")
    config["auto_map"] = config["base_config"]["auto_map"] = EVIL
    config["base_config"]["custom_pipelines"] = {"x": {"impl": "evil.Own"}}
    module = NeMoForImageClassification.from_pretrained(
        damaged(saved / "module", tmp_path / "a", "config.json", config)
    )
    module.save_pretrained(tmp_path / "b")
    module.save_plain(tmp_path / "c")
    module.export_onnx(tmp_path / "d")
    for folder in "bcd":
        assert not re.search("evil|auto_map", (tmp_path / folder / "config.json").read_text())


MANY = 300_000
HUGE = {
    "sites": [{"key": f"a{index}:ffn", "pruning_mode": "dense"} for index in range(20_000)],
    "label_groups": [{"name": str(index), "labels": [0]} for index in range(MANY)],
    "label_groups.0.labels": list(range(MANY)),
    "label_ids": list(range(MANY)),
    "id2label": {str(index): "" for index in range(MANY)},
    "base_config.id2label": {str(index): "" for index in range(MANY)},
    "label2id": {str(index): index for index in range(MANY)},
    "base_class": "x" * 10**7,
    "id2label.0": "x" * 10**7,
    "nemo_config.targets": ["ffn"] * MANY,
    "nemo_config.sites": [{"kind": "ffn", "producers": ["a.*"] * 5000, "output": "b"}],
    "sites.0.widths": {str(index): index for index in range(MANY)},
    "strange": [[0] * 1000] * 450,
    "training": {**RUN, "arguments": {f"a{index}": 1 for index in range(MANY)}},
}


@pytest.mark.parametrize("field", list(HUGE))
def test_small_files_that_would_make_long_work_are_refused(saved, field):
    keys = tuple(int(key) if key == "0" and "id2label" not in field else key for key in field.split("."))
    with pytest.raises(ValueError, match=r"^Got [\s\S]*; expected (at most|a text of at most|fewer)") as error:
        NeMoModelConfig.from_dict(with_entry(config_of(saved / "parent"), keys, HUGE[field]))
    assert len(str(error.value)) < 1000


def headers(count: int) -> bytes:
    header = json.dumps({f"t{index}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for index in range(count)})
    return struct.pack("<Q", len(header)) + header.encode()


def test_many_tensors_shards_and_companions_are_refused(saved, tmp_path):
    for count, words in ((MANY, "a header of"), (90_000, "of over 20000 tensors")):
        refused(damaged(saved / "module", tmp_path / "a", "model.safetensors", headers(count)), words)
    (tmp_path / "a" / "model.safetensors").unlink()
    index = {"weight_map": {f"t{index}": f"s{index}.safetensors" for index in range(20_000)}}
    (tmp_path / "a" / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path / "a", "with over 10000 files")
    directory = shutil.copytree(saved / "module", tmp_path / "b")
    for name in ("vocab.txt", "tokenizer.json", "spiece.model"):
        with (directory / name).open("wb") as file:
            file.truncate(2**28)
    refused(directory, "files of the processor of 805306368 bytes")


# Whatever is written is checked by the code that reads it


SETTINGS = {
    "labels of any characters": lambda m: set_names(m, ["a\nb | `c`", "<b>\0{{ x }}"]),
    "a label of 20,000 characters": lambda m: set_names(m, ["x" * 20_000, "b"]),
    "a metric that is NaN": lambda m: setattr(m, "report", {"metrics": {"eval_loss": NAN, "a|b": INF}}),
    "a metric name of two lines": lambda m: setattr(m, "report", {"metrics": {"a\nb": 1}}),
    "a report of NaN": lambda m: setattr(m, "report", {**REPORT, "accuracy": NAN}),
    "a report of infinite": lambda m: setattr(m, "report", {**REPORT, "macs": 10**400}),
    "a whole report": lambda m: setattr(m, "report", REPORT),
    "half a report": lambda m: setattr(m, "report", {"labels": ["cat"]}),
    "a report of tensors": lambda m: setattr(m, "report", {"metrics": {"a": torch.ones(2)}}),
    "nested metrics": lambda m: setattr(m, "report", {"metrics": {"f1": {"cat": 0.5}, "many": [1.0, None]}}),
    "nested options": lambda m: set_training(m, {"a": {"b|c": ["d`", 1.5, None, INF]}}),
    "no options": lambda m: set_training(m, {}),
    "40 files": lambda m: setattr(m, "processor_files", {f"f{index}.txt": b"" for index in range(40)}),
    "a file of another folder": lambda m: setattr(m, "processor_files", {"../vocab.txt": b""}),
    "a file of weights": lambda m: setattr(m, "processor_files", {"model.safetensors": b""}),
    "files in two cases": lambda m: setattr(m, "processor_files", {"vocab.txt": b"", "VOCAB.txt": b""}),
    "many entries": lambda m: setattr(m.config, "note", [0] * 500_000),
    "a NaN of the plain model": lambda m: setattr(m.config.base_config, "layer_norm_eps", NAN),
    "code": lambda m: setattr(m.config, "auto_map", EVIL),
    "a kernel": lambda m: setattr(m.config, "quantization_config", {"quant_method": "x"}),
    "no label": lambda m: setattr(m.config, "id2label", {}),
    "depth": lambda m: setattr(m.config, "note", json.loads("[" * 30 + "]" * 30)),
}  # fmt: skip


def set_names(model, names):
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}


def set_training(model, arguments):
    model.config.training = {**RUN, "arguments": arguments}


@pytest.mark.parametrize("name", list(SETTINGS))
def test_what_is_saved_loads_and_the_rest_is_refused_before_anything_is_written(saved, tmp_path, name, caplog):
    module = NeMoForImageClassification.from_pretrained(saved / "module")
    expected = module.state_dict()
    try:
        SETTINGS[name](module)  # what strict fields refuse is not set
        module.save_pretrained(tmp_path / "a")
    except Exception as error:
        assert isinstance(error, (TypeError, ValueError)), error  # noqa: PT017
        assert "expected" in str(error)  # noqa: PT017
        assert list(tmp_path.iterdir()) == []
        return
    caplog.clear()
    loaded = NeMoForImageClassification.from_pretrained(tmp_path / "a")
    assert json.dumps(loaded.report) == json.dumps(module.report)
    assert (loaded.config.names, loaded.config.training) == (module.config.names, module.config.training)
    assert loaded.processor_files == module.processor_files
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())
    assert not caplog.records
    assert yaml.safe_load(render_model_card(card_facts(loaded, "me/x", CardOptions(), None)).split("---\n")[1])


def test_what_could_not_be_saved_is_refused_before_training(vit):
    vit.config.note = [0] * 500_000
    with pytest.raises(ValueError, match=r"loaded again: .* entries; expected fewer\. Correct model\.config"):
        attach_masks(vit)
    assert hooks_of(vit) == 0
    attach_masks(fresh("vit"))
