"""Writes directories and files so that a killed process leaves the old or the new, whole."""

import ctypes
import errno
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from shutil import ignore_patterns
from typing import Any

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows, where an open file can't be removed
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

HIDDEN = ".nemo_hf-"  # how the names of hidden directories begin
LOCK_NAME = "nemo_hf.lock"
KEY_NAMES = ("README.md", "model.onnx", "config.json")  # without which a reader refuses the other files
STALE_WEIGHTS = (
    "model.safetensors",
    "model.*.safetensors",
    "model*-?????-of-?????.safetensors",
    "model.safetensors.index*.json",
)
MOST_LINKS = 10_000  # other files of a directory that are taken over into the new one
CANT_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV, errno.EPERM, errno.EACCES,
                 errno.EBUSY, errno.EMLINK, errno.E2BIG}  # fmt: skip


@contextmanager
def replaced_directory(directory: str | Path, stale: Sequence[str] = ()) -> Iterator[Path]:
    """Yields an empty directory that takes the place of `directory` at once when the block ends without an error.

    Other files and folders of the old directory are taken over, except files that match a pattern in `stale`, such as
    shards of an older save. Where the system can't exchange two directories (Windows, network file systems, a mount
    point) or this process works inside, files are moved one by one: those that a reader starts with (`KEY_NAMES`) are
    removed first and written last, so that a killed process leaves a directory that is old, new or refused.
    """
    target = Path(os.path.realpath(directory))
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"Got {str(directory)!r}, which is a file; expected a directory. Pass another path.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _hidden_directory(target) as place:
        new = place / "files"
        new.mkdir()
        try:
            yield new
        except SafetensorError as error:
            raise OSError(
                f"Could not write {str(directory)!r} ({error}). What was there is unchanged: free some space, or "
                "choose another place, and save again."
            ) from error
        for path in (*new.rglob("*"), new):
            _sync(path)
        if not target.exists():
            try:
                new.rename(target)
            except OSError:
                if not target.exists():  # otherwise somebody else made it meanwhile
                    raise
        if new.exists():
            with locked(target):
                _replace(place, target, stale)
        _sync(target.parent)


@contextmanager
def replaced_file(path: str | Path) -> Iterator[Path]:
    """Yields a new path, whose file takes the place of `path` when the block ends without an error.

    A link at `path` is replaced, not followed: it may lead a stranger's text into a file of the user.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _hidden_directory(path) as place:
        yield place / path.name
        _sync(place / path.name)
        (place / path.name).replace(path)
        _sync(path.parent)


def write_json(path: str | Path, data: Any) -> None:
    """Writes JSON whole or not at all."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Writes UTF-8 text whole or not at all."""
    with replaced_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def linked_copy(directory: Path, beside: Path, ignored: Sequence[str] = ()) -> Iterator[Path]:
    """Yields a hidden copy of a directory as it is now, for a slow reader; names that match `ignored` are left out."""
    with _hidden_directory(beside) as place:
        copied = place / "files"
        try:
            link: Any = partial(os.link, follow_symlinks=False)
            shutil.copytree(directory, copied, symlinks=True, ignore=ignore_patterns(*ignored), copy_function=link)
        except (OSError, NotImplementedError):  # no links on this file system
            shutil.rmtree(copied, ignore_errors=True)
            shutil.copytree(directory, copied, symlinks=True, ignore=ignore_patterns(*ignored))
        yield copied


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """Yields an empty temporary directory; if this process is killed, a later one of the same user removes it."""
    name = f"nemo_hf-{getattr(os, 'getuid', int)()}"
    with _hidden_directory(Path(tempfile.gettempdir(), name)) as place:
        (place / "files").mkdir()
        yield place / "files"


@contextmanager
def _hidden_directory(target: Path) -> Iterator[Path]:
    """A hidden directory on the target's file system, locked while it is used; removes those of killed processes."""
    parent = target.parent
    if target.is_dir() and (target.stat().st_dev != parent.stat().st_dev or not os.access(parent, os.W_OK)):
        parent = target
    prefix = f"{HIDDEN}{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:8]}-"
    _remove_abandoned(parent, prefix, target, with_old_files=False)
    lock = None
    while lock is None:  # until it is locked before another process took it for an abandoned one
        place = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        lock = _lock_file(place, os.O_CREAT)
    try:
        yield place
        _remove_abandoned(parent, prefix, target, with_old_files=True)
    finally:
        if not _holds_old_files(place, _record(lock)):
            shutil.rmtree(place, ignore_errors=True)
        os.close(lock)


def _lock_file(place: Path, flags: int = 0) -> int | None:
    """Opens and locks the lock file of a hidden directory; `None` if it is not there or locked by another process."""
    try:
        lock = os.open(place / LOCK_NAME, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | flags, 0o600)
    except OSError as error:
        if flags and not isinstance(error, FileNotFoundError):
            raise
        return None
    is_ours = fcntl is None
    with suppress(OSError):
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_ours = os.path.samestat(os.fstat(lock), (place / LOCK_NAME).stat())
            except OSError as error:
                # On a file system without locks a hidden directory can be made, but is never taken for abandoned.
                is_ours = bool(flags) and error.errno not in (errno.EWOULDBLOCK, errno.ENOENT)
    if not is_ours:
        os.close(lock)
        return None
    return lock


def _remove_abandoned(parent: Path, prefix: str, target: Path, with_old_files: bool) -> None:
    """Removes hidden directories of killed processes; what only a replaced directory holds goes to the new one before.

    Old files that were moved there one by one may be the only whole ones, until a save here has ended.
    """
    for place in parent.glob(f"{prefix}????????"):
        with suppress(OSError):
            if hasattr(os, "getuid") and place.lstat().st_uid != os.getuid():
                continue
            place.rmdir()  # killed before it had a lock file
        if (place / "old").exists() and not with_old_files:
            continue
        if (lock := _lock_file(place)) is None:
            continue
        with suppress(OSError):
            record = _record(lock)
            if fcntl is None:
                os.close(lock)
                (place / LOCK_NAME).unlink()  # an error, if another process has it open
            if record.get("inode") == _inode(place / "files") and target.is_dir():
                _empty(place / "files", target, record)
            shutil.rmtree(place)
        with suppress(OSError):
            os.close(lock)


def _record(lock: int) -> dict[str, Any]:
    """What a lock file says of the directory that is replaced: its `inode`, `names` that go, and `linked` inodes."""
    try:
        record = json.loads(os.pread(lock, 2**24, 0))
    except (AttributeError, OSError, ValueError, RecursionError):  # empty as yet
        return {}
    return record if isinstance(record, dict) else {}


def _inode(path: Path) -> int:
    return path.stat().st_ino if path.exists() else -1


def _holds_old_files(place: Path, record: dict[str, Any]) -> bool:
    """Whether an error left files of the old directory in a hidden one, which the next save here takes care of."""
    return record.get("inode") == _inode(place / "files") or (place / "old").exists()


@contextmanager
def locked(directory: Path, is_shared: bool = False) -> Iterator[None]:
    """Lets one process or thread at a time replace a directory, where it can be locked; shared: lets none do so."""
    while fcntl is not None:
        opened = os.open(directory, os.O_RDONLY)
        try:
            with suppress(OSError):
                fcntl.flock(opened, fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(opened), directory.stat()):  # otherwise it was replaced meanwhile
                yield
                return
        finally:
            os.close(opened)
    yield


def _replace(place: Path, target: Path, stale: Sequence[str]) -> None:
    """Puts the files of a hidden directory in place of those of a directory."""
    new = place / "files"
    written = {path.name for path in new.iterdir()}
    there = {entry.name: entry.is_dir(follow_symlinks=False) for entry in list(os.scandir(target))}
    if folders := sorted(name for name in written if there.get(name) and not (new / name).is_dir()):
        raise IsADirectoryError(f"Got the folder {str(target / folders[0])!r}; expected a file or none. Move it away.")
    gone = {name for name, is_folder in there.items() if not is_folder and any(fnmatch(name, s) for s in stale)}
    record: dict[str, Any] = {"inode": _inode(target), "names": sorted(written | gone), "linked": []}
    try:
        exchange = _exchange_call()
        if place.parent == target or os.path.ismount(target) or _works_inside(target):
            raise OSError(errno.EINVAL, "can't be exchanged")
        _link_others(target, new, record["names"], record["linked"])
        _copy_owner(target, new)
        os.utime(new)
        (place / LOCK_NAME).write_text(json.dumps(record))
        _sync(new)
        sys.audit("os.rename", str(new), str(target), -1, -1)
        exchange(os.fsencode(new), os.fsencode(target))
    except OSError as error:
        if error.errno not in CANT_EXCHANGE:
            raise
        for path in new.iterdir():
            if path.name not in written:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        _move_one_by_one(new, target, place / "old", record["names"])
        return
    try:
        _empty(new, target, record)
    except OSError as error:  # the new files are there, and the next save here does the rest
        logger.warning("Saved %s, but could not remove all of the old directory %s: %s.", target, new, error)


def _exchange_call() -> Callable[[bytes, bytes], None]:
    """Finds the system's call that exchanges two directories in one step."""
    library: Any = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    if not (is_linux := hasattr(library, "renameat2")) and not hasattr(library, "renamex_np"):
        raise OSError(errno.ENOSYS, "no call that exchanges directories")
    here, exchanges = -100, 2  # AT_FDCWD; RENAME_EXCHANGE, and RENAME_SWAP of macOS

    def exchange(one: bytes, other: bytes) -> None:
        failed = (
            library.renameat2(here, one, here, other, exchanges)
            if is_linux
            else (library.renamex_np(one, other, exchanges))
        )
        if failed:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), os.fsdecode(other))

    return exchange


def _works_inside(directory: Path) -> bool:
    try:
        return Path.cwd().is_relative_to(directory)
    except FileNotFoundError:
        return False


def _link_others(old: Path, new: Path, left_out: Collection[str], linked: list[int]) -> None:
    """Links the files of a directory into a new one, and notes the inode of each."""
    for entry in list(os.scandir(old)):
        if entry.name in left_out or entry.name.startswith(HIDDEN):
            continue
        if len(linked) > MOST_LINKS:
            raise OSError(errno.E2BIG, "too many files")
        if entry.is_dir(follow_symlinks=False):
            (new / entry.name).mkdir()
            _link_others(Path(entry.path), new / entry.name, (), linked)
            _copy_owner(Path(entry.path), new / entry.name)
        else:
            os.link(entry.path, new / entry.name, follow_symlinks=False)
        linked.append(entry.inode())


def _copy_owner(old: Path, new: Path) -> None:
    """Gives a new directory the rights, owner, times and attributes of another."""
    before, now = old.stat(), new.stat()
    if (before.st_uid, before.st_gid) != (now.st_uid, now.st_gid):
        os.chown(new, before.st_uid, before.st_gid)
    shutil.copystat(old, new)


def _empty(old: Path, new: Path, record: dict[str, Any], is_top: bool = True) -> None:
    """Removes a directory that was replaced, but moves what appeared in it since it was linked into the new one."""
    for entry in list(os.scandir(old)):
        path, there, is_folder = Path(entry.path), new / entry.name, entry.is_dir(follow_symlinks=False)
        is_gone = is_top and entry.name in record["names"]
        if is_folder and is_gone:
            shutil.rmtree(path)
        elif is_folder and (there.is_dir() or entry.inode() in record["linked"]):
            _empty(path, there, record, is_top=False)
        elif is_gone or entry.inode() in record["linked"]:
            path.unlink()
        elif not os.path.lexists(there) or there.lstat().st_ino in record["linked"]:
            path.replace(there)
        else:
            path.unlink()  # written anew in the new directory
    old.rmdir()


def _move_one_by_one(new: Path, target: Path, old: Path, names: Collection[str]) -> None:
    """Moves files into a directory, whose own of these names go to `old`; an error puts them back."""

    def rank(name: str) -> int:
        return KEY_NAMES.index(name) if name in KEY_NAMES else -1

    old.mkdir()
    moves = [(target / name, old / name) for name in sorted(names, key=rank, reverse=True)]
    moves += [(path, target / path.name) for path in sorted(new.iterdir(), key=lambda path: rank(path.name))]
    done = []
    try:
        for before, after in moves:
            if os.path.lexists(before):
                before.rename(after)
                done.append((before, after))
        _sync(target)
    except BaseException:
        for before, after in reversed(done):
            after.rename(before)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Waits until a file, or the list of a directory's files, is on the disk."""
    is_directory = path.is_dir()
    if path.is_symlink() or (is_directory and os.name == "nt"):
        return
    opened = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError:
        if not is_directory:  # of which some file systems know nothing
            raise
    finally:
        os.close(opened)
