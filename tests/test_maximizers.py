"""Inner maximisation: closed forms, brute force, invariances, honest reports."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from sharpness_plugins.maximizers import LBFGSB, Maximum, MultiStart, SignFrankWolfe, maximizer_named
from sharpness_plugins.regions import Box
from sharpness_plugins.report import Kind

F64 = torch.float64
DEVICE_SOLVERS = [SignFrankWolfe(), MultiStart(), SignFrankWolfe(warm_up=())]
ALL_SOLVERS = [*DEVICE_SOLVERS, LBFGSB()]


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
    stuck = SignFrankWolfe().maximize(fn, box, torch.zeros(6, dtype=F64))
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
    frozen = SignFrankWolfe(max_gradients=10, warm_up=()).maximize(fn, box, torch.zeros(n))
    warmed = SignFrankWolfe(max_gradients=10).maximize(fn, box, torch.zeros(n))
    base = 0.5 * ridge * (box.half_width @ box.half_width).item()  # what every vertex has
    assert (warmed.value - base) >= 0.95 * (best - base)
    assert (frozen.value - base) <= 0.2 * (best - base)


@pytest.mark.parametrize("solver", [*ALL_SOLVERS, LBFGSB(published=True)], ids=repr)
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
    gap = found.gradient @ (box.ascent_vertex(found.gradient) - found.perturbation)
    assert found.gap == pytest.approx(gap.item(), abs=1e-9)
    assert found.status.kind in (Kind.LOWER_BOUND, Kind.NOT_CONVERGED)


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
    values = [
        SignFrankWolfe(max_gradients=n, tolerance=0).maximize(fn, box, torch.zeros(8, dtype=F64)).value
        for n in (2, 4, 8, 16)
    ]
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
        (lambda: SignFrankWolfe(max_gradients=0), "max_gradients must be at least 1, got 0"),
        (lambda: SignFrankWolfe(warm_up=(0.1, 2.0)), "fractions of the box"),
        (lambda: SignFrankWolfe(tolerance=-1.0), "tolerance"),
        (lambda: MultiStart(max_gradients=0), "max_gradients"),
        (lambda: MultiStart(num_proposals=-1), "num_proposals"),
        (lambda: LBFGSB(max_iterations=0), "max_iterations"),
        (lambda: maximizer_named("newton"), "sign_frank_wolfe, lbfgsb, lbfgsb_published.*got 'newton'"),
        (lambda: Box(torch.tensor([-1.0])), "half_width"),
    ],
)
def test_bad_settings_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_only_boxes():
    class Everything:
        pass

    for solver in (SignFrankWolfe(), MultiStart(), LBFGSB()):
        with pytest.raises(TypeError, match="Box, got a Everything"):
            solver.maximize(quadratic(torch.zeros(1), torch.ones(1)), Everything(), torch.zeros(1))


def test_maximum_is_a_tuple_with_the_promised_first_fields():
    assert Maximum._fields[:4] == ("perturbation", "value", "steps", "status")
