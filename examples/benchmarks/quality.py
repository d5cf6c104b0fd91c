"""Modules against every rival: one row a method, same data, budget and seeds.

    python examples/benchmarks/quality.py digits --rows plain mwt nemo nemo-authors ours --seeds 0 1 2
    python examples/benchmarks/quality.py clinc150 --data path/to/clinc150 \
        --model sentence-transformers/all-MiniLM-L6-v2 --rows plain ours --seeds 0
    python examples/benchmarks/quality.py cifar10 --data path/to/cifar10 --seeds 0
    python examples/benchmarks/quality.py cifar10-resnet18 --data path/to/cifar10 \
        --rows plain mwt nemo moda ours --seeds 0
    python examples/benchmarks/quality_tables.py  # tables and pictures from the JSON

Writes quality_digits.json and so on beside this script: rows are added as they come, one that is there is made anew
only with --again. Test data are read once for each row and seed and choose nothing. With --validation all is measured
on the validation data, goes to recipe_digits.json and so on, and the rows may be options of NeMoConfig as JSON, with
a "variant" of quality_variants.py among them: so were the defaults chosen. Runs on one CPU thread: a row and seed
takes two to four minutes on digits, half an hour on CLINC150 and CIFAR-10.
"""

import argparse
import copy
import hashlib
import json
import shlex
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from quality_tasks import PAPER, Split, Task, cifar10, cifar10_cnn, cifar10_small, clinc150, collate, digits
from quality_variants import VARIANTS
from sklearn.metrics import roc_auc_score
from torch import Tensor
from transformers import AutoConfig, Trainer, set_seed
from transformers.utils import logging as transformers_logging

from nemo_hf import NeMoConfig, NeMoTrainer, calibrate_rejection, make_parent
from nemo_hf.auto_classes import TASK_CLASSES
from nemo_hf.evaluation.report import measure_modularity, other_groups, random_masks
from nemo_hf.models.base import base_parameters
from nemo_hf.models.configuration import task_of
from nemo_hf.models.extraction import make_plan
from nemo_hf.models.files import write_json

HERE = Path(__file__).parent
ROWS: dict[str, dict | None] = {
    "plain": None,
    "mwt": {**PAPER, "objective": "cohesion-coupling"},
    "nemo": PAPER,
    "nemo-authors": {**PAPER, "objective": "contrastive-authors"},
    "ours": {},
    "ours, no contrast": {"contrastive_weight": 0.0},
    "ours, no sparsity": {"sparsity_weight": 0.0, "retention_target": None},
    "ours, soft masks": {"hard_masks": False},
    "ours, no rehearsal": {"rehearsal_probability": 0.0},
    "ours, less contrast": {"contrastive_weight": 0.2},
    "ours, specific": {"specificity_weight": 0.2, "contrastive_weight": 0.5, "rehearsal_probability": 0.5},
}
TUNING_EPOCHS = 10
Masks = Mapping[str, Tensor]


@torch.no_grad()
def answers(model, data: Split, masks: Masks | None = None, **options) -> Tensor:
    """Logits of all samples, shape (samples, labels), of a model or under static masks."""
    options |= {} if masks is None else {"static_masks": masks}
    model.eval()
    parts = []
    for batch in data.batches():
        del batch["labels"]
        parts.append(model(**batch, **options).logits)
    return torch.cat(parts)


def accuracy(logits: Tensor, right: Tensor) -> float:
    """Share of right answers."""
    return (logits.argmax(-1) == right).float().mean().item()


def members(task: Task, groups: Sequence[int]) -> list[int]:
    """The labels of some groups."""
    return [label for group in groups for label in list(task.groups.values())[group]]


def measured_set(task: Task, parent, data: Split, whole: Tensor, strangers: Split | None, groups) -> dict:
    """A module and its controls, as the parent under static masks, which is the same by the equivalence check."""
    labels = members(task, groups)
    plan = make_plan(parent, labels)
    own, inside = data.part(labels), torch.isin(data.labels, torch.tensor(labels))
    static = answers(parent, data, plan.static)
    module = static[:, labels]
    found = {"labels": labels if len(task.groups) == len(data.labels.unique()) else list(groups)}
    found |= {"neurons": plan.retained, "weights": kept_weights(parent, labels, plan.keep)}
    found |= {
        "module": accuracy(module[inside], own.labels),
        "restricted": accuracy(whole[inside][:, labels], own.labels),
    }
    controls = {"random": random_masks(plan.static, parent, seed=0)[: task.draws]}
    try:
        controls["other"] = [make_plan(parent, other_groups(parent, plan.groups, seed=0)).static]
    except ValueError:  # these groups open no neuron at all
        controls["other"] = [{key: torch.zeros_like(mask) for key, mask in plan.static.items()}]
    controls["empty"] = [{key: torch.zeros_like(mask) for key, mask in plan.static.items()}]
    for name, drawn in controls.items():
        found[name] = statistics.fmean(accuracy(answers(parent, own, m)[:, labels], own.labels) for m in drawn)
    found["rejection"] = roc_auc_score(inside, module.logsumexp(-1))
    if strangers is not None:
        energies = torch.cat([module[inside], answers(parent, strangers, plan.static)[:, labels]]).logsumexp(-1)
        found["strangers"] = roc_auc_score(torch.arange(len(energies)) < len(own), energies)
    return found


def kept_weights(parent, labels: Sequence[int], keep: Mapping[str, Mapping[str, Tensor]]) -> float:
    """Share of the weights of masked attention and feed-forward layers that a module keeps; of a CNN of them all."""
    if parent.kinds != {"conv"}:
        return attention_and_ffn(parent, keep)
    return base_parameters(parent.extract_module(labels)) / base_parameters(parent)


def attention_and_ffn(parent, keep: Mapping[str, Mapping[str, Tensor]]) -> float:
    """Share of the weights of masked attention and feed-forward layers that a module keeps."""
    kept = total = 0
    for site in parent.sites:
        layers = [(parent.model.get_submodule(rows.layer).weight, name) for rows, name in site.produced()]
        last = list(site.parts)[-1]
        reads = parent.model.get_submodule(site.output).weight
        for weight, name in layers:
            part = "query_key" if name in ("query", "key") else name if name in site.parts else last
            kept += weight.numel() * len(keep[site.key][part]) / site.parts[part]
            total += weight.numel()
        kept += reads.numel() * len(keep[site.key][last]) / site.parts[last]
        total += reads.numel()
    return kept / total


def fit(model, data: Split, steps: int, rate: float, seed: int, batch: int, validation: Split | None = None) -> None:
    """Trains a small classifier; with validation data, keeps the best epoch's weights."""
    set_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    best, kept, done = -1.0, None, 0
    while done < steps:
        model.train()
        for indices in torch.randperm(len(data)).split(batch):
            inputs = collate([data[index] for index in indices.tolist()])
            right = inputs.pop("labels")
            loss = torch.nn.functional.cross_entropy(model(**inputs).logits, right)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
        if validation is not None and (reached := accuracy(answers(model, validation), validation.labels)) > best:
            best, kept = reached, copy.deepcopy(model.state_dict())
    if kept is not None:
        model.load_state_dict(kept)


def modularity(parent, data: Split) -> dict:
    """Cohesion and coupling over at most 1,000 samples."""
    chosen = torch.arange(0, len(data), -(-len(data) // 1000))
    found = measure_modularity(parent, data.rows(chosen).batches(), len(chosen))
    return {key: found[key] for key in ("cohesion", "coupling")}


def cut_modules(task: Task, parent, plain, splits: Sequence[Split], seed: int) -> list[dict]:
    """Real modules of a few sets: sizes, fine-tuned, and plain models of the same size."""
    rows = []
    for groups in task.modules:
        labels = members(task, groups)
        module = parent.extract_module(labels)
        train, validation, test = (data.part(labels) for data in splits)
        row = {"labels": labels, "raw": accuracy(answers(module, test), test.labels)}
        row["parameters"] = base_parameters(module)
        row["weights"] = row["parameters"] / base_parameters(parent)
        row["megabytes"] = sum(p.numel() * p.element_size() for p in module.model.parameters()) / 1e6
        calibrate_rejection(module, splits[1].batches(), show_progress=False)
        row |= rejected(module, splits[2], labels)
        steps = TUNING_EPOCHS * -(-len(train) // task.batch)
        fit(tuned := copy.deepcopy(module), train, steps, task.rate / 3, seed, task.batch, validation)
        row["fine-tuned"] = accuracy(answers(tuned, test), test.labels)
        set_seed(seed)
        fresh = copy.deepcopy(module)
        for layer in fresh.modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        steps = task.epochs * -(-len(splits[0]) // task.batch)  # as many as the parent was trained for
        fit(fresh, train, steps, task.rate, seed, task.batch)
        row["same size, trained on the set"] = accuracy(answers(fresh, test), test.labels)
        masks = by_magnitude(plain, make_plan(parent, labels).keep)
        row["pruned"] = accuracy(answers(plain, test, masks)[:, labels], test.labels)
        rows.append(row)
    return rows


@torch.no_grad()
def rejected(module, data: Split, labels: Sequence[int]) -> dict[str, float]:
    """Shares of own samples accepted and of others rejected, at the threshold that validation data set."""
    own, scores = torch.isin(data.labels, torch.tensor(labels)), []
    for batch in data.batches():
        del batch["labels"]
        scores.append(module(**batch).rejection_scores)
    over = (torch.cat(scores) > module.config.rejection["threshold"]).float()
    return {"accepted": 1 - over[own].mean().item(), "rejected": over[~own].mean().item()}


def by_magnitude(plain, keep: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Masks of a plain model that keep as many neurons in each part, those whose weights have the largest norm."""
    masks = {}
    for site in plain.sites:
        layers = [plain.model.get_submodule(rows.layer).weight.flatten(1) for rows, _ in site.produced()]
        if site.kind == "conv":  # of all layers that make a channel
            scores = {"channels": sum(weight.norm(dim=1).view(site.neurons, -1).sum(1) for weight in layers)}
        else:
            norms = {name: weight.norm(dim=1) for weight, (_, name) in zip(layers, site.produced(), strict=True)}
            reads = plain.model.get_submodule(site.output).weight.norm(dim=0)
            if site.kind == "attention":
                scores = {"query_key": norms["query"] * norms["key"], "value": norms["value"] * reads}
            else:
                scores = {"intermediate": norms["units"] * reads}
        parts = []
        for name, score in scores.items():
            chosen = score.argsort(descending=True)[: len(keep[site.key][name])]
            parts.append(torch.zeros_like(score).index_fill(0, chosen, 1.0))
        masks[site.key] = torch.cat(parts)
    return masks


def trained(task: Task, options: dict | None, splits: Sequence[Split], seed: int, epochs: int, kept: Path | None):
    """The plain model as a parent of open masks, or the parent of a row, and the seconds that its training took.

    A parent that is kept is read again; these seconds are `None`.
    """
    start = time.perf_counter()
    own = None if options is None else {**task.options, **options}
    told = json.dumps([task.text, own, seed, epochs], sort_keys=True)
    folder = None if kept is None else kept / hashlib.sha256(told.encode()).hexdigest()[:16]
    if folder is not None and folder.exists():
        config = AutoConfig.from_pretrained(folder)
        return TASK_CLASSES[task_of(config.plain_class)].from_pretrained(folder), None
    if own is None:
        trainer = task.trainer(Trainer, splits[0], splits[1], seed, epochs)
        trainer.train()
        parent = make_parent(trainer.model)
    else:
        parent = trained_parent(task, own, splits, seed, epochs)
    seconds = round(time.perf_counter() - start)
    if folder is not None:
        parent.save_pretrained(folder)
    return parent, seconds


def trained_parent(task: Task, own: dict, splits: Sequence[Split], seed: int, epochs: int):
    """Trains the parent of a row."""
    own = dict(own)
    kind = VARIANTS[own.pop("variant")] if "variant" in own else NeMoTrainer
    kind = type(kind.__name__, (kind,), own.pop("variant_options", {}))
    before, separate = round(own.pop("plain_share", 0) * epochs), own.pop("separate_teacher", False)
    if any(len(labels) > 1 for labels in task.groups.values()):
        own["label_groups"] = task.groups
    trainer = task.trainer(
        kind, splits[0], splits[1], seed, epochs - before * (not separate), nemo_config=NeMoConfig(**own)
    )
    if before:
        plain = task.trainer(Trainer, splits[0], splits[1], seed, before)
        plain.train()
        if not separate:
            trainer.parent.model.load_state_dict(plain.model.state_dict())
        trainer.teacher = plain.model
    trainer.train()
    return trainer.parent


def run(task: Task, name: str, options: dict | None, seed: int, epochs: int, plain, on_validation: bool, kept) -> tuple:
    """Trains and measures one row."""
    start = time.perf_counter()
    splits = task.splits(seed)
    model, seconds = trained(task, options, splits, seed, epochs, kept)
    measured, row = splits[1 if on_validation else 2], {"row": name, "options": options, "seed": seed, "epochs": epochs}
    row["training seconds"] = seconds
    whole = answers(model, measured, model.masks.open_masks() if options is None else None)
    row["accuracy"] = accuracy(whole, measured.labels)
    if options is not None:
        by_sample = answers(model, measured, output_neuron_masks=True)
        row["accuracy by sample"] = accuracy(by_sample, measured.labels)
        row |= modularity(model, measured)
        row["dead"] = model.masks.dead_share()
        strangers = None if task.strangers is None or on_validation else task.strangers()
        row["sets"] = {
            kind: [measured_set(task, model, measured, whole, strangers, groups) for groups in sets]
            for kind, sets in task.sets.items()
        }
        if not on_validation and seed == 0:
            row["modules"] = cut_modules(task, model, plain, splits, seed)
    return {**row, "seconds": round(time.perf_counter() - start)}, model


def command_of(options: argparse.Namespace, name: str, seed: int) -> str:
    """The command that makes one row, wherever the data are."""
    given = [*(["--validation"] if options.validation else []), *(["--data", "DATA"] if options.data else [])]
    given += [] if options.epochs is None else ["--epochs", str(options.epochs)]
    given += ["--by-sample"] if options.by_sample else []
    words = ["python", "examples/benchmarks/quality.py", options.task, *given, "--rows", name, "--seeds", str(seed)]
    return shlex.join(words)


def key_of(row: Mapping) -> tuple:
    """What a row is known by."""
    return row["row"], row.get("by sample", False), row["seed"], row["epochs"]


def main() -> None:
    """Runs the rows that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ["digits", "clinc150", "cifar10", "cifar10-small", "cifar10-resnet18", "cifar10-vgg16"]
    parser.add_argument("task", choices=names)
    parser.add_argument("--rows", nargs="+", help="Names, or options as JSON with --validation; all if left out.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--data", help="Folder of parquet files, for clinc150 and cifar10.")
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="For clinc150.")
    parser.add_argument("--output", type=Path)
    parser.add_argument(
        "--keep", type=Path, help="Folder that keeps trained parents; those in it are not trained anew."
    )
    parser.add_argument(
        "--by-sample",
        action="store_true",
        help="Parents with hard masks answer with the neurons that each input opens.",
    )
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--validation", action="store_true")
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    build = {"digits": digits, "clinc150": lambda: clinc150(options.data, options.model),
             "cifar10": lambda: cifar10(options.data),
             "cifar10-small": lambda: cifar10_small(options.data),
             "cifar10-resnet18": lambda: cifar10_cnn(options.data, "resnet18"),
             "cifar10-vgg16": lambda: cifar10_cnn(options.data, "vgg16")}  # fmt: skip
    task = build[options.task]()
    known = {**ROWS, **task.own_rows}
    options.rows = options.rows or list(known)
    unknown = [name for name in options.rows if name not in known and not (options.validation and name[:1] == "{")]
    if unknown:
        parser.error(f"got the rows {unknown}; expected some of {list(known)}, or options as JSON with --validation")
    if options.validation:
        task = replace(task, sets={kind: sets[:: -(-len(sets) // 15)] for kind, sets in task.sets.items()}, draws=1)
    if options.by_sample:
        task = replace(task, options={**task.options, "static_evaluation": False})
    epochs = options.epochs or task.epochs
    output = options.output or HERE / f"{'recipe' if options.validation else 'quality'}_{options.task}.json"
    for seed in options.seeds:
        plain = None
        for name in options.rows:
            stored = json.loads(output.read_text()) if output.exists() else {"rows": []}
            if (
                any(key_of(row) == (name, options.by_sample, seed, epochs) for row in stored["rows"])
                and not options.again
            ):
                continue
            if plain is None and (not options.validation or name == "plain"):
                plain_row, plain = run(task, "plain", None, seed, epochs, None, options.validation, options.keep)
            row = plain_row if name == "plain" else None
            if row is None:
                own = known[name] if name in known else json.loads(name)
                row, _ = run(task, name, own, seed, epochs, plain, options.validation, options.keep)
            print(f"{name}, seed {seed}: {row['accuracy']:.3f} in {row['seconds']} s", flush=True)
            row["command"] = command_of(options, name, seed)
            stored = json.loads(output.read_text()) if output.exists() else {"rows": []}
            row |= {"by sample": True} if options.by_sample else {}
            kept = [r for r in stored["rows"] if key_of(r) != key_of(row)]
            versions = {"torch": torch.__version__, "transformers": transformers.__version__}
            write_json(output, {**stored, "task": task.text, "versions": versions, "rows": [*kept, row]})


if __name__ == "__main__":
    main()
