"""The three default metrics on three networks: what they count, move and cost against one plain torch gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from benchmarks.measuring import GRADIENTS_PER_HVP, GRADIENTS_PER_VALUE, clock, peak_bytes, repeat
from benchmarks.problems import MODELS, Problem, problem
from sharpness_plugins import Kind, get_metric, sampling
from sharpness_plugins.objective import Objective
from sharpness_plugins.report import Cost, MetricResult

ROUNDS = 3
KINDS = {"epsilon_box": Kind.LOWER_BOUND, "random_subspace": Kind.ESTIMATE, "hessian_topk": Kind.CONVERGED}


def check(metric: str, result: MetricResult, shared: Problem) -> None:
    """Against plain torch, on facts that a wrong implementation would miss."""
    assert result.status.kind is KINDS[metric], result.status
    assert math.isfinite(result.value)
    if metric == "epsilon_box":
        assert result.value >= one_sign_step(shared, epsilon=1e-3) * (1 - 1e-4)
    elif metric == "random_subspace":
        assert result.standard_error is not None
        assert 0 < result.standard_error < result.value
    else:
        below = power_iteration(shared, steps=15)
        assert 0.9 * result.value < below <= result.value * (1 + 1e-3)


def one_sign_step(shared: Problem, *, epsilon: float) -> float:
    """φ at the vertex of the box that the gradient points to: the maximum is at least this."""
    shared.reference_gradient()
    vertex = epsilon * (shared.weights().abs() + 1) * shared.take_gradient().sign()
    loss = shared.reference_loss_at(torch.zeros_like(vertex))
    return 100 * (shared.reference_loss_at(vertex) - loss) / (1 + loss)


def power_iteration(shared: Problem, *, steps: int) -> float:
    """A Rayleigh quotient of the Hessian: the largest eigenvalue is at least this."""
    vector = torch.randn(shared.dim, generator=torch.Generator().manual_seed(1))
    quotient = math.nan
    for _ in range(steps):
        vector = vector / vector.norm()
        product = shared.reference_hvp(vector)
        quotient, vector = (vector.double() @ product.double()).item(), product
    return quotient


def equivalents(cost: Cost) -> float:
    """The work in gradients, see ``measuring``."""
    return cost.gradients + GRADIENTS_PER_VALUE * cost.values + GRADIENTS_PER_HVP * cost.hvps


@pytest.mark.benchmark(group="metrics", timer=clock)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("metric", KINDS)
def test_metric(benchmark: Any, metric: str, model: str) -> None:
    shared = problem(model)
    objective = Objective(shared.model, shared.batches)
    measure = get_metric(metric)

    def run() -> MetricResult:
        return measure(objective, sampling.generator_for(0, metric))

    with objective.session():
        before = objective.cost
        result = run()
        cost = objective.cost - before
        check(metric, result, shared)
        repeat(benchmark, run, shared, rounds=ROUNDS)
        peak = peak_bytes(run)
    benchmark.extra_info.update(
        dim=shared.dim,
        num_samples=shared.num_samples,
        counts={"gradients": cost.gradients, "values": cost.values, "hvps": cost.hvps, "passes": cost.passes},
        value=result.value,
        kind=str(result.status.kind),
        peak_bytes=peak,
        peak_vectors=peak / (4 * shared.dim),
    )
    if benchmark.enabled:
        ratio = benchmark.extra_info["ratios"]["reference_gradients"]
        benchmark.extra_info["overhead"] = ratio / equivalents(cost)
