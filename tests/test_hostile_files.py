"""Files of a stranger: whatever they hold, loading ends in a model that runs or in a clear error, and soon."""

import json
import pickle
import re
import shutil
import struct
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import fresh, randomize_relevance
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageClassification

from nemo_hf import (
    NeMoConfig,
    NeMoForImageClassification,
    NeMoForSequenceClassification,
    UnsupportedArchitectureError,
    make_parent,
)
from nemo_hf.neurons.trial_inputs import random_inputs

REFUSALS = (OSError, ValueError)  # UnsupportedArchitectureError is a ValueError
SECONDS = 10  # a refusal takes some hundredths; other programs may run beside
LOADS = {"module": ({},), "parent": ({}, {"labels": ["cat", "dog"]})}
kinds = pytest.mark.parametrize("kind", list(LOADS))


def test_the_errors_are_those_that_are_promised():
    assert issubclass(UnsupportedArchitectureError, REFUSALS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A tiny parent and its module, and a scattered and a rotary pair."""
    root = tmp_path_factory.mktemp("saved")
    for name, family, pruning_mode in (("", "vit", ""), ("scattered-", "vit", "scatter"), ("rotary-", "llama", "")):
        parent = make_parent(fresh(family), NeMoConfig(hard_masks=name != "rotary-")).eval()
        if pruning_mode:
            parent.set_sites([type(site)(**{**vars(site), "pruning_mode": pruning_mode}) for site in parent.sites])
        randomize_relevance(parent)
        parent.report = {"metrics": {}}
        parent.save_pretrained(root / f"{name}parent")
        parent.extract_module(["cat", "dog"]).save_pretrained(root / f"{name}module")
    return root


@contextmanager
def hostile(source: Path, file: str, content: bytes | str | None = None):
    """The directory with another content of one file, for a while; a symbolic link stands for the weights."""
    directory = source.parent / "hostile"
    shutil.copytree(source, directory, copy_function=lambda old, new: Path(new).symlink_to(old))
    path = directory / file
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def config_of(source: Path) -> dict:
    return json.loads((source / "config.json").read_text())


def changed(source: Path, keys: tuple, value):
    """The directory with one entry of its configuration changed."""
    config = config_of(source)
    inner = config
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return hostile(source, "config.json", json.dumps(config))


def load(directory, model=NeMoForImageClassification, **options):
    """Loads and runs a model, in bounded time."""
    start = time.monotonic()
    try:
        loaded = model.from_pretrained(directory, **options)
        with torch.no_grad():
            logits = loaded(**random_inputs(loaded)).logits
        assert logits.shape == (4, loaded.config.num_labels)
        return loaded, logits
    finally:
        assert time.monotonic() - start < SECONDS


def refused(directory, *parts: str, kind: str = "module", model=NeMoForImageClassification) -> None:
    """Checks that all ways of loading end in our kind of message, which names what is wrong."""
    for options in LOADS[kind]:
        with pytest.raises(REFUSALS, match=r"^Got [\s\S]*; expected [\s\S]*\. ") as error:
            load(directory, model, **options)
        for part in parts:
            assert re.search(part, str(error.value)), error.value


SIZES = {
    ("base_config", "num_hidden_layers"): (10**9, 10**5),
    ("base_config", "hidden_size"): (10**9, 10**5),
    ("base_config", "image_size"): (10**9, 10**5),
    ("base_config", "num_channels"): (10**9,),
    ("base_config", "num_attention_heads"): (10**9,),
    ("base_config", "num_labels"): (10**9,),
    ("num_labels",): (10**9,),
}
OF_MODULES = {("sites", 0, "widths", "head_dim"): (10**12,), ("label_ids", 1): (10**12,)}
OF_PARENTS = {("base_config", "intermediate_size"): (10**9,), ("nemo_config", "generator_rank"): (10**12,)}
HARMLESS = {("base_config", "max_position_embeddings"): (10**12,)}  # of rotary models
ABSURD = {
    "module": {**SIZES, **OF_MODULES},
    "parent": {**SIZES, **OF_PARENTS},
    "rotary-parent": {("base_config", "vocab_size"): (10**12,), **HARMLESS},
}


LIMITED = """
import resource, sys, time
from nemo_hf import NeMoForImageClassification, NeMoForSequenceClassification
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
for line in sys.stdin:
    directory, labels = line.split()
    model = NeMoForSequenceClassification if "rotary" in directory else NeMoForImageClassification
    try:
        model.from_pretrained(directory, **({"labels": ["cat"]} if labels == "cut" else {}))
        print("loaded")
    except Exception as error:
        print(type(error).__name__, str(error).replace("\\n", " ")[:100])
"""


def test_absurd_sizes_take_neither_memory_nor_time(saved, tmp_path):
    """One process of at most a gigabyte more than it has after the imports, and of a minute."""
    cases = [(kind, k, v) for kind, sizes in ABSURD.items() for k, values in sizes.items() for v in values]
    lines = []
    for index, (kind, keys, value) in enumerate(cases):
        with changed(saved / kind, keys, value) as directory:
            copied = shutil.copytree(directory, tmp_path / f"{index}-{kind}", symlinks=True)
        lines += [f"{copied} whole"] + [f"{copied} cut"] * (kind != "module")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED], input="\n".join(lines), capture_output=True, text=True, timeout=120
    )
    answers = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(answers) == len(lines)
    allowed = ("loaded", "ValueError", "OSError", "UnsupportedArchitectureError")
    pairs = list(zip(lines, answers, strict=True))
    assert [pair for pair in pairs if not pair[1].startswith(allowed)] == []
    harmless = [line for line, answer in pairs if answer == "loaded"]
    assert len(harmless) == 2 * len(HARMLESS), harmless


def test_the_limit_of_registrations_holds_for_this_build_alone(saved):
    with changed(saved / "module", ("base_config", "num_hidden_layers"), 99_999) as directory:
        refused(directory, "layers and parameters")
    torch.nn.ModuleList(torch.nn.Identity() for _ in range(12_000))


def test_computed_tables_beyond_the_files_are_refused(saved, monkeypatch):
    from transformers import ViTForImageClassification

    original = ViTForImageClassification.__init__

    def with_table(self, config):
        original(self, config)
        self.register_buffer("table", torch.empty(2**30), persistent=False)

    monkeypatch.setattr(ViTForImageClassification, "__init__", with_table)
    for kind in LOADS:
        refused(saved / kind, r"a model of 4\d{9} bytes", kind=kind)


CHECK = {"status": "verified", "difference": 1e-7, "tolerance": 1e-5, "effect": 0.5, "samples": 4}
RUN = {"arguments": {"seed": 1, "lr_scheduler_kwargs": {"num_cycles": 2}}, "processes": 1, "samples": None}
WRONG = {
    ("base_config",): (3, [], "x"),
    ("base_config", "model_type"): (3, None, ["vit"], {}),
    ("base_config", "hidden_size"): ("32", None, -4, 0, 31, float("nan")),
    ("base_config", "num_hidden_layers"): ("2", -1, [2], float("nan")),
    ("base_config", "patch_size"): (0, "4"),
    ("base_config", "hidden_act"): ("evil", 3, None),
    ("base_config", "layer_norm_eps"): (float("nan"), float("inf"), -1.0, "small"),
    ("base_config", "id2label"): ([1], {"x": "y"}, {}),
    ("base_config", "dtype"): ("int8", 3, {"a": 1}),
    ("base_config", "to_dict"): (3,),
    ("base_config", "__dict__"): ({},),
    ("base_class",): (3, None, [], "ViTModel", "BertForSequenceClassification"),
    ("parent",): (3, ["me/parent"]),
    ("training",): (
        *(3, [], {"processes": 1}, {"arguments": {}}, {**RUN, "arguments": 3}, {**RUN, "arguments": {"a b": 1}}),
        *({**RUN, "arguments": {"seed": wrong}} for wrong in ("1\n\n# BUY", list(range(300)), {"a\n": 1})),
        *({**RUN, "processes": "2"}, {**RUN, "processes": True}, {**RUN, "samples": "x"}, {**RUN, "samples": 10**400}),
        *({**RUN, "base_model": 3}, {**RUN, "base_model": "a\nb"}, {**RUN, "command": ["x"]}),
        *({**RUN, "datasets": "x"}, {**RUN, "datasets": [3]}, {**RUN, "versions": {"torch": 3}}),
    ),
    ("processor_files",): (
        *(3, "vocab.txt", {"vocab.txt": 1}, [3], [None], [""], ["vocab.txt"] * 2, ["vocab.txt", "VOCAB.TXT"]),
        *(["../vocab.txt"], ["a/b.txt"], ["/etc/passwd"], ["a\\b.txt"], [".."], [".hidden"], ["a\nb"], ["n" * 101]),
        *(["config.json"], ["Config.JSON"], ["report.json"], ["README.md"], ["adapter_config.json"], ["code.py"]),
        *(["model.safetensors"], ["model.safetensors.index.json"], ["pytorch_model.bin"], ["a.pkl"]),
        [f"file{index}" for index in range(33)],
    ),
    ("round_to",): ("8", -1, 2.5),
    ("role",): (3, None, "both"),
    ("nemo_config",): (3, [], {"targets": 3}, {"temperature": float("nan")}, {"sites": [3]}, {"sites": 3}),
    ("label_groups",): (3, [], [3], [{}], [{"name": "a", "labels": []}], [{"name": 3, "labels": [0]}]),
    ("id2label",): (3, {}, {"0": None}, {"1": "a", "2": "b"}, {"a": "b"}),
    ("label2id",): (3, {"a": "b"}),
    ("sites",): (3, [], [3], [{}], {"key": 1}),
    ("equivalence",): (
        *(3, [], {"difference": [1]}, {"status": "x"}, {"status": "verified"}, {**CHECK, "status": "fine"}),
        *({**CHECK, "status": "verified |\n\n# BUY"}, {**CHECK, "difference": "1"}, {**CHECK, "effect": float("inf")}),
        *({**CHECK, "source": "# BUY"}, {**CHECK, "samples": True}, {**CHECK, "note": "# BUY"}),
    ),
    ("rejection",): (3, {}, {"weight": 1.0}, {"weight": "1", "bias": 0, "threshold": 0.5}),
    ("relevance_source",): (3, None, "guessed"),
    ("relevance_threshold",): ("x", 3, -1, float("nan")),
    ("problem_type",): (3, "regression", "x"),
    ("dtype",): ("int8", 3, "float8_e4m3fn"),
    ("model_type",): (3, None, "vit"),
    ("attn_implementation",): ("stranger/kernel",),
    ("_attn_implementation_internal",): ("stranger/kernel",),
    ("quantization_config",): ({"quant_method": "bitsandbytes"},),
    ("transformers_weights",): ("../other.safetensors", "other.safetensors"),
    ("get_text_config",): (3,),
}


@kinds
@pytest.mark.parametrize(
    ("keys", "value"), [(keys, value) for keys, values in WRONG.items() for value in values], ids=repr
)
def test_values_of_wrong_types_or_ranges_are_refused(saved, kind, keys, value):
    with changed(saved / kind, keys, value) as directory, pytest.raises(REFUSALS):
        load(directory, **LOADS[kind][-1])


@kinds
@pytest.mark.parametrize(
    ("key", "value"),
    [("equivalence", CHECK), ("equivalence", {**CHECK, "source": "parent"}), ("training", RUN), ("training", {})],
)
def test_right_records_are_read(saved, kind, key, value):
    with changed(saved / kind, (key,), value) as directory:
        assert getattr(load(directory)[0].config, key) == value


@pytest.mark.parametrize("value", [[0, 0], [-1, 0], [0, 5], ["cat", "dog"], [True, False], [0], [0, 2], 3, None])
def test_label_ids_that_are_not_the_module_s_are_refused(saved, value):
    with changed(saved / "module", ("label_ids",), value) as directory:
        refused(directory, "label")


GROUPS = [
    [("a", [0, 1]), ("b", [2, 3])],
    [("a", [0, 1]), ("b", [1, 2, 3, 4])],
    [("a", [0, 1]), ("a", [2, 3, 4])],
    [("a", [0, 1, 2, 3, 4, 5])],
    [("a", [0, 1, 2, 3, -4])],
    [("a", [0, 1]), ("b", [2, 3, 4])],
]


@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_groups_that_are_no_partition_are_refused(saved, groups):
    """The last one is a partition, which the relevance is not of."""
    value = [{"name": name, "labels": labels} for name, labels in groups]
    with changed(saved / "parent", ("label_groups",), value) as directory:
        refused(directory, "group|relevance", kind="parent")


@kinds
@pytest.mark.parametrize("depth", [25, 100, 900, 100_000])
def test_deep_nesting_is_refused(saved, kind, depth):
    text = (saved / kind / "config.json").read_text().rstrip()[:-1]
    with hostile(saved / kind, "config.json", text + ',"deep":' + "[" * depth + "]" * depth + "}") as directory:
        refused(directory, kind=kind)


@kinds
@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"{", b"\xff\xfe", b"{}", b'{"role": 1e999}', b"[" * 99])
def test_a_configuration_that_is_none_is_refused(saved, kind, content):
    with hostile(saved / kind, "config.json", content) as directory:
        for options in LOADS[kind]:
            with pytest.raises(REFUSALS):
                load(directory, **options)


@kinds
def test_files_of_absurd_size_are_not_read(saved, kind):
    for name, size in (("config.json", 2**25), ("report.json", 2**25), ("tokenizer.json", 2**30)):
        with hostile(saved / kind, name, b"") as directory:
            with (directory / name).open("wb") as file:
                file.truncate(size)  # takes no room on the disk
            with pytest.raises(OSError, match=rf"^Got .*{name}.* {size} bytes.*; expected "):
                NeMoForImageClassification.from_pretrained(directory)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 10**5, b'{"a":' * 30 + b"1" + b"}" * 30])
def test_a_report_that_is_none_is_refused(saved, content):
    with hostile(saved / "module", "report.json", content) as directory:
        refused(directory, r"report\.json", "expected a JSON mapping")


def header_of(path: Path) -> tuple[dict, bytes]:
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def with_header(header: dict | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


NAME = "model.vit.layernorm.weight"
HEADERS = {
    "end beyond the file": {"data_offsets": [0, 10**15]},
    "end before the start": {"data_offsets": [128, 0]},
    "overlapping": {"data_offsets": [0, 128]},
    "negative": {"data_offsets": [-128, 0]},
    "no integers": {"data_offsets": ["0", 128.5]},
    "one offset": {"data_offsets": [0]},
    "huge shape": {"shape": [2**40, 2**40]},
    "shape that overflows": {"shape": [2**62, 2]},
    "negative shape": {"shape": [-32]},
    "another shape": {"shape": [4, 8]},
    "another dtype": {"dtype": "I32"},
    "eight bits": {"dtype": "F8_E4M3", "shape": [128]},
    "no dtype": {"dtype": "object"},
    "null": {"dtype": None},
}


@kinds
@pytest.mark.parametrize("change", list(HEADERS.values()), ids=list(HEADERS))
def test_a_header_that_lies_is_refused(saved, kind, change):
    header, data = header_of(saved / kind / "model.safetensors")
    header[NAME] = {**header[NAME], **change}
    with hostile(saved / kind, "model.safetensors", with_header(header, data)) as directory:
        refused(directory, kind=kind)


@pytest.mark.parametrize("size", [0, 1, 10**8 + 1, 2**63, 2**64 - 1])
def test_a_header_of_absurd_length_is_refused(saved, size):
    content = (saved / "module" / "model.safetensors").read_bytes()
    with hostile(saved / "module", "model.safetensors", struct.pack("<Q", size) + content[8:]) as directory:
        refused(directory, "damaged or truncated")


def test_what_safetensors_refuses_itself(tmp_path):
    """Offsets must tile the data exactly, so that no tensor reads another's bytes or memory of its own."""
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    path = tmp_path / "a.safetensors"
    for header, data in (
        ({"a": entry, "b": entry}, 8),
        ({"a": entry, "b": {**entry, "data_offsets": [4, 12]}}, 12),
        ({"a": entry, "b": {**entry, "data_offsets": [12, 20]}}, 20),
        ({"a": entry}, 9),
        ({"a": entry}, 7),
        ({"a": {**entry, "shape": [3]}}, 8),
    ):
        path.write_bytes(with_header(header, bytes(data)))
        with pytest.raises(SafetensorError):
            safe_open(path, framework="pt")


STORED = {
    "weights as integers": (NAME, torch.int64),
    "relevance as numbers": ("masks.0.relevance", torch.float32),
    "relevance as signed": ("masks.0.relevance", torch.int8),
    "level as a number": ("masks.sparsity_level", torch.float64),
}


@pytest.mark.parametrize(("name", "dtype"), list(STORED.values()), ids=list(STORED))
def test_numbers_of_another_kind_are_refused(saved, tmp_path, name, dtype):
    tensors = load_file(saved / "parent" / "model.safetensors")
    tensors[name] = tensors[name].to(dtype)
    shutil.copytree(saved / "parent", tmp_path / "parent")
    save_file(tensors, tmp_path / "parent" / "model.safetensors", {"format": "pt"})
    refused(tmp_path / "parent", re.escape(name), "stored as", kind="parent")


def with_tensor(source: Path, target: Path, name: str, change) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors[name])
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("value", [-1, 32, 2**40, -(2**63)])
@pytest.mark.parametrize("place", ["o_proj.input_indices", "q_proj.output_indices"])
def test_indices_out_of_range_are_refused(saved, tmp_path, place, value):
    name = f"model.vit.layers.0.attention.{place}"
    directory = with_tensor(saved / "scattered-module", tmp_path / "a", name, lambda index: index[-1:].fill_(value))
    refused(directory, re.escape(name), "expected increasing ones from 0 to 31")


def test_repeated_indices_are_refused(saved, tmp_path):
    name = "model.vit.layers.0.attention.q_proj.output_indices"
    directory = with_tensor(saved / "scattered-module", tmp_path / "a", name, lambda i: i[1].copy_(i[0]))
    refused(directory, re.escape(name), "increasing")


@pytest.mark.parametrize("value", [-1, 8, 2**40])
def test_angles_out_of_range_are_refused(saved, tmp_path, value):
    tensors = load_file(saved / "rotary-module" / "model.safetensors")
    name = next(name for name in tensors if name.endswith("angle_indices"))
    directory = with_tensor(saved / "rotary-module", tmp_path / "a", name, lambda index: index[0].fill_(value))
    refused(directory, re.escape(name), "expected ones from 0 to 7", model=NeMoForSequenceClassification)


@pytest.mark.parametrize("value", [float("nan"), -0.1, 1.5, float("inf")])
def test_mean_masks_that_are_no_shares_are_refused(saved, tmp_path, value):
    name = "masks.1.mean_mask"
    directory = with_tensor(saved / "rotary-parent", tmp_path / "a", name, lambda mean: mean[0, 0].fill_(value))
    refused(directory, re.escape(name), r"outside \[0, 1\]", kind="parent", model=NeMoForSequenceClassification)


def test_a_record_of_training_may_hold_what_sizes_may_not(saved):
    record = {"processes": 1, "arguments": {"max_steps": 10**12, "push_to_hub": False, "eps": 3}, "loss": float("nan")}
    for kind in LOADS:
        with changed(saved / kind, ("training",), record) as directory:
            load(directory)


def test_weights_that_are_no_numbers_load(saved, tmp_path):
    """They are a training that failed, not a damaged file."""
    directory = with_tensor(saved / "module", tmp_path / "a", NAME, lambda weight: weight.fill_(float("nan")))
    assert load(directory)[1].isnan().all()


@pytest.fixture
def sharded(saved, tmp_path) -> Path:
    NeMoForImageClassification.from_pretrained(saved / "parent").save_pretrained(
        tmp_path / "in" / "parent", max_shard_size="20KB"
    )
    return tmp_path / "in" / "parent"


NAMES = ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "x.bin", "..", "", ".safetensors", None, 3, ["x"]]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_shards_lie_beside_their_index(sharded, name):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    first = next(iter(index["weight_map"]))
    target = sharded.parent / "x.safetensors"
    shutil.copy(sharded / index["weight_map"][first], target)
    if name == "/x.safetensors":
        name = str(target)
    index["weight_map"][first] = name
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(sharded, "weight file", kind="parent")


@pytest.mark.parametrize("content", [b"{}", b"[]", b"{", b'{"weight_map": []}', b'{"weight_map": {}}', b"[" * 10**5])
def test_an_index_that_is_none_is_refused(sharded, content):
    (sharded / "model.safetensors.index.json").write_bytes(content)
    refused(sharded, "index", kind="parent")


def test_a_tensor_in_two_shards_is_refused(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    tensors = load_file(first)
    name = next(iter(tensors))
    save_file({**load_file(second), name: tensors[name]}, second, {"format": "pt"})
    refused(sharded, re.escape(name), "several weight files", kind="parent")


@pytest.mark.parametrize("subfolder", ["..", "../module", "a/../../module", "/"])
def test_subfolders_lie_inside(saved, subfolder):
    with pytest.raises(REFUSALS, match=r"^Got the path .*; expected one inside .*\. "):
        NeMoForImageClassification.from_pretrained(saved / "parent", subfolder=subfolder)


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@kinds
def test_nothing_is_unpickled(saved, tmp_path, kind):
    directory = shutil.copytree(saved / kind, tmp_path / "a")
    mark = tmp_path / "mark"
    for name in ("pytorch_model.bin", "training_args.bin", "model.pt", ".metadata", "adapter_model.bin"):
        (directory / name).write_bytes(pickle.dumps(Evil(mark)))
    (directory / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model.bin"}}')
    for options in (*LOADS[kind], *({"use_safetensors": choice} for choice in (None, False))):
        if kind == "parent" or "labels" not in options:
            load(directory, **options)
    (directory / "model.safetensors").unlink()
    for options in LOADS[kind]:
        with pytest.raises(OSError, match=r"without model\.safetensors"):
            load(directory, **options)
    (directory / "shard-00000-model-00001-of-00001.safetensors").write_bytes(b"")
    refused(directory, "distributed checkpoint", kind=kind)
    assert not mark.exists()


@kinds
def test_code_beside_a_model_is_not_run(saved, tmp_path, kind):
    directory = shutil.copytree(saved / kind, tmp_path / "a")
    mark = tmp_path / "mark"
    code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\nclass Own: pass\n"
    (directory / "evil.py").write_text(code)
    (directory / "custom_generate").mkdir()
    (directory / "custom_generate" / "generate.py").write_text(code)
    config = config_of(directory)
    own = {"AutoConfig": "evil.Own", "AutoModelForImageClassification": "evil.Own"}
    config["auto_map"] = config["base_config"]["auto_map"] = own
    (directory / "config.json").write_text(json.dumps(config))
    for options in LOADS[kind]:
        load(directory, **options)
        load(directory, AutoModelForImageClassification, **options)
    assert not mark.exists()


@kinds
def test_a_model_leads_to_no_other_one(saved, tmp_path, kind):
    directory = shutil.copytree(saved / kind, tmp_path / "a")
    (directory / "adapter_config.json").write_text('{"base_model_name_or_path": "stranger/model"}')
    refused(directory, "adapter_config", "from elsewhere", kind=kind)


# What hypothesis puts in place of a value.
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 7, 255, 10**5, 10**9, 2**31, 2**63, 10**30, -(10**12)]),
    st.sampled_from([0.0, -1.5, 1e300, float("nan"), float("inf"), -float("inf")]),
    st.sampled_from(["", "0", "vit", "bert", "../x", "ViTForImageClassification", "a" * 1000, "\x00", "\ud83d\ude00"]),
)
GARBAGE = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)


def places(value, path=()):
    """All places in nested JSON."""
    if path:
        yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def mutated(config: dict, path: tuple, value, is_deleted: bool) -> dict:
    config = json.loads(json.dumps(config))
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    if is_deleted:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return config


def loads_or_refuses(directory: Path, options: dict) -> None:
    """The property: a model that runs, or one of the promised errors."""
    try:
        load(directory, **options)
    except REFUSALS:
        return


FUZZING = settings(
    derandomize=True,
    database=None,
    deadline=None,  # `load` holds its own
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


@kinds
@FUZZING
@given(data=st.data())
def test_any_entry_of_a_configuration_may_be_garbage(saved, kind, data):
    config = config_of(saved / kind)
    path = data.draw(st.sampled_from(list(places(config))))
    config = mutated(config, path, data.draw(GARBAGE), data.draw(st.booleans()))
    options = data.draw(st.sampled_from(LOADS[kind]))
    with hostile(saved / kind, "config.json", json.dumps(config)) as directory:
        loads_or_refuses(directory, options)


@kinds
@FUZZING
@given(data=st.data())
def test_any_byte_of_a_header_may_be_garbage(saved, kind, data):
    content = bytearray((saved / kind / "model.safetensors").read_bytes())
    (size,) = struct.unpack("<Q", content[:8])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 7) | st.integers(8, 7 + size))
        content[place] = data.draw(st.integers(0, 255) | st.sampled_from(list(b'0123456789[]{}",:-')))
    options = data.draw(st.sampled_from(LOADS[kind]))
    with hostile(saved / kind, "model.safetensors", bytes(content)) as directory:
        loads_or_refuses(directory, options)


@kinds
@FUZZING
@given(data=st.data())
def test_any_entry_of_a_header_may_be_garbage(saved, kind, data):
    header, content = header_of(saved / kind / "model.safetensors")
    path = data.draw(st.sampled_from(list(places(header))))
    header = mutated(header, path, data.draw(GARBAGE), data.draw(st.booleans()))
    options = data.draw(st.sampled_from(LOADS[kind]))
    with hostile(saved / kind, "model.safetensors", with_header(header, content)) as directory:
        loads_or_refuses(directory, options)


@kinds
def test_the_untouched_files_load(saved, kind):
    """Without which all of the above would prove nothing."""
    for options in LOADS[kind]:
        first, second = (load(saved / kind, **options)[1] for _ in range(2))
        assert torch.equal(first, second)
        assert first.isfinite().all()
    assert AutoConfig.from_pretrained(saved / kind).model_type == "nemo_hf"
