"""Checks of training data before the first step, and the label groups that one of its columns names."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers import DataCollatorWithPadding, DefaultDataCollator, default_data_collator
from transformers.trainer_utils import has_length

from nemo_hf.config import LabelLike
from nemo_hf.models.batches import split_batch, unchanged_random_state
from nemo_hf.models.configuration import SEVERAL_LABELS
from nemo_hf.models.labels import (
    IGNORED,
    LABEL_COLUMNS,
    SINGLE_LABEL,
    check_label_numbers,
    is_settled,
    label_ids,
    label_targets,
    settle_problem_type,
)

from .model_calls import check_own_loss
from .relevance import start_relevance

logger = logging.getLogger(__name__)

PROBED = 64  # most samples that are read to see whether a column holds the labels that batches have


def check_data_sets(trained: Any, counted: Any, collator: Any) -> None:
    """Refuses data to train on, and to count the relevance on (`None`: the same), that can't serve."""
    for name, data in (("train_dataset", trained), ("relevance_dataset", counted)):
        if isinstance(data, dict):
            raise ValueError(
                f"Got a {type(data).__name__} with {list(data)} as {name}; expected one data set. Pass one of them: "
                f"{name}=data[{next(iter(data), 'train')!r}]."
            )
        if isinstance(data, Sized) and not len(data):
            raise ValueError(f"Got an empty {name}; expected samples. Pass {name}=... with some.")
    if trained is not None and counted is None and not has_length(trained):
        kind = "an iterable data set" if isinstance(trained, IterableDataset) else "a data set without a length"
        raise ValueError(
            f"Got {kind} to train on; expected a finite one to count the relevance on. Pass a part of it as "
            "NeMoTrainer(..., relevance_dataset=...)."
        )
    if counted is not None and not isinstance(counted, IterableDataset) and not has_length(counted):
        raise ValueError(
            f"Got a {type(counted).__name__} without a length as relevance_dataset; expected a finite data set. Give "
            "it a __len__, or pass a list of samples."
        )
    columns = getattr(trained, "column_names", None)
    if columns is not None and _is_seen(trained, collator) and not set(LABEL_COLUMNS) & set(columns):
        raise ValueError(
            f"Got training data with the columns {list(columns)}; expected a 'label' or 'labels' column. "
            "Rename it with dataset.rename_column(..., 'label')."
        )


def _is_seen(dataset: Any, collator: Any) -> bool:
    """Whether batches hold the labels of a column as they are: no transform and no collator of the user's own."""
    if isinstance(dataset, datasets.Dataset) and (
        dataset.format["type"] == "custom" or len(set(LABEL_COLUMNS) & set(dataset.column_names)) > 1
    ):
        return False
    known = type(collator) in (type(None), DataCollatorWithPadding, DefaultDataCollator)
    return known or collator is default_data_collator


def column_values(dataset: Any, names: Sequence[str]) -> list[Any] | None:
    """The first of some columns that a `datasets.Dataset` or a list of samples has, without transforms, or `None`."""
    if isinstance(dataset, datasets.Dataset):  # a stream must not be read before training
        name = next((name for name in names if name in dataset.column_names), None)
        return None if name is None else list(dataset.with_format(None)[name])
    if not isinstance(dataset, (list, tuple)) or not all(isinstance(sample, Mapping) for sample in dataset):
        return None
    name = next((name for name in names if all(name in sample for sample in dataset)), None)
    values = [] if name is None else [sample[name] for sample in dataset]
    return [value.tolist() if isinstance(value, (Tensor, np.ndarray)) else value for value in values] or None


def seen_labels(dataset: Any, collator: Any, batches: Callable[[Any], Any] | None = None) -> list[Any] | None:
    """The labels that batches of a data set hold, from its column of labels; `None` if that can't be known.

    Behind a transform or collator of the user's own, `batches`, loaders of parts of the data, show whether they do.
    """
    labels, is_seen = column_values(dataset, LABEL_COLUMNS), _is_seen(dataset, collator)
    if not labels or is_seen or batches is None:
        return labels if is_seen else None
    first = list({str(label): index for index, label in reversed(list(enumerate(labels)))}.values())
    rows = first[:: -(-len(first) // PROBED)]
    try:
        with unchanged_random_state():
            read = [torch.as_tensor(batch["labels"]) for batch in batches(part_of(dataset, rows))]
        is_same = torch.equal(torch.cat(read).cpu(), torch.tensor([labels[row] for row in rows]))
    except Exception:  # whatever the user's code raises, here or in the first step
        return None
    return labels if is_same else None


def part_of(dataset: Any, rows: Sequence[int]) -> Any:
    """Some samples of a data set."""
    return dataset.select(rows) if isinstance(dataset, datasets.Dataset) else Subset(dataset, rows)


class _Share(IterableDataset[Any]):
    """Each of a number of processes' samples of a stream, one after another."""

    def __init__(self, stream: Any, rank: int, processes: int) -> None:
        self._stream, self._rank, self._processes = stream, rank, processes

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self._stream), self._rank, None, self._processes)


def sample_loader(trainer: Any, dataset: Any, is_shared: bool = False, workers: int | None = None) -> DataLoader[Any]:
    """Each sample of a data set, or of this process's share of it, once; unlike `get_eval_dataloader`."""
    args, collator = trainer.args, trainer.data_collator
    check_label_names(dataset, collator, trainer.parent)
    if isinstance(dataset, datasets.Dataset):
        dataset = trainer._remove_unused_columns(dataset, description="evaluation")
    else:
        collator = trainer._get_collator_with_removed_columns(collator, description="evaluation")
    if isinstance(dataset, IterableDataset):
        workers = 0  # each would read the whole stream
    if is_shared and args.world_size > 1:
        share = (args.process_index, args.world_size)
        is_stream = isinstance(dataset, IterableDataset)
        dataset = _Share(dataset, *share) if is_stream else Subset(dataset, range(share[0], len(dataset), share[1]))
    workers = args.dataloader_num_workers if workers is None else workers
    return DataLoader(dataset, batch_size=args.eval_batch_size, collate_fn=collator, num_workers=workers)


def calibration_options(trainer: Any, dataset: Any, calibration: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a cut, with the samples of a data set for one that needs some and is given none."""
    config, asked = trainer.nemo_config, {name for name, value in options.items() if value is not None}
    if config.masks == "assigned" and not asked & {"retention", "max_loss", "threshold", "round_to", "inputs"}:
        options = {**options, "retention": config.retention_target}
    if calibration is None and all(options.get(name) is None for name in ("retention", "max_loss")):
        return dict(options)
    if calibration is None and dataset is None:
        raise ValueError(
            "Got no data to cut on; expected samples. Pass extract_module(..., calibration=...), and its module to "
            "evaluate_module(..., module=...)."
        )
    samples = sample_loader(trainer, dataset) if calibration is None else calibration
    return {"calibration": samples, "show_progress": not trainer.args.disable_tqdm, **options}


def groups_from_column(dataset: Any, column: str, model: Any) -> dict[str, list[LabelLike]]:
    """Reads label groups, name to label ids, from a column of the groups' names or of a `ClassLabel`'s integers."""
    id2label = {int(index): str(name) for index, name in model.config.id2label.items()}
    several = model.config.problem_type == SEVERAL_LABELS
    if several or not has_length(dataset):
        kind = "a model whose samples have several labels" if several else "a stream, which only training reads"
        raise ValueError(f"Got group_column for {kind}; expected label_groups. Pass NeMoConfig(label_groups={{...}}).")
    values, labels = column_values(dataset, (column,)), column_values(dataset, LABEL_COLUMNS)
    if values is None or labels is None:
        raise ValueError(
            f"Got group_column={column!r}; expected a column of the datasets.Dataset to train on, which has "
            f"{getattr(dataset, 'column_names', 'no columns')}. Name one of them, or pass label_groups."
        )
    names = getattr(getattr(dataset, "features", {}).get(column), "names", None)
    owner: dict[int, str] = {}
    for label, value in zip(labels, values, strict=True):
        if label == IGNORED:
            continue
        if not isinstance(label, int) or label not in id2label:
            raise ValueError(
                f"Got group_column={column!r} beside the label {label!r}; expected ids from 0 to {len(id2label) - 1}. "
                "Store ids in the column of labels, or pass label_groups."
            )
        group = _group_name(value, names, column)
        if owner.setdefault(label, group) != group:
            raise ValueError(
                f"Got the label {id2label[label]!r} in the groups {owner[label]!r} and {group!r} of the column "
                f"{column!r}; expected one group per label. Correct the data, or pass label_groups."
            )
    groups: dict[str, list[LabelLike]] = {}
    for label in sorted(owner):
        groups.setdefault(owner[label], []).append(label)
    for label in sorted(set(id2label) - set(owner)):  # without a sample
        groups[id2label[label] if id2label[label] not in groups else f"{id2label[label]} ({label})"] = [label]
    return groups


def _group_name(value: Any, names: Sequence[str] | None, column: str) -> str:
    if value is None or value != value or value == "":  # NaN is what pandas makes of a missing value
        raise ValueError(
            f"Got a sample without a group in the column {column!r}; expected a name for each. Fill the column, or "
            "pass label_groups."
        )
    return str(names[value]) if names and isinstance(value, int) else str(value)


def check_label_names(dataset: Any, collator: Any, model: Any) -> None:
    """Refuses a column of labels whose `ClassLabel` gives the model's names other ids than the model does."""
    features = getattr(dataset, "features", None) or {}
    column = next((name for name in LABEL_COLUMNS if name in features), None)
    if column is None or not _is_seen(dataset, collator):
        return
    check_label_numbers(getattr(features[column], "names", None) or [], column, model.config.id2label)


def check_labels(labels: Sequence[Any], model: Any) -> Tensor | None:
    """Refuses labels of a column or list that are not those of a model; returns them as `label_targets`.

    `None` if they are lists that only training can tell to be of several labels or chances.
    """
    names = {int(index): str(name) for index, name in (model.config.id2label or {}).items()}
    texts = [label for label in labels if isinstance(label, str)]
    if texts or None in labels:
        do = f"Remove samples without a label, or give them the label {IGNORED}, which counts nowhere."
        if texts:
            do = "Use dataset.class_encode_column('label'), and load the model with as many num_labels."
        for known, number in ((map(str, names), "int"), (names.values(), "model.config.label2id.get")):
            if texts and set(texts) <= set(known):  # class_encode_column would number them by the alphabet
                do = f"Turn texts into ids: dataset.map(lambda sample: {{'label': {number}(sample['label'])}})."
        wrong = texts[0] if texts else None
        raise ValueError(f"Got the label {wrong!r} in the training data; expected ids from 0 to {len(names) - 1}. {do}")
    try:
        values = torch.tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:  # lists of unequal lengths, None or texts within lists
        raise ValueError(
            f"Got labels of different lengths or kinds in the training data ({error}); expected one id for each "
            f"sample, or where one may have several labels a list of {len(names)} zeros and ones. Correct the data."
        ) from error
    if values.ndim == 2 and values.is_floating_point() and not is_settled(model):
        return None
    return label_targets(values, len(names), model.config.problem_type == SEVERAL_LABELS, checks_values=True)


def check_before_training(trainer: Any, counted: Any) -> None:
    """Refuses to train without what is needed afterwards, and closes the groups of labels that have no sample.

    `counted` is what the relevance will be counted on.
    """
    parent, data = trainer.parent, trainer.train_dataset
    check_data_sets(data, trainer._relevance_dataset, trainer.data_collator)  # which may be others by now
    if counted is None:
        raise ValueError(
            "Got no data to count the relevance on after training; expected some beside an own get_train_dataloader. "
            "Pass NeMoTrainer(..., relevance_dataset=...)."
        )
    labels = seen_labels(data, trainer.data_collator, lambda part: sample_loader(trainer, part, workers=0))
    unseen: set[int] = set()
    if labels is not None:
        if (targets := check_labels(labels, parent)) is None:
            _settle(trainer, torch.tensor(labels))
            targets = check_labels(labels, parent)
        assert targets is not None
        ids = label_ids(targets, parent.config.has_several_labels)
        seen = ids.any(0).nonzero() if ids.ndim == 2 else ids.unique()
        unseen = set(parent.config.names) - set(seen.flatten().tolist())
        if len(unseen) == len(parent.config.names):
            raise ValueError(
                "Got training data without a sample of any label; expected some of each. Correct the column of labels."
            )
    elif trainer._reads_groups:
        raise ValueError(
            "Got group_column with labels that a transform or data collator makes; expected label_groups. Pass "
            "NeMoConfig(label_groups={...})."
        )
    if counted is not data and has_length(counted):
        with unchanged_random_state():
            batch = next(iter(sample_loader(trainer, part_of(counted, range(min(len(counted), 2))), workers=0)))
        read_batch(trainer, batch, is_watched=True)
    start_relevance(parent, unseen)


def _settle(trainer: Any, labels: Any) -> None:
    parent = trainer.parent
    if is_settled(parent):
        return
    settle_problem_type(parent, labels, trainer.compute_loss_func is not None)
    if parent.config.has_several_labels and trainer.args.label_smoothing_factor:
        logger.warning(
            "label_smoothing_factor has no effect: by its lists of floats, a sample may have several labels. For the "
            "chances of one label, load the model with problem_type='%s'.", SINGLE_LABEL,
        )  # fmt: skip


def read_batch(trainer: Any, batch: dict[str, Any], is_watched: bool) -> tuple[dict[str, Any], Any, Tensor, Tensor]:
    """Takes a batch apart: model inputs, labels as they are, `label_targets`, and `label_ids` of these.

    The first labels say what kind a model without `problem_type` is of. `is_watched`: whether values are checked.
    """
    parent = trainer.parent
    inputs, given = split_batch(parent, batch)
    _settle(trainer, given)
    has_several = parent.config.has_several_labels
    targets = label_targets(given, len(parent.config.names), has_several, is_watched or None).to(parent.device)
    if trainer.compute_loss_func is not None:
        check_own_loss("compute_loss_func", parent)
    return inputs, given, targets, label_ids(targets, has_several)
