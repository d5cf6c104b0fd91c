"""The tables of the case studies' pages; `examples/benchmarks/readme_tables.py` writes them."""

import statistics
from collections.abc import Callable

from compact import RESULTS, devices, grouped, load, markdown, mean

NAMES = {
    "classifier": "classifier of 150 intents, as it is",
    "source": "the same for 30 intents",
    "module": "**module**",
    "truncated": "truncated encoder",
    "truncated-all": "truncated encoder, trained on 150 intents",
}
"""What the table calls a model; exports to ONNX have the name of theirs."""
CLIENTS = (1, 4, 16)


def shown_name(name: str) -> str:
    """What the tables call a model or its export."""
    model, *formats = name.split("-onnx")
    return NAMES[model] + (f", ONNX{formats[0].replace('-', ' ')}" if formats else "")


def ordered(rows: list[dict]) -> dict[str, dict]:
    """Rows by model, in the order of `NAMES`."""
    found = {row["model"]: row for row in rows}
    return dict(sorted(found.items(), key=lambda item: (list(NAMES).index(item[0].split("-onnx")[0]), item[0])))


def banking_answers() -> str:
    """What the endpoint answers with each model, and what the models cost."""
    stored = load(RESULTS / "case_banking.json")
    models = ordered(stored["models"])
    header = ["model", "accuracy", "with rejection", "own accepted", "other domains rejected", "no intent rejected",
              "AUROC, other domains", "AUROC, no intent", "parameters", "MB", "MB pulled",
              "CPU minutes of work"]  # fmt: skip
    keys = ("closest", "right", "accepted", "rejected_other", "rejected_strange", "auroc_other", "auroc_strange")
    lines = []
    for name, row in ordered(stored["answers"]).items():
        row = {**row, "accepted": 1 - row["rejected_own"]}
        line = [shown_name(name), *(f"{row[key]:.3f}" for key in keys)]
        own = models.get(name)
        megabytes = [f"{own['bytes'] / 1e6:.1f}", f"{row['pulled_bytes'] / 1e6:.1f}"] if own else ["-", "-"]
        lines.append([*line, f"{own['parameters']:,}" if own else "-", *megabytes, minutes(own) if own else "-"])
    return f"{stored['task']}; {devices(stored, stored['models'])}:\n\n{markdown(header, lines)}"


def minutes(row: dict) -> str:
    """Minutes of CPU time that making a model took."""
    return f"{row['seconds'] / 60:.1f}"


def banking_load() -> str:
    """Start, memory and requests a second of the endpoint: medians over rounds."""
    stored = load(RESULTS / "case_banking.json")
    header = ["model", "start, s", "MiB", "peak MiB"]
    header += [
        f"{name}, {clients} client{'s' if clients > 1 else ''}"
        for clients in CLIENTS
        for name in ("per s", "p50, p95 ms")
    ]
    lines = []
    runs = grouped(stored["load"], "model")
    for name in ordered([{"model": name} for name in runs]):
        rows = runs[name]
        median = {
            key: statistics.median(row[key] for row in rows) for key in rows[0] if key not in ("model", "made_with")
        }
        line = [
            shown_name(name),
            f"{median['start']:.2f}",
            f"{median['resident_mib']:.0f}",
            f"{median['peak_mib']:.0f}",
        ]
        for clients in CLIENTS:
            times = ", ".join(f"{median[f'{key}_{clients}']:.1f}" for key in ("p50_ms", "p95_ms"))
            line += [f"{median[f'per_second_{clients}']:.0f}", times]
        lines.append(line)
    threads, rounds = stored["load"][0]["threads"], len({row["round"] for row in stored["load"]})
    text = f"{devices(stored, stored['load'])}; models on {threads} thread, requests of one text, medians of {rounds}"
    return f"{text} rounds:\n\n{markdown(header, lines)}"


def repair() -> str:
    """Precision and recall of repaired labels beside the alternatives: means over labels, and then each of them."""
    stored = load(RESULTS / "case_repair.json")
    header = ["model", "precision", "recall", "accuracy on others", "accuracy", "seconds", "parameters"]
    keys, parts = ("precision", "recall", "others", "accuracy"), []
    for (task, weakness), rows in grouped(stored["repairs"], "task", "weakness").items():
        labels, seeds = (list(grouped(rows, key)) for key in ("labels", "seed"))
        parts.append(f"{task}; {weakness}: means over {', '.join(labels)}; seed {', '.join(map(str, seeds))}:")
        lines = [
            [
                name,
                *(f"{mean(own, key):.3f}" for key in keys),
                f"{mean(own, 'seconds'):.0f}",
                f"{mean(own, 'parameters'):,.0f}",
            ]
            for name, own in grouped(rows, "model").items()
        ]
        parts.append(markdown(header, lines))
        names = list(grouped(rows, "model"))
        lines = [
            [label, *(f"{mean(by[name], 'precision'):.2f}, {mean(by[name], 'recall'):.2f}" for name in names)]
            for label, own in grouped(rows, "labels").items()
            for by in [grouped(own, "model")]
        ]
        parts.append(markdown(["precision, recall of", *names], lines))
    return f"{devices(stored, stored['repairs'])}, one thread.\n\n" + "\n\n".join(parts)


BLOCKS: dict[str, Callable[[], str]] = {
    "case banking": banking_answers, "case banking, load": banking_load, "case repair": repair,
}  # fmt: skip
