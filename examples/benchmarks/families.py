"""Tries every classification family of transformers: masks, exact cuts, files, training. Writes the support table.

    python examples/benchmarks/families.py                      # all of them, about eight minutes on one core
    python examples/benchmarks/families.py --families bert vit  # prints these, writes nothing; with --update their rows
    python examples/benchmarks/families.py --render             # the table from the JSON alone

Writes supported_models.json beside this script and, from it, supported_models.md.
"""

import argparse
import copy
import json
import logging
import tempfile
import time
import warnings
from pathlib import Path

import torch
import transformers
from tiny_models import LABELS, families, tiny_model
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import logging as transformers_logging

from nemo_hf import NeMoConfig, NeMoTrainer, UnsupportedArchitectureError, make_parent
from nemo_hf.models.equivalence import EQUIVALENCE_TOLERANCE
from nemo_hf.models.extraction import make_plan
from nemo_hf.models.pruning_modes import random_keep
from nemo_hf.neurons.patterns import find_sites
from nemo_hf.neurons.trial_inputs import random_inputs
from nemo_hf.pruning.plan import static_masks

HERE = Path(__file__).parent
KINDS = ("attention", "ffn", "conv")
TRIED = (KINDS, KINDS[:2], KINDS[1:], *((kind,) for kind in KINDS))
SPREADS = (0.15, 0.3, 0.6)
"""Spreads of the random weights, tried until the masks of each kind move the logits visibly."""


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
            parent = make_parent(copy.deepcopy(model), NeMoConfig(targets=targets, relevance_threshold=0.6))
        except UnsupportedArchitectureError as error:
            reasons["+".join(targets)] = str(error)
            continue
        return parent.eval(), reasons
    return None, reasons


def cut_by(parent) -> dict[str, str]:
    """How each site is cut."""
    return {} if parent is None else {site.key: site.pruning_mode for site in parent.sites}


def whole(model: PreTrainedModel, parent, reasons: dict[str, str]) -> dict[str, str]:
    """Why each kind of neurons that is not cut stays whole."""
    remarks = {"ffn": "experts in one tensor, to which tokens of all samples go"} if has_experts(model) else {}
    for kind in KINDS:
        if parent is not None and any(site.kind == kind for site in parent.sites):
            continue
        if kind == "conv":
            if parent is None and any(isinstance(layer, torch.nn.Conv2d) for layer in model.modules()):
                remarks[kind] = reasons[kind]
            continue
        if kind not in str(reasons) and "no neuron sites" not in str(reasons):
            if kind in remarks:
                continue
            try:
                find_sites(model, [kind])
                remarks[kind] = "its layers are never called"
            except UnsupportedArchitectureError:
                remarks[kind] = "no such layers by name"
            continue
        own = reasons.get(kind) or reasons.get("+".join(KINDS), "")
        remarks[kind] = "no such layers by name" if "no neuron sites" in own else own
    return remarks


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
    """Two steps of `NeMoTrainer`: the losses, and the share of generators and other trained tensors that moved."""
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
    moved = {name: bool((p.detach() != before[name]).any()) for name, p in parent.named_parameters()}
    generators = [is_moved for name, is_moved in moved.items() if ".generator." in name]
    others = [is_moved for name, is_moved in moved.items() if ".generator." not in name]
    return {
        "losses": losses,
        "generators_moved": sum(generators) / len(generators),
        "others_moved": sum(others) / len(others),
    }


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
    row["same_when_fresh"] = cut_by(fresh) == cut_by(parent)
    if parent is None:
        return {**row, "status": "refused"}
    for kind, effect in found.items():
        sites = [site for site in parent.sites if site.kind == kind]
        pruning_modes = sorted({site.pruning_mode for site in sites})
        row[kind] = {
            "sites": len(sites),
            "neurons": sum(s.neurons for s in sites),
            "pruning_modes": pruning_modes,
            **effect,
        }
    return {**row, "status": "supported", "module": cut(parent), "training": train(parent)}


REMARKS = (
    ("no such layers by name", "none known"),
    ("Channels of convolutions stay whole", "channels are mixed by norms"),
    ("leaves all logits as they are", "without effect here"),
    ("experts", "routed experts stay whole"),
    ("its layers are never called", "weights read without a call"),
    ("differ from call to call", "not deterministic"),
    ("the mask of one sample reaches", "samples are not in the first dimension"),
    ("without a linear head", "no linear head of the labels"),
    ("no logits", "no logits in the output"),
)


def remark(text: str) -> str:
    """A reason in a few words."""
    return next((short for part, short in REMARKS if part in text), text)


def rendered(data: dict) -> str:
    """The support table, from the sweep's data."""
    rows = data["families"]
    header = ["model type", "class", "attention", "feed-forward", "channels", "remark"]
    lines = [header, ["---"] * len(header)]
    for row in sorted(rows, key=lambda row: (row["model_type"], row["class"])):
        cells = [", ".join(row[kind]["pruning_modes"]) if kind in row else "-" for kind in KINDS]
        reasons = row.get("whole", {})
        # Most models have some convolution, such as that of their patches, whose channels are no neurons; and those of
        # convolutions have nothing else.
        told = {kind: remark(text) for kind, text in reasons.items() if kind != "conv"}
        remarks = [f"{kind}: {text}" for kind, text in told.items() if "conv" not in row or text != "none known"]
        if row["status"] != "supported":
            words = {remark(text) for text in reasons.values()} or {row.get("remark", "")}
            remarks = [f"{row['status']}: {', '.join(sorted(words))}"]
        lines.append([row["model_type"], f"`{row['class']}`", *cells, "; ".join(remarks)])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (HERE / "supported_models.template.md").read_text().format(table=table, **summary(rows), **data["made_with"])


def summary(rows: list[dict]) -> dict[str, int]:
    """The counts of the table."""
    supported = [row for row in rows if row["status"] == "supported"]
    dense = [row for row in supported if "attention" in row and "scatter" not in str(row["attention"]["pruning_modes"])]
    return {
        "classes": len(rows),
        "supported": len(supported),
        "refused": sum(row["status"] == "refused" for row in rows),
        "not_built": sum(row["status"] == "not built" for row in rows),
        "feed_forward": sum("ffn" in row for row in supported),
        "attention": sum("attention" in row for row in supported),
        "dense": len(dense),
        "channels": sum("conv" in row for row in supported),
    }


def main() -> None:
    """Runs the sweep and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", default=[])
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    path = HERE / "supported_models.json"
    if not options.render:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        logging.disable(logging.WARNING)
        rows = []
        for task, model_type, class_name in families():
            if options.families and model_type not in options.families:
                continue
            start = time.perf_counter()
            rows.append(check(task, model_type, class_name))
            seconds = time.perf_counter() - start
            print(class_name, *(rows[-1].get(k, {}).get("pruning_modes", "-") for k in KINDS), rows[-1]["status"],
                  f"{seconds:.1f} s", flush=True)  # fmt: skip
        if options.families and options.update:
            tried = {(row["task"], row["class"]): row for row in rows}
            written = json.loads(path.read_text())["families"]
            rows = [tried.get((row["task"], row["class"]), row) for row in written]
        elif options.families:
            print(json.dumps(rows, indent=1))
            return
        made_with = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
        path.write_text(json.dumps({"made_with": made_with, "families": rows}, indent=1) + "\n")
    (HERE / "supported_models.md").write_text(rendered(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
