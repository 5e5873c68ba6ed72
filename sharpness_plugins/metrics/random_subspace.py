"""ε-box sharpness in random subspaces: Metric 2.1 of Keskar et al. 2017 with a random A."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import reductions, sampling, steps
from ..errors import MeasurementStopped
from ..expected import ExpectedWork
from ..maximizers import Ascent, Maximizer, MultiStart
from ..objective import Objective
from ..regions import Box, Subspace
from ..report import Kind, MetricResult, Status
from ..schema import check_types
from ..subspace import SignSubspace
from . import keskar
from .claims import OF_THE_BOX

__all__ = ["COLUMN_SCALES", "RandomSubspace"]

COLUMN_SCALES = ("unscaled", "unit", "matched")


def _default_maximizer() -> MultiStart:
    return MultiStart(solver=Ascent(max_gradients=8), max_gradients=16)


@dataclass(frozen=True)
class RandomSubspace:
    """``φ = 100 (max f(w+Ay) - f(w)) / (1 + f(w))`` over ``|y_i| <= ε(|(A⁺w)_i| + 1)``, for A with ``dim`` random columns.

    In percent. The mean over independent draws of A, with its standard error; each draw is a lower bound of its own
    maximum. A has random signs ±1 times a scale, the same on every device, and is never stored as floats (13 bytes per
    parameter for 100 columns). The paper does not say how A was drawn or scaled, and the scale decides the number's size:

    * "unscaled": entries ±1, as large as standard normal ones; a weight moves by about ε√dim.
    * "unit": columns of length 1, for which A⁺ is nearly Aᵀ; a weight moves by about ε√(dim / n), and φ is tiny.
    * "matched": a vertex moves the weights as far as a vertex of the full-space box does.

    Args:
        epsilon: ε; the paper uses 1e-3 and 5e-4.
        dim: number of columns, p in the paper; lowered to the number of parameters where that is smaller, and said.
        draws: number of draws of A.
        column_scale: see above.
        maximizer: solver of each draw; 16 gradients by default.
    Cost: 16 gradients a draw, each with two products with A.
    Source: Keskar et al. (2017), Metric 2.1 and Table 4.
    """

    epsilon: float = 1e-3
    dim: int = 100
    draws: int = 5
    column_scale: str = "unscaled"
    maximizer: Maximizer | str = field(default_factory=_default_maximizer)

    name: ClassVar[str] = "random_subspace"
    invariances: ClassVar[frozenset[str]] = OF_THE_BOX

    def __post_init__(self) -> None:
        check_types(self)
        keskar.check_epsilon(self.epsilon)
        keskar.solver(self.maximizer)
        if self.dim < 1:
            raise ValueError(f"dim must be at least 1, got {self.dim}")
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, got {self.draws}")
        if self.column_scale not in COLUMN_SCALES:
            raise ValueError(f"column_scale must be one of {COLUMN_SCALES}, got {self.column_scale!r}")

    def expected_passes(self, objective: Objective) -> float:
        return keskar.budget_of(self.maximizer) * self.draws

    def expected_work(self, objective: Objective) -> ExpectedWork:
        return ExpectedWork(gradients=keskar.expected_gradients(self.maximizer).times(self.draws))

    def __call__(self, objective: Objective, rng: torch.Generator) -> MetricResult:
        keskar.check_loss(objective.loss)
        dim = min(self.dim, objective.dim)
        scale = self._scale(objective, dim)
        values: list[float] = []
        norms: list[float] = []
        at_bound: list[float] = []
        solved: list[dict[str, Any]] = []
        for draw in range(self.draws):
            scope = steps.child("draw")
            try:
                told = scope.run(lambda draw=draw: self._drawn(objective, dim, scale, draw, rng), generator=rng)  # type: ignore[misc]
            except MeasurementStopped:
                if not values:
                    raise
                break
            if told["stopped"] and values:  # half a draw would pull the mean down
                break
            values.append(told["value"])
            norms.append(told["norm"])
            at_bound.append(told["at_bound"])
            solved.append(told["solved"])
            if told["stopped"]:
                break
        draws = len(values)
        error = statistics.stdev(values) / math.sqrt(draws) if draws > 1 else None
        spread = "" if draws == 1 else f" from {min(values):.4g} to {max(values):.4g}"
        message = (
            f"mean over {draws} draw{'s' if draws > 1 else ''}{spread} of {dim} random columns "
            f"({self.column_scale}), each a lower bound; {100 * statistics.mean(at_bound):.0f} % of the coordinates at the "
            f"bound, the weights moved by {statistics.mean(norms):.3g}"
        )
        message += keskar.passed_over(sum(draw["non_finite"] for draw in solved))
        if dim < self.dim:
            message += f"; dim={self.dim} was lowered to the number of parameters"
        return MetricResult(
            value=statistics.mean(values),
            standard_error=error,
            status=Status(Kind.ESTIMATE if draws > 1 else Kind.LOWER_BOUND, message),
            details={
                "epsilon": self.epsilon,
                "dim": dim,
                "draws": draws,
                "column_scale": self.column_scale,
                "entry_scale": scale,
                "maximizer": repr(self.maximizer),
                "loss": objective.loss,
                "values": values,
                "perturbation_norms": norms,
                "share_at_bound": at_bound,
                "solver": solved,
            },
        )

    def _drawn(self, objective: Objective, dim: int, scale: float, draw: int, rng: torch.Generator) -> dict[str, Any]:
        key = sampling.key_for(rng.initial_seed(), "columns", draw)
        columns = SignSubspace(objective.space, dim, key, scale=scale)
        box = Box.keskar(columns.coordinates(objective.origin), self.epsilon)
        within = Subspace(columns, box).within(objective.value_and_grad)

        def fn(y: Tensor) -> tuple[float, Tensor]:
            return steps.step("in the subspace", lambda: within(y), about=y)  # a gradient of dim numbers

        maximum = keskar.maximize(self.maximizer, fn, box, rng)
        return {
            "value": keskar.sharpness(maximum.value, objective.loss),
            "norm": columns.norm_of(maximum.perturbation),
            "at_bound": box.share_at_bound(maximum.perturbation),
            "solved": keskar.described(maximum, objective.loss),
            "stopped": maximum.stopped,
        }

    def _scale(self, objective: Objective, dim: int) -> float:
        if self.column_scale == "unscaled":
            return 1.0
        if self.column_scale == "unit":
            return 1 / math.sqrt(objective.dim)
        box_norm = reductions.norm(objective.origin.abs() + 1).item()  # ‖Ay‖ of a vertex is about scale · √(dim · n)
        return box_norm / math.sqrt(dim * objective.dim)
