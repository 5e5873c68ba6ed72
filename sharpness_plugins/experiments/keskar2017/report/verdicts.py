"""A verdict on a claim of the paper, and the rules that several claims share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from ...paired import Paired
from .published import Published
from .reading import Reading, short

__all__ = [
    "DIRECTION",
    "Agreement",
    "Claim",
    "Judge",
    "Statement",
    "Verdict",
    "direction",
    "in_points",
    "in_times",
    "monotone",
    "seeds_of",
    "span",
]

STANDARD_ERRORS = 2.0  # that a mean paired difference must exceed
DIRECTION = (
    "the mean difference, seed by seed, has the paper's sign and exceeds two standard errors; partly: it has the sign alone"
)


class Agreement(str, Enum):
    """The text is what the table shows."""

    YES = "yes"
    PARTLY = "partly"
    NO = "no"
    UNKNOWN = "not measured"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Claim:
    """One statement of the paper, judged.

    Attributes:
        key: a name without spaces.
        where: in the paper.
        short: the statement as the end of a sentence, for summaries.
        paper: what it says, with its numbers.
        rule: when ``here`` agrees with it.
        here: what was found.
        reason: why it does not agree, or not wholly; empty where it does.
    """

    key: str
    where: str
    short: str
    paper: str
    rule: str
    here: str
    agrees: Agreement
    reason: str = ""


@dataclass(frozen=True)
class Statement:
    """What of a claim does not depend on the record."""

    key: str
    where: str
    short: str
    paper: str
    rule: str
    judge: Callable[[Reading, Published | None], Verdict]

    def claim(self, reading: Reading, published: Published | None) -> Claim:
        verdict = self.judge(reading, published)
        paper = verdict.paper or self.paper
        reason = "" if verdict.agrees is Agreement.YES else verdict.reason
        return Claim(self.key, self.where, self.short, paper, self.rule, verdict.here, verdict.agrees, reason)


@dataclass(frozen=True)
class Verdict:
    """``paper`` where the paper's number depends on the network."""

    agrees: Agreement
    here: str = "–"
    reason: str = ""
    paper: str = ""


Judge = Callable[[Reading, "Published | None"], Verdict]


def direction(paired: Paired | None, sign: int) -> tuple[Agreement, str]:
    if paired is None:
        return Agreement.UNKNOWN, "no seed has both values"
    if paired.mean_difference == 0:
        return Agreement.NO, "there is no difference on average"
    if sign * paired.mean_difference < 0:
        return Agreement.NO, f"the order is the other one on average, and the paper's in {seeds_of(paired, sign)}"
    if paired.standard_error is None:
        return Agreement.PARTLY, "the paper's order in the only seed, which says nothing about the spread"
    if paired.mean_difference * sign > STANDARD_ERRORS * paired.standard_error:
        return Agreement.YES, ""
    return Agreement.PARTLY, f"the paper's order on average, within two standard errors, and in {seeds_of(paired, sign)}"


def monotone(points: Iterable[tuple[float, float]], sign: int) -> tuple[Agreement, str]:
    """Whether the second entry goes up (1) or down (-1) from each point to the next."""
    values = [value for _, value in sorted(points) if math.isfinite(value)]
    if len(values) < 2:
        return Agreement.UNKNOWN, "fewer than two points have a value"
    steps = [sign * (after - before) for before, after in itertools.pairwise(values)]
    wrong = sum(step <= 0 for step in steps)
    if not wrong:
        return Agreement.YES, ""
    if sign * (values[-1] - values[0]) > 0:
        return Agreement.PARTLY, f"{wrong} of {len(steps)} steps from one mean to the next go the other way; the ends do not"
    return Agreement.NO, "the last mean lies on the other side of the first"


def seeds_of(paired: Paired, sign: int) -> str:
    return f"{paired.count(sign)} of {paired.num_seeds} seed{'s' * (paired.num_seeds > 1)}"


def in_points(paired: Paired, sign: int) -> str:
    change = f"{100 * paired.mean_difference:+.2f}"
    if paired.standard_error is not None:
        change += f" ± {100 * paired.standard_error:.2f}"
    return f"{change} points; {'higher' if sign > 0 else 'lower'} in {seeds_of(paired, sign)}"


def in_times(paired: Paired) -> str:
    """``8.1 times (seed by seed 7.0 to 9.2); higher in 5 of 5 seeds``."""
    if paired.ratio is None:
        return f"difference {paired.mean_difference:+.3g}; higher in {seeds_of(paired, 1)}"
    said = f"{short(paired.ratio)} times"
    if paired.num_seeds > 1:
        said += f" (seed by seed {short(min(paired.seed_ratios))} to {short(max(paired.seed_ratios))})"
    return f"{said}; higher in {seeds_of(paired, 1)}"


def span(values: Iterable[float]) -> str:
    kept = list(values)
    return f"{min(kept):.3g} to {max(kept):.3g}"
