"""Exports modules to ONNX, and checks onnxruntime's outputs before the files are moved into place."""

import copy
import inspect
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from nemo_hf.models.atomic_writes import replaced_directory
from nemo_hf.models.base import NeMoPreTrainedModel
from nemo_hf.models.equivalence import as_saved
from nemo_hf.models.files import clean_companion, read_json
from nemo_hf.models.finiteness import check_finite, check_outputs
from nemo_hf.models.head_outputs import NeMoOutput, answers
from nemo_hf.models.labels import settle_labels
from nemo_hf.models.loading import PROCESS_SETTINGS
from nemo_hf.models.privacy import clean
from nemo_hf.models.rejection import add_rejection
from nemo_hf.models.weight_files import size_in_bytes
from nemo_hf.neurons.sites import UnsupportedArchitectureError
from nemo_hf.neurons.trial_calls import first_line, is_out_of_memory
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
    outputs: list[str]  # "logits", of detectors "pred_boxes", and of calibrated modules "rejection_scores"
    difference: float  # largest between onnxruntime's outputs and the module's, in float32
    tolerance: float  # largest difference allowed: 1e-4 times max(1, largest logit)


def check_is_module(module: NeMoPreTrainedModel) -> None:
    """Refuses parents, which have masks, with a `ValueError`."""
    if module.is_parent:
        raise ValueError("Got a parent; expected a module. Call extract_module(labels) or detach_masks().")


def plain_config(module: NeMoPreTrainedModel) -> PreTrainedConfig:
    """The plain model's configuration with the module's labels."""
    settle_labels(module.config)
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
        (directory / name).write_bytes(clean_companion(name, content))


def clean_written_config(directory: Path) -> None:
    """Takes origins, paths, tokens and names of code out of a plain `config.json` that was just written."""
    path = directory / "config.json"
    text = json.dumps(clean(read_json(path), is_config=True), indent=2, sort_keys=True)
    path.write_text(f"{text}\n", encoding="utf-8")


def export_onnx(  # noqa: D417 - a method of parents and modules
    module: NeMoPreTrainedModel, directory: str | Path, inputs: Inputs | None = None
) -> OnnxExport:
    """Writes a module as `model.onnx` with its processor's files and a plain `config.json`.

    The batch is a free dimension; so are the tokens of texts and the samples of waveforms. Weights are in float32.
    A calibrated module gives `rejection_scores` too, and `rejection` in `config.json` holds the threshold; with a
    `rejected_label`, logits and labels have one more. Torch traces the model for the whole process: other threads must
    not call any model meanwhile, but may export too.

    Args:
        directory: Where to; appears whole or not at all.
        inputs: A few samples, at least 2, to trace and compare with; `None` draws random ones.

    Returns:
        Inputs, outputs and the largest difference that onnxruntime made on batches of several sizes and lengths.

    Raises:
        ValueError: If this is a parent, has texts but no padding token, `inputs` are fewer than 2 samples, or the
            directory holds weights with another config.json.
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
    with as_saved(module) as (saved,):
        exact = copy.deepcopy(saved).cpu().float()
    exact.config.return_dict = True
    exact.config.output_hidden_states = exact.config.output_attentions = False  # the file has logits alone
    if exact.config._attn_implementation not in ("eager", "sdpa"):  # others can't be traced
        exact.set_attn_implementation("eager")
    if inputs is not None and len(next(iter(inputs.values()))) < 2:
        raise ValueError("Got one sample to trace with; expected at least 2. Pass more, or none for random ones.")
    inputs = traced_inputs(exact) if inputs is None else {k: v.cpu() for k, v in inputs.items() if k != "labels"}
    inputs = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
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
    config = plain_config(module)
    _check_place(Path(directory), config)
    if module.config.rejection:
        config.rejection = dict(module.config.rejection)
        config.id2label, config.label2id = module.config.id2label, module.config.label2id
        if "num_labels" in config.to_dict():
            config.num_labels = len(config.id2label)
    with replaced_directory(directory, stale=(f"{ONNX_NAME}*",)) as temporary:
        _trace(exact, inputs, free, outputs, temporary / ONNX_NAME)
        difference, tolerance = _check_onnx(exact, inputs, free, outputs, temporary / ONNX_NAME)
        config.save_pretrained(temporary)
        clean_written_config(temporary)
        write_processor(module, temporary)
    shapes = {name: [free[name].get(dim, size) for dim, size in enumerate(v.shape)] for name, v in inputs.items()}
    return OnnxExport(shapes, outputs, difference, tolerance)


def _check_place(directory: Path, config: PreTrainedConfig) -> None:
    """Refuses a directory with weights whose config.json would be replaced by that of another model."""
    path = directory / "config.json"
    if not path.is_file() or not any(directory.glob("*.safetensors")):
        return
    there, ours = ({**data} for data in (read_json(path), clean(json.loads(config.to_json_string()), is_config=True)))
    for data in (there, ours):
        for name in ("rejection", "dtype", "architectures", "transformers_version"):
            data.pop(name, None)
    if there != ours:
        raise ValueError(
            f"Got {str(directory)!r}, which holds weights with another config.json; expected a directory without. "
            "Export to a directory of its own."
        )


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
    size = size_in_bytes(module.parameters())
    options: dict[str, Any] = {"external_data": size > LARGEST_FILE, "dynamo": True, "verbose": False}
    options |= {"input_names": list(inputs), "output_names": list(outputs), "dynamic_shapes": free}
    try:
        with PROCESS_SETTINGS, _silent(), torch.no_grad():
            torch.onnx.export(module, (), path, kwargs=dict(inputs), **options)
    except Exception as error:  # the exporter raises whatever the model's code meets
        if isinstance(error, (ImportError, OSError)) or is_out_of_memory(error):
            raise
        names = " and ".join(dict.fromkeys(name for dims in free.values() for name in dims.values()))
        raise UnsupportedArchitectureError(
            f"Got a module of {module.config.base_class} that torch.onnx can't trace with free {names} "
            f"({type(error).__name__}: {first_line(error)}). {OTHER_WAYS.format('save_plain')}"
        ) from error
    _drop_notes(path)


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


def _drop_notes(path: Path) -> None:
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
            answered = module(**batch)
        check_outputs(module, batch, answers(answered), [name for _, name in sorted(module.config.id2label.items())])
        got = dict(zip(outputs, runner(**batch), strict=True))
        expected = {name: answered[name] for name in outputs if name != "rejection_scores"}
        if "rejection_scores" in got:  # of the file's logits, since a steep fit magnifies how these differ
            own: Any = NeMoOutput(logits=got["logits"][:, : module.num_labels])
            add_rejection(own, module.config, is_in_eval=True)
            expected["rejection_scores"] = own.rejection_scores
            expected["logits"] = torch.cat(
                [answered.logits[:, : module.num_labels], own.logits[:, module.num_labels :]], -1
            )
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
