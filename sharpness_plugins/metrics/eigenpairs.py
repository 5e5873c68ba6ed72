"""Largest eigenvalues of curvature matrices other than the Hessian itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..krylov import Ending, LanczosRequest
from ..krylov_pass import KrylovNeed, KrylovPass, measure_alone
from ..objective import Objective
from ..operators import Curvature
from ..report import Kind, MetricResult, Status
from ..schema import check_types
from .claims import of_curvature

__all__ = ["AdaptiveTopK", "GaussNewtonTopK", "topk_request", "topk_result"]


def topk_request(k: int, tolerance: float, num_matvecs: int | None, which: str = "LA") -> LanczosRequest:
    """``k`` eigenvalues with a guard pair; ``20 k + 100`` products where no budget is given."""
    budget = 20 * k + 100 if num_matvecs is None else num_matvecs
    return LanczosRequest(k=k, which=which, tolerance=tolerance, num_matvecs=budget)


def topk_result(shared: KrylovPass, k: int, tolerance: float) -> MetricResult:
    """The first ``k`` eigenvalues that a run found, and how well."""
    run = shared.run
    values, residuals, bounds = run.values[:k], run.residuals[:k], run.bounds[:k]
    relative = (residuals / values.abs().clamp_min(1e-300)).where(values != 0, 0.0).max().item()
    how = f"{run.num_matvecs} products, {shared.how}, largest relative residual {relative:.1e}"
    if len(values) < k and run.ending is not Ending.STOPPED:
        how += f"; k={k} was lowered to the number of parameters"
    if run.converged:
        where = "on the whole space" if run.ending is Ending.WHOLE_SPACE else "with a guard pair"
        status = Status(
            Kind.CONVERGED,
            f"eigenvalues of {shared.operator.description}, residuals below {tolerance:g} of each value, {where} ({how})",
        )
    else:
        status = Status(
            Kind.NOT_CONVERGED,
            f"eigenvalues of {shared.operator.description}; {run.ending} before the residuals fell below {tolerance:g} "
            f"({how}); the values are bounds from inside the spectrum",
        )
    return MetricResult(
        value=values[0].item(),
        status=status,
        details={
            "eigenvalues": values.tolist(),
            "residuals": residuals.tolist(),
            "error_bars": bounds.tolist(),
            "k": len(values),
            "tolerance": tolerance,
            "num_matvecs": run.num_matvecs,
            "basis_size": run.basis_size,
            "hvp_mode": shared.how,
        },
    )


@dataclass(frozen=True)
class _TopKMetric(ABC):
    """What the largest eigenvalues of all matrices have in common."""

    k: int = 5
    tolerance: float = 1e-2
    num_matvecs: int | None = None
    select: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_types(self)
        self.krylov_need()

    def expected_passes(self, objective: Objective) -> float:
        return float(min(3 * self.k + 7, objective.dim))

    @abstractmethod
    def _curvature(self) -> Curvature: ...

    @property
    def invariances(self) -> frozenset[str]:
        return of_curvature(self._curvature().adaptive)

    def krylov_need(self) -> KrylovNeed | None:
        return KrylovNeed(self._curvature(), topk_request(self.k, self.tolerance, self.num_matvecs))

    def from_krylov(self, shared: KrylovPass) -> MetricResult:
        return topk_result(shared, self.k, self.tolerance)

    def __call__(self, objective: Objective, rng: torch.Generator) -> MetricResult:
        return measure_alone(self, objective, rng)


@dataclass(frozen=True)
class GaussNewtonTopK(_TopKMetric):
    """The ``k`` largest eigenvalues of the Gauss–Newton matrix ``Jᵀ S J``; ``value`` is the first. See ``HessianTopK``.

    Never negative for a convex loss; at a minimum that fits the data they are close to the Hessian's. For cross-entropy the
    matrix is the Fisher matrix.

    Args:
        k, tolerance, num_matvecs: as of ``HessianTopK``.
        select: globs of parameter names: the eigenvalues of their block.
        adaptive: of ``D A D`` with ``D = diag |w|``.
    Cost: 1.7 to 2.5 gradients a product.
    """

    adaptive: bool = False

    name: ClassVar[str] = "gauss_newton_topk"

    def _curvature(self) -> Curvature:
        return Curvature("gauss_newton", self.select, self.adaptive)


@dataclass(frozen=True)
class AdaptiveTopK(_TopKMetric):
    """The ``k`` largest eigenvalues of ``D H D`` with ``D = diag |w|``: curvature relative to the size of each weight.

    Unlike the Hessian's they do not change when layers of a ReLU network are rescaled (Dinh et al. 2017). Half of the first,
    times ρ², is what a small elliptic ball ``‖D⁻¹ e‖ <= ρ`` raises the loss at a minimum (Kwon et al. 2021, ASAM).

    Args:
        k, tolerance, num_matvecs: as of ``HessianTopK``.
        select: globs of parameter names: the eigenvalues of their block.
        hvp: how products are made; see ``hvp.HVP_MODES``.
    """

    hvp: str | None = None

    name: ClassVar[str] = "adaptive_topk"
    works_on_shards: ClassVar[bool] = True

    def _curvature(self) -> Curvature:
        return Curvature("hessian", self.select, True, self.hvp)
