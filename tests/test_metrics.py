"""The three built-in metrics: closed forms to 1e-10 in float64, invariances, honest statuses."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import oracles
from sharpness_plugins import sampling
from sharpness_plugins.maximizers import LBFGSB, MultiStart
from sharpness_plugins.metrics import EpsilonBox, HessianTopK, RandomSubspace
from sharpness_plugins.objective import Objective
from sharpness_plugins.regions import Box
from sharpness_plugins.report import Kind
from sharpness_plugins.subspace import SignSubspace

F64 = torch.float64
H = torch.tensor(oracles.DIAGONAL, dtype=F64)
W = torch.tensor(oracles.WEIGHTS, dtype=F64)


def rng(seed: int = 0) -> torch.Generator:
    return sampling.generator_for(seed, "test")


def at_minimum(scale: float = 1.0) -> Objective:
    return oracles.quadratic(torch.diag(H), W, minimum=W, offset=0.05, scale=scale)


# ---------------------------------------------------------------- epsilon_box


def test_epsilon_box_of_a_diagonal_quadratic_at_its_minimum():
    """The published worked value; every gradient method that starts at zero reports 0 here."""
    result = EpsilonBox(epsilon=1e-3)(at_minimum(), rng())
    closed = 50 * 1e-6 * (H * (W.abs() + 1) ** 2).sum().item() / 1.05
    assert result.value == pytest.approx(closed, rel=1e-10)
    assert result.value == pytest.approx(0.0154119, abs=5e-8)
    assert result.status.kind is Kind.LOWER_BOUND


@pytest.mark.parametrize("epsilon", [1e-3, 5e-4, 0.1])
@pytest.mark.parametrize("seed", range(6))
def test_epsilon_box_of_indefinite_diagonal_quadratics(seed, epsilon):
    generator = torch.Generator().manual_seed(seed)
    h = 10 * torch.randn(30, generator=generator, dtype=F64)
    w, c = torch.randn(30, generator=generator, dtype=F64), torch.randn(30, generator=generator, dtype=F64)
    c = w - 2 * epsilon * (c - c.mean())  # close by, so that some maxima lie inside the box
    objective = oracles.quadratic(torch.diag(h), w, minimum=c, offset=3.0)
    loss = 3 + 0.5 * (h * (w - c) ** 2).sum().item()
    gain = oracles.diagonal_box_gain(h, h * (w - c), epsilon * (w.abs() + 1))
    result = EpsilonBox(epsilon=epsilon)(objective, rng())
    assert result.value == pytest.approx(100 * gain / (1 + loss), rel=1e-10)


def test_epsilon_box_of_a_linear_loss():
    slope = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0, -1e-3], dtype=F64)
    objective = oracles.objective_of(lambda w: slope @ w + 20, W)
    loss = (slope @ W + 20).item()
    result = EpsilonBox(epsilon=1e-3)(objective, rng())
    expected = 100 * 1e-3 * (slope.abs() * (W.abs() + 1)).sum().item() / (1 + loss)
    assert result.value == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1e2, 1e4])
@pytest.mark.parametrize("maximizer", ["sign_frank_wolfe", "lbfgsb"])
def test_epsilon_box_does_not_depend_on_the_unit_of_the_loss(scale, maximizer):
    """After the 1 + f normalization: the rise scales with the loss, on a network that is no quadratic."""
    problem = oracles.small_classifier()
    ce = nn.functional.cross_entropy

    def scaled(factor: float) -> Objective:
        return Objective(problem.model, problem.loader(), loss_fn=lambda m, b: factor * ce(m(b[0]), b[1]))

    metric = EpsilonBox(epsilon=1e-2, maximizer=maximizer)
    plain, other = metric(scaled(1.0), rng()), metric(scaled(scale), rng())
    rise = plain.details["max_loss"] - plain.details["loss"]
    assert other.details["max_loss"] - other.details["loss"] == pytest.approx(scale * rise, rel=1e-8)
    assert other.value == pytest.approx(100 * scale * rise / (1 + scale * plain.details["loss"]), rel=1e-8)


@pytest.mark.parametrize("epsilon", [1e-4, 1e-3])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_float32_gives_the_sharpness_of_float64(name, epsilon):
    """At the same weights: the loss accumulates in float64, and a rounded gradient leads to the same maximum."""
    from benchmarks.problems import problem

    shared = problem(name)
    single = Objective(shared.model, shared.batches)
    exact = copy.deepcopy(shared.model).double()
    double = Objective(exact, [(inputs.double(), labels) for inputs, labels in shared.batches])
    values = [EpsilonBox(epsilon)(objective, rng()).value for objective in (single, double)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_epsilon_box_grows_with_the_box_and_reports_what_it_did():
    problem = oracles.small_classifier()
    objective = Objective(problem.model, problem.loader(7, 13))
    values = []
    for epsilon in (1e-4, 1e-3, 1e-2, 1e-1):
        result = EpsilonBox(epsilon=epsilon)(objective, rng())
        values.append(result.value)
        details = result.details
        box = Box(epsilon * (objective.origin.abs() + 1))
        assert details["box_norm"] == pytest.approx(box.half_width.norm().item())
        assert 0 < details["perturbation_norm"] <= details["box_norm"] * (1 + 1e-12)
        assert 0 < details["share_at_bound"] <= 1
        assert max(details["start_values"]) == pytest.approx(result.value, rel=1e-12)
        assert {name.split()[-1] for name in details["start_names"][:2]} == {"raised", "lowered"}
        assert details["start_names"][2] == "zero"
        assert sum(details["start_gradients"]) == details["gradients_in_solver"]
        assert details["gradients_in_solver"] <= 24
        assert result.value == pytest.approx(100 * (details["max_loss"] - objective.loss) / (1 + objective.loss))
        for name in details["start_names"]:
            assert name in result.status.message
    assert values == sorted(values)


def test_epsilon_box_reaches_what_a_long_scipy_run_reaches():
    problem = oracles.small_classifier()
    objective = Objective(problem.model, problem.loader())
    ours = EpsilonBox(epsilon=0.05)(objective, rng()).value
    scipy = EpsilonBox(epsilon=0.05, maximizer=LBFGSB(max_iterations=500))(objective, rng()).value
    assert ours >= scipy * (1 - 1e-6)


def test_epsilon_box_in_float32_is_that_in_float64():
    double, single = oracles.small_classifier(), oracles.small_classifier(torch.float32)
    values = [EpsilonBox()(Objective(p.model, p.loader()), rng()).value for p in (double, single)]
    assert values[1] == pytest.approx(values[0], rel=1e-4)


def test_a_box_below_the_resolution_of_float32_is_said():
    single, double = oracles.small_classifier(torch.float32), oracles.small_classifier()
    fine = EpsilonBox(1e-3)(Objective(single.model, single.loader()), rng())
    coarse = EpsilonBox(1e-7)(Objective(single.model, single.loader()), rng())
    exact = EpsilonBox(1e-7)(Objective(double.model, double.loader()), rng())
    assert "rounds" not in fine.status.message
    assert fine.details["step_lost_in_rounding"] < 1e-3
    assert "torch.float32 rounds" in coarse.status.message
    assert "model.double()" in coarse.status.message
    assert "rounds" not in exact.status.message


def test_the_papers_call_stops_at_once_on_a_minimum_and_says_so():
    result = EpsilonBox(maximizer="lbfgsb_published")(at_minimum(), rng())
    assert result.value == 0
    assert result.status.kind is Kind.NOT_CONVERGED
    assert "0 of 10 iterations" in result.status.message


def test_regression_outputs_are_raised_and_lowered():
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    x = torch.randn(8, 3, dtype=F64)
    objective = Objective(model, [(x, model(x).detach())], criterion=nn.MSELoss())
    assert objective.loss == 0
    result = EpsilonBox(epsilon=0.1)(objective, rng())
    assert any(name.startswith("output 0") for name in result.details["start_names"])
    # f = mean (X e)²: compare with all vertices
    half_width = 0.1 * (objective.origin.abs() + 1)
    design = torch.cat([x, torch.ones(8, 1, dtype=F64)], 1)
    vertices = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=F64)] * 4) * half_width
    truth = 100 * (vertices @ design.T).square().mean(1).max().item()
    assert result.value == pytest.approx(truth, rel=1e-10)


def test_a_loss_below_minus_one_is_refused():
    objective = oracles.objective_of(lambda w: w.sum() - 100, W)
    for metric in (EpsilonBox(), RandomSubspace(dim=2)):
        with pytest.raises(ValueError, match=r"divides the rise by 1 \+ loss, which must be positive"):
            metric(objective, rng())


# ---------------------------------------------------------------- random_subspace


def linear_problem(dim: int, offset: float = 50.0):
    generator = torch.Generator().manual_seed(4)
    slope = torch.randn(dim, generator=generator, dtype=F64)
    weights = torch.randn(dim, generator=generator, dtype=F64)
    return oracles.objective_of(lambda w: slope @ w + offset, weights), slope, weights


def dense(objective: Objective, columns: int, generator: torch.Generator, draw: int, scale: float) -> torch.Tensor:
    key = sampling.key_for(generator.initial_seed(), "columns", draw)
    subspace = SignSubspace(objective.space, columns, key)
    return scale * torch.stack([subspace.lift(row) for row in torch.eye(columns, dtype=F64)], 1)


@pytest.mark.parametrize("column_scale", ["unscaled", "unit", "matched"])
def test_random_subspace_of_a_linear_loss(column_scale):
    """``100 Σ |Aᵀg|_i ε(|A⁺w|_i + 1) / (1 + f)``, with the dense matrix and its pseudo-inverse."""
    objective, slope, weights = linear_problem(300)
    scale = {
        "unscaled": 1.0,
        "unit": 300**-0.5,
        "matched": (weights.abs() + 1).norm().item() / math.sqrt(7 * 300),
    }[column_scale]
    result = RandomSubspace(epsilon=1e-3, dim=7, draws=3, column_scale=column_scale)(objective, rng())
    expected = []
    for draw in range(3):
        a = dense(objective, 7, rng(), draw, scale)
        half_width = 1e-3 * ((torch.linalg.pinv(a) @ weights).abs() + 1)
        expected.append(100 * ((a.T @ slope).abs() * half_width).sum().item() / (1 + objective.loss))
    assert result.details["values"] == pytest.approx(expected, rel=1e-10)
    assert result.value == pytest.approx(sum(expected) / 3, rel=1e-10)
    spread = torch.tensor(expected, dtype=F64).std(unbiased=True).item() / 3**0.5
    assert result.standard_error == pytest.approx(spread, rel=1e-8)
    assert result.details["column_scale"] == column_scale
    assert column_scale in result.status.message
    assert result.status.kind is Kind.ESTIMATE


def test_random_subspace_of_a_convex_quadratic_against_all_vertices():
    generator = torch.Generator().manual_seed(2)
    root = torch.randn(40, 40, generator=generator, dtype=F64)
    h, w = root @ root.T / 40, torch.randn(40, generator=generator, dtype=F64)
    objective = oracles.quadratic(h, w, minimum=w, offset=0.1)
    metric = RandomSubspace(epsilon=1e-2, dim=6, draws=4, maximizer=MultiStart(max_gradients=60))
    result = metric(objective, rng())
    for draw, value in enumerate(result.details["values"]):
        a = dense(objective, 6, rng(), draw, 1.0)
        half_width = 1e-2 * ((torch.linalg.pinv(a) @ w).abs() + 1)
        vertices = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=F64)] * 6) * half_width
        lifted = vertices @ a.T
        truth = 100 * 0.5 * ((lifted @ h) * lifted).sum(1).max().item() / 1.1
        assert 0.9 * truth <= value <= truth * (1 + 1e-12)


def test_the_matched_scale_moves_the_weights_as_far_as_the_box():
    objective, _, _ = linear_problem(5000)
    result = RandomSubspace(dim=50, draws=2, column_scale="matched")(objective, rng())
    box = (1e-3 * (objective.origin.abs() + 1)).norm().item()
    assert result.details["perturbation_norms"] == pytest.approx([box, box], rel=0.1)


def test_one_draw_has_no_standard_error_and_more_columns_than_parameters_are_lowered():
    objective, _, _ = linear_problem(20)
    result = RandomSubspace(dim=5, draws=1)(objective, rng())
    assert result.standard_error is None
    assert result.status.kind is Kind.LOWER_BOUND
    lowered = RandomSubspace()(objective, rng())
    assert lowered.details["dim"] == 20
    assert "dim=100 was lowered to the number of parameters" in lowered.status.message
    assert lowered.details["values"] == RandomSubspace(dim=20)(objective, rng()).details["values"]


def test_draws_depend_on_the_seed_and_on_nothing_else():
    objective, _, _ = linear_problem(200)
    metric = RandomSubspace(dim=5, draws=2)
    one, again, other = metric(objective, rng(0)), metric(objective, rng(0)), metric(objective, rng(1))
    assert one.details["values"] == again.details["values"] != other.details["values"]
    longer = RandomSubspace(dim=5, draws=3)(objective, rng(0))
    assert longer.details["values"][:2] == one.details["values"]


# ---------------------------------------------------------------- hessian_topk


@pytest.mark.parametrize("sizes", [(20,), (9, 9, 2)])
@pytest.mark.parametrize("which", ["LA", "LM"])
def test_eigenvalues_of_a_network_against_the_dense_hessian(which, sizes):
    problem = oracles.small_classifier()
    exact = torch.linalg.eigvalsh(problem.dense_hessian())
    order = torch.argsort(exact.abs() if which == "LM" else exact, descending=True)
    objective = Objective(problem.model, problem.loader(*sizes))
    result = HessianTopK(k=5, tolerance=1e-6, which=which)(objective, rng())
    found, residuals = (
        torch.tensor(result.details["eigenvalues"], dtype=F64),
        torch.tensor(result.details["residuals"], dtype=F64),
    )
    torch.testing.assert_close(found, exact[order][:5], rtol=1e-9, atol=1e-12)
    assert ((found[:, None] - exact).abs().min(1).values <= residuals + 1e-13).all()
    assert result.value == found[0]
    assert result.status.kind is Kind.CONVERGED
    assert "retained double backward" in result.status.message
    assert result.details["num_matvecs"] == objective.cost.hvps


def test_eigenvalues_at_the_default_tolerance_have_three_digits():
    problem = oracles.small_classifier(torch.float32, nn.ReLU, num_samples=50)
    exact = torch.linalg.eigvalsh(problem.dense_hessian().double()).flip(0)[:5]
    result = HessianTopK()(Objective(problem.model, problem.loader()), rng())
    torch.testing.assert_close(torch.tensor(result.details["eigenvalues"], dtype=F64), exact, rtol=1e-3, atol=0)


def test_eigenvalues_of_part_of_the_parameters():
    problem = oracles.small_classifier()
    block = problem.dense_hessian()[30:, 30:]
    result = HessianTopK(k=2, tolerance=1e-8)(Objective(problem.model, problem.loader(), select="2.*"), rng())
    exact = torch.linalg.eigvalsh(block).flip(0)[:2].tolist()
    assert result.details["eigenvalues"] == pytest.approx(exact, rel=1e-9)


def test_multiple_eigenvalues_of_a_small_model_are_all_found():
    """A linear model under squared error: H = (2/N) I ⊗ XᵀX, every eigenvalue as often as there are outputs."""
    torch.manual_seed(0)
    x = torch.randn(12, 5, dtype=F64)
    objective = Objective(
        nn.Linear(5, 3, bias=False).double(), [(x[:7], x[:7, :3]), (x[7:], x[7:, :3])], criterion=nn.MSELoss()
    )
    exact = torch.linalg.eigvalsh(2 / 36 * x.T @ x).flip(0).repeat_interleave(3)  # the mean is over samples and outputs
    result = HessianTopK(k=7)(objective, rng())
    assert result.details["eigenvalues"] == pytest.approx(exact[:7].tolist(), rel=1e-9)
    assert "on the whole space" in result.status.message


def test_a_budget_that_runs_out_is_said():
    problem = oracles.small_classifier()
    result = HessianTopK(k=5, num_matvecs=6, tolerance=1e-6)(Objective(problem.model, problem.loader()), rng())
    assert result.status.kind is Kind.NOT_CONVERGED
    assert "budget of 6 products ran out" in result.status.message
    assert "lower bounds" in result.status.message


def test_more_eigenvalues_than_parameters_are_lowered():
    result = HessianTopK(k=7)(at_minimum(), rng())
    assert result.details["eigenvalues"] == pytest.approx([100, 10, 5, 1, 0.1, 0], abs=1e-10)
    assert "k=7 was lowered to the number of parameters" in result.status.message


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: EpsilonBox(epsilon=0), "epsilon must be a positive number, got 0"),
        (lambda: EpsilonBox(epsilon=float("nan")), "epsilon must be"),
        (lambda: EpsilonBox(maximizer="adam"), "got 'adam'"),
        (lambda: EpsilonBox(max_targets=-1), "max_targets"),
        (lambda: RandomSubspace(dim=0), "dim must be at least 1"),
        (lambda: RandomSubspace(draws=0), "draws must be at least 1"),
        (lambda: RandomSubspace(column_scale="gaussian"), r"column_scale must be one of \('unscaled', 'unit', 'matched'\)"),
        (lambda: HessianTopK(k=0), "k must be at least 1"),
        (lambda: EpsilonBox(sketch_samples=0), "sketch_samples must be at least 1, or None, got 0"),
        (lambda: EpsilonBox(eigenvectors=-1), "eigenvectors must be at least 0, got -1"),
        (lambda: HessianTopK(tolerance=0), "tolerance"),
        (lambda: HessianTopK(which="SA"), "which must be one of"),
        (lambda: HessianTopK(k=5, num_matvecs=3), "need at least as many products"),
    ],
)
def test_bad_settings_are_refused_at_construction(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_settings_are_their_own_record():
    expected = "EpsilonBox(epsilon=0.0005, maximizer='lbfgsb', max_targets=10, sketch_samples=None, eigenvectors=0)"
    assert repr(EpsilonBox(5e-4, "lbfgsb")) == expected
    assert EpsilonBox() == EpsilonBox(1e-3)
