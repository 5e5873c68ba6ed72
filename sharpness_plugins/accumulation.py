"""Gradients of a batch from its micro-batches, each weighted by its samples, so that ragged ones are exact."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Accumulation", "synchronized"]


class Accumulation:
    """After the last micro-batch of a group, ``.grad`` is the gradient of the mean over all its samples on all ranks.

    A micro-batch's loss is the mean over its ``n_j`` samples. Where the group's size ``n`` is known, it is weighted by
    ``n_j / n``. Where it is not, by ``n_j / typical``, and the gradients are rescaled once, at the group's end: before
    they are clipped, unscaled or looked at. On ``world_size`` ranks whose gradients are averaged, as DDP and FSDP do,
    the weights are that many times larger.

    ::

        for batch in loader:
            micro_batch = loader.micro_batch
            with synchronized(model, micro_batch.is_last):
                accumulation.backward(loss_fn(model, batch), *micro_batch)
            if micro_batch.is_last:
                optimizer.step()
                optimizer.zero_grad()

    The group begins with gradients that are None or zero. A half-precision loss rounds the weight to its own dtype
    (0.4 % in bfloat16): take the mean in float32.

    Args:
        parameters: whose gradients are rescaled; an optimizer for those that it has at that time.
        world_size: ranks whose gradients are averaged; 1 where they are summed.
        typical: about what a group holds over all ranks, the same number on every rank. It only keeps gradients of
            unknown groups from over- or underflowing in half precision.
        sum_over_ranks: adds a number up over the ranks, once per group of unknown size; None for one process.
        scaler: scales the loss before its backward pass (a ``torch.amp.GradScaler``).
    """

    def __init__(
        self,
        parameters: Optimizer | Iterable[Tensor],
        *,
        world_size: int = 1,
        typical: float = 1.0,
        sum_over_ranks: Callable[[float], float] | None = None,
        scaler: Any = None,
    ) -> None:
        if world_size < 1:
            raise ValueError(f"world_size must be at least 1, got {world_size}")
        self._parameters = parameters if isinstance(parameters, Optimizer) else list(parameters)
        self._world_size = world_size
        self._typical = _positive("typical", typical)
        self._sum_over_ranks = sum_over_ranks
        self._scaler = scaler
        self._seen = 0.0
        self._group: float | None = None

    def weight(self, num_samples: float, group_samples: float | None = None) -> float:
        """What to multiply this micro-batch's mean loss with; its samples are counted.

        Raises:
            ValueError: a group that changes its size, or that has more samples than it was said to have.
        """
        num_samples = _positive("num_samples", num_samples)
        if group_samples is not None:
            group_samples = _positive("group_samples", group_samples)
        if self._seen and group_samples != self._group:
            raise ValueError(
                f"a group of {_size(self._group)} samples goes on as one of {_size(group_samples)}. Call finish() after its "
                "last micro-batch, or reset() where it is given up."
            )
        if group_samples is None and self._world_size > 1 and self._sum_over_ranks is None:
            raise ValueError(
                f"the size of a group on {self._world_size} ranks must be known or summed: pass group_samples, or "
                "sum_over_ranks to Accumulation"
            )
        seen = self._seen + num_samples
        if group_samples is not None and seen > group_samples * (1 + 1e-9):
            raise ValueError(f"the group was said to hold {group_samples:g} samples, and now has {seen:g}")
        self._seen, self._group = seen, group_samples
        return self._world_size * num_samples / (self._typical if group_samples is None else group_samples)

    def backward(self, loss: Tensor, num_samples: float, group_samples: float | None = None, is_last: bool = False) -> None:
        """The backward pass of one weighted micro-batch; of the last one of a group, also ``finish()``.

        Args:
            loss: the mean over its samples, a scalar.
            num_samples, group_samples, is_last: as in ``samplers.MicroBatch``.
        """
        loss = loss * self.weight(num_samples, group_samples)
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()
        if is_last:
            self.finish()

    def finish(self) -> None:
        """End the group: a group of unknown size is rescaled by what it turned out to hold. Nothing without a group."""
        if self._seen and self._group is None:
            total = self._seen if self._sum_over_ranks is None else self._sum_over_ranks(self._seen)
            self._rescale(self._typical / total)
        self.reset()

    def reset(self) -> None:
        """Give the group up, after its gradients were set to zero."""
        self._seen, self._group = 0.0, None

    @torch.no_grad()
    def _rescale(self, factor: float) -> None:
        if factor == 1:
            return
        for parameter in self._each():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def _each(self) -> Iterator[Tensor]:
        if isinstance(self._parameters, Optimizer):
            for group in self._parameters.param_groups:
                yield from group["params"]
        else:
            yield from self._parameters


@contextlib.contextmanager
def synchronized(module: Any, is_last: bool) -> Iterator[None]:
    """Forward and backward pass inside: ranks exchange gradients after the last micro-batch of a group only.

    For DistributedDataParallel and FullyShardedDataParallel by their ``no_sync``, for ``fully_shard`` by its
    ``set_requires_gradient_sync``; nothing for other modules.
    """
    if callable(fully_sharded := getattr(module, "set_requires_gradient_sync", None)):
        fully_sharded(is_last)
        yield
    elif not is_last and callable(no_sync := getattr(module, "no_sync", None)):
        with no_sync():
            yield
    else:
        yield


def _positive(name: str, value: float) -> float:
    value = float(value)
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, got {value:g}. Leave out micro-batches without samples.")
    return value


def _size(group: float | None) -> str:
    return "unknown" if group is None else f"{group:g}"
