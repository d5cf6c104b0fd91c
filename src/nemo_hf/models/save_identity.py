"""One identity for all files of a save: written into each, and compared when they are loaded."""

import hashlib
import json
import logging
import struct
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from safetensors import SafetensorError

from .atomic_writes import locked
from .config_checks import damaged
from .files import REPORT_NAME, find_file

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
CONFIG_NAME = "config.json"
FIELD = "save_identity"  # of config.json: the `id`, and digests of weights and processor files by name
ID_KEY, DIGEST_KEY = "save_id", "digest"  # in metadata of weight files and of their index, and in a report
NO_ID = "0" * 64
LONGEST_HEADER = 100_000_000  # bytes, as in safetensors
BLOCK = 2**20
ATTEMPTS = 10  # to load a directory that is replaced again and again


def write_identity(
    directory: Path, companions: Mapping[str, bytes], report: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Writes a save's identity into the files that `transformers` wrote, and the report beside them.

    It is a digest of their content, so the same model saved again has the same files.
    """
    path = directory / CONFIG_NAME
    config = json.loads(path.read_bytes())
    config.pop(FIELD, None)
    weights = sorted(directory.glob("*.safetensors"))
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in companions.items()}
    placed = {file.name: _with_placeholder(file) for file in weights}
    digests |= {name: digest for name, (digest, _) in placed.items()}
    identity = _identity_of(config, digests)
    for file in weights:
        with file.open("r+b") as opened:
            opened.seek(placed[file.name][1])
            opened.write(identity.encode())
    for file in directory.glob("*.safetensors.index*.json"):
        index = json.loads(file.read_bytes())
        index["metadata"] = {**index.get("metadata", {}), ID_KEY: identity}
        file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    config[FIELD] = {"id": identity, "digests": digests}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if report is not None:
        write_report(directory, report, identity)
    return dict(config[FIELD])


def write_report(directory: Path, report: Mapping[str, Any], identity: str | None) -> None:
    """Writes a report with the identity of its save and a digest of its own, where nobody reads it as yet."""
    tied = {**report, ID_KEY: identity, DIGEST_KEY: _report_digest(report)}
    text = json.dumps(tied, indent=2, ensure_ascii=False) + "\n"
    (directory / REPORT_NAME).write_text(text, encoding="utf-8")


def bare_report(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report without what ties it to its save."""
    return {name: value for name, value in report.items() if name not in (ID_KEY, DIGEST_KEY)}


def _report_digest(report: Mapping[str, Any]) -> str:
    as_read = json.loads(json.dumps(report))  # keys are texts then
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def _identity_of(config: Mapping[str, Any], digests: Mapping[str, str]) -> str:
    content = [{name: value for name, value in config.items() if name != FIELD}, digests]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _with_placeholder(path: Path) -> tuple[str, int]:
    """Writes a weight file anew with a placeholder for the identity; returns the tensors' digest and its offset."""
    rewritten = path.with_suffix(".new")
    with path.open("rb") as before, rewritten.open("wb") as after:
        header = _read_header(before)
        digest = _digest_of(header)
        header["__metadata__"] = {**header.get("__metadata__", {}), ID_KEY: NO_ID}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors start at multiples of 8
        after.write(struct.pack("<Q", len(text)) + text)
        while block := before.read(BLOCK):
            digest.update(block)
            after.write(block)
    rewritten.replace(path)
    return digest.hexdigest(), 8 + text.index(f'"{ID_KEY}":"{NO_ID}"'.encode()) + len(ID_KEY) + 4


def _read_header(file: BinaryIO) -> dict[str, Any]:
    (length,) = struct.unpack("<Q", file.read(8))
    header = json.loads(file.read(min(length, LONGEST_HEADER)))
    return dict(header)


def _digest_of(header: Mapping[str, Any]) -> Any:
    """Begins the digest of a weight file with names, types, shapes and places of its tensors."""
    tensors = {name: about for name, about in header.items() if name != "__metadata__"}
    return hashlib.sha256(json.dumps(tensors, sort_keys=True).encode())


def check_identity(source: str, config: Mapping[str, Any], given: Any, found: Mapping[Path, str | None]) -> None:
    """Checks that a config.json, weight files with their index, and the configuration that a caller gives are one save.

    `found` holds the identities of the weight files and the index by path.
    """
    own = identity_of(config)
    for path, identity in found.items():
        if identity != own:
            raise OSError(
                f"Got {CONFIG_NAME!r} and {path.name!r} of different saves in {source!r}; expected files of one save. "
                "Save or download the model again."
            )
    if identity_of(given) not in (None, own):
        raise OSError(
            f"Got a configuration of another save than the files in {source!r}; expected theirs, which may have been "
            f"replaced a moment ago. Load again, or set config.{FIELD} = None if it fits them all the same."
        )


def identity_of(config: Any) -> str | None:
    """The identity in a configuration or in the content of a config.json; `None` if it has none."""
    return _recorded(config).get("id")


def _recorded(config: Any) -> dict[str, Any]:
    recorded = config.get(FIELD) if isinstance(config, Mapping) else getattr(config, FIELD, None)
    return recorded if isinstance(recorded, dict) else {}


def check_digests(config: Mapping[str, Any], weights: Iterable[Path], companions: Mapping[str, bytes]) -> None:
    """Recomputes the digests of files that were saved, and compares them with those that config.json records."""
    recorded = _recorded(config)
    digests: dict[str, Any] = recorded["digests"] if isinstance(recorded.get("digests"), dict) else {}
    found: dict[str, str] = {name: hashlib.sha256(content).hexdigest() for name, content in companions.items()}
    for path in weights:
        with path.open("rb") as file:
            digest = _digest_of(_read_header(file))
            while block := file.read(BLOCK):
                digest.update(block)
        found[path.name] = digest.hexdigest()
    found[CONFIG_NAME] = _identity_of(config, digests)
    expected = {**digests, CONFIG_NAME: recorded.get("id")}
    for name in sorted(expected.keys() | found.keys()):
        if (digest := found.get(name)) != expected.get(name):
            got = f"{name[:100]!r} with the digest {digest[:12]}..." if digest else f"no file {name[:100]!r}"
            raise damaged(got, f"the digest {str(expected.get(name))[:12]}... that was saved", OSError)


def own_report(
    source: str | Path, hub_options: Mapping[str, Any], config: Any, report: Mapping[str, Any] | None, verify: bool
) -> dict[str, Any] | None:
    """Returns a report without its identity; that of another save is left out with a warning, or refused."""
    own = identity_of(config)
    if report is not None and report.get(ID_KEY) == own:
        if not verify or report.get(DIGEST_KEY) == (_report_digest(bare_report(report)) if own else None):
            return bare_report(report)
    elif report is not None and not verify:
        message = "Left out %s of %r, which is of another save than %s. Evaluate the model again."
        logger.warning(message, REPORT_NAME, str(source), CONFIG_NAME)
    if verify and find_file(source, REPORT_NAME, hub_options):
        raise damaged(f"{REPORT_NAME!r} in {str(source)!r} that was changed", "that of the save", OSError)
    return None


def load_whole(source: str | Path | None, hub_options: Mapping[str, Any], load: Callable[[], Result]) -> Result:
    """Calls `load`, and calls it again if the local directory that it reads was replaced meanwhile."""
    path = Path(source or "", hub_options.get("subfolder") or "", CONFIG_NAME)
    failure: Exception | None = None
    for attempt in range(ATTEMPTS):
        # A writer that is faster than this reader has to wait for it.
        with locked(path.parent, is_shared=True) if attempt > 1 and path.parent.is_dir() else nullcontext():
            before = _stamp(path)
            try:
                result = load()
            except (OSError, SafetensorError, ValueError) as error:  # as files of two saves cause them
                if _stamp(path) == before:
                    raise
                failure = error
            else:
                if _stamp(path) == before:
                    return result
    raise OSError(
        f"Got {str(source)!r}, which was replaced while it was loaded, {ATTEMPTS} times; expected one save for as long "
        "as loading takes. Load again when it is not written."
    ) from failure


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        about = path.stat()
    except OSError:
        return None
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns
