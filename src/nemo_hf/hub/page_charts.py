"""Charts of a page as plain data: lines in the coordinates of an SVG, with ticks and a text that tells the same."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 70, 32, 16, 56  # around the area of the lines
TICKS = 5
RING = "The ring is the module that the rest of this page is about."
THRESHOLD = "The ring is the threshold that the module has now."

Point = tuple[float, float]


def line_chart(
    title: str, text: str, axes: tuple[str, str], lines: Mapping[str, Sequence[Point]], x_range: Point, y_range: Point,
    forms: tuple[str, str], marks: Sequence[Point] = (), ring: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Places lines by name, and single marks, in a chart; `forms` print ticks, `ring` says what marks are."""

    def place(point: Point) -> tuple[float, float]:
        across = (point[0] - x_range[0]) / ((x_range[1] - x_range[0]) or 1)
        up = (point[1] - y_range[0]) / ((y_range[1] - y_range[0]) or 1)
        return round(LEFT + across * (WIDTH - LEFT - RIGHT), 1), round(
            HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1
        )

    found = []
    for style, (name, points) in enumerate(lines.items()):
        placed = [place(point) for point in points]
        path = " ".join(f"{x},{y}" for x, y in placed)
        found.append({"name": name, "style": style, "path": path, "dots": placed if len(placed) <= 12 else []})
    return {
        "title": title, "text": text, "axes": axes, "lines": found, "width": WIDTH, "height": HEIGHT,
        "left": LEFT, "right": WIDTH - RIGHT, "top": TOP, "bottom": HEIGHT - BOTTOM,
        "x_ticks": [(place((x, y_range[0]))[0], format(x, forms[0])) for x in ticks(*x_range)],
        "y_ticks": [(place((x_range[0], y))[1], format(y, forms[1])) for y in ticks(*y_range)],
        "marks": [place(point) for point in marks], "ring": ring,
    }  # fmt: skip


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, about `TICKS` of them."""
    raw = (high - low) / TICKS or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(place * step, 10) for place in range(first, math.floor(high / step + 1e-9) + 1)]


def accuracy_chart(rows: Sequence[Mapping[str, Any]], kinds: Mapping[str, str]) -> dict[str, Any] | None:
    """Accuracy over size: a line for the modules and each control; `None` for fewer than two sizes."""
    if len(rows) < 2:
        return None
    ordered = sorted(rows, key=lambda row: row["megabytes"])
    lines = {
        title: [(row["megabytes"], row[kind]) for row in ordered if row.get(kind) is not None]
        for kind, title in kinds.items()
    }
    lines = {title: points for title, points in lines.items() if points}
    values = [y for points in lines.values() for _, y in points]
    low = math.floor(10 * min(values) - 1e-9) / 10
    sizes = [row["megabytes"] for row in ordered]
    spare = 0.05 * (sizes[-1] - sizes[0]) or 0.1 * sizes[0]
    text = "; ".join(f"{title}: " + ", ".join(f"{y:.1%} at {x:.3g} MB" for x, y in own) for title, own in lines.items())
    own = [(row["megabytes"], row["accuracy"]) for row in rows if row["is_own"]]
    axes = ("size in MB", "right answers")
    title = "Accuracy of modules over their size, beside controls"
    x_range = (sizes[0] - spare, sizes[-1] + spare)
    return line_chart(title, text, axes, lines, x_range, (max(0.0, low), 1.0), (".3g", ".0%"), own, RING)


def rejection_chart(found: Mapping[str, Any]) -> dict[str, Any]:
    """Shares of own samples accepted over shares of others rejected, by threshold, with the module's own threshold."""
    points = sorted([(other, own) for _, own, other in found["curve"]], key=lambda point: (point[0], -point[1]))
    points = [(0.0, 1.0), *points, (1.0, 0.0)]
    chosen = found.get("chosen") or {}
    marks = [(chosen["rejected"], chosen["accepted"])] if None not in map(chosen.get, ("rejected", "accepted")) else []
    text = f"AUROC {found['auroc']:.3f}, over {found['own']} own samples and {found['other']} others"
    axes = ("other samples rejected", "own samples accepted")
    title = "Own samples accepted over other samples rejected"
    return line_chart(
        title, text, axes, {"this module": points}, (0.0, 1.0), (0.0, 1.0), (".0%", ".0%"), marks, THRESHOLD
    )
