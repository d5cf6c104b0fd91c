"""Exports modules to ONNX, and checks onnxruntime's outputs before the files are moved into place."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_hf.models.base import NeMoPreTrainedModel
from nemo_hf.models.files import EXPORTED_FILES

from .agreement import Inputs
from .onnx_quantization import WIDTHS, check_width, quantize_file
from .tracing import FileExport, compare_outputs, drop_notes, prepared, trace, write_export

ONNX_NAME = EXPORTED_FILES["onnx"]
STALE = (f"{ONNX_NAME}*",)
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def export_onnx(  # noqa: D417 - a method of parents and modules
    module: NeMoPreTrainedModel,
    directory: str | Path,
    inputs: Inputs | None = None,
    *,
    quantize: str | None = None,
    calibration: Any = None,
    min_agreement: float | None = None,
) -> FileExport:
    """Writes a module as `model.onnx` with its processor's files and a plain `config.json`.

    The batch is a free dimension; so are the tokens of texts and the samples of waveforms. Weights are in float32, or
    quantized by onnxruntime. A calibrated module gives `rejection_scores` too, and `rejection` in `config.json` holds
    the threshold; with a `rejected_label`, logits and labels have one more. The file is compared with the module before
    it is kept, and `export` in `config.json` holds what was found. Torch traces the model for the whole process: other
    threads must not call any model meanwhile, but may export too.

    Args:
        directory: Where to; appears whole or not at all.
        inputs: A few samples, at least 2, to trace and compare with; `None` takes calibration samples, or random ones.
        quantize: `"int8"` for weights of linear layers, embeddings and, with calibration samples, convolutions in 8
            bits; `"int4"` for those of linear layers and embeddings in 4 bits; `None` for none. Layers' inputs are
            rounded to 8 bits too.
        calibration: Samples to compare answers on, as in `nemo_hf.extract_module`, at most 1,000; texts, images or
            recordings need the processor that the module carries. If labelled, samples of other labels are left out,
            unless the module has calibrated rejection: then up to 500 are of its labels, and as many of others.
        min_agreement: Share of these samples, in [0, 1], whose answer must be the module's, of all and of those that
            the module doesn't reject; `None` is 0.98. Random inputs, which are near the borders between labels, only
            show that the logits are not off by more than half of the largest.

    Returns:
        Inputs, outputs, the largest difference that onnxruntime made in float32 on batches of several sizes and
        lengths, and how the answers of the file agree with the module's.

    Raises:
        ValueError: If this is a parent, has texts but no padding token, `inputs` are fewer than 2 samples, an argument
            is out of range, `min_agreement` comes without calibration samples, convolutions are to be quantized without
            calibration samples, or the directory holds weights with another config.json.
        ImportError: If onnx, onnxscript or onnxruntime is missing.
        UnsupportedArchitectureError: If the model can't be traced or quantized, or onnxruntime computes something else.
    """
    check_width(quantize, WIDTHS)
    ready = prepared(module, inputs, calibration, min_agreement, ONNX_PACKAGES, "onnx")

    def write(temporary: Path, scratch: Path) -> Any:
        written = temporary / ONNX_NAME
        path = scratch / ONNX_NAME if quantize else written
        trace(ready, path)
        compared = compare_outputs(ready, OnnxRunner(path, torch.get_num_threads()))
        if quantize:
            quantize_file(path, written, quantize, ready.samples, ready.is_large)
            drop_notes(written)
        return compared, lambda: OnnxRunner(written, torch.get_num_threads())

    return write_export(module, ready, directory, STALE, "onnx", quantize, write)


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
