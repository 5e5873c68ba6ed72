"""Callbacks that Lightning and Fabric find by their entry points; nothing unless ``SHARPNESS_AUTO=1``.

Lightning calls the factories unguarded whenever a Trainer is made, so they import nothing before they are asked and never
raise.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

__all__ = ["auto_callbacks", "auto_fabric_callbacks"]


def auto_callbacks() -> list[Any]:
    """For ``lightning.pytorch.callbacks_factory``: a ``SharpnessCallback``.

    ``SHARPNESS_AUTO_METRICS`` names the metrics (comma-separated), ``SHARPNESS_AUTO_EVERY`` how often.
    """

    def make() -> Any:
        from sharpness_adapters.lightning import SharpnessCallback

        callback = SharpnessCallback(**_settings())
        callback.is_optional = True
        return callback

    return _guarded(make)


def auto_fabric_callbacks() -> list[Any]:
    """For ``lightning.fabric.callbacks_factory``: a ``FabricSharpnessCallback``."""

    def make() -> Any:
        from sharpness_adapters.fabric import FabricSharpnessCallback

        return FabricSharpnessCallback(**_settings())

    return _guarded(make)


def _settings() -> dict[str, Any]:
    names = [name.strip() for name in os.environ.get("SHARPNESS_AUTO_METRICS", "").split(",") if name.strip()]
    every = os.environ.get("SHARPNESS_AUTO_EVERY")
    return {"metrics": names or None, **({"every": every} if every else {})}


def _guarded(make: Callable[[], Any]) -> list[Any]:
    if os.environ.get("SHARPNESS_AUTO") != "1":
        return []
    try:
        return [make()]
    except Exception as error:
        warnings.warn(f"SHARPNESS_AUTO=1 measures nothing: {type(error).__name__}: {error}", stacklevel=3)
        return []
