"""Products with a random subspace against those with a dense float32 matrix, and the memory that they take."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.measuring import clock, peak_bytes
from sharpness_plugins.space import ParameterSpace
from sharpness_plugins.subspace import SignSubspace

COLUMNS = 100
DIM = 2**18  # of the products: 105 MB as a dense matrix
LARGE = 25_557_032  # of the memory: the parameters of a ResNet-50, 10.2 GB as a dense matrix
ROUNDS = 15


class Flat(nn.Module):
    """A model of one parameter."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))


@functools.cache
def subspace(*, regenerate: bool) -> SignSubspace:
    return SignSubspace(ParameterSpace(Flat(DIM)), COLUMNS, 2**64 - 3, regenerate=regenerate)


@functools.cache
def dense() -> Tensor:
    """The same columns, a row each, which is the faster way round for both products."""
    return torch.stack([subspace(regenerate=False).lift(unit) for unit in torch.eye(COLUMNS)])


def vectors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(COLUMNS, generator=generator), torch.randn(DIM, generator=generator)


def peer(product: str) -> Callable[[], Tensor]:
    matrix, (y, g) = dense(), vectors()
    return (lambda: torch.mv(matrix.T, y)) if product == "lift" else (lambda: torch.mv(matrix, g))


@pytest.mark.benchmark(group="subspace", timer=clock)
@pytest.mark.parametrize("product", ["lift", "restrict"])
@pytest.mark.parametrize("signs", ["packed", "regenerated"])
def test_product(benchmark: Any, signs: str, product: str) -> None:
    """One product; the ratio is to the dense one, timed in turn."""
    columns, (y, g) = subspace(regenerate=signs == "regenerated"), vectors()
    exact = dense().double()
    ratios: list[float] = []

    def work() -> Tensor:
        return columns.lift(y) if product == "lift" else columns.restrict(g)

    expected = exact.T @ y.double() if product == "lift" else exact @ g.double()
    assert (work().double() - expected).norm() <= 1e-6 * expected.norm()
    densely = peer(product)

    def timed() -> None:
        began = clock()
        densely()
        middle = clock()
        work()
        ratios.append((clock() - middle) / (middle - began))

    densely()
    benchmark.pedantic(timed, rounds=ROUNDS)
    benchmark.extra_info.update(
        dim=DIM, num_columns=COLUMNS, counts={}, ratios={"dense_products": statistics.median(ratios)}
    )


@pytest.mark.benchmark(group="subspace", timer=clock)
@pytest.mark.parametrize("signs", ["packed", "regenerated"])
def test_memory(benchmark: Any, signs: str) -> None:
    """Bytes per parameter above the vectors that go in and come out: what is kept, and the most that a product adds."""
    space, made = ParameterSpace(Flat(LARGE)), []
    y, g = torch.ones(COLUMNS), torch.ones(LARGE)

    def make() -> None:
        made.append(SignSubspace(space, COLUMNS, 1, regenerate=signs == "regenerated"))

    making = peak_bytes(make)
    kept = 0 if signs == "regenerated" else 13 * LARGE
    lifting = kept + peak_bytes(lambda: made[0].lift(y)) - 4 * LARGE
    restricting = kept + peak_bytes(lambda: made[0].restrict(g))
    per_parameter = max(making, lifting, restricting) / LARGE
    assert per_parameter <= 16
    benchmark.pedantic(made[0].restrict, args=(g,), rounds=1)
    benchmark.extra_info.update(dim=LARGE, num_columns=COLUMNS, counts={"bytes_per_parameter": per_parameter}, ratios={})
