"""Measuring as a callback, with values that other callbacks can monitor."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from sharpness_plugins import distributed
from sharpness_plugins.errors import PluginWarning
from sharpness_plugins.monitor import Measurement, SharpnessMonitor, gradient_norm
from sharpness_plugins.schedules import Progress

from ..monitoring import Monitoring, values_of
from .noise import NOISE, NoiseWatch
from .probing import transferred_probe
from .sam import SAMCallback
from .sizes import BatchSizeCallback
from .trainer import Groups, check_trainer, epoch_after, is_last_of_group, samples_of

__all__ = ["SharpnessCallback"]


class SharpnessCallback(Monitoring, Callback):
    """Measures sharpness during ``fit``, and once on the validation data in ``validate``.

    Training with it is training without it, bit for bit. Every rank measures at the same steps, on the same probe. The
    values go to the trainer's loggers when they are measured, and as ``sharpness/<metric>`` to ``log`` in every epoch,
    so that ``ModelCheckpoint(monitor="sharpness/hessian_topk")`` and ``EarlyStopping`` find them.

    With them go ``gradient_norm``, the norm of the gradient that the last step took (with a ``SAMCallback`` whose rule
    follows the gradient in each step, of the first of its two), the ``surrogate_gap`` of a ``SAMCallback``, and the
    ``gradient_noise_scale`` where ``noise_scale`` is set or a ``BatchSizeCallback`` looks at it.

    Args:
        metrics: as for ``measure_sharpness``; a name may carry settings, ``"hessian_topk:k=1"``.
        every, budget, budget_in, batch_norm, seed, criterion, signals: as for ``SharpnessMonitor``. The first measurement is
            made before the first step, whatever the budget, which waits with the next one.
        loss_fn: None for ``training_step_loss``, unless there is a ``criterion``.
        num_samples: of the probe, drawn once from the training data and passed through the module's transfer hooks.
        probe: batches or a loader to draw it from; None for the training loader's data set.
        csv, jsonl: files to append to.
        sinks: callables that are told of each measurement, on every rank.
        noise_scale: whether to record ``gradient_noise_scale``, from the micro-batches and ranks of training, of which it
            takes two: no further pass over data, two reads of each gradient.
        prefix: of the names that are logged, which also tells two of these callbacks apart in a checkpoint.
    Attributes:
        monitor: the ``SharpnessMonitor``; None before training.
        is_optional: of an automatic one: a training loader that no probe can be drawn from, or a strategy that cannot be
            measured, is a warning only, and it stands aside where the user has a ``SharpnessCallback``.
    """

    def __init__(self, *args: Any, noise_scale: bool = False, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.noise_scale = noise_scale
        self.is_optional = False
        self._is_left_out = False
        self._groups = Groups()
        self._noise: NoiseWatch | None = None
        self._in_hand = (0, 0.0)

    @property
    def state_key(self) -> str:
        return f"SharpnessCallback[{self.prefix}]{' (automatic)' if self.is_optional else ''}"

    def _stands_aside(self, trainer: Any) -> bool:
        given = [one for one in trainer.callbacks if isinstance(one, SharpnessCallback) and not one.is_optional]
        return self._is_left_out or (self.is_optional and bool(given))

    def _leave_out(self, error: Exception) -> None:
        """Nothing is measured, of an automatic one; the error of another goes on."""
        if not self.is_optional:
            raise error
        self._is_left_out = True
        warnings.warn(f"no sharpness is measured: {type(error).__name__}: {error}", PluginWarning, stacklevel=3)

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        self._is_left_out = False
        try:
            check_trainer(self, trainer, steps=self.noise_scale and stage == "fit")
        except ValueError as error:
            self._leave_out(error)
        for callback in trainer.callbacks:
            if isinstance(callback, BatchSizeCallback):
                callback.watches_noise |= self.noise_scale

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        if self._stands_aside(trainer):
            return
        if self._saved is None and trainer.global_step and self.monitor is not None:
            self._saved = self.state_dict()  # fit goes on where another fit of this trainer ended
        self._groups.begin(trainer)
        if self.noise_scale and not any(isinstance(one, BatchSizeCallback) for one in trainer.callbacks):
            self._noise = self._noise or NoiseWatch(trainer)
        try:
            self.monitor = self._monitor(trainer, pl_module, trainer.train_dataloader)
        except Exception as error:
            self._leave_out(error)
            return
        if self._saved is not None:
            self.monitor.load_state_dict(self._saved["monitor"])
            self._groups.samples = float(self._saved["samples"])
            if self._noise is not None and self._saved.get("noise") is not None:
                self._noise.meter.load_state_dict(self._saved["noise"])
            self._saved = None
        if not self.monitor.history:  # whatever the budget: who monitors a value must find one
            progress = Progress(trainer.global_step, round(self._groups.samples), float(trainer.current_epoch), 0, 0)
            self.monitor.measure(progress)

    def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._in_hand = batch_idx, samples_of(batch)

    def on_before_backward(self, trainer: Any, pl_module: LightningModule, loss: Tensor) -> None:
        if self._noise is not None:
            self._noise.before_backward(trainer, self._in_hand[1], 1 / trainer.accumulate_grad_batches)

    def on_after_backward(self, trainer: Any, pl_module: LightningModule) -> None:
        if self._noise is not None:
            self._noise.after_backward(trainer, is_last=is_last_of_group(trainer, self._in_hand[0]))

    def on_exception(self, trainer: Any, pl_module: LightningModule, exception: BaseException) -> None:
        if self._noise is not None:
            self._noise.close()

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._groups.end_batch(trainer, batch) is not None and self.monitor is not None:
            self._measure_if_due(trainer, epoch_after(trainer, batch_idx))

    def on_validation_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING and not self._stands_aside(trainer):
            with torch.inference_mode(False):  # around the loader, too: inference tensors have no backward
                monitor = self._monitor(trainer, pl_module, trainer.val_dataloaders)
                progress = Progress(trainer.global_step, round(self._groups.samples), None, 0, 0)
                monitor.measure(progress)
            self.monitor = monitor
        if not trainer.sanity_checking:
            self._log(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
        self._log(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        if self.monitor is None:
            return self._saved or {}
        noise = None if self._noise is None else self._noise.meter.state_dict()
        return {"monitor": self.monitor.state_dict(), "samples": self._groups.samples, "noise": noise}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = dict(state_dict) or None

    def _monitor(self, trainer: Any, module: LightningModule, loader: Any) -> SharpnessMonitor:
        """What fails on one rank fails on all of them, which would wait for it in the first measurement."""
        with distributed.resolve_ranks("auto").sharing("drawing the probe"):
            given = loader if self.probe is None else self.probe
            probe = transferred_probe(trainer, module, given, self.num_samples, self.seed)
            signals = _free_signals(trainer, module)
            if (noise := self._noise) is not None:
                signals[NOISE] = lambda: noise.signal(trainer.global_step, round(self._groups.samples))
            return self._make_monitor(module, probe, _LoggerSink(trainer, self.prefix), signals)

    def _measure_if_due(self, trainer: Any, epoch: float) -> None:
        assert self.monitor is not None
        progress = Progress(
            trainer.global_step,
            round(self._groups.samples),
            epoch,
            round(self._groups.samples / trainer.global_step) if trainer.global_step else 0,
            0,
        )
        self.monitor.measure_if_due(progress)

    def _log(self, trainer: Any, module: LightningModule) -> None:
        """The last value, in every epoch: a monitor of ours is then never missing."""
        if self.last is None:
            return
        logger = None if trainer.state.fn == TrainerFn.VALIDATING else False  # in fit the loggers have had it
        for name, value in self.last.values.items():
            module.log(f"{self.prefix}/{name}", value, rank_zero_only=False, logger=logger, on_step=False, on_epoch=True)


class _LoggerSink:
    """The trainer's own loggers, at the optimizer step of the measurement."""

    def __init__(self, trainer: Any, prefix: str) -> None:
        self._trainer, self._prefix = trainer, prefix

    def __call__(self, measurement: Measurement) -> None:
        for logger in self._trainer.loggers:
            logger.log_metrics(values_of(measurement, self._prefix), step=measurement.step)


def _free_signals(trainer: Any, module: LightningModule) -> dict[str, Any]:
    """Of training and of the other callbacks, at no cost."""
    found: dict[str, Any] = {"gradient_norm": gradient_norm(module)}
    for callback in trainer.callbacks:
        if isinstance(callback, SAMCallback):
            found["surrogate_gap"] = callback.gap_over_ranks
            if callback.follows_gradient:
                found["gradient_norm"] = lambda sam=callback: sam.gradient_norm
        if isinstance(callback, BatchSizeCallback):
            found[NOISE] = callback.noise_scale
    return found
