"""The Hessian as an optimizer sees it, and how far it is from the edge of stability."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from .. import distributed
from ..expected import ExpectedWork
from ..krylov_pass import KrylovNeed, KrylovPass, expected_products, expected_trial, merged
from ..lanczos import basis_of_use
from ..objective import Objective
from ..operators import Curvature
from ..report import MetricResult
from ..schema import check_types
from .claims import of_curvature
from .eigenpairs import topk_request, topk_result

__all__ = ["PreconditionedTopK", "Preconditioner", "preconditioner_of"]

_WRAPPED_AS = ("optimizer", "base_optimizer")  # by Accelerate and Lightning; by sharpness-aware optimizers


@dataclass(frozen=True)
class Preconditioner:
    """What an optimizer makes of a gradient: steps of ``learning_rate · D²`` times its running mean.

    Attributes:
        scale: the diagonal of ``D``, shape ``(dim,)``: ``P^{-1/2}``, times the root of the parameter's learning rate over
            the largest. 0 for what the optimizer does not move.
        shift: weight decay that is part of the gradient, times ``D²``; None without.
        threshold: gradient descent on a quadratic diverges where an eigenvalue of ``D H D`` exceeds it.
        num_moved: parameters that the optimizer moves.
    """

    scale: Tensor
    shift: Tensor | None
    learning_rate: float
    threshold: float
    description: str
    num_moved: int


@dataclass(frozen=True)
class PreconditionedTopK:
    """The ``k`` largest eigenvalues of ``P^{-1/2} H P^{-1/2}``, ``P`` read from a live optimizer; ``value`` is the first.

    ``details["edge_of_stability_ratio"]`` is the first over the threshold above which the optimizer diverges on a
    quadratic: 1 at the edge, where full-batch training settles. With the learning rate η and momentum β the threshold is
    2/η (SGD), (2 + 2β)/η (momentum), (2 + 2β)/((1 + 2β) η) (Nesterov), and (2 + 2β₁)/((1 − β₁) η) for Adam and AdamW, whose
    ``P`` is ``(√v̂ + ε)(1 − β₁ᵗ)``. Weight decay that enters the gradient is added to ``H``; AdamW's, which does not, is
    left out. Groups with different learning rates are scaled to the largest.

    Args:
        optimizer: of the model that is measured, after a step. Read when the metric is called; never written to.
        k, tolerance, num_matvecs: as of ``HessianTopK``.
        hvp: how products are made; see ``hvp.HVP_MODES``.
    Source: Cohen et al., Gradient descent on neural networks typically occurs at the edge of stability (2021), and Adaptive
        gradient methods at the edge of stability (2022).
    """

    optimizer: Optimizer
    k: int = 1
    tolerance: float = 1e-2
    num_matvecs: int | None = None
    hvp: str | None = None

    name: ClassVar[str] = "preconditioned_topk"
    invariances: ClassVar[frozenset[str]] = of_curvature(adaptive=False)

    def __post_init__(self) -> None:
        check_types(self)
        _unwrapped(self.optimizer)
        self._need()

    def expected_passes(self, objective: Objective) -> float:
        return float(min(3 * self.k + 7, objective.dim))

    def expected_work(self, objective: Objective) -> ExpectedWork:
        needs = [self._need()]
        vectors = basis_of_use(merged(needs, objective.dim), objective.dim)
        products = expected_products(needs, objective.dim)
        return ExpectedWork(gradients=expected_trial(objective), hvps=products, vectors=vectors)

    def _need(self) -> KrylovNeed:
        return KrylovNeed(Curvature("hessian", hvp=self.hvp), topk_request(self.k, self.tolerance, self.num_matvecs))

    def __call__(self, objective: Objective, rng: torch.Generator) -> MetricResult:
        seen = preconditioner_of(self.optimizer, objective)
        need = self._need()
        operator = need.operator.on(objective).scaled(
            seen.scale, shift=seen.shift, description=f"the Hessian preconditioned by {seen.description}"
        )
        with objective.session():
            result = topk_result(KrylovPass(operator, [need], rng), self.k, self.tolerance)
        ratio = result.value / seen.threshold
        said = (
            f"{result.status.message}; {ratio:.3g} of the edge of stability at {seen.threshold:.4g} "
            f"(learning rate {seen.learning_rate:.3g})"
        )
        if seen.num_moved < objective.dim:
            said += f"; the optimizer moves {seen.num_moved:,} of {objective.dim:,} parameters, and the others are left out"
        return replace(
            result,
            status=replace(result.status, message=said),
            details={
                **result.details,
                "edge_of_stability_ratio": ratio,
                "threshold": seen.threshold,
                "learning_rate": seen.learning_rate,
                "optimizer": seen.description,
            },
        )


def preconditioner_of(optimizer: Optimizer, objective: Objective) -> Preconditioner:
    """Read the preconditioner of SGD, Adam or AdamW at the parameters of an objective.

    Raises:
        ValueError: the optimizer has none of these parameters or none of their states yet; its groups have different
            momenta; it maximizes.
    """
    optimizer = _unwrapped(optimizer)
    names = {parameter: name for name, parameter in objective.module.named_parameters()}
    numels = dict(zip(objective.space.names, objective.space.numels, strict=True))
    groups = [(group, [p for p in group["params"] if names.get(p) in numels]) for group in optimizer.param_groups]
    groups = [(group, parameters) for group, parameters in groups if parameters]
    if not groups:
        raise ValueError(
            f"the {type(optimizer).__name__} has none of the measured parameters. Pass the optimizer of this very model "
            "(a copy of a model has parameters of its own)."
        )
    factors = {_factor(optimizer, group) for group, _ in groups}
    if len(factors) > 1:
        raise ValueError("the groups of the optimizer have different momenta, and so no common edge of stability")
    if any(group.get("maximize") for group, _ in groups):
        raise ValueError("the optimizer maximizes, so it has no edge of stability")
    largest = max(float(group["lr"]) for group, _ in groups)
    scales, shifts = ({name: torch.zeros(numel) for name, numel in numels.items()} for _ in range(2))
    moved = 0
    for name, parameter, group in _moved(optimizer, groups, names):
        rate = float(group["lr"]) / largest if largest else 1.0
        square = (rate / _preconditioner(optimizer, parameter, group)).reshape(-1)
        scales[name] = square.sqrt()
        shifts[name] = float(group["weight_decay"]) * square * (not _is_decoupled(optimizer, group))
        moved += parameter.numel()
    if not moved:
        raise ValueError(
            f"the {type(optimizer).__name__} has made no step yet, so it has no preconditioner. Take a step first."
        )
    scale, shift = (torch.cat([x.to(objective.origin) for x in parts.values()]) for parts in (scales, shifts))
    return Preconditioner(
        scale=scale,
        shift=shift if bool(shift.any()) else None,
        learning_rate=largest,
        threshold=factors.pop() / largest if largest else math.inf,
        description=type(optimizer).__name__,
        num_moved=moved,
    )


def _unwrapped(optimizer: Any) -> Optimizer:
    """The SGD, Adam or AdamW inside of wrappers."""
    inner = optimizer
    for _ in range(4):
        if isinstance(inner, (SGD, Adam, AdamW)):
            return inner
        inner = next((getattr(inner, name) for name in _WRAPPED_AS if hasattr(inner, name)), None)
    raise ValueError(
        f"the preconditioner of SGD, Adam and AdamW is known here, not that of {type(optimizer).__name__}. "
        "Measure hessian_topk, or adaptive_topk."
    )


def _factor(optimizer: Optimizer, group: dict[str, Any]) -> float:
    """The threshold times the learning rate."""
    if not isinstance(optimizer, SGD):
        beta = float(group["betas"][0])
        return (2 + 2 * beta) / (1 - beta)
    beta = float(group["momentum"])
    if group["nesterov"]:
        return (2 + 2 * beta) / (1 + 2 * beta)
    return (2 + 2 * beta) / (1 - float(group["dampening"]) if beta else 1.0)


def _is_decoupled(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    return isinstance(optimizer, AdamW) or bool(group.get("decoupled_weight_decay"))


def _moved(
    optimizer: Optimizer, groups: list[tuple[dict[str, Any], list[Tensor]]], names: dict[Any, str]
) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    for group, parameters in groups:
        for parameter in parameters:
            if isinstance(optimizer, SGD) or "exp_avg_sq" in optimizer.state.get(parameter, {}):
                yield names[parameter], parameter, group


def _preconditioner(optimizer: Optimizer, parameter: Tensor, group: dict[str, Any]) -> Tensor:
    """The diagonal of ``P`` for one parameter, in float64."""
    if isinstance(optimizer, SGD):
        return torch.ones(parameter.numel(), dtype=torch.float64)
    state = optimizer.state[parameter]
    step = float(state["step"])
    beta1, beta2 = (float(beta) for beta in group["betas"])
    square = distributed.whole(state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]).detach().double()
    bias: float = 1 - beta1**step
    denominator: Tensor = (square / (1 - beta2**step)).sqrt() + float(group["eps"])
    return denominator * bias
