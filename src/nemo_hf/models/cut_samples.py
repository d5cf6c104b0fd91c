"""Calibration samples of a cut, sorted: those with the module's labels, others, and those that are held back."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .calibration import Calibration, read_calibration
from .cut_source import CutTask, Inputs

logger = logging.getLogger(__name__)

Pair = tuple[Inputs, Tensor | None]
FEWEST_LABELLED, LEAST_AGREEMENT = 10, 0.25  # labels in another order agree with a good model's by chance only
HELD_OUT = 3  # one sample of so many measures the loss, where no others are given for that


@dataclass
class CutSamples:
    """Batches of calibration samples: with the module's labels, of others, and those that are held back."""

    own: list[Pair] = field(default_factory=list)
    others: list[Pair] = field(default_factory=list)
    held_out: list[Pair] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Number of own samples."""
        return sum(_rows(inputs) for inputs, _ in self.own)

    @classmethod
    def read(
        cls, model: PreTrainedModel, task: CutTask, calibration: Any, validation: Any, max_loss: float | None,
        processing_class: Any, max_samples: int, batch_size: int,
    ) -> "CutSamples":  # fmt: skip
        """Reads the samples and sorts them by their labels."""
        read = partial(read_calibration, model, processing_class=processing_class, batch_size=batch_size,
                       max_samples=max_samples, labels_wanted=task.label_ids)  # fmt: skip
        found = cls()
        found._sort(read(calibration), task.label_ids)
        if not found.own:  # `read_calibration` has warned of it
            found.own, found.others = found.others, []
        if max_loss is not None:
            found._hold_back(None if validation is None else read(validation), task.label_ids)
        return found

    def warn_of_other_labels(self, likeliest: Sequence[Tensor]) -> None:
        """Warns where hardly any label is what the model answers, `likeliest`: the ids may be of another order."""
        given = [labels for _, labels in self.own if labels is not None and labels.ndim == 1]
        if not given or len(given) != len(likeliest):
            return
        labels, answered = torch.cat(given), torch.cat(list(likeliest))
        right, known = int((labels == answered).sum()), int((labels >= 0).sum())
        if known >= FEWEST_LABELLED and right < LEAST_AGREEMENT * known:
            logger.warning(
                "The model answers only %d of %d calibration samples as they are labelled. Check that it is trained, "
                "and that the labels are ids of model.config.id2label, or pass the samples without labels.",
                *(right, known),
            )

    def _sort(self, calibration: Calibration, label_ids: Sequence[int]) -> None:
        for inputs, labels in calibration:
            is_own = own_rows(labels, label_ids, _rows(inputs))
            for chosen, part in ((is_own, self.own), (~is_own, self.others)):
                if bool(chosen.any()):
                    part.append(_chosen((inputs, labels), chosen))

    def _hold_back(self, validation: Calibration | None, label_ids: Sequence[int]) -> None:
        if validation is not None:
            other = CutSamples()
            other._sort(validation, label_ids)
            self.held_out = other.own
        else:
            is_held = torch.arange(self.count) % HELD_OUT == HELD_OUT - 1
            parts = list(zip(self.own, is_held.split([_rows(inputs) for inputs, _ in self.own]), strict=True))
            self.held_out = [_chosen(pair, part) for pair, part in parts if part.any()]
            self.own = [_chosen(pair, ~part) for pair, part in parts if not part.all()]
        if not self.held_out or any(labels is None for _, labels in self.held_out):
            raise ValueError(
                "Got max_loss without labelled samples of the module's labels; expected some to measure the loss on. "
                "Pass validation= with labels, or retention= in place of max_loss."
            )


def _rows(inputs: Mapping[str, Tensor]) -> int:
    return len(next(iter(inputs.values())))


def _chosen(pair: Pair, chosen: Tensor) -> Pair:
    inputs, labels = pair
    found = {name: value[chosen] for name, value in inputs.items()}
    mask = found.get("attention_mask")
    is_part = not bool(chosen.all()) and labels is not None and (labels.ndim == 1 or labels.dtype == torch.bool)
    if mask is not None and mask.ndim == 2 and is_part:
        used = int(mask.any(0).nonzero().max()) + 1 if bool(mask.any()) else mask.shape[1]  # others may be longer
        found = {name: v[:, :used] if v.shape[:2] == mask.shape else v for name, v in found.items()}
    return found, None if labels is None else labels[chosen]


def own_rows(labels: Tensor | None, label_ids: Sequence[int], samples: int) -> Tensor:
    """Which samples have one of some labels, (batch,); all, where that is not known or labels are of places in them."""
    if labels is not None and labels.dtype == torch.bool and labels.ndim == 2:
        return labels[:, list(label_ids)].any(-1)
    if labels is None or labels.ndim != 1:
        return torch.ones(samples, dtype=torch.bool)
    return torch.isin(labels, torch.tensor(label_ids))
