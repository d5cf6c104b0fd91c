"""Tiny random models that label tokens, pixels and boxes, with parents and modules of them."""

import copy
import functools

import torch
import transformers
from conftest import IMAGE, LABELS, SIZES, TEXT, randomize, randomize_relevance, tiny

from nemo_hf import NeMoConfig, make_parent

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
