"""Where Trainer stands in its data."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["Position", "position", "samples_per_batch"]


class Position(NamedTuple):
    """Where Trainer stands in its data. ``samples`` are those of this epoch, over all ranks."""

    epoch: int
    samples: int
    epoch_samples: int
    batch_size: int

    @property
    def total(self) -> int:
        return self.epoch * self.epoch_samples + self.samples

    def steps(self, base: int) -> int:
        """Optimizer steps of ``base`` samples that the data so far are: what a schedule laid out for them has behind it."""
        return self.epoch * -(-self.epoch_samples // base) + self.samples // base


def position(args: Any, state: Any, loader: Any) -> Position:
    """From the epoch, a multiple of one over its batches: exact, also at the ragged batch that ends it."""
    per_batch = samples_per_batch(args, loader)
    try:
        num_batches, num_samples = len(loader), len(loader.dataset)
    except TypeError:  # a stream, whose epochs are as long as training
        samples = state.global_step * per_batch * args.gradient_accumulation_steps
        return Position(0, samples, 1 << 62, per_batch * args.gradient_accumulation_steps)
    epoch, batches = divmod(round((state.epoch or 0.0) * num_batches), num_batches)
    epoch_samples = min(num_samples, num_batches * per_batch)
    return Position(
        epoch, min(batches * per_batch, epoch_samples), epoch_samples, per_batch * args.gradient_accumulation_steps
    )


def samples_per_batch(args: Any, loader: Any) -> int:
    """On all ranks together; of the loader, where it tells, as ``auto_find_batch_size`` leaves ``args`` as they were."""
    told = getattr(loader, "total_batch_size", None)
    return told if isinstance(told, int) else int(args.train_batch_size * args.world_size)
