"""Saves modules as plain models of `transformers`, and times a module in each of its formats."""

import copy
import logging
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
from nemo_hf.models.atomic_writes import STALE_WEIGHTS, replaced_directory, scratch_directory
from nemo_hf.models.base import NeMoPreTrainedModel, base_parameters
from nemo_hf.models.configuration import PLACE_TASKS
from nemo_hf.models.equivalence import EQUIVALENCE_TOLERANCE, as_saved, exact_float32
from nemo_hf.models.finiteness import check_finite, check_outputs
from nemo_hf.models.head_outputs import answers, difference
from nemo_hf.models.loading import PROCESS_SETTINGS, hidden_progress
from nemo_hf.neurons.sites import AttentionSite, UnsupportedArchitectureError
from nemo_hf.neurons.trial_calls import SHAPE_ERRORS, first_line, is_out_of_memory
from nemo_hf.neurons.trial_inputs import trial_inputs
from nemo_hf.pruning.layer_cuts import cut_tensor, tensor_cuts
from nemo_hf.pruning.layer_edits import weight_shape
from nemo_hf.pruning.shared_rows import expanded_state

from . import onnx
from .plain_files import OTHER_WAYS, check_is_module, check_place, clean_written_config, plain_config, write_processor
from .tracing import traced_inputs
from .uniform_widths import UniformWidths, uniform_widths, zero_padded_state

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlainExport:
    """What `save_plain` wrote: numbers of parameters, changed widths, and how far its logits differ."""

    parameters: int  # of the plain model in the files
    module_parameters: int
    full_parameters: int  # of the plain model at full width, with the module's labels
    changes: dict[str, int]  # widths that differ from the parent's configuration, by attribute: `text_config.head_dim`
    difference: float  # largest, from the module's logits in float32, before rounding to its dtype
    tolerance: float  # largest difference allowed: 1e-5 times max(1, largest logit)


def save_plain(  # noqa: D417 - a method of parents and modules
    module: NeMoPreTrainedModel, directory: str | Path, inputs: Mapping[str, Tensor] | None = None
) -> PlainExport:
    """Saves a module as a plain model of `transformers`, which loads without this library.

    A plain configuration has one width for all layers. So every feed-forward part gets the width of the widest,
    filled up with zeros; attention gets fewer or narrower heads where the configuration can say so (Llama, ViT, T5)
    and its full width otherwise (BERT, GPT-2). The plain model is thus larger than the module, at most as large as
    the parent's.

    Args:
        directory: Where to; appears whole or not at all.
        inputs: A few samples to compare logits on; `None` draws random ones.

    Returns:
        Sizes, changed widths and the difference that was found before anything was written.

    Raises:
        ValueError: If this is a parent, or the directory holds exported files with another config.json.
        UnsupportedArchitectureError: If no configuration of the plain class gives the module's logits.
    """
    check_is_module(module)
    check_finite(module)
    if module.config.rejection:
        logger.warning(
            "Left the calibrated rejection out: a plain model answers with one of the module's labels, whatever it is "
            "given. Use save_pretrained or export_onnx where it is needed."
        )
    plain_class = module.config.plain_class
    if getattr(transformers, plain_class.__name__, None) is not plain_class:
        raise UnsupportedArchitectureError(
            f"Got a module of {plain_class.__name__}, which is registered but no class of transformers; expected one "
            f"of its classes. {OTHER_WAYS.format('export_onnx')}"
        )
    widths, plain, largest, tolerance = _smallest_plain(module, inputs)
    full = _built(module, plain_config(module))
    stored = {name: tensor.dtype for name, tensor in module.model.state_dict().items()}
    for name, tensor in (*plain.named_parameters(), *plain.named_buffers()):
        if name in stored:
            tensor.data = tensor.data.to(stored[name])
    check_place(Path(directory), plain.config, STALE_WEIGHTS)
    with replaced_directory(directory, stale=STALE_WEIGHTS) as temporary:
        plain.save_pretrained(temporary)
        clean_written_config(temporary)
        write_processor(module, temporary)
        _check_files(plain, temporary)
    sizes = (plain.num_parameters(), base_parameters(module), full.num_parameters())
    narrowed = {"hidden_size": module.config.stream_width} if module.config.stream_width else {}
    return PlainExport(*sizes, changes=narrowed | widths.changes, difference=largest, tolerance=tolerance)


def _built(module: NeMoPreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A plain model on the meta device."""
    with torch.device("meta"):
        return module.config.plain_class(copy.deepcopy(config))


def _of_full_parts(module: NeMoPreTrainedModel) -> PreTrainedModel:
    """A plain model, on the meta device, with all neurons and with the width of the module's stream."""
    config: Any = plain_config(module)
    if not module.config.stream_width:
        return _built(module, config)
    config.hidden_size = module.config.stream_width
    attention = [site for site in module.sites if isinstance(site, AttentionSite)]
    config.head_dim = attention[0].head_dim if attention else None
    try:
        full = _built(module, config)
        widths = [(weight_shape(full.get_submodule(s.output))[1], s.heads * s.value_dim) for s in attention]
    except ValueError:
        widths = [(0, 1)]
    if any(found != expected for found, expected in widths):
        raise UnsupportedArchitectureError(
            f"Got a module of {module.config.base_class} with a narrower residual stream; expected a class whose "
            f"configuration has a head_dim, such as ViT or Llama. {OTHER_WAYS.format('export_onnx')}"
        )
    return full


def _smallest_plain(
    module: NeMoPreTrainedModel, inputs: Mapping[str, Tensor] | None
) -> tuple[UniformWidths, PreTrainedModel, float, float]:
    """The smallest plain model in float32 that computes what a module does; difference and tolerance."""
    batch = {name: value.to(module.device) for name, value in trial_inputs(module, inputs).items()}
    batch = {name: value.float() if value.is_floating_point() else value for name, value in batch.items()}

    def shapes_of(tried: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
        try:
            return {name: tuple(tensor.shape) for name, tensor in _built(module, tried).state_dict().items()}
        except ValueError:  # by which families refuse widths that they can't have
            return {}

    full = _of_full_parts(module)
    site_widths = {entry["key"]: entry.get("widths", {}) for entry in module.config.sites or []}
    state = zero_padded_state(full, module.sites, site_widths, expanded_state(module.model))
    with torch.no_grad(), exact_float32(module) as (exact,):
        expected = answers(exact(**batch, return_dict=True)) if exact.task in PLACE_TASKS else exact.own_logits(**batch)
        check_outputs(exact, batch, expected, list(module.config.names.values()))
        tolerance = EQUIVALENCE_TOLERANCE * max(1.0, expected.abs().max().item())
        for widths in uniform_widths(full, module.sites, state, shapes_of):  # the full width is the last
            try:
                plain = _filled(full, widths, state)
                plain.to(module.device)  # type: ignore[arg-type]
                found = difference(answers(plain(**batch, return_dict=True)), expected, module.task)
            except SHAPE_ERRORS as error:
                if is_out_of_memory(error):
                    raise
                reason = first_line(error)
                continue
            if found <= tolerance:
                return widths, plain, found, tolerance
            reason = f"even at full width its logits differ by {found:.2e}, over {tolerance:.2e}"
    raise UnsupportedArchitectureError(
        f"Got a module of {module.config.base_class} that the plain class can't hold exactly: {reason}. "
        f"{OTHER_WAYS.format('export_onnx')}"
    )


def _filled(full: PreTrainedModel, widths: UniformWidths, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """A plain model in float32 and eval mode with the zero-padded weights, cut to uniform widths."""
    filled = dict(state)
    for name, cut in tensor_cuts(full, widths.cuts, {}).items():
        filled[name] = cut_tensor(state[name].index_select, cut)
    with PROCESS_SETTINGS, no_init_weights():
        plain: PreTrainedModel = type(full)(copy.deepcopy(widths.config)).float()
    plain.load_state_dict(filled)
    plain.tie_weights()
    if shared := [name for name, tensor in plain.state_dict().items() if not torch.equal(tensor, filled[name])]:
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
            changes = f"The tensor {name!r} of a {type(plain).__name__} changes when it is saved and loaded."
            raise UnsupportedArchitectureError(f"{changes} {OTHER_WAYS.format('export_onnx')}")


def compare_latency(
    module: NeMoPreTrainedModel, parent: NeMoPreTrainedModel, batch_sizes: Sequence[int] = LATENCY_BATCHES
) -> dict[str, Any]:
    """Times a module in all its formats beside the plain model inside its parent.

    Returns `device`, with the threads of torch and onnxruntime on a CPU; `latency_ms` by format (`"parent"`,
    `"module"`, `"plain"`, `"onnx"`) and batch size; and `latency_note`, as in `ModuleReport`. A format that the module
    can't have is left out, and so is ONNX on another device than the CPU or without its packages.
    """
    check_is_module(module)
    runners: dict[str, Any] = {"parent": copy.deepcopy(parent).detach_masks().eval()}
    sample = {name: value.to(module.device) for name, value in traced_inputs(module).items()}
    with scratch_directory() as folder, torch.no_grad(), as_saved(module) as (saved,):
        runners["module"] = saved.model
        try:
            runners["plain"] = _smallest_plain(saved, None)[1].to(module.dtype)  # type: ignore[arg-type]
        except UnsupportedArchitectureError as error:
            logger.info("No plain model to time: %s", error)
        if module.device.type == "cpu":
            try:
                onnx.export_onnx(saved, folder)
                runners["onnx"] = onnx.OnnxRunner(Path(folder, onnx.ONNX_NAME), LATENCY_THREADS)
            except (UnsupportedArchitectureError, ImportError, ValueError) as error:
                logger.info("No ONNX model to time: %s", error)
        found = time_runs(runners, sample, batch_sizes)
    return {"device": found.device, "latency_ms": found.milliseconds, "latency_note": found.note}
