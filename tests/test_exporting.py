"""Modules outside the library: plain models, ONNX files and compiled modules give the same logits."""

import copy
import json
from functools import cache
from operator import attrgetter
from pathlib import Path
from unittest.mock import Mock

import onnx
import pytest
import torch
from conftest import fresh, generated, image_processor, image_samples, randomize_relevance, tokenizer
from torch.utils.data import DataLoader

from nemo_hf import UnsupportedArchitectureError, calibrate_rejection
from nemo_hf.evaluation import latency
from nemo_hf.export.onnx import OnnxRunner
from nemo_hf.export.plain_model import compare_latency
from nemo_hf.models.attach import attach_masks
from nemo_hf.models.base import base_parameters
from nemo_hf.neurons.sites import with_pruning_modes
from nemo_hf.neurons.trial_inputs import random_inputs


@cache
def built_parent(family, hard_masks=True):
    parent = attach_masks(fresh(family), generated(relevance_threshold=0.6, hard_masks=hard_masks)).eval()
    randomize_relevance(parent)
    return parent


def cut_module(family, pruning_mode=None, empty_head=False, hard_masks=True):
    parent = copy.deepcopy(built_parent(family, hard_masks))
    if pruning_mode is not None:
        chosen = {s.key: pruning_mode for s in parent.sites if pruning_mode in {mode.name for mode in s.pruning_modes}}
        assert chosen
        parent.set_sites(with_pruning_modes(parent.sites, chosen))
    for mask in parent.masks.site_masks() if empty_head else ():
        if mask.site.kind == "attention":
            mask.relevance[:, mask.site.parts["query_key"] :][:, : mask.site.head_dim] = 0
    return parent.extract_module(["ship", "dog"])


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


def assert_plain(module, directory):
    """Saves, loads and compares a plain model; returns the widths that changed."""
    export = module.save_plain(directory)
    plain = module.config.plain_class.from_pretrained(directory)
    inputs = random_inputs(module)
    assert torch.allclose(logits(plain, inputs), logits(module, inputs), atol=1e-5)
    assert plain.config.id2label == {0: "ship", 1: "dog"}
    assert plain.config.num_labels == 2
    assert export.parameters == plain.num_parameters()
    assert export.module_parameters == base_parameters(module) <= export.parameters <= export.full_parameters
    assert all(attrgetter(name)(plain.config) == value for name, value in export.changes.items())
    return export.changes


@pytest.mark.parametrize(
    ("family", "options", "widths", "heads"),
    [
        ("vit", {"hard_masks": False}, {"intermediate_size", "head_dim"}, {}),
        ("vit", {"pruning_mode": "dense-heads-kept"}, {"intermediate_size", "head_dim"}, {}),
        ("vit", {"empty_head": True}, {"intermediate_size", "head_dim"}, {"num_attention_heads": 3}),
        ("bert", {"empty_head": True}, {"intermediate_size"}, {}),
        ("gpt2", {"pruning_mode": "scatter"}, {"n_inner"}, {}),
        ("llama", {"pruning_mode": "scatter"}, {"intermediate_size"}, {}),
        ("llama", {"empty_head": True}, {"intermediate_size"}, {"num_attention_heads": 2, "num_key_value_heads": 1}),
        ("swin", {}, set(), {}),
    ],
)
def test_plain_models_give_the_modules_logits_at_smaller_widths(family, options, widths, heads, tmp_path):
    module = cut_module(family, **options)
    changes = assert_plain(module, tmp_path)
    assert set(changes) - set(heads) == widths
    assert {name: value for name, value in changes.items() if name in heads} == heads
    if "intermediate_size" in changes:
        parent = built_parent(family, options.get("hard_masks", True))
        masks = [mask for mask in parent.masks.site_masks() if mask.site.kind == "ffn"]
        used = [(mask.relevance[[1, 3]].amax(0) >= 0.6 * 255).sum() for mask in masks]
        assert changes["intermediate_size"] == max(used)


def test_the_rescaled_softmax_is_folded_back(tmp_path):
    """A layer that computes its scale from its own width, so that the cut put the difference into q."""
    module = cut_module("vit")
    for layer in (layer for layer in module.model.modules() if hasattr(layer, "scaling")):
        assert layer.head_dim < 8
        for parameter in layer.q_proj.parameters():
            parameter.data *= (layer.head_dim / 8) ** 0.5
        layer.scaling = layer.head_dim**-0.5
    rescaled = {site.key: "dense-rescaled" for site in module.sites if site.kind == "attention"}
    module.sites = with_pruning_modes(module.sites, rescaled)
    assert_plain(module, tmp_path)


def test_plain_files_have_the_modules_dtype_and_processor(tmp_path):
    module = cut_module("bert").to(torch.bfloat16)
    module.attach_processor(tokenizer())
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")  # of an older save
    module.save_plain(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors", *module.processor_files}
    plain = module.config.plain_class.from_pretrained(tmp_path, dtype="auto")
    assert plain.dtype == torch.bfloat16
    inputs = random_inputs(module)
    assert torch.allclose(logits(plain.float(), inputs), logits(module.float(), inputs), atol=1e-5)


def test_what_can_not_be_plain_is_refused_and_not_written(tmp_path, monkeypatch):
    module = cut_module("vit")
    for export in (built_parent("vit").save_plain, built_parent("vit").export_onnx):
        with pytest.raises(ValueError, match=r"Got a parent; expected a module"):
            export(tmp_path / "out")
    module.model.vit.layernorm.register_forward_hook(lambda layer, inputs, output: output * 1.5)
    with pytest.raises(UnsupportedArchitectureError, match=r"can't hold exactly: .*logits differ.*export_onnx"):
        module.save_plain(tmp_path / "out")
    own = type("ViTForImageClassification", (module.config.plain_class,), {})
    monkeypatch.setattr(type(module.config), "plain_class", own)
    with pytest.raises(UnsupportedArchitectureError, match=r"registered but no class of transformers"):
        module.save_plain(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_onnx_gives_logits_and_rejection_scores_for_any_batch(tmp_path):
    module = cut_module("vit", "scatter")
    calibrate_rejection(module, DataLoader(image_samples(30), batch_size=15), show_progress=False)
    module.attach_processor(image_processor())
    samples = torch.stack([sample["pixel_values"] for sample in image_samples(2)]).bfloat16()
    with pytest.raises(ValueError, match=r"Got one sample to trace with; expected at least 2\. Pass more"):
        module.export_onnx(tmp_path, {"pixel_values": samples[:1]})
    for export in (module.export_onnx, module.export_openvino, module.save_plain):
        for wrong in ({}, {"labels": torch.zeros(2)}, {"pixel_values": samples[:0]}, {"pixel_values": [[1.0]]}):
            with pytest.raises(ValueError, match=r"Got the inputs .*; expected tensors by name, of one sample or more"):
                export(tmp_path / "none", wrong)
    assert list(tmp_path.iterdir()) == []
    export = module.export_onnx(tmp_path, {"pixel_values": samples})  # of another precision than the module's
    assert export.difference < 1e-4
    assert (export.inputs, export.outputs) == ({"pixel_values": ["batch", 3, 16, 16]}, ["logits", "rejection_scores"])
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.onnx", "preprocessor_config.json"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rejection"]["threshold"] == module.config.rejection["threshold"]
    assert config["id2label"] == {"0": "ship", "1": "dog", "2": "none of these"}
    graph = tmp_path / "model.onnx"
    assert str(Path(__file__).parents[1]).encode() not in graph.read_bytes()  # nor where the code lies
    assert not any(node.metadata_props for node in onnx.load(graph).graph.node)
    run = OnnxRunner(graph, 1)
    for count in (1, 7):
        pixels = torch.stack([sample["pixel_values"] for sample in image_samples(count)])
        with torch.no_grad():
            expected = module(pixels)
        for name, got in zip(export.outputs, run(pixel_values=pixels), strict=True):
            assert torch.allclose(got, expected[name], atol=1e-5)


@pytest.mark.parametrize("family", ["bert", pytest.param("llama", marks=pytest.mark.sweep)])
def test_onnx_of_texts_takes_any_length_and_padding(family, tmp_path):
    module = cut_module(family)
    export = module.export_onnx(tmp_path)
    assert export.inputs["input_ids"] == ["batch", "tokens"]
    assert ("token_type_ids" in export.inputs) == (family == "bert")
    run = OnnxRunner(tmp_path / "model.onnx", 1)
    for count, length, padding in ((1, 5, 0), (3, 21, 4), (2, 2, 1)):
        ids = torch.randint(4, 120, (count, length), generator=torch.Generator().manual_seed(1))
        mask = torch.ones_like(ids)
        mask[-1, length - padding :] = 0
        inputs = {"input_ids": ids * mask, "attention_mask": mask}
        inputs |= {"token_type_ids": ids % 2} if family == "bert" else {}
        assert torch.allclose(run(**inputs)[0], logits(module, inputs), atol=1e-5)


@pytest.mark.parametrize(
    ("patched", "match"),
    [
        ({"nemo_hf.export.tracing.find_spec": lambda name: None}, r"Got no onnx and no .*nemo-hf\[onnx\]"),
        ({"torch.onnx.export": Mock(side_effect=RuntimeError("why\n"))}, r"free batch and tokens \(Runtime.*: why\)"),
        ({}, r"without a padding token"),
    ],
)
def test_what_can_not_be_exported_says_why(monkeypatch, tmp_path, patched, match):
    module = cut_module("gpt2")
    if not patched:
        module.model.config.pad_token_id = module.config.base_config.pad_token_id = None
    for name, value in patched.items():
        monkeypatch.setattr(name, value)
    with pytest.raises((ImportError, ValueError), match=match):
        module.export_onnx(tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left"), MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")], ids=repr
)
@pytest.mark.parametrize(
    ("place", "method"),
    [("torch.onnx.export", "export_onnx"), ("nemo_hf.export.plain_model.tensor_cuts", "save_plain")],
)
def test_errors_of_this_machine_are_not_blamed_on_the_model(monkeypatch, tmp_path, error, place, method):
    module = cut_module("vit")
    monkeypatch.setattr(place, Mock(side_effect=error))
    with pytest.raises(type(error)) as raised:
        getattr(module, method)(tmp_path / "out")
    assert raised.value is error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["export_onnx", "save_plain"])
def test_inputs_that_a_module_does_not_take_are_not_blamed_on_the_format(tmp_path, method):
    with pytest.raises(ValueError, match="Input image size") as raised:
        getattr(cut_module("vit"), method)(tmp_path / "out", {"pixel_values": torch.zeros(2, 3, 20, 20)})
    assert not isinstance(raised.value, UnsupportedArchitectureError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("wrong", "samples"), [(0.0, 4), (float("nan"), 1)])
def test_a_wrong_onnx_file_is_not_moved_into_place(monkeypatch, tmp_path, wrong, samples):
    module = cut_module("vit")

    def run(**inputs):
        right = logits(module, inputs)
        return [torch.full_like(right, wrong) if len(right) == samples else right]

    monkeypatch.setattr("nemo_hf.export.onnx.trace", lambda *arguments: None)
    monkeypatch.setattr("nemo_hf.export.onnx.OnnxRunner", lambda path, threads: run)
    with pytest.raises(UnsupportedArchitectureError, match=r"differ from the module's by .*; expected at most"):
        module.export_onnx(tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore")  # what torch says of its own tracing
@pytest.mark.parametrize(("family", "mode"), [("vit", "scatter"), ("llama", None)])
def test_compiled_modules_give_the_same_logits(family, mode):
    module = cut_module(family, mode)
    inputs = random_inputs(module)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.allclose(logits(compiled, inputs), logits(module, inputs), atol=1e-6)


def test_latency_is_of_all_formats_that_can_be_made(monkeypatch):
    parent, module = built_parent("vit"), cut_module("vit")
    with monkeypatch.context() as patch:
        patch.setattr("nemo_hf.export.onnx.export_onnx", lambda module, folder: None)
        patch.setattr("nemo_hf.export.onnx.OnnxRunner", lambda path, threads: {1: module.model}[threads])
        report = compare_latency(module, parent, batch_sizes=(1, 3))
    assert report["device"].endswith(", 1 thread)")
    assert list(report["latency_ms"]) == ["parent", "module", "plain", "onnx"]
    assert all(list(times) == ["1", "3"] for times in report["latency_ms"].values())
    assert parent.is_parent
    monkeypatch.setattr("nemo_hf.export.tracing.find_spec", lambda name: None)
    monkeypatch.setattr(latency, "LARGEST_SPREAD", 0)
    module.model.vit.layernorm.register_forward_hook(lambda layer, inputs, output: output * 1.5)
    report = compare_latency(module, parent, batch_sizes=(2,))
    assert report["latency_ms"] == {"parent": {}, "module": {}}
    assert "runs disagree" in report["latency_note"]
