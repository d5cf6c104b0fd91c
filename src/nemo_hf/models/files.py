"""Reads files that may come from a stranger (bounded, checked, never run); writes directories whole or not at all."""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils._validators import validate_repo_id
from safetensors import SafetensorError
from transformers.utils.hub import cached_file

from .config_checks import check_report, damaged, is_companion, leaves

logger = logging.getLogger(__name__)

REPORT_NAME = "report.json"
# Usual files of tokenizers, image processors and feature extractors, where a configuration names none.
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json",
                   "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt",
                   "spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "chat_template.jinja")  # fmt: skip
LARGEST_JSON = 16 * 2**20
LARGEST_COMPANION = 512 * 2**20  # bytes of a tokenizer or image processor's file
ALWAYS_CHECKED = 2**20  # bytes up to which a file is compared with its checksum at every load, not only on arrival
CLOCK_TOLERANCE = 2.0  # seconds by which the clocks of a file system and of this machine may differ


def find_file(source: str | Path, name: str, hub_options: Mapping[str, Any]) -> Path | None:
    """Finds a file of a local directory or a Hub repository (through the ordinary cache); `None` if it has none."""
    inner = Path(hub_options.get("subfolder") or "", name)
    if inner.is_absolute() or ".." in inner.parts:
        raise ValueError(f"Got the path {str(inner)!r}; expected one inside {str(source)!r}. Name a folder there.")
    if Path(source).is_dir():
        path = Path(source, inner)
        return path if path.is_file() else None
    started = time.time()
    try:
        found = cached_file(str(source), name, _raise_exceptions_for_missing_entries=False, **hub_options)
    except Exception as error:  # of the HTTP library, if a connection breaks
        if isinstance(error, (OSError, ValueError)) and not isinstance(error, HfHubHTTPError):
            raise
        raise OSError(f"Could not fetch {name!r} of {str(source)!r}: {error!r}. Try again.") from error
    if not found:
        return None
    check_content(Path(found), started - CLOCK_TOLERANCE)
    return Path(found)


def check_content(path: Path, since: float) -> None:
    """Compares a file of the Hub's cache with its checksum, which is its name there.

    Files that are older than `since` (seconds since the epoch) count as checked, unless they are small.
    """
    blob = path.resolve()
    known, about = blob.name, blob.stat()
    if blob.parent.name != "blobs" or (about.st_mtime < since and about.st_size > ALWAYS_CHECKED):
        return
    if re.fullmatch("[0-9a-f]{64}", known):
        hashes = [hashlib.sha256()]
    elif re.fullmatch("[0-9a-f]{40}", known):  # of git, which hashes a heading first, or of a mirror
        heading = b"blob %d\0" % about.st_size
        hashes = [hashlib.sha1(start, usedforsecurity=False) for start in (heading, b"")]
    else:
        return
    with blob.open("rb") as file:
        while part := file.read(2**20):
            for each in hashes:
                each.update(part)
    if known not in [each.hexdigest() for each in hashes]:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise OSError(
            f"Got {path.name!r} from the Hub whose content doesn't have the checksum {known}; expected an undamaged "
            "download. It was removed from the cache: load again."
        )


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file; one that is too large, not a mapping or nested too deep is an `OSError`."""
    try:
        if (size := path.stat().st_size) > LARGEST_JSON:
            raise ValueError(f"{size} bytes")
        data = json.loads(path.read_bytes())
        for _ in leaves(data):  # nested too deep
            pass
        if not isinstance(data, dict):
            raise ValueError(f"a {type(data).__name__}")
    except (ValueError, RecursionError) as error:
        expected = f"a JSON mapping of at most {LARGEST_JSON} bytes"
        problem = str(error).removeprefix("Got ").partition(";")[0]
        raise damaged(f"{str(path)!r} with {problem}", expected, OSError) from error
    return data


def recorded_names(files: Mapping[str, Any]) -> list[str] | None:
    """Names of a processor's files that a configuration records, and loading reads; `None` if there are no files."""
    return sorted(filter(is_companion, files)) if files else None


def read_companions(
    source: str | Path, hub_options: Mapping[str, Any], names: Sequence[str] | None = None
) -> tuple[dict[str, bytes], dict[str, Any] | None]:
    """Reads the processor's files (those of these names that are there; `None`: the usual ones) and the report, if any.

    A report with wrong entries is left out with a warning, since the model runs without it.
    """
    names = PROCESSOR_FILES if names is None else names
    paths = {name: find_file(source, name, hub_options) for name in names}
    for name, path in paths.items():
        if path and path.stat().st_size > LARGEST_COMPANION:
            size = path.stat().st_size
            raise OSError(
                f"Got {name!r} of {size} bytes in {str(source)!r}; expected at most {LARGEST_COMPANION}. Save the "
                "processor again."
            )
    path = find_file(source, REPORT_NAME, hub_options)
    report = read_json(path) if path else None
    try:
        if report is not None:
            check_report(report)
    except (TypeError, ValueError) as error:
        message = "Left out %s of %r, which is not the report of a parent or module (%s). Evaluate the model again."
        logger.warning(message, REPORT_NAME, str(source), str(error)[:500])
        report = None
    return {name: found.read_bytes() for name, found in paths.items() if found}, report


def hub_name(source: str | None) -> str | None:
    """Returns the name of a Hub repository as it is, and `None` for anything that may be a local path."""
    if not source or Path(source).exists():
        return None
    try:
        validate_repo_id(source)
    except HFValidationError:
        return None
    return source


@contextmanager
def replaced_directory(directory: str | Path, stale: Sequence[str] = ()) -> Iterator[Path]:
    """Yields an empty directory, whose files are moved to `directory` when the block ends without an error.

    Files there of other names stay, except those that match a pattern in `stale`, such as shards of an older save.
    """
    directory = Path(directory)
    if directory.is_file():
        raise NotADirectoryError(f"Got {str(directory)!r}, which is a file; expected a directory. Pass another path.")
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        with clear_write_errors(directory):
            yield temporary
        os.umask(mask := os.umask(0))
        temporary.chmod(0o777 & ~mask)  # mkdtemp's directories are private
        if not directory.exists():
            temporary.rename(directory)
            return
        # The configuration goes last: whoever sees the new one finds the new weights.
        written = sorted(temporary.iterdir(), key=lambda file: file.name == "config.json")
        for file in written:
            file.replace(directory / file.name)
        old = {path for pattern in stale for path in directory.glob(pattern)}
        for path in old - {directory / file.name for file in written}:
            path.unlink()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def clear_write_errors(directory: Path) -> Iterator[None]:
    """Turns what safetensors raises when a disk is full into an error that says so."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(
            f"Could not write {str(directory)!r} ({error}). What was there is unchanged: free some space, or choose "
            "another place, and save again."
        ) from error


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
