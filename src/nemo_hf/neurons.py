"""Neuron sites as data: which layers produce a site's neurons, which layer reads them, and what is pooled."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


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
    """Intermediate units of a feed-forward part; with a GLU, of its gate and up projections together.

    Args:
        producers: Rows of the layers that make the units.
        least_width: 1 where the layer that reads the units can't have no inputs, else 0.
    """

    producers: tuple[Rows, ...] = ()
    least_width: int = 0

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


def layer_features(layer: nn.Module) -> tuple[int, int] | None:
    """Returns (in_features, out_features) of a plain linear layer, `None` for any other.

    Subclasses don't count: quantized and adapter layers hold weights that can't be cut by row.
    """
    if type(layer) is nn.Linear:
        return layer.in_features, layer.out_features
    if type(layer) is Conv1D:
        return layer.nx, layer.nf
    return None
