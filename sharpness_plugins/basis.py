"""A few long vectors that are nearly orthonormal: where they are kept, and how others are made orthogonal to them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import distributed, reductions
from .distributed import Ranks
from .layout import WHOLE, Layout

__all__ = ["STORAGES", "Basis", "bytes_per_vector"]

STORAGES = ("full", "half", "host")

_COLUMNS = 2**19  # bounds what is copied or converted at a time; measured on a CPU, a fifth faster than 2^15
_SMALL_REST = 0.5  # of a squared norm


WORTH_SHARING = 2**27  # bytes of a vector, from which on ranks keep a part of each; a step then sends one vector more


def bytes_per_vector(like: Tensor, storage: str, layout: Layout = WHOLE) -> int:
    """What one vector of the shape and dtype of ``like`` takes on a rank; of shards, on the rank with the largest."""
    part = -(-like.numel() // _ranks_of(like, layout).size)
    return int(layout.largest(part * (2 if storage == "half" else like.element_size())))


def _ranks_of(like: Tensor, layout: Layout) -> Ranks:
    """Those that keep a part of each whole vector: the ranks of the measurement that goes on, where that is worth while."""
    is_long = like.numel() * like.element_size() >= WORTH_SHARING
    return distributed.measuring() if layout.is_whole and is_long else Ranks()


class Basis:
    """Room for ``size`` vectors of the shape, dtype and device of ``like``, allocated once.

    Args:
        storage: "full" keeps them as they are; "half" in float16, scaled by √dim so that the entries of a unit vector are
            near 1 (half the memory; the vectors are then orthonormal to 1e-4); "host" in the memory of the host, streamed
            to the device of ``like`` at every use.
        layout: of the vectors. With shards, each rank keeps those that it is given, and only ``orthogonalize`` is
            collective.
    On several ranks that measure together, each keeps its part of every long vector that is whole, and vectors that go in
    and come out are whole: all methods but ``store`` and ``rotate`` are collective then.
    """

    def __init__(self, size: int, like: Tensor, storage: str = "full", layout: Layout = WHOLE) -> None:
        self.dim, self._layout = layout.length(like), layout
        self._like = like.new_empty(0)
        self._scale = self.dim**0.5 if storage == "half" else 1.0
        dtype = torch.float16 if storage == "half" else like.dtype
        device = torch.device("cpu") if storage == "host" else like.device
        self._ranks = _ranks_of(like, layout)
        here = like.numel()
        part = -(-here // self._ranks.size)
        self._own = slice(min(self._ranks.rank * part, here), min((self._ranks.rank + 1) * part, here))
        self._width = self._own.stop - self._own.start
        self._rows = torch.empty((size, self._width), dtype=dtype, device=device)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def device(self) -> torch.device:
        return self._rows.device

    @property
    def nbytes(self) -> int:
        return self._rows.numel() * self._rows.element_size()

    @property
    def is_spread(self) -> bool:
        """Whether other ranks have other parts of its vectors."""
        return not self._ranks.is_alone

    def state(self, filled: int) -> Tensor:
        """The first rows as they are kept; a view."""
        return self._rows[:filled]

    def set_state(self, rows: Tensor) -> None:
        self._rows[: len(rows)] = rows

    def room(self, position: int, spare: Tensor) -> Tensor | None:
        """Where to write what may be stored at ``position``: its row, which then needs no copy; None for a new vector.

        Args:
            spare: a vector that is not needed any more, and a row only where rows are as vectors are.
        """
        if self._ranks.size > 1:
            return spare
        if self._scale != 1.0 or self._rows.device != self._like.device or self._rows.dtype != self._like.dtype:
            return spare
        return self._rows[position] if position < len(self) else None

    def store(self, position: int, vector: Tensor) -> Tensor:
        """Keep ``vector`` in a row; returns it as it is kept (rounded, for "half")."""
        row, own = self._rows[position], vector[self._own]
        if self._scale == 1.0:
            if own.data_ptr() != row.data_ptr():
                row.copy_(own)
            return vector
        for columns in self._blocks():
            row[columns] = own[columns] * self._scale
        return self.row(position)

    def row(self, position: int) -> Tensor:
        own = self._loaded(slice(position, position + 1), slice(None))
        return self._whole(own if self._ranks.size > 1 else own.clone())[0]

    def orthogonalize(
        self, w: Tensor, filled: int, expected: Tensor, first: int, *, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Classical Gram-Schmidt of ``w`` against the first ``filled`` rows, twice, the first time by ``expected``.

        What is subtracted first are coefficients that the caller knows already, by symmetry; the second pass measures what
        is left of them and subtracts that, which is as accurate as measuring twice and reads the rows twice and not four
        times.

        With shards, the coefficients and the squared norm before they are subtracted take one sum over the ranks together;
        a second one where little is left after it.

        Args:
            w: shape ``(dim,)``; not written to, unless it is ``out``.
            expected: shape ``(filled,)``, float64 on the device of ``w``; zero before ``first``.
        Returns:
            ``w`` orthogonalized; what ``expected`` lacked, shape ``(filled,)``; the squared norm of the answer (float64).
        """
        whole = torch.empty_like(w) if out is None else out
        w, left = w[self._own], whole[self._own]
        lacked, squares = [expected.new_zeros(filled)], [expected.new_zeros(())]
        known = -expected[first:filled].to(w.dtype)
        for columns in self._blocks():
            rows = self._loaded(slice(filled), columns)
            torch.addmv(w[columns], rows[first:].T, known, out=left[columns])
            lacked.append(reductions.matvec(rows, left[columns]))
        if not self._layout.is_whole:
            return whole, *self._corrected_shard(left, torch.stack(lacked).sum(dim=0))
        with self._ranks.sharing("coefficients in a basis") as shared:
            shared.vector = torch.stack(lacked).sum(dim=0)
        correction = shared.vector
        assert correction is not None
        rest = -correction.to(w.dtype)
        for columns in self._blocks():
            left[columns].addmv_(self._loaded(slice(filled), columns).T, rest)
            squares.append(reductions.dot(left[columns], left[columns]))
        square = torch.stack(squares).sum()
        if self._ranks.is_alone:
            return whole, correction, square
        with self._ranks.sharing("an orthogonal vector") as shared:
            whole[: self._own.start] = 0
            whole[self._own.stop :] = 0
            shared.vector, shared.numbers = whole, [square.item()]
        assert shared.vector is not None
        whole.copy_(shared.vector)
        return whole, correction, square.new_tensor(shared.numbers[0])

    def _corrected_shard(self, left: Tensor, lacked: Tensor) -> tuple[Tensor, Tensor]:
        """Subtract what is still lacked, by the sum over all shards: that, and the squared norm of the whole answer."""
        told = self._layout.sums(torch.cat([lacked, reductions.dot(left, left)[None]]))
        correction, before = told[:-1], told[-1]
        rest = -correction.to(left.dtype)
        for columns in self._blocks():
            left[columns].addmv_(self._loaded(slice(len(rest)), columns).T, rest)
        square = before - correction.square().sum()
        if square < _SMALL_REST * before:  # of such a difference few digits are right
            square = self._layout.dot(left, left)
        return correction, square

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
        answer = self._like.new_empty((len(weights), self._width))
        for columns in self._blocks():
            torch.mm(weights, self._loaded(slice(weights.shape[1]), columns), out=answer[:, columns])
        return self._whole(answer)

    def _whole(self, own: Tensor) -> Tensor:
        """Rows with the parts of all ranks."""
        if self._ranks.is_alone:
            return own
        with self._ranks.sharing("vectors of a basis") as shared:
            shared.vector = own.new_zeros((len(own), self.dim))
            shared.vector[:, self._own] = own
        assert shared.vector is not None
        return shared.vector

    def _blocks(self) -> Iterator[slice]:
        """Of the columns that are here."""
        return (slice(start, min(start + _COLUMNS, self._width)) for start in range(0, self._width, _COLUMNS))

    def _loaded(self, rows: slice, columns: slice) -> Tensor:
        part = self._rows[rows, columns].to(self._like)
        return part if self._scale == 1.0 else part / self._scale
