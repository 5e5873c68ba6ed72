"""The data sets of the reproduction by name: digits, MNIST, CIFAR-10, CIFAR-100, TIMIT's features."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...errors import did_you_mean
from ..data import Samples, Split, digits_noisy_split, digits_split
from .originals import DataFileError, read_cifar, read_features, read_mnist

__all__ = ["SOURCES", "Source", "checksum", "load", "source_of"]


@dataclass(frozen=True)
class Source:
    """A data set.

    Attributes:
        description: for a reader.
        num_classes: that the network's output has.
        image: shape of a sample as an image, for augmentation; None where it is none.
        flips: whether a mirrored image shows the same.
        by_seed: whether each seed has a split of its own; else the published one serves all.
        needs_files: whether the user names where its files are.
    """

    description: str
    num_classes: int
    image: tuple[int, int, int] | None
    flips: bool
    by_seed: bool
    needs_files: bool
    read: Callable[[int, Path, bool], Split]


def _digits(seed: int, _: Path, __: bool) -> Split:
    return digits_split(seed)


def _digits_noisy(seed: int, _: Path, __: bool) -> Split:
    return digits_noisy_split(seed)


def _mnist(_: int, folder: Path, verify: bool) -> Split:
    return read_mnist(folder, verify=verify)


def _cifar10(_: int, folder: Path, verify: bool) -> Split:
    return read_cifar(folder, 10, verify=verify)


def _cifar100(_: int, folder: Path, verify: bool) -> Split:
    return read_cifar(folder, 100, verify=verify)


def _timit(_: int, folder: Path, __: bool) -> Split:
    return read_features(folder, num_features=360, num_classes=1973)


SOURCES = {
    "digits": Source("500 of scikit-learn's 8x8 digits, the rest to test", 10, (1, 8, 8), False, True, False, _digits),
    "digits-noisy": Source(
        "800 of scikit-learn's 8x8 digits, a tenth of the labels wrong", 10, (1, 8, 8), False, True, False, _digits_noisy
    ),
    "mnist": Source("MNIST", 10, (1, 28, 28), False, False, True, _mnist),
    "cifar10": Source("CIFAR-10", 10, (3, 32, 32), True, False, True, _cifar10),
    "cifar100": Source("CIFAR-100", 100, (3, 32, 32), True, False, True, _cifar100),
    "timit": Source("features like TIMIT's: 360 numbers, 1973 classes", 1973, None, False, False, True, _timit),
}


def source_of(name: str) -> Source:
    """Raises a ValueError that names the data sets there are."""
    if name not in SOURCES:
        raise ValueError(f"there is no data set {name!r}.{did_you_mean(name, SOURCES)} Data sets: {', '.join(SOURCES)}")
    return SOURCES[name]


def load(
    name: str,
    seed: int,
    *,
    folder: Path | None = None,
    verify: bool = True,
    max_train: int | None = None,
    max_test: int | None = None,
) -> Split:
    """The split of ``seed``: inputs as images where the data are images, in [0, 1].

    Args:
        folder: of the original files; see ``read_mnist``, ``read_cifar``, ``read_features``.
        verify: compare their checksums with the published ones.
        max_train, max_test: take the first so many samples.
    Raises:
        DataFileError, ValueError: the data cannot be had.
    """
    source = source_of(name)
    if source.needs_files and folder is None:
        raise DataFileError(f"{name} is read from files of yours, and nothing is downloaded: say where they are (--folder)")
    split = source.read(seed, folder or Path(), verify)
    return Split(_first(split.train, max_train), _first(split.test, max_test))


def _first(samples: Samples, count: int | None) -> Samples:
    return samples if count is None else Samples(samples.inputs[:count], samples.labels[:count])


def checksum(split: Split) -> str:
    """SHA-256 of the tensors, whatever files they came from."""
    found = hashlib.sha256()
    for tensor in (split.train.inputs, split.train.labels, split.test.inputs, split.test.labels):
        found.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
        found.update(tensor.cpu().contiguous().numpy().data)
    return found.hexdigest()
