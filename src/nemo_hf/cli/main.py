"""The command line `nemo-hf`: thin commands over the library."""

import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    HfArgumentParser,
    TrainingArguments,
)

from nemo_hf.auto_classes import NeMoClassifier
from nemo_hf.config import LabelLike, NeMoConfig
from nemo_hf.evaluation.report import evaluate_module, format_table
from nemo_hf.hub.module_collections import push_modules
from nemo_hf.hub.provenance import safe_command
from nemo_hf.hub.publish import CARD_NAME, CardOptions, push_model, write_companions
from nemo_hf.models.base import NeMoPreTrainedModel, base_parameters
from nemo_hf.models.configuration import NeMoModelConfig, task_of
from nemo_hf.models.equivalence import EquivalenceError
from nemo_hf.models.files import write_json
from nemo_hf.models.pruning_modes import make_parent
from nemo_hf.models.remote_files import hub_name
from nemo_hf.neurons.mask_hooks import GeneratedMask
from nemo_hf.neurons.proposals import propose_sites
from nemo_hf.training.trainer import NeMoTrainer

from .commands import (
    DataOptions,
    DemoCommand,
    EvaluateCommand,
    ExportCommand,
    ExtractCommand,
    InspectCommand,
    PushCommand,
    TrainCommand,
)
from .data import LoadedData, load_data
from .demo import accuracy, format_demo, run_demo

AUTO_CLASSES = {
    "image-classification": AutoModelForImageClassification,
    "text-classification": AutoModelForSequenceClassification,
    "audio-classification": AutoModelForAudioClassification,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: Words after `nemo-hf`; `None` takes those of the process.

    Returns:
        Exit status: 0, or 2 if the input is wrong; the message is on standard error.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, tuple[Any, Callable[..., None]]] = {
        "demo": ((DemoCommand,), _demo),
        "train": ((TrainCommand, TrainingArguments), _train),
        "extract": ((ExtractCommand,), _extract),
        "export": ((ExportCommand,), _export),
        "evaluate": ((EvaluateCommand,), _evaluate),
        "push": ((PushCommand,), _push),
        "inspect": ((InspectCommand,), _inspect),
    }
    if not words or words[0] not in commands:
        print("usage: nemo-hf COMMAND ...    (nemo-hf COMMAND --help says more)\n")
        for name, (kinds, _) in commands.items():
            print(f"  {name:10}{kinds[0].__doc__}")
        return 0 if not words or words[0] in ("-h", "--help") else 2
    kinds, run = commands[words[0]]
    parser = HfArgumentParser(kinds, prog=f"nemo-hf {words[0]}", description=kinds[0].__doc__, allow_abbrev=False)
    logging.basicConfig(level=logging.WARNING)
    positional = _with_option_names(words[1:], kinds[0])
    try:
        options = parser.parse_args_into_dataclasses(positional)
        options[0].command_line = safe_command(["nemo-hf", *words])
        run(*options)
    except (ValueError, TypeError, OSError, ImportError, EquivalenceError) as error:
        print(f"nemo-hf {words[0]}: {error}", file=sys.stderr)
        return 2
    return 0


def _with_option_names(words: list[str], kind: type[Any]) -> list[str]:
    """Lets the first option be given without its name: `nemo-hf inspect MODEL`."""
    first = {InspectCommand: "--model", PushCommand: "--path"}.get(kind)
    return [first, *words] if first and words and not words[0].startswith("-") else words


def _demo(command: DemoCommand) -> None:
    options = {} if command.epochs is None else {"epochs": command.epochs}
    report = run_demo(command.output_dir, seed=command.seed, **options)
    print(f"\n{format_demo(report)}\n\n{command.output_dir}: parent/, modules/, report.json, modules.png")


def _read_nemo_config(text: str | None) -> NeMoConfig:
    if text is None:
        return NeMoConfig()
    if text.lstrip().startswith("{"):
        return NeMoConfig.from_dict(json.loads(text))
    return NeMoConfig.from_json_file(text)


def _train(command: TrainCommand, arguments: TrainingArguments) -> None:
    if not command.model:
        raise ValueError("Got no --model; expected a plain model, such as --model google/vit-base-patch16-224.")
    nemo_config = _read_nemo_config(command.nemo_config)
    data = load_data(
        command.dataset,
        command.model,
        [command.train_split, command.split],
        command.label_column,
        command.input_column,
        keep=[nemo_config.group_column] if nemo_config.group_column else [],
    )
    model = AUTO_CLASSES[data.task].from_pretrained(command.model, **data.label_options(), ignore_mismatched_sizes=True)
    if data.task == "image-classification":
        arguments.remove_unused_columns = False  # the columns are made when a sample is read
    trainer = NeMoTrainer(
        model,
        arguments,
        data.collator,
        data.splits[command.train_split],
        eval_dataset=data.splits[command.split],
        processing_class=data.processor,
        compute_metrics=accuracy,
        nemo_config=nemo_config,
    )
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    metrics = trainer.evaluate()
    trainer.parent.config.training = {
        **(trainer.parent.config.training or {}),
        "command": command.command_line,
        "datasets": [name] if (name := hub_name(command.dataset)) else [],
    }
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(json.dumps(metrics, indent=2))


def _extract(command: ExtractCommand) -> None:
    labels = _labels(command.labels, _config(command.parent))
    module = _load(command.parent, labels=labels, threshold=command.threshold, round_to=command.round_to)
    module.save_pretrained(command.output_dir)
    config = module.config
    print(
        f"{command.output_dir}: {list(config.names.values())}, {base_parameters(module):,} parameters, "
        f"{config.retained_neurons:.1%} of the neurons"
    )


def _export(command: ExportCommand) -> None:
    module = _load(command.module)
    if command.format == "plain":
        plain = module.save_plain(command.output_dir)
        sizes = f"{plain.parameters:,} parameters (module: {plain.module_parameters:,}), changed: {plain.changes}"
    else:
        onnx = module.export_onnx(command.output_dir)
        sizes = f"inputs {onnx.inputs}, outputs {onnx.outputs}, difference {onnx.difference:.1e}"
    print(f"{command.output_dir}: {sizes}")


def _config(source: str) -> NeMoModelConfig:
    config = AutoConfig.from_pretrained(source)
    if config.model_type != "nemo_hf":
        raise ValueError(
            f"Got {source!r} of model type {config.model_type!r}; expected a parent or module of nemo_hf. "
            "Train one with nemo-hf train."
        )
    assert isinstance(config, NeMoModelConfig)
    return config


def _load(source: str, **options: Any) -> NeMoClassifier:
    model = AUTO_CLASSES[task_of(_config(source).plain_class)].from_pretrained(source, **options)
    assert isinstance(model, NeMoClassifier)
    return model


def _labels(words: Sequence[str], config: NeMoModelConfig) -> list[LabelLike]:
    """Reads labels as names if there are such names, and as ids otherwise."""
    known = {*config.names.values(), *config.groups}
    return [int(word) if word.isdigit() and word not in known else word for word in words]


def _evaluate(command: EvaluateCommand) -> None:
    parent = _load(command.parent)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parent.to(device)  # type: ignore[arg-type]
    loader = _batches(command, command.split, parent)
    if not command.labels:
        raise ValueError("Got no --labels; expected modules to measure, such as --labels cat+dog car.")
    reports = [
        evaluate_module(
            parent,
            _labels(word.split("+"), parent.config),
            loader,
            threshold=command.threshold,
            round_to=command.round_to,
        ).to_dict()
        for word in command.labels
    ]
    print(format_table(reports))
    if command.output:
        write_json(command.output, reports)


def _push(command: PushCommand) -> None:
    measured_on = hub_name(command.dataset)
    split = command.split if measured_on else None
    options = CardOptions(command.parent_repo, command.license, command.datasets, (), measured_on, split)
    pushed: dict[str, Any] = {"private": command.private or None}
    if command.path and command.repo_id and not command.parent:
        model = _load(command.path)
        if command.dry_run:
            card = Path(command.path, CARD_NAME)
            before = card.read_text(encoding="utf-8") if card.is_file() else None
            write_companions(model, command.path, command.repo_id, options, before)
            print(f"{card} written; nothing uploaded")
        else:
            print(push_model(model, command.repo_id, options, **pushed))
        return
    if not command.parent or not command.namespace or command.path or command.dry_run:
        raise ValueError(
            "Got neither a whole --path DIR --repo_id ME/NAME nor a whole --parent DIR --modules ... --namespace ME "
            "(which has no --dry_run); expected one of the two."
        )
    parent = _load(command.parent)
    modules = {word: _labels(word.split("+"), parent.config) for word in command.modules}
    done = push_modules(
        parent,
        modules,
        command.namespace,
        command.name or Path(command.parent).absolute().name,
        _batches(command, command.split, parent) if command.dataset else None,
        _batches(command, command.calibration_split, parent) if command.calibration_split else None,
        options,
        command.threshold,
        command.round_to,
        command.compare_formats,
        **pushed,
    )
    for name, address in done.items():
        print(f"{name}: {address}")


def _batches(command: DataOptions, split: str, parent: NeMoClassifier) -> torch.utils.data.DataLoader[Any]:
    source = str(parent.name_or_path)
    names = list(parent.config.names.values())
    columns = (command.label_column, command.input_column)
    data: LoadedData = load_data(command.dataset, source, [split], *columns, names=names)
    return torch.utils.data.DataLoader(data.splits[split], batch_size=command.batch_size, collate_fn=data.collator)


def _inspect(command: InspectCommand) -> None:
    options = {"trust_remote_code": True} if command.trust_remote_code else {}
    config = AutoConfig.from_pretrained(command.model, **options)
    if config.model_type == "nemo_hf":
        parent: NeMoPreTrainedModel = _load(command.model)
    else:
        own = getattr(config, "auto_map", None) or {}
        kinds = [
            kind
            for kind in AUTO_CLASSES.values()
            if type(config) in (kind._model_mapping or ()) or kind.__name__ in own
        ]
        if not kinds:
            raise ValueError(
                f"Got model type {config.model_type!r}; expected one with an image, sequence or audio classifier."
            )
        model = kinds[0].from_pretrained(command.model, **options)
        sites = propose_sites(model) if command.propose else None
        if sites is not None:
            print(json.dumps({"sites": sites}, indent=1))
        parent = make_parent(model, NeMoConfig(sites=sites or None))
    rows = [("site", "kind", "neurons", "pruning mode")]
    rows += [
        (site.name, site.kind, str(_neurons(parent, index)), site.pruning_mode)
        for index, site in enumerate(parent.sites)
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"\n{parent.config.base_class}: {base_parameters(parent):,} parameters")
    if parent.masks is not None:
        first = next(parent.masks.site_masks())
        made = f"generators: rank {first.generator.down.out_features}" if isinstance(first, GeneratedMask) else "none"
        print(f"mask {made}; equivalence check: {(parent.config.equivalence or {}).get('status')}")


def _neurons(model: NeMoPreTrainedModel, index: int) -> int:
    """Neurons of a site: of a parent all, of a module those that it was cut to."""
    if model.is_parent:
        return model.sites[index].neurons
    widths = (model.config.sites or [])[index]["widths"]
    if "head_dim" in widths:
        return int(2 * widths["key_value_heads"] * widths["head_dim"])
    return sum(int(width) for name, width in widths.items() if name not in ("query", "output"))


if __name__ == "__main__":
    raise SystemExit(main())
