"""The loss of a LightningModule, as a plugin of ``sharpness_plugins`` that its entry point names.

Imports neither a trainer nor torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sharpness_plugins import hookimpl

__all__ = ["is_lightning_module", "sharpness_resolve_loss"]

_PACKAGES = ("lightning", "pytorch_lightning")


@hookimpl
def sharpness_resolve_loss(model: Any) -> Callable[[Any, Any], Any] | None:
    """A LightningModule computes its loss in ``training_step``."""
    if not is_lightning_module(model):
        return None
    from .lightning_step import training_step_loss

    return training_step_loss


def is_lightning_module(model: Any) -> bool:
    """By the names of its classes, so that nothing is imported to ask."""
    classes = ((kind.__name__, kind.__module__.partition(".")[0]) for kind in type(model).__mro__)
    return any(name == "LightningModule" and package in _PACKAGES for name, package in classes)
