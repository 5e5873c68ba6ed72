"""``training_step`` of a LightningModule, called beside training; imports no Lightning."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from sharpness_plugins.errors import LossRuleError

__all__ = ["beside_training", "loss_of", "step_arguments", "training_step_loss"]

_OF_TORCH = frozenset(vars(nn.Module()))
_MANY = 256  # entries; a longer container holds data
_LARGE = 1 << 20  # elements; a larger tensor that is no state of a metric is a table, which nobody adds to


def training_step_loss(module: Any, batch: Any) -> Any:
    """``training_step(batch, 0)`` of a LightningModule, ``beside_training``: a ``loss_fn`` of ``measure_sharpness``.

    Raises:
        LossRuleError: manual optimization, whose ``training_step`` would step; a step that returned no loss.
    """
    if not module.automatic_optimization:
        raise LossRuleError(
            f"{type(module).__name__} optimizes by hand, so its training_step would step the optimizer. Pass "
            "loss_fn=lambda module, batch: ... (the scalar mean loss of a batch)."
        )
    with beside_training(module):
        loss = loss_of(module.training_step(*step_arguments(module, batch, 0)))
    if loss is None:
        raise LossRuleError(f"training_step of {type(module).__name__} returned no loss for this batch")
    return loss


def step_arguments(module: Any, batch: Any, batch_idx: int) -> tuple[Any, ...]:
    """As Lightning passes them: the index only where ``training_step`` takes two arguments."""
    parameters = inspect.signature(module.training_step).parameters.values()
    takes_index = len(parameters) >= 2 or any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
    return (batch, batch_idx) if takes_index else (batch,)


def loss_of(output: Any) -> Tensor | None:
    """Of what ``training_step`` returned; None where it left the batch out."""
    loss: Tensor | None = output.get("loss") if isinstance(output, Mapping) else output
    return loss


@contextlib.contextmanager
def beside_training(module: nn.Module) -> Iterator[None]:
    """What ``training_step`` logs and notes inside is not training's: metrics, lists of outputs, counters are as before.

    ``log`` and ``log_dict`` do nothing; they are shadowed in the instance, as a class may have overridden them. What the
    module and those in it hold as attributes (states of torchmetrics, lists that ``training_step`` appends to) is a copy
    inside. Parameters and buffers are none of this function's business.
    """
    before = [(one, {name: value for name, value in vars(one).items() if name not in _OF_TORCH}) for one in module.modules()]
    try:
        for one, attributes in before:
            states = attributes.get("_defaults", ())  # of a torchmetrics.Metric
            copies = {name: _copied(value, name in states) for name, value in attributes.items()}
            vars(one).update({name: made for name, made in copies.items() if made is not attributes[name]})
        vars(module).update(dict.fromkeys(("log", "log_dict"), lambda *args, **kwargs: None))
        yield
    finally:
        for one, attributes in before:
            now = vars(one)
            for name in [name for name in now if name not in _OF_TORCH and name not in attributes]:
                del now[name]
            now.update(attributes)


def _copied(value: Any, is_state: bool = False, depth: int = 2) -> Any:
    """What can be added to in place, made anew; anything else as it is."""
    if isinstance(value, Tensor):
        return value.clone() if is_state or value.numel() <= _LARGE else value
    if type(value) not in (list, dict, defaultdict, OrderedDict, set, deque):
        return value
    made = copy.copy(value)
    if depth and len(made) <= _MANY:  # lists of lists, as for several loaders; tensors in a list are not added to
        if isinstance(made, dict):
            made.update({name: _copied(one, depth=depth - 1) for name, one in made.items()})
        elif isinstance(made, list):
            made[:] = [one if isinstance(one, Tensor) else _copied(one, depth=depth - 1) for one in made]
    return made
