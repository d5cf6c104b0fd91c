"""Tables and pictures of the earlier results/quality_*.json; `readme_tables.py` writes them into the pages."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from compact import RESULTS, Rows, grouped, load, markdown, mean
from scipy.stats import t as student

MEASURED = {"neurons": 2, "module": 3, "restricted": 3, "random": 3, "other": 3, "empty": 3}  # decimals by column


def stored_results(task: str) -> dict:
    """Results of a task."""
    return load(RESULTS / f"quality_{task}.json")


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    around = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{around}"


def upper_bound(points: Sequence[float]) -> str:
    """Mean loss and, from three seeds on, the upper bound of its one-sided 95 % interval."""
    if len(points) < 3:
        return f"{statistics.fmean(points):.2f}" if points else "-"
    middle, error = statistics.fmean(points), statistics.stdev(points) / len(points) ** 0.5
    return f"{middle:.2f} (at most {middle + student.ppf(0.95, len(points) - 1) * error:.2f})"


def sets_of(stored: dict) -> dict[str, Rows]:
    """Rows of the table "sets" by method, without sets of one label, among which a module has nothing to choose."""
    return grouped([row for row in stored["sets"] if row["restricted"] < 1 or row["kind"] != "singles"], "method")


def specificity(row: dict) -> float:
    """Points that a module is better than the neurons of other labels."""
    return 100 * (row["module"] - row["other"])


def loss_in_points(row: dict) -> float:
    """Points that modules lose to the restricted parent."""
    return 100 * (row["restricted"] - row["module"])


def cells(rows: Rows, *columns: str) -> list[str]:
    """Means of columns, "-" where nothing was measured."""
    decimals = MEASURED | {"rejection": 3, "cohesion": 2, "coupling": 2, "by_sample": 3, "weights": 2, "dead": 2}
    known = {name for name in columns if rows and all(row.get(name) is not None for row in rows)}
    return [f"{mean(rows, name):.{decimals.get(name, 3)}f}" if name in known else "-" for name in columns]


def methods_table(stored: dict) -> str:
    """One line a method: means over kinds of sets and seeds."""
    header = ["method", "seeds", "accuracy", "points lost to plain", "by sample", "neurons of singles", "neurons",
              "module", "parent", "points lost", "random", "other", "empty", "specificity", "rejection AUROC",
              "cohesion", "coupling"]  # fmt: skip
    sets, singles = sets_of(stored), grouped([row for row in stored["sets"] if row["kind"] == "singles"], "method")
    lines = []
    for name, rows in grouped(stored["methods"], "method").items():
        line = [name, seeds_of(rows), spread([row["accuracy"] for row in rows])]
        if name in sets:
            own = sets[name]
            neurons, module, *controls = cells(own, *MEASURED)
            losses = [mean(same, loss_in_points) for same in grouped(own, "seed").values()]
            line += [upper_bound([100 * (row["plain"] - row["accuracy"]) for row in rows if row["plain"] is not None])]
            line += [
                *cells(rows, "by_sample"),
                *cells(singles.get(name, []), "neurons"),
                neurons,
                f"**{module}**",
                controls[0],
            ]
            line += [upper_bound(losses), *controls[1:], f"{mean(own, specificity):.1f}", *cells(own, "rejection")]
            line += cells(rows, "cohesion", "coupling")
        lines.append([*line, *["-"] * (len(header) - len(line))])
    return markdown(header, lines)


def seeds_of(rows: Rows) -> str:
    """The seeds of a method, such as "0-9"."""
    seeds = sorted(row["seed"] for row in rows)
    is_range = len(seeds) > 2 and seeds == list(range(seeds[0], seeds[-1] + 1))
    return f"{seeds[0]}-{seeds[-1]}" if is_range else ", ".join(map(str, seeds))


def kinds_table(stored: dict) -> str:
    """One line a method and kind of set: means over seeds."""
    header = ["method", "sets", "neurons", "weights", "module", "parent", "random", "other", "empty",
              "specificity", "rejection AUROC"]  # fmt: skip
    lines = []
    for (name, kind), rows in grouped(stored["sets"], "method", "kind").items():
        line = [name, f"{rows[0]['sets']} {kind}", *cells(rows, "neurons", "weights", *list(MEASURED)[1:])]
        lines.append([*line, f"{mean(rows, specificity):.1f}", *cells(rows, "rejection")])
    return markdown(header, lines)


def modules_table(stored: dict) -> str:
    """Modules that were cut: what fine-tuning, training from scratch and pruning reach at the same size."""
    header = ["method", "labels", "weights", "MB", "raw", "fine-tuned", "same size from scratch", "pruned",
              "own accepted", "others rejected"]  # fmt: skip
    lines = []
    for row in stored["modules"]:
        sizes = [f"{row[key]:.2f}" for key in ("weights", "megabytes")]
        keys = ("raw", "fine_tuned", "same_size", "pruned", "accepted", "rejected")
        lines.append([row["method"], row["labels"], *sizes, *(f"{row[key]:.3f}" for key in keys)])
    return markdown(header, lines)


def summary(stored: dict) -> str:
    """A shorter table of the methods."""
    header = ["method", "accuracy", "neurons", "module", "parent restricted", "random", "other", "coupling"]
    sets, methods, lines = sets_of(stored), grouped(stored["methods"], "method"), []
    for name, rows in methods.items():
        line = [name, spread([row["accuracy"] for row in rows])]
        if name in sets:
            neurons, module, *controls = cells(sets[name], *list(MEASURED)[:-1])
            line += [neurons, f"**{module}**", *controls, *cells(rows, "coupling")]
        lines.append([*line, *["-"] * (len(header) - len(line))])
    counts = sorted({len(rows) for rows in methods.values()})
    seeds = f"{counts[0]} to {counts[-1]} seeds" if len(counts) > 1 else f"{counts[0]} seed{'s' * (counts[0] > 1)}"
    return f"{stored['task']}; {seeds}:\n\n{markdown(header, lines)}"


def commands(stored: dict) -> str:
    """The commands that make the rows, one for all methods with the same seeds."""
    by_seeds: dict[str, list[str]] = {}
    for name, rows in grouped(stored["methods"], "method").items():
        by_seeds.setdefault(" ".join(str(row["seed"]) for row in rows), []).append(name)
    lines = []
    for seeds, names in by_seeds.items():
        given = " ".join(f"'{name}'" if " " in name else name for name in names if "processor" not in name)
        if given:
            lines.append(stored["command"].replace("METHOD", given).replace("SEED", seeds))
    return "\n".join(["```bash", *lines, "```"])


def page(task: str) -> str:
    """All tables of a task."""
    stored = stored_results(task)
    parts = [f"{stored['task']}.", methods_table(stored), kinds_table(stored), modules_table(stored)]
    strangers = {name: rows for name, rows in sets_of(stored).items() if rows[0].get("strangers") is not None}
    found = ", ".join(f"{mean(rows, 'strangers'):.3f} ({name})" for name, rows in strangers.items())
    parts += [f"AUROC of rejecting inputs of no label: {found}."] if found else []
    return "\n\n".join([*parts, commands(stored)])


def patching_table() -> str:
    """Labels of a weak model before and after patching: means over labels."""
    stored = load(RESULTS / "patching.json")
    header = ["strong model", "model", "precision", "recall", "accuracy on others", "labels with more recall"]
    weak = {row["label"]: row for row in stored["labels"] if row["model"] == "weak"}
    lines = []
    for (strong, model), rows in grouped(stored["labels"], "strong", "model").items():
        better = sum(row["recall"] > weak[row["label"]]["recall"] for row in rows)
        line = [strong, model, *(f"{mean(rows, key):.3f}" for key in ("precision", "recall", "others"))]
        lines.append([*line, "-" if model == "weak" else f"{better} of {len(rows)}"])
    return f"{stored['task']}; seed {stored['seed']}:\n\n{markdown(header, lines)}\n\n```bash\n{stored['command']}\n```"


def draw(tasks: dict[str, str], methods: Sequence[str], path: Path) -> None:
    """Points that modules lose to the restricted parent, and their specificity, over the share of neurons kept.

    `tasks` holds titles by task. A line is a method, its points are the kinds of sets.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(tasks), 6.5), layout="constrained")
    panels = figure.subplots(2, len(tasks), sharex=True, sharey="row")
    lines = {}
    for (task, title), (top, bottom) in zip(tasks.items(), panels.T, strict=True):
        top.set_title(title)
        bottom.set_xlabel("share of neurons kept")
        sets = sets_of(stored_results(task))
        for index, name in enumerate(methods):
            kinds = grouped(sets.get(name, []), "kind").values()
            sizes = [mean(rows, "neurons") for rows in kinds]
            for axes, value in ((top, loss_in_points), (bottom, specificity)):
                values = [mean(rows, value) for rows in kinds]
                (lines[name],) = axes.plot(sizes, values, color=f"C{index}", marker="o")
    panels[0, 0].set_ylabel("points lost to the restricted parent")
    panels[1, 0].set_ylabel("specificity in points")
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines))
    figure.savefig(path, dpi=80, pil_kwargs={"optimize": True})
