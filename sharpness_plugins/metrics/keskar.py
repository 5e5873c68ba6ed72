"""What the two box metrics share: the (C_ε, A)-sharpness of Keskar et al. 2017."""

from __future__ import annotations

from typing import Any

from ..maximizers import Maximizer, Maximum, maximizer_named

__all__ = ["check_epsilon", "check_loss", "sharpness", "solver"]


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


def described(maximum: Maximum, loss: float) -> dict[str, Any]:
    """The part of the details that every inner maximisation has."""
    return {
        "start_values": [sharpness(value, loss) for value in maximum.start_values],
        "start_names": list(maximum.start_names),
        "gradients_in_solver": maximum.gradients,
        "steps": maximum.steps,
        "rejections": maximum.rejections,
        "stationarity_gap": 100 * maximum.gap / (1 + loss),
    }
