"""What a metric says beforehand that it will take, for the plan of a measurement."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["NOTHING", "ExpectedWork", "Range"]


class Range(NamedTuple):
    """A count that is known within bounds; ``high`` is infinite where there is none."""

    low: float
    typical: float
    high: float

    @classmethod
    def exactly(cls, count: float) -> Range:
        return cls(count, count, count)

    def plus(self, other: Range) -> Range:
        return Range(self.low + other.low, self.typical + other.typical, self.high + other.high)

    def times(self, factor: float) -> Range:
        return Range(*(factor * count if count else 0.0 for count in self))

    def __contains__(self, count: object) -> bool:
        return isinstance(count, (int, float)) and self.low - 1e-9 <= count <= self.high + 1e-9

    def __str__(self) -> str:
        if self.low == self.high:
            return _short(self.low)
        return f"{_short(self.typical)} ({_short(self.low)}–{_short(self.high)})"


NOTHING = Range(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class ExpectedWork:
    """Evaluations in full-data equivalents, as in ``Cost``; a metric gives it as ``expected_work(objective)``.

    Attributes:
        values, gradients, hvps: of the loss, its gradient, products with a matrix.
        vectors: that are kept through many of them, beside the few that every solver works with: a Krylov basis, say.
    """

    values: Range = NOTHING
    gradients: Range = NOTHING
    hvps: Range = NOTHING
    vectors: int = 0

    @property
    def passes(self) -> Range:
        return self.values.plus(self.gradients).plus(self.hvps)


def _short(count: float) -> str:
    return "?" if math.isinf(count) else f"{count:.3g}"
