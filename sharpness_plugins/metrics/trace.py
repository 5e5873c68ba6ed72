"""Traces and Frobenius norms of curvature matrices."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..expected import NOTHING, ExpectedWork, Range
from ..krylov_pass import KrylovNeed, KrylovPass, expected_trial, measure_alone, probes_beside
from ..objective import Objective
from ..operators import Curvature, Operator
from ..report import Kind, MetricResult, Status
from ..schema import check_types
from ..traces import Estimate, Probes, hutch_pp, xtrace
from .claims import of_curvature

__all__ = ["TRACE_METHODS", "FisherTrace", "GaussNewtonTrace", "HessianFrobenius", "HessianTrace"]

TRACE_METHODS = ("deflated", "hutchinson", "hutch++", "xtrace")
LABELS = ("model", "empirical")

_FEWEST_PRODUCTS = 6


@dataclass(frozen=True)
class _TraceMetric(ABC):
    """What the traces of all matrices have in common."""

    num_matvecs: int = 30
    method: str = "deflated"
    select: str | tuple[str, ...] | None = None
    adaptive: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        check_settings(self.num_matvecs, self.method)
        self._curvature()

    def expected_passes(self, objective: Objective) -> float:
        return float(min(self.num_matvecs, objective.dim))

    @abstractmethod
    def _curvature(self) -> Curvature: ...

    @property
    def invariances(self) -> frozenset[str]:
        return of_curvature(self.adaptive)

    def expected_work(self, objective: Objective) -> ExpectedWork:
        """Of the methods that read no run."""
        least = self.num_matvecs if self.method == "hutchinson" else min(self.num_matvecs, objective.dim) // 3
        spans = {"hutch++": self.num_matvecs // 3, "xtrace": self.num_matvecs // 2}
        products = Range(least, self.num_matvecs, self.num_matvecs)
        trial = expected_trial(objective) if self._curvature().matrix == "hessian" else NOTHING
        return ExpectedWork(gradients=trial, hvps=products, vectors=spans.get(self.method, 0))

    def krylov_need(self) -> KrylovNeed | None:
        return (
            KrylovNeed(self._curvature(), num_steps=self.num_matvecs // 2, num_products=self.num_matvecs)
            if self.method == "deflated"
            else None
        )

    def from_krylov(self, shared: KrylovPass) -> MetricResult:
        count = probes_beside(shared.run.num_matvecs, self.num_matvecs)
        with shared.operator.session():
            estimate = shared.probes.trace(count)
            layers = shared.probes.traces_of_blocks(count)
        return _result(
            shared.operator, estimate, layers, how(shared, estimate, *estimate.interval()), counts(shared, estimate)
        )

    def __call__(self, objective: Objective, rng: torch.Generator) -> MetricResult:
        if self.method == "deflated":
            return measure_alone(self, objective, rng)
        operator, layers, made = self._curvature().on(objective), {}, 0

        def matvec(vector: Tensor) -> Tensor:
            nonlocal made
            product = operator.matvec(vector)
            made += 1
            return product

        with operator.session():
            if self.method == "hutchinson":
                probes = Probes(matvec, operator.like, rng, blocks=operator.blocks, layout=operator.layout)
                estimate, layers = probes.trace(self.num_matvecs), probes.traces_of_blocks(self.num_matvecs)
            else:
                run = {"hutch++": hutch_pp, "xtrace": xtrace}[self.method]
                estimate = run(matvec, operator.like, self.num_matvecs, rng, memory=operator.memory, layout=operator.layout)
        low, high = estimate.interval()
        what = f"{estimate.instead}, {made} made" if estimate.instead else f"{self.method} with {made} products"
        said = f"{what}, {operator.how()}; 95 % interval [{low:.4g}, {high:.4g}]"
        return _result(operator, estimate, layers, said, {"num_matvecs": made, "hvp_mode": operator.how()})


@dataclass(frozen=True)
class HessianTrace(_TraceMetric):
    """Trace of the Hessian of the mean loss, with a standard error, and the traces of its layers.

    "deflated": half of the products make a Krylov basis, on which the trace is known, and the others probe the rest; the
    basis is the one that ``spectral_density`` and others read when they are measured together. Relative error with 30
    products, measured on a CNN of 2886 parameters: .004 after training on whole batches (Hutchinson .085, Hutch++ .012,
    XTrace .006), where a few eigenvalues make up nearly all of the spectrum; .035 after batches of 64 (.07, .045, .035),
    where even 15 exact eigenvectors would leave .026 to 15 probes; .31 untrained (.26, .37, .32), where the trace is a small
    difference of large parts and "hutchinson" is the best. "hutch++" and "xtrace" are those of the literature.

    ``details["layers"]`` holds the trace of every parameter's block with its standard error, at no further product
    ("deflated" and "hutchinson"); they add up to the trace. ``details["interval"]`` is Student's 95 % interval,
    ``value ± t · standard_error`` with one degree of freedom less than probes.

    Args:
        num_matvecs: products, with those of the basis. Where the basis is shared and has taken them all, a tenth more.
        method: one of ``TRACE_METHODS``.
        select: globs of parameter names: the trace of their block.
        adaptive: of ``D H D`` with ``D = diag |w|``: does not change when layers of a ReLU network are rescaled.
        hvp: how products are made; see ``hvp.HVP_MODES``.
    Memory: ``num_matvecs / 2`` vectors, none for "hutchinson".
    """

    hvp: str | None = None

    name: ClassVar[str] = "hessian_trace"
    works_on_shards: ClassVar[bool] = True

    def _curvature(self) -> Curvature:
        return Curvature("hessian", self.select, self.adaptive, self.hvp)


@dataclass(frozen=True)
class GaussNewtonTrace(_TraceMetric):
    """Trace of the Gauss–Newton matrix ``Jᵀ S J``, ``S`` the Hessian of the loss in the outputs; see ``HessianTrace``.

    Never negative for a convex loss; for cross-entropy the trace of the Fisher matrix.
    Cost: 1.7 to 2.5 gradients a product, and no more memory than a gradient, also for a large vocabulary.
    """

    name: ClassVar[str] = "gauss_newton_trace"

    def _curvature(self) -> Curvature:
        return Curvature("gauss_newton", self.select, self.adaptive)


@dataclass(frozen=True)
class FisherTrace(_TraceMetric):
    """Trace of the Fisher matrix: the mean squared norm of the gradients of single targets' losses; see ``HessianTrace``.

    Args:
        labels: "model": labels as the model would draw them, with a cross-entropy; none is drawn, since the mean over them
            is the Gauss–Newton matrix. "empirical": the labels of the data, with any loss; where the loss is small it is
            much smaller, and it is no curvature. The gradients are those of the positions of a cross-entropy (each token of
            a text), otherwise of samples.
    """

    labels: str = "model"

    name: ClassVar[str] = "fisher_trace"

    @property
    def invariances(self) -> frozenset[str]:
        """Nothing of the loss: with the labels of the data it is quadratic, and a scaled one has no labels of its own."""
        return of_curvature(self.adaptive, loss=None)

    def _curvature(self) -> Curvature:
        if self.labels not in LABELS:
            raise ValueError(f"labels must be one of {LABELS}, got {self.labels!r}")
        return Curvature("fisher" if self.labels == "model" else "empirical_fisher", self.select, self.adaptive)


@dataclass(frozen=True)
class HessianFrobenius:
    """Frobenius norm of the Hessian of the mean loss, ``√Σλ²``, with a standard error.

    Of the same basis and the same probes as the deflated trace, so measured beside ``hessian_trace`` it costs nothing.

    Args: see ``HessianTrace``.
    """

    num_matvecs: int = 30
    select: str | tuple[str, ...] | None = None
    adaptive: bool = False
    hvp: str | None = None

    name: ClassVar[str] = "hessian_frobenius"
    works_on_shards: ClassVar[bool] = True

    @property
    def invariances(self) -> frozenset[str]:
        return of_curvature(self.adaptive)

    def __post_init__(self) -> None:
        check_types(self)
        check_settings(self.num_matvecs, "deflated")
        self._curvature()

    def expected_passes(self, objective: Objective) -> float:
        return float(min(self.num_matvecs, objective.dim))

    def _curvature(self) -> Curvature:
        return Curvature("hessian", self.select, self.adaptive, self.hvp)

    def krylov_need(self) -> KrylovNeed | None:
        return KrylovNeed(self._curvature(), num_steps=self.num_matvecs // 2, num_products=self.num_matvecs)

    def from_krylov(self, shared: KrylovPass) -> MetricResult:
        count = probes_beside(shared.run.num_matvecs, self.num_matvecs)
        with shared.operator.session():
            square = shared.probes.squared_norm(count)
        value = math.sqrt(square.value)
        error = square.standard_error / (2 * value) if value else 0.0
        low, high = (math.sqrt(max(end, 0.0)) for end in square.interval())
        return MetricResult(
            value=value,
            standard_error=error,
            status=Status(
                kind_of(square), f"Frobenius norm of {shared.operator.description}, {how(shared, square, low, high)}"
            ),
            details={"interval": [low, high], **counts(shared, square)},
        )

    def __call__(self, objective: Objective, rng: torch.Generator) -> MetricResult:
        return measure_alone(self, objective, rng)


def check_settings(num_matvecs: int, method: str) -> None:
    if method not in TRACE_METHODS:
        raise ValueError(f"method must be one of {TRACE_METHODS}, got {method!r}")
    if num_matvecs < _FEWEST_PRODUCTS:
        raise ValueError(f"num_matvecs must be at least {_FEWEST_PRODUCTS}, got {num_matvecs}")


def _result(
    operator: Operator, estimate: Estimate, layers: dict[str, Estimate], how: str, details: dict[str, object]
) -> MetricResult:
    return MetricResult(
        value=estimate.value,
        standard_error=estimate.standard_error,
        status=Status(kind_of(estimate), f"trace of {operator.description}, {how}"),
        details={
            "interval": list(estimate.interval()),
            "layers": {
                name: {"trace": layer.value, "standard_error": layer.standard_error} for name, layer in layers.items()
            },
            "mean_eigenvalue": estimate.value / operator.dim,
            **details,
        },
    )


def kind_of(estimate: Estimate) -> Kind:
    return Kind.ESTIMATE if estimate.standard_error else Kind.EXACT


def how(shared: KrylovPass, estimate: Estimate, low: float, high: float) -> str:
    basis = f"{shared.run.num_matvecs} products in a Krylov basis of {shared.run.num_kept}"
    if not estimate.standard_error:
        return f"exact: {basis} span the whole space ({shared.how})"
    return f"{basis}, {estimate.degrees + 1} outside of it ({shared.how}); 95 % interval [{low:.4g}, {high:.4g}]"


def counts(shared: KrylovPass, estimate: Estimate) -> dict[str, object]:
    probes = estimate.degrees + 1 if estimate.standard_error else 0
    return {
        "num_probes": probes,
        "basis_size": shared.run.num_kept,
        "num_matvecs": shared.run.num_matvecs + probes,
        "hvp_mode": shared.how,
    }
