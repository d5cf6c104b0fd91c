"""Batches of labelled samples: checked, on a model's device, and numbered as in the data."""

import math
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .configuration import SEVERAL_LABELS
from .labels import check_answers_once, label_ids, label_targets
from .saved_model import SavedModel

Pair = tuple[dict[str, Any], Tensor | None]  # inputs and labels of a batch
GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples, taken modulo 1, spread evenly and never repeat


def one_of(every: int, start: int, count: int) -> Tensor:
    """Marks one of `every` samples from place `start` on, spread evenly, but in no period: labels may come in one."""
    places = torch.arange(start, start + count, dtype=torch.float64)
    return places * GOLDEN % 1 >= 1 - 1 / every


def split_batch(model: SavedModel, batch: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """Moves a batch to a model's device and takes its labels out as they are."""
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"Got a {type(batch).__name__} as batch; expected tensors by name. Pass a DataLoader or a list of batches."
        )
    inputs = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    if (labels := inputs.pop("labels", None)) is None:
        raise ValueError(
            f"Got a batch with {sorted(inputs)}; expected 'labels' in it. Add a label column to the data, or let the "
            "data collator name it 'labels'."
        )
    return inputs, labels


def checked_batch(model: SavedModel, batch: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """Moves a batch to a model's device and takes its labels out, as `label_ids` returns them.

    Labels are ids of the parent, also for modules; of composed models, whose labels may be fewer, they have no limit.
    """
    check_answers_once(model)
    inputs, given = split_batch(model, batch)
    if isinstance(given, Number) or getattr(given, "ndim", 1) == 0:
        raise ValueError("Got a sample with one label; expected batches. Pass DataLoader(dataset, batch_size=8).")
    config: Any = model.config
    role, has_several = getattr(config, "role", None), config.problem_type == SEVERAL_LABELS
    names = config.base_config.id2label if role == "module" else config.id2label
    targets = label_targets(given, len(names or ()) if role else None, has_several, checks_values=True)
    tensors = [value for value in inputs.values() if isinstance(value, Tensor) and value.ndim]
    if len(targets) != (samples := len(tensors[0]) if tensors else 0):
        raise ValueError(
            f"Got {len(targets)} labels for {samples} samples in tensors; expected one for each. Correct the batches, "
            "or let the data collator make tensors."
        )
    return inputs, label_ids(targets, has_several).to(model.device)


def labelled_batches(
    model: SavedModel, batches: Iterable[Mapping[str, Any]]
) -> Iterator[tuple[dict[str, Any], Tensor, list[int]]]:
    """Yields inputs, labels and numbers of the samples that have a label; the numbers count the others (-100) too."""
    seen = 0
    for batch in batches:
        inputs, labels = checked_batch(model, batch)
        is_known = labels >= 0 if labels.ndim == 1 else torch.ones_like(labels[:, 0])
        numbers = [seen + place for place in is_known.nonzero().flatten().tolist()]
        seen += len(labels)
        if numbers:
            yield select_samples(inputs, is_known), labels[is_known], numbers


def select_samples(inputs: Mapping[str, Any], chosen: Tensor) -> dict[str, Any]:
    """The inputs of some samples: `chosen` is boolean, (batch,), or their places."""
    return {name: value[chosen] if isinstance(value, Tensor) else value for name, value in inputs.items()}


def sample_count(inputs: Mapping[str, Any]) -> int:
    """Number of samples of a batch of inputs."""
    return len(next(iter(inputs.values())))


def select_pair(pair: Pair, chosen: Tensor) -> Pair:
    """Inputs and labels of some samples; likewise."""
    inputs, labels = pair
    return select_samples(inputs, chosen), None if labels is None else labels[chosen]


@contextmanager
def unchanged_random_state() -> Iterator[None]:
    """Restores the generators of random numbers at the end, so that a look at data does not change the training."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - that of transforms and collators
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
