"""ε-box sharpness in the full space: Metric 2.1 of Keskar et al. 2017."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .. import reductions
from ..maximizers import Maximizer, MultiStart
from ..objective import Objective
from ..regions import Box
from ..report import MetricResult, Status
from . import keskar

__all__ = ["EpsilonBox"]


_TOO_MUCH_LOST = 0.01


@dataclass(frozen=True)
class EpsilonBox:
    """``φ = 100 (max f(w+e) - f(w)) / (1 + f(w))`` over ``|e_i| <= ε(|w_i| + 1)``: the worst relative rise, in percent.

    The value is a lower bound: the maximum is approached from several starts, and local maxima are many.
    ``details["start_values"]`` holds what each start reached; their spread is the honest uncertainty. On a classifier the
    local maxima are indexed by the class that gets inflated, so one start is the box vertex that raises the mean logit of
    the class whose vertex has the highest loss (one backward and one forward pass for each of up to ten classes; for
    other outputs, each output raised and lowered). Then follow the antipode of the best point and random points.

    Not invariant to rescaling layers of a ReLU network (Dinh et al. 2017), and BatchNorm's mode moves it 9 to 40 times.

    Args:
        epsilon: ε; the paper uses 1e-3 and 5e-4.
        maximizer: the solver, or its name: "sign_frank_wolfe" (default, 24 gradients in all), "lbfgsb" (10 iterations of
            SciPy's L-BFGS-B, scaled so that they run), "lbfgsb_published" (the paper's call, which stops at once on
            well-trained networks).
        max_targets: classes or outputs tried as starts.
    Cost: about 24 gradients, and up to ``max_targets`` backward passes on at most 512 samples and as many forward passes.
    Source: Keskar et al. (2017), Metric 2.1 with A = I.
    """

    epsilon: float = 1e-3
    maximizer: Maximizer | str = field(default_factory=MultiStart)
    max_targets: int = 10

    name: ClassVar[str] = "epsilon_box"

    def __post_init__(self) -> None:
        keskar.check_epsilon(self.epsilon)
        keskar.solver(self.maximizer)
        if self.max_targets < 0:
            raise ValueError(f"max_targets must be at least 0, got {self.max_targets}")

    def expected_passes(self, objective: Objective) -> float:
        several = keskar.uses_proposals(self.maximizer)
        return keskar.budget_of(self.maximizer) + (2 * self.max_targets if objective.has_classes and several else 0)

    def __call__(self, objective: Objective, rng: torch.Generator) -> MetricResult:
        keskar.check_loss(objective.loss)
        box = Box(self.epsilon * (objective.origin.abs() + 1))
        maximum = keskar.maximize(self.maximizer, objective.value_and_grad, box, rng, self._targeted(objective, box))
        e = maximum.perturbation
        value = keskar.sharpness(maximum.value, objective.loss)
        at_bound = box.share_at_bound(e)
        moved = reductions.norm(e).item()
        message = (
            f"{maximum.status.message}; {100 * at_bound:.0f} % of the coordinates at the bound, "
            f"the weights moved by {moved:.3g}{keskar.passed_over(maximum.non_finite)}"
        )
        lost = _lost_in_rounding(objective.origin, e)
        if lost > _TOO_MUCH_LOST:
            message += (
                f"; {objective.origin.dtype} rounds {100 * lost:.2g} % of that step away, so the value is as uncertain: "
                "measure model.double(), or a larger epsilon"
            )
        if len(maximum.start_values) > 1:
            reached = ", ".join(
                f"{name} {keskar.sharpness(v, objective.loss):.4g}"
                for name, v in zip(maximum.start_names, maximum.start_values, strict=True)
            )
            message += f"; reached from {reached}"
        return MetricResult(
            value=value,
            status=Status(maximum.status.kind, message),
            details={
                "epsilon": self.epsilon,
                "maximizer": repr(self.maximizer),
                "loss": objective.loss,
                "max_loss": maximum.value,
                **keskar.described(maximum, objective.loss),
                "share_at_bound": at_bound,
                "perturbation_norm": moved,
                "step_lost_in_rounding": lost,
                "box_norm": reductions.norm(box.half_width).item(),
                "largest_half_width": box.half_width.max().item(),
            },
        )

    def _targeted(self, objective: Objective, box: Box) -> Iterator[tuple[str, Tensor]]:
        """The two vertices of highest loss among those that raise (or lower) one output; one forward pass ranks each."""
        if not self.max_targets:
            return
        kept: list[tuple[float, str, Tensor]] = []
        for k, gradient in objective.output_gradients(max_outputs=self.max_targets):
            for sign, verb in ((1, "raised"), (-1, "lowered")):
                if sign < 0 and objective.has_classes:
                    continue  # lowering one class raises the others, which have vertices of their own
                vertex = sign * box.ascent_vertex(gradient)
                value = objective.value(vertex)
                if math.isfinite(value):
                    what = f"class {k}" if objective.has_classes else f"output {k} {verb}"
                    kept.append((value, what, vertex))
                    kept = sorted(kept, key=lambda entry: -entry[0])[:2]
        for _, what, vertex in kept:
            yield what, vertex


def _lost_in_rounding(origin: Tensor, perturbation: Tensor) -> float:
    """``‖((w + e) - w) - e‖ / ‖e‖``: what the dtype of the weights cannot hold of the step."""
    length = reductions.norm(perturbation).item()
    return reductions.norm((origin + perturbation) - origin - perturbation).item() / length if length else 0.0
