"""Neuron sites: where a model's attention and feed-forward neurons are, found by structure.

This is the only place that knows the names of layers and the quirks of families.
"""

import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .config import TARGETS
from .neurons import AttentionSite, FeedForwardSite, NeuronSite, Rows, UnsupportedArchitectureError, layer_features


@dataclass(frozen=True)
class AttentionPattern:
    """Names inside an attention layer, relative to it; a leading `../` is relative to its parent."""

    query: str
    key: str
    value: str
    output: str
    head_dim_attribute: str
    width_attributes: tuple[str, ...] = ()
    fused: str | None = None


@dataclass(frozen=True)
class FeedForwardPattern:
    """Names inside the layer that holds a feed-forward part; `pooled=""` is that layer itself."""

    producers: tuple[str, ...]
    output: str
    pooled: str | None = None
    pooled_output: bool = False


ATTENTION_PATTERNS = (
    AttentionPattern("q_proj", "k_proj", "v_proj", "o_proj", "head_dim"),
    AttentionPattern("q_proj", "k_proj", "v_proj", "out_proj", "head_dim"),
    AttentionPattern("q_lin", "k_lin", "v_lin", "out_lin", "attention_head_size"),
    AttentionPattern("query", "key", "value", "dense", "attention_head_size", ("all_head_size",)),
    AttentionPattern("query", "key", "value", "../output.dense", "attention_head_size", ("all_head_size",)),
    AttentionPattern("", "", "", "c_proj", "head_dim", ("split_size",), fused="c_attn"),
)
FEED_FORWARD_PATTERNS = (
    FeedForwardPattern(("gate_proj", "up_proj"), "down_proj"),
    FeedForwardPattern(("fc1",), "fc2"),
    FeedForwardPattern(("lin1",), "lin2", pooled=""),
    FeedForwardPattern(("c_fc",), "c_proj"),
    FeedForwardPattern(("intermediate_dense",), "output_dense"),
    FeedForwardPattern(("intermediate.dense",), "output.dense", pooled="attention", pooled_output=True),
    FeedForwardPattern(("ffn",), "ffn_output", pooled="attention", pooled_output=True),
)
HEAD_NAMES = re.compile(
    r"(^|\.)((?!pre_)(\w*classifier)(\.(out_proj|dense))?|score|(classification_)?head(\.out_proj)?)$"
)
"""Heads of transformers' classification models: `classifier`, `score`, `distillation_classifier`, ..."""


def find_sites(model: PreTrainedModel, targets: Sequence[str] = TARGETS) -> list[NeuronSite]:
    """Finds a model's neuron sites by the structure of its layers.

    Args:
        model: A plain classification model; its weights may be on the meta device.
        targets: Kinds of sites to find, of `"attention"` and `"ffn"`.

    Returns:
        The sites in the order of the model's layers.

    Raises:
        UnsupportedArchitectureError: If there is no site of these kinds, or one that can't be exact.
    """
    sites: list[NeuronSite] = []
    for name, layer in model.named_modules():
        if "attention" in targets:
            sites.extend(_attention_sites(model, name, layer))
        if "ffn" in targets:
            sites.extend(_feed_forward_sites(model, name, layer))
    if not sites:
        linear = [name for name, layer in model.named_modules() if layer_features(layer)]
        raise UnsupportedArchitectureError(
            f"Got model type {model.config.model_type!r}, in which no neuron sites of kind {list(targets)} are known; "
            "expected attention with separate q, k, v and output projections or a feed-forward part of two linear "
            f"layers. Linear layers found: {linear[:8]}{' ...' if len(linear) > 8 else ''}. "
            "Choose a Transformer classifier of that structure, such as ViT or BERT."
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
    if not heads:
        raise UnsupportedArchitectureError(
            f"Got model type {model.config.model_type!r} without a linear head of {num_labels} outputs named like "
            "'classifier' or 'score'; modules are cut at that head. Choose a *ForImageClassification or "
            "*ForSequenceClassification model."
        )
    return heads


def _child(model: nn.Module, name: str, relative: str) -> tuple[str, nn.Module] | None:
    """Path and layer at `relative` from the layer `name`, or `None` where there is no such layer."""
    if relative.startswith("../"):
        name, relative = name.rpartition(".")[0], relative[3:]
    path = ".".join(part for part in (name, relative) if part)
    try:
        return path, model.get_submodule(path)
    except AttributeError:
        return None


def _linear_children(model: nn.Module, name: str, relatives: Sequence[str]) -> list[tuple[str, tuple[int, int]]] | None:
    found = []
    for relative in relatives:
        child = _child(model, name, relative)
        features = layer_features(child[1]) if child else None
        if child is None or features is None:
            return None
        found.append((child[0], features))
    return found


def _feed_forward_sites(model: PreTrainedModel, name: str, layer: nn.Module) -> Iterator[NeuronSite]:
    for pattern in FEED_FORWARD_PATTERNS:
        layers = _linear_children(model, name, (*pattern.producers, pattern.output))
        if layers is None:
            continue
        *producers, (output, (width, _)) = layers
        if any(features[1] != width for _, features in producers):
            continue  # a fused or gated layout that these names don't describe
        pooled = _child(model, name, pattern.pooled) if pattern.pooled is not None else None
        yield FeedForwardSite(
            name=name,
            pooled=pooled[0] if pooled else producers[0][0],
            pooled_output=pattern.pooled_output and pooled is not None,
            in_features=producers[0][1][0],
            output=output,
            # Conv1D views its input as (-1, width), which torch can't do at width 0.
            least_width=int(isinstance(model.get_submodule(output), Conv1D)),
            producers=tuple(Rows(path, 0, width) for path, _ in producers),
        )
        return


def _attention_sites(model: PreTrainedModel, name: str, layer: nn.Module) -> Iterator[NeuronSite]:
    for pattern in ATTENTION_PATTERNS:
        names = (pattern.fused,) if pattern.fused else (pattern.query, pattern.key, pattern.value)
        layers = _linear_children(model, name, (*names, pattern.output))
        if layers is None:
            continue
        *projections, (output, (output_width, _)) = layers
        rows = _fused_rows(projections[0]) if pattern.fused else [Rows(path, 0, f[1]) for path, f in projections]
        query, key, value = rows
        in_features = projections[0][1][0]
        if any(features[0] != in_features for _, features in projections):
            continue  # cross-attention: k and v read another input
        if query.size != output_width or key.size != value.size:
            raise _refusal(
                model,
                name,
                f"q, k, v and output widths {query.size}, {key.size}, {value.size}, "
                f"{output_width} are not those of heads of one width",
            )
        head_dim = getattr(layer, pattern.head_dim_attribute, None)
        if not isinstance(head_dim, int) or query.size % head_dim or key.size % head_dim:
            raise _refusal(model, name, f"its {pattern.head_dim_attribute}={head_dim!r} is no width of a head")
        _refuse_inexact(model, name, layer)
        heads = query.size // head_dim
        yield AttentionSite(
            name=name,
            pooled=query.layer,
            in_features=in_features,
            output=output,
            query=query,
            key_rows=key,
            value=value,
            heads=heads,
            key_value_heads=key.size // head_dim,
            head_dim=head_dim,
            is_rotary="position_embeddings" in inspect.signature(layer.forward).parameters,
            head_dim_attribute=pattern.head_dim_attribute,
            width_attributes=tuple(a for a in pattern.width_attributes if hasattr(layer, a)),
            head_tensors=_head_tensors(name, layer, {r.layer for r in rows} | {output}, heads),
        )
        return


def _fused_rows(projection: tuple[str, tuple[int, int]]) -> list[Rows]:
    path, (_, width) = projection
    return [Rows(path, index * (width // 3), width // 3) for index in range(3)]


def _head_tensors(name: str, layer: nn.Module, projections: set[str], heads: int) -> tuple[str, ...]:
    """Parameters of an attention layer, such as a table of position biases, with one column a head."""
    return tuple(
        f"{name}.{path}"
        for path, parameter in layer.named_parameters()
        if f"{name}.{path}".rpartition(".")[0] not in projections
        and parameter.ndim > 1
        and parameter.shape[-1] == heads
    )


def _refuse_inexact(model: PreTrainedModel, name: str, layer: nn.Module) -> None:
    """Screens for structures in which a missing q or k dimension changes more than itself."""
    children = dict(layer.named_children())
    norms = [child for child in children if re.fullmatch(r"[qk]_(layer)?norm", child)]
    if norms:
        raise _refusal(model, name, f"its {norms} normalise over the whole head, so its width can't change")
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    factor = rope.get("partial_rotary_factor", getattr(model.config, "partial_rotary_factor", 1.0))
    if factor not in (None, 1.0):
        raise _refusal(model, name, f"only a share of {factor} of its head dimensions is rotated")


def _refusal(model: PreTrainedModel, name: str, reason: str) -> UnsupportedArchitectureError:
    return UnsupportedArchitectureError(
        f"Got model type {model.config.model_type!r}, whose attention layer {name!r} can't be cut exactly: {reason}. "
        "Mask its feed-forward neurons alone with NeMoConfig(targets=['ffn'])."
    )
