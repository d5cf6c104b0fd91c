"""The tensors of a saved model: checked from the headers of their files, and read by name and by slice."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_hf.pruning.layer_cuts import TensorCut, cut_tensor

from .remote_files import find_file, read_json

WEIGHTS_NAME = "model.safetensors"
SHARD_NAME = re.compile(r"\w[\w.-]*\.safetensors")
STORED_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
STORED_DTYPES = {torch.uint8: "U8", torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL"}


class WeightFiles:
    """The tensors of a saved model, in one file or several; `size` is that of all files in bytes."""

    def __init__(self, source: str | Path, hub_options: Mapping[str, Any], variant: str | None = None) -> None:
        self._source = source
        self._files: dict[str, Any] = {}
        self._stored_names: dict[str, str] = {}
        self.size = 0
        for path in _weight_paths(source, hub_options, f".{variant}" if variant else ""):
            opened = _open(path)
            if repeated := sorted(set(opened.keys()) & set(self._files)):
                raise OSError(
                    f"Got the tensor {repeated[0]!r} in several weight files of {str(source)!r}; expected each in one. "
                    "Save the model again."
                )
            self._files.update(dict.fromkeys(opened.keys(), opened))
            self.size += path.stat().st_size

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._files)

    def check_dtypes(self, expected: Mapping[str, torch.dtype]) -> None:
        """Checks that integers are stored as such, and weights as floating-point numbers."""
        for name in expected.keys() & self._files.keys():
            dtype, got = expected[name], self._lazy(name).get_dtype()
            allowed = tuple(STORED_FLOATS) if dtype.is_floating_point else (STORED_DTYPES.get(dtype, got),)
            if got not in allowed:
                raise ValueError(
                    f"Got the tensor {name!r} stored as {got} in {str(self._source)!r}; expected "
                    f"{' or '.join(allowed)}. Save or download the model again."
                )

    def check_shapes(self, expected: Mapping[str, Sequence[int]], others: tuple[str, ...] = ()) -> None:
        """Checks that these tensors are there with these shapes, and besides only names that start with `others`."""
        for name, shape in expected.items():
            if name not in self._files:
                raise ValueError(
                    f"Got weights of {str(self._source)!r} without the tensor {name!r}; expected all of the parent's. "
                    "Save or download the parent again."
                )
            got = tuple(self._lazy(name).get_shape())
            if got != tuple(shape):
                raise ValueError(
                    f"Got the tensor {name!r} of shape {got} in {str(self._source)!r}; expected {tuple(shape)}. "
                    "The weights and config.json are not of the same model: save or download them again."
                )
        unexpected = set(self._files) - set(expected)
        if strange := sorted(name for name in unexpected if not name.startswith(others)):
            raise ValueError(
                f"Got weights of {str(self._source)!r} with {len(strange)} unexpected tensors, such as {strange[0]!r}; "
                "expected exactly those of the configuration. Save or download the parent again."
            )

    def find_tied(self, tied: Mapping[str, str]) -> None:
        """Lets tensors be read that are stored under another name; `tied` is a model's `all_tied_weights_keys`."""
        for pair in tied.items():
            for name, other in (pair, pair[::-1]):
                if name not in self._files and other in self._files:
                    self._files[name] = self._files[other]
                    self._stored_names[name] = other

    def read(self, name: str, cut: TensorCut | None = None) -> Tensor:
        """Reads a tensor to the CPU, or only the rows and columns that `cut` keeps of it."""
        if cut is not None and cut.constant is not None:
            return cut.constant.clone()
        if cut is None:
            tensor: Tensor = self._files[name].get_tensor(self._stored_names.get(name, name))
            return tensor
        lazy = self._lazy(name)
        return cut_tensor(lambda dim, index: _read_slice(lazy, dim, index), cut)

    def float_dtype(self, name: str) -> torch.dtype | None:
        """Precision of a tensor as it is stored; `None` for whole numbers."""
        return STORED_FLOATS.get(self._lazy(name).get_dtype())

    def _lazy(self, name: str) -> Any:
        return self._files[name].get_slice(self._stored_names.get(name, name))


def _weight_paths(source: str | Path, hub_options: Mapping[str, Any], variant: str) -> list[Path]:
    """Paths of the files that hold a model's weights, found in the order in which `transformers` looks for them."""
    single = WEIGHTS_NAME.replace(".", f"{variant}.", 1) if variant else WEIGHTS_NAME
    if path := find_file(source, single, hub_options):
        return [path]
    index = find_file(source, f"{WEIGHTS_NAME}.index{variant}.json", hub_options)
    names: Any = [single]
    if index:
        weight_map = read_json(index).get("weight_map")
        names = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
        strange = [name for name in names if not isinstance(name, str) or not SHARD_NAME.fullmatch(name)]
        if strange or not names:
            raise OSError(
                f"Got {index.name!r} of {str(source)!r} with the weight file {strange[:1] or None!r}; expected names "
                "of *.safetensors files beside it. Save or download the model again."
            )
    paths = {name: find_file(source, name, hub_options) for name in sorted(set(names))}
    for name, path in paths.items():
        if path is None:
            raise OSError(
                f"Got {str(source)!r} without {name}; expected the weights of a nemo_hf parent. "
                "Save the parent again with save_pretrained."
            )
    return [path for path in paths.values() if path]


def _read_slice(lazy: Any, dim: int, index: Tensor) -> Tensor:
    if len(index) == 0:
        shape = list(lazy.get_shape())
        shape[dim] = 0
        sample: Tensor = lazy[tuple(slice(0, 1) for _ in shape)]
        return torch.empty(shape, dtype=sample.dtype)
    part: Tensor = lazy[(*(slice(None),) * dim, index.tolist())]
    return part


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise OSError(
            f"Got a damaged or truncated weight file {str(path)!r} ({error}); expected safetensors. "
            "Save or download it again."
        ) from error
