"""Batches in parts that fit in memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch

from .batches import Batch, rows_of
from .memory import is_out_of_memory

__all__ = ["MicroBatches", "Part", "collect_garbage"]

T = TypeVar("T")


class Part(NamedTuple):
    """Samples ``start`` and following of a batch; the whole batch where it was not taken apart."""

    batch: Batch
    start: int


class MicroBatches:
    """Evaluates batches whole, until memory runs out; then in halves of those, and so on. The size that worked stays.

    The caller weights each part by its own samples, so the numbers do not depend on it.

    Args:
        obstacle: why batches of this model cannot be taken apart, or None; asked when memory runs out.
    Attributes:
        size: samples of a part, once memory has run out.
    """

    def __init__(self, obstacle: Callable[[], str | None]) -> None:
        self.size: int | None = None
        self._obstacle = obstacle

    def each(self, batch: Batch, work: Callable[[Part], T], *, relief: Callable[[], bool] = lambda: False) -> Iterator[T]:
        """``work`` on each part of the batch, in order.

        Args:
            relief: asked first when memory runs out: whether it could free some, so that the same part is worth another try.
        """
        start, num_samples = 0, batch.num_samples
        while start == 0 or (num_samples is not None and start < num_samples):
            part = self.part(batch, start)
            try:
                answer = work(part)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                fits = relief()
                if not fits and (cause := self.cannot_halve(part.batch)):
                    raise type(error)(f"{error} {cause}") from error
            else:
                yield answer
                start += part.batch.num_samples or 1
                continue
            # out of the handler: the error's frames held what the evaluation had allocated
            if not fits:
                self.size = (part.batch.num_samples or 0) // 2
            collect_garbage()

    def part(self, batch: Batch, start: int) -> Part:
        """What is evaluated at once, from the sample ``start`` on."""
        of = batch.num_samples
        if self.size is None or of is None or of <= self.size:
            return Part(batch, start)
        stop = min(start + self.size, of)
        return Part(batch._replace(data=rows_of(batch.data, slice(start, stop), of), num_samples=stop - start), start)

    def cannot_halve(self, batch: Batch) -> str | None:
        """Why not, and what to do, as a clause; None where it can."""
        if batch.num_samples is None:
            return "(It cannot be told how many samples a batch holds, so it was not taken apart: use smaller batches.)"
        if batch.num_samples < 2:
            return "(A single sample does not fit. Perturb fewer parameters with select=..., or use another device.)"
        cause = self._obstacle()
        return f"({cause}, so the batch was not taken apart: use smaller batches.)" if cause else None


def collect_garbage() -> None:
    """After memory ran out, and out of the handler."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
