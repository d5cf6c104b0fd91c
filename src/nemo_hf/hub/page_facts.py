"""What a page about a parent, module or plain model says, as plain data: what is not known is left out."""

import base64
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from nemo_hf.config import LabelLike, resolve_labels
from nemo_hf.evaluation.controls import ModuleAnswers
from nemo_hf.evaluation.metrics import jaccard_indices
from nemo_hf.models.base import NeMoPreTrainedModel, base_parameters
from nemo_hf.models.cut_source import static_parent
from nemo_hf.models.plain_checks import label_names
from nemo_hf.models.privacy import clean_text
from nemo_hf.models.weight_files import size_in_bytes
from nemo_hf.pruning.budget import layer_weights
from nemo_hf.pruning.plan import is_relevant
from nemo_hf.pruning.size_table import LABELS, full_widths, parameters_at, size_table

MOST_SHOWN = 16  # groups or labels that a table has a column for; of more, it has a summary
FEWEST_LABELS, ONE_OF = 5, 10  # labels of a module for which nobody named any: at least so many, and one of so many
MOST_PAIRS = 20  # of groups or labels, where there is a summary
MOST_COMPARED = 2000  # groups with each other
LARGEST_PICKER = 650_000  # bytes of labels and neurons in the page, above which they are left out
NOTHING_SAID: dict[str, Any] = {"dataset": None, "split": None, "seed": None, "cut_samples": [], "is_example": False}
SITE_KINDS = {"ffn": "feed-forward", "attention": "attention", "conv": "convolution"}
OF_NO_DATA = ("latency_ms", "parent_latency_ms", "latency_note", "device", "parent_megabytes")  # in a report


@dataclass(frozen=True)
class Measured:
    """What was measured for a page.

    Args:
        module: The module that answers, errors and times are of; `None` if there is none.
        answers: Its answers and those of others.
        points: Of modules of the same labels: `megabytes`, `retention` and shares of right answers by kind.
        kept_at: Place of `module` among the points; `None` if it is none of them.
        about: What the data are called, `dataset` and `split`; the `seed`; the least and the most `cut_samples` that
            modules and controls are cut on; whether the labels are an example, since nobody named any (`is_example`).
        is_reported: Whether the module's report is of the same data as `answers`.
    """

    module: NeMoPreTrainedModel | None = None
    answers: ModuleAnswers | None = None
    points: Sequence[Mapping[str, Any]] = ()
    kept_at: int | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    is_reported: bool = False


def page_facts(
    model: PreTrainedModel, origin: PreTrainedModel | None, measured: Measured, words: Mapping[str, Any]
) -> dict[str, Any]:
    """Collects what the page of a model says; `origin` is the parent or plain model, of a module the one it is of.

    `words` are for command lines: `model` and `origin` by the names that they are loaded by, `cut`, the words by which
    `nemo-hf cut` finds samples, and `title`.
    """
    own = model if isinstance(model, NeMoPreTrainedModel) else None
    role = own.config.role if own else "plain"
    module = own if role == "module" else measured.module
    parent = origin if isinstance(origin, NeMoPreTrainedModel) else None
    sited = parent
    if sited is None and origin is not None:
        sited = static_parent(origin)
    names = list((sited or model).config.names.values())
    report = _report(module, measured)
    facts: dict[str, Any] = {
        "role": role,
        "title": words["title"],
        "base_class": own.config.base_class if own else type(model).__name__,
        "labels": list(model.config.names.values()) if role == "module" else names,
        "groups": len(parent.config.groups) if parent else 0,
        **_size(model),
        "origin": _size(origin) if origin is not None else None,
        "of_labels": len(names) if origin is not None else None,
        "module": _module_facts(module) if module is not None else None,
        "report": report,
        "points": list(measured.points),
        "kept_at": measured.kept_at,
        "samples": measured.answers.samples if measured.answers else None,
        "confusion": _confusion(module, measured.answers),
        "rejection": _rejection(report, measured.answers),
        "about": {**NOTHING_SAID, **measured.about},
        "neurons": _neurons(parent, module),
        "overlap": _overlap(parent),
        "used": _median_used(parent),
        "picker": None,
    }
    if sited is not None and origin is not None and sum(map(len, names)) <= LARGEST_PICKER // 8:
        chosen = list(module.config.label_ids or ()) if module is not None else chosen_labels(origin)
        facts["picker"] = _picker(sited, parent, origin, words, chosen)
    return facts


def chosen_labels(model: PreTrainedModel, labels: LabelLike | Sequence[LabelLike] | None = None) -> list[int]:
    """Ids of the labels that are asked for, or of some that show what a module is."""
    groups = model.config.groups if isinstance(model, NeMoPreTrainedModel) else {}
    names = model.config.names if isinstance(model, NeMoPreTrainedModel) else label_names(model)
    if labels is not None:
        return resolve_labels(labels, groups, names)[0]
    unseen = set(getattr(model.config, "unseen_labels", None) or ())
    large = [ids for ids in groups.values() if 1 < len(ids) < len(names) and unseen.isdisjoint(ids)]
    known = [index for index in names if index not in unseen]
    few = min(MOST_SHOWN, max(FEWEST_LABELS, len(names) // ONE_OF))
    return list(large[0] if large else known[: max(1, min(few, len(names) // 2))])


def _size(model: PreTrainedModel) -> dict[str, Any]:
    plain = model.model if isinstance(model, NeMoPreTrainedModel) else model
    return {"parameters": base_parameters(model), "megabytes": size_in_bytes(plain.parameters()) / 1e6}


def _module_facts(module: NeMoPreTrainedModel) -> dict[str, Any]:
    config, done = module.config, module.config.extraction or {}
    errors = done.get("layers") or {}  # in the order of their paths, if they come from a file
    paths = [path for path, _ in module.model.named_modules() if path in errors]
    return {
        **_size(module),
        "labels": list(config.names.values()),
        "groups": list(config.groups),
        "retained": config.retained_neurons,
        "is_tuned": config.is_tuned,
        "extraction": {name: value for name, value in done.items() if name != "layers"} or None,
        "layers": [[path, *errors[path]] for path in paths],
        "fit": config.rejection,
    }


def _site_names(model: NeMoPreTrainedModel) -> list[list[str]]:
    """What each site is called, numbered by kind, with the path of its block."""
    seen: Counter[str] = Counter()
    found = []
    for site in model.sites:
        seen[site.kind] += 1
        found.append([f"{SITE_KINDS.get(site.kind, site.kind)} {seen[site.kind]}", site.name])
    return found


def _used(parent: NeMoPreTrainedModel) -> list[Tensor] | None:
    """Which neurons of each site the groups use, (groups, neurons); `None` before that was measured."""
    if parent.config.relevance_source == "initial":
        return None
    threshold = parent.nemo_config.relevance_threshold
    return [is_relevant(rows, threshold).cpu() for rows in parent.parent_masks().relevance().values()]


def _median_used(parent: NeMoPreTrainedModel | None) -> float | None:
    """The share of all neurons that a label group uses, the median over groups."""
    used = _used(parent) if parent is not None else None
    return None if used is None else torch.cat(used, -1).float().mean(-1).median().item()


def _neurons(parent: NeMoPreTrainedModel | None, module: NeMoPreTrainedModel | None) -> dict[str, Any] | None:
    """Shares of each site's neurons that the groups use, or a summary of many groups, and that the module keeps.

    A column is the place of a group among `groups`, or a title.
    """
    model = parent or module
    if model is None:
        return None
    columns: dict[int | str, list[float]] = {}
    groups: list[str] = []
    if parent is not None and (used := _used(parent)) is not None:
        groups, columns = list(parent.config.groups), _of_groups(used)
    is_alike = module is not None and [site.key for site in module.sites] == [site.key for site in model.sites]
    kept = _kept(module) if module is not None and is_alike else None
    if kept is not None and module is not None:
        names, sizes = list(module.config.groups), [site.neurons for site in module.sites]
        if not columns and len(names) <= MOST_SHOWN and all(len(row) == len(names) + 1 for row in kept):
            groups = names
            for place in range(len(names)):
                columns[place] = [row[place] / size for row, size in zip(kept, sizes, strict=True)]
        columns["kept by the module"] = [row[-1] / size for row, size in zip(kept, sizes, strict=True)]
    if not columns:
        return None
    sites = [[*name, site.neurons] for name, site in zip(_site_names(model), model.sites, strict=True)]
    rows = [list(values) for values in zip(*columns.values(), strict=True)]
    return {"columns": list(columns), "sites": sites, "rows": rows, "groups": groups}


def _of_groups(used: Sequence[Tensor]) -> dict[int | str, list[float]]:
    """Shares of each site's neurons that groups use, (groups, neurons) by site: of each group, or of many a summary."""
    shares = torch.stack([mask.float().mean(-1) for mask in used])  # (sites, groups)
    count = shares.shape[1]
    columns: dict[int | str, list[float]] = {place: shares[:, place].tolist() for place in range(count)}
    if count > MOST_SHOWN:
        ordered = shares.sort(-1).values
        summary = {"fewest": 0, "median": count // 2, "most": count - 1}
        columns = {f"{name} of a group": ordered[:, place].tolist() for name, place in summary.items()}
    if count > 1:
        columns["shared by all"] = [mask.all(0).float().mean().item() for mask in used]
        columns["used by any"] = [mask.any(0).float().mean().item() for mask in used]
    return columns


def _kept(module: NeMoPreTrainedModel) -> list[list[int]] | None:
    """How many neurons of each site the groups of a module use and it keeps; `None` if an older version cut it."""
    entries = {entry["key"]: entry.get("kept") for entry in module.config.sites or []}
    rows = [entries.get(site.key) for site in module.sites]
    return rows if all(isinstance(row, list) and row for row in rows) else None  # type: ignore[return-value]


def _overlap(parent: NeMoPreTrainedModel | None) -> dict[str, Any] | None:
    """Jaccard indices of the groups' neurons: all, or of many groups the highest ones and how they are spread."""
    if parent is None or not 1 < len(parent.config.groups) <= MOST_COMPARED:
        return None
    if (used := _used(parent)) is None:
        return None
    groups = list(parent.config.groups)
    indices = jaccard_indices(torch.cat(used, -1))
    if len(groups) <= MOST_SHOWN:
        return {"groups": groups, "indices": indices.tolist()}
    rows, columns = torch.triu_indices(len(groups), len(groups), 1)
    values = indices[rows, columns]
    best = values.argsort(descending=True, stable=True)[:MOST_PAIRS].tolist()
    spread = torch.histc(values, 10, 0, 1).int().tolist()
    pairs = [[int(rows[place]), int(columns[place]), values[place].item()] for place in best]
    return {"groups": groups, "pairs": pairs, "spread": spread, "median": values.median().item()}


def _confusion(module: NeMoPreTrainedModel | None, answers: ModuleAnswers | None) -> dict[str, Any] | None:
    """Counts of answers by right label: all, or of many labels the most frequent mistakes and the worst labels."""
    if module is None or answers is None or not answers.confusion:
        return None
    labels, counts = list(module.config.names.values()), np.array(answers.confusion)
    totals, right = counts.sum(1), counts.diagonal()
    if len(labels) <= MOST_SHOWN:
        return {"labels": labels, "counts": counts.tolist()}
    wrong = counts - np.diag(right)
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_PAIRS]
    pairs = [divmod(int(place), len(labels)) for place in order if wrong.flat[place]]
    mistakes = [[row, column, int(wrong[row, column]), int(totals[row])] for row, column in pairs]
    seen = [place for place in range(len(labels)) if totals[place]]
    worst = sorted(seen, key=lambda place: right[place] / totals[place])[:10]
    lowest = [[place, float(right[place] / totals[place]), int(totals[place])] for place in worst]
    return {"labels": labels, "mistakes": mistakes, "lowest": lowest}


def _report(module: NeMoPreTrainedModel | None, measured: Measured) -> dict[str, Any] | None:
    """The module's report; beside answers on other data, these, and what of the report depends on no data."""
    report, answers = (None if module is None else module.report), measured.answers
    if module is None or answers is None or measured.is_reported:
        return report
    kept = {name: value for name, value in (report or {}).items() if name in OF_NO_DATA}
    return {**kept, "accuracy": answers.accuracies.get("module"), "samples": answers.samples}


def _rejection(report: Mapping[str, Any] | None, answers: ModuleAnswers | None) -> dict[str, Any] | None:
    """The rejection curve, with the place of the module's own threshold if its report is of the same data."""
    if report is None or answers is None or not answers.rejection:
        return None
    return {**answers.rejection, "chosen": report.get("rejection")}


def _picker(
    sited: NeMoPreTrainedModel, parent: NeMoPreTrainedModel | None, origin: PreTrainedModel,
    words: Mapping[str, Any], chosen: Sequence[int],
) -> dict[str, Any]:  # fmt: skip
    """What choosing labels needs: their words on a command line, sizes, and of each group the neurons that it uses."""
    names, groups = sited.config.names, parent.config.groups if parent else {}
    table = size_table(sited.model, sited.sites, sited.heads, len(names))
    widths, size = full_widths(sited.sites, len(names)), _size(origin)
    weights = int(sum(layer_weights(sited.model, sited.sites).values()))
    per_label = parameters_at(table, widths) - parameters_at(table, {**widths, LABELS: len(names) - 1})
    is_grouped = any(len(members) > 1 for members in groups.values())
    unseen = set(sited.config.unseen_labels or ())
    embeddings: Any = sited.model.get_input_embeddings() if sited.main_input_name == "input_ids" else None
    found: dict[str, Any] = {
        "names": list(names.values()),
        "words": label_words(names, groups),
        "groups": [[name, group_word(name, ids, names), ids] for name, ids in groups.items()] if is_grouped else [],
        "parameters": size["parameters"],
        "bytes_per_parameter": size["megabytes"] * 1e6 / size["parameters"],
        "samples": {
            "rest": parameters_at(table, {**widths, LABELS: 0}) - weights,
            "per_label": per_label,
            "weights": weights,
            "embeddings": 0 if embeddings is None else embeddings.weight.numel(),
            "command": shlex.join(["nemo-hf", "cut", words["origin"], "--labels"]),
            "options": shlex.join(words["cut"]),
            "note": "Put your own samples in place of DATA." if "DATA" in words["cut"] else "",
        },
        "relevance": None,
        "output": "cut-module",
        "chosen": list(chosen),
        "source": words["origin"],
        "note": words.get("note", ""),
    }
    used = _used(parent) if parent is not None and parent.nemo_config.trains_modules else None
    if parent is not None and used is not None:
        packed = np.packbits(torch.cat(used, -1).numpy(), axis=-1, bitorder="little")
        masks = [base64.b64encode(row.tobytes()).decode() for row in packed]
        places = {index: place for place, members in enumerate(groups.values()) for index in members}
        fits = sum(map(len, masks)) <= LARGEST_PICKER
        found["relevance"] = {
            "table": table if fits else None,
            "masks": masks if fits else None,
            "group_of": [places[index] for index in names],
            "unseen": sorted(places[index] for index in unseen),
        }
    return found


def label_words(names: Mapping[int, str], groups: Mapping[str, Sequence[int]]) -> list[str | None]:
    """What to type for each label, quoted for a shell: its name or its id; `None` if neither means this label alone."""
    counts = Counter(names.values())
    taken = {*names.values(), *groups}
    found: list[str | None] = []
    for index, name in names.items():
        is_clear = counts[name] == 1 and list(groups.get(name, [index])) == [index]
        if is_clear and _can_be_typed(name):
            found.append(shlex.quote(name))
        else:
            found.append(None if str(index) in taken else str(index))
    return found


def group_word(name: str, ids: Sequence[int], names: Mapping[int, str]) -> str | None:
    """What to type for a group, quoted for a shell; `None` if its labels must be named one by one."""
    same = [index for index, label in names.items() if label == name]
    return shlex.quote(name) if _can_be_typed(name) and same in ([], list(ids)) else None


def _can_be_typed(name: str) -> bool:
    return name.isprintable() and bool(name.strip()) and not name.startswith("-")


def shown_source(word: str) -> tuple[str, bool]:
    """A word of a command as a page has it, without absolute paths and tokens, and whether a folder was left out."""
    is_path = PurePath(word).is_absolute() or PureWindowsPath(word).is_absolute() or word.startswith("~")
    return clean_text((PureWindowsPath(word).name or "MODEL") if is_path else word), is_path
