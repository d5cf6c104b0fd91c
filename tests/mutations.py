"""Random changes of files: of bytes, and of values, keys and places in JSON."""

import copy
import json
import random
import shutil
from pathlib import Path

VALUES = (None, True, -1, 0, 7, 10**6, 2**63, -(10**30), 0.5, 1e300, float("nan"), float("inf"), "", "vit", "x" * 10**5,
          "\u202e\x00\n# x", "../../etc/passwd", "\ud800", [], {}, [[]], {"a": 1})  # fmt: skip
KINDS = ("value", "value", "remove", "add", "rename", "swap", "deep", "type", "number")
NAMES = ("auto_map", "a", "__class__", "quantization_config", "to_dict", "", "\x00")


def mutate_bytes(rng: random.Random, data: bytearray, start: int, end: int) -> str:
    """Changes some bytes between two places, in place; returns what was done."""
    first = rng.randrange(start, max(start + 1, end))
    last = min(end, first + rng.choice([1, 2, 8, 64, 1024]))
    old, noise = bytes(data[first:last]), rng.randbytes(last - first)
    flipped = bytes([old[0] ^ 1 << rng.randrange(8)]) + old[1:] if old else b"x"
    changes = {"flip": flipped, "insert": noise + old, "repeat": old + old, "zero": bytes(len(old)), "random": noise}
    kind = rng.choice([*changes, "delete", "truncate"])
    data[first : None if kind == "truncate" else last] = changes.get(kind, b"")
    return f"{kind} bytes {first} to {last} of {start} to {end}"


def places(value, path=()):
    """All places in nested JSON: path, owner and key."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key), value, key
        yield from places(value[key], (*path, key))


def mutate_json(rng: random.Random, data, others: list) -> tuple:
    """Changes nested JSON in one place; returns it and what was changed; `others` are files of the same name."""
    found = list(places(data))
    if not found:
        return rng.choice(VALUES), "all of it"
    path, owner, key = rng.choice(found)
    value, kind = owner[key], rng.choice(KINDS)
    if kind == "remove":
        del owner[key]
    elif kind == "rename" and isinstance(owner, dict):
        owner[str(key) + rng.choice(["_", "s", " ", "\u00e9", ".0"])] = owner.pop(key)
    elif kind == "add" and isinstance(owner, dict):
        owner[rng.choice(NAMES)] = rng.choice(VALUES)
    elif kind == "swap":
        twins = [there[last] for other in others for place, there, last in places(other) if place == path]
        _, there, last = rng.choice(found)
        owner[key] = copy.deepcopy(rng.choice(twins or [there[last]]))
    elif kind == "deep":
        for _ in range(rng.choice([1, 30, 500])):
            owner[key] = rng.choice([[owner[key]], {"a": owner[key]}])
    elif kind == "type":
        owner[key] = rng.choice([str(value), [value], len(str(value))])
    elif kind == "number" and isinstance(value, (int, float)):
        owner[key] = rng.choice([value + 1, value - 1, -value, value * 2, value / 3, value * 10**9])
    else:
        owner[key] = rng.choice(VALUES)
    now = next((repr(there[last])[:60] for place, there, last in places(data) if place == path), "nothing")
    return data, f"{kind} at {'.'.join(map(str, path))[:120]} from {repr(value)[:60]} to {now}"


def mutate(rng: random.Random, root: Path, name: str, target: Path) -> tuple[str, str]:
    """Writes one mutant of a save; returns the kind of file, and what was done."""
    shutil.copytree(root / name, target)
    path = rng.choice(sorted(target.iterdir()))
    twins = [twin for twin in sorted(root.glob(f"*/{path.name}")) if twin.parent.name not in (name, target.name)]
    kind = {"config.json": "config", "report.json": "report"}.get(path.name, "companion")
    kind = "weights" if path.suffix == ".safetensors" else "index" if "index" in path.name else kind
    content, draw = bytearray(path.read_bytes()), rng.random()
    if draw < 0.05:
        path.unlink()
        return f"{kind} removed", path.name
    if draw < 0.12 and twins:
        twin = rng.choice(twins)
        shutil.copy(twin, path)
        return f"{kind} of another save", f"{path.name} of {twin.parent.name}"
    end = 8 + int.from_bytes(content[:8], "little") if kind == "weights" else 0
    how = rng.choice(["header", "header bytes", "data", "data"]) if kind == "weights" else ""
    if how == "header" or (path.suffix == ".json" and draw < 0.8):
        others = [] if how else [json.loads(twin.read_text()) for twin in twins]
        data, done = mutate_json(rng, json.loads(content[8:end] if how else content), others)
        text = json.dumps(data, ensure_ascii=draw < 0.5).encode(errors="surrogatepass")
        content = len(text).to_bytes(8, "little") + text + content[end:] if how else text
    else:
        done = mutate_bytes(rng, content, end if how == "data" else 0, end if how == "header bytes" else len(content))
    path.write_bytes(content)
    return f"{kind}, {how.split()[0]}" if how else kind, f"{path.name}: {done}"
