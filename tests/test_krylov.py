"""Lanczos: prescribed spectra, residuals that bound the error, edges."""

from __future__ import annotations

import pytest
import torch

import oracles
from sharpness_plugins import krylov
from sharpness_plugins.krylov import top_ritz_pairs

F64 = torch.float64


def start(dim: int, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.randn(dim, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def counted(matrix: torch.Tensor):
    def matvec(v):
        matvec.calls += 1
        return matrix @ v

    matvec.calls = 0
    return matvec


SPECTRA = {
    "decaying": torch.cat([torch.tensor([10.0, 5, 4, 3, 2], dtype=F64), torch.linspace(1, 0, 295, dtype=F64)]),
    "plus and minus": torch.cat([torch.tensor([10.0, -10, 5, -5], dtype=F64), torch.linspace(-1, 1, 296, dtype=F64)]),
    "dominant negative": torch.cat([torch.tensor([-50.0, 8, 7, 6, 5, 4], dtype=F64), torch.linspace(-1, 1, 294, dtype=F64)]),
    "cluster": torch.cat([torch.tensor([10.0, 9.9, 9.8, 9.7, 9.6, 9.5], dtype=F64), torch.linspace(-1, 1, 294, dtype=F64)]),
    "spike": torch.cat([torch.tensor([1e6, 5, 4, 3, 2, 1.5], dtype=F64), torch.linspace(0, 1, 294, dtype=F64)]),
}


@pytest.mark.parametrize("which", ["LA", "LM"])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_prescribed_spectra(spectrum, scale, which):
    eigenvalues = scale * SPECTRA[spectrum]
    key = eigenvalues.abs() if which == "LM" else eigenvalues
    expected = eigenvalues[torch.argsort(key, descending=True)][:4]
    matvec = counted(oracles.with_spectrum(eigenvalues))
    found = top_ritz_pairs(matvec, start(300), 4, num_matvecs=200, tolerance=1e-6, which=which)
    assert found.converged
    assert matvec.calls == found.num_matvecs < 200
    assert found.values.abs().tolist() == sorted(found.values.abs().tolist(), reverse=True) or which == "LA"
    torch.testing.assert_close(found.values.sort().values, expected.sort().values, rtol=1e-9, atol=0)  # ± pairs tie
    assert (found.residuals <= 1e-6 * found.values.abs() * (1 + 1e-9)).all()


@pytest.mark.parametrize("tolerance", [0.1, 1e-2, 1e-4])
@pytest.mark.parametrize("seed", range(5))
def test_an_eigenvalue_lies_within_each_residual(tolerance, seed):
    eigenvalues = SPECTRA["plus and minus"]
    matrix = oracles.with_spectrum(eigenvalues, seed)
    found = top_ritz_pairs(counted(matrix), start(300, seed), 5, num_matvecs=100, tolerance=tolerance, return_vectors=True)
    distance = (found.values[:, None] - eigenvalues).abs().min(dim=1).values
    assert (distance <= found.residuals + 1e-12).all()
    # and the residual is what it says: ‖A x - θ x‖
    x = found.vectors
    torch.testing.assert_close((x @ matrix - found.values[:, None] * x).norm(dim=1), found.residuals, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(x @ x.T, torch.eye(5, dtype=F64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", range(30))
def test_nothing_is_missed_but_inside_a_cluster_narrower_than_the_tolerance(seed):
    eigenvalues = torch.sort(torch.randn(200, generator=torch.Generator().manual_seed(seed), dtype=F64).pow(3)).values
    found = top_ritz_pairs(counted(oracles.with_spectrum(eigenvalues, seed)), start(200, seed), 5, num_matvecs=200)
    assert found.converged
    torch.testing.assert_close(found.values, eigenvalues.flip(0)[:5], rtol=2e-2, atol=0)


def test_no_ghost_copies_however_long_it_runs():
    """Without re-orthogonalization a dominant eigenvalue comes back again and again, with tiny residuals."""
    eigenvalues = torch.cat([torch.tensor([1000.0], dtype=F64), torch.linspace(0, 1, 199, dtype=F64)])
    matrix = oracles.with_spectrum(eigenvalues).float()
    found = top_ritz_pairs(counted(matrix), start(200, dtype=torch.float32), 10, num_matvecs=200, tolerance=1e-5)
    assert (found.values[1:] < 1.01).all()


@pytest.mark.parametrize("k", [1, 3, 6])
def test_the_whole_space(k):
    eigenvalues = torch.tensor([3.0, 3.0, 3.0, -1.0, 0.5, 0.0], dtype=F64)
    found = top_ritz_pairs(counted(oracles.with_spectrum(eigenvalues)), start(6), k, num_matvecs=50, tolerance=1e-9)
    expected = eigenvalues.sort(descending=True).values[:k]
    torch.testing.assert_close(found.values[:1], expected[:1], rtol=1e-10, atol=1e-12)
    assert found.converged
    if k == 6:  # only the exhausted space shows multiplicities
        torch.testing.assert_close(found.values, expected, rtol=1e-10, atol=1e-12)
        assert found.num_matvecs == 6
        assert found.residuals.tolist() == [0.0] * 6


def test_an_eigenvector_as_start_does_not_end_the_search():
    eigenvalues = torch.arange(10.0, 0, -1, dtype=F64)
    found = top_ritz_pairs(counted(torch.diag(eigenvalues)), torch.eye(10, dtype=F64)[7], 3, num_matvecs=50)
    torch.testing.assert_close(found.values, eigenvalues[:3], rtol=1e-3, atol=0)


def test_the_zero_operator():
    found = top_ritz_pairs(torch.zeros_like, start(8), 3, num_matvecs=8)
    assert found.values.tolist() == [0, 0, 0]
    assert found.converged


def test_one_product_gives_the_rayleigh_quotient_and_is_not_called_converged():
    matrix = oracles.with_spectrum(SPECTRA["decaying"])
    v = start(300)
    found = top_ritz_pairs(counted(matrix), v, 1, num_matvecs=1)
    assert found.values[0] == pytest.approx((v @ matrix @ v / (v @ v)).item())
    assert found.residuals[0] == pytest.approx((matrix @ v / v.norm() - found.values[0] * v / v.norm()).norm().item())
    assert not found.converged


def test_an_exhausted_budget_is_said_and_gives_lower_bounds():
    eigenvalues = torch.linspace(0, 1, 300, dtype=F64)
    found = top_ritz_pairs(counted(oracles.with_spectrum(eigenvalues)), start(300), 3, num_matvecs=6)
    assert not found.converged
    assert (found.values <= eigenvalues.flip(0)[:3]).all()


def test_float32_keeps_its_digits_on_long_vectors():
    """A rank-one operator along a constant vector, where plain float32 dot products lose digits."""
    n = 4_000_000
    u = torch.full((n,), 1.0)
    found = top_ritz_pairs(
        lambda v: u * (u.double() @ v.double() / n).float(), u + 0.1 * start(n, dtype=torch.float32), 1, num_matvecs=5
    )
    assert found.values[0] == pytest.approx(1.0, rel=2e-6)


@pytest.mark.parametrize("max_basis", [5, 6, 8, 14, 40, None])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_a_restarted_basis_finds_the_same(spectrum, max_basis):
    eigenvalues = SPECTRA[spectrum]
    matvec = counted(oracles.with_spectrum(eigenvalues))
    found = top_ritz_pairs(matvec, start(300), 2, num_matvecs=600, tolerance=1e-6, max_basis=max_basis, return_vectors=True)
    assert found.converged
    torch.testing.assert_close(found.values, eigenvalues.sort(descending=True).values[:2], rtol=1e-9, atol=0)
    x = found.vectors
    true_residuals = torch.stack([matvec(row) - value * row for row, value in zip(x, found.values, strict=True)]).norm(dim=1)
    torch.testing.assert_close(true_residuals, found.residuals, rtol=1e-3, atol=1e-9 * eigenvalues.abs().max().item())


def test_restarts_cost_few_products():
    eigenvalues = SPECTRA["decaying"]
    products = [
        top_ritz_pairs(
            counted(oracles.with_spectrum(eigenvalues)), start(300), 5, num_matvecs=300, max_basis=size, guard=1
        ).num_matvecs
        for size in (300, 14)
    ]
    assert products[1] <= 1.5 * products[0]


def test_memory_bounds_the_basis_and_is_checked_before_it_is_used(monkeypatch):
    matrix = oracles.with_spectrum(SPECTRA["decaying"])
    vector = 8 * 300
    monkeypatch.setattr(krylov, "free_bytes", lambda device: 5 * vector)
    found = top_ritz_pairs(counted(matrix), start(300), 2, num_matvecs=300, tolerance=1e-6)
    torch.testing.assert_close(found.values, SPECTRA["decaying"][:2], rtol=1e-9, atol=0)
    monkeypatch.setattr(krylov, "free_bytes", lambda device: 4 * vector)
    with pytest.raises(MemoryError, match=r"basis of 5 vectors, the fewest for 3 Ritz pairs.*fewer eigenvalues"):
        top_ritz_pairs(counted(matrix), start(300), 2, num_matvecs=300)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"k": 0}, "k must be between 1 and the number of parameters, 5, got 0"),
        ({"k": 6}, "got 6"),
        ({"num_matvecs": 1}, "at least as many products"),
        ({"which": "SA"}, "which must be one of"),
        ({"tolerance": 0.0}, "tolerance must be positive"),
        ({"start": torch.zeros(5)}, "finite and not zero"),
        ({"start": torch.full((5,), float("nan"))}, "finite and not zero"),
    ],
)
def test_bad_input_is_refused(change, match):
    arguments = {"start": torch.ones(5), "k": 2, "num_matvecs": 5, **change}
    with pytest.raises(ValueError, match=match):
        top_ritz_pairs(torch.clone, arguments.pop("start"), arguments.pop("k"), **arguments)


def test_operators_that_are_not_symmetric_are_an_error():
    matrix = oracles.with_spectrum(SPECTRA["decaying"])
    matrix = matrix + torch.triu(matrix, 1)
    with pytest.raises(ArithmeticError, match="not symmetric"):
        top_ritz_pairs(counted(matrix), start(300), 3, num_matvecs=100)
    noise, symmetric = torch.Generator().manual_seed(1), oracles.with_spectrum(SPECTRA["decaying"])

    def unrepeatable(v):
        return symmetric @ v + 0.5 * torch.randn(300, generator=noise, dtype=F64)

    with pytest.raises(ArithmeticError, match="not symmetric"):
        top_ritz_pairs(unrepeatable, start(300), 3, num_matvecs=100)


def test_products_that_are_not_finite_are_an_error():
    with pytest.raises(ArithmeticError, match="product 1 with the operator is not finite"):
        top_ritz_pairs(lambda v: v * float("inf"), torch.ones(4), 1, num_matvecs=3)
