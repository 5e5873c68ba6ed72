"""What a measurement must not leave behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING
from typing import Any

import torch
from torch import Tensor

from .. import sampling
from .core import Violation
from .problems import Problem

__all__ = ["no_change"]


@contextmanager
def no_change(problem: Problem) -> Iterator[None]:
    """Raises ``Violation`` if something that belongs to the user is not as it was, also where the block raised."""
    before = dict(_state(problem))
    try:
        yield
    finally:
        after = dict(_state(problem))
        changed = [name for name, value in before.items() if not _equal(value, after.get(name, MISSING))]
        changed += [name for name in after if name not in before]
        torch.set_grad_enabled(before["the grad mode"])
        torch.set_default_dtype(before["the default dtype"])
        if changed:
            raise Violation(f"it changed {', '.join(changed[:5])}" + (" and more" if len(changed) > 5 else ""))


def _state(problem: Problem) -> Iterator[tuple[str, Any]]:
    for name, parameter in problem.model.named_parameters():
        yield f"parameter {name}", parameter.detach().clone()
        yield f"the identity of parameter {name}", id(parameter)
        yield f"requires_grad of {name}", parameter.requires_grad
        yield f"the gradient of {name}", None if parameter.grad is None else parameter.grad.clone()
    for name, buffer in problem.model.named_buffers():
        yield f"buffer {name}", buffer.clone()
    for name, module in problem.model.named_modules():
        yield f"the mode of {name or 'the model'}", module.training
        yield f"hooks of {name or 'the model'}", len(module._forward_hooks) + len(module._forward_pre_hooks)
    for position, batch in enumerate(problem.loader):
        yield f"batch {position} of the data", [tensor.clone() for tensor in batch]
    for owner, state in sampling.global_states().items():
        yield f"{owner}'s random state", state
    yield "the grad mode", torch.is_grad_enabled()
    yield "the default dtype", torch.get_default_dtype()
    yield "the number of threads", torch.get_num_threads()
    yield "the deterministic mode", torch.are_deterministic_algorithms_enabled()


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)
