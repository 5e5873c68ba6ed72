"""Which timm this is."""

from __future__ import annotations

import re
from importlib import metadata

__all__ = ["OLDEST", "check_version"]

OLDEST = (1, 0, 27)  # the first whose tasks tell what they train


def check_version() -> None:
    """
    Raises:
        ImportError: timm is older than what is needed.
    """
    found = metadata.version("timm")
    if tuple(int(part) for part in re.findall(r"\d+", found)[:3]) < OLDEST:
        raise ImportError(
            f"sharpness_adapters.timm needs timm>={'.'.join(map(str, OLDEST))}, and {found} is installed. Install it with: "
            'pip install "sharpness-plugins[timm]"'
        )
