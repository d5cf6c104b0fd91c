"""Modules of models that answer at many places of a sample: labels of tokens and pixels, and detected objects."""

import numpy as np
import pytest
import torch
import transformers
from conftest import logits_of, tokenizer, without
from PIL import Image
from place_helpers import CHOSEN, IDS, MODELS, close, inputs_of, module_of, parent_of, plain_model, restricted, run
from transformers import (
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    AutoModelForTokenClassification,
    pipeline,
)
from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil
from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil
from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

from nemo_hf import UnsupportedArchitectureError

SIMILAR = ("distilbert", "roberta", "mobilevit", "conditional-detr", "deformable-detr")  # to others here, or slow
NAMES = [pytest.param(name, marks=pytest.mark.sweep if name in SIMILAR else ()) for name in MODELS]
AUTO = {
    "token-classification": AutoModelForTokenClassification,
    "image-segmentation": AutoModelForSemanticSegmentation,
    "object-detection": AutoModelForObjectDetection,
}


def source_of_module(name, parent):
    """The plain model without the neurons that no chosen label opens often enough."""
    static = {m.site.key: (m.relevance[IDS].amax(0) >= round(0.6 * 255)).float() for m in parent.masks.site_masks()}
    return without(plain_model(name), parent, static)


def restricted_source(name, inputs):
    """What that model answers, restricted to the labels."""
    outputs = run(source_of_module(name, parent_of(name)), **inputs)
    outputs["logits"] = restricted(outputs)
    return outputs


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_random", [False, True])
def test_a_module_answers_as_its_source_restricted_to_the_labels(name, is_random):
    parent, inputs = parent_of(name, is_random), inputs_of(name)
    module = parent.extract_module(CHOSEN, inputs=inputs)
    source = source_of_module(name, parent) if is_random else plain_model(name)
    expected, got = run(source, **inputs), run(module, **inputs)
    assert not is_random or not close(restricted(run(plain_model(name), **inputs)), restricted(expected))
    assert got.logits.shape == restricted(expected).shape
    assert close(got.logits, restricted(expected))
    if "pred_boxes" in expected:
        assert close(got.pred_boxes, expected.pred_boxes)
        assert got.keys() == expected.keys()
    assert module.config.equivalence["status"] == ("verified" if is_random else "unverified")
    assert module.config.id2label == dict(enumerate(CHOSEN))


@pytest.mark.parametrize("name", NAMES)
def test_save_and_load_through_the_auto_class(name, tmp_path):
    module, inputs = module_of(name), inputs_of(name)
    module.save_pretrained(tmp_path)
    loaded = AUTO[module.task].from_pretrained(tmp_path)
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in module.state_dict().items())
    got, expected = run(loaded, **inputs), run(module, **inputs)
    assert all(close(got[key], value, 1e-6) for key, value in expected.items() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("name", ["roberta", "segformer", "detr"])
def test_a_module_is_cut_while_its_parent_is_loaded(name, tmp_path):
    parent_of(name).save_pretrained(tmp_path)
    loaded = AUTO[module_of(name).task].from_pretrained(tmp_path, labels=CHOSEN)
    assert close(logits_of(loaded, **inputs_of(name)), logits_of(module_of(name), **inputs_of(name)), 1e-6)


@pytest.mark.parametrize("name", [name for name in NAMES if name.values != ("rt-detr",)])
def test_plain_models_need_no_library(name, tmp_path):
    module, inputs = module_of(name), inputs_of(name)
    module.save_plain(tmp_path, inputs=inputs)
    plain = getattr(transformers, MODELS[name][0]).from_pretrained(tmp_path)
    got, expected = run(plain, **inputs), run(module, **inputs)
    assert close(got.logits, expected.logits)
    assert plain.config.id2label == dict(enumerate(CHOSEN))


def test_a_plain_detector_can_not_choose_queries_by_labels_that_it_has_not(tmp_path):
    with pytest.raises(UnsupportedArchitectureError, match=r"enc_score_head.*Use save_pretrained"):
        module_of("rt-detr").save_plain(tmp_path, inputs=inputs_of("rt-detr"))


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", ["bert", "distilbert", "deberta-v2", "roberta"])
def test_the_pipeline_names_tokens_as_the_restricted_source_does(name, tmp_path):
    module, words = module_of(name), tokenizer()
    module.attach_processor(words)
    module.save_pretrained(tmp_path)
    found = pipeline("token-classification", model=str(tmp_path), ignore_labels=[])("w5 w17 w60 w101")
    logits = restricted_source(name, words("w5 w17 w60 w101", return_tensors="pt")).logits[0]
    assert [token["entity"] for token in found] == [CHOSEN[index] for index in logits.argmax(-1).tolist()]
    assert [token["score"] for token in found] == pytest.approx(logits.softmax(-1).amax(-1).tolist(), abs=1e-4)


def test_the_pipeline_labels_pixels_as_the_restricted_source_does(picture, tmp_path):
    module, processor = module_of("segformer"), SegformerImageProcessorPil(size={"height": 32, "width": 32})
    module.attach_processor(processor)
    module.save_pretrained(tmp_path)
    found = pipeline("image-segmentation", model=str(tmp_path))(picture)
    outputs = restricted_source("segformer", processor(picture, return_tensors="pt"))
    expected = processor.post_process_semantic_segmentation(outputs, target_sizes=[(40, 60)])[0].numpy()
    assert {part["label"] for part in found} == {CHOSEN[index] for index in np.unique(expected)}
    for part in found:
        assert np.array_equal(np.array(part["mask"]) > 0, expected == CHOSEN.index(part["label"]))


@pytest.mark.parametrize(
    ("name", "processor_class"),
    [
        ("detr", DetrImageProcessorPil),
        ("yolos", YolosImageProcessorPil),
        ("rt-detr", RTDetrImageProcessorPil),
    ],
)
def test_the_pipeline_detects_what_the_restricted_source_does(name, processor_class, picture, tmp_path):
    side = 32 if name == "yolos" else 64
    module, processor = module_of(name), processor_class(size={"height": side, "width": side})
    module.attach_processor(processor)
    module.save_pretrained(tmp_path)
    found = pipeline("object-detection", model=str(tmp_path))(picture, threshold=0.0)
    outputs = restricted_source(name, {"pixel_values": processor(picture, return_tensors="pt").pixel_values})
    (expected,) = processor.post_process_object_detection(outputs, 0.0, target_sizes=torch.tensor([[40, 60]]))
    order = expected["scores"].argsort(descending=True)
    found = sorted(found, key=lambda one: -one["score"])
    assert [one["label"] for one in found] == [CHOSEN[index] for index in expected["labels"][order].tolist()]
    boxes = torch.tensor([list(one["box"].values()) for one in found])
    assert (boxes - expected["boxes"][order]).abs().max() <= 1.01  # whole pixels
