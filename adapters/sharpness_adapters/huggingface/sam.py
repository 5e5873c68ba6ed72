"""SAM and its relatives as a callback: passes uphill before each optimizer step, through ``Trainer.training_step``."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sharpness_plugins.optimizers import Rule, SharpnessAware

from ..sharpening import Radius, Sharpening
from .attachable import Attachable
from .training import innermost, refuse_engines

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["SAMCallback"]


class SAMCallback(Attachable):
    """Sharpness-aware minimization with any model and optimizer: the further passes come just before the optimizer's step.

    Records the micro-batches of a step and replays them through ``Trainer.training_step`` where the rule leads the weights,
    so accumulation, label smoothing, a custom loss, mixed precision and data parallelism are what they are without it.
    Trainer clips the gradient before that, so what the rule makes is clipped again; ``grad_norm`` in its log is the first
    one's. BatchNorm's running statistics see the first pass only. What the rule remembers is saved with the optimizer.

    Args:
        rho: radius; None for the rule's own: 0.05 for ``sam``, 0.5 for ``asam``.
        adaptive: short for ``rule="asam"``.
        rule: a name that ``sharpness list`` shows, and its settings, ``"gsam:alpha=0.3"``; or a ``Rule``. Those that mix the
            first gradient in get it as it was before Trainer clipped it.
        interval: an ascent in each so-many-th step only; the others cost one pass, as those between two of ``looksam`` do.
        (``surrogate_gap`` and ``gradient_norm`` are signals for ``SharpnessCallback(signals=...)``.)
    Cost: a forward and a backward pass per ascent, beside Trainer's own, so two per step for ``momentum_sam`` and
        ``random_sam``, too, which need no first one.
    Raises:
        ValueError: from ``attach``, with DeepSpeed or FSDP1, which hold no whole gradient then.
    """

    def __init__(
        self, rho: Radius | None = None, *, adaptive: bool = False, rule: str | Rule = "sam", interval: int = 1
    ) -> None:
        self._sharpening = Sharpening.read(rule, rho, interval, adaptive=adaptive)
        super().__init__(rho=rho, adaptive=adaptive, rule=rule, interval=interval)
        self._sharp: SharpnessAware | None = None
        self._micro_batches: list[tuple[Any, Any, Any]] = []
        self._losses: list[Tensor] = []
        self._clipped = 1.0

    def attach(self, trainer: Any) -> Self:
        refuse_engines(trainer, "SAMCallback")
        super().attach(trainer)
        first_pass, clip = trainer.training_step, trainer.accelerator.clip_grad_norm_

        def is_on() -> bool:  # not taken off again
            return any(vars(one) is vars(self) for one in trainer.callback_handler.callbacks)

        def training_step(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            loss: Tensor = first_pass(model, inputs, *args, **kwargs)
            if is_on() and self._sharp is not None and self._sharp.next_ascents:
                self._micro_batches.append((model, inputs, (args, kwargs)))
                self._losses.append(loss)
            return loss

        def clip_grad_norm_(parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> Any:
            norm = clip(parameters, max_norm, *args, **kwargs)
            if norm is not None:
                self._clipped = min(1.0, max_norm / (float(norm) + 1e-6))
            return norm

        self._replay = first_pass
        trainer.training_step = training_step
        if self._sharpening.looks_at_first:
            trainer.accelerator.clip_grad_norm_ = clip_grad_norm_
        return self

    def surrogate_gap(self) -> float | None:
        """By how much Trainer's loss rose on the way uphill, in the last step with an ascent; None before the first."""
        return None if self._sharp is None else self._sharp.surrogate_gap

    def gradient_norm(self) -> float | None:
        """Of what the last step with an ascent followed, as Trainer has clipped it; None before the first."""
        return None if self._sharp is None else self._sharp.gradient_norm

    @property
    def follows_gradient(self) -> bool:
        """Whether ``gradient_norm`` is that of the gradient, in each step."""
        return self._sharpening.follows_gradient

    def _begin(self, args: Any, state: Any, control: Any, kwargs: dict[str, Any]) -> None:
        if self._trainer is None:
            raise ValueError("SAMCallback replays what Trainer does, so it must know it: SAMCallback(...).attach(trainer)")
        optimizer = innermost(kwargs["optimizer"])
        if self._sharp is None or self._sharp.base is not optimizer:  # a second train() may go on with the same one
            self._sharp = self._sharpening.around(optimizer, kwargs["model"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._micro_batches.clear()
        self._losses.clear()
        self._clipped = 1.0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        recorded, first, sharp = self._micro_batches, self._losses, self._sharp
        self._micro_batches, self._losses = [], []
        assert sharp is not None
        parameters = [parameter for parameter in kwargs["model"].parameters() if parameter.requires_grad]
        scaler = getattr(self._trainer.accelerator, "scaler", None)
        if self._clipped < 1:
            _divide(parameters, self._clipped)
        second: list[Tensor] = []
        for ascent in sharp.ascents(scale=1.0, evaluated=True):  # Trainer has unscaled the first gradient
            with ascent as move:
                if scaler is None or bool(torch.isfinite(move.norm)):  # a step that overflowed is skipped anyway
                    second = self._again(recorded)
                if scaler is not None:
                    _divide(parameters, scaler.get_scale())
        if scaler is not None and not sharp.is_finite():
            sharp.give_up()
            for parameter in parameters:
                parameter.grad = None  # which leaves the weights alone; Trainer's scaler has looked at the first one
        is_made_anew = bool(second) or self._sharpening.looks_at_first
        if is_made_anew and args.max_grad_norm is not None and args.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        if second:
            sharp.surrogate_gap = torch.stack(second).sum() - torch.stack(first).sum()

    def _again(self, recorded: list[tuple[Any, Any, Any]]) -> list[Tensor]:
        accelerator = self._trainer.accelerator
        losses = []
        for number, (model, inputs, (extra, named)) in enumerate(recorded, 1):
            is_last = number == len(recorded)
            with contextlib.nullcontext() if is_last else accelerator.no_sync(model=model):
                losses.append(self._replay(model, inputs, *extra, **named))
        return losses


def _divide(parameters: list[nn.Parameter], divisor: float) -> None:
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.div_(divisor)
