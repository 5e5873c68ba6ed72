"""Lanczos with full re-orthogonalization: Ritz pairs of a symmetric operator, with residuals that can be trusted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import reductions, sampling
from .memory import free_bytes

__all__ = ["MatVec", "RitzPairs", "top_ritz_pairs"]

MatVec = Callable[[Tensor], Tensor]

WHICH = ("LA", "LM")
_ROUNDING = 100  # times the rounding unit times the largest |value|: residuals below that are rounding of the products


@dataclass(frozen=True)
class RitzPairs:
    """Approximate eigenpairs of a symmetric operator.

    Attributes:
        values: shape ``(k,)``, float64, descending (by magnitude for "LM").
        residuals: shape ``(k,)``: some eigenvalue lies within ``residuals[i]`` of ``values[i]``.
        vectors: shape ``(k, dim)`` in the dtype of the operator, or None.
        num_matvecs: products used.
        converged: whether every residual, the guard pair's too, met the tolerance.
    """

    values: Tensor
    residuals: Tensor
    vectors: Tensor | None
    num_matvecs: int
    converged: bool


def top_ritz_pairs(
    matvec: MatVec,
    start: Tensor,
    k: int,
    *,
    num_matvecs: int,
    tolerance: float = 1e-2,
    which: str = "LA",
    guard: int = 1,
    generator: torch.Generator | None = None,
    return_vectors: bool = False,
) -> RitzPairs:
    """The ``k`` largest Ritz values of a symmetric operator, by Lanczos with full re-orthogonalization.

    Stops as soon as ``k + guard`` pairs have ``residual <= tolerance * |value|`` (the error of a value is then of the
    order of residual² over the gap) or residuals at the rounding of the products, or when ``num_matvecs`` products are
    used or the space is exhausted. A guard pair keeps a slowly appearing eigenvalue from being missed: measured, 5 % of
    runs without and none of 60 with one; inside a cluster narrower than the tolerance, one can still stand for its
    neighbour. When the Krylov space is invariant before enough pairs are found, it goes on from a new random vector,
    orthogonal to it.

    Calls ``matvec`` at most ``num_matvecs`` times (one pass over the data each, for a Hessian) and stores as many vectors:
    0.9 GB for ResNet-18 in float32 with 20. Its own work is two products with that basis a step, twice.

    Args:
        matvec: ``v -> A v``, shape ``(dim,)`` to ``(dim,)``, ``A`` symmetric.
        start: shape ``(dim,)``, not zero. Its dtype and device are those of the arithmetic.
        which: "LA" for the largest eigenvalues, "LM" for those of largest magnitude.
        generator: of the new random vectors; needed where the space can be exhausted.
        return_vectors: whether to form the Ritz vectors.
    Raises:
        ValueError: ``k`` is not between 1 and ``dim`` or exceeds ``num_matvecs``; ``start`` is zero or not finite.
        MemoryError: the basis does not fit; says how many products would.
        ArithmeticError: a product is not finite.
    Source: Parlett, The Symmetric Eigenvalue Problem (1998), chapter 13; Paige (1976) on why to re-orthogonalize.
    """
    dim = start.numel()
    if not 1 <= k <= dim:
        raise ValueError(f"k must be between 1 and the number of parameters, {dim}, got {k}")
    steps = min(num_matvecs, dim)
    if k > steps:
        raise ValueError(f"k = {k} Ritz pairs need at least as many products, got num_matvecs = {num_matvecs}")
    if which not in WHICH:
        raise ValueError(f"which must be one of {WHICH}, got {which!r}")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
    length = reductions.norm(start).item()
    if not 0 < length < math.inf:
        raise ValueError(f"the start vector must be finite and not zero, its norm is {length}")

    _check_memory(steps, start)
    generator = generator or torch.Generator().manual_seed(0)
    basis = start.new_empty((steps, dim))
    basis[0] = start / length
    projected = torch.zeros((steps, steps), dtype=torch.float64)
    wanted = min(k + guard, dim)
    for j in range(steps):
        w = matvec(basis[j].clone())
        alpha = reductions.dot(basis[j], w).item()
        if not math.isfinite(alpha):
            raise ArithmeticError(f"product {j + 1} with the operator is not finite; look for infinite second derivatives")
        projected[j, j] = alpha
        w = _orthogonalized(w, basis[: j + 1])
        beta = reductions.norm(w).item()
        theta, s = torch.linalg.eigh(projected[: j + 1, : j + 1])
        order = torch.argsort(theta.abs() if which == "LM" else theta, descending=True)
        theta, s = theta[order], s[:, order]
        scale = theta.abs().max().item()
        exhausted = beta <= 10 * torch.finfo(start.dtype).eps * max(scale, torch.finfo(start.dtype).tiny) * (j + 1) ** 0.5
        if exhausted:
            beta = 0.0
        residuals = beta * s[-1].abs()
        limits = torch.clamp(tolerance * theta.abs(), min=_ROUNDING * torch.finfo(start.dtype).eps * scale)
        enough = j + 1 >= wanted and bool((residuals[:wanted] <= limits[:wanted]).all())
        if enough or j + 1 == steps:
            break
        if exhausted:
            basis[j + 1] = _fresh_direction(basis[: j + 1], generator)
        else:
            projected[j, j + 1] = projected[j + 1, j] = beta
            basis[j + 1] = w / beta
    vectors = (s[:, :k].T.to(basis) @ basis[: j + 1]) if return_vectors else None
    if j + 1 == dim:
        residuals = torch.zeros_like(residuals)  # the basis is the whole space
    converged = bool((residuals[:wanted] <= limits[:wanted]).all()) and j + 1 >= min(wanted, dim)
    return RitzPairs(theta[:k], residuals[:k], vectors, j + 1, converged)


def _orthogonalized(w: Tensor, basis: Tensor) -> Tensor:
    """Classical Gram-Schmidt, twice: as accurate as the modified one, and two matrix products instead of a loop."""
    for _ in range(2):
        w = w - basis.T @ (basis @ w)
    return w


def _fresh_direction(basis: Tensor, generator: torch.Generator) -> Tensor:
    """A random unit vector orthogonal to the rows of ``basis``, which are fewer than its columns."""
    while True:
        w = sampling.normal(basis.shape[1], generator, basis)
        length = reductions.norm(w)
        w = _orthogonalized(w, basis)
        left = reductions.norm(w)
        if left > 1e-3 * length:  # else what is left is mostly rounding; draw again
            w = _orthogonalized(w / left.to(w.dtype), basis)
            return w / reductions.norm(w).to(w.dtype)


def _check_memory(steps: int, start: Tensor) -> None:
    per_vector = start.numel() * start.element_size()
    free = free_bytes(start.device)
    if free is not None and steps * per_vector > free:
        raise MemoryError(
            f"a Krylov basis of {steps} vectors takes {steps * per_vector / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are "
            "free. "
            f"Use at most num_matvecs={max(free // per_vector - 2, 0)}, or fewer parameters (select=...)."
        )
