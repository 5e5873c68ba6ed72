"""Float32 sums against float64 ones."""

import pytest
import torch

from sharpness_plugins import reductions

LENGTHS = [0, 1, 4095, 4096, 4097, 256 * 4096 - 1, 256 * 4096 + 5000]


@pytest.fixture(scope="module")
def long_vectors():
    """1e7 numbers with a mean, on which a plain float32 dot product loses its digits."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(10**7, generator=generator).mul_(1e-3).add_(1) for _ in range(2)]


def test_long_float32_sums_keep_six_digits_where_torch_dot_does_not(long_vectors):
    x, y = long_vectors
    exact = x.double() @ y.double()
    assert reductions.dot(x, y).item() == pytest.approx(exact.item(), rel=1e-6)
    assert reductions.norm(x).item() == pytest.approx(x.double().norm().item(), rel=1e-6)
    assert reductions.total(x).item() == pytest.approx(x.double().sum().item(), rel=1e-6)
    both = torch.stack([x, y])
    for product in (reductions.matvec, reductions._batched_matvec):  # the second is for other devices
        torch.testing.assert_close(product(both, y), both.double() @ y.double(), rtol=2e-6, atol=0)
    if torch.backends.mkl.is_available():  # other libraries block their sums
        assert abs(torch.dot(x, y).item() / exact.item() - 1) > 1e-4, "the vectors are no test"


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("stride", [1, 3])
def test_every_element_counts_once_at_any_length(length, stride):
    x = torch.arange(1, length * stride + 1, dtype=torch.float64)[::stride] / 1000
    y = torch.cos(x)
    assert reductions.total(x).item() == pytest.approx(x.sum().item(), rel=1e-12, abs=1e-12)
    assert reductions.dot(x, y).item() == pytest.approx((x * y).sum().item(), rel=1e-9, abs=1e-6)
    assert reductions.norm(x).item() == pytest.approx(x.square().sum().sqrt().item(), rel=1e-12)


def test_signs_that_cancel_give_an_exact_zero():
    x = torch.tensor([1.0, -1.0]).repeat(100_000)
    assert reductions.total(x).item() == 0.0


@pytest.mark.parametrize("length", [1, 1023, 1024, 1025, 2**15, 2**15 + 1, 100_000])
@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("product", [reductions.matvec, reductions._batched_matvec])
def test_matrix_products_of_any_length_also_of_part_of_a_matrix(length, rows, product):
    matrix = torch.cos(torch.arange(2.0 * (rows + 2) * length, dtype=torch.float64)).view(rows + 2, -1)[1:-1, ::2]
    vector = torch.sin(torch.arange(2.0 * length, dtype=torch.float64))[::2]
    found = product(matrix.contiguous(), vector)
    torch.testing.assert_close(found, matrix @ vector, rtol=1e-10, atol=1e-9)
    assert found.dtype == torch.float64
    wide = torch.zeros(rows, length + 7, dtype=torch.float64)
    wide[:, 3 : 3 + length] = matrix
    torch.testing.assert_close(product(wide[:, 3 : 3 + length], vector.contiguous()), found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_answers_are_float64_scalars(dtype):
    x = torch.ones(5, dtype=dtype)
    for answer in (reductions.total(x), reductions.dot(x, x), reductions.norm(x)):
        assert answer.dtype == torch.float64
        assert answer.ndim == 0


def test_vectors_of_different_lengths_are_refused():
    with pytest.raises((ValueError, RuntimeError)):
        reductions.dot(torch.ones(5000), torch.ones(4000))
