"""Neuron sites: which layers produce a group of neurons, which layers read them, and how they can be pruned."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from transformers.pytorch_utils import Conv1D

CHANNEL_NORMS = (_BatchNorm, _InstanceNorm)  # work on each channel separately
PAD = -1  # index of a row or column of zeros


class UnsupportedArchitectureError(ValueError):
    """A model whose neurons can't be masked and cut exactly; the message says why, and what to do."""


@dataclass(frozen=True)
class PruningMode:
    """How modules are cut at a site."""

    name: str
    is_scattered: bool = False  # layers keep their outer shape, with zeros where nothing is computed; or they shrink
    drops_heads: bool = False  # dense attention: heads without values are removed, or stay as zeros
    rescales: bool = False  # dense attention: q is scaled where the softmax scale follows the width that a layer finds
    is_gated: bool = False  # masks act where neurons are produced too, since norms or rotations behind read them all


DENSE = PruningMode("dense", drops_heads=True)
SCATTER = PruningMode("scatter", is_scattered=True)
SCATTER_GATED = PruningMode("scatter-gated", is_scattered=True, is_gated=True)
SCATTERED = (SCATTER, SCATTER_GATED)
DENSE_ATTENTION = (  # in the order of the trials
    DENSE,
    PruningMode("dense-rescaled", drops_heads=True, rescales=True),
    PruningMode("dense-heads-kept"),
    PruningMode("dense-heads-kept-rescaled", rescales=True),
    PruningMode("dense-heads-kept-gated", is_gated=True),
    PruningMode("dense-heads-kept-rescaled-gated", rescales=True, is_gated=True),
)
PRUNING_MODES = {mode.name: mode for mode in (*DENSE_ATTENTION, *SCATTERED)}


@dataclass(frozen=True)
class Rows:
    """Outputs of a layer that are neurons: consecutive ones, or equally many from each of its shares."""

    layer: str
    start: int  # in the layer, or in each share
    size: int
    outputs: int = 0  # all outputs of the layer; 0: only these
    shares: int = 1  # equal parts of the layer, such as heads that hold q, k and v side by side

    @property
    def layer_outputs(self) -> int:
        """Number of all outputs of the layer."""
        return self.outputs or self.size

    def indices(self, kept: Tensor) -> Tensor:
        """Turns positions among these outputs, or `PAD`, into output indices of the layer; same shape."""
        each, share = self.size // self.shares, self.layer_outputs // self.shares
        return torch.where(kept == PAD, PAD, self.start + kept // each * share + kept % each)

    def spread(self, values: Tensor) -> Tensor:
        """Spreads factors (..., size) over all outputs of the layer; other outputs get 1."""
        each, share = self.size // self.shares, self.layer_outputs // self.shares
        if each == share:
            return values
        by_share = values.unflatten(-1, (self.shares, each))
        return F.pad(by_share, (self.start, share - self.start - each), value=1.0).flatten(-2)


@dataclass(frozen=True)
class NeuronSite:
    """Neurons that share one mask generator; `name` is the path of the block around them, unique with `kind`."""

    name: str
    pooled: str  # path of the layer whose input is pooled for the generator
    in_features: int  # width of what is pooled
    output: str  # path of the layer that reads the neurons
    pooled_output: bool = field(default=False, kw_only=True)  # pool the output of `pooled` instead of its input
    pruning_mode: str = field(default="", kw_only=True)  # one of `pruning_modes`
    is_gated_only: bool = field(default=False, kw_only=True)  # what lies before `output` allows only gated modes
    least_width: int = field(default=0, kw_only=True)  # 1 where a dense cut must keep a neuron

    kind = ""

    def __post_init__(self) -> None:
        if not self.pruning_mode:
            object.__setattr__(self, "pruning_mode", self.pruning_modes[0].name)

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
    def pruning_modes(self) -> tuple[PruningMode, ...]:
        """Pruning modes that may be exact here, the one with the smallest modules first."""
        return (SCATTER_GATED,) if self.is_gated_only else (DENSE, *SCATTERED)

    @property
    def cut_by(self) -> PruningMode:
        """The pruning mode."""
        return PRUNING_MODES[self.pruning_mode]

    @property
    def readers(self) -> tuple[str, ...]:
        """Paths of all layers that read the neurons, in the order in which they run."""
        return (self.output,)

    @property
    def entry(self) -> dict[str, Any]:
        """The site's entry in a configuration: key, pruning mode, and its layers if they can't be found by name."""
        return {"key": self.key, "pruning_mode": self.pruning_mode}

    def read_mask(self, mask: Tensor) -> Tensor:
        """Spreads a mask (..., neurons) over what `output` reads: (..., its in_features)."""
        return mask

    def input_scale(self, reader: str, mask: Tensor) -> Tensor:
        """Spreads a mask (neurons,) over all inputs of one of `readers`."""
        return self.read_mask(mask)

    def produced(self) -> tuple[tuple[Rows, str], ...]:
        """The outputs that are neurons, each with its part: `"query"`, `"key"`, `"value"` or `"units"`."""
        raise NotImplementedError

    @property
    def layers(self) -> set[str]:
        """Paths of all layers that the site names."""
        return {self.pooled, *self.readers, *(rows.layer for rows, _ in self.produced())}

    def part_mask(self, part: str, mask: Tensor) -> Tensor:
        """Spreads a mask (..., neurons) over the rows of a part of `produced`."""
        return mask


@dataclass(frozen=True)
class FeedForwardSite(NeuronSite):
    """Intermediate units of a feed-forward part; the gate and up projections of a GLU share theirs."""

    producers: tuple[Rows, ...] = ()

    kind = "ffn"

    @property
    def parts(self) -> dict[str, int]:  # noqa: D102 - inherited
        return {"intermediate": self.producers[0].size}

    def produced(self) -> tuple[tuple[Rows, str], ...]:  # noqa: D102 - inherited
        return tuple((rows, "units") for rows in self.producers)


@dataclass(frozen=True)
class ChannelSite(NeuronSite):
    """Channels of convolutions, or groups of them; closed where they are read, as a norm's bias would revive them."""

    channels: int = 0
    size: int = 0  # number of neurons
    producers: tuple[str, ...] = ()  # convolutions or linear layers; their results are added, or multiplied
    passing: tuple[str, ...] = ()  # norms and grouped convolutions that the channels pass through
    read_by: tuple[tuple[str, int], ...] = ()  # layers that read the channels, each with its number of inputs

    kind = "conv"

    @property
    def parts(self) -> dict[str, int]:  # noqa: D102 - inherited
        return {"channels": self.size}

    @property
    def pruning_modes(self) -> tuple[PruningMode, ...]:  # noqa: D102 - inherited
        return (DENSE,)

    @property
    def readers(self) -> tuple[str, ...]:  # noqa: D102 - inherited
        return tuple(path for path, _ in self.read_by)

    @property
    def entry(self) -> dict[str, Any]:  # noqa: D102 - inherited
        layers = {"producers": list(self.producers), "passing": list(self.passing), "readers": list(self.readers)}
        return {**super().entry, "site": {"kind": self.kind, **layers}}

    @property
    def layers(self) -> set[str]:  # noqa: D102 - inherited
        return {*super().layers, *self.passing}

    def produced(self) -> tuple[tuple[Rows, str], ...]:  # noqa: D102 - inherited
        return tuple((Rows(path, 0, self.channels), "units") for path in self.producers)

    def part_mask(self, part: str, mask: Tensor) -> Tensor:  # noqa: D102 - inherited
        return spread(mask, self.channels)

    def input_scale(self, reader: str, mask: Tensor) -> Tensor:  # noqa: D102 - inherited
        return spread(mask, dict(self.read_by)[reader])

    @property
    def outputs(self) -> dict[str, int]:
        """Layers whose outputs are the channels, with the number of outputs a neuron."""
        return dict.fromkeys((*self.producers, *self.passing), self.channels // self.size)

    @property
    def inputs(self) -> dict[str, int]:
        """Layers whose inputs are the channels, with the number of inputs a neuron."""
        return {path: width // self.size for path, width in self.read_by}


@dataclass(frozen=True)
class AttentionSite(NeuronSite):
    """Dimensions of an attention block: those that q and k share, and those of v.

    Rotation ties dimension j of q and k to j + head_dim / 2: a q.k neuron is then a frequency, one pair in all heads.
    """

    query: Rows = Rows("", 0, 0)
    key_rows: Rows = Rows("", 0, 0)
    value: Rows = Rows("", 0, 0)
    heads: int = 1  # of q, which share `key_value_heads` heads of k and v
    key_value_heads: int = 1
    head_dim: int = 1  # width of a head's q and k
    is_rotary: bool = False
    head_dim_attribute: str | None = None  # of the attention layer: holds the head width
    width_attributes: tuple[str, ...] = ()  # of the attention layer: hold heads times head width
    head_tensors: tuple[str, ...] = ()  # paths of other parameters whose last dimension counts the heads

    kind = "attention"

    @property
    def value_dim(self) -> int:
        """Width of a head's v."""
        return self.value.size // self.key_value_heads

    @property
    def query_key_heads(self) -> int:
        """Number of heads that have q.k neurons of their own."""
        return 1 if self.is_rotary else self.key_value_heads

    @property
    def query_key_dims(self) -> int:
        """Number of q.k neurons of each of these heads: dimensions, or frequencies."""
        return self.head_dim // 2 if self.is_rotary else self.head_dim

    @property
    def parts(self) -> dict[str, int]:  # noqa: D102 - inherited
        return {"query_key": self.query_key_heads * self.query_key_dims, "value": self.value.size}

    @property
    def pruning_modes(self) -> tuple[PruningMode, ...]:  # noqa: D102 - inherited
        if self.is_gated_only:
            return (SCATTER_GATED,)
        neurons: Counter[str] = Counter()
        for rows, _ in self.produced():
            neurons[rows.layer] += rows.size
        lies_apart = all(rows.shares == 1 and neurons[rows.layer] == rows.layer_outputs for rows, _ in self.produced())
        return (*DENSE_ATTENTION, *SCATTERED) if lies_apart and self.value_dim == self.head_dim else SCATTERED

    def produced(self) -> tuple[tuple[Rows, str], ...]:  # noqa: D102 - inherited
        return ((self.query, "query"), (self.key_rows, "key"), (self.value, "value"))

    def part_mask(self, part: str, mask: Tensor) -> Tensor:  # noqa: D102 - inherited
        if part == "value":
            return mask[..., self.parts["query_key"] :]
        mask = mask[..., : self.parts["query_key"]]
        if self.is_rotary:
            return torch.cat([mask] * (2 * (self.heads if part == "query" else self.key_value_heads)), -1)
        return self._shared(mask) if part == "query" else mask

    def read_mask(self, mask: Tensor) -> Tensor:  # noqa: D102 - inherited
        return self._shared(self.part_mask("value", mask))

    def _shared(self, mask: Tensor) -> Tensor:
        """Repeats a mask (..., key_value_heads x dims) for each query head: (..., heads x dims)."""
        by_head: Tensor = mask.unflatten(-1, (self.key_value_heads, -1))
        return by_head.repeat_interleave(self.heads // self.key_value_heads, -2).flatten(-2)


def with_pruning_modes(sites: Sequence[NeuronSite], pruning_modes: Mapping[str, str]) -> list[NeuronSite]:
    """Returns the sites with other pruning modes (by site key); raises ValueError if one can't have its mode."""
    changed = [replace(site, pruning_mode=pruning_modes.get(site.key, site.pruning_mode)) for site in sites]
    for site in changed:
        possible = [mode.name for mode in site.pruning_modes]
        if site.pruning_mode not in possible:
            raise ValueError(
                f"Got the pruning mode {site.pruning_mode!r} for {site.key!r}; expected one of {possible}. "
                "The config.json is damaged or of another version: save the model again."
            )
    return changed


def spread(values: Tensor, width: int) -> Tensor:
    """Repeats each of (..., neurons) values for its consecutive inputs or outputs: (..., width)."""
    return values if values.shape[-1] == width else values.repeat_interleave(width // values.shape[-1], -1)


def neuron_dim(layer: nn.Module) -> int:
    """Dimension that counts the neurons in a layer's input; 1 of images (batch, channels, height, width)."""
    return 1 if isinstance(layer, nn.Conv2d) else -1


def layer_features(layer: nn.Module) -> tuple[int, int] | None:
    """Returns (in_features, out_features) of a plain linear layer, `None` for any other."""
    if type(layer) is Conv1D:
        return layer.nx, layer.nf
    # No subclasses of other libraries: quantized and adapter layers hold weights that can't be cut by row.
    is_plain = type(layer) is nn.Linear or type(layer).__module__.startswith(("transformers.models.", "timm."))
    if is_plain and isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return None
