"""Modules against every rival on scikit-learn's digits: one row a method, same data, budget and seeds.

    python examples/benchmarks/quality.py --rows plain mwt nemo nemo-authors ours --seeds 0 1 2
    python examples/benchmarks/quality.py --render      # quality.md and quality.png from quality.json alone

1,150 images train, 287 choose (which epoch of a fine-tuning counts; the options of the rows were chosen on such
data too, with other scripts), 360 test, read once for each row and seed. About two minutes a row and seed on one core.
Rows are added to quality.json as they come; a row that is there is made anew only with --again.
"""

import argparse
import copy
import itertools
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from digits_recipe import held_out
from sklearn.metrics import roc_auc_score
from torch import Tensor
from transformers import Trainer, set_seed
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.utils import logging as transformers_logging

from nemo_hf import NeMoConfig, NeMoTrainer, make_parent
from nemo_hf.demo import MODULES, Digits, digits_trainer, load_digits_split
from nemo_hf.evaluation import other_groups, random_masks
from nemo_hf.extraction import make_plan
from nemo_hf.files import write_json
from nemo_hf.modeling import base_parameters

OUTPUT = Path(__file__).with_suffix(".json")
PAPER = {"hard_masks": False, "rehearsal_probability": 0.0, "sparsity_weight": 0.0, "detach_pooled": False,
         "retention_target": None, "relevance_threshold": 0.9}  # fmt: skip
ROWS: dict[str, dict | None] = {
    "plain": None,
    "mwt": {**PAPER, "objective": "cohesion-coupling"},
    "nemo": PAPER,
    "nemo-authors": {**PAPER, "objective": "contrastive-authors"},
    "ours": {},
    "ours, size target": {"retention_target": 0.11},
    "ours, no contrast": {"contrastive_weight": 0.0},
    "ours, no sparsity": {"sparsity_weight": 0.0, "retention_target": None},
    "ours, soft masks": {"hard_masks": False},
    "ours, no rehearsal": {"rehearsal_probability": 0.0},
    "ours, specific": {"specificity_weight": 1.0},
}
DRAW = random.Random(0)  # noqa: S311 - the sets of labels, the same in every run
SETS = {
    "singles": [(label,) for label in range(10)],
    "pairs": list(itertools.combinations(range(10), 2)),
    "triples": [(3, 8, 9), *(tuple(sorted(DRAW.sample(range(10), 3))) for _ in range(9))],
    "fives": [tuple(range(5)), *(tuple(sorted(DRAW.sample(range(10), 5))) for _ in range(9))],
}
TUNING_EPOCHS = 10


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean, ignoring what is missing."""
    return statistics.fmean(values)


def part(data: Digits, labels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Images of some labels, and their labels by position in `labels`."""
    places = {label: place for place, label in enumerate(labels)}
    kept = [index for index, label in enumerate(data.labels) if label in places]
    return data.pixel_values[kept], torch.tensor([places[data.labels[index]] for index in kept])


@torch.no_grad()
def accuracy(model, images: Tensor, right: Tensor, labels: Sequence[int] | None = None, mask=None) -> float:
    """Share of right answers, of a whole model restricted to `labels`, or of a module."""
    options = {} if mask is None else {"static_masks": mask}
    logits = model.eval()(images, **options).logits
    logits = logits if labels is None else logits[:, list(labels)]
    return (logits.argmax(-1) == right).float().mean().item()


def measured_set(parent, data: Digits, labels: Sequence[int]) -> dict[str, float]:
    """A module and its controls, as the parent under static masks, which is the same by the extraction law."""
    images, right = part(data, labels)
    plan = make_plan(parent, list(labels))
    found = {"neurons": plan.retained, "module": accuracy(parent, images, right, labels, plan.static)}
    found["restricted"] = accuracy(parent, images, right, labels)
    drawn = random_masks(plan.static, parent, seed=0)
    found["random"] = mean([accuracy(parent, images, right, labels, mask) for mask in drawn])
    other = make_plan(parent, other_groups(parent, plan.groups, seed=0)).static
    found["other"] = accuracy(parent, images, right, labels, other)
    empty = {key: torch.zeros_like(mask) for key, mask in plan.static.items()}
    found["empty"] = accuracy(parent, images, right, labels, empty)
    found["rejection"] = rejection_auroc(parent, data, labels, plan.static)
    return found


@torch.no_grad()
def rejection_auroc(parent, data: Digits, labels: Sequence[int], mask) -> float:
    """How well the energy of a module's logits tells its own images from those of other labels."""
    logits = parent.eval()(data.pixel_values, static_masks=mask).logits[:, list(labels)]
    return roc_auc_score(torch.isin(torch.tensor(data.labels), torch.tensor(labels)), logits.logsumexp(-1))


@torch.no_grad()
def single_aurocs(parent, data: Digits) -> list[float]:
    """How well each single-label module tells its label from the rest by its one logit."""
    right = torch.tensor(data.labels)
    scores = []
    for label in range(10):
        logits = parent.eval()(data.pixel_values, static_masks=make_plan(parent, [label]).static).logits
        scores.append(roc_auc_score(right == label, logits[:, label]))
    return scores


def fit(model, images: Tensor, right: Tensor, epochs: int, rate: float, seed: int, validation=None) -> dict:
    """Trains a small classifier; with validation data, keeps the best epoch's weights."""
    set_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    best, kept = -1.0, None
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(len(images)).split(64):
            loss = torch.nn.functional.cross_entropy(model(images[batch]).logits, right[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if validation is not None and (reached := accuracy(model, *validation)) > best:
            best, kept = reached, copy.deepcopy(model.state_dict())
    if kept is not None:
        model.load_state_dict(kept)
    return {"validation": best}


def cut_modules(parent, plain, splits: tuple[Digits, Digits, Digits], epochs: int, seed: int) -> list[dict]:
    """Real modules of the demo's three sets: sizes, fine-tuned, and plain models of the same size."""
    train, validation, test = splits
    rows = []
    for labels in MODULES:
        module = parent.extract_module(list(labels))
        parts = [part(data, labels) for data in (train, validation, test)]
        row = {"labels": labels, "raw": accuracy(module, *parts[2]), "parameters": base_parameters(module)}
        row["weights"] = row["parameters"] / base_parameters(parent)
        row["megabytes"] = sum(p.numel() * p.element_size() for p in module.model.parameters()) / 1e6
        fit(tuned := copy.deepcopy(module), *parts[0], TUNING_EPOCHS, 3e-4, seed, parts[1])
        row["fine-tuned"] = accuracy(tuned, *parts[2])
        set_seed(seed)
        fresh = copy.deepcopy(module)
        for layer in fresh.modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        steps = epochs * -(-len(train) // 64)  # as many steps as the parent was trained for
        fit(fresh, *parts[0], steps // -(-len(parts[0][0]) // 64), 1e-3, seed)
        row["same size, trained on the set"] = accuracy(fresh, *parts[2])
        row["pruned"] = accuracy(plain, *parts[2], labels, by_magnitude(plain, make_plan(parent, list(labels)).keep))
        rows.append(row)
    return rows


def by_magnitude(plain, keep: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Masks of a plain model that keep as many neurons in each part, those whose weights have the largest norm."""
    masks = {}
    for site in plain.sites:
        weights = {name: plain.model.get_submodule(rows.layer).weight.norm(dim=1) for rows, name in site.produced()}
        if "query" in weights:
            scores = {"query_key": weights["query"] * weights["key"], "value": weights["value"]}
        else:
            scores = {"intermediate": weights["units"]}
        read = plain.model.get_submodule(site.output).weight.norm(dim=0)
        last = list(scores)[-1]
        scores[last] = scores[last] * read
        parts = []
        for name, score in scores.items():
            chosen = score.argsort(descending=True)[: len(keep[site.key][name])]
            parts.append(torch.zeros_like(score).index_fill(0, chosen, 1.0))
        masks[site.key] = torch.cat(parts)
    return masks


def trained(name: str, splits, seed: int, epochs: int):
    """The plain model, or the parent of a row, and what its evaluation says."""
    train, validation, _ = splits
    options = ROWS[name]
    kind = Trainer if options is None else NeMoTrainer
    extra = {} if options is None else {"nemo_config": NeMoConfig(**options)}
    trainer = digits_trainer(kind, train, validation, seed, epochs, **extra)
    trainer.train()
    if options is None:
        return make_parent(trainer.model), {}
    return trainer.parent, trainer.evaluate()


def run(name: str, seed: int, epochs: int, plain) -> tuple[dict, object]:
    """Trains and measures one row."""
    start = time.perf_counter()
    train, validation = held_out(seed)
    processor = ViTImageProcessorPil(do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    test = load_digits_split(processor, seed)[1]
    splits = (train, validation, test)
    model, metrics = trained(name, splits, seed, epochs)
    row = {"row": name, "options": ROWS[name], "seed": seed, "epochs": epochs}
    row["accuracy"] = accuracy(model, *part(test, range(10)))
    if ROWS[name] is not None:
        row |= {key: metrics.get(f"eval_{key}") for key in ("cohesion", "coupling")}
        row["sets"] = {
            kind: [{"labels": s, **measured_set(model, test, s)} for s in sets] for kind, sets in SETS.items()
        }
        row["aurocs"] = single_aurocs(model, test)
        row["modules"] = cut_modules(model, plain, splits, epochs, seed)
    return {**row, "seconds": round(time.perf_counter() - start)}, model


def main() -> None:
    """Runs the rows that are asked for, or renders."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    if not options.render:
        torch.set_num_threads(1)
        for seed in options.seeds:
            plain = None
            for name in options.rows:
                done = json.loads(options.output.read_text())["rows"] if options.output.exists() else []
                is_same = [(row["row"], row["seed"], row["epochs"]) == (name, seed, options.epochs) for row in done]
                if any(is_same) and not options.again:
                    continue
                if plain is None:
                    plain_row, plain = run("plain", seed, options.epochs, None)
                row = plain_row if name == "plain" else run(name, seed, options.epochs, plain)[0]
                print(f"{name}, seed {seed}: {row['accuracy']:.3f} in {row['seconds']} s", flush=True)
                done = [old for old, same in zip(done, is_same, strict=True) if not same]
                versions = {"torch": torch.__version__, "transformers": transformers.__version__}
                command = "python examples/benchmarks/quality.py"
                write_json(options.output, {"versions": versions, "command": command, "rows": [*done, row]})
    rows = json.loads(options.output.read_text())["rows"]
    options.output.with_suffix(".md").write_text(rendered(rows))
    draw(rows, options.output.with_suffix(".png"))


def averaged(rows: list[dict], kind: str, key: str) -> float:
    """Mean of one figure over the sets of a kind and over seeds."""
    return mean([found[key] for row in rows for found in row["sets"][kind]])


def rendered(rows: list[dict]) -> str:
    """The table, from the rows."""
    header = ["row", "seeds", "accuracy", "cohesion", "coupling", "AUROC of singles"]
    header += [f"{kind}: neurons, raw, parent, random, other" for kind in SETS if kind != "singles"]
    header += ["singles: neurons", "rejection AUROC", "weights", "fine-tuned", "same size alone", "pruned"]
    lines = [header, ["---"] * len(header)]
    for name in dict.fromkeys(row["row"] for row in rows):
        own = [row for row in rows if row["row"] == name]
        cells = [name, ", ".join(str(row["seed"]) for row in own), f"{mean([row['accuracy'] for row in own]):.3f}"]
        if "sets" not in own[0]:
            lines.append([*cells, *["-"] * (len(header) - 3)])
            continue
        cells += [f"{mean([row[key] for row in own]):.2f}" for key in ("cohesion", "coupling")]
        cells.append(f"{mean([score for row in own for score in row['aurocs']]):.3f}")
        for kind in ("pairs", "triples", "fives"):
            figures = [averaged(own, kind, key) for key in ("neurons", "module", "restricted", "random", "other")]
            cells.append(f"{figures[0]:.2f}, **{figures[1]:.3f}**, " + ", ".join(f"{f:.3f}" for f in figures[2:]))
        cells.append(f"{averaged(own, 'singles', 'neurons'):.2f}")
        cells.append(f"{mean([averaged(own, kind, 'rejection') for kind in ('pairs', 'triples', 'fives')]):.3f}")
        modules = [module for row in own for module in row["modules"]]
        keys = ("weights", "fine-tuned", "same size, trained on the set", "pruned")
        cells += [f"{mean([module[key] for module in modules]):.3f}" for key in keys]
        lines.append(cells)
    text = __doc__.strip().split("\n\n")
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"# {text[0]}\n\n{text[2]}\n\n{table}\n\n![Accuracy over size](quality.png)\n"


def draw(rows: list[dict], path: Path) -> None:
    """Accuracy of modules over their share of neurons, one line a row of the table."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["row"] for row in rows if "sets" in row):
        own = [row for row in rows if row["row"] == name]
        points = [[averaged(own, kind, key) for key in ("neurons", "module")] for kind in ("pairs", "triples", "fives")]
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xlabel("share of neurons kept (pairs, triples, fives)")
    axes.set_ylabel("raw accuracy of modules")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
