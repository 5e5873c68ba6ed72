"""Two metrics: the short way, a function that returns a number; the full way, a dataclass that returns a result."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sharpness_plugins import Kind, MetricResult, Status, metric

if TYPE_CHECKING:
    import torch

    from sharpness_plugins import Objective


@metric("acme_gradient_norm", invariances=["neuron_permutation", "loss_scaling"])
def gradient_norm(objective: Objective, *, order: float = 2.0) -> float:
    """Norm of the gradient at the trained weights: how far from a minimum they are."""
    if not (isinstance(order, (int, float)) and order > 0):
        raise ValueError(f"order must be a positive number, got {order!r}")
    _, gradient = objective.value_and_grad()
    return float(gradient.norm(order))


@metric("acme_average_rise")
@dataclass(frozen=True)
class AverageRise:
    """Mean rise of the loss under normal perturbations of the weights.

    Estimates ``E f(w + sigma z) - f(w)`` with ``z`` standard normal; at a minimum it is ``sigma² trace(H) / 2`` up to
    terms of fourth order. Every draw comes with its mirror image, which cancels the gradient's share of the spread.
    """

    sigma: float = 1e-3
    num_draws: int = 10

    invariances: ClassVar[frozenset[str]] = frozenset({"neuron_permutation", "loss_scaling"})  # testing.check_metric checks

    def __post_init__(self) -> None:
        if not (isinstance(self.sigma, (int, float)) and self.sigma > 0):
            raise ValueError(f"sigma must be a positive number, got {self.sigma!r}")
        if not (isinstance(self.num_draws, int) and self.num_draws >= 2):
            raise ValueError(f"num_draws must be a whole number from 2, got {self.num_draws!r}")

    def __call__(self, objective: Objective, rng: torch.Generator) -> MetricResult:
        import torch  # here, so that listing the metrics stays fast

        loss = objective.value()
        rises = []
        for _ in range(self.num_draws):
            normal = torch.randn(objective.origin.shape, generator=rng, device=rng.device)
            step = self.sigma * normal.to(objective.origin)
            rises.append((objective.value(step) + objective.value(-step)) / 2 - loss)
        return MetricResult(
            value=statistics.fmean(rises),
            standard_error=statistics.stdev(rises) / math.sqrt(self.num_draws),
            status=Status(Kind.ESTIMATE, f"mean over {self.num_draws} pairs of random directions, sigma {self.sigma:g}"),
        )
