"""Boxes, balls and subspaces: nearest points, vertices, bounds, and the steps that solvers take in them."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import oracles
from sharpness_plugins.regions import Ball, Box, Subspace, stepped
from sharpness_plugins.space import ParameterSpace
from sharpness_plugins.subspace import SignSubspace

F64 = torch.float64
numbers = st.floats(-1e6, 1e6, width=32)


def vectors(dim: int, elements=numbers):
    return st.lists(elements, min_size=dim, max_size=dim).map(lambda values: torch.tensor(values, dtype=F64))


@st.composite
def boxes(draw, dim: int):
    kind = draw(st.sampled_from(["half widths", "keskar", "adaptive", "uniform"]))
    size = draw(st.floats(1e-3, 10))
    if kind == "half widths":
        return Box(draw(vectors(dim, st.floats(0, 1e3, width=32))))
    origin = draw(vectors(dim))
    if kind == "keskar":
        return Box.keskar(origin, size)
    return Box.infinity_ball(origin, size, adaptive=kind == "adaptive", eta=0.01)


@st.composite
def balls(draw, dim: int):
    rho = draw(st.floats(1e-2, 1e2))
    if draw(st.booleans()):
        return Ball(rho)
    return Ball(rho, draw(vectors(dim, st.sampled_from([0.0, 1e-2, 0.5, 1.0, 3.0, 40.0]))))


@st.composite
def regions_and_points(draw, count: int = 2):
    dim = draw(st.integers(1, 6))
    region = draw(st.one_of(boxes(dim), balls(dim)))
    return region, *(draw(vectors(dim)) for _ in range(count))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(regions_and_points())
def test_projection_is_the_nearest_point_and_never_moves_points_apart(case):
    region, x, y = case
    p, q = region.project(x), region.project(y)
    size = 1 + x.norm() + y.norm()
    assert region.contains(p)
    assert (region.project(p) - p).norm() <= 1e-12 * size
    assert (p - q).norm() <= (x - y).norm() * (1 + 1e-9) + 1e-9 * size
    assert ((x - p) @ (q - p)) <= 1e-9 * size**2  # no point of the region is nearer
    if region.contains(x):
        assert torch.equal(p, x)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(regions_and_points())
def test_the_vertex_maximizes_every_linear_function(case):
    region, gradient, point = case
    vertex = region.ascent_vertex(gradient)
    assert region.contains(vertex)
    highest = gradient @ vertex
    if isinstance(region, Box):
        expected = (region.half_width * gradient.abs()).sum().item()
    else:
        weight = 1.0 if region.weight is None else region.weight
        expected = region.rho * (weight * gradient).norm().item()
    assert highest.item() == pytest.approx(expected, rel=1e-9)
    assert highest >= gradient @ region.project(point) - 1e-9 * (1 + highest.abs())
    assert not region.ascent_vertex(torch.zeros_like(gradient)).any()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(regions_and_points(3), st.sampled_from([1.0, 0.25]))
def test_a_vertex_step_and_what_is_told_of_it(case, share):
    """The region's fused step against project and ascent_vertex alone."""
    region, start, gradient, _ = case
    y = region.project(start)
    vertex = region.ascent_vertex(gradient)
    if isinstance(region, Box):
        vertex = torch.where(gradient == 0, y, vertex)
    assume(gradient.any())
    out = torch.full_like(y, math.nan)
    told = stepped(region).vertex_step(out, y, gradient, share)
    size = 1 + y.norm() + vertex.norm()
    assert (out - (y + share * (vertex - y))).norm() <= 1e-12 * size
    scale = 3e-9 * ((1 + gradient.abs().max()) * size).item()
    assert told.gap == pytest.approx((gradient @ (vertex - y)).item(), abs=scale)
    assert told.slope == pytest.approx((gradient @ region.ascent_vertex(gradient)).item(), abs=scale)
    assert told.distance == pytest.approx(((vertex - y) ** 2).sum().item(), rel=1e-6, abs=1e-9 * size.item() ** 2)
    assert stepped(region).vertex_step(None, y, gradient)[:2] == pytest.approx(told[:2], abs=scale)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(regions_and_points(3), st.booleans(), st.sampled_from([1.0, 0.75]))
def test_a_projected_step_stays_inside_and_ascends(case, signed, momentum):
    region, start, gradient, other = case
    y, previous = region.project(start), region.project(other)
    for before in (None, previous):
        out = torch.full_like(y, math.nan)
        told = stepped(region).projected_step(out, y, before, gradient, 0.5, momentum, signed=signed)
        assert region.contains(out)
        scale = 3e-9 * ((1 + gradient.abs().max()) * (1 + y.norm() + out.norm())).item()
        assert told.ascent == pytest.approx((gradient @ (out - y)).item(), abs=scale)
        if before is None and isinstance(region, Box):  # a projected step along the gradient never descends
            assert told.ascent >= -scale


def test_keskars_box_is_the_papers():
    origin = torch.tensor([0.5, -2.0, 0.0])
    assert Box.keskar(origin, 1e-3).half_width.tolist() == pytest.approx([1.5e-3, 3e-3, 1e-3])


def test_the_maximum_norm_ball_is_a_box():
    origin = torch.tensor([0.5, -2.0, 0.0])
    assert Box.infinity_ball(origin, 0.1).half_width.tolist() == pytest.approx([0.1, 0.1, 0.1])
    adaptive = Box.infinity_ball(origin, 0.1, adaptive=True, eta=0.01)
    assert adaptive.half_width.tolist() == pytest.approx([0.051, 0.201, 0.001])


def test_the_adaptive_ball_does_not_see_the_scale_of_layers():
    """f(a, b) = ab: scaling a up and b down leaves f and the adaptive maximum, not the plain one (Dinh et al. 2017)."""
    gains = []
    for scale in (1.0, 30.0):
        w = torch.tensor([2.0 * scale, 3.0 / scale], dtype=F64)
        ball = Ball.adaptive(w, 0.05)
        e = ball.ascent_vertex(w.flip(0))
        gains.append(((w + e).prod() - w.prod()).item())
    assert gains[0] == pytest.approx(gains[1], rel=1e-12)


def test_share_at_the_bound_counts_both_sides():
    box = Box(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert box.share_at_bound(torch.tensor([1.0, -2.0, 1.5, 0.0])) == 0.5


def test_a_box_model_step_is_exact_on_separable_quadratics():
    generator = torch.Generator().manual_seed(0)
    h, slope = (torch.randn(70_000, generator=generator, dtype=F64) for _ in range(2))
    box = Box(torch.rand(70_000, generator=generator, dtype=F64))
    y, other = (box.half_width * (2 * torch.rand(70_000, generator=generator, dtype=F64) - 1) for _ in range(2))
    out = other.clone()  # in place over the second point
    assert box.model_step(out, y, slope + h * y, out, slope + h * other)
    gain = (slope * out + 0.5 * h * out**2).sum().item()
    assert gain == pytest.approx(oracles.diagonal_box_gain(h, slope, box.half_width), rel=1e-9)


def subspace_of(num_columns: int, half_width: float):
    space = ParameterSpace(torch.nn.Linear(6, 5).double())
    columns = SignSubspace(space, num_columns, key=7)
    return Subspace(columns, Box(torch.full((num_columns,), half_width, dtype=F64)))


def dense(columns: SignSubspace) -> torch.Tensor:
    return torch.stack([columns.lift(row) for row in torch.eye(columns.num_columns, dtype=F64)], dim=1)


def test_a_subspace_holds_what_its_coefficients_make():
    region = subspace_of(4, 0.5)
    matrix = dense(region.columns)
    generator = torch.Generator().manual_seed(1)
    inside = matrix @ torch.tensor([0.5, -0.2, 0.0, 0.1], dtype=F64)
    assert region.contains(inside)
    assert not region.contains(1.1 * inside)  # a coefficient above its bound
    assert not region.contains(inside + 1e-3 * torch.randn(35, generator=generator, dtype=F64))  # beside the columns
    gradient = torch.randn(35, generator=generator, dtype=F64)
    vertex = region.ascent_vertex(gradient)
    assert region.contains(vertex)
    assert (gradient @ vertex).item() == pytest.approx(0.5 * (matrix.T @ gradient).abs().sum().item(), rel=1e-12)


def test_the_nearest_point_of_a_subspace_beats_all_others():
    region = subspace_of(4, 0.3)
    generator = torch.Generator().manual_seed(2)
    matrix = dense(region.columns)
    point = torch.randn(35, generator=generator, dtype=F64)
    nearest = region.project(point)
    assert region.contains(nearest)
    others = (matrix @ (torch.rand(4, 500, generator=generator, dtype=F64) * 0.6 - 0.3)).T
    assert bool((((point - nearest) @ (others - nearest).T) <= 1e-9).all())
    assert torch.allclose(region.project(nearest), nearest, atol=1e-9)


def test_a_function_of_the_coefficients_has_their_gradient():
    region = subspace_of(3, 1.0)
    matrix = dense(region.columns)
    h = oracles.with_spectrum(torch.linspace(1, 3, 35, dtype=F64))

    def fn(e):
        return (0.5 * e @ h @ e).item(), h @ e

    c = torch.tensor([0.1, -0.4, 0.2], dtype=F64)
    value, gradient = region.within(fn)(c)
    assert value == pytest.approx((0.5 * (matrix @ c) @ h @ (matrix @ c)).item(), rel=1e-12)
    assert torch.allclose(gradient, matrix.T @ (h @ (matrix @ c)), rtol=1e-10)


class Halfspace:
    """A third party's region, with nothing but the protocol: a box cut by ``sum(e) <= 0``, by alternating projection."""

    def project(self, perturbation):
        e = perturbation
        for _ in range(200):
            e = e.clamp(-1, 1)
            e = e - max(e.sum().item(), 0.0) / e.numel()
        return e.clamp(-1, 1)

    def ascent_vertex(self, gradient):
        low, high = gradient.min().item(), gradient.max().item()
        for _ in range(200):
            mid = (low + high) / 2
            low, high = (mid, high) if (gradient - mid).sign().sum() > 0 else (low, mid)
        return (gradient - max(high, 0.0)).sign()

    def contains(self, perturbation):
        return bool((perturbation.abs() <= 1).all()) and perturbation.sum().item() <= 1e-9


def test_a_region_of_three_methods_has_steps():
    region = Halfspace()
    gradient = torch.tensor([3.0, -1.0, 0.5, 0.2], dtype=F64)
    y = torch.zeros(4, dtype=F64)
    out = torch.empty_like(y)
    told = stepped(region).vertex_step(out, y, gradient)
    assert torch.equal(out, region.ascent_vertex(gradient))
    assert told.gap == told.slope == (gradient @ out).item()
    assert stepped(region).projected_step(out, y, None, gradient, 10.0, signed=False).ascent > 0
    assert region.contains(out)


@pytest.mark.parametrize("half_width", [[-1.0], [float("nan")], [float("inf")], [[1.0]], 1.0])
def test_half_widths_that_are_none_are_refused(half_width):
    with pytest.raises(ValueError, match="half_width"):
        Box(torch.tensor(half_width))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Box.keskar(torch.tensor([math.nan]), 1e-3), "anchor must hold finite numbers"),
        (lambda: Box.keskar(torch.ones(2), -1.0), "slope and offset must be finite numbers >= 0, got -1.0"),
        (lambda: Box.infinity_ball(torch.ones(2), math.inf), "slope and offset"),
        (lambda: Ball(0.0), "rho must be a positive number, got 0.0"),
        (lambda: Ball(1.0, torch.tensor([-1.0])), "weight must be a vector of finite numbers >= 0"),
        (lambda: Ball.adaptive(torch.ones(2), 1.0, eta=-1.0), "eta must be a number >= 0, got -1.0"),
    ],
)
def test_regions_that_are_none_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_what_is_no_region_is_refused_by_what_it_lacks():
    with pytest.raises(TypeError, match="int lacks project, ascent_vertex, contains"):
        stepped(3)
