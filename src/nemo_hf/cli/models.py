"""Models, labels and data that the words of a command name."""

from argparse import Namespace
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from nemo_hf.auto_classes import AUTO_CLASSES, NeMoClassifier
from nemo_hf.config import LabelLike
from nemo_hf.models.base import NeMoPreTrainedModel
from nemo_hf.models.configuration import TASKS, NeMoModelConfig, model_class, task_of
from nemo_hf.models.privacy import hub_name

from .data import load_data, spread_samples


def read_config(source: str, **options: Any) -> PreTrainedConfig:
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


def read_own_config(source: str) -> NeMoModelConfig:
    """Reads the configuration of a parent or module."""
    config = read_config(source)
    if not isinstance(config, NeMoModelConfig):
        raise ValueError(
            f"Got {source!r} of model type {config.model_type!r}; expected a parent or module. Train a "
            "parent with nemo-hf train."
        )
    return config


def load_plain(source: str, config: PreTrainedConfig, **code: Any) -> PreTrainedModel:
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


def load_any(source: str, **code: Any) -> Any:
    """Loads a plain classifier, parent or module."""
    config = read_config(source, **code)
    return load(source) if isinstance(config, NeMoModelConfig) else load_plain(source, config, **code)


def load(source: str, **options: Any) -> NeMoClassifier:
    """Loads a parent or module."""
    kind: type[NeMoClassifier] = model_class(task_of(read_own_config(source).plain_class), NeMoModelConfig)
    return kind.from_pretrained(source, **options)


def names_of(config: PreTrainedConfig) -> dict[int, str]:
    """Label names of a plain model, parent or module by id."""
    return (
        config.names if isinstance(config, NeMoModelConfig) else {int(i): n for i, n in (config.id2label or {}).items()}
    )


def known_names(config: PreTrainedConfig) -> set[str]:
    """Names of labels and groups."""
    return {*names_of(config).values(), *(config.groups if isinstance(config, NeMoModelConfig) else ())}


def labels_of(word: str, known: Collection[str]) -> list[LabelLike]:
    """The labels that a word joins by `+`: names if there are such names, ids otherwise."""
    words = [word] if word in known else word.split("+")
    return [int(each) if each.isdecimal() and each not in known else each for each in words]


def load_batches(options: Namespace, split: str, parent: PreTrainedModel, most: int | None = None) -> DataLoader[Any]:
    """Batches of data for a parent or a plain model, of at most so many samples."""
    if not isinstance(parent, NeMoPreTrainedModel):
        task = task_of(type(parent))
    else:
        task = parent.task
        parent.parent_masks()  # a module has none, and not all labels of the data: a ValueError
    names = list(names_of(parent.config).values())
    columns = (options.label_column, options.input_column)
    own = {"names": names, "task": task, "max_length": options.max_length}
    data = load_data(options.dataset, str(parent.name_or_path), [split], *columns, **own)
    samples = spread_samples(data.splits[split], most)
    return DataLoader(samples, batch_size=options.batch_size, collate_fn=data.collator)
