"""The file that keeps the state of a long measurement: records that are appended, whole or not at all, never unpickled."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from .errors import StateFileError

__all__ = ["StateFile", "bytes_of", "digest"]

_MAGIC = b"sharpness-plugins state 1\n"
_HEAD = struct.Struct("<4sQQI")  # mark, bytes of the header, bytes of the tensors, checksum of both
_MARK = b"rec\n"
_LONGEST_HEADER = 2**26
_CHUNK = 2**22
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
}

Tree = Any


class _Place(NamedTuple):
    """Where the tensors of a record begin, how many bytes the whole record takes, and what its header says."""

    start: int
    size: int
    header: dict[str, Any]


class StateFile:
    """Records by key, of plain values and tensors, in one file.

    A record is appended with a checksum, so that a kill in the middle loses that record only. When most of the file is
    records that were replaced or dropped, it is written anew beside itself and put in its place. Reading runs no code: the
    file is JSON and the bytes of tensors. One process at a time, where the system can lock files.

    Args:
        path: made, where there is no such file.
        identity: strings by what they are of: a file with others belongs to another measurement and is refused.
    Raises:
        StateFileError: the file is another measurement's, damaged, in use, or no state at all; nothing is changed in it.
        OSError: it can not be made or read.
    """

    def __init__(self, path: str | os.PathLike[str], identity: Mapping[str, str]) -> None:
        self.path = Path(path)
        self._identity = dict(identity)
        self._places: dict[str, _Place] = {}
        self._end = 0
        self._file: io.FileIO
        if not self.path.exists():
            self._put_in_place()
        self._file = self._opened()

    @property
    def live_bytes(self) -> int:
        """What the records take that are not replaced or dropped."""
        return sum(place.size for place in self._places.values())

    @property
    def keys(self) -> list[str]:
        return list(self._places)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def label(self, key: str) -> Any:
        return self._places[key].header["label"]

    def read(self, key: str) -> Tree:
        """What was written under the key; tensors are new, on the CPU.

        Raises:
            StateFileError: it makes no sense.
        """
        place = self._places[key]
        tensors = []
        self._file.seek(place.start)
        for dtype, shape, count in place.header["tensors"]:
            data = _read(self._file, count)
            flat = torch.frombuffer(data, dtype=torch.uint8) if count else torch.empty(0, dtype=torch.uint8)
            tensors.append(flat.view(_DTYPES[dtype]).view(shape))
        try:
            return _unpacked(place.header["tree"], tensors)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise StateFileError(self._damaged(f"{type(error).__name__}: {error}")) from error

    def write(self, key: str, tree: Tree, label: Any = None, *, drop: Iterable[str] = ()) -> None:
        """Append a record, and forget those whose keys begin with one of ``drop``.

        Raises:
            TypeError: ``tree`` holds other things than numbers, strings, None, tensors, and lists, tuples and dicts of them.
            OSError: the disk is full, say; the file is as it was.
        """
        tensors: list[Tensor] = []
        packed = _packed(tree, tensors)
        self._append(key, {"key": key, "label": label, "tree": packed, "drop": list(drop)}, tensors)
        if self._end > 2 * self.live_bytes + _CHUNK:
            self.compact()

    def drop(self, *prefixes: str) -> None:
        self.write("", None, drop=prefixes)

    def flush(self) -> None:
        """To the disk itself: what was written survives the end of the system, too."""
        os.fsync(self._file.fileno())

    def compact(self) -> None:
        """Write the file anew with what is live."""
        self._put_in_place()

    def close(self) -> None:
        self._file.close()

    # ------------------------------------------------------------------ reading and writing

    def _append(self, key: str, header: dict[str, Any], tensors: list[Tensor]) -> None:
        arrays = [_bytes(tensor) for tensor in tensors]
        header["tensors"] = [
            [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), len(array)]
            for tensor, array in zip(tensors, arrays, strict=True)
        ]
        text = json.dumps(header).encode()
        count, checksum = sum(map(len, arrays)), zlib.crc32(text)
        for array in arrays:
            checksum = zlib.crc32(array, checksum)
        try:
            self._file.seek(self._end)
            _write(self._file, _HEAD.pack(_MARK, len(text), count, checksum) + text)
            for array in arrays:
                _write(self._file, array)
        except BaseException:
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
            raise
        self._remember(key, header, self._end + _HEAD.size + len(text), _HEAD.size + len(text) + count)
        self._end += _HEAD.size + len(text) + count

    def _remember(self, key: str, header: dict[str, Any], start: int, size: int) -> None:
        for prefix in header["drop"]:
            for gone in [known for known in self._places if known.startswith(prefix)]:
                del self._places[gone]
        if key:
            self._places[key] = _Place(start, size, header)

    def _put_in_place(self) -> None:
        """The file with what is live, written beside itself and put in its place when it is whole."""
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        places: dict[str, _Place] = {}
        try:
            with io.FileIO(beside, "w+") as file:
                _write(file, _MAGIC)
                text = json.dumps({"identity": self._identity}).encode()
                _write(file, _HEAD.pack(_MARK, len(text), 0, zlib.crc32(text)) + text)
                for key, place in self._places.items():
                    ahead = place.size - sum(count for *_, count in place.header["tensors"])
                    places[key] = place._replace(start=file.tell() + ahead)
                    self._file.seek(place.start - ahead)
                    _copy(self._file, file, place.size)
                end = file.tell()
                os.fsync(file.fileno())
            is_open = hasattr(self, "_file")
            if is_open:
                self._file.close()  # some systems replace no file that is open
            try:
                os.replace(beside, self.path)
                self._places, self._end = places, end
            finally:
                if is_open:
                    self._file = self._locked()
        finally:
            beside.unlink(missing_ok=True)

    def _opened(self) -> io.FileIO:
        if self.path.is_dir():
            raise StateFileError(f"the state file {self.path} is a folder. Name a file.")
        file = self._locked()
        try:
            self._load(file)
        except BaseException:
            file.close()
            raise
        return file

    def _locked(self) -> io.FileIO:
        """The file, open; nobody else opens it so until it is closed, or this process ends."""
        file = io.FileIO(self.path, "r+")
        try:
            fcntl: Any = importlib.import_module("fcntl")
            # of this process alone: a lock of the file's would be kept by workers that a loader has forked
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # not on Windows
            pass
        except (BlockingIOError, PermissionError):
            file.close()
            raise StateFileError(
                f"the state file {self.path} is in use by another process, which would overwrite it. Name another file."
            ) from None
        except OSError:  # a file system without locks
            pass
        return file

    def _load(self, file: io.FileIO) -> None:
        size = os.fstat(file.fileno()).st_size
        reader = io.BufferedReader(file, _CHUNK)
        try:
            if reader.read(len(_MAGIC)) != _MAGIC:
                raise StateFileError(
                    f"{self.path} is no state file of this version of sharpness_plugins, and it was left alone. Name "
                    "another file, or delete this one to begin anew."
                )
            self._end = len(_MAGIC)
            first = _record(reader, size - self._end)
            if first is None or "identity" not in first[0]:
                raise StateFileError(self._damaged("its head is cut off"))
            self._check(first[0]["identity"])
            self._end += first[1]
            while (found := _record(reader, size - self._end)) is not None:
                header, length = found
                count = sum(int(c) for _, _, c in header["tensors"])
                self._remember(str(header["key"]), header, self._end + length - count, length)
                self._end += length
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, StateFileError):
                raise
            raise StateFileError(self._damaged(f"{type(error).__name__}: {error}")) from error
        finally:
            reader.detach()

    def _check(self, found: Mapping[str, str]) -> None:
        other = [what for what, told in self._identity.items() if found.get(what) != told]
        other += [what for what in found if what not in self._identity]
        if other:
            raise StateFileError(
                f"the state file {self.path} belongs to another measurement: the {', the '.join(other)} differ"
                f"{'s' * (len(other) == 1)}. Measure what it belongs to, name another file, or delete it to begin anew."
            )

    def _damaged(self, how: str) -> str:
        return f"the state file {self.path} is damaged ({how}). Delete it to begin anew."


def bytes_of(tree: Tree) -> int:
    """What the tensors of a tree take."""
    tensors: list[Tensor] = []
    _packed(tree, tensors)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def digest(tree: Tree) -> int:
    """A checksum of a tree of numbers and tensors."""
    tensors: list[Tensor] = []
    checksum = zlib.crc32(json.dumps(_packed(tree, tensors)).encode())
    for tensor in tensors:
        checksum = zlib.crc32(_bytes(tensor), checksum)
    return checksum


def _packed(tree: Tree, tensors: list[Tensor]) -> Any:
    """JSON, with the tensors by their numbers; Python writes floats so that they come back bit for bit."""
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    if isinstance(tree, Tensor):
        tensors.append(tree.detach())
        return {"tensor": len(tensors) - 1}
    if isinstance(tree, list):
        return [_packed(entry, tensors) for entry in tree]
    if isinstance(tree, tuple):
        return {"tuple": [_packed(entry, tensors) for entry in tree]}
    if isinstance(tree, Mapping) and all(isinstance(key, (str, int)) for key in tree):
        return {"dict": [[key, _packed(entry, tensors)] for key, entry in tree.items()]}
    raise TypeError(f"a {type(tree).__name__} cannot be kept in a state file")


def _unpacked(packed: Any, tensors: list[Tensor]) -> Tree:
    if isinstance(packed, list):
        return [_unpacked(entry, tensors) for entry in packed]
    if not isinstance(packed, dict):
        return packed
    ((kind, inner),) = packed.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "tuple":
        return tuple(_unpacked(entry, tensors) for entry in inner)
    return {key: _unpacked(entry, tensors) for key, entry in inner}


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if not flat.numel():
        return memoryview(b"")
    found: memoryview = flat.view(torch.uint8).numpy().data
    return found


def _record(reader: BinaryIO, left: int) -> tuple[dict[str, Any], int] | None:
    """Header and size of the next record, whose checksum is right; None at the end of what is whole."""
    head = reader.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    mark, length, count, checksum = _HEAD.unpack(head)
    if mark != _MARK or length > _LONGEST_HEADER or _HEAD.size + length + count > left:
        return None
    text = reader.read(length)
    found, rest = zlib.crc32(text), count
    while rest:
        chunk = reader.read(min(rest, _CHUNK))
        if not chunk:
            return None
        found, rest = zlib.crc32(chunk, found), rest - len(chunk)
    if found != checksum:
        return None
    header = json.loads(text)
    sizes = [(_DTYPES[dtype].itemsize * math.prod(shape), size) for dtype, shape, size in header.get("tensors", [])]
    if any(told != size for told, size in sizes) or sum(size for _, size in sizes) != count:
        raise ValueError("the sizes of a record contradict each other")
    return header, _HEAD.size + length + count


def _read(file: io.FileIO, count: int) -> bytearray:
    data = bytearray(count)
    rest = memoryview(data)
    while rest:
        taken = file.readinto(rest)
        if not taken:
            raise OSError("the file is shorter than it was")
        rest = rest[taken:]
    return data


def _write(file: io.FileIO, data: bytes | bytearray | memoryview) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _copy(source: io.FileIO, target: io.FileIO, count: int) -> None:
    while count:
        chunk = _read(source, min(count, _CHUNK))
        _write(target, chunk)
        count -= len(chunk)
