"""Quantized ONNX files and OpenVINO files: smaller, compared with the module, and refused where they differ."""

import copy
import json
import logging
import shutil
from functools import cache
from pathlib import Path

import onnx
import pytest
import torch
from conftest import image_samples, randomize, tiny, tokenizer
from place_helpers import inputs_of, module_of
from saving_helpers import contents
from test_exporting import cut_module
from torch.utils.data import DataLoader

from nemo_hf import UnsupportedArchitectureError, calibrate_rejection, extract_module
from nemo_hf.export.agreement import check_agreement, measure_agreement, read_samples
from nemo_hf.export.onnx import OnnxRunner
from nemo_hf.export.openvino import OpenVinoRunner
from nemo_hf.export.tracing import trace
from nemo_hf.models.batches import sample_count
from nemo_hf.models.rejection import energy, rejection_scores
from nemo_hf.neurons.trial_inputs import random_inputs

TRACED = {}
TEXTS = ["w1 w2 w3", "w4", "w100 w7 w8 w9 w10", "w5 w6"]


@pytest.fixture(autouse=True)
def traced_once(monkeypatch, tmp_path_factory):
    """The same module is traced once, since that takes seconds; test_exporting.py tries how."""

    def copied(ready, path):
        tensors = [*ready.exact.state_dict().values(), *ready.inputs.values()]
        key = str(ready.exact.config), *ready.outputs, *ready.inputs, *(tensor.numpy().tobytes() for tensor in tensors)
        if key not in TRACED:
            TRACED[key] = tmp_path_factory.mktemp("traced") / "model.onnx"
            trace(ready, TRACED[key])
        shutil.copy(TRACED[key], path)

    for name in ("onnx", "openvino"):
        monkeypatch.setattr(f"nemo_hf.export.{name}.trace", copied)


@cache
def text_module():
    module = cut_module("bert")
    module.attach_processor(tokenizer())
    return module


@cache
def image_module():
    """Most of the weights of this one are in convolutions."""
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    model = randomize(tiny("ResNetForImageClassification", **sizes))
    return extract_module(model, [1, 3], [pixels(40)], retention=0.5, show_progress=False)


def pixels(count):
    return {"pixel_values": torch.stack([sample["pixel_values"] for sample in image_samples(count)])}


def kinds(path):
    return {node.op_type for node in onnx.load(path).graph.node}


def logits(module, batch):
    with torch.no_grad():
        return module(**batch).logits


@pytest.mark.parametrize(("width", "kind"), [("int8", "MatMulInteger"), ("int4", "MatMulNBits")])
def test_files_of_linear_layers_are_smaller_and_answer_as_the_module(width, kind, tmp_path, caplog):
    module = text_module()
    handlers = [*logging.getLogger().handlers]
    export = module.export_onnx(tmp_path, quantize=width, calibration=TEXTS)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert logging.getLogger().handlers == handlers
    assert export.difference <= export.tolerance
    assert (export.agreement.samples, export.agreement.are_random, export.agreement.agreement) == (4, False, 1.0)
    written = (tmp_path / "model.onnx").read_bytes()
    weights = sum(parameter.numel() for parameter in module.parameters())
    assert export.bytes == len(written) < 4 * weights
    assert kind in kinds(tmp_path / "model.onnx")
    assert {"MatMul", "Gemm"}.isdisjoint(
        node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node if "weight" in "".join(node.input)
    )
    embedding = max(onnx.load(tmp_path / "model.onnx").graph.initializer, key=lambda tensor: max(tensor.dims or [0]))
    assert embedding.data_type != onnx.TensorProto.FLOAT  # the largest table is the vocabulary's
    config = json.loads((tmp_path / "config.json").read_text())["export"]["onnx"]
    assert (config["quantize"], config["agreement"]) == (width, 1.0)
    assert str(Path(__file__).parents[1]).encode() not in written
    batch = random_inputs(module)
    run = OnnxRunner(tmp_path / "model.onnx", 1)
    batch = {name: value for name, value in batch.items() if name in run.names}
    batch |= {name: torch.zeros_like(batch["input_ids"]) for name in run.names - batch.keys()}
    right = logits(module, batch)
    assert 0 < (run(**batch)[0] - right).abs().max() < 0.1 * right.abs().max()


def test_convolutions_need_samples_and_have_no_4_bits(tmp_path):
    module, samples = image_module(), pixels(12)
    with pytest.raises(ValueError, match=r"in convolutions and no calibration samples; expected some"):
        module.export_onnx(tmp_path / "out", quantize="int8")
    with pytest.raises(UnsupportedArchitectureError, match=r"has none in 4 bits; .*Pass quantize='int8'"):
        module.export_onnx(tmp_path / "out", quantize="int4", calibration=[samples])
    assert list(tmp_path.iterdir()) == []
    export = module.export_onnx(tmp_path / "out", quantize="int8", calibration=[samples], min_agreement=0.5)
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds(tmp_path / "out" / "model.onnx")
    right = logits(module, samples)
    got = OnnxRunner(tmp_path / "out" / "model.onnx", 1)(**samples)[0]
    assert export.agreement.agreement == (got.argmax(-1) == right.argmax(-1)).double().mean()
    assert export.agreement.logit_difference == pytest.approx((got - right).abs().max().item(), rel=1e-4)


def test_rejection_scores_of_a_quantized_file_are_those_of_its_logits(tmp_path):
    module = copy.deepcopy(image_module())
    calibrate_rejection(module, DataLoader(image_samples(40), batch_size=20), show_progress=False)
    module.export_onnx(tmp_path, quantize="int8", calibration=[pixels(30)], min_agreement=0)
    logits, scores = OnnxRunner(tmp_path / "model.onnx", 1)(**pixels(30))
    expected = rejection_scores(energy(logits[:, :2]), module.config.rejection)
    assert torch.allclose(scores, expected, atol=1e-5)
    assert torch.equal(logits.argmax(-1) == 2, scores > module.config.rejection["threshold"])
    assert (logits.argmax(-1) == 2).unique().tolist() == [False, True]


@pytest.mark.parametrize("method", ["export_onnx", "export_openvino"])
def test_files_below_the_agreement_are_refused_and_the_old_ones_stay(method, tmp_path, monkeypatch):
    module = text_module()
    (tmp_path / "model.onnx").write_text("old")
    (tmp_path / "openvino_model.xml").write_text("old")
    before = contents(tmp_path)
    place = "nemo_hf.export.agreement._same_answers"
    monkeypatch.setattr(place, lambda module, batch, got, expected: torch.arange(len(got["logits"])) > 0)
    with pytest.raises(UnsupportedArchitectureError, match=r"on 75\.00% of 4 samples; expected at least 98\.00%"):
        getattr(module, method)(tmp_path, quantize="int8", calibration=TEXTS)
    assert contents(tmp_path) == before
    getattr(module, method)(tmp_path, quantize="int8", calibration=TEXTS, min_agreement=0.75)
    assert contents(tmp_path) != before


def test_formats_of_one_module_share_a_directory_and_other_modules_stay_out(tmp_path):
    parent = copy.deepcopy(cut_module("vit", "scatter"))
    module, other = parent, copy.deepcopy(parent)
    other.config.label2id = {"cat": 0, "car": 1}
    other.config.id2label = {0: "cat", 1: "car"}
    exact = {"quantize": "int8", "calibration": [pixels(9)], "min_agreement": 0}
    module.export_onnx(tmp_path, **exact)
    onnx_alone = json.loads((tmp_path / "config.json").read_text())["export"]
    module.export_openvino(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["export"] == onnx_alone
    module.export_openvino(tmp_path, **exact)
    both = json.loads((tmp_path / "config.json").read_text())["export"]
    assert (set(both), both["onnx"]) == ({"onnx", "openvino"}, onnx_alone["onnx"])
    before = contents(tmp_path)
    for method, names in (("export_onnx", "openvino_model.xml"), ("export_openvino", "model.onnx")):
        with pytest.raises(ValueError, match=rf"with another config.json \({names}\); expected"):
            getattr(other, method)(tmp_path)
    calibrate_rejection(module, DataLoader(image_samples(30), batch_size=15), show_progress=False)
    with pytest.raises(ValueError, match=r"with another config.json \(model.onnx\); expected"):
        module.export_openvino(tmp_path)
    assert contents(tmp_path) == before
    (tmp_path / "openvino_model.xml").unlink()
    other.export_onnx(tmp_path)  # in place of the only other weights
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["id2label"], "export" in config) == ({"0": "cat", "1": "car"}, False)


@pytest.mark.parametrize("width", [None, "int8"])
def test_openvino_gives_logits_and_rejection_scores_for_any_batch(width, tmp_path):
    module = cut_module("vit", "scatter")
    calibrate_rejection(module, DataLoader(image_samples(30), batch_size=15), show_progress=False)
    samples = pixels(9)["pixel_values"]
    export = module.export_openvino(tmp_path, quantize=width, calibration=[pixels(9)], min_agreement=0)
    assert export.difference <= export.tolerance
    assert export.outputs == ["logits", "rejection_scores"]
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "openvino_model.bin", "openvino_model.xml"}
    assert str(tmp_path).encode() not in (tmp_path / "openvino_model.xml").read_bytes()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rejection"]["threshold"] == module.config.rejection["threshold"]
    assert (config["export"]["openvino"]["quantize"], config["export"]["openvino"]["samples"]) == (width, 9)
    run = OpenVinoRunner(tmp_path / "openvino_model.xml", 1, INFERENCE_PRECISION_HINT="f32")
    for count in (1, 7):
        right = logits(module, {"pixel_values": samples[:count]})[:, :2]
        apart = (run(pixel_values=samples[:count])[0][:, :2] - right).abs().max()
        assert apart < (1e-5 if width is None else 0.05 * right.abs().max())
        assert (apart > 1e-5) == (width is not None)


def test_agreement_is_the_share_of_equal_answers_by_a_plain_loop():
    module = cut_module("vit")
    batches = [{"pixel_values": torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(s))} for s in (0, 1)]
    wrong = {(0, 1), (1, 0), (1, 4)}

    def run(batch):
        number = next(n for n, own in enumerate(batches) if own is batch)
        right = logits(module, batch)
        return {"logits": torch.stack([-row if (number, i) in wrong else row for i, row in enumerate(right)])}

    found = measure_agreement(module, run, batches, are_random=False)
    assert found.agreement == 0.7
    largest = max(2 * logits(module, batches[n])[i].abs().max().item() for n, i in wrong)
    assert found.logit_difference == pytest.approx(largest)
    check_agreement(found, 0.7, "a file")
    with pytest.raises(UnsupportedArchitectureError, match=r"answer on 70\.00% of 10 samples"):
        check_agreement(found, 0.71, "a file")
    random = measure_agreement(module, run, batches, are_random=True)
    with pytest.raises(UnsupportedArchitectureError, match=r"on random inputs; expected at most"):
        check_agreement(random, 0.0, "a file")


def test_labelled_samples_of_others_count_only_where_the_module_rejects_them(tmp_path, monkeypatch):
    module = cut_module("vit")
    samples = image_samples(30)
    own = sum(int(sample["labels"]) in module.config.label_ids for sample in samples)
    assert 0 < own < 30
    found = module.export_onnx(tmp_path, calibration=samples).agreement
    assert (found.samples, found.accepted_samples, found.accepted_agreement) == (own, own, found.agreement)
    calibrate_rejection(module, DataLoader(samples, batch_size=15), show_progress=False)
    assert module.export_onnx(tmp_path, calibration=samples).agreement.samples == 2 * own  # as many others
    monkeypatch.setattr("nemo_hf.export.agreement.MOST_SAMPLES", 6)
    labelled, texts = (sum(map(sample_count, read_samples(module, given))) for given in (samples, [pixels(30)]))
    assert (labelled, texts) == (6, 3)


def test_rejections_do_not_make_up_for_wrong_answers_among_the_accepted():
    """All of 18 samples that the module rejects are right, and half of the two others."""
    module = copy.deepcopy(cut_module("vit"))
    calibrate_rejection(module, DataLoader(image_samples(30), batch_size=15), show_progress=False)
    batch = pixels(20)
    with torch.no_grad():
        scores = module(**batch).rejection_scores.sort().values
        module.config.rejection["threshold"] = (scores[1] + scores[2]).item() / 2
        right = module(**batch)
    accepted = (right.rejection_scores <= module.config.rejection["threshold"]).nonzero().flatten()
    assert len(accepted) == 2
    wrong = {"logits": right.logits.clone(), "rejection_scores": right.rejection_scores}
    wrong["logits"][accepted[0]] = wrong["logits"][accepted[0]].roll(1)
    found = measure_agreement(module, lambda batch: wrong, [batch], are_random=False)
    assert (found.agreement, found.accepted_samples, found.accepted_agreement) == (0.95, 2, 0.5)
    with pytest.raises(UnsupportedArchitectureError, match=r"on 50\.00% of the 2 samples that the module doesn't rej"):
        check_agreement(found, 0.9, "a file")
    check_agreement(found, 0.5, "a file")
    module.config.rejection["threshold"] = -1.0 + scores[0].item()
    with torch.no_grad():
        nothing = measure_agreement(module, lambda batch: module(**batch), [batch], are_random=False)
    assert (nothing.accepted_samples, nothing.accepted_agreement) == (0, None)
    check_agreement(nothing, 1.0, "a file")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"quantize": "int2"}, r"Got quantize='int2'; expected 'int8' or 'int4', or None"),
        ({"min_agreement": 1.5}, r"Got min_agreement=1\.5; expected a share of the samples in \[0, 1\]"),
        ({"calibration": []}, r"calibration"),
        ({"min_agreement": 0.5}, r"Got min_agreement=0\.5 and no calibration samples; expected some.*--dataset, or"),
        ({"min_agreement": 0.98, "quantize": "int8"}, r"Got min_agreement=0\.98 and no calibration samples"),
    ],
)
def test_wrong_arguments_are_refused(options, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        text_module().export_onnx(tmp_path / "out", **options)
    if "min_agreement" in options:
        with pytest.raises(ValueError, match=match):
            text_module().export_openvino(tmp_path / "out", **options)
    with pytest.raises(ValueError, match=r"Got quantize='int4'; expected 'int8', or None"):
        text_module().export_openvino(tmp_path / "out", quantize="int4")
    assert list(tmp_path.iterdir()) == []


def test_without_openvino_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("nemo_hf.export.tracing.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"Got no openvino and no .*nemo-hf\[openvino\]"):
        text_module().export_openvino(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "segformer", "detr"])
@pytest.mark.parametrize("method", ["export_onnx", "export_openvino"])
def test_heads_of_tokens_pixels_and_boxes_are_quantized(name, method, tmp_path):
    module, samples = module_of(name), inputs_of(name)
    found = getattr(module, method)(tmp_path, quantize="int8", calibration=[samples], min_agreement=0.8).agreement
    assert found.samples == len(next(iter(samples.values())))
    assert 0 < found.logit_difference < 0.3 * found.largest_logit
