"""One run from one start: a direction times a step rule.

===============================  =================  ====================
solver                           direction          step rule
===============================  =================  ====================
sign Frank–Wolfe (power method)  ``ToVertex``       ``Backtracking``
APGD                             ``AlongSign``      ``Halving``
spectral projected gradient      ``AlongGradient``  ``Spectral``
===============================  =================  ====================

The other products work, too. Points are updated in place: beside the function's own memory a run holds a point, its
gradient and the next point, 12 bytes per parameter in float32; below its best point also that and its gradient.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..errors import MeasurementStopped
from ..regions import Region, SteppedRegion, stepped
from ..report import Kind, Status
from .core import Evaluations, Maximum, Proposals, ValueAndGrad

__all__ = [
    "AlongGradient",
    "AlongSign",
    "Ascent",
    "Backtracking",
    "Climb",
    "Direction",
    "Halving",
    "Spectral",
    "StepRule",
    "ToVertex",
    "apgd",
    "spectral_projected_gradient",
]

SPENT = "its budget was used"
FIXED_POINT = "it reached a fixed point"
NOT_FINITE = "the gradient is not finite there"
STOPPED = "the measurement was stopped"


class Climb:
    """Where a run is: a point y with its value and gradient, the best one so far, and room for the next."""

    def __init__(self, evaluations: Evaluations, region: SteppedRegion, y: Tensor, value: float, gradient: Tensor) -> None:
        self.evaluations, self.region = evaluations, region
        self.y, self.value, self.gradient = y, value, gradient
        self.first = self.best_value = value
        self._best: tuple[Tensor, Tensor] | None = None  # None while y is the best
        self.left: Tensor | None = None  # the point before y
        self.next = torch.empty_like(y)
        self.next_value, self.next_gradient = -math.inf, gradient
        self.steps = self.rejections = 0

    @property
    def best(self) -> tuple[Tensor, Tensor]:
        """The best point and its gradient."""
        return self._best or (self.y, self.gradient)

    @property
    def spent(self) -> bool:
        return self.evaluations.spent

    def evaluate_next(self) -> float:
        self.next_value, self.next_gradient = self.evaluations(self.next)
        return self.next_value

    def accept(self) -> None:
        """Go to the next point; what is left makes room, unless it is the best."""
        left, left_gradient = self.y, self.gradient
        self.y, self.value, self.gradient = self.next, self.next_value, self.next_gradient
        if self.value > self.best_value:
            self.best_value, self._best, self.next = self.value, None, left
        elif self._best is None:
            self._best, self.next = (left, left_gradient), torch.empty_like(left)
        else:
            self.next = left
        self.left = left
        self.steps += 1

    def go_back(self) -> None:
        """To the best point."""
        if self._best is not None:
            self.next = self.y
            self.y, self.gradient = self._best
            self.value, self._best = self.best_value, None
        self.left = None


class Direction(Protocol):
    """Where a step goes; how far is the step rule's affair."""

    def unit(self, climb: Climb) -> float:
        """A step length that suits the point."""

    def step(self, climb: Climb, length: float, previous: Tensor | None = None, momentum: float = 1.0) -> float:
        """Write ``climb.next``; returns ``<gradient, next - y>``, not finite where the gradient is not.

        With ``previous``, a share of 1 - momentum of the step from there to y is mixed in, where the direction can.
        """


@dataclass(frozen=True)
class ToVertex:
    """Towards the vertex that maximizes the linear model; a length of 1 goes all the way. Takes no momentum.

    Source: Frank and Wolfe (1956); with full steps, Journée et al., Generalized power method for sparse PCA (2010).
    """

    def unit(self, climb: Climb) -> float:
        return 1.0

    def step(self, climb: Climb, length: float, previous: Tensor | None = None, momentum: float = 1.0) -> float:
        share = min(length, 1.0)
        told = climb.region.vertex_step(climb.next, climb.y, climb.gradient, share)
        return share * told.gap if math.isfinite(told.slope) else math.nan


@dataclass(frozen=True)
class AlongSign:
    """Along the vertex of the gradient, and back into the region: steepest ascent in the region's own norm."""

    def unit(self, climb: Climb) -> float:
        return 1.0

    def step(self, climb: Climb, length: float, previous: Tensor | None = None, momentum: float = 1.0) -> float:
        told = climb.region.projected_step(climb.next, climb.y, previous, climb.gradient, length, momentum, signed=True)
        return told.ascent


@dataclass(frozen=True)
class AlongGradient:
    """Along the gradient in the region's own units, and back into the region.

    Its unit sends a coordinate of mean slope half a width.
    """

    def unit(self, climb: Climb) -> float:
        slope = climb.region.vertex_step(None, climb.y, climb.gradient).slope
        return climb.region.layout.length(climb.y) / (2 * slope) if slope > 0 else 1.0

    def step(self, climb: Climb, length: float, previous: Tensor | None = None, momentum: float = 1.0) -> float:
        told = climb.region.projected_step(climb.next, climb.y, previous, climb.gradient, length, momentum, signed=False)
        return told.ascent


class StepRule(Protocol):
    """How far each step goes, and which are taken."""

    def run(self, climb: Climb, direction: Direction, tolerance: float) -> tuple[str, bool]:
        """Climb until the budget is spent or no step ascends: why it ended, and whether ``next`` is where to go on."""


@dataclass(frozen=True)
class Backtracking:
    """Full steps, and shorter ones where f does not rise: every step ascends.

    For a convex f full steps to a vertex always do. Where one does not, f is not convex between the two points: then the
    secant along each coordinate says where it is concave, and the step goes to the maximum of that separable quadratic
    model (exact when f is one), or else to the top of the parabola on the way to the vertex.
    """

    def run(self, climb: Climb, direction: Direction, tolerance: float) -> tuple[str, bool]:
        gained = math.inf
        rounding = 8 * torch.finfo(climb.y.dtype).eps
        while True:
            length = direction.unit(climb)
            gap = direction.step(climb, length)
            if math.isnan(gap):
                return NOT_FINITE, False
            if not gap > rounding * (climb.value - climb.first):
                return FIXED_POINT, False
            if gained < tolerance * (climb.value - climb.first) and climb.steps >= 2:
                return f"a step gained less than {tolerance:g} of the gain", True
            if climb.spent:
                return SPENT, True
            before = climb.value
            if not self._ascends(climb, direction, length, gap):
                return (SPENT, True) if climb.spent else ("no step ascended", False)
            gained = climb.value - before

    def _ascends(self, climb: Climb, direction: Direction, length: float, gap: float) -> bool:
        """Whether one of the tries rises; if the budget ends before, ``climb.next`` is the next one to try."""
        end = climb.evaluate_next()
        if self._accepted(climb):
            return True
        if math.isfinite(end) and climb.region.model_step(
            climb.next, climb.y, climb.gradient, climb.next, climb.next_gradient
        ):
            if climb.spent:
                return False
            climb.evaluate_next()
            if self._accepted(climb):
                return True
        # the parabola through f(y), its slope on the way, and f at the end of it
        curvature = gap - (end - climb.value)
        share = min(max(gap / (2 * curvature), 0.1), 0.5) if math.isfinite(curvature) else 0.1
        direction.step(climb, share * length)
        if climb.spent:
            return False
        climb.evaluate_next()
        return self._accepted(climb)

    @staticmethod
    def _accepted(climb: Climb) -> bool:
        if climb.next_value > climb.value:
            climb.accept()
            return True
        climb.rejections += 1
        return False


@dataclass(frozen=True)
class Halving:
    """Steps of a fixed length with momentum, which may descend; halved at checkpoints where they do not pay.

    Args:
        length: of the first steps, in units of the direction.
        momentum: share of the new step; the rest is the step before.
    Source: Croce and Hein, Reliable evaluation of adversarial robustness (2020), Algorithm 1.
    """

    length: float = 2.0
    momentum: float = 0.75

    def __post_init__(self) -> None:
        if not 0 < self.length < math.inf:
            raise ValueError(f"length must be a positive number, got {self.length}")
        if not 0 < self.momentum <= 1:
            raise ValueError(f"momentum must be in (0, 1], got {self.momentum}")

    def run(self, climb: Climb, direction: Direction, tolerance: float) -> tuple[str, bool]:
        checkpoints = self._checkpoints(climb.evaluations.budget - climb.evaluations.gradients)
        length = self.length * direction.unit(climb)
        rises = steps = last = 0
        unchanged = False  # the length, at the checkpoint before
        best_then = climb.best_value
        while not climb.spent:
            ascent = direction.step(climb, length, climb.left, self.momentum)
            if math.isnan(ascent):
                return NOT_FINITE, False
            if climb.left is None and not ascent > 0:
                return FIXED_POINT, False
            before = climb.value
            value = climb.evaluate_next()
            steps += 1
            if math.isfinite(value):
                climb.accept()
                rises += value > before
            else:
                climb.go_back()
                length /= 2
            if steps in checkpoints:
                stuck = rises < 0.75 * (steps - last) or (unchanged and climb.best_value == best_then)
                if stuck:
                    length /= 2
                    climb.go_back()
                unchanged, best_then, rises, last = not stuck, climb.best_value, 0, steps
        return SPENT, False

    @staticmethod
    def _checkpoints(budget: int) -> set[int]:
        shares = [0.0, 0.22]
        while shares[-1] < 1:
            shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
        return {math.ceil(share * budget) for share in shares[1:]}


@dataclass(frozen=True)
class Spectral:
    """Barzilai–Borwein lengths, shortened until f exceeds the least of the last ``memory`` values by enough.

    Source: Birgin, Martínez and Raydan, Nonmonotone spectral projected gradient methods on convex sets (2000), SPG2.
    """

    memory: int = 10

    _SUFFICIENT = 1e-4
    _RANGE = 1e3  # lengths, in units of the first

    def __post_init__(self) -> None:
        if self.memory < 1:
            raise ValueError(f"memory must be at least 1, got {self.memory}")

    def run(self, climb: Climb, direction: Direction, tolerance: float) -> tuple[str, bool]:
        unit = length = direction.unit(climb)
        recent = deque([climb.value], maxlen=self.memory)
        while True:
            ascent = direction.step(climb, length)
            if math.isnan(ascent):
                return NOT_FINITE, False
            if not ascent > 0:
                return FIXED_POINT, False
            if climb.spent:
                return SPENT, True
            share = 1.0
            while climb.evaluate_next() < min(recent) + self._SUFFICIENT * share * ascent:
                climb.rejections += 1
                if climb.spent or share < 1e-6:
                    return (SPENT if climb.spent else "no step ascended"), False
                curvature = 2 * (share * ascent - (climb.next_value - climb.value)) / share**2
                best = ascent / curvature if curvature > 0 and math.isfinite(curvature) else 0.0
                share = min(max(best, 0.1 * share), 0.5 * share)
                direction.step(climb, length)
                climb.next.sub_(climb.y).mul_(share).add_(climb.y)
            squared, curvature = climb.region.secant(climb.y, climb.next, climb.gradient, climb.next_gradient)
            length = squared / -curvature if curvature < 0 else self._RANGE * unit
            length = min(max(length, unit / self._RANGE), self._RANGE * unit)
            climb.accept()
            recent.append(climb.value)


@dataclass(frozen=True)
class Ascent:
    """One run from one start: a direction times a step rule, from zero after a warm-up. Returns the best point seen.

    From zero the first steps follow the gradient at growing fractions of the region, without jumping to a vertex: steps to
    vertices alone freeze at a poor one when the trace of the Hessian is large against its largest eigenvalue times √dim.

    Args:
        direction, step: see the module.
        max_gradients: budget.
        warm_up: fractions of the region; used when the start is zero. Empty for none.
        tolerance: a rule whose every step ascends stops when one gains less than this share of the gain so far; 0 runs on
            to a fixed point.
    Cost: one gradient a step, and the memory that the module says.
    """

    direction: Direction = field(default_factory=ToVertex)
    step: StepRule = field(default_factory=Backtracking)
    max_gradients: int = 12
    warm_up: tuple[float, ...] = (0.05, 0.15, 0.4, 1.0)
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        if self.max_gradients < 1:
            raise ValueError(f"max_gradients must be at least 1, got {self.max_gradients}")
        if not all(0 < r <= 1 for r in self.warm_up):
            raise ValueError(f"warm_up must hold fractions of the region in (0, 1], got {self.warm_up}")
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance must be at least 0, got {self.tolerance}")

    @property
    def num_proposals(self) -> int:
        return 0

    def maximize(self, fn: ValueAndGrad, region: Region, start: Tensor, proposals: Proposals = ()) -> Maximum:
        """See ``Maximizer``; ``proposals`` are not used."""
        inside = stepped(region)
        y = region.project(start).contiguous()
        if y.data_ptr() == start.data_ptr():
            y = y.clone()
        from_zero = inside.layout.everywhere(not start.any())
        del start  # a vector less, where the caller has let go of it
        evaluations = Evaluations(fn, self.max_gradients)
        climb = Climb(evaluations, inside, y, *evaluations(y))
        try:
            if from_zero:
                self._warm_up(climb)
            reason, goes_on = self.step.run(climb, self.direction, self.tolerance)
        except MeasurementStopped:
            reason, goes_on = STOPPED, False
        return self._finished(climb, reason, goes_on=goes_on)

    def _warm_up(self, climb: Climb) -> None:
        for fraction in self.warm_up:
            if climb.spent or not climb.region.linear_point(climb.next, climb.gradient, fraction) > 0:
                break
            climb.evaluate_next()
            if math.isfinite(climb.next_value):
                climb.accept()
        climb.go_back()
        climb.steps = 0

    def _finished(self, climb: Climb, reason: str, *, goes_on: bool) -> Maximum:
        point, gradient = climb.best
        gap = climb.region.vertex_step(None, point, gradient).gap
        evaluations = climb.evaluations
        said = f"one start; stopped after {evaluations.gradients} gradients because {reason}"
        return Maximum(
            perturbation=point,
            value=climb.best_value,
            steps=climb.steps,
            status=Status(Kind.LOWER_BOUND, said),
            gradients=evaluations.gradients,
            gradient=gradient,
            onward=climb.next if goes_on else None,
            start_values=(climb.best_value,),
            start_names=("start",),
            start_gradients=(evaluations.gradients,),
            rejections=climb.rejections,
            gap=gap,
            non_finite=evaluations.non_finite,
            stopped=reason is STOPPED,
        )


def apgd(max_gradients: int = 24) -> Ascent:
    """Auto-PGD: steps along the sign of the gradient with momentum, of a length that halves where it does not pay.

    Source: Croce and Hein (2020), Algorithm 1, in half widths of the box.
    """
    return Ascent(AlongSign(), Halving(), max_gradients, warm_up=())


def spectral_projected_gradient(max_gradients: int = 24) -> Ascent:
    """Projected gradient with Barzilai–Borwein lengths and a nonmonotone line search, in half widths of the box.

    Source: Birgin, Martínez and Raydan (2000), SPG2.
    """
    return Ascent(AlongGradient(), Spectral(), max_gradients, warm_up=())
