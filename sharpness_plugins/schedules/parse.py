"""A schedule from one line of text, as a command line or a YAML file has it."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from ..errors import did_you_mean
from .combinators import Cap, Hold, Max, Min, Monotone, Then
from .core import BatchSchedule
from .learning_rate import FromLearningRate
from .noise import InnerProductTest, NoiseScale, NormTest
from .sharpness import SharpnessSwitch
from .timed import Double, Fixed, Steps, WarmStart

__all__ = ["SCHEDULES", "parse_schedule"]

_CLASSES = (
    *(Fixed, Steps, WarmStart, Double, FromLearningRate, NoiseScale, NormTest, InnerProductTest, SharpnessSwitch),
    *(Then, Max, Min, Cap, Hold, Monotone),
)
SCHEDULES: Mapping[str, Callable[..., BatchSchedule]] = MappingProxyType({one.name: one for one in _CLASSES})
_CALL = re.compile(r"\s*[^\W\d]\w*\s*\(")


def parse_schedule(text: str | int, known: Mapping[str, Callable[..., BatchSchedule]] = SCHEDULES) -> BatchSchedule:
    """A schedule as it is written.

    ``"256"`` is fixed, ``"0:256 40ep:5000"`` are steps, and anything else is a call with literal settings, nested where
    schedules combine: ``"cap(double(256, every='10ep', cap=8192), 4096)"``. The ``repr`` of a schedule is read back.

    Args:
        known: what may be called, by name.
    Raises:
        ValueError: it is no such text, names an unknown schedule, or has a setting that the schedule refuses.
        TypeError: a setting is missing, unknown, or of the wrong type.
    """
    if not isinstance(text, str):
        return Fixed(text)
    if _CALL.match(text) is None:
        return Fixed(int(text)) if re.fullmatch(r"\s*[0-9]+\s*", text) else Steps(text)
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ValueError(f"schedule {text!r} cannot be read: {error}") from None
    schedule: BatchSchedule = _value(node, text, {**known, **{getattr(one, "__name__", ""): one for one in known.values()}})
    return schedule


def _value(node: ast.expr, text: str, known: Mapping[str, Callable[..., BatchSchedule]]) -> Any:
    if not isinstance(node, ast.Call):
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            raise ValueError(f"schedule {text!r}: {ast.unparse(node)!r} is neither a value nor a schedule") from None
    name = ast.unparse(node.func)
    if name not in known:
        raise ValueError(f"schedule {text!r}: {name!r} is unknown.{did_you_mean(name, known)} Known: {', '.join(SCHEDULES)}")
    if any(keyword.arg is None for keyword in node.keywords) or any(isinstance(one, ast.Starred) for one in node.args):
        raise ValueError(f"schedule {text!r}: write each setting of {name!r} out, without asterisks")
    given = [_value(one, text, known) for one in node.args]
    settings = {str(keyword.arg): _value(keyword.value, text, known) for keyword in node.keywords}
    try:
        return known[name](*given, **settings)
    except (TypeError, ValueError) as error:
        raise type(error)(f"schedule {text!r}: {error}") from error
