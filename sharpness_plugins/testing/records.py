"""Settings and details of a plugin: what they must be, and what they must refuse."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from typing import Any

from ..specs import FunctionMetric, Metric
from .core import Violation

__all__ = ["bad_fields", "bad_values", "changed", "check_json"]


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


def bad_values(metric: Any) -> Iterator[tuple[str, Any]]:
    """Settings of a metric that hold a number or a word, with values that are neither."""
    if isinstance(metric, FunctionMetric):
        for name, value in metric.settings.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                yield name, "nonsense"
                yield name, math.nan
    elif is_dataclass(metric):
        yield from bad_fields(metric)


def bad_fields(settings: Any) -> Iterator[tuple[str, Any]]:
    """The same of the fields of a dataclass."""
    for one in fields(settings):
        value, words = getattr(settings, one.name, None), str(one.type).replace("|", " ").split()
        if not one.init or isinstance(value, bool):
            continue
        if isinstance(value, (int, float)) or (value is None and {"int", "float"} & set(words)):
            yield one.name, "nonsense"
            yield one.name, math.nan
        elif isinstance(value, str):
            yield one.name, "no such choice"


def changed(metric: Metric, name: str, value: Any) -> Metric:
    if isinstance(metric, FunctionMetric):
        return metric.with_settings(**{name: value})
    changed: Metric = replace(metric, **{name: value})  # type: ignore[type-var]
    return changed
