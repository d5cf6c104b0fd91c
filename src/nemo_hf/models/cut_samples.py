"""Calibration samples of a cut, sorted: those with the module's labels, others, and those that are held back."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .batches import Pair, sample_count, select_pair
from .calibration import Calibration, read_calibration
from .cut_source import CutTask, Inputs
from .labels import has_label

logger = logging.getLogger(__name__)

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
        return sum(sample_count(inputs) for inputs, _ in self.own)

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
            every = torch.ones(sample_count(inputs), dtype=torch.bool)
            is_own = every if labels is None else has_label(labels, label_ids)
            for chosen, part in ((is_own, self.own), (~is_own, self.others)):
                if bool(chosen.any()):
                    own, found = select_pair((inputs, labels), chosen)
                    is_of_places = found is not None and found.ndim > 1 and found.dtype != torch.bool
                    part.append((own if bool(chosen.all()) or is_of_places else _trimmed(own), found))

    def _hold_back(self, validation: Calibration | None, label_ids: Sequence[int]) -> None:
        if validation is not None:
            other = CutSamples()
            other._sort(validation, label_ids)
            self.held_out = other.own
        else:
            is_held = torch.arange(self.count) % HELD_OUT == HELD_OUT - 1
            parts = list(zip(self.own, is_held.split([sample_count(inputs) for inputs, _ in self.own]), strict=True))
            self.held_out = [select_pair(pair, part) for pair, part in parts if part.any()]
            self.own = [select_pair(pair, ~part) for pair, part in parts if not part.all()]
        if not self.held_out or any(labels is None for _, labels in self.held_out):
            raise ValueError(
                "Got max_loss without labelled samples of the module's labels; expected some to measure the loss on. "
                "Pass validation= with labels, or retention= in place of max_loss."
            )


def _trimmed(inputs: Inputs) -> Inputs:
    """Inputs without the tokens that only longer samples beside them needed."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.ndim != 2 or not bool(mask.any()):
        return inputs
    used = int(mask.any(0).nonzero().max()) + 1
    return {name: v[:, :used] if v.shape[:2] == mask.shape else v for name, v in inputs.items()}
