"""What the two box metrics share: the (C_ε, A)-sharpness of Keskar et al. 2017."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import sampling
from ..maximizers import Maximizer, Maximum, ValueAndGrad, maximizer_named
from ..regions import Box

__all__ = [
    "budget_of",
    "check_epsilon",
    "check_loss",
    "described",
    "maximize",
    "passed_over",
    "sharpness",
    "solver",
    "uses_proposals",
]


def check_epsilon(epsilon: float) -> None:
    if not 0 < epsilon < float("inf"):
        raise ValueError(f"epsilon must be a positive number, got {epsilon!r}; the paper uses 1e-3 and 5e-4")


def check_loss(loss: float) -> None:
    if not loss > -1:
        raise ValueError(
            f"the loss at the trained weights is {loss:.4g}, and (C_ε, A)-sharpness divides the rise by 1 + loss, which "
            "must be positive. Use a loss that is bounded below by 0."
        )


def sharpness(value: float, loss: float) -> float:
    """``100 (max f - f) / (1 + f)``, in percent."""
    return 100 * (value - loss) / (1 + loss)


def solver(maximizer: Maximizer | str) -> Maximizer:
    return maximizer_named(maximizer) if isinstance(maximizer, str) else maximizer


def uses_proposals(maximizer: Maximizer | str) -> bool:
    return getattr(solver(maximizer), "num_proposals", 0) > 0


def budget_of(maximizer: Maximizer | str) -> float:
    """Gradients that the solver may use; 12 where it does not say."""
    budget: float = getattr(solver(maximizer), "max_gradients", 12)
    return budget


def maximize(
    maximizer: Maximizer | str,
    fn: ValueAndGrad,
    box: Box,
    rng: torch.Generator,
    proposals: Iterable[tuple[str, Tensor]] = (),
) -> Maximum:
    """From zero; solvers of several starts also get ``proposals`` and, after those, random points of the box.

    Points inside it: measured on dense quadratics with all vertices known, they find more in few dimensions (.98 and .85
    of the maximum, mean and worst, at 16 gradients) than random vertices (.97 and .72), which are more often stationary.
    """
    chosen = solver(maximizer)
    start = torch.zeros_like(box.half_width)
    if not uses_proposals(chosen):
        return chosen.maximize(fn, box, start)

    def offered() -> Iterator[tuple[str, Tensor]]:
        yield from proposals
        while True:
            yield "random point", box.half_width * sampling.uniform(len(start), rng, start)

    return chosen.maximize(fn, box, start, offered())


def passed_over(count: int) -> str:
    """A clause on points whose loss was infinite or NaN; empty where there were none."""
    points = f"{count} points" if count > 1 else "1 point"
    return f"; the loss was not finite at {points} of the region, so its maximum is not" if count else ""


def described(maximum: Maximum, loss: float) -> dict[str, Any]:
    """The part of the details that every inner maximisation has."""
    return {
        "start_values": [sharpness(value, loss) for value in maximum.start_values],
        "start_names": list(maximum.start_names),
        "gradients_in_solver": maximum.gradients,
        "steps": maximum.steps,
        "rejections": maximum.rejections,
        "non_finite": maximum.non_finite,
        "stationarity_gap": 100 * maximum.gap / (1 + loss),
    }
