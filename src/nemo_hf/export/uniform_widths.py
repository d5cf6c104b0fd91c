"""Finds plain configurations, which have one width for all layers, into which a module's weights fit with zeros.

The weights first get the parent's widths again, with zeros for the neurons that were cut. Neurons that are zero in
every layer can then be left out, as far as the configuration has a number for their width.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nemo_hf.neurons.sites import AttentionSite, FeedForwardSite, NeuronSite, Rows, UnsupportedArchitectureError
from nemo_hf.pruning.layer_cuts import ROTARY_NAME, LayerCut, SiteCut, site_cut, tensor_cuts, uncut_tensor

from .plain_files import OTHER_WAYS

State = Mapping[str, Tensor]
Shapes = dict[str, tuple[int, ...]]

HEAD_DIM_NAMES = ("head_dim", "attention_head_size", "d_kv", "kv_channels")
UNSET_WIDTH_WORDS = ("inner", "intermediate", "ffn")  # of widths that may be unset for a multiple of another (GPT-2)


@dataclass(frozen=True)
class UniformWidths:
    """A plain configuration, and the cuts that turn the zero-padded weights into its shapes."""

    config: PreTrainedConfig
    changes: dict[str, int] = field(default_factory=dict)  # of the parent's configuration: "text_config.head_dim" to 4
    cuts: tuple[SiteCut, ...] = ()


def zero_padded_state(
    plain: PreTrainedModel, sites: Sequence[NeuronSite], widths: Mapping[str, Mapping[str, int]], state: State
) -> dict[str, Tensor]:
    """Gives a module's tensors the shapes of the plain model at full width, with zeros for what was cut.

    `plain` may be on the meta device; `widths` are those of the module's cuts by site key, as `SiteCut.widths`. Returns
    tensors on the CPU, floating ones in float32.
    """
    state = {name: tensor.detach().cpu() for name, tensor in state.items()}
    by_name = tensor_cuts(plain, [_original_cut(site, widths[site.key], state) for site in sites], {})
    padded = {}
    for name, full in plain.state_dict().items():
        tensor = state.get(name, torch.empty(0))
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        if name in by_name and name in state:
            tensor = uncut_tensor(tensor, by_name[name], full.shape)
        if tensor.shape != full.shape:
            raise UnsupportedArchitectureError(
                f"Got a module whose tensor {name!r} is missing or doesn't fit into a {type(plain).__name__}; expected "
                f"shape {tuple(full.shape)} at full width. {OTHER_WAYS.format('export_onnx')}"
            )
        padded[name] = tensor.clone()
    return padded


def _original_cut(site: NeuronSite, widths: Mapping[str, int], state: State) -> SiteCut:
    """A cut of the full-width layers with the module's shapes; dense layers don't say which neurons: the first."""
    if site.cut_by.is_scattered:
        paths = {site.output, *(rows.layer for rows, _ in site.produced())}
        indices = {path: (state.get(f"{path}.output_indices"), state.get(f"{path}.input_indices")) for path in paths}
        return SiteCut({}, {path: LayerCut(*index, is_scattered=True) for path, index in indices.items()})
    if not isinstance(site, AttentionSite):
        return site_cut(site, {part: torch.arange(widths[part]) for part in site.parts})
    heads = site.head_dim * torch.arange(widths["key_value_heads"]).unsqueeze(-1)
    dims = (heads + torch.arange(widths["head_dim"])).flatten()
    if not site.is_rotary:
        return site_cut(site, {"query_key": dims, "value": dims})
    angles = state[f"{site.name}.{ROTARY_NAME}.angle_indices"][: widths["head_dim"] // 2]
    kept = torch.cat([angles[:1], angles[1:][angles[1:] > 0]])  # frequencies in rising order, then zeros as padding
    return site_cut(site, {"query_key": kept, "value": dims})


def uniform_widths(
    plain: PreTrainedModel, sites: Sequence[NeuronSite], state: State, shapes_of: Callable[[PreTrainedConfig], Shapes]
) -> Iterator[UniformWidths]:
    """Finds configurations of smaller widths whose shapes fit, the smallest first and the full width last.

    Takes the plain model at full width, on the meta device, its sites and zero-padded tensors. `shapes_of` returns the
    tensors' shapes by configuration, none if it allows no model. Whether it computes the same is yet to be tried.
    """
    search = _Search(plain, sites, state, shapes_of)
    full = UniformWidths(plain.config)
    units, heads = search.feed_forward(), list(search.attention())
    before = {path: value for path, _, value in _entries(plain.config)}
    for one in (units, full) if units.changes else (full,):
        for other in (*heads, full):
            changes = {**one.changes, **other.changes}
            differing = {path: value for path, value in changes.items() if before.get(path) != value}
            yield UniformWidths(_changed(plain.config, changes), differing, (*one.cuts, *other.cuts))


@dataclass(frozen=True)
class _Search:
    """Tries configurations against the shapes that the cut tensors would have."""

    plain: PreTrainedModel
    sites: Sequence[NeuronSite]
    state: State
    shapes_of: Callable[[PreTrainedConfig], Shapes]

    def feed_forward(self) -> UniformWidths:
        """The smallest feed-forward widths that single integers of the configuration allow."""
        config = self.plain.config
        full_shapes = self.shapes_of(config)
        left = {site: self._read(site) for site in self.sites if isinstance(site, FeedForwardSite)}
        changes: dict[str, int] = {}
        cuts: list[SiteCut] = []
        for full in sorted({site.neurons for site in left}):
            for path, name, value in _entries(config):
                is_unset = value is None and any(word in name for word in UNSET_WIDTH_WORDS)
                group = {site: used for site, used in left.items() if site.neurons == full}
                width = _widest(group.values())
                if not group or width >= full or not (is_unset or (type(value) is int and value == full)):
                    continue
                tried = self.shapes_of(_changed(config, {path: width}))
                weights = {site: f"{site.output}.weight" for site in group}
                reached = {s: used for s, used in group.items() if tried.get(weights[s]) != full_shapes[weights[s]]}
                if not reached:
                    continue
                width = _widest(reached.values())
                dense = {replace(site, pruning_mode="dense"): _first(used, width) for site, used in reached.items()}
                own = [site_cut(site, {"intermediate": kept}) for site, kept in dense.items()]
                if self._fits({path: width}, own):
                    changes[path] = width
                    cuts += own
                    left = {site: used for site, used in left.items() if site not in reached}
        return UniformWidths(config, changes, tuple(cuts))

    def attention(self) -> Iterator[UniformWidths]:
        """Fewer and narrower heads, as far as the configuration allows them, the smallest first."""
        config = self.plain.config
        used = {site: self._used_dims(site) for site in self.sites if isinstance(site, AttentionSite)}
        shapes = {(site.heads, site.key_value_heads, site.head_dim) for site in used}
        if len(shapes) != 1:
            return
        ((heads, key_value_heads, head_dim),) = shapes
        fewest = max(1, *(int(value.any(-1).sum()) for value, _ in used.values()))
        narrowest = max(_head_width(site, *dims) for site, dims in used.items())
        for count, width in ((fewest, narrowest), (fewest, head_dim), (key_value_heads, narrowest)):
            if (count, width) == (key_value_heads, head_dim):
                continue
            changes = dict.fromkeys(_head_dim_paths(config, head_dim), width)
            if count < key_value_heads:
                counts = {heads: heads // key_value_heads * count, key_value_heads: count}
                changes |= {p: counts[v] for p, name, v in _entries(config) if _counts_heads(name, v) and v in counts}
            for mode in ("dense", "dense-rescaled") if width < head_dim else ("dense",):
                cuts = [_head_cut(site, *dims, count, width, mode) for site, dims in used.items()]
                if self._fits(changes, cuts):
                    yield UniformWidths(config, changes, tuple(cuts))

    def _used_dims(self, site: AttentionSite) -> tuple[Tensor, Tensor]:
        """Dimensions of v and of q.k that are not zero on either side: boolean, (key/value heads, dimensions)."""
        heads, sharing = site.key_value_heads, site.heads // site.key_value_heads
        made = {part: self._made(rows) for rows, part in site.produced()}
        value = self._read(site).view(heads, sharing, -1).any(1) & made["value"].view(heads, -1)
        query_key = made["query"].view(heads, sharing, -1).any(1) & made["key"].view(heads, -1)
        return value, query_key

    def _is_nonzero(self, path: str) -> Tensor:
        """Which weights of a linear layer are not zero, shape (outputs, inputs)."""
        weight = self.state[f"{path}.weight"]
        return (weight.T if isinstance(self.plain.get_submodule(path), Conv1D) else weight) != 0

    def _read(self, site: NeuronSite) -> Tensor:
        """Inputs of a site's output layer whose weights are not all zero."""
        return self._is_nonzero(site.output).any(0)

    def _made(self, rows: Rows) -> Tensor:
        """Outputs whose weights or bias are not zero."""
        made = self._is_nonzero(rows.layer).any(1) | (self.state.get(f"{rows.layer}.bias", torch.zeros(1)) != 0)
        return made[rows.indices(torch.arange(rows.size))]

    def _fits(self, changes: Mapping[str, int], cuts: Sequence[SiteCut]) -> bool:
        expected = {name: tuple(tensor.shape) for name, tensor in self.plain.state_dict().items()}
        for name, cut in tensor_cuts(self.plain, cuts, {}).items():
            widths = {dim: len(index) for dim, index in cut.indices.items()}
            expected[name] = tuple(widths.get(dim, size) for dim, size in enumerate(expected[name]))
        return self.shapes_of(_changed(self.plain.config, changes)) == expected


def _widest(used: Iterable[Tensor]) -> int:
    return max((1, *(int(units.sum()) for units in used)))


def _head_width(site: AttentionSite, value: Tensor, query_key: Tensor) -> int:
    """Dimensions of the widest head; all where a dimension's place in the head has a meaning."""
    if site.is_rotary or site.is_gated_only:
        return site.head_dim
    has_values = value.any(-1, keepdim=True)
    return max(1, int(value.sum(-1).max()), int((query_key & has_values).sum(-1).max()))


def _head_cut(site: AttentionSite, value: Tensor, query_key: Tensor, count: int, width: int, mode: str) -> SiteCut:
    heads = _first(value.any(-1), count).tolist()

    def kept(used: Tensor) -> Tensor:
        return torch.cat([_first(used[head], width) + head * site.head_dim for head in heads])

    keep = {"query_key": torch.arange(site.query_key_dims) if site.is_rotary else kept(query_key), "value": kept(value)}
    return replace(site_cut(replace(site, pruning_mode=mode), keep), constants={})


def _first(used: Tensor, count: int) -> Tensor:
    """Sorted indices of `count` neurons: the used ones, then the first of the others."""
    return used.to(torch.int8).argsort(descending=True, stable=True)[:count].sort().values


def _entries(config: PreTrainedConfig) -> Iterator[tuple[str, str, Any]]:
    """Path, name and value of the entries of a configuration and of those inside it."""
    for part in ("", *config.sub_configs):
        owner = getattr(config, part, None) if part else config
        if isinstance(owner, PreTrainedConfig):
            for name, value in owner.to_dict().items():
                yield (f"{part}.{name}" if part else name), name, value


def _counts_heads(name: str, value: Any) -> bool:
    return "head" in name and not any(word in name for word in ("dim", "size", "width")) and type(value) is int


def _head_dim_paths(config: PreTrainedConfig, head_dim: int) -> list[str]:
    """Paths of the width of a head; the usual one where none is set, which some families read all the same."""
    found = [path for path, name, value in _entries(config) if name in HEAD_DIM_NAMES and value == head_dim]
    return found or ["head_dim"]


def _changed(config: PreTrainedConfig, changes: Mapping[str, int]) -> PreTrainedConfig:
    changed = copy.deepcopy(config)
    for path, value in changes.items():
        part, _, name = path.rpartition(".")
        setattr(getattr(changed, part) if part else changed, name, value)
    return changed
