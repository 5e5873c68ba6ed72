"""How the long vectors of a measurement lie: whole on every rank, or on each rank a shard of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import reductions, sampling
from .distributed import Ranks

__all__ = ["WHOLE", "Layout", "Shards"]

_NUMBERS = 4  # that a meeting of the ranks adds up without a second collective


class Layout:
    """Every rank has all entries of every vector.

    What is said here of a vector is meant of the whole one, however it lies; what works on it entry by entry need not ask.
    """

    is_whole = True

    def length(self, vector: Tensor) -> int:
        """Entries of the whole vector, of which ``vector`` is what lies here."""
        return vector.numel()

    def sums(self, told: Tensor) -> Tensor:
        """What is known of the whole, where ``told`` holds sums over the entries that lie here; float64."""
        return told

    def largest(self, number: float) -> float:
        """Of the whole, where ``number`` is the largest of what lies here."""
        return number

    def everywhere(self, holds: bool) -> bool:
        return holds

    def of_blocks(self, lengths: Sequence[int], chosen: Sequence[int]) -> Layout:
        """The layout of vectors that hold only some blocks of these.

        Args:
            lengths: what lies here of each block that the vectors are made of, in order.
            chosen: positions of the blocks that are kept, ascending.
        """
        return self

    def dot(self, x: Tensor, y: Tensor) -> Tensor:
        """Inner product, as a 0-dim float64 tensor."""
        return self.sums(reductions.dot(x, y))

    def norm(self, x: Tensor) -> Tensor:
        """Euclidean norm, as a 0-dim float64 tensor."""
        return self.dot(x, x).sqrt()

    def matvec(self, rows: Tensor, vector: Tensor) -> Tensor:
        """``rows @ vector``, shapes ``(m, n)`` and ``(n,)`` to ``(m,)``, in float64."""
        return self.sums(reductions.matvec(rows, vector))

    def normal(self, generator: torch.Generator, like: Tensor) -> Tensor:
        """Standard normal vector; the whole one is the same in every layout."""
        return sampling.normal(like.numel(), generator, like)

    def uniform(self, generator: torch.Generator, like: Tensor) -> Tensor:
        """Vector uniform in [-1, 1); the whole one is the same in every layout."""
        return sampling.uniform(like.numel(), generator, like)


WHOLE = Layout()


class Shards(Layout):
    """Each rank has some of the entries of every vector, and each entry lies on one rank. All methods are collective.

    Args:
        ranks: among which the vectors are spread.
        dim: entries of the whole vectors.
        ranges: the positions ``[start, stop)`` in the whole vector of what lies here, in order.
    """

    is_whole = False

    def __init__(self, ranks: Ranks, dim: int, ranges: Sequence[tuple[int, int]]) -> None:
        self._ranks, self.dim, self.ranges = ranks, dim, tuple(ranges)

    def length(self, vector: Tensor) -> int:
        return self.dim

    def sums(self, told: Tensor) -> Tensor:
        """One all-reduce, of up to four sums; two for more."""
        with self._ranks.sharing("sums over shards") as shared:
            if told.numel() <= _NUMBERS:
                shared.numbers = told.reshape(-1).tolist()
            else:
                shared.vector = told.to(torch.float64, copy=True)  # which is added up in place
        if shared.vector is not None:
            return shared.vector
        return torch.tensor(shared.numbers, dtype=torch.float64, device=told.device).view(told.shape)

    def largest(self, number: float) -> float:
        with self._ranks.sharing("the largest over shards") as shared:
            shared.vector = torch.zeros(self._ranks.size, dtype=torch.float64)
            shared.vector[self._ranks.rank] = number
        return float(shared.vector.max())

    def everywhere(self, holds: bool) -> bool:
        with self._ranks.sharing("whether it holds on all shards") as shared:
            shared.numbers = [float(not holds)]
        return shared.numbers[0] == 0

    def of_blocks(self, lengths: Sequence[int], chosen: Sequence[int]) -> Layout:
        sizes = [int(size) for size in self.sums(torch.tensor(lengths, dtype=torch.float64)).tolist()]
        starts = [0, *itertools.accumulate(sizes)]
        kept, filled = [], 0
        for block in chosen:
            first, last = starts[block], starts[block + 1]
            inside = [(max(start, first), min(stop, last)) for start, stop in self.ranges]
            kept += [(filled + start - first, filled + stop - first) for start, stop in inside if start < stop]
            filled += sizes[block]
        return Shards(self._ranks, filled, kept)

    def normal(self, generator: torch.Generator, like: Tensor) -> Tensor:
        return sampling.pieces_of_normal(self.dim, self.ranges, generator, like)

    def uniform(self, generator: torch.Generator, like: Tensor) -> Tensor:
        return sampling.pieces_of_uniform(self.dim, self.ranges, generator, like)
