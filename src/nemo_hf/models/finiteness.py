"""Finds weights and logits that are NaN or infinite, names them, and says what to do."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

MOST_NAMED = 3
LOAD_WIDER = "Load it with dtype=torch.float32."
RETRAIN = (
    "Go back to weights from before; then look for NaN among the training data, lower learning_rate, or train in "
    "bfloat16 or float32 in place of float16."
)


def infinite_tensors(model: nn.Module, state: Mapping[str, Any] | None = None) -> list[str]:
    """Names of parameters and buffers with NaN or infinities, in `state` or else in the model; it waits for a GPU once.

    Infinities are allowed in buffers that are no running statistics: attention masks, say, hold them.
    """
    buffers = dict(model.named_buffers())
    tensors = {**dict(model.named_parameters()), **buffers} if state is None else state
    local = {name: value.to_local() if hasattr(value, "to_local") else value for name, value in tensors.items()}
    floats = {n: v.detach() for n, v in local.items() if v.is_floating_point() and not v.is_meta and v.numel()}
    by_device: dict[torch.device, list[str]] = {}
    for name, value in floats.items():
        by_device.setdefault(value.device, []).append(name)
    suspects: list[str] = []
    for names in by_device.values():  # a sum is quick, and finite only if all numbers are; the reverse may not hold
        finite = torch.stack([floats[name].sum() for name in names]).isfinite().tolist()
        suspects += [name for name, is_finite in zip(names, finite, strict=True) if not is_finite]
    found = []
    for name in suspects:
        may_hold_infinity = name in buffers and not name.rpartition(".")[2].startswith("running_")
        wrong = floats[name].isnan() if may_hold_infinity else ~floats[name].isfinite()
        found += [name] if bool(wrong.any()) else []
    return found


def check_finite(model: nn.Module, state: Mapping[str, Any] | None = None, also: str = "") -> None:
    """Refuses weights that are NaN or infinite with a `ValueError` that names them; `also` ends its message."""
    if names := infinite_tensors(model, state):
        remedy = LOAD_WIDER if _dtype(model) == torch.float16 else RETRAIN
        raise ValueError(
            f"Got NaN or infinite numbers in {len(names)} of the {len(model.state_dict())} weights and buffers of a "
            f"{type(model).__name__}, {_listed(names)}; expected finite ones. {remedy}{also}"
        )


def _dtype(model: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def _listed(names: Sequence[Any]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(map(str, names[:MOST_NAMED])) + more


def check_training(model: nn.Module, logs: Mapping[str, Any]) -> None:
    """Refuses to train on once NaN has reached the weights, which are read only if a logged number is not finite."""
    wrong = [name for name, value in logs.items() if isinstance(value, float) and not math.isfinite(value)]
    if wrong:
        check_finite(model)
    if losses := [name for name in wrong if name.startswith("loss_")]:  # infinite gradients in float16 are usual
        logger.warning(
            "Got NaN or infinite %s since the last log; the weights are finite still. Look for NaN or huge numbers "
            "among the training data, and train in bfloat16 or float32 in place of float16.", ", ".join(losses),
        )  # fmt: skip


def check_outputs(
    model: nn.Module,
    inputs: Mapping[str, Any],
    logits: Tensor,
    labels: Sequence[str],
    numbers: Sequence[int] | None = None,
    masks: Mapping[str, Tensor] | None = None,
) -> None:
    """Refuses logits (batch, ..., labels), or soft masks, that are NaN or infinite, with a `ValueError` that says why.

    It blames the model's weights, the inputs or half precision, whichever it finds; `numbers` are those of the samples.
    """
    finite = logits.isfinite()
    of_sample = finite.flatten(1).all(-1)
    for mask in (masks or {}).values():  # (batch, calls, neurons)
        of_sample = of_sample & mask.isfinite().flatten(1).all(-1)
    if bool(of_sample.all()):
        return
    check_finite(model)
    wrong = (~of_sample).nonzero().flatten()
    samples = _listed([numbers[index] if numbers else index for index in wrong.tolist()])
    columns = [*labels, *["no object, or boxes"] * (logits.shape[-1] - len(labels))]  # of detectors
    by_column = finite.flatten(0, -2).all(0).tolist()
    names = [name for name, is_finite in zip(columns, by_column, strict=True) if not is_finite]
    what = f"logits of {_listed(list(dict.fromkeys(names)))}" if names else "masks"
    got = f"NaN or infinite {what} for the samples {samples} (counted from 0)"
    given = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.is_floating_point()}
    strange = [n for n, v in given.items() if v.ndim and len(v) == len(logits) and not bool(v[wrong].isfinite().all())]
    if strange:
        raise ValueError(
            f"Got {got}, whose {' and '.join(strange)} are not finite either; expected finite numbers. Leave these "
            "samples out, or correct them."
        )
    is_half = _dtype(model) in (torch.float16, torch.bfloat16)
    remedy = LOAD_WIDER if is_half else "Scale these inputs as in training, or look for huge weights."
    raise ValueError(
        f"Got {got}, from finite weights and inputs, so a number grew too large for {logits.dtype} on the way; "
        f"expected finite ones. {remedy}"
    )
