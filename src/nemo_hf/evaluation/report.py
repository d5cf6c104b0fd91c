"""A module's report: accuracy beside controls, size, operations and latency."""

import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from nemo_hf.config import LabelLike
from nemo_hf.models.base import NeMoPreTrainedModel, base_parameters
from nemo_hf.models.equivalence import as_saved
from nemo_hf.models.extraction import extract_module, make_plan
from nemo_hf.models.label_checks import check_label_shape
from nemo_hf.models.label_groups import group_indices, sample_groups
from nemo_hf.models.rejection import energy, score_energies
from nemo_hf.neurons.trial_inputs import random_inputs

from .latency import count_macs, device_name, measure_latency
from .metrics import cohesion_and_coupling
from .rejection import auroc, own_samples

logger = logging.getLogger(__name__)

RANDOM_DRAWS = 5


@dataclass(frozen=True)
class ModuleReport:
    """What is known of a module, for a table or JSON.

    Args:
        labels: Names of the module's labels, in the order of its outputs.
        groups: Names of the label groups that it was cut for.
        accuracy: Share of right answers of the stand-alone module, without fine-tuning. Where a sample may
            have several labels, an answer is the yes or no to one label of the module, over all samples.
        parent_restricted_accuracy: The same of the parent, its answers restricted to `labels`.
        controls: The same of the parent under other static masks: `random` (mean of 5 masks with as many
            neurons in each part of each site), `other` (the mask of up to as many other groups; `None` if
            there is no other group), `empty` (no neuron).
        samples: Number of samples with these labels; all of them where a sample may have several labels.
        parameters: Of the module; `parent_parameters` of the parent without generators.
        megabytes: 10^6 bytes of the module's parameters; `parent_megabytes` likewise.
        macs: Multiply-accumulates for one sample; `parent_macs` likewise.
        neuron_retention_rate: Kept neurons over neurons; `weight_retention_rate`: kept parameters over
            the parent's.
        latency_ms: Median milliseconds of a batch by its size; `parent_latency_ms`: of the plain model
            inside the parent, without masks.
        device: Name of the device of the latency, a CPU's with its threads.
        input_shape: Shape of the sample whose latency and operations these are.
            `threshold`: of the module's plan. `seed`: of the controls.
        rejection: `auroc` of telling samples of the module's labels from all others by its energy (`None` if
            there are no others); after `calibrate_rejection`, shares of own samples `accepted` and of others
            `rejected` at its threshold.
    """

    labels: list[str]
    groups: list[str]
    accuracy: float
    parent_restricted_accuracy: float
    controls: dict[str, float | None]
    samples: int
    parameters: int
    parent_parameters: int
    megabytes: float
    parent_megabytes: float
    macs: int
    parent_macs: int
    neuron_retention_rate: float
    weight_retention_rate: float
    latency_ms: dict[str, float]
    parent_latency_ms: dict[str, float]
    device: str
    input_shape: list[int]
    threshold: float
    seed: int
    rejection: dict[str, float | None]

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain data for JSON."""
        return asdict(self)


def evaluate_module(
    parent: NeMoPreTrainedModel,
    labels: LabelLike | Sequence[LabelLike],
    batches: Iterable[Mapping[str, Any]],
    module: NeMoPreTrainedModel | None = None,
    threshold: float | None = None,
    round_to: int | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> ModuleReport:
    """Measures a module and its controls on the samples that have its labels.

    Args:
        parent: The parent.
        labels: Label ids, label names or group names.
        batches: Batches of model inputs with `labels`, of data that chose nothing.
        module: The module, if it is cut already; `None` cuts it. It carries the report from then on.
        threshold: As in `extract_module`.
        round_to: As in `extract_module`.
        seed: Seed of the random and other control.
        show_progress: Whether to show a progress bar.

    Returns:
        The report.

    Raises:
        ValueError: If the labels make no module, or no sample has one of them.
    """
    plan = make_plan(parent, labels, threshold, round_to)
    if module is None:
        module = extract_module(parent, labels, threshold, round_to)
    masks = {"empty": [_empty_masks(parent)], "random": random_masks(plan.static, parent, seed)}
    other = other_groups(parent, plan.groups, seed)
    if other:
        try:
            masks["other"] = [make_plan(parent, other, plan.threshold, round_to).static]
        except ValueError:  # these groups open no neuron at all
            masks["other"] = masks["empty"]
    module.to(parent.device)  # type: ignore[arg-type]
    with as_saved(parent, module):
        right, samples, known = _count_right(parent, module, plan.label_ids, masks, batches, show_progress)
    if not samples:
        raise ValueError(
            f"Got evaluation data without a sample of the labels {plan.label_ids}; expected at least one. "
            "Pass data that has these labels."
        )
    controls = {name: right[name] / samples / len(draws) for name, draws in masks.items()}
    latencies = measure_latency(parent, module)
    bytes_each = [sum(p.numel() * p.element_size() for p in m.model.parameters()) for m in (module, parent)]
    parameters = [base_parameters(m) for m in (module, parent)]
    names = parent.config.names
    report = ModuleReport(
        labels=[names[index] for index in plan.label_ids],
        groups=plan.groups,
        accuracy=right["module"] / samples,
        parent_restricted_accuracy=right["parent"] / samples,
        controls={name: controls.get(name) for name in ("random", "other", "empty")},
        samples=samples,
        parameters=parameters[0],
        parent_parameters=parameters[1],
        megabytes=bytes_each[0] / 1e6,
        parent_megabytes=bytes_each[1] / 1e6,
        macs=count_macs(module),
        parent_macs=count_macs(parent),
        neuron_retention_rate=plan.retained,
        weight_retention_rate=parameters[0] / parameters[1],
        latency_ms=latencies[0],
        parent_latency_ms=latencies[1],
        device=device_name(parent.device),
        input_shape=list(random_inputs(module)[module.main_input_name].shape[1:]),
        threshold=plan.threshold,
        seed=seed,
        rejection=_rejection(module, *known),
    )
    module.report = report.to_dict()
    return report


@torch.no_grad()
def measure_modularity(
    parent: NeMoPreTrainedModel, batches: Iterable[Mapping[str, Any]], most: int
) -> dict[str, float | int | None]:
    """Measures how alike the masks of samples are, within groups and between them.

    Args:
        parent: The parent.
        batches: Batches of model inputs with `labels`, on the parent's device.
        most: Number of samples after which no further batch is read.

    Returns:
        `cohesion`, `coupling` (`None` without such pairs) and the number of `modularity_samples`; nothing if
        the batches have no labels.
    """
    opened: list[Tensor] = []
    groups: list[Tensor] = []
    group_of_label = group_indices(parent)
    for batch in batches:
        inputs = dict(batch)
        if "labels" not in inputs or sum(len(part) for part in groups) >= most:
            break
        groups.append(sample_groups(parent, inputs.pop("labels"), group_of_label))
        masks = parent(**inputs, output_neuron_masks=True).neuron_masks
        opened.append(torch.cat([(mask > 0).any(1) for mask in masks.values()], -1))
    if not opened:
        return {}
    samples = sum(len(part) for part in groups)
    logger.info("Cohesion and coupling are measured over %d samples.", samples)
    cohesion, coupling = cohesion_and_coupling(torch.cat(opened), torch.cat(groups))
    return {"cohesion": cohesion, "coupling": coupling, "modularity_samples": samples}


@torch.no_grad()
def _count_right(
    parent: NeMoPreTrainedModel,
    module: NeMoPreTrainedModel,
    label_ids: Sequence[int],
    masks: Mapping[str, Sequence[Mapping[str, Tensor]]],
    batches: Iterable[Mapping[str, Any]],
    show_progress: bool,
) -> tuple[dict[str, float], int, tuple[Tensor, Tensor]]:
    """Counts right answers of the module, the parent restricted, and the parent under control masks.

    Returns also the energies of the module's answers to all samples, and which samples have its labels.
    """
    wanted = torch.tensor(label_ids, device=parent.device)
    right = dict.fromkeys(["module", "parent", *masks], 0.0)
    samples = 0
    energies, is_own = [torch.zeros(0)], [torch.zeros(0, dtype=torch.bool)]
    for batch in tqdm(batches, desc="Module", disable=not show_progress):
        if "labels" not in batch:
            raise ValueError(
                f"Got a batch with {sorted(batch)}; expected 'labels' in it. Add a label column to the data."
            )
        labels = batch["labels"].to(parent.device)
        check_label_shape(labels, parent.config.has_several_labels)
        has_several = parent.config.has_several_labels
        chosen = torch.ones(len(labels), dtype=torch.bool) if has_several else torch.isin(labels, wanted)
        inputs = {k: v.to(parent.device) for k, v in batch.items() if k != "labels" and isinstance(v, Tensor)}
        logits = module(**inputs).logits
        energies.append(energy(logits, has_several).cpu())
        is_own.append(own_samples(module, labels).cpu())
        if not chosen.any():
            continue
        inputs = {name: values[chosen] for name, values in inputs.items()}
        labels = labels[chosen]
        samples += len(labels)
        answers = [("module", logits[chosen]), ("parent", parent(**inputs).logits[:, wanted])]
        for name, draws in masks.items():
            answers += [(name, parent(**inputs, static_masks=mask).logits[:, wanted]) for mask in draws]
        for name, logits in answers:
            if has_several:
                right[name] += ((logits > 0) == (labels[:, wanted] > 0)).float().mean(-1).sum().item()
            else:
                right[name] += int((wanted[logits.argmax(-1)] == labels).sum())
    return right, samples, (torch.cat(energies), torch.cat(is_own))


def _rejection(module: NeMoPreTrainedModel, energies: Tensor, is_own: Tensor) -> dict[str, float | None]:
    """How well a module tells its own samples from others."""
    found = {"auroc": auroc(energies, is_own), "accepted": None, "rejected": None}
    fit = module.config.rejection
    if fit:
        is_rejected = score_energies(energies, fit) > fit["threshold"]
        found["accepted"] = 1 - is_rejected[is_own].float().mean().item()
        found["rejected"] = None if bool(is_own.all()) else is_rejected[~is_own].float().mean().item()
    return found


def _empty_masks(parent: NeMoPreTrainedModel) -> dict[str, Tensor]:
    return {site.key: torch.zeros(site.neurons) for site in parent.sites}


def random_masks(static: Mapping[str, Tensor], parent: NeMoPreTrainedModel, seed: int) -> list[dict[str, Tensor]]:
    """Draws the masks of the random control.

    Args:
        static: Site key to a module's static mask, shape (neurons,).
        parent: The parent.
        seed: Seed of the draws.

    Returns:
        Masks with as many open neurons in each part of each site.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(RANDOM_DRAWS):
        masks = {}
        for site in parent.sites:
            parts = static[site.key].split(list(site.parts.values()))
            masks[site.key] = torch.cat([p[torch.randperm(len(p), generator=generator)] for p in parts])
        drawn.append(masks)
    return drawn


def other_groups(parent: NeMoPreTrainedModel, groups: Sequence[str], seed: int) -> list[int]:
    """Draws the groups of the other control.

    Args:
        parent: The parent.
        groups: Names of a module's groups.
        seed: Seed of the draw.

    Returns:
        Label ids of as many groups as given, or fewer, from all the others.
    """
    others = {name: ids for name, ids in parent.config.groups.items() if name not in groups}
    chosen = random.Random(seed).sample(sorted(others), min(len(groups), len(others)))  # noqa: S311
    return [index for name in chosen for index in others[name]]


def format_table(reports: Sequence[Mapping[str, Any]]) -> str:
    """Renders module reports as a table for a terminal.

    Args:
        reports: Reports as `ModuleReport.to_dict` gives them.

    Returns:
        Lines of text: one row a module.
    """
    header = ["module", "neurons", "weights", "parameters", "MB", "MACs"]
    header += ["raw acc", "parent", "random", "other", "empty", "ms b1/b8/b32"]
    rows = [header]
    for report in reports:
        names = [str(name) for name in report["labels"]]
        label = ",".join(names) if len(",".join(names)) <= 24 else f"{'+'.join(report['groups'])[:24]}"
        times = "/".join(f"{value:.1f}" for value in report["latency_ms"].values())
        parent_times = "/".join(f"{value:.1f}" for value in report["parent_latency_ms"].values())
        controls = report["controls"]
        rows.append(
            [
                label,
                f"{report['neuron_retention_rate']:.2f}",
                f"{report['weight_retention_rate']:.2f}",
                f"{report['parameters']:,}",
                f"{report['megabytes']:.2f} of {report['parent_megabytes']:.2f}",
                f"{report['macs'] / report['parent_macs']:.2f}",
                f"{report['accuracy']:.3f}",
                f"{report['parent_restricted_accuracy']:.3f}",
                *("-" if controls[name] is None else f"{controls[name]:.3f}" for name in ("random", "other", "empty")),
                f"{times} of {parent_times}",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
