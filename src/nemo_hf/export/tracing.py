"""Traces modules to ONNX, and checks what a runtime computes of them."""

import copy
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from nemo_hf.models.atomic_writes import replaced_directory, scratch_directory
from nemo_hf.models.base import NeMoPreTrainedModel
from nemo_hf.models.batches import sample_count
from nemo_hf.models.equivalence import as_saved
from nemo_hf.models.finiteness import check_finite, check_outputs
from nemo_hf.models.head_outputs import NeMoOutput, answers
from nemo_hf.models.loading import PROCESS_SETTINGS
from nemo_hf.models.rejection import add_rejection
from nemo_hf.models.weight_files import size_in_bytes
from nemo_hf.neurons.sites import UnsupportedArchitectureError
from nemo_hf.neurons.trial_calls import first_line, is_out_of_memory
from nemo_hf.neurons.trial_inputs import random_inputs, trial_inputs

from .agreement import Agreement, Inputs, check_agreement, in_float32, measure_agreement, needed_share, read_samples
from .plain_files import OTHER_WAYS, check_is_module, check_place, plain_config, write_companions

Free = Mapping[str, Mapping[int, str]]  # names of the dimensions of inputs that may have any size
Runner = Callable[..., list[Tensor]]  # gives a file's outputs for inputs by name

TOLERANCE = 1e-4  # share of the largest logit: the kernels of other runtimes sum in another order
LARGEST_FILE = 1_500_000_000  # bytes of weights; an ONNX file holds at most 2 GB, so more go to a file of their own
TRACED_SAMPLES = 4


@dataclass(frozen=True)
class FileExport:
    """What `export_onnx` or `export_openvino` wrote."""

    inputs: dict[str, list[Any]]  # name to dimensions, names for the free ones
    outputs: list[str]  # "logits", of detectors "pred_boxes", and of calibrated modules "rejection_scores"
    difference: float  # largest between the runtime's outputs and the module's, in float32, before any quantization
    tolerance: float  # largest difference allowed: 1e-4 times max(1, largest logit)
    agreement: Agreement | None  # of the file's answers; None for a file in float32 without calibration samples
    bytes: int  # of the file, and of its weights if they are in a file of their own


@dataclass(frozen=True)
class Traceable:
    """What a module is traced from, and how its file is compared with it."""

    exact: NeMoPreTrainedModel  # in float32 on the CPU
    config: PreTrainedConfig  # of the file
    inputs: Inputs  # to trace with
    free: Free
    outputs: list[str]
    samples: list[dict[str, Tensor]] | None  # batches of calibration samples
    needed: float  # share of equal answers to these

    @property
    def shapes(self) -> dict[str, list[Any]]:
        """Inputs' dimensions, names for the free ones."""
        return {n: [self.free[n].get(dim, size) for dim, size in enumerate(v.shape)] for n, v in self.inputs.items()}

    @property
    def is_large(self) -> bool:
        """Whether the weights need a file of their own."""
        return size_in_bytes(self.exact.parameters()) > LARGEST_FILE

    def measured(self, run: Runner, file: str, quantize: str | None) -> Agreement:
        """Compares answers on the calibration samples, or on random inputs, and keeps what was found in the config."""
        batches = [traced_inputs(self.exact)] if self.samples is None else self.samples

        def named(batch: Inputs) -> dict[str, Tensor]:
            return dict(zip(self.outputs, run(**batch), strict=True))

        found = measure_agreement(self.exact, named, batches, are_random=self.samples is None)
        check_agreement(found, self.needed, f"a file for {file}{f' in {quantize}' if quantize else ''}")
        self.config.export = {**getattr(self.config, "export", {}), file: {"quantize": quantize, **asdict(found)}}
        return found


def write_export(
    module: NeMoPreTrainedModel, ready: Traceable, directory: str | Path, stale: Sequence[str], form: str,
    quantize: str | None, write: Callable[[Path, Path], tuple[tuple[float, float], Callable[[], Runner]]],
) -> FileExport:  # fmt: skip
    """Puts an exported file with its companions in place of those that match `stale`, once it is compared.

    `write` gets the new directory and one for scratch, and returns what `compare_outputs` does and what opens the file.
    """
    check_place(Path(directory), ready.config, stale)
    with replaced_directory(directory, stale=stale) as temporary, scratch_directory() as scratch:
        (difference, tolerance), opened = write(temporary, scratch)
        agreement = ready.measured(opened(), form, quantize) if quantize or ready.samples else None
        size = sum(file.stat().st_size for file in temporary.iterdir())
        write_companions(module, ready.config, temporary)
    return FileExport(ready.shapes, ready.outputs, difference, tolerance, agreement, size)


def prepared(
    module: NeMoPreTrainedModel, inputs: Inputs | None, calibration: Any, min_agreement: float | None,
    packages: Sequence[str], extra: str,
) -> Traceable:  # fmt: skip
    """A module ready to be traced; what can't be is refused."""
    check_is_module(module)
    needed = needed_share(min_agreement, calibration)
    if missing := [name for name in packages if find_spec(name) is None]:
        raise ImportError(
            f"Got no {' and no '.join(missing)}; expected these packages. Run: pip install 'nemo-hf[{extra}]'"
        )
    check_finite(module)
    with as_saved(module) as (saved,):
        exact = copy.deepcopy(saved).cpu().float()
    exact.config.return_dict = True
    exact.config.output_hidden_states = exact.config.output_attentions = False  # the file has logits alone
    if exact.config._attn_implementation not in ("eager", "sdpa"):  # others can't be traced
        exact.set_attn_implementation("eager")
    samples = None if calibration is None else read_samples(exact, calibration)
    if inputs is not None and sample_count(inputs := trial_inputs(exact, inputs)) < 2:
        raise ValueError("Got one sample to trace with; expected at least 2. Pass more, or none for random ones.")
    if inputs is None:
        first = next((batch for batch in samples or () if len(next(iter(batch.values()))) > 1), None)
        inputs = traced_inputs(exact) if first is None else {k: v[:TRACED_SAMPLES] for k, v in first.items()}
    inputs = in_float32(inputs)
    if exact.main_input_name == "input_ids" and len(inputs["input_ids"]) < 2:
        raise ValueError(
            f"Got a {module.config.base_class} without a padding token; expected one, for batches of texts. "
            "Set module.config.pad_token_id."
        )
    with torch.no_grad():
        exact(**inputs, return_dict=True)  # inputs that it doesn't take are no fault of the exporter
    boxes = ["pred_boxes"] if module.task == "object-detection" else []
    outputs = ["logits", *boxes, *(["rejection_scores"] if module.config.rejection else [])]
    free = {name: _free_dimensions(name, value) for name, value in inputs.items()}
    return Traceable(exact, _rejecting_config(module), inputs, free, outputs, samples, needed)


def _rejecting_config(module: NeMoPreTrainedModel) -> PreTrainedConfig:
    """The plain configuration, of a calibrated module with its rejection and the rejected label."""
    config = plain_config(module)
    if module.config.rejection:
        config.rejection = dict(module.config.rejection)
        config.id2label, config.label2id = module.config.id2label, module.config.label2id
        if "num_labels" in config.to_dict():
            config.num_labels = len(config.id2label)
    return config


def traced_inputs(module: NeMoPreTrainedModel) -> dict[str, Tensor]:
    """Random inputs as a processor gives them, with token types where the model has embeddings for several."""
    inputs = random_inputs(module)
    types = getattr(module.model.config, "type_vocab_size", 0)
    if "input_ids" in inputs and types > 1 and "token_type_ids" in inspect.signature(module.model.forward).parameters:
        second = torch.arange(inputs["input_ids"].shape[1]) >= inputs["input_ids"].shape[1] // 3
        inputs["token_type_ids"] = second.long().expand_as(inputs["input_ids"]).contiguous()
    return inputs


def _free_dimensions(name: str, value: Tensor) -> dict[int, str]:
    """Names of the dimensions that may have any size: the batch, and the length of texts and waveforms."""
    if name == "input_values" and value.ndim == 2:
        return {0: "batch", 1: "samples"}
    is_of_image = name in ("pixel_attention_mask", "spatial_shapes")
    is_text = not value.is_floating_point() and value.ndim > 1 and not is_of_image
    return {0: "batch", 1: "tokens"} if is_text else {0: "batch"}


def trace(ready: Traceable, path: Path) -> None:
    """Writes a module as an ONNX file in float32."""
    module, inputs, free = ready.exact, ready.inputs, ready.free
    options: dict[str, Any] = {"external_data": ready.is_large, "dynamo": True, "verbose": False}
    options |= {"input_names": list(inputs), "output_names": ready.outputs, "dynamic_shapes": free}
    try:
        with PROCESS_SETTINGS, _silent(), torch.no_grad(), _returning(module, ready.outputs):
            torch.onnx.export(module, (), path, kwargs=dict(inputs), **options)
    except Exception as error:  # the exporter raises whatever the model's code meets
        if isinstance(error, (ImportError, OSError)) or is_out_of_memory(error):
            raise
        names = " and ".join(dict.fromkeys(name for dims in free.values() for name in dims.values()))
        raise UnsupportedArchitectureError(
            f"Got a module of {module.config.base_class} that torch.onnx can't trace with free {names} "
            f"({type(error).__name__}: {first_line(error)}). {OTHER_WAYS.format('save_plain')}"
        ) from error
    drop_notes(path)


@contextmanager
def _returning(module: NeMoPreTrainedModel, names: Sequence[str]) -> Iterator[None]:
    """Makes a module return some outputs as a tuple; detectors have more, which no class of outputs declares."""
    whole = module.forward

    @wraps(whole)
    def forward(*args: Any, **inputs: Any) -> tuple[Tensor, ...]:
        found: Any = whole(*args, **inputs)
        return tuple(found[name] for name in names)

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


@contextmanager
def _silent() -> Iterator[None]:
    """Hides what torch.onnx says of itself: deprecations, axis names, optional packages."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)


def drop_notes(path: Path) -> None:
    """Drops what the exporter notes down of the code: stack traces with the paths of this machine's files."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    waiting: list[Any] = [model]
    while waiting:
        part = waiting.pop()
        for name in {"metadata_props", "doc_string"}.intersection(part.DESCRIPTOR.fields_by_name):
            part.ClearField(name)
        for value in [value for field, value in part.ListFields() if field.message_type is not None]:
            waiting.extend(value if hasattr(value, "add") else [value])  # repeated, or one
    onnx.save(model, path)


def compare_outputs(ready: Traceable, run: Runner) -> tuple[float, float]:
    """Largest difference of a runtime's outputs on batches of several sizes and lengths, and the tolerance."""
    module = ready.exact
    worst = 0.0, TOLERANCE
    for batch in _batches(ready.inputs, ready.free):
        with torch.no_grad():
            answered = module(**batch)
        check_outputs(module, batch, answers(answered), [name for _, name in sorted(module.config.id2label.items())])
        got = dict(zip(ready.outputs, run(**batch), strict=True))
        expected = {name: answered[name] for name in ready.outputs if name != "rejection_scores"}
        if "rejection_scores" in got:  # of the file's logits, since a steep fit magnifies how these differ
            own: Any = NeMoOutput(logits=got["logits"][:, : module.num_labels])
            add_rejection(own, module.config, is_in_eval=True)
            expected["rejection_scores"] = own.rejection_scores
            expected["logits"] = torch.cat(
                [answered.logits[:, : module.num_labels], own.logits[:, module.num_labels :]], -1
            )
        for name, right in expected.items():
            difference = (got[name] - right).abs().max().item()
            tolerance = TOLERANCE * max(1.0, right.abs().max().item())
            if not difference <= tolerance:  # also NaN
                raise UnsupportedArchitectureError(
                    f"Got a file of a {module.config.base_class} whose {name} differ from the module's by "
                    f"{difference:.2e}; expected at most {tolerance:.2e}. {OTHER_WAYS.format('save_plain')}"
                )
            worst = max(worst, (difference, tolerance), key=lambda found: found[0] / found[1])
    return worst


def _batches(inputs: Inputs, free: Free) -> Iterator[dict[str, Tensor]]:
    """The samples as they are, the first alone, the others (with padding), more of them, and shorter ones."""
    yield dict(inputs)
    yield {name: value[:1] for name, value in inputs.items()}
    yield {name: value[1:] for name, value in inputs.items()}
    yield {name: torch.cat([value, value[1:]]) for name, value in inputs.items()}
    if any(1 in dims for dims in free.values()):
        # Cut at the start, since some models look for the end of a text.
        length = min(value.shape[1] for name, value in inputs.items() if 1 in free[name])
        for gone in (length // 4, length // 3):
            cut = {name: value[:, gone:] if 1 in free[name] else value for name, value in inputs.items()}
            mask = cut.get("attention_mask", torch.ones(len(next(iter(cut.values()))), 1))
            rows = mask.flatten(1).any(1)  # those of which something is left
            if bool(rows.any()):
                yield {name: value[rows].contiguous() for name, value in cut.items()}
