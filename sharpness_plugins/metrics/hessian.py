"""Eigenvalues of the Hessian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .. import sampling
from ..krylov import WHICH, top_ritz_pairs
from ..objective import Objective
from ..report import Kind, MetricResult, Status

__all__ = ["HessianTopK"]

_WHOLE = 100


@dataclass(frozen=True)
class HessianTopK:
    """The ``k`` largest eigenvalues of the Hessian of the mean loss; ``value`` is the first.

    By Lanczos with full re-orthogonalization on exact Hessian-vector products, until the residual of every wanted pair,
    and of one guard pair, is below ``tolerance`` times its value; eigenvalue errors are then of the order of
    residual² / gap (1e-5 typically at the default). ``details["eigenvalues"]`` and ``details["residuals"]`` are lists,
    descending: some eigenvalue lies within each residual of the value beside it. Where the budget runs out first, the
    values are lower bounds for "LA", and the status says so.

    An eigenvalue that occurs several times exactly (the last layer of several outputs under squared error, say) is found at
    least once, but not always as often as it occurs; smaller true eigenvalues then fill the list. Up to 100 parameters the
    whole Hessian is found instead, and each eigenvalue as often as it occurs.

    For piecewise linear networks (ReLU, max pooling) this is the Hessian that automatic differentiation sees; kinks do
    not count. It is not invariant to rescaling layers, and with cross-entropy it falls as the loss falls.

    Args:
        k: number of eigenvalues; lowered to the number of parameters where that is smaller, and said.
        tolerance: relative residual.
        which: "LA" for the algebraically largest (sharpness), "LM" for the largest in magnitude.
        num_matvecs: budget of products; None for ``20 k + 100``.
    Cost: typically 8 to 12 products for k = 1 and 13 to 25 for k = 5, each about three gradients; ``4 k + 20`` vectors of
        memory, or down to ``k + 3`` where no more fit.
    """

    k: int = 5
    tolerance: float = 1e-2
    which: str = "LA"
    num_matvecs: int | None = None

    name: ClassVar[str] = "hessian_topk"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")
        if not self.tolerance > 0:
            raise ValueError(f"tolerance must be positive, got {self.tolerance}")
        if self.which not in WHICH:
            raise ValueError(f"which must be one of {WHICH}, got {self.which!r}")
        if self.num_matvecs is not None and self.num_matvecs < self.k:
            raise ValueError(
                f"k = {self.k} eigenvalues need at least as many products, got num_matvecs = {self.num_matvecs}"
            )

    def expected_passes(self, objective: Objective) -> float:
        return float(min(self._budget(), 3 * self.k + 7, objective.dim))

    def _budget(self) -> int:
        return 20 * self.k + 100 if self.num_matvecs is None else self.num_matvecs

    def __call__(self, objective: Objective, rng: torch.Generator) -> MetricResult:
        k = min(self.k, objective.dim)
        start = sampling.normal(objective.dim, rng, objective.origin)
        # a few parameters have their whole Hessian, and with it the multiplicities that one start vector does not see
        whole = objective.dim <= min(_WHOLE, self._budget())
        pairs = top_ritz_pairs(
            objective.hvp,
            start,
            k,
            num_matvecs=self._budget(),
            tolerance=self.tolerance,
            which=self.which,
            guard=objective.dim - k if whole else 1,
            max_basis=objective.dim if whole else None,
            generator=rng,
        )
        values, residuals = pairs.values.tolist(), pairs.residuals.tolist()
        worst = max(residual / abs(value) if value else 0.0 for value, residual in zip(values, residuals, strict=True))
        how = f"{pairs.num_matvecs} products, {objective.hvp_mode}, largest relative residual {worst:.1e}"
        if k < self.k:
            how += f"; k={self.k} was lowered to the number of parameters"
        if pairs.converged:
            checked = "on the whole space" if whole else "with a guard pair"
            status = Status(Kind.CONVERGED, f"residuals below {self.tolerance:g} of each value, {checked} ({how})")
        else:
            bound = "; the values are lower bounds" if self.which == "LA" else ""
            status = Status(
                Kind.NOT_CONVERGED,
                f"the budget of {self._budget()} products ran out before the residuals fell below {self.tolerance:g} "
                f"({how}){bound}",
            )
        return MetricResult(
            value=values[0],
            status=status,
            details={
                "eigenvalues": values,
                "residuals": residuals,
                "k": k,
                "which": self.which,
                "tolerance": self.tolerance,
                "num_matvecs": pairs.num_matvecs,
                "hvp_mode": objective.hvp_mode,
            },
        )
