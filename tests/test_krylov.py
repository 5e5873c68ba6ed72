"""Lanczos: prescribed spectra, residuals and error bars that bound the error, nothing missed, edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import nn

import oracles
from sharpness_plugins import lanczos as lanczos_room
from sharpness_plugins.krylov import Ending, LanczosRequest
from sharpness_plugins.lanczos import lanczos
from sharpness_plugins.objective import Objective

F64 = torch.float64
NUM_SEEDS = 15  # benchmarks/bench_krylov.py runs 200


def start(dim: int, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.randn(dim, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def counted(matrix: torch.Tensor):
    def matvec(v):
        matvec.calls += 1
        return matrix @ v

    matvec.calls = 0
    return matvec


def solve(matrix, v=None, *, seed: int = 0, **settings):
    v = start(len(matrix), seed, matrix.dtype) if v is None else v
    return lanczos(counted(matrix), v, LanczosRequest(**settings), generator=torch.Generator().manual_seed(seed + 1000))


def leading(eigenvalues: torch.Tensor, k: int, which: str) -> torch.Tensor:
    key = {"LA": eigenvalues, "SA": -eigenvalues, "LM": eigenvalues.abs()}[which]
    return eigenvalues[torch.argsort(key, descending=True)][:k]


def spectrum(*leaders: float, low: float = -1.0, dim: int = 300) -> torch.Tensor:
    return torch.cat([torch.tensor(leaders, dtype=F64), torch.linspace(1, low, dim - len(leaders), dtype=F64)])


SPECTRA = {
    "decaying": spectrum(10, 5, 4, 3, 2, low=0),
    "plus and minus": spectrum(10, -10, 5, -5, 3, 2.5, 2),
    "nearly plus and minus": spectrum(10, -9.9, 5, -4.9, 3, 2.5, 2),
    "dominant negative": spectrum(-50, 8, 7, 6, 5, 4),
    "cluster": spectrum(10, 9.999, 9.998, 9.997, 9.996),
    "multiplicity 3": spectrum(10, 10, 10, 5, 4),
    "small": 1e-9 * spectrum(10, 5, 4, 3, 2, low=0),
    "spike": spectrum(1e6, 5, 4, 3, 2, 1.5, low=0),
}
SIMPLE = [name for name in SPECTRA if name not in ("cluster", "multiplicity 3")]


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
@pytest.mark.parametrize("name", SIMPLE)
def test_prescribed_spectra(name, scale, which):
    eigenvalues = scale * SPECTRA[name] * (-1 if which == "SA" else 1)
    matvec = counted(oracles.with_spectrum(eigenvalues))
    found = lanczos(matvec, start(300), LanczosRequest(k=4, tolerance=1e-6, which=which, num_matvecs=300))
    assert found.converged
    assert matvec.calls == found.num_matvecs < 300
    expected = leading(eigenvalues, 4, which)
    torch.testing.assert_close(found.values.sort().values, expected.sort().values, rtol=1e-9, atol=0)  # ± pairs tie
    keys = {"LA": -found.values, "SA": found.values, "LM": -found.values.abs()}[which]
    assert keys.tolist() == sorted(keys.tolist())
    assert (found.residuals <= 1e-6 * found.values.abs() * (1 + 1e-9)).all()


@pytest.mark.parametrize("k", [1, 4, 5])
def test_both_ends_at_once(k):
    eigenvalues = SPECTRA["nearly plus and minus"]
    found = solve(oracles.with_spectrum(eigenvalues), k=k, which="BE", tolerance=1e-6, num_matvecs=200)
    ordered = eigenvalues.sort(descending=True).values
    low = k // 2
    expected = torch.cat([ordered[: k - low], ordered[len(ordered) - low :]])
    torch.testing.assert_close(found.values, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("tolerance", [0.1, 1e-2, 1e-4])
@pytest.mark.parametrize("seed", range(5))
def test_an_eigenvalue_lies_within_each_residual_and_this_one_within_its_error_bar(tolerance, seed):
    eigenvalues = SPECTRA["plus and minus"]
    matrix = oracles.with_spectrum(eigenvalues, seed)
    found = solve(matrix, seed=seed, k=5, num_matvecs=100, tolerance=tolerance, keep_basis=True)
    distance = (found.values[:, None] - eigenvalues).abs().min(dim=1).values
    rounding = len(matrix) * torch.finfo(F64).eps * 10  # the matrix is a product, so its eigenvalues are these up to this
    assert (distance <= found.residuals + rounding).all()
    assert ((found.values - leading(eigenvalues, 5, "LA")).abs() <= found.bounds + rounding).all()
    assert (found.bounds <= found.residuals + rounding).all()
    # and the residual is what it says: ‖A x - θ x‖
    x = found.vectors
    torch.testing.assert_close((x @ matrix - found.values[:, None] * x).norm(dim=1), found.residuals, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(x @ x.T, torch.eye(5, dtype=F64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SPECTRA)
def test_nothing_is_missed_and_nothing_comes_twice(name):
    eigenvalues = SPECTRA[name]
    expected = leading(eigenvalues, 5, "LA")
    for seed in range(NUM_SEEDS):
        found = lanczos(
            lambda v: eigenvalues * v,
            start(300, seed),
            LanczosRequest(k=5, num_matvecs=400, check_multiplicity=True),
            generator=torch.Generator().manual_seed(seed + 1000),
        )
        assert found.converged
        torch.testing.assert_close(found.values, expected, rtol=1e-3, atol=1e-9 * eigenvalues.abs().max().item())


def networks() -> dict[str, oracles.Classification]:
    """More parameters than are solved whole, and Hessians that are known exactly."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 4
    x = torch.randn(60, 8, generator=generator, dtype=F64)
    x[:, :4] += 2 * torch.nn.functional.one_hot(y, 4)
    made = {}
    for name, activation, steps in (("at its start", nn.Tanh, 0), ("trained", nn.Tanh, 40), ("with kinks", nn.ReLU, 40)):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(1)
            model = nn.Sequential(nn.Linear(8, 16), activation(), nn.Linear(16, 8), activation(), nn.Linear(8, 4)).double()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        optimizer.zero_grad()
        made[name] = oracles.Classification(model.eval(), x, y)
    return made


@pytest.mark.parametrize(
    ("name", "which"),
    [("at its start", "LA"), ("at its start", "LM"), ("trained", "LA"), ("trained", "BE"), ("with kinks", "LA")],
)
def test_the_hessians_of_three_networks(name, which):
    problem = networks()[name]
    exact = problem.dense_hessian()
    objective = Objective(problem.model, problem.loader(25, 35))
    with objective.session():
        torch.testing.assert_close(objective.hvp(torch.eye(objective.dim, dtype=F64)), exact, rtol=1e-8, atol=1e-10)
        through = lanczos(objective.hvp, start(objective.dim), LanczosRequest(k=5, which=which, tolerance=1e-8))
    eigenvalues = torch.linalg.eigvalsh(exact)
    both = torch.cat([eigenvalues.flip(0)[:3], eigenvalues[:2].flip(0)])
    expected = both if which == "BE" else leading(eigenvalues, 5, which)
    torch.testing.assert_close(through.values, expected, rtol=1e-8, atol=1e-10)
    for seed in range(NUM_SEEDS // 3):
        found = solve(exact, seed=seed, k=5, which=which, num_matvecs=400)
        torch.testing.assert_close(found.values, expected, rtol=1e-2, atol=1e-3 * eigenvalues.abs().max().item())
        assert found.converged


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("multiplicity", "k"), [(2, 1), (3, 2), (3, 5), (6, 4)])
def test_hidden_copies_are_found_on_request_and_counted(multiplicity, k, seed):
    eigenvalues = spectrum(*[10.0] * multiplicity, 5, 4, 3, 2.5)
    start_vector, expected = start(300, seed), leading(eigenvalues, k, "LA")
    settings = {"k": k, "num_matvecs": 400}
    without = lanczos(lambda v: eigenvalues * v, start_vector, LanczosRequest(**settings))
    found = lanczos(lambda v: eigenvalues * v, start_vector, LanczosRequest(**settings, check_multiplicity=True))
    torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=0)
    assert ((found.values - expected).abs() <= found.bounds + 1e-12).all()
    assert found.converged
    if without.values[min(k, multiplicity) - 1] < 9:  # one starting vector sees one copy, until rounding brings others
        assert found.num_hidden >= 1


def test_the_search_for_hidden_copies_costs_few_products_and_finds_none_in_a_simple_spectrum():
    eigenvalues = SPECTRA["decaying"]
    plain, searched = (
        lanczos(lambda v: eigenvalues * v, start(300), LanczosRequest(k=5, check_multiplicity=check))
        for check in (False, True)
    )
    assert searched.num_hidden == 0
    assert plain.num_matvecs < searched.num_matvecs <= 3 * plain.num_matvecs
    torch.testing.assert_close(searched.values, plain.values, rtol=1e-4, atol=0)


@pytest.mark.parametrize("which", ["LM", "SA", "BE"])
def test_hidden_copies_at_other_ends(which):
    eigenvalues = spectrum(8, 8, -9, -9, -9, 4, -4, 3, -3)
    found = lanczos(
        lambda v: eigenvalues * v, start(300), LanczosRequest(k=4, which=which, num_matvecs=400, check_multiplicity=True)
    )
    expected = {"LM": [-9, -9, -9, 8], "SA": [-9, -9, -9, -4], "BE": [8, 8, -9, -9]}[which]
    assert found.values.tolist() == pytest.approx(expected, rel=1e-4)


def test_the_budget_may_end_in_the_search_and_it_is_said():
    eigenvalues = SPECTRA["decaying"]
    plain = lanczos(lambda v: eigenvalues * v, start(300), LanczosRequest(k=5))
    cut = lanczos(
        lambda v: eigenvalues * v,
        start(300),
        LanczosRequest(k=5, num_matvecs=plain.num_matvecs + 8, check_multiplicity=True),
    )
    assert cut.ending is Ending.UNSEARCHED
    assert not cut.converged
    assert cut.values.tolist() == pytest.approx(plain.values.tolist(), rel=1e-4)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(("k", "tolerance"), [(1, 1e-2), (5, 1e-2), (5, 1e-3), (10, 1e-3)])
def test_no_more_products_than_arpack_with_a_basis_of_the_same_size(name, k, tolerance):
    eigenvalues, ours, arpack = SPECTRA[name], 0, 0
    for seed in range(3):
        products = []

        def matvec(v, products=products):
            products.append(1)
            return eigenvalues.numpy() * v

        v = start(300, seed)
        operator = LinearOperator((300, 300), matvec=matvec, dtype=np.float64)
        eigsh(operator, k=k, ncv=2 * k + 4, tol=tolerance, which="LA", v0=v.numpy(), maxiter=10_000)
        arpack += len(products)
        request = LanczosRequest(k=k, tolerance=tolerance, guard=0, num_matvecs=10_000)
        ours += lanczos(lambda v: eigenvalues * v, v, request).num_matvecs
    assert ours <= arpack


@pytest.mark.parametrize("seed", range(30))
def test_nothing_is_missed_but_inside_a_cluster_narrower_than_the_tolerance(seed):
    eigenvalues = torch.sort(torch.randn(200, generator=torch.Generator().manual_seed(seed), dtype=F64).pow(3)).values
    found = solve(oracles.with_spectrum(eigenvalues, seed), seed=seed, k=5, num_matvecs=200)
    assert found.converged
    torch.testing.assert_close(found.values, eigenvalues.flip(0)[:5], rtol=2e-2, atol=0)


def test_no_ghost_copies_however_long_it_runs():
    """Without re-orthogonalization a dominant eigenvalue comes back again and again, with tiny residuals."""
    eigenvalues = torch.cat([torch.tensor([1000.0], dtype=F64), torch.linspace(0, 1, 199, dtype=F64)])
    matrix = oracles.with_spectrum(eigenvalues).float()
    found = solve(matrix, k=10, num_matvecs=200, tolerance=1e-5)
    assert (found.values[1:] < 1.01).all()


@pytest.mark.parametrize("k", [1, 3, 6])
def test_the_whole_space(k):
    eigenvalues = torch.tensor([3.0, 3.0, 3.0, -1.0, 0.5, 0.0], dtype=F64)
    found = solve(oracles.with_spectrum(eigenvalues), k=k, num_matvecs=50, tolerance=1e-9)
    expected = eigenvalues.sort(descending=True).values[:k]
    torch.testing.assert_close(found.values[:1], expected[:1], rtol=1e-10, atol=1e-12)
    assert found.converged
    if k == 6:  # only the exhausted space shows multiplicities
        torch.testing.assert_close(found.values, expected, rtol=1e-10, atol=1e-12)
        assert found.ending is Ending.WHOLE_SPACE
        assert found.num_matvecs == 6
        assert found.residuals.tolist() == [0.0] * 6


def test_an_eigenvector_as_start_does_not_end_the_search():
    eigenvalues = torch.arange(10.0, 0, -1, dtype=F64)
    found = solve(torch.diag(eigenvalues), torch.eye(10, dtype=F64)[7], k=3, num_matvecs=50)
    torch.testing.assert_close(found.values, eigenvalues[:3], rtol=1e-3, atol=0)


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_operators_of_low_rank(rank, dtype):
    """The Krylov space is exhausted after rank + 1 steps; the rest of what was asked for is zero."""
    eigenvalues = torch.cat([torch.arange(rank, 0, -1, dtype=F64), torch.zeros(40 - rank, dtype=F64)])
    found = solve(oracles.with_spectrum(eigenvalues).to(dtype), k=5, num_matvecs=60)
    expected = eigenvalues[:5]
    torch.testing.assert_close(found.values, expected, rtol=1e-5, atol=1e-5)
    assert found.converged


def test_the_zero_operator():
    for check in (False, True):
        request = LanczosRequest(k=3, num_matvecs=30, check_multiplicity=check)
        found = lanczos(torch.zeros_like, start(20), request)
        assert found.values.tolist() == [0, 0, 0]
        assert found.converged


def test_one_product_gives_the_rayleigh_quotient_and_is_not_called_converged():
    matrix = oracles.with_spectrum(SPECTRA["decaying"])
    v = start(300)
    found = solve(matrix, v, k=1, num_matvecs=1)
    assert found.values[0] == pytest.approx((v @ matrix @ v / (v @ v)).item())
    assert found.residuals[0] == pytest.approx((matrix @ v / v.norm() - found.values[0] * v / v.norm()).norm().item())
    assert found.ending is Ending.BUDGET
    assert not found.converged


def test_an_exhausted_budget_is_said_and_gives_lower_bounds():
    eigenvalues = torch.linspace(0, 1, 300, dtype=F64)
    found = solve(oracles.with_spectrum(eigenvalues), k=3, num_matvecs=6)
    assert not found.converged
    assert (found.values <= eigenvalues.flip(0)[:3]).all()


def test_a_tolerance_below_the_rounding_ends_there_and_says_so():
    eigenvalues = SPECTRA["decaying"]
    found = solve(oracles.with_spectrum(eigenvalues).float(), k=2, tolerance=1e-12, num_matvecs=300)
    assert found.ending is Ending.ROUNDING
    torch.testing.assert_close(found.values, eigenvalues[:2], rtol=1e-5, atol=0)
    assert ((found.values - eigenvalues[:2]).abs() <= found.bounds).all()


def test_float32_keeps_its_digits_on_long_vectors():
    """A rank-one operator along a constant vector, where plain float32 dot products lose digits."""
    n = 4_000_000
    u = torch.full((n,), 1.0)
    found = lanczos(
        lambda v: u * (u.double() @ v.double() / n).float(),
        u + 0.1 * start(n, dtype=torch.float32),
        LanczosRequest(k=1, num_matvecs=5),
    )
    assert found.values[0] == pytest.approx(1.0, rel=2e-6)


@pytest.mark.parametrize("max_basis", [5, 6, 8, 14, 40, None])
@pytest.mark.parametrize("name", SIMPLE)
def test_a_restarted_basis_finds_the_same(name, max_basis):
    eigenvalues = SPECTRA[name]
    matrix = oracles.with_spectrum(eigenvalues)
    found = solve(matrix, k=2, num_matvecs=900, tolerance=1e-6, max_basis=max_basis, keep_basis=True)
    assert found.converged
    assert found.basis_size == (max_basis or 8)
    torch.testing.assert_close(found.values, leading(eigenvalues, 2, "LA"), rtol=1e-9, atol=0)
    x = found.vectors
    true_residuals = (x @ matrix - found.values[:, None] * x).norm(dim=1)
    torch.testing.assert_close(true_residuals, found.residuals, rtol=1e-3, atol=1e-9 * eigenvalues.abs().max().item())


@pytest.mark.parametrize("max_basis", [14, 10])
def test_restarts_cost_few_products(max_basis):
    matrix = oracles.with_spectrum(SPECTRA["decaying"])
    unlimited, bounded = (solve(matrix, k=5, num_matvecs=300, max_basis=size) for size in (300, max_basis))
    assert bounded.num_matvecs <= 1.5 * unlimited.num_matvecs


@pytest.mark.parametrize("storage", ["half", "host"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_other_storages_give_the_same_eigenvalues(storage, dtype):
    eigenvalues = SPECTRA["nearly plus and minus"]
    matrix = oracles.with_spectrum(eigenvalues).to(dtype)
    found = solve(matrix, k=5, storage=storage, keep_basis=True)
    full = solve(matrix, k=5, storage="full", keep_basis=True)
    exact = leading(eigenvalues, 5, "LA")
    assert found.converged
    assert ((found.values - exact).abs() <= found.bounds).all()
    if storage == "host":
        assert torch.equal(found.values, full.values)
        assert torch.equal(found.vectors, full.vectors)
        return
    torch.testing.assert_close(found.values, exact, rtol=1e-4, atol=0)
    assert found._basis.nbytes * (2 if dtype == torch.float32 else 4) == full._basis.nbytes
    x = found.vectors.double()
    true_residuals = (x @ matrix.double() - found.values[:, None] * x).norm(dim=1)
    assert (true_residuals <= found.residuals + 1e-6).all()


def test_memory_bounds_the_basis_and_is_checked_before_it_is_used(monkeypatch):
    matrix = oracles.with_spectrum(SPECTRA["decaying"])
    vector = 8 * 300
    monkeypatch.setattr(lanczos_room, "free_bytes", lambda device: 5 * vector)
    found = solve(matrix, k=2, num_matvecs=300, tolerance=1e-6)
    assert found.basis_size == 5
    torch.testing.assert_close(found.values, SPECTRA["decaying"][:2], rtol=1e-9, atol=0)
    monkeypatch.setattr(lanczos_room, "free_bytes", lambda device: 4 * vector)
    with pytest.raises(MemoryError, match=r"basis of 5 vectors, the fewest for 3 Ritz pairs.*fewer eigenvalues"):
        solve(matrix, k=2, num_matvecs=300)
    # half precision holds four times as many float64 vectors, and a budget of bytes is kept to
    assert solve(matrix, k=2, num_matvecs=300, storage="half").basis_size == 8
    assert solve(matrix, k=5, num_matvecs=300, basis_bytes=9 * vector + 5).basis_size == 9
    with pytest.raises(MemoryError, match="basis of 8 vectors"):
        solve(matrix, k=5, num_matvecs=300, basis_bytes=7 * vector)


@pytest.mark.parametrize("num_matvecs", [1, 4, 12])
def test_the_quadrature_of_the_starting_vector_is_exact_for_polynomials(num_matvecs):
    eigenvalues = SPECTRA["plus and minus"] / 10
    matrix, v = oracles.with_spectrum(eigenvalues), start(300)
    found = solve(matrix, v, k=1, tolerance=1e-14, num_matvecs=num_matvecs, max_basis=20)
    nodes, weights = found.quadrature()
    assert len(nodes) == num_matvecs
    power = v / v.norm()
    for degree in range(2 * num_matvecs):
        assert (weights * nodes**degree).sum().item() == pytest.approx((v @ power / v.norm()).item(), abs=1e-12)
        power = matrix @ power


@pytest.mark.parametrize("check", [False, True])
def test_a_run_goes_on_to_the_least_number_of_products(check):
    """Also where all has converged long before; nothing gets worse, and the quadrature has as many nodes."""
    eigenvalues = SPECTRA["decaying"]
    matrix = oracles.with_spectrum(eigenvalues)
    short = solve(matrix, k=1)
    found = solve(matrix, k=1, min_matvecs=25, max_basis=27, check_multiplicity=check)
    assert short.num_matvecs < 20
    assert found.converged
    assert found.num_matvecs == 25 if not check else found.num_matvecs > 25
    assert len(found.alphas) == 25
    assert abs(found.values[0] - eigenvalues[0]) <= abs(short.values[0] - eigenvalues[0]) + 1e-12
    assert solve(oracles.with_spectrum(eigenvalues[:6]), k=2, min_matvecs=25).num_matvecs == 6  # there is no more


def test_the_quadrature_stops_at_the_first_restart():
    found = solve(oracles.with_spectrum(SPECTRA["decaying"]), k=5, tolerance=1e-6)
    assert found.num_matvecs > 14
    assert len(found.alphas) == 14
    assert len(found.betas) == 13


def test_the_kept_basis_serves_deflation():
    """tr(A) = tr(Q A Qᵀ) + tr of A on the complement; Q has orthonormal rows, and the projected operator is Q A Qᵀ."""
    eigenvalues = SPECTRA["dominant negative"]
    matrix = oracles.with_spectrum(eigenvalues)
    found = solve(matrix, k=3, keep_basis=True, check_multiplicity=True)
    q = found.combine(torch.eye(found.num_kept, dtype=F64))
    torch.testing.assert_close(q @ q.T, torch.eye(found.num_kept, dtype=F64), rtol=0, atol=1e-12)
    torch.testing.assert_close(q @ matrix @ q.T, found.projected, rtol=0, atol=1e-8)
    probe = start(300, 9)
    left = found.remove(probe)
    torch.testing.assert_close(left, probe - q.T @ (q @ probe), rtol=0, atol=1e-10)
    assert (q @ left).abs().max() < 1e-12
    with pytest.raises(ValueError, match="keep_basis=True"):
        _ = solve(matrix, k=3).vectors


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"k": 6}, "number of parameters, 5, got 6"),
        ({"num_matvecs": 1}, "at least as many products"),
        ({"which": "SM"}, "which must be one of"),
        ({"tolerance": 0.0}, "tolerance must be positive"),
        ({"tolerance": float("nan")}, "tolerance must be positive"),
        ({"guard": -1}, "guard must be at least 0"),
        ({"min_matvecs": -1}, "min_matvecs must lie between 0 and num_matvecs = "),
        ({"min_matvecs": 999}, "min_matvecs must lie between 0 and num_matvecs = .*, got 999"),
        ({"storage": "disk"}, "storage must be one of"),
        ({"storage": "half", "tolerance": 1e-4}, "half precision holds residuals down to 0.001"),
        ({"max_basis": 4}, "basis of 5 vectors or more, got max_basis = 4"),
        ({"v": torch.zeros(5)}, "finite and not zero"),
        ({"v": torch.full((5,), float("nan"))}, "finite and not zero"),
        ({"v": torch.ones(5, dtype=torch.bfloat16)}, "float32 or float64, and the start vector is torch.bfloat16"),
    ],
)
def test_bad_input_is_refused(change, match):
    arguments = {"v": torch.ones(5), "k": 2, "num_matvecs": 10, **change}
    with pytest.raises(ValueError, match=match):
        lanczos(torch.clone, arguments.pop("v"), LanczosRequest(**arguments))


def test_operators_that_are_not_symmetric_are_an_error():
    matrix = oracles.with_spectrum(SPECTRA["decaying"])
    with pytest.raises(ArithmeticError, match="not symmetric"):
        solve(matrix + torch.triu(matrix, 1), k=3, num_matvecs=100)
    noise = torch.Generator().manual_seed(1)

    def unrepeatable(v):
        return matrix @ v + 0.5 * torch.randn(300, generator=noise, dtype=F64)

    with pytest.raises(ArithmeticError, match="not symmetric"):
        lanczos(unrepeatable, start(300), LanczosRequest(k=3, num_matvecs=100))


def test_products_that_are_not_finite_are_an_error():
    with pytest.raises(ArithmeticError, match="product 1 with the operator is not finite"):
        lanczos(lambda v: v * float("inf"), torch.ones(4), LanczosRequest(k=1, num_matvecs=3))

    def late(v):
        late.calls += 1
        return v * torch.arange(9.0) if late.calls < 4 else v * float("nan")

    late.calls = 0
    with pytest.raises(ArithmeticError, match="product 4"):
        lanczos(late, start(9, dtype=torch.float32), LanczosRequest(k=2, num_matvecs=20))


def test_an_operator_may_return_its_argument_and_keep_its_answers():
    answers = []

    def identity(v):
        answers.append(v)
        return v

    found = lanczos(identity, start(30), LanczosRequest(k=2, num_matvecs=40))
    assert found.values.tolist() == pytest.approx([1, 1])
    kept = []

    def keeping(v):
        kept.append(torch.arange(30.0, dtype=F64) * v)
        return kept[-1]

    twins = [start(30).mul_(1) for _ in range(2)]
    lanczos(keeping, twins[0], LanczosRequest(k=2, num_matvecs=40))
    assert torch.equal(twins[0], twins[1])  # the start is not written to
    first = twins[0] / twins[0].norm()
    torch.testing.assert_close(kept[0], torch.arange(30.0, dtype=F64) * first, rtol=1e-12, atol=0)


def test_one_transfer_to_the_host_a_step(monkeypatch):
    transfers = []
    copy = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: transfers.append(self.numel()) or copy(self))
    found = solve(oracles.with_spectrum(SPECTRA["decaying"]), k=5)
    assert len(transfers) == found.num_matvecs
    assert max(transfers) <= 2 * 14 + 1
