"""Neuron sites: where a model's attention and feed-forward neurons are, found by structure.

This is the only place that knows the names of layers and the quirks of families. A site is data: which
layers produce its neurons, which layer reads them, and which tensor its mask generator pools.
"""

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .config import TARGETS


class UnsupportedArchitectureError(ValueError):
    """A model whose neurons can't be masked and cut exactly; the message says why and what to do."""


@dataclass(frozen=True)
class Rows:
    """Consecutive outputs of a layer: all of a Linear's, or one share of a fused projection."""

    layer: str
    start: int
    size: int


@dataclass(frozen=True)
class NeuronSite:
    """Neurons that share one mask generator because their projections read the same input.

    Args:
        name: Path of the block that holds the site; unique with `kind`.
        pooled: Path of the layer at which the input is pooled.
        pooled_output: Whether the output of `pooled` is taken instead of its input (where the feed-forward
            part is called in chunks, its own input is only a share of the sequence).
        in_features: Width of the pooled input.
        output: Path of the layer that reads the neurons.
    """

    name: str
    pooled: str
    in_features: int
    output: str
    pooled_output: bool = field(default=False, kw_only=True)

    kind = ""

    @property
    def key(self) -> str:
        """Name that is unique in the model, also as a key in files."""
        return f"{self.name}:{self.kind}"

    @property
    def parts(self) -> dict[str, int]:
        """Number of neurons by part, in the order in which the mask holds them."""
        raise NotImplementedError

    @property
    def neurons(self) -> int:
        """Number of neurons, the width of the mask."""
        return sum(self.parts.values())

    @property
    def back_end(self) -> str:
        """How modules are cut here: `"dense"` or `"scatter"`."""
        return "dense"

    def read_mask(self, mask: Tensor) -> Tensor:
        """Spreads a mask (..., neurons) over what `output` reads: (..., its in_features)."""
        return mask


@dataclass(frozen=True)
class FeedForwardSite(NeuronSite):
    """Intermediate units of a feed-forward part; with a GLU, of its gate and up projections together."""

    producers: tuple[Rows, ...] = ()

    kind = "ffn"

    @property
    def parts(self) -> dict[str, int]:  # noqa: D102 - inherited
        return {"intermediate": self.producers[0].size}


@dataclass(frozen=True)
class AttentionSite(NeuronSite):
    """Dimensions of an attention block: those of q and k together, and those of v.

    Args:
        query: Rows of q. `key_rows` and `value` likewise.
        heads: Number of query heads; `key_value_heads` of them are shared under grouped-query attention.
        head_dim: Width of a head.
        is_rotary: Whether q and k are rotated, which ties dimension j to j + head_dim / 2.
        head_dim_attribute: Attribute of the attention layer that says the width of a head, or `None`.
        width_attributes: Attributes of the layer that hold heads times head width.
        head_tensors: Paths of other parameters whose last dimension counts the heads.
        is_scattered: Whether the scatter back end is used although the head width has an attribute.
    """

    query: Rows = Rows("", 0, 0)
    key_rows: Rows = Rows("", 0, 0)
    value: Rows = Rows("", 0, 0)
    heads: int = 0
    key_value_heads: int = 0
    head_dim: int = 0
    is_rotary: bool = False
    head_dim_attribute: str | None = None
    width_attributes: tuple[str, ...] = ()
    head_tensors: tuple[str, ...] = ()
    is_scattered: bool = False

    kind = "attention"

    @property
    def query_key_dims(self) -> int:
        """Number of q.k neurons in a key/value head: dimensions, or tied pairs of them."""
        return self.head_dim // 2 if self.is_rotary else self.head_dim

    @property
    def parts(self) -> dict[str, int]:  # noqa: D102 - inherited
        return {
            "query_key": self.key_value_heads * self.query_key_dims,
            "value": self.key_value_heads * self.head_dim,
        }

    @property
    def back_end(self) -> str:  # noqa: D102 - inherited
        # The rotation reads its cosines and sines at full head width, so rotary heads keep their shape.
        scatters = self.is_scattered or self.is_rotary or self.head_dim_attribute is None
        return "scatter" if scatters else "dense"

    def query_mask(self, mask: Tensor) -> Tensor:
        """Spreads a mask (..., neurons) over the rows of q: (..., heads * head_dim)."""
        mask = mask[..., : self.parts["query_key"]].unflatten(-1, (self.key_value_heads, -1))
        return self._shared(torch.cat([mask, mask], -1) if self.is_rotary else mask)

    def read_mask(self, mask: Tensor) -> Tensor:  # noqa: D102 - inherited
        return self._shared(mask[..., self.parts["query_key"] :].unflatten(-1, (self.key_value_heads, -1)))

    def _shared(self, mask: Tensor) -> Tensor:
        """Gives each query head the mask of its key/value head: (..., key_value_heads, dims), flattened."""
        return mask.repeat_interleave(self.heads // self.key_value_heads, -2).flatten(-2)


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
    FeedForwardPattern(("intermediate.dense",), "output.dense", pooled="attention", pooled_output=True),
    FeedForwardPattern(("ffn",), "ffn_output", pooled="attention", pooled_output=True),
)
HEAD_NAMES = re.compile(r"(^|\.)((?!pre_)(\w*classifier)(\.out_proj)?|score|(classification_)?head(\.out_proj)?)$")
"""Heads of transformers' classification models: `classifier`, `score`, `distillation_classifier`, ..."""


def layer_features(layer: nn.Module) -> tuple[int, int] | None:
    """Returns (in_features, out_features) of a plain linear layer, `None` for any other.

    Subclasses don't count: quantized and adapter layers hold weights that can't be cut by row.
    """
    if type(layer) is nn.Linear:
        return layer.in_features, layer.out_features
    if type(layer) is Conv1D:
        return layer.nx, layer.nf
    return None


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


def with_back_ends(sites: Sequence[NeuronSite], back_ends: Mapping[str, str]) -> list[NeuronSite]:
    """Applies the back ends that were found exact for a model.

    Args:
        sites: The model's sites.
        back_ends: Site key to `"dense"` or `"scatter"`; sites that are not named stay as they are.

    Returns:
        The sites, in order.

    Raises:
        ValueError: If a site can't have the back end that is named.
    """
    changed = []
    for site in sites:
        wanted = back_ends.get(site.key, site.back_end)
        if wanted == "scatter" and isinstance(site, AttentionSite):
            site = replace(site, is_scattered=True)
        if site.back_end != wanted:
            raise ValueError(
                f"Got the back end {wanted!r} for {site.key!r}; expected {site.back_end!r}. "
                "The config.json is damaged or of another version: save the model again."
            )
        changed.append(site)
    return changed


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
