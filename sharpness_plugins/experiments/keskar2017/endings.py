"""When a training ends: one rule per text, decided between epochs from what can be looked at again after a pause."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..training import Run

__all__ = ["Ending"]

KINDS = {
    "plateau": "no better by 1e-4 nats in {} epochs",
    "epoch_loss": "an epoch's mean loss below {}",
    "loss": "a training loss of {}",
    "epochs": "{} epochs",
    "steps": "{} steps",
}
LEAST_GAIN = 1e-4  # nats; what "ceased to improve" means is not published


@dataclass(frozen=True)
class Ending:
    """``plateau:10``, ``epoch_loss:0.002``, ``loss:0.005``, ``epochs:60`` or ``steps:1000``, at the first end of an epoch.

    ``epoch_loss`` is the mean over an epoch while the weights move; ``loss`` that of all training samples in eval mode,
    looked at every so many epochs.
    """

    kind: str
    value: float

    def __post_init__(self) -> None:
        fits = math.isfinite(self.value) and (self.value > 0 or (self.kind == "epochs" and self.value == 0))
        whole = self.kind in ("loss", "epoch_loss") or (fits and self.value == int(self.value))
        if self.kind not in KINDS or not fits or not whole:
            raise ValueError(
                f"an ending must be {', '.join(f'{kind}:VALUE' for kind in KINDS)} with a positive value, whole but for the "
                f"losses, got '{self}'. Example: epoch_loss:0.002"
            )

    @classmethod
    def parse(cls, text: str) -> Ending:
        kind, _, value = text.partition(":")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        return cls(kind.strip(), number)

    def __str__(self) -> str:
        return f"{self.kind}:{self.value:g}" if self.kind in ("loss", "epoch_loss") else f"{self.kind}:{self.value:.0f}"

    @property
    def words(self) -> str:
        return KINDS[self.kind].format(f"{self.value:g}")

    @property
    def always_comes(self) -> bool:
        """Whether it comes after a known time, so that it is never given up."""
        return self.kind in ("epochs", "steps")

    def reached(self, run: Run, history: Sequence[float], loss: Callable[[], float], *, check_epochs: int) -> bool:
        """Between epochs: ``history`` holds the mean losses of those done, and ``loss`` evaluates the training set.

        Args:
            check_epochs: ``loss`` is looked at before the first epoch and then every so many.
        """
        if self.kind == "plateau":
            patience = int(self.value)
            if len(history) <= patience:
                return False
            return min(history[-patience:]) > min(history[:-patience]) - LEAST_GAIN
        if self.kind == "epoch_loss":
            return run.epoch_loss < self.value
        if self.kind == "loss":
            return run.epochs % check_epochs == 0 and loss() <= self.value
        done = run.epochs if self.kind == "epochs" else run.steps
        return done >= self.value
