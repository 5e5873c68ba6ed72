"""Schedules that look only at how far training has come. They keep no memory: every answer follows from the progress."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from types import MappingProxyType
from typing import Any, ClassVar

from .checks import at_least, make_whole, whole
from .core import Decision, Memory, Progress
from .durations import Duration

__all__ = ["Double", "Fixed", "Steps", "WarmStart"]


_NO_SIGNALS: Mapping[str, str | None] = MappingProxyType({})


@dataclass(frozen=True)
class Fixed:
    """One batch size throughout."""

    batch_size: int

    name: ClassVar[str] = "fixed"
    signals: ClassVar[Mapping[str, str | None]] = _NO_SIGNALS
    coupling: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        make_whole(self, "batch_size")

    @property
    def sizes(self) -> tuple[int, int]:
        return self.batch_size, self.batch_size

    def initial(self) -> Decision:
        return Decision(self.batch_size, f"{self.batch_size} throughout")

    def __call__(self, progress: Progress, memory: Memory) -> Decision:
        return self.initial()


_STEP = re.compile(r"(?P<threshold>[^:,]*):\s*(?P<size>[^\s:,]*)[\s,]*")


@dataclass(frozen=True)
class Steps:
    """A batch size from each threshold on: ``Steps("0:256 40ep:5000")``.

    Args:
        steps: ``threshold:size`` pairs, or a sequence of such pairs. Thresholds are durations since the beginning, in one
            unit (a bare number counts samples), strictly rising from 0. Sizes may fall.
    Raises:
        ValueError: a threshold or a size cannot be read, or the thresholds do not rise from 0; with the text at fault.
    """

    steps: str | Sequence[tuple[str | float | Duration, int]]

    name: ClassVar[str] = "steps"
    signals: ClassVar[Mapping[str, str | None]] = _NO_SIGNALS
    coupling: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        if not isinstance(self.steps, str):
            pairs: Any = self.steps
            if not isinstance(pairs, Sequence) or any(not isinstance(one, (list, tuple)) or len(one) != 2 for one in pairs):
                raise TypeError(f"steps are text such as '0:256 40ep:5000', or (threshold, size) pairs; got {self.steps!r}")
            # durations as text, so that the repr can be read back
            plain = tuple(
                (str(at) if isinstance(at, Duration) else at, whole("a batch size in steps", n)) for at, n in pairs
            )
            object.__setattr__(self, "steps", plain)
        table, text = self.table, self.steps
        if not table:
            raise ValueError(f"steps {text!r} are empty: write '0:256 40ep:5000'")
        if table[0][0].amount != 0:
            raise ValueError(
                f"steps {text!r} begin at {table[0][0]}, which leaves the batch size before it open: begin with '0:size'"
            )
        for (before, _), (after, _) in pairwise(table):
            if before.amount and before.unit != after.unit:
                raise ValueError(f"steps {text!r} mix units ({before}, {after}), so their order is not known: use one")
            if after.amount <= before.amount:
                raise ValueError(f"steps {text!r} must have rising thresholds, but {after} follows {before}")

    @cached_property
    def table(self) -> tuple[tuple[Duration, int], ...]:
        """The thresholds and their sizes."""
        pairs = self._split(self.steps) if isinstance(self.steps, str) else self.steps
        return tuple((Duration.parse(threshold), whole("a batch size in steps", size)) for threshold, size in pairs)

    @staticmethod
    def _split(text: str) -> list[tuple[str, int]]:
        pairs, end = [], 0
        while end < len(text.rstrip()):
            match = _STEP.match(text, end)
            if match is None:
                raise ValueError(f"steps {text!r}: {text[end:].strip()!r} is not 'threshold:size', such as '40ep:5000'")
            if not (match["size"].isascii() and match["size"].isdigit()):
                raise ValueError(f"steps {text!r}: the batch size {match['size']!r} is not a whole number")
            pairs.append((match["threshold"], int(match["size"])))
            end = match.end()
        return pairs

    @property
    def sizes(self) -> tuple[int, int]:
        sizes = [size for _, size in self.table]
        return min(sizes), max(sizes)

    def initial(self) -> Decision:
        return self._decision(0)

    def __call__(self, progress: Progress, memory: Memory) -> Decision:
        # all thresholds but the first 0 are in one unit, so tokens are asked for only where they are meant
        return self._decision(sum(threshold.reached(progress) for threshold, _ in self.table[1:]))

    def _decision(self, phase: int) -> Decision:
        threshold, size = self.table[phase]
        if phase:
            return Decision(size, f"{threshold} reached: {self.table[phase - 1][1]} -> {size}")
        until = f"until {self.table[1][0]}" if len(self.table) > 1 else "throughout"
        return Decision(size, f"{size} {until}")


@dataclass(frozen=True)
class WarmStart:
    """Small batches first, large ones after ``at``: the paper's warm start, section 4 of arXiv 1609.04836.

    Args:
        at: a duration; 0 trains with large batches from the beginning, the paper's comparison.
        restart_optimizer: whether the large-batch phase is a new training that begins from the weights, with a fresh
            optimizer state and the learning rate as it was, as in the paper; else one training whose batch size changes,
            with the learning-rate rule that belongs to the optimizer.
    """

    small_batch: int
    large_batch: int
    at: str
    restart_optimizer: bool = True

    name: ClassVar[str] = "warm_start"
    signals: ClassVar[Mapping[str, str | None]] = _NO_SIGNALS

    def __post_init__(self) -> None:
        make_whole(self, "small_batch", "large_batch")
        if self.large_batch <= self.small_batch:
            raise ValueError(
                f"large_batch={self.large_batch} is not above small_batch={self.small_batch}: use Steps to go down"
            )
        _ = self._at

    @cached_property
    def _at(self) -> Duration:
        return Duration.parse(self.at)

    @property
    def coupling(self) -> str | None:
        return "none" if self.restart_optimizer else None

    @property
    def sizes(self) -> tuple[int, int]:
        return (self.small_batch if self._at.amount else self.large_batch), self.large_batch

    def initial(self) -> Decision:
        if not self._at.amount:
            return Decision(self.large_batch, f"{self.large_batch} throughout: a warm start of no length")
        return Decision(self.small_batch, f"warm start with {self.small_batch} until {self._at}")

    def __call__(self, progress: Progress, memory: Memory) -> Decision:
        if not self._at.amount or not self._at.reached(progress):
            return self.initial()
        reason = f"{self._at} reached: {self.small_batch} -> {self.large_batch}"
        return Decision(self.large_batch, reason, restart_optimizer=self.restart_optimizer)


@dataclass(frozen=True)
class Double:
    """``batch_size * factor**n`` after ``n`` times ``every``, up to ``cap``, as AdaBatch has it (arXiv 1712.02029)."""

    batch_size: int
    every: str
    cap: int
    factor: int = 2

    name: ClassVar[str] = "double"
    signals: ClassVar[Mapping[str, str | None]] = _NO_SIGNALS
    coupling: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        make_whole(self, "batch_size", "cap")
        make_whole(self, "factor", least=2)
        at_least("cap", self.cap, self.batch_size, "batch_size")
        if not self._every.amount:
            raise ValueError(f"every={self.every!r} has no length: the batch size would be at its cap at once")

    @cached_property
    def _every(self) -> Duration:
        return Duration.parse(self.every)

    @property
    def sizes(self) -> tuple[int, int]:
        return self.batch_size, self.cap

    def initial(self) -> Decision:
        return self._decision(0)

    def __call__(self, progress: Progress, memory: Memory) -> Decision:
        return self._decision(self._every.elapsed(progress))

    def _decision(self, times: int) -> Decision:
        size, grown = self.batch_size, 0
        while grown < times and size < self.cap:
            size, grown = min(size * self.factor, self.cap), grown + 1
        if not grown:
            return Decision(size, f"{size} for the first {self._every}")
        before = self.batch_size * self.factor ** (grown - 1)
        capped = ", the cap" if size == self.cap else ""
        return Decision(size, f"{self._every} passed {grown} times: {before} -> {size}{capped}")
