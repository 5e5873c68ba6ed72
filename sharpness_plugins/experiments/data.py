"""Small real data for the experiments, split by seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import missing_dependency

__all__ = ["Samples", "Split", "as_split", "digits_noisy_split", "digits_split"]

SPLIT_SEED = 1000  # the split of seed s is drawn with 1000 + s, so it shares no stream with the initial weights


@dataclass(frozen=True)
class Samples:
    """Inputs ``(num_samples, *shape)`` and integer labels ``(num_samples,)``, on one device."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Samples:
        return Samples(self.inputs.to(device), self.labels.to(device))

    def batches(self, batch_size: int) -> list[tuple[Tensor, Tensor]]:
        """All samples in their order, as views; the last batch may be smaller."""
        return list(zip(torch.split(self.inputs, batch_size), torch.split(self.labels, batch_size), strict=True))


@dataclass(frozen=True)
class Split:
    """Disjoint training and test samples."""

    train: Samples
    test: Samples


Pairs = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def as_split(data: Split | Pairs) -> Split:
    """``((train_inputs, train_labels), (test_inputs, test_labels))`` as a ``Split``; a ``Split`` as it is.

    Raises:
        TypeError: it is neither, or labels are not classes as int64.
        ValueError: no samples, or not as many labels as inputs.
    """
    if isinstance(data, Split):
        split = data
    else:
        try:
            (train_inputs, train_labels), (test_inputs, test_labels) = data
        except (TypeError, ValueError):
            raise TypeError(
                f"data must be a Split or ((train_inputs, train_labels), (test_inputs, test_labels)), got "
                f"{type(data).__name__}. Take the tensors out of a DataLoader first: torch.cat over its batches."
            ) from None
        split = Split(Samples(train_inputs, train_labels), Samples(test_inputs, test_labels))
    for name, samples in (("training", split.train), ("test", split.test)):
        if not all(isinstance(tensor, Tensor) for tensor in (samples.inputs, samples.labels)):
            raise TypeError(f"the {name} inputs and labels must be tensors, got {type(samples.inputs).__name__}")
        if len(samples.inputs) != len(samples.labels) or not len(samples):
            raise ValueError(
                f"there must be as many {name} labels as inputs and at least one, got {len(samples.labels)} and "
                f"{len(samples.inputs)}"
            )
        if samples.labels.dtype != torch.int64 or samples.labels.dim() != 1:
            raise TypeError(
                f"the {name} labels must be int64 of shape (num_samples,), one class each: test accuracy counts "
                f"them. Got {samples.labels.dtype} of shape {tuple(samples.labels.shape)}"
            )
    return split


def digits_split(seed: int, *, num_train: int = 500) -> Split:
    """scikit-learn's 1797 handwritten digits, 8x8 pixels in [0, 1]: ``num_train`` at random, the rest for the test."""
    inputs, labels = _digits()
    if not 0 < num_train < len(labels):
        raise ValueError(f"num_train must lie between 1 and {len(labels) - 1}, got {num_train}: the test set is the rest")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED + seed))
    return _split(inputs, labels, order[:num_train], order[num_train:])


def digits_noisy_split(seed: int, *, num_train: int = 800, num_test: int = 800, wrong_share: float = 0.1) -> Split:
    """The same digits, with a wrong label on a share of the training samples, so that a network has to memorize them.

    Permuted by ``numpy.random.RandomState(1000 + seed)``: the first ``num_train`` to train on, the last ``num_test`` to
    test. Then the same stream draws which labels are wrong, and by how much from 1 to 9 (modulo 10) each is shifted.
    """
    inputs, labels = _digits()
    if min(num_train, num_test) < 1 or num_train + num_test > len(labels):
        raise ValueError(
            f"num_train and num_test must be at least 1 and together at most {len(labels)}, got {num_train} and {num_test}"
        )
    if not 0 <= wrong_share <= 1:
        raise ValueError(f"wrong_share must lie between 0 and 1, got {wrong_share}")
    stream = np.random.RandomState(SPLIT_SEED + seed)
    order = torch.from_numpy(stream.permutation(len(labels)))
    split = _split(inputs, labels, order[:num_train], order[-num_test:])
    wrong = torch.from_numpy(stream.permutation(num_train)[: round(wrong_share * num_train)])
    shift = torch.from_numpy(stream.randint(1, 10, size=len(wrong)))
    split.train.labels[wrong] = (split.train.labels[wrong] + shift) % 10
    return split


def _digits() -> tuple[Tensor, Tensor]:
    datasets = missing_dependency("sklearn.datasets", extra="demo", purpose="the digits data set")
    pixels, digits = datasets.load_digits(return_X_y=True)
    return torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits, dtype=torch.int64)


def _split(inputs: Tensor, labels: Tensor, train: Tensor, test: Tensor) -> Split:
    return Split(Samples(inputs[train], labels[train]), Samples(inputs[test], labels[test]))
