"""Signals for batch-size schedules: who measures them, when, and within which budget."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from . import distributed, registry
from .errors import LostRankError, PluginWarning, UnknownNameError, did_you_mean
from .measure import measure_sharpness
from .pacing import FIRST_GUESS, Budget, Pace, gradients_of
from .probe import num_probe_samples
from .registry import Metric
from .report import Kind
from .schedules import Progress, Signal
from .texts import name_and_settings

if TYPE_CHECKING:
    from .losses import LossFn
    from .noise_scale import NoiseScaleMeter

__all__ = ["MeterSignal", "MetricSignal", "SignalBook", "SignalContext", "SignalSource", "find_signal"]


@dataclass(frozen=True)
class SignalContext:
    """What a signal may look at.

    Attributes:
        probe: a loader of its own, never the one that training reads.
        meter: of the gradient noise scale, fed by training; None where nobody feeds one.
        step, samples: how far training has come.
        seed: the same for the same step of the same run.
    """

    model: nn.Module | None
    optimizer: Optimizer
    probe: Iterable[Any] | None
    loss_fn: LossFn | None
    criterion: Callable[..., Any] | None
    meter: NoiseScaleMeter | None
    step: int
    samples: int
    seed: int


SignalSource = Callable[[SignalContext], Signal]


@dataclass(frozen=True)
class MetricSignal:
    """Any metric, measured on the probe loader. Unknown where it fails, or stops before its number means anything."""

    metric: Metric

    def __call__(self, context: SignalContext) -> Signal:
        if context.model is None or context.probe is None:
            raise ValueError(f"{registry.metric_name(self.metric)!r} is measured on a model and a probe, and here is none")
        report = measure_sharpness(
            context.model,
            context.probe,
            [self.metric],
            loss_fn=context.loss_fn,
            criterion=context.criterion,
            seed=context.seed,
            progress=False,
            on_interrupt="raise",
        )
        (result,) = report.results.values()
        cost = result.cost
        work = 0.0 if cost is None else gradients_of(cost)
        unknown = result.status.kind in (Kind.FAILED, Kind.NOT_CONVERGED) or not math.isfinite(result.value)
        return Signal(
            None if unknown else result.value,
            None if unknown else result.standard_error,
            step=context.step,
            samples=context.samples,
            note=result.status.message,
            work=work * report.provenance["num_samples"],
        )


@dataclass(frozen=True)
class MeterSignal:
    """A quantity that training's own gradients tell at no further pass over data.

    Attributes:
        quantity: one of ``noise_scale.SIGNALS``.
    """

    quantity: str

    def __call__(self, context: SignalContext) -> Signal:
        if context.meter is None:
            raise ValueError(
                f"{self.quantity!r} comes from the gradients of micro-batches or ranks, and no NoiseScaleMeter is fed here"
            )
        return context.meter.signal(self.quantity, context.step, context.samples)


def find_signal(name: str) -> SignalSource:
    """The signal of this name (``"hessian_topk:k=1"``): a plugin's, or else the metric.

    Raises:
        UnknownNameError: there is neither.
    """
    plain, settings = name_and_settings(name)
    if registry.available_signals(plain):
        return registry.get_signal(plain, **settings)
    if registry.available_metrics(plain):
        return MetricSignal(registry.get_metric(plain, **settings))
    known = sorted([*registry.available_signals(), *registry.available_metrics()])
    raise UnknownNameError(
        f"the schedule looks at signal {name!r}, and no signal or metric has that name.{did_you_mean(plain, known)} "
        f"Available: {', '.join(known)}."
    )


class SignalBook:
    """The newest value of every signal that a schedule looks at, measured when it is due and the budget allows.

    A signal that is due but too dear waits until training has gone on long enough to pay for it.

    Args:
        requests: names, and how often to measure: a duration as text, or None for before every step.
    """

    def __init__(self, requests: Mapping[str, str | None], budget: Budget, probe: Iterable[Any] | None = None) -> None:
        self._sources = {name: find_signal(name) for name in requests}
        self._paces = {name: Pace(every, budget.clock) for name, every in requests.items()}
        self._prices: dict[str, float] = {}
        self.budget = budget
        self._probe_samples = 0.0 if probe is None else num_probe_samples(probe)
        self.newest: dict[str, Signal] = {}

    @property
    def requests(self) -> tuple[str, ...]:
        return tuple(self._sources)

    @property
    def measured(self) -> list[str]:
        """The signals that are metrics, measured on the probe."""
        return [name for name, source in self._sources.items() if isinstance(source, MetricSignal)]

    @property
    def needs_meter(self) -> bool:
        """Whether a signal comes from the gradients of training."""
        return any(isinstance(source, MeterSignal) for source in self._sources.values())

    def measure_due(self, progress: Progress, context: SignalContext) -> None:
        """Measure what is due, in the order of the requests; on all ranks, and where a clock has a say, when rank 0 does."""
        self.budget.train(progress)
        for name, pace in self._paces.items():
            price = self._prices.get(name, self.budget.price_of(FIRST_GUESS * self._probe_samples, progress))
            measures = pace.is_due(progress) and (self._is_free(name) or self.budget.affords(price))
            if pace.is_timed or (pace.is_due(progress) and self.budget.is_timed and not self._is_free(name)):
                measures = distributed.from_rank_zero(measures)
            if measures:
                self.newest[name] = signal = self._ask(name, context)
                self._prices[name] = self.budget.pay(signal.work)
                pace.took_place(progress)

    def _ask(self, name: str, context: SignalContext) -> Signal:
        """One that raises is unknown, and training goes on."""
        try:
            return self._sources[name](context)
        except Exception as error:
            if registry.is_strict() or isinstance(error, LostRankError):
                raise
            note = f"{type(error).__name__}: {error}"
            warnings.warn(f"signal {name!r} failed at step {context.step}: {note}", PluginWarning, stacklevel=4)
            return Signal(None, None, context.step, context.samples, note)

    def _is_free(self, name: str) -> bool:
        return isinstance(self._sources[name], MeterSignal)

    def state_dict(self) -> dict[str, Any]:
        return {
            "newest": {name: asdict(signal) for name, signal in self.newest.items()},
            "paces": {name: pace.state_dict() for name, pace in self._paces.items()},
            "prices": dict(self._prices),
            "budget": self.budget.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.newest = {name: Signal(**signal) for name, signal in state["newest"].items()}
        for name, pace in state["paces"].items():
            self._paces[name].load_state_dict(pace)
        self._prices = dict(state["prices"])
        self.budget.load_state_dict(state["budget"])
