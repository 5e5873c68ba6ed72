"""The best known maximum of every problem: what a long search found, or any solver since.

The search shares no code with the library's solvers but the call of SciPy. It makes ``NUM_GRADIENTS`` gradients: ascents
from zero, from the vertices that raise or lower one output, from the antipode of the best of these, from random vertices and
random points, by sign steps, APGD and SciPy's L-BFGS-B; then the best vertex, disturbed and climbed again, until the
gradients are used.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from sharpness_plugins import sampling
from sharpness_plugins.maximizers import ValueAndGrad
from sharpness_plugins.regions import Box

from . import peers
from .networks import Network
from .problems import Problem, check_answer

__all__ = ["NUM_GRADIENTS", "Reference", "References", "climb", "search", "share"]

NUM_GRADIENTS = 1200
FILE = Path(__file__).parent / "references.json"
WARM_UP = (0.05, 0.15, 0.4, 1.0)
SAME_LOSS = 1e-3  # relative: networks of another machine, trained to another rounding


@dataclass(frozen=True)
class Reference:
    """The best known value of one problem.

    Attributes:
        value: the loss, by plain torch; ``origin_loss``: at the trained weights.
        recipe: key of the network's recipe.
        how: what found it; ``gradients``: how many the search had used when it ended.
    """

    value: float
    origin_loss: float
    recipe: str
    how: str
    gradients: int


def share(value: float, reference: float, origin_loss: float) -> float:
    """Of the best known rise of the loss. At most 1: whoever finds more has made a new reference first."""
    return (value - origin_loss) / (reference - origin_loss)


class References:
    """``references.json``: only ever improved, and written at once."""

    def __init__(self, file: Path = FILE) -> None:
        self.file = file

    def all(self) -> dict[str, Reference]:
        if not self.file.exists():
            return {}
        stored: Mapping[str, Mapping[str, object]] = json.loads(self.file.read_text())
        return {name: Reference(**entry) for name, entry in stored.items()}  # type: ignore[arg-type]

    def of(self, problem: Problem) -> Reference | None:
        """What is stored for this very network; None where nothing is."""
        found = self.all().get(problem.name)
        if found is None or found.recipe != problem.recipe.key:
            return None
        if not math.isclose(found.origin_loss, problem.origin_loss, rel_tol=SAME_LOSS):
            return None
        return found

    def offer(self, problem: Problem, value: float, how: str, *, gradients: int = 0) -> Reference:
        """Store ``value`` if it is the best yet; returns what is stored then."""
        known = self.of(problem)
        if known is not None and (known.value >= value and known.gradients >= gradients):
            return known
        best = known if known is not None and known.value >= value else None
        made = Reference(
            value=value if best is None else best.value,
            origin_loss=problem.origin_loss,
            recipe=problem.recipe.key,
            how=how if best is None else best.how,
            gradients=gradients if known is None else max(gradients, known.gradients),
        )
        entries = {name: asdict(reference) for name, reference in (self.all() | {problem.name: made}).items()}
        partial = self.file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n")
        partial.replace(self.file)
        return made


# ---------------------------------------------------------------------- the search


class _UsedError(Exception):
    pass


class _Evaluations:
    """The objective, its gradients counted, and the best point seen with the name of what found it."""

    def __init__(self, problem: Problem, budget: int) -> None:
        self._fn = problem.objective.value_and_grad
        self._budget = budget
        self.used = 0
        self.value, self.how = -math.inf, ""
        self.best = torch.zeros_like(problem.objective.origin)
        self.now = ""

    def __call__(self, e: Tensor) -> tuple[float, Tensor]:
        if self.used >= self._budget:
            raise _UsedError
        value, gradient = self._fn(e)
        self.used += 1
        if value > self.value:
            self.value, self.best, self.how = value, e.clone(), self.now
        return value, gradient


def climb(fn: ValueAndGrad, box: Box, start: Tensor, *, max_gradients: int) -> tuple[float, Tensor]:
    """Sign steps from ``start``; half the way, then a quarter, where one does not ascend. The best point and its value."""
    e = box.project(start)
    value, gradient = fn(e)
    used = 1
    while used < max_gradients:
        vertex = torch.where(gradient == 0, e, box.ascent_vertex(gradient))
        if torch.equal(vertex, e):
            break
        for part in (1.0, 0.5, 0.25, 0.06):
            if used == max_gradients:
                return value, e
            trial = e + part * (vertex - e)
            trial_value, trial_gradient = fn(trial)
            used += 1
            if trial_value > value:
                gained = trial_value - value
                e, value, gradient = trial, trial_value, trial_gradient
                break
        else:
            break
        if gained < 1e-5 * abs(value):
            break
    return value, e


def search(problem: Problem, *, num_gradients: int = NUM_GRADIENTS, seed: int = 0) -> tuple[float, Tensor, str, int]:
    """The best value, where, what found it, and the gradients used (those of the outputs not counted)."""
    box, rng = problem.box, sampling.generator_for(seed, "reference", problem.name)
    fn = _Evaluations(problem, num_gradients)
    with contextlib.suppress(_UsedError), problem.objective.session():
        _explore(fn, problem, box, rng)
        while True:
            _disturb(fn, problem.network, box, rng)
    return check_answer(problem, fn.value, fn.best), fn.best, fn.how, fn.used


def _explore(fn: _Evaluations, problem: Problem, box: Box, rng: torch.Generator) -> None:
    per_start = 14
    fn.now = "sign steps from zero after a warm-up"
    climb(fn, box, _warmed_up(fn, box), max_gradients=per_start)
    for name, vertex in _targeted(problem.network, box):
        fn.now = f"sign steps from the vertex with {name}"
        climb(fn, box, vertex, max_gradients=per_start)
    fn.now = "sign steps from the antipode of the best so far"
    climb(fn, box, -fn.best, max_gradients=per_start)
    zero = torch.zeros_like(box.half_width)
    for _ in range(12):
        point = box.half_width * sampling.uniform(len(zero), rng, zero)
        fn.now = "sign steps from a random point"
        climb(fn, box, point, max_gradients=per_start)
        fn.now = "sign steps from a random vertex"
        climb(fn, box, box.ascent_vertex(point), max_gradients=per_start)
    for name, peer in (
        ("APGD from zero", peers.apgd(60)),
        ("APGD from random points", peers.apgd_random_points(160, per_start=40)),
        ("SciPy from zero, its antipode and random points", peers.scipy_restarts(iterations=15, num_random=4)),
    ):
        fn.now = name
        peer(fn, box, rng)
    fn.now = "APGD from the best so far"
    peers.apgd(60, fn.best)(fn, box, rng)


def _disturb(fn: _Evaluations, network: Network, box: Box, rng: torch.Generator) -> None:
    """Climb again from the best point with random signs, or with whole tensors turned round."""
    best = fn.best
    draw = sampling.uniform(len(best), rng, best)
    strength = 0.5 * abs(sampling.uniform(1, rng, best).item())
    fn.now = "sign steps from the best vertex with random signs turned"
    climb(fn, box, torch.where(draw.abs() < strength, -best, best), max_gradients=10)
    sizes = [parameter.numel() for parameter in network.model.parameters()]
    turned = torch.where(sampling.uniform(len(sizes), rng, best) < -0.4, -1.0, 1.0)
    fn.now = "sign steps from the best vertex with whole tensors turned"
    best = fn.best
    climb(fn, box, best * turned.repeat_interleave(torch.tensor(sizes)), max_gradients=10)


def _warmed_up(fn: _Evaluations, box: Box) -> Tensor:
    e = torch.zeros_like(box.half_width)
    for fraction in WARM_UP:
        slope = box.half_width * fn(e)[1]
        e = fraction * box.half_width * torch.clamp(slope / (2 * slope.abs().mean() + 1e-30), -1, 1)
    return e


def _targeted(network: Network, box: Box) -> Iterator[tuple[str, Tensor]]:
    """For each output, the vertices to which the gradient of its mean points, and away from it."""
    parameters = list(network.model.parameters())
    with torch.enable_grad():
        outputs = network.model(network.inputs).mean(0)
        for k, output in enumerate(outputs):
            gradients = torch.autograd.grad(output, parameters, retain_graph=True)
            vertex = box.ascent_vertex(torch.cat([g.reshape(-1) for g in gradients]))
            yield f"output {k} raised", vertex
            yield f"output {k} lowered", -vertex
