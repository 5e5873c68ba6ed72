"""Sharpness of minima, measured honestly and fast, on any PyTorch model.

>>> from sharpness_plugins import measure_sharpness                         # doctest: +SKIP
>>> print(measure_sharpness(model, loader))                                 # doctest: +SKIP

Importing this package imports no torch: names are looked up on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import metrics
    from .errors import (
        DuplicateNameError,
        LoaderError,
        LossRuleError,
        MeasurementWarning,
        NonFiniteLossError,
        PluginWarning,
        SecondDerivativeError,
        SharpnessError,
        UnknownNameError,
    )
    from .measure import measure_sharpness
    from .objective import Objective
    from .registry import MetricSpec, available_metrics, get_metric, hookimpl, metric
    from .report import Cost, Kind, MetricResult, SharpnessReport, Status

__all__ = [
    "measure_sharpness",
    "SharpnessReport",
    "MetricResult",
    "Status",
    "Kind",
    "Cost",
    "Objective",
    "metrics",
    "metric",
    "available_metrics",
    "get_metric",
    "MetricSpec",
    "hookimpl",
    "SharpnessError",
    "LoaderError",
    "LossRuleError",
    "NonFiniteLossError",
    "SecondDerivativeError",
    "UnknownNameError",
    "DuplicateNameError",
    "MeasurementWarning",
    "PluginWarning",
]

_HOME = {
    "measure_sharpness": "measure",
    "Objective": "objective",
    **dict.fromkeys(("MetricSpec", "available_metrics", "get_metric", "hookimpl", "metric"), "registry"),
    **dict.fromkeys(("Cost", "Kind", "MetricResult", "SharpnessReport", "Status"), "report"),
}


def __getattr__(name: str) -> Any:
    if name not in (*__all__, "__version__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("sharpness-plugins")
    if name == "metrics":
        return importlib.import_module(f"{__name__}.metrics")
    return getattr(importlib.import_module(f"{__name__}.{_HOME.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
