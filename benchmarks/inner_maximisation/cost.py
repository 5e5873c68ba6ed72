"""What a solver's own work costs, the objective left out: ``python -m benchmarks.inner_maximisation.cost``.

A quadratic of two million dimensions (see ``quadratics.py``), one thread. The time inside of the function that is
maximized is taken off; the default gets the fewest gradients with which it attains what SciPy's ten iterations attain.
Memory twice: the largest sum of allocations that torch's profiler saw, less that of one evaluation (without what NumPy and
SciPy hold), and the growth of the resident set of a process of its own (with it, and with one evaluation).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sharpness_plugins import sampling
from sharpness_plugins.maximizers import LBFGSB, Maximizer, Maximum
from sharpness_plugins.metrics import EpsilonBox, keskar
from sharpness_plugins.regions import Box

from ..measuring import clock, peak_bytes
from .memory import largest_resident, resident_now
from .networks import one_thread
from .quadratics import Quadratic

__all__ = ["Spent", "default_with", "main", "peak_bytes_of", "spent"]

DIM = 2_000_000
RATIO, NEGATIVE = 10.0, 0.5  # see quadratics.py; SciPy runs its ten iterations on this one
LARGEST_BUDGET = 48
REPEATS = 5


@dataclasses.dataclass(frozen=True)
class Spent:
    """``seconds`` of the processor outside of the function; ``inside``: in it."""

    value: float
    gradients: int
    seconds: float
    inside: float


def default_with(max_gradients: int) -> Maximizer:
    maximizer: Any = EpsilonBox().maximizer
    changed: Maximizer = dataclasses.replace(maximizer, max_gradients=max_gradients)
    return changed


def maximized(maximizer: Maximizer, quadratic: Quadratic, fn: Any) -> Maximum:
    """As the metric calls it, with random points for further starts."""
    box = Box(torch.ones(quadratic.dim))
    return keskar.maximize(maximizer, fn, box, sampling.generator_for(0, "cost"))


def spent(maximizer: Maximizer, quadratic: Quadratic) -> Spent:
    inside = 0.0

    def timed(e: Tensor) -> tuple[float, Tensor]:
        nonlocal inside
        began = clock()
        answer = quadratic.value_and_grad(e)
        inside += clock() - began
        return answer

    began = clock()
    found = maximized(maximizer, quadratic, timed)
    total = clock() - began
    return Spent(quadratic.value(found.perturbation), found.gradients, total - inside, inside)


def peak_bytes_of(maximizer: Maximizer, quadratic: Quadratic) -> int:
    """Torch's peak during the whole solve less that of one evaluation: the box, the points and gradients that it keeps."""
    one = peak_bytes(lambda: quadratic.value_and_grad(torch.zeros(quadratic.dim)))
    return peak_bytes(lambda: maximized(maximizer, quadratic, quadratic.value_and_grad)) - one


def _resident_growth(which: str, budget: int, quadratic: Quadratic) -> int:
    """Bytes by which the resident set of a new process grew at most in the solve, the quadratic made before."""
    command = [sys.executable, "-m", "benchmarks.inner_maximisation.cost", "--dim", str(quadratic.dim)]
    command += ["--child", which, str(budget), repr(quadratic.scale)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    grown: int = json.loads(answer.stdout)
    return grown


def _child(dim: int, which: str, budget: str, scale: str) -> int:
    maximizer: Maximizer = LBFGSB() if which == "scipy" else default_with(int(budget))
    small = Quadratic.made(1000, RATIO, negative=NEGATIVE)
    maximized(maximizer, small, small.value_and_grad)  # imports and thread pools are not the solver's
    quadratic = Quadratic.made(dim, RATIO, negative=NEGATIVE, scale=float(scale))
    quadratic.value_and_grad(torch.zeros(dim))
    before = resident_now()
    maximized(maximizer, quadratic, quadratic.value_and_grad)
    return largest_resident() - before


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inner_maximisation.cost", description=__doc__)
    parser.add_argument("--dim", type=int, default=DIM)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    with one_thread():
        if options.child is not None:
            print(json.dumps(_child(options.dim, *options.child)))
        else:
            _compare(Quadratic.made(options.dim, RATIO, negative=NEGATIVE))


def _compare(quadratic: Quadratic) -> None:
    scipy = spent(LBFGSB(), quadratic)
    for budget in range(2, LARGEST_BUDGET + 1):
        if spent(default_with(budget), quadratic).value >= scipy.value:
            break
    runs = {"scipy": [scipy], "default": [spent(default_with(budget), quadratic) for _ in range(REPEATS)]}
    solvers: dict[str, Maximizer] = {"scipy": LBFGSB(), "default": default_with(budget)}
    head = [
        "solver",
        "share of the maximum",
        "gradients",
        "ns/param",
        "objective ns/param",
        "torch B/param",
        "resident B/param",
    ]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    nanoseconds = {}
    for name, found in runs.items():
        middle = sorted(found, key=lambda run: run.seconds)[len(found) // 2]
        nanoseconds[name] = 1e9 * middle.seconds / quadratic.dim
        held = peak_bytes_of(solvers[name], quadratic) / quadratic.dim
        resident = _resident_growth(name, budget, quadratic) / quadratic.dim
        cells = [name, f"{middle.value:.5f}", str(middle.gradients), f"{nanoseconds[name]:.1f}"]
        cells += [f"{1e9 * middle.inside / quadratic.dim:.1f}", f"{held:.1f}", f"{resident:.1f}"]
        print("| " + " | ".join(cells) + " |", flush=True)
    print(f"\n{nanoseconds['scipy'] / nanoseconds['default']:.0f} times less time in the solver")


if __name__ == "__main__":
    main()
