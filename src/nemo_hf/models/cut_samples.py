"""Samples of a cut, sorted: those with the module's labels, others, and those that measure it."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nemo_hf.neurons.trial_calls import on_device

from .batches import Pair, one_of, sample_count, select_pair
from .calibration import Calibration, read_calibration
from .cut_source import CutTask, Inputs
from .head_outputs import labels_last
from .labels import has_label

logger = logging.getLogger(__name__)

FEWEST_LABELLED, LEAST_AGREEMENT = 10, 0.25  # labels in another order agree with a good model's by chance only
HELD_OUT = 3  # one sample of so many measures the loss, where no others are given for that


@dataclass
class CutSamples:
    """Batches of samples: with the module's labels and of others, to cut on, and of both kinds, to measure on."""

    own: list[Pair] = field(default_factory=list)
    others: list[Pair] = field(default_factory=list)
    held_out: list[Pair] = field(default_factory=list)
    held_out_others: list[Pair] = field(default_factory=list)

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
        if validation is not None:
            other = cls()
            other._sort(read(validation), task.label_ids)
            found.held_out, found.held_out_others = other.own, other.others
        elif max_loss is not None:
            found._hold_back()
        if max_loss is not None and (not found.held_out or any(labels is None for _, labels in found.held_out)):
            raise ValueError(
                "Got max_loss without labelled samples of the module's labels; expected some to measure the loss on. "
                "Pass validation= with labels, or retention= in place of max_loss."
            )
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

    def _hold_back(self) -> None:
        is_held = one_of(HELD_OUT, 0, self.count)
        parts = list(zip(self.own, is_held.split([sample_count(inputs) for inputs, _ in self.own]), strict=True))
        self.held_out = [select_pair(pair, part) for pair, part in parts if part.any()]
        self.own = [select_pair(pair, ~part) for pair, part in parts if not part.all()]


def accuracy(
    model: PreTrainedModel, task: CutTask, samples: Sequence[Pair], label_ids: Sequence[int] | None = None
) -> float | None:
    """Share of right answers among the task's labels; `None` without labels, or where answers have another shape.

    `label_ids` are the model's outputs for these labels; `None`: the first ones.
    """
    right = total = 0
    for inputs, labels in samples:
        logits = labels_last(model(**on_device(model, inputs), return_dict=True).logits).cpu()
        logits = logits[..., : len(task.label_ids)] if label_ids is None else logits[..., list(label_ids)]
        if labels is not None and labels.dtype == torch.bool:
            hits = (logits > 0) == labels[:, task.label_ids]
        elif labels is None or logits.shape[:-1] != labels.shape:
            return None
        else:
            answered = torch.tensor(task.label_ids)[logits.argmax(-1)]
            hits = (answered == labels)[torch.isin(labels, torch.tensor(task.label_ids))]
        right, total = right + int(hits.sum()), total + hits.numel()
    return right / total if total else None


def _trimmed(inputs: Inputs) -> Inputs:
    """Inputs without the tokens that only longer samples beside them needed."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.ndim != 2 or not bool(mask.any()):
        return inputs
    used = int(mask.any(0).nonzero().max()) + 1
    return {name: v[:, :used] if v.shape[:2] == mask.shape else v for name, v in inputs.items()}
