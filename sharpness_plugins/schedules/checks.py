"""Settings refused where a schedule is built, in words that quote them."""

from __future__ import annotations

import math
import operator
from typing import Any

from .core import BatchSchedule

__all__ = ["at_least", "growth", "is_schedule", "make_whole", "whole"]


def whole(name: str, value: Any, *, least: int = 1) -> int:
    """``value`` as an int of at least ``least``.

    Raises:
        TypeError: it is no whole number. ValueError: it is too small.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def make_whole(settings: Any, *names: str, least: int = 1) -> None:
    """Turn these fields of a frozen dataclass, NumPy's integers too, into plain ints."""
    for name in names:
        object.__setattr__(settings, name, whole(name, getattr(settings, name), least=least))


def at_least(name: str, value: int, least: int, least_name: str) -> None:
    if value < least:
        raise ValueError(f"{name}={value} is below {least_name}={least}: give a {name} of {least} or more")


def growth(name: str, value: float, *, above: float) -> float:
    """A finite factor greater than ``above``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and value > above):
        raise ValueError(f"{name} must be a finite number above {above:g}, got {value!r}")
    return float(value)


def is_schedule(owner: str, value: Any) -> BatchSchedule:
    lacks = [name for name in ("signals", "coupling", "initial", "__call__") if not hasattr(value, name)]
    if lacks or isinstance(value, type):
        what = "is a class: call it with its settings" if isinstance(value, type) else f"has no {', '.join(lacks)}"
        raise TypeError(f"{owner} combines batch-size schedules, but {value!r} {what}")
    schedule: BatchSchedule = value
    return schedule
