"""From small to large batches when a metric of sharpness, or any other signal, says so."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any, ClassVar

from ..texts import name_and_settings
from .checks import growth, make_whole
from .core import Decision, Memory, Progress, Signal
from .durations import Duration

__all__ = ["SharpnessSwitch"]

# the default log-ratio of each rule: what counts as moving, and what counts as low
_THRESHOLDS = {"plateau": 0.1, "halved": math.log(2), "below_peak": math.log(2)}

_ROUNDING = 1e-12  # of a difference of logarithms: a half is a half


@dataclass(frozen=True)
class SharpnessSwitch:
    """``small_batch`` until a signal fires, or until the deadline; then ``large_batch``.

    Signals are compared as the median of the last ``window`` measurements, on a logarithmic scale. The rules:

    - "plateau": it moved by more than ``threshold`` from one window to the next, and now it does not. What never moved is
      no plateau.
    - "halved": it fell by ``threshold`` (a half) below what it was at the last change: the batch is multiplied by
      ``factor``, up to ``large_batch``, and again when it falls as far again; also where nothing changed for ``patience``.
      With ``window=1`` and ``patience="10ep"`` this is ABSA (arXiv 1810.01021).
    - "below_peak": it fell by ``threshold`` (a half) below the highest window.

    No rule fires on an interval of ``num_standard_errors`` about a measurement that spans its threshold; the interval of a
    window is that of the medians of both ends, so its true median lies within it if each measured value does. Triggers are
    not universal: on small digits with clean labels half of the peak was reached at epoch 10, with noisy ones never, and
    the plateau at 52 and at 16. Hence the deadline.

    Args:
        metric: a registered metric or signal; settings after a colon, as in ``"hessian_topk:k=1,tolerance=0.1"``.
        deadline: a duration, after which the batch is large whatever was measured.
        min_wait: a duration before the first change, and between changes.
        threshold: a log-ratio above 0; None for 0.1 ("plateau") or log 2.
        every: how often to measure, a duration.
        budget: the largest share of the training time that measuring may take; it is kept by measuring less often.
    """

    small_batch: int
    large_batch: int
    metric: str = "hessian_topk"
    rule: str = "plateau"
    _: KW_ONLY
    deadline: str
    min_wait: str = "1ep"
    window: int = 3
    threshold: float | None = None
    every: str = "1ep"
    budget: float = 0.05
    num_standard_errors: float = 2.0
    factor: int = 2
    patience: str | None = None

    name: ClassVar[str] = "sharpness_switch"
    coupling: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        make_whole(self, "small_batch", "large_batch", "window")
        make_whole(self, "factor", least=2)
        if self.large_batch <= self.small_batch:
            raise ValueError(
                f"large_batch={self.large_batch} is not above small_batch={self.small_batch}: there is no switch"
            )
        if not isinstance(self.metric, str) or len(name_and_settings(self.metric)[0].split()) != 1:
            raise ValueError(f"metric {self.metric!r} is not a name: write 'hessian_topk' or 'hessian_topk:k=1'")
        if self.rule not in _THRESHOLDS:
            raise ValueError(f"rule must be one of {', '.join(map(repr, _THRESHOLDS))}, got {self.rule!r}")
        if self.rule != "halved" and (self.factor != 2 or self.patience is not None):
            raise ValueError(f"factor and patience belong to the rule 'halved', but the rule is {self.rule!r}")
        if self.threshold is not None:
            growth("threshold", self.threshold, above=0.0)
        if self.num_standard_errors != 0:
            growth("num_standard_errors", self.num_standard_errors, above=0.0)
        if growth("budget", self.budget, above=0.0) > 1:
            raise ValueError(f"budget={self.budget!r} is a share of the training time: at most 1")
        for setting in ("deadline", "every", "patience"):
            if (text := getattr(self, setting)) is not None and not Duration.parse(text).amount:
                raise ValueError(f"{setting}={text!r} has no length")
        self._check_times()

    def _check_times(self) -> None:
        for setting in ("min_wait", "patience"):
            text = getattr(self, setting)
            if text is None:
                continue
            wait = Duration.parse(text)
            if wait.unit == self._deadline.unit and wait.amount >= self._deadline.amount:
                raise ValueError(
                    f"{setting}={text!r} is not shorter than deadline={self.deadline!r}: nothing else would count"
                )
        needed = 2 * self.window + 1 if self.rule == "plateau" else self.window + 1
        every = Duration.parse(self.every)
        if every.unit == self._deadline.unit and every.amount * (needed - 1) > self._deadline.amount:
            raise ValueError(
                f"deadline={self.deadline!r} comes before the {needed} measurements, one every {self.every!r}, that "
                f"{self.rule!r} needs with window={self.window}: measure more often, or use WarmStart"
            )

    @cached_property
    def _deadline(self) -> Duration:
        return Duration.parse(self.deadline)

    @cached_property
    def _min_wait(self) -> Duration:
        return Duration.parse(self.min_wait)

    @cached_property
    def _patience(self) -> Duration | None:
        return None if self.patience is None else Duration.parse(self.patience)

    @property
    def signals(self) -> Mapping[str, str | None]:
        return {self.metric: self.every}

    @property
    def sizes(self) -> tuple[int, int]:
        return self.small_batch, self.large_batch

    def initial(self) -> Decision:
        reason = f"{self.small_batch} until {self.metric} fires ({self.rule}), or {self._deadline}"
        memory = {"batch_size": self.small_batch, "changed": None, "waited": None, "measured": None}
        return Decision(self.small_batch, reason, {**memory, "values": [], "reference": None, "moved": False})

    def __call__(self, progress: Progress, memory: Memory) -> Decision:
        held = memory["batch_size"]
        if held == self.large_batch:
            return Decision(held, memory["reason"], memory)
        state = dict(memory)
        if state["changed"] is None:  # the first call: the waits begin here
            state.update(self._now(progress))
        signal = progress.signals.get(self.metric)
        if signal is not None and signal.step != state["measured"]:
            self._consume(signal, state)
        fires, why = self._judge(signal, state)
        if not self._min_wait.reached(progress, since=state["changed"]):
            fires, why = False, f"less than {self._min_wait} at this size"
        elif fires and self.rule == "halved":
            state["reference"] = _window(state["values"], self.window)
        elif self._patience is not None and self._patience.reached(progress, since=state["waited"]):
            fires, why = True, f"{self._patience} without a change"
        return self._decide(progress, state, fires, why)

    def _decide(self, progress: Progress, state: dict[str, Any], fires: bool, why: str) -> Decision:
        held = size = state["batch_size"]
        if fires:
            size = min(held * self.factor, self.large_batch) if self.rule == "halved" else self.large_batch
        if size < self.large_batch and self._deadline.reached(progress):
            size, why = self.large_batch, f"deadline of {self._deadline} reached, {why}"
        if size == held:
            return Decision(held, f"{held} kept: {why}", state)
        reason = f"{why}: {held} -> {size}"
        if size == self.large_batch:
            return Decision(size, reason, {"batch_size": size, "reason": reason})
        return Decision(size, reason, {**state, "batch_size": size, **self._now(progress)})

    def _now(self, progress: Progress) -> dict[str, float | None]:
        waited = None if self._patience is None else self._patience.position(progress)
        return {"changed": self._min_wait.position(progress), "waited": waited}

    def _consume(self, signal: Signal, state: dict[str, Any]) -> None:
        """Take a measurement into the memory."""
        state["measured"] = signal.step
        interval = signal.interval(self.num_standard_errors)
        if interval is None or signal.value is None:
            return
        kept = 2 * self.window if self.rule == "plateau" else self.window
        state["values"] = [*state["values"], [interval[0], signal.value, interval[1]]][-kept:]
        now = _window(state["values"], self.window)
        before = _window(state["values"][: -self.window], self.window)
        if now and before and self.rule == "plateau":
            low, high = _log_ratio(now, before)
            state["moved"] = state["moved"] or low > self._limit or high < -self._limit
        elif now and self.rule == "halved":
            state["reference"] = state["reference"] or now
        elif now and self.rule == "below_peak":
            state["reference"] = max(state["reference"] or now, now, key=lambda window: window[1])

    @property
    def _limit(self) -> float:
        return _THRESHOLDS[self.rule] if self.threshold is None else self.threshold

    def _judge(self, signal: Signal | None, state: Mapping[str, Any]) -> tuple[bool, str]:
        """Whether the rule fires on what is in memory, and why."""
        now = _window(state["values"], self.window)
        if signal is not None and signal.value is None:
            return False, f"{self.metric} is unknown{signal.note and f' ({signal.note})'}"
        if now is None:
            return False, f"{len(state['values'])} of {self.window} measurements of {self.metric}"
        if self.rule == "plateau":
            return self._judge_plateau(now, state)
        low, high = _log_ratio(now, state["reference"])
        than = "its peak" if self.rule == "below_peak" else "it was"
        told = f"{self.metric} {now[1]:.4g} against {state['reference'][1]:.4g}, {math.exp(-self._limit):.3g} of what {than}"
        if high <= -self._limit + _ROUNDING:
            return True, told
        return False, f"{told}: {'its error spans that' if low <= -self._limit else 'not yet'}"

    def _judge_plateau(self, now: list[float], state: Mapping[str, Any]) -> tuple[bool, str]:
        before = _window(state["values"][: -self.window], self.window)
        if before is None:
            return False, f"{len(state['values'])} of {2 * self.window} measurements of {self.metric}"
        low, high = _log_ratio(now, before)
        told = f"{self.metric} went from {before[1]:.4g} to {now[1]:.4g}"
        if not state["moved"]:
            return False, f"{told}, and never moved by a factor {math.exp(self._limit):.3g}"
        if -self._limit <= low + _ROUNDING and high <= self._limit + _ROUNDING:
            return True, f"{told}, less than a factor {math.exp(self._limit):.3g}"
        outside = low > self._limit or high < -self._limit
        return False, f"{told}: {'still moving' if outside else 'its error spans the threshold'}"


def _window(values: Sequence[Sequence[float]], size: int) -> list[float] | None:
    """Low end, value and high end: the medians of the last ``size`` measurements; None where there are fewer."""
    return [statistics.median(column) for column in zip(*values[-size:], strict=True)] if len(values) >= size else None


def _log_ratio(now: Sequence[float], before: Sequence[float]) -> tuple[float, float]:
    """The interval of ``log(now / before)``, everything where ``before`` may be zero or negative."""
    if before[0] <= 0:
        return -math.inf, math.inf
    low, high = (math.log(value) if value > 0 else -math.inf for value in (now[0], now[2]))
    return low - math.log(before[2]), high - math.log(before[0])
