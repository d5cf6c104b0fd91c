"""What a page says in words and figures, from its facts."""

from collections.abc import Mapping
from typing import Any

ACCEPTED = (0.99, 0.95, 0.9, 0.8, 0.5)  # shares of own samples that the table of rejection has
KINDS = {
    "restricted": "whole model, choosing among these labels",
    "accuracy": "module",
    "raw": "module before reconstruction",
    "random": "random neurons of the same size",
    "other": "module of other labels",
    "empty": "no neurons",
}


def known_accuracies(facts: Mapping[str, Any]) -> dict[str, float]:
    """Shares of right answers of the page's module, its whole model and controls, by kind, as far as they are known."""
    report, validation = facts["report"] or {}, _validation(facts)
    found: dict[str, Any] = {"accuracy": validation.get("accuracy"), "restricted": validation.get("source_accuracy")}
    if "accuracy" in report:
        restricted, controls = report.get("parent_restricted_accuracy"), report.get("controls") or {}
        found = {"accuracy": report["accuracy"], "restricted": restricted, **controls}
    if facts["kept_at"] is not None:
        found |= facts["points"][facts["kept_at"]]
    return {kind: found[kind] for kind in KINDS if found.get(kind) is not None}


def _validation(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the cut measured of the module; nothing if it was trained further since then."""
    module = facts["module"] or {}
    return {} if module.get("is_tuned") else (module.get("extraction") or {}).get("validation") or {}


def curve_rows(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of accuracies by size: the cuts, and the module itself where it is none of them."""
    rows = [{**point, "is_own": place == facts["kept_at"]} for place, point in enumerate(facts["points"])]
    accuracies, module = known_accuracies(facts), facts["module"]
    if module is not None and "accuracy" in accuracies and facts["kept_at"] is None:
        retention = (module["extraction"] or {}).get("retention")
        rows.append({"megabytes": module["megabytes"], "retention": retention, "is_own": True, **accuracies})
    return sorted(rows, key=lambda row: -row["megabytes"])


def measured_on(facts: Mapping[str, Any]) -> int | None:
    """Number of samples that the accuracies which the module brought along are of."""
    return (facts["report"] or {}).get("samples", _validation(facts).get("samples"))


def rejection_rows(found: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Shares of own samples accepted and of others rejected at the strictest threshold that accepts so many."""
    rows = [
        max((row for row in found["curve"] if row[1] >= share), key=lambda row: row[2], default=None)
        for share in ACCEPTED
    ]
    return [(row[1], row[2]) for row in dict.fromkeys(map(tuple, filter(None, rows)))]


def latency_rows(report: Mapping[str, Any] | None) -> list[list[float]]:
    """Batch sizes with the times of the whole model and the module."""
    own, whole = ((report or {}).get(name) or {} for name in ("latency_ms", "parent_latency_ms"))
    return [[int(size), whole[size], own[size]] for size in sorted(own.keys() & whole.keys(), key=int)]


def headline(facts: Mapping[str, Any]) -> tuple[str, str]:
    """A sentence that says what the module is worth, or of a model without one what it is, and one for comparison."""
    module, of = facts["module"], facts["of_labels"]
    if module is None:
        groups = f" in {facts['groups']} groups" if 1 < facts["groups"] < len(facts["labels"]) else ""
        used = f"; a group uses {facts['used']:.0%} of its neurons" if facts["used"] is not None else ""
        return f"A classifier of {len(facts['labels'])} labels{groups} takes {size_text(facts['megabytes'])}{used}.", ""
    count, whole, known = len(module["labels"]), _whole_size(facts), known_accuracies(facts)
    labels = f"{count} of {of} labels" if of else f"{count} label{'' if count == 1 else 's'}"
    text = f"A module of {labels} takes {size_text(module['megabytes'])}{f' of {size_text(whole)}' if whole else ''}"
    text += f" and answers {known['accuracy']:.1%} of its samples right" if "accuracy" in known else ""
    beside = []
    if "restricted" in known:
        beside.append(f"the whole model, choosing among the same labels, reaches {known['restricted']:.1%}")
    if "random" in known:
        beside.append(f"random neurons of the same size reach {known['random']:.1%}")
    compared = "; ".join(beside)
    return f"{text}.", f"{compared[0].upper()}{compared[1:]}." if beside else ""


def _whole_size(facts: Mapping[str, Any]) -> float | None:
    report, done = facts["report"] or {}, (facts["module"] or {}).get("extraction") or {}
    if facts["origin"]:
        return float(facts["origin"]["megabytes"])
    return report.get("parent_megabytes") or (done["source_bytes"] / 1e6 if "source_bytes" in done else None)


def key_figures(facts: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The figures at the top of the page: what, how much, and beside what."""
    module, whole, known = facts["module"], _whole_size(facts), known_accuracies(facts)
    if module is None:
        parameters = f"{facts['parameters']:,} parameters"
        return [("size", size_text(facts["megabytes"]), parameters), ("labels", str(len(facts["labels"])), "")]
    share = (
        f"{module['megabytes'] / whole:.0%} of {size_text(whole)}" if whole else f"{module['parameters']:,} parameters"
    )
    found = [("size", size_text(module["megabytes"]), share)]
    if "accuracy" in known:
        beside = f"whole model {known['restricted']:.1%}" if "restricted" in known else ""
        found.append(("right answers", f"{known['accuracy']:.1%}", beside))
    if "random" in known:
        found.append(("random neurons", f"{known['random']:.1%}", "of the same size"))
    auroc = (facts["rejection"] or (facts["report"] or {}).get("rejection") or {}).get("auroc")
    found += [("AUROC of rejection", f"{auroc:.3f}", "own samples from others")] if auroc is not None else []
    if rows := latency_rows(facts["report"]):
        size, before, after = rows[0]
        found.append((f"latency, batch of {size}", f"{after:.3g} ms", f"whole model {before:.3g} ms"))
    return found


def unknown(facts: Mapping[str, Any], has_picker: bool) -> list[tuple[str, str]]:
    """What the page lacks, each with the sentence that says how to get it."""
    is_module, found = facts["role"] == "module", known_accuracies(facts)
    data = "--dataset DATA"
    both = f"{data} and --parent SOURCE" if is_module else data
    cuts = f"{data}{'' if is_module else ', which cuts modules'}"
    has_others = facts["module"] is not None and len(facts["module"]["labels"]) != facts["of_labels"]
    lacks_other = has_others and bool(facts["points"]) and all(row.get("other") is None for row in facts["points"])
    has_several = facts["samples"] is not None and facts["confusion"] is None
    lacks = {
        "A choice of labels": (
            has_picker,
            "needs the model that the module was cut from: --parent SOURCE."
            if is_module and not facts["origin"]
            else "does not fit into a page of so many labels: nemo-hf cut takes them by name.",
        ),
        "Accuracy": ("restricted" in found, f"beside the whole model is measured by {both}."),
        "Accuracy over size": (bool(facts["points"]), f"with controls is measured by {both}, which cuts modules."),
        "A control of other labels": (not lacks_other, "needs labelled samples of them to cut on."),
        "Mistakes among the labels": (
            facts["confusion"] is not None,
            "are counted where each sample has one label." if has_several else f"are counted by {data}.",
        ),
        "The rejection curve": (bool(facts["rejection"]), f"is measured by {data}, with samples of other labels."),
        "Latency": (bool(latency_rows(facts["report"])), f"is measured by {both}."),
        "Errors of reconstruction": (
            bool(facts["module"] and facts["module"]["layers"]),
            "by layer are recorded where a module is cut on samples: nemo-hf cut with --dataset."
            if is_module
            else f"by layer are recorded by {cuts}.",
        ),
        "Neurons of label groups": (
            bool(facts["neurons"] and facts["neurons"]["groups"]),
            f"are known of parents, which nemo-hf train makes{'; name it by --parent' if is_module else ''}.",
        ),
        "Overlap": (facts["overlap"] is not None, "between groups is known of parents of several, up to 2,000."),
    }
    return [(what, how) for what, (is_known, how) in lacks.items() if not is_known]


def size_text(megabytes: float) -> str:
    """A size in MB, or in kB below 0.1 MB."""
    return f"{1000 * megabytes:.3g} kB" if megabytes < 0.1 else f"{megabytes:.3g} MB"
