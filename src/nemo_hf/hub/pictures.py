"""Pictures of which neurons the label groups use."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_hf.evaluation.metrics import jaccard_indices
from nemo_hf.models.base import NeMoPreTrainedModel
from nemo_hf.pruning.plan import is_relevant

NUMBERED_CELLS = 150
NAMED_GROUPS = 40


def draw_neurons(model: NeMoPreTrainedModel, path: str | Path) -> bool:
    """Draws which share of each site's neurons the label groups use.

    Args:
        model: A parent with a measured relevance, drawn with how far groups share neurons; or a module, drawn
            with what it keeps.
        path: Picture file; its ending says the format.

    Returns:
        Whether there was something to draw: a module that was cut by an older version doesn't know its groups' shares.

    Raises:
        ImportError: If matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Got no matplotlib; expected it for the picture. Install nemo-hf[demo].") from error
    panels = _parent_panels(model) if model.is_parent else _module_panels(model)
    if not panels:
        return False
    kinds = [site.kind for site in model.sites]
    names = [f"{kind} {kinds[:index].count(kind)}" for index, kind in enumerate(kinds)]
    height = min(20.0, max(4.5, 0.28 * len(names)))
    figure = Figure(figsize=(11 if len(panels) > 1 else 6.5, height), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=[1.3, 1][: len(panels)])[0]
    for one, (values, columns, rows, title) in zip(axes, panels, strict=True):
        _draw(figure, one, values, columns, rows or names, title)
    figure.savefig(path, dpi=120)
    return True


def _parent_panels(parent: NeMoPreTrainedModel) -> list[tuple[Any, list[str], list[str], str]]:
    assert parent.masks is not None
    threshold = parent.nemo_config.relevance_threshold
    used = {key: is_relevant(relevance, threshold) for key, relevance in parent.masks.relevance().items()}
    shares = torch.stack([mask.float().mean(-1) for mask in used.values()]).cpu().numpy()  # (sites, groups)
    overlap = jaccard_indices(torch.cat(list(used.values()), -1)).cpu().numpy()
    groups = list(parent.config.groups)
    return [
        (shares, groups, [], "Share of neurons used"),
        (overlap, groups, groups, "Overlap of neurons (Jaccard index)"),
    ]


def _module_panels(module: NeMoPreTrainedModel) -> list[tuple[Any, list[str], list[str], str]]:
    entries = {entry["key"]: entry for entry in module.config.sites or []}
    rows = [entries[site.key].get("kept") for site in module.sites]
    groups = list(module.config.groups)
    if any(not isinstance(row, list) or len(row) != len(groups) + 1 for row in rows):
        return []
    counts = np.array(rows, dtype=float)
    shares = counts / np.array([[site.neurons] for site in module.sites])
    return [(shares, [*groups, "module"], [], "Share of neurons used")]


def _draw(figure: Any, axes: Any, values: Any, columns: Sequence[str], rows: Sequence[str], title: str) -> None:
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_title(title)
    for names, place, rotation in (
        (columns, axes.set_xticks, 90 if len(columns) > 12 else 0),
        (rows, axes.set_yticks, 0),
    ):
        step = -(-len(names) // NAMED_GROUPS)
        # A dollar sign would start a formula, and a name may be long.
        printable = ["".join(c if c.isprintable() else " " for c in name) for name in names[::step]]
        shown = [" ".join(name.split())[:24].replace("$", r"\$") for name in printable]
        place(range(0, len(names), step), shown, rotation=rotation)
    axes.set_xlabel("label group")
    for row, column in np.ndindex(values.shape) if values.size <= NUMBERED_CELLS else ():
        axes.text(
            column,
            row,
            f"{values[row, column]:.2f}".lstrip("0"),
            ha="center",
            va="center",
            fontsize=7,
            color="black" if values[row, column] > 0.6 else "white",
        )
    figure.colorbar(image, ax=axes, shrink=0.9)
