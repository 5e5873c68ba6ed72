"""Radii that change while training goes on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

__all__ = ["ProportionalToLearningRate", "Rho", "radius"]


@dataclass(frozen=True)
class ProportionalToLearningRate:
    """From ``low`` at learning rate ``lr_low`` to ``high`` at ``lr_high``, on a straight line; GSAM's.

    Each parameter group follows its own learning rate, whatever scheduler sets it.
    Source: Zhuang et al., Surrogate Gap Minimization Improves Sharpness-Aware Training, arXiv 2203.08065 (2022).
    """

    high: float
    lr_high: float
    low: float = 0.0
    lr_low: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.low <= self.high and 0 <= self.lr_low < self.lr_high):
            raise ValueError(f"0 <= low <= high and 0 <= lr_low < lr_high must hold, got {self}")

    def at(self, lr: float) -> float:
        share = (lr - self.lr_low) / (self.lr_high - self.lr_low)
        return max(0.0, self.low + (self.high - self.low) * share)


Rho: TypeAlias = "float | Callable[[int], float] | ProportionalToLearningRate"


def radius(rho: Rho, step: int, group: dict[str, Any]) -> float:
    """The radius of a parameter group in a step.

    Raises:
        ValueError: it is negative or not finite.
    """
    if isinstance(rho, ProportionalToLearningRate):
        value = rho.at(float(group["lr"]))
    else:
        value = float(rho(step) if callable(rho) else rho)
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"rho is a radius and not negative, got {value} in step {step}")
    return value
