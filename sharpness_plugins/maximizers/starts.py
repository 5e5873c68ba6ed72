"""Several starts within one budget."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from .. import steps
from ..errors import MeasurementStopped
from ..regions import Region, stepped
from ..report import Kind, Status
from .ascent import AlongSign, Ascent, Halving
from .core import Maximizer, Maximum, Proposals, ValueAndGrad
from .parking import Parked, from_tree, park, to_tree, unpark

__all__ = ["MultiStart"]

_RACE = 0.55  # of the budget: while less is used, one more start is let into the race
_HEAT = 3  # gradients that every start is given
_EXTRA = 2  # and those that are ahead, before half of them drop out again
_NEAR = 0.9  # of the best gain: a late start that comes so near is run to its end


def _short_steps() -> Ascent:
    return Ascent(AlongSign(), Halving(length=0.5), warm_up=())


@dataclass(frozen=True)
class MultiStart:
    """One solver from several starts, within one budget: a race, then exploration with what is left.

    Local maxima are many, and which start is in the best basin shows only after a few steps. So the caller's first
    proposals are given 3 gradients each (zero its warm-up, too) until half of the budget is used; the better half of them
    goes on for 2 more, and so on; the winner runs to its end. If gradients are left, the start, the antipode of the best
    point and further proposals follow, 3 gradients each, to their end where they come near the best. At last the best runs
    on to a fixed point.

    Chosen on 63 problems of 21 networks and confirmed on others that were not looked at: see
    ``benchmarks/inner_maximisation``.

    Args:
        solver: one start's solver; its budget is the most that one start may take. A solver without a budget of its own
            (``LBFGSB``) is run to its end from every start.
        max_gradients: budget of all starts together; no start is begun without a gradient left for it.
        num_starts: the most proposals that race; None for as many as the budget lets in, one for every 5 gradients.
        num_proposals: the most proposals to use; the budget allows fewer, as a rule.
        antipodal: whether to try the antipode.
        fallback: what goes on from the best point, with all that is left, where a third of the solver's first steps do not
            ascend: f is then far from convex in the region (measured: a Transformer with random weights). By default APGD
            with steps of half a width. None for nothing.
    Memory: beside the solver's, half a byte per parameter and start of a box, 4 to 8 where it stopped between vertices.
    """

    solver: Maximizer = field(default_factory=Ascent)
    max_gradients: int = 24
    num_starts: int | None = None
    num_proposals: int = 100
    antipodal: bool = True
    fallback: Maximizer | None = field(default_factory=_short_steps)

    def __post_init__(self) -> None:
        if self.max_gradients < 1:
            raise ValueError(f"max_gradients must be at least 1, got {self.max_gradients}")
        if self.num_starts is not None and self.num_starts < 1:
            raise ValueError(f"num_starts must be at least 1, or None, got {self.num_starts}")
        if self.num_proposals < 0:
            raise ValueError(f"num_proposals must be at least 0, got {self.num_proposals}")

    def maximize(self, fn: ValueAndGrad, region: Region, start: Tensor, proposals: Proposals = ()) -> Maximum:
        """See ``Maximizer``."""
        search = _Search(fn, region, start, self.solver, self.max_gradients)
        try:
            self._search(search, region, start, proposals)
        except MeasurementStopped:
            search.stop()
        return search.result()

    def _search(self, search: _Search, region: Region, start: Tensor, proposals: Proposals) -> None:
        offered = itertools.islice(proposals, self.num_proposals)
        parked = ((name, park(point, region)) for name, point in offered)
        for proposal in itertools.islice(parked, self.num_starts):
            search.begin(*proposal)
            if search.used >= _RACE or search.is_rough:
                break
        name = "zero" if stepped(region).layout.everywhere(not start.any()) else "start"
        if not search.has_started:
            search.begin(name, park(start, region))
        if self.fallback is not None and search.is_rough and not search.arrives():
            search.go_over_to(self.fallback)
            return
        search.race()
        if not search.has_tried(name):
            search.explore(name, park(start, region))
        if self.antipodal and search.left:
            search.explore("antipode", park(-search.best_point(), region))
        search.refine()
        while search.left > 1 and (further := next(parked, None)) is not None:
            search.explore(*further)
        search.refine()


@dataclass(eq=False)
class _Start:
    """One start: the best that it has reached, where it would go on, and what it was given."""

    name: str
    value: float = -math.inf
    point: Parked | None = None
    onward: Parked | None = None
    gap: float = math.nan
    gradients: int = 0
    settled: bool = False  # at its best point: the solver ended there by itself


class _Search:
    """Several starts, and what is left of their common budget."""

    def __init__(self, fn: ValueAndGrad, region: Region, like: Tensor, solver: Any, budget: int) -> None:
        self._region, self._like, self._solver = region, like, solver
        self._lowest = math.inf  # value seen: gains are counted from there

        def watched(e: Tensor) -> tuple[float, Tensor]:
            value, gradient = fn(e)
            if math.isfinite(value):
                self._lowest = min(self._lowest, value)
            return value, gradient

        self._fn = watched
        self._budgeted = hasattr(solver, "max_gradients")
        self._limit = solver.max_gradients if self._budgeted else math.inf
        self._budget = self.left = budget
        self._starts: list[_Start] = []
        self._steps = self._rejections = self._non_finite = 0
        self._stopped = False

    def stop(self) -> None:
        """Keep the starts that have a point; raises MeasurementStopped where none has."""
        self._stopped, self._starts = True, [start for start in self._starts if start.point is not None]
        if not self._starts:
            raise MeasurementStopped

    @property
    def best(self) -> _Start:
        return max(self._starts, key=lambda start: start.value)

    @property
    def has_started(self) -> bool:
        return bool(self._starts)

    @property
    def used(self) -> float:
        """Share of the budget."""
        return 1 - self.left / self._budget

    def has_tried(self, name: str) -> bool:
        return any(start.name == name for start in self._starts)

    @property
    def is_rough(self) -> bool:
        """Whether a third of the steps failed; measured on trained networks, none do."""
        return self._rejections >= 2 and 2 * self._rejections >= self._steps

    def arrives(self) -> bool:
        """Whether the best start reaches a fixed point within a few gradients."""
        self._go_on(self.best, _HEAT)
        return self.best.settled

    def go_over_to(self, solver: Any) -> None:
        """Climb on from the best point with another solver, and all that is left."""
        self._solver, self._limit = solver, math.inf
        if self.left > 1 and self.best.point is not None:
            self._run(self.best, self.best.point, self.left)

    def best_point(self) -> Tensor:
        point = self.best.point
        assert point is not None
        return unpark(point, self._region)

    def begin(self, name: str, point: Parked) -> _Start | None:
        """Give one more start its first gradients."""
        if self.left < 1:
            return None
        start = _Start(name)
        self._starts.append(start)
        self._run(start, point, _HEAT + (len(getattr(self._solver, "warm_up", ())) if name == "zero" else 0))
        return start

    def race(self) -> None:
        """The better half goes on, until one is left, which runs to its end."""
        ahead = list(self._starts)
        while len(ahead) > 1:
            ahead = sorted(ahead, key=lambda start: -start.value)[: len(ahead) // 2]
            if len(ahead) > 1:
                for start in ahead:
                    self._go_on(start, _EXTRA)
        for start in ahead:
            self._go_on(start, self.left)

    def explore(self, name: str, point: Parked) -> None:
        """One more start, to its end if it comes near the best."""
        others = [start.value for start in self._starts]
        begun = self.begin(name, point)
        if begun and (not others or begun.value - self._lowest >= _NEAR * (max(others) - self._lowest)):
            self._go_on(begun, self.left)

    def refine(self) -> None:
        """The best start goes on to a fixed point; from its best point itself, if it went astray from there."""
        if self.left > 1 and not self.best.settled:
            self._go_on(self.best, self.left, to_the_end=True)
            if self.left > 1 and not self.best.settled and self.best.point is not None:
                self._run(self.best, self.best.point, self.left, to_the_end=True)

    def _go_on(self, start: _Start, gradients: int, *, to_the_end: bool = False) -> None:
        if start.onward is not None and self.left and (to_the_end or start.gradients < self._limit):
            self._run(start, start.onward, gradients, to_the_end=to_the_end)

    def _run(self, start: _Start, point: Parked, gradients: int, *, to_the_end: bool = False) -> None:
        solver = self._solver
        if self._budgeted:
            allowed = gradients if to_the_end else min(gradients, self._limit - start.gradients)
            changed: dict[str, Any] = {"max_gradients": int(max(1, min(allowed, self.left)))}
            if to_the_end and hasattr(solver, "tolerance"):
                changed["tolerance"] = 0.0
            solver = replace(solver, **changed)
        found = steps.child("run").run(lambda: self._climbed(solver, start, point))
        self._stopped |= found["stopped"]
        self._lowest = min(self._lowest, found["lowest"])
        self.left = max(0, self.left - found["gradients"])
        start.gradients += found["gradients"]
        self._steps += found["steps"]
        self._rejections += found["rejections"]
        self._non_finite += found["non_finite"]
        if found["point"] is not None:
            start.value, start.gap, start.settled = found["value"], found["gap"], found["onward"] is None
            start.point = from_tree(found["point"], self._like)
        start.onward = from_tree(found["onward"], self._like)

    def _climbed(self, solver: Maximizer, start: _Start, point: Parked) -> dict[str, Any]:
        """What a run of the solver found, as a tree; a point only where it is better than the start's."""
        found = solver.maximize(self._fn, self._region, unpark(point, self._region))
        is_better = start.point is None or found.value > start.value
        return {
            "value": found.value,
            "gap": found.gap,
            "point": to_tree(park(found.perturbation, self._region)) if is_better else None,
            "onward": None if found.onward is None else to_tree(park(found.onward, self._region)),
            "gradients": found.gradients,
            "steps": found.steps,
            "rejections": found.rejections,
            "non_finite": found.non_finite,
            "lowest": self._lowest,
            "stopped": found.stopped,
        }

    def result(self) -> Maximum:
        spent = sum(start.gradients for start in self._starts)
        count = len(self._starts)
        how = f"best of {count} start{'s' if count > 1 else ''} after {spent} gradients" + ", then stopped" * self._stopped
        best = self.best
        return Maximum(
            perturbation=self.best_point(),
            value=best.value,
            steps=self._steps,
            status=Status(Kind.LOWER_BOUND, how),
            gradients=spent,
            start_values=tuple(start.value for start in self._starts),
            start_names=tuple(start.name for start in self._starts),
            start_gradients=tuple(start.gradients for start in self._starts),
            rejections=self._rejections,
            gap=best.gap,
            non_finite=self._non_finite,
            stopped=self._stopped,
        )
