"""The conformance suite of batch-size schedules."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from .. import sampling
from ..registry import available_couplings, schedule_factories
from ..schedules import BatchSchedule, Decision, Duration, Progress, Signal, parse_schedule, sizes
from .core import ConformanceReport, NotApplicable, Suite, Verdict, Violation, listed, pickled, shortened, told

__all__ = ["check_schedule"]

_STEPS = 240
_SAMPLES = 1000  # of an epoch
_TOKENS = 8  # of a sample
_MOST_BYTES = 8192  # of its memory: the state of a controller stays below 10 kB
_UNKNOWN = Signal(None, None, note="too noisy to tell")


class _Asked(NamedTuple):
    """One question to a schedule, and its answer."""

    progress: Progress
    memory: Any
    decision: Decision


@dataclass(frozen=True)
class _Script:
    """A training run, as a schedule sees it."""

    name: str
    signals: Callable[[int], Mapping[str, Signal]]
    learning_rate: Callable[[int], float | None]


def check_schedule(schedule: BatchSchedule | str, *, skip: Mapping[str, str] | None = None) -> ConformanceReport:
    """Check that a schedule does what controllers and users rely on; one line in a test of its own::

        from sharpness_plugins.testing import check_schedule

        def test_conformance():
            check_schedule(Ramp(16, 512, until="40ep"))

    It is asked through scripted runs of 240 steps: signals that fall, rise, oscillate, are unknown or come late, with
    learning rates that warm up and decay. Checked are, by these names:

    - ``initial``: a decision to begin with; ``batch_sizes``: whole numbers from 1, and within its ``sizes`` if it has them;
      ``reasons``: a sentence on one line; ``signals``: names with durations; ``coupling``: a known one, or None.
    - ``pure``: asked again the same, it answers the same, whatever it was asked between, under any global seed, and leaves
      progress and memory as they were.
    - ``monotone``: never falls, where it says so by an attribute ``monotone``.
    - ``unknown_signals``: a signal that is unknown moves nothing that no signal at all would not move.
    - ``memory``: JSON of at most 8 kB; ``resume``: from the JSON of its memory and its own pickle, at every step, a run goes
      on as it would have.
    - ``text``: its ``repr`` is read back as an equal schedule; ``pickle``.

    Args:
        schedule: one, or its text.
        skip: names of checks that shall not count, each with the reason.
    Returns:
        what was checked, what did not apply and why; ``print`` it.
    Raises:
        ConformanceError: an AssertionError that lists every violated property, with numbers.
    """
    made = parse_schedule(schedule, schedule_factories()) if isinstance(schedule, str) else schedule
    return _ScheduleSuite(made, skip or {}).run()


class _ScheduleSuite:
    def __init__(self, schedule: BatchSchedule, skip: Mapping[str, str]) -> None:
        if "initial" in skip:
            raise ValueError("the initial decision cannot be left out: all other checks begin with it")
        self._schedule = schedule
        self._suite = Suite(f"schedule {shortened(repr(schedule))}", skip)
        self._runs: dict[str, list[_Asked]] = {}
        self._incomparable = ""

    def run(self) -> ConformanceReport:
        check = self._suite.check
        check("initial", self._initial)
        if self._suite["initial"] is Verdict.VIOLATED:
            return self._suite.finish()
        check("signals", self._signals)
        check("coupling", self._coupling)
        check("pure", self._pure)
        if self._suite["pure"] is Verdict.VIOLATED:
            self._incomparable = "it does not answer the same twice"
        check("batch_sizes", self._batch_sizes)
        check("reasons", self._reasons)
        check("memory", self._memory)
        check("monotone", self._monotone)
        check("unknown_signals", self._unknown_signals)
        check("text", self._text)
        check("pickle", self._pickle)
        check("resume", self._resume)
        return self._suite.finish()

    # --- running it

    def _scripts(self) -> Iterator[_Script]:
        names = self._named_signals()

        def all_of(value: Callable[[int], float | None], error: float, every: int) -> Callable[[int], dict[str, Signal]]:
            def at(step: int) -> dict[str, Signal]:
                measured = step // every * every
                number = value(measured)
                signal = _UNKNOWN if number is None else Signal(number, error)
                return {name: replace(signal, step=measured, samples=measured) for name in names}

            return at

        yield _Script("falling signals", all_of(lambda step: 400 * math.exp(-step / 40), 0.5, 4), _warm_up_and_cosine)
        yield _Script("rising signals", all_of(lambda step: 3.0 + step * step / 20, 2.0, 5), _decay_in_steps)
        yield _Script(
            "signals that oscillate and are unknown now and then",
            all_of(lambda step: None if step % 28 == 0 else 60 + 58 * math.cos(step / 17), 1.0, 4),
            _warm_up_and_cosine,
        )
        yield _Script("signals around zero", all_of(lambda step: math.sin(step), 0.3, 3), lambda step: None)

    def _named_signals(self) -> list[str]:
        try:
            return [name for name in self._schedule.signals if isinstance(name, str)]
        except Exception:  # "signals" tells
            return []

    def _asked(self, script: _Script) -> list[_Asked]:
        if script.name not in self._runs:
            self._runs[script.name] = list(_train(self._schedule, script))
        return self._runs[script.name]

    def _all_asked(self) -> Iterator[tuple[str, _Asked]]:
        for script in self._scripts():
            for asked in self._asked(script):
                yield script.name, asked

    # --- the checks

    def _initial(self) -> str:
        lacks = [name for name in ("signals", "coupling", "initial", "__call__") if not hasattr(self._schedule, name)]
        if lacks or isinstance(self._schedule, type):
            raise Violation("it is a class" if isinstance(self._schedule, type) else f"it has no {', '.join(lacks)}")
        first = self._schedule.initial()
        if not isinstance(first, Decision):
            raise Violation(f"it is a {type(first).__name__}, and not a Decision")
        if self._schedule.initial() != first:
            raise Violation(f"it is {first}, and the second time {self._schedule.initial()}")
        for script in self._scripts():
            for asked in self._asked(script):
                if not isinstance(asked.decision, Decision):
                    raise Violation(f"at step {asked.progress.step} it answered a {type(asked.decision).__name__}")
        return f"{first.batch_size}: {first.reason}"

    def _signals(self) -> str:
        signals = self._schedule.signals
        if not isinstance(signals, Mapping):
            raise Violation(f"they are a {type(signals).__name__}, and not a mapping from names to durations")
        for name, every in signals.items():
            if not isinstance(name, str) or not name.strip():
                raise Violation(f"{name!r} is no name")
            if every is not None and not (isinstance(every, str) and Duration.parse(every).amount):
                raise Violation(f"{name!r} is to be measured every {every!r}, which is no duration as text")
        budget = getattr(self._schedule, "budget", None)
        if budget is not None and not 0 < budget <= 1:
            raise Violation(f"its budget is {budget!r}, and not a share of the training time")
        return listed(signals)

    def _coupling(self) -> str:
        coupling = self._schedule.coupling
        known = available_couplings()
        if coupling is not None and coupling not in known:
            raise Violation(f"{coupling!r} is none of {', '.join(known)}")
        return str(coupling)

    def _pure(self) -> None:
        for script in self._scripts():
            restore = sampling.rng_states(torch.device("cpu"))
            try:
                sampling.seed_global(1)
                for number, asked in enumerate(self._asked(script)):
                    if number % 3 == 0:  # what is asked between must not matter
                        self._schedule.initial()
                    before = pickle.dumps((asked.progress, asked.memory))
                    again = self._schedule(asked.progress, asked.memory)
                    if again != asked.decision:
                        raise Violation(
                            f"with {script.name}, at step {asked.progress.step} it answered {_shown(asked.decision)}, and "
                            f"asked again {_shown(again)}"
                        )
                    if pickle.dumps((asked.progress, asked.memory)) != before:
                        raise Violation(f"with {script.name}, at step {asked.progress.step} it wrote to what it was given")
            finally:
                restore()

    def _batch_sizes(self) -> str:
        bounds = sizes(self._schedule)
        if bounds is not None and not (
            isinstance(bounds, tuple) and len(bounds) == 2 and all(map(_is_size, bounds)) and bounds[0] <= bounds[1]
        ):
            raise Violation(f"its sizes are {bounds!r}, and not a pair of a smallest and a largest batch size")
        seen: set[int] = set()
        first = _Asked(_progress(0, 0, 1, 1, 1.0, {}), None, self._schedule.initial())
        for name, asked in [("no script", first), *self._all_asked()]:
            size, where = asked.decision.batch_size, f"with {name}, at step {asked.progress.step}"
            if not _is_size(size):
                raise Violation(f"{where} it asks for {size!r}, and not for a whole number of samples from 1")
            if bounds is not None and not bounds[0] <= size <= bounds[1]:
                raise Violation(f"{where} it asks for {size}, and its sizes are {bounds[0]} to {bounds[1]}")
            seen.add(size)
        return f"{min(seen)} to {max(seen)}, {len(seen)} different ones" + ("" if bounds else "; no sizes are stated")

    def _reasons(self) -> None:
        for name, asked in self._all_asked():
            reason = asked.decision.reason
            if not isinstance(reason, str) or not reason.strip() or "\n" in reason:
                raise Violation(
                    f"with {name}, at step {asked.progress.step} its reason is {reason!r}, and not a line of text"
                )

    def _memory(self) -> str:
        most = 0
        for name, asked in self._all_asked():
            where = f"with {name}, at step {asked.progress.step}"
            try:
                text = json.dumps(asked.decision.memory, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise Violation(f"{where} its memory is no JSON: {told(error)}") from error
            if not isinstance(asked.decision.memory, Mapping):
                raise Violation(f"{where} its memory is a {type(asked.decision.memory).__name__}, and not a mapping")
            most = max(most, len(text.encode()))
            if most > _MOST_BYTES:
                raise Violation(
                    f"{where} its memory takes {most} bytes, and the state of a controller has room for {_MOST_BYTES}"
                )
        return f"{most} bytes at most"

    def _monotone(self) -> None:
        if not getattr(self._schedule, "monotone", False):
            raise NotApplicable("it does not say so")
        for script in self._scripts():
            before = self._schedule.initial().batch_size
            for asked in self._asked(script):
                size = asked.decision.batch_size
                if size < before:
                    raise Violation(f"with {script.name}, at step {asked.progress.step} it falls from {before} to {size}")
                before = size

    def _unknown_signals(self) -> None:
        names = self._named_signals()
        if not names:
            raise NotApplicable("it looks at none")
        self._stop_if_incomparable()

        def nothing(step: int) -> dict[str, Signal]:
            return {}

        def unknown(step: int) -> dict[str, Signal]:
            return {name: replace(_UNKNOWN, step=step, samples=step) for name in names}

        without = list(_train(self._schedule, _Script("no signals", nothing, _warm_up_and_cosine)))
        with_unknown = list(_train(self._schedule, _Script("unknown signals", unknown, _warm_up_and_cosine)))
        for one, other in zip(without, with_unknown, strict=True):
            if one.decision.batch_size != other.decision.batch_size:
                raise Violation(
                    f"at step {one.progress.step} it asks for {other.decision.batch_size} where every signal is unknown "
                    f"({other.decision.reason}), and for {one.decision.batch_size} where none was measured"
                )

    def _resume(self) -> None:
        if Verdict.VIOLATED in (self._suite["memory"], self._suite["pickle"]):
            raise NotApplicable("its memory or itself is not what a checkpoint can hold")
        self._stop_if_incomparable()
        for script in self._scripts():
            resumed = list(_train(self._schedule, script, resumed=True))
            for one, other in zip(self._asked(script), resumed, strict=True):
                if one.decision.batch_size != other.decision.batch_size or one.decision.reason != other.decision.reason:
                    raise Violation(
                        f"with {script.name}, resumed before every step, at step {one.progress.step} it answered "
                        f"{_shown(other.decision)}, and {_shown(one.decision)} in the run that went on"
                    )

    def _text(self) -> None:
        text, kind = repr(self._schedule), type(self._schedule)
        known: dict[str, Callable[..., BatchSchedule]] = {**schedule_factories(), kind.__name__: kind}
        try:
            again = parse_schedule(text, known)
        except (TypeError, ValueError) as error:
            raise Violation(f"{shortened(text)} cannot be read: {told(error)}") from error
        if again != self._schedule:
            raise Violation(f"{shortened(text)} reads as {shortened(repr(again))}")

    def _pickle(self) -> None:
        again = pickled(self._schedule)
        if again != self._schedule:
            raise Violation(f"{shortened(repr(self._schedule))} came back as {shortened(repr(again))}")

    def _stop_if_incomparable(self) -> None:
        if self._incomparable:
            raise NotApplicable(self._incomparable)


def _train(schedule: BatchSchedule, script: _Script, *, resumed: bool = False) -> Iterator[_Asked]:
    """The questions of a run, and the answers; ``resumed`` by a new process before every one of them.

    Raises:
        Violation: it raises in the middle of training.
    """
    first = schedule.initial()
    size, memory, samples = first.batch_size, first.memory, 0
    base, peak = size, 0.0
    for step in range(_STEPS):
        rate = script.learning_rate(step)
        peak = max(peak, rate or 0.0)
        relative = None if rate is None else rate / peak if peak else 0.0
        progress = _progress(step, samples, size, base, relative, script.signals(step))
        if resumed:
            schedule, memory = pickle.loads(pickle.dumps(schedule)), json.loads(json.dumps(memory))
        try:
            decision = schedule(progress, copy.deepcopy(memory))  # what it does to its own is for "pure" to find
        except Exception as error:
            raise Violation(f"with {script.name}, at step {step} it raised {told(error)}") from error
        yield _Asked(progress, memory, decision)
        if type(decision) is not Decision:
            return
        memory = decision.memory
        if _is_size(decision.batch_size):
            size = decision.batch_size
        samples += size


def _progress(step: int, samples: int, size: int, base: int, rate: float | None, signals: Mapping[str, Signal]) -> Progress:
    return Progress(
        step=step,
        samples=samples,
        epoch=samples / _SAMPLES,
        batch_size=size,
        base_batch_size=base,
        tokens=_TOKENS * samples,
        learning_rate=rate,
        signals=signals,
    )


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 1


def _shown(decision: Decision) -> str:
    return f"{decision.batch_size} ({decision.reason})"


def _warm_up_and_cosine(step: int) -> float:
    return (step + 1) / 20 if step < 20 else 0.5 * (1 + math.cos(math.pi * (step - 20) / 190))


def _decay_in_steps(step: int) -> float:
    return 10.0 ** -(step // 80)
