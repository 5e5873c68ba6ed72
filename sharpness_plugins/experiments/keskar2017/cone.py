"""Does a sharp minimum resemble a cone? A metric: along which directions the loss rises steeply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ... import sampling
from ...krylov import LanczosRequest
from ...lanczos import lanczos
from ...objective import Objective
from ...regions import Box
from ...report import Kind, MetricResult, Status

__all__ = ["ConeTest"]


@dataclass(frozen=True)
class ConeTest:
    """Share of random directions along which the loss rises steeply, beside that of the top subspace's dimensions.

    Each direction ``d`` has length 1 and is followed to ``±r``, where r is the distance of the corners of the ε-box; the
    rise is ``100 (f(w ± r d) - f(w)) / (1 + f(w))`` in percent, of the worse side. ``value`` is the share of random
    directions with a rise of at least ``steep`` percent; ``details`` holds every rise. The top subspace is that of the
    ``dims`` largest eigenvalues of the Hessian.

    Cost: ``2 (directions + dims)`` values and about ``3 dims + 10`` Hessian-vector products; ``dims`` vectors.
    Source: Keskar et al. (2017), section 2.2, who sampled the loss near large-batch minima without saying how.
    """

    epsilon: float = 1e-3
    directions: int = 100
    dims: int = 20
    steep: float = 1.0

    name: ClassVar[str] = "cone"

    def __post_init__(self) -> None:
        if min(self.directions, self.dims) < 1 or not self.epsilon > 0:
            raise ValueError(
                f"directions and dims must be at least 1 and epsilon positive, got {self.directions}, {self.dims} and "
                f"{self.epsilon}"
            )

    def __call__(self, objective: Objective, rng: torch.Generator) -> MetricResult:
        origin = objective.origin
        radius = Box.keskar(origin, self.epsilon).half_width.double().norm().item()
        random = [self._rise(objective, sampling.normal(objective.dim, rng, origin), radius) for _ in range(self.directions)]
        request = LanczosRequest(
            k=min(self.dims, objective.dim), tolerance=0.1, num_matvecs=20 + 8 * self.dims, keep_basis=True
        )
        with objective.session():
            run = lanczos(objective.hvp, sampling.normal(objective.dim, rng, origin), request, generator=rng)
        vectors = run.vectors
        assert vectors is not None
        top = [self._rise(objective, vector.to(origin), radius) for vector in vectors]
        shares = [sum(rise >= self.steep for rise in rises) / len(rises) for rises in (random, top)]
        return MetricResult(
            value=shares[0],
            standard_error=(shares[0] * (1 - shares[0]) / len(random)) ** 0.5,
            status=Status(
                Kind.ESTIMATE,
                f"at a distance of {radius:.3g} the loss rises by {self.steep:g} % or more along {100 * shares[0]:.0f} % of "
                f"{len(random)} random directions and {100 * shares[1]:.0f} % of the top {len(top)} dimensions",
            ),
            details={"radius": radius, "random_rises": random, "top_rises": top, "steep": self.steep},
        )

    def _rise(self, objective: Objective, direction: Tensor, radius: float) -> float:
        step = direction * (radius / direction.double().norm().item())
        worse = max(objective.value(step), objective.value(-step))
        return 100 * (worse - objective.loss) / (1 + objective.loss)
