"""One gradient and one Hessian-vector product through ``Objective``, against the plain torch gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring import clock, peak_bytes, repeat
from benchmarks.problems import MODELS, Problem, problem
from sharpness_plugins.objective import Objective

ROUNDS = 15


def objective_of(problem: Problem) -> Objective:
    return Objective(problem.model, problem.batches)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def work_of(call: Callable[[], object]) -> int:
    """Floating point operations of matrix products and convolutions: the same on every machine."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def record(benchmark: Any, shared: Problem, objective: Objective, work: Callable[[], object]) -> None:
    before = objective.cost
    peak = peak_bytes(work)
    cost = objective.cost - before
    benchmark.extra_info.update(
        dim=shared.dim,
        num_samples=shared.num_samples,
        counts={"gradients": cost.gradients, "values": cost.values, "hvps": cost.hvps, "passes": cost.passes},
        peak_bytes=peak,
        peak_vectors=peak / (4 * shared.dim),
        hvp_mode=objective.hvp_mode,
    )


@pytest.mark.benchmark(group="objective", timer=clock)
@pytest.mark.parametrize("model", MODELS)
def test_gradient(benchmark: Any, model: str) -> None:
    shared = problem(model)
    objective = objective_of(shared)
    loss = shared.reference_gradient()
    value, gradient = objective.value_and_grad()
    assert value == pytest.approx(loss, rel=1e-4)
    assert relative_error(gradient, shared.take_gradient()) < 1e-4
    with objective.session():
        repeat(benchmark, objective.value_and_grad, shared, rounds=ROUNDS)
        record(benchmark, shared, objective, objective.value_and_grad)


@pytest.mark.benchmark(group="objective", timer=clock)
@pytest.mark.parametrize("model", MODELS)
def test_gradient_outside_a_session(benchmark: Any, model: str) -> None:
    """Each call then sets the modes of the model and puts them back."""
    shared = problem(model)
    objective = objective_of(shared)
    objective.value_and_grad()
    repeat(benchmark, objective.value_and_grad, shared, rounds=ROUNDS)
    record(benchmark, shared, objective, objective.value_and_grad)


@pytest.mark.benchmark(group="objective", timer=clock)
@pytest.mark.parametrize("model", MODELS)
def test_hvp(benchmark: Any, model: str) -> None:
    shared = problem(model)
    objective = objective_of(shared)
    vector = torch.randn(shared.dim, generator=torch.Generator().manual_seed(0))
    assert relative_error(objective.hvp(vector), shared.reference_hvp(vector)) < 1e-3

    def product() -> torch.Tensor:
        return objective.hvp(vector)

    with objective.session():
        repeat(benchmark, product, shared, rounds=ROUNDS)
        record(benchmark, shared, objective, product)
        benchmark.extra_info["work_in_gradients"] = work_of(product) / work_of(objective.value_and_grad)
