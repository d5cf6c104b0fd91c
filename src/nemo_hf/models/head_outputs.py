"""What models return, and what heads answer in one layout: once a sample, or for each token, pixel or box of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput


@dataclass
class NeMoOutput(ModelOutput):
    """Output of a parent or a module.

    `logits` have shape (batch, labels), as in `transformers`, or of tokens (batch, tokens, labels), of segmentation
    (batch, labels, height, width), and of detectors (batch, queries, labels), where many have one more for "no object".
    `loss`, `hidden_states` and `attentions` are as in `transformers`, and so is what detectors add, as `pred_boxes`.
    `neuron_masks`, of parents in training or on request, maps site keys to soft masks, shape (batch, calls, neurons).
    `rejection_scores`, of modules that `calibrate_rejection` prepared, are the chances that the inputs have none of the
    module's labels, shape (batch,); inputs over `config.rejection["threshold"]` are to be rejected. In eval mode the
    logits of these modules end with one for `config.rejected_label`, unless that is `None`: see docs/rejection.md.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    neuron_masks: dict[str, Tensor] | None = None
    rejection_scores: Tensor | None = None


def labels_last(logits: Tensor) -> Tensor:
    """Logits of shape (batch, ..., labels); those of pixels come as (batch, labels, height, width)."""
    return logits.movedim(1, -1) if logits.ndim == 4 else logits


def restrict_logits(logits: Tensor, label_ids: Sequence[int], num_labels: int) -> Tensor:
    """The logits of some of `num_labels` labels, in their order, as a module of these has them: same layout.

    A last output of detectors for "no object" stays.
    """
    dim = 1 if logits.ndim == 4 else -1
    kept = [*label_ids, *range(num_labels, logits.shape[dim])]
    return logits.index_select(dim, torch.tensor(kept, device=logits.device))


def answers(outputs: Any, label_ids: Sequence[int] | None = None, num_labels: int = 0) -> Tensor:
    """All that a model answers, (batch, ..., numbers): logits, of some labels or all, then the boxes of detectors."""
    logits = outputs.logits if label_ids is None else restrict_logits(outputs.logits, label_ids, num_labels)
    boxes = outputs.get("pred_boxes")
    return labels_last(logits) if boxes is None else torch.cat([labels_last(logits), boxes], -1)


def difference(got: Tensor, expected: Tensor, task: str) -> float:
    """Largest difference of `answers` of two models for a task; NaN if one has NaN or infinite numbers.

    Of detectors, some of which rank their queries, each query is compared with the nearest one of the other model:
    rounding may change the order of near ties.
    """
    apart = (got - expected).abs()
    if task == "object-detection" and bool(apart.isfinite().all()):
        between = torch.cdist(got.double(), expected.double(), p=torch.inf)
        return torch.maximum(between.amin(1).max(), between.amin(2).max()).item()
    return apart.max().item()
