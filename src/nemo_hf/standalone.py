"""Modules that load without nemo_hf: one Python file beside the weights, which builds the module's layers.

The file knows no family. It builds the plain model and makes the changes that its constants list, which are found
by comparing the plain model with the module. They are literals in the file and not data in config.json, because
they name attributes to set: whoever lets the file run trusts it, whereas a configuration must be harmless.
"""

import copy
import inspect
import json
import math
import re
import sys
import tempfile
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
from jinja2 import Environment, StrictUndefined
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import check_imports, get_class_in_module

from .files import CODE_NAME, write_json
from .inputs import random_inputs
from .law import LAW_TOLERANCE, exact_float32
from .loading import hidden_progress
from .modeling import NeMoPreTrainedModel
from .neurons import UnsupportedArchitectureError
from .slicing import ROTARY_NAME, RotaryAngles, ScatterLinear

CONFIG_CLASS = "NeMoModuleConfig"
KINDS = {
    "image-classification": ("ImageClassification", ("pixel_values",)),
    "text-classification": ("SequenceClassification", ("input_ids", "attention_mask")),
    "audio-classification": ("AudioClassification", ("input_values", "input_features")),
}
"""End of the class names by task, and the inputs that every model of the task is given."""
PIPELINE_INPUTS = {"text-classification": ("token_type_ids", "bbox")}
"""Inputs that are dropped where the plain model does not take them, since tokenizers make them all the same."""
NO_INPUTS = {"self", "labels", "return_dict", "kwargs", "past_key_values", "use_cache"}
Number = int | float | bool
PATH = re.compile(r"(?:[A-Za-z_][A-Za-z0-9_]*|[0-9]+)(?:\.(?:[A-Za-z_][A-Za-z0-9_]*|[0-9]+))*")


class StandaloneCodeError(RuntimeError):
    """A module that loads otherwise with the file written for it than as it is."""


def write_code(module: NeMoPreTrainedModel, directory: str | Path, inputs: Mapping[str, Tensor] | None = None) -> Path:
    """Writes beside a saved module the code with which it loads without nemo_hf.

    Adds `auto_map` to config.json, so that the Auto classes load the directory with `trust_remote_code=True`. Where
    nemo_hf is imported they load it as before and don't ask for trust. The code is first run on the saved weights
    and compared with the module.

    Args:
        module: A module of a plain model of `transformers`.
        directory: Where it was saved.
        inputs: A few samples to compare the logits on; `None` draws random ones.

    Returns:
        Path of the file.

    Raises:
        ValueError: If it is a parent, or nothing can be drawn for `inputs`.
        UnsupportedArchitectureError: If its plain model is not of `transformers`, or differs in other ways from it than
            the file can tell.
        StandaloneCodeError: If the code gives other tensors or logits; the directory is as before.
        OSError: If the directory holds no saved module.
    """
    directory = Path(directory)
    code = render_code(module)
    config_path = directory / "config.json"
    if not config_path.is_file():
        raise FileNotFoundError(
            f"Got {str(directory)!r} without config.json; expected a saved module. Call save_pretrained first."
        )
    with tempfile.TemporaryDirectory() as temporary:
        trial = Path(temporary, CODE_NAME)
        trial.write_text(code, encoding="utf-8")
        _check(module, trial, directory, random_inputs(module) if inputs is None else inputs)
    config = json.loads(config_path.read_text(encoding="utf-8"))
    room = Path(CODE_NAME).stem
    config["auto_map"] = {
        "AutoConfig": f"{room}.{CONFIG_CLASS}",
        f"AutoModelFor{KINDS[module.task][0]}": f"{room}.{_model_class(module)}",
    }
    hidden = directory / f".{CODE_NAME}.tmp"
    hidden.write_text(code, encoding="utf-8")
    hidden.replace(directory / CODE_NAME)
    write_json(config_path, dict(sorted(config.items())))
    return directory / CODE_NAME


def render_code(module: NeMoPreTrainedModel) -> str:
    """Returns the code with which a module loads without nemo_hf.

    Args:
        module: As in `write_code`.

    Returns:
        A Python file that imports `torch` and `transformers`. Nothing in it comes from label names or other free text:
        names are identifiers, values are numbers.

    Raises:
        ValueError: As `write_code`.
        UnsupportedArchitectureError: As `write_code`.
    """
    if module.is_parent:
        raise ValueError(
            "Got a parent; expected a module, since masks need nemo_hf. Cut a module: parent.extract_module([...])."
        )
    plain_class = module.config.plain_class
    name = plain_class.__name__
    is_known = type(module.config.base_config).__module__.startswith("transformers.")
    if not is_known or getattr(transformers, name, None) is not plain_class:
        raise UnsupportedArchitectureError(
            f"Got a module of {plain_class.__module__}.{name}; expected a class of transformers, since the code beside "
            "the weights can build no other. Save the module without code."
        )
    config = copy.deepcopy(module.config)
    with torch.device("meta"):
        plain, resized = plain_class(copy.deepcopy(config.base_config)), type(module)(config).model
    changes, scattered, rotary = find_changes(plain, resized)
    main_inputs = KINDS[module.task][1]
    taken = [name for name in inspect.signature(plain_class.forward).parameters if _is_input(name)]
    droppable = PIPELINE_INPUTS.get(module.task, ())
    environment = Environment(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True)  # noqa: S701
    template = files("nemo_hf").joinpath(f"templates/{CODE_NAME}.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        version=transformers.__version__,
        auto_class=f"AutoModelFor{KINDS[module.task][0]}",
        model_class=_model_class(module),
        base_class=_identifier(name),
        changes=_literal(changes),
        scattered=_literal(scattered) if scattered else "",
        rotary=_literal(rotary) if rotary else "",
        rotary_name=ROTARY_NAME,
        main_inputs=main_inputs,
        inputs=[_identifier(name) for name in dict.fromkeys((*main_inputs, *droppable, *taken))],
        passed=[_identifier(name) for name in dict.fromkeys((*main_inputs, *taken))],
    )


def find_changes(
    plain: PreTrainedModel, resized: PreTrainedModel
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]], dict[str, int]]:
    """Compares a plain model with the one inside a module, layer by layer.

    Args:
        plain: The plain model at full width; its weights may be on the meta device.
        resized: The model inside the module, likewise.

    Returns:
        By path of the layer: the tensors of another shape (shapes as tuples) and the numbers among its attributes
        that differ; the arguments of each `ScatterLinear`; the number of angles of each attention layer that has
        `RotaryAngles`.

    Raises:
        UnsupportedArchitectureError: If a layer is neither of the plain model nor of these two kinds, or has other
            tensors.
    """
    changes: dict[str, dict[str, Any]] = {}
    scattered: dict[str, dict[str, Any]] = {}
    rotary: dict[str, int] = {}
    before = dict(plain.named_modules())
    for path, layer in resized.named_modules():
        if isinstance(layer, ScatterLinear):
            scattered[path] = _scatter_arguments(layer)
        elif isinstance(layer, RotaryAngles):
            rotary[path.removesuffix(f".{ROTARY_NAME}")] = len(layer.angle_indices)
        elif path not in before or _tensors(before[path]).keys() != _tensors(layer).keys():
            raise UnsupportedArchitectureError(
                f"Got a module whose layer {path!r} ({type(layer).__name__}) is none of the plain model with smaller "
                "parameters; expected no other. Save the module without code."
            )
        elif found := _layer_changes(before[path], layer):
            changes[path] = found
    return changes, scattered, rotary


def _scatter_arguments(layer: ScatterLinear) -> dict[str, Any]:
    outputs, inputs = layer.weight.shape
    return {
        "inputs": inputs,
        "outputs": outputs,
        "full_outputs": layer.full_outputs,
        "reads_some": layer.input_indices is not None,
        "has_bias": layer.bias is not None,
    }


def _tensors(layer: nn.Module) -> dict[tuple[str, bool], tuple[int, ...]]:
    """Shapes of a layer's own tensors by name and whether it is a parameter."""
    parameters = {(name, True): tuple(value.shape) for name, value in layer.named_parameters(recurse=False)}
    return parameters | {(name, False): tuple(value.shape) for name, value in layer.named_buffers(recurse=False)}


def _layer_changes(before: nn.Module, after: nn.Module) -> dict[str, Any]:
    shapes = _tensors(before)
    found: dict[str, Any] = {key[0]: shape for key, shape in _tensors(after).items() if shape != shapes[key]}
    values = vars(before)
    found.update(
        {
            name: value
            for name, value in vars(after).items()
            if isinstance(value, Number) and not name.startswith("_") and value != values.get(name, value)
        }
    )
    return found


def _is_input(name: str) -> bool:
    return name not in NO_INPUTS and not name.startswith("output_")


def _model_class(module: NeMoPreTrainedModel) -> str:
    return f"NeMoModuleFor{KINDS[module.task][0]}"


def _identifier(name: str) -> str:
    if not (name.isascii() and name.isidentifier()):
        raise UnsupportedArchitectureError(f"Got the name {name!r}; expected an identifier. Save without code.")
    return name


def _literal(entries: Mapping[str, Any]) -> str:
    """Python's notation of shapes and numbers by path, one path a line; nothing else passes."""
    lines = ["{"]
    for path, value in entries.items():
        if not PATH.fullmatch(path):
            raise UnsupportedArchitectureError(
                f"Got a layer with the path {path!r}; expected identifiers and numbers with dots between them. "
                "Save the module without code."
            )
        if isinstance(value, Mapping):
            parts = ", ".join(f'"{_identifier(name)}": {_number_or_shape(part)}' for name, part in value.items())
            lines.append(f'    "{path}": {{{parts}}},')
        else:
            lines.append(f'    "{path}": {_number_or_shape(value)},')
    return "\n".join([*lines, "}"])


def _number_or_shape(value: Any) -> str:
    numbers = value if isinstance(value, tuple) else () if value is None else (value,)
    if not all(type(number) in (int, float, bool) and math.isfinite(number) for number in numbers):
        raise UnsupportedArchitectureError(f"Got the value {value!r}; expected finite numbers. Save without code.")
    return repr(value)


def _check(module: NeMoPreTrainedModel, code: Path, directory: Path, inputs: Mapping[str, Tensor]) -> None:
    """Compares what the code makes of a directory with the module."""
    check_imports(code)
    loaded_class: Any = get_class_in_module(_model_class(module), code)
    try:
        with hidden_progress():
            loaded = loaded_class.from_pretrained(directory).to(module.device)
        with torch.no_grad(), exact_float32(module, loaded) as (expected_model, got_model):
            batch = {
                name: value.to(module.device, torch.float32 if value.is_floating_point() else value.dtype)
                for name, value in inputs.items()
                if name != "labels"
            }
            expected, got = expected_model(**batch), got_model(**batch)
    except RuntimeError as error:
        raise StandaloneCodeError(
            f"Got an error when {str(directory)!r} is loaded without nemo_hf: {error}. Save the module there first; if "
            "this is what you did, save it without code, and report the model type."
        ) from error
    finally:
        del sys.modules[loaded_class.__module__]
    _check_tensors(module.state_dict(), loaded.state_dict())
    for name in ("logits", "rejection_scores") if module.config.rejection else ("logits",):
        difference = (got[name] - expected[name]).abs().max().item()
        tolerance = LAW_TOLERANCE * max(1.0, expected[name].abs().max().item())
        if not difference <= tolerance:  # also when it is not a number
            raise StandaloneCodeError(
                f"Got {name} that differ by {difference:.2e} when a module of {module.config.base_class} is loaded "
                f"without nemo_hf; expected at most {tolerance:.2e}. Save the module without code, and report the "
                "model type."
            )


def _check_tensors(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> None:
    strange = sorted(set(expected) ^ set(got)) or [
        name for name, tensor in expected.items() if not torch.equal(tensor, got[name])
    ]
    if strange:
        raise StandaloneCodeError(
            f"Got {len(strange)} tensors, such as {strange[0]!r}, that are not the module's when it is loaded without "
            "nemo_hf; expected the same. The directory holds other weights: save the module there first."
        )
