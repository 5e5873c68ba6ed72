"""The gradient noise scale from Lightning's micro-batches and ranks."""

from __future__ import annotations

import contextlib
from typing import Any

from sharpness_plugins import distributed
from sharpness_plugins.noise_scale import NoiseScaleMeter
from sharpness_plugins.schedules import Signal

from .trainer import scale_of

__all__ = ["NOISE", "NoiseWatch"]

NOISE = "gradient_noise_scale"


class NoiseWatch:
    """Feeds a ``NoiseScaleMeter`` from the hooks around Lightning's backward passes.

    Attributes:
        meter: of all parameters that the trainer's optimizers have.
    """

    def __init__(self, trainer: Any) -> None:
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self.meter = NoiseScaleMeter(
            [parameter for group in groups for parameter in group["params"]],
            sum_over_ranks=distributed.sum_over_ranks if trainer.world_size > 1 else None,
        )
        self._open = contextlib.ExitStack()
        self._ratios: set[float] = set()

    def before_backward(self, trainer: Any, num_samples: float, weight: float) -> None:
        """
        Args:
            weight: of the mean loss over these samples in what is differentiated, without a ``GradScaler``'s scale.
        """
        self._ratios.add(weight / num_samples)
        self._open.enter_context(self.meter.micro_batch(num_samples, weight=weight * scale_of(trainer)))

    def after_backward(self, trainer: Any, *, is_last: bool) -> None:
        """A step whose micro-batches, of all ranks, were not weighted by their samples tells nothing."""
        self._open.close()
        if not is_last:
            return
        mean = distributed.sum_of(max(self._ratios)) / distributed.world_size()
        unequal = any(abs(ratio - mean) > 1e-6 * mean for ratio in self._ratios)
        self._ratios = set()
        if distributed.sum_of(float(unequal)):
            self.meter.discard()
        else:
            self.meter.step(grad_scale=scale_of(trainer))

    def close(self) -> None:
        """After an exception in a backward pass."""
        self._open.close()

    def signal(self, step: int, samples: int) -> Signal:
        return self.meter.signal(NOISE, step, samples)
