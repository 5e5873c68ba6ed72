"""Experiments on small real data, written on the public API only. Importing this imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .warm_start import warm_start_curve

__all__ = ["warm_start_curve"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .warm_start import warm_start_curve

    return warm_start_curve
