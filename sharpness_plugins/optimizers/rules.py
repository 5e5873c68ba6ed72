"""How sharpness-aware optimizers differ: where the weights go for another gradient, and what is made of the gradients.

A rule is a frozen dataclass with at most three hooks, each a pure function of a :class:`Step`: it changes no tensor that it
is given. Everything else (the norm, moving there and back, counting, checkpoints) belongs to ``SharpnessAware``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

__all__ = [
    "ASAM",
    "FSAM",
    "GSAM",
    "SAM",
    "WSAM",
    "Descent",
    "KStepSAM",
    "LookSAM",
    "MomentumSAM",
    "RandomSAM",
    "Rule",
    "Step",
]

Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class Step:
    """What a rule's hooks look at. Lists are parallel; they hold what this rank has of each weight, as real numbers.

    In ``metric`` and ``direction`` they run over the weights that have a gradient now (over all of them for a rule with
    ``needs_gradient = False``), in ``combine`` over those that had one in any pass.

    Attributes:
        index: steps taken before this one that the rule was asked for.
        weights: where the step begins.
        gradients: at the point where the weights stand now; in ``combine``, the first ones. Empty without a first pass.
        second: gradients at the end of the ascent; None before it, and on steps without one.
        scale: what losses, and so gradients, were multiplied with, shape ``()``; 1 without a ``GradScaler``.
        state: tensors by name that the last step left (parallel lists, zeros for weights that are new), those that
            ``Rule.state`` names. Entries that a hook assigns are kept if the step is taken; empty before the first.
        inner: inner product over all weights of all ranks that share them out, shape ``()``, float64.
        norm: Euclidean norm, likewise.
        momentum: the base optimizer's running mean of gradients (``momentum_buffer``, ``exp_avg``), zeros where there is none.
        noise: standard normal numbers, other ones in each step, the same on each rank that holds the same weights.
    """

    index: int
    weights: Tensors
    gradients: Tensors
    second: Tensors | None
    scale: Tensor
    state: dict[str, Tensors]
    inner: Callable[[Tensors, Tensors], Tensor]
    norm: Callable[[Tensors], Tensor]
    momentum: Callable[[], Tensors]
    noise: Callable[[], Tensors]


@dataclass(frozen=True)
class Descent:
    """What ``combine`` may return in place of gradients.

    Attributes:
        gradients: what the base optimizer gets.
        decoupled: subtracted from the weights, times the learning rate, after its step: past its momentum and its
            preconditioner.
    """

    gradients: Tensors
    decoupled: Tensors


@dataclass(frozen=True)
class Rule:
    """Abstract: what all rules have, with the choices of SAM. A rule of your own is a frozen dataclass derived from it::

        @dataclass(frozen=True)
        class SignSAM(Rule):
            \"\"\"Along the signs of the gradient.\"\"\"

            def direction(self, step):
                return [gradient.sign() for gradient in step.gradients]

    Attributes:
        default_rho: the radius where the user gives none.
        state: names of the entries of ``Step.state`` that live from step to step.
        needs_gradient: whether the ascent follows the gradient at the weights, which costs one.
    """

    default_rho: ClassVar[float] = 0.05
    state: ClassVar[tuple[str, ...]] = ()
    needs_gradient: ClassVar[bool] = True

    @property
    def is_linear(self) -> bool:
        """Whether gradients times ``c`` give ``c`` times the result and the same state, so that a rule need not know the scale
        of a ``GradScaler``."""
        return True

    @property
    def ascents(self) -> int:
        """Gradients that are made away from the weights, where a step makes any."""
        return 1

    @property
    def every(self) -> int:
        """An ascent is made in each so-many-th step only; ``combine`` sees ``second=None`` in those between."""
        return 1

    @property
    def stride(self) -> float:
        """Length of one ascent, in radii; where they add up to more than the radius, they end on the ball."""
        return 1 / self.ascents

    @property
    def gradients_per_step(self) -> float:
        """Forward and backward passes, on average."""
        return float(self.needs_gradient) + self.ascents / self.every

    def metric(self, step: Step) -> Tensors | float | None:
        """The ball's shape: ``T`` in ``‖δ / T‖ <= ρ``; a number η for ``T = |w| + η``, None for ``T = 1``."""
        return None

    def direction(self, step: Step) -> Tensors:
        """``u``: the weights move by ``ρ T² u / ‖T u‖``, and not at all where that norm is zero."""
        return step.gradients

    def combine(self, step: Step) -> Tensors | Descent:
        """The gradients that the base optimizer gets."""
        return step.gradients if step.second is None else step.second


@dataclass(frozen=True)
class SAM(Rule):
    """The gradient at ``w + ρ g/‖g‖``.

    Source: Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, arXiv 2010.01412 (2021).
    """


@dataclass(frozen=True)
class ASAM(Rule):
    """SAM in the ball ``‖δ/T‖ <= ρ`` with ``T = |w| + eta``: the gradient at ``w + ρ T²g/‖T g‖``.

    With ``eta=0`` it does not see a rescaling of the layers of a ReLU network; ρ is 2 then, say.
    Source: Kwon et al., ASAM, arXiv 2102.11600 (2021).
    """

    default_rho: ClassVar[float] = 0.5

    eta: float = 0.01

    def __post_init__(self) -> None:
        _at_least("eta", self.eta, 0.0)

    def metric(self, step: Step) -> float:
        return self.eta


@dataclass(frozen=True)
class GSAM(Rule):
    """Surrogate-gap-guided SAM: ``g₁ − alpha g₀⊥``, the part of the first gradient across the second one taken off.

    Its ρ follows the learning rate in the paper: ``rho=ProportionalToLearningRate(...)``.
    Source: Zhuang et al., Surrogate Gap Minimization Improves Sharpness-Aware Training, arXiv 2203.08065 (2022).
    """

    alpha: float = 0.4

    def __post_init__(self) -> None:
        _at_least("alpha", self.alpha, 0.0)

    def combine(self, step: Step) -> Tensors:
        assert step.second is not None
        along = _ratio(step.inner(step.gradients, step.second), step.norm(step.second) ** 2)
        return plus(times(step.second, 1 + self.alpha * along), step.gradients, -self.alpha)


@dataclass(frozen=True)
class WSAM(Rule):
    """Weighted sharpness: the gradient of ``L + γ/(1 − γ) (L_SAM − L)``.

    Decoupled, the base optimizer gets that of ``L`` alone, and the other part moves the weights by itself.
    Source: Yue et al., Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization Term, KDD (2023).

    Attributes:
        gamma: 0 is the base optimizer, 1/2 is SAM.
    """

    gamma: float = 0.9
    decoupled: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < 1:
            raise ValueError(f"gamma must be in [0, 1), got {self.gamma}")

    @property
    def is_linear(self) -> bool:
        return not self.decoupled  # that part is out of a GradScaler's sight

    def combine(self, step: Step) -> Tensors | Descent:
        assert step.second is not None
        weight = self.gamma / (1 - self.gamma)
        if not self.decoupled:
            return plus(times(step.second, weight), step.gradients, 1 - weight)
        rise = plus(step.second, step.gradients, -1.0)
        return Descent(step.gradients, times(rise, weight / step.scale))


@dataclass(frozen=True)
class FSAM(Rule):
    """Friendly SAM: uphill along ``g − sigma m``, the noise of the batch, with ``m`` the running mean of gradients before.

    Source: Li et al., Friendly Sharpness-Aware Minimization, arXiv 2403.12350 (2024), and its code: ``m`` begins as the
    first gradient, which is followed itself, and is ``decay m + (1 − decay) g`` after each step.
    """

    state: ClassVar[tuple[str, ...]] = ("mean",)

    sigma: float = 1.0
    decay: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay}")

    @property
    def is_linear(self) -> bool:
        return False

    def direction(self, step: Step) -> Tensors:
        gradients: Tensors = times(step.gradients, 1 / step.scale)
        mean = step.state.get("mean")
        if mean is None:
            step.state["mean"] = gradients
            return gradients
        step.state["mean"] = plus(times(mean, self.decay), gradients, 1 - self.decay)
        return plus(gradients, mean, -self.sigma)


@dataclass(frozen=True)
class LookSAM(Rule):
    """SAM in each ``k``-th step; between them, ``g + alpha ‖g‖ v/‖v‖``.

    ``v`` is what the last second gradient had across the first one: it changes slowly, so it is used again.
    Source: Liu et al., Towards Efficient and Scalable Sharpness-Aware Minimization, arXiv 2203.02714 (2022).
    """

    default_rho: ClassVar[float] = 0.1
    state: ClassVar[tuple[str, ...]] = ("across",)

    k: int = 10
    alpha: float = 0.7

    def __post_init__(self) -> None:
        _at_least("k", self.k, 1)
        _at_least("alpha", self.alpha, 0.0)

    @property
    def every(self) -> int:
        return self.k

    def combine(self, step: Step) -> Tensors:
        if step.second is not None:
            along = _ratio(step.inner(step.gradients, step.second), step.norm(step.gradients) ** 2)
            across = plus(step.second, times(step.gradients, along), -1.0)
            step.state["across"] = times(across, _ratio(torch.ones_like(along), step.norm(across)))
            return step.second
        across = step.state["across"]
        length = _ratio(self.alpha * step.norm(step.gradients), step.norm(across))
        return plus(step.gradients, times(across, length), 1.0)


@dataclass(frozen=True)
class MomentumSAM(Rule):
    """The gradient at ``w − ρ v/‖v‖`` with ``v`` the base optimizer's momentum: one gradient per step, as without it.

    The first step of all has no momentum, and is the base optimizer's.
    Source: Becker et al., Momentum-SAM: Sharpness Aware Minimization without Computational Overhead, arXiv 2401.12033 (2024).
    """

    default_rho: ClassVar[float] = 0.3
    needs_gradient: ClassVar[bool] = False

    def direction(self, step: Step) -> Tensors:
        return times(step.momentum(), -1.0)


@dataclass(frozen=True)
class RandomSAM(Rule):
    """The gradient at a random point of the sphere, ``w + ρ n/‖n‖``: a baseline that costs one gradient."""

    needs_gradient: ClassVar[bool] = False

    def direction(self, step: Step) -> Tensors:
        return step.noise()


@dataclass(frozen=True)
class KStepSAM(Rule):
    """SAM with ``k`` ascents of ``step ρ`` each, along the gradient at the point that the one before reached.

    Ascents that leave the ball are projected on it (projected gradient ascent); at the default ``step = 1/k`` none does.
    """

    k: int = 2
    step: float | None = None

    def __post_init__(self) -> None:
        _at_least("k", self.k, 1)
        if self.step is not None and not 0 < self.step <= 1:
            raise ValueError(f"step must be in (0, 1], got {self.step}")

    @property
    def ascents(self) -> int:
        return self.k

    @property
    def stride(self) -> float:
        return 1 / self.k if self.step is None else self.step


def times(tensors: Tensors, factor: Tensor | float) -> list[Tensor]:
    """``factor · x`` for each ``x``, new tensors."""
    if not tensors:
        return []
    if not isinstance(factor, Tensor):
        return list(torch._foreach_mul(list(tensors), factor))
    if len({(tensor.device, tensor.dtype) for tensor in tensors}) == 1:
        # by its overload: torch._foreach_mul may take a tensor of one element for a number, and wait for it
        like = tensors[0]
        made = torch.ops.aten._foreach_mul.Tensor(list(tensors), factor.to(like.device, like.dtype))
        return list(made)
    return [tensor * factor.to(tensor.device, tensor.dtype) for tensor in tensors]


def plus(tensors: Tensors, others: Tensors, factor: float) -> list[Tensor]:
    """``x + factor · y`` for each pair, new tensors."""
    return list(torch._foreach_add(list(tensors), list(others), alpha=factor)) if tensors else []


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """``a / b``, and 0 where b is."""
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ValueError(f"{name} must be at least {least:g}, got {value}")
