"""Neuron sites: where a model's attention and feed-forward neurons are, found by structure.

This is the only place that knows the names of layers and the quirks of families.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from nemo_hf.config import TARGETS

from .builders import attention_site, feed_forward_site, fused_rows, head_count, inputs_of, latent_rows, separate_rows
from .sites import NeuronSite, UnsupportedArchitectureError, layer_features


@dataclass(frozen=True)
class FeedForwardPattern:
    """Names inside the layer that holds a feed-forward part; `pooled=""` is that layer itself."""

    producers: tuple[str, ...]
    output: str
    pooled: str | None = None
    pooled_output: bool = False


# Names are relative to the attention layer; a leading `../` is relative to its parent.
SEPARATE_PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("query_proj", "key_proj", "value_proj"),
    ("projection_query", "projection_key", "projection_value"),
    ("linear_q", "linear_k", "linear_v"),
    ("q_head", "k_head", "v_head"),
    ("Wq", "Wk", "Wv"),
)
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
"""Layers of latent attention: q, and k beside v of each head; part of q and k is rotated and not theirs to cut."""
OUTPUTS = (
    "o_proj",
    "out_proj",
    "out_lin",
    "o",
    "dense",
    "c_proj",
    "Wo",
    "proj",
    "post_proj",
    "linear_out",
    "../output.dense",
    "../output",
)
POOLED_AT_LAYER = ("query_proj",)
"""Projections that also see relative positions, so that only the attention layer's own input is a sample's."""
FEED_FORWARD_PATTERNS = (
    FeedForwardPattern(("gate_proj", "up_proj"), "down_proj"),
    FeedForwardPattern(("gate_up_proj",), "down_proj"),
    FeedForwardPattern(("up_proj",), "down_proj"),
    FeedForwardPattern(("fc1",), "fc2"),
    FeedForwardPattern(("linear_fc1",), "linear_fc2"),
    FeedForwardPattern(("lin1",), "lin2", pooled=""),
    FeedForwardPattern(("c_fc",), "c_proj"),
    FeedForwardPattern(("fc_in",), "fc_out"),
    FeedForwardPattern(("wi_0", "wi_1"), "wo"),
    FeedForwardPattern(("wi",), "wo"),
    FeedForwardPattern(("Wi",), "Wo"),
    FeedForwardPattern(("dense_h_to_4h",), "dense_4h_to_h"),
    FeedForwardPattern(("intermediate_dense",), "output_dense"),
    FeedForwardPattern(("intermediate.dense",), "output.dense", pooled="attention", pooled_output=True),
    FeedForwardPattern(("layout_intermediate.dense",), "layout_output.dense"),
    FeedForwardPattern(("ffn",), "ffn_output", pooled="attention", pooled_output=True),
    FeedForwardPattern(("dense.dense",), "output.dense"),
    FeedForwardPattern(("dense1",), "dense2"),
    FeedForwardPattern(("linear_1",), "linear_2"),
    FeedForwardPattern(("layer_1",), "layer_2"),
    FeedForwardPattern(("pwconv1",), "pwconv2"),
    FeedForwardPattern(("linear_up.linear",), "linear_down.linear"),
    FeedForwardPattern(("0",), "2"),
)
HEAD_NAMES = re.compile(
    r"(^|\.)((?!pre_)\w*classifier\w*|score|\w*head|fc|logits_proj|sequence_summary|final_layer)"
    r"(\.(out_proj|linear_out|dense|summary|linear|\d+))?$"
)
"""Heads of transformers' classification models: `classifier`, `score`, `distillation_classifier`, ..."""


def find_sites(model: PreTrainedModel, targets: Sequence[str] = TARGETS, reason: str | None = "") -> list[NeuronSite]:
    """Finds a model's attention and feed-forward sites by the structure of its layers.

    Args:
        model: A plain classification model; its weights may be on the meta device.
        targets: Kinds of sites to find; channels of convolutions (`"conv"`) are found by running the model, not here.
        reason: What to say besides if there is none, such as why channels can't be cut; `None` allows none.

    Returns:
        The sites in the order of the model's layers.

    Raises:
        UnsupportedArchitectureError: If there is no site of these kinds.
    """
    sites: list[NeuronSite] = []
    for name, layer in model.named_modules():
        if "attention" in targets:
            sites.extend(_attention_sites(model, name, layer))
        if "ffn" in targets:
            sites.extend(_feed_forward_sites(model, name, layer))
    if not sites and reason is not None:
        linear = [name for name, layer in model.named_modules() if layer_features(layer)]
        raise UnsupportedArchitectureError(
            f"Got model type {model.config.model_type!r}, in which no neuron sites of kind {list(targets)} are known; "
            "expected attention with separate q, k, v and output projections, a feed-forward part of two linear "
            f"layers, or convolutions. Linear layers found: {linear[:8]}{' ...' if len(linear) > 8 else ''}. {reason}"
            "Name its layers in NeMoConfig(sites=[...]), which `nemo-hf inspect --propose` and propose_sites write, or "
            "choose a Transformer classifier such as ViT or BERT."
        )
    return sites


def find_heads(model: PreTrainedModel, num_labels: int) -> list[str]:
    """Finds the linear layers whose outputs are the logits.

    Args:
        model: A plain classification model.
        num_labels: Number of labels.

    Returns:
        Paths of the layers; two for a DeiT with a distillation head.

    Raises:
        UnsupportedArchitectureError: If there is none.
    """
    heads = [
        name
        for name, layer in model.named_modules()
        if HEAD_NAMES.search(name) and (features := layer_features(layer)) and features[1] == num_labels
    ]
    # A projection before the head, which has as many outputs by chance.
    heads = [h for h in heads if not (h.endswith(".dense") and h.removesuffix("dense") + "out_proj" in heads)]
    last = {h.rpartition(".")[0]: h for h in heads if h.rpartition(".")[2].isdigit()}
    heads = [h for h in heads if last.get(h.rpartition(".")[0], h) == h]
    if not heads:  # a head of another name, if only one layer can be it
        by_width = [n for n, layer in model.named_modules() if (layer_features(layer) or (0, 0))[1] == num_labels]
        heads = by_width if len(by_width) == 1 else []
    if not heads:
        raise UnsupportedArchitectureError(
            f"Got model type {model.config.model_type!r} without a linear head of {num_labels} outputs named like "
            "'classifier' or 'score'; modules are cut at that head. Choose a *ForImageClassification or "
            "*ForSequenceClassification model."
        )
    return heads


def _linear_children(model: nn.Module, name: str, relatives: Sequence[str]) -> list[str] | None:
    """Paths of the linear layers at relative paths from the layer `name`, or `None` if one of them is none."""
    found = []
    for relative in relatives:
        path = _path(name, relative)
        try:
            layer = model.get_submodule(path)
        except AttributeError:
            return None
        if layer_features(layer) is None:
            return None
        found.append(path)
    return found


def _path(name: str, relative: str) -> str:
    if relative.startswith("../"):
        name, relative = name.rpartition(".")[0], relative[3:]
    return ".".join(part for part in (name, relative) if part)


def _feed_forward_sites(model: PreTrainedModel, name: str, layer: nn.Module) -> Iterator[NeuronSite]:
    for pattern in FEED_FORWARD_PATTERNS:
        layers = _linear_children(model, name, (*pattern.producers, pattern.output))
        if layers is None:
            continue
        pooled = None if pattern.pooled is None else _path(name, pattern.pooled)
        if pooled and pattern.pooled and not hasattr(layer, pattern.pooled):
            pooled = None
        takes_output = pattern.pooled_output and pooled is not None
        site = feed_forward_site(model, name, layers[:-1], layers[-1], pooled, takes_output)
        if site is not None:
            yield site
            return


def _attention_sites(model: PreTrainedModel, name: str, layer: nn.Module) -> Iterator[NeuronSite]:
    output = next((found[0] for name_ in OUTPUTS if (found := _linear_children(model, name, (name_,)))), None)
    if output is None:
        return
    heads = head_count(model, layer, inputs_of(model, output))
    for names in SEPARATE_PROJECTIONS:
        layers = _linear_children(model, name, names)
        if layers and (rows := separate_rows(model, layers, output, heads)):
            pooled = name if names[0] in POOLED_AT_LAYER else None
            yield attention_site(model, name, output, rows, pooled)
            return
    for latent in LATENT_PROJECTIONS:
        layers = _linear_children(model, name, latent)
        if layers and (rows := latent_rows(model, layers, layer, output)):
            yield attention_site(model, name, output, rows, is_rotary=False)
            return
    for fused, layout in FUSED_PROJECTIONS.items():
        layers = _linear_children(model, name, (fused,))
        if layers and (rows := fused_rows(model, layers[0], layout, output, heads)):
            yield attention_site(model, name, output, rows)
            return
