"""Closures: one that knows its batch, so that it can be cut in parts, and the passes that evaluate several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .. import distributed
from ..accumulation import synchronized
from ..batches import count_samples, rows_of

__all__ = ["BatchClosure", "Closure", "evaluate", "parts_of", "total"]

Closure = Callable[[], Any]


class BatchClosure:
    """The loss of a batch and its backward pass, in one call, or in parts that add up to it::

        optimizer.step(BatchClosure(lambda batch: criterion(model(batch[0]), batch[1]), batch))

    Any optimizer of torch takes it as its closure.

    Args:
        loss_fn: from a batch to the mean loss over its samples, a scalar.
        batch: tensors, or a tree of them, with samples along the first axis.
        backward: of the loss; ``lambda loss: scaler.scale(loss).backward()``, say.
        weight: multiplies the loss.
    """

    def __init__(
        self,
        loss_fn: Callable[[Any], Tensor],
        batch: Any,
        *,
        backward: Callable[[Tensor], Any] = Tensor.backward,
        weight: float = 1.0,
    ) -> None:
        self.loss_fn, self.batch, self.backward, self.weight = loss_fn, batch, backward, weight

    def __call__(self) -> Tensor:
        loss = self.loss_fn(self.batch)
        if self.weight != 1:
            loss = loss * self.weight
        self.backward(loss)
        return loss.detach()

    def split(self, m: int) -> list[BatchClosure]:
        """Closures of ``m`` samples each, the last one of what remains, weighted so that they add up to the mean.

        Raises:
            ValueError: it cannot be told how many samples the batch holds.
        """
        total = count_samples(self.batch)
        if total is None:
            raise ValueError(
                f"it cannot be told how many samples a {type(self.batch).__name__} holds, so it cannot be cut into parts of "
                f"m={m}. Pass one closure for each part: optimizer.step([closure, closure, ...])"
            )
        if total <= m:
            return [self]
        bounds = range(0, total, m)
        return [
            BatchClosure(
                self.loss_fn,
                rows_of(self.batch, slice(start, start + m), total),
                backward=self.backward,
                weight=self.weight * (min(start + m, total) - start) / total,
            )
            for start in bounds
        ]


def parts_of(closure: Closure | Sequence[Closure], m: int | None, *, cuts: bool) -> list[list[Closure]]:
    """Closures that share an ascent, part by part.

    Args:
        m: samples that share one; None for all.
        cuts: whether there is an ascent at all.
    Raises:
        ValueError: there is no closure, or one that cannot be cut.
    """
    closures = [closure] if callable(closure) else list(closure)
    if not closures:
        raise ValueError("no closure was given")
    if m is None:
        return [closures]
    if callable(closure) and not isinstance(closure, BatchClosure):
        raise ValueError(
            f"m={m} cannot cut what a closure evaluates. Pass optimizer.step(BatchClosure(loss_fn, batch)), or one closure "
            "for each part: optimizer.step([closure, closure, ...])"
        )
    parts = [part for one in closures for part in (one.split(m) if isinstance(one, BatchClosure) else [one])]
    return [[part] for part in parts] if cuts else [parts]


def evaluate(
    closures: Sequence[Closure], parameters: Sequence[Tensor], modules: Sequence[nn.Module], *, exchanges: bool
) -> list[Any]:
    """Evaluate closures, whose gradients add up in ``.grad``; returns what they return, detached.

    Args:
        modules: average gradients over ranks, and can be told not to.
        exchanges: whether they do, in the last closure's backward pass.
    Raises:
        RuntimeError: a closure cleared the gradients of those before it.
    """
    losses = []
    for number, closure in enumerate(closures, 1):
        with ExitStack() as stack:
            for module in modules:
                stack.enter_context(synchronized(module, exchanges and number == len(closures)))
            stack.enter_context(torch.enable_grad())
            before = _accumulated(parameters)
            loss = closure()
            _check_accumulated(before)
        losses.append(loss.detach() if isinstance(loss, Tensor) else loss)
    return losses


def total(losses: Sequence[Any]) -> Any:
    found = losses[0]
    for loss in losses[1:]:
        found = found + loss
    return found


def _accumulated(parameters: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Gradients that a further one is added to, in place. Ranks that exchange them put others in their place."""
    if distributed.world_size() > 1:
        return []
    return [(p, p.grad) for p in parameters if p.grad is not None and p.grad.layout is torch.strided]


def _check_accumulated(before: Sequence[tuple[Tensor, Tensor]]) -> None:
    # backward(create_graph=True) puts sums in their place, which require gradients
    now = ((parameter.grad, gradient) for parameter, gradient in before)
    if any(found is None or (found is not gradient and not found.requires_grad) for found, gradient in now):
        raise RuntimeError(
            "a closure cleared the gradients of those before it, which add up. Leave out model.zero_grad(): step() "
            "evaluates each closure with the gradients that it should have"
        )
