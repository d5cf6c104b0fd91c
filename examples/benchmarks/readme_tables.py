"""Writes the tables and pictures of all pages from the results: the one command after a benchmark ran.

    python examples/benchmarks/readme_tables.py
    python examples/benchmarks/readme_tables.py --demo demo0 demo1 demo2  # takes up runs of `nemo-hf demo` first

A table stands between `<!-- NAME -->` and `<!-- /NAME -->` in README.md, docs/results.md, docs/export.md or
supported_models.md; the text around it is written by hand. What is not measured is left out.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from compact import RESULTS, cells, devices, grouped, load, markdown, stamped, write
from families import support_line, support_table
from training_tables import draw, headlines, stored_results, training_page

sys.path.append(str(Path(__file__).parents[1] / "case_studies"))
from tables import BLOCKS as CASES

ROOT = Path(__file__).parents[2]
CUT_SAMPLES = 300
CUT_ROWS = [
    *((0.2, method) for method in ("ours", "ours, fewer tokens", "fisher, mask tuning", "torch-pruning, taylor")),
    *((0.1, method) for method in ("ours", "ours, refined", "raw", "fisher, mask tuning", "torch-pruning, taylor")),
    *((0.1, method) for method in ("truncated", "student")),
]
"""The rows of README's table of cuts, where they are measured: share asked for and method."""


def cuts() -> str:
    """README's table of modules cut from a plain classifier; that of the demo until the former are measured."""
    stored = load(RESULTS / "cutting_clinc150.json")
    singles = [row for row in stored.get("modules", []) if row["kind"] == "singles"]
    rows = {(row["retention"], row["method"]): row for row in singles if row["samples"] == CUT_SAMPLES}
    measured = [rows[key] for key in CUT_ROWS if key in rows]
    header = ["way", "weights", "whole model", "module", "other labels' module"]
    if not measured:
        own = [row for row in load(RESULTS / "demo.json")["modules"] if row["source"] == "plain"]
        lines = []
        for found in grouped(own, "retention").values():
            weights, whole, module, raw, other = cells(found, "weights", "restricted", "accuracy", "raw", "other")
            lines += [["cut", weights, whole, raw, "-"], ["reconstructed", weights, whole, f"**{module}**", other]]
        return f"The demo's digits, means over modules and seeds:\n\n{markdown(header, lines)}"
    lines = []
    for row in measured:
        shown = [f"{row['weights']:.2f}", f"{row['restricted']:.3f}", f"{row['module']:.3f}"]
        other = "-" if row["other"] is None else f"{row['other']:.3f}"
        lines.append([row["method"], *shown, other, f"{row['bytes'] / 1e6:.1f}", str(row["sets"])])
    return f"One domain of CLINC150, MiniLM, means of sets:\n\n{markdown([*header, 'MB', 'sets'], lines)}"


def demo() -> str:
    """Modules of the demo by source and retention: means over sets of labels and seeds."""
    stored = load(RESULTS / "demo.json")
    header = ["modules cut from", "weights", "whole model", "module", "before reconstruction", "random neurons",
              "module of other labels"]  # fmt: skip
    names = {"plain": "the plain model", "parent": "the model trained on"}
    lines = []
    for (source, _), rows in grouped(stored["modules"], "source", "retention").items():
        weights, *accuracies = cells(rows, "weights", "restricted", "accuracy", "raw", "random", "other")
        accuracies[1] = f"**{accuracies[1]}**"
        lines.append([names[source], weights, *accuracies])
    seeds = ", ".join(str(row["seed"]) for row in stored["models"])
    plain, parent = cells(stored["models"], "plain", "parent")
    return (
        f"`nemo-hf demo`, mean over three sets of digits and the seeds {seeds}: plain model {plain}, trained on with "
        f"assigned masks (`plain_ratio=0`) {parent}.\n\n{markdown(header, lines)}"
    )


def store_demo(folders: list[Path]) -> None:
    """Takes up the reports of demo runs, one folder a seed."""
    models, modules = [], []
    names = ("source", "retention", "weights", "restricted", "accuracy", "raw", "random", "other", "seconds", "bytes")
    for folder in folders:
        report = json.loads((folder / "report.json").read_text())
        seed = {"seed": report["seed"]}
        models.append({**seed, **{name: report[name]["accuracy"] for name in ("plain", "parent")}})
        for each in report["modules"]:
            modules.append(
                seed | {"labels": ", ".join(map(str, each["labels"]))} | {name: each[name] for name in names}
            )
    machines, models = stamped({}, models)
    about = {"command": "nemo-hf demo --output-dir demoSEED --seed SEED", "made_with": machines}
    write(RESULTS / "demo.json", {**about, "models": models, "modules": modules})


def costs() -> str:
    """What masks, relevance and extraction cost."""
    found = load(RESULTS / "training_step.json")
    text = f"{devices(found, found['steps'])}; time and peak memory over those of a plain `Trainer` step:"
    return "\n\n".join([text, training_steps(found["steps"]), afterwards()])


def training_steps(rows: list[dict]) -> str:
    """Steps of `NeMoTrainer` over plain ones, whatever kinds were measured; and the parameters of generators."""
    kinds = [kind for kind in grouped(rows, "step") if kind != "plain"]
    lines = []
    for setting, steps in grouped(rows, "setting").items():
        own = {row["step"]: row for row in steps}
        base = own["plain"]["peak_mib"]
        shown = [f"{own[k]['ratio']:.2f}, {own[k]['peak_mib'] / base:.2f}" if k in own else "-" for k in kinds]
        lines.append([setting, f"{own['plain']['ms']:.0f}", *shown, f"{max(row['generators'] for row in steps):.1%}"])
    return markdown(["training step", "plain ms", *kinds, "generators"], lines)


def afterwards() -> str:
    """What comes after training costs."""
    found = load(RESULTS / "relevance.json")
    passes = " and ".join(f"{found[f'relevance, {name}']['ratio']:.2f}" for name in ("ViT-S/4", "MiniLM"))
    peaks = " and ".join(f"{row['peak_mib'] / row['weights_mib']:.2f}" for row in found["extraction memory, ViT-L"])
    return (
        f"Relevance takes {passes} times a plain pass over the data (ViT-S, MiniLM), and "
        f"{found['relevance, 1,000 groups over 10']['ratio']:.2f} times that with 1,000 label groups instead of 10.\n"
        f"A module of a ViT-S is cut in {found['extraction, ViT-S']['cut']:.1f} s without its check and in "
        f"{found['extraction, ViT-S']['with the check']:.1f} s with it; cutting it on load reads "
        f"{max(row['ratio'] for row in found['cut on load, ViT-S']):.2f} times the bytes of its own file.\n"
        f"Cutting half and a quarter of a ViT-L takes {peaks} times the memory of its weights, these included.\n"
        f"Importing nemo_hf adds {found['import']['added']:.2f} s to importing Trainer."
    )


def speed() -> str:
    """Speedup of modules by batch size beside the ratio of operations, and where the time of a batch goes."""
    found = load(RESULTS / "module_latency.json")
    batches = sorted({row["batch"] for row in found["times"]})
    lines = []
    for (model, sample, kept, runtime), rows in grouped(found["times"], "model", "input", "kept", "runtime").items():
        by_batch = {row["batch"]: row["speedup"] for row in rows if row.get("speedup")}
        times = [f"{by_batch[batch]:.2f}" if batch in by_batch else "-" for batch in batches]
        share = f"{by_batch[batches[-1]] / rows[0]['operations']:.0%}" if batches[-1] in by_batch else "-"
        lines.append([f"{model}, {sample}", f"{kept:g}", runtime, f"{rows[0]['operations']:.2f}", *times, share])
    header = ["model", "retention", "runtime", "operations", *(f"batch {batch}" for batch in batches), "share"]
    kinds = [name for name, value in found["parts"][0].items() if isinstance(value, float) and name not in PART_KEYS]
    parts = [
        [row["model"], f"{row['kept']:g}", *(f"{row[kind]:.1f}" for kind in kinds), f"{row['bound']:.0%}"]
        for row in found["parts"]
    ]
    text = f"{devices(found, found['times'])}; `{found['command']}`:"
    after = f"Milliseconds of a batch of {found['parts'][0]['batch']}, eager, by kind of operation:"
    tables = [markdown(header, sorted(lines)), after, markdown(["model", "retention", *kinds, "bound"], parts)]
    return "\n\n".join([text, *tables])


PART_KEYS = ("batch", "kept", "bound")  # of the table of kinds of operations, that are no times


def cutting() -> str:
    """Modules cut from plain classifiers, beside other ways to a small model of some labels."""
    return "\n\n".join(cutting_page(load(path)) for path in sorted(RESULTS.glob("cutting_*.json")))


def structure() -> str:
    """What dropped parts and narrower streams buy: a line for each way, a column for each share of the weights."""
    stored = load(RESULTS / "depth_and_width.json")
    parts = []
    for (task, kind), rows in grouped(stored.get("modules", []), "task", "kind").items():
        shares = sorted({row["retention"] for row in rows}, reverse=True)
        lines = []
        for way, own in grouped(rows, "way").items():
            found = {row["retention"]: f"{row['module']:.3f} ({row['bytes'] / 1e3:.0f} kB)" for row in own}
            lines.append([way, *(found.get(share, "-") for share in shares)])
        seeds = sorted({seed for row in rows for seed in row["seeds"]})
        about = f"{task}, {kind}: number of modules {max(row['rows'] for row in rows)}, seeds {seeds}"
        parts.append(f"{about}, {rows[0]['samples']} samples; restricted source {rows[0]['restricted']:.3f}:")
        parts.append(markdown(["accuracy (size)", *(f"{share:g} of the weights" for share in shares)], lines))
    return "\n\n".join(parts)


def cutting_page(stored: dict) -> str:
    """A table for each kind of sets: means over sets, with times of the first set alone, on one thread."""
    times = grouped(stored.get("latency", []), "kind", "method", "retention")
    batches = sorted({row["batch"] for row in stored.get("latency", [])})
    header = ["method", "share", "weights", "calibration", "accuracy", "loss", "worst", "specificity", "rejection",
              "parameters", "MB", "MiB", "sets", "seconds", *(f"ms, batch {b}" for b in batches)]  # fmt: skip
    formats = {"weights": "{:.3f}", "samples": "{}", "module": "{:.3f}", "loss": "{:.1f}", "worst_loss": "{:.1f}",
               "specificity": "{:.1f}", "rejection": "{:.3f}", "parameters": "{:,}", "megabytes": "{:.1f}",
               "peak_mib": "{:.0f}", "sets": "{}"}  # fmt: skip
    parts = [f"{stored['task']}; source {stored['source']}. Losses and specificity in points."]
    for kind, rows in grouped(stored["modules"], "kind").items():
        lines = []
        for row in rows:
            row = {**row, "megabytes": row["bytes"] / 1e6}
            shown = ["-" if row[name] is None else form.format(row[name]) for name, form in formats.items()]
            timed = times.get((kind, row["method"], row["retention"]), [])
            own = {t["batch"]: f"{t['ms']:.1f}" for t in timed}
            asked = "-" if row["retention"] is None else f"{row['retention']:g}"
            seconds = f"{timed[0]['seconds']:.1f}" if timed else "-"
            lines.append([row["method"], asked, *shown, seconds, *(own.get(batch, "-") for batch in batches)])
        parts.append(f"{kind}; restricted source {rows[0]['restricted']:.3f}:")
        parts.append(markdown(header, lines))
    return "\n\n".join(parts)


def deployment() -> str:
    """Models by cut and format: accuracy, bytes, and how much faster they are than the source; then rejection."""
    stored = load(RESULTS / "deployment.json")
    times = grouped(stored.get("times", []), "model", "format")
    batches = sorted({row["batch"] for row in stored.get("times", [])})
    header = ["model", "format", "accuracy", "loss", "worst loss", "domains", "MB",
              *(f"ms, batch {b}" for b in batches), "to source, same format", "to source, torch"]  # fmt: skip
    lines = []
    by_model = grouped(stored["accuracies"], "model").values()
    for row in (row for rows in by_model for row in sorted(rows, key=itemgetter("format"))):
        timed = {each["batch"]: each for each in times.get((row["model"], row["format"]), [])}
        accuracy, loss, worst = f"{row['accuracy']:.3f}", f"{row['loss']:.1f}", f"{row['worst_loss']:.1f}"
        size = "-" if row["bytes"] is None else f"{row['bytes'] / 1e6:.1f}"
        ratios = [
            " / ".join(f"{timed[batch][name]:.1f}" if batch in timed else "-" for batch in batches)
            for name in ("to_source_in_format", "to_source_in_torch")
        ]
        ms = (f"{timed[batch]['ms']:.2f}" if batch in timed else "-" for batch in batches)
        lines.append([row["model"], row["format"], accuracy, loss, worst, str(row["domains"]), size, *ms, *ratios])
    parts = [f"{devices(stored, stored.get('times', []))}:", markdown(header, lines)]
    if rejected := stored.get("rejection"):
        names = ("agreement", "own_rejected", "others_rejected", "auroc")
        lines = [[row["format"], *(f"{row[name]:.3f}" for name in names), str(row["domains"])] for row in rejected]
        header = ["format", "agreement", "own queries rejected", "others rejected", "AUROC", "domains"]
        parts += [f"Rejection of {rejected[0]['model']}:", markdown(header, lines)]
    return "\n\n".join(parts)


BLOCKS: dict[str, Callable[[], str]] = {
    "results": lambda: headlines(stored_results()), "training": lambda: training_page(stored_results()),
    "costs": costs, "support": support_line, "demo": demo, "cuts": cuts, "cutting": cutting, "structure": structure,
    "deployment": deployment, "speed": speed, **CASES,
    "supported models": support_table,
}  # fmt: skip
PAGES = {
    ROOT / "README.md": ["cuts", "results"],
    ROOT / "docs" / "results.md": ["training", "demo", "costs", "support"],
    ROOT / "docs" / "case_banking.md": ["case banking", "case banking, load"],
    ROOT / "docs" / "case_repair.md": ["case repair"],
    ROOT / "docs" / "cutting.md": ["structure"],
    ROOT / "docs" / "export.md": ["deployment"],
    ROOT / "docs" / "speed.md": ["speed"],
    Path(__file__).with_name("supported_models.md"): ["support", "supported models"],
}
"""The pages and the tables that each must have; other tables are made where their markers are found."""


def rendered(text: str) -> str:
    """A page with all its tables made again."""
    for name, make in BLOCKS.items():
        pattern = re.compile(rf"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
        if pattern.search(text):
            block = "\n".join(filter(None, (f"<!-- {name} -->", make(), f"<!-- /{name} -->")))
            text = pattern.sub(lambda _, block=block: block, text)
    return text


def missing(text: str, names: list[str]) -> list[str]:
    """Names of tables that a page has no pair of markers for."""
    return [name for name in names if not re.search(rf"<!-- {name} -->.*?<!-- /{name} -->", text, re.DOTALL)]


def main() -> None:
    """Writes all pages and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", nargs="+", type=Path, default=[], help="Output folders of `nemo-hf demo`.")
    if folders := parser.parse_args().demo:
        store_demo(folders)
    problems = []
    for path, names in PAGES.items():
        if not path.exists():
            problems.append(f"{path.relative_to(ROOT)} is missing.")
            continue
        text = path.read_text()
        path.write_text(rendered(text))
        problems += [
            f"{path.relative_to(ROOT)} has no <!-- {name} --> ... <!-- /{name} -->." for name in missing(text, names)
        ]
    draw(stored_results(), ROOT / "docs" / "training.png")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
