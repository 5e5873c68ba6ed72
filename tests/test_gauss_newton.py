"""Gauss–Newton and Fisher products against dense matrices from the definition."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

import oracles
from sharpness_plugins import sampling
from sharpness_plugins.errors import LossRuleError
from sharpness_plugins.gauss_newton import OutputProducts
from sharpness_plugins.metrics import FisherTrace, GaussNewtonTopK, GaussNewtonTrace
from sharpness_plugins.objective import Objective
from sharpness_plugins.report import Kind

F64 = torch.float64


def rng(seed: int = 0) -> torch.Generator:
    return sampling.generator_for(seed, "test")


def dense(objective: Objective, matrix: str) -> torch.Tensor:
    products = OutputProducts(objective, matrix)
    return torch.stack([products(row) for row in torch.eye(objective.dim, dtype=objective.origin.dtype)])


def jacobian(model: nn.Module, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs, and their Jacobian in the flat weights as (samples, outputs, dim), by torch.func."""
    names, shapes = zip(*((name, p.shape) for name, p in model.named_parameters()), strict=True)
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def outputs(flat: torch.Tensor) -> torch.Tensor:
        pieces = flat.split([shape.numel() for shape in shapes])
        weights = {n: piece.view(s) for n, piece, s in zip(names, pieces, shapes, strict=True)}
        return torch.func.functional_call(model, weights, (inputs,))

    return outputs(flat).detach(), torch.func.jacrev(outputs)(flat).detach()


def softmax_curvature(z: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """``a (diag p − p pᵀ)``, the diagonal from the others, since rows add up to zero: ``1 − p`` has no digits near 1."""
    p = z.softmax(1)
    beside = -p[:, :, None] * p[:, None] * (1 - torch.eye(z.shape[1], dtype=z.dtype))
    return weights[:, None, None] * (beside - torch.diag_embed(beside.sum(2)))


def gauss_newton(model: nn.Module, inputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    z, j = jacobian(model, inputs)
    return torch.einsum("ncd,nce,nef->df", j, softmax_curvature(z, weights), j)


@pytest.fixture
def problem() -> oracles.Classification:
    return oracles.small_classifier()


EVEN = torch.full((20,), 1 / 20, dtype=F64)


@pytest.mark.parametrize("sizes", [(20,), (7, 13), (1, 19), (5, 5, 5, 5)])
def test_gauss_newton_of_cross_entropy_in_any_batching(problem, sizes):
    objective = Objective(problem.model, problem.loader(*sizes))
    exact = gauss_newton(problem.model, problem.inputs, EVEN)
    torch.testing.assert_close(dense(objective, "gauss_newton"), exact, rtol=0, atol=1e-14)
    torch.testing.assert_close(dense(objective, "fisher"), exact, rtol=0, atol=1e-14)
    assert objective.cost.hvps == 2 * objective.dim


def test_gauss_newton_of_float32_and_of_several_outputs_per_sample():
    torch.manual_seed(0)
    x, y = torch.randn(6, 3, 5, dtype=F64), torch.randint(0, 4, (6, 5))
    y[0, :3] = -100  # as in a padded text
    model = nn.Conv1d(3, 4, 3, padding=1).double()
    objective = Objective(model, [(x[:2], y[:2]), (x[2:], y[2:])], criterion=nn.CrossEntropyLoss())
    z, j = jacobian(model, x)
    rows, jacobians = z.movedim(1, 2).reshape(-1, 4), j.movedim(1, 2).reshape(30, 4, -1)
    weights = (y.reshape(-1) != -100).double() / 27
    exact = torch.einsum("ncd,nce,nef->df", jacobians, softmax_curvature(rows, weights), jacobians)
    torch.testing.assert_close(dense(objective, "gauss_newton"), exact, rtol=0, atol=1e-14)
    single = Objective(model.float(), [(x.float(), y)], criterion=nn.CrossEntropyLoss())
    torch.testing.assert_close(dense(single, "gauss_newton").double(), exact, rtol=0, atol=3e-7 * exact.abs().max().item())


def test_class_weights_count(problem):
    class_weights = torch.tensor([1.0, 2.0, 0.5], dtype=F64)
    criterion = nn.CrossEntropyLoss(weight=class_weights)
    objective = Objective(problem.model, problem.loader(7, 13), criterion=criterion)
    weights = class_weights[problem.targets]
    exact = gauss_newton(problem.model, problem.inputs, weights / weights.sum())
    products = OutputProducts(objective, "gauss_newton")
    found = torch.stack([products(row) for row in torch.eye(objective.dim, dtype=F64)])
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-14)
    assert "closed form" in products.how


def test_a_smoothed_loss_is_differentiated_instead(problem):
    """The Hessian of cross-entropy in the scores does not depend on the labels, so smoothing changes nothing of it."""
    objective = Objective(problem.model, problem.loader(7, 13), criterion=nn.CrossEntropyLoss(label_smoothing=0.2))
    products = OutputProducts(objective, "gauss_newton")
    found = torch.stack([products(row) for row in torch.eye(objective.dim, dtype=F64)])
    torch.testing.assert_close(found, gauss_newton(problem.model, problem.inputs, EVEN), rtol=0, atol=1e-14)
    assert "the loss differentiated twice" in products.how


def test_gauss_newton_of_squared_error():
    problem = oracles.small_classifier()
    y = torch.randn(20, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    objective = Objective(problem.model, [(problem.inputs[:7], y[:7]), (problem.inputs[7:], y[7:])], criterion=nn.MSELoss())
    _, j = jacobian(problem.model, problem.inputs)
    flat = j.reshape(60, -1)
    torch.testing.assert_close(dense(objective, "gauss_newton"), 2 / 60 * flat.T @ flat, rtol=0, atol=1e-13)


def test_gauss_newton_of_a_convex_loss_of_ones_own():
    problem = oracles.small_classifier()

    def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return nn.functional.softplus(model(batch[0])).pow(2).mean()

    objective = Objective(problem.model, problem.loader(7, 13), loss_fn=loss_fn)
    z, j = jacobian(problem.model, problem.inputs)
    bent = torch.func.vmap(torch.func.hessian(lambda row: nn.functional.softplus(row).pow(2).mean()))(z) / 20
    exact = torch.einsum("ncd,nce,nef->df", j, bent, j)
    torch.testing.assert_close(dense(objective, "gauss_newton"), exact, rtol=0, atol=1e-13)


def test_gauss_newton_of_a_linear_model_is_the_hessian():
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(9, 4, dtype=F64), torch.randint(0, 3, (9,))
    objective = Objective(model, [(x, y)])
    hessian = torch.stack([objective.hvp(row) for row in torch.eye(15, dtype=F64)])
    torch.testing.assert_close(dense(objective, "gauss_newton"), hessian, rtol=0, atol=1e-14)


@pytest.mark.parametrize("sizes", [(20,), (7, 13)])
def test_empirical_fisher_of_classes_and_of_samples(problem, sizes):
    z, j = jacobian(problem.model, problem.inputs)
    slopes = torch.einsum("ncd,nc->nd", j, z.softmax(1) - nn.functional.one_hot(problem.targets, 3).double())
    objective = Objective(problem.model, problem.loader(*sizes))
    exact = slopes.T @ slopes / 20
    torch.testing.assert_close(dense(objective, "empirical_fisher"), exact, rtol=0, atol=1e-13)

    y = torch.randn(20, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    batches = [(problem.inputs[: sizes[0]], y[: sizes[0]]), (problem.inputs[sizes[0] :], y[sizes[0] :])]
    squared = Objective(problem.model, [batch for batch in batches if len(batch[0])], criterion=nn.MSELoss())
    slopes = torch.einsum("ncd,nc->nd", j, 2 / 3 * (z - y))
    torch.testing.assert_close(dense(squared, "empirical_fisher"), slopes.T @ slopes / 20, rtol=0, atol=1e-12)


def test_a_sure_model_keeps_its_digits(problem):
    """Scores 40 apart: 1 − p_y is 4e-18, and what is computed from it would be zero."""
    with torch.no_grad():
        problem.model[-1].bias.copy_(torch.tensor([0.0, 40.0, 80.0]))
        problem.model[-1].weight.mul_(0.1)
    sure = oracles.Classification(problem.model, problem.inputs, torch.full((20,), 2))
    exact = gauss_newton(sure.model, sure.inputs, EVEN)
    found = dense(Objective(sure.model, sure.loader()), "gauss_newton")
    assert 0 < exact.abs().max() < 1e-15
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-10 * exact.abs().max().item())


class _NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, back):
        (x,) = ctx.saved_tensors
        return back * (1 - x.tanh() ** 2)


class _Custom(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _NoForwardMode.apply(x)


def test_without_forward_mode_double_backward_gives_the_same(problem):
    expected = dense(Objective(problem.model, problem.loader()), "gauss_newton")
    model = nn.Sequential(problem.model[0], _Custom(), problem.model[2])
    objective = Objective(model, problem.loader(7, 13))
    products = OutputProducts(objective, "gauss_newton")
    found = torch.stack([products(row) for row in torch.eye(objective.dim, dtype=F64)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    assert products.how.startswith("double backward of the outputs")
    assert "no forward mode" in products.how


class _Answer(nn.Module):
    """Answers with a mapping that holds more than the scores."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> OrderedDict:
        logits = self.inner(x)
        return OrderedDict(hidden=logits.exp(), logits=logits, labels_seen=torch.ones(1, dtype=torch.long))


def test_outputs_may_be_mappings_with_more_in_them(problem):
    expected = dense(Objective(problem.model, problem.loader()), "gauss_newton")
    found = dense(Objective(_Answer(problem.model), problem.loader(7, 13)), "gauss_newton")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_attention_models_work_as_they_come():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.Sequential(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Flatten(), nn.Linear(24, 3)).eval()
    x, y = torch.randn(5, 3, 8), torch.randint(0, 3, (5,))
    objective = Objective(model, [(x, y)])
    u, v = (sampling.normal(objective.dim, rng(s), objective.origin) for s in (0, 1))
    products = OutputProducts(objective, "gauss_newton")
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            _, j = jacobian(model, x)
            z = model(x).detach()
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    exact = torch.einsum("ncd,nce,ne->d", j, softmax_curvature(z, torch.full((5,), 0.2)), j @ v)
    torch.testing.assert_close(products(v), exact, rtol=1e-3, atol=1e-4 * exact.abs().max().item())
    assert (u @ products(v)).item() == pytest.approx((v @ products(u)).item(), rel=1e-3)


def test_nothing_is_left_behind(problem):
    before = {name: p.clone() for name, p in problem.model.named_parameters()}
    objective = Objective(problem.model, problem.loader())
    OutputProducts(objective, "gauss_newton")(torch.ones(objective.dim, dtype=F64))
    assert not problem.model._forward_hooks
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in problem.model.named_parameters())


def test_a_loss_that_is_not_one_of_the_output_is_refused(problem):
    def penalized(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1]) + sum(p.square().sum() for p in model.parameters())

    def around(model, batch):
        return model[0](batch[0]).square().mean()

    for loss_fn, match in ((penalized, "beside the model's output"), (around, "without a call of the model")):
        objective = Objective(problem.model, problem.loader(), loss_fn=loss_fn)
        with pytest.raises(LossRuleError, match=match):
            OutputProducts(objective, "gauss_newton")(torch.ones(objective.dim, dtype=F64))
        assert not problem.model._forward_hooks


# ---------------------------------------------------------------- the metrics


def test_metrics_against_the_dense_matrices(problem):
    objective = Objective(problem.model, problem.loader(7, 13))
    exact = gauss_newton(problem.model, problem.inputs, EVEN)
    top = GaussNewtonTopK(k=4)(objective, rng())
    assert top.details["eigenvalues"] == pytest.approx(torch.linalg.eigvalsh(exact).flip(0)[:4].tolist(), rel=1e-9)
    assert top.status.kind is Kind.CONVERGED
    trace = GaussNewtonTrace(num_matvecs=2 * objective.dim)(objective, rng())
    assert trace.value == pytest.approx(exact.trace().item(), rel=1e-9)
    assert (trace.status.kind, trace.standard_error) == (Kind.EXACT, 0.0)
    fisher = FisherTrace(num_matvecs=2 * objective.dim)(objective, rng())
    assert fisher.value == pytest.approx(trace.value, rel=1e-9)
    layers = trace.details["layers"]
    assert layers["2.bias"]["trace"] == pytest.approx(exact.diagonal()[-3:].sum().item(), rel=1e-9)


def test_empirical_fisher_trace_is_the_mean_squared_gradient(problem):
    objective = Objective(problem.model, problem.loader(7, 13))
    z, j = jacobian(problem.model, problem.inputs)
    slopes = torch.einsum("ncd,nc->nd", j, z.softmax(1) - nn.functional.one_hot(problem.targets, 3).double())
    exact = FisherTrace(labels="empirical", num_matvecs=2 * objective.dim)(objective, rng())
    assert exact.value == pytest.approx(slopes.square().sum(1).mean().item(), rel=1e-9)


def test_the_fisher_matrix_of_the_models_labels_needs_classes():
    torch.manual_seed(0)
    x = torch.randn(8, 3, dtype=F64)
    objective = Objective(nn.Linear(3, 2).double(), [(x, x[:, :2])], criterion=nn.MSELoss())
    with pytest.raises(LossRuleError, match="Use labels='empirical'"):
        FisherTrace()(objective, rng())
    with pytest.raises(ValueError, match="labels must be one of"):
        FisherTrace(labels="drawn")
