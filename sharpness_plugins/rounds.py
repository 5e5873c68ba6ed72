"""Passes over the data, part by part: by each process for itself, or by all ranks at the same time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from .batches import Batch
from .distributed import MemoryRanOut, Ranks, Step, StepKind
from .errors import RemoteFailureError
from .memory import is_out_of_memory
from .micro_batches import MicroBatches, Part, collect_garbage

__all__ = ["InStep", "Rounds"]

T = TypeVar("T")


class Rounds:
    """Each process goes over its own batches."""

    def each(
        self,
        batches: Iterable[Batch],
        parts: MicroBatches,
        work: Callable[[Part], T],
        *,
        lend: Callable[[], T],
        relief: Callable[[], bool] = lambda: False,
    ) -> Iterator[T]:
        """``work`` on the parts of all batches, in order.

        Args:
            parts: how batches are taken apart where memory runs out.
            lend: what a rank does in a round in which it has no part, but others have; only where they go in step.
            relief: see ``MicroBatches.each``.
        """
        for batch in batches:
            yield from parts.each(batch, work, relief=relief)


class InStep(Rounds):
    """All ranks take one part each in every round, or lend what the others need for theirs.

    Where memory runs out on one rank, all give the round up and take smaller parts.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def each(
        self,
        batches: Iterable[Batch],
        parts: MicroBatches,
        work: Callable[[Part], T],
        *,
        lend: Callable[[], T],
        relief: Callable[[], bool] = lambda: False,
    ) -> Iterator[T]:
        """See ``Rounds.each``."""
        waiting, batch, start = iter(batches), None, 0
        while True:
            if batch is None:
                batch, start = next(waiting, None), 0
            part = None if batch is None else parts.part(batch, start)
            if self._ranks.next_step(None if part is None else Step(StepKind.BEGIN)) is None:
                return
            error: Exception | None = None
            try:
                answer = lend() if part is None else work(part)
            except MemoryRanOut:
                pass
            except Exception as raised:
                if not is_out_of_memory(raised):
                    raise
                error = raised.with_traceback(None)  # its frames hold what the evaluation had allocated
            else:
                yield answer
                if batch is not None and part is not None:
                    start += part.batch.num_samples or 1
                    batch = batch if batch.num_samples is not None and start < batch.num_samples else None
                continue
            self._take_smaller(parts, part, error)

    def _take_smaller(self, parts: MicroBatches, part: Part | None, error: Exception | None) -> None:
        """All ranks halve what they take at once, or fail where one of them cannot."""
        if error is not None:
            with contextlib.suppress(MemoryRanOut):
                self._ranks.next_step(None, memory_ran_out=True)
        size = 0 if part is None else part.batch.num_samples or 0
        cause = None if part is None else parts.cannot_halve(part.batch)
        told = self._ranks.gather((size, None if error is None else f"{type(error).__name__}: {error}", cause))
        failed = [(rank, text) for rank, (_, text, _) in zip(self._ranks.members, told, strict=True) if text is not None]
        causes = [cause for size, text, cause in told if cause and (text is not None or size)]
        if causes:
            if error is not None:
                raise type(error)(f"{error} {causes[0]}") from error
            raise RemoteFailureError(f"rank {failed[0][0]} failed: {failed[0][1]} {causes[0]}")
        parts.size = max(size for size, _, _ in told) // 2
        collect_garbage()
