"""Schedules made of schedules. Each part keeps a memory of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

from .checks import is_schedule, make_whole
from .core import BatchSchedule, Decision, Memory, Progress, sizes
from .durations import Duration

__all__ = ["Cap", "Hold", "Max", "Min", "Monotone", "Then"]


def _merged_signals(owner: str, schedules: Sequence[BatchSchedule]) -> dict[str, str | None]:
    """What any of them looks at, as often as the most impatient wants it."""
    merged: dict[str, str | None] = {}
    for schedule in schedules:
        for signal, every in schedule.signals.items():
            other = merged.get(signal)
            if every is not None and other is not None:
                one, two = Duration.parse(every), Duration.parse(other)
                if one.unit != two.unit:
                    raise ValueError(
                        f"{owner} would measure {signal!r} every {other!r} and every {every!r}, and cannot tell which comes "
                        "first: use one unit"
                    )
                every = every if one.amount < two.amount else other
            merged[signal] = other if every is None else every
    return merged


def _merged_coupling(owner: str, schedules: Sequence[BatchSchedule]) -> str | None:
    rules = {schedule.coupling for schedule in schedules} - {None}
    if len(rules) > 1:
        raise ValueError(
            f"{owner} combines schedules that want different learning-rate rules, {' and '.join(sorted(map(repr, rules)))}: "
            "one run has one rule"
        )
    return next(iter(rules), None)


def _merged_sizes(schedules: Sequence[BatchSchedule]) -> tuple[list[int], list[int]] | None:
    """Smallest and largest of each; None where one does not say."""
    known = [sizes(schedule) for schedule in schedules]
    if None in known:
        return None
    return [pair[0] for pair in known if pair], [pair[1] for pair in known if pair]


def _merged_budget(schedules: Sequence[BatchSchedule]) -> float | None:
    """The tightest."""
    budgets = [getattr(schedule, "budget", None) for schedule in schedules]
    return min((budget for budget in budgets if budget is not None), default=None)


@dataclass(frozen=True)
class Then:
    """``first``, and from ``until`` on ``second``, for good. Durations in both count from the beginning of training."""

    first: BatchSchedule
    until: str
    second: BatchSchedule

    name: ClassVar[str] = "then"

    def __post_init__(self) -> None:
        is_schedule("Then", self.first)
        is_schedule("Then", self.second)
        if not self._until.amount:
            raise ValueError(f"until={self.until!r} has no length: the first schedule would never be used")
        _ = self.signals, self.coupling

    @cached_property
    def _until(self) -> Duration:
        return Duration.parse(self.until)

    @property
    def signals(self) -> Mapping[str, str | None]:
        return _merged_signals("Then", (self.first, self.second))

    @property
    def coupling(self) -> str | None:
        return _merged_coupling("Then", (self.first, self.second))

    @property
    def budget(self) -> float | None:
        return _merged_budget((self.first, self.second))

    @property
    def sizes(self) -> tuple[int, int] | None:
        known = _merged_sizes((self.first, self.second))
        return known and (min(known[0]), max(known[1]))

    def initial(self) -> Decision:
        decision = self.first.initial()
        return replace(decision, memory={"first": decision.memory, "second": None})

    def __call__(self, progress: Progress, memory: Memory) -> Decision:
        if memory["second"] is None and not self._until.reached(progress):
            decision = self.first(progress, memory["first"])
            return replace(decision, memory={"first": decision.memory, "second": None})
        begun = self.second.initial().memory if memory["second"] is None else memory["second"]
        decision = self.second(progress, begun)
        reason = f"after {self._until}: {decision.reason}"
        return replace(decision, reason=reason, memory={"first": None, "second": decision.memory})


@dataclass(frozen=True, init=False, repr=False)
class _Choice(ABC):
    """One of several decisions at a time; of equals, the first."""

    schedules: tuple[BatchSchedule, ...]

    def __init__(self, *schedules: BatchSchedule) -> None:
        object.__setattr__(self, "schedules", tuple(is_schedule(self._owner, schedule) for schedule in schedules))
        if len(schedules) < 2:
            raise ValueError(f"{self._owner} chooses between two schedules or more, got {self!r}")
        _ = self.signals, self.coupling

    @staticmethod
    @abstractmethod
    def _choose(batch_sizes: Sequence[int]) -> int: ...

    @property
    def _owner(self) -> str:
        return type(self).__name__

    @property
    def signals(self) -> Mapping[str, str | None]:
        return _merged_signals(self._owner, self.schedules)

    @property
    def coupling(self) -> str | None:
        return _merged_coupling(self._owner, self.schedules)

    @property
    def budget(self) -> float | None:
        return _merged_budget(self.schedules)

    @property
    def sizes(self) -> tuple[int, int] | None:
        known = _merged_sizes(self.schedules)
        return known and (self._choose(known[0]), self._choose(known[1]))

    def initial(self) -> Decision:
        return self._chosen([schedule.initial() for schedule in self.schedules])

    def __call__(self, progress: Progress, memory: Memory) -> Decision:
        pairs = zip(self.schedules, memory["schedules"], strict=True)
        return self._chosen([schedule(progress, own) for schedule, own in pairs])

    def _chosen(self, decisions: Sequence[Decision]) -> Decision:
        wanted = [decision.batch_size for decision in decisions]
        chosen = decisions[wanted.index(self._choose(wanted))]
        reason = f"{chosen.reason} ({self._owner} of {', '.join(map(str, wanted))})"
        return replace(chosen, reason=reason, memory={"schedules": [decision.memory for decision in decisions]})

    def __repr__(self) -> str:
        return f"{self._owner}({', '.join(map(repr, self.schedules))})"


class Max(_Choice):
    """The largest batch size that any of the schedules wants."""

    name: ClassVar[str] = "max"

    @staticmethod
    def _choose(batch_sizes: Sequence[int]) -> int:
        return max(batch_sizes)


class Min(_Choice):
    """The smallest batch size that any of the schedules wants."""

    name: ClassVar[str] = "min"

    @staticmethod
    def _choose(batch_sizes: Sequence[int]) -> int:
        return min(batch_sizes)


class _Wrapper:
    """What one schedule around another passes on."""

    schedule: BatchSchedule

    @property
    def signals(self) -> Mapping[str, str | None]:
        return self.schedule.signals

    @property
    def coupling(self) -> str | None:
        return self.schedule.coupling

    @property
    def budget(self) -> float | None:
        return _merged_budget((self.schedule,))


@dataclass(frozen=True)
class Cap(_Wrapper):
    """``schedule``, but never more than ``limit``."""

    schedule: BatchSchedule
    limit: int

    name: ClassVar[str] = "cap"

    def __post_init__(self) -> None:
        is_schedule("Cap", self.schedule)
        make_whole(self, "limit")

    @property
    def sizes(self) -> tuple[int, int] | None:
        known = sizes(self.schedule)
        return known and (min(known[0], self.limit), min(known[1], self.limit))

    def initial(self) -> Decision:
        return self._capped(self.schedule.initial())

    def __call__(self, progress: Progress, memory: Memory) -> Decision:
        return self._capped(self.schedule(progress, memory))

    def _capped(self, decision: Decision) -> Decision:
        if decision.batch_size <= self.limit:
            return decision
        return replace(decision, batch_size=self.limit, reason=f"{decision.reason}, capped at {self.limit}")


@dataclass(frozen=True)
class Hold(_Wrapper):
    """``schedule``, but each batch size lasts at least ``min_steps`` optimizer steps: a change within them waits."""

    schedule: BatchSchedule
    min_steps: int

    name: ClassVar[str] = "hold"

    def __post_init__(self) -> None:
        is_schedule("Hold", self.schedule)
        make_whole(self, "min_steps")

    @property
    def sizes(self) -> tuple[int, int] | None:
        return sizes(self.schedule)

    def initial(self) -> Decision:
        decision = self.schedule.initial()
        return replace(decision, memory=self._memory(decision.memory, decision.batch_size, None))

    def __call__(self, progress: Progress, memory: Memory) -> Decision:
        held = memory["batch_size"]
        since = progress.step if memory["since"] is None else memory["since"]  # None: the first call
        decision = self.schedule(progress, memory["schedule"])
        if decision.batch_size == held:
            return replace(decision, memory=self._memory(decision.memory, held, since))
        if progress.step - since < self.min_steps:
            reason = f"{held} kept: fewer than {self.min_steps} steps at it; then {decision.reason}"
            return Decision(held, reason, self._memory(decision.memory, held, since))
        return replace(decision, memory=self._memory(decision.memory, decision.batch_size, progress.step))

    @staticmethod
    def _memory(own: Memory, batch_size: int, since: int | None) -> Memory:
        return {"schedule": own, "batch_size": batch_size, "since": since}


@dataclass(frozen=True)
class Monotone(_Wrapper):
    """``schedule``, but never less than it has been."""

    schedule: BatchSchedule

    name: ClassVar[str] = "monotone"
    monotone: ClassVar[bool] = True

    def __post_init__(self) -> None:
        is_schedule("Monotone", self.schedule)

    @property
    def sizes(self) -> tuple[int, int] | None:
        return sizes(self.schedule)

    def initial(self) -> Decision:
        decision = self.schedule.initial()
        return replace(decision, memory={"schedule": decision.memory, "batch_size": decision.batch_size})

    def __call__(self, progress: Progress, memory: Memory) -> Decision:
        held, decision = memory["batch_size"], self.schedule(progress, memory["schedule"])
        size = max(held, decision.batch_size)
        own = {"schedule": decision.memory, "batch_size": size}
        if size > decision.batch_size:
            return Decision(size, f"{size} kept, it never falls: {decision.reason}", own)
        return replace(decision, memory=own)
