"""Evaluates a module on its labels: accuracy beside controls, size, operations, latency and rejection."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from nemo_hf.config import LabelLike, resolve_labels
from nemo_hf.models.base import NeMoPreTrainedModel, base_parameters
from nemo_hf.models.batches import labelled_batches, select_samples
from nemo_hf.models.cut_source import static_parent
from nemo_hf.models.equivalence import as_saved
from nemo_hf.models.extraction import ModulePlan, extract_module, make_plan
from nemo_hf.models.finiteness import check_finite, check_outputs
from nemo_hf.models.labels import check_answers_once, group_indices, group_membership, sample_groups
from nemo_hf.models.plain_checks import label_names
from nemo_hf.models.rejection import energy, rejection_scores
from nemo_hf.models.rejection_calibration import auroc, own_samples
from nemo_hf.models.weight_files import size_in_bytes
from nemo_hf.neurons.trial_inputs import random_inputs
from nemo_hf.pruning.plan import is_relevant

from .latency import LATENCY_BATCHES, count_macs, measure_latency
from .metrics import LibraryMetrics, MetricLike, cohesion_and_coupling

RANDOM_DRAWS = 5
CONTROLS = ("random", "other", "empty")
COLUMNS = {  # of a table of reports, with the widths of their cells; times are the parent's over the module's
    "samples": 7, "accuracy": 8, "parent": 6, **dict.fromkeys(CONTROLS, 6), "AUROC": 5, "neurons": 7, "weights": 7,
    "MB": 16, "MACs": 4, f"speed-up {'/'.join(f'b{size}' for size in LATENCY_BATCHES)}": 18,
}  # fmt: skip


@dataclass(frozen=True)
class ModuleReport:
    """Measurements of a module, for a table or JSON.

    Args:
        labels: Names of the module's labels, in the order of its outputs.
        groups: Names of the label groups that it was cut for.
        accuracy: Share of right answers of the module, without fine-tuning. Where a sample may have several
            labels, an answer is the yes or no to one label of the module, over all samples.
        parent_restricted_accuracy: The same of the parent, its answers restricted to `labels`.
        controls: The same of the parent under other static masks: `random` (mean of 5 masks with as many neurons in
            each part of each site), `other` (of up to as many other groups), `empty` (no neuron); `None` where there
            are no such masks.
        samples: Number of samples with these labels; all of them where a sample may have several labels.
        parameters: Of the module; `parent_parameters` of the parent without generators.
        megabytes: 10^6 bytes of the module's parameters; `parent_megabytes` likewise.
        macs: Multiply-accumulates for one sample; `parent_macs` likewise.
        neuron_retention_rate: Kept neurons over neurons; `weight_retention_rate`: parameters over the parent's.
        latency_ms: Milliseconds of a batch by its size, the lower quartile of repeated runs; `parent_latency_ms` of
            the plain model inside the parent. Sizes whose ratio of the two does not repeat within 5 % are left out.
        device: Name of the device of the latency, a CPU's with its threads.
        input_shape: Shape of the sample whose latency and operations these are.
        threshold: Of the module's plan.
        seed: Of the controls.
        rejection: `auroc` of telling samples of the module's labels from others by its energy (`None` without others);
            after `calibrate_rejection`, shares of own samples `accepted` and of others `rejected` at its threshold.
        latency_note: Which batch sizes `latency_ms` leaves out, and why; `None` if none.
        metrics: Metrics of the library `evaluate` that were asked for; `parent_metrics` of the restricted parent.
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
    latency_note: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    parent_metrics: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain data for JSON."""
        return asdict(self)


def evaluate_module(
    parent: PreTrainedModel,
    labels: LabelLike | Sequence[LabelLike],
    batches: Iterable[Mapping[str, Any]],
    module: NeMoPreTrainedModel | None = None,
    threshold: float | None = None,
    round_to: int | None = None,
    seed: int = 0,
    show_progress: bool = True,
    metrics: MetricLike | None = None,
    quick: bool = False,
) -> ModuleReport:
    """Evaluates a module and its controls on the samples that have its labels.

    Args:
        parent: The parent, or with `module` the plain model that it was cut from.
        labels: Label ids, label names or group names; with `module` those of the module.
        batches: Batches of model inputs with `labels`, the parent's label ids, of held-out data.
        module: The module, if it is cut already; `None` cuts it. It carries the report from then on. Of one that was
            cut on calibration samples the controls `random` and `other` are `None`: relevance didn't choose its
            neurons.
        threshold: As in `extract_module`; with `module` that of the module counts.
        round_to: As in `extract_module`; with `module` that of the module counts.
        seed: Seed of the random and other control.
        show_progress: Whether to show a progress bar.
        metrics: Names of metrics of the library `evaluate`, or paths of metric scripts; or keyword arguments of
            their `compute` by name, as in `{"f1": {"average": "macro"}}`. They get ids of the module's labels,
            0 for the first, or 0 and 1 for each label where a sample may have several.
        quick: Whether to leave the controls out, and to take times of single samples alone.

    Returns:
        The report.

    Raises:
        ValueError: If the labels make no module, `module` is not the parent's module for these labels and options, or
            missing beside a plain model, no sample has one of the labels, a metric can't be computed, or weights or
            logits are not finite.
        ImportError: If `metrics` are given without the package `evaluate`, or one that a metric needs.
        OSError: If a metric can't be loaded.
    """
    if not isinstance(parent, NeMoPreTrainedModel):
        if module is None:
            raise ValueError(
                f"Got a {type(parent).__name__} without module; expected a module of it. Pass module=extract_module("
                "model, labels, calibration=...), or a parent."
            )
        parent = static_parent(parent)
    check_answers_once(parent)
    library_metrics = LibraryMetrics(metrics, parent.config.has_several_labels)
    if module is None:
        module = extract_module(parent, labels, threshold, round_to)
    check_finite(parent)
    check_finite(module)
    plan = _plan_of(module, parent, labels, threshold=threshold, round_to=round_to)
    empty = [{site.key: torch.zeros(site.neurons) for site in parent.sites}]
    masks = {} if quick else {"empty": empty}
    groups = list(module.config.groups)
    if plan is not None and not quick:
        masks["random"] = random_masks(plan.static, parent, seed)
    if plan is not None and not quick and (other := other_groups(parent, groups, seed)):
        try:
            masks["other"] = [make_plan(parent, other, plan.threshold, plan.round_to).static]
        except ValueError:  # these groups open no neuron at all
            masks["other"] = empty
    module.to(parent.device)  # type: ignore[arg-type]
    with as_saved(parent, module) as saved:
        progress = tqdm(batches, desc="Module", leave=False, disable=not show_progress)
        answers, right, energies, is_own = _collect_answers(saved[0], saved[1], masks, progress)
        computed = [library_metrics.compute(answers[name][0], right) for name in ("module", "parent")]
        latency = measure_latency(saved[0], saved[1], LATENCY_BATCHES[:1] if quick else LATENCY_BATCHES)
    accuracy = {name: (found == right).double().mean().item() for name, found in answers.items()}
    sizes: dict[str, Any] = {}
    for prefix, model in (("", module), ("parent_", parent)):
        sizes[f"{prefix}parameters"] = base_parameters(model)
        sizes[f"{prefix}megabytes"] = size_in_bytes(model.model.parameters()) / 1e6
        sizes[f"{prefix}macs"] = count_macs(model)
    report = ModuleReport(
        labels=list(module.config.names.values()),
        groups=groups,
        accuracy=accuracy["module"],
        parent_restricted_accuracy=accuracy["parent"],
        controls={name: accuracy.get(name) for name in CONTROLS},
        samples=len(right),
        neuron_retention_rate=(module.config.retained_neurons or 0.0) if plan is None else plan.retained,
        weight_retention_rate=sizes["parameters"] / sizes["parent_parameters"],
        latency_ms=latency.milliseconds["module"],
        parent_latency_ms=latency.milliseconds["parent"],
        latency_note=latency.note,
        device=latency.device,
        input_shape=list(random_inputs(module)[module.main_input_name].shape[1:]),
        threshold=module.config.relevance_threshold or 0.0,
        seed=seed,
        rejection=_rejection(module, energies, is_own),
        metrics=computed[0],
        parent_metrics=computed[1],
        **sizes,
    )
    module.report = report.to_dict()
    return report


def _plan_of(module: NeMoPreTrainedModel, parent: NeMoPreTrainedModel, labels: Any, **given: Any) -> ModulePlan | None:
    """The plan by which a module was cut from its parent, or a `ValueError` if it can't have been.

    `None` for one that was cut on calibration samples: relevance doesn't tell its neurons.
    """
    own = module.config
    if module.is_parent:
        raise ValueError("Got a parent as module; expected a module. Cut one with extract_module(labels).")
    own_names, own_ids = list(own.names.values()), own.label_ids or []
    ids, _ = resolve_labels(labels, {**own.groups, **parent.config.groups}, parent.config.names)
    options: dict[str, Any] = {"threshold": own.relevance_threshold, "round_to": own.round_to}
    differing = [f"{name}={value!r}" for name, value in given.items() if value not in (None, options[name])]
    if sorted(ids) != sorted(own_ids) or differing:
        raise ValueError(
            f"Got {', '.join(differing) or f'{labels=}'} and a module of {own_names} cut with {options}; expected the "
            "module's own labels and options. Leave the others out, or leave module out to cut another."
        )
    is_same = may_come_from(module, parent)
    plan = make_plan(parent, own_ids, **options) if own.extraction is None else None
    if is_same and plan is not None:
        kept = {entry["key"]: entry.get("kept", plan.counts.get(entry["key"])) for entry in own.sites or []}
        is_same = kept == plan.counts and own.retained_neurons in (None, plan.retained)
    if not is_same:
        raise ValueError(
            f"Got a module of {own_names} with other labels, layers or neurons than this parent's relevance says; "
            "expected a module of this parent as it is now. Load the parent that it was cut from, or cut it anew."
        )
    return plan


def may_come_from(module: NeMoPreTrainedModel, origin: PreTrainedModel) -> bool:
    """Whether a module can have been cut from a parent or plain model: one of its class, with its labels."""
    own = module.config
    if isinstance(origin, NeMoPreTrainedModel):
        base_class, names = origin.config.base_class if origin.is_parent else None, origin.config.names
    else:
        base_class, names = type(origin).__name__, label_names(origin)
    return base_class == own.base_class and list(own.names.values()) == [
        names.get(each) for each in own.label_ids or ()
    ]


@torch.no_grad()
def _collect_answers(
    parent: NeMoPreTrainedModel,
    module: NeMoPreTrainedModel,
    masks: Mapping[str, Sequence[Mapping[str, Tensor]]],
    batches: Iterable[Mapping[str, Any]],
) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """Runs the module, its parent, and the parent under control masks, on the samples that have the module's labels.

    Returns answers as ids of the module's labels, (draws, samples), or 0 and 1 for each, (draws, samples, labels), by
    what answered; the right ones without draws; and of all samples the module's energies and which are its own.
    """
    wanted = torch.tensor(module.config.label_ids, device=parent.device)
    has_several, names = parent.config.has_several_labels, list(module.config.names.values())
    answers: dict[str, list[Tensor]] = {name: [] for name in ("module", "parent", *masks)}
    right, energies, is_own = [], [], []
    for inputs, labels, numbers in labelled_batches(parent, batches):
        logits = module.own_logits(**inputs)
        check_outputs(module, inputs, logits, names, numbers)
        own = own_samples(module, labels)
        energies.append(energy(logits, has_several).cpu())
        is_own.append(own.cpu())
        chosen = torch.ones_like(own) if has_several else own
        if not chosen.any():
            continue
        inputs, labels = select_samples(inputs, chosen), labels[chosen]
        numbers = [number for number, is_chosen in zip(numbers, chosen.tolist(), strict=True) if is_chosen]
        found = labels[:, wanted] if has_several else (labels[:, None] == wanted).int().argmax(-1)
        right.append(found.long().cpu())
        runs = {"module": [logits[chosen]], "parent": [parent(**inputs, return_dict=True).logits[:, wanted]]}
        for name, draws in masks.items():
            runs[name] = [parent(**inputs, static_masks=mask, return_dict=True).logits[:, wanted] for mask in draws]
        for name, outputs in runs.items():
            drawn = torch.stack(outputs)
            check_outputs(parent, inputs, torch.cat(outputs, -1), len(outputs) * names, numbers)
            answers[name].append((drawn > 0 if has_several else drawn.argmax(-1)).long().cpu())
    if not right:
        raise ValueError(f"Got data without a sample of the labels {names}; expected at least one. Pass data with one.")
    joined = {name: torch.cat(parts, 1) for name, parts in answers.items()}
    return joined, torch.cat(right), torch.cat(energies), torch.cat(is_own)


@torch.no_grad()
def measure_modularity(
    parent: NeMoPreTrainedModel, batches: Iterable[Mapping[str, Any]], most: int
) -> dict[str, float | int | None]:
    """Measures `cohesion` and `coupling` (`None` without such pairs) over `modularity_samples`, about `most`.

    Where masks don't depend on the sample, a sample's mask is that of its groups.
    """
    opened, groups, samples = [], [], 0
    group_of_label = group_indices(parent)
    kept = is_relevant(
        torch.cat([*parent.parent_masks().relevance().values()], -1), parent.nemo_config.relevance_threshold
    )
    with as_saved(parent) as (parent,):
        for inputs, labels, numbers in labelled_batches(parent, batches):
            groups.append(sample_groups(labels, group_of_label, len(parent.config.groups)))
            outputs = parent(**inputs, output_neuron_masks=True, return_dict=True)
            masks = outputs.neuron_masks
            check_outputs(parent, inputs, outputs.logits, list(parent.config.names.values()), numbers, masks)
            if masks is None:
                is_of = group_membership(labels, group_of_label, len(kept))  # (batch, groups)
                opened.append((is_of.float() @ kept.float()) > 0)
            else:
                opened.append(torch.cat([(mask > 0).any(1) for mask in masks.values()], -1))
            samples += len(labels)
            if samples >= most:
                break
    if not samples:
        raise ValueError("Got data without a sample that has a label; expected some. Pass data with labels.")
    cohesion, coupling = cohesion_and_coupling(torch.cat(opened), torch.cat(groups))
    return {"cohesion": cohesion, "coupling": coupling, "modularity_samples": samples}


def _rejection(module: NeMoPreTrainedModel, energies: Tensor, is_own: Tensor) -> dict[str, float | None]:
    """How well a module tells its own samples from others."""
    found = {"auroc": auroc(energies, is_own), "accepted": None, "rejected": None}
    if fit := module.config.rejection:
        is_rejected = rejection_scores(energies, fit) > fit["threshold"]
        for name, decided in (("accepted", ~is_rejected[is_own]), ("rejected", is_rejected[~is_own])):
            found[name] = decided.float().mean().item() if len(decided) else None
    return found


def random_masks(static: Mapping[str, Tensor], parent: NeMoPreTrainedModel, seed: int) -> list[dict[str, Tensor]]:
    """Draws masks with as many open neurons in each part of each site as a module's static masks have."""
    generator = torch.Generator().manual_seed(seed)

    def shuffled(key: str, sizes: Iterable[int]) -> Tensor:
        parts = static[key].split(list(sizes))
        return torch.cat([part[torch.randperm(len(part), generator=generator)] for part in parts])

    return [{site.key: shuffled(site.key, site.parts.values()) for site in parent.sites} for _ in range(RANDOM_DRAWS)]


def other_groups(parent: NeMoPreTrainedModel, groups: Sequence[str], seed: int) -> list[int]:
    """Draws as many groups as given, or all others if these are fewer; returns their label ids."""
    unseen = set(parent.config.unseen_labels or ())
    others = {name: ids for name, ids in parent.config.groups.items() if name not in groups and not unseen >= set(ids)}
    chosen = random.Random(seed).sample(sorted(others), min(len(groups), len(others)))  # noqa: S311
    return [index for name in chosen for index in others[name]]


def format_table(reports: Sequence[Mapping[str, Any]]) -> str:
    """Renders reports, as `ModuleReport.to_dict` gives them, as a table for a terminal with a row for each module."""
    names = [",".join(map(str, report["labels"])) for report in reports]
    by_name = zip(names, reports, strict=True)
    names = [name if len(name) <= 24 else "+".join(report["groups"])[:24] for name, report in by_name]
    width = max(map(len, names), default=0)
    return "\n".join([table_head(width), *map(partial(table_row, width=width), names, reports)])


def table_head(width: int) -> str:
    """The head of a table whose rows `table_row` renders one by one, with names of up to `width` letters."""
    names = ("module".ljust(width), *(name.ljust(size) for name, size in COLUMNS.items()))
    return "\n".join(["  ".join(names).rstrip(), "  ".join("-" * len(name) for name in names)])


def table_row(name: str, report: Mapping[str, Any], width: int) -> str:
    """The row of a module of some name."""
    times = [[report[name].get(str(n)) for n in LATENCY_BATCHES] for name in ("latency_ms", "parent_latency_ms")]
    shares = [report["accuracy"], report["parent_restricted_accuracy"], *map(report["controls"].get, CONTROLS)]
    cells = [
        str(report["samples"]),
        *("-" if share is None else f"{share:.3f}" for share in (*shares, report["rejection"]["auroc"])),
        f"{report['neuron_retention_rate']:.2f}",
        f"{report['weight_retention_rate']:.2f}",
        f"{report['megabytes']:.2f} of {report['parent_megabytes']:.2f}",
        f"{report['macs'] / report['parent_macs']:.2f}",
        "/".join("-" if None in pair else f"{pair[1] / pair[0]:.1f}" for pair in zip(*times, strict=True)),
    ]
    sizes = (max(width, len("module")), *COLUMNS.values())
    return "  ".join(cell.ljust(size) for cell, size in zip([name, *cells], sizes, strict=True)).rstrip()


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Cells in columns for a terminal, with a line under the first row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
