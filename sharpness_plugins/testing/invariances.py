"""What a metric says does not move its number, tried on networks that compute the same function."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from ..errors import SharpnessError
from ..report import Kind, MetricResult
from . import problems
from .core import told
from .problems import Problem

__all__ = ["holds"]

_FACTORS = (8.0, 1 / 8)
_LOSS_FACTORS = (4.0, 1 / 4)
_ERRORS = 5.0  # standard errors that two estimates of one number may lie apart
_DECIDES = 0.3  # a tolerance wider than this share of the value tells nothing
_SLACK = {Kind.ESTIMATE: 1e-3, Kind.EXACT: 1e-6, Kind.CONVERGED: 1e-3, Kind.LOWER_BOUND: 2e-2, Kind.NOT_CONVERGED: 5e-2}


def holds(
    name: str, measure: Callable[[Problem], MetricResult], base: MetricResult, *, has_error: bool
) -> tuple[bool | None, str]:
    """Whether the invariance holds, None where that cannot be told, and the numbers or the reason.

    Args:
        base: measured on ``problems.classifier()``.
        has_error: whether the standard errors can be believed.
    """
    plain = problems.classifier()
    said = []
    try:
        if name == "batch_norm_scaling":
            plain = problems.batch_norm_classifier()
            base = measure(plain)
        for problem, factor, how in _transformed(name, plain):
            other = measure(problem)
            wanted = factor * base.value
            if not (math.isfinite(wanted) and math.isfinite(other.value)):
                return None, f"the number is not finite {how}"
            slack, errors = _allowed(base, factor, other, has_error)
            apart = abs(other.value - wanted)
            if apart > slack + errors:
                expectation = f"{wanted:.6g} ± {slack + errors:.2g} was expected"
                return False, f"{base.value:.6g}, {how} {other.value:.6g} where {expectation}"
            if apart > slack and slack + errors > _DECIDES * abs(wanted):
                return None, f"{base.value:.6g}, {how} {other.value:.6g}: its error is too wide to tell"
            said.append(f"{how} {other.value:.6g}")
    except (ValueError, TypeError, SharpnessError) as error:
        return None, f"it does not measure {plain.name} transformed so: {told(error)}"
    if not base.value:
        return None, "the number is 0, which every factor leaves as it is"
    return True, f"{base.value:.6g}, {', '.join(said)}"


def _allowed(base: MetricResult, factor: float, other: MetricResult, has_error: bool) -> tuple[float, float]:
    """How far two numbers may lie apart by how they were obtained, and by their standard errors."""
    slack = sum(_SLACK.get(one.status.kind, 0.0) * abs(by * one.value) for one, by in ((base, factor), (other, 1.0)))
    if not has_error:
        return slack, 0.0
    return slack, _ERRORS * math.hypot(factor * (base.standard_error or 0.0), other.standard_error or 0.0)


def _transformed(name: str, plain: Problem) -> Iterator[tuple[Problem, float, str]]:
    """What must not move the number, or by which factor, and in which words."""
    if name == "layer_rescaling":
        for factor in _FACTORS:
            yield problems.rescaled(plain, factor), 1.0, f"a layer times {factor:g}"
    elif name == "neuron_permutation":
        for seed in (0, 1):
            yield problems.neurons_permuted(plain, seed), 1.0, "neurons in another order"
    elif name == "batch_norm_scaling":
        for factor in _LOSS_FACTORS:
            yield problems.normalized_scaled(plain, factor), 1.0, f"weights before BatchNorm times {factor:g}"
    else:
        for factor in _LOSS_FACTORS:
            expected = factor if name == "loss_scaling" else 1.0
            yield problems.loss_scaled(plain, factor), expected, f"the loss times {factor:g}"
