"""Files that are written whole or not at all, also by several processes at once. Imports no torch."""

from __future__ import annotations

import os
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from types import ModuleType

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows: no such locks, and there a file that is open cannot be replaced anyway
    fcntl = None

__all__ = ["append", "update", "write"]

_PATIENCE = 10.0  # seconds to wait for another process, which holds the file for milliseconds


def write(path: str | os.PathLike[str], content: str | bytes, *, durable: bool = True) -> None:
    """The file appears complete or not at all; where this fails, an old one stays as it was.

    Of several processes that write it at once, one's content stays. A link keeps pointing where it does; what is no plain
    file (a pipe, ``/dev/stdout``) is written to directly. Text is UTF-8.

    Args:
        durable: wait for the disk, 10 ms or so. False is for what is written often and can be made again: after a loss of
            power, and not after a kill, the file may be broken.
    Raises:
        OSError: the disk is full, the folder is missing or must not be written to.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = None
    if mode is not None and not stat.S_ISREG(mode):
        with open(path, "wb", buffering=0) as special:
            _write_all(special, data)
        return
    _replace(Path(os.path.realpath(path)), data, mode, durable=durable)


def append(path: str | os.PathLike[str], line: str) -> None:
    """One more line at the end: all of it or, where the disk is full, nothing, as half a line would spoil the next one.

    What a process that was killed left of a line stays a line by itself. Several processes may append at once.
    """
    if not line.endswith("\n"):
        line += "\n"
    with _alone(Path(path)) as file:
        end = file.seek(0, os.SEEK_END)
        _append(file, line if _ends_a_line(file, end) else f"\n{line}")


def update(path: str | os.PathLike[str], change: Callable[[str], str]) -> None:
    """The file's text becomes ``change(text)``, ``""`` for one that is not there; nobody else's change falls between.

    What only adds to the end is appended; otherwise the old file stays until the new one is whole.
    """
    place = Path(path)
    with _alone(place) as file:
        file.seek(0)
        old = file.readall().decode()
        new = change(old)
        if new.startswith(old):
            _append(file, new[len(old) :])
        else:
            _replace(Path(os.path.realpath(place)), new.encode(), os.fstat(file.fileno()).st_mode)


def _replace(target: Path, data: bytes, mode: int | None, *, durable: bool = True) -> None:
    beside = target.with_name(f".{target.name[:80]}.{uuid.uuid4().hex[:12]}.tmp")  # processes of other machines, too
    try:
        with open(beside, "xb", buffering=0) as file:
            _write_all(file, data)
            if durable:
                os.fsync(file.fileno())  # some file systems tell only now that the disk is full
        if mode is not None:
            os.chmod(beside, stat.S_IMODE(mode))
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def _append(file: FileIO, text: str) -> None:
    end = file.seek(0, os.SEEK_END)
    try:
        _write_all(file, text.encode())
    except BaseException:
        file.truncate(end)
        raise


def _write_all(file: FileIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _ends_a_line(file: FileIO, end: int) -> bool:
    if not end:
        return True
    file.seek(end - 1)
    return file.read(1) == b"\n"


@contextmanager
def _alone(path: Path) -> Iterator[FileIO]:
    """The file, opened and locked against other processes and threads that come through here; made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + _PATIENCE
    while True:
        with path.open("a+b", buffering=0) as file:
            _lock(file, path, deadline)
            if _is_still(file, path):  # else somebody replaced it while we waited, and the lock is on the old one
                yield file
                return


def _lock(file: FileIO, path: Path, deadline: float) -> None:
    if fcntl is None:
        return
    while True:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{path} has been locked by another process for {_PATIENCE:g} s") from None
            time.sleep(0.005)
        except OSError:  # a file system without locks
            return


def _is_still(file: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
