"""Exports modules to ONNX, and checks onnxruntime's outputs before the files are moved into place."""

import copy
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from nemo_hf.models.base import NeMoPreTrainedModel
from nemo_hf.models.equivalence import as_saved
from nemo_hf.models.files import replaced_directory
from nemo_hf.models.finiteness import check_finite, check_outputs
from nemo_hf.models.rejection import energy, rejection_scores
from nemo_hf.neurons.sites import UnsupportedArchitectureError
from nemo_hf.neurons.trial_calls import first_line
from nemo_hf.neurons.trial_inputs import random_inputs

Inputs = Mapping[str, Tensor]
Free = Mapping[str, Mapping[int, str]]  # names of the dimensions of inputs that may have any size

ONNX_NAME = "model.onnx"
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ONNX_TOLERANCE = 1e-4  # share of the largest logit: onnxruntime's kernels sum in another order
LARGEST_FILE = 1_500_000_000  # bytes of weights; an ONNX file holds at most 2 GB, so more go to a file of their own
OTHER_WAYS = "Use save_pretrained, whose files nemo_hf loads, or {}."


@dataclass(frozen=True)
class OnnxExport:
    """What `export_onnx` wrote."""

    inputs: dict[str, list[Any]]  # name to dimensions, names for the free ones
    outputs: list[str]  # "logits", shape (batch, labels), and of calibrated modules "rejection_scores", shape (batch,)
    difference: float  # largest between onnxruntime's outputs and the module's, in float32
    tolerance: float  # largest difference allowed: 1e-4 times max(1, largest logit)


def check_is_module(module: NeMoPreTrainedModel) -> None:
    """Refuses parents, which have masks, with a `ValueError`."""
    if module.is_parent:
        raise ValueError("Got a parent; expected a module. Call extract_module(labels) or detach_masks().")


def plain_config(module: NeMoPreTrainedModel) -> PreTrainedConfig:
    """The plain model's configuration with the module's labels."""
    config = copy.deepcopy(module.config.base_config)
    assert isinstance(config, PreTrainedConfig)
    names = module.config.names
    config.id2label = names
    config.label2id = {name: index for index, name in names.items()}
    config.problem_type = module.config.problem_type
    if "num_labels" in config.to_dict():  # kept apart from id2label in some families
        config.num_labels = len(names)
    config.architectures = [module.config.base_class]
    return config


def write_processor(module: NeMoPreTrainedModel, directory: Path) -> None:
    """Writes the files of the module's processor into a directory."""
    for name, content in module.processor_files.items():
        (directory / name).write_bytes(content)


def export_onnx(  # noqa: D417 - a method of parents and modules
    module: NeMoPreTrainedModel, directory: str | Path, inputs: Inputs | None = None
) -> OnnxExport:
    """Writes a module as `model.onnx` with its processor's files and a plain `config.json`.

    The batch is a free dimension; so are the tokens of texts and the samples of waveforms. Weights are in float32.
    A calibrated module gives `rejection_scores` too, and `rejection` in `config.json` holds the threshold.

    Args:
        directory: Where to; appears whole or not at all.
        inputs: A few samples, at least 2, to trace and compare with; `None` draws random ones.

    Returns:
        Inputs, outputs and the largest difference that onnxruntime made on batches of several sizes and lengths.

    Raises:
        ValueError: If this is a parent, has texts but no padding token, or `inputs` are fewer than 2 samples.
        ImportError: If onnx, onnxscript or onnxruntime is missing.
        UnsupportedArchitectureError: If the model can't be traced, or onnxruntime computes something else.
    """
    check_is_module(module)
    missing = [name for name in ONNX_PACKAGES if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"Got no {' and no '.join(missing)}; expected these packages. Run: pip install 'nemo-hf[onnx]'"
        )
    check_finite(module)
    with as_saved(module):
        exact = copy.deepcopy(module).cpu().float().eval()
    if exact.config._attn_implementation not in ("eager", "sdpa"):  # others can't be traced
        exact.set_attn_implementation("eager")
    if inputs is not None and len(next(iter(inputs.values()))) < 2:
        raise ValueError("Got one sample to trace with; expected at least 2. Pass more, or none for random ones.")
    inputs = traced_inputs(exact) if inputs is None else {k: v.cpu() for k, v in inputs.items() if k != "labels"}
    inputs = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
    if exact.main_input_name == "input_ids" and len(inputs["input_ids"]) < 2:
        raise ValueError(
            f"Got a {module.config.base_class} without a padding token; expected one, for batches of texts. "
            "Set pad_token_id in module.config.base_config and module.model.config."
        )
    outputs = ["logits", *(["rejection_scores"] if module.config.rejection else [])]
    free = {name: _free_dimensions(name, value) for name, value in inputs.items()}
    with replaced_directory(directory, stale=(f"{ONNX_NAME}*",)) as temporary:
        _trace(exact, inputs, free, outputs, temporary / ONNX_NAME)
        difference, tolerance = _check_onnx(exact, inputs, free, outputs, temporary / ONNX_NAME)
        config = plain_config(module)
        if module.config.rejection:
            config.rejection = dict(module.config.rejection)
        config.save_pretrained(temporary)
        write_processor(module, temporary)
    shapes = {name: [free[name].get(dim, size) for dim, size in enumerate(v.shape)] for name, v in inputs.items()}
    return OnnxExport(shapes, outputs, difference, tolerance)


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


def _trace(module: NeMoPreTrainedModel, inputs: Inputs, free: Free, outputs: Sequence[str], path: Path) -> None:
    size = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    options: dict[str, Any] = {"external_data": size > LARGEST_FILE, "dynamo": True, "verbose": False}
    options |= {"input_names": list(inputs), "output_names": list(outputs), "dynamic_shapes": free}
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # what it says of itself: deprecations, axis names, optional packages
    try:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):
            torch.onnx.export(module, (), path, kwargs=dict(inputs), **options)
    except Exception as error:  # the exporter raises whatever the model's code meets
        names = " and ".join(dict.fromkeys(name for dims in free.values() for name in dims.values()))
        raise UnsupportedArchitectureError(
            f"Got a module of {module.config.base_class} that torch.onnx can't trace with free {names} "
            f"({type(error).__name__}: {first_line(error)}). {OTHER_WAYS.format('save_plain')}"
        ) from error
    finally:
        logger.setLevel(level)


class OnnxRunner:
    """Calls the model in an ONNX file with tensors, on a number of threads for each operation."""

    def __init__(self, path: str | Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3  # errors
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.names = {entry.name for entry in self.session.get_inputs()}

    def __call__(self, **inputs: Tensor) -> list[Tensor]:
        """Returns the outputs in the file's order."""
        given = {name: value.numpy() for name, value in inputs.items() if name in self.names}
        return [torch.from_numpy(output) for output in self.session.run(None, given)]


def _check_onnx(
    module: NeMoPreTrainedModel, inputs: Inputs, free: Free, outputs: Sequence[str], path: Path
) -> tuple[float, float]:
    """Largest difference of onnxruntime's outputs on batches of several sizes and lengths, and the tolerance."""
    runner = OnnxRunner(path, torch.get_num_threads())
    worst = 0.0, ONNX_TOLERANCE
    for batch in _batches(inputs, free):
        with torch.no_grad():
            logits = module(**batch).logits
        check_outputs(module, batch, logits, list(module.config.names.values()))
        got = dict(zip(outputs, runner(**batch), strict=True))
        expected = {"logits": logits}
        if "rejection_scores" in got:  # of the file's logits, since a steep fit magnifies how these differ
            energies = energy(got["logits"], module.config.has_several_labels)
            expected["rejection_scores"] = rejection_scores(energies, module.config.rejection or {})
        for name, right in expected.items():
            difference = (got[name] - right).abs().max().item()
            tolerance = ONNX_TOLERANCE * max(1.0, right.abs().max().item())
            if not difference <= tolerance:  # also NaN
                raise UnsupportedArchitectureError(
                    f"Got an ONNX file of a {module.config.base_class} whose {name} differ from the module's by "
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
            yield {name: value[:, gone:].contiguous() if 1 in free[name] else value for name, value in inputs.items()}
