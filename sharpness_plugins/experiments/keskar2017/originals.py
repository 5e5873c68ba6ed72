"""MNIST, CIFAR-10 and CIFAR-100 from their original files, and features from a NumPy file. Nothing is downloaded."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import SharpnessError
from ..data import Samples, Split

__all__ = ["DataFileError", "read_cifar", "read_features", "read_mnist"]

Bytes = Callable[[str], bytes]


class DataFileError(SharpnessError, ValueError):
    """A file of the data is missing, altered or in another format; the message says which and what to do."""


# --- MNIST

_MNIST = {  # MD5 of the uncompressed files: what gzip wrapped around them differs from copy to copy
    "train-images": ("idx3", "6bbc9ace898e44ae57da46a324031adb"),
    "train-labels": ("idx1", "a25bea736e30d166cdddb491f175f624"),
    "t10k-images": ("idx3", "2646ac647ad5339dbf082846283269ea"),
    "t10k-labels": ("idx1", "27ae3e4e09519cfbb04c329615203637"),
}


def read_mnist(folder: Path, *, verify: bool = True) -> Split:
    """Images ``(n, 1, height, width)`` in [0, 1] from the four idx files, each plain or ``.gz``.

    They are looked for in ``folder``, and in ``raw`` and ``MNIST/raw`` below it, as ``train-images-idx3-ubyte`` or
    ``train-images.idx3-ubyte``.

    Args:
        verify: compare the MD5 of their (uncompressed) content with that of the original files.
    Raises:
        DataFileError: see there.
    """
    read: dict[str, np.ndarray[Any, Any]] = {}
    for part, (kind, checksum) in _MNIST.items():
        path = _mnist_file(folder, part, kind)
        content = _content(path)
        if verify:
            _verify(path.name, content, checksum)
        read[part] = _idx(path.name, content, dimensions=int(kind[-1]))
    halves = {}
    for half in ("train", "t10k"):
        images, labels = read[f"{half}-images"], read[f"{half}-labels"]
        halves[half] = _images(f"MNIST's {half} files", images[:, None], labels, num_classes=10)
    return Split(halves["train"], halves["t10k"])


def _mnist_file(folder: Path, part: str, kind: str) -> Path:
    names = [f"{part}{mark}{kind}-ubyte{packed}" for packed in ("", ".gz") for mark in "-."]
    for place in (folder, folder / "raw", folder / "MNIST" / "raw"):
        for name in names:
            if (place / name).is_file():
                return place / name
    raise DataFileError(
        f"there is no {names[0]} or {names[2]} in {folder}, nor in raw or MNIST/raw below it. MNIST is read from its four "
        "original files; nothing is downloaded"
    )


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataFileError(f"{path.name} is not a whole gzip file ({error}). Copy it again") from None


def _idx(name: str, content: bytes, dimensions: int) -> np.ndarray[Any, Any]:
    """The idx format: two zero bytes, the type (8: unsigned bytes), the number of dimensions, each as 32 bits, the data."""
    head = 4 + 4 * dimensions
    magic = bytes((0, 0, 8, dimensions))
    if len(content) < head or content[:4] != magic:
        raise DataFileError(
            f"{name} is not an idx file of unsigned bytes with {dimensions} dimensions: it begins with "
            f"{content[:4].hex(' ') or 'nothing'} instead of {magic.hex(' ')}"
        )
    shape = struct.unpack(f">{dimensions}I", content[4:head])
    if len(content) - head != np.prod(shape, dtype=object):
        raise DataFileError(
            f"{name} should hold {shape} bytes after its head, and holds {len(content) - head}: it is cut off"
        )
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)


# --- CIFAR


@dataclass(frozen=True)
class _Version:
    """One of the versions that CIFAR is published in.

    Attributes:
        archive, archive_checksum: its name and MD5, as published beside it.
        train, test: its files, in ``folder`` of the archive.
        checksums: MD5 of the files, where known.
    """

    name: str
    archive: str
    archive_checksum: str
    folder: str
    train: tuple[str, ...]
    test: str
    checksums: Mapping[str, str]


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
_CIFAR = {
    10: (
        _Version(
            "binary",
            "cifar-10-binary.tar.gz",
            "c32a1d4ab5d03f1284b67883e8d87530",
            "cifar-10-batches-bin",
            tuple(f"{name}.bin" for name in _BATCHES),
            "test_batch.bin",
            {},
        ),
        _Version(
            "python",
            "cifar-10-python.tar.gz",
            "c58f30108f718f92721af3b95e74349a",
            "cifar-10-batches-py",
            _BATCHES,
            "test_batch",
            {
                "data_batch_1": "c99cafc152244af753f735de768cd75f",
                "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
                "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
                "data_batch_4": "634d18415352ddfa80567beed471001a",
                "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
                "test_batch": "40351d587109b95175f43aff81a1287e",
            },
        ),
    ),
    100: (
        _Version(
            "binary",
            "cifar-100-binary.tar.gz",
            "03b5dce01913d631647c71ecec9e9cb8",
            "cifar-100-binary",
            ("train.bin",),
            "test.bin",
            {},
        ),
        _Version(
            "python",
            "cifar-100-python.tar.gz",
            "eb9058c3a382ffc7106e4002c42a8d85",
            "cifar-100-python",
            ("train",),
            "test",
            {"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
        ),
    ),
}
_NUM_TRAIN, _NUM_TEST = 50_000, 10_000
_PIXELS = 3 * 32 * 32


def read_cifar(folder: Path, num_classes: int, *, verify: bool = True) -> Split:
    """Images ``(n, 3, 32, 32)`` in [0, 1] from the binary or the python version, as an archive or unpacked.

    ``folder`` holds the archive, or its folder, or is that folder. The python version is a pickle and is read by an
    unpickler that makes numbers, text, lists, mappings and arrays, and nothing else.

    Args:
        num_classes: 10 or 100 (the fine labels).
        verify: compare the MD5 of the archive, or of the unpacked files where one is known, with the published ones, and
            ask for 50 000 and 10 000 images.
    Raises:
        DataFileError: see there.
    """
    for version in _CIFAR[num_classes]:
        for place in (folder / version.folder, folder):
            if (place / version.test).is_file():
                return _cifar(version, num_classes, functools.partial(_file, place), verify, unpacked=True)
    for version in _CIFAR[num_classes]:
        archive = folder / version.archive
        if archive.is_file():
            if verify:
                _verify(archive.name, archive.read_bytes(), version.archive_checksum)
            with _opened(archive) as members:
                return _cifar(version, num_classes, functools.partial(_member, members, version), verify, unpacked=False)
    archives = " or ".join(version.archive for version in _CIFAR[num_classes])
    folders = " or ".join(version.folder for version in _CIFAR[num_classes])
    raise DataFileError(f"there is no {archives}, and no folder {folders}, in {folder}. Nothing is downloaded")


def _file(folder: Path, name: str) -> bytes:
    if not (folder / name).is_file():
        raise DataFileError(f"there is no {name} beside the other files in {folder}")
    return (folder / name).read_bytes()


def _opened(archive: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(archive)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataFileError(f"{archive.name} is not a whole tar.gz archive ({error}). Copy it again") from None


def _member(members: tarfile.TarFile, version: _Version, name: str) -> bytes:
    try:
        member = members.extractfile(f"{version.folder}/{name}")
        if member is None:
            raise KeyError(name)
        return member.read()
    except (KeyError, tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataFileError(f"{version.archive} has no readable {version.folder}/{name} ({error})") from None


def _cifar(version: _Version, num_classes: int, read: Bytes, verify: bool, *, unpacked: bool) -> Split:
    halves = []
    for names, expected in ((version.train, _NUM_TRAIN), ((version.test,), _NUM_TEST)):
        images, labels = [], []
        for name in names:
            content = read(name)
            if verify and unpacked and name in version.checksums:
                _verify(name, content, version.checksums[name])
            part = _pickled(name, content, num_classes) if version.name == "python" else _records(name, content, num_classes)
            images.append(part[0])
            labels.append(part[1])
        half = _images(", ".join(names), np.concatenate(images), np.concatenate(labels), num_classes)
        if verify and len(half) != expected:
            raise DataFileError(f"{', '.join(names)} should hold {expected} images, and hold {len(half)}{_HOW_ALTERED}")
        halves.append(half)
    return Split(*halves)


def _records(name: str, content: bytes, num_classes: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The binary version: the label (of CIFAR-100 the coarse and the fine one) and then the pixels, colour by colour."""
    labels = 1 if num_classes == 10 else 2
    if not content or len(content) % (labels + _PIXELS):
        raise DataFileError(
            f"{name} should hold records of {labels + _PIXELS} bytes, and holds {len(content)} bytes: it is cut off"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, labels + _PIXELS)
    return records[:, labels:].reshape(-1, 3, 32, 32), records[:, labels - 1]


def _pickled(name: str, content: bytes, num_classes: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except DataFileError:
        raise
    except Exception as error:  # the unpickler stumbles over foreign bytes in many ways
        raise DataFileError(f"{name} is not a pickle of CIFAR ({type(error).__name__}: {error})") from None
    key = b"labels" if num_classes == 10 else b"fine_labels"
    entries = {k.encode() if isinstance(k, str) else k: v for k, v in batch.items()} if isinstance(batch, dict) else {}
    pixels, labels = entries.get(b"data"), entries.get(key)
    fits = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.ndim == 2 and pixels.shape[1] == _PIXELS
    if not fits or not isinstance(labels, (list, np.ndarray)):
        raise DataFileError(f"{name} should be a mapping with 'data' (n x {_PIXELS} bytes) and {key.decode()!r}, and is not")
    assert isinstance(pixels, np.ndarray)
    return pixels.reshape(-1, 3, 32, 32), np.asarray(labels)


class _Unpickler(pickle.Unpickler):
    """Makes plain values and NumPy arrays of them. A pickle can name any function to be called; no other is known here."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
            ("numpy._core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
            ("_codecs", "encode"): _latin1,  # bytes in an older protocol
        }
        if (module, name) not in known:
            raise DataFileError(f"this pickle calls {module}.{name}, which has no place in a CIFAR file. Do not use it")
        return known[module, name]


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise DataFileError(f"this pickle encodes text as {encoding!r}, which has no place in a CIFAR file. Do not use it")
    return text.encode("latin1")


# --- features


def read_features(file: Path, *, num_features: int, num_classes: int) -> Split:
    """``train_inputs`` ``(n, num_features)``, ``train_labels`` ``(n,)``, ``test_inputs``, ``test_labels`` of an ``.npz``.

    ``file`` may also be a folder with one ``.npz`` file. Pickled objects in it are refused.

    Raises:
        DataFileError: see there.
    """
    if file.is_dir():
        found = sorted(file.glob("*.npz"))
        if len(found) != 1:
            raise DataFileError(f"{file} should hold one .npz file, and holds {len(found)}. Name the file itself")
        file = found[0]
    names = ("train_inputs", "train_labels", "test_inputs", "test_labels")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            read = {name: np.asarray(arrays[name]) for name in names}
    except FileNotFoundError:
        raise DataFileError(f"there is no file {file}") from None
    except KeyError:
        raise DataFileError(f"{file.name} should hold the arrays {', '.join(names)}, and does not") from None
    except Exception as error:  # NumPy stumbles over foreign bytes in many ways
        raise DataFileError(f"{file.name} cannot be read as an .npz of numbers ({type(error).__name__}: {error})") from None
    halves = []
    for half in ("train", "test"):
        inputs, labels = read[f"{half}_inputs"], read[f"{half}_labels"]
        if inputs.ndim != 2 or inputs.shape[1] != num_features or inputs.dtype.kind != "f" or not np.isfinite(inputs).all():
            raise DataFileError(
                f"{half}_inputs in {file.name} should be finite floats of shape (samples, {num_features}), and are "
                f"{inputs.dtype} of shape {inputs.shape}"
            )
        halves.append(Samples(torch.from_numpy(inputs.astype(np.float32)), _labels(half, labels, len(inputs), num_classes)))
    return Split(*halves)


# --- common

_HOW_ALTERED = ". If the file was altered on purpose, pass --no-checksum"


def _verify(name: str, content: bytes, checksum: str) -> None:
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != checksum:
        raise DataFileError(f"{name} is not the original file: its MD5 is {found} instead of {checksum}{_HOW_ALTERED}")


def _images(name: str, pixels: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], num_classes: int) -> Samples:
    return Samples(
        torch.from_numpy(pixels.astype(np.float32) / np.float32(255)), _labels(name, labels, len(pixels), num_classes)
    )


def _labels(name: str, labels: np.ndarray[Any, Any], num_samples: int, num_classes: int) -> Tensor:
    if labels.shape != (num_samples,) or not num_samples:
        raise DataFileError(
            f"{name}: {labels.shape} labels for {num_samples} samples; there must be as many, and at least one"
        )
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= num_classes:
        raise DataFileError(f"{name}: labels must be whole numbers from 0 to {num_classes - 1}, got {_span(labels)}")
    return torch.from_numpy(labels.astype(np.int64))


def _span(labels: np.ndarray[Any, Any]) -> str:
    return f"{labels.min()} to {labels.max()}" if labels.dtype.kind in "iuf" else f"{labels.dtype}"
