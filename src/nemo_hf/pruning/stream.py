"""Narrows the residual stream of pre-norm models, after SliceGPT (Ashkboos et al., arXiv 2401.15024).

Where all that reads the stream does so behind a norm, and all that writes to it is linear, the stream may be rotated:
norms see lengths alone, once their scales are folded into the layers that read them. The directions that say least on
calibration samples are then left out. A norm that subtracts the mean sees one direction less than there are numbers. So
the others are laid orthogonal to the vector of ones, where its mean is 0, and the result is an ordinary narrower model.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nemo_hf.neurons.sites import NeuronSite, UnsupportedArchitectureError

from .layer_edits import weight_shape
from .resize import ScatterLinear
from .statistics import admitted_rows

LAYERS = (nn.Linear, Conv1D, ScatterLinear, nn.Conv2d)
WIDTHS = ("in_features", "out_features", "nx", "nf", "in_channels", "out_channels", "embedding_dim")


@dataclass(frozen=True)
class Stream:
    """What touches the residual stream: norms and layers by path, and other tensors by name."""

    width: int
    norms: list[str]
    readers: list[str]
    writers: list[str]
    tables: list[str]  # parameters whose last dimension is the stream: embeddings, class tokens

    def axes(self, model: nn.Module) -> dict[str, int]:
        """The dimension of each tensor, by name, that goes along the stream."""
        found = dict.fromkeys(self.tables, -1)
        for paths, reads in ((self.readers, True), (self.writers, False)):
            for path in paths:
                layer = model.get_submodule(path)
                found[f"{path}.weight"] = int(reads != isinstance(layer, Conv1D))
                if not reads and layer.bias is not None:
                    found[f"{path}.bias"] = 0
        return found | {name: 0 for path in self.norms for name, _ in _own(model, path)}


def find_stream(model: nn.Module, sites: Sequence[NeuronSite]) -> Stream:
    """Finds the layers around the stream that the parts of a model add to, by their widths."""
    outputs = {site.output for site in sites if site.kind != "conv"}
    producers = {rows.layer for site in sites for rows, _ in site.produced()}
    widths = {weight_shape(model.get_submodule(path))[0] for path in outputs}
    if len(widths) != 1:
        raise _refused(f"parts that write to streams of the widths {sorted(widths)}")
    width = widths.pop()
    norms, readers, writers, tables = [], [], [], []
    for path, layer in model.named_modules():
        own = {name: tuple(tensor.shape) for name, tensor in _own(model, path)}
        if isinstance(layer, LAYERS):
            made, read = weight_shape(layer)[:2]
            if path in producers or (path not in outputs and read == width):
                readers.append(path)
            elif made == width:
                writers.append(path)
        elif isinstance(layer, nn.LayerNorm) or type(layer).__name__.endswith("RMSNorm"):
            norms += [path] if own and set(own.values()) == {(width,)} else []
        else:
            tables += [name for name, shape in own.items() if shape[-1:] == (width,)]
    return Stream(width, norms, readers, writers, tables)


def _own(model: nn.Module, path: str) -> list[tuple[str, Tensor]]:
    """The parameters of a layer itself, by name in the model."""
    own = model.get_submodule(path).named_parameters(prefix=path, recurse=False)
    return list(own)


def resize_stream(model: nn.Module, sites: Sequence[NeuronSite], width: int) -> None:
    """Gives the layers around the stream of a model, at full width until now, another width, without weights."""
    stream = find_stream(model, sites)
    for name, axis in stream.axes(model).items():
        path, _, own = name.rpartition(".")
        layer, old = model.get_submodule(path), model.get_parameter(name)
        shape = list(old.shape)
        shape[axis] = width
        setattr(layer, own, nn.Parameter(old.new_empty(shape), old.requires_grad))
    for path in (*stream.readers, *stream.writers):
        layer = model.get_submodule(path)
        made, read = weight_shape(layer)[:2]
        for attribute in WIDTHS:
            if hasattr(layer, attribute):
                setattr(layer, attribute, made if attribute.startswith(("out", "nf")) else read)
    for path, layer in model.named_modules():
        if path in stream.norms and isinstance(layer, nn.LayerNorm):
            layer.normalized_shape = (width,)
        elif f"{path}.weight" in stream.tables and isinstance(layer, nn.Embedding):
            layer.embedding_dim = width


@torch.no_grad()
def stream_moments(model: nn.Module, stream: Stream, batches: Iterable[Mapping[str, Any]]) -> Tensor:
    """Mean of products of what norms make of the stream, before their scales, over tokens and norms: (width, width)."""
    total, rows = torch.zeros(stream.width, stream.width, dtype=torch.float64), 0
    inputs: Mapping[str, Any] = {}

    def add(layer: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal total, rows
        values = admitted_rows(args[0], inputs).double()
        values = values - values.mean(-1, keepdim=True) if isinstance(layer, nn.LayerNorm) else values
        values = values / values.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30)
        total, rows = total + (values.mT @ values).cpu(), rows + len(values)

    with ExitStack() as stack:
        for path in stream.norms:
            stack.callback(model.get_submodule(path).register_forward_pre_hook(add).remove)
        for inputs in batches:
            model(**inputs, return_dict=True)
    return total / max(1, rows)


def stream_basis(model: nn.Module, stream: Stream, moments: Tensor, width: int) -> tuple[Tensor, float]:
    """A matrix (old width, new width) that takes streams to narrower ones; and the share of variance that it loses."""
    centres = {isinstance(model.get_submodule(path), nn.LayerNorm) for path in stream.norms}
    if len(centres) != 1:
        raise _refused("norms of both kinds" if centres else "no norm on its stream")
    skipped = int(centres.pop())  # the constant direction
    if skipped:  # it comes last, whatever else has no variance
        moments = moments - moments.diagonal().mean()
    values, vectors = torch.linalg.eigh((moments + moments.mT) / 2)
    kept = vectors.flip(-1)[:, : width - skipped]
    energies = values.flip(-1).clamp(min=0)
    # Cosines: orthogonal to each other and, but for the first, to the vector of ones; they share out what is said.
    places, waves = torch.arange(width, dtype=torch.float64), torch.arange(skipped, width, dtype=torch.float64)
    cosines = ((places[None] + 0.5) * waves[:, None] * math.pi / width).cos()
    cosines = cosines / cosines.square().sum(-1, keepdim=True).sqrt()
    loss = 1 - (energies[: width - skipped].sum() / energies.sum().clamp(min=1e-30)).item()
    return kept @ cosines * (width / stream.width) ** 0.5, max(0.0, loss)


@torch.no_grad()
def read_norms(model: nn.Module, stream: Stream, inputs: Mapping[str, Any]) -> dict[str, str]:
    """The norm that each reader of the stream reads, by path; a reader of anything else is refused."""
    held: dict[int, tuple[str, Tensor]] = {}  # by place in memory, which views share; alive until the end
    found: dict[str, str] = {}

    def made(path: str, layer: nn.Module, args: Any, output: Tensor) -> None:
        held[output.untyped_storage().data_ptr()] = (path, output)

    def read(path: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        norm = held.get(args[0].untyped_storage().data_ptr(), ("",))[0]
        if not norm or found.get(path, norm) != norm:
            raise _refused(f"{path!r}, which reads the stream otherwise than behind one norm")
        found[path] = norm

    with ExitStack() as stack:
        for path in stream.norms:
            stack.callback(model.get_submodule(path).register_forward_hook(partial(made, path)).remove)
        for path in stream.readers:
            stack.callback(model.get_submodule(path).register_forward_pre_hook(partial(read, path)).remove)
        model(**inputs, return_dict=True)
    if missing := sorted({*stream.readers} - found.keys()):
        raise _refused(f"{missing[0]!r}, which was not called")
    return found


def narrowed_state(model: nn.Module, stream: Stream, norm_of: Mapping[str, str], basis: Tensor) -> dict[str, Tensor]:
    """A model's state in a basis that `stream_basis` returns, the scales of norms folded into the layers behind."""
    state = dict(model.state_dict())
    shifts: dict[str, list[tuple[Tensor, Tensor]]] = {}  # by norm, of readers without a bias: weights and what is due
    scale = basis.shape[0] / basis.shape[1]
    for name, axis in stream.axes(model).items():
        path, old = name.rpartition(".")[0], state[name]
        wide, by = old.double(), basis.to(old.device)
        if path in stream.norms:
            new = torch.full((basis.shape[1],), float(name.endswith("weight")))
        elif path in norm_of:
            norm = model.get_submodule(norm_of[path])
            moved = wide.movedim(axis, -1)
            new = (moved * norm.weight.double() @ by * scale).movedim(-1, axis)
            if (shift := getattr(norm, "bias", None)) is not None:
                due = moved @ shift.double()
                if f"{path}.bias" in state:
                    state[f"{path}.bias"] = (state[f"{path}.bias"].double() + due).to(old.dtype)
                else:
                    shifts.setdefault(norm_of[path], []).append((new.movedim(axis, -1), due))
        else:
            new = (wide.movedim(axis, -1) @ by).movedim(-1, axis)
        state[name] = new.to(old).contiguous()
    for owner, pairs in shifts.items():
        weights, due = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        if len(pairs) < [*norm_of.values()].count(owner):
            raise _refused(f"layers with and without a bias behind {owner!r}")
        state[f"{owner}.bias"] = torch.linalg.pinv(weights).matmul(due).to(state[f"{owner}.bias"])
    return state


def _refused(got: str) -> UnsupportedArchitectureError:
    return UnsupportedArchitectureError(
        f"Got {got}, and stream=; expected a model whose residual stream is read behind norms alone, such as ViT, "
        "GPT-2 or Llama (not BERT, whose stream passes through norms). Leave stream out."
    )
