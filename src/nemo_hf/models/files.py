"""Writing of directories and files: whole, or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .remote_files import REPORT_NAME as REPORT_NAME  # for those who write it


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
