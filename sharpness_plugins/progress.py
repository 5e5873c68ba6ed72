"""Progress of a measurement: the event that the data loop emits, and who draws it where."""

from __future__ import annotations

import importlib
import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO

__all__ = ["ProgressEvent", "ProgressListener", "resolve_listener"]

REDRAW_SECONDS = 0.1


@dataclass(frozen=True)
class ProgressEvent:
    """Emitted after every batch, and with ``metric=None`` once at the end.

    Attributes:
        metric: key of the metric that is being measured, or None when all are done.
        passes: sweeps over the data so far for this metric, fractions included.
        expected_passes: what the metric says it will need, or None where it does not know.
        seconds: since this metric began.
    """

    metric: str | None
    passes: float
    expected_passes: float | None
    seconds: float

    @property
    def seconds_left(self) -> float | None:
        if not self._expects or self.expected_passes is None or self.passes <= 0:
            return None
        return max(self.expected_passes - self.passes, 0.0) * self.seconds / self.passes

    @property
    def _expects(self) -> bool:
        return self.expected_passes is not None and 0 < self.expected_passes < math.inf

    def __str__(self) -> str:
        if self.metric is None:
            return ""
        of = f" of about {self.expected_passes:.0f}" if self._expects else ""
        left = "" if self.seconds_left is None else f", about {_clock(self.seconds_left)} left"
        return f"{self.metric}: {self.passes:.1f}{of} passes over the data, {_clock(self.seconds)}{left}"


ProgressListener = Callable[[ProgressEvent], None]


def _clock(seconds: float) -> str:
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
    return f"{whole // 60}:{whole % 60:02d}"


class TerminalProgress:
    """One line on a terminal, redrawn in place and wiped at the end."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._drawn_at = -math.inf
        self._width = 0

    def __call__(self, event: ProgressEvent) -> None:
        now = time.monotonic()
        if event.metric is not None and now - self._drawn_at < REDRAW_SECONDS:
            return
        self._drawn_at = now
        # a line that wraps could not be redrawn
        text = str(event)[: shutil.get_terminal_size().columns - 1]
        if text or self._width:
            self._stream.write("\r" + text.ljust(self._width) + ("" if text else "\r"))
            self._stream.flush()
        self._width = len(text)


class NotebookProgress:
    """One output area in a notebook, updated in place."""

    def __init__(self, display: Callable[..., Any]) -> None:
        self._handle = display({"text/plain": ""}, raw=True, display_id=True)
        self._drawn_at = -math.inf

    def __call__(self, event: ProgressEvent) -> None:
        now = time.monotonic()
        if event.metric is not None and now - self._drawn_at < REDRAW_SECONDS:
            return
        self._drawn_at = now
        self._handle.update({"text/plain": str(event)}, raw=True)


def resolve_listener(progress: bool | ProgressListener | None, stream: TextIO | None = None) -> ProgressListener | None:
    """Who hears of progress: a callable as given, a drawing where somebody looks, nobody in a log.

    Args:
        progress: None draws in a notebook and on a terminal only; True draws on ``stream`` whatever it is;
            False draws nothing; a callable receives every ``ProgressEvent``.
        stream: where to draw; standard error unless told.
    """
    if callable(progress):
        return progress
    if progress is False:
        return None
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if any(kind.__name__ == "ZMQInteractiveShell" for kind in type(shell).__mro__):  # Colab's is a subclass
        return NotebookProgress(importlib.import_module("IPython.display").display)
    stream = stream or sys.stderr
    if stream is not None and (progress or stream.isatty()):  # a windowed program has no standard error
        return TerminalProgress(stream)
    return None
