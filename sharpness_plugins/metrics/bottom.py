"""The smallest eigenvalue of the Hessian."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..krylov import LanczosResult
from ..krylov_pass import KrylovNeed, KrylovPass, measure_alone
from ..objective import Objective
from ..operators import Curvature
from ..report import Kind, MetricResult, Status
from ..schema import check_types
from .claims import of_curvature
from .eigenpairs import topk_request, topk_result

__all__ = ["HessianBottom"]

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class HessianBottom:
    """The smallest eigenvalue of the Hessian of the mean loss: how negative is the curvature in the worst direction.

    By default bounds from the products that other metrics make anyway: ``value`` is an upper bound, since it is a Rayleigh
    quotient, and ``details["lower_bound"]`` a lower one that holds with probability 0.95 over the random start, which is
    wide for a large network (a sixth of the spectrum for 15 steps and ten million parameters). ``certify`` computes it to
    ``tolerance`` with a run of its own at the lower end: two to five times the products of the five largest, measured, as
    the gaps there are small.

    Args:
        certify: whether to compute ``k`` of them until their residuals are below ``tolerance``.
        num_matvecs: steps for the bounds, or the budget to certify; None for 20 steps, or for ``40 k + 200``.
        select: globs of parameter names: of their block.
        adaptive: of ``D H D`` with ``D = diag |w|``.
        hvp: how products are made; see ``hvp.HVP_MODES``.
    Source: Kuczyński and Woźniakowski, Estimating the largest eigenvalue by the power and Lanczos algorithms with a random
        start (1992), theorem 4.2, for the lower bound.
    """

    certify: bool = False
    k: int = 1
    tolerance: float = 1e-2
    num_matvecs: int | None = None
    select: str | tuple[str, ...] | None = None
    adaptive: bool = False
    hvp: str | None = None

    name: ClassVar[str] = "hessian_bottom"
    works_on_shards: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_types(self)
        if not self.certify and self.k != 1:
            raise ValueError(f"bounds are of the smallest eigenvalue only; pass certify=True for k = {self.k} of them")
        self.krylov_need()

    @property
    def invariances(self) -> frozenset[str]:
        return of_curvature(self.adaptive)

    def expected_passes(self, objective: Objective) -> float:
        return float(min(50 * self.k if self.certify else self.num_matvecs or 20, objective.dim))

    def krylov_need(self) -> KrylovNeed | None:
        curvature = Curvature("hessian", self.select, self.adaptive, self.hvp)
        if not self.certify:
            return KrylovNeed(curvature, num_steps=20 if self.num_matvecs is None else self.num_matvecs)
        budget = 40 * self.k + 200 if self.num_matvecs is None else self.num_matvecs
        return KrylovNeed(curvature, topk_request(self.k, self.tolerance, budget, which="SA"))

    def from_krylov(self, shared: KrylovPass) -> MetricResult:
        return topk_result(shared, self.k, self.tolerance) if self.certify else _bounds(shared)

    def __call__(self, objective: Objective, rng: torch.Generator) -> MetricResult:
        return measure_alone(self, objective, rng)


def _bounds(shared: KrylovPass) -> MetricResult:
    run = shared.run
    nodes, _ = run.quadrature()
    above = min(nodes[0].item(), run.ritz_values[-1].item())
    if run.num_kept == shared.operator.dim:
        kind, below, said = Kind.EXACT, above, "on the whole space"
    else:
        kind, below = Kind.ESTIMATE, _lower_bound(run, shared.operator.dim)
        said = f"an upper bound; it is above {below:.4g} with probability {_CONFIDENCE:g}, and certify=True computes it"
    return MetricResult(
        value=above,
        status=Status(
            kind,
            f"smallest eigenvalue of {shared.operator.description}: {said} ({run.num_matvecs} products, {shared.how})",
        ),
        details={
            "lower_bound": below,
            "upper_bound": above,
            "confidence": _CONFIDENCE,
            "num_steps": len(nodes),
            "num_matvecs": run.num_matvecs,
            "hvp_mode": shared.how,
        },
    )


def _lower_bound(run: LanczosResult, dim: int) -> float:
    """What the smallest eigenvalue exceeds with probability ``_CONFIDENCE``; -inf where so few steps tell nothing.

    ``m`` steps from a uniformly random direction miss an end of the spectrum by more than the share ``ε`` of its width with
    a probability of at most ``1.648 √n exp(−√ε (2 m − 1))``; both ends are missed by ``ε`` at most, half of the risk each.
    """
    nodes, _ = run.quadrature()
    risk = (1 - _CONFIDENCE) / 2
    share = (math.log(1.648 * dim**0.5 / risk) / (2 * len(nodes) - 1)) ** 2
    if share >= 0.5:
        return -math.inf
    return (nodes[0] - share * (nodes[-1] - nodes[0]) / (1 - 2 * share)).item()
