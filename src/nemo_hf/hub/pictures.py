"""Pictures of which neurons the label groups use, and of how good modules are at their size."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_hf.evaluation.metrics import jaccard_indices
from nemo_hf.models.atomic_writes import replaced_file
from nemo_hf.models.base import NeMoPreTrainedModel
from nemo_hf.pruning.plan import is_relevant

logger = logging.getLogger(__name__)

NUMBERED_CELLS = 150  # up to which a panel shows its values as text too
NAMED_GROUPS = 40  # along an axis; of more, every second, third, ... has its name


def draw_neurons(model: NeMoPreTrainedModel, path: str | Path) -> bool:
    """Draws which share of each site's neurons the label groups use, with their overlap or what a module keeps.

    Returns whether it was drawn: a module cut by an older version lacks its groups' shares, or matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("No picture of the neurons is drawn, since matplotlib is missing. Install nemo-hf[demo].")
        return False
    if not (panels := _parent_panels(model) if model.is_parent else _module_panels(model)):
        return False
    kinds = [site.kind for site in model.sites]
    names = [f"{kind} {kinds[:index].count(kind)}" for index, kind in enumerate(kinds)]
    size = (11 if len(panels) > 1 else 6.5, min(20.0, max(4.5, 0.28 * len(names))))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=[1.3, 1][: len(panels)])[0]
    for one, (values, columns, rows, title) in zip(axes, panels, strict=True):
        _draw(figure, one, values, columns, rows or names, title)
    with replaced_file(path) as temporary:
        figure.savefig(temporary, dpi=90, format="png", metadata={"Software": None})
    return True


def draw_curves(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], path: str | Path) -> bool:
    """Draws accuracies over shares of weights: by panel and name of a line its points. Returns whether it was drawn."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("No picture of the modules is drawn, since matplotlib is missing. Install nemo-hf[demo].")
        return False
    figure = Figure(figsize=(4.8 * len(panels), 3.9), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for one, (title, lines) in zip(axes, panels.items(), strict=True):
        for place, (name, points) in enumerate(lines.items()):
            style = {"linestyle": "-" if place < 2 else "--", "marker": "o", "color": f"C{place}"}
            one.plot(*zip(*points, strict=True), label=name, linewidth=2 if place == 1 else 1.2, markersize=4, **style)
        one.set_xscale("log")
        shares = sorted({share for points in lines.values() for share, _ in points})
        one.set_xticks(shares, [f"{share:.0%}" for share in shares])
        one.minorticks_off()
        one.set_title(title)
        one.set_xlabel("weights of attention and feed-forward layers kept")
        one.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy, mean over modules")
    axes[-1].legend(loc="lower right", fontsize=8)
    with replaced_file(path) as temporary:
        figure.savefig(temporary, dpi=90, format="png", metadata={"Software": None})
    return True


def _parent_panels(parent: NeMoPreTrainedModel) -> list[tuple[Any, list[str], list[str], str]]:
    """Shares, shape (sites, groups), and overlaps, shape (groups, groups), each with names of columns, rows, title."""
    assert parent.masks is not None
    threshold = parent.nemo_config.relevance_threshold
    used = [is_relevant(relevance, threshold) for relevance in parent.masks.relevance().values()]
    shares = torch.stack([mask.float().mean(-1) for mask in used]).cpu().numpy()
    overlap = jaccard_indices(torch.cat(used, -1)).cpu().numpy()
    groups = list(parent.config.groups)
    overlaps = (overlap, groups, groups, "Overlap of neurons (Jaccard index)")
    return [(shares, groups, [], "Share of neurons used"), overlaps]


def _module_panels(module: NeMoPreTrainedModel) -> list[tuple[Any, list[str], list[str], str]]:
    entries = {entry["key"]: entry for entry in module.config.sites or []}
    rows = [entries[site.key].get("kept") for site in module.sites]
    groups = list(module.config.groups)
    if any(not isinstance(row, list) or len(row) != len(groups) + 1 for row in rows):
        return []
    shares = np.array(rows, dtype=float) / np.array([[site.neurons] for site in module.sites])
    return [(shares, [*groups, "module"], [], "Share of neurons used")]


def _draw(figure: Any, axes: Any, values: Any, columns: Sequence[str], rows: Sequence[str], title: str) -> None:
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_title(title)
    for names, place in ((columns, axes.set_xticks), (rows, axes.set_yticks)):
        step = -(-len(names) // NAMED_GROUPS)
        # A dollar sign would start a formula, and a name may be long.
        printable = ["".join(c if c.isprintable() else " " for c in name) for name in names[::step]]
        shown = [" ".join(name.split())[:24].replace("$", r"\$") for name in printable]
        place(range(0, len(names), step), shown, rotation=90 if names is columns and len(names) > 12 else 0)
    axes.set_xlabel("label group")
    for row, column in np.ndindex(values.shape) if values.size <= NUMBERED_CELLS else ():
        color, text = "black" if values[row, column] > 0.6 else "white", f"{values[row, column]:.2f}".lstrip("0")
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(image, ax=axes, shrink=0.9)
