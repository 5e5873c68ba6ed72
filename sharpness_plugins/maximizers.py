"""Solvers of the inner maximisation ``max f(e), e in region``: every answer is the best point seen, a lower bound."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from . import reductions
from .regions import Box, Region
from .report import Kind, Status

__all__ = ["LBFGSB", "Maximizer", "Maximum", "MultiStart", "SignFrankWolfe", "ValueAndGrad", "maximizer_named"]

ValueAndGrad = Callable[[Tensor], tuple[float, Tensor]]


class Maximum(NamedTuple):
    """What a solver found.

    Attributes:
        perturbation: the best point seen, never merely the last; shape ``(dim,)``.
        value: f there.
        steps: accepted steps.
        status: a lower bound, and the sentence how it was found.
        gradients: evaluations of f with its gradient.
        gradient: at ``perturbation``, where the solver knows it.
        start_values: the best value reached from each start, in order: their spread is the honest uncertainty.
        start_names: what those starts were.
        rejections: vertex steps that did not raise f; for a convex f there are none.
        gap: ``max <gradient, v - perturbation>`` over the region: a measure of stationarity, zero at a local maximum. It
            bounds what is left to gain only where f is concave.
        non_finite: points at which f was not finite, passed over.
    """

    perturbation: Tensor
    value: float
    steps: int
    status: Status
    gradients: int = 0
    gradient: Tensor | None = None
    start_values: tuple[float, ...] = ()
    start_names: tuple[str, ...] = ()
    rejections: int = 0
    gap: float = math.nan
    non_finite: int = 0


class Maximizer(Protocol):
    """Settings in a frozen dataclass, one method. It may use up to ``num_proposals`` starts of the caller's."""

    @property
    def num_proposals(self) -> int: ...

    def maximize(
        self, fn: ValueAndGrad, region: Region, start: Tensor, proposals: Iterable[tuple[str, Tensor]] = ()
    ) -> Maximum:
        """Maximize ``fn`` over ``region`` from ``start`` and, where the solver uses several starts, ``proposals``.

        Args:
            fn: ``e -> (f(e), gradient)``, shapes ``(dim,)``; a value that is not finite counts as no ascent.
            region: where to look.
            start: a point of the region, shape ``(dim,)``.
            proposals: further starts with their names, the most promising first; drawn one by one, as they are used.
        """


@dataclass
class _Run:
    """One run's budget and the best point it has seen."""

    fn: ValueAndGrad
    budget: int
    gradients: int = 0
    best_value: float = -math.inf
    best: Tensor | None = None
    best_gradient: Tensor | None = None
    non_finite: int = 0

    def evaluate(self, e: Tensor) -> tuple[float, Tensor]:
        value, gradient = self.fn(e)
        self.gradients += 1
        if not math.isfinite(value) or not bool(torch.isfinite(gradient).all()):
            value = -math.inf
            self.non_finite += 1
        if value > self.best_value:
            self.best_value, self.best, self.best_gradient = value, e, gradient
        return value, gradient

    @property
    def spent(self) -> bool:
        return self.gradients >= self.budget


@dataclass(frozen=True)
class SignFrankWolfe:
    """Ascent from vertex to vertex of a box: Frank–Wolfe with full steps, also known as the generalized power method.

    For a convex f every step ascends. Where one does not, f is not convex between the two points: then the secant along
    each coordinate says where it is concave, and the step goes to the maximum of that separable quadratic model (exact
    when f is one), or else a shorter way to the vertex. From a start with ``warm_up``, the first steps follow the
    linearly clipped gradient at growing fractions of the box: from zero, sign steps alone freeze at a poor vertex when
    the trace of the Hessian is large against its largest eigenvalue times √dim.

    Args:
        max_gradients: budget.
        warm_up: fractions of the box; used when the start is zero. Empty for none.
        tolerance: stop when a step gains less than this share of the gain so far; 0 runs on to a fixed point.
    Cost: one gradient a step and, beside the problem's own vectors, three of its size.
    Source: Journée et al., Generalized power method for sparse PCA (2010); Frank and Wolfe (1956).
    """

    max_gradients: int = 12
    warm_up: tuple[float, ...] = (0.05, 0.15, 0.4, 1.0)
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        if self.max_gradients < 1:
            raise ValueError(f"max_gradients must be at least 1, got {self.max_gradients}")
        if not all(0 < r <= 1 for r in self.warm_up):
            raise ValueError(f"warm_up must hold fractions of the box in (0, 1], got {self.warm_up}")
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance must be at least 0, got {self.tolerance}")

    @property
    def num_proposals(self) -> int:
        return 0

    def maximize(
        self, fn: ValueAndGrad, region: Region, start: Tensor, proposals: Iterable[tuple[str, Tensor]] = ()
    ) -> Maximum:
        """See ``Maximizer``; ``region`` must be a ``Box``, ``proposals`` are not used."""
        if not isinstance(region, Box):
            raise TypeError(f"SignFrankWolfe ascends on a Box, got a {type(region).__name__}")
        run = _Run(fn, self.max_gradients)
        y = region.project(start)
        value, gradient = run.evaluate(y)
        return self._ascend(run, region, y, value, gradient)

    def resume(self, fn: ValueAndGrad, box: Box, maximum: Maximum) -> Maximum:
        """Ascend on from a point whose value and gradient are known; no gradient is spent on it again."""
        assert maximum.gradient is not None
        run = _Run(fn, self.max_gradients, 0, maximum.value, maximum.perturbation, maximum.gradient)
        return self._ascend(run, box, maximum.perturbation, maximum.value, maximum.gradient)

    def _ascend(self, run: _Run, region: Box, y: Tensor, value: float, gradient: Tensor) -> Maximum:
        first = value
        if self.warm_up and not y.any():
            y, value, gradient = self._warmed_up(run, region, y, value, gradient)
        steps, rejections, reason = 0, 0, "its budget was used"
        while not run.spent:
            vertex = torch.where(gradient == 0, y, region.ascent_vertex(gradient))
            if not reductions.dot(gradient, vertex - y) > 0:
                reason = "it reached a fixed point"
                break
            before = value
            y, value, gradient, failures = self._step(run, region, y, value, gradient, vertex)
            rejections += failures
            if not value > before:
                reason = reason if run.spent else "no step ascended"
                break
            steps += 1
            if value - before < self.tolerance * (value - first) and steps >= 2:
                reason = f"a step gained less than {self.tolerance:g} of the gain"
                break
        best, best_gradient = (y, gradient) if run.best is None else (run.best, run.best_gradient)
        assert best_gradient is not None
        vertex = torch.where(best_gradient == 0, best, region.ascent_vertex(best_gradient))
        return Maximum(
            perturbation=best,
            value=run.best_value,
            steps=steps,
            status=Status(Kind.LOWER_BOUND, f"one start; stopped after {run.gradients} gradients because {reason}"),
            gradients=run.gradients,
            gradient=best_gradient,
            start_values=(run.best_value,),
            start_names=("start",),
            rejections=rejections,
            non_finite=run.non_finite,
            gap=reductions.dot(best_gradient, vertex - best).item(),
        )

    def _warmed_up(self, run: _Run, box: Box, y: Tensor, value: float, gradient: Tensor) -> tuple[Tensor, float, Tensor]:
        for fraction in self.warm_up:
            slope = box.half_width * gradient
            mean = reductions.total(slope.abs()).item() / slope.numel()
            if run.spent or mean == 0:
                break
            y = fraction * box.half_width * torch.clamp(slope / (2 * mean), -1, 1)
            value, gradient = run.evaluate(y)
        if value < run.best_value and run.best is not None and run.best_gradient is not None:
            return run.best, run.best_value, run.best_gradient
        return y, value, gradient

    def _step(
        self, run: _Run, box: Box, y: Tensor, value: float, gradient: Tensor, vertex: Tensor
    ) -> tuple[Tensor, float, Tensor, int]:
        """The next point (``y`` again if nothing ascends), its value and gradient, and the number of rejections."""
        vertex_value, vertex_gradient = run.evaluate(vertex)
        if vertex_value > value:
            return vertex, vertex_value, vertex_gradient, 0
        rejections = 1
        if vertex_value > -math.inf and not run.spent:
            trial = _separable_model_maximum(box, y, gradient, vertex, vertex_gradient)
            trial_value, trial_gradient = run.evaluate(trial)
            if trial_value > value:
                return trial, trial_value, trial_gradient, rejections
            rejections += 1
        if not run.spent:
            # the parabola through f(y), its slope towards the vertex, and f(vertex)
            gap = reductions.dot(gradient, vertex - y).item()
            curvature = gap - (vertex_value - value)
            share = min(max(gap / (2 * curvature), 0.1), 0.5) if math.isfinite(curvature) else 0.1
            trial = y + share * (vertex - y)
            trial_value, trial_gradient = run.evaluate(trial)
            if trial_value > value:
                return trial, trial_value, trial_gradient, rejections
            rejections += 1
        return y, value, gradient, rejections


def _separable_model_maximum(box: Box, y: Tensor, gradient: Tensor, other: Tensor, other_gradient: Tensor) -> Tensor:
    """Maximum over the box of ``Σ g_i t_i + ½ d_i t_i²``, ``t = e - y``, with ``d`` from the secants towards ``other``.

    Where the two points share a coordinate nothing is known of ``d_i``, and it stays.
    """
    step = other - y
    moved = step != 0
    curvature = torch.where(moved, (other_gradient - gradient) / torch.where(moved, step, 1), 0)
    inner = torch.clamp(y - gradient / torch.where(curvature < 0, curvature, -1), -box.half_width, box.half_width)

    def gain(end: Tensor) -> Tensor:
        t = end - y
        return gradient * t + 0.5 * curvature * t * t

    ends = torch.where(gain(box.half_width) >= gain(-box.half_width), box.half_width, -box.half_width)
    return torch.where(moved, torch.where(curvature < 0, inner, ends), y)


@dataclass(frozen=True)
class MultiStart:
    """One solver from several starts, within one budget: explore, refine the best, and explore on with what is left.

    The starts are the given one (zero), the caller's first proposal, the antipode of the best point so far, and then
    further proposals. Local maxima are many, so the second start buys more than a better solver does: measured on 27
    problems, one start finds .93 of the best known maximum on average and .62 at worst, two .986 and .86.

    Args:
        solver: one start's solver; its budget is the most that one start may take.
        max_gradients: budget of all starts and the refinement together.
        num_proposals: the most proposals to use; the budget allows fewer, as a rule.
        antipodal: whether to try the antipode.
    """

    solver: SignFrankWolfe = field(default_factory=SignFrankWolfe)
    max_gradients: int = 24
    num_proposals: int = 100
    antipodal: bool = True

    def __post_init__(self) -> None:
        if self.max_gradients < 1:
            raise ValueError(f"max_gradients must be at least 1, got {self.max_gradients}")
        if self.num_proposals < 0:
            raise ValueError(f"num_proposals must be at least 0, got {self.num_proposals}")

    def maximize(
        self, fn: ValueAndGrad, region: Region, start: Tensor, proposals: Iterable[tuple[str, Tensor]] = ()
    ) -> Maximum:
        """See ``Maximizer``; ``region`` must be a ``Box``."""
        if not isinstance(region, Box):
            raise TypeError(f"MultiStart ascends on a Box, got a {type(region).__name__}")
        search = _Search(fn, region, self.solver, self.max_gradients)
        offered = itertools.islice(proposals, self.num_proposals)
        search.explore("start" if start.any() else "zero", start)
        for name, point in itertools.islice(offered, 1):
            search.explore(name, point)
        if self.antipodal:
            search.explore("antipode", -search.best.perturbation)
        search.refine()
        while search.left > 1 and (proposal := next(offered, None)) is not None:
            search.explore(*proposal)
        search.refine()
        return search.result()


class _Search:
    """The best of several runs, and what is left of their common budget."""

    def __init__(self, fn: ValueAndGrad, box: Box, solver: SignFrankWolfe, budget: int) -> None:
        self._fn, self._box, self._solver = fn, box, solver
        self._budget = self.left = budget
        self._names: list[str] = []
        self._values: list[float] = []
        self._steps = self._rejections = self._non_finite = self._winner = 0
        self._settled = False
        self.best: Maximum

    def explore(self, name: str, point: Tensor) -> None:
        """Ascend from one more start, without the warm-up on any but the first."""
        if self.left < 1:
            return
        solver = self._solver if not self._names else replace(self._solver, warm_up=())
        found = replace(solver, max_gradients=min(solver.max_gradients, self.left)).maximize(self._fn, self._box, point)
        self._spend(found)
        if not self._names or found.value > self.best.value:
            self.best, self._winner, self._settled = found, len(self._names), False
        self._names.append(name)
        self._values.append(found.value)

    def refine(self) -> None:
        """Ascend on from the best point, to a fixed point."""
        if self.left < 1 or self._settled or not self.best.gap > 0:
            return
        solver = replace(self._solver, warm_up=(), tolerance=0.0, max_gradients=self.left)
        self.best = solver.resume(self._fn, self._box, self.best)
        self._spend(self.best)
        self._settled = True
        self._values[self._winner] = self.best.value

    def _spend(self, found: Maximum) -> None:
        self.left -= found.gradients
        self._steps += found.steps
        self._rejections += found.rejections
        self._non_finite += found.non_finite

    def result(self) -> Maximum:
        spent = self._budget - self.left
        how = f"best of {len(self._names)} start{'s' if len(self._names) > 1 else ''} after {spent} gradients"
        return self.best._replace(
            status=Status(Kind.LOWER_BOUND, how),
            steps=self._steps,
            rejections=self._rejections,
            non_finite=self._non_finite,
            gradients=spent,
            start_values=tuple(self._values),
            start_names=tuple(self._names),
        )


@dataclass(frozen=True)
class LBFGSB:
    """SciPy's L-BFGS-B, the paper's solver, on the host: 10 iterations from one start.

    With ``published=True`` the call is the paper's: SciPy's default tolerances, the raw objective. On a well-trained
    network, whose gradient is below ``gtol = 1e-5``, it stops at once and reports no rise at all; the status then says so.
    Otherwise the variables are scaled to the unit box, the objective so that its largest scaled slope is 100, and both
    tolerances are zero, so that the iterations are really run and the answer does not depend on the unit of the loss.

    Cost: 10 to 15 gradients; 490 bytes of host memory and 3.4 µs of host time per parameter.
    Source: Byrd et al., A limited memory algorithm for bound constrained optimization (1995); Keskar et al. (2017).
    """

    max_iterations: int = 10
    published: bool = False

    _PAIRS = 10

    def __post_init__(self) -> None:
        if self.max_iterations < 1:
            raise ValueError(f"max_iterations must be at least 1, got {self.max_iterations}")

    @property
    def num_proposals(self) -> int:
        return 0

    def maximize(
        self, fn: ValueAndGrad, region: Region, start: Tensor, proposals: Iterable[tuple[str, Tensor]] = ()
    ) -> Maximum:
        """See ``Maximizer``; ``region`` must be a ``Box``, ``proposals`` are not used.

        Raises:
            ValueError: the problem is so large that SciPy's 32-bit workspace index would overflow.
        """
        if not isinstance(region, Box):
            raise TypeError(f"LBFGSB maximizes over a Box, got a {type(region).__name__}")
        largest = (2**31 - 1 - 11 * self._PAIRS**2) // (2 * self._PAIRS + 5)
        if start.numel() > largest:
            raise ValueError(
                f"SciPy's L-BFGS-B overflows its 32-bit workspace above {largest:,} variables, and this problem has "
                f"{start.numel():,}. Use the default maximizer, SignFrankWolfe, which has no such limit."
            )
        run = _Run(fn, budget=0)
        half_width = region.half_width.double().cpu().numpy()
        origin = region.project(start)
        first, gradient = run.evaluate(origin)
        slope = (region.half_width * gradient).abs().max().item()
        unit, scale = (1.0, 1.0) if self.published else (half_width, 100.0 / slope if slope > 0 else 1.0)
        pending: list[tuple[float, Tensor]] = [(first, gradient)]  # SciPy asks for the start again

        def negated(u: np.ndarray[Any, Any]) -> tuple[float, np.ndarray[Any, Any]]:
            if pending:
                value, grad = pending.pop()
            else:
                value, grad = run.evaluate(region.project(torch.from_numpy(u * unit).to(start)))
            return -(value - first) * scale if not self.published else -value, -grad.double().cpu().numpy() * unit * scale

        bound = half_width if self.published else np.ones_like(half_width)
        options: dict[str, Any] = {"maxiter": self.max_iterations, "maxcor": self._PAIRS}
        if not self.published:
            options |= {"ftol": 0.0, "gtol": 0.0}
        u0 = origin.double().cpu().numpy()
        if not self.published:
            u0 = np.divide(u0, half_width, out=np.zeros_like(u0), where=half_width > 0)
        outcome = scipy.optimize.minimize(
            negated, u0, jac=True, method="L-BFGS-B", bounds=scipy.optimize.Bounds(-bound, bound), options=options
        )
        assert run.best is not None
        assert run.best_gradient is not None
        vertex = torch.where(run.best_gradient == 0, run.best, region.ascent_vertex(run.best_gradient))
        how = "as published" if self.published else "scaled, zero tolerances"
        said = (
            f"SciPy L-BFGS-B ({how}), {outcome.nit} of {self.max_iterations} iterations, {run.gradients} gradients: "
            f"{outcome.message}"
        )
        if outcome.nit == 0:
            said += ". It stopped where it started, so its 0 is not a maximum; use the default maximizer"
        elif outcome.nit < self.max_iterations and self.published:
            said += ". It stopped before its iterations were used"
        return Maximum(
            perturbation=run.best,
            value=run.best_value,
            steps=int(outcome.nit),
            status=Status(Kind.NOT_CONVERGED if outcome.nit == 0 else Kind.LOWER_BOUND, said),
            gradients=run.gradients,
            gradient=run.best_gradient,
            start_values=(run.best_value,),
            start_names=("zero" if not start.any() else "start",),
            non_finite=run.non_finite,
            gap=reductions.dot(run.best_gradient, vertex - run.best).item(),
        )


_NAMED: dict[str, Maximizer] = {
    "sign_frank_wolfe": MultiStart(),
    "lbfgsb": LBFGSB(),
    "lbfgsb_published": LBFGSB(published=True),
}


def maximizer_named(name: str) -> Maximizer:
    """The solvers that go by a name: ``sign_frank_wolfe`` (the default), ``lbfgsb``, ``lbfgsb_published``.

    Raises:
        ValueError: no such name.
    """
    if name not in _NAMED:
        raise ValueError(f"maximizer must be one of {', '.join(_NAMED)}, or a maximizer object, got {name!r}")
    return _NAMED[name]
