"""Measuring during training: when, on what, at what cost, and where the numbers go. Knows no trainer."""

from __future__ import annotations

import csv
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from . import registry
from .batches import count_samples
from .errors import PluginWarning
from .measure import Metrics, measure_sharpness, resolve_metrics
from .pacing import Budget, Pace
from .report import Kind, SharpnessReport
from .schedules import Progress, Signal
from .space import Select

if TYPE_CHECKING:
    from .losses import LossFn

__all__ = ["CSVSink", "JSONLSink", "Measurement", "SharpnessMonitor", "Sink"]

FIRST_GUESS = 50  # gradients over the probe that a metric is taken to cost before the first measurement
HISTORY_KEPT = 200  # measurements in a checkpoint; sinks have all
GRADIENTS = {"values": 1 / 3, "gradients": 1.0, "hvps": 2.0}  # what each evaluation costs, in gradients


@dataclass(frozen=True)
class Measurement:
    """What was measured at one moment of training.

    Attributes:
        step, samples, epoch: how far training had come.
        loss: on the probe; None where it could not be had.
        values: by metric or signal; NaN where it failed.
        standard_errors: of those that are estimates.
        notes: by name, a sentence on each number that failed or is not what was asked for; under "probe" why nothing was
            measured at all.
        seconds: what the measurement took.
    """

    step: int
    samples: int
    epoch: float | None
    loss: float | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    standard_errors: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON: NaN as None."""
        values = {name: value if math.isfinite(value) else None for name, value in self.values.items()}
        return {**asdict(self), "values": values}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Measurement:
        return cls(**{**saved, "values": {n: math.nan if v is None else v for n, v in saved["values"].items()}})


Sink = Callable[[Measurement], None]
"""Where measurements go: a file, a logger, a plot. What it raises becomes a warning."""


class JSONLSink:
    """One line of JSON per measurement, appended to a file. A resumed run goes on in the same file."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __call__(self, measurement: Measurement) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(measurement.to_dict()) + "\n")


class CSVSink:
    """One row per measurement. A number that appears later gives the file a new column, and older rows an empty cell."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __call__(self, measurement: Measurement) -> None:
        row: dict[str, Any] = {name: getattr(measurement, name) for name in ("step", "samples", "epoch", "loss", "seconds")}
        row |= {f"{name}_se": error for name, error in measurement.standard_errors.items()}
        row = {**row, **measurement.values}
        exists = self.path.exists() and self.path.stat().st_size > 0
        if not exists:
            self._write([row], list(row), "w")
            return
        with self.path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or ())
            if set(row) <= set(columns):
                self._write([row], columns, "a", header=False)
                return
            rows = list(reader)
        self._write([*rows, row], [*columns, *(name for name in row if name not in columns)], "w")

    def _write(self, rows: list[dict[str, Any]], columns: list[str], mode: str, *, header: bool = True) -> None:
        target = self.path if mode == "a" else self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        with target.open(mode, newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            if header:
                writer.writeheader()
            writer.writerows(rows)
        if target != self.path:
            os.replace(target, self.path)


class SharpnessMonitor:
    """Measures a model that is being trained, when it is due and the budget allows, and keeps the history.

    Training with it is training without it, bit for bit: it reads a probe of its own, leaves parameters, buffers,
    gradients and random states as they are, and what fails is recorded, never raised.

    Args:
        model: what is trained; wrappers are taken off.
        probe: batches to measure on (``probe_batches(loader)``), never the training loader.
        metrics, loss_fn, criterion, select, batch_norm, seed: as for ``measure_sharpness``.
        every: how often, a duration such as ``"1ep"``, ``"500 steps"`` or ``"1M samples"``, or ``"10 min"`` of training.
        budget: the largest share of training that measuring may take, .02 for 2 %; None for no limit. Measurements that
            are due but too dear wait. ``budget_in`` counts it in "seconds" or in "samples".
        signals: numbers that cost nothing, by name, recorded with each measurement: a function without arguments that
            returns a ``Signal``, a number, or None where there is none yet (the noise scale of a ``NoiseScaleMeter``, the
            surrogate gap of a SAM optimizer, a gradient norm).
        sinks: told of each measurement.
    Raises:
        UnknownNameError: nobody offers the metric. ValueError: the cadence or the budget is none.
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Iterable[Any],
        metrics: Metrics = None,
        *,
        every: str = "1ep",
        budget: float | None = 0.02,
        budget_in: str = "seconds",
        loss_fn: LossFn | None = None,
        criterion: Callable[..., Any] | None = None,
        select: Select = None,
        batch_norm: str = "eval",
        seed: int = 0,
        signals: Mapping[str, Callable[[], Signal | float | None]] | None = None,
        sinks: Sink | Iterable[Sink] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model, self.probe = model, probe
        self.metrics = resolve_metrics(metrics)
        self.pace, self.budget = Pace(every, clock), Budget(budget, budget_in, clock)
        self.history: list[Measurement] = []
        self.sinks: list[Sink] = [sinks] if callable(sinks) else list(sinks)
        self.signals = dict(signals or {})
        self._settings: dict[str, Any] = {
            "loss_fn": loss_fn,
            "criterion": criterion,
            "select": select,
            "batch_norm": batch_norm,
            "seed": seed,
        }
        self._price: float | None = None

    @property
    def last(self) -> Measurement | None:
        """The newest measurement."""
        return self.history[-1] if self.history else None

    def is_due(self, progress: Progress) -> bool:
        """Whether ``measure_if_due`` would measure now."""
        self.budget.train(progress)
        if not self.pace.is_due(progress):
            return False
        price = self._price
        if price is None:
            price = self.budget.price_of(FIRST_GUESS * len(self.metrics) * self._probe_samples(), progress)
        return self.budget.affords(price)

    def measure_if_due(self, progress: Progress) -> Measurement | None:
        """After an optimizer step: the measurement, if one was due and affordable."""
        return self.measure(progress) if self.is_due(progress) else None

    def measure(self, progress: Progress) -> Measurement:
        """Measure now, whatever is due. The budget pays for it."""
        self.budget.train(progress)
        began = time.monotonic()
        try:
            report = measure_sharpness(self.model, self.probe, self.metrics, progress=False, **self._settings)
        except Exception as error:
            if registry.is_strict():
                raise
            note = f"{type(error).__name__}: {error}"
            warnings.warn(f"nothing was measured at step {progress.step}: {note}", PluginWarning, stacklevel=2)
            made = Measurement(progress.step, progress.samples, progress.epoch, notes={"probe": note})
            work = 0.0
        else:
            made = _from_report(report, progress)
            work = sum(GRADIENTS[what] * getattr(report.cost, what) for what in GRADIENTS) * report.provenance["num_samples"]
        made = self._with_signals(made, time.monotonic() - began)
        self._price = self.budget.pay(work)
        self.pace.took_place(progress)
        self.history.append(made)
        for sink in self.sinks:
            self._tell(sink, made)
        return made

    def _probe_samples(self) -> float:
        return float(sum(count_samples(batch) or 0 for batch in self.probe)) if isinstance(self.probe, list) else 0.0

    def _with_signals(self, made: Measurement, seconds: float) -> Measurement:
        values, errors, notes = dict(made.values), dict(made.standard_errors), dict(made.notes)
        for name, read in self.signals.items():
            try:
                signal = read()
            except Exception as error:
                values[name], notes[name] = math.nan, f"{type(error).__name__}: {error}"
                continue
            if isinstance(signal, Signal):
                values[name] = math.nan if signal.value is None else signal.value
                if signal.standard_error is not None:
                    errors[name] = signal.standard_error
                if signal.note:
                    notes[name] = signal.note
            elif signal is not None:
                values[name] = float(signal)
        return Measurement(made.step, made.samples, made.epoch, made.loss, values, errors, notes, seconds)

    def _tell(self, sink: Sink, made: Measurement) -> None:
        try:
            sink(made)
        except Exception as error:
            if registry.is_strict():
                raise
            warnings.warn(
                f"{sink!r} did not take a measurement: {type(error).__name__}: {error}", PluginWarning, stacklevel=3
            )

    def state_dict(self) -> dict[str, Any]:
        """JSON: when it measured last, what that cost, and the newest of the history."""
        return {
            "pace": self.pace.state_dict(),
            "budget": self.budget.state_dict(),
            "price": self._price,
            "history": [measurement.to_dict() for measurement in self.history[-HISTORY_KEPT:]],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.pace.load_state_dict(state["pace"])
        self.budget.load_state_dict(state["budget"])
        self._price = state["price"]
        self.history = [Measurement.from_dict(saved) for saved in state["history"]]


def _from_report(report: SharpnessReport, progress: Progress) -> Measurement:
    told = (Kind.FAILED, Kind.NOT_CONVERGED)
    results = report.results.items()
    return Measurement(
        progress.step,
        progress.samples,
        progress.epoch,
        report.loss,
        {key: result.value for key, result in results},
        {key: result.standard_error for key, result in results if result.standard_error is not None},
        {key: f"{result.status.kind}: {result.status.message}" for key, result in results if result.status.kind in told},
    )
