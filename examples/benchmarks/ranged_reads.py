"""How many bytes and requests would a module take if it were read from the Hub by ranges, instead of the whole file?

    python examples/benchmarks/ranged_reads.py

An experiment on paper: the plans and cuts are those of nemo_hf, the relevance is random, and no network is used.
Writes ranged_reads.json beside this script, and ranged_reads.md from its template.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from nemo_hf.models.attach import attach_masks
from nemo_hf.models.base import NeMoPreTrainedModel
from nemo_hf.models.files import write_json
from nemo_hf.neurons.sites import PAD, NeuronSite
from nemo_hf.pruning.layer_cuts import site_cut
from nemo_hf.pruning.plan import plan_module
from nemo_hf.pruning.tensor_slices import TensorCut, tensor_cuts

HERE = Path(__file__).parent
LABELS = 100
GROUPS = 10
SHARES = (0.05, 0.1, 0.2, 0.3, 0.5)
SHOWN_SHARE = 0.2
GAPS = (0, 4 * 2**10, 64 * 2**10, 2**20)
SECONDS_A_REQUEST = 0.05
BYTES_A_SECOND = 20_000_000
IN_FLIGHT = 8
LAYOUTS = {
    "row-major": (False, False),
    "readers transposed": (True, False),
    "readers transposed, neurons by group": (True, True),
}
"""Whether the layers that read neurons are stored transposed, and whether a group's neurons lie together."""
DTYPES = {torch.int64: "I64", torch.float32: "F32", torch.uint8: "U8"}
"""In the order in which safetensors files hold them; tensors of one kind lie by name."""
PARENTS: dict[str, Callable[[], PreTrainedModel]] = {
    "ViT-B": lambda: ViTForImageClassification(ViTConfig(num_labels=LABELS)),
    "MiniLM": lambda: BertForSequenceClassification(
        BertConfig(
            hidden_size=384, num_hidden_layers=12, num_attention_heads=12, intermediate_size=1536, num_labels=LABELS
        )
    ),
}
Entry = tuple[int, tuple[int, ...], int]
"""First byte of a tensor in the file, its shape, and the bytes of a number."""


def build(make: Callable[[], PreTrainedModel]) -> NeMoPreTrainedModel:
    """A parent without memory for its weights, with groups of equally many labels."""
    with torch.device("meta"):
        parent = attach_masks(make())
    size = LABELS // GROUPS
    parent.config.label_groups = [
        {"name": f"group {index}", "labels": list(range(index * size, (index + 1) * size))} for index in range(GROUPS)
    ]
    return parent


def random_relevance(site: NeuronSite, share: float, by_group: bool, generator: torch.Generator) -> Tensor:
    """Relevance of one group for a share of a site's neurons: uint8, shape (1, neurons).

    Args:
        site: The site.
        share: Share of the neurons of each head, or of the feed-forward part.
        by_group: Whether they are the first ones, or drawn.
        generator: Source of the draw.
    """
    parts = []
    for name, size in site.parts.items():
        heads = 1
        if site.kind == "attention":
            heads = site.query_key_heads if name == "query_key" else site.key_value_heads
        dims = size // heads
        kept = max(1, round(share * dims))
        order = torch.arange(dims).expand(heads, dims)
        if not by_group:
            order = torch.rand(heads, dims, generator=generator).argsort(-1)
        part = torch.zeros(heads, dims, dtype=torch.uint8)
        parts.append(part.scatter(1, order[:, :kept], 255).flatten())
    return torch.cat(parts)[None]


def cuts_of(
    parent: NeMoPreTrainedModel, relevance: Mapping[str, Tensor], labels: Sequence[int]
) -> dict[str, TensorCut]:
    """The cut of each of a parent's tensors for the module of the relevance's first group."""
    plan = plan_module(parent.sites, relevance, [0], 0.5)
    cuts = [site_cut(site, plan[site.key]) for site in parent.sites]
    heads = dict.fromkeys(parent.heads, torch.tensor(list(labels)))
    by_name = tensor_cuts(parent.model, cuts, heads)
    needed = {f"model.{name}": by_name.get(name, TensorCut()) for name in parent.model.state_dict()}
    return {name: cut for name, cut in needed.items() if cut.constant is None}


def readers(cuts: Mapping[str, TensorCut]) -> set[str]:
    """Weights of the layers that read neurons, which are cut by column."""
    return {name for name, cut in cuts.items() if list(cut.indices) == [1]}


def entries_of(state: Mapping[str, Tensor], transposed: set[str]) -> tuple[dict[str, Entry], int, int]:
    """Where a safetensors file holds tensors.

    Args:
        state: The tensors; their weights may be on the meta device.
        transposed: Names of those that are stored transposed.

    Returns:
        The entries by name, the bytes of the length and the header before the first tensor, and those of the file.
    """
    order = sorted(state, key=lambda name: (list(DTYPES).index(state[name].dtype), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    placed, place = {}, 0
    for name in order:
        tensor = state[name]
        shape = tuple(tensor.shape[::-1] if name in transposed else tensor.shape)
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": [place, place + size]}
        placed[name] = (place, shape, tensor.element_size())
        place += size
    length = 8 + -(-len(json.dumps(header, separators=(",", ":"))) // 8) * 8
    return {name: (start + length, *rest) for name, (start, *rest) in placed.items()}, length, place + length


def needed_ranges(entries: Mapping[str, Entry], cuts: Mapping[str, TensorCut], transposed: set[str]) -> np.ndarray:
    """Bytes that a module's tensors lie at: sorted ranges [first, end) that don't touch, shape (ranges, 2)."""
    found = []
    for name, cut in cuts.items():
        first, shape, width = entries[name]
        sizes = (*shape, 1, 1)[:2] if len(shape) < 2 else (shape[0], math.prod(shape[1:]))
        rows, columns = int(sizes[0]), int(sizes[1])
        indices = {1 - dim if name in transposed else dim: index for dim, index in cut.indices.items()}
        row_runs = _runs(indices.get(0), rows)
        column_runs = _runs(indices.get(1), columns)
        if len(column_runs) == 1 and (column_runs[0] == (0, columns)).all():
            found.append(first + row_runs * columns * width)  # whole rows, one after another
            continue
        starts = np.concatenate([np.arange(begin, end) for begin, end in row_runs] or [np.zeros(0, int)])
        inner = (starts[:, None, None] * columns + column_runs[None]) * width
        found.append(first + inner.reshape(-1, 2))
    ranges = np.concatenate(found)
    ranges = ranges[ranges[:, 1] > ranges[:, 0]]
    return coalesced(ranges[ranges[:, 0].argsort()], 0)


def _runs(index: Tensor | None, size: int) -> np.ndarray:
    """Runs [first, end) of consecutive kept indices; all, if nothing is cut."""
    if index is None:
        return np.array([[0, size]])
    kept = np.unique(index[index != PAD].numpy())
    breaks = np.flatnonzero(np.diff(kept) > 1)
    if not len(kept):
        return np.zeros((0, 2), int)
    return np.stack([kept[np.r_[0, breaks + 1]], kept[np.r_[breaks, len(kept) - 1]] + 1], 1)


def coalesced(ranges: np.ndarray, gap: int) -> np.ndarray:
    """Joins sorted ranges with at most `gap` bytes between them."""
    if not len(ranges):
        return ranges
    breaks = np.flatnonzero(ranges[1:, 0] - ranges[:-1, 1] > gap)
    return np.stack([ranges[np.r_[0, breaks + 1], 0], ranges[np.r_[breaks, len(ranges) - 1], 1]], 1)


def seconds(requests: int, size: int) -> float:
    """Time of requests that are known at once: what takes longer, their waiting or the bytes, after a first wait."""
    waits = math.ceil(requests / IN_FLIGHT) * SECONDS_A_REQUEST
    return SECONDS_A_REQUEST + max(waits, size / BYTES_A_SECOND)


def measure(parent: NeMoPreTrainedModel, share: float, layout: str) -> list[dict]:
    """One row a gap: bytes, requests and time of a module that keeps a share of all neurons."""
    is_transposed, by_group = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(0)
    relevance = {site.key: random_relevance(site, share, by_group, generator) for site in parent.sites}
    cuts = cuts_of(parent, relevance, parent.config.label_groups[0]["labels"])
    transposed = readers(cuts) if is_transposed else set()
    state = parent.state_dict()
    entries, header, _ = entries_of(state, transposed)
    needed = needed_ranges(entries, cuts, transposed)
    # The relevance decides what else is needed, so it comes before; its tensors lie together.
    relevance_bytes = sum(tensor.numel() for name, tensor in state.items() if name.endswith(".relevance"))
    first = 2 * SECONDS_A_REQUEST + (header + relevance_bytes) / BYTES_A_SECOND
    rows = []
    for gap in GAPS:
        ranges = coalesced(needed, gap)
        size = int((ranges[:, 1] - ranges[:, 0]).sum())
        total = {"bytes": size + header + relevance_bytes, "requests": len(ranges) + 2}
        rows.append(
            {"layout": layout, "share": share, "gap": gap}
            | {"module_bytes": int((needed[:, 1] - needed[:, 0]).sum()), **total}
            | {"seconds": round(first + seconds(len(ranges), size), 2)}
        )
    return rows


def measure_all() -> dict:
    """All rows, and what they stand on."""
    found: dict = {
        "seconds_a_request": SECONDS_A_REQUEST,
        "bytes_a_second": BYTES_A_SECOND,
        "in_flight": IN_FLIGHT,
        "parents": {},
        "rows": [],
    }
    for name, make in PARENTS.items():
        parent = build(make)
        size = entries_of(parent.state_dict(), set())[2]
        found["parents"][name] = {"bytes": size, "seconds": round(seconds(1, size), 2)}
        for share in SHARES:
            for layout in LAYOUTS:
                found["rows"] += [{"parent": name, **row} for row in measure(parent, share, layout)]
    return found


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _gap(size: int) -> str:
    return "0" if not size else f"{size // 2**10} KiB" if size < 2**20 else f"{size // 2**20} MiB"


def _cell(row: Mapping) -> str:
    return f"{row['bytes'] / 1e6:.1f} MB, {row['requests']:,}, {row['seconds']:.2f} s"


def render(found: Mapping) -> str:
    """The page, from the template and the results."""
    values: dict[str, object] = {
        "share": f"{SHOWN_SHARE:.0%}",
        "milliseconds": round(found["seconds_a_request"] * 1000),
        "rate": round(found["bytes_a_second"] / 1e6),
        "in_flight": found["in_flight"],
    }
    for name, parent in found["parents"].items():
        rows = [row for row in found["rows"] if row["parent"] == name]
        best = {}
        for row in rows:
            key = row["share"], row["layout"]
            best[key] = min((best.get(key, row), row), key=lambda each: each["seconds"])
        shares = list(dict.fromkeys(row["share"] for row in rows))
        layouts = list(dict.fromkeys(row["layout"] for row in rows))
        by_share = _table(
            ["neurons kept", "module", *layouts],
            [
                [f"{share:.0%}", f"{best[share, layouts[0]]['module_bytes'] / 1e6:.1f} MB"]
                + [f"{_cell(best[share, layout])} ({_gap(best[share, layout]['gap'])})" for layout in layouts]
                for share in shares
            ],
        )
        of_one = {(row["gap"], row["layout"]): row for row in rows if row["share"] == SHOWN_SHARE}
        gaps = list(dict.fromkeys(row["gap"] for row in rows))
        by_gap = _table(
            ["largest gap", *layouts],
            [[_gap(gap), *(_cell(of_one[gap, layout]) for layout in layouts)] for gap in gaps],
        )
        prefix = name.lower().replace("-", "_")
        values |= {f"{prefix}_by_share": by_share, f"{prefix}_by_gap": by_gap}
        values |= {f"{prefix}_size": f"{parent['bytes'] / 1e6:.1f} MB", f"{prefix}_time": f"{parent['seconds']:.2f} s"}
    return (HERE / "ranged_reads.template.md").read_text(encoding="utf-8").format(**values)


if __name__ == "__main__":
    results = measure_all()
    write_json(HERE / "ranged_reads.json", results)
    (HERE / "ranged_reads.md").write_text(render(results), encoding="utf-8")
