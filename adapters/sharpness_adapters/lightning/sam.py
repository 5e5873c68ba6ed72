"""SAM and its relatives as a callback: the passes uphill before each optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor
from torch.optim import Optimizer

from sharpness_plugins import distributed
from sharpness_plugins.accumulation import synchronized
from sharpness_plugins.optimizers import Rule, SharpnessAware

from ..lightning_step import beside_training, loss_of, step_arguments
from ..sharpening import Radius, Sharpening
from .sizes import BatchSizeCallback
from .trainer import check_trainer, scale_of, scaler_of

__all__ = ["SAMCallback"]


class SAMCallback(Callback):
    """Sharpness-aware minimization with an unchanged module and optimizer: the further passes before each optimizer step.

    In ``on_before_optimizer_step`` the weights move uphill, ``training_step`` runs again on every micro-batch of the step,
    silently, and the optimizer gets the gradients that the rule makes. So it holds with accumulation, clipping (of the
    rule's gradient only), several ranks, bf16 and a ``GradScaler``. Put after callbacks that look at the first gradient.
    What the rule remembers is saved with the optimizer's state.

    Args:
        rho: radius; None for the rule's own: 0.05 for ``sam``, 0.5 for ``asam``.
        adaptive, eta: short for ``rule="asam:eta=..."``.
        rule: a name that ``sharpness list`` shows, and its settings, ``"gsam:alpha=0.3"``; or a ``Rule``.
        interval: an ascent in each so-many-th step only; the others cost one pass, as those between two of ``looksam`` do.
    Cost: a forward and a backward pass per ascent, beside the trainer's own, so two per step for ``momentum_sam`` and
        ``random_sam``, too, which need no first one; the micro-batches of a step with an ascent stay in memory.
    Attributes:
        num_skipped: steps left out because a gradient made uphill overflowed in half precision; the scale is then lowered.
    Raises:
        ValueError: with the rule, settings of the trainer's own first pass (``m``, ``perturb``, ``replay_rng``).
    """

    def __init__(
        self,
        rho: Radius | None = None,
        adaptive: bool = False,
        eta: float = 0.01,
        rule: str | Rule = "sam",
        interval: int = 1,
    ) -> None:
        self._sharpening = Sharpening.read(rule, rho, interval, adaptive=adaptive, eta=eta)
        self.rho, self.rule, self.interval = self._sharpening.rho, self._sharpening.rule, self._sharpening.interval
        self.num_skipped = 0
        self._sharp: SharpnessAware | None = None
        self._batches: list[tuple[int, Any]] = []
        self._first: dict[int, Tensor] = {}
        self._overflowed = False

    @property
    def surrogate_gap(self) -> float | None:
        """Loss at the perturbed weights minus loss, at the last step with an ascent, on this rank; None before the first."""
        return None if self._sharp is None else self._sharp.surrogate_gap

    @property
    def gradient_norm(self) -> float | None:
        """Norm of what the last ascending step followed (of ``T g`` in ASAM's ball), over all ranks."""
        return None if self._sharp is None else self._sharp.gradient_norm

    @property
    def follows_gradient(self) -> bool:
        """Whether ``gradient_norm`` is that of the gradient, in each step."""
        return self._sharpening.follows_gradient

    def gap_over_ranks(self) -> float | None:
        gap = self.surrogate_gap
        return None if gap is None else distributed.sum_of(gap) / distributed.world_size()

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        check_trainer(self, trainer, steps=stage == "fit")

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        for optimizer in trainer.optimizers:  # one: there are no more in automatic optimization
            self._sharp = self._sharpening.around(optimizer, pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._sharp is not None and self._sharp.next_ascents:
            self._batches.append((batch_idx, batch))
        else:
            self._batches.clear()

    def on_before_zero_grad(self, trainer: Any, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._batches = self._batches[-1:]  # the micro-batch in hand begins a group
        self._first.clear()

    def on_before_backward(self, trainer: Any, pl_module: LightningModule, loss: Tensor) -> None:
        if self._batches:
            self._first[self._batches[-1][0]] = loss.detach() * (trainer.accumulate_grad_batches / scale_of(trainer))

    def on_before_optimizer_step(self, trainer: Any, pl_module: LightningModule, optimizer: Optimizer) -> None:
        sharp = self._sharp
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if sharp is None or all(parameter.grad is None for parameter in parameters):
            return
        scale = scale_of(trainer)
        # Lightning has unscaled the first gradient, except for fused optimizers, which divide in their step
        divides = getattr(optimizer, "_step_supports_amp_scaling", False)
        is_scaled = scaler_of(trainer) is not None and not divides
        gap: Tensor | None = None
        with torch.enable_grad(), beside_training(pl_module):
            for ascent in sharp.ascents(scale=scale if divides else 1.0, evaluated=True):
                with ascent as move:
                    if is_scaled and not torch.isfinite(move.norm):
                        continue  # the scaler has seen it, and skips the step
                    gap = self._second_pass(trainer, pl_module, scale)
                    if is_scaled:
                        self._overflowed |= not _unscale([p.grad for p in parameters if p.grad is not None], scale)
        if gap is not None:
            sharp.surrogate_gap = gap
        if self._overflowed:
            self.num_skipped += 1
            sharp.give_up()
            for parameter in parameters:
                parameter.grad = None  # a step without gradients is none

    def _second_pass(self, trainer: Any, module: LightningModule, scale: float) -> Tensor | None:
        weights = _weights_of_group(trainer)
        gap: Tensor | None = None
        for index, (batch_idx, batch) in enumerate(self._batches, 1):
            weight = weights.get(batch_idx, 1 / trainer.accumulate_grad_batches)
            with synchronized(trainer.strategy.model, index == len(self._batches)):
                arguments = step_arguments(module, batch, batch_idx)
                loss = loss_of(trainer.strategy.training_step(*arguments))
                if loss is None:
                    continue
                module.backward(loss * (weight * scale))
            if batch_idx in self._first:
                part = (loss.detach() - self._first[batch_idx]) * weight
                gap = part if gap is None else gap + part
        return gap

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        scaler = scaler_of(trainer)
        if self._overflowed and scaler is not None:
            scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
        self._overflowed = False

    def on_train_end(self, trainer: Any, pl_module: LightningModule) -> None:
        self._batches, self._first = [], {}


def _unscale(gradients: list[Tensor], scale: float) -> bool:
    """Whether they are finite."""
    for gradient in gradients:
        gradient.mul_(1 / scale)
    finite = [torch.isfinite(gradient).all() for gradient in gradients]
    return not finite or bool(torch.stack(finite).all())


def _weights_of_group(trainer: Any) -> Mapping[int, float]:
    """What each micro-batch's mean loss was weighted with, by its index, where a schedule weighs them."""
    for callback in trainer.callbacks:
        if isinstance(callback, BatchSizeCallback):
            return callback.weights
    return {}
