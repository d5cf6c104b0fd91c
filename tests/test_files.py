"""Directories are written whole or not at all, weights are read by slice, and reports and processors come back."""

import json
from dataclasses import fields

import pytest
import torch
from safetensors.torch import save_file

from nemo_hf.evaluation.report import ModuleReport
from nemo_hf.models.atomic_writes import replaced_directory, write_json
from nemo_hf.models.attach import attach_masks
from nemo_hf.models.config_checks import MODULE_REPORT
from nemo_hf.models.files import read_companions, recorded_names
from nemo_hf.models.weight_files import WeightFiles
from nemo_hf.pruning.layer_cuts import PAD, TensorCut

TENSOR = torch.arange(24, dtype=torch.float32).view(4, 6) + 1


def contents(directory) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()}


def saved(directory, tensors=None) -> WeightFiles:
    save_file(tensors or {"weight": TENSOR, "bias": TENSOR[:, 0].clone()}, directory / "model.safetensors")
    return WeightFiles(directory, {})


def test_a_new_directory_appears_at_once(tmp_path):
    (tmp_path / "plain").mkdir()
    with replaced_directory(tmp_path / "deep" / "out") as temporary:
        (temporary / "a").write_text("1")
        assert not (tmp_path / "deep" / "out").exists()
    assert contents(tmp_path / "deep" / "out") == {"a": "1"}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert (tmp_path / "deep" / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("spoiled", [{"report": {"accuracy": {1, 2}}}, {"processor_files": {"no/folder.json": b""}}])
@pytest.mark.parametrize("exists", [True, False])
def test_a_save_that_fails_leaves_the_directory_as_it_was(tmp_path, vit, spoiled, exists):
    parent = attach_masks(vit)
    if exists:
        parent.save_pretrained(tmp_path / "out")
    before = {path: path.read_bytes() for path in tmp_path.glob("out/*")}
    torch.nn.init.zeros_(vit.classifier.weight)
    for name, value in spoiled.items():
        setattr(parent, name, value)
    with pytest.raises(ValueError, match=r"^Got a model that could not be loaded again: .*; expected what"):
        parent.save_pretrained(tmp_path / "out")
    assert before == {path: path.read_bytes() for path in tmp_path.glob("out/*")}
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if exists else [])


def test_a_file_is_no_place_to_save(tmp_path, vit):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(NotADirectoryError, match="out', which is a file; expected a directory"):
        attach_masks(vit).save_pretrained(tmp_path / "out")
    assert contents(tmp_path) == {"out": "mine"}


@pytest.mark.parametrize(
    ("rows", "columns"),
    [([0, 2], None), (None, [5, 1]), ([3, 0], [0, 4, 5]), ([], None), (None, []), ([1], [])],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_slices_are_those_of_the_whole_tensor(tmp_path, rows, columns, dtype):
    cut = {d: torch.tensor(index, dtype=torch.long) for d, index in ((0, rows), (1, columns)) if index is not None}
    expected = TENSOR.to(dtype)
    for dim, index in cut.items():
        expected = expected.index_select(dim, index)
    got = saved(tmp_path, {"weight": TENSOR.to(dtype)}).read("weight", TensorCut(cut))
    assert torch.equal(got, expected)
    assert got.dtype == dtype
    assert got.is_contiguous()


def test_padding_scales_whole_tensors_and_constants(tmp_path):
    weights = saved(tmp_path)
    cut = TensorCut({0: torch.tensor([2, PAD, 0])}, {0: torch.tensor([0.5, 7.0, 2.0])})
    expected = torch.stack([TENSOR[2] * 0.5, torch.zeros(6), TENSOR[0] * 2])
    assert torch.equal(weights.read("weight", cut), expected)
    assert torch.equal(weights.read("bias", TensorCut({0: torch.tensor([3, 1])})), TENSOR[[3, 1], 0])
    assert torch.equal(weights.read("weight"), TENSOR)
    assert torch.equal(weights.read("indices", TensorCut(constant=torch.tensor([4]))), torch.tensor([4]))


def test_sharded_weights_are_read_as_one(tmp_path):
    save_file({"weight": TENSOR}, tmp_path / "one.safetensors")
    save_file({"bias": TENSOR[0].clone()}, tmp_path / "two.safetensors")
    index = {"metadata": {}, "weight_map": {"weight": "one.safetensors", "bias": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    weights = WeightFiles(tmp_path, {})
    assert torch.equal(weights.read("weight"), TENSOR)
    assert torch.equal(weights.read("bias"), TENSOR[0])
    save_file({"bias": TENSOR[0].clone(), "weight": TENSOR}, tmp_path / "two.safetensors")
    with pytest.raises(OSError, match=r"^Got the tensor 'weight' in several weight files of .*; expected each in one"):
        WeightFiles(tmp_path, {})
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(OSError, match=r"^Got .* without two.safetensors; expected all files that save_pretrained"):
        WeightFiles(tmp_path, {})


@pytest.mark.parametrize(("first", "second"), [("20KB", "1GB"), ("1GB", "20KB"), ("20KB", "40KB")])
def test_weights_saved_before_are_not_read_again(tmp_path, vit, first, second):
    parent = attach_masks(vit)
    parent.save_pretrained(tmp_path, max_shard_size=first)
    torch.nn.init.constant_(parent.model.classifier.bias, 7.0)
    parent.save_pretrained(tmp_path, max_shard_size=second)
    assert torch.equal(WeightFiles(tmp_path, {}).read("model.classifier.bias"), torch.full((5,), 7.0))
    loaded = type(parent).from_pretrained(tmp_path)
    assert torch.equal(loaded.model.classifier.bias.detach(), torch.full((5,), 7.0))


def test_a_processor_s_files_are_read_by_the_names_that_are_recorded(tmp_path):
    files = {"dict.txt": b"a", "spm_char.model": b"b", "entity_vocab.json": b"{}"}
    for name, content in {**files, "vocab.txt": b"c"}.items():
        (tmp_path / name).write_bytes(content)
    names = recorded_names(files)
    assert names == sorted(files)
    assert read_companions(tmp_path, {}, names) == (files, None)
    assert read_companions(tmp_path, {}, [*names, "bpe.codes"]) == (files, None)
    assert read_companions(tmp_path, {}) == ({"vocab.txt": b"c"}, None)
    assert read_companions(tmp_path, {}, []) == ({}, None)
    assert recorded_names({"tokenization_own.py": b"", "vocab.txt": b"", "model.safetensors": b""}) == ["vocab.txt"]
    assert recorded_names({}) is None


TIMES = {"1": 1.0}
REPORT = {
    "labels": ["cat"],
    "groups": ["cat"],
    **dict.fromkeys(("accuracy", "parent_restricted_accuracy", "megabytes", "parent_megabytes"), 0.5),
    **dict.fromkeys(("neuron_retention_rate", "weight_retention_rate", "threshold"), 0.5),
    **dict.fromkeys(("samples", "parameters", "parent_parameters", "macs", "parent_macs", "seed"), 4),
    "latency_ms": TIMES,
    "parent_latency_ms": TIMES,
    "controls": {"empty": 0.5, "other": None},
    "device": "cpu",
    "input_shape": [3, 8, 8],
    "rejection": {"auroc": None},
}
FORMATS = {"device": "cpu", "threads": 2, "latency_ms": {"plain": TIMES}}


def test_the_fields_of_a_report_are_those_of_the_class():
    needed = {name for name, kind in MODULE_REPORT.items() if not str(kind).endswith("| None")}
    assert needed == set(REPORT)
    assert needed <= {field.name for field in fields(ModuleReport)} <= set(MODULE_REPORT)


@pytest.mark.parametrize(
    "report",
    [REPORT, {**REPORT, "formats": FORMATS}, {**REPORT, "latency_ms": {}, "latency_note": "busy"}, {"metrics": {}},
     {"metrics": {"eval_loss": float("nan")}}],
)  # fmt: skip
def test_right_reports_are_read(tmp_path, report, caplog):
    write_json(tmp_path / "report.json", report)
    assert json.dumps(read_companions(tmp_path, {})[1]) == json.dumps(report)
    assert not caplog.records


WRONG_REPORTS = [
    *({}, {"accuracy": 1.0}, {"metrics": 3}, {"metrics": {"a |\n\n# BUY": 1}}, {"metrics": {"a": 10**400}}),
    *({name: value for name, value in REPORT.items() if name != gone} for gone in REPORT),
    *({**REPORT, name: wrong} for name in REPORT for wrong in ("# BUY\n", [[3]], None)),
    *({**REPORT, "formats": wrong} for wrong in (3, {"device": "cpu"}, {**FORMATS, "latency_ms": {"plain": [1]}})),
    *({**REPORT, "macs": 10**400}, {**REPORT, "latency_note": "a\nb"}),
]


def test_other_reports_are_left_out_with_a_warning(tmp_path, caplog):
    for report in WRONG_REPORTS:
        caplog.clear()
        write_json(tmp_path / "report.json", report)
        assert read_companions(tmp_path, {}) == ({}, None), report
        assert "not the report of a parent or module" in caplog.text
