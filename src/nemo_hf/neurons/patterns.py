"""Finds attention and feed-forward neurons by names and widths of layers, which only this file and `builders` know."""

import re
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from nemo_hf.config import TARGETS

from .builders import ModelLayers, attention_site, feed_forward_site, fused_rows, head_count, latent_rows, separate_rows
from .sites import AttentionSite, FeedForwardSite, NeuronSite, UnsupportedArchitectureError, layer_features

# Names are relative to the attention layer; a leading `../` is relative to its parent.
SEPARATE_PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("q", "k", "v"),
    ("query_proj", "key_proj", "value_proj"), ("projection_query", "projection_key", "projection_value"),
    ("linear_q", "linear_k", "linear_v"), ("q_head", "k_head", "v_head"), ("Wq", "Wk", "Wv"),
)  # fmt: skip
FUSED_PROJECTIONS = {
    "c_attn": "one after another",
    "Wqkv": "one after another",
    "qkv_proj": "one after another",
    "qkv": "one after another",
    "query_key_value": "by key/value head",
    "in_proj": "by key/value head",
}
"""Layers that make q, k and v at once, and how the three lie in their outputs."""
LATENT_PROJECTIONS = (("q_b_proj", "kv_b_proj"), ("q_proj", "kv_b_proj"))
"""Layers of latent attention: q, and k beside v of each head; the rotated dimensions of q and k are not cut."""
OUTPUT_PROJECTIONS = (
    "o_proj", "out_proj", "out_lin", "o", "dense", "c_proj", "Wo", "proj", "post_proj", "linear_out",
    "../output.dense", "../output",
)  # fmt: skip
POOLED_AT_LAYER = ("query_proj",)
"""Projections that also see relative positions, so that only the attention layer's own input is a sample's."""
FEED_FORWARD_LAYERS = {
    ("gate_proj", "up_proj"): "down_proj", ("gate_up_proj",): "down_proj", ("up_proj",): "down_proj",
    ("fc1",): "fc2", ("linear_fc1",): "linear_fc2", ("lin1",): "lin2", ("c_fc",): "c_proj", ("fc_in",): "fc_out",
    ("wi_0", "wi_1"): "wo", ("wi",): "wo", ("Wi",): "Wo", ("dense_h_to_4h",): "dense_4h_to_h",
    ("intermediate_dense",): "output_dense", ("intermediate.dense",): "output.dense",
    ("layout_intermediate.dense",): "layout_output.dense", ("ffn",): "ffn_output", ("dense.dense",): "output.dense",
    ("dense1",): "dense2", ("linear_1",): "linear_2", ("layer_1",): "layer_2", ("pwconv1",): "pwconv2",
    ("linear_up.linear",): "linear_down.linear", ("0",): "2",
}  # fmt: skip
"""Layers that make units, and the one that reads them."""
CALLED_IN_CHUNKS = {"lin1": "", "intermediate.dense": "attention", "ffn": "attention"}
"""Feed-forward parts that see a share of the sequence at a time, and the layer to pool at: its output, or for ""
the input of the layer around them."""
HEAD_NAMES = re.compile(
    r"(^|\.)((?!pre_)\w*classifier\w*|score|(?!enc_)\w*head|fc|logits_proj|sequence_summary|final_layer|class_embed)"
    r"(\.(out_proj|linear_out|dense|summary|linear|convolution|(layers\.)?\d+))?$"
)
"""Heads of transformers' models: `classifier`, `score`, `distillation_classifier`, ...; not those that choose queries
(`enc_score_head`), which need all labels to choose as before."""
HEAD_LIST = "class_embed"  # of detectors with a head for each layer of their decoder
NO_OBJECT_HEAD = re.compile(r"(^|\.)class_labels_classifier(\.|$)")
"""Heads of detectors of which some have a last output for "no object"."""


def find_sites(model: PreTrainedModel, targets: Sequence[str] = TARGETS) -> list[NeuronSite]:
    """Finds attention and feed-forward sites, in the order of the model's layers; weights may be on the meta device."""
    layers = ModelLayers(model)
    sites: list[NeuronSite] = []
    for name, layer in layers.unique.items():
        if next(layer.children(), None) is not None:
            attention = _attention_site(layers, name) if "attention" in targets else None
            units = _feed_forward_site(layers, name) if "ffn" in targets else None
            sites.extend(site for site in (attention, units) if site)
    return sites


def check_found(
    model: PreTrainedModel, sites: list[NeuronSite], targets: Sequence[str], reason: str = ""
) -> list[NeuronSite]:
    """The sites, of which there must be one; `reason` says why some of the model's neurons are none."""
    if not sites:
        linear = list(ModelLayers(model).linear)
        raise UnsupportedArchitectureError(
            f"Got model type {model.config.model_type!r}, in which no neuron sites of kind {list(targets)} are known; "
            "expected attention with separate q, k, v and output projections, a feed-forward part of two linear "
            f"layers, or convolutions. Linear layers found: {linear[:8]}{' ...' if len(linear) > 8 else ''}. {reason}"
            "Name its layers in NeMoConfig(sites=[...]), which `nemo-hf inspect --propose` and propose_sites write, or "
            "choose a Transformer classifier such as ViT or BERT."
        )
    return sites


def find_heads(model: PreTrainedModel, num_labels: int) -> dict[str, int]:
    """Paths of the layers whose outputs are the logits, each with its number of outputs after those of the labels.

    They are linear layers (two for a DeiT with a distillation head), or else convolutions.
    """
    outputs = {name: (layer_features(layer) or (0, 0))[1] for name, layer in model.named_modules()}
    fitting = [name for name, count in outputs.items() if count == num_labels]
    wider = [name for name, count in outputs.items() if count == num_labels + 1 and NO_OBJECT_HEAD.search(name)]
    heads = _named_heads([*fitting, *wider])
    if not heads:
        convolutions = {n: layer for n, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
        heads = _named_heads([n for n, c in convolutions.items() if c.out_channels == num_labels and c.groups == 1])
    if not heads and len(fitting) == 1:  # a head of another name, if only one layer can be it
        heads = fitting
    if not heads:
        raise UnsupportedArchitectureError(
            f"Got model type {model.config.model_type!r} without a linear head of {num_labels} outputs, or a "
            "convolution, named like 'classifier', 'score' or 'class_embed'. Choose a model of transformers for "
            "classification, token classification, semantic segmentation or object detection."
        )
    if any(head.endswith(f"{HEAD_LIST}.{getattr(model.config, 'decoder_layers', None)}") for head in heads):
        raise UnsupportedArchitectureError(
            f"Got model type {model.config.model_type!r} with two_stage=True, whose heads over all labels also choose "
            "the queries; expected heads that only answer. Choose such a model without two_stage, or RT-DETR, which "
            "has a layer of its own for this."
        )
    return {head: max(0, outputs[head] - num_labels) for head in heads}


def _named_heads(fitting: Sequence[str]) -> list[str]:
    """The layers of the right number of outputs that have names of heads."""
    heads = [name for name in fitting if HEAD_NAMES.search(name)]
    # A projection before the head, which has as many outputs by chance.
    heads = [h for h in heads if not (h.endswith(".dense") and h.removesuffix("dense") + "out_proj" in heads)]
    last = {h.rpartition(".")[0]: h for h in heads if h.rpartition(".")[2].isdigit() and HEAD_LIST not in h}
    return [h for h in heads if last.get(h.rpartition(".")[0], h) == h]


def _linear_paths(layers: ModelLayers, name: str, relatives: Sequence[str]) -> list[str] | None:
    """Paths of the linear layers at relative paths from the layer `name`, or `None` if one of them is not there."""
    paths = [_path(name, relative) for relative in relatives]
    return paths if all(path in layers.linear for path in paths) else None


def _path(name: str, relative: str) -> str:
    if relative.startswith("../"):
        name, relative = name.rpartition(".")[0], relative[3:]
    return f"{name}.{relative}" if name and relative else name or relative


def _feed_forward_site(layers: ModelLayers, name: str) -> FeedForwardSite | None:
    for producers, output in FEED_FORWARD_LAYERS.items():
        paths = _linear_paths(layers, name, (*producers, output))
        if paths is None or (producers == ("0",) and _path(name, "1") in layers.linear):  # of three layers in a row
            continue
        around = CALLED_IN_CHUNKS.get(producers[0])
        pooled = None if around is None or _path(name, around) not in layers.by_path else _path(name, around)
        site = feed_forward_site(layers, name, paths[:-1], paths[-1], pooled, bool(around and pooled))
        if site is not None:
            return site
    return None


def _attention_site(layers: ModelLayers, name: str) -> AttentionSite | None:
    output = next((found[0] for last in OUTPUT_PROJECTIONS if (found := _linear_paths(layers, name, (last,)))), None)
    if output is None:
        return None
    heads = head_count(layers.config, layers.by_path[name], layers.linear[output][0])
    for names in SEPARATE_PROJECTIONS:
        paths = _linear_paths(layers, name, names)
        if paths and (rows := separate_rows(layers, paths, output, heads)):
            return attention_site(layers, name, output, rows, name if names[0] in POOLED_AT_LAYER else None)
    for latent in LATENT_PROJECTIONS:
        paths = _linear_paths(layers, name, latent)
        if paths and (rows := latent_rows(layers, paths, name, output)):
            return attention_site(layers, name, output, rows, is_rotary=False)
    for fused, layout in FUSED_PROJECTIONS.items():
        paths = _linear_paths(layers, name, (fused,))
        if paths and (rows := fused_rows(layers, paths[0], layout, output, heads)):
            return attention_site(layers, name, output, rows)
    return None
