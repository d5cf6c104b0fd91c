"""Metrics as functions of tensors: cohesion and coupling of masks, and any metric of the library `evaluate`."""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from nemo_hf.models.label_groups import shares_group

MetricLike = str | Sequence[str] | Mapping[str, Mapping[str, Any]]
"""Names of metrics of `evaluate` or paths of metric scripts, or keyword arguments of `compute` by name."""


def jaccard_indices(masks: Tensor) -> Tensor:
    """Jaccard index of every two masks, (samples, neurons) to (samples, samples); two empty ones count as equal."""
    opened = masks.float()
    both = opened @ opened.T
    sizes = opened.sum(-1)
    either = sizes[:, None] + sizes[None, :] - both
    return torch.where(either > 0, both / either.clamp(min=1), torch.ones_like(both))


def cohesion_and_coupling(masks: Tensor, groups: Tensor) -> tuple[float | None, float | None]:
    """Mean Jaccard index of masks within groups (cohesion) and between groups (coupling); `None` without such pairs.

    `masks` are the open neurons of each sample, (samples, neurons); `groups` its group, (samples,), or membership in
    groups, boolean, (samples, groups). Pairs of different samples that share a group are within it.

    References:
        MwT (arXiv 2306.09376), section on cohesion and coupling; NeMo (arXiv 2508.11348).
    """
    indices = jaccard_indices(masks)
    same = shares_group(groups)
    different_samples = ~torch.eye(len(groups), dtype=torch.bool, device=groups.device)
    within, between = indices[same & different_samples], indices[~same & different_samples]
    return within.mean().item() if len(within) else None, between.mean().item() if len(between) else None


class LibraryMetrics:
    """Metrics of the library `evaluate`, loaded before they are needed; `None` loads none and needs no library.

    Where a sample may have several labels, metrics are loaded with their configuration "multilabel".
    """

    def __init__(self, metrics: MetricLike | None, has_several_labels: bool) -> None:
        named = [metrics] if isinstance(metrics, str) else metrics or []
        self._arguments = dict(named) if isinstance(named, Mapping) else {name: {} for name in named}
        self._metrics = {name: _load(name, has_several_labels) for name in self._arguments}

    def compute(self, answers: Tensor, labels: Tensor) -> dict[str, float]:
        """Computes all metrics of label ids, shape (samples,), or of 0 and 1 for each label, (samples, labels)."""
        found: dict[str, float] = {}
        for name, metric in self._metrics.items():
            arguments = self._arguments[name]
            try:
                result = metric.compute(predictions=answers.tolist(), references=labels.tolist(), **arguments)
            except Exception as error:  # metrics raise whatever the libraries behind them do
                raise ValueError(
                    f"The metric {name!r} can't be computed with the keyword arguments {arguments!r} "
                    f"({type(error).__name__}: {error}). Pass others, as in metrics={{'f1': {{'average': 'macro'}}}}."
                ) from error
            for key, value in result.items():
                if key in found or not isinstance(value, Real) or not math.isfinite(value):
                    raise ValueError(
                        f"Got {key}={value!r} from the metric {name!r}; expected one finite number, under a name that "
                        "no other metric uses. Leave it out, or pass keyword arguments that average over the labels."
                    )
                found[key] = float(value)
        return found


def _load(name: str, has_several_labels: bool) -> Any:
    try:
        import evaluate
    except ImportError as error:
        raise ImportError("Metrics need the package evaluate. Run: pip install 'nemo-hf[metrics]'") from error
    try:
        return evaluate.load(name, "multilabel" if has_several_labels else None, keep_in_memory=True)
    except ImportError:
        raise  # it names the package that the metric needs
    except Exception as error:  # whatever the Hub's client or the script raises
        raise OSError(
            f"The metric {name!r} can't be loaded ({type(error).__name__}: {error}). Check the name and the connection "
            "to the Hub, or pass the path of a metric script."
        ) from error
