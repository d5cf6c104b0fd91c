"""Runs an action in a child process that is killed, or meets an error, at its n-th file operation."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.rmtree", "os.truncate", "os.link",
           "os.symlink", "os.utime", "os.chown"}  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def forked(action: Callable[[], object], at: int, root: Path, error: OSError | None = None) -> bool:
    """Whether the child got to its `at`-th change of a file below `root`; there it is killed, or `error` is raised."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        count = 0

        def watch(event: str, given: tuple) -> None:
            nonlocal count
            if event != "open" and event not in CHANGES:
                return
            is_read = event == "open" and not (isinstance(given[2], int) and given[2] & WRITES)
            if is_read or not isinstance(given[0], (str, bytes, os.PathLike)):
                return
            if str(root) not in os.fsdecode(given[0]):
                return
            count += 1
            if count == at:
                os.write(writer, b"x")
                if error is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise error

        sys.addaudithook(watch)
        try:
            action()
        except BaseException:
            os._exit(3)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        reached = bool(pipe.read())
    _, status = os.waitpid(child, 0)
    assert reached or status == 0, "the action fails by itself"
    return reached


def operations(action: Callable[[], object], root: Path, error: OSError | None = None) -> Iterator[int]:
    """Runs the action again and again, interrupted at one operation after another; yields the number of each."""
    at = 1
    while forked(action, at, root, error):
        yield at
        at += 1
