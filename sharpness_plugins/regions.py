"""Feasible sets of the inner maximisation: boxes, balls and subspaces, with the steps that solvers take in them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from . import reductions
from .kernels import ball, box, vectors
from .layout import WHOLE, Layout
from .subspace import SignSubspace

__all__ = [
    "Ball",
    "Box",
    "ProjectedStep",
    "Region",
    "SteppedRegion",
    "Subspace",
    "ValueAndGrad",
    "VertexStep",
    "stepped",
]

ValueAndGrad = Callable[[Tensor], tuple[float, Tensor]]


class Region(Protocol):
    """A closed convex set of perturbations that contains zero. All that a solver asks of a third party's set.

    Where vectors lie in shards, the set must have ``layout``, the ``layout.Layout`` of them, and answer for the whole ones.
    """

    def project(self, perturbation: Tensor) -> Tensor:
        """The nearest point of the set."""

    def ascent_vertex(self, gradient: Tensor) -> Tensor:
        """The point of the set that maximizes ``<gradient, e>``; zero where the gradient is zero."""

    def contains(self, perturbation: Tensor) -> bool: ...


class VertexStep(NamedTuple):
    """What is known of the way from a point y to the vertex v of its gradient g.

    Attributes:
        gap: ``<g, v - y>``: what a linear function would gain on the whole way; zero at a local maximum.
        slope: ``max <g, e>`` over the set; not finite if g is not.
        distance: ``‖v - y‖²``.
    """

    gap: float
    slope: float
    distance: float


class ProjectedStep(NamedTuple):
    """What is known of a projected step.

    Attributes:
        ascent: ``<g, step>``.
        length: squared length of the step in the region's own units (half widths, radii).
    """

    ascent: float
    length: float


class SteppedRegion(Region, Protocol):
    """A region with the steps of the solvers done in place, each in as few passes as it takes. Vectors are ``(dim,)``.

    With vectors in shards, everything that is told of them is of the whole ones, and all methods are collective.
    """

    @property
    def layout(self) -> Layout: ...

    def vertex_step(self, out: Tensor | None, y: Tensor, gradient: Tensor, share: float = 1.0) -> VertexStep:
        """Write the point that lies the ``share`` of the way from y to the vertex; where g is zero, y may stay.

        Without ``out`` nothing is written.
        """

    def linear_point(self, out: Tensor, gradient: Tensor, fraction: float) -> float:
        """Write a point of ``fraction`` times the set that follows the gradient without jumping to a vertex.

        Returns ``max <g, e>`` over the set.
        """

    def projected_step(
        self,
        out: Tensor,
        y: Tensor,
        previous: Tensor | None,
        gradient: Tensor,
        length: float,
        momentum: float = 1.0,
        *,
        signed: bool,
    ) -> ProjectedStep:
        """Write ``t = Π(y + length d)``, or with momentum m ``Π(y + m (t - y) + (1 - m)(y - previous))``.

        d is the vertex of the gradient if ``signed``, else the gradient in the region's own units.
        """

    def secant(self, y: Tensor, other: Tensor, gradient: Tensor, other_gradient: Tensor) -> tuple[float, float]:
        """Squared length of the way in the region's own units, and ``<other - y, other_gradient - gradient>``."""

    def model_step(self, out: Tensor, y: Tensor, gradient: Tensor, other: Tensor, other_gradient: Tensor) -> bool:
        """Write the maximum of a model made of two points and their gradients; False if the region has no such model."""


def stepped(region: Region) -> SteppedRegion:
    """The region with its own steps, or with plain ones made of ``project`` and ``ascent_vertex``.

    Raises:
        TypeError: it lacks these.
    """
    if isinstance(region, (Box, Ball)):
        return region
    missing = [name for name in ("project", "ascent_vertex", "contains") if not callable(getattr(region, name, None))]
    if missing:
        raise TypeError(
            f"region must have the methods project, ascent_vertex and contains, and {type(region).__name__} lacks "
            f"{', '.join(missing)}"
        )
    return _PlainSteps(region)


@dataclass(frozen=True, eq=False)
class Box:
    """``|e_i| <= b_i`` with half widths ``b_i = slope |anchor_i| + offset``, finite and not negative.

    With the anchor alone, the half widths are the anchor; they are never stored otherwise, but recomputed where they are
    needed, which costs no memory beside the anchor.

    Args:
        anchor: shape ``(dim,)``; the half widths themselves (then not negative), or what they are made from.
        slope, offset: numbers, not negative.
        layout: of the anchor and of all vectors here. In shards, a step takes one all-reduce, of what is told of it.
    """

    anchor: Tensor
    slope: float = 1.0
    offset: float = 0.0
    layout: Layout = WHOLE
    _scalars: tuple[Tensor, Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        plain = self.slope == 1.0 and self.offset == 0.0
        named = "half_width" if plain else "anchor"
        if self.anchor.ndim != 1 or not self.anchor.is_floating_point():
            raise ValueError(f"{named} must be a vector of numbers, got {self.anchor.dtype}, {tuple(self.anchor.shape)}")
        lowest, highest = map(float, self.anchor.aminmax()) if len(self.anchor) else (0.0, 0.0)
        lowest, highest = -self.layout.largest(-lowest), self.layout.largest(highest)
        if not (math.isfinite(lowest) and math.isfinite(highest)) or (plain and lowest < 0):
            raise ValueError(f"{named} must hold finite numbers{' >= 0' if plain else ''}, got {lowest:g} to {highest:g}")
        if not (0 <= self.slope < math.inf and 0 <= self.offset < math.inf):
            raise ValueError(f"slope and offset must be finite numbers >= 0, got {self.slope} and {self.offset}")
        scalars = tuple(vectors.scalar(value, self.anchor) for value in (self.slope, self.offset))
        object.__setattr__(self, "anchor", self.anchor.detach().contiguous())
        object.__setattr__(self, "_scalars", scalars)

    @classmethod
    def keskar(cls, origin: Tensor, epsilon: float, *, layout: Layout = WHOLE) -> Box:
        """``|e_i| <= ε (|w_i| + 1)``. Source: Keskar et al. (2017), eq. 3."""
        return cls(origin, epsilon, epsilon, layout)

    @classmethod
    def infinity_ball(
        cls, origin: Tensor, rho: float, *, adaptive: bool = False, eta: float = 0.0, layout: Layout = WHOLE
    ) -> Box:
        """``max |e_i| <= rho``, or with ``adaptive`` ``|e_i| <= rho (|w_i| + eta)``.

        Source: Kwon et al., ASAM (2021), with the maximum norm.
        """
        return cls(origin, rho, rho * eta, layout) if adaptive else cls(origin, 0.0, rho, layout)

    @property
    def half_width(self) -> Tensor:
        """b, shape ``(dim,)``, computed anew."""
        return self.half_width_of(slice(None))

    def half_width_of(self, piece: slice) -> Tensor:
        """b on a range of the coordinates."""
        if self.slope == 1.0 and self.offset == 0.0:
            return self.anchor[piece]
        slope, offset = self._scalars
        return self.anchor[piece].abs().mul_(slope).add_(offset)

    def project(self, perturbation: Tensor) -> Tensor:
        inside = perturbation.clone(memory_format=torch.contiguous_format)
        for e, b in self._pieces(inside):
            e.clamp_(-b, b)
        return inside

    def ascent_vertex(self, gradient: Tensor) -> Tensor:
        vertex = gradient.sign()
        for v, b in self._pieces(vertex):
            v.mul_(b)
        return vertex

    def contains(self, perturbation: Tensor) -> bool:
        return self.layout.everywhere(all(bool((e.abs() <= b).all()) for e, b in self._pieces(perturbation)))

    def share_at_bound(self, perturbation: Tensor) -> float:
        """Fraction of the coordinates within a millionth of a bound."""
        at_bound = perturbation.new_zeros((), dtype=torch.float64)
        for e, b in self._pieces(perturbation):
            at_bound += (e.abs() >= (1 - 1e-6) * b).sum()
        return float(self.layout.sums(at_bound)) / self.layout.length(perturbation)

    def vertex_step(self, out: Tensor | None, y: Tensor, gradient: Tensor, share: float = 1.0) -> VertexStep:
        if out is None:
            told = box.box_gap(y, gradient, self.anchor, *self._scalars)
        else:
            told = box.box_vertex_step(out, y, gradient, self.anchor, *self._scalars, share)
        known = self.layout.sums(told[: box.VertexStatistic.NORM]).tolist()
        statistic = box.VertexStatistic
        return VertexStep(known[statistic.GAP], known[statistic.SLOPE], known[statistic.DISTANCE])

    def linear_point(self, out: Tensor, gradient: Tensor, fraction: float) -> float:
        if self.layout.is_whole:
            return box.box_linear_step(out, gradient, self.anchor, *self._scalars, fraction).item()
        # the mean of b|g| is known only after a meeting; the point is then a projected step from the middle of the box
        local = box.box_gap(gradient, gradient, self.anchor, *self._scalars)[box.VertexStatistic.SLOPE]
        slope: float = self.layout.sums(local).item()
        per_mean = self.layout.length(out) / (2 * slope) if slope else 0.0
        largest = torch.finfo(vectors.arithmetic_dtype(out.dtype)).max
        out.zero_()
        length = min(per_mean, largest)
        box.box_projected_step(out, out, None, gradient, self.anchor, *self._scalars, length, signed=False)
        out.mul_(fraction)
        return slope

    def projected_step(
        self,
        out: Tensor,
        y: Tensor,
        previous: Tensor | None,
        gradient: Tensor,
        length: float,
        momentum: float = 1.0,
        *,
        signed: bool,
    ) -> ProjectedStep:
        local = box.box_projected_step(
            out, y, previous, gradient, self.anchor, *self._scalars, length, momentum, signed=signed
        )
        told = self.layout.sums(local).tolist()
        return ProjectedStep(told[box.ProjectedStatistic.ASCENT], told[box.ProjectedStatistic.DISTANCE_IN_BOX])

    def secant(self, y: Tensor, other: Tensor, gradient: Tensor, other_gradient: Tensor) -> tuple[float, float]:
        local = box.box_secant(y, other, gradient, other_gradient, self.anchor, *self._scalars)
        told = self.layout.sums(local).tolist()
        return told[box.SecantStatistic.DISTANCE_IN_BOX], told[box.SecantStatistic.CURVATURE]

    def model_step(self, out: Tensor, y: Tensor, gradient: Tensor, other: Tensor, other_gradient: Tensor) -> bool:
        """The maximum of ``Σ g_i t_i + ½ d_i t_i²``, ``t = e - y``, with ``d`` from the secants towards ``other``.

        Exact for a separable quadratic. Where the two points share a coordinate nothing is known of ``d_i``, and it stays.
        """
        for piece in vectors.pieces(len(y), y.device):
            here, g, b = y[piece], gradient[piece], self.half_width_of(piece)
            way = other[piece] - here
            moved = way != 0
            curvature = torch.where(moved, (other_gradient[piece] - g) / torch.where(moved, way, 1), 0)
            concave = curvature < 0
            inner = torch.clamp(here - g / torch.where(concave, curvature, -1), -b, b)
            up, down = b - here, -b - here
            rises = g * up + 0.5 * curvature * up * up >= g * down + 0.5 * curvature * down * down
            model = torch.where(concave, inner, torch.where(rises, b, -b))
            out[piece].copy_(torch.where(moved, model, here))
        return True

    def _pieces(self, perturbation: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for piece in vectors.pieces(len(perturbation), perturbation.device):
            yield perturbation[piece], self.half_width_of(piece)


@dataclass(frozen=True, eq=False)
class Ball:
    """``‖e / weight‖₂ <= rho``; the plain ball without a weight.

    Args:
        rho: radius, positive.
        weight: shape ``(dim,)``, not negative: the ellipsoid's half axes over rho. Where it is zero, e is zero.
        layout: of the weight and of all vectors here. In shards, every norm is an all-reduce: a step takes two to four.
    """

    rho: float
    weight: Tensor | None = None
    layout: Layout = WHOLE

    def __post_init__(self) -> None:
        if not 0 < self.rho < math.inf:
            raise ValueError(f"rho must be a positive number, got {self.rho}")
        if self.weight is not None and not self.layout.everywhere(
            self.weight.ndim == 1 and bool((self.weight >= 0).logical_and(self.weight < math.inf).all())
        ):
            raise ValueError("weight must be a vector of finite numbers >= 0, shape (dim,)")

    @classmethod
    def adaptive(cls, origin: Tensor, rho: float, *, eta: float = 0.0, layout: Layout = WHOLE) -> Ball:
        """``‖e / (|w| + eta)‖₂ <= rho``: does not change when layers of a ReLU network are rescaled, for ``eta`` 0.

        Source: Kwon et al., ASAM (2021), Definition 2.
        """
        if not 0 <= eta < math.inf:
            raise ValueError(f"eta must be a number >= 0, got {eta}")
        return cls(rho, origin.abs().add_(eta), layout)

    def project(self, perturbation: Tensor) -> Tensor:
        """The nearest point in the Euclidean norm; for a weighted ball by Newton's method on one multiplier, in float64."""
        if self.contains(perturbation):
            return perturbation.clone()
        if self.weight is None:
            return perturbation * (self.rho / self._length(perturbation))
        squares = self.weight.double().square()
        e = perturbation.double()
        multiplier = 0.0
        for _ in range(100):
            # p = e T² / (T² + μ); Newton on 1/‖p/T‖ = 1/ρ, which is concave and increasing in μ: from 0 it never overshoots
            inside = torch.where(squares > 0, e * squares.sqrt() / (squares + multiplier), 0)
            length = (inside.norm() if self.layout.is_whole else self.layout.norm(inside)).item()
            if length <= self.rho * (1 + 1e-13):
                break
            descent = self.layout.sums((inside.square() / (squares + multiplier).clamp_min(1e-300)).sum()).item()
            multiplier += (length / self.rho - 1) * length**2 / descent
        return self._within(torch.where(squares > 0, e * squares / (squares + multiplier), 0).to(perturbation))

    def ascent_vertex(self, gradient: Tensor) -> Tensor:
        scaled = self._scaled(gradient)
        length = self.layout.norm(scaled).item()
        return self._scaled(scaled) * (self.rho / length) if length > 0 else torch.zeros_like(gradient)

    def contains(self, perturbation: Tensor) -> bool:
        if self.weight is not None and not self.layout.everywhere(not (perturbation[self.weight == 0] != 0).any()):
            return False
        # a few ulp: a point that was scaled to length rho is in the ball
        return self._length(perturbation) <= self.rho * (1 + 4 * torch.finfo(perturbation.dtype).eps)

    def vertex_step(self, out: Tensor | None, y: Tensor, gradient: Tensor, share: float = 1.0) -> VertexStep:
        written = torch.empty_like(y) if out is None else out
        statistic, square = ball.BallStatistic, None
        if not self.layout.is_whole:
            scaled = gradient if self.weight is None else gradient * self.weight
            square = self.layout.dot(scaled, scaled)
        told = self.layout.sums(ball.ball_step(written, y, gradient, self.weight, self.rho, share, square)).tolist()
        slope = told[statistic.SLOPE] if square is None else self.rho * square.sqrt().item()
        return VertexStep(told[statistic.GAP], slope, told[statistic.DISTANCE])

    def linear_point(self, out: Tensor, gradient: Tensor, fraction: float) -> float:
        return _PlainSteps(self).linear_point(out, gradient, fraction)

    def projected_step(
        self,
        out: Tensor,
        y: Tensor,
        previous: Tensor | None,
        gradient: Tensor,
        length: float,
        momentum: float = 1.0,
        *,
        signed: bool,
    ) -> ProjectedStep:
        direction = self.ascent_vertex(gradient) if signed else self._scaled(self._scaled(gradient)).mul_(self.rho**2)
        moved = self._within(direction.mul_(length).add_(y))
        if previous is not None:
            moved = self._within(y + momentum * (moved - y) + (1 - momentum) * (y - previous))
        step = moved - y
        out.copy_(moved)
        squared, ascent = self._squared_and_dot(step, gradient)
        return ProjectedStep(ascent, squared)

    def secant(self, y: Tensor, other: Tensor, gradient: Tensor, other_gradient: Tensor) -> tuple[float, float]:
        return self._squared_and_dot(other - y, other_gradient - gradient)

    def model_step(self, out: Tensor, y: Tensor, gradient: Tensor, other: Tensor, other_gradient: Tensor) -> bool:
        return False

    def _scaled(self, vector: Tensor) -> Tensor:
        return vector.clone() if self.weight is None else vector * self.weight

    def _in_radii(self, perturbation: Tensor) -> Tensor:
        """In units of the half axes over rho."""
        return perturbation if self.weight is None else torch.where(self.weight > 0, perturbation / self.weight, 0)

    def _length(self, perturbation: Tensor) -> float:
        return self.layout.norm(self._in_radii(perturbation)).item()

    def _squared_and_dot(self, step: Tensor, other: Tensor) -> tuple[float, float]:
        """Squared length of the step in radii, and ``<step, other>``."""
        inside = self._in_radii(step)
        squared, dot = self.layout.sums(torch.stack([reductions.dot(inside, inside), reductions.dot(step, other)]))
        return (squared.sqrt().item() / self.rho) ** 2, dot.item()

    def _within(self, perturbation: Tensor) -> Tensor:
        """Nearest in the ball's own norm, in place: shortened."""
        length = self._length(perturbation)
        return perturbation.mul_(self.rho / length) if length > self.rho else perturbation


@dataclass(frozen=True, eq=False)
class Subspace:
    """``{A c : c in inner}`` for the columns of a random matrix A that is never stored as one.

    Solvers do better in the coefficients c, of which there are few: ``within`` gives the function of them.
    """

    columns: SignSubspace
    inner: Box

    def within(self, fn: ValueAndGrad) -> ValueAndGrad:
        """``c -> (f(A c), Aᵀ gradient)``, shapes ``(num_columns,)``."""

        def of_coefficients(coefficients: Tensor) -> tuple[float, Tensor]:
            value, gradient = fn(self.columns.lift(coefficients))
            return value, self.columns.restrict(gradient)

        return of_coefficients

    def project(self, perturbation: Tensor) -> Tensor:
        """The nearest point: least squares in the coefficients, with their bounds, in float64 on the host."""
        right = self.columns.restrict(perturbation).double().cpu().numpy()
        gram = self.columns.gram().double().cpu().numpy() * self.columns.scale**2
        root = np.linalg.cholesky(gram)
        bound = self.inner.half_width.double().cpu().numpy()
        tight = np.maximum(bound, 1e-300)
        found = scipy.optimize.lsq_linear(root.T, np.linalg.solve(root, right), bounds=(-tight, tight), tol=1e-14)
        return self.columns.lift(self.inner.project(torch.from_numpy(found.x).to(self.inner.anchor)))

    def ascent_vertex(self, gradient: Tensor) -> Tensor:
        return self.columns.lift(self.inner.ascent_vertex(self.columns.restrict(gradient)))

    def contains(self, perturbation: Tensor) -> bool:
        coefficients = self.columns.coordinates(perturbation)
        slack = 1e-5 if perturbation.dtype == torch.float32 else 1e-10
        beside = reductions.norm(self.columns.lift(coefficients) - perturbation).item()
        if beside > slack * max(reductions.norm(perturbation).item(), torch.finfo(torch.float32).tiny):
            return False
        return bool((coefficients.abs() <= self.inner.half_width * (1 + slack)).all())


@dataclass(frozen=True)
class _PlainSteps:
    """The steps of any region, made of its projection and vertex; a unit of length is the plain one."""

    region: Region

    @property
    def layout(self) -> Layout:
        layout: Layout = getattr(self.region, "layout", WHOLE)
        return layout

    def project(self, perturbation: Tensor) -> Tensor:
        return self.region.project(perturbation)

    def ascent_vertex(self, gradient: Tensor) -> Tensor:
        return self.region.ascent_vertex(gradient)

    def contains(self, perturbation: Tensor) -> bool:
        return self.region.contains(perturbation)

    def vertex_step(self, out: Tensor | None, y: Tensor, gradient: Tensor, share: float = 1.0) -> VertexStep:
        vertex = self.region.ascent_vertex(gradient)
        step = vertex - y
        told = [reductions.dot(gradient, step), reductions.dot(gradient, vertex), reductions.dot(step, step)]
        if out is not None:
            out.copy_(vertex if share == 1 else y + share * step)
        return VertexStep(*self.layout.sums(torch.stack(told)).tolist())

    def linear_point(self, out: Tensor, gradient: Tensor, fraction: float) -> float:
        out.copy_(self.region.ascent_vertex(gradient))
        slope: float = self.layout.dot(gradient, out).item()
        out.mul_(fraction)
        return slope

    def projected_step(
        self,
        out: Tensor,
        y: Tensor,
        previous: Tensor | None,
        gradient: Tensor,
        length: float,
        momentum: float = 1.0,
        *,
        signed: bool,
    ) -> ProjectedStep:
        direction = self.region.ascent_vertex(gradient) if signed else gradient
        moved = self.region.project(y + length * direction)
        if previous is not None:
            moved = self.region.project(y + momentum * (moved - y) + (1 - momentum) * (y - previous))
        step = moved - y
        out.copy_(moved)
        ascent, squared = self.layout.sums(torch.stack([reductions.dot(gradient, step), reductions.dot(step, step)]))
        return ProjectedStep(ascent.item(), squared.item())

    def secant(self, y: Tensor, other: Tensor, gradient: Tensor, other_gradient: Tensor) -> tuple[float, float]:
        step = other - y
        told = torch.stack([reductions.dot(step, step), reductions.dot(step, other_gradient - gradient)])
        squared, curvature = self.layout.sums(told).tolist()
        return squared, curvature

    def model_step(self, out: Tensor, y: Tensor, gradient: Tensor, other: Tensor, other_gradient: Tensor) -> bool:
        return False
