"""Modules of models that answer at many places of a sample: labels of tokens and pixels, and detected objects."""

import copy
import functools

import numpy as np
import pytest
import torch
import transformers
from conftest import (
    IMAGE,
    LABELS,
    SIZES,
    TEXT,
    logits_of,
    randomize,
    randomize_relevance,
    tiny,
    tokenizer,
    without,
)
from PIL import Image
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

from nemo_hf import (
    NeMoConfig,
    UnsupportedArchitectureError,
    make_parent,
)

CHOSEN, IDS = ["frog", "cat", "car"], [4, 0, 2]
STAGES = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
BACKBONE = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "d_model": 32,
    "num_queries": 7,
}
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
DETR = {**BACKBONE, **HEADS, "encoder_layers": 1, "decoder_layers": 2}
RT_DETR = {
    **HEADS,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "d_model": 32,
    "encoder_hidden_dim": 32,
    "num_queries": 9,
    "encoder_in_channels": [16] * 3,
    "decoder_in_channels": [32] * 3,
    "decoder_n_points": 2,
    "num_denoising": 0,
}
SEGFORMER = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [16, 32],
    "patch_sizes": [3, 3],
    "strides": [4, 2],
    "num_attention_heads": [2, 4],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 24,
}
MOBILEVIT = {
    "image_size": 32,
    "patch_size": 2,
    "hidden_sizes": [16] * 3,
    "neck_hidden_sizes": [8, 8, 8, 8, 16, 16, 24],
    "num_attention_heads": 2,
    "aspp_out_channels": 16,
    "atrous_rates": [2, 2, 2],
}
BEIT = {**IMAGE, "num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "pool_scales": [1, 2], "auxiliary_channels": 8}
DISTILBERT = {"vocab_size": 120, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
DEBERTA = {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
MODELS = {
    "bert": ("BertForTokenClassification", TEXT),
    "distilbert": ("DistilBertForTokenClassification", DISTILBERT),
    "deberta-v2": ("DebertaV2ForTokenClassification", DEBERTA),
    "roberta": ("RobertaForTokenClassification", TEXT),
    "segformer": ("SegformerForSemanticSegmentation", SEGFORMER),
    "beit": ("BeitForSemanticSegmentation", BEIT),
    "mobilevit": ("MobileViTForSemanticSegmentation", MOBILEVIT),
    "detr": ("DetrForObjectDetection", DETR),
    "conditional-detr": ("ConditionalDetrForObjectDetection", DETR),
    "deformable-detr": ("DeformableDetrForObjectDetection", DETR),
    "yolos": ("YolosForObjectDetection", {**SIZES, "image_size": [32, 32], "patch_size": 8, "num_detection_tokens": 6}),
    "rt-detr": ("RTDetrForObjectDetection", RT_DETR),
}
SLOW = ("mobilevit", "deformable-detr", "rt-detr")  # whose many convolutions are traced one by one
AUTO = {
    "token-classification": AutoModelForTokenClassification,
    "image-segmentation": AutoModelForSemanticSegmentation,
    "object-detection": AutoModelForObjectDetection,
}


def plain_model(name, **options):
    """A tiny random model with the five labels of these tests."""
    class_name, sizes = MODELS[name]
    if name == "rt-detr":
        stages = {**STAGES, "out_features": ["stage2", "stage3", "stage4"]}
        sizes = {**sizes, "backbone_config": transformers.RTDetrResNetConfig(**stages)}
    elif name.endswith("detr"):
        stages = {**STAGES, "out_features": ["stage4"] if name != "deformable-detr" else ["stage2", "stage3", "stage4"]}
        sizes = {**sizes, "backbone_config": transformers.ResNetConfig(**stages)}
    spread = 0.4 if name == "mobilevit" else 0.15  # so many norms hide what masks do
    return randomize(tiny(class_name, **{**sizes, **options}), spread)


def inputs_of(name):
    """Texts with padding, or images."""
    generator = torch.Generator().manual_seed(1)
    if MODELS[name][0].endswith("TokenClassification"):
        ids = torch.randint(5, 118, (3, 12), generator=generator)
        ids[1:, 8:] = 0
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}
    side = {"beit": 16, "mobilevit": 96, "deformable-detr": 128}.get(name, 64 if name.endswith("detr") else 32)
    return {"pixel_values": torch.randn(3, 3, side, side, generator=generator)}


@functools.cache
def _parent(name):
    targets = ("attention", "ffn") if name in SLOW else ("attention", "ffn", "conv")
    config = NeMoConfig(masks="static", targets=targets, relevance_threshold=0.6)
    return make_parent(plain_model(name), config, inputs=inputs_of(name)).eval()


def parent_of(name, is_random=True):
    parent = copy.deepcopy(_parent(name))
    if is_random:
        randomize_relevance(parent)
    return parent


@functools.cache
def _module(name):
    return parent_of(name).extract_module(CHOSEN, inputs=inputs_of(name))


def module_of(name):
    return copy.deepcopy(_module(name))


def restricted(outputs):
    """Logits of the chosen labels, and of "no object" where there are six for five labels."""
    dim = 1 if outputs.logits.ndim == 4 else -1
    kept = [*IDS, *range(len(LABELS), outputs.logits.shape[dim])]
    return outputs.logits.index_select(dim, torch.tensor(kept))


def run(model, **inputs):
    with torch.no_grad():
        return model(**inputs)


def close(got, expected, share=1e-5):
    return torch.allclose(got, expected, rtol=0, atol=share * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("is_random", [False, True])
def test_a_module_answers_as_its_source_restricted_to_the_labels(name, is_random):
    parent, inputs = parent_of(name, is_random), inputs_of(name)
    module = parent.extract_module(CHOSEN, inputs=inputs)
    static = {m.site.key: (m.relevance[IDS].amax(0) >= round(0.6 * 255)).float() for m in parent.masks.site_masks()}
    source = without(plain_model(name), parent, static) if is_random else plain_model(name)
    expected, got = run(source, **inputs), run(module, **inputs)
    assert not is_random or not close(restricted(run(plain_model(name), **inputs)), restricted(expected))
    assert close(got.logits, restricted(expected)) and got.logits.shape == restricted(expected).shape
    if "pred_boxes" in expected:
        assert close(got.pred_boxes, expected.pred_boxes)
        assert got.keys() == expected.keys()
    assert module.config.equivalence["status"] == ("verified" if is_random else "unverified")
    assert module.config.id2label == dict(enumerate(CHOSEN))


@pytest.mark.parametrize("name", MODELS)
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
    loaded = AUTO[_parent(name).task].from_pretrained(tmp_path, labels=CHOSEN)
    assert close(logits_of(loaded, **inputs_of(name)), logits_of(module_of(name), **inputs_of(name)), 1e-6)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "rt-detr"])
def test_plain_models_need_no_library(name, tmp_path):
    module, inputs = module_of(name), inputs_of(name)
    module.save_plain(tmp_path, inputs=inputs)
    plain = getattr(transformers, MODELS[name][0]).from_pretrained(tmp_path)
    got, expected = run(plain, **inputs), run(module, **inputs)
    assert close(got.logits, expected.logits) and plain.config.id2label == dict(enumerate(CHOSEN))


def test_a_plain_detector_can_not_choose_queries_by_labels_that_it_has_not(tmp_path):
    with pytest.raises(UnsupportedArchitectureError, match="enc_score_head.*Use save_pretrained"):
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
    static = {m.site.key: m.relevance[IDS].amax(0) >= 153 for m in parent_of(name).masks.site_masks()}
    source = without(plain_model(name), parent_of(name), {key: mask.float() for key, mask in static.items()})
    logits = restricted(run(source, **words("w5 w17 w60 w101", return_tensors="pt")))[0]
    assert [token["entity"] for token in found] == [CHOSEN[index] for index in logits.argmax(-1).tolist()]
    assert [token["score"] for token in found] == pytest.approx(logits.softmax(-1).amax(-1).tolist(), abs=1e-4)


def restricted_source(name, inputs):
    """What the plain model with the neurons of the module alone answers, restricted to the labels."""
    parent = parent_of(name)
    static = {m.site.key: (m.relevance[IDS].amax(0) >= 153).float() for m in parent.masks.site_masks()}
    outputs = run(without(plain_model(name), parent, static), **inputs)
    outputs["logits"] = restricted(outputs)
    return outputs


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
