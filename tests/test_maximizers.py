"""Inner maximisation: closed forms, brute force, invariances, honest reports."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from sharpness_plugins.maximizers import (
    LBFGSB,
    AlongGradient,
    AlongSign,
    Ascent,
    Backtracking,
    BestSoFar,
    Halving,
    Maximum,
    MultiStart,
    Spectral,
    ToVertex,
    apgd,
    maximizer_named,
    park,
    spectral_projected_gradient,
    unpark,
)
from sharpness_plugins.regions import Ball, Box
from sharpness_plugins.report import Kind, Status

F64 = torch.float64
DEVICE_SOLVERS = [Ascent(), MultiStart(), Ascent(warm_up=())]
PROJECTED_SOLVERS = [apgd(), MultiStart(solver=apgd(12))]
PRODUCTS = [
    Ascent(direction, step, max_gradients=40, warm_up=())
    for direction in (ToVertex(), AlongSign(), AlongGradient())
    for step in (Backtracking(), Halving(), Spectral())
]
ALL_SOLVERS = [*DEVICE_SOLVERS, *PROJECTED_SOLVERS, LBFGSB(), MultiStart(solver=LBFGSB())]
GRADIENT_SOLVERS = [spectral_projected_gradient(), MultiStart(solver=spectral_projected_gradient(12))]


def quadratic(h: torch.Tensor, slope: torch.Tensor, offset: float = 0.0):
    """``offset + slope·e + ½ eᵀ h e``; h a vector (diagonal) or a matrix."""

    def fn(e):
        he = h * e if h.ndim == 1 else h @ e
        return offset + (slope @ e + 0.5 * e @ he).item(), slope + he

    return fn


def counted(fn):
    def wrapper(e):
        wrapper.calls += 1
        return fn(e)

    wrapper.calls = 0
    return wrapper


@pytest.mark.parametrize("solver", ALL_SOLVERS, ids=repr)
def test_linear_functions_are_maximized_exactly(solver):
    slope = torch.tensor([3.0, -2.0, 0.0, 1e-9, -1e3], dtype=F64)
    box = Box(torch.tensor([1.0, 0.5, 2.0, 1.0, 0.1], dtype=F64))
    found = solver.maximize(quadratic(torch.zeros(5, dtype=F64), slope, 7.0), box, torch.zeros(5, dtype=F64))
    assert found.value == pytest.approx(7 + (slope.abs() * box.half_width).sum().item(), rel=1e-12)
    assert box.contains(found.perturbation)


@pytest.mark.parametrize("solver", DEVICE_SOLVERS, ids=repr)
def test_convex_diagonal_quadratics_are_maximized_exactly(solver):
    generator = torch.Generator().manual_seed(0)
    h = torch.rand(50, generator=generator, dtype=F64) ** 4 * 100
    slope = torch.randn(50, generator=generator, dtype=F64)
    box = Box(torch.rand(50, generator=generator, dtype=F64))
    found = solver.maximize(quadratic(h, slope), box, torch.zeros(50, dtype=F64))
    assert found.value == pytest.approx(oracles.diagonal_box_gain(h, slope, box.half_width), rel=1e-12)
    assert found.rejections == 0


@pytest.mark.parametrize("seed", range(20))
def test_indefinite_diagonal_quadratics_are_maximized_exactly(seed):
    """Concave coordinates have their maximum inside the box, where no vertex is."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(40, generator=generator, dtype=F64) * torch.logspace(-2, 2, 40, dtype=F64)
    slope = torch.randn(40, generator=generator, dtype=F64)
    box = Box(torch.rand(40, generator=generator, dtype=F64))
    found = MultiStart().maximize(quadratic(h, slope), box, torch.zeros(40, dtype=F64))
    assert found.value == pytest.approx(oracles.diagonal_box_gain(h, slope, box.half_width), rel=1e-10)
    assert box.contains(found.perturbation)
    assert found.gradients <= 24


@pytest.mark.parametrize("seed", range(10))
def test_dense_psd_quadratics_against_all_vertices(seed):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(10, 10, generator=generator, dtype=F64)
    h, slope = root @ root.T, torch.randn(10, generator=generator, dtype=F64)
    half_width = torch.rand(10, generator=generator, dtype=F64)
    fn = quadratic(h, slope)
    vertices = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=10)), dtype=F64) * half_width
    truth = (vertices @ slope + 0.5 * ((vertices @ h) * vertices).sum(1)).max().item()
    starts = [(f"random {i}", half_width * torch.rand(10, generator=generator, dtype=F64).mul(2).sub(1)) for i in range(30)]
    found = MultiStart(max_gradients=100).maximize(fn, Box(half_width), torch.zeros(10, dtype=F64), starts)
    assert found.value <= truth * (1 + 1e-12)
    assert found.value >= 0.95 * truth
    assert len(found.start_values) > 8


def test_a_stationary_start_is_left():
    """At an exact minimum every gradient method that starts at zero stays there."""
    h = torch.tensor(oracles.DIAGONAL, dtype=F64)
    box = Box(torch.ones(6, dtype=F64))
    fn = quadratic(h, torch.zeros(6, dtype=F64))
    corner = torch.tensor([1.0, -1, 1, -1, 1, 1], dtype=F64)
    found = MultiStart().maximize(fn, box, torch.zeros(6, dtype=F64), [("random vertex", corner)])
    assert found.value == pytest.approx(0.5 * h.sum().item(), rel=1e-14)
    stuck = Ascent().maximize(fn, box, torch.zeros(6, dtype=F64))
    assert stuck.value == 0
    assert stuck.gradients == 1


@pytest.mark.parametrize("solver", [MultiStart(), LBFGSB()], ids=repr)
@pytest.mark.parametrize("scale", [1e-4, 1e4, 1e-9])
def test_the_unit_of_the_loss_does_not_matter(solver, scale):
    generator = torch.Generator().manual_seed(3)
    root = torch.randn(30, 30, generator=generator, dtype=F64)
    h, slope = root @ root.T - 20 * torch.eye(30, dtype=F64), torch.randn(30, generator=generator, dtype=F64)
    box = Box(torch.rand(30, generator=generator, dtype=F64))
    one = solver.maximize(quadratic(h, slope), box, torch.zeros(30, dtype=F64))
    other = solver.maximize(quadratic(scale * h, scale * slope), box, torch.zeros(30, dtype=F64))
    assert other.value == pytest.approx(scale * one.value, rel=1e-9)
    assert other.gradients == one.gradients


def test_frozen_vertices_are_passed_by_the_warm_up():
    """Where the trace is large against λmax √n, sign steps from zero stop at the first vertex they see."""
    n = 200_000
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(n, generator=generator)
    v /= v.norm()
    ridge = 10 * n**0.5 / n  # trace(H) = 10 λmax √n with λmax = 1
    noise = 1e-6 * torch.randn(n, generator=generator)

    def fn(e):
        along = v @ e
        return (noise @ e + 0.5 * along**2 + 0.5 * ridge * (e @ e)).item(), noise + along * v + ridge * e

    box = Box(torch.full((n,), 1e-3))
    best = fn(box.ascent_vertex(v))[0]
    frozen = Ascent(max_gradients=10, warm_up=()).maximize(fn, box, torch.zeros(n))
    warmed = Ascent(max_gradients=10).maximize(fn, box, torch.zeros(n))
    base = 0.5 * ridge * (box.half_width @ box.half_width).item()  # what every vertex has
    assert (warmed.value - base) >= 0.95 * (best - base)
    assert (frozen.value - base) <= 0.2 * (best - base)


@pytest.mark.parametrize("solver", [*ALL_SOLVERS, *GRADIENT_SOLVERS, LBFGSB(published=True)], ids=repr)
def test_the_best_point_seen_is_returned_with_its_own_value(solver):
    generator = torch.Generator().manual_seed(5)
    root = torch.randn(12, 12, generator=generator, dtype=F64)
    h, slope = root + root.T, torch.randn(12, generator=generator, dtype=F64)
    seen = []

    def fn(e):
        value, gradient = quadratic(h, slope)(e)
        seen.append(value)
        return value, gradient

    box = Box(torch.rand(12, generator=generator, dtype=F64))
    found = solver.maximize(fn, box, torch.zeros(12, dtype=F64))
    assert found.value == max(seen)
    assert quadratic(h, slope)(found.perturbation)[0] == found.value
    assert found.gradients == len(seen)
    assert max(found.start_values) == found.value
    assert sum(found.start_gradients) == found.gradients
    assert len(found.start_gradients) == len(found.start_values) == len(found.start_names)
    gradient = quadratic(h, slope)(found.perturbation)[1]
    gap = gradient @ (box.ascent_vertex(gradient) - found.perturbation)
    assert found.gap == pytest.approx(gap.item(), abs=1e-9)
    assert found.status.kind in (Kind.LOWER_BOUND, Kind.NOT_CONVERGED)
    assert box.contains(found.perturbation)


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 8, 13, 24])
def test_budgets_hold(budget):
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(20, 20, generator=generator, dtype=F64)
    fn = counted(quadratic(root + root.T, torch.randn(20, generator=generator, dtype=F64)))
    found = MultiStart(max_gradients=budget).maximize(fn, Box(torch.ones(20, dtype=F64)), torch.zeros(20, dtype=F64))
    assert fn.calls == found.gradients <= budget


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_more_budget_never_finds_less(seed):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(8, 8, generator=generator, dtype=F64)
    fn = quadratic(root + root.T, torch.randn(8, generator=generator, dtype=F64))
    box = Box(torch.rand(8, generator=generator, dtype=F64))
    values = [Ascent(max_gradients=n, tolerance=0).maximize(fn, box, torch.zeros(8, dtype=F64)).value for n in (2, 4, 8, 16)]
    assert values == sorted(values)


def test_values_that_are_not_finite_are_no_ascent():
    def fn(e):
        value = float("nan") if (e > 0.5).any() else e.sum().item()
        return value, torch.ones_like(e)

    found = MultiStart().maximize(fn, Box(torch.ones(3, dtype=F64)), torch.zeros(3, dtype=F64))
    assert found.value == pytest.approx(1.2, abs=0.31)  # 0.1 to 0.5 a coordinate, and no NaN
    assert (found.perturbation <= 0.5).all()
    assert found.non_finite > 0


def test_a_box_of_width_zero_stays_put():
    box = Box(torch.tensor([0.0, 1.0], dtype=F64))
    for solver in ALL_SOLVERS:
        found = solver.maximize(
            quadratic(torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64)), box, torch.zeros(2, dtype=F64)
        )
        assert found.perturbation.tolist() == [0.0, 1.0]


def well_trained():
    h = torch.linspace(0.001, 0.1, 100, dtype=F64)
    return quadratic(h, torch.full((100,), 1e-6, dtype=F64)), Box(torch.full((100,), 1e-2, dtype=F64)), h


def test_the_published_solver_stops_at_once_and_says_so():
    fn, box, _ = well_trained()
    found = LBFGSB(published=True).maximize(fn, box, torch.zeros(100, dtype=F64))
    assert found.value == 0
    assert found.status.kind is Kind.NOT_CONVERGED
    assert "0 of 10 iterations" in found.status.message
    assert "not a maximum" in found.status.message


def test_the_scaled_form_runs_where_the_published_one_stops():
    fn, box, h = well_trained()
    truth = oracles.diagonal_box_gain(h, torch.full((100,), 1e-6, dtype=F64), box.half_width)
    found = LBFGSB().maximize(fn, box, torch.zeros(100, dtype=F64))
    assert 0.9 * truth <= found.value <= truth * (1 + 1e-12)
    assert MultiStart().maximize(fn, box, torch.zeros(100, dtype=F64)).value == pytest.approx(truth, rel=1e-12)


def test_lbfgsb_is_scipys_own_call_in_the_published_form():
    import numpy as np
    import scipy.optimize

    generator = torch.Generator().manual_seed(9)
    root = torch.randn(15, 15, generator=generator, dtype=F64)
    h, slope = root @ root.T, torch.randn(15, generator=generator, dtype=F64)
    half_width = torch.rand(15, generator=generator, dtype=F64)
    fn = quadratic(h, slope, 2.0)

    def negated(x):
        value, gradient = fn(torch.from_numpy(x))
        return -value, -gradient.numpy()

    b = half_width.numpy()
    bounds = list(zip(-b, b, strict=True))
    _, value, info = scipy.optimize.fmin_l_bfgs_b(negated, np.zeros(15), bounds=bounds, maxiter=10)
    found = LBFGSB(published=True).maximize(fn, Box(half_width), torch.zeros(15, dtype=F64))
    assert found.value == -value
    assert found.gradients == info["funcalls"]


def test_lbfgsb_refuses_what_would_overflow():
    class Huge(torch.Tensor):
        def numel(self):
            return 86_000_000

    start = torch.zeros(3, dtype=F64).as_subclass(Huge)
    with pytest.raises(ValueError, match=r"overflows its 32-bit workspace above 85,8\d\d,\d\d\d variables.*86,000,000"):
        LBFGSB().maximize(quadratic(torch.zeros(3), torch.ones(3)), Box(torch.ones(3, dtype=F64)), start)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Ascent(max_gradients=0), "max_gradients must be at least 1, got 0"),
        (lambda: Ascent(warm_up=(0.1, 2.0)), "fractions of the region"),
        (lambda: Ascent(tolerance=-1.0), "tolerance"),
        (lambda: MultiStart(max_gradients=0), "max_gradients"),
        (lambda: MultiStart(num_proposals=-1), "num_proposals"),
        (lambda: MultiStart(num_starts=0), "num_starts must be at least 1, or None, got 0"),
        (lambda: Halving(length=0.0), "length must be a positive number, got 0.0"),
        (lambda: Halving(momentum=0.0), r"momentum must be in \(0, 1\], got 0.0"),
        (lambda: Spectral(memory=0), "memory must be at least 1, got 0"),
        (lambda: LBFGSB(max_iterations=0), "max_iterations"),
        (
            lambda: maximizer_named("newton"),
            "sign_frank_wolfe, apgd, spectral_projected_gradient, lbfgsb, lbfgsb_published.*got 'newton'",
        ),
        (lambda: Box(torch.tensor([-1.0])), "half_width"),
    ],
)
def test_bad_settings_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_what_is_no_region_is_refused():
    class Everything:
        pass

    for solver in (Ascent(), MultiStart()):
        with pytest.raises(TypeError, match="Everything lacks project, ascent_vertex, contains"):
            solver.maximize(quadratic(torch.zeros(1), torch.ones(1)), Everything(), torch.zeros(1))
    with pytest.raises(TypeError, match="Box, got a Ball"):
        LBFGSB().maximize(quadratic(torch.zeros(1), torch.ones(1)), Ball(1.0), torch.zeros(1))


@pytest.mark.parametrize("solver", PRODUCTS, ids=repr)
def test_every_direction_goes_with_every_step_rule(solver):
    """A concave quadratic has one maximum in the box, at which every solver's answer must be stationary."""
    generator = torch.Generator().manual_seed(4)
    h = -torch.rand(30, generator=generator, dtype=F64) - 0.2
    slope = torch.randn(30, generator=generator, dtype=F64)
    box = Box(torch.rand(30, generator=generator, dtype=F64) + 0.1)
    truth = oracles.diagonal_box_gain(h, slope, box.half_width)
    fn = counted(quadratic(h, slope))
    found = solver.maximize(fn, box, torch.zeros(30, dtype=F64))
    assert found.value <= truth * (1 + 1e-12)
    assert found.value >= 0.97 * truth
    assert fn.calls == found.gradients <= 40
    assert found.status.message.startswith("one start; stopped after")


def ball_maximum(h: torch.Tensor, slope: torch.Tensor, rho: float) -> float:
    """``max slope·e + ½ eᵀ diag(h) e`` over ``‖e‖ <= rho``, from the secular equation by bisection."""
    low, high = h.max().item() * (1 + 1e-15), h.max().item() + slope.norm().item() / rho + 1.0
    low = max(low, 0.0)
    if (h < 0).all() and (slope / h).norm() <= rho:
        return (-0.5 * slope**2 / h).sum().item()
    for _ in range(200):
        mid = (low + high) / 2
        low, high = (mid, high) if (slope / (mid - h)).norm() > rho else (low, mid)
    e = slope / (high - h)
    return (slope @ e + 0.5 * e @ (h * e)).item()


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(
    "solver", [Ascent(max_gradients=60, tolerance=0), apgd(100), spectral_projected_gradient(60)], ids=repr
)
def test_balls_against_the_secular_equation(solver, adaptive):
    generator = torch.Generator().manual_seed(2)
    h = torch.tensor([10.0, 1.0, 0.1, -3.0, 0.0], dtype=F64)
    slope = torch.randn(5, generator=generator, dtype=F64)
    weight = torch.rand(5, generator=generator, dtype=F64) + 0.5 if adaptive else None
    ball = Ball(0.3, weight)
    scale = torch.ones(5, dtype=F64) if weight is None else weight
    truth = ball_maximum(h * scale**2, slope * scale, 0.3)  # in u = e / weight
    found = solver.maximize(quadratic(h, slope), ball, torch.zeros(5, dtype=F64))
    assert found.value <= truth * (1 + 1e-12)
    assert found.value >= truth * (1 - 1e-3)
    assert ball.contains(found.perturbation)


def test_the_maximum_over_a_ball_at_a_minimum_is_the_largest_eigenvalue():
    """½ρ²λmax: full steps to the vertex are the power method there, which needs a start other than zero."""
    h = torch.tensor(oracles.DIAGONAL, dtype=F64)
    start = torch.full((6,), 0.1, dtype=F64)
    found = MultiStart(max_gradients=60).maximize(
        quadratic(h, torch.zeros(6, dtype=F64)), Ball(0.5), torch.zeros(6, dtype=F64), [("even", start)]
    )
    assert found.value == pytest.approx(0.5 * 0.25 * 100, rel=1e-9)


def test_apgd_halves_its_steps_where_they_overshoot():
    """Sign steps of two half widths jump over a maximum inside the box for ever; halved at checkpoints they find it."""
    h, slope = torch.full((20,), -1.0, dtype=F64), torch.full((20,), 0.3, dtype=F64)
    box = Box(torch.ones(20, dtype=F64))
    fixed = Ascent(AlongSign(), Halving(length=2.0, momentum=1.0), max_gradients=3, warm_up=())
    truth = oracles.diagonal_box_gain(h, slope, box.half_width)
    assert fixed.maximize(quadratic(h, slope), box, torch.zeros(20, dtype=F64)).value < 0.5 * truth
    assert apgd(60).maximize(quadratic(h, slope), box, torch.zeros(20, dtype=F64)).value >= 0.99 * truth


def test_the_race_gives_more_to_whoever_is_ahead():
    """Two basins: the start in the better one gets the rest of the budget, the other its first gradients only."""
    generator = torch.Generator().manual_seed(0)
    slope = torch.randn(50, generator=generator, dtype=F64)
    low, high = torch.full((50,), -1.0, dtype=F64), torch.full((50,), 1.0, dtype=F64)

    def fn(e):  # convex in the direction of all ones, so both corners attract; the upper one is higher
        mean = e.mean()
        value = (mean**2 + 0.1 * mean).item() + 1e-3 * (slope @ e).item()
        return value, (2 * mean + 0.1) / 50 * torch.ones_like(e) + 1e-3 * slope

    box = Box(torch.ones(50, dtype=F64))
    found = MultiStart(max_gradients=15, num_starts=2).maximize(
        fn, box, torch.zeros(50, dtype=F64), [("low", 0.5 * low), ("high", 0.5 * high)]
    )
    given = dict(zip(found.start_names, found.start_gradients, strict=True))
    assert given["low"] <= 3
    assert given["high"] >= given["low"]
    assert found.start_values[1] == found.value > found.start_values[0]
    assert list(found.start_names) == ["low", "high", "zero", "antipode"][: len(found.start_names)]


def test_scipy_restarts_at_the_antipode():
    fn, box, _ = well_trained()
    found = MultiStart(solver=LBFGSB(), max_gradients=40).maximize(fn, box, torch.zeros(100, dtype=F64))
    assert found.start_names == ("zero", "antipode")
    assert found.value == max(found.start_values)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 70_000), st.integers(0, 1000))
def test_parked_vertices_come_back_bit_for_bit(dim, seed):
    generator = torch.Generator().manual_seed(seed)
    box = Box.keskar(torch.randn(dim, generator=generator), 1e-3)
    vertex = box.ascent_vertex(torch.randn(dim, generator=generator) * (torch.rand(dim, generator=generator) > 0.1))
    parked = park(vertex, box)
    assert not isinstance(parked, torch.Tensor)
    assert parked.positive.nbytes + parked.negative.nbytes <= dim / 4 + 2
    assert torch.equal(unpark(parked, box), vertex)


def test_points_that_are_no_vertices_are_parked_as_they_are():
    box = Box(torch.ones(3))
    point = torch.tensor([1.0, 0.5, -1.0])
    assert park(point, box) is point
    assert unpark(point, box) is point
    assert park(point, Ball(1.0)) is point


class LastIterate:
    """A third party's solver that returns where it ends, which is not the best it saw."""

    num_proposals = 0
    max_gradients = 7

    def maximize(self, fn, region, start, proposals=()):
        e = region.project(start + 0.5)
        for _ in range(7):
            _, gradient = fn(e)
            e.copy_(region.project(-e + 0.1 * gradient.sign()))  # in place, and downhill half of the time
        return Maximum(e, fn(e)[0], 7, Status(Kind.LOWER_BOUND, "seven steps"), gradients=1)


def test_a_solver_that_descends_returns_its_best_when_wrapped():
    seen = []
    base = quadratic(torch.ones(4, dtype=F64), torch.tensor([1.0, -1, 0.5, 2], dtype=F64))

    def fn(e):
        seen.append(base(e)[0])
        return base(e)

    box = Box(torch.ones(4, dtype=F64))
    bare = LastIterate().maximize(fn, box, torch.zeros(4, dtype=F64))
    assert bare.value < max(seen)
    seen.clear()
    found = BestSoFar(LastIterate()).maximize(fn, box, torch.zeros(4, dtype=F64))
    assert found.value == max(seen) == base(found.perturbation)[0]
    assert found.gradients == len(seen) == 8
    assert found.gap >= 0
    assert BestSoFar(LastIterate()).max_gradients == 7


def test_a_gradient_that_is_not_finite_ends_the_run_at_a_finite_value():
    def fn(e):
        seen.append(e.sum().item())
        gradient = torch.ones_like(e) if not e.any() else torch.full_like(e, float("nan"))
        return e.sum().item(), gradient

    for solver in (Ascent(warm_up=()), apgd(6), spectral_projected_gradient(6)):
        seen = []
        found = solver.maximize(fn, Box(torch.ones(3, dtype=F64)), torch.zeros(3, dtype=F64))
        assert found.value == max(seen) > 0
        assert len(seen) == 2
        assert "the gradient is not finite there" in found.status.message


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", [MultiStart(), apgd(), spectral_projected_gradient()], ids=repr)
def test_the_start_and_the_box_are_left_alone(solver, dtype):
    generator = torch.Generator().manual_seed(8)
    root = torch.randn(20, 20, generator=generator, dtype=dtype)
    fn = quadratic(root @ root.T, torch.randn(20, generator=generator, dtype=dtype))
    anchor, start = (torch.rand(20, generator=generator, dtype=dtype) for _ in range(2))
    proposal = -start.clone()
    before = [x.clone() for x in (anchor, start, proposal)]
    found = solver.maximize(fn, Box(anchor), start, [("given", proposal)])
    assert all(torch.equal(x, y) for x, y in zip((anchor, start, proposal), before, strict=True))
    assert found.perturbation.dtype == dtype


def test_three_vectors_are_all_that_a_run_holds():
    """A point, its gradient and the next point: 12 bytes per parameter in float32, 16 with the best of several starts."""
    from benchmarks.measuring import peak_bytes

    n = 2**20
    h, slope = torch.rand(n), torch.randn(n)
    box = Box.keskar(torch.randn(n), 1e-3)
    handed = []

    def fn(e):
        gradient = torch.addcmul(slope, h, e)
        handed.append(gradient.nbytes)
        return float(gradient[0]) + len(handed), gradient  # rises for ever

    start, vertex = torch.zeros(n), box.ascent_vertex(h)
    fn(start)
    own = peak_bytes(lambda: fn(start))
    one = peak_bytes(lambda: Ascent(max_gradients=8, tolerance=0).maximize(fn, box, start)) - own
    several = peak_bytes(lambda: MultiStart().maximize(fn, box, start, [("vertex", vertex)] * 3)) - own
    assert one <= 12.5 * n
    assert several <= 16 * n


def test_maximum_is_a_tuple_with_the_promised_first_fields():
    assert Maximum._fields[:4] == ("perturbation", "value", "steps", "status")
