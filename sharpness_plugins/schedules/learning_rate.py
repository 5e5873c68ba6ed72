"""Batches that grow where the learning rate would fall."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from .checks import at_least, growth, make_whole
from .core import Decision, Memory, Progress

__all__ = ["FromLearningRate"]

_COUPLINGS = {"smith": "linear", "seesaw": "sqrt"}


@dataclass(frozen=True)
class FromLearningRate:
    """``batch_size * q`` where the learning-rate schedule has fallen by ``q`` since its peak, up to ``cap``.

    With ``κ`` the growth of the batch, the rules differ in what the learning rate η does beside it:

    - "smith": η is multiplied by ``κ``, so that it stays at its peak, and η/B goes as it would in the run that decays
      (Smith et al., arXiv 1711.00489, for SGD, whose noise is η/B). Beyond the cap the learning rate falls.
    - "seesaw": η is multiplied by ``sqrt(κ)``: where it would halve it falls by ``sqrt(2)`` and the batch doubles, and
      η/sqrt(B) goes as it would in the run that halves (Seesaw, arXiv 2510.14717, for Adam).

    Both hold whatever the batch size in use is, as the multiplier is made from it. A learning rate that rises, as in a
    warm-up, changes nothing; one that rises again after a fall takes the batch back.

    Args:
        cap: largest batch size; Smith et al. stop at a tenth of the data.
        smallest_change: the size moves when it would by at least this factor, so that a cosine gives steps, not a new size
            at every step; 1 follows exactly.
    """

    batch_size: int
    cap: int
    rule: str = "smith"
    smallest_change: float = 2.0

    name: ClassVar[str] = "from_learning_rate"
    signals: ClassVar[Mapping[str, str | None]] = MappingProxyType({})

    def __post_init__(self) -> None:
        make_whole(self, "batch_size", "cap")
        at_least("cap", self.cap, self.batch_size, "batch_size")
        if self.rule not in _COUPLINGS:
            raise ValueError(f"rule must be one of {', '.join(map(repr, _COUPLINGS))}, got {self.rule!r}")
        if self.smallest_change != 1:
            growth("smallest_change", self.smallest_change, above=1.0)

    @property
    def coupling(self) -> str | None:
        return _COUPLINGS[self.rule]

    @property
    def sizes(self) -> tuple[int, int]:
        return self.batch_size, self.cap

    def initial(self) -> Decision:
        reason = f"{self.batch_size} until the learning rate falls"
        return Decision(self.batch_size, reason, {"batch_size": self.batch_size, "fallen": 1.0})

    def __call__(self, progress: Progress, memory: Memory) -> Decision:
        held, rate = memory["batch_size"], progress.learning_rate
        if rate is None or not rate > 0:
            # at exactly zero nothing is learnt, so no size is right: a warm-up from 0, or the end of a decay to 0
            why = "the learning rate is not known" if rate is None else f"at a learning rate of {rate:g}"
            return Decision(held, f"{held} kept: {why}", memory)
        fallen = max(1.0, 1 / rate)
        wanted = self.cap if fallen * self.batch_size >= self.cap else math.floor(fallen * self.batch_size + 0.5)
        told = f"the learning rate has fallen by {fallen:.4g}"
        since = max(fallen / memory["fallen"], memory["fallen"] / fallen)
        if wanted == held or (since < self.smallest_change * (1 - 1e-12) and wanted not in self.sizes):
            return Decision(held, f"{held} kept: {told}", memory)
        return Decision(wanted, f"{told}: {held} -> {wanted}", {"batch_size": wanted, "fallen": fallen})
