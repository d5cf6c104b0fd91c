"""Refines a module: distils its source's answers, restricted to the module's labels, on calibration samples."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, TrainingArguments

from nemo_hf.neurons.trial_calls import evaluating, on_device

from .atomic_writes import scratch_directory
from .base import NeMoPreTrainedModel
from .batches import unchanged_random_state
from .finiteness import check_finite
from .head_outputs import labels_last, restrict_logits
from .labels import IGNORED, labelled_cross_entropy
from .processors import stacked
from .rejection import energy

LEARNING_RATE = 1e-4
ENERGY_WEIGHT = 0.1  # without this term, answers improve and rejection suffers
ANSWERS, OWN = "source_logits", "is_own"  # what samples hold beside inputs and labels

Sample = dict[str, Tensor]


def refine_module(
    source: PreTrainedModel,
    module: NeMoPreTrainedModel,
    calibration: Iterable[tuple[Mapping[str, Tensor], Tensor | None]],
    epochs: int,
    learning_rate: float | None = None,
    batch_size: int = 32,
    seed: int = 0,
    show_progress: bool = True,
) -> None:
    """Trains a module to answer as its source does among the module's labels; the source stays as it is.

    The loss is the divergence of the module's answers from the source's, with a small weight the distance of their
    energies, for rejection, and where samples have labels of the module the task loss; samples of other labels add
    their energies only. Models of several labels a sample take the binary cross-entropy with the source's answers, and
    the task loss. Batch norms keep their statistics. The samples are held in memory.

    Args:
        source: The model that the module was cut from, a plain model or a parent.
        module: The module; it is trained in place, in float32, and counts as tuned from then on.
        calibration: Batches of inputs and labels, ids of the source or `None`, as `read_calibration` gives them.
        epochs: Passes over the samples, 0 or more.
        learning_rate: Highest learning rate of AdamW, which falls along a cosine; `None` takes 1e-4.
        batch_size: Samples of an optimizer step.
        seed: Seed of the order of samples and of dropout; the caller's random state is as before afterwards.
        show_progress: Whether to show a progress bar.

    Raises:
        ValueError: If `module` is a parent, a number is out of range, there are no samples or training makes NaN.

    References:
        Distillation as in Hinton et al. (arXiv 1503.02531), at temperature 1.
    """
    rate = LEARNING_RATE if learning_rate is None else learning_rate
    _check(module, epochs, rate, batch_size)
    if not epochs:
        return
    samples = _samples(source, module, calibration)
    device, dtype = module.device, module.dtype
    config: Any = module.config.base_config
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    is_text = "input_ids" in samples[0]
    at_once = 1 if is_text and pad is None else batch_size  # classifiers without padding take one text at a time
    module.float()
    try:
        with _unchanged_process(device), torch.enable_grad(), scratch_directory() as directory:
            args = TrainingArguments(
                output_dir=str(directory), num_train_epochs=epochs, learning_rate=rate, lr_scheduler_type="cosine",
                per_device_train_batch_size=at_once, gradient_accumulation_steps=batch_size // at_once, seed=seed,
                optim="adamw_torch", save_strategy="no", report_to=[], disable_tqdm=not show_progress,
                train_sampling_strategy="group_by_length" if is_text else "random", remove_unused_columns=False,
                dataloader_drop_last=len(samples) % at_once == 1 < at_once < len(samples),  # batch norms need two
                dataloader_pin_memory=False, use_cpu=device.type == "cpu",
            )  # fmt: skip
            args._n_gpu = min(args.n_gpu, 1)  # transformers 5.24 would replicate the module
            _train(module, args, pad or 0, samples)
            module.drop_stale_results()
    finally:
        module.to(dtype).to(device)  # type: ignore[arg-type]
        module.eval()
    module.zero_grad(set_to_none=True)
    check_finite(module)


def _check(module: NeMoPreTrainedModel, epochs: Any, rate: Any, batch_size: Any) -> None:
    if module.is_parent:
        raise ValueError("Got a parent to refine; expected a module. Cut one with extract_module.")
    for name, value, least in (("epochs", epochs, 0), ("batch_size", batch_size, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"Got {name}={value!r}; expected a whole number of {least} or more. Pass {name}=3, say.")
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < float("inf"):
        raise ValueError(f"Got learning_rate={rate!r}; expected a number above 0. Pass {LEARNING_RATE}, or None.")


def _samples(
    source: PreTrainedModel,
    module: NeMoPreTrainedModel,
    calibration: Iterable[tuple[Mapping[str, Tensor], Tensor | None]],
) -> list[Sample]:
    """Single samples without padding, with the source's answers among the module's labels, and labels as the task has.

    Answers have shape (labels,), (tokens, labels) or (labels, height, width).
    """
    ids = torch.tensor(module.config.label_ids)
    count = source.config.num_labels or 0
    samples: list[Sample] = []
    with evaluating(source):
        for inputs, labels in calibration:
            logits = source(**on_device(source, inputs), return_dict=True).logits.float().cpu()
            answers = restrict_logits(logits, module.config.label_ids, count)
            targets = None if labels is None else _targets(labels, ids, module.config.has_several_labels)
            is_other = torch.zeros(len(answers), dtype=torch.bool)
            if labels is not None and targets is not None and targets.ndim == 1:
                is_other = (labels >= 0) & (targets == IGNORED)
            mask = inputs.get("attention_mask")
            for row in range(len(answers)):
                sample = {name: value[row] for name, value in inputs.items()}
                sample |= {ANSWERS: answers[row], OWN: ~is_other[row]}
                if targets is not None:
                    sample["labels"] = targets[row]
                samples.append(sample if mask is None else _without_padding(sample, mask[row]))
    if not samples:
        raise ValueError("Got no calibration samples to refine a module on; expected some. Pass a few hundred.")
    return samples


def _targets(labels: Tensor, ids: Tensor, has_several: bool) -> Tensor:
    """Labels by their places in the module, `IGNORED` for others; of several labels those of the module, as floats."""
    if has_several and labels.dtype == torch.bool:
        return labels[:, ids].float()
    places = torch.full((max(int(labels.max()), int(ids.max()), 0) + 1,), IGNORED)
    places[ids] = torch.arange(len(ids))
    return torch.where(labels < 0, IGNORED, places[labels.clamp(min=0)])


def _without_padding(sample: Sample, mask: Tensor) -> Sample:
    """Cuts the padding at the end off, of whatever has a value for each token or each point of a recording."""
    if mask.ndim != 1 or not bool(mask.any()):
        return sample
    end = int(mask.nonzero().max()) + 1
    whole = {ANSWERS, "labels"} if sample[ANSWERS].ndim == 1 else set()
    return {
        name: value[:end].clone() if name not in whole and value.ndim and len(value) == len(mask) else value
        for name, value in sample.items()
    }


class _Collator:
    """Joins samples to batches, padded where their lengths differ."""

    def __init__(self, pad: int) -> None:
        self._padding = {"input_ids": pad, "labels": IGNORED}

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        return {name: stacked(name, [s[name] for s in samples], self._padding.get(name, 0)) for name in samples[0]}


def _train(module: NeMoPreTrainedModel, args: TrainingArguments, pad: int, samples: list[Sample]) -> None:
    """Trains a module on samples that hold the answers of its source."""
    from transformers import Trainer  # here, since it takes a second and 90 MB that a module in use has no need of

    class Distillation(Trainer):
        loss_is_scaled_for_ga = False  # a mean over each micro-batch

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            """Says nothing: the progress bar is enough."""

        def compute_loss(
            self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Tensor | tuple[Tensor, Any]:
            """The divergence from the source's answers, and the task loss where samples have labels."""
            for layer in model.modules():
                if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                    layer.eval()  # statistics of few samples are worse than those that the module has
            inputs = dict(inputs)
            answers, is_own, labels = inputs.pop(ANSWERS), inputs.pop(OWN), inputs.pop("labels", None)
            outputs = model(**inputs, return_dict=True)
            has_several: bool = self.accelerator.unwrap_model(model).config.has_several_labels
            loss = distillation_loss(outputs.logits, answers, is_own, labels, has_several, inputs.get("attention_mask"))
            return (loss, outputs) if return_outputs else loss

    Distillation(module, args, _Collator(pad), samples).train()


def distillation_loss(
    logits: Tensor,
    answers: Tensor,
    is_own: Tensor,
    labels: Tensor | None,
    has_several: bool,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Divergence of a module's answers from its source's, distance of energies, and the task loss of labels: a scalar.

    Logits have shape (batch, labels), (batch, tokens, labels) or (batch, labels, height, width); `is_own`, boolean,
    (batch,), marks the samples whose answers count, and not their energies alone. `labels` are places in the module,
    `IGNORED` where there is none, or floats of the logits' shape. Padded tokens don't count.
    """
    logits, answers = labels_last(logits).float(), labels_last(answers).float()
    is_real = is_own.view(-1, *[1] * (logits.ndim - 2)).expand(logits.shape[:-1])
    if attention_mask is not None and attention_mask.shape == is_real.shape:
        is_token = attention_mask.bool()
        logits, answers, is_real = logits[is_token], answers[is_token], is_real[is_token]
        labels = labels[is_token] if labels is not None and labels.shape[:2] == is_token.shape else labels
    if has_several:
        loss = F.binary_cross_entropy_with_logits(logits, answers.sigmoid())
        return loss if labels is None else loss + F.binary_cross_entropy_with_logits(logits, labels)
    flat, targets, rows = logits.flatten(0, -2), answers.flatten(0, -2), is_real.flatten()
    divergence = F.kl_div(flat.log_softmax(-1), targets.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    loss = (divergence * rows).sum() / rows.sum().clamp(min=1)
    loss = loss + ENERGY_WEIGHT * F.smooth_l1_loss(energy(flat), energy(targets))
    if labels is None or labels.numel() != len(flat):  # labels of another resolution
        return loss
    return loss + labelled_cross_entropy(flat, labels.flatten())


@contextmanager
def _unchanged_process(device: torch.device) -> Iterator[None]:
    """Restores random states, and what trainers and accelerators share, which new `TrainingArguments` set anew."""
    shared = [state._shared_state for state in (AcceleratorState, GradientState, PartialState)]
    before = [dict(state) for state in shared]
    devices = [] if device.type == "cpu" else [device]
    try:
        with unchanged_random_state(), torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            yield
    finally:
        for state, entries in zip(shared, before, strict=True):
            state.clear()
            state.update(entries)
