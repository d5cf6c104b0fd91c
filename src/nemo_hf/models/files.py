"""Directories of parents and modules: written whole or not at all, and weights read by slice."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_hf.pruning.tensor_slices import TensorCut, cut_tensor

from .remote_files import PROCESSOR_FILES as PROCESSOR_FILES  # beside what writes them
from .remote_files import REPORT_NAME as REPORT_NAME
from .remote_files import find_file, read_json

WEIGHTS_NAME = "model.safetensors"
SHARD_NAME = re.compile(r"\w[\w.-]*\.safetensors")
STORED_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
STORED_DTYPES = {torch.uint8: "U8", torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL"}


@contextmanager
def replaced_directory(directory: str | Path, stale: Sequence[str] = ()) -> Iterator[Path]:
    """Lets files be written beside a directory and moves them in when all are there.

    Args:
        directory: The directory to write; files in it of other names stay.
        stale: Patterns of files that go if they were not written anew, such as shards of an older save.

    Yields:
        An empty directory on the same file system. If the block raises, it is removed and `directory`
        is untouched.

    Raises:
        NotADirectoryError: If `directory` is a file.
    """
    directory = Path(directory)
    if directory.is_file():
        raise NotADirectoryError(f"Got {str(directory)!r}, which is a file; expected a directory. Pass another path.")
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())  # mkdtemp's directories are private
        if not directory.exists():
            temporary.rename(directory)
            return
        # The configuration goes last: whoever sees the new one finds the new weights.
        written = sorted(temporary.iterdir(), key=lambda file: file.name == "config.json")
        for file in written:
            file.replace(directory / file.name)
        names = {file.name for file in written}
        for old in [old for pattern in stale for old in directory.glob(pattern)]:
            if old.name not in names:
                old.unlink()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: str | Path, data: Any) -> None:
    """Writes JSON to a temporary name and renames it."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Writes UTF-8 text to a temporary name and renames it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def processor_files(processor: Any) -> dict[str, bytes]:
    """Returns the files that a tokenizer, image processor or feature extractor saves, by name."""
    with tempfile.TemporaryDirectory() as directory:
        processor.save_pretrained(directory)
        return {file.name: file.read_bytes() for file in sorted(Path(directory).iterdir()) if file.is_file()}


class WeightFiles:
    """The tensors of a saved model, in one file or several, read by name and by slice.

    Args:
        source: Local directory or Hub repository id.
        hub_options: `revision`, `token`, `cache_dir`, ... of `from_pretrained`.

        variant: Variant of the weights, as in `from_pretrained`.

    Raises:
        OSError: If there are no safetensors weights, or a file is damaged.
    """

    def __init__(self, source: str | Path, hub_options: Mapping[str, Any], variant: str | None = None) -> None:
        self._source = source
        self._files: dict[str, Any] = {}
        self._stored_names: dict[str, str] = {}
        self.size = 0
        """Bytes of all files."""
        for path in _weight_paths(source, hub_options, f".{variant}" if variant else ""):
            opened = open_weights(path)
            repeated = sorted(set(opened.keys()) & set(self._files))
            if repeated:
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
        """Checks from the files' headers that integers are stored as such, and weights as floating-point numbers.

        Args:
            expected: Kind of each tensor by name; tensors that the files lack are passed over.

        Raises:
            ValueError: If a tensor is stored as another kind of numbers.
        """
        for name in expected.keys() & self._files.keys():
            dtype, got = expected[name], self._lazy(name).get_dtype()
            allowed = tuple(STORED_FLOATS) if dtype.is_floating_point else (STORED_DTYPES.get(dtype, got),)
            if got not in allowed:
                raise ValueError(
                    f"Got the tensor {name!r} stored as {got} in {str(self._source)!r}; expected "
                    f"{' or '.join(allowed)}. Save or download the model again."
                )

    def float_dtype(self, name: str) -> torch.dtype | None:
        """Precision of a tensor as it is stored; `None` for whole numbers."""
        return STORED_FLOATS.get(self._lazy(name).get_dtype())

    def _lazy(self, name: str) -> Any:
        return self._files[name].get_slice(self._stored_names.get(name, name))

    def find_tied(self, tied: Mapping[str, str]) -> None:
        """Lets tensors be read that the files hold under another name only, because a model shares them.

        Args:
            tied: Name of a tensor to the name of the one that it is the same as, as `all_tied_weights_keys`.
        """
        for pair in tied.items():
            for name, other in (pair, pair[::-1]):
                if name not in self._files and other in self._files:
                    self._files[name] = self._files[other]
                    self._stored_names[name] = other

    def check_shapes(self, expected: Mapping[str, Sequence[int]], others: str | None = None) -> None:
        """Checks from the files' headers that just these tensors are there with the right shapes.

        Args:
            expected: Shape by name of the tensor.
            others: Start of the names of tensors that may be there besides.

        Raises:
            ValueError: If a tensor is missing, unexpected or has another shape.
        """
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
        strange = sorted(n for n in set(self._files) - set(expected) if others is None or not n.startswith(others))
        if strange:
            raise ValueError(
                f"Got weights of {str(self._source)!r} with {len(strange)} unexpected tensors, such as {strange[0]!r}; "
                "expected exactly those of the configuration. Save or download the parent again."
            )

    def read(self, name: str, cut: TensorCut | None = None) -> Tensor:
        """Reads a tensor, or only the kept rows and columns of it.

        Args:
            name: Name of the tensor in the file.
            cut: What to keep; `None` keeps all.

        Returns:
            The tensor on the CPU.

        Raises:
            KeyError: If the files lack the tensor; `check_shapes` says so kindly.
        """
        if cut is not None and cut.constant is not None:
            return cut.constant.clone()
        if cut is None:
            tensor: Tensor = self._files[name].get_tensor(self._stored_names.get(name, name))
            return tensor
        lazy = self._lazy(name)
        return cut_tensor(lambda dim, index: _read_slice(lazy, dim, index), cut)


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


def open_weights(path: str | Path) -> Any:
    """Opens a safetensors file for reading; a damaged one is an `OSError` that says so."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise OSError(
            f"Got a damaged or truncated weight file {str(path)!r} ({error}); expected safetensors. "
            "Save or download it again."
        ) from error
