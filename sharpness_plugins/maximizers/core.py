"""What every solver of the inner maximisation takes and gives, and the budget that it keeps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import MeasurementStopped
from ..regions import Region, ValueAndGrad, stepped
from ..report import Kind, Status

__all__ = ["BestSoFar", "Evaluations", "Maximizer", "Maximum", "Proposals", "ValueAndGrad"]

Proposals = Iterable[tuple[str, Tensor]]


class Maximum(NamedTuple):
    """What a solver found.

    Attributes:
        perturbation: the best point seen, never merely the last; shape ``(dim,)``.
        value: f there.
        steps: accepted steps.
        status: a lower bound, and the sentence how it was found.
        gradients: evaluations of f with its gradient.
        gradient: at ``perturbation``, where the solver still has it.
        onward: where the solver would evaluate next, where it knows; going on from there costs nothing twice.
        start_values: the best value reached from each start, in order: their spread is the honest uncertainty.
        start_names: what those starts were.
        start_gradients: what each of them was given; a start that fell behind was given few.
        rejections: steps that did not raise f where a convex f would have risen.
        gap: ``max <gradient, v - perturbation>`` over the region: a measure of stationarity, zero at a local maximum. It
            bounds what is left to gain only where f is concave.
        non_finite: points at which f was not finite, passed over.
        stopped: whether the measurement was stopped in the middle, and this is the best until then.
    """

    perturbation: Tensor
    value: float
    steps: int
    status: Status
    gradients: int = 0
    gradient: Tensor | None = None
    onward: Tensor | None = None
    start_values: tuple[float, ...] = ()
    start_names: tuple[str, ...] = ()
    start_gradients: tuple[int, ...] = ()
    rejections: int = 0
    gap: float = math.nan
    non_finite: int = 0
    stopped: bool = False


class Maximizer(Protocol):
    """Settings in a frozen dataclass, one method. It may use up to ``num_proposals`` starts of the caller's."""

    @property
    def num_proposals(self) -> int: ...

    def maximize(self, fn: ValueAndGrad, region: Region, start: Tensor, proposals: Proposals = ()) -> Maximum:
        """Maximize ``fn`` over ``region`` from ``start`` and, where the solver uses several starts, ``proposals``.

        Where the region says that vectors lie in shards (``region.layout``), each rank has its shard of all vectors, and
        all of them must evaluate the same points: what the solver decides on may be known of whole vectors only.

        Args:
            fn: ``e -> (f(e), gradient)``, shapes ``(dim,)``; a value that is not finite counts as no ascent. The solver
                goes on to use the memory of e: keep a copy, if any. It raises ``MeasurementStopped`` when the measurement is
                to stop; a solver then returns the best point so far, if it has one.
            region: where to look.
            start: a point of the region, shape ``(dim,)``.
            proposals: further starts with their names, the most promising first; drawn one by one, as they are used.
        """


class Evaluations:
    """A function with a budget of evaluations."""

    def __init__(self, fn: ValueAndGrad, budget: int) -> None:
        self._fn = fn
        self.budget = budget
        self.gradients = 0
        self.non_finite = 0

    def __call__(self, e: Tensor) -> tuple[float, Tensor]:
        value, gradient = self._fn(e)
        self.gradients += 1
        if not math.isfinite(value):
            value = self.refused()
        return value, gradient.detach().to(e).contiguous()

    def refused(self) -> float:
        """Count a point whose value or gradient is not finite, which no solver goes to."""
        self.non_finite += 1
        return -math.inf

    @property
    def spent(self) -> bool:
        return self.gradients >= self.budget


@dataclass(frozen=True)
class BestSoFar:
    """Any solver, made to return the best point that it evaluated rather than where it ended.

    For solvers of third parties whose steps may descend. Costs a copy of the point whenever f rises above all before.
    """

    solver: Maximizer

    def __getattr__(self, name: str) -> Any:  # the budget, and whatever else a caller asks of a solver
        if name.startswith("__") or name == "solver":
            raise AttributeError(name)
        return getattr(self.solver, name)

    @property
    def num_proposals(self) -> int:
        return self.solver.num_proposals

    def maximize(self, fn: ValueAndGrad, region: Region, start: Tensor, proposals: Proposals = ()) -> Maximum:
        """See ``Maximizer``."""
        best: list[tuple[float, Tensor, Tensor]] = []
        seen, layout = Evaluations(fn, budget=0), stepped(region).layout

        def watched(e: Tensor) -> tuple[float, Tensor]:
            value, gradient = seen(e)
            is_higher = not best or value > best[0][0]
            if is_higher and layout.everywhere(bool(torch.isfinite(gradient).all())) and region.contains(e):
                best[:] = [(value, e.clone(), gradient.clone())]
            return value, gradient

        try:
            found = self.solver.maximize(watched, region, start, proposals)
        except MeasurementStopped:
            if not best:
                raise
            said = f"the best of {seen.gradients} gradients when it was stopped"
            found = Maximum(best[0][1], -math.inf, 0, Status(Kind.LOWER_BOUND, said), stopped=True)
        if not best or best[0][0] <= found.value:
            return found._replace(gradients=seen.gradients)
        value, point, gradient = best[0]
        return found._replace(
            perturbation=point,
            value=value,
            gradient=gradient,
            onward=None,
            gradients=seen.gradients,
            gap=stepped(region).vertex_step(None, point, gradient).gap,
        )
