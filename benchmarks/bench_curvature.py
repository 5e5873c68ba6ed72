"""Curvature metrics: how accurate the trace is, what one run for all costs, what tracking saves; curvlinops beside them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.curvature.networks import dense_hessian, digits_cnn
from benchmarks.measuring import clock, repeat
from benchmarks.problems import problem
from sharpness_plugins import measure_sharpness, sampling
from sharpness_plugins.experiments.data import digits_split
from sharpness_plugins.gauss_newton import OutputProducts
from sharpness_plugins.krylov import LanczosRequest
from sharpness_plugins.krylov_pass import KrylovPass
from sharpness_plugins.lanczos import lanczos
from sharpness_plugins.metrics import HessianBottom, HessianFrobenius, HessianTrace, SpectralDensity
from sharpness_plugins.metrics.trace import num_probes
from sharpness_plugins.objective import Objective
from sharpness_plugins.operators import from_linear_operator
from sharpness_plugins.traces import Estimate, Probes, hutch_pp, xtrace
from sharpness_plugins.tracking import EigenTracker

FAMILY = (HessianTrace(), HessianFrobenius(), SpectralDensity(), HessianBottom())
PRODUCTS, SEEDS = 30, 200
STEPS = 20


@functools.cache
def hessian_of_cnn(state: str) -> Tensor:
    """Exact, in float64: two minutes."""
    settings = {"whole batches": (60, 500), "batches of 64": (60, 64), "untrained": (0, 500)}[state]
    return dense_hessian(digits_cnn(steps=settings[0], batch_size=settings[1], dtype=torch.float64))


def traced(method: str, hessian: Tensor, seed: int) -> Estimate:
    """A trace from thirty products, as ``HessianTrace`` makes it."""
    generator, like = sampling.generator_for(seed, "trace"), torch.zeros(len(hessian), dtype=torch.float64)

    def matvec(vector: Tensor) -> Tensor:
        return hessian @ vector

    if method == "xtrace":
        return xtrace(matvec, like, PRODUCTS, generator)
    if method == "hutch++":
        return hutch_pp(matvec, like, PRODUCTS, generator)
    if method == "hutchinson":
        return Probes(matvec, like, generator).trace(PRODUCTS)
    metric = HessianTrace(num_matvecs=PRODUCTS)
    shared = KrylovPass(from_linear_operator(hessian), [metric.krylov_need()], generator)
    return shared.probes.trace(num_probes(shared, PRODUCTS))


@pytest.mark.benchmark(group="trace", timer=clock)
@pytest.mark.parametrize("method", ["deflated", "xtrace", "hutch++", "hutchinson"])
@pytest.mark.parametrize("state", ["whole batches", "batches of 64", "untrained"])
def test_trace_with_thirty_products(benchmark: Any, state: str, method: str) -> None:
    """From 200 seeds, against the dense Hessian: relative error, and how often Student's 95 % interval has the truth in it.

    What a basis of 15 can do is bounded by what it leaves to 15 probes: ``limit`` is the error with the 15 eigenvectors of
    the largest magnitude given for nothing.
    """
    hessian = hessian_of_cnn(state)
    truth, spectrum = hessian.trace().item(), torch.linalg.eigvalsh(hessian)
    rest = spectrum[spectrum.abs().argsort()][:-15].square().sum().item()
    estimates = benchmark.pedantic(lambda: [traced(method, hessian, seed) for seed in range(SEEDS)], rounds=1)
    errors = torch.tensor([estimate.value / truth - 1 for estimate in estimates])
    covered = sum(low <= truth <= high for low, high in (estimate.interval() for estimate in estimates)) / SEEDS
    found = {"relative_rmse": errors.square().mean().sqrt().item(), "covered": covered}
    benchmark.extra_info.update(
        dim=len(hessian), num_matvecs=PRODUCTS, limit=(2 * rest / 15) ** 0.5 / abs(truth), ratios={}, **found
    )
    assert 0.85 <= covered <= 0.99
    if state == "whole batches" and method in ("deflated", "xtrace"):
        assert found["relative_rmse"] <= 0.01


@pytest.mark.benchmark(group="one run for many", timer=clock)
def test_together(benchmark: Any) -> None:
    shared = problem("cnn")
    alone = {m.name: measure_sharpness(shared.model, shared.batches, m, progress=False)[m.name].cost for m in FAMILY}
    report = measure_sharpness(shared.model, shared.batches, FAMILY, progress=False)
    together = sum(result.cost.hvps for result in report.values() if result.cost is not None)
    dearest = max(cost.hvps for cost in alone.values() if cost is not None)
    assert together <= 1.1 * dearest
    repeat(benchmark, lambda: measure_sharpness(shared.model, shared.batches, FAMILY, progress=False), shared, rounds=3)
    benchmark.extra_info.update(dim=shared.dim, counts={"together": together, "dearest": dearest})


@pytest.mark.benchmark(group="tracking", timer=clock)
@pytest.mark.parametrize(("k", "least"), [(1, 2.5), (5, 1.2)])
def test_tracking(benchmark: Any, k: int, least: float) -> None:
    """Every step of SGD on a network of digits, against runs from random vectors to the same tolerance."""
    samples = digits_split(0).train
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    draws = torch.Generator().manual_seed(0)

    def train() -> None:
        rows = torch.randint(0, len(samples.labels), (64,), generator=draws)
        optimizer.zero_grad()
        torch.autograd.backward(functional.cross_entropy(model(samples.inputs[rows]), samples.labels[rows]))
        optimizer.step()

    for _ in range(60):
        train()
    batches = [(samples.inputs, samples.labels)]
    tracker, objective = EigenTracker(k), Objective(model, batches)
    request = LanczosRequest(k=k, tolerance=3e-2)
    tracker.update(objective)
    tracked = cold = 0
    for step in range(STEPS):
        train()
        tracked += tracker.update(objective).num_matvecs
        here = Objective(model, batches)
        start = sampling.normal(here.dim, sampling.generator_for(step, "cold"), here.origin)
        with here.session():
            cold += lanczos(here.hvp, start, request).num_matvecs
    assert tracked * least <= cold
    benchmark.pedantic(lambda: tracker.update(objective), rounds=3)
    benchmark.extra_info.update(dim=objective.dim, counts={"tracked": tracked / STEPS, "cold": cold / STEPS})


@pytest.mark.benchmark(group="Gauss–Newton product", timer=clock)
@pytest.mark.parametrize("matrix", ["gauss_newton", "empirical_fisher"])
def test_product_agrees_with_curvlinops(benchmark: Any, matrix: str) -> None:
    curvlinops = pytest.importorskip("curvlinops", reason="the peer of this comparison: pip install curvlinops-for-pytorch")
    shared = problem("cnn")
    kind = {"gauss_newton": "GGNLinearOperator", "empirical_fisher": "EFLinearOperator"}[matrix]
    peer = getattr(curvlinops, kind)(
        shared.model, nn.CrossEntropyLoss(), list(shared.model.parameters()), shared.batches, check_deterministic=False
    )
    objective = Objective(shared.model, shared.batches)
    products = OutputProducts(objective, matrix)
    vector = sampling.normal(shared.dim, sampling.generator_for(0, "v"), objective.origin)
    found = products(vector)
    expected: Tensor = peer @ vector
    assert (found - expected).norm() <= 2e-6 * expected.norm()
    repeat(benchmark, lambda: products(vector), shared, rounds=3)
    benchmark.extra_info.update(dim=shared.dim, num_samples=shared.num_samples, how=products.how)
