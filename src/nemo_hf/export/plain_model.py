"""Saves modules as plain models of `transformers`, and times a module in each of its formats."""

import copy
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from nemo_hf.evaluation.latency import LATENCY_BATCHES, LATENCY_THREADS, time_runs
from nemo_hf.models.base import NeMoPreTrainedModel, base_parameters
from nemo_hf.models.equivalence import EQUIVALENCE_TOLERANCE, as_saved, exact_float32
from nemo_hf.models.files import replaced_directory
from nemo_hf.models.loading import hidden_progress
from nemo_hf.neurons.sites import UnsupportedArchitectureError
from nemo_hf.neurons.trial_calls import first_line
from nemo_hf.neurons.trial_inputs import random_inputs
from nemo_hf.pruning.layer_cuts import cut_tensor, tensor_cuts

from .onnx import (
    ONNX_NAME,
    OTHER_WAYS,
    OnnxRunner,
    check_is_module,
    export_onnx,
    plain_config,
    traced_inputs,
    write_processor,
)
from .uniform_widths import UniformWidths, uniform_widths, zero_padded_state

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlainExport:
    """What `save_plain` wrote.

    Args:
        parameters: Number of parameters of the plain model in the files.
        module_parameters: Number of parameters of the module.
        full_parameters: Number of parameters of the plain model at full width, with the module's labels.
        changes: Widths that differ from the parent's configuration, by attribute, as `text_config.head_dim`.
        difference: Largest difference of its logits from the module's in float32, before it is rounded to its dtype.
        tolerance: Largest difference that was allowed: 1e-5 times max(1, largest logit).
    """

    parameters: int
    module_parameters: int
    full_parameters: int
    changes: dict[str, int]
    difference: float
    tolerance: float


def save_plain(
    module: NeMoPreTrainedModel, directory: str | Path, inputs: Mapping[str, Tensor] | None = None
) -> PlainExport:
    """Saves a module as a plain model; see the method `save_plain`."""
    check_is_module(module)
    plain_class = module.config.plain_class
    if getattr(transformers, plain_class.__name__, None) is not plain_class:
        raise UnsupportedArchitectureError(
            f"Got a module of {plain_class.__name__}, which is registered but no class of transformers; expected one "
            f"that loads without further code. {OTHER_WAYS.format('export_onnx')}"
        )
    widths, plain, difference, tolerance = _smallest_plain(module, inputs)
    full = _built(plain_class, plain_config(module))
    stored = {name: tensor.dtype for name, tensor in module.model.state_dict().items()}
    for name, tensor in (*plain.named_parameters(), *plain.named_buffers()):
        if name in stored:
            tensor.data = tensor.data.to(stored[name])
    with replaced_directory(directory, stale=("model*.safetensors*",)) as temporary:
        plain.save_pretrained(temporary)
        write_processor(module, temporary)
        _check_files(plain, temporary)
    sizes = (plain.num_parameters(), base_parameters(module), full.num_parameters())
    return PlainExport(*sizes, changes=widths.changes, difference=difference, tolerance=tolerance)


def _built(plain_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A plain model on the meta device."""
    with torch.device("meta"), no_init_weights():
        return plain_class(copy.deepcopy(config))


def _smallest_plain(
    module: NeMoPreTrainedModel, inputs: Mapping[str, Tensor] | None
) -> tuple[UniformWidths, PreTrainedModel, float, float]:
    """The smallest plain model in float32 that computes what a module does; difference and tolerance."""
    plain_class = module.config.plain_class
    inputs = random_inputs(module) if inputs is None else {k: v for k, v in inputs.items() if k != "labels"}
    batch = {
        name: value.to(module.device, torch.float32 if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }

    def shapes_of(tried: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
        try:
            return {name: tuple(tensor.shape) for name, tensor in _built(plain_class, tried).state_dict().items()}
        except Exception:  # each family raises its own errors for widths that it can't have
            return {}

    full = _built(plain_class, plain_config(module))
    site_widths = {entry["key"]: entry.get("widths", {}) for entry in module.config.sites or []}
    try:
        state = zero_padded_state(full, module.sites, site_widths, module.model.state_dict())
    except ValueError as error:
        raise _not_plain(module, str(error)) from error
    with torch.no_grad(), exact_float32(module) as (exact,):
        expected = exact(**batch).logits
        tolerance = EQUIVALENCE_TOLERANCE * max(1.0, expected.abs().max().item())
        for widths in uniform_widths(full, module.sites, state, shapes_of):  # the full width is the last
            try:
                plain = _filled(full, widths, state)
                plain.to(module.device)  # type: ignore[arg-type]
                difference = (plain(**batch).logits - expected).abs().max().item()
            except Exception as error:  # likewise, when the model is called
                reason = first_line(error)
                continue
            if difference <= tolerance:
                return widths, plain, difference, tolerance
            reason = f"even at full width its logits differ by {difference:.2e}, over {tolerance:.2e}"
    raise _not_plain(module, reason)


def _not_plain(module: NeMoPreTrainedModel, reason: str) -> UnsupportedArchitectureError:
    return UnsupportedArchitectureError(
        f"Got a module of {module.config.base_class} that the plain class can't hold exactly: {reason}. "
        f"{OTHER_WAYS.format('export_onnx')}"
    )


def _filled(full: PreTrainedModel, widths: UniformWidths, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """A plain model in float32 and eval mode with the zero-padded weights, cut to uniform widths."""
    by_name = tensor_cuts(full, widths.cuts, {})
    filled = {
        name: cut_tensor(tensor.index_select, by_name[name]) if name in by_name else tensor
        for name, tensor in state.items()
    }
    with no_init_weights():
        plain: PreTrainedModel = type(full)(copy.deepcopy(widths.config)).float()
    plain.load_state_dict(filled)
    plain.tie_weights()
    shared = [name for name, tensor in plain.state_dict().items() if not torch.equal(tensor, filled[name])]
    if shared:
        raise ValueError(f"the plain class shares {shared[0]!r} between layers that the module cuts differently")
    plain.eval()
    return plain


def _check_files(plain: PreTrainedModel, directory: Path) -> None:
    """Checks that the files give the same tensors through the plain class."""
    with hidden_progress():
        loaded = type(plain).from_pretrained(directory, dtype="auto")
    state = loaded.state_dict()
    for name, tensor in plain.state_dict().items():
        if name not in state or not torch.equal(state[name].to(tensor.dtype), tensor.cpu()):
            raise UnsupportedArchitectureError(
                f"The tensor {name!r} of a {type(plain).__name__} changes when it is saved and loaded. "
                + OTHER_WAYS.format("export_onnx")
            )


def compare_latency(
    module: NeMoPreTrainedModel, parent: NeMoPreTrainedModel, batch_sizes: Sequence[int] = LATENCY_BATCHES
) -> dict[str, Any]:
    """Times a module in all its formats beside the plain model inside its parent.

    Returns `device`, with the threads of torch and onnxruntime on a CPU; `latency_ms` by format (`"parent"`,
    `"module"`, `"plain"`, `"onnx"`) and batch size; and `latency_note`, as in `ModuleReport`. A format that the module
    can't have is left out, and so is ONNX on another device than the CPU or without its packages.
    """
    check_is_module(module)
    runners: dict[str, Any] = {"parent": copy.deepcopy(parent).detach_masks().eval(), "module": module.model}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), as_saved(module):
        sample = traced_inputs(module)
        try:
            runners["plain"] = _smallest_plain(module, None)[1].to(module.dtype)  # type: ignore[arg-type]
        except UnsupportedArchitectureError as error:
            logger.info("No plain model to time: %s", error)
        if module.device.type == "cpu":
            try:
                export_onnx(module, folder)
                runners["onnx"] = OnnxRunner(Path(folder, ONNX_NAME), LATENCY_THREADS)
            except (UnsupportedArchitectureError, ImportError, ValueError) as error:
                logger.info("No ONNX model to time: %s", error)
        sample = {name: value.to(module.device) for name, value in sample.items()}
        found = time_runs(runners, sample, batch_sizes)
    return {"device": found.device, "latency_ms": found.milliseconds, "latency_note": found.note}
