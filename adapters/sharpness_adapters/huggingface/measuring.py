"""Measuring as a callback, with Trainer's own log as sink."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sharpness_plugins import distributed
from sharpness_plugins.measure import Metrics, resolve_metrics
from sharpness_plugins.monitor import Measurement, SharpnessMonitor, Sink, norm_of
from sharpness_plugins.probe import probe_batches
from sharpness_plugins.schedules import Progress, Signal
from sharpness_plugins.space import Select

from ..sharded import refuse_sharded
from .attachable import Attachable
from .position import position
from .sam import SAMCallback
from .training import refuse_engines

if TYPE_CHECKING:
    from typing_extensions import Self

    from sharpness_plugins.losses import LossFn

__all__ = ["SharpnessCallback"]


class SharpnessCallback(Attachable):
    """Measures the model while Trainer trains it, on samples of its own, and logs ``sharpness/<metric>`` through Trainer.

    Training with it is training without it, bit for bit. The loss is the mean over the examples (or tokens), whatever
    Trainer's own is scaled by: with accumulation that of models which ignore ``num_items_in_batch`` is a multiple of it.
    Under mixed precision the model is measured without autocast.

    With each measurement go ``gradient_norm``, the norm of the gradient that the last step took, and where the trainer has a
    ``SAMCallback`` its ``surrogate_gap``, and the norm of the first of its two where its rule follows that in each step.

    Given as ``callbacks=[...]`` instead of attached, it does all of this except for logging and SAM's signals.

    Args:
        metrics, every, budget, budget_in, loss_fn, criterion, select, batch_norm, seed, signals: as for
            ``SharpnessMonitor``.
        num_samples: of the training data to measure on, drawn once.
        probe: other batches to measure on.
        sinks: told of each measurement, on the first rank, beside Trainer's log.
    Attributes:
        monitor: the ``SharpnessMonitor``; None before training.
    Raises:
        ValueError: DeepSpeed or FSDP1, whose weights cannot be gathered here.
    """

    def __init__(
        self,
        metrics: Metrics = None,
        every: str = "1ep",
        *,
        budget: float | None = 0.02,
        budget_in: str = "seconds",
        num_samples: int = 512,
        probe: Iterable[Any] | None = None,
        loss_fn: LossFn | None = None,
        criterion: Callable[..., Any] | None = None,
        select: Select = None,
        batch_norm: str = "eval",
        seed: int = 0,
        signals: Mapping[str, Callable[[], Signal | float | None]] | None = None,
        sinks: Sink | Iterable[Sink] = (),
    ) -> None:
        shared: dict[str, Any] = {
            "metrics": metrics,
            "every": every,
            "budget": budget,
            "budget_in": budget_in,
            "loss_fn": loss_fn,
            "criterion": criterion,
            "select": select,
            "batch_norm": batch_norm,
            "seed": seed,
            "signals": signals,
        }
        own_sinks = (sinks,) if callable(sinks) else tuple(sinks)
        super().__init__(**shared, num_samples=num_samples, probe=probe, sinks=own_sinks)
        self.monitor: SharpnessMonitor | None = None
        self._shared = shared
        self._gradients: list[Tensor] = []

    @property
    def history(self) -> list[Measurement]:
        """All measurements of this run, and of those that it was resumed from."""
        return [] if self.monitor is None else self.monitor.history

    def attach(self, trainer: Any) -> Self:
        refuse_engines(trainer, "SharpnessCallback")
        return super().attach(trainer)

    def _begin(self, args: Any, state: Any, control: Any, kwargs: dict[str, Any]) -> None:
        refuse_sharded(kwargs["model"], "SharpnessCallback")
        settings, loader = self._settings, kwargs["train_dataloader"]
        probe = settings["probe"]
        if probe is None:
            with distributed.resolve_ranks("auto").sharing(
                "drawing the probe"
            ):  # what one rank cannot, the others must know
                probe = probe_batches(loader, settings["num_samples"], seed=settings["seed"])
        sinks: list[Sink] = [self._log, *settings["sinks"]] if state.is_world_process_zero else [self._log]
        metrics = resolve_metrics(settings["metrics"])
        free = {name: read for name, read in self._free_signals().items() if name not in metrics}
        signals = {**free, **(settings["signals"] or {})}
        self.monitor = SharpnessMonitor(kwargs["model"], probe, **{**self._shared, "signals": signals, "sinks": sinks})

    def _free_signals(self) -> dict[str, Callable[[], float | None]]:
        """Of training, and of a ``SAMCallback`` of the same trainer, at no cost."""
        signals: dict[str, Callable[[], float | None]] = {"gradient_norm": lambda: norm_of(self._gradients)}
        trainer = self._trainer
        for callback in () if trainer is None else trainer.callback_handler.callbacks:
            if isinstance(callback, SAMCallback):
                signals["surrogate_gap"] = partial(_over_ranks, callback.surrogate_gap)
                if callback.follows_gradient:
                    signals["gradient_norm"] = callback.gradient_norm
        return signals

    def _began(self, args: Any, state: Any, control: Any, kwargs: dict[str, Any]) -> None:
        if state.global_step == 0:
            self._measure(args, state, kwargs)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What the step took, as Trainer lets go of it before ``on_step_end``."""
        self._gradients = [parameter.grad for parameter in kwargs["model"].parameters() if parameter.grad is not None]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measure(args, state, kwargs)
        self._gradients = []

    def _measure(self, args: Any, state: Any, kwargs: dict[str, Any]) -> None:
        if self.monitor is None:
            return
        at = position(args, state, kwargs["train_dataloader"])
        progress = Progress(
            step=state.global_step,
            samples=at.total,
            epoch=float(state.epoch or 0.0),
            batch_size=at.batch_size,
            base_batch_size=at.batch_size,
        )
        with _full_precision(kwargs["model"]):
            self.monitor.measure_if_due(progress)

    def _log(self, made: Measurement) -> None:
        if (trainer := self._trainer) is None:
            return
        values = {f"sharpness/{name}": value for name, value in made.values.items() if math.isfinite(value)}
        if made.loss is not None and math.isfinite(made.loss):
            values["sharpness/loss"] = made.loss
        due = trainer.control.should_log  # Trainer.log takes the step's own log for done
        trainer.log(values)
        trainer.control.should_log = due

    def _state_dict(self) -> dict[str, Any]:
        return {} if self.monitor is None else self.monitor.state_dict()

    def _load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.monitor is not None and state:
            self.monitor.load_state_dict(state)


def _over_ranks(read: Callable[[], float | None]) -> float | None:
    """The mean; every rank asks at the same step."""
    value = read()
    return None if value is None else distributed.sum_of(value) / distributed.world_size()


@contextlib.contextmanager
def _full_precision(model: nn.Module) -> Iterator[None]:
    """Accelerate's autocast is inside ``forward``, where nothing around the call turns it off; its original is beside it."""
    wrapped = vars(model).get("forward")
    if wrapped is None or "_original_forward" not in vars(model):
        yield
        return
    model.forward = model._original_forward  # type: ignore[assignment]
    try:
        yield
    finally:
        model.forward = wrapped
