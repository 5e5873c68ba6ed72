"""What to ask of a Krylov space of a symmetric operator, and what it tells: eigenvalues with error bars, and their like."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from .basis import STORAGES, Basis

__all__ = ["HALF_ROUNDING", "WHICH", "Ending", "LanczosRequest", "LanczosResult"]

WHICH = ("LA", "SA", "LM", "BE")
HALF_ROUNDING = 2.0**-11  # of an entry in half precision


class Ending(str, Enum):
    """Why a run ended. The text is what the user reads."""

    CONVERGED = "every residual is within the tolerance"
    ROUNDING = "every residual is within the tolerance or at the rounding of the products"
    WHOLE_SPACE = "the basis spans the whole space"
    BUDGET = "the budget of products ran out"
    UNSEARCHED = "the budget of products ran out in the search for hidden copies"
    STOPPED = "the measurement was stopped"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class LanczosRequest:
    """Which eigenvalues, how well, and with how much work and memory; the same request can serve several metrics.

    Args:
        k: number of eigenvalues.
        which: "LA" the algebraically largest, "SA" the smallest, "LM" those of largest magnitude, "BE" half from each end
            (of an odd number, one more of the largest).
        tolerance: a pair has converged when ``residual <= tolerance * |value|``; the error of its value is then of the order
            of residual² over the gap.
        num_matvecs: budget of products.
        min_matvecs: products to make at least, unless the space is exhausted before: for what else reads the run (a density,
            a basis for a trace) and wants more of it than the eigenvalues do.
        guard: further pairs at each wanted end that must have settled, too: to ``tolerance``, to 1 %, or to 3 % of their
            distance to the wanted ones. They keep a slowly appearing eigenvalue from being missed. Measured on three
            networks of 316 parameters, top 5 from 200 starts each: 12 misses without, one with a guard pair, none with two,
            for a seventh to a quarter more products. Any run from one vector misses what that has next to nothing of; in the
            one that missed, one random vector in 2500 has as little.
        check_multiplicity: after convergence, search the complement of the found vectors from a new random one, until it
            holds no eigenvalue that belongs to the wanted ones. One starting vector sees one copy of a multiple
            eigenvalue, and one of a cluster narrower than the tolerance. About two thirds more products on networks, up to
            1.5 times more before a flat bulk, and as many again for every hidden one. Measured: no miss on the three
            networks, nor on eight difficult spectra, from 200 starts each.
        max_basis: vectors to store, at least ``k + 2`` plus the guards; None for ``2 k + 4`` (``k + 5`` is enough for
            nearly as few products).
        basis_bytes: as many vectors as fit in these bytes, at most ``max_basis``; None for half of the free memory.
        storage: "full", "half" or "host"; see ``basis.Basis``.
        keep_basis: keep the vectors in the result, for ``vectors``, ``combine`` and ``remove``.
    """

    k: int = 5
    which: str = "LA"
    tolerance: float = 1e-2
    num_matvecs: int = 200
    min_matvecs: int = 0
    guard: int = 1
    check_multiplicity: bool = False
    max_basis: int | None = None
    basis_bytes: int | None = None
    storage: str = "full"
    keep_basis: bool = False

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")
        if self.k > self.num_matvecs:
            raise ValueError(
                f"k = {self.k} eigenvalues need at least as many products, got num_matvecs = {self.num_matvecs}"
            )
        if not 0 <= self.min_matvecs <= self.num_matvecs:
            raise ValueError(f"min_matvecs must lie between 0 and num_matvecs = {self.num_matvecs}, got {self.min_matvecs}")
        if self.which not in WHICH:
            raise ValueError(f"which must be one of {WHICH}, got {self.which!r}")
        if not 0 < self.tolerance < math.inf:
            raise ValueError(f"tolerance must be positive and finite, got {self.tolerance}")
        if self.guard < 0:
            raise ValueError(f"guard must be at least 0, got {self.guard}")
        if self.storage not in STORAGES:
            raise ValueError(f"storage must be one of {STORAGES}, got {self.storage!r}")
        if self.storage == "half" and self.tolerance < 2 * HALF_ROUNDING:
            raise ValueError(
                f"a basis in half precision holds residuals down to {2 * HALF_ROUNDING:.1g} of a value, got tolerance = "
                f"{self.tolerance:g}. Use storage='full', or 'host'."
            )
        if self.max_basis is not None and self.max_basis < self.wanted + 2:
            raise ValueError(
                f"{self.wanted} Ritz pairs (k = {self.k} and the guards) need a basis of {self.wanted + 2} vectors or more, "
                f"got max_basis = {self.max_basis}"
            )

    @property
    def ends(self) -> list[tuple[str, int]]:
        """The wanted ends of the spectrum, and how many of the ``k`` belong to each."""
        if self.which == "BE":
            high, low = self.k - self.k // 2, self.k // 2
            return [("LA", high), ("SA", low)] if low else [("LA", high)]
        return [(self.which, self.k)]

    @property
    def wanted(self) -> int:
        return self.k + self.guard * len(self.ends)


@dataclass(frozen=True)
class LanczosResult:
    """Approximate eigenpairs of a symmetric operator, and what else one Krylov space tells.

    Attributes:
        values: the wanted Ritz values, shape ``(k,)``, float64 on the CPU like all others here: descending; ascending for
            "SA"; by magnitude for "LM".
        residuals: shape ``(k,)``: some eigenvalue lies within ``residuals[i]`` of ``values[i]``, and the rounding of the
            products.
        bounds: shape ``(k,)``, ``min(r, r²/gap)`` and at least the rounding of the products: the error of ``values[i]``,
            where no eigenvalue is hidden in the gap to the next Ritz value.
        ending: why it ended; ``converged``: whether every residual, the guards' too, is small enough.
        num_matvecs: products used; ``num_hidden``: eigenvalues that only the search of ``check_multiplicity`` found.
        ritz_values, ritz_residuals: all of the last basis, descending; ``projected`` is the operator in that basis,
            ``basis · A · basisᵀ``, and its trace the operator's on the space.
        alphas, betas: diagonal and off-diagonal of the tridiagonal matrix of the starting vector, up to the first restart.
        basis_size: vectors that were allocated.
    """

    request: LanczosRequest
    values: Tensor
    residuals: Tensor
    bounds: Tensor
    ending: Ending
    num_matvecs: int
    num_hidden: int
    ritz_values: Tensor
    ritz_residuals: Tensor
    projected: Tensor
    alphas: Tensor
    betas: Tensor
    basis_size: int
    _chosen: Tensor
    _coordinates: Tensor
    _basis: Basis | None

    @property
    def converged(self) -> bool:
        return self.ending not in (Ending.BUDGET, Ending.UNSEARCHED, Ending.STOPPED)

    @property
    def vectors(self) -> Tensor:
        """Ritz vectors of ``values``, shape ``(k, dim)``, orthonormal. Needs ``keep_basis``."""
        return self.combine(self._coordinates[:, self._chosen].T)

    @property
    def num_kept(self) -> int:
        """Vectors in the last basis: the rank of what ``remove`` takes away."""
        return len(self.projected)

    def combine(self, coefficients: Tensor) -> Tensor:
        """``coefficients @ basis``, shape ``(p, num_kept)`` to ``(p, dim)``. Needs ``keep_basis``."""
        return self._kept().combine(coefficients)

    def remove(self, vector: Tensor) -> Tensor:
        """``vector`` without its part in the last basis, which is deflation. Needs ``keep_basis``."""
        basis, nothing = self._kept(), torch.zeros(self.num_kept, dtype=torch.float64, device=vector.device)
        for _ in range(2):
            vector, _, _ = basis.orthogonalize(vector, self.num_kept, nothing, self.num_kept)
        return vector

    def quadrature(self) -> tuple[Tensor, Tensor]:
        """Nodes and weights, shapes ``(m,)``, of the spectral density as the starting vector sees it.

        ``Σ weights · f(nodes)`` is ``vᵀ f(A) v / vᵀv`` for every polynomial ``f`` of degree below ``2 m``.
        """
        tridiagonal = torch.diag(self.alphas) + torch.diag(self.betas, 1) + torch.diag(self.betas, -1)
        nodes, s = torch.linalg.eigh(tridiagonal)
        return nodes, s[0].square()

    def _kept(self) -> Basis:
        if self._basis is None:
            raise ValueError("the basis was not kept. Ask for it: LanczosRequest(..., keep_basis=True).")
        return self._basis
