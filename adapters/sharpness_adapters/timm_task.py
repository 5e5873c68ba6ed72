"""Tasks of timm as what is measured; imports no timm."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from torch import nn

from sharpness_plugins.losses import unwrap

if TYPE_CHECKING:
    from timm.task import TrainingTask

__all__ = ["bare_task", "task_loss"]


def task_loss(model: Any, batch: Any) -> Any:
    """The task's own loss, the mean over the batch."""
    return model(*batch)["loss"]


def bare_task(task: TrainingTask) -> TrainingTask:
    """The same task without DDP, compilation and hooks; its parameters are those that are trained, not a teacher's."""
    bare = copy.copy(task)
    bare.__dict__.update({name: OrderedDict() for name, held in vars(task).items() if _is_hooks(name, held)})
    if (module := task.get_trainable_module()) is not task and isinstance(module, nn.Module):
        bare.__dict__.update(task._modules)  # attributes, but no submodules: a teacher, the averaged model
        del bare.__dict__["trainable_module"]
        bare._modules = {"trainable_module": unwrap(module)[0]}
    return bare


def _is_hooks(name: str, held: Any) -> bool:
    return "_hooks" in name and isinstance(held, dict)
