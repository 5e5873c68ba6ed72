"""What people write on a command line or in a configuration file: a name and its settings. Imports no torch."""

from __future__ import annotations

import ast
import re
from typing import Any

__all__ = ["name_and_settings"]


def name_and_settings(text: str) -> tuple[str, dict[str, Any]]:
    """``"epsilon_box:epsilon=5e-4,starts=(1, 2)"`` to the name and its settings; values are Python literals, or text.

    A name may itself hold a colon (``plugin:name``): settings begin at the first colon that ``key=`` follows.

    Raises:
        ValueError: a setting is not ``key=value``.
    """
    name, *tail = re.split(r":(?=\s*\w+\s*=)", text, maxsplit=1)
    settings: dict[str, Any] = {}
    for part in _split_at_commas(tail[0] if tail else ""):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key.isidentifier():
            raise ValueError(f"{text!r}: {part.strip()!r} is not KEY=VALUE. Example: epsilon_box:epsilon=5e-4")
        try:
            settings[key] = ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            settings[key] = value
    return name.strip(), settings


def _split_at_commas(text: str) -> list[str]:
    """At those outside of brackets and quotes: a value may be a tuple, a list, or text with commas."""
    parts, depth, quote, before = [""], 0, "", "="
    for character in text:
        if quote:
            quote = "" if character == quote and before != "\\" else quote
            before = "" if before == "\\" else character  # an escaped backslash escapes nothing
        elif character in "'\"" and before in "=([{,:":  # else it is an apostrophe
            quote, before = character, character
        elif not character.isspace():
            depth += (character in "([{") - (character in ")]}")
            before = character
        if character == "," and depth <= 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part.strip()]
