"""From a module's layers back to shapes that the configuration of a plain model can express.

First every site gets its full width again, with zeros where the cut took something away. What a zero column
hides or a zero row never makes can then be left out anew, as far as one number for all layers allows it.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nemo_hf.neurons.sites import AttentionSite, FeedForwardSite, NeuronSite
from nemo_hf.pruning.layer_cuts import ROTARY_NAME, Keep, LayerCut, SiteCut, site_cut
from nemo_hf.pruning.tensor_slices import tensor_cuts, uncut_tensor

State = Mapping[str, Tensor]
Shapes = dict[str, tuple[int, ...]]
Changes = dict[tuple[str, ...], int]
"""New values of a configuration's integers, by path: the names of the parts around it, then its own."""

HEAD_DIM_NAMES = ("head_dim", "attention_head_size", "d_kv", "kv_channels")
UNSET_WIDTH_WORDS = ("inner", "intermediate", "ffn")
"""Words in the names of widths that a configuration may leave out for a multiple of another (GPT-2)."""


@dataclass(frozen=True)
class Narrowing:
    """A configuration of smaller widths, and how the full-width weights are cut to them.

    Args:
        config: The configuration.
        changes: What is changed in it.
        cuts: The cuts of the sites that get smaller.
    """

    config: PreTrainedConfig
    changes: Changes = field(default_factory=dict)
    cuts: tuple[SiteCut, ...] = ()


def restored_state(
    plain: PreTrainedModel, sites: Sequence[NeuronSite], widths: Mapping[str, Mapping[str, int]], state: State
) -> dict[str, Tensor]:
    """Gives a module's weights the shapes of the plain model, with zeros for what was cut away.

    Args:
        plain: The plain model at full width with the module's labels, on the meta device.
        sites: The module's sites.
        widths: Site key to the widths of its cut, as `SiteCut.widths`.
        state: The tensors of the model inside the module.

    Returns:
        The plain model's tensors, on the CPU, floating ones in float32. With them it computes what the module
        does, as long as zeros stay zeros between the layers.

    Raises:
        ValueError: If a tensor is missing or fits no cut.
    """
    by_name = tensor_cuts(plain, [_same_cut(site, widths[site.key], state) for site in sites], {})
    restored = {}
    for name, full in plain.state_dict().items():
        if name not in state:
            raise ValueError(f"Got a module without the tensor {name!r}; expected all of a {type(plain).__name__}'s.")
        tensor = state[name].detach().cpu()
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        if name in by_name:
            tensor = uncut_tensor(tensor, by_name[name], full.shape)
        if tensor.shape != full.shape:
            raise ValueError(
                f"Got the tensor {name!r} of shape {tuple(tensor.shape)}; expected {tuple(full.shape)}, as in a "
                f"{type(plain).__name__} of these labels."
            )
        restored[name] = tensor.clone()
    return restored


def _same_cut(site: NeuronSite, widths: Mapping[str, int], state: State) -> SiteCut:
    """A cut of the full-width layers that puts everything where the module has it."""
    if site.cut_by.is_scattered:
        paths = {site.output, *(rows.layer for rows, _ in site.produced())}
        cuts = {path: _scattered_cut(state, path) for path in paths}
        return SiteCut({}, cuts)
    if not isinstance(site, AttentionSite):
        return site_cut(site, {part: torch.arange(widths[part]) for part in site.parts})
    heads = site.head_dim * torch.arange(widths["key_value_heads"]).unsqueeze(-1)
    dims = (heads + torch.arange(widths["head_dim"])).flatten()
    if not site.is_rotary:
        return site_cut(site, {"query_key": dims, "value": dims})
    angles = state[f"{site.name}.{ROTARY_NAME}.angle_indices"].cpu()[: widths["head_dim"] // 2]
    # Kept frequencies rise; the zeros after them stand for none.
    kept = torch.cat([angles[:1], angles[1:][angles[1:] > 0]])
    return site_cut(site, {"query_key": kept, "value": dims})


def _scattered_cut(state: State, path: str) -> LayerCut:
    outputs, inputs = (state.get(f"{path}.{side}_indices") for side in ("output", "input"))
    return LayerCut(
        None if outputs is None else outputs.cpu(), None if inputs is None else inputs.cpu(), is_scattered=True
    )


def narrowings(
    plain: PreTrainedModel, sites: Sequence[NeuronSite], state: State, shapes_of: Callable[[PreTrainedConfig], Shapes]
) -> Iterator[Narrowing]:
    """Finds configurations of smaller widths by trying them.

    Args:
        plain: The plain model at full width, on the meta device.
        sites: Its sites.
        state: Its tensors; zeros in them say what may go.
        shapes_of: Returns the shapes of the tensors of a model with a configuration, none if it allows no model.

    Yields:
        Narrowings whose shapes fit, the smallest one first and the full width last. Whether the model then
        computes the same is for the caller to try.
    """
    search = _Search(plain, [_Alive.of(plain, site, state) for site in sites], shapes_of)
    feed_forward = search.feed_forward()
    attention = list(search.attention())
    for units in (feed_forward, Narrowing(plain.config)) if feed_forward.changes else (feed_forward,):
        for heads in (*attention, Narrowing(plain.config)):
            config = _changed(plain.config, {**units.changes, **heads.changes})
            changes = {
                path: value
                for path, value in {**units.changes, **heads.changes}.items()
                if _value(plain.config, path) != value
            }
            yield Narrowing(config, changes, (*units.cuts, *heads.cuts))


@dataclass(frozen=True, eq=False)
class _Alive:
    """Neurons of a site that reach what comes after it, boolean: units, or (heads, dimensions) of q.k and v."""

    site: NeuronSite
    units: Tensor
    query_key: Tensor | None = None

    @classmethod
    def of(cls, plain: PreTrainedModel, site: NeuronSite, state: State) -> "_Alive":
        read = _read_inputs(plain, site.output, state)
        if not isinstance(site, AttentionSite):
            return cls(site, read)
        heads, sharing = site.key_value_heads, site.heads // site.key_value_heads
        made = {part: _made_outputs(plain, rows.layer, state)[rows.indices(torch.arange(rows.size))]
                for rows, part in site.produced()}  # fmt: skip
        values = read.view(heads, sharing, -1).any(1) & made["value"].view(heads, -1)
        query_key = made["query"].view(heads, sharing, -1).any(1) & made["key"].view(heads, -1)
        return cls(site, values, query_key)


def _weight(plain: nn.Module, path: str, state: State) -> Tensor:
    """Weight of a linear layer, shape (outputs, inputs)."""
    weight = state[f"{path}.weight"]
    return weight.T if isinstance(plain.get_submodule(path), Conv1D) else weight


def _read_inputs(plain: nn.Module, path: str, state: State) -> Tensor:
    return (_weight(plain, path, state) != 0).any(0)


def _made_outputs(plain: nn.Module, path: str, state: State) -> Tensor:
    made = (_weight(plain, path, state) != 0).any(1)
    bias = state.get(f"{path}.bias")
    return made if bias is None else made | (bias != 0)


@dataclass(frozen=True)
class _Search:
    """Tries configurations against the shapes that the cut tensors would have."""

    plain: PreTrainedModel
    alive: Sequence[_Alive]
    shapes_of: Callable[[PreTrainedConfig], Shapes]

    def feed_forward(self) -> Narrowing:
        """The narrowest widths of feed-forward parts that single integers of the configuration allow."""
        full_shapes = self.shapes_of(self.plain.config)
        left = [alive for alive in self.alive if isinstance(alive.site, FeedForwardSite)]
        accepted: Changes = {}
        cuts: list[SiteCut] = []
        for full in sorted({alive.site.neurons for alive in left}):
            for path in _paths(self.plain.config, full, _may_be_width):
                group = [alive for alive in left if alive.site.neurons == full]
                width = _widest(group)
                if not group or width >= full:
                    continue
                probed = self.shapes_of(_changed(self.plain.config, {path: width}))
                reached = [a for a in group if probed.get(f"{a.site.output}.weight") != _shape(full_shapes, a)]
                own = [_narrow_units(alive, _widest(reached)) for alive in reached]
                if reached and self._fits({path: _widest(reached)}, own):
                    accepted[path] = _widest(reached)
                    cuts += own
                    left = [alive for alive in left if alive not in reached]
        return Narrowing(self.plain.config, accepted, tuple(cuts))

    def attention(self) -> Iterator[Narrowing]:
        """Fewer and narrower heads, as far as the configuration allows them, the smallest first."""
        alive = [alive for alive in self.alive if isinstance(alive.site, AttentionSite)]
        sites = [a.site for a in alive if isinstance(a.site, AttentionSite)]
        kinds = {(site.heads, site.key_value_heads, site.head_dim) for site in sites}
        if len(kinds) != 1:
            return
        ((heads, key_value_heads, head_dim),) = kinds
        fewest = max(1, *(int(a.units.any(-1).sum()) for a in alive))
        width = max(_head_width(a) for a in alive)
        for count, narrow in ((fewest, width), (fewest, head_dim), (key_value_heads, width)):
            if (count, narrow) == (key_value_heads, head_dim):
                continue
            counts = {heads: heads // key_value_heads * count, key_value_heads: count}
            changes: Changes = {}
            for full, fewer in counts.items() if count < key_value_heads else ():
                changes |= dict.fromkeys(_paths(self.plain.config, full, _may_be_heads), fewer)
            changes |= dict.fromkeys(_head_dim_paths(self.plain.config, head_dim), narrow)
            for pruning_mode in ("dense", "dense-rescaled") if narrow < head_dim else ("dense",):
                cuts = [_narrow_heads(a, count, narrow, pruning_mode) for a in alive]
                if self._fits(changes, cuts):
                    yield Narrowing(self.plain.config, changes, tuple(cuts))

    def _fits(self, changes: Changes, cuts: Sequence[SiteCut]) -> bool:
        expected = {name: tuple(tensor.shape) for name, tensor in self.plain.state_dict().items()}
        for name, cut in tensor_cuts(self.plain, cuts, {}).items():
            shape = list(expected[name])
            for dim, index in cut.indices.items():
                shape[dim] = len(index)
            expected[name] = tuple(shape)
        return self.shapes_of(_changed(self.plain.config, changes)) == expected


def _shape(shapes: Shapes, alive: _Alive) -> tuple[int, ...]:
    return shapes[f"{alive.site.output}.weight"]


def _widest(group: Sequence[_Alive]) -> int:
    return max((1, *(int(alive.units.sum()) for alive in group)))


def _head_width(alive: _Alive) -> int:
    """Dimensions of the widest head; all where a dimension's place in the head has a meaning."""
    site = alive.site
    assert isinstance(site, AttentionSite)
    assert alive.query_key is not None
    if site.is_rotary or site.is_gated_only:
        return site.head_dim
    living = alive.units.any(-1, keepdim=True)
    return max(1, int(alive.units.sum(-1).max()), int((alive.query_key & living).sum(-1).max()))


def _narrow_units(alive: _Alive, width: int) -> SiteCut:
    return site_cut(replace(alive.site, pruning_mode="dense"), {"intermediate": _first(alive.units, width)})


def _narrow_heads(alive: _Alive, count: int, width: int, pruning_mode: str) -> SiteCut:
    site = alive.site
    assert isinstance(site, AttentionSite)
    assert alive.query_key is not None
    heads = _first(alive.units.any(-1), count).tolist()
    keep: Keep = {
        "query_key": torch.cat([_first(alive.query_key[head], width) + head * site.head_dim for head in heads]),
        "value": torch.cat([_first(alive.units[head], width) + head * site.head_dim for head in heads]),
    }
    if site.is_rotary:
        keep = {**keep, "query_key": torch.arange(site.query_key_dims)}
    cut = site_cut(replace(site, pruning_mode=pruning_mode), keep)
    return replace(cut, constants={})


def _first(alive: Tensor, count: int) -> Tensor:
    """Sorted indices of `count` neurons: the living ones, then the first of the others."""
    return alive.to(torch.int8).argsort(descending=True, stable=True)[:count].sort().values


def _parts(config: PreTrainedConfig) -> Iterator[tuple[tuple[str, ...], PreTrainedConfig]]:
    """A configuration and those inside it, with their paths."""
    yield (), config
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            yield (name,), part


def _paths(config: PreTrainedConfig, value: int, may_be: Callable[[str, Any, int], bool]) -> list[tuple[str, ...]]:
    """Paths of the integers that may stand for a width."""
    return [
        (*path, name)
        for path, part in _parts(config)
        for name, found in part.to_dict().items()
        if may_be(name, found, value)
    ]


def _may_be_width(name: str, found: Any, value: int) -> bool:
    unset = found is None and any(word in name for word in UNSET_WIDTH_WORDS)
    return unset or (type(found) is int and found == value)


def _may_be_heads(name: str, found: Any, value: int) -> bool:
    is_count = "head" in name and not any(word in name for word in ("dim", "size", "width"))
    return is_count and type(found) is int and found == value


def _head_dim_paths(config: PreTrainedConfig, head_dim: int) -> list[tuple[str, ...]]:
    """Paths of the width of a head; the usual one where none is set, which some families read all the same."""
    found = [
        (*path, name)
        for path, part in _parts(config)
        for name in HEAD_DIM_NAMES
        if getattr(part, name, None) == head_dim and name not in getattr(part, "attribute_map", {})
    ]
    return found or [("head_dim",)]


def _changed(config: PreTrainedConfig, changes: Changes) -> PreTrainedConfig:
    changed = copy.deepcopy(config)
    for path, value in changes.items():
        setattr(_owner(changed, path), path[-1], value)
    return changed


def _owner(config: PreTrainedConfig, path: tuple[str, ...]) -> PreTrainedConfig:
    for name in path[:-1]:
        config = getattr(config, name)
    return config


def _value(config: PreTrainedConfig, path: tuple[str, ...]) -> Any:
    return getattr(_owner(config, path), path[-1], None)
