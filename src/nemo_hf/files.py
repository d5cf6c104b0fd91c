"""Directories of parents and modules: written whole or not at all, and read with clear errors."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils.hub import cached_file

from .weights import TensorCut, cut_tensor

REPORT_NAME = "report.json"
CODE_NAME = "modeling_nemo_module.py"
WEIGHTS_NAME = "model.safetensors"
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "chat_template.jinja",
)
"""Files that `save_pretrained` of tokenizers, image processors and feature extractors writes."""


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
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def processor_files(processor: Any) -> dict[str, bytes]:
    """Returns the files that a tokenizer, image processor or feature extractor saves, by name."""
    with tempfile.TemporaryDirectory() as directory:
        processor.save_pretrained(directory)
        return {file.name: file.read_bytes() for file in sorted(Path(directory).iterdir()) if file.is_file()}


def find_file(source: str | Path, name: str, hub_options: Mapping[str, Any]) -> Path | None:
    """Finds a file of a local directory or a Hub repository (through the ordinary cache).

    Args:
        source: The directory or repository id.
        name: File name.
        hub_options: `revision`, `token`, `cache_dir`, ... of `from_pretrained`.

    Returns:
        Its local path, or `None` if there is no such file.
    """
    if Path(source).is_dir():
        path = Path(source, hub_options.get("subfolder") or "", name)
        return path if path.is_file() else None
    try:
        found = cached_file(str(source), name, _raise_exceptions_for_missing_entries=False, **hub_options)
    except HfHubHTTPError as error:
        raise OSError(f"Could not fetch {name!r} of {str(source)!r}: {error}. Try again.") from error
    return Path(found) if found else None


def read_companions(
    source: str | Path, hub_options: Mapping[str, Any]
) -> tuple[dict[str, bytes], dict[str, Any] | None]:
    """Reads the processor's files and the report that lie beside a model's weights."""
    paths = {name: find_file(source, name, hub_options) for name in PROCESSOR_FILES}
    files = {name: path.read_bytes() for name, path in paths.items() if path}
    report = find_file(source, REPORT_NAME, hub_options)
    return files, json.loads(report.read_text(encoding="utf-8")) if report else None


class WeightFiles:
    """The tensors of a saved model, in one file or several, read by name and by slice.

    Args:
        source: Local directory or Hub repository id.
        hub_options: `revision`, `token`, `cache_dir`, ... of `from_pretrained`.

    Raises:
        OSError: If there are no safetensors weights, or a file is damaged.
    """

    def __init__(self, source: str | Path, hub_options: Mapping[str, Any]) -> None:
        self._source = source
        index = find_file(source, f"{WEIGHTS_NAME}.index.json", hub_options)
        if index:
            weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
        else:
            names = [WEIGHTS_NAME]
        self._files: dict[str, Any] = {}
        self._stored_names: dict[str, str] = {}
        for name in names:
            path = find_file(source, name, hub_options)
            if path is None:
                raise OSError(
                    f"Got {str(source)!r} without {name}; expected the weights of a nemo_hf parent. "
                    "Save the parent again with save_pretrained."
                )
            opened = open_weights(path)
            self._files.update(dict.fromkeys(opened.keys(), opened))

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

    def check_shapes(self, expected: Mapping[str, Sequence[int]]) -> None:
        """Checks from the files' headers that just these tensors are there with the right shapes.

        Args:
            expected: Shape by name of the tensor.

        Raises:
            ValueError: If a tensor is missing, unexpected or has another shape.
        """
        for name, shape in expected.items():
            if name not in self._files:
                raise ValueError(
                    f"Got weights of {str(self._source)!r} without the tensor {name!r}; expected all of the parent's. "
                    "Save or download the parent again."
                )
            got = tuple(self._files[name].get_slice(self._stored_names.get(name, name)).get_shape())
            if got != tuple(shape):
                raise ValueError(
                    f"Got the tensor {name!r} of shape {got} in {str(self._source)!r}; expected {tuple(shape)}. "
                    "The weights and config.json are not of the same model: save or download them again."
                )
        strange = sorted(set(self._files) - set(expected))
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
        file, name = self._files[name], self._stored_names.get(name, name)
        if cut is None:
            tensor: Tensor = file.get_tensor(name)
            return tensor
        lazy = file.get_slice(name)
        return cut_tensor(lambda dim, index: _read_slice(lazy, dim, index), cut)


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
