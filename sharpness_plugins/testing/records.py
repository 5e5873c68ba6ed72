"""Settings and details of a plugin: what they must be, and what they must refuse."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from typing import Any

from ..specs import FunctionMetric, Metric, metric_settings
from .core import Violation

__all__ = ["bad_values", "changed", "check_json"]


def check_json(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise Violation(f"{where} has the key {key!r}, and JSON has only strings as keys")
            check_json(entry, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple, set, frozenset)):
        for position, entry in enumerate(value):
            check_json(entry, f"{where}[{position}]")
    elif not (value is None or isinstance(value, (bool, int, float, str, Enum)) or hasattr(value, "tolist")):
        raise Violation(f"{where} is a {type(value).__name__}, which a report keeps only as text")


def bad_values(metric: Metric) -> Iterator[tuple[str, Any]]:
    """Settings that hold a number or a word, with values that are neither."""
    kinds: dict[str, str] = {one.name: str(one.type) for one in fields(metric) if one.init} if is_dataclass(metric) else {}
    for name, value in metric_settings(metric).items():
        words = kinds.get(name, "").replace("|", " ").split()
        if isinstance(value, bool):
            continue
        if isinstance(value, (int, float)) or (value is None and {"int", "float"} & set(words)):
            yield name, "nonsense"
            yield name, math.nan
        elif isinstance(value, str) and not isinstance(metric, FunctionMetric):
            yield name, "no such choice"


def changed(metric: Metric, name: str, value: Any) -> Metric:
    if isinstance(metric, FunctionMetric):
        return metric.with_settings(**{name: value})
    changed: Metric = replace(metric, **{name: value})  # type: ignore[type-var]
    return changed
