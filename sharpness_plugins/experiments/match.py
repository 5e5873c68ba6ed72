"""Where two trainings that are to be compared end, and the training that goes there."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from .training import Run, Training, evaluate

__all__ = ["Match", "Stop", "train_to_match"]

UNITS = {"loss": "a training loss of {}", "epochs": "{} epochs", "steps": "{} steps"}


@dataclass(frozen=True)
class Match:
    """What networks that are compared have in common: ``loss``, ``epochs`` or ``steps``.

    ``epochs`` and ``steps`` count from the start of the last phase: a warm-started network has its warm start besides.
    """

    kind: str
    value: float

    def __post_init__(self) -> None:
        whole = self.kind == "loss" or self.value == int(self.value) if math.isfinite(self.value) else False
        if self.kind not in UNITS or not whole or self.value <= 0:
            raise ValueError(
                f"match must be a positive loss, or a whole number of epochs or steps, got '{self}'. "
                "Examples: loss:0.005, epochs:60, steps:1000"
            )

    @classmethod
    def parse(cls, text: str | Match) -> Match:
        """``"loss:0.005"``, ``"epochs:60"``, ``"steps:1000"``."""
        if isinstance(text, Match):
            return text
        kind, _, value = text.partition(":")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not number > 0:
            raise ValueError(f"match must be loss:VALUE, epochs:N or steps:N, got {text!r}. Example: loss:0.005")
        return cls(kind.strip(), number)

    def __str__(self) -> str:
        return f"{self.kind}:{self.value:g}"

    @property
    def words(self) -> str:
        return UNITS[self.kind].format(f"{self.value:g}")


class Stop(NamedTuple):
    """A network at one moment of a training, and what was done up to there."""

    model: nn.Module
    training: Training


def train_to_match(
    run: Run,
    match: Match,
    *,
    epochs: Collection[int] = (),
    check_every: int,
    max_steps: int,
    on_epoch: Callable[[int, float], None],
) -> tuple[Stop, dict[int, Stop]]:
    """Train until ``match``, and on until every one of ``epochs`` is over.

    A loss is that of all training samples in eval mode, looked at before the first step and then at the first end of an
    epoch that lies at least ``check_every`` steps after the last look (one pass over the data without gradients).

    Args:
        epochs: after which copies of the network are kept, each positive.
        max_steps: where a run that does not reach the loss gives up.
        on_epoch: is told the number of epochs done and the last one's mean loss.
    Returns:
        a copy of the network at the match (``reached_target`` false where it gave up), and those by epoch.
    """
    last: Stop | None = None
    copies: dict[int, Stop] = {}
    checked = -check_every
    while True:
        at_epoch_end = run.steps % run.steps_per_epoch == 0
        if at_epoch_end and run.epochs in epochs:
            copies[run.epochs] = _stop(run)
        if last is None and at_epoch_end and match.kind == "loss" and run.steps - checked >= check_every:
            checked = run.steps
            if evaluate(run.model, run.samples).loss <= match.value:
                last = _stop(run)
        elif last is None and match.kind != "loss" and getattr(run, match.kind) >= match.value:
            last = _stop(run)
        if last is None and match.kind == "loss" and run.steps >= max_steps:
            last = _stop(run, reached_target=False)
        if last is not None and len(copies) == len(epochs):
            return last, copies
        num_steps = run.steps_to_epoch_end
        if last is None and match.kind == "steps":
            num_steps = min(num_steps, int(match.value) - run.steps)
        run.advance(num_steps)
        if run.steps % run.steps_per_epoch == 0:
            on_epoch(run.epochs, run.epoch_loss)


def _stop(run: Run, *, reached_target: bool = True) -> Stop:
    return Stop(copy.deepcopy(run.model), run.training(reached_target=reached_target))
