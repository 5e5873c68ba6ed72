"""SAM as a callback: the second pass before each optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor
from torch.optim import Optimizer

from sharpness_plugins import distributed
from sharpness_plugins.accumulation import synchronized
from sharpness_plugins.optimizers import perturbed

from ..lightning_step import beside_training, loss_of, step_arguments
from .sizes import BatchSizeCallback
from .trainer import check_trainer, scale_of, scaler_of

__all__ = ["SAMCallback"]


class SAMCallback(Callback):
    """Sharpness-aware minimization with an unchanged module and optimizer: the second pass before each optimizer step.

    In ``on_before_optimizer_step`` the weights move to ``w + rho g/‖g‖``, ``training_step`` runs again on every micro-batch
    of the step, silently, and the optimizer gets the gradients made there. So it holds with accumulation, clipping (of the
    second gradient only), several ranks, bf16 and a ``GradScaler``. Put after callbacks that look at the first gradient.

    Args:
        rho, adaptive, eta: as for ``perturbed``.
    Cost: a second forward and backward pass; the micro-batches of a step stay in memory.
    Attributes:
        num_skipped: steps left out because the second gradient overflowed in half precision; the scale is then lowered.
    """

    def __init__(self, rho: float = 0.05, adaptive: bool = False, eta: float = 0.01) -> None:
        if not rho >= 0:
            raise ValueError(f"rho is a radius and not negative, got {rho}")
        self.rho, self.adaptive, self.eta = rho, adaptive, eta
        self.num_skipped = 0
        self._batches: list[tuple[int, Any]] = []
        self._first: dict[int, Tensor] = {}
        self._gap: Tensor | None = None
        self._norm: Tensor | None = None
        self._overflowed = False

    @property
    def surrogate_gap(self) -> float | None:
        """Loss at the perturbed weights minus loss, at the last step, on this rank; None before the first."""
        return None if self._gap is None else float(self._gap)

    @property
    def gradient_norm(self) -> float | None:
        """Norm of the first gradient (of ``T g`` where adaptive) at the last step, over all ranks."""
        return None if self._norm is None else float(self._norm)

    def gap_over_ranks(self) -> float | None:
        gap = self.surrogate_gap
        return None if gap is None else distributed.sum_of(gap) / distributed.world_size()

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        check_trainer(self, trainer, steps=stage == "fit")

    def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batches.append((batch_idx, batch))

    def on_before_zero_grad(self, trainer: Any, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._batches = self._batches[-1:]  # the micro-batch in hand begins a group
        self._first.clear()

    def on_before_backward(self, trainer: Any, pl_module: LightningModule, loss: Tensor) -> None:
        if self._batches:
            self._first[self._batches[-1][0]] = loss.detach() * (trainer.accumulate_grad_batches / scale_of(trainer))

    def on_before_optimizer_step(self, trainer: Any, pl_module: LightningModule, optimizer: Optimizer) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if all(parameter.grad is None for parameter in parameters):
            return
        scale = scale_of(trainer)
        settings: dict[str, Any] = {"adaptive": self.adaptive, "eta": self.eta, "module": pl_module}
        with torch.enable_grad(), beside_training(pl_module), perturbed(parameters, self.rho, **settings) as ascent:
            self._norm = ascent.norm
            if scaler_of(trainer) is not None and not torch.isfinite(ascent.norm):
                return  # the scaler has seen it, and skips the step
            self._gap = self._second_pass(trainer, pl_module, scale)
        if scaler_of(trainer) is not None:
            self._unscale([p.grad for p in parameters if p.grad is not None], scale)
            if self._overflowed:
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

    def _unscale(self, gradients: list[Tensor], scale: float) -> None:
        for gradient in gradients:
            gradient.mul_(1 / scale)
        finite = [torch.isfinite(gradient).all() for gradient in gradients]
        self._overflowed = bool(finite) and not bool(torch.stack(finite).all())
        self.num_skipped += self._overflowed

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        scaler = scaler_of(trainer)
        if self._overflowed and scaler is not None:
            scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
        self._overflowed = False

    def on_train_end(self, trainer: Any, pl_module: LightningModule) -> None:
        self._batches, self._first = [], {}


def _weights_of_group(trainer: Any) -> Mapping[int, float]:
    """What each micro-batch's mean loss was weighted with, by its index, where a schedule weighs them."""
    for callback in trainer.callbacks:
        if isinstance(callback, BatchSizeCallback):
            return callback.weights
    return {}
