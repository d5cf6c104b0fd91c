"""Tables and the picture of results/training_*.json; `readme_tables.py` writes them into the pages.

Modules are compared only where they were measured on as many sets and the same seeds. Between ways to cut, the accuracy
on validation data chooses.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from compact import RESULTS, Rows, cells, devices, grouped, load, markdown
from scipy.stats import t as student

TITLES = {
    "digits": "Digits, ViT",
    "clinc150": "CLINC150, MiniLM",
    "clinc150-2000": "CLINC150-2000, MiniLM",
    **{f"cifar10-{name.lower()}": f"CIFAR-10, {name}" for name in ("ResNet18", "VGG16", "ViT", "SimCNN", "ResCNN")},
}
RECONSTRUCTED = ("reconstructed", "reconstructed, relevance")
FINE_TUNED = ("fine-tuned", "fine-tuned, relevance")
SHOWN_WAYS = {"raw": ("raw",), "reconstructed": RECONSTRUCTED, "fine-tuned": FINE_TUNED}
COMPARED = {"reconstructed": ("raw", *RECONSTRUCTED), "fine-tuned": FINE_TUNED}
"""The ways that a method may choose from, beside the way of the plain model that it is compared with."""
HEADLINES = {
    "digits": ("pairs", ("plain", "assigned", "nemo", "mwt")),
    "clinc150-2000": ("singles", ("plain", "assigned")),
    "cifar10-vgg16": ("pairs", ("plain", "assigned", "nemo", "moda")),
}
"""The rows of README's table, where they are measured: kind of sets and methods by task."""
HEADLINE_RETENTIONS = (0.2, 0.05)
DRAWN_METHODS = ("assigned", "generated", "nemo", "mwt", "moda")
Results = Mapping[str, dict]


def stored_results(folder: Path = RESULTS) -> dict[str, dict]:
    """Results by task, without modules that have nothing to choose, since their set is one label."""
    found = {}
    for path in folder.glob("training_*.json"):
        stored = load(path)
        if "methods" in stored:
            for name in ("modules", "own"):
                rows = stored.get(name, [])
                stored[name] = [row for row in rows if row["restricted"] < 1 or row["kind"] != "singles"]
            found[path.stem.removeprefix("training_")] = stored
    places = {name: place for place, name in enumerate(TITLES)}
    return dict(sorted(found.items(), key=lambda item: (places.get(item[0], len(places)), item[0])))


def title(task: str) -> str:
    """Name of a task."""
    return TITLES.get(task, task)


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


def seeds_of(seeds: Sequence[int]) -> str:
    """Seeds, such as "0-9"."""
    seeds = sorted(seeds)
    is_range = len(seeds) > 2 and seeds == list(range(seeds[0], seeds[-1] + 1))
    return f"{seeds[0]}-{seeds[-1]}" if is_range else ", ".join(map(str, seeds))


def losses(rows: Rows) -> list[float]:
    """Points that a training method loses to the plain model, by seed."""
    return [row["lost"] for row in rows if row.get("lost") is not None and row["method"] != "plain"]


def times_plain(rows: Rows, plain: Mapping[int, dict], column: str) -> str:
    """Mean over seeds of a cost over that of the plain model."""
    pairs = [(row.get(column), plain.get(row["seed"], {}).get(column)) for row in rows]
    ratios = [own / base for own, base in pairs if own and base]
    return f"{statistics.fmean(ratios):.2f}" if ratios else "-"


def methods_table(stored: Mapping) -> str:
    """One line a method: what it does to the whole model, and what its training costs."""
    header = ["method", "seeds", "accuracy", "points lost to plain", "cohesion", "coupling", "memory"]
    plain = {row["seed"]: row for row in stored["methods"] if row["method"] == "plain"}
    lines = []
    for method, rows in grouped(stored["methods"], "method").items():
        line = [method, seeds_of([row["seed"] for row in rows]), spread([row["accuracy"] for row in rows])]
        memory = times_plain(rows, plain, "peak_mib")
        lines.append([*line, upper_bound(losses(rows)), *cells(rows, "cohesion", "coupling"), memory])
    return markdown(header, lines)


def best(rows: Rows, ways: Sequence[str], like: Mapping | None) -> dict | None:
    """The row of one of some ways that does best on validation data, of those with the sets and seeds of another."""
    known = [row for row in rows if row["way"] in ways and like is not None and same_sets(row, like)]
    return max(known, key=lambda row: row["validation"], default=None)


def widest(rows: Rows) -> dict | None:
    """The row of most sets."""
    return max(rows, key=lambda row: row["sets"], default=None)


def same_sets(row: Mapping, other: Mapping) -> bool:
    """Whether two rows are means over as many sets and the same seeds."""
    return (row["sets"], row["seeds"]) == (other["sets"], other["seeds"])


def modules_of(stored: Mapping, *keys: str) -> dict[tuple, Rows]:
    """Rows of modules by kind of sets and size, in order of the kinds and from large to small, or by further keys."""
    found = grouped(stored["modules"], *keys, "kind", "retention")
    kinds = list(grouped(stored["modules"], "kind"))
    return dict(sorted(found.items(), key=lambda item: (kinds.index(item[0][-2]), -item[0][-1])))


def modules_table(stored: Mapping) -> str:
    """One line a method, kind of sets and size; sizes and controls are those of the reconstructed module."""
    header = ["kind", "retention", "method", "restricted", *SHOWN_WAYS, "other", "rejection", "weights", "sets",
              "seeds"]  # fmt: skip
    lines = []
    for (method, kind, retention), rows in modules_of(stored, "method").items():
        shown = best(rows, RECONSTRUCTED, widest(rows)) or widest(rows)
        found = [best(rows, ways, shown) for ways in SHOWN_WAYS.values()]
        accuracies = ["-" if row is None else f"{row['module']:.3f}" for row in found]
        line = [kind, f"{retention:g}", method, *cells([shown], "restricted"), *accuracies]
        counts = [str(shown["sets"]), seeds_of(shown["seeds"])]
        lines.append([*line, *cells([shown], "other", "rejection", "weights"), *counts])
    return markdown(header, lines)


def own_table(results: Results) -> str:
    """Modules of the sizes that methods choose themselves: means over kinds of sets."""
    header = ["data and model", "method", "weights", "restricted", "module", "fine-tuned"]
    lines = [
        [title(task), method, *cells(rows, "weights", "restricted", "module", "tuned")]
        for task, stored in results.items()
        for method, rows in grouped(stored["own"], "method").items()
    ]
    return markdown(header, lines) if lines else ""


def against_mwt(results: Results, method: str) -> str:
    """Fine-tuned accuracy and size of a method's modules against those of MwT, means over tasks; empty if unknown."""
    differences, sizes = [], []
    for stored in results.values():
        own, base = ({r["kind"]: r for r in stored["own"] if r["method"] == name} for name in (method, "mwt"))
        pairs = [(own[kind], base[kind]) for kind in own if kind in base and same_sets(own[kind], base[kind])]
        if pairs:
            differences.append(statistics.fmean(100 * (ours["tuned"] - theirs["tuned"]) for ours, theirs in pairs))
            weights = [sum(row["weights"] for row in rows) for rows in zip(*pairs, strict=True)]
            sizes.append(100 * (weights[0] / weights[1] - 1))
    if not differences:
        return ""
    count = f"{len(sizes)} task{'s' * (len(sizes) > 1)}"
    return f"{statistics.fmean(differences):+.2f} points and {statistics.fmean(sizes):+.2f} % of size ({count})"


def claim(results: Results) -> str:
    """What the paper says of its method, beside what is measured here."""
    if not (table := own_table(results)):
        return ""
    names = {"nemo": "nemo", "plain": "a fifth of the plain model, reconstructed,"}
    found = {shown: against_mwt(results, method) for method, shown in names.items()}
    lines = [f"- {shown} against mwt: {text}" for shown, text in found.items() if text]
    paper = "- nemo against mwt in the paper (arXiv 2508.11348): +1.72 points and -58.10 % of size"
    limits = (
        "Not comparable: data; widths of 16 and 20 epochs on CIFAR-10, where the paper has 64 and 200; SVHN and "
        "Fashion-MNIST, which were not run. Methods choose sizes by their own threshold of 0.9."
    )
    return "\n\n".join([table, "\n".join([*lines, paper]), limits])


def pays_table(results: Results) -> str:
    """Modules of the plain model, and by how many points those of training methods are better."""
    methods = list(dict.fromkeys(r["method"] for s in results.values() for r in s["modules"] if r["method"] != "plain"))
    lines = []
    for task, stored in results.items():
        for (kind, retention), rows in modules_of(stored).items():
            own = grouped(rows, "method")
            for way, ways in COMPARED.items():
                plain = next((row for row in own.get("plain", []) if row["way"] == way), None)
                if plain is None:
                    continue
                found = [best(own.get(method, []), ways, plain) for method in methods]
                shown = ["-" if r is None else f"{100 * (r['module'] - plain['module']):+.1f}" for r in found]
                if set(shown) - {"-"}:
                    lines.append([title(task), kind, f"{retention:g}", way, f"{plain['module']:.3f}", *shown])
    return markdown(["data and model", "kind", "retention", "way", "plain", *methods], lines) if lines else ""


def training_page(results: Results) -> str:
    """All tables of trained models and their modules, with the picture."""
    if not results:
        return ""
    parts = ["![Accuracy of modules over their share of the weights, by task, kind of sets and method](training.png)"]
    if table := pays_table(results):
        parts += ["### Where does training pay?", "Points above the plain model's module of the same size:", table]
    if table := claim(results):
        parts += ["### The paper's claim", "Modules of the methods' own sizes, means over kinds of sets:", table]
    for task, stored in results.items():
        parts += [f"### {title(task)}", f"{stored['task']}; {stored['epochs']} epochs. `{stored['command']}`; "
                  f"{devices(stored, stored['methods'])}.", methods_table(stored)]  # fmt: skip
        parts += [modules_table(stored)] if stored["modules"] else []
    return "\n\n".join(parts)


def headlines(results: Results) -> str:
    """README's table: what training methods cost, and modules of one kind of sets."""
    sizes = [f"module, {size:.0%}" for size in HEADLINE_RETENTIONS]
    header = ["data and model", "training", "seeds", "points lost", *sizes]
    lines = []
    for task, (kind, methods) in HEADLINES.items():
        stored = results.get(task, {"methods": [], "modules": []})
        measured, modules = grouped(stored["methods"], "method"), modules_of(stored, "method")
        for method in methods:
            if method in measured:
                rows = [modules.get((method, kind, size), []) for size in HEADLINE_RETENTIONS]
                found = [best(own, RECONSTRUCTED, widest(own)) for own in rows]
                shown = ["-" if row is None else f"{row['module']:.3f}" for row in found]
                line = [title(task), method, seeds_of([row["seed"] for row in measured[method]])]
                lines.append([*line, upper_bound(losses(measured[method])), *shown])
    return markdown(header, lines) if lines else ""


def curves(stored: Mapping, kind: str) -> dict[str, list[tuple[float, float]]]:
    """Lines of the picture for a kind of sets: points of share of weights and accuracy by name."""
    methods = grouped([row for row in stored["modules"] if row["kind"] == kind], "method")
    asked = [(f"plain, {name}", "plain", ways) for name, ways in SHOWN_WAYS.items()]
    asked += [(f"{method}, reconstructed", method, RECONSTRUCTED) for method in DRAWN_METHODS]
    found = {}
    for name, method, ways in asked:
        sizes = grouped([row for row in methods.get(method, []) if row["way"] in ways], "retention").values()
        chosen = [best(rows, ways, widest(rows)) for rows in sizes]
        if points := sorted((row["weights"], row["module"]) for row in chosen if row is not None):
            found[name] = points
    return found


def draw(results: Results, path: Path) -> None:
    """Draws accuracy of modules over their share of the weights: a row of panels for each task, one a kind of sets."""
    from matplotlib.figure import Figure

    kinds = {task: list(grouped(stored["modules"], "kind")) for task, stored in results.items()}
    kinds = {task: names for task, names in kinds.items() if names}
    if not kinds:
        return
    columns = max(map(len, kinds.values()))
    figure = Figure(figsize=(1.2 + 3.4 * columns, 0.9 + 2.7 * len(kinds)), layout="constrained")
    panels = figure.subplots(len(kinds), columns, squeeze=False)
    colors = {f"{method}, reconstructed": f"C{place}" for place, method in enumerate(DRAWN_METHODS)}
    styles = dict(zip((f"plain, {name}" for name in SHOWN_WAYS), (":", "-", "--"), strict=True))
    legend = {}
    for row, (task, names) in zip(panels, kinds.items(), strict=True):
        for axes in row[len(names) :]:
            axes.set_visible(False)
        for axes, kind in zip(row, names, strict=False):
            for name, points in curves(results[task], kind).items():
                style = {"color": colors.get(name, "black"), "linestyle": styles.get(name, "-")}
                (legend[name],) = axes.plot(*zip(*points, strict=True), marker="o", markersize=3, **style)
            axes.set_xscale("log")
            sizes = sorted({r["retention"] for r in results[task]["modules"] if r["kind"] == kind})
            axes.set_xticks(sizes, [f"{size:.0%}" for size in sizes])
            axes.minorticks_off()
            axes.set(title=f"{title(task)}: {kind}", xlabel="share of the weights kept")
            axes.grid(alpha=0.3)
        row[0].set_ylabel("accuracy")
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=min(len(legend), 1 + columns))
    figure.savefig(path, dpi=75, metadata={"Software": None}, pil_kwargs={"optimize": True})
