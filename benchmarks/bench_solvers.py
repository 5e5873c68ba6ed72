"""ε-box sharpness by the default solver and by SciPy's L-BFGS-B, on small- and large-batch minima: what each finds."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from benchmarks.measuring import clock
from benchmarks.problems import Problem, minimum
from sharpness_plugins import sampling
from sharpness_plugins.maximizers import MultiStart
from sharpness_plugins.metrics import EpsilonBox
from sharpness_plugins.objective import Objective
from sharpness_plugins.report import MetricResult

SOLVERS = ("sign_frank_wolfe", "lbfgsb", "lbfgsb_published")
MINIMA = {  # batch size, epoch loss at which training stopped, seed
    "small_batch-0": (16, 2e-3, 0),
    "small_batch-1": (16, 2e-3, 1),
    "large_batch-0": (500, 2e-3, 0),
    "large_batch-1": (500, 2e-3, 1),
    "small_batch_trained_on": (16, 1e-5, 0),
}


@functools.cache
def objective_of(name: str) -> Objective:
    shared = network(name)
    return Objective(shared.model, shared.batches)


def network(name: str) -> Problem:
    return minimum(*MINIMA[name])


def measured(name: str, maximizer: str | MultiStart, *, seed: int = 0) -> MetricResult:
    objective = objective_of(name)
    with objective.session():
        return EpsilonBox(maximizer=maximizer)(objective, sampling.generator_for(seed, "epsilon_box"))


@functools.cache
def best_known(name: str) -> float:
    """The best of all the solvers here and of a search of 240 gradients from many starts."""
    many = MultiStart(max_gradients=240)
    return max(measured(name, many, seed=7).value, *(measured(name, solver).value for solver in SOLVERS))


@pytest.mark.benchmark(group="solvers", timer=clock)
@pytest.mark.parametrize("name", MINIMA)
@pytest.mark.parametrize("solver", SOLVERS)
def test_solver(benchmark: Any, solver: str, name: str) -> None:
    objective = objective_of(name)
    before = objective.cost
    result = measured(name, solver)
    cost = objective.cost - before
    assert 0 <= result.value <= best_known(name)
    if solver == "sign_frank_wolfe":
        assert result.value >= 0.9 * best_known(name)  # the worst of 66 other problems was .927
    benchmark.pedantic(measured, args=(name, solver), rounds=1)
    benchmark.extra_info.update(
        loss=objective.loss,
        ratios={},  # none to compare: SciPy's own work on the host takes most of the time, and varies twofold
        counts={"gradients": cost.gradients, "values": cost.values, "passes": cost.passes},
        value=result.value,
        share_of_best=result.value / best_known(name),
        best_known=best_known(name),
        kind=str(result.status.kind),
    )
