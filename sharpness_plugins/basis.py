"""A few long vectors that are nearly orthonormal: where they are kept, and how others are made orthogonal to them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import reductions

__all__ = ["STORAGES", "Basis", "bytes_per_vector"]

STORAGES = ("full", "half", "host")

_COLUMNS = 2**19  # bounds what is copied or converted at a time; measured on a CPU, a fifth faster than 2^15


def bytes_per_vector(like: Tensor, storage: str) -> int:
    """What one vector of the shape and dtype of ``like`` takes."""
    return like.numel() * (2 if storage == "half" else like.element_size())


class Basis:
    """Room for ``size`` vectors of the shape, dtype and device of ``like``, allocated once.

    Args:
        storage: "full" keeps them as they are; "half" in float16, scaled by √dim so that the entries of a unit vector are
            near 1 (half the memory; the vectors are then orthonormal to 1e-4); "host" in the memory of the host, streamed
            to the device of ``like`` at every use.
    """

    def __init__(self, size: int, like: Tensor, storage: str = "full") -> None:
        self.dim = like.numel()
        self._like = like.new_empty(0)
        self._scale = self.dim**0.5 if storage == "half" else 1.0
        dtype = torch.float16 if storage == "half" else like.dtype
        device = torch.device("cpu") if storage == "host" else like.device
        self._rows = torch.empty((size, self.dim), dtype=dtype, device=device)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def device(self) -> torch.device:
        return self._rows.device

    @property
    def nbytes(self) -> int:
        return self._rows.numel() * self._rows.element_size()

    def state(self, filled: int) -> Tensor:
        """The first rows as they are kept; a view."""
        return self._rows[:filled]

    def set_state(self, rows: Tensor) -> None:
        self._rows[: len(rows)] = rows

    def store(self, position: int, vector: Tensor) -> Tensor:
        """Keep ``vector`` in a row; returns it as it is kept (rounded, for "half")."""
        row = self._rows[position]
        if self._scale == 1.0:
            row.copy_(vector)
            return vector
        for columns in self._blocks():
            row[columns] = vector[columns] * self._scale
        return self.row(position)

    def row(self, position: int) -> Tensor:
        return self._loaded(slice(position, position + 1), slice(None))[0].clone()

    def orthogonalize(
        self, w: Tensor, filled: int, expected: Tensor, first: int, *, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Classical Gram-Schmidt of ``w`` against the first ``filled`` rows, twice, the first time by ``expected``.

        What is subtracted first are coefficients that the caller knows already, by symmetry; the second pass measures what
        is left of them and subtracts that, which is as accurate as measuring twice and reads the rows twice and not four
        times.

        Args:
            w: shape ``(dim,)``; not written to, unless it is ``out``.
            expected: shape ``(filled,)``, float64 on the device of ``w``; zero before ``first``.
        Returns:
            ``w`` orthogonalized; what ``expected`` lacked, shape ``(filled,)``; the squared norm of the answer (float64).
        """
        left = torch.empty_like(w) if out is None else out
        lacked, squares = [], []
        known = -expected[first:filled].to(w.dtype)
        for columns in self._blocks():
            rows = self._loaded(slice(filled), columns)
            torch.addmv(w[columns], rows[first:].T, known, out=left[columns])
            lacked.append(reductions.matvec(rows, left[columns]))
        correction = torch.stack(lacked).sum(dim=0)
        rest = -correction.to(w.dtype)
        for columns in self._blocks():
            left[columns].addmv_(self._loaded(slice(filled), columns).T, rest)
            squares.append(reductions.dot(left[columns], left[columns]))
        return left, correction, torch.stack(squares).sum()

    def rotate(self, rotation: Tensor) -> None:
        """Replace the first rows by ``rotationᵀ rows``, in place; ``rotation`` has shape ``(filled, kept)``, float64."""
        filled, kept = rotation.shape
        turn = rotation.T.to(self._like)
        for columns in self._blocks():
            turned = turn @ self._loaded(slice(filled), columns)
            self._rows[:kept, columns] = turned if self._scale == 1.0 else turned * self._scale

    def combine(self, coefficients: Tensor) -> Tensor:
        """``coefficients @ rows``, shape ``(k, filled)`` to ``(k, dim)``, in the dtype and on the device of the vectors."""
        weights = coefficients.to(self._like)
        answer = self._like.new_empty((len(weights), self.dim))
        for columns in self._blocks():
            torch.mm(weights, self._loaded(slice(weights.shape[1]), columns), out=answer[:, columns])
        return answer

    def _blocks(self) -> Iterator[slice]:
        return (slice(start, min(start + _COLUMNS, self.dim)) for start in range(0, self.dim, _COLUMNS))

    def _loaded(self, rows: slice, columns: slice) -> Tensor:
        part = self._rows[rows, columns].to(self._like)
        return part if self._scale == 1.0 else part / self._scale
