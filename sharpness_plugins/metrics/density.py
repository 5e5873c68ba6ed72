"""The spectral density of the Hessian."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..krylov import LanczosResult
from ..krylov_pass import KrylovNeed, KrylovPass, measure_alone
from ..objective import Objective
from ..operators import Curvature
from ..report import Kind, MetricResult, Status
from ..schema import check_types
from .claims import of_curvature

__all__ = ["SpectralDensity"]

_SETTLED = 1e-2  # relative residual of an eigenvalue that is set apart from the rest
_WIDTHS_BEYOND = 4.0


@dataclass(frozen=True)
class SpectralDensity:
    """How the eigenvalues of the Hessian are distributed; ``value`` is their root mean square, the width of it all.

    By stochastic Lanczos quadrature: ``details["nodes"]`` and ``["weights"]`` sum up to one and integrate functions of the
    spectrum. Eigenvalues that have converged are set apart with the weight 1/n that they have, and the quadrature of the
    random starting vector stands for the others. Its Monte-Carlo error is known from one vector: the mean of ``f`` over a
    uniformly random direction has the variance ``2 Var(f) / (n + 2)``, where ``Var`` is over the spectrum. For a network of
    a million parameters that is a thousandth; ``details["density"]``, smoothed by a Gaussian of standard deviation
    ``details["width"]``, has an error at every point of ``details["grid"]``, ``["density_error"]``. Beside it stands the
    resolution of the quadrature: detail finer than the distance of its nodes is smoothed away, or an artefact of them.
    ``details["negative_share"]`` is ``Σ_{λ<0} |λ| / Σ |λ|``, 0 at a minimum and near a half at initialization; where most
    eigenvalues are next to zero it depends on that resolution (measured with 20 nodes: 0.34 where 0.30 is right).

    Args:
        num_nodes: steps of the run; where the run is shared and makes more before its first restart, those.
        num_points: of the grid.
        width: of the smoothing, in units of the eigenvalues; None for the width of the unsettled spectrum over the number of
            its nodes, and at least two steps of the grid, which else would miss eigenvalues that stand alone.
        select: globs of parameter names: of their block.
        adaptive: of ``D H D`` with ``D = diag |w|``.
        hvp: how products are made; see ``hvp.HVP_MODES``.
    Source: Ubaru, Chen and Saad, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature (2017); Chen, Trogdon and
        Ubaru, Analysis of stochastic Lanczos quadrature for spectrum approximation (2021).
    """

    num_nodes: int = 20
    num_points: int = 201
    width: float | None = None
    select: str | tuple[str, ...] | None = None
    adaptive: bool = False
    hvp: str | None = None

    name: ClassVar[str] = "spectral_density"
    works_on_shards: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_types(self)
        if self.num_nodes < 2:
            raise ValueError(f"num_nodes must be at least 2, got {self.num_nodes}")
        if self.num_points < 2:
            raise ValueError(f"num_points must be at least 2, got {self.num_points}")
        if self.width is not None and not 0 < self.width < math.inf:
            raise ValueError(f"width must be None or a positive number, got {self.width}")
        self.krylov_need()

    @property
    def invariances(self) -> frozenset[str]:
        return of_curvature(self.adaptive)

    def expected_passes(self, objective: Objective) -> float:
        return float(min(self.num_nodes, objective.dim))

    def krylov_need(self) -> KrylovNeed:
        return KrylovNeed(Curvature("hessian", self.select, self.adaptive, self.hvp), num_steps=self.num_nodes)

    def from_krylov(self, shared: KrylovPass) -> MetricResult:
        operator, run = shared.operator, shared.run
        spectrum = _Spectrum.of(run, operator.dim)
        value, error = spectrum.root_mean_square()
        width = self.width if self.width is not None else spectrum.resolution(self.num_points)
        grid, density, bars = spectrum.smoothed(self.num_points, width)
        exact = spectrum.dim_random == 0
        said = "every eigenvalue is known" if exact else f"{len(spectrum.nodes)} nodes of one random direction"
        return MetricResult(
            value=value,
            standard_error=error,
            status=Status(
                Kind.EXACT if exact else Kind.ESTIMATE,
                f"root mean square eigenvalue of {operator.description}: {said} and {len(spectrum.settled)} settled "
                f"eigenvalues ({run.num_matvecs} products, {shared.how})",
            ),
            details={
                "nodes": torch.cat([spectrum.nodes, spectrum.settled]).tolist(),
                "weights": torch.cat([spectrum.weights, spectrum.settled_weights]).tolist(),
                "negative_share": spectrum.negative_share(),
                "settled_eigenvalues": spectrum.settled.tolist(),
                "grid": grid.tolist(),
                "density": density.tolist(),
                "density_error": bars.tolist(),
                "width": width,
                "num_matvecs": run.num_matvecs,
                "hvp_mode": shared.how,
            },
        )

    def __call__(self, objective: Objective, rng: torch.Generator) -> MetricResult:
        return measure_alone(self, objective, rng)


@dataclass(frozen=True)
class _Spectrum:
    """Settled eigenvalues, and a quadrature of the other ``dim_random`` ones; all weights together are 1."""

    nodes: Tensor
    weights: Tensor
    settled: Tensor
    dim: int

    @classmethod
    def of(cls, run: LanczosResult, dim: int) -> _Spectrum:
        if run.num_kept == dim:
            return cls(torch.empty(0).double(), torch.empty(0).double(), run.ritz_values, dim)
        nodes, weights = run.quadrature()
        done = run.ritz_residuals <= _SETTLED * run.ritz_values.abs()
        settled, residuals = run.ritz_values[done], run.ritz_residuals[done]
        # a node that stands for a settled eigenvalue is there already; one that has not settled on it may be further away
        gone = torch.zeros(len(nodes), dtype=torch.bool)
        taken = []
        for value, residual in zip(settled, residuals, strict=True):
            distance = torch.where(gone, math.inf, (nodes - value).abs())
            nearest = int(distance.argmin())
            if distance[nearest] <= max(residual.item(), _SETTLED * abs(value.item())):
                gone[nearest] = True
                taken.append(value)
        kept = torch.stack(taken) if taken else torch.empty(0, dtype=torch.float64)
        rest = weights[~gone]
        return cls(nodes[~gone], rest / rest.sum() * (1 - len(kept) / dim), kept, dim)

    @property
    def dim_random(self) -> int:
        return self.dim - len(self.settled)

    @property
    def settled_weights(self) -> Tensor:
        return torch.full_like(self.settled, 1 / self.dim)

    def mean(self, of_nodes: Tensor, of_settled: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over the spectrum of functions given by their values, shapes ``(m, p)`` and ``(s, p)``, and its error."""
        value = self.weights @ of_nodes + self.settled_weights @ of_settled
        if not self.dim_random:
            return value, torch.zeros_like(value)
        share = self.dim_random / self.dim
        w = self.weights / share
        spread = (w @ of_nodes.square() - (w @ of_nodes).square()).clamp_min(0)
        return value, share * (2 * spread / (self.dim_random + 2)).sqrt()

    def root_mean_square(self) -> tuple[float, float]:
        square, error = self.mean(self.nodes.square()[:, None], self.settled.square()[:, None])
        value = square.sqrt().item()
        return value, error.item() / (2 * value) if value else 0.0

    def negative_share(self) -> float:
        points, weights = torch.cat([self.nodes, self.settled]), torch.cat([self.weights, self.settled_weights])
        total = (weights @ points.abs()).item()
        return -(weights @ points.clamp(max=0)).item() / total if total else 0.0

    def resolution(self, num_points: int) -> float:
        """Distance of the nodes that stand for many eigenvalues, or of two pairs of points of the grid."""
        everything = torch.cat([self.nodes, self.settled])
        points = self.nodes if len(self.nodes) > 1 else everything
        apart = (points.max() - points.min()).item() / max(len(points), 2)
        on_grid = 2 * (everything.max() - everything.min()).item() / num_points
        return max(apart, on_grid) or max(everything.abs().max().item(), 1.0) * 1e-3

    def smoothed(self, num_points: int, width: float) -> tuple[Tensor, Tensor, Tensor]:
        points = torch.cat([self.nodes, self.settled])
        low, high = points.min().item() - _WIDTHS_BEYOND * width, points.max().item() + _WIDTHS_BEYOND * width
        grid = torch.linspace(low, high, num_points, dtype=torch.float64)

        def bell(centres: Tensor) -> Tensor:
            return torch.exp(-0.5 * ((grid - centres[:, None]) / width).square()) / (width * math.sqrt(2 * math.pi))

        density, error = self.mean(bell(self.nodes), bell(self.settled))
        return grid, density, error
