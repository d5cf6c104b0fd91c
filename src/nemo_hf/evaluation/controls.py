"""Cuts modules of some labels on calibration samples beside controls of the same sizes, and measures them."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from nemo_hf.models.base import NeMoPreTrainedModel
from nemo_hf.models.batches import labelled_batches, select_samples
from nemo_hf.models.calibrated_cut import extract_module
from nemo_hf.models.calibration import read_calibration
from nemo_hf.models.cut_source import static_parent
from nemo_hf.models.finiteness import check_outputs
from nemo_hf.models.labels import has_label
from nemo_hf.models.plain_checks import label_names
from nemo_hf.models.rejection import energy
from nemo_hf.models.rejection_calibration import auroc, own_samples
from nemo_hf.pruning.plan import is_relevant

Answering = Mapping[str, Callable[..., Any]]  # plain models by name
CUTS = {
    "accuracy": "modules",
    "raw": "the same without reconstruction",
    "random": "random neurons of the same size",
    "other": "modules of other labels",
}
THRESHOLDS = 33  # at which the rejection curve is measured


def cut_beside_controls(
    source: PreTrainedModel, labels: Sequence[int], calibration: Any, retentions: Sequence[float], seed: int = 0,
    show_progress: bool = False, **options: Any,
) -> list[dict[str, NeMoPreTrainedModel]]:  # fmt: skip
    """Cuts modules of some label ids at each retention: `accuracy`, and the controls of the same size beside it.

    `raw` is the module before reconstruction; `random` keeps neurons drawn by `seed` from those that the source uses,
    reconstructed; `other` is a module of as many other labels, with this module's head, if samples have such labels:
    cut on other ones it would be the module itself. `options` are further ones of `nemo_hf.extract_module`.
    """
    given = {"calibration": calibration, "retention": list(retentions), "show_progress": show_progress, **options}
    cut: Callable[..., list[NeMoPreTrainedModel]] = partial(extract_module, source, **given)
    chosen, count = list(labels), len(label_names(source))
    others = [label for label in range(count) if label not in labels][: len(chosen)]
    cuts: dict[str, Callable[[], list[NeMoPreTrainedModel]]] = {
        "accuracy": partial(cut, chosen),
        "raw": partial(cut, chosen, reconstruct=False, rejection=False),
        "random": lambda: extract_module(
            _with_random_relevance(source, seed), chosen, scores="relevance", **{**given, "rejection": False}
        ),
    }
    if others and _have_labels(source, calibration, chosen, others, options):
        cuts["other"] = partial(cut, others, rejection=False)
    found: dict[str, list[NeMoPreTrainedModel]] = {}
    with tqdm(cuts.items(), disable=not show_progress) as bar:
        for kind, make in bar:
            bar.set_description(f"Cutting {CUTS[kind]}")
            found[kind] = make()
    for module, stranger in zip(found["accuracy"], found.get("other", ()), strict=False):
        for head in module.heads:  # answers for these labels
            stranger.model.set_submodule(head, module.model.get_submodule(head))
    return [dict(zip(found, modules, strict=True)) for modules in zip(*found.values(), strict=True)]


def _have_labels(
    source: PreTrainedModel, calibration: Any, labels: Sequence[int], others: Sequence[int], options: Mapping[str, Any]
) -> bool:
    """Whether samples for modules of these labels and of others are known to have one of the others."""
    given = {name: options[name] for name in ("processing_class", "batch_size", "max_samples") if name in options}
    samples = read_calibration(source, calibration, labels_wanted=[*labels, *others], **given)
    return any(found is not None and bool(has_label(found, others).any()) for _, found in samples)


def _with_random_relevance(source: Any, seed: int) -> NeMoPreTrainedModel:
    """A parent like a model, whose relevance ranks at random those neurons that the model uses."""
    parent = copy.deepcopy(source) if isinstance(source, NeMoPreTrainedModel) else static_parent(source)
    generator = torch.Generator().manual_seed(seed)
    for mask in parent.parent_masks().site_masks():
        used = is_relevant(mask.relevance, parent.nemo_config.relevance_threshold).any(0)
        drawn = torch.randint(128, 256, used.shape, generator=generator, dtype=torch.uint8)
        mask.relevance.copy_(torch.where(used.cpu(), drawn, 0))
    parent.config.relevance_source = "exact"
    return parent


@dataclass(frozen=True)
class ModuleAnswers:
    """What a module and others answer on labelled samples.

    Args:
        accuracies: Share of right answers among the module's labels on the samples that have one, by name; where a
            sample may have several labels, of the yes or no to each label, on all samples.
        samples: Number of these samples.
        confusion: How often the module answers a label (column) where another is right (row), (labels, labels); empty
            where a sample may have several labels.
        rejection: `auroc` of telling own samples from others by the energy of the module's logits, the numbers of
            `own` and `other` samples, and `curve`: by rising threshold the shares of own samples accepted and of
            others rejected. Empty without samples of both kinds.
    """

    accuracies: dict[str, float]
    samples: int
    confusion: list[list[int]] = field(default_factory=list)
    rejection: dict[str, Any] = field(default_factory=dict)


@torch.no_grad()
def measure_answers(
    module: NeMoPreTrainedModel, others: Answering, batches: Iterable[Mapping[str, Any]]
) -> ModuleAnswers:
    """Runs a module, and others of the same outputs, on labelled batches.

    `labels` of the batches are ids of the model that the module was cut from.
    """
    wanted = torch.tensor(module.config.label_ids)
    several, names = module.config.has_several_labels, list(module.config.names.values())
    logits: dict[str, list[Tensor]] = {name: [] for name in ("module", *others)}
    truth, energies, owned = [], [], []
    for inputs, labels, numbers in labelled_batches(module, batches):
        found = module.own_logits(**inputs)
        check_outputs(module, inputs, found, names, numbers)
        own = own_samples(module, labels)
        energies.append(energy(found, several).cpu())
        owned.append(own.cpu())
        chosen = torch.ones_like(own) if several else own
        if not chosen.any():
            continue
        kept = select_samples(inputs, chosen)
        truth.append(labels[chosen].cpu())
        logits["module"].append(found[chosen].cpu())
        for name, model in others.items():
            logits[name].append(model(**kept, return_dict=True).logits[:, : len(wanted)].cpu())
    if not truth:
        raise ValueError(f"Got data without a sample of the labels {names}; expected at least one. Pass data with one.")
    known = torch.cat(truth)
    right = known[:, wanted] if several else (known[:, None] == wanted).int().argmax(-1)
    answers = {n: (torch.cat(v) > 0) if several else torch.cat(v).argmax(-1) for n, v in logits.items()}
    confusion = torch.zeros(0, 0, dtype=torch.long)
    if not several:
        places = right * len(wanted) + answers["module"]
        confusion = torch.bincount(places, minlength=len(wanted) ** 2).view(len(wanted), -1)
    return ModuleAnswers(
        {name: (found == right).double().mean().item() for name, found in answers.items()},
        len(known),
        confusion.tolist(),
        rejection_curve(torch.cat(energies), torch.cat(owned)),
    )


def rejection_curve(energies: Tensor, is_own: Tensor) -> dict[str, Any]:
    """AUROC and curve of accepting samples whose energy, (samples,), reaches a threshold; empty without both kinds.

    The curve has rows of threshold, share of own samples accepted, and share of others rejected; its thresholds are
    quantiles of the energies of either kind, so that it is even along both axes, however few samples one has.
    """
    found = auroc(energies, is_own)
    if found is None:
        return {}
    steps = torch.linspace(0, 1, THRESHOLDS, dtype=torch.float64)
    own, other = (energies[chosen].double().sort().values for chosen in (is_own, ~is_own))
    thresholds = torch.cat([kind[(steps * (len(kind) - 1)).round().long()] for kind in (own, other)]).unique()
    rows = [[t.item(), (own >= t).double().mean().item(), (other < t).double().mean().item()] for t in thresholds]
    return {"auroc": found, "own": int(is_own.sum()), "other": int((~is_own).sum()), "curve": rows}
