"""Lanczos and the sums under it: what it misses, its products beside ARPACK's, and its own work on long vectors."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from benchmarks.measuring import clock
from sharpness_plugins import reductions
from sharpness_plugins.krylov import LanczosRequest
from sharpness_plugins.lanczos import lanczos

NUM_SEEDS = 200
DIM = 400
RESNET_18 = 11_180_000  # parameters


def _spectrum(*leaders: float, low: float = -1.0) -> Tensor:
    bulk = torch.linspace(1, low, DIM - len(leaders), dtype=torch.float64)
    return torch.cat([torch.tensor(leaders, dtype=torch.float64), bulk])


SPECTRA = {
    "plus_and_minus": _spectrum(10, -10, 5, -5, 3, 2.5, 2),
    "nearly_plus_and_minus": _spectrum(10, -9.9, 5, -4.9, 3, 2.5, 2),
    "dominant_negative": _spectrum(-50, 8, 7, 6, 5, 4),
    "cluster": _spectrum(10, 9.999, 9.998, 9.997, 9.996),
    "multiplicity_3": _spectrum(10, 10, 10, 5, 4),
    "small": 1e-6 * _spectrum(10, 5, 4, 3, 2, low=0),
    "smaller": 1e-9 * _spectrum(10, 5, 4, 3, 2, low=0),
    "spike": _spectrum(1e6, 5, 4, 3, 2, 1.5, low=0),
}


def start_of(seed: int) -> Tensor:
    return torch.randn(DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def products_of_arpack(eigenvalues: Tensor, k: int, tolerance: float, seed: int) -> int:
    products = []

    def matvec(v: np.ndarray) -> np.ndarray:
        products.append(1)
        return eigenvalues.numpy() * v

    operator = LinearOperator((DIM, DIM), matvec=matvec, dtype=np.float64)
    eigsh(operator, k=k, ncv=2 * k + 4, tol=tolerance, which="LA", v0=start_of(seed).numpy(), maxiter=10_000)
    return len(products)


@pytest.mark.benchmark(group="krylov", timer=clock)
@pytest.mark.parametrize("name", SPECTRA)
def test_nothing_missed(benchmark: Any, name: str) -> None:
    """Top five at the default tolerance, hidden copies looked for, from 200 starting vectors."""
    eigenvalues = SPECTRA[name]
    expected = eigenvalues.sort(descending=True).values[:5]
    request = LanczosRequest(k=5, num_matvecs=500, check_multiplicity=True)

    def solve_all() -> list[int]:
        products = []
        for seed in range(NUM_SEEDS):
            generator = torch.Generator().manual_seed(seed + NUM_SEEDS)
            found = lanczos(lambda v: eigenvalues * v, start_of(seed), request, generator=generator)
            assert found.converged
            torch.testing.assert_close(found.values, expected, rtol=1e-3, atol=1e-9 * eigenvalues.abs().max().item())
            products.append(found.num_matvecs)
        return products

    products = benchmark.pedantic(solve_all, rounds=1)
    benchmark.extra_info.update(
        ratios={},
        counts={"gradients": 0, "values": 0, "hvps": statistics.mean(products), "passes": statistics.mean(products)},
    )


@pytest.mark.benchmark(group="krylov", timer=clock)
@pytest.mark.parametrize("guard", [0, 1])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-6])
@pytest.mark.parametrize("k", [1, 5, 10])
def test_products_beside_arpack(benchmark: Any, k: int, tolerance: float, guard: int) -> None:
    """To the same residuals, from the same ten vectors; ARPACK has a basis of the same size, and no guard."""
    seeds = range(10)
    arpack = {name: sum(products_of_arpack(e, k, tolerance, s) for s in seeds) for name, e in SPECTRA.items()}
    request = LanczosRequest(k=k, tolerance=tolerance, guard=guard, num_matvecs=10_000)

    def solve_all() -> dict[str, int]:
        return {
            name: sum(lanczos(lambda v, e=e: e * v, start_of(s), request).num_matvecs for s in seeds)
            for name, e in SPECTRA.items()
        }

    ours = benchmark.pedantic(solve_all, rounds=1)
    if not guard:
        assert sum(ours.values()) <= sum(arpack.values())
        assert all(ours[name] <= 1.04 * arpack[name] for name in SPECTRA)
    mean = sum(ours.values()) / len(seeds) / len(SPECTRA)
    benchmark.extra_info.update(
        ratios={},
        counts={"gradients": 0, "values": 0, "hvps": mean, "passes": mean},
        beside_arpack={name: ours[name] / arpack[name] for name in SPECTRA},
    )


@pytest.mark.benchmark(group="krylov", timer=clock)
@pytest.mark.parametrize("storage", ["full", "half"])
def test_own_work(benchmark: Any, storage: str) -> None:
    """A step of the top five at the size of ResNet-18, in units of a copy of one vector (2 words an entry)."""
    weights = torch.rand(RESNET_18, generator=torch.Generator().manual_seed(0))
    weights[:7] = torch.tensor([20.0, 15, 10, 8, 6, 5, 4])
    start = torch.randn(RESNET_18, generator=torch.Generator().manual_seed(1))
    spent: list[float] = []

    def matvec(v: Tensor) -> Tensor:
        began = clock()
        product = weights * v
        spent.append(clock() - began)
        return product

    def solve() -> int:
        spent.clear()
        return lanczos(matvec, start, LanczosRequest(k=5, storage=storage)).num_matvecs

    steps, twin = solve(), torch.empty_like(start)
    began = clock()
    for _ in range(10):
        twin.copy_(start)
    copy = (clock() - began) / 10
    began = clock()
    benchmark.pedantic(solve, rounds=1)
    own = (clock() - began - sum(spent)) / steps
    benchmark.extra_info.update(
        ratios={},
        counts={"gradients": 0, "values": 0, "hvps": steps, "passes": steps},
        copies_a_step=own / copy,
        seconds=own,
    )


@pytest.mark.benchmark(group="krylov", timer=clock)
def test_sums_of_a_hundred_million(benchmark: Any) -> None:
    """Positive numbers, whose float32 sums lose the most: 1e-6 against float64."""
    n = 100_000_000
    x = torch.rand(n, generator=torch.Generator().manual_seed(0)).mul_(1e-3).add_(1)
    exact = sum((part.double() @ part.double()).item() for part in torch.split(x, 2**24))
    assert reductions.dot(x, x).item() == pytest.approx(exact, rel=1e-6)
    assert reductions.matvec(x[None], x).item() == pytest.approx(exact, rel=1e-6)
    assert reductions.norm(x).item() == pytest.approx(exact**0.5, rel=1e-6)
    benchmark.pedantic(reductions.dot, args=(x, x), rounds=3)
    benchmark.extra_info.update(ratios={}, counts={"gradients": 0, "values": 0, "hvps": 0, "passes": 0})
