"""The solvers that are compared: ours, through the metric that users call, and what others do.

A solver is ``budget -> solve`` with ``solve(objective, epsilon, rng) -> Answer``; either is None where it is not meant for
that budget or problem. A file given with ``--candidates`` has a dictionary ``SOLVERS`` of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharpness_plugins.maximizers import (
    Ascent,
    Maximizer,
    Maximum,
    MultiStart,
    Proposals,
    ValueAndGrad,
    apgd,
    spectral_projected_gradient,
)
from sharpness_plugins.metrics import EpsilonBox
from sharpness_plugins.objective import Objective
from sharpness_plugins.regions import Box, Region
from sharpness_plugins.report import Cost

from . import peers

__all__ = ["SOLVERS", "Answer", "Solve", "Solver", "equivalents", "peer", "through_metric"]

GRADIENTS_PER_VALUE = 1 / 3  # a forward pass
GRADIENTS_PER_HVP = 3.0


class Answer(NamedTuple):
    """What a solver found and what it cost, both as the objective counted.

    Attributes:
        value: the loss at ``perturbation``.
        gradients: all gradients, those of the outputs that choose starts among them, by their share of the samples.
        equivalents: ``gradients``, and a value as 1/3 of one.
        perturbation: shape ``(dim,)``.
    """

    value: float
    gradients: float
    equivalents: float
    perturbation: Tensor


Solve = Callable[[Objective, float, torch.Generator], "Answer | None"]
Solver = Callable[[int], "Solve | None"]


def equivalents(cost: Cost) -> float:
    return cost.gradients + GRADIENTS_PER_VALUE * cost.values + GRADIENTS_PER_HVP * cost.hvps


@dataclass(frozen=True)
class _Recorded:
    """A maximizer that keeps its last answer: a metric's result does not hold the perturbation."""

    inner: Maximizer
    found: list[Maximum] = field(default_factory=list, repr=False)

    def __getattr__(self, name: str) -> Any:  # the budget, and whatever else a metric asks of a maximizer
        return getattr(self.inner, name)

    @property
    def num_proposals(self) -> int:
        return self.inner.num_proposals

    def maximize(self, fn: ValueAndGrad, region: Region, start: Tensor, proposals: Proposals = ()) -> Maximum:
        self.found.append(self.inner.maximize(fn, region, start, proposals))
        return self.found[-1]


@dataclass(frozen=True)
class _RecordedStarts(MultiStart):
    """The same of a ``MultiStart``, from whose budget the metric takes what it spends on starts."""

    found: list[Maximum] = field(default_factory=list, repr=False)

    def maximize(self, fn: ValueAndGrad, region: Region, start: Tensor, proposals: Proposals = ()) -> Maximum:
        self.found.append(super().maximize(fn, region, start, proposals))
        return self.found[-1]


def _recorded(maximizer: Maximizer) -> _Recorded | _RecordedStarts:
    if isinstance(maximizer, MultiStart):
        return _RecordedStarts(**{f.name: getattr(maximizer, f.name) for f in fields(MultiStart)})
    return _Recorded(maximizer)


def through_metric(maximizer: Maximizer, **settings: Any) -> Solve:
    """``EpsilonBox(maximizer=..., **settings)``, so that its starts and their cost are part of the answer."""

    def solve(objective: Objective, epsilon: float, rng: torch.Generator) -> Answer:
        recorded = _recorded(maximizer)
        before = objective.cost
        with objective.session():
            EpsilonBox(epsilon=epsilon, maximizer=recorded, **settings)(objective, rng)
        cost = objective.cost - before
        (found,) = recorded.found
        return Answer(found.value, cost.gradients, equivalents(cost), found.perturbation)

    return solve


def peer(work: peers.Peer, budget: int | None) -> Solve:
    """A peer, stopped after ``budget`` gradients (None: its own end)."""

    def solve(objective: Objective, epsilon: float, rng: torch.Generator) -> Answer:
        before = objective.cost
        box = Box(epsilon * (objective.origin.abs() + 1))
        with objective.session():
            value, perturbation, _ = peers.within(work, budget, objective.value_and_grad, box, rng)
        cost = objective.cost - before
        return Answer(value, cost.gradients, equivalents(cost), perturbation)

    return solve


def _default(budget: int) -> Solve:
    maximizer: Any = EpsilonBox().maximizer
    return through_metric(replace(maximizer, max_gradients=budget))


def _pytorch_minimize(budget: int) -> Solve | None:
    if budget != 12 or not peers.has_pytorch_minimize():
        return None
    solve = peer(peers.pytorch_minimize(), None)

    def solve_if_small(objective: Objective, epsilon: float, rng: torch.Generator) -> Answer | None:
        return solve(objective, epsilon, rng) if objective.dim < peers.PYTORCH_MINIMIZE_LARGEST else None

    return solve_if_small


def _only_at(budget: int, work: peers.Peer) -> Solver:
    """A call of fixed length, listed with the budget that comes nearest to it."""
    return lambda asked: peer(work, None) if asked == budget else None


SOLVERS: Mapping[str, Solver] = {
    "default": _default,
    "scipy_published": _only_at(12, peers.scipy_call(published=True)),
    "scipy": _only_at(12, peers.scipy_call()),
    "scipy_antipode": _only_at(24, peers.scipy_restarts()),
    "scipy_restarts": _only_at(48, peers.scipy_restarts(num_random=2)),
    "scipy_run_on": lambda budget: peer(peers.scipy_call(iterations=1000), budget),
    "default_full_sketch": lambda budget: through_metric(MultiStart(max_gradients=budget), sketch_samples=10**9),
    "sign_frank_wolfe_zero": lambda budget: through_metric(Ascent(max_gradients=budget)),
    "spectral_projected_gradient": lambda budget: through_metric(spectral_projected_gradient(budget)),
    "apgd_ours": lambda budget: through_metric(apgd(budget)),
    "apgd": lambda budget: peer(peers.apgd(budget), budget),
    "apgd_antipode": lambda budget: peer(peers.apgd_antipode(budget), budget),
    "sign_pgd": lambda budget: peer(peers.sign_pgd(budget), budget),
    "sign_pgd_restarts": lambda budget: peer(peers.sign_pgd_restarts(budget), budget),
    "pytorch_minimize": _pytorch_minimize,
}
