"""SciPy's L-BFGS-B, the paper's solver, on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from ..errors import MeasurementStopped
from ..regions import Box, Region
from ..report import Kind, Status
from .core import Evaluations, Maximum, Proposals, ValueAndGrad

__all__ = ["LBFGSB"]


@dataclass(frozen=True)
class LBFGSB:
    """SciPy's L-BFGS-B, the paper's solver, on the host: 10 iterations from one start.

    With ``published=True`` the call is the paper's: SciPy's default tolerances, the raw objective. On a well-trained
    network, whose gradient is below ``gtol = 1e-5``, it stops at once and reports no rise at all; the status then says so.
    Otherwise the variables are scaled to the unit box, the objective so that its largest scaled slope is 100, and both
    tolerances are zero, so that the iterations are really run and the answer does not depend on the unit of the loss.

    Cost: 10 to 15 gradients; 490 bytes of host memory and 3.4 µs of host time per parameter.
    Source: Byrd et al., A limited memory algorithm for bound constrained optimization (1995); Keskar et al. (2017).
    """

    max_iterations: int = 10
    published: bool = False

    _PAIRS = 10

    def __post_init__(self) -> None:
        if self.max_iterations < 1:
            raise ValueError(f"max_iterations must be at least 1, got {self.max_iterations}")

    @property
    def num_proposals(self) -> int:
        return 0

    def maximize(self, fn: ValueAndGrad, region: Region, start: Tensor, proposals: Proposals = ()) -> Maximum:
        """See ``Maximizer``; ``region`` must be a ``Box``, ``proposals`` are not used.

        Raises:
            TypeError: the region is no box, or its vectors lie in shards.
            ValueError: the problem is so large that SciPy's 32-bit workspace index would overflow.
        """
        if not isinstance(region, Box):
            raise TypeError(f"LBFGSB maximizes over a Box, got a {type(region).__name__}")
        if not region.layout.is_whole:
            raise TypeError(
                "LBFGSB runs SciPy on whole vectors, and those of this measurement lie in shards over the ranks. Use the "
                "default maximizer, 'sign_frank_wolfe', or 'apgd' or 'spectral_projected_gradient'."
            )
        largest = (2**31 - 1 - 11 * self._PAIRS**2) // (2 * self._PAIRS + 5)
        if start.numel() > largest:
            raise ValueError(
                f"SciPy's L-BFGS-B overflows its 32-bit workspace above {largest:,} variables, and this problem has "
                f"{start.numel():,}. Use the default maximizer, 'sign_frank_wolfe', which has no such limit."
            )
        evaluations = Evaluations(fn, budget=0)
        widths = region.half_width
        half_width = widths.double().cpu().numpy()
        origin = region.project(start)
        best: list[tuple[float, Tensor, Tensor]] = []

        def evaluate(e: Tensor) -> tuple[float, Tensor]:
            value, gradient = evaluations(e)
            if not bool(torch.isfinite(gradient).all()):
                value = evaluations.refused() if value > -np.inf else value
            if not best or value > best[0][0]:
                best[:] = [(value, e, gradient)]
            return value, gradient

        first, gradient = evaluate(origin)
        slope = (widths * gradient).abs().max().item()
        unit, scale = (1.0, 1.0) if self.published else (half_width, 100.0 / slope if slope > 0 else 1.0)
        pending: list[tuple[float, Tensor]] = [(first, gradient)]  # SciPy asks for the start again

        def negated(u: np.ndarray[Any, Any]) -> tuple[float, np.ndarray[Any, Any]]:
            if pending:
                value, grad = pending.pop()
            else:
                value, grad = evaluate(region.project(torch.from_numpy(u * unit).to(start)))
            return -(value - first) * scale if not self.published else -value, -grad.double().cpu().numpy() * unit * scale

        bound = half_width if self.published else np.ones_like(half_width)
        options: dict[str, Any] = {"maxiter": self.max_iterations, "maxcor": self._PAIRS}
        if not self.published:
            options |= {"ftol": 0.0, "gtol": 0.0}
        u0 = origin.double().cpu().numpy()
        if not self.published:
            u0 = np.divide(u0, half_width, out=np.zeros_like(u0), where=half_width > 0)
        bounds = scipy.optimize.Bounds(-bound, bound)
        try:
            outcome = scipy.optimize.minimize(negated, u0, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
            iterations, ending = int(outcome.nit), str(outcome.message)
        except MeasurementStopped:
            outcome, iterations, ending = None, 0, "the measurement was stopped"
        value, point, gradient = best[0]
        how = "as published" if self.published else "scaled, zero tolerances"
        said = (
            f"SciPy L-BFGS-B ({how}), {iterations} of {self.max_iterations} iterations, {evaluations.gradients} gradients: "
            f"{ending}"
        )
        stays = outcome is not None and iterations == 0
        if outcome is None:
            said = f"SciPy L-BFGS-B ({how}), {evaluations.gradients} gradients when {ending}"
        elif stays:
            said += ". It stopped where it started, so its 0 is not a maximum; use the default maximizer"
        elif iterations < self.max_iterations and self.published:
            said += ". It stopped before its iterations were used"
        return Maximum(
            perturbation=point,
            value=value,
            steps=iterations,
            status=Status(Kind.NOT_CONVERGED if stays else Kind.LOWER_BOUND, said),
            gradients=evaluations.gradients,
            gradient=gradient,
            start_values=(value,),
            start_names=("zero" if not start.any() else "start",),
            start_gradients=(evaluations.gradients,),
            non_finite=evaluations.non_finite,
            gap=region.vertex_step(None, point, gradient).gap,
            stopped=outcome is None,
        )
