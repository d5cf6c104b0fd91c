"""The evaluation data that a call of a trainer means: those that are given, or one of the trainer's by its name."""

from typing import Any

from .data import part_of


def one_dataset(given: Any, known: Any) -> Any:
    """Finds one data set: `given` itself or by name, or if it is `None` that of the trainer, `known`."""
    names = (
        f"one of the names {list(known)}" if isinstance(known, dict) else "a data set, since the trainer has no names"
    )
    if isinstance(given, str):
        if not isinstance(known, dict) or given not in known:
            raise ValueError(f"Got eval_dataset={given!r}; expected {names}. Pass it as eval_dataset.")
        given = known[given]
    dataset = known if given is None else given
    if dataset is None:
        raise ValueError("Got no evaluation data; expected a data set. Pass it as eval_dataset.")
    if isinstance(dataset, dict) and dataset:
        how = f"eval_dataset={next(iter(dataset))!r}" if given is None else f"data[{next(iter(dataset))!r}]"
        raise ValueError(f"Got the data sets {list(dataset)} at once; expected one. Pass one of them, as in {how}.")
    if hasattr(dataset, "__len__") and not len(dataset):
        raise ValueError("Got an empty evaluation data set; expected samples. Pass another one as eval_dataset.")
    return dataset


def spread_samples(dataset: Any, most: int) -> Any:
    """At most so many samples, spread over the data set, since data are often sorted by label; streams stay whole."""
    if not hasattr(dataset, "__len__"):
        return dataset
    return part_of(dataset, range(0, len(dataset), -(-len(dataset) // most)))
