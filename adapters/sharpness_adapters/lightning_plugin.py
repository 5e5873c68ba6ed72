"""The loss of a LightningModule, as a plugin of ``sharpness_plugins`` that its entry point names. Imports no trainer."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sharpness_plugins import hookimpl
from sharpness_plugins.errors import LossRuleError

__all__ = ["is_lightning_module", "loss_of", "sharpness_resolve_loss", "silenced", "step_arguments", "training_step_loss"]

_PACKAGES = ("lightning", "pytorch_lightning")


@hookimpl
def sharpness_resolve_loss(model: Any) -> Callable[[Any, Any], Any] | None:
    """A LightningModule computes its loss in ``training_step``."""
    return training_step_loss if is_lightning_module(model) else None


def is_lightning_module(model: Any) -> bool:
    """By the names of its classes, so that nothing is imported to ask."""
    classes = ((kind.__name__, kind.__module__.partition(".")[0]) for kind in type(model).__mro__)
    return any(name == "LightningModule" and package in _PACKAGES for name, package in classes)


def training_step_loss(module: Any, batch: Any) -> Any:
    """``training_step(batch, 0)`` of a LightningModule, with its logging silenced: a ``loss_fn`` of ``measure_sharpness``.

    Raises:
        LossRuleError: manual optimization, whose ``training_step`` would step; a step that returned no loss.
    """
    if not module.automatic_optimization:
        raise LossRuleError(
            f"{type(module).__name__} optimizes by hand, so its training_step would step the optimizer. Pass "
            "loss_fn=lambda module, batch: ... (the scalar mean loss of a batch)."
        )
    with silenced(module):
        loss = loss_of(module.training_step(*step_arguments(module, batch, 0)))
    if loss is None:
        raise LossRuleError(f"training_step of {type(module).__name__} returned no loss for this batch")
    return loss


def step_arguments(module: Any, batch: Any, batch_idx: int) -> tuple[Any, ...]:
    """As Lightning passes them: the index only where ``training_step`` takes two arguments."""
    parameters = inspect.signature(module.training_step).parameters.values()
    takes_index = len(parameters) >= 2 or any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
    return (batch, batch_idx) if takes_index else (batch,)


def loss_of(output: Any) -> Any:
    """Of what ``training_step`` returned; None where it left the batch out."""
    return output.get("loss") if isinstance(output, Mapping) else output


@contextlib.contextmanager
def silenced(module: Any) -> Iterator[None]:
    """``log`` and ``log_dict`` do nothing; shadowed in the instance, as a class may have overridden them."""
    shadows = {name: module.__dict__[name] for name in ("log", "log_dict") if name in module.__dict__}
    module.__dict__.update(dict.fromkeys(("log", "log_dict"), lambda *args, **kwargs: None))
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            del module.__dict__[name]
        module.__dict__.update(shadows)
