"""Cuts of named tensors: which slice of the parent's tensor each tensor of a module is, in memory or in a file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nemo_hf.neurons.sites import CHANNEL_NORMS, PAD

from .layer_cuts import LayerCut, SiteCut
from .resize import NORM_TENSORS


@dataclass(frozen=True)
class TensorCut:
    """How one tensor of a module is made from the parent's tensor of the same name."""

    indices: Mapping[int, Tensor] = field(default_factory=dict)  # kept ones by dimension, `PAD` for zeros
    scales: Mapping[int, Tensor] = field(default_factory=dict)  # factor of each kept index, by dimension
    is_transposed: bool = False  # after the cut: a `Conv1D` that becomes scattered
    constant: Tensor | None = None  # the tensor itself, if it does not come from the parent (indices of a layer)


def tensor_cuts(model: nn.Module, cuts: Sequence[SiteCut], heads: Mapping[str, Tensor]) -> dict[str, TensorCut]:
    """Translates the cuts of all sites into cuts of named tensors of the plain model at full width; others stay whole.

    `heads` maps the path of each classification head to the label ids that stay, in the module's order.
    """
    tensors: dict[str, TensorCut] = {}
    layer_cuts = [item for cut in cuts for item in cut.layers.items()]
    layer_cuts += [(path, LayerCut(outputs=index)) for path, index in heads.items()]
    for path, layer_cut in layer_cuts:
        for name, new in _layer_tensors(model, path, layer_cut).items():
            # A layer that reads the neurons of one site and makes those of another is cut on both sides.
            old = tensors.get(name, TensorCut())
            tensors[name] = replace(new, indices={**old.indices, **new.indices}, scales={**old.scales, **new.scales})
    for cut in cuts:
        for path, index in cut.head_tensors.items():
            tensors[path] = TensorCut({model.get_parameter(path).ndim - 1: index})
        tensors.update({name: TensorCut(constant=tensor) for name, tensor in cut.constants.items()})
    return tensors


def _layer_tensors(model: nn.Module, path: str, cut: LayerCut) -> dict[str, TensorCut]:
    layer = model.get_submodule(path)
    if isinstance(layer, CHANNEL_NORMS):
        assert cut.outputs is not None
        names = [name for name in NORM_TENSORS if getattr(layer, name) is not None]
        return {f"{path}.{name}": TensorCut({0: cut.outputs}) for name in names}
    is_transposed = isinstance(layer, Conv1D)  # its weight is (inputs, outputs)
    output_dim, input_dim = (1, 0) if is_transposed else (0, 1)
    sides = ((output_dim, cut.outputs, cut.output_scale), (input_dim, cut.inputs, cut.input_scale))
    indices = {dim: index for dim, index, _ in sides if index is not None}
    scales = {dim: scale[index] for dim, index, scale in sides if index is not None and scale is not None}
    tensors = {f"{path}.weight": TensorCut(indices, scales, is_transposed and cut.is_scattered)}
    if layer.bias is not None and cut.outputs is not None:
        bias_scale = {} if cut.output_scale is None else {0: cut.output_scale[cut.outputs]}
        tensors[f"{path}.bias"] = TensorCut({0: cut.outputs}, bias_scale)
    if cut.is_scattered:
        for name, index in (("output_indices", cut.outputs), ("input_indices", cut.inputs)):
            if index is not None:
                tensors[f"{path}.{name}"] = TensorCut(constant=index)
    return tensors


def cut_tensor(read: Callable[[int, Tensor], Tensor], cut: TensorCut) -> Tensor:
    """Makes a module's tensor, contiguous; `read` returns the parent's at some indices of a dimension."""
    if cut.constant is not None:
        return cut.constant.clone()
    for dim, index in cut.indices.items():
        tensor = _with_zeros(read(dim, index[index != PAD]), dim, index)
        read = tensor.index_select
    if cut.scales and tensor.element_size() < 4:  # half precision would round the product
        tensor = tensor.float()
    for dim, scale in cut.scales.items():
        tensor = tensor * _along(dim, scale, tensor)
    return (tensor.T if cut.is_transposed else tensor).contiguous()


def uncut_tensor(tensor: Tensor, cut: TensorCut, shape: Sequence[int]) -> Tensor:
    """Returns a tensor of the parent's shape that a cut (of indices and nonzero scales) turns into `tensor`, else 0."""
    tensor = tensor.T if cut.is_transposed else tensor
    for dim, scale in cut.scales.items():
        tensor = tensor / _along(dim, scale, tensor)
    for dim, index in cut.indices.items():
        kept = (index != PAD).nonzero().squeeze(-1)
        wider = [*tensor.shape[:dim], shape[dim], *tensor.shape[dim + 1 :]]
        tensor = tensor.new_zeros(wider).index_copy(dim, index[kept], tensor.index_select(dim, kept))
    return tensor.contiguous()


def _along(dim: int, scale: Tensor, tensor: Tensor) -> Tensor:
    return scale.to(tensor.dtype).view(-1, *(1,) * (tensor.ndim - 1 - dim))


def _with_zeros(kept: Tensor, dim: int, index: Tensor) -> Tensor:
    if not bool((index == PAD).any()):
        return kept
    shape = (*kept.shape[:dim], len(index), *kept.shape[dim + 1 :])
    return kept.new_zeros(shape).index_copy(dim, (index != PAD).nonzero().squeeze(-1), kept)
