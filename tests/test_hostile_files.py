"""Files that are damaged or a stranger's: loading ends in a model that runs or in a clear error, and soon."""

import json
import pickle
import re
import resource
import shutil
import struct
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from conftest import fresh, generated, randomize_relevance, rewrite_weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from nemo_hf import NeMoForImageClassification, NeMoForSequenceClassification, NeMoModelConfig
from nemo_hf.models.attach import attach_masks
from nemo_hf.models.weight_files import WeightFiles
from nemo_hf.neurons.sites import with_pruning_modes
from nemo_hf.neurons.trial_inputs import random_inputs

REFUSALS = (OSError, ValueError)  # UnsupportedArchitectureError is a ValueError
SECONDS = 10  # a refusal takes some hundredths; other programs may run beside
LOADS = {"module": ({},), "parent": ({}, {"labels": ["cat", "dog"]})}
kinds = pytest.mark.parametrize("kind", list(LOADS))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A tiny parent and its module, and a scattered and a rotary pair.

    At a given rank of generators the masks of one layer fit another.
    """
    root = tmp_path_factory.mktemp("saved")
    for name, family in (("", "vit"), ("scattered-", "vit"), ("rotary-", "llama")):
        parent = attach_masks(fresh(family), generated(hard_masks=name != "rotary-", generator_rank=4)).eval()
        if name == "scattered-":
            parent.set_sites(with_pruning_modes(parent.sites, {site.key: "scatter" for site in parent.sites}))
        randomize_relevance(parent)
        parent.report = {"metrics": {}}
        parent.save_pretrained(root / f"{name}parent")
        parent.extract_module(["cat", "dog"]).save_pretrained(root / f"{name}module")
    fresh("vit").save_pretrained(root / "plain")
    return root


def config_of(source: Path) -> dict:
    return json.loads((source / "config.json").read_text())


def with_entry(config: dict, keys: tuple, value) -> dict:
    """A copy of nested JSON with another value in one place."""
    config = json.loads(json.dumps(config))
    inner = config
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return config


def damaged(source: Path, target: Path, file: str, content) -> Path:
    """A copy of a directory with another content of one file."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    content = json.dumps(content) if isinstance(content, dict) else content
    (target / file).write_bytes(content.encode() if isinstance(content, str) else content)
    return target


def changed(source: Path, target: Path, field: str, value) -> Path:
    """A copy of a directory with another value in one field of its configuration."""
    keys = tuple(int(key) if key.isdigit() else key for key in field.split("."))
    return damaged(source, target, "config.json", with_entry(config_of(source), keys, value))


def load(directory, model=NeMoForImageClassification, **options):
    """Loads and runs a model, in bounded time, and returns its logits."""
    start = time.monotonic()
    try:
        loaded = model.from_pretrained(directory, **options)
        with torch.no_grad():
            logits = loaded(**random_inputs(loaded)).logits
        assert logits.shape == (4, loaded.config.num_labels)
        return logits
    finally:
        assert time.monotonic() - start < SECONDS


def refused(directory, *parts: str, kind: str = "module", model=NeMoForImageClassification) -> None:
    """Checks that loading, whole or in part, ends in our kind of message, which names what is wrong."""
    for options in LOADS[kind]:
        with pytest.raises(REFUSALS, match=r"^Got [\s\S]*; expected [\s\S]*\. ") as error:
            load(directory, model, **options)
        for part in parts:
            assert re.search(part, str(error.value)), error.value


@kinds
def test_the_untouched_files_load(saved, kind):
    """Without which the tests below would prove nothing."""
    for options in LOADS[kind]:
        first, second = (load(saved / kind, **options) for _ in range(2))
        assert torch.equal(first, second)
        assert first.isfinite().all()


# Configurations, as dictionaries

CHECK = {"status": "verified", "difference": 1e-7, "tolerance": 1e-5, "effect": 0.5, "samples": 4}
RUN = {"arguments": {"seed": 1, "lr_scheduler_kwargs": {"num_cycles": 2}}, "processes": 1, "samples": None}
FIT = {"weight": 1.0, "bias": 0, "threshold": 0.5}
NAN, INF = float("nan"), float("inf")
WRONG = {
    "base_config": (3, [], "x"),
    "base_config.model_type": (3, None, ["vit"], {}),
    "base_config.hidden_size": ("32", None, NAN, 2**49),
    "base_config.num_hidden_layers": ("2", [2], NAN, 10**9),
    "base_config.num_labels": (10**9,),
    "base_config.hidden_act": (3, None),
    "base_config.layer_norm_eps": (NAN, INF, -1.0, "small"),
    "base_config.id2label": ([1], {"x": "y"}),
    "base_config.dtype": ("int8", 3, {"a": 1}),
    "base_config.chunk_size_feed_forward": ("0", None, True),
    "base_config.image_size": (-16, [16, -16], 0),
    "base_config.return_dict": (3, "yes"),
    "base_config.to_dict": (3,),
    "base_config.__dict__": ({},),
    "base_class": (3, None, []),
    "parent": (3, ["me/parent"]),
    "is_tuned": (1, "yes", None),
    "token_rows": ("40", -1, 1.5),
    "training": (
        *(3, {"processes": 1}, {**RUN, "arguments": 3}, {**RUN, "arguments": {"a=1); b(": 1}}),
        *({**RUN, "arguments": {"seed": wrong}} for wrong in ("1\n\n# BUY", {"a\n": 1}, 10**400, "x" * 10**5)),
        *({**RUN, "processes": True}, {**RUN, "samples": 10**400}, {**RUN, "base_model": "a\nb"}),
        *({**RUN, "command": ["x"]}, {**RUN, "datasets": [3]}, {**RUN, "versions": {"torch": 3}}),
    ),
    "processor_files": (
        *(3, "vocab.txt", [3], [""], ["vocab.txt", "VOCAB.TXT"], ["../vocab.txt"], ["a/b.txt"], ["/etc/passwd"]),
        *(["a\\b.txt"], [".."], [".hidden"], ["a\nb"], ["n" * 101], ["Config.JSON"], ["report.json"], ["README.md"]),
        *(["adapter_config.json"], ["code.py"], ["model.safetensors"], ["pytorch_model.bin"], ["a.pkl"]),
        [f"file{index}" for index in range(33)],
    ),
    "round_to": ("8", -1, 0, 2.5, True),
    "role": (3, None, "both", ["parent"]),
    "nemo_config": (3, [], {"temperature": NAN}),
    "nemo_config.targets": ([{}, "ffn"], [["ffn"]], "ffn", ["x" * 10**5]),
    "label_groups": (3, [3], [{}], [{"name": "a", "labels": []}], [{"name": 3, "labels": [0]}],
                     [{"name": "a", "labels": [0]}, {"name": "a", "labels": [1]}],
                     [{"name": "a", "labels": [0, 1]}, {"name": "b", "labels": [1, 2]}]),
    "label_ids": (3, [], [0, 0], [-1, 0], ["cat", "dog"], [True, False]),
    "unseen_labels": (3, [], [0, 0], [-1], ["cat"], [True]),
    "id2label": (3, {"0": None}, {"1": "a", "2": "b"}, {"a": "b"}),
    "label2id": (3, {"a": "b"}),
    "num_labels": (10**9,),
    "sites": (3, [3], [{}], {"key": 1}, [{"key": "a:ffn"}], [{"key": "a:ffn", "pruning_mode": 3}]),
    "equivalence": (
        *(3, [], {"difference": [1]}, {"status": "x"}, {"status": "verified"}, {**CHECK, "status": "fine"}),
        *({**CHECK, "status": "verified |\n\n# BUY"}, {**CHECK, "difference": "1"}, {**CHECK, "effect": INF}),
        *({**CHECK, "source": "# BUY"}, {**CHECK, "samples": True}, {**CHECK, "note": "a\n# BUY"}),
    ),
    "rejection": (3, {"weight": 1.0}, {**FIT, "weight": "1"}, {**FIT, "bias": NAN}, {**FIT, "bias": True}),
    "relevance_source": (3, None, "guessed"),
    "relevance_threshold": ("x", 3, -1, NAN, True),
    "retained_neurons": (2, INF),
    "problem_type": (3, "regression", "x"),
    "dtype": ("int8", 3, "float8_e4m3fn"),
    "model_type": (3, None),
    "attn_implementation": ("stranger/kernel",),
    "_attn_implementation_internal": ("stranger/kernel",),
    "quantization_config": ({"quant_method": "bitsandbytes"},),
    "transformers_weights": ("../other.safetensors",),
    "get_text_config": (3,),
}  # fmt: skip


@pytest.mark.parametrize("field", list(WRONG))
def test_values_of_wrong_types_or_ranges_are_refused_and_named(saved, field):
    for kind in LOADS:
        config = config_of(saved / kind)
        for value in WRONG[field]:
            with pytest.raises(ValueError, match=r"^Got [\s\S]*; expected [\s\S]*\. ") as error:
                NeMoModelConfig.from_dict(with_entry(config, tuple(field.split(".")), value))
            is_named = field.split(".")[-1] in str(error.value) or "'dict' object" in str(error.value)
            assert is_named or field == "base_config.id2label", error.value
            assert len(str(error.value)) < 1000


RIGHT = {
    "equivalence": ({**CHECK, "source": "parent"}, None),
    "training": ({}, {**RUN, "arguments": {"max_steps": 10**12, "push_to_hub": False, "max_grad_norm": INF}}),
    "rejection": ({**FIT, "accepted": 0.95, "rejected": 0.4},),
    "processor_files": (["vocab.txt", "spm_char.model"], [], None),
    "relevance_threshold": (1, 0.25),
}


def test_right_records_are_read_and_wrong_ones_not_set(saved):
    for field, values in RIGHT.items():
        for value in values:
            config = NeMoModelConfig.from_dict(with_entry(config_of(saved / "module"), (field,), value))
            assert getattr(config, field) == value
    with pytest.raises(Exception, match="label_ids"):
        config.label_ids = [1, 1]


NONE = (b"", b"[]", b"3", b"{", b"\xff\xfe", b"{}", b'{"role": 1e999}', b"[" * 99, b"[" * 10**5)


@pytest.mark.parametrize("content", [*NONE, 25, 900], ids=lambda content: repr(content)[:20])
def test_a_configuration_that_is_none_or_nested_deep_is_refused(saved, tmp_path, content):
    if isinstance(content, int):
        content = json.dumps(config_of(saved / "module"))[:-1] + ',"deep":' + "[" * content + "]" * content + "}"
    refused(damaged(saved / "module", tmp_path / "a", "config.json", content))


def test_text_that_can_not_be_written_again_is_refused(saved, tmp_path):
    refused(changed(saved / "module", tmp_path / "a", "id2label", {"0": "\ud800", "1": "dog"}), "half a character")
    path = tmp_path / "b" / "report.json"
    damaged(saved / "module", path.parent, path.name, {"metrics": {"\udfff": 1}})
    refused(path.parent, "half a character")


# Configurations that fit no model

WRONG_MODELS = [
    *(("base_config.hidden_size", value) for value in (-4, 0, 31)),
    ("base_config.num_attention_heads", 5),
    *(("base_config.num_hidden_layers", -1), ("base_config.patch_size", 0), ("base_config.hidden_act", "evil")),
    *(("base_config.id2label", {}), ("id2label", {}), ("label_groups", []), ("model_type", "vit")),
    *(("base_class", value) for value in ("ViTModel", "BertForSequenceClassification")),
    *(("nemo_config", value) for value in ({"targets": 3}, {"sites": [3]}, {"sites": 3})),
]


@kinds
@pytest.mark.parametrize(("field", "value"), WRONG_MODELS, ids=str)
def test_configurations_that_build_no_model_are_refused(saved, tmp_path, kind, field, value):
    with pytest.raises(REFUSALS):
        load(changed(saved / kind, tmp_path / "a", field, value), **LOADS[kind][-1])


WIDTHS = [*({"intermediate": width} for width in (10**12, 49, -1, "3", True, None)), {}, {"head_dim": 3}, None]
GROUPS = ([[0, 1], [2, 3]], [[0, 1, 2, 3, 4, 5]], [[0, 1], [2, 3, 4]])
BOTH = [
    ("sites", [], r"with the sites \[\]; expected some of .'vit.layers.0"),
    ("sites.0.key", "os.system:attention", r"with the sites \['os\.system:attention', 'vit"),
    ("sites.0.pruning_mode", "warp", "the pruning mode 'warp' for 'vit.layers.0.attention.*'dense'.*config.json"),
    ("base_class", "ViTForEverything", "the model class 'ViTForEverything'.*run before: AutoConfig.register"),
    ("nemo_config.beta", 1, r"unknown options \['beta'\].*temperature.*update nemo-hf"),
]
NOT_OF_THE_WEIGHTS = [
    *((kind, *row) for kind in LOADS for row in BOTH),
    *(("module", "label_ids", value, "label") for value in ([0, 5], [0], [0, 2], None)),
    *(("module", "sites.1.widths", value, "width.*'vit.layers.0.mlp:ffn'") for value in WIDTHS),
    ("module", "sites.1.widths", {"intermediate": 2}, r"'model.vit.layers.0.mlp.fc1\.\w+' of shape .*\(2,"),
    ("module", "sites", slice(-1), "'model.vit.layers.1.mlp.fc1"),
    *(("parent", "sites", slice(*ends), r"masks\.\d") for ends in ((1, None), (0, 3))),
    *(("parent", "label_groups", [{"name": str(i), "labels": ids} for i, ids in enumerate(groups)], "group|relevance")
      for groups in GROUPS),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "field", "value", "words"), NOT_OF_THE_WEIGHTS, ids=str)
def test_what_does_not_belong_to_the_weights_is_named(saved, tmp_path, kind, field, value, words):
    if isinstance(value, slice):  # of the list that is there
        value = config_of(saved / kind)[field][value]
    refused(changed(saved / kind, tmp_path / "a", field, value), words, kind=kind)


def test_other_models_than_asked_for_are_refused(saved):
    for options in LOADS["parent"]:
        with pytest.raises(ValueError, match=rf"^Got '{saved}/plain'.*expected .*parent.*NeMoTrainer"):
            NeMoForImageClassification.from_pretrained(saved / "plain", **options)
        with pytest.raises((TypeError, ValueError), match=r"^Got a ViTForImageClassification.*expected .*image"):
            NeMoForSequenceClassification.from_pretrained(saved / "parent", **options)
        with pytest.raises(OSError, match="nowhere"):
            NeMoForImageClassification.from_pretrained(saved / "nowhere", **options)
    with pytest.raises(ValueError, match=r"which is a module; expected a parent.* Load it without labels="):
        NeMoForImageClassification.from_pretrained(saved / "module", labels=["cat"])


@contextmanager
def limited_memory(more: int):
    """Lets this process take at most so many bytes more than it has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


ABSURD = [
    *((kind, f"base_config.{name}", 10**9) for kind in LOADS for name in ("hidden_size", "image_size", "num_channels")),
    ("module", "base_config.num_hidden_layers", 99_999),
    ("module", "label_ids", [0, 10**12]),
    ("parent", "base_config.intermediate_size", 10**9),
    ("parent", "nemo_config.generator_rank", 10**12),
]


@pytest.mark.parametrize(("kind", "field", "value"), ABSURD, ids=str)
def test_absurd_sizes_take_neither_memory_nor_time(saved, tmp_path, kind, field, value):
    directory = changed(saved / kind, tmp_path / "a", field, value)
    with limited_memory(2**30):
        refused(directory, kind="module" if "rank" in field else kind)  # a cut has no generators
    if value == 99_999:  # the bound on layers was for that build alone
        torch.nn.ModuleList(torch.nn.Identity() for _ in range(12_000))


# Other files


@pytest.mark.parametrize(("name", "size"), [("config.json", 2**25), ("report.json", 2**25), ("tokenizer.json", 2**30)])
def test_files_of_absurd_size_are_not_read(saved, tmp_path, name, size):
    directory = damaged(saved / "module", tmp_path / "a", name, b"")
    with (directory / name).open("wb") as file:
        file.truncate(size)  # takes no room on the disk
    with pytest.raises(OSError, match=rf"^Got .*{name}.* {size} bytes.*; expected "):
        NeMoForImageClassification.from_pretrained(directory)


def test_subfolders_lie_inside(saved):
    load(saved, subfolder="parent")
    for subfolder in ("..", "../module", "a/../../module", "/"):
        with pytest.raises(REFUSALS, match=r"^Got the path .*; expected one inside .*\. "):
            NeMoForImageClassification.from_pretrained(saved / "parent", subfolder=subfolder)


class Evil(str):
    """A path at which a file appears when this is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path(str(self)),)


@kinds
def test_nothing_is_unpickled_and_code_beside_a_model_is_not_run(saved, tmp_path, kind):
    directory, mark = shutil.copytree(saved / kind, tmp_path / "a"), tmp_path / "mark"
    code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\nclass Own: pass\n"
    (directory / "custom_generate").mkdir()
    for name in ("evil.py", "custom_generate/generate.py"):
        (directory / name).write_text(code)
    config = config_of(directory)
    names = dict.fromkeys(("AutoConfig", "AutoModelForImageClassification"), "evil.Own")
    config["auto_map"] = config["base_config"]["auto_map"] = names
    (directory / "config.json").write_text(json.dumps(config))
    for name in ("pytorch_model.bin", "training_args.bin", "model.pt", ".metadata", "adapter_model.bin"):
        (directory / name).write_bytes(pickle.dumps(Evil(mark)))
    (directory / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model.bin"}}')
    for options in (*LOADS[kind], {"use_safetensors": False}):
        load(directory, **options)
        load(directory, AutoModelForImageClassification, **options)
    (directory / "model.safetensors").unlink()
    for options in LOADS[kind]:
        with pytest.raises(OSError, match=r"without model\.safetensors"):
            load(directory, **options)
    (directory / "shard-00000-model-00001-of-00001.safetensors").write_bytes(b"")
    refused(directory, "distributed checkpoint", kind=kind)
    (directory / "adapter_config.json").write_text('{"base_model_name_or_path": "stranger/model"}')
    refused(directory, "adapter_config", "from elsewhere", kind=kind)
    assert not mark.exists()


# Weights


NAME = "model.vit.layernorm.weight"


def with_tensor(source: Path, target: Path, end: str, change) -> tuple[Path, str]:
    """A copy of a directory with what `change` makes of the first tensor whose name ends so, and that name."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith(end))
    new = change(tensors.pop(name))
    tensors |= {} if new is None else {name: new.contiguous()}
    rewrite_weights(target / "model.safetensors", tensors)
    return target, name


def ending_in(value):
    return lambda tensor: torch.cat([tensor[:-1], tensor[-2:-1] if value == "repeat" else tensor[-1:].fill_(value)])


RESHAPED = (
    lambda tensor: tensor[:1],  # one row
    lambda tensor: torch.cat([tensor, tensor]),  # more rows
    lambda tensor: torch.cat([tensor, tensor], -1),  # wider
    lambda tensor: tensor[..., None],  # deeper
)
UNITS = "model.vit.layers.0.mlp.fc1.weight"
TENSORS = [
    *(("parent", name, lambda tensor: None, "1 missing tensors, such as") for name in (UNITS, "0.relevance")),
    *(("parent", name, change, "Got the tensor .*ave or d") for name in (UNITS, "0.relevance") for change in RESHAPED),
    *((kind, NAME, torch.Tensor.int, "stored as") for kind in LOADS),
    ("module", NAME, lambda tensor: tensor.to(torch.float8_e4m3fn), "stored as"),
    ("parent", "masks.0.relevance", torch.Tensor.char, "stored as"),
    *(("scattered-module", "o_proj.input_indices", ending_in(value), "increasing ones from 0 to 31")
      for value in (-1, 32, 2**40, "repeat")),
    *(("rotary-module", "angle_indices", ending_in(value), "ones from 0 to 7") for value in (-1, 8)),
    *(("rotary-parent", "1.mean_mask", ending_in(value), r"outside \[0, 1\]") for value in (NAN, -0.1, 1.5)),
]  # fmt: skip


@pytest.mark.parametrize(("source", "end", "change", "words"), TENSORS)
def test_a_tensor_that_is_missing_or_has_another_shape_dtype_or_range_is_named(
    saved, tmp_path, source, end, change, words
):
    directory, name = with_tensor(saved / source, tmp_path / "a", end, change)
    model = NeMoForSequenceClassification if "rotary" in source else NeMoForImageClassification
    refused(directory, re.escape(name), words, kind=source.split("-")[-1], model=model)


@kinds
def test_unexpected_tensors_and_truncated_weights_are_named(saved, tmp_path, kind):
    path = saved / kind / "model.safetensors"
    rewrite_weights(path, {**load_file(path), "extra": torch.zeros(1)}, tmp_path / "extra")
    content = (tmp_path / "extra").read_bytes()
    directory = damaged(saved / kind, tmp_path / "a", "model.safetensors", content)
    refused(directory, "1 unexpected tensors, such as 'extra'; expected exactly those", kind=kind)
    for length in (0, 100, -100):
        directory = damaged(saved / kind, tmp_path / "a", "model.safetensors", path.read_bytes()[:length])
        refused(directory, f"{directory}.*safetensors", kind=kind)


def test_weights_that_are_no_numbers_load(saved, tmp_path):
    """They are a training that failed, not a damaged file."""
    directory, _ = with_tensor(saved / "module", tmp_path / "a", NAME, lambda weight: weight.fill_(NAN))
    assert load(directory).isnan().all()


def test_shards_lie_beside_their_index(saved, tmp_path):
    sharded = tmp_path / "in" / "parent"
    NeMoForImageClassification.from_pretrained(saved / "parent").save_pretrained(sharded, max_shard_size="20KB")
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = next(iter(index["weight_map"]))
    shutil.copy(sharded / index["weight_map"][first], sharded.parent / "x.safetensors")
    absolute = str(sharded.parent / "x.safetensors")
    for name in ("../x.safetensors", absolute, "a/x.safetensors", "x.bin", "..", ".safetensors", None, ["x"]):
        path.write_text(json.dumps(with_entry(index, ("weight_map", first), name)))
        with pytest.raises(OSError, match=r"^Got .* with the weight file .*; expected "):
            WeightFiles(sharded, {})
    shards = {"weight_map": {"a": index["weight_map"][first]}}
    about = [json.dumps({**shards, **wrong}).encode() for wrong in ({}, {"metadata": None}, {"metadata": [3]})]
    for content in (b"{", b'{"weight_map": []}', b'{"weight_map": {}}', b"[" * 10**5, *about):
        path.write_bytes(content)
        with pytest.raises(OSError, match=r"^Got .*index.*; expected "):
            WeightFiles(sharded, {})


# What hypothesis puts in place of a value

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 7, 255, 10**5, 10**9, 2**31, 2**63, 10**30, -(10**12)]),
    st.sampled_from([0.0, -1.5, 1e300, NAN, INF, -INF]),
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


SUPPRESSED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
FUZZING = {"derandomize": True, "database": None, "deadline": None, "suppress_health_check": SUPPRESSED}


@kinds
@settings(max_examples=25, **FUZZING)  # fuzz_saved_files.py tries thousands
@given(data=st.data())
def test_garbage_in_a_configuration_or_header_is_loaded_or_refused(saved, tmp_path, kind, data):
    def mutated(config):
        return json.dumps(with_entry(config, data.draw(st.sampled_from(list(places(config)))), data.draw(GARBAGE)))

    if data.draw(st.booleans()):
        file, content = "config.json", mutated(config_of(saved / kind))
    else:
        file, content = "model.safetensors", (saved / kind / "model.safetensors").read_bytes()
        end = 8 + struct.unpack("<Q", content[:8])[0]
        header = mutated(json.loads(content[8:end])).encode()
        content = struct.pack("<Q", len(header)) + header + content[end:]
    with suppress(*REFUSALS):
        load(damaged(saved / kind, tmp_path / "a", file, content), **data.draw(st.sampled_from(LOADS[kind])))
