"""The loss of one batch at given weights: nothing is written to the model, and nothing that it does carries over."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from . import sampling
from .batches import Batch, map_tensors, tensors_of
from .errors import NonFiniteLossError
from .losses import LossRule
from .space import ParameterSpace

__all__ = ["CutOffError", "Evaluator", "LossSums", "WeightlessError", "gradient_of", "mean_of"]

T = TypeVar("T")


class CutOffError(ValueError):
    """The loss does not depend on the selected parameters."""


class WeightlessError(ValueError):
    """Every target is ignored in some part of a batch: it has no loss, and nothing of it counts.

    Attributes:
        lent: what came of the data of other ranks meanwhile, where weights lie in shards.
    """

    lent: Any = None


class Evaluator:
    """Evaluates the model by ``functional_call`` on views of a flat vector of shape ``(dim,)``.

    Attributes:
        rule: the loss; set it before the first loss is asked for.
        total_weight: of the whole loader, which makes the parts of the mean; 0 until it is known.
        sizes: samples of the whole batches, by position.
        draws: whether the model draws random numbers.
        looking: whether to look at what the model does beside computing (the first pass), or to guard against what it was
            seen to do.
    """

    def __init__(self, module: nn.Module, space: ParameterSpace, seed: int) -> None:
        self.module, self.space, self._seed = module, space, seed
        self.rule: LossRule | None = None
        self.total_weight = torch.tensor(0.0, dtype=torch.float64)
        self.draws = False
        self.looking = True
        self._inputs_written = self._weights_written = False
        self.sizes: dict[int, int | None] = {}

    def seed(self, position: int) -> None:
        """What a model draws, although in eval mode, it draws again at every evaluation."""
        sampling.seed_global(self._seed + position, self.space.device)

    def call(self, function: Callable[[nn.Module, Any], Any], flat: Tensor, batch: Batch) -> Any:
        """``function(model, batch)`` with the weights ``flat``; containers of the batch are new each time."""
        data = map_tensors(batch.data, torch.clone if self.looking or self._inputs_written else torch.detach)
        weights = self.space.state(flat, copy_constants=self.looking or self._weights_written)
        if not self.looking:
            return self._with_state(function, weights, data, batch.position)
        given, drawn = tensors_of(data), sampling.torch_state(self.space.device)
        answer = self._with_state(function, weights, data, batch.position)
        self._inputs_written |= any(tensor._version > 0 for tensor in given)
        self._weights_written |= any(weights[name]._version > 0 for name in self.space.constants)
        self.draws |= drawn != sampling.torch_state(self.space.device)
        return answer

    def loss(self, flat: Tensor, batch: Batch, use: Callable[[Tensor, Tensor], T]) -> T:
        """``use(loss, weight)`` of the batch, while the weights ``flat`` are in the model.

        Derivatives belong inside ``use``: a checkpointed model runs forward again in its backward pass.

        Raises:
            WeightlessError: this is part of a batch, and has no weight.
        """
        answer: T = self.call(self._using(batch, use), flat, batch)
        return answer

    def share(self, flat: Tensor, batch: Batch, use: Callable[[Tensor], T]) -> T:
        """``use(the batch's part of the mean loss)``, otherwise as ``loss``."""
        return self.loss(flat, batch, lambda loss, weight: use(self.part(loss, weight)))

    def part(self, loss: Tensor, weight: Tensor) -> Tensor:
        """The batch's part of the mean loss."""
        return loss * (weight / self.total_weight)

    def value(self, flat: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean loss of the batch, and its weight."""
        try:
            return self.loss(flat, batch, lambda loss, weight: (loss.detach(), weight))
        except WeightlessError:
            return self._nothing, self._nothing

    def value_and_grad(self, leaf: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Mean loss of the batch, its weight, and the gradient of its part of the mean over all batches."""

        def use(loss: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return loss.detach(), weight, gradient_of(self.part(loss, weight), leaf, batch.position)

        try:
            return self.loss(leaf, batch, use)
        except WeightlessError as error:
            return self._nothing, self._nothing, torch.zeros_like(leaf) if error.lent is None else error.lent.gradient

    def look_elsewhere(self, batch: Batch, seed: int) -> None:
        """A rule that was read off the loss at the origin must hold at other weights, too."""
        if self.rule is None or self.rule.fallback is None:
            return
        with torch.no_grad():
            self.call(self.rule.loss_fn, self.elsewhere(seed), batch)

    def elsewhere(self, seed: int) -> Tensor:
        """Random weights of about the size of the trained ones."""
        origin = self.space.origin
        return (origin.abs() + 0.1) * self.space.layout.normal(sampling.generator_for(seed, "elsewhere"), origin)

    def inside(self, flat: Tensor, batch: Batch, use: Callable[[], T]) -> T:
        """``use()``, while the weights ``flat`` are in the model, which is not called."""
        answer: T = self.call(lambda model, data: use(), flat, batch)
        return answer

    def in_float64(self, flat: Tensor, batch: Batch, use: Callable[[Tensor], T]) -> T:
        """As ``share``, with ``flat``, all other parameters, buffers and inputs in float64."""
        pieces = torch.split(flat, self.space.numels)
        state = {name: _double(tensor.detach()) for name, tensor in self.space.state(self.space.origin).items()}
        for name, piece, shape in zip(self.space.names, pieces, self.space.shapes, strict=True):
            state[name] = piece.view(shape)

        def share(loss: Tensor, weight: Tensor) -> T:
            return use(self.part(loss, weight))

        data = map_tensors(batch.data, _double)
        answer: T = self._with_state(self._using(batch, share), state, data, batch.position)
        return answer

    @property
    def _nothing(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.space.device)

    def _using(self, batch: Batch, use: Callable[[Tensor, Tensor], T]) -> Callable[[nn.Module, Any], T]:
        rule = self.rule
        assert rule is not None  # the objective sets it first

        def bound(model: nn.Module, data: Any) -> T:
            loss, weight = rule.loss_fn(model, data)
            loss = loss.to(torch.float64)
            weight = torch.as_tensor(weight, dtype=torch.float64, device=loss.device).detach()
            # of whole batches it is known, and not asked again: that would wait for the device
            if batch.num_samples != self.sizes.get(batch.position, batch.num_samples) and not weight > 0:
                raise WeightlessError(f"every target is ignored in {batch.num_samples} samples of batch {batch.position}")
            return use(loss, weight)

        return bound

    def _with_state(
        self, function: Callable[[nn.Module, Any], Any], weights: dict[str, Tensor], data: Any, position: int
    ) -> Any:
        if self.draws:
            self.seed(position)
        state = {f"model.{name}": tensor for name, tensor in weights.items()}
        return functional_call(_Bound(self.module, function), state, (data,))


def gradient_of(share: Tensor, leaf: Tensor, position: int, *, create_graph: bool = False) -> Tensor:
    """Gradient of a batch's part of the mean loss.

    Raises:
        CutOffError: the loss was cut off from ``leaf``.
    """
    gradient: Tensor | None = None
    if share.requires_grad:
        (gradient,) = torch.autograd.grad(share, leaf, create_graph=create_graph, allow_unused=True)
    if gradient is None:
        raise CutOffError(
            f"the loss of batch {position} does not depend on the selected parameters: the model or the loss "
            "detaches it (torch.no_grad, .detach(), .item()), or does not use them (a loss_fn must use the model that "
            "it is given). Change that, or select others."
        )
    return gradient


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean and weight of a batch from those of its parts; a part without weight has no mean."""
    if len(parts) == 1:
        return parts[0]
    losses, weights = (torch.stack(column) for column in zip(*parts, strict=True))
    return (torch.where(weights > 0, losses, 0.0) * weights).sum() / weights.sum(), weights.sum()


class LossSums:
    """Losses and weights of this rank's batches, added up in float64 without waiting for the device."""

    def __init__(self) -> None:
        self._parts: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def add(self, position: int, loss: Tensor, weight: Tensor) -> None:
        """Of a batch, or of a part of it."""
        self._parts.setdefault(position, []).append((loss, weight))

    def weightless(self) -> set[int]:
        """Positions of the batches of which every target is ignored."""
        return {position for position, (_, weight) in self._joined().items() if weight == 0}

    def totals(self, *, at_origin: bool) -> list[float]:
        """Sum of weighted losses, sum of weights.

        Raises:
            NonFiniteLossError: at the origin, the loss of some batch is NaN or infinite.
        """
        if not self._parts:
            return [0.0, 0.0]
        given, w = (torch.stack(column) for column in zip(*self._joined().values(), strict=True))
        losses = torch.where(w > 0, given, 0.0)  # a batch without weight (every target ignored) has no mean
        totals: list[float] = torch.stack([(losses * w).sum(), w.sum()]).tolist()
        if at_origin and not math.isfinite(totals[0]):
            bad = [i for i, loss in enumerate(losses.tolist()) if not math.isfinite(loss)]
            if bad:
                which = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
                raise NonFiniteLossError(
                    _no_minimum(losses[bad[0]].item(), f" on batch {which} of {len(losses)} (counted from 0)")
                )
        return totals

    def _joined(self) -> dict[int, tuple[Tensor, Tensor]]:
        return {position: _joined(parts) for position, parts in self._parts.items()}


def mean_of(totals: list[float], *, at_origin: bool) -> float:
    """The mean loss of all ranks, from what their totals add up to."""
    total, weight = totals
    mean = total / weight if weight else math.nan
    if at_origin and not math.isfinite(mean):
        raise NonFiniteLossError(_no_minimum(mean, ""))
    return mean


def _no_minimum(loss: float, where: str) -> str:
    return (
        f"the loss at the trained weights is {loss}{where}, so there is no minimum to measure. Look for NaN inputs or "
        "diverged weights."
    )


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if isinstance(tensor, Tensor) and tensor.is_floating_point() else tensor


class _Bound(nn.Module):
    """``function(model, batch)`` as a module, so that ``functional_call`` swaps the weights for all of ``function``.

    A loss function may call a method or a part of the model, not only the model.
    """

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, batch: Any) -> Any:
        return self.function(self.model, batch)
