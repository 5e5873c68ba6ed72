"""Eigenvalues of the Hessian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..krylov import Ending, LanczosRequest, LanczosResult
from ..krylov_pass import KrylovNeed, KrylovPass, measure_alone
from ..objective import Objective
from ..operators import Curvature
from ..report import Kind, MetricResult, Status
from ..schema import check_types
from .claims import of_curvature

__all__ = ["HessianTopK"]

WHICH = ("LA", "LM")


@dataclass(frozen=True)
class HessianTopK:
    """The ``k`` largest eigenvalues of the Hessian of the mean loss; ``value`` is the first.

    By Lanczos with full re-orthogonalization on exact Hessian-vector products, until the residual of every wanted pair is
    below ``tolerance`` times its value, and a guard pair has settled. ``details["eigenvalues"]``, ``["residuals"]`` and
    ``["error_bars"]`` are lists, descending: some eigenvalue lies within each residual of the value beside it, and this one
    within its error bar, ``min(r, r²/gap)``, unless others hide in the gap (1e-5 typically at the default). Where the budget
    runs out first, the values are lower bounds for "LA", and the status says so.

    An eigenvalue that occurs several times exactly (the last layer of several outputs under squared error, say) is found at
    least once, but not always as often as it occurs, and a cluster narrower than ``tolerance`` is like one; smaller true
    eigenvalues then fill the list. ``check_multiplicity`` finds them all. Up to 100 parameters the whole Hessian is found
    instead, and each eigenvalue as often as it occurs.

    For piecewise linear networks (ReLU, max pooling) this is the Hessian that automatic differentiation sees; kinks do
    not count. It is not invariant to rescaling layers, and with cross-entropy it falls as the loss falls.

    Args:
        k: number of eigenvalues; lowered to the number of parameters where that is smaller, and said.
        tolerance: relative residual.
        which: "LA" for the algebraically largest (sharpness), "LM" for the largest in magnitude.
        num_matvecs: budget of products; None for ``20 k + 100``.
        guard, check_multiplicity, max_basis, storage: see ``krylov.LanczosRequest``.
        select: globs of parameter names: the eigenvalues of their block.
        hvp: how products are made; None for the objective's own choice, otherwise one of ``hvp.HVP_MODES``.
    Cost: typically 8 to 12 products for k = 1 and 13 to 25 for k = 5, each two gradients where the graphs fit in memory
        (1.5 for ResNet-18) and three where not; ``2 k + 4`` vectors of memory, or down to ``k + 3`` where no more fit.
    """

    k: int = 5
    tolerance: float = 1e-2
    which: str = "LA"
    num_matvecs: int | None = None
    guard: int = 1
    check_multiplicity: bool = False
    max_basis: int | None = None
    storage: str = "full"
    hvp: str | None = None
    select: str | tuple[str, ...] | None = None

    name: ClassVar[str] = "hessian_topk"
    works_on_shards: ClassVar[bool] = True
    invariances: ClassVar[frozenset[str]] = of_curvature(adaptive=False)

    def __post_init__(self) -> None:
        check_types(self)
        if self.which not in WHICH:
            raise ValueError(f"which must be one of {WHICH}, got {self.which!r}")
        self.krylov_need()

    def expected_passes(self, objective: Objective) -> float:
        return float(min(self._budget(), 3 * self.k + 7, objective.dim))

    def _budget(self) -> int:
        return 20 * self.k + 100 if self.num_matvecs is None else self.num_matvecs

    def krylov_need(self) -> KrylovNeed:
        request = LanczosRequest(
            k=self.k,
            which=self.which,
            tolerance=self.tolerance,
            num_matvecs=self._budget(),
            guard=self.guard,
            check_multiplicity=self.check_multiplicity,
            max_basis=self.max_basis,
            storage=self.storage,
        )
        return KrylovNeed(Curvature("hessian", self.select, hvp=self.hvp), request)

    def __call__(self, objective: Objective, rng: torch.Generator) -> MetricResult:
        return measure_alone(self, objective, rng)

    def from_krylov(self, shared: KrylovPass) -> MetricResult:
        run, k = shared.run, min(self.k, shared.operator.dim)
        return MetricResult(
            value=run.values[0].item(),
            status=self._status(run, f"{run.num_matvecs} products, {shared.how}"),
            details={
                "eigenvalues": run.values[:k].tolist(),
                "residuals": run.residuals[:k].tolist(),
                "error_bars": run.bounds[:k].tolist(),
                "k": k,
                "which": self.which,
                "tolerance": self.tolerance,
                "num_matvecs": run.num_matvecs,
                "num_hidden": run.num_hidden,
                "basis_size": run.basis_size,
                "hvp_mode": shared.how,
                "hvp_check": shared.check,
            },
        )

    def _status(self, run: LanczosResult, how: str) -> Status:
        pairs = zip(run.values[: self.k].tolist(), run.residuals[: self.k].tolist(), strict=True)
        how += f", largest relative residual {max(r / abs(value) if value else 0.0 for value, r in pairs):.1e}"
        if len(run.values) < self.k and run.ending is not Ending.STOPPED:
            how += f"; k={self.k} was lowered to the number of parameters"
        if run.converged:
            met = "at the rounding of the products, or " if run.ending is Ending.ROUNDING else ""
            checked = "on the whole space" if run.ending is Ending.WHOLE_SPACE else _with_guards(self.guard)
            checked += "; hidden copies were looked for" * run.request.check_multiplicity
            return Status(Kind.CONVERGED, f"residuals {met}below {self.tolerance:g} of each value, {checked} ({how})")
        bound = "; the values are lower bounds" if self.which == "LA" else ""
        before = (
            "the search for hidden copies ended"
            if run.ending is Ending.UNSEARCHED
            else f"the residuals fell below {self.tolerance:g}"
        )
        cause = run.ending if run.ending is Ending.STOPPED else f"the budget of {self._budget()} products ran out"
        return Status(Kind.NOT_CONVERGED, f"{cause} before {before} ({how}){bound}")


def _with_guards(guard: int) -> str:
    return {0: "without a guard pair", 1: "with a guard pair"}.get(guard, f"with {guard} guard pairs")
