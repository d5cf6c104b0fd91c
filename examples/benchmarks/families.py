"""Tries every classification family of transformers: masks, exact cuts, files, training, reconstruction.

    python examples/benchmarks/families.py                      # all of them, about fifteen minutes on one core
    python examples/benchmarks/families.py --families bert vit  # only these, whose rows are replaced

Writes results/supported_models.json; readme_tables.py makes the table in supported_models.md from it.
"""

import argparse
import copy
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import compact
import torch
from tiny_models import LABELS, families, tiny_model
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import logging as transformers_logging

from nemo_hf import NeMoConfig, NeMoTrainer, UnsupportedArchitectureError, extract_module, make_parent
from nemo_hf.models.equivalence import EQUIVALENCE_TOLERANCE
from nemo_hf.models.extraction import make_plan
from nemo_hf.models.pruning_modes import random_keep
from nemo_hf.neurons.patterns import find_sites
from nemo_hf.neurons.trial_inputs import random_inputs
from nemo_hf.pruning.plan import static_masks

RESULTS = compact.RESULTS / "supported_models.json"
KINDS = ("attention", "ffn", "conv")
TRIED = (KINDS, KINDS[:2], KINDS[1:], *((kind,) for kind in KINDS))
SPREADS = (0.15, 0.3, 0.6)  # of the random weights, tried until the masks of each kind move the logits visibly
CALIBRATED, FRESH, RETENTION = 128, 128, 0.4  # samples that a module is cut on, and others; its share of the weights
BATCH = 32
REMARKS = (
    ("Channels of convolutions stay whole", "channels are mixed by norms"),
    ("leaves all logits as they are", "without effect here"),
    ("differ from call to call", "not deterministic"),
    ("the mask of one sample reaches", "samples are not in the first dimension"),
    ("without a linear head", "no linear head of the labels"),
    ("no logits", "no logits in the output"),
)
"""Parts of error messages, and the remark of the table."""


@torch.no_grad()
def effects(parent) -> dict[str, dict[str, float]]:
    """What cutting about half of a kind's neurons does to the logits, beside the tolerance of the equivalence check."""
    inputs = random_inputs(parent)
    opened = parent(**inputs, static_masks=parent.masks.open_masks()).logits
    found = {}
    for kind in dict.fromkeys(site.kind for site in parent.sites):
        keep = random_keep(parent.sites, {site.key for site in parent.sites if site.kind == kind})
        masked = parent(**inputs, static_masks=static_masks(parent.sites, keep)).logits
        found[kind] = {
            "effect": (masked - opened).abs().max().item(),
            "tolerance": EQUIVALENCE_TOLERANCE * max(1.0, masked.abs().max().item()),
        }
    return found


def attach(model: PreTrainedModel) -> tuple:
    """The parent of as many kinds of neurons as can be cut exactly, or none, and why others can't."""
    reasons = {}
    for targets in TRIED:
        try:
            parent = make_parent(
                copy.deepcopy(model), NeMoConfig(targets=targets, masks="generated", relevance_threshold=0.6)
            )
        except UnsupportedArchitectureError as error:
            reasons["+".join(targets)] = str(error)
            continue
        return parent.eval(), reasons
    return None, reasons


def modes_of(parent) -> dict[str, str]:
    """How each site is cut."""
    return {} if parent is None else {site.key: site.pruning_mode for site in parent.sites}


def whole(model: PreTrainedModel, parent, reasons: dict[str, str]) -> dict[str, str]:
    """Why each kind of neurons that is not cut stays whole, in a few words."""
    cut = {"conv", *(() if parent is None else (site.kind for site in parent.sites))}
    remarks = {"ffn": "routed experts stay whole"} if has_experts(model) else {}
    if parent is None and any(isinstance(layer, torch.nn.Conv2d) for layer in model.modules()):
        remarks["conv"] = remark(reasons["conv"])
    for kind in (kind for kind in KINDS if kind not in cut):
        if kind in str(reasons) or "no neuron sites" in str(reasons):
            own = reasons.get(kind) or reasons.get("+".join(KINDS), "")
            remarks[kind] = "none known" if "no neuron sites" in own else remark(own)
        elif kind not in remarks:
            remarks[kind] = "weights read without a call" if find_sites(model, [kind]) else "none known"
    return remarks


def remark(text: str) -> str:
    """An error message in a few words."""
    return next((short for part, short in REMARKS if part in text), text)


def has_experts(model: PreTrainedModel) -> bool:
    """Whether a feed-forward part routes tokens to experts that are slices of one tensor."""
    return any(p.ndim == 3 and "experts" in name for name, p in model.named_parameters())


@torch.no_grad()
def cut(parent) -> dict[str, float]:
    """Cuts a module under a random relevance; compares it with its parent, and once more from its files."""
    generator = torch.Generator().manual_seed(0)
    for mask in parent.masks.site_masks():
        mask.relevance.copy_(torch.randint(0, 256, mask.relevance.shape, generator=generator))
    parent.config.relevance_source = "exact"
    labels = ["ship", "dog"]
    inputs = random_inputs(parent)
    expected = parent(**inputs, static_masks=make_plan(parent, labels).static).logits[:, [3, 1]]
    module = parent.extract_module(labels)
    with tempfile.TemporaryDirectory() as folder:
        module.save_pretrained(Path(folder) / "module")
        loaded = type(module).from_pretrained(Path(folder) / "module")
        parent.save_pretrained(Path(folder) / "parent")
        read = type(parent).from_pretrained(Path(folder) / "parent", labels=labels)
    # Loaded weights lie where they lie in the file, and some processors round by their alignment; copies lie alike.
    got, again, on_load = (copy.deepcopy(model)(**inputs).logits for model in (module, loaded, read))
    return {
        "difference": (got - expected).abs().max().item(),
        "difference_after_loading": (again - got).abs().max().item(),
        "difference_when_cut_on_load": (on_load - got).abs().max().item(),
        "tolerance": EQUIVALENCE_TOLERANCE * max(1.0, expected.abs().max().item()),
        "parameters": sum(p.numel() for p in module.model.parameters()) / parent.model.num_parameters(),
    }


def train(parent) -> dict:
    """Two steps of `NeMoTrainer`: the losses, and the share of the generators' tensors that moved."""
    inputs = random_inputs(parent)
    samples = [{**{k: v[i % len(v)] for k, v in inputs.items()}, "labels": i % len(LABELS)} for i in range(10)]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=2, per_device_train_batch_size=5, logging_steps=1, report_to="none", disable_tqdm=True,
            learning_rate=1e-3, use_cpu=True, save_strategy="no", remove_unused_columns=False,
        )  # fmt: skip
        trainer = NeMoTrainer(parent, args, train_dataset=samples)
        before = {name: p.detach().clone() for name, p in parent.named_parameters()}
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    moved = [(p != before[name]).any().item() for name, p in parent.named_parameters() if ".generator." in name]
    return {"losses": losses, "generators_moved": sum(moved) / len(moved)}


@torch.no_grad()
def reconstruct(model: PreTrainedModel, targets: tuple[str, ...]) -> dict:
    """Mean squares by which answers of a raw cut and of a reconstructed one differ from the model's on fresh inputs.

    `refused` says why a module was not reconstructed.
    """
    batches = list(drawn(model, CALIBRATED + FRESH))
    count = len(batches) * CALIBRATED // (CALIBRATED + FRESH)
    options = {"nemo_config": NeMoConfig(targets=targets), "show_progress": False}
    found = {}
    for name, is_reconstructed in (("raw", False), ("reconstructed", True)):
        module = extract_module(
            model, ["ship", "dog"], batches[:count], RETENTION, reconstruct=is_reconstructed, **options
        )
        missing = [module(**batch).logits - model(**batch).logits[:, [3, 1]] for batch in batches[count:]]
        found[name] = torch.cat(missing).square().mean().item()
    return {**found, "refused": module.config.extraction.get("refused")}


def drawn(model: PreTrainedModel, count: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of random samples, of one each for models that take no more at a time."""
    inputs = random_inputs(model, count)
    if len(next(iter(inputs.values()))) == count:
        for start in range(0, count, BATCH):
            yield {name: value[start : start + BATCH] for name, value in inputs.items()}
        return
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        order = torch.randperm(inputs["input_ids"].shape[1], generator=generator)
        yield {**inputs, "input_ids": inputs["input_ids"][:, order]}


def check(task: str, model_type: str, class_name: str) -> dict:
    """Everything about one class, as plain data."""
    row = {"task": task, "model_type": model_type, "class": class_name}
    try:
        model = tiny_model(model_type, class_name)
    except ImportError as error:
        return {**row, "status": "not built", "remark": str(error).strip().split("\n")[0].split(" but ")[0]}
    for spread in SPREADS:
        model = tiny_model(model_type, class_name, spread)
        parent, reasons = attach(model)
        found = {} if parent is None else effects(parent)
        if all(kind["effect"] > 100 * kind["tolerance"] for kind in found.values()):
            break
    row.update(whole=whole(model, parent, reasons), spread=spread)
    fresh, _ = attach(tiny_model(model_type, class_name, spread=None))
    row["same_when_fresh"] = modes_of(fresh) == modes_of(parent)
    if parent is None:
        return {**row, "status": "refused"}
    for kind, effect in found.items():
        sites = [site for site in parent.sites if site.kind == kind]
        modes, neurons = sorted({site.pruning_mode for site in sites}), sum(site.neurons for site in sites)
        row[kind] = {"neurons": neurons, "pruning_modes": modes, **effect}
    row["reconstruction"] = reconstruct(model, parent.nemo_config.targets)
    return {**row, "status": "supported", "module": cut(parent), "training": train(parent)}


def stored() -> dict:
    """Results, with a row for each class as `check` returns it, less what is only measured."""
    found = compact.load(RESULTS)
    found["families"] = [{k: v for k, v in row.items() if v is not None} for row in found["families"]]
    for row in found["families"]:
        for kind in KINDS:
            if kind in row:
                row[kind] = {"pruning_modes": row[kind].split(", "), "neurons": row[f"{kind}_neurons"]}
    return found


def short(row: dict) -> dict:
    """A row as it is written."""
    found = {name: row.get(name) for name in ("task", "model_type", "class", "status", "spread", "whole", "remark")}
    for kind in KINDS:
        own = row.get(kind)
        found |= {kind: own and ", ".join(own["pruning_modes"]), f"{kind}_neurons": own and own["neurons"]}
    found |= {name: row.get("module", {}).get(name) for name in ("difference", "tolerance", "parameters")}
    return found | {name: row.get("reconstruction", {}).get(name) for name in ("raw", "reconstructed", "refused")}


def support_line() -> str:
    """In how many families neurons are cut."""
    families = {row["model_type"]: row for row in stored()["families"]}.values()
    kinds = Counter(kind for row in families for kind in KINDS if kind in row)
    dense = sum("attention" in row and "scatter" not in str(row["attention"]["pruning_modes"]) for row in families)
    return (
        f"Of {len(families)} families, feed-forward neurons are cut exactly in {kinds['ffn']} and attention in "
        f"{kinds['attention']}, of these {dense} dense throughout;\nchannels of convolutions in {kinds['conv']}."
    )


def reconstruction(row: dict) -> str:
    """What a reconstruction leaves of the distance of a raw cut, or why there is none."""
    if row["status"] != "supported":
        return "-"
    if row.get("refused"):
        return f"refused: {row['refused']}"
    return f"{row['reconstructed'] / row['raw']:.1%}" if row["reconstructed"] != row["raw"] else "no need"


def support_table() -> str:
    """The versions, the counts and a line a class."""
    data = stored()
    count = Counter(row["status"] for row in data["families"])
    made_with = data["made_with"][0]
    header = ["model type", "class", "attention", "feed-forward", "channels", "reconstruction", "remark"]
    lines = []
    for row in sorted(data["families"], key=lambda row: (row["model_type"], row["class"])):
        reasons = row.get("whole", {})
        if row["status"] == "supported":
            remarks = [f"{kind}: {text}" for kind, text in reasons.items() if "conv" not in row or text != "none known"]
        else:
            remarks = [f"{row['status']}: {', '.join(sorted(set(reasons.values()) or {row.get('remark', '')}))}"]
        modes = [", ".join(row[kind]["pruning_modes"]) if kind in row else "-" for kind in KINDS]
        lines.append([row["model_type"], f"`{row['class']}`", *modes, reconstruction(row), "; ".join(remarks)])
    return (
        f"transformers {made_with['transformers']}, torch {made_with['torch']}. {len(lines)} pairs of model type and "
        f"class: {count['supported']} supported, {count['refused']} refused with a reason, {count['not built']} not "
        f"built because a library is missing. Reconstruction: what is left of the mean square by which the answers of "
        f"a raw cut differ from the model's on {FRESH} random samples, at {RETENTION:.0%} of the weights, after "
        f"reconstruction on {CALIBRATED} others.\n\n"
        f"{compact.markdown(header, lines)}"
    )


def main() -> None:
    """Tries the families."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", default=[])
    chosen = parser.parse_args().families
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    rows = []
    for task, model_type, class_name in families():
        if not chosen or model_type in chosen:
            rows.append(short(check(task, model_type, class_name)))
            print(class_name, *(rows[-1][kind] or "-" for kind in KINDS), rows[-1]["status"], flush=True)
    if not chosen:
        RESULTS.unlink(missing_ok=True)  # transformers may have lost a class
    about = {"command": "python examples/benchmarks/families.py"}
    compact.update(RESULTS, about, "families", rows, "task", "model_type", "class")


if __name__ == "__main__":
    main()
