"""Checks of the labels in a batch or a data set."""

from collections.abc import Mapping, Sequence

import torch


def check_label_shape(labels: torch.Tensor, has_several: bool) -> None:
    """Raises a ValueError if a batch has one label a sample where the model is for several, or the other way round."""
    if (labels.ndim == 2) != has_several:
        kind = "a list of zeros and ones" if labels.ndim == 2 else "one label id"
        problem = "multi_label_classification" if labels.ndim == 2 else "single_label_classification"
        raise ValueError(
            f"Got labels of shape {tuple(labels.shape)}, {kind} a sample; expected "
            f"{'a list' if has_several else 'an id'}, "
            f"as the model's problem_type says. Load the model with problem_type={problem!r}."
        )


def check_label_counts(counts: Sequence[float], id2label: Mapping[int, str]) -> None:
    """Raises a ValueError if some label has no sample; `counts` are numbers of samples by label id."""
    missing = [id2label[index] for index, count in enumerate(counts) if not count]
    if missing:
        raise ValueError(
            f"Got training data without a sample of {missing[:12]}; expected at least one of each of the "
            f"{len(counts)} labels, or their modules would be empty. Add samples, or load the model with fewer labels."
        )
