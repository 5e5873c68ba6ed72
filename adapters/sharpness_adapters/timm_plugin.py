"""timm's tasks and checkpoints, as a plugin of ``sharpness_plugins`` that its entry point names. Imports no timm."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from sharpness_plugins import hookimpl

__all__ = ["sharpness_open_checkpoint", "sharpness_resolve_loss", "task_loss"]


@hookimpl
def sharpness_resolve_loss(model: Any, batch: Any) -> Callable[[Any, Any], Any] | None:
    """A ``timm.task.TrainingTask`` computes its loss itself."""
    tasks = sys.modules.get("timm.task")
    if tasks is None or not isinstance(model, tasks.TrainingTask) or not isinstance(batch, (tuple, list)):
        return None
    return task_loss


def task_loss(model: Any, batch: Any) -> Any:
    """The task's own loss, the mean over the batch."""
    return model(*batch)["loss"]


@hookimpl
def sharpness_open_checkpoint(path: str) -> Callable[[str], Mapping[str, Any]] | None:
    """A checkpoint of timm's train.py tells its model and its data."""
    from .timm_checkpoint import read_timm_checkpoint

    checkpoint = read_timm_checkpoint(path)
    return None if checkpoint is None else checkpoint.open
