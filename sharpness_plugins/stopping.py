"""Stopping a measurement in the middle: by Ctrl-C, or by the clock."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar, Token
from types import FrameType
from typing import Any

from .errors import LostRankError, MeasurementStopped

__all__ = ["ON_INTERRUPT", "Overdue", "StopSwitch", "check", "evaluating", "is_stopped"]

ON_INTERRUPT = ("return", "raise")

# why it is to stop, as numbers that ranks can exchange, with the limit that was reached
_NOTHING = (0.0, 0.0)
_CTRL_C, _LIMIT, _METRIC_LIMIT = 1.0, 2.0, 3.0

_TWICE_WITHIN = 2.0  # seconds: a second Ctrl-C so soon stops the script, also where the next measurement has begun
_GRACE = 1.0  # seconds past a limit: what has not evaluated anything by then is taken to hang
_LONGEST_BATCH = 60.0  # seconds without the end of a batch, past a limit: then an evaluation is taken to hang

_CURRENT: ContextVar[StopSwitch | None] = ContextVar("stop_switch", default=None)
_last_interrupt = -math.inf


class Overdue(KeyboardInterrupt):
    """Raised into a metric that hangs past a limit. As with Ctrl-C, only what puts things back may hold it up."""


class StopSwitch:
    """Whether a measurement is to stop, asked at the beginning of every evaluation and after every batch.

    Ctrl-C is taken over while it is entered: the first one asks to stop, the second one is ``KeyboardInterrupt`` at once,
    as is one before the first metric, when there is nothing to return yet.
    Only in the main thread, and only where nobody else handles the signal; otherwise, and with "raise", it is what it was.

    A metric that hangs between evaluations, past a limit, is interrupted by an alarm, on the main thread of a POSIX system,
    where nobody else uses SIGALRM; one that hangs inside of C code cannot be.

    Args:
        time_limit: seconds from now on; None for no limit.
        metric_time_limit: seconds for each metric.
        on_interrupt: one of ``ON_INTERRUPT``.
        shared: several ranks measure together, and end in the same evaluation: what counts then is what all of them have
            heard of each other (``says``, ``hear``), Ctrl-C of any and the clock of the first. There is no alarm, which
            would reach them at different moments.
    Attributes:
        raised: why the current metric was stopped, as the end of "stopped ..."; empty where it was not.
    """

    def __init__(
        self,
        *,
        time_limit: float | None = None,
        metric_time_limit: float | None = None,
        on_interrupt: str = "return",
        shared: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if on_interrupt not in ON_INTERRUPT:
            raise ValueError(f"on_interrupt must be one of {ON_INTERRUPT}, got {on_interrupt!r}")
        for name, limit in (("time_limit", time_limit), ("metric_time_limit", metric_time_limit)):
            if limit is not None and not 0 < limit < math.inf:
                raise ValueError(f"{name} must be a positive number of seconds, or None, got {limit!r}")
        self._shared, self._heard = shared, _NOTHING
        self._takes_over = on_interrupt == "return"
        self._may_alarm = not shared and (time_limit is not None or metric_time_limit is not None)
        self._limit, self._metric_limit, self._clock = time_limit, metric_time_limit, clock
        self._end = math.inf if time_limit is None else clock() + time_limit
        self._metric_end = math.inf
        self._interrupted = False
        self._overdue = False
        self._in_metric = self._has_begun = False
        self._has_alarm = False
        self._depth = 0  # of evaluations
        self._beat = clock()
        self._undo: list[Callable[[], object]] = []
        self._outer: StopSwitch | None = None
        self._token: Token[StopSwitch | None] | None = None
        self.raised = ""

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C was pressed, here or on another rank."""
        return self._interrupted or self._heard[0] == _CTRL_C

    @property
    def reason(self) -> str:
        """Why the whole measurement is to stop, as the end of "stopped ..."; empty where it is not."""
        code, limit = self._stands
        return "" if code == _METRIC_LIMIT else _told(code, limit)

    def says(self) -> tuple[float, float]:
        """Why it is to stop for all that this process knows, as numbers for ``hear``."""
        if self._interrupted:
            return _CTRL_C, 0.0
        now = self._clock()
        if self._limit is not None and now >= self._end:
            return _LIMIT, self._limit
        if self._metric_limit is not None and self._in_metric and now >= self._metric_end:
            return _METRIC_LIMIT, self._metric_limit
        return _NOTHING

    def hear(self, said: Sequence[Sequence[float]]) -> None:
        """What all ranks say, the same on all of them."""
        pressed = [one for one in said if one[0] == _CTRL_C]
        code, limit = (pressed or said)[0]
        self._heard = code, limit

    @property
    def _stands(self) -> tuple[float, float]:
        return self._heard if self._shared else self.says()

    @property
    def _reason_now(self) -> str:
        return _told(*self._stands) if self._in_metric else ""

    def check(self) -> None:
        """Raises MeasurementStopped where the measurement, or the metric, is to stop."""
        self._beat = self._clock()
        if self._outer is not None:
            self._outer.check()
        if reason := self._reason_now:
            self.raised = reason
            raise MeasurementStopped(f"stopped {reason}")

    @contextlib.contextmanager
    def metric(self) -> Iterator[None]:
        """One metric; what hangs in it past a limit raises ``Overdue``."""
        now = self._clock()
        self.raised, self._overdue = "", False
        self._heard = _NOTHING if self._heard[0] == _METRIC_LIMIT else self._heard  # that was the last metric's
        self._metric_end = math.inf if self._metric_limit is None else now + self._metric_limit
        self._beat = now
        self._set_alarm(min(self._end, self._metric_end) - now + _GRACE)
        self._in_metric = self._has_begun = True
        try:
            yield
        finally:
            self._in_metric = False
            self._set_alarm(math.inf)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """An evaluation: what it raises after Ctrl-C (whose workers are stopped by the same key) is that stop."""
        self.check()
        self._depth += 1
        try:
            yield
        except LostRankError:  # one that left by Ctrl-C, say; nothing can be measured any more
            raise
        except Exception:
            if self._stands[0] == _CTRL_C:
                self.check()
            raise
        finally:
            self._depth -= 1

    # ------------------------------------------------------------------ signals

    def __enter__(self) -> StopSwitch:
        self._outer = _CURRENT.get()
        self._token = _CURRENT.set(self)
        if threading.current_thread() is threading.main_thread():
            if self._takes_over and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                self._handle(signal.SIGINT, self._on_interrupt)
            if self._may_alarm and hasattr(signal, "setitimer") and signal.getsignal(signal.SIGALRM) is signal.SIG_DFL:
                self._handle(signal.SIGALRM, self._on_alarm)
                self._has_alarm = True
        return self

    def __exit__(self, *error: object) -> None:
        while self._undo:
            self._undo.pop()()
        if self._token is not None:
            _CURRENT.reset(self._token)

    def _handle(self, number: int, handler: Callable[[int, FrameType | None], Any]) -> None:
        before = signal.signal(number, handler)

        def undo() -> None:
            if signal.getsignal(number) == handler:  # else somebody has taken over meanwhile
                signal.signal(number, before)

        self._undo.append(undo)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        global _last_interrupt
        now = time.monotonic()
        again = self._interrupted or not self._has_begun or now - _last_interrupt < _TWICE_WITHIN
        self._interrupted, _last_interrupt = True, now
        if again:
            raise KeyboardInterrupt

    def _set_alarm(self, seconds: float) -> None:
        if self._has_alarm and signal.getsignal(signal.SIGALRM) == self._on_alarm:
            seconds = max(seconds, 1e-3) if seconds < math.inf else 0.0
            signal.setitimer(signal.ITIMER_REAL, seconds, _GRACE if seconds else 0.0)

    def _on_alarm(self, number: int, frame: FrameType | None) -> None:
        hangs = self._depth == 0 or self._clock() - self._beat > _LONGEST_BATCH
        if self._in_metric and hangs and (reason := self._reason_now) and not self._overdue:
            self._overdue, self.raised = True, reason
            raise Overdue(f"stopped {reason}")


def _told(code: float, limit: float) -> str:
    """As the end of "stopped ..."."""
    if code == _CTRL_C:
        return "by Ctrl-C"
    if code == _LIMIT:
        return f"at the time limit of {limit:g} s"
    return f"at the time limit of {limit:g} s for a metric" if code == _METRIC_LIMIT else ""


def check() -> None:
    """Raises MeasurementStopped where the measurement around is to stop."""
    switch = _CURRENT.get()
    if switch is not None:
        switch.check()


def is_stopped() -> bool:
    """Whether the metric in hand was stopped: what it makes now is not the whole of it."""
    switch = _CURRENT.get()
    return switch is not None and bool(switch.raised)


@contextlib.contextmanager
def evaluating() -> Iterator[None]:
    """Around one evaluation of an objective; nothing outside of a measurement."""
    switch = _CURRENT.get()
    with contextlib.nullcontext() if switch is None else switch.evaluating():
        yield
