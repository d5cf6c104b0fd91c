"""Mutates bytes and JSON values of saved models: each mutant is refused clearly, equal to the original, or explained.

python tests/fuzz_saved_files.py --seconds 600 --seed 0 prints counts and faults; --only 0-123 tries one mutant of them.
"""

import argparse
import copy
import inspect
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import image_processor, image_samples, parent_of, randomize_relevance, text_samples, tokenizer
from training_helpers import batch_of
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

from nemo_hf import NeMoForImageClassification, NeMoForSequenceClassification, calibrate_rejection, compose
from nemo_hf.evaluation.report import evaluate_module
from nemo_hf.hub.model_card import render_model_card
from nemo_hf.hub.publish import CardOptions, card_facts
from nemo_hf.models.equivalence import EquivalenceError
from nemo_hf.models.finiteness import infinite_tensors

SECONDS, MEMORY = 20, 4 * 2**30  # of processor time, and bytes of address space beyond those of the start
LONGEST = 5000  # characters of an error message
OWN = {"vit": NeMoForImageClassification, "bert": NeMoForSequenceClassification}
AUTO = {"vit": AutoModelForImageClassification, "bert": AutoModelForSequenceClassification}
SAMPLES = {"vit": batch_of(image_samples(20)), "bert": batch_of(text_samples(20))}
PROCESSORS = {"vit": image_processor, "bert": tokenizer}
CLEAR = re.compile(r"Got [\s\S]*; expected |.*(not appear to have a file|not a valid JSON file)|Unrecognized model")
CAN_VERIFY = "verify_files" in inspect.getsource(NeMoForImageClassification.from_pretrained)
VALUES = (None, True, -1, 0, 7, 10**6, 2**63, -(10**30), 0.5, 1e300, float("nan"), float("inf"), "", "vit", "x" * 10**5,
          "\u202e\x00\n# x", "../../etc/passwd", "\ud800", [], {}, [[]], {"a": 1})  # fmt: skip
KINDS = ("value", "value", "remove", "add", "rename", "swap", "deep", "type", "number")
NAMES = ("auto_map", "a", "__class__", "quantization_config", "to_dict", "", "\x00")


def build_saves(root: Path) -> dict[str, tuple[str, list[dict]]]:
    """Writes the models that are mutated; returns the family and the ways to load each, by directory."""
    saves = {}

    def save(model, name, family, *ways, **options):
        model.save_pretrained(root / name, **options)
        saves[name] = (family, [{}, {"auto": True}, *ways])

    for family in OWN:
        parent = parent_of(family)
        parent.attach_processor(PROCESSORS[family]())
        parent.report = {"metrics": {"eval_accuracy": 0.5, "eval_loss": float("nan")}}
        module = parent.extract_module(["cat", "dog"])
        calibrate_rejection(module, [SAMPLES[family]], show_progress=False)
        evaluate_module(parent, ["cat", "dog"], [SAMPLES[family]], module, show_progress=False)
        cuts = ({"labels": ["cat", "dog"]}, {"labels": ["frog"], "threshold": 0.3, "verify": True})
        save(parent, f"{family}-parent", family, *cuts)
        save(parent, f"{family}-sharded-parent", family, *cuts, max_shard_size="20KB")
        save(module, f"{family}-module", family)
        save(module, f"{family}-sharded-module", family, max_shard_size="10KB")
        save(compose([module, parent.extract_module(["ship"])]), f"{family}-composed", family)
        randomize_relevance(parent, seed=1)  # another save of the same shapes
        with torch.no_grad():
            parent.model.classifier.weight.mul_(-1)
        save(parent, f"{family}-other", family, *cuts)
    return saves


def mutate_bytes(rng: random.Random, data: bytearray, start: int, end: int) -> str:
    """Changes some bytes between two places, in place; returns what was done."""
    first = rng.randrange(start, max(start + 1, end))
    last = min(end, first + rng.choice([1, 2, 8, 64, 1024]))
    kind = rng.choice(["flip", "truncate", "insert", "zero", "repeat", "delete", "random"])
    if kind == "flip" and data:
        data[first] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        del data[first:]
    elif kind in ("insert", "repeat"):
        data[first:first] = rng.randbytes(last - first) if kind == "insert" else data[first:last]
    else:
        data[first:last] = {"zero": bytes(last - first), "delete": b""}.get(kind, rng.randbytes(last - first))
    return f"{kind} bytes {first} to {last} of {start} to {end}"


def places(value, path=()):
    """All places in nested JSON."""
    if path:
        yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def inner(data, path):
    for key in path:
        data = data[key]
    return data


def mutate_json(rng: random.Random, data, others: list) -> tuple:
    """A copy of nested JSON with a change in one place, and what was changed; `others` are files of the same name."""
    data = copy.deepcopy(data)
    path = rng.choice(list(places(data)) or [()])
    if not path:
        return rng.choice(VALUES), "all of it"
    owner, key = inner(data, path[:-1]), path[-1]
    value, kind = owner[key], rng.choice(KINDS)
    if kind == "swap":
        found = [other for other in others if path in set(places(other))]
        owner[key] = inner(rng.choice(found), path) if found else inner(data, rng.choice(list(places(data))))
    elif kind == "remove":
        del owner[key]
    elif kind == "rename" and isinstance(owner, dict):
        owner[str(key) + rng.choice(["_", "s", " ", "\u00e9", ".0"])] = owner.pop(key)
    elif kind == "add" and isinstance(owner, dict):
        owner[rng.choice(NAMES)] = rng.choice(VALUES)
    elif kind == "deep":
        for _ in range(rng.choice([1, 30, 500])):
            owner[key] = rng.choice([[owner[key]], {"a": owner[key]}])
    elif kind == "type":
        owner[key] = rng.choice([str(value), [value], len(str(value))])
    elif kind == "number" and isinstance(value, (int, float)):
        owner[key] = rng.choice([value + 1, value - 1, -value, value * 2, value / 3, value * 10**9])
    else:
        owner[key] = rng.choice(VALUES)
    now = repr(owner[key])[:60] if key in owner or (isinstance(owner, list) and key < len(owner)) else "nothing"
    return data, f"{kind} at {'.'.join(map(str, path))[:120]} from {repr(value)[:60]} to {now}"


def mutate(rng: random.Random, root: Path, saves: dict, target: Path) -> tuple[str, str, str]:
    """Writes one mutant of a save; returns the save, the kind of file, and what was done."""
    name = rng.choice(sorted(saves))
    shutil.copytree(root / name, target)
    path = rng.choice(sorted(target.iterdir()))
    twins = [root / other / path.name for other in saves if other != name and (root / other / path.name).is_file()]
    kind = {"config.json": "config", "report.json": "report"}.get(path.name, "companion")
    kind = "weights" if path.suffix == ".safetensors" else "index" if "index" in path.name else kind
    content, draw = bytearray(path.read_bytes()), rng.random()
    if draw < 0.05:
        path.unlink()
        return name, f"{kind} removed", path.name
    if draw < 0.12 and twins:
        twin = rng.choice(twins)
        shutil.copy(twin, path)
        return name, f"{kind} of another save", f"{path.name} of {twin.parent.name}"
    end = 8 + struct.unpack("<Q", content[:8])[0] if kind == "weights" else 0
    how = rng.choice(["header", "header bytes", "data", "data"]) if kind == "weights" else ""
    if how == "header" or (path.suffix == ".json" and draw < 0.8):
        others = [] if how else [json.loads(twin.read_text()) for twin in twins]
        data, done = mutate_json(rng, json.loads(content[8:end] if how else content), others)
        text = json.dumps(data, ensure_ascii=draw < 0.5).encode(errors="surrogatepass")
        content = struct.pack("<Q", len(text)) + text + content[end:] if how else text
    else:
        done = mutate_bytes(rng, content, end if how == "data" else 0, end if how == "header bytes" else len(content))
    path.write_bytes(content)
    return name, f"{kind}' {how.split()[0]}" if how else kind, f"{path.name}: {done}"


def describe(model, family: str) -> dict:
    with torch.no_grad():
        logits = model(**{name: value[:4] for name, value in SAMPLES[family].items() if name != "labels"}).logits
    files = {name: content.hex() for name, content in model.processor_files.items()}
    return {"labels": model.config.id2label, "logits": repr(logits.tolist()), "processor": files}


def load(directory: Path, family: str, options: dict) -> dict:
    """Loads a model, runs it, writes its card and its files, and loads these; returns what it is."""
    is_auto = options.get("auto") or "composed" in directory.name
    given = {name: value for name, value in options.items() if name != "auto"}
    model = (AUTO if is_auto else OWN)[family].from_pretrained(directory, **given)
    found = describe(model, family)
    render_model_card(card_facts(model, "me/model", CardOptions(), None))
    if not infinite_tensors(model):
        with tempfile.TemporaryDirectory() as again:
            model.save_pretrained(again)
            assert describe(AUTO[family].from_pretrained(again), family) == found, "changes when it is saved and loaded"
    return found


def judge(directory: Path, family: str, options: dict, right: dict, kind: str) -> tuple[str, str]:
    """Loads a mutant and says what comes of it: a word for the counts, FAULT at its start, and details."""
    try:
        found = load(directory, family, options)
    except (ValueError, OSError, TypeError, ImportError, EquivalenceError) as error:
        is_clear = CLEAR.match(str(error)) and len(str(error)) < LONGEST
        return ("refused", str(error)) if is_clear else ("FAULT unclear", traceback.format_exc(limit=-3)[-LONGEST:])
    except BaseException:
        return "FAULT error", traceback.format_exc(limit=-4)[-LONGEST:]
    differing = [name for name in right if found[name] != right[name]]
    if not differing:
        return "equal", ""
    if kind.startswith("companion") and differing == ["processor"]:
        return "another companion", ""
    if kind == "config" or (kind.startswith("weights'") and not CAN_VERIFY):
        return f"another {kind.split()[0]}", str(differing)
    if not kind.startswith("weights'"):
        return "FAULT silent", str(differing)
    try:
        load(directory, family, {**options, "verify_files": True})
    except (ValueError, OSError) as error:
        return "found by verify_files", str(error)
    return "FAULT not found by verify_files", str(differing)


def in_child(*arguments) -> tuple[str, str]:
    """Judges in a forked child with bounded time and memory, so that no crash or hang ends the search."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS,) * 2)  # a child starts at 0
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            os.write(writer, json.dumps(judge(*arguments)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    content = b""
    while select.select([reader], [], [], 10 * SECONDS)[0] and (part := os.read(reader, 2**16)):
        content += part
    os.close(reader)
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    return tuple(json.loads(content)) if content else ("FAULT crash or hang", f"the child's status is {status}")


def fuzz(seconds: float, seed: int = 0, only: str | None = None) -> dict:
    """Tries mutants for some seconds, or one; returns counts by kind of file and outcome, and the faults."""
    counts, faults, rights, number = {}, [], {}, 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        saves = build_saves(root)
        end = time.monotonic() + seconds
        while number < 1 if only else time.monotonic() < end:
            key, number = only or f"{seed}-{number}", number + 1
            rng = random.Random(key)
            name, kind, done = mutate(rng, root, saves, root / "mutant")
            family, ways = saves[name]
            way = rng.randrange(len(ways))
            if (name, way) not in rights:
                rights[name, way] = load(root / name, family, ways[way])
            named = (root / "mutant").rename(root / f"mutant-{name}")
            word, details = in_child(named, family, ways[way], rights[name, way], kind)
            shutil.rmtree(named)
            counts.setdefault(kind, Counter())[word] += 1
            if word.startswith("FAULT") or only:
                faults.append({"mutant": key, "save": name, "load": ways[way], "what": done, word: details})
    return {"mutants": number, "counts": dict(sorted(counts.items())), "faults": faults}


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")
def test_mutants_of_saved_files_are_refused_or_equal_or_explained():
    found = fuzz(float(os.environ.get("FUZZ_SECONDS", "120")), int(os.environ.get("FUZZ_SEED", "0")))
    assert not found["faults"], json.dumps(found["faults"], indent=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one mutant, as faults name it: SEED-NUMBER")
    result = fuzz(**vars(parser.parse_args()))
    print(json.dumps(result, indent=1))
    sys.exit(bool(result["faults"]))
