"""ε-box sharpness in the full space: Metric 2.1 of Keskar et al. 2017."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import steps
from ..errors import MeasurementStopped
from ..expected import ExpectedWork, Range
from ..krylov_pass import expected_trial
from ..lanczos import basis_of_use
from ..layout import Layout
from ..maximizers import Maximizer, Maximum, MultiStart, Parked, from_tree, park, to_tree, unpark
from ..objective import Objective
from ..regions import Box
from ..report import Kind, MetricResult, Status
from ..schema import check_types
from . import keskar, starts
from .claims import OF_THE_BOX
from .starts import Starts

__all__ = ["EpsilonBox"]


_TOO_MUCH_LOST = 0.01


@dataclass(frozen=True)
class EpsilonBox:
    """``φ = 100 (max f(w+e) - f(w)) / (1 + f(w))`` over ``|e_i| <= ε(|w_i| + 1)``: the worst relative rise, in percent.

    The value is a lower bound: the maximum is approached from several starts, and local maxima are many.
    ``details["start_values"]`` holds what each start reached; their spread is the honest uncertainty. On a classifier the
    local maxima are indexed by the class that gets inflated, so the first starts are box vertices that raise one class
    against another, or raise or lower one (``starts.targeted_starts``). They race; zero, the antipode of the best point and
    random vertices follow where the budget allows.

    Not invariant to rescaling layers of a ReLU network (Dinh et al. 2017), and BatchNorm's mode moves it 9 to 40 times.

    Args:
        epsilon: ε; the paper uses 1e-3 and 5e-4.
        maximizer: the solver, or its name: "sign_frank_wolfe" (default, 24 gradients in all), "lbfgsb" (10 iterations of
            SciPy's L-BFGS-B, scaled so that they run), "lbfgsb_published" (the paper's call, which stops at once on
            well-trained networks).
        max_targets: classes or outputs tried as starts; 0 for none.
        sketch_samples: samples that tell which way a class goes; None for 64 to 1024 of them, about 2.5
            gradients' worth.
        eigenvectors: leading eigenvectors of the Hessian that are tried as starts before all others; they cost
            Hessian-vector products.
    Cost: 24 gradients, those that choose the starts included, and ``2 max_targets + 6`` forward passes.
    Source: Keskar et al. (2017), Metric 2.1 with A = I.
    """

    epsilon: float = 1e-3
    maximizer: Maximizer | str = field(default_factory=MultiStart)
    max_targets: int = 10
    sketch_samples: int | None = None
    eigenvectors: int = 0

    name: ClassVar[str] = "epsilon_box"
    works_on_shards: ClassVar[bool] = True
    invariances: ClassVar[frozenset[str]] = OF_THE_BOX

    def __post_init__(self) -> None:
        check_types(self)
        keskar.check_epsilon(self.epsilon)
        keskar.solver(self.maximizer)
        if self.max_targets < 0:
            raise ValueError(f"max_targets must be at least 0, got {self.max_targets}")
        if self.sketch_samples is not None and self.sketch_samples < 1:
            raise ValueError(f"sketch_samples must be at least 1, or None, got {self.sketch_samples}")
        if self.eigenvectors < 0:
            raise ValueError(f"eigenvectors must be at least 0, got {self.eigenvectors}")

    def expected_passes(self, objective: Objective) -> float:
        passes = keskar.budget_of(self.maximizer)
        if keskar.uses_proposals(self.maximizer):
            passes += 2 * self.max_targets + 6 + 4 * self.eigenvectors
        return passes

    def expected_work(self, objective: Objective) -> ExpectedWork:
        gradients = keskar.expected_gradients(self.maximizer)
        if not keskar.uses_proposals(self.maximizer):
            return ExpectedWork(gradients=gradients)
        most = 2 * self.max_targets + 7 if self.max_targets else 0
        if not self.eigenvectors:
            return ExpectedWork(values=Range(0, most, most), gradients=gradients)
        run = starts.eigenvector_request(self.eigenvectors, objective.dim)
        found = min(4 * self.eigenvectors + 10, run.num_matvecs)
        return ExpectedWork(
            values=Range(0, most, most),
            gradients=gradients.plus(expected_trial(objective)),
            hvps=Range(min(run.k, found), found, run.num_matvecs),
            vectors=basis_of_use(run, objective.dim),
        )

    def __call__(self, objective: Objective, rng: torch.Generator) -> MetricResult:
        keskar.check_loss(objective.loss)
        layout = objective.layout
        box = Box.keskar(objective.origin, self.epsilon, layout=layout)
        tried = starts.Tried()
        try:
            proposals, spent = self._starts(objective, box, rng, tried)
            maximum = keskar.maximize(self.maximizer, objective.value_and_grad, box, rng, proposals, spent=spent)
        except MeasurementStopped:
            if tried.point is None:
                raise
            maximum = _best_tried(tried, tried.point, box, objective.loss)
        if maximum.stopped and tried.point is not None and tried.value > maximum.value:
            said = f"{maximum.status.message}, below the best of the starts tried, {tried.name}"
            maximum = maximum._replace(
                perturbation=unpark(tried.point, box),
                value=tried.value,
                status=Status(Kind.LOWER_BOUND, said),
                gap=math.nan,
            )
        e = maximum.perturbation
        value = keskar.sharpness(maximum.value, objective.loss)
        at_bound = box.share_at_bound(e)
        moved = layout.norm(e).item()
        message = (
            f"{maximum.status.message}; {100 * at_bound:.0f} % of the coordinates at the bound, "
            f"the weights moved by {moved:.3g}{keskar.passed_over(maximum.non_finite)}"
        )
        lost = _lost_in_rounding(objective.origin, e, moved, layout)
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
        half_width = box.half_width
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
                "box_norm": layout.norm(half_width).item(),
                "largest_half_width": layout.largest(half_width.max().item() if len(half_width) else 0.0),
            },
        )

    def _starts(self, objective: Objective, box: Box, rng: torch.Generator, tried: starts.Tried) -> tuple[Starts, int]:
        """The starts, and the gradients that it took to choose them, rounded up."""
        if not keskar.uses_proposals(self.maximizer):
            return iter(()), 0
        scope = steps.child("starts")
        chosen, spent = scope.run(lambda: self._chosen(objective, box, rng, tried), generator=rng)
        parked = [(name, from_tree(point, box.anchor)) for name, point in chosen]
        return ((name, unpark(point, box)) for name, point in parked if point is not None), math.ceil(spent)

    def _chosen(self, objective: Objective, box: Box, rng: torch.Generator, tried: starts.Tried) -> tuple[list[Any], float]:
        """Names and parked points, as a tree, and the gradients that they took."""
        before = objective.cost.gradients
        chosen = [
            (name, to_tree(park(point, box)))
            for name, point in itertools.chain(
                starts.eigenvector_starts(objective, box, rng, self.eigenvectors),
                starts.targeted_starts(objective, box, rng, self.max_targets, self.sketch_samples, tried),
            )
        ]
        return chosen, objective.cost.gradients - before


def _best_tried(tried: starts.Tried, point: Parked, box: Box, loss: float) -> Maximum:
    """Of the points that were to become starts, and the trained weights, where the solver has not evaluated any."""
    said = f"the best of the starts tried until then ({tried.count})"
    perturbation, value, name = unpark(point, box), tried.value, tried.name
    if value < loss:
        said = f"no start tried until then ({tried.count}) lies above the trained weights"
        perturbation, value, name = torch.zeros_like(perturbation), loss, "zero"
    status = Status(Kind.LOWER_BOUND, said)
    return Maximum(
        perturbation, value, 0, status, start_values=(value,), start_names=(name,), start_gradients=(0,), stopped=True
    )


def _lost_in_rounding(origin: Tensor, perturbation: Tensor, length: float, layout: Layout) -> float:
    """``‖((w + e) - w) - e‖ / ‖e‖``: what the dtype of the weights cannot hold of the step, which is ``length`` long."""
    return layout.norm((origin + perturbation) - origin - perturbation).item() / length if length else 0.0
