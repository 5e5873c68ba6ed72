"""Tracking: eigenvalues of the dense Hessian at every step, at a fraction of the products, and no surprise unsaid."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import oracles
from sharpness_plugins import sampling
from sharpness_plugins.krylov import LanczosRequest
from sharpness_plugins.lanczos import lanczos
from sharpness_plugins.objective import Objective
from sharpness_plugins.tracking import EigenTracker, Update

F64 = torch.float64


def network() -> oracles.Classification:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 4)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=F64))
    inputs = torch.randn(80, 12, generator=generator, dtype=F64)
    return oracles.Classification(model.eval(), inputs, inputs[:, :4].argmax(1))


def descend(problem: oracles.Classification, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    torch.autograd.backward(nn.functional.cross_entropy(problem.model(problem.inputs), problem.targets))
    optimizer.step()


@pytest.mark.parametrize(("k", "factor"), [(1, 3.0), (5, 1.5)])
def test_every_step_is_right_and_cheaper_than_from_nothing(k, factor):
    """Momentum on the full batch, thirty steps in a row, against the dense Hessian, and a cold run to the same tolerance."""
    problem = network()
    objective = Objective(problem.model, problem.loader(30, 50))
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.05, momentum=0.9)
    tracker, request = EigenTracker(k), LanczosRequest(k=k, tolerance=3e-2)
    tracker.update(objective)
    tracked, cold, updates = 0, 0, set()
    for step in range(30):
        descend(problem, optimizer)
        before = objective.cost.hvps
        found = tracker.update(objective)
        assert objective.cost.hvps - before == found.num_matvecs
        tracked += found.num_matvecs
        updates.add(found.update)
        hessian = problem.dense_hessian()
        exact = torch.linalg.eigvalsh(hessian)
        assert found.values == sorted(found.values, reverse=True)
        if k == 1 or found.update is not Update.KEPT:  # a Rayleigh quotient
            assert found.values[0] <= exact[-1].item() * (1 + 1e-9)
        assert found.values[0] == pytest.approx(exact[-1].item(), rel=0.03)
        for value, bar in zip(found.values, found.error_bars, strict=True):
            assert (exact - value).abs().min().item() <= 2 * bar
        start = sampling.normal(objective.dim, sampling.generator_for(step, "cold"), objective.origin)
        cold += lanczos(lambda v, h=hessian: h @ v, start, request).num_matvecs
    assert tracked * factor <= cold
    assert Update.STARTED_OVER not in updates


def test_still_weights_cost_one_product():
    problem = network()
    objective = Objective(problem.model, problem.loader())
    for k in (1, 4):
        tracker = EigenTracker(k)
        first = tracker.update(objective)
        assert first.update is Update.STARTED_OVER
        assert "nothing was tracked before" in first.message
        again = tracker.update(objective)
        assert (again.update, again.num_matvecs) == (Update.KEPT, 1)
        assert again.values == pytest.approx(first.values, rel=0.02)
        assert again.error_bars[0] <= 3e-2 * math.hypot(*again.values)


def test_the_error_bar_of_one_product_holds():
    """At weights that moved a little: some eigenvalue lies within the residual of the Rayleigh quotient."""
    problem = network()
    objective = Objective(problem.model, problem.loader())
    tracker = EigenTracker(1, tolerance=0.3)
    tracker.update(objective)
    for seed in range(10):
        with torch.no_grad():
            for p in problem.model.parameters():
                p.add_(0.003 * torch.randn(p.shape, dtype=F64, generator=torch.Generator().manual_seed(seed)))
        found = tracker.update(objective)
        assert found.update is Update.KEPT
        exact = torch.linalg.eigvalsh(problem.dense_hessian())
        assert (exact - found.values[0]).abs().min().item() <= found.error_bars[0]
        assert found.values[0] <= exact[-1].item()


def test_another_direction_that_takes_over_is_found():
    """Two directions that never mix: noise alone brings in the second, when it becomes the larger one."""
    scale = torch.tensor([1.0, 0.5, 0.1, 0.1, 0.1, 0.1], dtype=F64)
    point = oracles.Point(torch.zeros(6, dtype=F64))
    objective = Objective(point, [torch.zeros(1)], loss_fn=lambda m, b: (0.5 * scale * m().square()).sum())
    tracker = EigenTracker(1, renew_every=None)
    assert tracker.update(objective).values[0] == pytest.approx(1.0, rel=1e-3)
    for step in range(12):
        scale[1] = 0.5 + 0.4 * step
        found = tracker.update(objective)
        if step % 3 == 2:
            scale[0] = 1.0 + 0.2 * step  # so that the vector at hand has to be looked at again
    assert found.update is not Update.STARTED_OVER
    assert found.values[0] <= scale.max().item() + 1e-9


def test_it_starts_over_and_says_so():
    problem = network()
    objective = Objective(problem.model, problem.loader())
    tracker = EigenTracker(2, renew_every=3)
    updates = [tracker.update(objective) for _ in range(5)]
    assert [u.update is Update.STARTED_OVER for u in updates] == [True, False, False, False, True]
    assert "since 3 updates were made from the last vectors" in updates[4].message
    assert "was" in updates[4].message
    other = Objective(problem.model, problem.loader(), select="2.*")
    moved = tracker.update(other)
    assert moved.update is Update.STARTED_OVER
    assert "84 parameters" in moved.message


def test_refining_in_vain_starts_over():
    problem = network()
    objective = Objective(problem.model, problem.loader())
    tracker = EigenTracker(3, num_matvecs=6, tolerance=1e-6)
    assert not tracker.update(objective).converged
    with torch.no_grad():
        for p in problem.model.parameters():
            p.add_(0.1)
    found = tracker.update(objective)
    assert found.update is Update.STARTED_OVER
    assert "refining took 6 products in vain" in found.message
    assert found.num_matvecs == 12
    assert not found.converged


def test_state_goes_through_a_checkpoint():
    problem = network()
    objective = Objective(problem.model, problem.loader())
    tracker, resumed = EigenTracker(2), EigenTracker(2)
    tracker.update(objective)
    resumed.load_state_dict(tracker.state_dict())
    with torch.no_grad():
        problem.model[0].weight.mul_(1.01)
    assert tracker.update(objective) == resumed.update(objective)


def test_more_eigenvalues_than_parameters_are_all_of_them():
    point = oracles.Point(torch.zeros(3, dtype=F64))
    h = torch.tensor([3.0, 2.0, 1.0], dtype=F64)
    objective = Objective(point, [torch.zeros(1)], loss_fn=lambda m, b: (0.5 * h * m().square()).sum())
    tracker = EigenTracker(5)
    for _ in range(3):
        assert tracker.update(objective).values == pytest.approx([3, 2, 1], rel=0.02)


def test_products_that_are_not_finite_are_an_error(monkeypatch):
    problem = network()
    objective = Objective(problem.model, problem.loader())
    tracker = EigenTracker(1)
    tracker.update(objective)
    monkeypatch.setattr(Objective, "hvp", lambda self, vector, perturbation=None: vector * math.nan)
    with pytest.raises(ArithmeticError, match="not finite"):
        tracker.update(objective)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"k": 0}, "k must be at least 1"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"renew_every": 0}, "renew_every must be None"),
    ],
)
def test_bad_settings_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        EigenTracker(**settings)
