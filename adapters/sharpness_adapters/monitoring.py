"""What callbacks of Lightning and of Fabric are told about measuring; imports neither."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from sharpness_plugins import registry
from sharpness_plugins.measure import Metrics, resolve_metrics
from sharpness_plugins.monitor import CSVSink, JSONLSink, Measurement, Reading, SharpnessMonitor, Sink
from sharpness_plugins.pacing import Budget, Pace
from sharpness_plugins.texts import name_and_settings

from .lightning_plugin import is_lightning_module
from .lightning_step import training_step_loss
from .sharded import refuse_sharded

__all__ = ["Monitoring", "values_of"]


class Monitoring:
    """Settings of a ``SharpnessMonitor``, all of which a YAML file can hold but the last ones.

    Args:
        metrics: as for ``measure_sharpness``; a name may carry settings, ``"hessian_topk:k=1"``.
        every, budget, budget_in, batch_norm, seed, criterion: as for ``SharpnessMonitor``.
        num_samples: of the probe.
        csv, jsonl: files to append to.
        prefix: of the names that are logged.
        probe: batches, or a loader whose data set they are drawn from.
        loss_fn: None for ``training_step_loss`` of a LightningModule, unless there is a ``criterion``, and else for the
            rules of ``measure_sharpness``.
        sinks: callables that are told of each measurement, on every rank.
        signals: further numbers that cost nothing, as for ``SharpnessMonitor``.
    Attributes:
        monitor: the ``SharpnessMonitor``; None before there is something to measure.
    """

    def __init__(
        self,
        metrics: str | Sequence[Any] | Mapping[str, Any] | None = None,
        every: str = "1ep",
        budget: float | None = 0.02,
        num_samples: int = 512,
        seed: int = 0,
        batch_norm: str = "eval",
        budget_in: str = "seconds",
        csv: str | None = None,
        jsonl: str | None = None,
        prefix: str = "sharpness",
        probe: Any = None,
        loss_fn: Any = None,
        criterion: Any = None,
        sinks: Any = None,
        signals: Any = None,
    ) -> None:
        self.metrics: Metrics = resolve_metrics(_named(metrics))
        Pace(every), Budget(budget, budget_in)  # refused here rather than after the data were loaded
        self.every, self.budget, self.budget_in = every, budget, budget_in
        self.num_samples, self.seed, self.batch_norm = num_samples, seed, batch_norm
        self.csv, self.jsonl, self.prefix = csv, jsonl, prefix
        self.probe, self.loss_fn, self.criterion = probe, loss_fn, criterion
        self.sinks: list[Sink] = [sinks] if callable(sinks) else list(sinks or ())
        self.signals: dict[str, Reading] = dict(signals or {})
        self.monitor: SharpnessMonitor | None = None
        self._saved: dict[str, Any] | None = None

    @property
    def last(self) -> Measurement | None:
        """The newest measurement."""
        return None if self.monitor is None else self.monitor.last

    def _make_monitor(self, module: nn.Module, probe: list[Any], log: Sink, signals: Mapping[str, Any]) -> SharpnessMonitor:
        """
        Args:
            log: the trainer's own, told after the files and before the user's sinks.
            signals: what the trainer shows by itself; metrics and signals of the user's go before them.
        """
        refuse_sharded(module, type(self).__name__)
        metrics = resolve_metrics(self.metrics)
        loss_fn = self.loss_fn
        if loss_fn is None and self.criterion is None and is_lightning_module(module):
            loss_fn = training_step_loss
        given: list[tuple[Callable[[str], Sink], str | None]] = [(CSVSink, self.csv), (JSONLSink, self.jsonl)]
        return SharpnessMonitor(
            module,
            probe,
            metrics,
            every=self.every,
            budget=self.budget,
            budget_in=self.budget_in,
            loss_fn=loss_fn,
            criterion=self.criterion,
            batch_norm=self.batch_norm,
            seed=self.seed,
            signals={**{name: one for name, one in signals.items() if name not in metrics}, **self.signals},
            sinks=[*(kind(path) for kind, path in given if path is not None), log, *self.sinks],
        )


def values_of(measurement: Measurement, prefix: str) -> dict[str, float]:
    """For a logger: values, standard errors and the loss."""
    values = {f"{prefix}/{name}": value for name, value in measurement.values.items()}
    values |= {f"{prefix}/{name}_se": error for name, error in measurement.standard_errors.items()}
    return values if measurement.loss is None else {**values, f"{prefix}/loss": measurement.loss}


def _named(metrics: Any) -> Any:
    """Names with settings, ``"hessian_topk:k=1"``, made metrics; anything else as it is."""
    if isinstance(metrics, str):
        name, settings = name_and_settings(metrics)
        return registry.get_metric(name, **settings)
    return [_named(one) for one in metrics] if isinstance(metrics, (list, tuple)) else metrics
