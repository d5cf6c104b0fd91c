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

from nemo_hf.config import NeMoConfig
from nemo_hf.evaluation.controls import ModuleAnswers
from nemo_hf.evaluation.metrics import jaccard_indices
from nemo_hf.models.base import NeMoPreTrainedModel, base_parameters
from nemo_hf.models.equivalence import sharing_copy
from nemo_hf.models.pruning_modes import make_parent
from nemo_hf.models.weight_files import size_in_bytes
from nemo_hf.pruning.budget import layer_weights
from nemo_hf.pruning.plan import is_relevant
from nemo_hf.pruning.size_table import LABELS, full_widths, parameters_at, size_table

MOST_SHOWN = 16  # groups or labels that a table has a column for; of more, it has a summary
MOST_PAIRS = 20  # of groups or labels, where there is a summary
LARGEST_PICKER = 650_000  # bytes of labels and neurons in the page, above which they are left out
KINDS = {"ffn": "feed-forward", "attention": "attention", "conv": "convolution"}


@dataclass(frozen=True)
class Measured:
    """What was measured for a page.

    Args:
        module: The module that answers, errors and times are of; `None` if there is none.
        answers: Its answers and those of others.
        points: Of modules of the same labels: `megabytes`, `retention` and shares of right answers by kind.
        kept_at: Place of `module` among the points; `None` if it is none of them.
        about: What the data are called: `dataset` and `split`.
    """

    module: NeMoPreTrainedModel | None = None
    answers: ModuleAnswers | None = None
    points: Sequence[Mapping[str, Any]] = ()
    kept_at: int | None = None
    about: Mapping[str, Any] = field(default_factory=dict)


def page_facts(
    model: PreTrainedModel, origin: PreTrainedModel | None, measured: Measured, words: Mapping[str, Any]
) -> dict[str, Any]:
    """Collects what the page of a model says; `origin` is the parent or plain model, of a module the one it is of.

    `words` are for command lines: `model` and `origin` by the names that they are loaded by, `cut`, the words by which
    `nemo-hf cut` finds samples, and `title`.
    """
    role = model.config.role if isinstance(model, NeMoPreTrainedModel) else "plain"
    module = model if role == "module" else measured.module
    parent = origin if isinstance(origin, NeMoPreTrainedModel) else None
    sited = parent
    if sited is None and origin is not None:
        sited = make_parent(sharing_copy(origin), NeMoConfig(masks="static"))
    names = list((sited or model).config.names.values())
    facts: dict[str, Any] = {
        "role": role,
        "title": words["title"],
        "base_class": model.config.base_class if isinstance(model, NeMoPreTrainedModel) else type(model).__name__,
        "labels": list(model.config.names.values()) if role == "module" else names,
        "groups": len(parent.config.groups) if parent else 0,
        **_size(model),
        "origin": _size(origin) if origin is not None else None,
        "of_labels": len(names) if origin is not None else None,
        "module": _module_facts(module) if module is not None else None,
        "report": module.report if module is not None else None,
        "points": list(measured.points),
        "kept_at": measured.kept_at,
        "samples": measured.answers.samples if measured.answers else None,
        "confusion": _confusion(module, measured.answers),
        "rejection": _rejection(module, measured.answers),
        "about": {"dataset": None, "split": None, "seed": None, **measured.about},
        "neurons": _neurons(parent, module),
        "overlap": _overlap(parent),
        "relevance": parent.config.relevance_source if parent else None,
    }
    chosen = (
        list(module.config.label_ids or ()) if module is not None else list(sited.config.names)[:1] if sited else []
    )
    facts["picker"] = _picker(sited, parent, origin, words, chosen) if sited is not None else None
    return facts


def _size(model: PreTrainedModel) -> dict[str, Any]:
    plain = model.model if isinstance(model, NeMoPreTrainedModel) else model
    return {"parameters": base_parameters(model), "megabytes": size_in_bytes(plain.parameters()) / 1e6}


def _module_facts(module: NeMoPreTrainedModel) -> dict[str, Any]:
    config, done = module.config, module.config.extraction or {}
    return {
        **_size(module),
        "labels": list(config.names.values()),
        "groups": list(config.groups),
        "retained": config.retained_neurons,
        "is_tuned": config.is_tuned,
        "extraction": {name: value for name, value in done.items() if name != "layers"} or None,
        "layers": [[path, *errors] for path, errors in (done.get("layers") or {}).items()],
        "fit": config.rejection,
    }


def _site_names(model: NeMoPreTrainedModel) -> list[list[str]]:
    """What each site is called, numbered by kind, with the path of its block."""
    seen: Counter[str] = Counter()
    found = []
    for site in model.sites:
        seen[site.kind] += 1
        found.append([f"{KINDS.get(site.kind, site.kind)} {seen[site.kind]}", site.name])
    return found


def _used(parent: NeMoPreTrainedModel) -> list[Tensor] | None:
    """Which neurons of each site the groups use, (groups, neurons); `None` before that was measured."""
    if parent.config.relevance_source == "initial":
        return None
    threshold = parent.nemo_config.relevance_threshold
    return [is_relevant(rows, threshold).cpu() for rows in parent.parent_masks().relevance().values()]


def _neurons(parent: NeMoPreTrainedModel | None, module: NeMoPreTrainedModel | None) -> dict[str, Any] | None:
    """Shares of each site's neurons that the groups use, or a summary of many groups, and that the module keeps."""
    columns: dict[str, list[float]] = {}
    model = parent or module
    if model is None:
        return None
    groups: list[str] = []
    if parent is not None and (used := _used(parent)) is not None:
        groups = list(parent.config.groups)
        shares = torch.stack([mask.float().mean(-1) for mask in used])  # (sites, groups)
        if len(groups) > MOST_SHOWN:
            ordered = shares.sort(-1).values
            summary = {"fewest": ordered[:, 0], "median": ordered[:, len(groups) // 2], "most": ordered[:, -1]}
            columns = {name: values.tolist() for name, values in summary.items()}
        else:
            columns = {f"group {place}": shares[:, place].tolist() for place in range(len(groups))}
        if len(groups) > 1:
            columns["shared by all"] = [mask.all(0).float().mean().item() for mask in used]
            columns["used by any"] = [mask.any(0).float().mean().item() for mask in used]
    is_alike = module is not None and [site.key for site in module.sites] == [site.key for site in model.sites]
    kept = _kept(module) if module is not None and is_alike else None
    own = [name for name, _ in columns.items() if name.startswith("group ")]
    if module is not None and kept is not None:
        names = list(module.config.groups)
        if not columns and len(names) <= MOST_SHOWN and all(len(row) == len(names) + 1 for row in kept):
            neurons = [site.neurons for site in module.sites]
            groups, own = names, [f"group {place}" for place in range(len(names))]
            shares = [[count / size for count in row[:-1]] for row, size in zip(kept, neurons, strict=True)]
            columns = {name: [row[place] for row in shares] for place, name in enumerate(own)}
        columns["kept by the module"] = [row[-1] / s.neurons for row, s in zip(kept, module.sites, strict=True)]
    if not columns:
        return None
    shown = dict(zip(own, groups, strict=False))
    rows = [list(values) for values in zip(*columns.values(), strict=True)]
    sites = [[*name, site.neurons] for name, site in zip(_site_names(model), model.sites, strict=True)]
    titles = [{"group": shown[name]} if name in shown else {"text": name} for name in columns]
    return {"columns": titles, "sites": sites, "rows": rows, "groups": len(groups), "summary": len(groups) > MOST_SHOWN}


def _kept(module: NeMoPreTrainedModel) -> list[list[int]] | None:
    """How many neurons of each site the groups of a module use and it keeps; `None` if an older version cut it."""
    entries = {entry["key"]: entry.get("kept") for entry in module.config.sites or []}
    rows = [entries.get(site.key) for site in module.sites]
    return rows if all(isinstance(row, list) and row for row in rows) else None  # type: ignore[return-value]


def _overlap(parent: NeMoPreTrainedModel | None) -> dict[str, Any] | None:
    """Jaccard indices of the groups' neurons: all, or of many groups the highest ones and how they are spread."""
    if parent is None or (used := _used(parent)) is None or len(parent.config.groups) < 2:
        return None
    groups = list(parent.config.groups)
    indices = jaccard_indices(torch.cat(used, -1))
    if len(groups) <= MOST_SHOWN:
        return {"groups": groups, "indices": indices.tolist()}
    rows, columns = torch.triu_indices(len(groups), len(groups), 1)
    values = indices[rows, columns]
    best = values.argsort(descending=True, stable=True)[:MOST_PAIRS].tolist()
    spread = torch.histc(values, 10, 0, 1).int().tolist()
    pairs = [[groups[int(rows[place])], groups[int(columns[place])], values[place].item()] for place in best]
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
    mistakes = [[labels[row], labels[column], int(wrong[row, column]), int(totals[row])] for row, column in pairs]
    seen = [place for place in range(len(labels)) if totals[place]]
    worst = sorted(seen, key=lambda place: right[place] / totals[place])[:10]
    lowest = [[labels[place], right[place] / totals[place], int(totals[place])] for place in worst]
    return {"labels": labels, "mistakes": mistakes, "lowest": lowest}


def _rejection(module: NeMoPreTrainedModel | None, answers: ModuleAnswers | None) -> dict[str, Any] | None:
    """The rejection curve, with the place of the module's own threshold, or what its report holds."""
    found = dict(answers.rejection) if answers else {}
    if module is None or not found:
        return None
    return {**found, "chosen": (module.report or {}).get("rejection")}


def _picker(
    sited: NeMoPreTrainedModel, parent: NeMoPreTrainedModel | None, origin: PreTrainedModel | None,
    words: Mapping[str, Any], chosen: Sequence[int],
) -> dict[str, Any]:  # fmt: skip
    """What choosing labels needs: their words on a command line, sizes, and of each group the neurons that it uses."""
    names, groups = sited.config.names, parent.config.groups if parent else {}
    table = size_table(sited.model, sited.sites, sited.heads, len(names))
    widths, size = full_widths(sited.sites, len(names)), _size(origin or sited)
    weights = int(sum(layer_weights(sited.model, sited.sites).values()))
    per_label = parameters_at(table, widths) - parameters_at(table, {**widths, LABELS: len(names) - 1})
    is_grouped = any(len(members) > 1 for members in groups.values())
    unseen = set(sited.config.unseen_labels or ())
    tables = [layer for layer in [sited.model.get_input_embeddings()] if sited.main_input_name == "input_ids"]
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
            "embeddings": sum(layer.weight.numel() for layer in tables),  # type: ignore[union-attr, misc]
            "command": shlex.join(["nemo-hf", "cut", words["origin"], "--labels"]),
            "options": shlex.join(words["cut"]),
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
    """A model or data set as a page names it, without absolute paths, and whether a folder was left out."""
    is_path = PurePath(word).is_absolute() or PureWindowsPath(word).is_absolute() or word.startswith("~")
    return (PureWindowsPath(word).name or "MODEL", True) if is_path else (word, False)
