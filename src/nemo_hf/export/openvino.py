"""Exports modules to OpenVINO, and checks what it computes before the files are moved into place."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_hf.models.base import NeMoPreTrainedModel
from nemo_hf.models.files import EXPORTED_FILES

from .agreement import Inputs
from .onnx_quantization import check_width
from .tracing import FileExport, compare_outputs, prepared, trace, write_export

OPENVINO_NAME = EXPORTED_FILES["openvino"]
STALE = ("openvino_model.*",)
OPENVINO_PACKAGES = ("openvino", "onnx", "onnxscript")
LARGEST = 127  # of 8-bit weights
SMALLEST = 512  # numbers of a tensor whose weights are quantized
READERS = {"MatMul", "Gather", "Convolution", "GroupConvolution"}


def export_openvino(  # noqa: D417 - a method of parents and modules
    module: NeMoPreTrainedModel,
    directory: str | Path,
    inputs: Inputs | None = None,
    *,
    quantize: str | None = None,
    calibration: Any = None,
    min_agreement: float | None = None,
) -> FileExport:
    """Writes a module as `openvino_model.xml` and `.bin` with its processor's files and a plain `config.json`.

    OpenVINO converts the traced ONNX file; inputs, outputs, rejection and the comparison are those of `export_onnx`.
    Answers are compared in the precision that OpenVINO chooses on this machine, bfloat16 on many servers.

    Args:
        directory: Where to; appears whole or not at all.
        inputs: A few samples, at least 2, to trace and compare with; `None` takes calibration samples, or random ones.
        quantize: `"int8"` for weights of linear layers, embeddings and convolutions in 8 bits, with a scale for each
            output or row; `None` for float32.
        calibration: Samples to compare answers on, as in `export_onnx`.
        min_agreement: Share of equal answers, in [0, 1], as in `export_onnx`.

    Returns:
        Inputs, outputs, the largest difference in float32, and how the answers agree with the module's.

    Raises:
        ValueError: If this is a parent, has texts but no padding token, `inputs` are fewer than 2 samples, an argument
            is out of range, `min_agreement` comes without calibration samples, or the directory holds weights with
            another config.json.
        ImportError: If openvino, onnx or onnxscript is missing.
        UnsupportedArchitectureError: If the model can't be traced, or OpenVINO computes something else.
    """
    check_width(quantize, ("int8",))
    ready = prepared(module, inputs, calibration, min_agreement, OPENVINO_PACKAGES, "openvino")
    import openvino

    def write(temporary: Path, scratch: Path) -> Any:
        traced, path, threads = scratch / "model.onnx", temporary / OPENVINO_NAME, torch.get_num_threads()
        trace(ready, traced)
        model = openvino.Core().read_model(traced)
        compared = compare_outputs(ready, OpenVinoRunner(model, threads, INFERENCE_PRECISION_HINT="f32"))
        if quantize:
            _quantize(model)
        openvino.save_model(model, path, compress_to_fp16=False)
        return compared, lambda: OpenVinoRunner(path, threads)

    return write_export(module, ready, directory, STALE, "openvino", quantize, write)


class OpenVinoRunner:
    """Calls an OpenVINO model, or that in a file, with tensors, on a number of threads of this CPU."""

    def __init__(self, model: Any, threads: int, **options: str) -> None:
        import openvino

        given = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, **options}
        self.request = openvino.Core().compile_model(model, "CPU", given).create_infer_request()
        self.names = {name for entry in self.request.model_inputs for name in entry.names}

    def __call__(self, **inputs: Tensor) -> list[Tensor]:
        """Returns the outputs in the file's order."""
        given = {name: value.numpy() for name, value in inputs.items() if name in self.names}
        found = self.request.infer(given)
        return [torch.from_numpy(found[index].copy()) for index in range(len(found))]


def _quantize(model: Any) -> None:
    """Gives the weights of a model's layers and tables 8 bits and a scale for each output or row, in place."""
    from openvino import Type
    from openvino import opset13 as operators

    for node in model.get_ordered_ops():
        if node.get_type_name() != "Constant" or node.get_element_type() != Type.f32:
            continue
        readers = list(node.output(0).get_target_inputs())
        kinds = {entry.get_node().get_type_name() for entry in readers}
        if len(node.shape) < 2 or np.prod(node.shape) < SMALLEST or not kinds <= READERS:
            continue
        reader = readers[0].get_node()
        is_transposed = kinds == {"MatMul"} and not reader.get_attributes()["transpose_b"]
        summed = len(node.shape) - 2 if is_transposed else tuple(range(1, len(node.shape)))
        scales = np.abs(node.data).max(summed, keepdims=True) / LARGEST
        rounded = np.round(node.data / np.where(scales == 0, 1, scales)).astype(np.int8)
        widened = operators.convert(operators.constant(rounded), Type.f32)
        weights = operators.multiply(widened, operators.constant(scales.astype(np.float32)))
        for entry in readers:
            entry.replace_source_output(weights.output(0))
