"""What the two box metrics share: the (C_ε, A)-sharpness of Keskar et al. 2017."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import torch

from ..expected import Range
from ..maximizers import LBFGSB, Maximizer, Maximum, MultiStart, Proposals, ValueAndGrad, maximizer_named
from ..regions import Box
from . import starts

__all__ = [
    "budget_of",
    "check_epsilon",
    "check_loss",
    "described",
    "expected_gradients",
    "maximize",
    "passed_over",
    "sharpness",
    "solver",
    "uses_proposals",
]


_LINE_SEARCH = 20  # SciPy's most evaluations in one iteration


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
    proposals: Proposals = (),
    *,
    spent: int = 0,
) -> Maximum:
    """From zero; solvers of several starts also get ``proposals`` and, after those, zero and random ones.

    What was ``spent`` to find the proposals is taken from the budget of a ``MultiStart``.
    """
    chosen = solver(maximizer)
    if isinstance(chosen, MultiStart) and spent:
        chosen = replace(chosen, max_gradients=max(1, chosen.max_gradients - spent))
    zero = box.anchor.new_zeros(1).expand(len(box.anchor))  # no memory
    if not uses_proposals(chosen):
        return chosen.maximize(fn, box, zero)
    return chosen.maximize(fn, box, zero, itertools.chain(proposals, [("zero", zero)], starts.random_starts(box, rng)))


def expected_gradients(maximizer: Maximizer | str) -> Range:
    """Of one inner maximisation; without an upper bound where the solver does not tell its budget."""
    chosen = solver(maximizer)
    if isinstance(chosen, LBFGSB):
        return Range(1, chosen.max_iterations + 2, _LINE_SEARCH * chosen.max_iterations + 2)
    budget = budget_of(chosen)
    tells = hasattr(chosen, "max_gradients") and hasattr(getattr(chosen, "solver", chosen), "max_gradients")
    return Range(1, budget, budget if tells else math.inf)


def passed_over(count: int) -> str:
    """A clause on points whose loss was infinite or NaN; empty where there were none."""
    points = f"{count} points" if count > 1 else "1 point"
    return f"; the loss was not finite at {points} of the region, so its maximum is not" if count else ""


def described(maximum: Maximum, loss: float) -> dict[str, Any]:
    """The part of the details that every inner maximisation has."""
    return {
        "start_values": [sharpness(value, loss) for value in maximum.start_values],
        "start_names": list(maximum.start_names),
        "start_gradients": list(maximum.start_gradients),
        "gradients_in_solver": maximum.gradients,
        "steps": maximum.steps,
        "rejections": maximum.rejections,
        "non_finite": maximum.non_finite,
        "stationarity_gap": 100 * maximum.gap / (1 + loss),
    }
