"""Metrics as functions of tensors: cohesion and coupling of masks, and any metric of the library `evaluate`."""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from nemo_hf.models.labels import shares_group

MetricLike = str | Sequence[str] | Mapping[str, Mapping[str, Any]]  # names, or keyword arguments of `compute` by name


def jaccard_indices(masks: Tensor) -> Tensor:
    """Jaccard index of every two masks, (samples, neurons) to (samples, samples); two empty ones count as equal."""
    opened = masks.float()
    both = opened @ opened.T
    sizes = opened.sum(-1)
    either = sizes[:, None] + sizes[None, :] - both
    return torch.where(either == 0, torch.ones_like(both), both / either.clamp(min=1))  # NaN stays NaN


def cohesion_and_coupling(masks: Tensor, groups: Tensor) -> tuple[float | None, float | None]:
    """Mean Jaccard index of masks within groups (cohesion) and between them (coupling); `None` without such pairs.

    `masks` are open neurons, (samples, neurons); `groups` as in `shares_group`. The measures are those of MwT (arXiv
    2306.09376) and NeMo (arXiv 2508.11348).
    """
    indices, same = jaccard_indices(masks), shares_group(groups)
    different_samples = ~torch.eye(len(groups), dtype=torch.bool, device=groups.device)
    if not bool(indices.isfinite().all()):
        raise ValueError("Got masks that are NaN or infinite; expected finite numbers. Leave these samples out.")
    of_pairs = [indices[pairs & different_samples] for pairs in (same, ~same)]
    cohesion, coupling = (found.mean().item() if len(found) else None for found in of_pairs)
    return cohesion, coupling


class LibraryMetrics:
    """Metrics of the library `evaluate`, loaded before they are needed; `None` loads none and needs no library."""

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
                        f"Got {key}={value!r} from the metric {name!r}; expected a finite number under its own "
                        "name. Leave it out, or pass keyword arguments that average over the labels."
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
