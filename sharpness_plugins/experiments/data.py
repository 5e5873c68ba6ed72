"""Small real data for the experiments, split by seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import missing_dependency

__all__ = ["Samples", "Split", "digits_split"]

SPLIT_SEED = 1000  # the split of seed s is drawn with 1000 + s, so it shares no stream with the initial weights


@dataclass(frozen=True)
class Samples:
    """Inputs ``(num_samples, num_features)`` and integer labels ``(num_samples,)``."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Samples:
        return Samples(self.inputs.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Split:
    """Disjoint training and test samples."""

    train: Samples
    test: Samples


def digits_split(seed: int, *, num_train: int = 500) -> Split:
    """scikit-learn's 1797 handwritten digits, 8x8 pixels in [0, 1]: ``num_train`` at random, the rest for the test."""
    datasets = missing_dependency("sklearn.datasets", extra="demo", purpose="the digits data set")
    pixels, digits = datasets.load_digits(return_X_y=True)
    if not 0 < num_train < len(digits):
        raise ValueError(f"num_train must lie between 1 and {len(digits) - 1}, got {num_train}: the test set is the rest")
    inputs, labels = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED + seed))
    train, test = order[:num_train], order[num_train:]
    return Split(Samples(inputs[train], labels[train]), Samples(inputs[test], labels[test]))
