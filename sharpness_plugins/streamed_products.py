"""Hessian-vector products where weights and vectors lie in shards: exact ones, or differences with an error estimate."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor

from . import sampling
from .errors import LostRankError, MeasurementStopped, RanksApartError, SecondDerivativeError
from .evaluation import CutOffError, WeightlessError, gradient_of
from .hvp import ASYMMETRY, DIFFERENCES, DISAGREEMENT, FRESH, HVP_MODES, KINK, STEP, short
from .layout import Layout
from .micro_batches import Part
from .streaming import StreamedEvaluator

__all__ = ["Data", "StreamedProducts"]

Work = Callable[["Part | None"], Tensor]

_STEPS = (1, 8, 64)  # times the first: rounding falls with the step, what kinks do does not
_EXACT, _DIFFERENCE = 5.0, 2.0  # gradients: two products, and one by differences


class Data(Enum):
    """What a product is made of: all, the first batch of each rank, or a few samples of that."""

    ALL, FIRST, FEW = range(3)


class Total(Protocol):
    """Goes over the data in step with the other ranks."""

    def __call__(self, work: Work, count: int, data: Data = Data.ALL) -> Tensor:
        """The sum, shape ``(count, dim)``, of ``work(part)`` over the parts; of ``work(None)`` in rounds without one."""


class StreamedProducts:
    """Products of the Hessian with shards of vectors, made by all ranks together in the way that a probe chose.

    Exact where it can be: double backward through the gathering of the weights, three gradients a product, in the memory of
    one unit's gathered weights and of what autograd saves beside weights. The probe takes it where ``uᵀHv`` equals ``vᵀHu``
    and differences of gradients do not tell that an operation has a wrong second derivative. Where it does not exist, or not
    even one sample fits in memory, central differences of the gradient, four passes forward and back in two points, if two
    steps agree: then what they differ by is the error estimate, relative to the product, looked at again after 1, 2, 4, ...
    products. Kinks (ReLU, max pooling) make them differ, and are refused.

    Args:
        mode: "auto", "double backward" or "central differences".
    Attributes:
        mode: how the last product was made; None before the first.
        check: the sentence that says what was compared.
        error: of a product by differences, relative; the largest that was seen. 0 for exact ones.
        spent: gradients that the probe took, in samples.
    """

    def __init__(self, evaluator: StreamedEvaluator, layout: Layout, *, mode: str = "auto", seed: int = 0) -> None:
        if mode not in HVP_MODES:
            raise ValueError(f"hvp must be one of {HVP_MODES}, got {mode!r}")
        if mode not in ("auto", FRESH, DIFFERENCES):
            raise ValueError(
                f"hvp={mode!r} needs whole weights; where they lie in shards, use 'auto', {FRESH!r} or {DIFFERENCES!r}"
            )
        self._evaluator, self._stream, self._layout = evaluator, evaluator.stream, layout
        self._asked, self._seed = mode, seed
        self._chosen: str | None = None
        self._point: Tensor | None = None
        self._step = 0.0
        self._made = 0
        self._why = ""  # differences were taken
        self.mode: str | None = None
        self.check = ""
        self.error = 0.0
        self.spent = 0.0

    def move_to(self, origin: Tensor, perturbation: Tensor | None) -> None:
        """Products are at ``origin + perturbation`` from now on."""
        self._point = origin if perturbation is None else origin + perturbation

    def release(self) -> bool:
        """There is nothing to free: no graph is kept."""
        return False

    def state(self) -> list[Any]:
        """What the probe chose, as JSON."""
        return [self._chosen, self.mode, self.check, self._step, self.error, self._made, self._why]

    def set_state(self, state: list[Any]) -> None:
        """Go on with what a probe chose before, on the same model and data."""
        self._chosen, self.mode, self.check, self._step, self.error, self._made, self._why = state

    def __call__(self, rows: Tensor, total: Total) -> Tensor:
        """The Hessian at the point times each of the rows, shape ``(k, dim)``. Collective."""
        if self._chosen is None:
            self._chosen = self._choose(total)
        self.mode = self._chosen
        if self._chosen == FRESH:
            return self._exact(rows, total)
        products = []
        for row in rows:
            product = self._difference(row, total, self._step)
            self._made += 1
            if self._made & (self._made - 1) == 0:
                self._look_again(row, product, total)
            products.append(product)
        return torch.stack(products)

    # ------------------------------------------------------------------ the ways

    def _exact(self, rows: Tensor, total: Total, data: Data = Data.ALL, *, trial: bool = False) -> Tensor:
        point, stream = self._at, self._stream

        def work(part: Part | None) -> Tensor:
            if part is None:
                return stream.lend(point).products
            leaf = point.detach().requires_grad_()

            def products(share: Tensor) -> Tensor:
                gradient = gradient_of(share, leaf, part.batch.position, create_graph=True)
                found = []
                for i, row in enumerate(rows):
                    with stream.multiplying(i):
                        (product,) = torch.autograd.grad(
                            gradient, leaf, row, retain_graph=i + 1 < len(rows), allow_unused=True, materialize_grads=True
                        )
                    found.append(product)
                return torch.stack(found)

            try:
                return self._evaluator.share(leaf, part.batch, products)
            except WeightlessError as error:
                return error.lent.products  # type: ignore[no-any-return]

        stream.rows = rows
        try:
            return total(self._counted(work, _EXACT if trial else 0), len(rows), data)
        finally:
            stream.rows = None

    def _difference(self, row: Tensor, total: Total, step: float, data: Data = Data.ALL, *, trial: bool = False) -> Tensor:
        length = self._layout.norm(row).item()
        if length == 0:
            return torch.zeros_like(row)
        ahead, behind = (self._at + sign * (step / length) * row for sign in (1, -1))

        def work(part: Part | None) -> Tensor:
            return (self._gradient(ahead, part) - self._gradient(behind, part))[None]

        return total(self._counted(work, _DIFFERENCE if trial else 0), 1, data)[0].mul_(length / (2 * step))

    def _gradient(self, point: Tensor, part: Part | None) -> Tensor:
        if part is None:
            return self._stream.lend(point).gradient
        return self._evaluator.value_and_grad(point.detach().requires_grad_(), part.batch)[2]

    @property
    def _at(self) -> Tensor:
        assert self._point is not None  # move_to comes first
        return self._point

    # ------------------------------------------------------------------ the probe

    def _choose(self, total: Total) -> str:
        if self._asked == DIFFERENCES:
            return self._without_kinks(total, "")
        cause = ""
        for data in (Data.FEW, Data.FIRST):
            try:
                with self._stream.ranks.sharing("trying second derivatives"):
                    return self._judged(total, data)
            except (LostRankError, RanksApartError, MeasurementStopped, CutOffError, SecondDerivativeError):
                raise
            except Exception as error:
                cause = cause or short(error)
        if self._asked == FRESH:
            raise SecondDerivativeError(f"{FRESH} does not work on this model: {cause}")
        return self._without_kinks(total, f"; {FRESH} does not work: {cause}")

    def _judged(self, total: Total, data: Data) -> str:
        generator = sampling.generator_for(self._seed, "hvp")
        u, v = (self._layout.normal(generator, self._at) for _ in range(2))
        along_u, along_v = self._exact(torch.stack([u, v]), total, data, trial=True)
        norm, dot, dtype = self._layout.norm, self._layout.dot, u.dtype
        size = max(norm(along_u).item(), norm(along_v).item())
        if not math.isfinite(size):
            self.check = "the products are not finite"
            return FRESH
        asymmetry = abs((dot(u, along_v) - dot(v, along_u)).item())
        if asymmetry > ASYMMETRY[dtype] * size:
            raise ArithmeticError(f"its Hessian is not symmetric: uᵀHv and vᵀHu differ by {asymmetry / size:.2g} of ‖Hv‖")
        near, nearer = (self._difference(u, total, h, data, trial=True) for h in (STEP[dtype], STEP[dtype] / 4))
        scatter, off = self._apart(nearer, near), self._apart(along_u, nearer)
        if off <= DISAGREEMENT[dtype] + 2 * scatter:
            self.check = f"uᵀHv = vᵀHu, and central differences of the gradient agree to {off:.0e}"
        elif scatter > KINK:
            self.check = (
                "uᵀHv = vᵀHu, but central differences of the gradient with two steps disagree, so nothing confirms it"
            )
        else:
            raise SecondDerivativeError(
                f"an operation of {type(self._evaluator.module).__name__} has a wrong second derivative: differences of "
                f"gradients are {off:.0%} off {FRESH}. Its backward must be differentiable itself: built from torch "
                "operations, with nothing detached. Mend it, or measure first-order metrics only: metrics=['epsilon_box']."
            )
        return FRESH

    def _without_kinks(self, total: Total, why: str) -> str:
        """Whether two steps agree, on all of the data; the first of several lengths that does, or the best."""
        row = self._layout.normal(sampling.generator_for(self._seed, "hvp"), self._at)
        found = []
        for times in _STEPS:
            step = times * STEP[row.dtype]
            near, nearer = (self._difference(row, total, h, trial=True) for h in (step, step / 4))
            found.append((self._apart(nearer, near), step))
            if found[-1][0] <= DISAGREEMENT[row.dtype]:
                break
        self.error, self._step = min(found)
        self._refuse_kinks(why)
        self._say(why)
        return DIFFERENCES

    def _look_again(self, row: Tensor, product: Tensor, total: Total) -> None:
        nearer = self._difference(row, total, self._step / 4, trial=True)
        self.error = max(self.error, self._apart(nearer, product))
        self._refuse_kinks("")
        self._say("")

    def _say(self, why: str) -> None:
        self._why = why or self._why
        self.check = f"differences with a quarter of the step agree to {self.error:.0e}, the error estimate{self._why}"

    def _refuse_kinks(self, why: str) -> None:
        if not self.error <= KINK:
            raise SecondDerivativeError(
                f"central differences of the gradient with steps of {self._step:g} and a quarter of that differ by "
                f"{self.error:.0%}: the loss has kinks (ReLU, max pooling) or bends too much within a step, or its gradient "
                f"is too noisy. They would not be the Hessian{why}. Use hvp='auto'; where that fails for want of memory, "
                "larger devices, or fewer parameters (select=...)."
            )

    def _apart(self, found: Tensor, expected: Tensor) -> float:
        norm = self._layout.norm
        size = max(norm(expected).item(), norm(found).item())
        return norm(found - expected).item() / size if size else 0.0

    def _counted(self, work: Work, gradients: float) -> Work:
        """The same work, whose gradients count as spent."""

        def counted(part: Part | None) -> Tensor:
            if part is not None:
                self.spent += gradients * (part.batch.num_samples or 0)
            return work(part)

        return counted
