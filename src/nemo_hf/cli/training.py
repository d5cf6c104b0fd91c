"""The command `train`."""

import copy
import dataclasses
import json
import logging
import shlex
from argparse import SUPPRESS, HelpFormatter, Namespace
from pathlib import Path
from typing import Any, NoReturn

from torch.utils.data import DataLoader
from transformers import HfArgumentParser, PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from nemo_hf.auto_classes import AUTO_CLASSES
from nemo_hf.config import LabelLike, NeMoConfig
from nemo_hf.evaluation.groups import format_groups, group_means, measure_groups
from nemo_hf.models.privacy import hub_name
from nemo_hf.training.callbacks import PhaseNames
from nemo_hf.training.distributed import is_sharded, whole_copy
from nemo_hf.training.step_loss import named_scalars
from nemo_hf.training.trainer import NeMoTrainer
from nemo_hf_cli import EVALUATION_BATCH, LEARNING_RATES, SMALL, STARTING_VALUES

from .data import LoadedData, load_data, spread_samples
from .demo import accuracy
from .models import labels_of, read_config

logger = logging.getLogger(__name__)

DRY_SAMPLES = 2  # of each label, for the relevance and the evaluation of a dry run


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. See nemo-hf train --help-all.")


def training_parser() -> HfArgumentParser:
    """The parser of `TrainingArguments`; it returns those that are given."""
    options: Any = {"add_help": False, "allow_abbrev": False, "usage": SUPPRESS, "formatter_class": HelpFormatter}
    parser = _Parser(TrainingArguments, **options)  # type: ignore[arg-type]
    for action in parser._actions:
        action.default = SUPPRESS
    return parser


def train(options: Namespace) -> None:
    """Trains a parent, evaluates it, saves it, and prints its metrics and its label groups."""
    trained_on = hub_name(options.dataset)  # a local folder of that name may be gone after the training
    given = vars(training_parser().parse_args(options.training_words))
    arguments, nemo_config = TrainingArguments(options.output_dir, **given), _nemo_config(options)
    read_config(options.model)
    splits = [options.train_split, options.split]
    keep = [nemo_config.group_column] if nemo_config.group_column else []
    columns = {"label_column": options.label_column, "input_column": options.input_column, "keep": keep}
    data = load_data(options.dataset, options.model, splits, max_length=options.max_length, **columns)
    if options.label_groups:
        nemo_config = dataclasses.replace(nemo_config, label_groups=_label_groups(options, set(data.names)))
    model = _plain_model(options.model, data, arguments.seed)
    _start_values(arguments, given, data.task, model)
    if data.task == "image-classification":
        arguments.remove_unused_columns = False  # the columns are made when a sample is read
    train_data = data.splits[options.train_split]
    for_relevance, eval_data = _limited(options, arguments, data)
    common: dict[str, Any] = {"processing_class": data.processor, "compute_metrics": accuracy}
    trainer = NeMoTrainer(
        *(model, arguments, data.collator, train_data, eval_data),
        nemo_config=nemo_config,
        relevance_dataset=None if len(for_relevance) == len(train_data) else for_relevance,
        **common,
    )
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    metrics = trainer.evaluate()
    record = {"command": options.command_line, "datasets": [trained_on] if trained_on else []}
    trainer.parent.config.training = {**(trainer.parent.config.training or {}), **record}
    trainer.save_model()
    parent = whole_copy(trainer.parent) if is_sharded(trainer.parent) else trainer.parent
    if trainer.is_world_process_zero():
        print(json.dumps(metrics, indent=2))
        batches = DataLoader(eval_data, batch_size=arguments.per_device_eval_batch_size, collate_fn=data.collator)
        groups = measure_groups(parent, batches, show_progress=not arguments.disable_tqdm)
        trainer.log(named_scalars({f"group_{name}": value for name, value in group_means(groups).items()}))
        if not trainer.nemo_config.trains_modules:
            print(f"\nThe parent was trained as a plain model. To cut a module and reconstruct it:\n{_cut(options)}\n")
        print(format_groups(groups), flush=True)
    if options.baseline:
        again = _plain_model(options.model, data, arguments.seed)
        plain = Trainer(again, _alone(arguments), data.collator, train_data, eval_data, **common)
        plain.add_callback(PhaseNames(plain, "Plain model: "))
        plain.train()
        found = plain.evaluate()["eval_accuracy"]
        if trainer.is_world_process_zero():
            print(f"\naccuracy: parent {metrics['eval_accuracy']:.4f}, plain model trained alike {found:.4f}")


def _cut(options: Namespace) -> str:
    """The command that cuts a module out of the trained parent, on the data that it was trained on."""
    words = ["nemo-hf", "cut", options.output_dir, "--labels", "GROUP", "--dataset", options.dataset]
    given = {"split": options.train_split, "label-column": options.label_column, "input-column": options.input_column}
    words += [word for name, value in given.items() if value is not None for word in (f"--{name}", value)]
    return shlex.join([*words, "--output-dir", "MODULE"])


def _start_values(arguments: TrainingArguments, given: dict[str, Any], task: str, model: PreTrainedModel) -> None:
    """Gives training arguments that are not given values that suit the task and the size of the model."""
    is_small = model.num_parameters() <= SMALL
    rest = {"per_device_eval_batch_size": EVALUATION_BATCH, "learning_rate": LEARNING_RATES[not is_small]}
    for name, value in {**STARTING_VALUES[task], **rest}.items():
        setattr(arguments, name, given.get(name, value))


def _nemo_config(options: Namespace) -> NeMoConfig:
    """The options of the masks; label groups are checked once the labels are known."""
    given = options.nemo_config or "{}"
    is_inline = given.lstrip().startswith("{")
    try:
        values = json.loads(given if is_inline else Path(given).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"Got --nemo-config {given}, which is no JSON ({error}); expected options by name. Quote names and texts: "
            '{"retention_target": 0.2}'
        ) from error
    config = NeMoConfig.from_dict(values)
    groups = {"group_column": options.group_column, "label_groups": options.label_groups and _label_groups(options)}
    return dataclasses.replace(config, **{name: value for name, value in groups.items() if value is not None})


def _label_groups(options: Namespace, known: set[str] | None = None) -> dict[str, list[LabelLike]]:
    groups: dict[str, list[LabelLike]] = {}
    for word in options.label_groups:
        name, _, labels = word.partition("=")
        if not name or not labels or name in groups:
            raise ValueError(f"Got {word!r} in --label-groups; expected NAME=LABEL+LABEL, each name once. Write it so.")
        groups[name] = labels_of(labels, known or set())
    return groups


def _plain_model(source: str, data: LoadedData, seed: int) -> PreTrainedModel:
    """The model at `source` with the labels of the data; the seed is that of a head which is drawn anew."""
    set_seed(seed)
    names = {"id2label": dict(enumerate(data.names)), "label2id": {name: i for i, name in enumerate(data.names)}}
    model: PreTrainedModel = AUTO_CLASSES[data.task].from_pretrained(source, **names, ignore_mismatched_sizes=True)
    return model


def _limited(options: Namespace, arguments: TrainingArguments, data: LoadedData) -> tuple[Any, Any]:
    """What the relevance is counted on, and what is evaluated on: little of both for less than an epoch of training."""
    parts = data.splits[options.train_split], data.splits[options.split]
    limits = [options.max_relevance_samples, options.max_eval_samples]
    trained = arguments.max_steps * arguments.train_batch_size * arguments.gradient_accumulation_steps
    trained *= arguments.world_size
    if 0 < trained < len(parts[0]) and None in limits:
        most = max(trained, DRY_SAMPLES * len(data.names))
        limits = [most if limit is None else limit for limit in limits]
        logger.warning(
            "--max-steps ends before an epoch: the relevance is counted on %d samples, and %d are evaluated. For more, "
            "use --max-relevance-samples and --max-eval-samples.",
            *(min(limit, len(part)) for limit, part in zip(limits, parts, strict=True)),
        )
    return spread_samples(parts[0], limits[0]), spread_samples(parts[1], limits[1])


def _alone(arguments: TrainingArguments) -> TrainingArguments:
    """Arguments of a training that saves and reports nothing."""
    own = copy.copy(arguments)
    own.save_strategy, own.eval_strategy = SaveStrategy.NO, IntervalStrategy.NO
    own.report_to, own.push_to_hub, own.load_best_model_at_end = [], False, False
    return own
