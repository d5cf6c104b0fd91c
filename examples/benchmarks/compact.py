"""Reads and writes the results of the benchmarks: small JSON files whose tables have one row a line, and Markdown."""

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from nemo_hf.evaluation.latency import device_name
from nemo_hf.models.atomic_writes import write_text

RESULTS = Path(__file__).parent / "results"
Rows = list[dict[str, Any]]


def load(path: Path) -> dict[str, Any]:
    """Results of a file, tables as lists of dictionaries; nothing if there is no file."""
    found = {}
    for name, value in json.loads(path.read_text()).items() if path.exists() else ():
        if isinstance(value, dict) and set(value) == {"columns", "rows"}:
            value = [dict(zip(value["columns"], row, strict=True)) for row in value["rows"]]
        found[name] = value
    return found


def write(path: Path, data: Mapping[str, Any]) -> None:
    """Writes results: floats with four significant digits, lists of dictionaries as tables of columns and rows."""
    parts = []
    for name, value in data.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            columns = list(dict.fromkeys(column for row in value for column in row))
            lines = [text([row.get(column) for column in columns]) for row in value]
            written = f'{{"columns": {text(columns)}, "rows": [\n  ' + ",\n  ".join(lines) + "\n ]}"
        else:
            written = text(value)
        parts.append(f" {text(name)}: {written}")
    write_text(path, "{\n" + ",\n".join(parts) + "\n}\n")


def text(value: Any) -> str:
    """JSON on one line."""
    return json.dumps(rounded(value), ensure_ascii=False)


def rounded(value: Any) -> Any:
    """A value whose floats have four significant digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {name: rounded(part) for name, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, (list, tuple)) else value


def merged(old: Iterable[dict], new: Iterable[dict], *keys: str) -> Rows:
    """Old rows, those with the `keys` of a new row replaced by it, and the other new rows behind them."""
    return list({tuple(map(str, map(row.get, keys))): row for row in [*old, *new]}.values())


def stamped(stored: Mapping[str, Any], rows: Iterable[dict]) -> tuple[list[dict], Rows]:
    """The machines of stored results and this one (device and versions), and rows with its place among them."""
    device = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    made_with = {"device": device, "torch": torch.__version__, "transformers": transformers.__version__}
    machines = merged(stored.get("made_with", []), [made_with], *made_with)
    return machines, [{**row, "made_with": machines.index(made_with)} for row in rows]


def update(path: Path, about: Mapping[str, Any], table: str, rows: Iterable[dict], *keys: str) -> None:
    """Adds rows to a table of a file; they replace rows with the same `keys`."""
    stored = load(path)
    machines, rows = stamped(stored, rows)
    write(path, {**about, "made_with": machines, table: merged(stored.get(table, []), rows, *keys)})


def devices(stored: Mapping[str, Any], rows: Iterable[dict]) -> str:
    """The devices that rows were measured on."""
    return ", ".join(dict.fromkeys(stored["made_with"][row["made_with"]]["device"] for row in rows))


def grouped(rows: Iterable[dict], *keys: str) -> dict[Any, Rows]:
    """Rows by the value of a key, or by the values of several, in order of appearance."""
    found: dict[Any, Rows] = {}
    for row in rows:
        values = tuple(row.get(key) for key in keys)
        found.setdefault(values if len(keys) > 1 else values[0], []).append(row)
    return found


def mean(rows: Sequence[dict], column: str | Callable[[dict], float]) -> float:
    """Mean of a column, or of a function of a row."""
    return statistics.fmean(column(row) if callable(column) else row[column] for row in rows)


def cells(rows: Rows, *columns: str) -> list[str]:
    """Means of columns with three decimals, shares and indices with two; "-" where not all rows were measured."""
    decimals = dict.fromkeys(("cohesion", "coupling", "weights"), 2)
    known = {name for name in columns if rows and all(row.get(name) is not None for row in rows)}
    return [f"{mean(rows, name):.{decimals.get(name, 3)}f}" if name in known else "-" for name in columns]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))
