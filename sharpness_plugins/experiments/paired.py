"""Two recipes compared seed by seed, and how numbers over seeds are shown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Paired", "aligned", "and_list", "mean_and_spread", "pair"]


@dataclass(frozen=True)
class Paired:
    """One quantity under a reference recipe and under another one, seed by seed; only seeds where both are finite."""

    reference: tuple[float, ...]
    other: tuple[float, ...]

    @property
    def num_seeds(self) -> int:
        return len(self.reference)

    @property
    def differences(self) -> list[float]:
        return [other - reference for reference, other in zip(self.reference, self.other, strict=True)]

    @property
    def mean_difference(self) -> float:
        return statistics.fmean(self.differences)

    @property
    def standard_error(self) -> float | None:
        """Of the mean difference, s/√n with ddof=1; None for one seed, which says nothing about the spread."""
        return statistics.stdev(self.differences) / math.sqrt(self.num_seeds) if self.num_seeds > 1 else None

    @property
    def t(self) -> float | None:
        """Student's paired t, with ``num_seeds - 1`` degrees of freedom; None for one seed or without any spread."""
        return self.mean_difference / self.standard_error if self.standard_error else None

    @property
    def ratio(self) -> float | None:
        """Of the means; None where it says nothing, because a value is not positive."""
        if min(*self.reference, *self.other) <= 0:
            return None
        return statistics.fmean(self.other) / statistics.fmean(self.reference)

    @property
    def seed_ratios(self) -> list[float]:
        return [other / reference for reference, other in zip(self.reference, self.other, strict=True)]

    def count(self, sign: int) -> int:
        """In how many seeds the other value is higher (``sign=1``) or lower (``-1``)."""
        return sum(sign * difference > 0 for difference in self.differences)

    def verdict(self, sign: int) -> str:
        """Whether the quantity moves as the paper says, from ``sign`` of (other - reference)."""
        if sign * self.mean_difference <= 0:
            return "NOT as in the paper"
        if self.num_seeds == 1:
            return "the paper's order, in the only seed"
        return "as in the paper" if self.count(sign) == self.num_seeds else "as in the paper on average, not in every seed"


def pair(reference: Sequence[float], other: Sequence[float]) -> Paired | None:
    """None where no seed has both values."""
    both = [values for values in zip(reference, other, strict=True) if all(map(math.isfinite, values))]
    return Paired(*zip(*both, strict=True)) if both else None


def mean_and_spread(values: Sequence[float]) -> str:
    """``34.1±9.7``: three significant digits of the mean, the sample standard deviation to the same place."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "-"
    mean = statistics.fmean(finite)
    spread = statistics.stdev(finite) if len(finite) > 1 else None
    size = abs(mean)
    if size != 0 and not 1e-4 <= size < 1e6:
        return f"{mean:.2e}" if spread is None else f"{mean:.2e}±{spread:.0e}"
    decimals = 2 if size == 0 else max(0, 2 - math.floor(math.log10(size)))
    return f"{mean:.{decimals}f}" if spread is None else f"{mean:.{decimals}f}±{spread:.{decimals}f}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with a rule below the first: the first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *body = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return [head, "-" * len(head), *body]


def and_list(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
