"""Renders README's tables from the results beside the scripts.

    python examples/benchmarks/readme_tables.py

Reads examples/demo.json (one report a seed) and the results beside this script; rewrites
what stands between the markers in README.md.
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from quality_tables import TITLES, stored_results, summary

BENCHMARKS = Path(__file__).parent
EXAMPLES = Path(__file__).parents[1]
README = EXAMPLES.parent / "README.md"
SUPPORT = BENCHMARKS / "supported_models.json"


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def module_row(name: str, modules: list[dict], parent_ms: list[dict], module_ms: list[dict]) -> list[str]:
    """One module, averaged over seeds."""
    controls = [[m["controls"][key] for m in modules] for key in ("random", "other", "empty")]
    return [
        name,
        f"{mean([m['neuron_retention_rate'] for m in modules]):.2f}",
        f"{mean([m['weight_retention_rate'] for m in modules]):.2f}",
        f"**{mean([m['accuracy'] for m in modules]):.3f}**",
        f"{mean([m['parent_restricted_accuracy'] for m in modules]):.3f}",
        *("-" if None in values else f"{mean(values):.3f}" for values in controls),
        f"{mean([m['32'] for m in module_ms]):.1f} of {mean([m['32'] for m in parent_ms]):.1f}",
    ]


HEADER = ["module", "neurons", "weights", "raw accuracy", "parent", "random", "other", "empty", "ms at batch 32"]


def demo_table() -> str:
    """Means over the seeds of the demo."""
    reports = json.loads((EXAMPLES / "demo.json").read_text())["reports"]
    rows = []
    for modules in zip(*(report["modules"] for report in reports), strict=True):
        name = ", ".join(map(str, modules[0]["labels"]))
        parent_ms, module_ms = [
            [m[key] for m in modules] for key in ("parent_latency_ms_by_batch", "latency_ms_by_batch")
        ]
        rows.append(module_row(name, list(modules), parent_ms, module_ms))
    plain, parent = [[report[key]["accuracy"] for report in reports] for key in ("plain", "parent")]
    coupling = mean([report["parent"]["coupling"] for report in reports])
    seeds = ", ".join(str(report["seed"]) for report in reports)
    return (
        f"Mean over the seeds {seeds}: plain model {mean(plain):.3f}, parent {mean(parent):.3f}, "
        f"coupling {coupling:.2f}.\n\n{table(HEADER, rows)}"
    )


def quality_tables() -> str:
    """What `quality.py` measured, in short."""
    found = {task: stored_results(task) for task in TITLES}
    return "\n\n".join(summary(stored) for stored in found.values() if stored)


def support_line() -> str:
    """In how many families of transformers neurons are cut."""
    families = {row["model_type"]: row for row in json.loads(SUPPORT.read_text())["families"]}
    found = {kind: [row for row in families.values() if kind in row] for kind in ("ffn", "attention", "conv")}
    dense = [row for row in found["attention"] if "scatter" not in str(row["attention"]["pruning_modes"])]
    return (
        f"Of {len(families)} families, feed-forward neurons are cut exactly in {len(found['ffn'])} and attention in "
        f"{len(found['attention'])}, of these {len(dense)} dense throughout;\n"
        f"channels of convolutions in {len(found['conv'])}."
    )


def training_table() -> str:
    """What masks cost in training."""
    found = json.loads((BENCHMARKS / "training_step.json").read_text())
    rows = []
    for row in found["rows"]:
        ratios = [f"{row[kind]['ratio']:.2f}" for kind in ("masks", "masks and rehearsal")]
        peak = f"{row['masks']['peak_ratio']:.2f}"
        rows.append([row["setting"], f"{row['plain']['milliseconds']:.0f}", *ratios, peak, f"{row['generators']:.1%}"])
    header = ["training step", "plain ms", "masks", "and rehearsal", "peak memory", "generators"]
    return f"{found['device']}; times and memory over those of a plain `Trainer` step:\n\n{table(header, rows)}"


def latency_table() -> str:
    """How much faster modules are."""
    found = json.loads((BENCHMARKS / "module_latency.json").read_text())
    rows = []
    for row in found["rows"]:
        speedups = [f"{size['speedup']:.2f}" for size in row["eager"]]
        rows.append([f"{row['model']}, {row['neurons']:.0%} of the neurons", f"{row['ideal']:.2f}", *speedups])
    batches = [f"batch {size['batch']}" for size in found["rows"][0]["eager"]]
    return "Speedup of modules over their parent; *operations* is the parent's number over the module's:\n\n" + table(
        ["module", "operations", *batches], rows
    )


def afterwards_line() -> str:
    """What comes after training costs."""
    found = json.loads((BENCHMARKS / "relevance.json").read_text())
    read = max(row["ratio"] for row in found["cut on load, ViT-S"])
    passes = " and ".join(f"{found[f'pass, {name}']['ratio']:.2f}" for name in ("ViT-S/4", "MiniLM"))
    return (
        f"Relevance takes {passes} times a plain pass over the data (ViT-S, MiniLM), and "
        f"{found['pass, 1,000 groups over 10']['ratio']:.2f} times that with 1,000 label groups instead of 10.\n"
        f"A module of a ViT-S is cut in {found['seconds of extraction, ViT-S']['cut']:.1f} s besides its check; "
        f"cutting it on load reads {read:.2f} times its bytes.\n"
        f"Importing nemo_hf adds {found['import seconds']['added']:.2f} s to importing Trainer."
    )


def costs() -> str:
    """What masks and modules cost."""
    return f"{training_table()}\n\n{afterwards_line()}\n\n{latency_table()}"


def rendered(readme: str) -> str:
    """README with its tables made anew."""
    tables = {
        "demo": demo_table,
        "support": support_line,
        "quality": quality_tables,
        "costs": costs,
    }
    for name, make in tables.items():
        pattern = re.compile(rf"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
        block = f"<!-- {name} -->\n{make()}\n<!-- /{name} -->"
        readme = pattern.sub(lambda _, block=block: block, readme)
    return readme


if __name__ == "__main__":
    README.write_text(rendered(README.read_text()))
