"""SAM as a callback: the second pass before each optimizer step, through ``Trainer.training_step``."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sharpness_plugins.optimizers import perturbed

from .attachable import Attachable
from .training import refuse_engines

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["SAMCallback"]


class SAMCallback(Attachable):
    """Sharpness-aware minimization with any model and optimizer: the second pass comes just before the optimizer's step.

    Records the micro-batches of a step and replays them through ``Trainer.training_step`` at the perturbed weights, so
    accumulation, label smoothing, a custom loss, mixed precision and data parallelism are what they are without it. Trainer
    clips the gradient before that, so the second one is clipped again; ``grad_norm`` in its log is the first one's.
    BatchNorm's running statistics see the first pass only.

    Args:
        rho: radius of the ball that the weights move in.
        adaptive: ASAM's ball, with each weight's own size in it.
        (``surrogate_gap`` and ``gradient_norm`` are signals for ``SharpnessCallback(signals=...)``.)
    Cost: twice the passes over the data.
    Raises:
        ValueError: from ``attach``, with DeepSpeed or FSDP, which hold no whole gradient then.
    """

    def __init__(self, rho: float = 0.05, *, adaptive: bool = False) -> None:
        if not rho >= 0:
            raise ValueError(f"rho is a radius and not negative, got {rho}")
        super().__init__(rho=rho, adaptive=adaptive)
        self._micro_batches: list[tuple[Any, Any, Any]] = []
        self._losses: list[Tensor] = []
        self._norm: Tensor | None = None
        self._gap: Tensor | None = None

    def attach(self, trainer: Any) -> Self:
        refuse_engines(trainer, "SAMCallback")
        super().attach(trainer)
        first_pass = trainer.training_step

        def training_step(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            loss: Tensor = first_pass(model, inputs, *args, **kwargs)
            if any(vars(one) is vars(self) for one in trainer.callback_handler.callbacks):  # not taken off again
                self._micro_batches.append((model, inputs, (args, kwargs)))
                self._losses.append(loss)
            return loss

        self._replay = first_pass
        trainer.training_step = training_step
        return self

    def surrogate_gap(self) -> float | None:
        """By how much Trainer's loss rose on the way to the perturbed weights, in the last step; None before the first."""
        return None if self._gap is None else float(self._gap)

    def gradient_norm(self) -> float | None:
        """Of the first gradient in the last step, as Trainer has clipped it; None before the first."""
        return None if self._norm is None else float(self._norm)

    def _begin(self, args: Any, state: Any, control: Any, kwargs: dict[str, Any]) -> None:
        if self._trainer is None:
            raise ValueError("SAMCallback replays what Trainer does, so it must know it: SAMCallback(...).attach(trainer)")
        self._norm = self._gap = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._micro_batches.clear()
        self._losses.clear()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, recorded, first = self._trainer, self._micro_batches, self._losses
        self._micro_batches, self._losses = [], []
        parameters = [parameter for parameter in kwargs["model"].parameters() if parameter.requires_grad]
        scaler = getattr(trainer.accelerator, "scaler", None)
        second: list[Tensor] = []
        ball = perturbed(parameters, self._settings["rho"], adaptive=self._settings["adaptive"], module=kwargs["model"])
        with ball as ascent:
            if scaler is None or bool(torch.isfinite(ascent.norm)):  # a step that overflowed is skipped anyway
                for number, (model, inputs, (extra, named)) in enumerate(recorded, 1):
                    is_last = number == len(recorded)
                    with contextlib.nullcontext() if is_last else trainer.accelerator.no_sync(model=model):
                        second.append(self._replay(model, inputs, *extra, **named))
        if scaler is not None:
            _unscale(parameters, scaler.get_scale())
        if args.max_grad_norm is not None and args.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        self._norm = ascent.norm
        self._gap = torch.stack(second).sum() - torch.stack(first).sum() if second else None


def _unscale(parameters: list[nn.Parameter], scale: float) -> None:
    """Trainer has unscaled the first gradient and will not again. A second one that overflowed leaves the weights alone."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for gradient in gradients:
        gradient.div_(scale)
    if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
        for parameter in parameters:
            parameter.grad = None
