"""Which solvers freeze: ``python -m benchmarks.inner_maximisation.frozen``.

The stress test is 200 000 dimensions at ratio 10 with ten gradients; around it a family of ratios, and indefinite ones.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from sharpness_plugins import sampling

from .networks import one_thread
from .quadratics import Quadratic
from .run import solvers_from
from .solvers import Answer, Solver

__all__ = ["main", "share_found"]

DIM = 200_000
BUDGET = 10
CASES = tuple((ratio, negative) for negative in (0.0, 0.5) for ratio in (1.0, 3.0, 10.0, 30.0))


def share_found(quadratic: Quadratic, solver: Solver, *, budget: int = BUDGET, seed: int = 0) -> tuple[float, Answer] | None:
    """Share of the maximum, taken in float64 at the point found; None where the solver is not meant for the budget."""
    solve = solver(budget)
    if solve is None:
        return None
    answer = solve(quadratic.objective(), 1.0, sampling.generator_for(seed, "frozen"))
    if answer is None:
        return None
    if answer.perturbation.abs().max() > 1 + 1e-6:
        raise AssertionError("the perturbation leaves the box")
    return quadratic.value(answer.perturbation), answer  # the maximum is 1


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inner_maximisation.frozen", description=__doc__)
    parser.add_argument("--dim", type=int, default=DIM)
    parser.add_argument("--budget", type=int, default=BUDGET)
    parser.add_argument("--seeds", type=int, default=3, help="quadratics of each kind; the worst share is printed")
    parser.add_argument("--solvers", help="names, separated by commas; default: all that have a form for the budget")
    parser.add_argument("--candidates", help="a Python file with more solvers in a dictionary SOLVERS")
    options = parser.parse_args(arguments)
    known = solvers_from(options.candidates)
    names = options.solvers.split(",") if options.solvers else list(known)
    names = [name for name in names if known[name](options.budget) is not None]
    worst: dict[str, list[float]] = {name: [] for name in names}
    most = dict.fromkeys(names, 0.0)
    with one_thread():
        for ratio, negative in CASES:
            found: dict[str, list[float]] = {name: [] for name in names}
            for seed in range(options.seeds):
                quadratic = Quadratic.made(options.dim, ratio, negative=negative, seed=seed)
                for name in names:
                    if (one := share_found(quadratic, known[name], budget=options.budget, seed=seed)) is not None:
                        found[name].append(one[0])
                        most[name] = max(most[name], one[1].gradients)
            for name in names:
                worst[name].append(min(found[name], default=math.nan))
    titles = [f"ratio {ratio:g}" + f", {100 * negative:.0f} % negative" * (negative > 0) for ratio, negative in CASES]
    print("| solver | gradients | " + " | ".join(titles) + " |\n|" + "---|" * (len(titles) + 2))
    for name in names:
        print(f"| {name} | {most[name]:g} | " + " | ".join(f"{s:.3f}" for s in worst[name]) + " |")


if __name__ == "__main__":
    main()
