"""Curvature metrics against dense Hessians; one Krylov run for many of them, at the cost of one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import oracles
from sharpness_plugins import PluginWarning, available_metrics, measure_sharpness, sampling
from sharpness_plugins.krylov_pass import KrylovNeed, measure_operator
from sharpness_plugins.metrics import (
    AdaptiveTopK,
    FisherTrace,
    GaussNewtonTopK,
    HessianBottom,
    HessianFrobenius,
    HessianTopK,
    HessianTrace,
    PreconditionedTopK,
    SpectralDensity,
)
from sharpness_plugins.objective import Objective
from sharpness_plugins.operators import Curvature, Operator, from_linear_operator
from sharpness_plugins.plots import density_plot
from sharpness_plugins.report import Kind, MetricResult

F64 = torch.float64
FAMILY = (HessianTrace(), HessianFrobenius(), SpectralDensity(), HessianBottom())


def rng(seed: int = 0) -> torch.Generator:
    return sampling.generator_for(seed, "test")


@pytest.fixture
def problem() -> oracles.Classification:
    return oracles.small_classifier(num_samples=40)


def wide_classifier() -> oracles.Classification:
    """More than a hundred parameters, so that nothing is exhausted."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 4)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=F64))
    inputs = torch.randn(60, 10, generator=generator, dtype=F64)
    return oracles.Classification(model.eval(), inputs, torch.randint(0, 4, (60,), generator=generator))


@pytest.fixture(scope="module")
def wide() -> tuple[oracles.Classification, torch.Tensor]:
    problem = wide_classifier()
    return problem, problem.dense_hessian()


def matrix_operator(matrix: torch.Tensor) -> Operator:
    return Operator(lambda v: matrix @ v, torch.zeros(len(matrix), dtype=matrix.dtype), {}, "the matrix")


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("sizes", [(40,), (13, 27)])
def test_whole_spaces_are_exact(problem, sizes):
    hessian = problem.dense_hessian()
    spectrum = torch.linalg.eigvalsh(hessian)
    objective = Objective(problem.model, problem.loader(*sizes))
    full = 2 * objective.dim
    expected = {
        HessianTrace(full): hessian.trace().item(),
        HessianTrace(full, select="2.*"): hessian.diagonal()[30:].sum().item(),
        HessianFrobenius(full): hessian.norm().item(),
        HessianFrobenius(full, select=("0.bias", "2.weight")): hessian[24:48, 24:48].norm().item(),
        HessianBottom(num_matvecs=objective.dim): spectrum[0].item(),
        SpectralDensity(num_nodes=objective.dim): spectrum.square().mean().sqrt().item(),
    }
    for metric, value in expected.items():
        result = metric(objective, rng())
        assert result.value == pytest.approx(value, rel=1e-9), metric
        assert result.status.kind is Kind.EXACT, result.status
        assert not result.standard_error


def test_estimates_lie_within_their_errors(wide):
    problem, hessian = wide
    objective = Objective(problem.model, problem.loader())
    spectrum = torch.linalg.eigvalsh(hessian)
    truth = {
        HessianTrace(): hessian.trace(),
        HessianTrace(method="hutchinson"): hessian.trace(),
        HessianTrace(method="hutch++"): hessian.trace(),
        HessianTrace(method="xtrace"): hessian.trace(),
        HessianFrobenius(): hessian.norm(),
        SpectralDensity(): spectrum.square().mean().sqrt(),
    }
    for metric, exact in truth.items():
        before = objective.cost
        result = metric(objective, rng())
        assert result.standard_error > 0
        assert abs(result.value - exact.item()) < 4 * result.standard_error, metric
        assert (objective.cost - before).hvps == result.details["num_matvecs"] == metric.expected_passes(objective), metric
        assert result.status.kind is Kind.ESTIMATE
    blocks = {"0.weight": 200, "0.bias": 20, "2.weight": 80, "2.bias": 4}
    layers = HessianTrace()(objective, rng()).details["layers"]
    for name, part in zip(blocks, torch.split(hessian.diagonal(), list(blocks.values())), strict=True):
        assert abs(layers[name]["trace"] - part.sum().item()) < 4 * layers[name]["standard_error"], name


def test_any_batching_gives_the_same_numbers(wide):
    problem, _ = wide
    found = []
    for sizes in ((60,), (1, 59), (17, 17, 26)):
        report = measure_sharpness(problem.model, problem.loader(*sizes), [*FAMILY, "gauss_newton_trace", "adaptive_topk"])
        found.append([result.value for result in report.values()])
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert found[2] == pytest.approx(found[0], rel=1e-6)


def test_adaptive_curvature_of_dinhs_example():
    """½ (w₁ w₂ − 1)² at (α, 1/α): λmax is α² + α⁻², but that of D H D is 2 for every α."""
    for alpha in (1.0, 3.0, 30.0):
        objective = oracles.objective_of(lambda w: 0.5 * (w[0] * w[1] - 1) ** 2, torch.tensor([alpha, 1 / alpha], dtype=F64))
        assert AdaptiveTopK(k=1)(objective, rng()).value == pytest.approx(2.0)
        assert HessianTrace(adaptive=True)(objective, rng()).value == pytest.approx(2.0)
        assert HessianTrace()(objective, rng()).value == pytest.approx(alpha**2 + alpha**-2)


def test_eigenvalues_of_scaled_blocks(wide):
    problem, hessian = wide
    objective = Objective(problem.model, problem.loader())
    w = objective.origin.abs()[220:]
    exact = torch.linalg.eigvalsh(w[:, None] * hessian[220:, 220:] * w).flip(0)
    result = AdaptiveTopK(k=3, tolerance=1e-8, select="2.*")(objective, rng())
    assert result.details["eigenvalues"] == pytest.approx(exact[:3].tolist(), rel=1e-9)
    assert "the block 2.* of the Hessian, scaled by |w|" in result.status.message
    with pytest.raises(ValueError, match="matches none of the measured parameters"):
        HessianTrace(select="head.*")(objective, rng())


@pytest.mark.parametrize("metric", [HessianTopK, AdaptiveTopK])
def test_products_by_differences_say_their_error_which_the_error_bars_hold(metric):
    """In float32, where the step and the rounding of gradients move a product by parts in a thousand."""
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 5)), (torch.randn(64, 20), torch.arange(64) % 5)
    exact, found = (
        metric(k=3, tolerance=1e-6, hvp=hvp)(Objective(model, [batch]), rng()) for hvp in (None, "central differences")
    )
    error = float(found.status.message.split("error estimate ")[1].split(" of a product")[0])
    assert "error estimate" not in exact.status.message
    assert 0 < error < 0.05
    off = torch.tensor(found.details["eigenvalues"]) - torch.tensor(exact.details["eigenvalues"])
    bars = torch.tensor(found.details["error_bars"])
    assert (off.abs() <= bars + torch.tensor(exact.details["error_bars"])).all()
    assert (bars >= 0.6 * error * found.value).all()  # said with one digit


def test_the_smallest_eigenvalue_lies_between_its_bounds(wide):
    problem, hessian = wide
    smallest = torch.linalg.eigvalsh(hessian)[:2]
    objective = Objective(problem.model, problem.loader())
    for seed in range(20):
        bounds = HessianBottom()(objective, rng(seed)).details
        assert bounds["lower_bound"] <= smallest[0].item() <= bounds["upper_bound"] + 1e-12
        assert bounds["upper_bound"] - bounds["lower_bound"] < 1.0  # of a spectrum that is 1.4 wide
    certified = HessianBottom(certify=True, k=2, tolerance=1e-8)(objective, rng())
    assert certified.details["eigenvalues"] == pytest.approx(smallest.tolist(), rel=1e-9)
    assert certified.status.kind is Kind.CONVERGED


def test_the_bound_from_below_holds_as_often_as_it_says():
    """Kuczyński and Woźniakowski's, on spectra whose ends are hard to see: from 20 directions each, few steps to many."""
    n = 300
    chebyshev = -torch.cos(torch.linspace(0, math.pi, n, dtype=F64))  # dense at its ends
    alone = torch.cat([torch.tensor([-1.0], dtype=F64), torch.linspace(-0.9, 1, n - 1, dtype=F64)])
    shifted = torch.cat([torch.tensor([1e3 - 1], dtype=F64), 1e3 + torch.linspace(0, 1, n - 1, dtype=F64)])
    missed = finite = 0
    for spectrum in (chebyshev, alone, shifted):
        for seed in range(20):
            operator = Operator(lambda v, s=spectrum: s * v, torch.zeros(n, dtype=F64), {}, "the matrix")
            for steps in (12, 20, 30):
                (found,) = measure_operator(operator, [HessianBottom(num_matvecs=steps)], seed=seed).values()
                missed += found.details["lower_bound"] > spectrum.min().item() + 1e-9
                finite += math.isfinite(found.details["lower_bound"])
                assert found.value >= spectrum.min().item() - 1e-9
    assert missed <= 0.05 * 180
    assert finite >= 120


def test_the_density_is_that_of_the_spectrum_within_its_error():
    """Smoothed widely enough for twenty nodes, at every point of the grid, for a bulk and outliers; over many seeds."""
    dim = 1000
    bulk = torch.randn(dim - 5, dtype=F64, generator=torch.Generator().manual_seed(0))
    spectrum = torch.cat([bulk, torch.tensor([50.0, 40, 30, 20, -25], dtype=F64)])
    matrix = torch.diag(spectrum)  # Lanczos from a normal vector does not see the eigenbasis
    hits = []
    for seed in range(30):
        (result,) = measure_operator(matrix_operator(matrix), [SpectralDensity(num_nodes=24, width=1.0)], seed=seed).values()
        details = result.details
        grid, density, error = (torch.tensor(details[key], dtype=F64) for key in ("grid", "density", "density_error"))
        bells = torch.exp(-0.5 * (grid - spectrum[:, None]).square()) / math.sqrt(2 * math.pi)
        inside = (grid > -3) & (grid < 3)
        hits.append(((density - bells.mean(0)).abs() <= 2 * error)[inside].double().mean())
        assert (density - bells.mean(0)).abs().max() < 0.06 * bells.mean(0).max()
        assert sum(details["weights"]) == pytest.approx(1)
        assert sorted(details["settled_eigenvalues"])[-4:] == pytest.approx([20, 30, 40, 50], rel=1e-3)
        assert abs(result.value - spectrum.square().mean().sqrt().item()) < 4 * result.standard_error
    assert torch.stack(hits).mean() > 0.85


def test_the_density_is_drawn_with_its_error_and_every_settled_eigenvalue(wide):
    problem, _ = wide
    result = measure_sharpness(problem.model, problem.loader(), SpectralDensity(num_nodes=30))["spectral_density"]
    details = result.details
    (axes,) = density_plot(result, title="a network").axes
    curve, marks = axes.get_lines()
    assert list(curve.get_xdata()) == details["grid"]
    drawn, density, error = (
        torch.tensor(list(x), dtype=F64) for x in (curve.get_ydata(), details["density"], details["density_error"])
    )
    floor = axes.get_ylim()[0]
    assert torch.equal(drawn, density.clamp(min=floor))
    assert list(marks.get_xdata()) == details["settled_eigenvalues"] != []
    (band,) = axes.collections
    corners = torch.tensor(band.get_paths()[0].vertices, dtype=F64)
    for point, low, high in zip(details["grid"], density - 2 * error, density + 2 * error, strict=True):
        at = corners[(corners[:, 0] - point).abs() < 1e-12][:, 1]
        assert at.min().item() == pytest.approx(max(low.item(), floor))
        assert at.max().item() == pytest.approx(max(high.item(), floor))
    assert axes.get_yscale() == "log"
    with pytest.raises(ValueError, match="only a result of spectral_density"):
        density_plot(HessianTrace()(Objective(problem.model, problem.loader()), rng()))


# ---------------------------------------------------------------- one run for many


@pytest.mark.parametrize("k", [1, 5])
def test_a_shared_run_is_long_enough_for_all(wide, k):
    """The largest eigenvalue alone needs fewer products than the density has nodes."""
    problem, hessian = wide
    alone = [measure_sharpness(problem.model, problem.loader(), m) for m in (HessianTopK(k=k), *FAMILY)]
    report = measure_sharpness(problem.model, problem.loader(), [HessianTopK(k=k), *FAMILY])
    assert report["hessian_topk"].details["num_matvecs"] >= 20
    assert len(report["spectral_density"].details["nodes"]) >= 20
    assert report["hessian_bottom"].details["num_steps"] >= 20
    together = sum(result.cost.hvps for result in report.values())
    assert together <= 1.1 * max(r.cost.hvps for r in alone)
    assert report["hessian_topk"].value == pytest.approx(torch.linalg.eigvalsh(hessian)[-1].item(), rel=1e-3)


def test_together_they_cost_what_the_dearest_costs(wide):
    problem, hessian = wide
    loader = problem.loader(20, 40)
    alone = {m.name: measure_sharpness(problem.model, loader, m)[m.name].cost.hvps for m in FAMILY}
    report = measure_sharpness(problem.model, loader, FAMILY)
    together = sum(result.cost.hvps for result in report.values())
    assert together <= 1.1 * max(alone.values())
    assert sum(alone.values()) == 30 + 30 + 20 + 20
    assert report.cost.hvps == together
    for name, exact in (("hessian_trace", hessian.trace()), ("hessian_frobenius", hessian.norm())):
        assert abs(report[name].value - exact.item()) < 4 * report[name].standard_error
    assert len(report["hessian_trace"].details["layers"]) == 4  # at no further product


def test_it_is_said_who_paid(wide):
    problem, _ = wide
    report = measure_sharpness(problem.model, problem.loader(), [SpectralDensity(), HessianTrace(), "fisher_trace"])
    density, trace = report["spectral_density"], report["hessian_trace"]
    assert "paid for the 20 products of one Krylov run, which hessian_trace read, too" in density.status.message
    assert "read the 20 products of one Krylov run that spectral_density paid for" in trace.status.message
    assert (density.cost.hvps, trace.cost.hvps) == (20, 10)  # the probes of the trace are its own
    assert density.details["run_shared_with"] == ["hessian_trace"]
    assert trace.details["run_paid_by"] == "spectral_density"
    assert "run_paid_by" not in report["fisher_trace"].details


def test_the_order_does_not_matter(wide):
    problem, _ = wide
    there = measure_sharpness(problem.model, problem.loader(), FAMILY)
    back = measure_sharpness(problem.model, problem.loader(), FAMILY[::-1])
    assert {key: result.value for key, result in there.items()} == {key: result.value for key, result in back.items()}


def test_a_metric_alone_is_called_as_it_is(wide):
    problem, _ = wide
    objective = Objective(problem.model, problem.loader())
    direct = HessianTrace()(objective, sampling.generator_for(7, "hessian_trace"))
    measured = measure_sharpness(problem.model, problem.loader(), "hessian_trace", seed=7)["hessian_trace"]
    assert measured.value == direct.value
    assert measured.status == direct.status


def test_what_differs_is_not_shared(wide):
    problem, _ = wide
    metrics = [HessianTrace(), HessianTrace(adaptive=True), HessianTrace(select="2.*"), HessianTrace(method="hutchinson")]
    report = measure_sharpness(problem.model, problem.loader(), metrics)
    assert [result.cost.hvps for result in report.values()] == [30] * 4
    assert not any("run_paid_by" in result.details for result in report.values())


@dataclass(frozen=True)
class Thirds:
    """A metric of somebody else's that reads the run, too."""

    name: ClassVar[str] = "acme_thirds"

    def krylov_need(self) -> KrylovNeed:
        return KrylovNeed(Curvature(), num_steps=12)

    def from_krylov(self, shared) -> MetricResult:
        return MetricResult(float(shared.run.ritz_values[0] / 3))

    def __call__(self, objective, rng) -> MetricResult:
        raise AssertionError("it has a peer")


@dataclass(frozen=True)
class Broken(Thirds):
    """Asking it what it needs fails, and so does calling it."""

    name: ClassVar[str] = "acme_broken"

    def krylov_need(self) -> KrylovNeed:
        raise KeyError("needs")

    def __call__(self, objective, rng) -> MetricResult:
        raise RuntimeError("called on its own")


def test_others_may_join_the_run_and_cannot_break_it(wide):
    problem, _ = wide
    with pytest.warns(PluginWarning, match="called on its own"):
        report = measure_sharpness(problem.model, problem.loader(), [Thirds(), Broken(), HessianTrace()])
    assert report["acme_thirds"].cost.hvps == 15
    assert report["hessian_trace"].cost.hvps == 15
    assert report["acme_thirds"].status.message.startswith("paid for the 15 products")


def test_a_run_that_fails_is_reported_by_each_and_the_others_go_on(wide, monkeypatch):
    problem, _ = wide
    monkeypatch.setattr(Objective, "hvp", lambda self, vector, perturbation=None: vector * math.nan)
    with pytest.warns(PluginWarning) as warned:
        report = measure_sharpness(problem.model, problem.loader(), [HessianTrace(), HessianBottom(), FisherTrace()])
    assert len(warned) == 2
    assert report["hessian_trace"].status.kind is report["hessian_bottom"].status.kind is Kind.FAILED
    assert "not finite" in report["hessian_trace"].status.message
    assert "the Krylov run shared with hessian_trace failed: ArithmeticError" in report["hessian_bottom"].status.message
    assert report["fisher_trace"].value > 0


# ---------------------------------------------------------------- bridge


def test_operators_of_others_are_measured(wide):
    from scipy.sparse.linalg import aslinearoperator

    _, hessian = wide
    operator = from_linear_operator(aslinearoperator(hessian.numpy()))
    found = measure_operator(operator, [HessianTrace(num_matvecs=60), HessianFrobenius(), HessianBottom(certify=False)])
    assert abs(found["hessian_trace"].value - hessian.trace().item()) < 4 * found["hessian_trace"].standard_error
    assert abs(found["hessian_frobenius"].value - hessian.norm().item()) < 4 * found["hessian_frobenius"].standard_error
    assert "the operator" in found["hessian_trace"].status.message
    (top,) = measure_operator(
        from_linear_operator(hessian), [GaussNewtonTopK(k=2, tolerance=1e-8)]
    ).values()  # a tensor, too
    assert top.details["eigenvalues"] == pytest.approx(torch.linalg.eigvalsh(hessian).flip(0)[:2].tolist(), rel=1e-9)
    with pytest.raises(ValueError, match="square"):
        from_linear_operator(aslinearoperator(hessian[:3].numpy()))
    with pytest.raises(TypeError, match="multiplies by @"):
        from_linear_operator([1, 2])
    with pytest.raises(ValueError, match="does not read a Krylov run"):
        measure_operator(operator, [HessianTrace(method="xtrace")])
    with pytest.raises(ValueError, match="different ends"):
        measure_operator(operator, [HessianTrace(), HessianBottom(certify=True)])


# ---------------------------------------------------------------- preconditioned


OPTIMIZERS = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "dampened": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, dampening=0.5),
    "nesterov": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, nesterov=True),
    "sgd, decayed": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=0.7),
    "adam": lambda p, lr: torch.optim.Adam(p, lr=lr, betas=(0.9, 1.0 - 1e-15), eps=1.0),  # v stays 0, so P = ε (1 − β₁ᵗ)
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr, betas=(0.9, 1.0 - 1e-15), eps=1.0, weight_decay=0.0),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("share", "diverges"), [(0.98, False), (1.02, True)])
def test_ratio_one_is_where_the_optimizer_diverges(name, share, diverges):
    """On ½ Σ h w²: the steps die out below the ratio 1, and grow above."""
    h = torch.tensor([3.0, 1.0, 0.2], dtype=F64)
    point = oracles.Point(torch.ones(3, dtype=F64))

    def step(optimizer: torch.optim.Optimizer, count: int) -> float:
        largest = 0.0
        for _ in range(count):
            optimizer.zero_grad()
            torch.autograd.backward((0.5 * h * point().square()).sum())
            optimizer.step()
            largest = max(largest, point.weight.abs().max().item())
        return largest

    def ratio(lr: float) -> float:
        with torch.no_grad():
            point.weight.copy_(torch.tensor([1e-12, 1e-12, 1e-12]))
        optimizer = OPTIMIZERS[name](point.parameters(), lr)
        step(optimizer, 400)  # the bias corrections are over
        point.zero_grad(set_to_none=True)
        objective = Objective(point, [torch.zeros(1)], loss_fn=lambda m, b: (0.5 * h * m().square()).sum())
        result = PreconditionedTopK(optimizer)(objective, rng())
        assert result.details["edge_of_stability_ratio"] == pytest.approx(result.value / result.details["threshold"])
        return result.details["edge_of_stability_ratio"]

    lr = 0.01 * share / ratio(0.01)  # P does not depend on it here
    with torch.no_grad():
        point.weight.copy_(torch.tensor([1e-20, 0, 0]))
    optimizer = OPTIMIZERS[name](point.parameters(), lr)
    assert (step(optimizer, 2000) > 1e-4) == diverges  # where Adam stops growing, since it sees its own gradients


def test_the_preconditioner_of_adam_is_what_divides_its_step(problem):
    """Against a step of Adam itself, and with groups of different learning rates and a frozen layer."""
    model = problem.model
    model[0].bias.requires_grad_(False)
    groups = [{"params": [model[0].weight], "lr": 1e-3}, {"params": list(model[2].parameters()), "lr": 4e-3}]
    optimizer = torch.optim.Adam(groups, betas=(0.8, 0.99), eps=1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(model(problem.inputs), problem.targets))
        optimizer.step()
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    first = [optimizer.state[p]["exp_avg"].clone() for p in model.parameters() if p.requires_grad]
    objective = Objective(model, problem.loader())
    hessian = torch.stack([objective.hvp(row) for row in torch.eye(objective.dim, dtype=F64)])
    result = PreconditionedTopK(optimizer, k=2, tolerance=1e-8)(objective, rng())
    # what the optimizer divided its running mean by: repeat its last step from the state that it left
    steps = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            bias = 1 - 0.8 ** state["step"].item()
            denominator = (state["exp_avg_sq"] / (1 - 0.99 ** state["step"].item())).sqrt() + 1e-3
            steps.append(((group["lr"] / 4e-3) / (bias * denominator)).reshape(-1))
    root = torch.cat(steps).sqrt()
    exact = torch.linalg.eigvalsh(root[:, None] * hessian * root).flip(0)
    assert result.details["eigenvalues"] == pytest.approx(exact[:2].tolist(), rel=1e-9)
    assert result.details["threshold"] == pytest.approx((2 + 2 * 0.8) / (1 - 0.8) / 4e-3)
    assert result.details["learning_rate"] == 4e-3
    assert all(torch.equal(p, q) for p, q in zip(before, (p for p in model.parameters() if p.requires_grad), strict=True))
    assert all(
        torch.equal(optimizer.state[p]["exp_avg"], m)
        for p, m in zip((p for p in model.parameters() if p.requires_grad), first, strict=True)
    )


def test_parameters_that_the_optimizer_does_not_move_are_left_out(problem):
    hessian = problem.dense_hessian()
    optimizer = torch.optim.SGD(problem.model[2].parameters(), lr=0.1)
    result = PreconditionedTopK(optimizer)(Objective(problem.model, problem.loader()), rng())
    assert result.value == pytest.approx(torch.linalg.eigvalsh(hessian[30:, 30:])[-1].item(), rel=1e-6)
    assert "moves 21 of 51 parameters" in result.status.message


def test_optimizers_that_cannot_be_read_are_refused(problem):
    objective = Objective(problem.model, problem.loader())
    parameters = list(problem.model.parameters())
    with pytest.raises(ValueError, match="not that of Adagrad"):
        PreconditionedTopK(torch.optim.Adagrad(parameters))
    with pytest.raises(ValueError, match="no step yet"):
        PreconditionedTopK(torch.optim.Adam(parameters))(objective, rng())
    with pytest.raises(ValueError, match="has none of the measured parameters"):
        PreconditionedTopK(torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1))(objective, rng())
    mixed = [{"params": parameters[:2]}, {"params": parameters[2:], "momentum": 0.5}]
    with pytest.raises(ValueError, match="different momenta"):
        PreconditionedTopK(torch.optim.SGD(mixed, lr=0.1))(objective, rng())


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: HessianTrace(method="hutch"), "method must be one of"),
        (lambda: HessianTrace(num_matvecs=5), "num_matvecs must be at least 6, got 5"),
        (lambda: HessianFrobenius(num_matvecs=0), "num_matvecs must be at least 6"),
        (lambda: HessianTrace(hvp="fast"), "hvp must be None or one of"),
        (lambda: SpectralDensity(num_nodes=1), "num_nodes must be at least 2"),
        (lambda: SpectralDensity(num_points=1), "num_points must be at least 2"),
        (lambda: SpectralDensity(width=0.0), "width must be None or a positive number"),
        (lambda: HessianBottom(k=2), "certify=True"),
        (lambda: HessianBottom(num_matvecs=0), "num_steps"),
        (lambda: GaussNewtonTopK(k=0), "k must be at least 1"),
        (lambda: AdaptiveTopK(tolerance=0.0), "tolerance must be positive"),
    ],
)
def test_bad_settings_are_refused_at_construction(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_a_list_of_globs_is_as_good_as_a_tuple(problem):
    assert HessianTrace(select=["0.*", "2.bias"]).krylov_need() == HessianTrace(select=("0.*", "2.bias")).krylov_need()
    with pytest.raises(TypeError, match="select must be None, or one or more globs"):
        HessianTrace(select=3)


def test_all_are_listed_with_one_line_each():
    offers = available_metrics()
    for name in (
        *("hessian_bottom", "hessian_trace", "hessian_frobenius", "spectral_density", "adaptive_topk"),
        *("gauss_newton_topk", "gauss_newton_trace", "fisher_trace", "preconditioned_topk"),
    ):
        assert offers[name].spec.summary
        assert "\n" not in offers[name].spec.summary


def test_the_largest_eigenvalues_come_from_the_same_run(wide):
    """With hessian_topk, whose run it is then: top-5, bottom, trace with layers, norm and density for 1.1 of the dearest."""
    problem, hessian = wide
    exact = torch.linalg.eigvalsh(hessian).flip(0)
    family = [HessianTopK(), *FAMILY]
    alone = [measure_sharpness(problem.model, problem.loader(), m)[m.name].cost.hvps for m in family]
    for order in (family, family[::-1]):
        report = measure_sharpness(problem.model, problem.loader(), order)
        assert sum(result.cost.hvps for result in report.values()) <= 1.1 * max(alone)
        top = report["hessian_topk"].details
        assert top["eigenvalues"] == pytest.approx(exact[:5].tolist(), rel=1e-3)
        assert report["hessian_topk"].status.kind is Kind.CONVERGED
        assert top["run_paid_by"] == order[0].name
        assert abs(report["hessian_trace"].value - hessian.trace().item()) < 4 * report["hessian_trace"].standard_error


def test_runs_at_other_ends_of_the_spectrum_stay_apart(wide):
    problem, hessian = wide
    exact = torch.linalg.eigvalsh(hessian)
    report = measure_sharpness(
        problem.model, problem.loader(), [HessianTopK(k=1), HessianBottom(certify=True), HessianTopK(k=3)]
    )
    keys = list(report)
    assert report[keys[2]].cost.hvps == 0
    assert report[keys[1]].value == pytest.approx(exact[0].item(), rel=1e-3)
    assert "run_paid_by" not in report[keys[1]].details


def test_eigenvalues_of_a_block(wide):
    problem, hessian = wide
    result = HessianTopK(k=2, tolerance=1e-8, select="2.*")(Objective(problem.model, problem.loader()), rng())
    exact = torch.linalg.eigvalsh(hessian[220:, 220:]).flip(0)
    assert result.details["eigenvalues"] == pytest.approx(exact[:2].tolist(), rel=1e-9)
