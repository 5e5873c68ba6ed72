"""What was read, as a few numbers: the same for any order and batching of the same samples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from .batches import Batch, all_tensors

__all__ = ["Fingerprint"]

_ELEMENTS = 2**22  # bounds the float64 copies


class Fingerprint:
    """A sum over samples that does not depend on their order or batching, but does on their contents."""

    def __init__(self) -> None:
        self.num_batches = 0
        self.num_samples = 0
        self._sums: list[Tensor] = []
        self.units: list[Tensor] = []  # of each batch: a number for each sample and 1, or one for all and their count

    def add(self, batch: Batch) -> None:
        self.num_batches += 1
        self.num_samples += batch.num_samples or 0
        numbers: list[Tensor] = []
        for position, tensor in enumerate(all_tensors(batch.data)):
            if tensor.numel() == 0 or tensor.layout is not torch.strided:
                continue
            rows = tensor.detach().reshape(tensor.shape[0] if tensor.ndim else 1, -1)
            rows = torch.view_as_real(rows).flatten(1) if rows.is_complex() else rows
            # a position-dependent weight: flips and crops of an image keep its plain sum
            weights = torch.sin(torch.arange(1, rows.shape[1] + 1, device=rows.device, dtype=torch.float64) + position)
            parts = torch.split(rows, max(1, _ELEMENTS // rows.shape[1]))
            per_sample = torch.cat(
                [torch.nan_to_num(part.to(torch.float64), nan=0.5, posinf=1.0, neginf=-1.0) @ weights for part in parts]
            ).cpu()
            numbers.append(per_sample)
            self._sums.append(torch.stack([per_sample.sum(), per_sample.square().sum(), per_sample.abs().sum()]))
        if numbers and all(len(per_sample) == batch.num_samples for per_sample in numbers):
            total = torch.stack(numbers).sum(0)
            self.units.append(torch.stack([total, torch.ones_like(total)]))
        else:
            total = torch.stack([per_sample.sum() for per_sample in numbers]).sum() if numbers else torch.tensor(0.0)
            self.units.append(torch.tensor([[total.item()], [batch.num_samples or 1]], dtype=torch.float64))

    @classmethod
    def of_all(cls, parts: Iterable[Fingerprint]) -> Fingerprint:
        """Of the samples of all parts together."""
        total = cls()
        for part in parts:
            total.num_batches += part.num_batches
            total.num_samples += part.num_samples
            total._sums += part._sums
        return total

    @property
    def sums(self) -> Tensor | None:
        return torch.stack(self._sums).sum(0) if self._sums else None

    def summary(self) -> Fingerprint:
        """The same, small enough to be sent round."""
        same = type(self)()
        same.num_batches, same.num_samples = self.num_batches, self.num_samples
        same._sums = [] if self.sums is None else [self.sums]
        return same

    def checksum(self) -> str:
        sums = [f"{number:.9e}" for row in self._sums for number in row.tolist()]
        return hashlib.sha256(repr((self.num_batches, self.num_samples, sums)).encode()).hexdigest()

    def difference(self, other: Fingerprint) -> str | None:
        """What another pass gave that the first did not, as a clause; None where they agree."""
        if other.num_samples != self.num_samples:
            return f"{self.num_samples} samples on the first pass and {other.num_samples} on another"
        first, second = self.sums, other.sums
        if first is None or second is None:
            return None
        # samples in another order differ by the rounding of the sums, other samples by much more
        tolerance = 1e-9 * torch.stack([first[2], first[1], first[2]])
        if bool(((first - second).abs() > tolerance).any()):
            return (
                "other data on another pass than on the first (random augmentation, shuffling with drop_last or "
                "max_samples, or padding that depends on the batch)"
            )
        return None
