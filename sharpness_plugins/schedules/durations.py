"""Lengths of training as users write them: ``"40ep"``, ``"1000 steps"``, ``"250M samples"``, ``"2B tokens"``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal

from .core import Progress

__all__ = ["Duration"]

_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_UNITS = ("samples", "tokens", "steps", "epochs")
_TEXT = re.compile(
    r"\s*(?P<number>(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d{1,3})?)\s*(?P<suffix>[kmbt])?"
    r"\s*(?P<unit>samples?|tokens?|steps?|ep(?:ochs?)?)?\s*",
    re.IGNORECASE | re.ASCII,
)
_MOST = 10**18  # beyond it a float no longer tells neighbours apart, and no training gets there
_SLACK = 1e-9  # epochs are sums of fractions: 400 steps of 1/10 epoch come to 39.99999999999999


@dataclass(frozen=True)
class Duration:
    """So many samples, tokens, optimizer steps or epochs.

    Attributes:
        amount: whole, but for epochs.
        unit: "samples", "tokens", "steps" or "epochs".
    """

    amount: float
    unit: str = "samples"

    def __post_init__(self) -> None:
        if self.unit not in _UNITS:
            raise ValueError(f"the unit of a duration is one of {', '.join(_UNITS)}; got {self.unit!r}")
        if isinstance(self.amount, bool) or not isinstance(self.amount, (int, float)):
            raise TypeError(f"the amount of a duration is a number, got {self.amount!r}")
        if not (math.isfinite(self.amount) and 0 <= self.amount <= _MOST):
            raise ValueError(f"a duration is between 0 and {_MOST:g} {self.unit}, got {self.amount!r}")
        if self.amount == int(self.amount):
            object.__setattr__(self, "amount", int(self.amount))
        elif self.unit != "epochs":
            raise ValueError(f"a duration in {self.unit} is a whole number, got {self.amount!r}")

    @classmethod
    def parse(cls, value: str | float | Duration) -> Duration:
        """From text: a number, perhaps K, M, B or T, and a unit; a bare number counts samples.

        Raises:
            ValueError: it is no such text, negative, or a fraction of a sample, token or step.
            TypeError: it is neither text nor a number.
        """
        if isinstance(value, Duration):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return cls(value)
        if not isinstance(value, str):
            raise TypeError(f"a duration is text such as '40ep', or a number of samples; got {value!r}")
        match = _TEXT.fullmatch(value)
        if match is None:
            raise ValueError(
                f"{value!r} is not a duration: write '40ep', '1000 steps', '250M samples' or '2B tokens'; "
                "a bare number counts samples"
            )
        unit = next(unit for unit in _UNITS if unit.startswith((match["unit"] or "samples").lower()[:2]))
        amount = Decimal(match["number"]) * _SUFFIXES.get((match["suffix"] or "").upper(), 1)
        if amount > _MOST or (amount % 1 and unit != "epochs"):
            raise ValueError(
                f"{value!r} is not a duration: it counts {unit}, of which there are at most {_MOST:g}, in whole numbers"
            )
        return cls(float(amount) if amount % 1 else int(amount), unit)

    def position(self, progress: Progress) -> float:
        """How far training has come, in this unit."""
        if self.unit == "samples":
            return progress.samples
        if self.unit == "steps":
            return progress.step
        if self.unit == "epochs":
            if progress.epoch is None:
                raise ValueError(
                    f"'{self}' counts epochs, but nobody knows how many samples one has: write it in samples or steps, or "
                    "say num_samples"
                )
            return progress.epoch
        if progress.tokens is None:
            raise ValueError(f"'{self}' counts tokens, but nobody counts them here: write it in samples, steps or epochs")
        return progress.tokens

    def reached(self, progress: Progress, since: float = 0.0) -> bool:
        """Whether it has passed since the ``position`` ``since``."""
        position = self.position(progress)
        return position - since >= self.amount - _slack(self.unit, position)

    def elapsed(self, progress: Progress) -> int:
        """How often it has passed since the beginning."""
        position = self.position(progress)
        if self.unit != "epochs":
            return int(position) // int(self.amount)
        return math.floor((position + _slack(self.unit, position)) / self.amount)

    def __str__(self) -> str:
        unit = self.unit[:-1] if self.amount == 1 else self.unit
        if self.amount != int(self.amount):
            return f"{self.amount!r} {unit}"
        fits = [(letter, size) for letter, size in _SUFFIXES.items() if self.amount and self.amount % size == 0]
        letter, size = fits[-1] if fits else ("", 1)
        return f"{int(self.amount) // size}{letter} {unit}"


def _slack(unit: str, position: float) -> float:
    return _SLACK * max(1.0, position) if unit == "epochs" else 0.0
