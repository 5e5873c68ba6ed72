"""Traces and norms of matrices of known spectrum: unbiased, as accurate as they say, exact where the space is exhausted."""

from __future__ import annotations

import math

import pytest
import torch

import oracles
from sharpness_plugins import MeasurementStopped, sampling
from sharpness_plugins.krylov import LanczosRequest
from sharpness_plugins.lanczos import lanczos
from sharpness_plugins.traces import Estimate, Probes, hutch_pp, mean_of, on_sphere, signs, xtrace

F64 = torch.float64
SEEDS = 100
DIM = 150


def rng(seed: int) -> torch.Generator:
    return sampling.generator_for(seed, "traces")


def network_like() -> torch.Tensor:
    """A few large eigenvalues and a bulk around zero, as of a trained network."""
    top = torch.tensor([30.0, 28, 23, 21, 19, 10, 8, 5, 4, 3], dtype=F64)
    bulk = 0.3 * torch.randn(DIM - 10, dtype=F64, generator=torch.Generator().manual_seed(0))
    return oracles.with_spectrum(torch.cat([top, bulk]))


def decaying() -> torch.Tensor:
    return oracles.with_spectrum(torch.arange(1, DIM + 1, dtype=F64) ** -1.5)


def counted(matrix: torch.Tensor):
    used = []

    def matvec(v: torch.Tensor) -> torch.Tensor:
        used.append(1)
        return matrix @ v

    return matvec, used


def krylov_run(matvec, like: torch.Tensor, steps: int, generator: torch.Generator):
    request = LanczosRequest(k=steps, guard=0, num_matvecs=steps, max_basis=steps + 2, keep_basis=True)
    return lanczos(matvec, sampling.normal(len(like), generator, like), request, generator=generator)


def deflated(matvec, like: torch.Tensor, generator: torch.Generator) -> Estimate:
    return Probes(matvec, like, generator, run=krylov_run(matvec, like, 15, generator)).trace(15)


METHODS = {
    "deflated": deflated,
    "hutchinson": lambda matvec, like, generator: Probes(matvec, like, generator).trace(30),
    "hutch++": lambda matvec, like, generator: hutch_pp(matvec, like, 30, generator),
    "xtrace": lambda matvec, like, generator: xtrace(matvec, like, 30, generator),
}


@pytest.mark.parametrize(
    ("method", "matrix", "seeds", "least"),
    [
        ("deflated", network_like(), 200, 0.93),
        ("deflated", decaying(), 100, 0.90),
        ("hutchinson", network_like(), 100, 0.90),
        ("hutch++", network_like(), 100, 0.87),
        ("xtrace", network_like(), 100, 0.87),  # its terms are exchangeable, not independent
    ],
    ids=["deflated", "deflated, decaying", "hutchinson", "hutch++", "xtrace"],
)
def test_standard_errors_tell_the_truth(method, matrix, seeds, least):
    """Mean zero error, spread as claimed, and 95 % intervals that cover as often, as far as so many seeds can tell."""
    truth = matrix.trace().item()
    estimates = [METHODS[method](lambda v: matrix @ v, torch.zeros(DIM, dtype=F64), rng(s)) for s in range(seeds)]
    errors = torch.tensor([e.value - truth for e in estimates], dtype=F64)
    claimed = torch.tensor([e.standard_error for e in estimates], dtype=F64).square().mean().sqrt()
    spread = errors.std()
    assert errors.mean().abs() < 4 * spread / seeds**0.5
    assert 0.75 < claimed / spread < 1.25
    covered = sum(low <= truth <= high for low, high in (e.interval() for e in estimates)) / seeds
    assert least <= covered <= 0.99


def test_deflation_is_as_good_as_xtrace_and_far_better_than_hutchinson():
    matrix = network_like()
    truth = matrix.trace().item()
    error = {}
    for name, method in METHODS.items():
        matvec, used = counted(matrix)
        found = [method(matvec, torch.zeros(DIM, dtype=F64), rng(s)).value / truth - 1 for s in range(30)]
        error[name] = torch.tensor(found).square().mean().sqrt().item()
        assert len(used) == 30 * 30, name
    assert error["deflated"] < 0.02
    assert error["deflated"] < 1.2 * error["xtrace"]
    assert error["deflated"] < 0.25 * error["hutchinson"]


def test_xtrace_is_the_naive_average_over_left_out_columns():
    """Against the definition: for every column, a basis of the other products, and the trace on it and beside it."""
    matrix, count = network_like(), 8
    omegas = [on_sphere(torch.zeros(DIM, dtype=F64), g) for g in [rng(3)] for _ in range(count)]
    products = torch.stack([matrix @ omega for omega in omegas], dim=1)
    terms = []
    for i, omega in enumerate(omegas):
        q, _ = torch.linalg.qr(torch.cat([products[:, :i], products[:, i + 1 :]], dim=1))
        rest = omega - q @ (q.T @ omega)
        terms.append((q.T @ matrix @ q).trace() + (DIM - count + 1) / rest.square().sum() * (rest @ matrix @ rest))
    expected = torch.stack(terms)
    found = xtrace(lambda v: matrix @ v, torch.zeros(DIM, dtype=F64), 2 * count, rng(3))
    assert found.value == pytest.approx(expected.mean().item(), rel=1e-9)
    assert found.standard_error == pytest.approx(expected.std().item() / count**0.5, rel=1e-7)


@pytest.mark.parametrize("deflate", [False, True])
def test_blocks_are_unbiased_and_add_up_to_the_trace(deflate):
    matrix, like = network_like(), torch.zeros(DIM, dtype=F64)
    blocks = {"a": slice(0, 40), "b": slice(40, 41), "c": slice(41, DIM)}
    found = {name: [] for name in blocks}
    for seed in range(SEEDS):
        generator = rng(seed)
        run = krylov_run(lambda v: matrix @ v, like, 12, generator) if deflate else None
        probes = Probes(lambda v: matrix @ v, like, generator, run=run, blocks=blocks)
        parts = probes.traces_of_blocks(8)
        assert sum(part.value for part in parts.values()) == pytest.approx(probes.trace(8).value, rel=1e-9)
        for name, part in parts.items():
            found[name].append((part.value, part.standard_error))
    for name, block in blocks.items():
        values, errors = torch.tensor(found[name], dtype=F64).T
        exact = matrix.diagonal()[block].sum()
        assert (values.mean() - exact).abs() < 4 * values.std() / SEEDS**0.5
        assert 0.75 < errors.square().mean().sqrt() / values.std() < 1.33


def test_frobenius_norm_from_the_same_probes():
    matrix, like = network_like(), torch.zeros(DIM, dtype=F64)
    truth, covered, errors = matrix.square().sum().item(), 0, []
    for seed in range(SEEDS):
        matvec, used = counted(matrix)
        generator = rng(seed)
        probes = Probes(matvec, like, generator, run=krylov_run(matvec, like, 15, generator))
        probes.trace(15)
        square = probes.squared_norm(15)
        assert len(used) == 30  # nothing more than for the trace
        low, high = square.interval()
        covered += low <= truth <= high
        errors.append(square.value / truth - 1)
    assert 0.9 <= covered / SEEDS <= 0.99
    assert abs(sum(errors)) / SEEDS < 4 * torch.tensor(errors).std().item() / SEEDS**0.5
    assert torch.tensor(errors).square().mean().sqrt() < 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_matrix_of_low_rank_is_exact(dtype):
    q = oracles.orthogonal(50, 0)[:, :4].to(dtype)
    matrix = (q * torch.tensor([5.0, -3, 2, 1], dtype=dtype)) @ q.T
    like, accuracy = torch.zeros(50, dtype=dtype), 200 * torch.finfo(dtype).eps
    for method in (hutch_pp, xtrace):
        found = method(lambda v: matrix @ v, like, 24, rng(0))
        assert found.value == pytest.approx(5, abs=accuracy)
        assert found.standard_error <= accuracy


def test_a_basis_of_the_whole_space_needs_no_probes():
    matrix = oracles.with_spectrum(torch.arange(-3, 5, dtype=F64))
    matvec, used = counted(matrix)
    like = torch.zeros(8, dtype=F64)
    probes = Probes(
        matvec, like, rng(0), run=krylov_run(matvec, like, 8, rng(0)), blocks={"a": slice(0, 3), "b": slice(3, 8)}
    )
    assert probes.trace(10) == Estimate(pytest.approx(4.0), 0.0, 0)
    assert probes.squared_norm(10).value == pytest.approx(44.0)
    assert probes.traces_of_blocks(10)["a"].value == pytest.approx(matrix.diagonal()[:3].sum().item())
    assert len(used) == 8


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_operator_has_trace_zero(method):
    found = METHODS[method](torch.zeros_like, torch.zeros(40, dtype=F64), rng(0))
    assert (found.value, found.standard_error) == (0.0, 0.0)


@pytest.mark.parametrize("method", METHODS)
def test_products_that_are_not_finite_are_an_error(method):
    with pytest.raises(ArithmeticError, match="not finite"):
        METHODS[method](lambda v: v * math.nan, torch.zeros(40, dtype=F64), rng(0))


def test_tiny_scales_lose_nothing():
    matrix = 1e-9 * network_like()
    for name, method in METHODS.items():
        small = method(lambda v: matrix @ v, torch.zeros(DIM, dtype=F64), rng(0))
        large = method(lambda v: 1e9 * (matrix @ v), torch.zeros(DIM, dtype=F64), rng(0))
        assert small.value == pytest.approx(1e-9 * large.value, rel=1e-9), name


def test_intervals_are_students():
    estimate = mean_of(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64), offset=10.0)
    assert estimate.value == 12.5
    assert estimate.standard_error == pytest.approx(math.sqrt(5 / 3) / 2)
    low, high = estimate.interval()
    assert (high - low) / 2 == pytest.approx(3.182446 * estimate.standard_error, rel=1e-6)
    alone = mean_of(torch.tensor([1.0]))
    assert math.isnan(alone.standard_error)
    assert alone.interval() == (-math.inf, math.inf)
    assert mean_of(torch.empty(0), 3.0).interval() == (3.0, 3.0)


def test_signs_are_signs():
    drawn = signs(torch.zeros(10001), rng(0))
    assert drawn.dtype == torch.float32
    assert set(drawn.tolist()) == {-1.0, 1.0}
    assert abs(drawn.mean().item()) < 0.05


@pytest.mark.parametrize(("method", "fewest"), [(hutch_pp, 6), (xtrace, 4)])
def test_too_few_products_are_refused(method, fewest):
    with pytest.raises(ValueError, match=f"at least {fewest} products, got {fewest - 1}"):
        method(lambda v: v, torch.zeros(5, dtype=F64), fewest - 1, rng(0))


def stopping_after(matrix: torch.Tensor, products: int):
    """A product that never comes back from its ``products + 1``-th call."""
    made: list[torch.Tensor] = []

    def matvec(v: torch.Tensor) -> torch.Tensor:
        if len(made) == products:
            raise MeasurementStopped
        made.append(v)
        return matrix @ v

    return matvec


def by_hand(matrix: torch.Tensor, omegas: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([omega @ matrix @ omega for omega in omegas])


@pytest.mark.parametrize("products", [2, 5, 10, 14, 20, 21, 22, 29])  # 10 for the range, 10 for its trace, 10 probes
def test_a_stopped_hutch_pp_is_what_its_products_tell(products):
    matrix, like, g = network_like(), torch.zeros(DIM, dtype=F64), rng(3)
    found = hutch_pp(stopping_after(matrix, products), like, 30, rng(3))
    omegas = [signs(like, g) for _ in range(10)]
    if products < 22:
        expected, offset = by_hand(matrix, omegas[:products]), 0.0
        assert found.instead.startswith(f"Hutchinson's estimate by {min(products, 10)} products")
    else:
        q, _ = torch.linalg.qr(torch.stack([matrix @ omega for omega in omegas], dim=1))
        probes = [v - q @ (q.T @ v) for v in (signs(like, g) for _ in range(products - 20))]
        expected, offset = by_hand(matrix, probes), (q.T @ matrix @ q).trace().item()
        assert found.instead == f"Hutch++ with {products - 20} of 10 probes"
    assert found.value == pytest.approx(offset + expected.mean().item(), rel=1e-9)
    assert found.standard_error == pytest.approx(expected.std().item() / len(expected) ** 0.5, rel=1e-7)
    assert found.degrees == len(expected) - 1


@pytest.mark.parametrize("products", [2, 9, 15, 22, 23, 27, 29])  # 15 for the range, 15 for the matrix on it
def test_a_stopped_xtrace_is_that_of_fewer_test_vectors_or_hutchinsons(products):
    matrix, like, g = network_like(), torch.zeros(DIM, dtype=F64), rng(3)
    found = xtrace(stopping_after(matrix, products), like, 30, rng(3))
    if products < 23:
        expected = by_hand(matrix, [on_sphere(like, g) for _ in range(min(products, 15))])
        assert found.value == pytest.approx(expected.mean().item(), rel=1e-9)
        assert found.standard_error == pytest.approx(expected.std().item() / len(expected) ** 0.5, rel=1e-7)
        assert found.instead.startswith(f"Hutchinson's estimate by {min(products, 15)} products")
    else:
        expected = xtrace(lambda v: matrix @ v, like, 2 * (products - 15), rng(3))
        assert found.value == pytest.approx(expected.value, rel=1e-9)
        assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-7)
        assert found.instead == f"XTrace with {products - 15} of 15 test vectors"


@pytest.mark.parametrize("products", [0, 1])
@pytest.mark.parametrize("method", [hutch_pp, xtrace])
def test_a_run_that_is_stopped_before_it_has_an_error_bar_has_no_number(method, products):
    with pytest.raises(MeasurementStopped):
        method(stopping_after(network_like(), products), torch.zeros(DIM, dtype=F64), 30, rng(0))


@pytest.mark.parametrize("method", [hutch_pp, xtrace])
def test_an_exhausted_range_whose_trace_was_not_finished_is_not_called_exact(method):
    matrix = oracles.with_spectrum(torch.tensor([5.0, 3.0] + [0.0] * (DIM - 2), dtype=F64))
    like = torch.zeros(DIM, dtype=F64)
    whole = method(lambda v: matrix @ v, like, 30, rng(0))
    assert whole.value == pytest.approx(8.0, rel=1e-10)
    found = method(stopping_after(matrix, 4), like, 30, rng(0))  # 3 products find the range
    assert found.instead.startswith("Hutchinson's estimate by 3 products")
    assert found.standard_error > 0
