"""What a batch-size schedule sees, and what it answers. Plain data: no clock, no random numbers, no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

__all__ = ["JSON", "BatchSchedule", "Decision", "Memory", "Progress", "Signal", "sizes", "smallest"]

JSON: TypeAlias = "bool | int | float | str | list[JSON] | Mapping[str, JSON] | None"
Memory: TypeAlias = Mapping[str, Any]  # JSON, and nothing else


@dataclass(frozen=True)
class Signal:
    """A measured number that schedules may look at, and how sure it is.

    Attributes:
        value: None where it is unknown: measured, but saying nothing. ``note`` then says why.
        standard_error: None where it is not known.
        step, samples: how far training had come when it was measured.
        work: samples whose gradient would have cost as much.
    """

    value: float | None
    standard_error: float | None = None
    step: int = 0
    samples: int = 0
    note: str = ""
    work: float = 0.0

    def __post_init__(self) -> None:
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"a signal is finite or None (unknown), got {self.value}")

    def interval(self, num_standard_errors: float) -> tuple[float, float] | None:
        """``value ± num_standard_errors * standard_error``; a point where no error is known, None where no value is."""
        if self.value is None:
            return None
        width = num_standard_errors * (self.standard_error or 0.0)
        return self.value - width, self.value + width


@dataclass(frozen=True)
class Progress:
    """How far training has come, before the next optimizer step.

    Attributes:
        step: optimizer steps taken.
        samples: samples consumed, over all ranks.
        epoch: passes over the training data, a fraction within one; None where nobody knows how long one is.
        batch_size: the global batch size in use: what was applied, not what was asked for.
        base_batch_size: the one that training began with.
        tokens: tokens consumed, where somebody counts them.
        learning_rate: what the learning-rate schedule says now, divided by what it said at its highest so far.
        signals: by name, the newest of each; none where nothing was measured yet.
    """

    step: int
    samples: int
    epoch: float | None
    batch_size: int
    base_batch_size: int
    tokens: int | None = None
    learning_rate: float | None = None
    signals: Mapping[str, Signal] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """The batch size that a schedule wants, and why.

    Attributes:
        memory: what the schedule wants to be given next time, as JSON.
        restart_optimizer: where this changes the batch size, begin the new one with a fresh optimizer state, as the paper's
            warm start does. It says nothing where the size stays.
    """

    batch_size: int
    reason: str
    memory: Memory = field(default_factory=dict)
    restart_optimizer: bool = False


class BatchSchedule(Protocol):
    """A pure function of progress and memory; a frozen dataclass, as a rule, whose fields are its settings.

    ``initial`` answers for the beginning, with the first memory; each call is given the memory of the answer before. It need
    not be called at every step, and called twice with the same it answers the same. Durations count from the beginning of
    training. One that knows its smallest and largest batch size says so by an attribute ``sizes``, a pair; one that never
    goes back, by ``monotone``; one that looks at dear signals, by ``budget``, which share of training measuring them may
    take. ``testing.check_schedule`` holds it to all of this.

    Attributes:
        signals: names of the signals it looks at, which are then measured, mapped to how often: a duration such as
            ``"1ep"`` or ``"500 steps"``, or None for whenever they cost nothing.
        coupling: the learning-rate rule that belongs to it, or None to go by the optimizer.
    """

    @property
    def signals(self) -> Mapping[str, str | None]: ...
    @property
    def coupling(self) -> str | None: ...
    def initial(self) -> Decision: ...
    def __call__(self, progress: Progress, memory: Memory) -> Decision: ...


def sizes(schedule: BatchSchedule) -> tuple[int, int] | None:
    """The smallest and the largest batch size it may want; None where it does not say."""
    known: tuple[int, int] | None = getattr(schedule, "sizes", None)
    return known


def smallest(schedule: BatchSchedule) -> int | None:
    """The smallest batch size it may want: one below the world size cannot be had. None where it does not say."""
    known = sizes(schedule)
    return None if known is None else known[0]
