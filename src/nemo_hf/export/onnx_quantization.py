"""Quantizes ONNX files by onnxruntime's quantizers.

Linear layers get 8-bit weights with a scale for each output, or 4-bit weights in blocks, and onnxruntime rounds their
inputs to 8 bits as they come. It has no quick kernels for convolutions of such inputs, whose ranges therefore come from
calibration samples. All else, such as attention's products and rejection scores, stays in float32.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_hf.neurons.sites import UnsupportedArchitectureError

Inputs = Mapping[str, Tensor]

WIDTHS = ("int8", "int4")
BLOCK = 32  # 4-bit weights that share a scale
INTEGER_PRODUCTS = 4  # the accuracy level at which onnxruntime rounds the inputs of 4-bit layers to 8 bits
FEW = 0.1  # share of all weights up to which convolutions stay in float32
AROUND_CONVOLUTIONS = ("Conv", "Relu", "Clip", "Add", "MaxPool", "AveragePool", "GlobalAveragePool")


def check_width(width: Any, known: Sequence[str]) -> None:
    """Refuses a width that a format doesn't have with a `ValueError`."""
    if width is not None and width not in known:
        shown = " or ".join(map(repr, known))
        raise ValueError(f"Got quantize={width!r}; expected {shown}, or None for weights in float32.")


def quantize_file(source: Path, target: Path, width: str, samples: Sequence[Inputs] | None, is_large: bool) -> None:
    """Writes an ONNX file with weights of a width, from one in a directory for scratch files.

    `samples` are calibration batches, if there are any; a file that `is_large` keeps its weights beside it.
    """
    import onnx

    with _quiet():
        from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
        from onnxruntime.quantization.onnx_model import ONNXModel
        from onnxruntime.quantization.quant_utils import add_pre_process_metadata

        model = onnx.load(source)
        del model.graph.value_info[:]  # older versions transpose weights and leave their shapes there as they were
        convolutional = _convolutional(model, width, samples)
        if width == "int4":
            ONNXModel(model).replace_gemm_with_matmul()  # of which alone there are kernels
            blocks: dict[str, Any] = {"block_size": BLOCK, "accuracy_level": INTEGER_PRODUCTS}
            blocks["op_types_to_quantize"] = ("MatMul", "Gather")
            quantizer = MatMulNBitsQuantizer(model, **blocks)
            quantizer.process()
            quantizer.model.save_model_to_file(target, is_large)
            return
        add_pre_process_metadata(model)  # otherwise they recommend what torch's exporter has done
        # Seven bits, since sums of eight overflow on CPUs without VNNI: what is compared here holds there, too.
        options: dict[str, Any] = {"per_channel": True, "reduce_range": True, "use_external_data_format": is_large}
        if convolutional:
            static = source.with_name("static.onnx")
            quantize_static(model, static, _reader(samples or ()), nodes_to_quantize=convolutional,
                            activation_type=QuantType.QUInt8, **options)  # fmt: skip
            model = onnx.load(static)
        quantize_dynamic(model, target, ["MatMul", "Gemm", "Gather"], **options)


def _convolutional(model: Any, width: str, samples: Sequence[Inputs] | None) -> list[str]:
    """Names of convolutions and of what is between them, if they have enough of the weights to be quantized.

    Refuses those that onnxruntime has no way for.
    """
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in model.graph.initializer}
    nodes = list(model.graph.node)
    places = [place for place, node in enumerate(nodes) if node.op_type == "Conv"]
    share = sum(sizes.get(name, 0) for name in {nodes[place].input[1] for place in places}) / sum(sizes.values())
    if share <= FEW:
        return []
    got = f"Got quantize={width!r} for a module with {share:.0%} of its weights in convolutions"
    if width == "int4":
        raise UnsupportedArchitectureError(
            f"{got}, of which onnxruntime has none in 4 bits; expected linear layers. Pass quantize='int8'."
        )
    if not samples:
        raise ValueError(
            f"{got} and no calibration samples; expected some, since the ranges of the convolutions' inputs come from "
            "them. Pass calibration=, a hundred samples or more."
        )
    return [node.name for node in nodes[: places[-1] + 1] if node.op_type in AROUND_CONVOLUTIONS]


def _reader(samples: Sequence[Inputs]) -> Any:
    """Calibration batches as onnxruntime takes them."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        waiting = iter(samples)

        def get_next(self) -> dict[str, Any] | None:
            return next(({name: value.numpy() for name, value in batch.items()} for batch in self.waiting), None)

    return Reader()


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides what the quantizers log of each layer, and keeps one of them from setting up the logging of the process."""
    root, own, handler = logging.getLogger(), logging.getLogger("onnxruntime"), logging.NullHandler()
    level, dropped = own.level, (lambda record: False)
    root.addHandler(handler)  # with a handler, basicConfig changes nothing
    root.addFilter(dropped)  # of what is logged by logging.warning itself
    own.setLevel(logging.ERROR)
    try:
        yield
    finally:
        own.setLevel(level)
        root.removeFilter(dropped)
        root.removeHandler(handler)
