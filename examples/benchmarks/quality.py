"""Compares modules of several training methods on the same data, with the same budget and seeds.

    python examples/benchmarks/quality.py digits --rows plain mwt nemo nemo-authors ours --seeds 0 1 2
    python examples/benchmarks/quality.py clinc150 --data path/to/clinc150 --rows plain ours --seeds 0
    python examples/benchmarks/quality.py cifar10-vgg16 --data path/to/cifar10 --rows 'ours, by sample' --seeds 0

Each row and seed is trained, measured on test data, and written to results/quality_TASK.json, where it replaces an
earlier one. Test data choose no option. "NAME, by sample" is a parent that answers each input with the neurons which
that input opens. With `--validation` a row may also be options of `NeMoConfig` as JSON; it is measured on validation
data and printed as a line of what_was_tried.md. Runs on one CPU thread: two to four minutes a row and seed on digits,
half an hour on the others.
"""

import argparse
import copy
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import compact
import torch
from quality_tables import validation_line
from quality_tasks import METHODS, TASKS, Split, Task, collate
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from nemo_hf import NeMoConfig, NeMoTrainer, calibrate_rejection, make_parent
from nemo_hf.evaluation.report import other_groups, random_masks
from nemo_hf.models.base import base_parameters
from nemo_hf.models.extraction import make_plan

TUNING_EPOCHS = 10
BY_SAMPLE = ", by sample"


@torch.no_grad()
def logits_of(model, data: Split, masks: Mapping[str, Tensor] | None = None, name: str = "logits", **options) -> Tensor:
    """Logits of all samples, shape (samples, labels), perhaps under static masks; or another output by its `name`."""
    options |= {} if masks is None else {"static_masks": masks}
    model.eval()
    batches = ({key: value for key, value in batch.items() if key != "labels"} for batch in data.batches())
    return torch.cat([model(**inputs, **options)[name] for inputs in batches])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of right answers."""
    return (logits.argmax(-1) == labels).float().mean().item()


def labels_of(task: Task, groups: Sequence[int]) -> list[int]:
    """The labels of some groups."""
    return [label for group in groups for label in list(task.groups.values())[group]]


def measure_module(
    task: Task, parent, data: Split, logits: Tensor, strangers: Split | None, groups: Sequence[int]
) -> dict:
    """Measures a module and its controls as the parent under static masks, whose logits are those of the module.

    `logits` (samples, all labels) are those of the parent; they are restricted to the labels of the module.
    """
    labels = labels_of(task, groups)
    plan = make_plan(parent, labels)
    own, inside = data.part(labels), torch.isin(data.labels, torch.tensor(labels))
    module = logits_of(parent, data, plan.static)[:, labels]
    empty = {key: torch.zeros_like(mask) for key, mask in plan.static.items()}
    try:
        other = make_plan(parent, other_groups(parent, plan.groups, seed=0)).static
    except ValueError:  # these groups open no neuron at all
        other = empty
    found = {
        "neurons": plan.retained,
        "weights": plan.retained,
    }  # a neuron of these transformers has as many as another
    if parent.kinds == {"conv"}:
        found["weights"] = base_parameters(parent.extract_module(labels)) / base_parameters(parent)
    found["module"] = accuracy(module[inside], own.labels)
    found["restricted"] = accuracy(logits[inside][:, labels], own.labels)
    drawn = random_masks(plan.static, parent, seed=0)[: task.draws]
    for name, masks in (("random", drawn), ("other", [other]), ("empty", [empty])):
        found[name] = statistics.fmean(accuracy(logits_of(parent, own, m)[:, labels], own.labels) for m in masks)
    found["rejection"] = roc_auc_score(inside, module.logsumexp(-1))
    if strangers is not None:
        energies = torch.cat([module[inside], logits_of(parent, strangers, plan.static)[:, labels]]).logsumexp(-1)
        found["strangers"] = roc_auc_score(torch.arange(len(energies)) < len(own), energies)
    return found


def measure_sets(task: Task, parent, data: Split, logits: Tensor, strangers: Split | None) -> list[dict]:
    """One row for each kind of set: means over its sets, and the largest loss of a module to the restricted parent."""
    rows = []
    for kind, sets in task.sets.items():
        found = [measure_module(task, parent, data, logits, strangers, groups) for groups in sets]
        means = {name: statistics.fmean(each[name] for each in found) for name in found[0]}
        worst = max(each["restricted"] - each["module"] for each in found)
        rows.append({"kind": kind, "sets": len(sets), **means, "worst_loss": worst})
    return rows


def fit(model, data: Split, steps: int, rate: float, seed: int, batch: int, validation: Split | None = None) -> None:
    """Trains a small classifier; with validation data, keeps the weights of the best epoch."""
    set_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    best, weights, done = -1.0, None, 0
    while done < steps:
        model.train()
        for indices in torch.randperm(len(data)).split(batch):
            inputs = collate([data[index] for index in indices.tolist()])
            labels = inputs.pop("labels")
            optimizer.zero_grad()
            F.cross_entropy(model(**inputs).logits, labels).backward()
            optimizer.step()
            done += 1
        if validation is not None and (reached := accuracy(logits_of(model, validation), validation.labels)) > best:
            best, weights = reached, copy.deepcopy(model.state_dict())
    if weights is not None:
        model.load_state_dict(weights)


def measure_cuts(task: Task, parent, plain, splits: Sequence[Split], seed: int) -> list[dict]:
    """Cuts modules and compares them, raw and fine-tuned, with models of the same size."""
    rows = []
    for groups in task.modules:
        labels = labels_of(task, groups)
        shown = ", ".join(map(str, labels)) if len(labels) < 7 else f"{len(labels)} from {labels[0]}"
        module = parent.extract_module(labels)
        train, validation, test = (data.part(labels) for data in splits)
        row = {"labels": shown, "weights": base_parameters(module) / base_parameters(parent)}
        row["megabytes"] = sum(p.numel() * p.element_size() for p in module.model.parameters()) / 1e6
        row["raw"] = accuracy(logits_of(module, test), test.labels)
        calibrate_rejection(module, splits[1].batches(), show_progress=False)
        steps = TUNING_EPOCHS * -(-len(train) // task.batch)
        fit(tuned := copy.deepcopy(module), train, steps, task.rate / 3, seed, task.batch, validation)
        row["fine_tuned"] = accuracy(logits_of(tuned, test), test.labels)
        set_seed(seed)
        fresh = copy.deepcopy(module)
        for layer in fresh.modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        steps = task.epochs * -(-len(splits[0]) // task.batch)  # as many as the parent's
        fit(fresh, train, steps, task.rate, seed, task.batch)
        row["same_size"] = accuracy(logits_of(fresh, test), test.labels)
        pruned = masks_by_magnitude(plain, make_plan(parent, labels).keep)
        row["pruned"] = accuracy(logits_of(plain, test, pruned)[:, labels], test.labels)
        rejected = (
            logits_of(module, splits[2], name="rejection_scores") > module.config.rejection["threshold"]
        ).float()
        own = torch.isin(splits[2].labels, torch.tensor(labels))
        rows.append({**row, "accepted": 1 - rejected[own].mean().item(), "rejected": rejected[~own].mean().item()})
    return rows


def masks_by_magnitude(plain, keep: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Masks that keep as many neurons in each part as `keep`: those with the largest weights of a plain model."""
    masks = {}
    for site in plain.sites:
        names = [name for _, name in site.produced()]
        layers = [plain.model.get_submodule(rows.layer).weight.flatten(1) for rows, _ in site.produced()]
        if site.kind == "conv":  # of all layers that make a channel
            scores = {"channels": sum(weight.norm(dim=1).view(site.neurons, -1).sum(1) for weight in layers)}
        else:
            norms = {name: weight.norm(dim=1) for name, weight in zip(names, layers, strict=True)}
            reads = plain.model.get_submodule(site.output).weight.norm(dim=0)
            if site.kind == "attention":
                scores = {"query_key": norms["query"] * norms["key"], "value": norms["value"] * reads}
            else:
                scores = {"intermediate": norms["units"] * reads}
        kept = [(score, score.argsort(descending=True)[: len(keep[site.key][name])]) for name, score in scores.items()]
        masks[site.key] = torch.cat([torch.zeros_like(score).index_fill(0, chosen, 1.0) for score, chosen in kept])
    return masks


def trained(task: Task, options: dict | None, splits: Sequence[Split], seed: int, epochs: int, folder: Path | None):
    """Trains a parent, or a plain model (with open masks) if there are no options; returns it and the seconds.

    Parents saved in `folder` before are loaded, and their seconds are `None`.
    """
    start = time.perf_counter()
    options = None if options is None else {**task.options, **options}
    key = json.dumps([task.text, options, seed, epochs], sort_keys=True)
    path = None if folder is None else folder / hashlib.sha256(key.encode()).hexdigest()[:16]
    if path is not None and path.exists():
        return task.model_class.from_pretrained(path), None
    if options is None:
        trainer = task.trainer(Trainer, splits[0], splits[1], seed, epochs)
        trainer.train()
        parent = make_parent(trainer.model)
    else:
        if any(len(labels) > 1 for labels in task.groups.values()):
            options["label_groups"] = task.groups
        trainer = task.trainer(NeMoTrainer, splits[0], splits[1], seed, epochs, nemo_config=NeMoConfig(**options))
        trainer.train()
        parent = trainer.parent
    if path is not None:
        parent.save_pretrained(path)
    return parent, round(time.perf_counter() - start)


def modularity(parent, data: Split) -> dict[str, float]:
    """Cohesion and coupling."""
    args = TrainingArguments(tempfile.gettempdir(), report_to=[], use_cpu=True, disable_tqdm=True)
    found = NeMoTrainer(parent, args, collate, eval_dataset=data).evaluate_modularity()
    return {name: found[name] for name in ("cohesion", "coupling")}


def measure_plain(task: Task, seed: int, epochs: int, on_validation: bool, folder: Path | None) -> tuple[dict, object]:
    """Trains and measures the plain model; returns its row and itself."""
    splits = task.splits(seed)
    plain, seconds = trained(task, None, splits, seed, epochs, folder)
    data = splits[1 if on_validation else 2]
    reached = accuracy(logits_of(plain, data, plain.masks.open_masks()), data.labels)
    return {"epochs": epochs, "accuracy": reached, "training_seconds": seconds}, plain


def measure(
    task: Task, options: dict, seed: int, epochs: int, plain, on_validation: bool, folder: Path | None
) -> dict[str, list[dict]]:
    """Trains and measures one method with one seed: rows of the tables "methods", "sets" and "modules"."""
    splits = task.splits(seed)
    parent, seconds = trained(task, options, splits, seed, epochs, folder)
    data = splits[1 if on_validation else 2]
    logits = logits_of(parent, data)
    row = {"epochs": epochs, "accuracy": accuracy(logits, data.labels)}
    row["by_sample"] = accuracy(logits_of(parent, data, output_neuron_masks=True), data.labels)
    row |= {**modularity(parent, data), "dead": parent.masks.dead_share(), "training_seconds": seconds}
    strangers = None if task.strangers is None or on_validation else task.strangers()
    cuts = [] if on_validation or seed != 0 else measure_cuts(task, parent, plain, splits, seed)
    return {"methods": [row], "sets": measure_sets(task, parent, data, logits, strangers), "modules": cuts}


def add(stored: dict, found: Mapping[str, list[dict]], method: str, seed: int) -> dict:
    """Stored results with the rows of a method and seed replaced, or added."""
    tables = {}
    for name, keys in (("methods", []), ("sets", ["kind"]), ("modules", ["labels"])):
        new = [{"method": method, "seed": seed, **row} for row in found.get(name, [])]
        if name == "methods":
            machines, new = compact.stamped(stored, new)
        tables[name] = compact.merged(stored.get(name, []), new, "method", "seed", *keys)
    return {**stored, "made_with": machines, **tables}


def options_of(name: str, methods: Mapping[str, dict | None]) -> dict | None:
    """The options of a row: of a method, perhaps by sample, or written as JSON."""
    base = name.removesuffix(BY_SAMPLE)
    if base[:1] != "{" and base not in methods:
        raise SystemExit(f"Got the row {name!r}; expected some of {list(methods)}, or options as JSON.")
    options = json.loads(base) if base[:1] == "{" else methods[base]
    return options if base == name else {**(options or {}), "static_evaluation": False}


def arguments() -> argparse.Namespace:
    """What to measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--rows", nargs="+", default=list(METHODS), help="Methods, or NeMoConfig options as JSON.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="In place of the task's own; needs --output or --validation.")
    parser.add_argument("--data", default="", help="Folder of parquet files, for clinc150 and cifar10.")
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="For clinc150.")
    parser.add_argument("--keep", type=Path, help="Folder for trained parents; those in it are not trained again.")
    parser.add_argument("--validation", action="store_true", help="Measure on validation data and only print.")
    parser.add_argument("--output", type=Path, help="In place of results/quality_TASK.json.")
    given = parser.parse_args()
    if given.epochs and not (given.output or given.validation):
        parser.error("got --epochs without --output, which would replace the results of the task's own epochs")
    return given


def main() -> None:
    """Measures the rows that are asked for."""
    given = arguments()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    task = TASKS[given.task](given.data, given.model)
    if given.validation:
        task = replace(task, sets={kind: sets[:: -(-len(sets) // 15)] for kind, sets in task.sets.items()}, draws=1)
    rows = {name: options_of(name, {**METHODS, **task.methods}) for name in given.rows}
    epochs, output = given.epochs or task.epochs, given.output or compact.RESULTS / f"quality_{given.task}.json"
    data = " --data DATA" if given.data else ""
    about = {"command": f"python examples/benchmarks/quality.py {given.task}{data} --rows METHOD --seeds SEED"}
    lines: dict = {}
    for seed in given.seeds:
        plain_row, plain = measure_plain(task, seed, epochs, given.validation, given.keep)
        for name, options in rows.items():
            found = {"methods": [plain_row]}
            if options is not None:
                found = measure(task, options, seed, epochs, plain, given.validation, given.keep)
                found["methods"][0]["plain"] = plain_row["accuracy"]
            print(f"{name}, seed {seed}: {found['methods'][0]['accuracy']:.3f}", flush=True)
            if given.validation:
                lines = add(lines, found, name, seed)
                continue
            stored = compact.load(output)
            known = stored.get("options", {}) | ({} if options is None else {name: {**task.options, **options}})
            compact.write(output, add({**about, "task": task.text, **stored, "options": known}, found, name, seed))
    for name in rows if given.validation else ():
        print(validation_line(name, lines))


if __name__ == "__main__":
    main()
