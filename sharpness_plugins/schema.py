"""What is taken from elsewhere: settings and their types, JSON with its shape and limits. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

__all__ = ["ANY", "check", "check_types", "read_json"]

MOST_BYTES = 64 * 2**20  # a report of a thousand layers with a spectral density has half of one MiB
_DEEPEST = 100

ANY: Any = object()
_NAMES = {float: "a number", int: "a whole number", str: "text", bool: "true or false", None: "null"}


def read_json(text: str | bytes, what: str) -> Any:
    """Strict JSON: no NaN, at most 64 MiB, at most 100 brackets deep. Nothing in it is run.

    Raises:
        ValueError: it is none; ``what`` it should have been is in the message.
    """
    if not isinstance(text, (str, bytes)):
        raise ValueError(f"this is not {what}: it is a {type(text).__name__}, and not JSON text")
    if len(text) > MOST_BYTES:
        raise ValueError(f"this is not {what}: it has {len(text)} bytes, and at most {MOST_BYTES} are read")
    try:
        found = json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError(f"this is not {what}: its brackets are nested too deep") from None
    except ValueError as error:  # also of numbers with thousands of digits, and of bytes that are no text
        raise ValueError(f"this is not {what}: it is not JSON ({error})") from error
    if _is_deeper(found, _DEEPEST):
        raise ValueError(f"this is not {what}: its brackets are nested more than {_DEEPEST} deep")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _is_deeper(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most):
        level = [
            entry
            for one in level
            if isinstance(one, (list, dict))
            for entry in (one.values() if isinstance(one, dict) else one)
            if isinstance(entry, (list, dict))
        ]
        if not level:
            return False
    return True


def check(value: Any, shape: Any, where: str) -> None:
    """Hold a value against a shape.

    A shape is ``float`` (finite, whole ones too), ``int``, ``str``, ``bool``, ``None``, ``ANY``; a tuple of shapes, one of
    which must fit; ``[shape]`` for a list; ``{str: shape}`` for a mapping with any names; or a mapping from each name that
    must be there to its shape, where ``...: ANY`` lets others be beside them.

    Raises:
        ValueError: it does not fit, with the place in the message.
    """
    if shape is ANY:
        return
    if isinstance(shape, tuple):
        if not any(_fits(value, one) for one in shape):
            raise ValueError(f"{where} must be {' or '.join(map(_named, shape))}, got {_shown(value)}")
        for one in shape:
            if _fits(value, one):
                check(value, one, where)
                return
    if not _fits(value, shape):
        raise ValueError(f"{where} must be {_named(shape)}, got {_shown(value)}")
    if isinstance(shape, list):
        for position, entry in enumerate(value):
            check(entry, shape[0], f"{where}[{position}]")
    elif isinstance(shape, Mapping):
        _check_mapping(value, shape, where)


def _check_mapping(value: Mapping[Any, Any], shape: Mapping[Any, Any], where: str) -> None:
    for name in value:
        if not isinstance(name, str):
            raise ValueError(f"{where} has {_shown(name)} among its names, which are text")
    if str in shape:
        for name, entry in value.items():
            check(entry, shape[str], f"{where}.{name}")
        return
    if missing := [name for name in shape if name is not ... and name not in value]:
        raise ValueError(f"{where} lacks {', '.join(map(repr, missing))}")
    if ... not in shape and (surplus := [name for name in value if name not in shape]):
        raise ValueError(f"{where} has {', '.join(map(_shown, surplus[:3]))}, which does not belong there")
    for name, one in shape.items():
        if name is not ...:
            check(value[name], one, f"{where}.{name}")


def _fits(value: Any, shape: Any) -> bool:
    """By its kind alone."""
    if shape is ANY:
        return True
    if isinstance(shape, Mapping):
        return isinstance(value, Mapping)
    if isinstance(shape, list):
        return isinstance(value, (list, tuple))
    if shape is None:
        return value is None
    if isinstance(value, bool) or shape is bool:
        return shape is bool and isinstance(value, bool)
    if shape is float:
        return isinstance(value, (int, float)) and abs(value) <= _LARGEST and math.isfinite(value)
    return isinstance(value, shape)


_LARGEST = int(1.7e308)  # a whole number beyond it is no float


def _named(shape: Any) -> str:
    if isinstance(shape, Mapping):
        return "a mapping"
    return "a list" if isinstance(shape, list) else _NAMES[shape]


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple, Mapping)):
        return f"a {type(value).__name__}"
    try:
        text = repr(value)
    except ValueError:  # a whole number of too many digits
        return f"a {type(value).__name__} of many digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_types(settings: Any) -> None:
    """Refuse what the annotation of a dataclass field rules out: for ``__post_init__``, ahead of checks of the range.

    ``int`` takes whole numbers, NumPy's too, ``float`` numbers but NaN, ``str`` text and ``bool`` truth values; "or None"
    is understood, and any other annotation takes everything.

    Raises:
        TypeError: a setting has another type. ValueError: it is NaN.
    """
    for one in fields(settings):
        value, words = getattr(settings, one.name), str(one.type).replace("|", " ").split()
        expected = next((word for word in words if word in _TYPES), None)
        if expected is None or not set(words) <= {*_TYPES, "None"} or (value is None and "None" in words):
            continue
        if not any(_TYPES[word][0](value) for word in words if word in _TYPES):
            said = " or ".join([_TYPES[word][1] for word in words if word in _TYPES] + ["None"] * ("None" in words))
            raise TypeError(f"{one.name} must be {said}, got {value!r}")
        if value != value:
            raise ValueError(f"{one.name} must be a number, got {value!r}")


def _is_whole(value: Any) -> bool:
    return not isinstance(value, bool) and hasattr(type(value), "__index__")


_TYPES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "int": (_is_whole, "a whole number"),
    "float": (lambda value: _is_whole(value) or isinstance(value, float), "a number"),
    "str": (lambda value: isinstance(value, str), "text"),
    "bool": (lambda value: isinstance(value, bool), "True or False"),
}
