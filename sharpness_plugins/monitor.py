"""Measuring during training: when, on what, at what cost, and where the numbers go. Knows no trainer."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import distributed, files, registry
from .errors import LoaderError, LostRankError, PluginWarning
from .measure import Metrics, measure_sharpness, resolve_metrics
from .noise_scale import SIGNALS, NoiseScaleMeter
from .pacing import FIRST_GUESS, Budget, Pace, gradients_of
from .probe import num_probe_samples
from .report import Kind, SharpnessReport
from .schedules import Progress, Signal
from .schema import ANY, check
from .space import Select

if TYPE_CHECKING:
    from .losses import LossFn

__all__ = ["CSVSink", "JSONLSink", "Measurement", "SharpnessMonitor", "Sink", "gradient_norm", "norm_of"]

HISTORY_KEPT = 200  # measurements in a checkpoint; sinks have all


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
        loss_rule: how the loss came from model and batch, as a sentence; None without a loss.
    """

    step: int
    samples: int
    epoch: float | None
    loss: float | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    standard_errors: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    loss_rule: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON: what is not finite as None."""
        return {
            **asdict(self),
            "loss": _finite(self.loss),
            "values": {name: _finite(value) for name, value in self.values.items()},
            "standard_errors": {name: _finite(error) for name, error in self.standard_errors.items()},
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Measurement:
        """The inverse of ``to_dict``.

        Raises:
            ValueError: ``saved`` is something else, or damaged.
        """
        check(saved, _MEASUREMENT, "the measurement")
        numbers = {
            part: {name: math.nan if number is None else number for name, number in saved[part].items()}
            for part in ("values", "standard_errors")
        }
        return cls(**{**saved, **numbers})


_MEASUREMENT = {
    "step": int,
    "samples": int,
    "epoch": (float, None),
    "loss": (float, None),
    "loss_rule": (str, None),
    "values": {str: (float, None)},
    "standard_errors": {str: (float, None)},
    "notes": {str: str},
    "seconds": float,
}
_STATE = {
    "pace": {"every": str, "last": (float, None)},
    "budget": {"unit": str, "trained": float, "spent": float},
    "price": (float, None),
    "history": [_MEASUREMENT],
    ...: ANY,
}


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


Sink = Callable[[Measurement], None]
"""Where measurements go: a file, a logger, a plot. What it raises becomes a warning."""

Reading = Callable[[], "Signal | float | Tensor | None"]


def gradient_norm(parameters: Optimizer | nn.Module | Iterable[Tensor]) -> Callable[[], float | None]:
    """A signal: the norm of what ``.grad`` holds when it is read, clipped or not; None where there is none.

    Of a module, its parameters at that moment: ``fully_shard`` puts gathered ones in their place for a while.

    Costs one pass over the gradients, and waits for the device, when a measurement is made and at no other time.
    """
    tensors = [] if isinstance(parameters, (Optimizer, nn.Module)) else list(parameters)

    def read() -> float | None:
        each = tensors
        if isinstance(parameters, Optimizer):
            each = [parameter for group in parameters.param_groups for parameter in group["params"]]
        elif isinstance(parameters, nn.Module):
            each = list(parameters.parameters())
        return norm_of(parameter.grad for parameter in each if parameter.grad is not None)

    return read


def norm_of(gradients: Iterable[Tensor]) -> float | None:
    """Of all together; None where there is none. Waits for the device.

    Collective where gradients lie on several ranks (``fully_shard``): one sum for each way in which they are spread.
    """
    parts: dict[tuple[Any, ...], list[Tensor]] = {}
    for one in gradients:
        held = _strided(distributed.local_part(one.detach()))
        norm = torch.linalg.vector_norm(held, dtype=torch.float64).cpu()
        parts.setdefault(distributed.shard_groups(one), []).append(norm)
    norms = [norm for groups, each in parts.items() for norm in _over_shards(each, groups)]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else None


def _over_shards(norms: list[Tensor], groups: tuple[Any, ...]) -> list[Tensor]:
    """Of what this rank holds of each tensor; over all ranks that hold a part, one norm."""
    if not groups:
        return norms
    return [distributed.sum_over_shards(torch.stack(norms).square().sum(), groups).sqrt()]


def _strided(gradient: Tensor) -> Tensor:
    gradient = gradient.coalesce().values() if gradient.is_sparse else gradient
    return torch.view_as_real(gradient) if gradient.is_complex() else gradient


class JSONLSink:
    """One line of JSON per measurement, appended to a file by rank 0. A resumed run goes on in the same file."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"JSONLSink({os.fspath(self.path)!r})"

    def __call__(self, measurement: Measurement) -> None:
        if distributed.rank() == 0:
            files.append(self.path, json.dumps(measurement.to_dict(), allow_nan=False))


class CSVSink:
    """One row per measurement, written by rank 0. A number that appears later gives the file a new column, and older rows
    an empty cell.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"CSVSink({os.fspath(self.path)!r})"

    def __call__(self, measurement: Measurement) -> None:
        if distributed.rank() != 0:
            return
        row: dict[str, Any] = {name: getattr(measurement, name) for name in ("step", "samples", "epoch", "loss", "seconds")}
        row |= {f"{name}_se": error for name, error in measurement.standard_errors.items()}
        row |= measurement.values
        files.update(self.path, lambda text: _with_row(text, row))


def _with_row(text: str, row: dict[str, Any]) -> str:
    """CSV with one more row, and more columns if it needs them."""
    if text and not text.endswith("\n"):  # what a process that was killed left of a row
        text += "\n"
    reader = csv.DictReader(io.StringIO(text, newline=""))
    columns = list(reader.fieldnames or ())
    news = [name for name in row if name not in columns]
    if columns and not news:
        return text + _as_csv([row], columns, header=False)
    return _as_csv([*reader, row], columns + news, header=True)


def _as_csv(rows: list[dict[str, Any]], columns: list[str], *, header: bool) -> str:
    text = io.StringIO()
    # what stands right of the last column, as in a row that was cut into another, is left out
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


class SharpnessMonitor:
    """Measures a model that is being trained, when it is due and the budget allows, and keeps the history.

    Training with it is training without it, bit for bit: it reads a probe of its own, leaves parameters, buffers,
    gradients and random states as they are, and what fails is recorded, never raised (``SHARPNESS_PLUGINS_STRICT=1``
    raises).

    On several ranks all of them measure at the same steps and share the probe out, which is the same on all of them, or each
    rank's own: every rank asks at every step, and where a clock has a say, rank 0's decision is sent round.

    Args:
        model: what is trained; wrappers are taken off.
        probe: batches to measure on (``probe_batches(loader)``), never the training loader.
        metrics, loss_fn, criterion, select, batch_norm, seed: as for ``measure_sharpness``. No metrics at all, ``()``,
            records the signals only.
        every: how often, a duration such as ``"1ep"``, ``"500 steps"`` or ``"1M samples"``, or ``"10 min"`` of training.
            The first measurement is due at once, the others at multiples of it.
        budget: the largest share of training that measuring may take, .02 for 2 %; None for no limit. Measurements that
            are due but too dear wait; the first, whose price nobody knows yet, is taken for 50 gradients per metric.
            ``budget_in`` counts it in "seconds" or in "samples"; only the second makes a resumed run measure at the very
            same steps.
        signals: numbers that cost nothing, by name, recorded with each measurement: a function without arguments that
            returns a ``Signal``, a number, or None where there is none yet (``gradient_norm(optimizer)``, the surrogate
            gap of a SAM optimizer); or a ``NoiseScaleMeter`` under the name of what it tells (``gradient_noise_scale``).
        sinks: told of each measurement, on every rank.
    Attributes:
        history: the measurements so far; after a resume, the newest of those before.
    Raises:
        UnknownNameError: nobody offers the metric. LoaderError: the probe can be read only once. ValueError: the cadence
            or the budget is none, or a signal has the name of a metric.
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
        signals: Mapping[str, Reading | NoiseScaleMeter] | None = None,
        sinks: Sink | Iterable[Sink] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if isinstance(probe, Iterator):
            raise LoaderError(
                f"the probe can be read only once (got a {type(probe).__name__}), and every measurement reads it: pass "
                "list(probe), or probe_batches(loader)"
            )
        self.model, self.probe = model, probe
        none = isinstance(metrics, Collection) and not isinstance(metrics, str) and not metrics
        self.metrics = {} if none else resolve_metrics(metrics)
        self.pace, self.budget = Pace(every, clock), Budget(budget, budget_in, clock)
        self.history: list[Measurement] = []
        self.sinks: list[Sink] = [sinks] if callable(sinks) else list(sinks)
        self.signals = dict(signals or {})
        self._check_names()
        self._settings: dict[str, Any] = {
            "loss_fn": loss_fn,
            "criterion": criterion,
            "select": select,
            "batch_norm": batch_norm,
            "seed": seed,
        }
        self._guess = FIRST_GUESS * len(self.metrics) * num_probe_samples(probe) if self.metrics else 0.0
        self._price: float | None = None
        self._clock = clock
        self._waiting: tuple[int, float] | None = None  # since which step, at what price

    def _check_names(self) -> None:
        for name, source in self.signals.items():
            if name in self.metrics:
                raise ValueError(f"both a metric and a signal are named {name!r}: their values would be one. Rename one")
            if isinstance(source, NoiseScaleMeter) and name not in SIGNALS:
                raise ValueError(f"a NoiseScaleMeter tells {', '.join(SIGNALS)}, and no signal {name!r}")

    @property
    def last(self) -> Measurement | None:
        """The newest measurement."""
        return self.history[-1] if self.history else None

    @property
    def why_waiting(self) -> str:
        """Why a measurement that is due was not made yet, as a sentence; empty where none is due."""
        if self._waiting is None or self.budget.share is None:
            return ""
        step, price = self._waiting
        left, unit = max(self.budget.share * self.budget.trained - self.budget.spent, 0.0), "s"
        if self.budget.unit == "samples":
            unit = " gradients of samples"
        return (
            f"a measurement is due since step {step} and waits: it would take about {price:.3g}{unit}, and a budget of "
            f"{100 * self.budget.share:g} % has {left:.3g}{unit} to spend so far. Raise budget (None for no limit), or "
            "measure less: fewer samples in the probe, cheaper metrics."
        )

    def is_due(self, progress: Progress) -> bool:
        """Whether ``measure_if_due`` would measure now.

        Raises:
            ValueError: the cadence counts what ``progress`` does not know.
        """
        self.budget.train(progress)
        due = self.pace.is_due(progress)
        if not due and not self.pace.is_timed:
            return False
        price = self._price
        if price is None:
            price = self.budget.price_of(self._guess, progress)
        measures = due and self.budget.affords(price)
        if self.pace.is_timed or self.budget.is_timed:
            measures = distributed.from_rank_zero(measures)
        if due and not measures:
            self._waiting = (progress.step if self._waiting is None else self._waiting[0]), price
        return measures

    def measure_if_due(self, progress: Progress) -> Measurement | None:
        """After an optimizer step: the measurement, if one was due and affordable."""
        return self.measure(progress) if self.is_due(progress) else None

    def measure(self, progress: Progress) -> Measurement:
        """Measure now, whatever is due. The budget pays for it, and for what the sinks take."""
        self.budget.train(progress)
        began = self._clock()
        made, work = self._measured(progress)
        made = replace(self._with_signals(made), seconds=self._clock() - began)
        self.history.append(made)
        self.pace.took_place(progress)
        self._waiting = None
        for sink in self.sinks:
            self._tell(sink, made)
        price = self.budget.pay(work or 0.0)
        if work is not None:  # else a measurement that failed would make the next one look cheap
            self._price = price
        if (note := made.notes.get("probe")) is not None:
            warnings.warn(f"nothing was measured at step {progress.step}: {note}", PluginWarning, stacklevel=2)
        return made

    def _measured(self, progress: Progress) -> tuple[Measurement, float | None]:
        """And what it was worth in gradients of samples; None where it failed."""
        empty = Measurement(progress.step, progress.samples, progress.epoch)
        if not self.metrics:
            return empty, 0.0
        try:
            report = measure_sharpness(
                self.model, self.probe, self.metrics, progress=False, on_interrupt="raise", **self._settings
            )
        except Exception as error:
            if registry.is_strict() or isinstance(error, LostRankError):
                raise
            return replace(empty, notes={"probe": f"{type(error).__name__}: {error}"}), None
        work = gradients_of(report.cost)
        return _from_report(report, progress), work * report.provenance["num_samples"]

    def _with_signals(self, made: Measurement) -> Measurement:
        values, errors, notes = dict(made.values), dict(made.standard_errors), dict(made.notes)
        for name, source in self.signals.items():
            try:
                if isinstance(source, NoiseScaleMeter):
                    read: Signal | float | Tensor | None = source.signal(name, made.step, made.samples)
                else:
                    read = source()
                signal = read if isinstance(read, Signal) else None
                if read is None:
                    continue
                if isinstance(read, Signal):
                    values[name] = math.nan if read.value is None else read.value
                else:
                    values[name] = float(read.detach() if isinstance(read, Tensor) else read)
            except Exception as error:
                if registry.is_strict():
                    raise
                values[name], notes[name] = math.nan, f"{type(error).__name__}: {error}"
                continue
            if signal is not None and signal.standard_error is not None:
                errors[name] = signal.standard_error
            if signal is not None and signal.note:
                notes[name] = signal.note
        return replace(made, values=values, standard_errors=errors, notes=notes)

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
        """Go on from there; with another cadence the next measurement is due at once.

        Raises:
            ValueError: it is no such state, or damaged. Nothing is changed then.
        """
        check(state, _STATE, "the state of the monitor")
        self.pace.load_state_dict(state["pace"])
        self.budget.load_state_dict(state["budget"])
        if state["budget"]["unit"] == self.budget.unit:
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
        loss_rule=report.provenance["loss_rule"],
    )
