"""Eight problems of the tuning half that are cheap to train, for ``benchmarks.check``: our default, and SciPy."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from benchmarks.inner_maximisation.problems import Problem, check_answer, problems_of
from benchmarks.inner_maximisation.references import References, search, share
from benchmarks.inner_maximisation.solvers import SOLVERS, Answer
from benchmarks.measuring import clock
from sharpness_plugins import sampling

PROBLEMS = (
    "mlp-small@0.001",
    "mlp-large@0.001",
    "deep-large@0.001",
    "tanh-large@0.005",
    "bn_mlp-large@0.001",
    "gelu-early@0.005",
    "binary-converged@0.001",
    "regression@0.0005",
)
BUDGETS = {"default": 24, "scipy": 12}
LEAST = 0.9  # of the best known rise, for the default


@functools.cache
def problem_named(name: str) -> Problem:
    (found,) = [problem for problem in problems_of("tuning") if problem.name == name]
    return found


@functools.cache
def best_known(name: str) -> float:
    """As stored; on a machine whose networks are others, what a shorter search finds."""
    problem = problem_named(name)
    reference = References().of(problem)
    return search(problem, num_gradients=400)[0] if reference is None else reference.value


def solved(name: str, solver: str) -> Answer:
    problem = problem_named(name)
    solve = SOLVERS[solver](BUDGETS[solver])
    assert solve is not None
    answer = solve(problem.objective, problem.epsilon, sampling.generator_for(0, name))
    assert answer is not None
    return answer


@pytest.mark.benchmark(group="inner_maximisation", timer=clock)
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("solver", BUDGETS)
def test_share(benchmark: Any, solver: str, name: str) -> None:
    problem = problem_named(name)
    before = problem.objective.cost
    answer = solved(name, solver)
    cost = problem.objective.cost - before
    value = check_answer(problem, answer.value, answer.perturbation)
    best = max(best_known(name), value)
    found = share(value, best, problem.origin_loss)
    assert solver != "default" or found >= LEAST
    benchmark.pedantic(solved, args=(name, solver), rounds=1)
    benchmark.extra_info.update(
        ratios={},  # the quality is compared here, and the work that it took
        counts={"gradients": cost.gradients, "values": cost.values, "passes": cost.passes},
        value=value,
        kind=solver,
        share_of_best=found,
        best_known=best,
    )
