"""The five largest eigenvalues by each library, as its users would call it, with its products counted."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sharpness_plugins import sampling
from sharpness_plugins.metrics import HessianTopK
from sharpness_plugins.objective import Objective

from .networks import Network

__all__ = ["K", "SOLVERS", "TOLERANCE", "Exact", "Solver"]

K = 5
TOLERANCE = 1e-2  # of a residual, relative to its value; ARPACK's is the same
ACCURATE = 1e-3  # what residuals of 1e-2 mean for the values, or better

Solver = Callable[[Network, int, "Exact"], tuple[list[float], int]]
"""``(network, seed, exact) -> (eigenvalues, products)``; only one that cannot stop by itself looks at ``exact``."""


@dataclass(frozen=True)
class Exact:
    """The largest eigenvalues, shape ``(K,)``, and the tridiagonal matrix of a long Lanczos run from some start."""

    values: Tensor
    alphas: Tensor
    betas: Tensor

    def error(self, values: list[float]) -> float:
        """The largest relative one."""
        return ((torch.tensor(values, dtype=torch.float64) - self.values).abs() / self.values).max().item()

    def steps_to(self, accuracy: float) -> int:
        """Steps of a plain Lanczos run whose values are that accurate; in fives, as a user would try."""
        for steps in range(2 * K, len(self.alphas), 5):
            off = torch.diag(self.betas[: steps - 1], 1)
            found = torch.linalg.eigvalsh(torch.diag(self.alphas[:steps]) + off + off.T).flip(0)[:K]
            if self.error(found.tolist()) <= accuracy:
                return steps
        return len(self.alphas)


def ours(network: Network, seed: int, exact: Exact) -> tuple[list[float], int]:
    """``HessianTopK()`` as it is, guard pair and check of the products included."""
    objective = Objective(network.model, [(network.inputs, network.labels)])
    result = HessianTopK(k=K, tolerance=TOLERANCE)(objective, sampling.generator_for(seed, "peers"))
    return result.details["eigenvalues"], objective.cost.hvps


def curvlinops(network: Network, seed: int, exact: Exact, *, basis: int | None = None) -> tuple[list[float], int]:
    """curvlinops' Hessian with SciPy's ``eigsh``: the ``tol`` of our tolerance, its own basis (20) or one as large as ours.

    Without its check of determinism, which would cost two products more.
    """
    from curvlinops import HessianLinearOperator

    with _math_attention(network):
        linear = HessianLinearOperator(
            network.model,
            nn.CrossEntropyLoss(),
            [p for p in network.model.parameters() if p.requires_grad],
            [(network.inputs, network.labels)],
            check_deterministic=False,
        ).to_scipy()
        products = []

        def matvec(v: np.ndarray) -> np.ndarray:
            products.append(1)
            return linear @ v

        counted = LinearOperator(linear.shape, matvec=matvec, dtype=linear.dtype)
        v0 = torch.randn(network.dim, generator=sampling.generator_for(seed, "peers")).numpy().astype(linear.dtype)
        values = eigsh(counted, k=K, which="LA", tol=TOLERANCE, ncv=basis, v0=v0, return_eigenvectors=False)
    return sorted(values.tolist(), reverse=True), len(products)


def curvlinops_lean(network: Network, seed: int, exact: Exact) -> tuple[list[float], int]:
    return curvlinops(network, seed, exact, basis=2 * K + 4)


def pyhessian(network: Network, seed: int, exact: Exact) -> tuple[list[float], int]:
    """PyHessian as it is: power iteration with deflation until a value changes by less than 1e-3."""
    room = importlib.import_module("pyhessian.hessian")  # the package hides the module behind a class of its name
    products, product = [], room.hessian_vector_product

    def counted(*args: Any) -> Any:
        products.append(1)
        return product(*args)

    room.hessian_vector_product = counted
    try:
        with _global_seed(seed), _math_attention(network), _quiet():
            found = room.hessian(
                network.model, nn.CrossEntropyLoss(), data=(network.inputs, network.labels), cuda=False
            ).eigenvalues(top_n=K)[0]
    finally:
        room.hessian_vector_product = product
        for parameter in network.model.parameters():
            parameter.grad = None
    return sorted(found, reverse=True), len(products)


def eigenthings(network: Network, seed: int, exact: Exact) -> tuple[list[float], int]:
    """hessian-eigenthings' Lanczos, with as many steps (in fives) as leave the values right to 1e-3.

    It takes a number of steps and cannot stop by itself; its default, 10, is wrong in the first digit.
    """
    from hessian_eigenthings import HessianOperator, lanczos, supervised_loss

    steps = exact.steps_to(ACCURATE)
    with _math_attention(network):
        operator = HessianOperator(
            network.model, [(network.inputs, network.labels)], supervised_loss(nn.functional.cross_entropy)
        )
        found = lanczos(operator, k=K, max_iter=steps, which="LA", seed=seed)
    return sorted(found.eigenvalues.tolist(), reverse=True), steps


SOLVERS: dict[str, Solver] = {
    "ours": ours,
    "curvlinops + eigsh": curvlinops,
    "curvlinops + eigsh, ncv 14": curvlinops_lean,
    "hessian-eigenthings, Lanczos": eigenthings,
    "PyHessian": pyhessian,
}


def _math_attention(network: Network) -> contextlib.AbstractContextManager[Any]:
    """Without it every peer raises an error on fused attention; ours does it by itself."""
    return sdpa_kernel(SDPBackend.MATH) if network.fused_attention else contextlib.nullcontext()


@contextlib.contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using backward.*create_graph=True")
        yield
