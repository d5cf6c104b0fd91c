"""What each command of `nemo-hf` does with its options."""

import json
from argparse import Namespace
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nemo_hf.config import LabelLike, NeMoConfig, resolve_labels
from nemo_hf.evaluation.report import aligned, evaluate_module, table_head, table_row
from nemo_hf.hub.publish import CARD_NAME, CardOptions, push_model, push_modules, write_companions
from nemo_hf.hub.report_page import PAGE_NAME
from nemo_hf.models.atomic_writes import write_json
from nemo_hf.models.base import NeMoPreTrainedModel, base_parameters
from nemo_hf.models.calibrated_cut import extract_module
from nemo_hf.models.calibration_inputs import input_kind
from nemo_hf.models.configuration import PLACE_TASKS, task_of
from nemo_hf.models.cut_saved import saved_processor
from nemo_hf.models.files import find_file
from nemo_hf.models.privacy import clean, hub_name, is_repository
from nemo_hf.models.pruning_modes import make_parent
from nemo_hf.neurons.mask_hooks import GeneratedMask
from nemo_hf.neurons.proposals import propose_sites

from .data import load_samples
from .demo import format_demo, run_demo
from .models import (
    known_names,
    labels_of,
    load,
    load_any,
    load_batches,
    load_plain,
    names_of,
    read_config,
    read_own_config,
)

QUICK_SAMPLES = 1000  # most that `evaluate --quick` measures on
ALONE = {"path", "repo_id", "parent_repo", "dry_run"}  # options of `push` for one model
BY_RELEVANCE = {"threshold", "round_to"}  # options of `cut` without samples
ON_SAMPLES = {"retention", "max_loss", "validation_split", "vocabulary", "max_positions", "refine_epochs", "samples",
              "scores", "cost", "drop_parts", "stream", "label_column", "input_column", "no_reconstruct",
              "trust_remote_code"}  # fmt: skip
CUTS = "expected a parent with what training found, or samples"
TOGETHER = {"parent", "namespace", "name", "modules", "calibration_split", "cut_split", "retention", "threshold",
            "round_to", "compare_formats"}  # fmt: skip


def demo(options: Namespace) -> None:
    """Runs the demo and prints its report."""
    report = run_demo(options.output_dir, options.seed, options.epochs)
    files = f"plain/, parent/, modules/, report.json, modules.png, {PAGE_NAME}"
    print(f"\n{format_demo(report)}\n\n{options.output_dir}: {files}")


def cut(options: Namespace) -> None:
    """Cuts modules out of a plain model or a parent, saves them and prints a table."""
    _check_apart(options.model, options.output_dir)
    given = {name: value for name, value in vars(options).items() if value not in (None, False)}
    wrong = sorted((BY_RELEVANCE if options.dataset else ON_SAMPLES) & given.keys())
    if wrong:
        do = "Leave them out" + ("." if options.dataset else ", or name samples with --dataset.")
        words = [f"--{name.replace('_', '-')}" for name in wrong]
        raise ValueError(f"Got {' '.join(words)} {'with' if options.dataset else 'without'} --dataset; {CUTS}. {do}")
    if not options.dataset:
        labels = _one_module(options.labels, known_names(read_own_config(options.model)))
        module = load(options.model, labels=labels, threshold=options.threshold, round_to=options.round_to)
        module.save_pretrained(options.output_dir)
        names, share = list(module.config.names.values()), module.config.retained_neurons
        print(f"{options.output_dir}: {names}, {base_parameters(module):,} parameters, {share:.1%} of the neurons")
        return
    modules: list[Any] = _cut_on_samples(options)
    cost = options.cost or "weights"
    rows = [["directory", "asked for", cost, "neurons", "MB", "of the source", "seconds", "error", "uncorrected",
             "accuracy", "source"]]  # fmt: skip
    for each in modules:
        done, folder = each.config.extraction, Path(options.output_dir)
        folder = folder / f"{done['retention']:g}" if len(modules) > 1 else folder
        each.save_pretrained(folder)
        shares = ["-" if done["retention"] is None else f"{done['retention']:g}", f"{done[cost]:.3f}"]
        size = [f"{done['bytes'] / 1e6:.2f}", f"{done['bytes'] / done['source_bytes']:.0%}", f"{done['seconds']:.1f}"]
        errors = [f"{done[name]:.3g}" if name in done else "-" for name in ("distance", "cut_distance")]
        found = [done.get("validation", {}).get(name) for name in ("accuracy", "source_accuracy")]
        shares.append(f"{done['neurons']:.3f}")
        rows.append([str(folder), *shares, *size, *errors, *("-" if each is None else f"{each:.3f}" for each in found)])
    names, samples = list(modules[0].config.names.values()), modules[0].config.extraction["samples"]
    print(f"{names}, cut on {samples} samples; errors: mean squares of the logits' differences\n\n{aligned(rows)}")


def _cut_on_samples(options: Namespace) -> list[NeMoPreTrainedModel]:
    """Loads a model and samples, and cuts a module for each retention."""
    model = load_any(options.model, **({"trust_remote_code": True} if options.trust_remote_code else {}))
    named = ("max_loss", "max_positions", "refine_epochs", "scores", "cost", "drop_parts", "stream", "vocabulary")
    chosen = {name: getattr(options, name) for name in named} | {"max_samples": options.samples}
    retention = options.retention if len(options.retention or ()) > 1 else next(iter(options.retention or ()), None)
    read = partial(_samples, options, model, model.config)
    modules = extract_module(
        model.to("cuda" if torch.cuda.is_available() else "cpu"),
        _one_module(options.labels, known_names(model.config)),
        read(options.split),
        retention,
        processing_class=saved_processor(model, options.model),
        validation=options.validation_split and read(options.validation_split),
        reconstruct=not options.no_reconstruct,
        **{name: value for name, value in chosen.items() if value is not None},
    )
    return modules if isinstance(modules, list) else [modules]


def _samples(options: Namespace, model: Any, config: Any, split: str) -> Any:
    """A split of `--dataset` as raw samples for a model, with labels of a configuration."""
    names, columns = list(names_of(config).values()), (options.label_column, options.input_column)
    return load_samples(options.dataset, split, input_kind(model), names, *columns)


def _cutter(options: Namespace, parent: NeMoPreTrainedModel) -> Callable[[Any], NeMoPreTrainedModel] | None:
    """What cuts modules of a parent on samples, if it trained none or the options say so; `None` is by relevance."""
    by_relevance = options.threshold is not None or options.round_to is not None
    on_samples = options.cut_split is not None or options.retention is not None
    if by_relevance and on_samples:
        raise ValueError(
            "Got --threshold or --round-to for a cut by relevance, and --cut-split or --retention for one on samples; "
            "expected one kind. Leave the other out."
        )
    if by_relevance or (parent.nemo_config.trains_modules and not on_samples):
        return None
    if not options.dataset:
        raise ValueError(
            "Got no --dataset; expected one, since these modules are cut on samples: the parent trained none, or "
            "--cut-split or --retention says so. Name it."
        )
    samples = _samples(options, parent, parent.config, options.cut_split or "train")
    processor = saved_processor(parent, options.parent)
    return lambda labels: extract_module(
        parent, labels, samples, options.retention, processing_class=processor, show_progress=False
    )


def export(options: Namespace) -> None:
    """Writes a module in another format and prints what changed."""
    _check_apart(options.module, options.output_dir)
    chosen = {"quantize": options.quantize, "min_agreement": options.min_agreement, "calibration": options.dataset}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if options.format == "plain" and chosen:
        raise ValueError(
            f"Got {', '.join(chosen)} for a plain model, which is exact; expected --format onnx or openvino. Name one."
        )
    module = load(options.module)
    if options.format == "plain":
        plain = module.save_plain(options.output_dir)
        sizes = f"{plain.parameters:,} parameters (module: {plain.module_parameters:,}), changed: {plain.changes}"
    else:
        if options.dataset:
            known = module.config.base_config  # all labels, as the data may have
            chosen["calibration"] = _samples(options, module, known, options.split)
        found = (module.export_onnx if options.format == "onnx" else module.export_openvino)(
            options.output_dir, **chosen
        )
        sizes = f"inputs {found.inputs}, outputs {found.outputs}, difference {found.difference:.1e}, {found.bytes:,} B"
        if (same := found.agreement) is not None:
            of = "random inputs" if same.are_random else "samples"
            sizes += f", the module's answer on {same.agreement:.1%} of {same.samples} {of}"
    print(f"{options.output_dir}: {sizes}")


def evaluate(options: Namespace) -> None:
    """Measures modules and prints a table."""
    if options.output and Path(options.output).is_dir():
        raise IsADirectoryError(f"Got --output {options.output}, which is a directory; expected a file. Name one.")
    if options.output:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)  # now, and not after the measurements
    if bool(options.labels) == bool(options.modules):
        raise ValueError(
            "Got both or none of --labels and --modules; expected one. Name labels to cut by relevance, or saved "
            "modules."
        )
    if options.modules and (options.cut_split or options.retention is not None):
        raise ValueError(
            "Got --cut-split or --retention with --modules, which are cut already; expected them with --labels. Leave "
            "them out."
        )
    parent = load_any(options.parent)
    if options.labels and not isinstance(parent, NeMoPreTrainedModel):
        raise ValueError(
            f"Got --labels for {options.parent}, a plain model; expected a parent, or modules of it. Cut some with "
            "nemo-hf cut, and name them with --modules."
        )
    parent.to("cuda" if torch.cuda.is_available() else "cpu")
    known = known_names(parent.config)
    asked: dict[str, Any] = {word: labels_of(word, known) for word in options.labels or ()}
    for labels in asked.values():
        resolve_labels(labels, getattr(parent.config, "groups", {}), names_of(parent.config))
    asked |= {path: list(read_own_config(path).names.values()) for path in options.modules or ()}
    loader = load_batches(options, options.split, parent, QUICK_SAMPLES if options.quick else None)
    cut = {"threshold": options.threshold, "round_to": options.round_to, "quick": options.quick}
    measure = partial(evaluate_module, parent, batches=loader, metrics=options.metrics)
    on_samples = _cutter(options, parent) if options.labels else None
    width, reports = max(map(len, asked)), []
    print(table_head(width), flush=True)
    for name, labels in asked.items():
        module = load(name) if options.modules else on_samples and on_samples(labels)
        report = measure(labels, module=module, **cut).to_dict()
        print(table_row(name, report, width), flush=True)
        reports.append(report)
    for name, report in zip(asked, reports, strict=True) if options.metrics else ():
        print(f"{name}: {report['metrics']}, parent: {report['parent_metrics']}")
    if options.output:
        write_json(options.output, clean(reports))


def push(options: Namespace) -> None:
    """Uploads one model, or a parent with modules of it."""
    given = {name for name in ALONE | TOGETHER if str(getattr(options, name)) not in ("None", "False", "[]")}
    is_alone = given <= ALONE and {"path", "repo_id"} <= given
    if not is_alone and not (given <= TOGETHER and {"parent", "namespace"} <= given):
        words = sorted("DIR" if name == "path" else f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(
            f"Got {' '.join(words) or 'no options'}; expected one of the two uses that nemo-hf push --help shows. "
            "Leave the options of the other use out."
        )
    if not options.dataset and (options.calibration_split or options.compare_formats):
        raise ValueError(
            "Got no --dataset; expected one. Name it, or leave --calibration-split and --compare-formats out."
        )
    for name in filter(None, (options.repo_id, options.parent_repo)):
        if not is_repository(name):
            raise ValueError(f"Got {name!r}; expected the name of a Hub repository, such as me/cat-dog. Correct it.")
    measured = (hub_name(options.dataset), options.split) if hub_name(options.dataset) else (None, None)
    page: str | bool = True if options.report_page == "" else options.report_page or False
    if page and not is_alone and page is not True:
        raise ValueError("Got one --report-page for several models; expected none or no FILE. Leave FILE out.")
    card = CardOptions(options.parent_repo, options.license, options.datasets, (), *measured)
    card = replace(card, report_page=page)
    model = load(options.path if is_alone else options.parent)
    if options.dry_run:
        path = find_file(options.path, CARD_NAME, {})
        before = path.read_text(encoding="utf-8") if path else None
        write_companions(model, options.path, options.repo_id, card, before)
        print(f"{Path(options.path, CARD_NAME)} written; nothing uploaded")
    elif is_alone:
        print(push_model(model, options.repo_id, card, private=options.private or None))
    else:
        done = push_modules(
            model,
            {word: labels_of(word, known_names(model.config)) for word in options.modules},
            options.namespace,
            options.name or Path(options.parent).absolute().name,
            load_batches(options, options.split, model) if options.dataset else None,
            load_batches(options, options.calibration_split, model) if options.calibration_split else None,
            *(card, options.threshold, options.round_to, options.compare_formats),
            private=options.private or None,
            cut=_cutter(options, model),
        )
        print("\n".join(f"{name}: {address}" for name, address in done.items()))


def inspect(options: Namespace) -> None:
    """Prints the neuron sites of a plain model, parent or module."""
    code = {"trust_remote_code": True} if options.trust_remote_code else {}
    config = read_config(options.model, **code)
    if config.model_type == "nemo_hf":
        model: NeMoPreTrainedModel = load(options.model)
    else:
        plain = load_plain(options.model, config, **code)
        sites = propose_sites(plain) if options.propose else None
        if options.propose:
            print(json.dumps({"sites": sites}, indent=1))
        masks = "static" if task_of(type(plain)) in PLACE_TASKS else "generated"
        model = make_parent(plain, NeMoConfig(sites=sites or None, masks=masks))
    width = max(len(site.name) for site in model.sites)
    print(f"{'site':{width}}  kind       neurons  pruning mode")
    for index, site in enumerate(model.sites):
        print(f"{site.name:{width}}  {site.kind:9}  {_neurons(model, index):7}  {site.pruning_mode}")
    print(f"\n{model.config.base_class}: {base_parameters(model):,} parameters")
    if model.masks is not None:
        first = next(model.masks.site_masks())
        made = f"of rank {first.generator.down.out_features}" if isinstance(first, GeneratedMask) else "none"
        print(f"mask generators: {made}; equivalence check: {(model.config.equivalence or {}).get('status')}")


def _one_module(words: Sequence[str], known: Collection[str]) -> list[LabelLike]:
    """The labels of one module: words, or one word that joins them."""
    if len(words) > 1 and (joined := [word for word in words if len(labels_of(word, known)) > 1]):
        raise ValueError(
            f"Got --labels {' '.join(words)}; expected the labels of one module, which {joined[0]!r} is by itself. "
            f"Join all of them, as in {'+'.join(words)}, or cut one module after another."
        )
    return [label for word in words for label in labels_of(word, known)]


def _check_apart(source: str, output: str) -> None:
    if Path(source).resolve() == Path(output).resolve():
        raise ValueError(
            f"Got {source!r} to read from and as --output-dir; expected two places, since what is there would be "
            "replaced. Name another --output-dir."
        )


def _neurons(model: NeMoPreTrainedModel, index: int) -> int:
    """Neurons of a site of a parent, or those that are left of them in a module."""
    if model.is_parent:
        return model.sites[index].neurons
    widths = (model.config.sites or [])[index]["widths"]
    if "head_dim" in widths:
        return int(2 * widths["key_value_heads"] * widths["head_dim"])
    return sum(int(width) for name, width in widths.items() if name not in ("query", "output"))
