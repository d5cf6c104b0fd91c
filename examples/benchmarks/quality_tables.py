"""Renders what `quality.py` measured: quality.md and a picture a task, from the JSON files beside this script.

python examples/benchmarks/quality_tables.py
"""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from scipy.stats import t as student

HERE = Path(__file__).parent
TITLES = {
    "digits": "Digits",
    "clinc150": "CLINC150",
    "cifar10": "CIFAR-10",
    "cifar10-small": "CIFAR-10, small ViT",
    "cifar10-resnet18": "CIFAR-10, ResNet18",
    "cifar10-vgg16": "CIFAR-10, VGG16",
}
PATCHING = HERE / "patching.json"
FIGURES = ("neurons", "weights", "module", "restricted", "random", "other", "empty", "rejection")
Rows = Sequence[dict]


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return statistics.fmean(values)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation over seeds."""
    around = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{around}"


def upper_bound(losses: Sequence[float]) -> str:
    """Mean of paired losses in points and the upper bound of its one-sided 95 % interval."""
    points = [100 * loss for loss in losses]
    if len(points) < 3:
        return f"{mean(points):.2f}"
    error = statistics.stdev(points) / len(points) ** 0.5
    return f"{mean(points):.2f} (at most {mean(points) + student.ppf(0.95, len(points) - 1) * error:.2f})"


def kinds_of(row: dict) -> list[str]:
    """Kinds of sets over which a row is averaged: those whose modules have an answer to choose."""
    return [kind for kind, sets in row["sets"].items() if sets[0]["restricted"] < 1 or kind != "singles"]


def figure(row: dict, name: str, kinds: Sequence[str] | None = None) -> float:
    """Mean over kinds of the mean over sets; "specificity" is the module's accuracy minus the other control's."""
    if name == "specificity":
        return figure(row, "module", kinds) - figure(row, "other", kinds)
    return mean([mean([found[name] for found in row["sets"][kind]]) for kind in kinds or kinds_of(row)])


def by_method(rows: Rows) -> dict[str, list[dict]]:
    """Rows of one method each, in the order in which they came."""
    usual = rows[0].get("epochs") if rows else None
    titles = []
    for row in rows:
        other = "" if row.get("epochs") == usual else f", {row['epochs']} epochs"
        where = f", {row['processor']}" if row["row"] == "plain" and "processor" in row else ""
        titles.append(row["row"] + (", by sample" if row.get("by sample") else "") + where + other)
    return {name: [r for r, t in zip(rows, titles, strict=True) if t == name] for name in dict.fromkeys(titles)}


def by_sample(own: Rows) -> str:
    """Mean accuracy of parents that answer with the neurons that each input opens, where it was measured."""
    known = [row.get("accuracy by sample") for row in own]
    return "-" if None in known else f"{mean(known):.3f}"


def methods_table(rows: Rows) -> str:
    """One line a method, averaged over sets, kinds and seeds."""
    header = ["method", "seeds", "accuracy", "points lost to plain", "by sample", "neurons of singles", "neurons",
              "raw", "parent", "points lost", "random", "other", "empty", "specificity", "rejection AUROC", "cohesion",
              "coupling"]  # fmt: skip
    methods = by_method(rows)
    plain = {(row["seed"], row.get("processor")): row["accuracy"] for row in rows if row["row"] == "plain"}
    lines = []
    for name, own in methods.items():
        line = [name, ", ".join(str(row["seed"]) for row in own), spread([row["accuracy"] for row in own])]
        if "sets" not in own[0]:
            lines.append([*line, *["-"] * (len(header) - len(line))])
            continue
        pairs = [(plain.get((row["seed"], row.get("processor"))), row["accuracy"]) for row in own]
        paired = [whole - accuracy for whole, accuracy in pairs if whole is not None]
        line.append(upper_bound(paired) if paired else "-")
        line.append(by_sample(own))
        line.append(f"{mean([figure(row, 'neurons', ['singles']) for row in own]):.2f}")
        over = {key: mean([figure(row, key) for row in own]) for key in (*FIGURES, "specificity")}
        line += [f"{over['neurons']:.2f}", f"**{over['module']:.3f}**", f"{over['restricted']:.3f}"]
        line.append(upper_bound([figure(row, "restricted") - figure(row, "module") for row in own]))
        line += [f"{over[key]:.3f}" for key in ("random", "other", "empty")]
        line += [f"{100 * over['specificity']:.1f}", f"{over['rejection']:.3f}"]
        line += [
            "-" if own[0][key] is None else f"{mean([row[key] for row in own]):.2f}" for key in ("cohesion", "coupling")
        ]
        lines.append(line)
    return table(header, lines)


def recipe_table(rows: Rows) -> str:
    """What was tried, on validation data: one line a set of options, seeds that all lines have first."""
    header = ["options", "seeds", "accuracy", "by sample", "neurons of singles", "neurons", "raw", "points lost",
              "random", "other", "specificity", "rejection AUROC", "coupling", "dead neurons"]  # fmt: skip
    lines = []
    for name, own in by_method(rows).items():
        line = [
            f"`{name}`",
            ", ".join(str(row["seed"]) for row in own),
            f"{mean([row['accuracy'] for row in own]):.3f}",
        ]
        if "sets" not in own[0]:
            lines.append([*line, *["-"] * (len(header) - len(line))])
            continue
        over = {key: mean([figure(row, key) for row in own]) for key in (*FIGURES, "specificity")}
        line += [by_sample(own), f"{mean([figure(row, 'neurons', ['singles']) for row in own]):.2f}"]
        line += [f"{over['neurons']:.2f}", f"{over['module']:.3f}"]
        line.append(f"{100 * (over['restricted'] - over['module']):.2f}")
        line += [f"{over['random']:.3f}", f"{over['other']:.3f}", f"{100 * over['specificity']:.1f}"]
        line += [
            f"{over['rejection']:.3f}",
            *(f"{mean([row[key] for row in own]):.2f}" for key in ("coupling", "dead")),
        ]
        lines.append(line)
    return table(header, lines)


def summary(stored: dict) -> str:
    """A short table for README: the methods of one task."""
    methods = by_method(stored["rows"])
    seeds = {name: len(own) for name, own in methods.items()}
    lines = []
    for name, own in methods.items():
        accuracy = spread([row["accuracy"] for row in own])
        if "sets" not in own[0]:
            lines.append([name, accuracy, *["-"] * 6])
            continue
        over = {key: mean([figure(row, key) for row in own]) for key in (*FIGURES, "specificity")}
        line = [name, accuracy, f"{over['neurons']:.2f}", f"**{over['module']:.3f}**", f"{over['restricted']:.3f}"]
        line += [f"{over['random']:.3f}", f"{over['other']:.3f}", f"{mean([row['coupling'] for row in own]):.2f}"]
        lines.append(line)
    header = ["method", "accuracy", "neurons", "raw module", "parent restricted", "random", "other", "coupling"]
    told = " to ".join(str(count) for count in sorted({min(seeds.values()), max(seeds.values())}))
    return f"{stored['task']}; {told} {'seed' if told == '1' else 'seeds'}:\n\n{table(header, lines)}"


def kinds_table(rows: Rows) -> str:
    """One line a method and kind of set."""
    header = ["method", "sets", "neurons", "weights", "raw", "parent", "random", "other", "empty",
              "specificity", "rejection AUROC"]  # fmt: skip
    lines = []
    for name, own in by_method([row for row in rows if "sets" in row]).items():
        for kind, sets in own[0]["sets"].items():
            over = {key: mean([figure(row, key, [kind]) for row in own]) for key in (*FIGURES, "specificity")}
            line = [name, f"{len(sets)} {kind}", f"{over['neurons']:.2f}", f"{over['weights']:.2f}"]
            line += [f"{over[key]:.3f}" for key in ("module", "restricted", "random", "other", "empty")]
            lines.append([*line, f"{100 * over['specificity']:.1f}", f"{over['rejection']:.3f}"])
    return table(header, lines)


def modules_table(rows: Rows) -> str:
    """Real modules: sizes, and what fine-tuning, training anew and pruning reach at the same size."""
    header = ["method", "labels", "weights", "MB", "raw", "fine-tuned", "same size, trained on the set", "pruned",
              "own accepted", "others rejected"]  # fmt: skip
    lines = []
    for name, own in by_method([row for row in rows if row.get("modules")]).items():
        for same in zip(*(row["modules"] for row in own), strict=True):
            labels = same[0]["labels"]
            shown = ", ".join(map(str, labels)) if len(labels) < 7 else f"{len(labels)} from {labels[0]}"
            line = [name, shown, *(f"{mean([m[key] for m in same]):.2f}" for key in ("weights", "megabytes"))]
            keys = ("raw", "fine-tuned", "same size, trained on the set", "pruned", "accepted", "rejected")
            lines.append([*line, *(f"{mean([m[key] for m in same]):.3f}" for key in keys)])
    return table(header, lines)


def rendered(task: str, stored: dict) -> str:
    """Title, tables and notes of one task."""
    rows = stored["rows"]
    notes = "\n".join(f"- {note}" for note in stored.get("notes", []))
    strangers = [
        f"- {name}: {figure_of_strangers(own):.3f}"
        for name, own in by_method([row for row in rows if "sets" in row]).items()
        if "strangers" in next(iter(own[0]["sets"].values()))[0]
    ]
    parts = [
        f"## {TITLES[task]}",
        f"{stored['task']}.",
        methods_table(rows),
        f"![Accuracy over size](quality_{task}.png)",
    ]
    if strangers:
        parts += ["AUROC of rejecting queries of no label at all:", "\n".join(strangers)]
    parts += [kinds_table(rows), modules_table(rows), notes, commands(rows)]
    return "\n\n".join(part for part in parts if part)


def patching_table(stored: dict) -> str:
    """Labels of a weak model before and after they were patched: means over labels."""
    header = ["strong model", "model", "precision", "recall", "accuracy on others", "labels with more recall"]
    kinds = {"weak": "weak", "calibrated weak": "weak, calibrated alike", "patched": "patched"}
    lines = []
    for name, own in by_method(stored["rows"]).items():
        for kind, title in kinds.items():
            found = [row[kind] for row in own]
            means = [f"{mean([each[key] for each in found]):.3f}" for key in list(found[0])]
            better = sum(each["recall"] > row["weak"]["recall"] for each, row in zip(found, own, strict=True))
            lines.append([name, title, *means, "-" if kind == "weak" else f"{better} of {len(own)}"])
    return table(header, lines)


def rendered_patching(stored: dict) -> str:
    """What joining the module of a strong model with a weak model does."""
    text = (
        "## Patching a weak model\n\nThe plain VGG16 after one epoch, joined with a strong model's module for one "
        f"label after the other (`compose`, calibrated on validation data); {stored['task']}; seed {stored['seed']}, "
        "test data. *Calibrated alike*: the weak model's own label in place of the module."
    )
    return "\n\n".join([text, patching_table(stored), f"```bash\n{stored['command']}\n```"])


def commands(rows: Rows) -> str:
    """The commands that made the rows, one for all seeds of a row."""
    seeds: dict[str, list[str]] = {}
    for row in rows:
        command, _, seed = row["command"].rpartition(" --seeds ")
        seeds.setdefault(command, []).append(seed)
    lines = [f"{command} --seeds {' '.join(numbers)}" for command, numbers in seeds.items()]
    return "\n".join(["```bash", *lines, "```"])


def rendered_recipe(task: str, stored: dict) -> str:
    """What was tried on one task."""
    notes = "\n".join(f"- {note}" for note in stored.get("notes", []))
    title = f"## What was tried on {TITLES[task]}\n\nOn validation data, which chose the defaults."
    picture = "![What contrast and specificity cost the parent](recipe_digits.png)" if task == "digits" else ""
    parts = [title, recipe_table(stored["rows"]), picture, notes, commands(stored["rows"])]
    return "\n\n".join(part for part in parts if part)


def figure_of_strangers(own: Rows) -> float:
    """Mean AUROC over sets, kinds and seeds."""
    return mean([figure(row, "strangers") for row in own])


def page(read: Callable[..., dict | None]) -> str:
    """The whole page, from what `read` returns for each task."""
    found = {task: stored for task in TITLES if (stored := read(task)) is not None}
    intro = (
        "# Modules against every rival\n\nMade by `python examples/benchmarks/quality_tables.py` from the JSON files "
        "that `quality.py` writes. Means over kinds of sets, sets and seeds; accuracy on test data, which chose "
        "nothing. *accuracy* is that of the parent as the module of all labels, *by sample* with the neurons that each "
        "input opens (so in rows named so, and with soft masks). *raw* is a module as it was cut; *parent* the whole "
        "model restricted to the module's labels; "
        "*random*, *other* and *empty* are other neurons in its place (as many at random; those of as many other "
        "groups; none); *weights* are those of attention and feed-forward layers, of a CNN all; *specificity* is raw "
        "minus other, in points. In brackets: upper bound of the one-sided 95 % interval over seeds of a paired "
        "loss. Rejection: telling own samples from those of all other labels by the energy of the module's logits."
    )
    tried = {task: stored for task in TITLES if (stored := read(task, "recipe")) is not None}
    parts = [rendered(task, stored) for task, stored in found.items()]
    if PATCHING.exists():
        parts.append(rendered_patching(json.loads(PATCHING.read_text())))
    return "\n\n".join([intro, *parts, *(rendered_recipe(task, stored) for task, stored in tried.items())]) + "\n"


def draw(rows: Rows, path: Path) -> None:
    """Raw accuracy of modules, and of what other labels' modules reach, over their share of neurons."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = drawing.subplots(1, 2)
    for name, own in by_method([row for row in rows if "sets" in row]).items():
        kinds = kinds_of(own[0])
        sizes = [mean([figure(row, "neurons", [kind]) for row in own]) for kind in kinds]
        for axes, key in ((left, "module"), (right, "specificity")):
            axes.plot(
                sizes, [mean([figure(row, key, [kind]) for row in own]) for kind in kinds], marker="o", label=name
            )
    left.set_ylabel("raw accuracy")
    right.set_ylabel("raw accuracy minus that of other labels' neurons")
    for axes in (left, right):
        axes.set_xlabel("share of neurons kept")
    left.legend(fontsize=7)
    drawing.savefig(path, dpi=110)


def draw_tradeoff(rows: Rows, path: Path, least: int = 3) -> None:
    """Points that parents lose to plain models over the coupling and the specificity of their modules.

    One point for each set of options that was tried with at least so many seeds, with its standard error.
    """
    from matplotlib.figure import Figure

    plain = {row["seed"]: row["accuracy"] for row in rows if row["row"] == "plain"}
    drawing = Figure(figsize=(10, 4.5), layout="constrained")
    axes = drawing.subplots(1, 2, sharey=True)
    tried = [own for own in by_method([row for row in rows if "sets" in row]).values() if len(own) >= least]
    for own in tried:
        lost = [100 * (plain[row["seed"]] - row["accuracy"]) for row in own]
        color = "tab:blue" if own[0].get("by sample") else "tab:orange"
        error = statistics.stdev(lost) / len(lost) ** 0.5
        for axis, value in zip(
            axes, (lambda row: row["coupling"], lambda row: 100 * figure(row, "specificity")), strict=True
        ):
            axis.errorbar(mean([value(row) for row in own]), mean(lost), error, marker="o", color=color, capsize=2)
    axes[0].set(xlabel="coupling", ylabel="points lost to plain, with standard error")
    axes[1].set(xlabel="specificity in points")
    axes[0].set_title("blue: by sample, orange: as the module of all labels", fontsize=8)
    drawing.savefig(path, dpi=110)


def stored_results(task: str, kind: str = "quality") -> dict | None:
    """What was measured on a task, if anything; of the kind "recipe" what was tried on validation data."""
    path = HERE / f"{kind}_{task}.json"
    return json.loads(path.read_text()) if path.exists() else None


def main() -> None:
    """Writes the page and the pictures."""
    (HERE / "quality.md").write_text(page(stored_results))
    for task in TITLES:
        if stored := stored_results(task):
            draw(stored["rows"], HERE / f"quality_{task}.png")
    draw_tradeoff(stored_results("digits", "recipe")["rows"], HERE / "recipe_digits.png")


if __name__ == "__main__":
    main()
