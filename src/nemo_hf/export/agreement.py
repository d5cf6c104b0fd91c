"""Compares what a file answers with what its module answers, on calibration samples or on random inputs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_hf.models.base import NeMoPreTrainedModel
from nemo_hf.models.batches import select_pair
from nemo_hf.models.calibration import read_calibration
from nemo_hf.models.finiteness import check_outputs
from nemo_hf.models.head_outputs import answers, difference, labels_last
from nemo_hf.models.labels import has_label
from nemo_hf.neurons.sites import UnsupportedArchitectureError

Inputs = Mapping[str, Tensor]

MIN_AGREEMENT = 0.98
LARGEST_NOISE = 0.5  # by which logits of random inputs may differ, as a share of the largest
BATCH, MOST_SAMPLES = 32, 1000


@dataclass(frozen=True)
class Agreement:
    """How the answers of a file compare with its module's, in float32."""

    samples: int
    are_random: bool  # random inputs, which lie near the borders between labels, and not calibration samples
    agreement: float  # share of equal answers, in [0, 1]; rejections are answers
    accepted_samples: int  # that the module doesn't reject
    accepted_agreement: float | None  # share of equal answers to these; None if there are none
    logit_difference: float  # the largest
    largest_logit: float  # of the module


def needed_share(min_agreement: Any, calibration: Any) -> float:
    """The share that `min_agreement` asks for; one out of range, or of no samples, is a `ValueError`."""
    if min_agreement is None:
        return MIN_AGREEMENT
    is_number = isinstance(min_agreement, (int, float)) and not isinstance(min_agreement, bool)
    if not is_number or not 0 <= min_agreement <= 1:
        raise ValueError(
            f"Got min_agreement={min_agreement!r}; expected a share of the samples in [0, 1], such as 0.98."
        )
    if calibration is None:
        raise ValueError(
            f"Got min_agreement={min_agreement!r} and no calibration samples; expected some, on which answers are "
            "compared. Pass calibration=, on the command line --dataset, or leave min_agreement out."
        )
    return float(min_agreement)


def read_samples(module: NeMoPreTrainedModel, calibration: Any) -> list[dict[str, Tensor]]:
    """Batches of calibration samples; samples of other labels are left out where the module doesn't reject them."""
    own, found = module.config.label_ids or [], []
    most = MOST_SAMPLES // 2 if module.config.rejection else MOST_SAMPLES  # and as many of other labels
    read = read_calibration(module, calibration, None, BATCH, most, labels_wanted=own)
    for inputs, labels in read:
        if labels is not None and own and not module.config.rejection:
            is_own = has_label(labels, own)
            inputs, _ = select_pair((inputs, labels), is_own)
        if len(next(iter(inputs.values()))):
            found.append(in_float32(inputs))
    if not found:
        raise ValueError(
            f"Got calibration samples of other labels alone; expected some of the module's labels {own}, by their ids "
            "in the parent. Pass samples without labels, or others."
        )
    return found


def in_float32(inputs: Inputs) -> dict[str, Tensor]:
    """Inputs on the CPU, without labels."""
    own = {name: value.cpu() for name, value in inputs.items() if name != "labels"}
    return {name: value.float() if value.is_floating_point() else value for name, value in own.items()}


@torch.no_grad()
def measure_agreement(
    module: NeMoPreTrainedModel, run: Callable[[Inputs], Inputs], batches: Sequence[Inputs], are_random: bool
) -> Agreement:
    """Runs a module and its file, whose outputs `run` gives by name, on the same batches."""
    samples, same, accepted, apart, largest = 0, [], [], [], []
    names = [name for _, name in sorted(module.config.id2label.items())]
    own = module.num_labels if module.config.rejection else None  # the logit behind these is of the rejected label
    for batch in batches:
        expected, got = module(**batch), run(batch)
        check_outputs(module, batch, answers(expected), names)
        logits, right = (labels_last(outputs["logits"])[..., :own] for outputs in (got, expected))
        samples += len(right)
        same.append(_same_answers(module, batch, got, expected).flatten())
        accepted.append(torch.ones_like(same[-1]) if own is None else ~_is_rejected(module, expected))
        apart.append(difference(logits, right, module.task))
        largest.append(right.abs().max().item())
    shares, are_accepted = torch.cat(same).double(), torch.cat(accepted)
    count = samples if own is None else int(are_accepted.sum())
    return Agreement(
        samples=samples,
        are_random=are_random,
        agreement=shares.mean().item(),
        accepted_samples=count,
        accepted_agreement=shares[are_accepted].mean().item() if count else None,
        logit_difference=torch.tensor(apart).max().item(),
        largest_logit=max(largest),
    )


def _is_rejected(module: NeMoPreTrainedModel, outputs: Any) -> Tensor:
    """Which samples a calibrated module, or its file, rejects."""
    rejected: Tensor = outputs["rejection_scores"] > (module.config.rejection or {})["threshold"]
    return rejected


def _same_answers(module: NeMoPreTrainedModel, batch: Inputs, got: Inputs, expected: Any) -> Tensor:
    """Which answers are equal, of samples, tokens, pixels or boxes; padding is left out."""
    logits, right = labels_last(got["logits"]), labels_last(expected["logits"])
    if module.task == "object-detection":  # whose queries may come in another order
        ours, theirs = (torch.cat([labels_last(of["logits"]), of["pred_boxes"]], -1) for of in (expected, got))
        nearest = torch.cdist(ours, theirs, p=torch.inf).argmin(-1)
        logits = logits.gather(1, nearest[..., None].expand_as(right))
    if module.config.has_several_labels:
        same = ((logits > 0) == (right > 0)).all(-1)
    else:
        same = logits.argmax(-1) == right.argmax(-1)
    if module.config.rejection:
        same &= _is_rejected(module, got) == _is_rejected(module, expected)
    mask = batch.get("attention_mask")
    return same[mask.bool()] if mask is not None and mask.shape == same.shape else same


def check_agreement(found: Agreement, needed: float, what: str) -> None:
    """Refuses a file that answers otherwise than its module with an `UnsupportedArchitectureError`."""
    allowed = LARGEST_NOISE * max(1.0, found.largest_logit)
    if found.are_random and not found.logit_difference <= allowed:  # also NaN
        raise UnsupportedArchitectureError(
            f"Got {what} whose logits differ from the module's by {found.logit_difference:.2g} on random inputs; "
            f"expected at most {allowed:.2g}. Pass calibration samples to see what its answers are worth, or None for "
            "quantize."
        )
    of_all = found.agreement, f"{found.samples} samples"
    of_accepted = found.accepted_agreement, f"the {found.accepted_samples} samples that the module doesn't reject"
    for share, of in () if found.are_random else (of_all, of_accepted):
        if share is not None and not share >= needed:
            raise UnsupportedArchitectureError(
                f"Got {what} that gives the module's answer on {share:.2%} of {of}; expected at least {needed:.2%}. "
                "Pass a wider type or None for quantize, or a lower min_agreement if that will do."
            )
