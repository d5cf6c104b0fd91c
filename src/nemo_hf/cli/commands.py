"""What each command of `nemo-hf` does with its options."""

import json
from argparse import Namespace
from collections.abc import Collection, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, TrainingArguments

from nemo_hf.auto_classes import AUTO_CLASSES, NeMoClassifier
from nemo_hf.config import LabelLike, NeMoConfig
from nemo_hf.evaluation.report import aligned, evaluate_module, format_table
from nemo_hf.hub.publish import CARD_NAME, CardOptions, push_model, push_modules, write_companions
from nemo_hf.models.atomic_writes import write_json
from nemo_hf.models.base import NeMoPreTrainedModel, base_parameters
from nemo_hf.models.calibrated_cut import extract_module
from nemo_hf.models.calibration_inputs import input_kind
from nemo_hf.models.configuration import PLACE_TASKS, TASKS, NeMoModelConfig, model_class, task_of
from nemo_hf.models.cut_saved import saved_processor
from nemo_hf.models.files import find_file
from nemo_hf.models.privacy import clean, hub_name, is_repository
from nemo_hf.models.pruning_modes import make_parent
from nemo_hf.neurons.mask_hooks import GeneratedMask
from nemo_hf.neurons.proposals import propose_sites
from nemo_hf.training.trainer import NeMoTrainer

from .data import load_data, load_samples
from .demo import accuracy, format_demo, run_demo

ALONE = {"path", "repo_id", "parent_repo", "dry_run"}  # options of `push` for one model
BY_RELEVANCE = {"threshold", "round_to"}  # options of `cut` without samples
ON_SAMPLES = {"retention", "max_loss", "validation_split", "vocabulary", "max_positions", "refine_epochs", "samples",
              "scores", "cost", "label_column", "input_column", "no_reconstruct", "trust_remote_code"}  # fmt: skip
CUTS = "expected a parent with what training found, or samples"
TOGETHER = {"parent", "namespace", "name", "modules", "calibration_split", "threshold", "round_to", "compare_formats"}


def demo(options: Namespace) -> None:
    """Runs the demo and prints its report."""
    report = run_demo(options.output_dir, options.seed, options.epochs)
    print(f"\n{format_demo(report)}\n\n{options.output_dir}: plain/, parent/, modules/, report.json, modules.png")


def train(options: Namespace) -> None:
    """Trains a parent, evaluates it, saves it and prints its metrics."""
    trained_on = hub_name(options.dataset)  # a local folder of that name may be gone after the training
    chosen = {field.name: getattr(options, field.name) for field in fields(TrainingArguments) if field.init}
    arguments, given = TrainingArguments(**chosen), options.nemo_config or "{}"
    is_inline = given.lstrip().startswith("{")
    try:
        nemo_config = NeMoConfig.from_dict(json.loads(given)) if is_inline else NeMoConfig.from_json_file(given)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"Got --nemo-config {given}, which is no JSON ({error}); expected options by name. Quote names and texts: "
            '{"retention_target": 0.2}'
        ) from error
    _read_config(options.model)
    splits = [options.train_split, options.split]
    groups = [nemo_config.group_column] if nemo_config.group_column else []
    data = load_data(options.dataset, options.model, splits, options.label_column, options.input_column, keep=groups)
    names = {"id2label": dict(enumerate(data.names)), "label2id": {name: i for i, name in enumerate(data.names)}}
    model = AUTO_CLASSES[data.task].from_pretrained(options.model, **names, ignore_mismatched_sizes=True)
    if data.task == "image-classification":
        arguments.remove_unused_columns = False  # the columns are made when a sample is read
    trainer = NeMoTrainer(
        *(model, arguments, data.collator, *(data.splits[split] for split in splits)),
        processing_class=data.processor,
        compute_metrics=accuracy,
        nemo_config=nemo_config,
    )
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    metrics = trainer.evaluate()
    record = {"command": options.command_line, "datasets": [trained_on] if trained_on else []}
    trainer.parent.config.training = {**(trainer.parent.config.training or {}), **record}
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(json.dumps(metrics, indent=2))


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
        labels = _labels(options.labels, _known(_config(options.model)))
        module = _load(options.model, labels=labels, threshold=options.threshold, round_to=options.round_to)
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
    model = _load_any(options.model, **({"trust_remote_code": True} if options.trust_remote_code else {}))
    chosen = {name: getattr(options, name) for name in ("max_loss", "max_positions", "refine_epochs", "scores", "cost")}
    chosen |= {"max_samples": options.samples, "vocabulary": options.vocabulary}
    retention = options.retention if len(options.retention or ()) > 1 else next(iter(options.retention or ()), None)
    read = partial(load_samples, options.dataset, kind=input_kind(model), names=list(_names(model.config).values()),
                   label_column=options.label_column, input_column=options.input_column)  # fmt: skip
    modules = extract_module(
        model.to("cuda" if torch.cuda.is_available() else "cpu"),
        _labels(options.labels, _known(model.config)),
        read(split=options.split),
        retention,
        processing_class=saved_processor(model, options.model),
        validation=options.validation_split and read(split=options.validation_split),
        reconstruct=not options.no_reconstruct,
        **{name: value for name, value in chosen.items() if value is not None},
    )
    return modules if isinstance(modules, list) else [modules]


def export(options: Namespace) -> None:
    """Writes a module in another format and prints what changed."""
    _check_apart(options.module, options.output_dir)
    module = _load(options.module)
    if options.format == "plain":
        plain = module.save_plain(options.output_dir)
        sizes = f"{plain.parameters:,} parameters (module: {plain.module_parameters:,}), changed: {plain.changes}"
    else:
        onnx = module.export_onnx(options.output_dir)
        sizes = f"inputs {onnx.inputs}, outputs {onnx.outputs}, difference {onnx.difference:.1e}"
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
    parent = _load_any(options.parent)
    if options.labels and not isinstance(parent, NeMoPreTrainedModel):
        raise ValueError(
            f"Got --labels for {options.parent}, a plain model; expected a parent, or modules of it. Cut some with "
            "nemo-hf cut, and name them with --modules."
        )
    parent.to("cuda" if torch.cuda.is_available() else "cpu")
    loader = _batches(options, options.split, parent)
    modules: list[Any] = [(_labels(word.split("+"), _known(parent.config)), None) for word in options.labels or ()]
    modules += [(list(each.config.names.values()), each) for each in map(_load, options.modules or ())]
    cut = {"threshold": options.threshold, "round_to": options.round_to}
    measure = partial(evaluate_module, parent, batches=loader, metrics=options.metrics)
    reports = [measure(labels, module=each, **cut).to_dict() for labels, each in modules]
    print(format_table(reports))
    for report in reports if options.metrics else ():
        print(f"{','.join(report['labels'])}: {report['metrics']}, parent: {report['parent_metrics']}")
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
    card = CardOptions(options.parent_repo, options.license, options.datasets, (), *measured)
    model = _load(options.path if is_alone else options.parent)
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
            {word: _labels(word.split("+"), _known(model.config)) for word in options.modules},
            options.namespace,
            options.name or Path(options.parent).absolute().name,
            _batches(options, options.split, model) if options.dataset else None,
            _batches(options, options.calibration_split, model) if options.calibration_split else None,
            *(card, options.threshold, options.round_to, options.compare_formats),
            private=options.private or None,
        )
        print("\n".join(f"{name}: {address}" for name, address in done.items()))


def inspect(options: Namespace) -> None:
    """Prints the neuron sites of a plain model, parent or module."""
    code = {"trust_remote_code": True} if options.trust_remote_code else {}
    config = _read_config(options.model, **code)
    if config.model_type == "nemo_hf":
        model: NeMoPreTrainedModel = _load(options.model)
    else:
        plain = _load_plain(options.model, config, **code)
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


def _check_apart(source: str, output: str) -> None:
    if Path(source).resolve() == Path(output).resolve():
        raise ValueError(
            f"Got {source!r} to read from and as --output-dir; expected two places, since what is there would be "
            "replaced. Name another --output-dir."
        )


def _read_config(source: str, **options: Any) -> PreTrainedConfig:
    """Reads the configuration of any model."""
    is_here = Path(source).is_dir()
    if not is_here and hub_name(source) is None:
        got = f"Got {source!r}, which is no directory and no name of a Hub repository"
        raise NotADirectoryError(f"{got}; expected one of them. Correct the path.")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(source, **options)
    except OSError as error:
        if is_here:
            raise
        raise OSError(f"Got {source!r}, which is no directory here and can't be read from the Hub. {error}") from error
    return config


def _config(source: str) -> NeMoModelConfig:
    config = _read_config(source)
    if not isinstance(config, NeMoModelConfig):
        raise ValueError(
            f"Got {source!r} of model type {config.model_type!r}; expected a parent or module. Train a "
            "parent with nemo-hf train."
        )
    return config


def _load_plain(source: str, config: PreTrainedConfig, **code: Any) -> PreTrainedModel:
    """Loads a plain classifier with the Auto class for its task."""
    own, name = getattr(config, "auto_map", None) or {}, (getattr(config, "architectures", None) or [""])[0]
    fitting = {task: a for task, a in AUTO_CLASSES.items() if type(config) in a._model_mapping or a.__name__ in own}
    if not fitting:
        raise ValueError(
            f"Got {source!r} of model type {config.model_type!r}; expected a classifier of images, texts or "
            "audio. Name another model, or add --trust-remote-code if the classifier is code of its repository."
        )
    saved = [auto_class for task, auto_class in fitting.items() if TASKS[task][0] in name]  # BERT's may be several
    model: PreTrainedModel = next(iter([*saved, *fitting.values()])).from_pretrained(source, **code)
    return model


def _load_any(source: str, **code: Any) -> Any:
    """Loads a plain classifier, parent or module."""
    config = _read_config(source, **code)
    return _load(source) if isinstance(config, NeMoModelConfig) else _load_plain(source, config, **code)


def _load(source: str, **options: Any) -> NeMoClassifier:
    kind: type[NeMoClassifier] = model_class(task_of(_config(source).plain_class), NeMoModelConfig)
    return kind.from_pretrained(source, **options)


def _names(config: PreTrainedConfig) -> dict[int, str]:
    """Label names of a plain model, parent or module by id."""
    return (
        config.names if isinstance(config, NeMoModelConfig) else {int(i): n for i, n in (config.id2label or {}).items()}
    )


def _known(config: PreTrainedConfig) -> set[str]:
    """Names of labels and groups."""
    return {*_names(config).values(), *(config.groups if isinstance(config, NeMoModelConfig) else ())}


def _labels(words: Sequence[str], known: Collection[str]) -> list[LabelLike]:
    """Reads labels as names if there are such names, and as ids otherwise."""
    return [int(word) if word.isdecimal() and word not in known else word for word in words]


def _batches(options: Namespace, split: str, parent: PreTrainedModel) -> DataLoader[Any]:
    """Batches of data for a parent or a plain model."""
    if not isinstance(parent, NeMoPreTrainedModel):
        task = task_of(type(parent))
    else:
        task = parent.task
        parent.parent_masks()  # a module has none, and not all labels of the data: a ValueError
    names = list(_names(parent.config).values())
    columns = (options.label_column, options.input_column)
    data = load_data(options.dataset, str(parent.name_or_path), [split], *columns, names=names, task=task)
    return DataLoader(data.splits[split], batch_size=options.batch_size, collate_fn=data.collator)


def _neurons(model: NeMoPreTrainedModel, index: int) -> int:
    """Neurons of a site of a parent, or those that are left of them in a module."""
    if model.is_parent:
        return model.sites[index].neurons
    widths = (model.config.sites or [])[index]["widths"]
    if "head_dim" in widths:
        return int(2 * widths["key_value_heads"] * widths["head_dim"])
    return sum(int(width) for name, width in widths.items() if name not in ("query", "output"))
