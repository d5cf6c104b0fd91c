"""The tensors of a saved model: checked from the headers of their files, and read by name and by slice."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_hf.pruning.layer_cuts import TensorCut, cut_tensor

from .config_checks import damaged
from .files import find_file, read_json
from .save_identity import ID_KEY

WEIGHTS_NAME = "model.safetensors"
MOST_TENSORS, MOST_SHARDS = 20_000, 10_000
LARGEST_HEADER = 16 * 2**20  # bytes
SHARD_NAME = re.compile(r"\w[\w.-]*\.safetensors")
STORED_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
STORED_DTYPES = {torch.uint8: "U8", torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL"}


def size_in_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, of which one that comes repeatedly, as tied parameters do, counts once."""
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


class WeightFiles:
    """The tensors of a saved model, in one file or several; `size` is that of all files in bytes."""

    def __init__(self, source: str | Path, hub_options: Mapping[str, Any], variant: str | None = None) -> None:
        self._source = source
        self._files: dict[str, Any] = {}
        self._stored_names: dict[str, str] = {}
        self.size = 0
        self.paths: list[Path] = []
        self.identities: dict[Path, str | None] = {}  # of each file and of the index: which save it is of
        for path in _weight_paths(source, hub_options, f".{variant}" if variant else "", self.identities):
            _check_header(path)
            try:
                opened = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise damaged(f"{str(path)!r}, which does not open ({error})", "safetensors", OSError) from error
            if repeated := sorted(set(opened.keys()) & set(self._files)):
                got = f"the tensor {repeated[0]!r} in several weight files of {str(source)!r}"
                raise damaged(got, "each in one", OSError)
            self._files.update(dict.fromkeys(opened.keys(), opened))
            self.size += path.stat().st_size
            self.paths.append(path)
            self.identities[path] = (opened.metadata() or {}).get(ID_KEY)
            if len(self._files) > MOST_TENSORS:
                raise damaged(f"weights in {str(source)!r} of over {MOST_TENSORS} tensors", "fewer", OSError)

    def __len__(self) -> int:
        return len(self._files)

    def check_dtypes(self, expected: Mapping[str, torch.dtype]) -> None:
        """Checks that integers are stored as such, and weights as floating-point numbers."""
        for name in expected.keys() & self._files.keys():
            dtype, got = expected[name], self._lazy(name).get_dtype()
            allowed = tuple(STORED_FLOATS) if dtype.is_floating_point else (STORED_DTYPES.get(dtype, got),)
            if got not in allowed:
                problem = f"the tensor {name!r} stored as {got} in {str(self._source)!r}"
                raise damaged(problem, " or ".join(allowed))

    def check_shapes(self, expected: Mapping[str, Sequence[int]], others: tuple[str, ...] = ()) -> None:
        """Checks that these tensors are there with these shapes; other names must start with one of `others`."""
        if missing := expected.keys() - self._files.keys():
            raise other_tensors(self._source, "missing", missing)
        for name, shape in expected.items():
            got = self._lazy(name).get_shape()
            if tuple(got) != tuple(shape):
                raise other_shape(self._source, name, got, shape)
        if strange := {name for name in self._files.keys() - expected.keys() if not name.startswith(others)}:
            raise other_tensors(self._source, "unexpected", strange)

    def find_tied(self, tied: Mapping[str, str]) -> None:
        """Lets tensors be read that are stored under another name; `tied` is a model's `all_tied_weights_keys`."""
        for pair in tied.items():
            for name, other in (pair, pair[::-1]):
                if name not in self._files and other in self._files:
                    self._files[name] = self._files[other]
                    self._stored_names[name] = other

    def read(self, name: str, cut: TensorCut | None = None) -> Tensor:
        """Reads a tensor to the CPU, or only the rows and columns that `cut` keeps of it."""
        if cut is None:
            tensor: Tensor = self._files[name].get_tensor(self._stored_names.get(name, name))
            return tensor
        if cut.constant is not None:
            return cut.constant.clone()
        lazy = self._lazy(name)
        return cut_tensor(lambda dim, index: _read_slice(lazy, dim, index), cut)

    def float_dtype(self, name: str) -> torch.dtype | None:
        """Precision of a tensor as it is stored; `None` for whole numbers."""
        return STORED_FLOATS.get(self._lazy(name).get_dtype())

    def _lazy(self, name: str) -> Any:
        return self._files[name].get_slice(self._stored_names.get(name, name))


def other_shape(source: str | Path, name: str, got: Sequence[int], expected: Sequence[int]) -> Exception:
    """Makes the error of a tensor that has another shape than the configuration says."""
    return damaged(f"the tensor {name!r} of shape {tuple(got)} in {str(source)!r}", str(tuple(expected)))


def other_tensors(source: str | Path, kind: str, names: Collection[str]) -> Exception:
    """Makes the error of tensors that are missing or unexpected."""
    got = f"weights in {str(source)!r} with {len(names)} {kind} tensors, such as {min(names)!r}"
    return damaged(got, "exactly those of the configuration")


def _check_header(path: Path) -> None:
    """Checks how long the header of a safetensors file says that it is, before it is read."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > LARGEST_HEADER:
        raise damaged(
            f"a header of {length} bytes in {str(path)!r}", f"safetensors with at most {LARGEST_HEADER}", OSError
        )


def _weight_paths(
    source: str | Path, hub_options: Mapping[str, Any], variant: str, identities: dict[Path, str | None]
) -> list[Path]:
    """Paths of the files that hold a model's weights, found in the order in which `transformers` looks for them."""
    single = WEIGHTS_NAME.replace(".", f"{variant}.", 1) if variant else WEIGHTS_NAME
    if path := find_file(source, single, hub_options):
        return [path]
    index = find_file(source, f"{WEIGHTS_NAME}.index{variant}.json", hub_options)
    names: Any = [single]
    if index:
        content = read_json(index)
        weight_map, about = content.get("weight_map"), content.get("metadata")
        identities[index] = about.get(ID_KEY) if isinstance(about, dict) else None
        names = list(weight_map.values()) if isinstance(weight_map, dict) else []
        strange = [name for name in names if not isinstance(name, str) or not SHARD_NAME.fullmatch(name)]
        if len(set(map(str, names))) > MOST_SHARDS:
            raise damaged(f"{index.name!r} of {str(source)!r} with over {MOST_SHARDS} files", "fewer", OSError)
        if strange or not names or not isinstance(about, dict):
            what = f"metadata={about!r}" if names and not strange else f"the weight file {strange[:1] or None!r}"
            got = f"{index.name!r} of {str(source)!r} with {what}"
            raise damaged(got, "names of *.safetensors files beside it", OSError)
    paths = []
    for name in sorted(set(names)):
        if (path := find_file(source, name, hub_options)) is None:
            raise damaged(f"{str(source)!r} without {name}", "all files that save_pretrained wrote", OSError)
        paths.append(path)
    return paths


def _read_slice(lazy: Any, dim: int, index: Tensor) -> Tensor:
    if len(index) == 0:
        shape = list(lazy.get_shape())
        shape[dim] = 0
        sample: Tensor = lazy[tuple(slice(0, 1) for _ in shape)]
        return torch.empty(shape, dtype=sample.dtype)
    part: Tensor = lazy[(*(slice(None),) * dim, index.tolist())]
    return part
