"""Mutates bytes and JSON values of saved models: a mutant is refused clearly, equal, or refused with verify_files.

python tests/fuzz_saved_files.py --seconds 600 --seed 0 prints counts and faults; --only 0-123 tries one mutant of them.
"""

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import image_processor, image_samples, parent_of, randomize_relevance, text_samples, tokenizer
from mutations import mutate
from training_helpers import batch_of
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

from nemo_hf import NeMoForImageClassification, NeMoForSequenceClassification, calibrate_rejection, compose
from nemo_hf.evaluation.report import evaluate_module
from nemo_hf.hub.model_card import render_model_card
from nemo_hf.hub.publish import CardOptions, card_facts
from nemo_hf.models.equivalence import EquivalenceError
from nemo_hf.models.finiteness import infinite_tensors
from nemo_hf.neurons.trial_inputs import random_inputs

SECONDS, MEMORY = 20, 4 * 2**30  # of processor time, and bytes of address space beyond those of the start
LONGEST = 5000  # characters of an error message
FAMILIES = {
    "vit": (NeMoForImageClassification, AutoModelForImageClassification, image_processor, batch_of(image_samples(20))),
    "bert": (NeMoForSequenceClassification, AutoModelForSequenceClassification, tokenizer, batch_of(text_samples(20))),
}
CLEAR = re.compile(r"Got [\s\S]*; expected |.*(not appear to have a file|not a valid JSON file)|Unrecognized model")
# What a changed file may change unless files are verified; another save's configuration, weights or index are refused.
CHANGES = {"config": ["labels", "logits", "processor", "report"], "weights": ["logits"], "index": [],
           "companion": ["processor"], "report": ["report"]}  # fmt: skip


def build_saves(root: Path) -> dict[str, tuple]:
    """Writes the models that are mutated; returns for each directory the family and the ways to load it."""
    saves = {}

    def save(model, name, *ways, **options):
        model.save_pretrained(root / f"{family}-{name}", **options)
        saves[f"{family}-{name}"] = (family, [{}, {"auto": True}, *ways])

    for family, (_, _, processor, samples) in FAMILIES.items():
        parent = parent_of(family)
        parent.attach_processor(processor())
        parent.report = {"metrics": {"eval_accuracy": 0.5, "eval_loss": float("nan")}}
        module = parent.extract_module(["cat", "dog"])
        calibrate_rejection(module, [samples], show_progress=False)
        evaluate_module(parent, ["cat", "dog"], [samples], module, show_progress=False)
        cuts = ({"labels": ["cat", "dog"]}, {"labels": ["frog"], "threshold": 0.3, "verify": True})
        save(parent, "parent", *cuts)
        save(parent, "sharded-parent", *cuts, max_shard_size="20KB")
        save(module, "module")
        save(module, "sharded-module", max_shard_size="10KB")
        save(compose([module, parent.extract_module(["ship"])]), "composed")
        randomize_relevance(parent, seed=1)  # another save of the same shapes
        with torch.no_grad():
            parent.model.classifier.weight.mul_(-1)
        save(parent, "other", *cuts)
    return saves


def describe(model, samples: dict) -> dict:
    inputs = {name: value[:4] for name, value in samples.items() if name != "labels"}
    if getattr(model.config.get_text_config(), "image_size", 16) != 16:  # changed by hand, say
        inputs = random_inputs(model)
    with torch.no_grad():
        logits = model(**inputs).logits
    files = {name: content.hex() for name, content in model.processor_files.items()}
    report = model.report and json.dumps(model.report, sort_keys=True)
    return {"labels": model.config.id2label, "logits": repr(logits.tolist()), "processor": files, "report": report}


def load(directory: Path, family: str, options: dict) -> dict:
    """Loads a model, runs it, writes its card and its files, and loads these; returns what it is."""
    own, auto, _, samples = FAMILIES[family]
    given = {name: value for name, value in options.items() if name != "auto"}
    model = (auto if "auto" in options or "composed" in directory.name else own).from_pretrained(directory, **given)
    found = describe(model, samples)
    render_model_card(card_facts(model, "me/model", CardOptions(), None))
    if not infinite_tensors(model):
        with tempfile.TemporaryDirectory() as again:
            model.save_pretrained(again)
            assert describe(auto.from_pretrained(again), samples) == found, "changes when it is saved and loaded"
    return found


def judge(directory: Path, family: str, options: dict, right: dict, kind: str) -> tuple[str, str]:
    """Loads a mutant, then with its digests, and says what comes of it: a word, FAULT at its start, and details."""
    file, is_mixture = re.split("[, ]", kind)[0], kind.endswith("of another save")
    allowed = [] if is_mixture and file in ("config", "weights", "index") else CHANGES[file]
    try:
        word = "refused"
        found = load(directory, family, options)
        differing = [name for name in right if found[name] != right[name]]
        if not differing:
            return "equal", ""
        if not set(differing) <= set(allowed):
            return "FAULT silent", str(differing)
        word = "found by verify_files"
        found = load(directory, family, {**options, "verify_files": True})
        is_gone = kind == "report removed" and found["report"] is None  # its digest is in itself
        return "loads without it" if is_gone else "FAULT not found by verify_files", str(differing)
    except (ValueError, OSError, TypeError, ImportError, EquivalenceError, RecursionError) as error:
        is_clear = CLEAR.match(str(error)) and len(str(error)) < LONGEST
        frames = traceback.extract_tb(error.__traceback__)[-2:]
        if frames[-1].filename.endswith("configuration_auto.py") or "_decode_special_floats" in {
            f.name for f in frames
        }:
            return "refused by transformers", str(error)  # whose Auto classes read config.json before we do
        return (word, str(error)) if is_clear else ("FAULT unclear", traceback.format_exc(limit=-4)[-LONGEST:])
    except BaseException:
        return "FAULT", traceback.format_exc(limit=-4)[-LONGEST:]


def in_child(*arguments) -> tuple[str, str]:
    """Judges in a forked child with bounded time and memory, so that no crash or hang ends the search."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS,) * 2)  # a child starts at 0
        signal.alarm(10 * SECONDS)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            os.write(writer, json.dumps(judge(*arguments)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        content = pipe.read()
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
            name = rng.choice(sorted(saves))
            family, ways = saves[name]
            way = rng.randrange(len(ways))
            if (name, way) not in rights:
                rights[name, way] = load(root / name, family, ways[way])
            target = root / f"mutant-{name}"
            kind, done = mutate(rng, root, name, target)
            word, details = in_child(target, family, ways[way], rights[name, way], kind)
            shutil.rmtree(target)
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
    raise SystemExit(bool(result["faults"]))
