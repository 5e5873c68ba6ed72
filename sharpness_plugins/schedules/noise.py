"""Batches as large as the noise of the gradient asks for: on a signal with its standard error, never on an unknown one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import ClassVar

from .checks import at_least, growth, make_whole
from .core import Decision, Memory, Progress
from .durations import Duration

__all__ = ["InnerProductTest", "NoiseScale", "NormTest"]


@dataclass(frozen=True)
class _Required(ABC):
    """A batch size of ``scale`` times a signal that is in samples.

    The size in use is compared with the interval of ``num_standard_errors`` about what is required: below it, it grows;
    above it, it shrinks, unless ``monotone``; within it nothing is known to be wrong, and it stays. Each measurement is
    judged once.

    Args:
        batch_size: the first.
        max_batch_size, min_batch_size: bounds; the smallest is the first where not given.
        max_growth: largest factor of one change, None for no such bound.
        monotone: never shrink.
        smallest_change: a change by a smaller factor waits, unless it arrives at a bound.
        num_standard_errors: half the width of the interval.
        min_wait: a duration between changes, and before the first.
        every: how often the signal is measured, a duration; None for whenever it costs nothing.
    """

    batch_size: int
    max_batch_size: int
    _: KW_ONLY
    min_batch_size: int | None = None
    max_growth: float | None = None
    monotone: bool = True
    smallest_change: float = 1.1
    num_standard_errors: float = 2.0
    min_wait: str = "1ep"
    every: str | None = None

    signal: ClassVar[str]
    setting: ClassVar[str]  # what the scale is made from
    coupling: ClassVar[str | None] = None

    @property
    @abstractmethod
    def scale(self) -> float: ...

    def __post_init__(self) -> None:
        make_whole(self, "batch_size", "max_batch_size")
        at_least("max_batch_size", self.max_batch_size, self.batch_size, "batch_size")
        if self.min_batch_size is not None:
            make_whole(self, "min_batch_size")
            at_least("batch_size", self.batch_size, self.min_batch_size, "min_batch_size")
        growth(self.setting, setting := getattr(self, self.setting), above=0.0)
        if not math.isfinite(self.scale):
            raise ValueError(f"{self.setting}={setting!r} is too small to divide by its square")
        if self.max_growth is not None:
            growth("max_growth", self.max_growth, above=1.0)
        if self.smallest_change != 1:
            growth("smallest_change", self.smallest_change, above=1.0)
        if self.max_growth is not None and self.smallest_change > self.max_growth:
            raise ValueError(
                f"smallest_change={self.smallest_change} is above max_growth={self.max_growth}: nothing can change"
            )
        if self.num_standard_errors != 0:
            growth("num_standard_errors", self.num_standard_errors, above=0.0)
        if self.every is not None and not Duration.parse(self.every).amount:
            raise ValueError(f"every={self.every!r} has no length; None measures whenever it costs nothing")
        _ = self._min_wait

    @cached_property
    def _min_wait(self) -> Duration:
        return Duration.parse(self.min_wait)

    @property
    def signals(self) -> Mapping[str, str | None]:
        return {self.signal: self.every}

    @property
    def sizes(self) -> tuple[int, int]:
        return self.min_batch_size or self.batch_size, self.max_batch_size

    def initial(self) -> Decision:
        memory = {"batch_size": self.batch_size, "changed": None, "measured": None}
        return Decision(self.batch_size, f"{self.batch_size} until {self.signal} is measured", memory)

    def __call__(self, progress: Progress, memory: Memory) -> Decision:
        held = memory["batch_size"]
        if memory["changed"] is None:  # the first call: the wait begins here
            memory = {**memory, "changed": self._min_wait.position(progress)}
        signal = progress.signals.get(self.signal)
        if signal is None:
            return Decision(held, f"{held} kept: {self.signal} is not measured yet", memory)
        if signal.step == memory["measured"]:
            return Decision(held, f"{held} kept: {self.signal} is not measured again yet", memory)
        interval = signal.interval(self.num_standard_errors)
        if interval is None or signal.value is None:
            return Decision(held, f"{held} kept: {self.signal} is unknown{signal.note and f' ({signal.note})'}", memory)
        if not self._min_wait.reached(progress, since=memory["changed"]):
            return Decision(held, f"{held} kept: less than {self._min_wait} at this size", memory)
        memory = {**memory, "measured": signal.step}
        wanted, why = self._judge(signal.value, interval, progress.batch_size, held)
        if wanted == held:
            return Decision(held, f"{held} kept: {why}", memory)
        memory = {**memory, "batch_size": wanted, "changed": self._min_wait.position(progress)}
        return Decision(wanted, f"{why}: {held} -> {wanted}", memory)

    def _judge(self, value: float, interval: tuple[float, float], current: int, held: int) -> tuple[int, str]:
        """What to use next, and why; ``current`` is in use, ``held`` was asked for."""
        low, high = (self.scale * end for end in interval)
        error = (high - low) / 2
        told = f"{self.signal} {value:.4g} asks for {self.scale * value:.4g}" + (f" ± {error:.2g}" if error else "")
        if low <= current <= high:
            return held, f"{told}, which does not exclude {current}"
        if high < current and self.monotone:
            return held, f"{told}, but it never shrinks"
        smallest, largest = self.sizes
        # the smallest that is enough; the last digit of a product is not worth a sample
        wanted = math.ceil(min(max(self.scale * value * (1 - 1e-12), smallest), largest))
        if self.max_growth is not None:
            lowest = min(current - 1, math.ceil(current / self.max_growth))
            highest = max(current + 1, math.floor(current * self.max_growth))
            wanted = min(max(min(max(wanted, lowest), highest), smallest), largest)
        if self.monotone:
            wanted = max(wanted, held)
        if wanted == held:
            return held, f"{told}, and no other size is allowed"
        if max(wanted / held, held / wanted) < self.smallest_change and wanted not in self.sizes:
            return held, f"{told}, less than a factor {self.smallest_change:g} away"
        return wanted, told


@dataclass(frozen=True)
class NoiseScale(_Required):
    """``target`` times the gradient noise scale S/|G|²: McCandlish et al., arXiv 1812.06162.

    It at most doubles, once per epoch, by default. Without a learning-rate rule beside it, it was the worst of ten policies
    on small digits.
    """

    target: float = 1.0
    _: KW_ONLY
    max_growth: float | None = 2.0

    name: ClassVar[str] = "noise_scale"
    signal: ClassVar[str] = "gradient_noise_scale"
    setting: ClassVar[str] = "target"

    @property
    def scale(self) -> float:
        return self.target


@dataclass(frozen=True)
class NormTest(_Required):
    """Grow where S/(B |G|²) > θ², to S/(θ² |G|²): the norm test of Byrd et al. (2012)."""

    theta: float = 0.9

    name: ClassVar[str] = "norm_test"
    signal: ClassVar[str] = "gradient_noise_scale"
    setting: ClassVar[str] = "theta"

    @property
    def scale(self) -> float:
        return 1 / self.theta / self.theta


@dataclass(frozen=True)
class InnerProductTest(_Required):
    """Grow where Var(gᵢ·G)/(B |G|⁴) > θ², to Var(gᵢ·G)/(θ² |G|⁴): Bollapragada et al. (2018). Looser than the norm test."""

    theta: float = 0.9

    name: ClassVar[str] = "inner_product_test"
    signal: ClassVar[str] = "inner_product_noise"
    setting: ClassVar[str] = "theta"

    @property
    def scale(self) -> float:
        return 1 / self.theta / self.theta
