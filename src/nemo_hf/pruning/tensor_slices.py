"""Cuts of named tensors: how each of a module's tensors comes from the parent's, in memory or in a file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nemo_hf.neurons.sites import CHANNEL_NORMS, PAD

from .layer_cuts import LayerCut, SiteCut
from .resize import NORM_TENSORS


@dataclass(frozen=True)
class TensorCut:
    """How one tensor of a module comes from the parent's tensor of the same name.

    Args:
        indices: Kept indices by dimension, `PAD` for zeros.
        scales: Factor of each kept index, by dimension.
        is_transposed: Whether the dimensions are swapped after the cut (a `Conv1D` that becomes scattered).
        constant: The tensor itself where it does not come from the parent (indices of a scattered layer).
    """

    indices: Mapping[int, Tensor] = field(default_factory=dict)
    scales: Mapping[int, Tensor] = field(default_factory=dict)
    is_transposed: bool = False
    constant: Tensor | None = None


def tensor_cuts(model: nn.Module, cuts: Sequence[SiteCut], heads: Mapping[str, Tensor]) -> dict[str, TensorCut]:
    """Translates cuts of layers into cuts of named tensors.

    Args:
        model: The plain model at full width; its weights may be on the meta device.
        cuts: The cut of each site.
        heads: Path of each head to the label ids that stay, in the module's order.

    Returns:
        Tensor name to its cut; tensors that are not named stay whole.
    """
    tensors: dict[str, TensorCut] = {}
    for cut in cuts:
        for path, layer_cut in cut.layers.items():
            _add(tensors, _layer_tensors(model, path, layer_cut))
        for path, index in cut.head_tensors.items():
            tensors[path] = TensorCut({model.get_parameter(path).ndim - 1: index})
        tensors.update({name: TensorCut(constant=tensor) for name, tensor in cut.constants.items()})
    for path, index in heads.items():
        _add(tensors, _layer_tensors(model, path, LayerCut(outputs=index)))
    return tensors


def _add(tensors: dict[str, TensorCut], more: Mapping[str, TensorCut]) -> None:
    """Adds cuts; a layer that reads the neurons of one site and makes those of another is cut on both sides."""
    for name, cut in more.items():
        before = tensors.get(name)
        if before is not None:
            cut = replace(cut, indices={**before.indices, **cut.indices}, scales={**before.scales, **cut.scales})
        tensors[name] = cut


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
    """Applies a cut to a tensor that can be read by index.

    Args:
        read: Returns the rows (dimension 0) or columns (dimension 1) of the tensor at some indices.
        cut: The cut, with indices in at least one dimension or a constant.

    Returns:
        The module's tensor, contiguous; in float32 at least where it was scaled.
    """
    if cut.constant is not None:
        return cut.constant.clone()
    (first, index), *others = cut.indices.items()
    tensor = _with_zeros(read(first, index[index != PAD]), first, index)
    for dim, index in others:
        tensor = _with_zeros(tensor.index_select(dim, index[index != PAD]), dim, index)
    if cut.scales and tensor.element_size() < 4:  # half precision would round the product
        tensor = tensor.float()
    for dim, scale in cut.scales.items():
        tensor = tensor * scale.to(tensor.dtype).view(-1, *(1,) * (tensor.ndim - 1 - dim))
    return (tensor.T if cut.is_transposed else tensor).contiguous()


def uncut_tensor(tensor: Tensor, cut: TensorCut, shape: Sequence[int]) -> Tensor:
    """Puts a cut tensor back at its old places.

    Args:
        tensor: A module's tensor.
        cut: The cut that made it, of indices and nonzero scales.
        shape: Shape of the parent's tensor.

    Returns:
        A tensor of that shape which the cut turns into `tensor`: zero wherever nothing was kept.
    """
    tensor = tensor.T if cut.is_transposed else tensor
    for dim, scale in cut.scales.items():
        tensor = tensor / scale.to(tensor.dtype).view(-1, *(1,) * (tensor.ndim - 1 - dim))
    for dim, index in cut.indices.items():
        kept = (index != PAD).nonzero().squeeze(-1)
        wider = [*tensor.shape[:dim], shape[dim], *tensor.shape[dim + 1 :]]
        tensor = tensor.new_zeros(wider).index_copy(dim, index[kept], tensor.index_select(dim, kept))
    return tensor.contiguous()


def _with_zeros(kept: Tensor, dim: int, index: Tensor) -> Tensor:
    if not bool((index == PAD).any()):
        return kept
    shape = list(kept.shape)
    shape[dim] = len(index)
    positions = (index != PAD).nonzero().squeeze(-1)
    return kept.new_zeros(shape).index_copy(dim, positions, kept)
