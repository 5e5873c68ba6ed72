"""When to measure during training: how often it was asked for, and what it may cost."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from .report import Cost
from .schedules import Duration, Progress

__all__ = ["FIRST_GUESS", "Budget", "Pace", "gradients_of"]

FIRST_GUESS = 50  # gradients that what was never measured is taken to cost: HessianTopK's 20 products are 40

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_TIME = re.compile(
    r"\s*(?P<number>\d+\.?\d*|\.\d+)\s*(?P<unit>s|secs?|seconds?|mins?|minutes?|h|hrs?|hours?)\s*", re.IGNORECASE | re.ASCII
)


def gradients_of(cost: Cost) -> float:
    """The work of a measurement: a loss is a third of a gradient, a Hessian-vector product two."""
    return cost.values / 3 + cost.gradients + 2 * cost.hvps


class Pace:
    """Due once at the beginning, and then at the multiples of so much training, such as the ends of epochs 1, 2 and 3.

    What waits (for a budget) is due until it takes place, and takes place once, however many multiples have passed.

    Args:
        every: a duration such as ``"1ep"`` or ``"500 steps"``, or a time such as ``"10 min"``, which counts from the last
            measurement; None for always.
        clock: seconds, monotonic.
    Raises:
        ValueError: it is no such text, or nothing.
    """

    def __init__(self, every: str | Duration | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = _seconds(every)
        self._every = None if every is None or self._seconds is not None else _duration(every)
        if self._seconds == 0 or (self._every is not None and not self._every.amount):
            raise ValueError(f"measuring every {every!r} has no end. Write '1 step' for every step")
        self._clock = clock
        self._last: float | None = None  # seconds on the clock, or how many multiples had passed

    @property
    def is_timed(self) -> bool:
        """Whether it goes by a clock, which says something else on every rank."""
        return self._seconds is not None

    @property
    def unit(self) -> str:
        """ "seconds", "samples", "tokens", "steps" or "epochs"; "steps" also where it is always due."""
        return "seconds" if self.is_timed else "steps" if self._every is None else self._every.unit

    def is_due(self, progress: Progress) -> bool:
        """Raises ValueError where ``progress`` does not know what is counted."""
        if self._every is not None:
            passed = self._every.elapsed(progress)
            return self._last is None or passed > self._last
        return self._last is None or self._seconds is None or self._clock() - self._last >= self._seconds

    def took_place(self, progress: Progress) -> None:
        self._last = self._clock() if self._every is None else self._every.elapsed(progress)

    def state_dict(self) -> dict[str, Any]:
        """JSON. A pace in seconds saves how long ago the last measurement was."""
        ago = self.is_timed and self._last is not None
        return {
            "every": str(self._every),
            "last": self._clock() - self._last if ago and self._last is not None else self._last,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; with another pace than was saved, begin anew: it is due at once."""
        last = state["last"] if state["every"] == str(self._every) else None
        self._last = self._clock() - last if self.is_timed and last is not None else last


def _seconds(every: str | Duration | None) -> float | None:
    match = _TIME.fullmatch(every) if isinstance(every, str) else None
    return None if match is None else float(match["number"]) * _UNITS[match["unit"][0].lower()]


def _duration(every: str | Duration) -> Duration:
    try:
        return Duration.parse(every)
    except ValueError as error:
        raise ValueError(f"{error}; to measure by time, write '10 min'") from None


class Budget:
    """The share of training that measuring may take, in seconds or in gradients of samples.

    Args:
        share: .05 for 5 %; None for no limit.
        unit: "seconds" is wall time. "samples" counts the samples whose gradients are taken, in training and in
            measuring: then what is afforded depends on nothing but the run, and a resumed run measures at the same steps.
        clock: seconds, monotonic.
    """

    def __init__(self, share: float | None, unit: str = "seconds", clock: Callable[[], float] = time.monotonic) -> None:
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"a budget is a share of training above 0 and at most 1, got {share!r}. Example: 0.05 for 5 %")
        if unit not in ("seconds", "samples"):
            raise ValueError(f"a budget counts 'seconds' or 'samples', got {unit!r}")
        self.share, self.unit, self.clock = share, unit, clock
        self.trained = self.spent = 0.0
        self._mark = clock()

    def train(self, progress: Progress) -> None:
        """Training has come this far; the time since the last call was training's."""
        self.trained = float(progress.samples) if self.unit == "samples" else self.trained + self._lap()

    def pay(self, work: float) -> float:
        """A measurement has ended that was worth ``work`` gradients of samples; returns its price in this budget's unit."""
        price = work if self.unit == "samples" else self._lap()
        self.spent += price
        return price

    def affords(self, price: float) -> bool:
        return self.share is None or self.spent + price <= self.share * self.trained

    def price_of(self, work: float, progress: Progress) -> float:
        """What ``work`` gradients of samples would cost, at the rate of training so far."""
        return work if self.unit == "samples" else work * self.trained / max(progress.samples, 1)

    @property
    def is_timed(self) -> bool:
        """Whether what it affords goes by a clock, which says something else on every rank."""
        return self.share is not None and self.unit == "seconds"

    @property
    def share_spent(self) -> float:
        """What measuring has taken, as a share of what training has."""
        return self.spent / self.trained if self.trained else 0.0

    def _lap(self) -> float:
        before, self._mark = self._mark, self.clock()
        return self._mark - before

    def state_dict(self) -> dict[str, Any]:
        """JSON."""
        return {"unit": self.unit, "trained": self.trained, "spent": self.spent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, where it was kept in the same unit, and else begin anew."""
        if state["unit"] == self.unit:
            self.trained, self.spent = float(state["trained"]), float(state["spent"])
        self._mark = self.clock()
