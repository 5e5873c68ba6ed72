"""A closure that knows its batch, so that it can be cut in parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..batches import count_samples, rows_of

__all__ = ["BatchClosure", "Closure"]

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
