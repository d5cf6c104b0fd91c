"""Measures the modules that all label groups of a parent would have, under their masks and without cutting them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from nemo_hf.models.base import NeMoPreTrainedModel
from nemo_hf.models.batches import labelled_batches
from nemo_hf.models.equivalence import as_saved
from nemo_hf.models.extraction import ModulePlan, make_plan
from nemo_hf.models.labels import group_indices
from nemo_hf.pruning.budget import kept_share, layer_weights

from .report import aligned, other_groups

COLUMNS = ("samples", "neurons", "weights", "accuracy", "parent", "specificity")


@torch.no_grad()
def measure_groups(
    parent: NeMoPreTrainedModel, batches: Iterable[Mapping[str, Any]], seed: int = 0, show_progress: bool = True
) -> dict[str, dict[str, float]]:
    """Measures a module of each label group, whose samples have one label each, in three passes over the data.

    By group: its `samples`; the shares of `neurons` and of masked layers' `weights` that its module keeps; `accuracy`
    of the module and the `parent` on these samples, answers restricted to the group's labels; and `specificity`, by
    how much the accuracy is above that under the mask of another group. Where each label is its own group, answers are
    not restricted: there would be one. A group without a sample has sizes alone. Where training left modules to
    reconstruction, there are no modules yet, and the parent alone is measured.
    """
    groups, group_of_label = parent.config.groups, group_indices(parent)
    has_modules = parent.nemo_config.trains_modules
    plans = {name: _plan(parent, ids) if has_modules else None for name, ids in groups.items()}
    costs = layer_weights(parent.model, parent.sites)
    found: dict[str, dict[str, float]] = {}
    for name, plan in plans.items():
        share = kept_share(parent.model, parent.sites, costs, plan.keep) if plan else 0.0
        found[name] = {"samples": 0}
        if has_modules:
            found[name] |= {"neurons": plan.retained if plan else 0.0, "weights": share}
    others = [other_groups(parent, [name], seed) for name in groups]
    closed = {site.key: torch.zeros(site.neurons) for site in parent.sites}
    static = [plan.static if plan else closed for plan in plans.values()]
    own = {key: torch.stack([masks[key] for masks in static]) for key in closed}
    place = [int(group_of_label[ids[0]]) if ids else index for index, ids in enumerate(others)]
    right = torch.zeros(3, len(groups))
    counts = torch.zeros(len(groups))
    with as_saved(parent) as (model,):
        for inputs, labels, _ in labelled_batches(model, tqdm(batches, "Groups", disable=not show_progress)):
            index = group_of_label[labels]
            outside = group_of_label[None, :] != index[:, None]
            outside &= len(groups) < len(group_of_label)
            of_other = torch.tensor(place, device=index.device)[index]
            runs: list[dict[str, Any]] = [{}]
            if has_modules:
                runs += [{"static_masks": _rows(own, rows)} for rows in (index, of_other)]
            for row, masks in enumerate(runs):
                logits = model(**inputs, **masks, return_dict=True).logits.masked_fill(outside, -torch.inf)
                right[row].index_add_(0, index.cpu(), (logits.argmax(-1) == labels).float().cpu())
            counts.index_add_(0, index.cpu(), torch.ones(len(index)))
    for row, name in enumerate(groups):
        if counts[row]:
            whole, module, other = (right[:, row] / counts[row]).tolist()
            found[name] |= {"samples": int(counts[row]), "parent": whole}
            found[name] |= {"accuracy": module} if has_modules else {}
            found[name] |= {"specificity": module - other} if has_modules and others[row] else {}
    return found


def _plan(parent: NeMoPreTrainedModel, labels: Sequence[int]) -> ModulePlan | None:
    """The plan of the module of some labels; `None` where these open no neuron, or had no sample in training."""
    try:
        return make_plan(parent, labels)
    except ValueError:
        return None


def _rows(masks: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    return {key: table.to(rows.device)[rows] for key, table in masks.items()}


def group_means(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Means over the groups that have a number, of what `measure_groups` found."""
    values = {name: [group[name] for group in found.values() if name in group] for name in COLUMNS}
    return {name: sum(own) / len(own) for name, own in values.items() if own}


def format_groups(found: Mapping[str, Mapping[str, float]]) -> str:
    """Renders what `measure_groups` found as a table for a terminal, with the means in the last row."""
    means = group_means(found)
    columns = [column for column in COLUMNS if column in means]
    rows = [["label group", *columns]]
    for name, group in {**found, "(mean)": means}.items():
        cells = [f"{group[column]:.3f}" if column in group else "-" for column in columns[1:]]
        rows.append([name[:40], f"{group['samples']:.0f}", *cells])
    return aligned(rows)
