"""timm's tasks and checkpoints, as a plugin of ``sharpness_plugins`` that its entry point names. Imports no timm."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from sharpness_plugins import hookimpl

__all__ = ["sharpness_open_checkpoint", "sharpness_resolve_loss", "sharpness_unwrap_model"]


@hookimpl
def sharpness_resolve_loss(model: Any, batch: Any) -> Callable[[Any, Any], Any] | None:
    """A ``timm.task.TrainingTask`` computes its loss itself."""
    if not _is_task(model) or not isinstance(batch, (tuple, list)):
        return None
    from .timm_task import task_loss

    return task_loss


@hookimpl
def sharpness_unwrap_model(model: Any) -> Any:
    """What a task trains, without its teacher and its averaged model."""
    if not _is_task(model):
        return None
    from .timm_task import bare_task

    return bare_task(model)


def _is_task(model: Any) -> bool:
    tasks = sys.modules.get("timm.task")
    return tasks is not None and isinstance(model, tasks.TrainingTask)


@hookimpl
def sharpness_open_checkpoint(path: str) -> Callable[[str], Mapping[str, Any]] | None:
    """A checkpoint of timm's train.py tells its model and its data."""
    from .timm_checkpoint import read_timm_checkpoint

    checkpoint = read_timm_checkpoint(path)
    return None if checkpoint is None else checkpoint.open
