"""Sharpness of minima, measured honestly and fast, on any PyTorch model.

>>> from sharpness_plugins import measure_sharpness                         # doctest: +SKIP
>>> print(measure_sharpness(model, loader))                                 # doctest: +SKIP

Importing this package imports no torch: names are looked up on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import metrics, optimizers, schedules
    from .controller import BatchChange, BatchController
    from .create import create_optimizer
    from .distributed import RanksOf
    from .errors import (
        DuplicateNameError,
        LoaderError,
        LossRuleError,
        MeasurementStopped,
        MeasurementWarning,
        NonFiniteLossError,
        PluginWarning,
        SecondDerivativeError,
        SharpnessError,
        StateFileError,
        UnknownNameError,
    )
    from .expected import ExpectedWork, Range
    from .measure import measure_sharpness
    from .monitor import CSVSink, JSONLSink, Measurement, SharpnessMonitor
    from .noise_scale import NoiseScaleMeter
    from .objective import Objective
    from .planning import MeasurementPlan, plan_measurement
    from .probe import probe_batches
    from .registry import (
        CouplingSpec,
        MetricSpec,
        OptimizerSpec,
        ScheduleSpec,
        SignalSpec,
        available_couplings,
        available_metrics,
        available_optimizers,
        available_schedules,
        available_signals,
        get_coupling,
        get_metric,
        get_rule,
        get_schedule,
        get_signal,
        hookimpl,
        metric,
    )
    from .report import Cost, Kind, MetricResult, SharpnessReport, Status

__all__ = [
    "measure_sharpness",
    "plan_measurement",
    "MeasurementPlan",
    "ExpectedWork",
    "Range",
    "SharpnessReport",
    "MetricResult",
    "Status",
    "Kind",
    "Cost",
    "Objective",
    "RanksOf",
    "metrics",
    "metric",
    "available_metrics",
    "get_metric",
    "MetricSpec",
    "SharpnessMonitor",
    "Measurement",
    "probe_batches",
    "CSVSink",
    "JSONLSink",
    "BatchController",
    "BatchChange",
    "NoiseScaleMeter",
    "schedules",
    "available_schedules",
    "get_schedule",
    "ScheduleSpec",
    "available_signals",
    "get_signal",
    "SignalSpec",
    "available_couplings",
    "get_coupling",
    "CouplingSpec",
    "optimizers",
    "create_optimizer",
    "available_optimizers",
    "get_rule",
    "OptimizerSpec",
    "hookimpl",
    "SharpnessError",
    "LoaderError",
    "LossRuleError",
    "NonFiniteLossError",
    "SecondDerivativeError",
    "StateFileError",
    "UnknownNameError",
    "DuplicateNameError",
    "MeasurementStopped",
    "MeasurementWarning",
    "PluginWarning",
]

_HOME = {
    "measure_sharpness": "measure",
    "Objective": "objective",
    "RanksOf": "distributed",
    **dict.fromkeys(("ExpectedWork", "Range"), "expected"),
    **dict.fromkeys(("MeasurementPlan", "plan_measurement"), "planning"),
    "probe_batches": "probe",
    **dict.fromkeys(("CSVSink", "JSONLSink", "Measurement", "SharpnessMonitor"), "monitor"),
    "NoiseScaleMeter": "noise_scale",
    **dict.fromkeys(("BatchChange", "BatchController"), "controller"),
    "create_optimizer": "create",
    **dict.fromkeys(("CouplingSpec", "MetricSpec", "OptimizerSpec", "ScheduleSpec", "SignalSpec"), "registry"),
    **dict.fromkeys(("available_couplings", "available_metrics", "available_optimizers", "available_schedules"), "registry"),
    **dict.fromkeys(("available_signals", "hookimpl", "metric"), "registry"),
    **dict.fromkeys(("get_coupling", "get_metric", "get_rule", "get_schedule", "get_signal"), "registry"),
    **dict.fromkeys(("Cost", "Kind", "MetricResult", "SharpnessReport", "Status"), "report"),
}


def __getattr__(name: str) -> Any:
    if name not in (*__all__, "__version__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("sharpness-plugins")
    if name in ("metrics", "optimizers", "schedules"):
        return importlib.import_module(f"{__name__}.{name}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
