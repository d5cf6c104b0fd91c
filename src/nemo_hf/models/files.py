"""Reads files that may come from a stranger: bounded, checked, never run."""

import hashlib
import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError
from transformers.utils.hub import cached_file

from .config_checks import check_companion_files, check_report, damaged, is_companion, leaves
from .privacy import LOADERS, clean

logger = logging.getLogger(__name__)

REPORT_NAME = "report.json"
EXPORTED_FILES = {"onnx": "model.onnx", "openvino": "openvino_model.xml"}  # by format
# Usual files of tokenizers, image processors and feature extractors, where a configuration names none.
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json",
                   "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt",
                   "spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "chat_template.jinja")  # fmt: skip
VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json")  # of which transformers reads no options
LARGEST_JSON = 16 * 2**20
ALWAYS_CHECKED = 2**20  # bytes up to which a file is compared with its checksum at every load, not only on arrival
CLOCK_TOLERANCE = 2.0  # seconds by which the clocks of a file system and of this machine may differ


def check_no_exports(directory: str | Path) -> None:
    """Refuses a directory with exported files, which need the config.json beside them, with a `ValueError`."""
    there = [name for name in EXPORTED_FILES.values() if Path(directory, name).is_file()]
    if there and Path(directory, "config.json").is_file():
        raise ValueError(
            f"Got {str(directory)!r}, where {' and '.join(there)} need the config.json that would be replaced; "
            "expected a directory without exported files. Save to a directory of its own, or move these away."
        )


def find_file(source: str | Path, name: str, hub_options: Mapping[str, Any]) -> Path | None:
    """Finds a file of a local directory or a Hub repository (through the ordinary cache); `None` if it has none."""
    inner = Path(hub_options.get("subfolder") or "", name)
    if inner.is_absolute() or ".." in inner.parts:
        raise ValueError(f"Got the path {str(inner)!r}; expected one inside {str(source)!r}. Name a folder there.")
    if Path(source).is_dir():
        path = Path(source, inner)
        if not path.is_file():
            return None
        check_link(path, Path(source))
        return path
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


def check_link(path: Path, directory: Path) -> None:
    """Refuses a link out of a directory: a stranger's could lead to any file of this machine.

    The Hub's cache has links from `snapshots` to `blobs` of the same repository.
    """
    root = directory.resolve()
    caches = [folder.parent / "blobs" for folder in root.parents if folder.name == "snapshots"]
    target = path.resolve()
    if not any(target.is_relative_to(allowed) for allowed in (root, *caches)):
        raise OSError(
            f"Got {path.name!r} in {str(directory)!r}, a link to a file outside; expected the file itself. If you "
            "trust the link, replace it by a copy of the file."
        )


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
    found = {name: path for name, path in paths.items() if path}
    check_companion_files({name: path.stat().st_size for name, path in found.items()}, repr(str(source)))
    path = find_file(source, REPORT_NAME, hub_options)
    report = read_json(path) if path else None
    try:
        if report is not None:
            check_report(report)
    except (TypeError, ValueError) as error:
        message = "Left out %s of %r, which is not the report of a parent or module (%s). Evaluate the model again."
        logger.warning(message, REPORT_NAME, str(source), str(error)[:500])
        report = None
    return {name: clean_companion(name, path.read_bytes()) for name, path in found.items()}, report


def clean_companion(name: str, content: bytes) -> bytes:
    """Leaves out of a processor's file what runs code, loads from elsewhere or is of the machine that wrote it.

    Vocabularies, whose keys are any words, have numbers in place of such entries and come back as they are.
    """
    is_options = name.endswith("config.json")
    if not name.endswith(".json") or name in VOCABULARIES or (len(content) > LARGEST_JSON and not is_options):
        return content
    if len(content) > LARGEST_JSON:
        raise damaged(f"{name!r} of {len(content)} bytes", f"at most {LARGEST_JSON}", OSError)
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):  # no JSON for transformers either
        return content
    named = [(path[-1], value) for path, value in leaves(data) if path]
    code = {key for key, value in named if key in LOADERS and not isinstance(value, (int, float))}
    if not isinstance(data, dict) or not (is_options or code):
        return content
    # A path that is named here is one of the machine that wrote it: transformers looks in the directory.
    kept = {key: value for key, value in data.items() if not (key.endswith("_file") and isinstance(value, str))}
    cleaned = clean(kept, is_config=True)
    if code:
        logger.warning(
            "Left %s out of %s, by which transformers would run code or load from elsewhere. Load that processor from "
            "its own repository if you trust it.", sorted(code), name,
        )  # fmt: skip
    return content if cleaned == data else (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()
