"""Real batches of changing size: one ``Trainer.train()`` for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers.trainer_callback import TrainerCallback

from sharpness_plugins.controller import BatchChange, BatchController, as_schedule
from sharpness_plugins.coupling import counts_steps
from sharpness_plugins.schedules import BatchSchedule, smallest

from .position import position
from .training import catch_up, innermost, refuse_engines, shift, take_means

__all__ = ["train_in_phases"]


def train_in_phases(
    trainer: Any,
    schedule: BatchSchedule | str,
    *,
    max_micro_batch: int | None = None,
    coupling: str = "auto",
    on_change: Callable[[BatchChange], None] | Iterable[Callable[[BatchChange], None]] = (),
) -> list[Any]:
    """Train with real batches of changing size: one ``trainer.train()`` for each, as Trainer keeps to one per call.

    ``args.num_train_epochs`` is the length of all together. Steps, epochs, the log, the order of the data, the optimizer's
    state and the learning-rate schedule (laid out for the smallest batch size, stepped by samples) go on from phase to
    phase; each phase has Trainer's end of training: callbacks, a last log. Changes take place between epochs. There is no
    resuming in the middle: for that, use ``BatchSizeCallback``.

    Args:
        schedule: text such as ``"0:32 2ep:256"``, or a ``BatchSchedule`` that looks at no signals.
        max_micro_batch: per device; what is larger is accumulated.
        coupling, on_change: as for ``BatchController``.
    Returns:
        a ``TrainOutput`` per phase.
    Raises:
        ValueError: signals; ``max_steps``, or a part of an epoch; DeepSpeed or FSDP1; data without a length.
    """
    args, wish = trainer.args, as_schedule(schedule)
    refuse_engines(trainer, "train_in_phases")
    if wish.signals:
        raise ValueError(f"{wish!r} looks at signals, which are not measured between phases. Use BatchSizeCallback")
    if args.max_steps > 0 or args.num_train_epochs != int(args.num_train_epochs):
        raise ValueError("phases are whole epochs: set num_train_epochs to a whole number, and leave max_steps alone")
    if not hasattr(trainer.train_dataset, "__len__"):
        raise ValueError("phases are epochs, and the training data have no length: use a map-style data set")
    trainer.create_optimizer()
    controller = BatchController(
        wish,
        innermost(trainer.optimizer),
        num_samples=len(trainer.train_dataset),
        max_micro_batch=max_micro_batch,
        coupling=coupling,
        on_change=on_change,
    )
    phases = _Phases(trainer, controller, min(smallest(wish) or controller.batch_size, controller.batch_size))
    kept = (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.num_train_epochs)
    loaded = trainer._train_batch_size  # what Trainer's loader goes by, taken from args once
    best, create_scheduler = args.load_best_model_at_end, trainer.create_scheduler
    data, takes = trainer.accelerator.dataloader_config, trainer.model_accepts_loss_kwargs
    data_seed = data.data_seed
    outputs = []
    trainer.callback_handler.callbacks.insert(0, phases)  # before those that read the state that it corrects
    trainer.create_scheduler = lambda num_training_steps, *a, **k: create_scheduler(phases.planned_steps, *a, **k)
    try:
        while phases.goes_on:
            plan = controller.decide()
            args.per_device_train_batch_size = plan.micro_batch
            trainer._train_batch_size = args.train_batch_size
            args.gradient_accumulation_steps = plan.accumulation
            args.num_train_epochs = kept[2] - phases.epochs
            args.load_best_model_at_end = best
            # Accelerate's sampler orders an epoch by the sum of this and the epoch's number, which begins at 0 again
            data.data_seed = (torch.initial_seed() if data_seed is None else data_seed) + phases.epochs
            outputs.append(trainer.train())
    finally:
        args.per_device_train_batch_size, args.gradient_accumulation_steps, args.num_train_epochs = kept
        trainer._train_batch_size = loaded
        args.load_best_model_at_end, data.data_seed, trainer.model_accepts_loss_kwargs = best, data_seed, takes
        del trainer.create_scheduler
        trainer.callback_handler.callbacks.remove(phases)
        controller.detach()
    return outputs


class _Phases(TrainerCallback):
    """Makes one run of several."""

    def __init__(self, trainer: Any, controller: BatchController, base: int) -> None:
        self._trainer, self._controller, self._base = trainer, controller, base
        self._num_epochs = int(trainer.args.num_train_epochs)
        num_samples = len(trainer.train_dataset)
        per_epoch = num_samples // base if trainer.args.dataloader_drop_last else -(-num_samples // base)
        self.planned_steps = self._num_epochs * per_epoch
        self.epochs = 0
        self.goes_on = True
        self._state: Any = None
        self._begun = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun, self._steps = self.epochs, 0
        if args.gradient_accumulation_steps > 1:
            take_means(self._trainer, kwargs["model"], kwargs["train_dataloader"])
        state.num_train_epochs = self._num_epochs
        if self._state is not None:
            before = self._state
            state.max_steps += before.global_step
            shift(self._trainer, state, before.global_step)
            state.epoch = float(self.epochs)
            for name in ("log_history", "best_metric", "best_global_step", "best_model_checkpoint"):
                if hasattr(before, name):
                    setattr(state, name, getattr(before, name))
            for _ in range(self._done if counts_steps(kwargs["lr_scheduler"]) else 0):
                kwargs["lr_scheduler"].step()
        self._state = state

    _done = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        at = position(args, state, kwargs["train_dataloader"])
        state.epoch += self._begun
        due = at.steps(self._base) - self._steps
        self._steps += due
        self._done += due
        self._controller.advance(at.total + self._begun * at.epoch_samples - self._controller.samples)
        catch_up(kwargs["optimizer"], kwargs["lr_scheduler"], due)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epochs += 1
        before = self._controller.plan
        is_over = control.should_training_stop or self.epochs >= self._num_epochs
        self.goes_on = not is_over and self._controller.decide() != before
        if self.goes_on:
            control.should_training_stop = True
            args.load_best_model_at_end = False  # not before the end
