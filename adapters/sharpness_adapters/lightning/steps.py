"""How many optimizer steps a schedule makes, before it is run."""

from __future__ import annotations

from typing import Any

from sharpness_plugins.controller import as_schedule
from sharpness_plugins.schedules import BatchSchedule, Progress, plan

__all__ = ["total_steps"]


def total_steps(
    schedule: str | int | BatchSchedule,
    num_samples: int,
    epochs: int,
    *,
    world_size: int = 1,
    micro_batch: int | None = None,
    max_micro_batch: int | None = None,
    multiple: int = 1,
    drop_last: bool = False,
) -> int:
    """Optimizer steps of a ``fit`` under a ``BatchSizeCallback``, by going through its decisions.

    Args:
        num_samples: in the training data, of which each of ``world_size`` ranks gets the same share, rounded up, as
            ``DistributedSampler`` does.
        micro_batch: of the loader, in mode "accumulate"; None in mode "loader".
    Raises:
        ValueError: the schedule looks at signals, which nobody knows in advance.
    """
    wanted = as_schedule(schedule)
    if wanted.signals:
        raise ValueError(f"the steps of {wanted!r} depend on {', '.join(wanted.signals)}, which nobody knows in advance")
    limits: dict[str, Any] = {
        "world_size": world_size,
        "max_micro_batch": max_micro_batch if micro_batch is None else micro_batch,
        "multiple": multiple if micro_batch is None else micro_batch,
    }
    share = -(-num_samples // world_size)
    decision = wanted.initial()
    current = base = plan(decision.batch_size, **limits)
    steps = samples = 0
    for epoch in range(epochs):
        index, batches = 0, 1
        while index < batches:
            if index == 0 or micro_batch is not None:
                progress = Progress(steps, samples, epoch + index / batches, current.batch_size, base.batch_size)
                next_decision = wanted(progress, decision.memory)
                made = plan(next_decision.batch_size, **limits)
                if index % made.accumulation == 0:
                    decision, current = next_decision, made
                if index == 0:
                    size = current.micro_batch
                    batches = share // size if drop_last else -(-share // size)
                    if not batches:
                        break
            begin = index
            index = min(index + current.accumulation, batches)
            samples += world_size * (min(index * current.micro_batch, share) - begin * current.micro_batch)
            steps += 1
    return steps
