"""Batch sizes by schedule as a callback: by accumulation, in one ``Trainer.train()``."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharpness_plugins.controller import BatchChange, BatchController, as_schedule
from sharpness_plugins.pacing import Budget
from sharpness_plugins.probe import probe_batches
from sharpness_plugins.schedules import BatchSchedule, Plan, smallest
from sharpness_plugins.signals import SignalBook

from .attachable import Attachable
from .position import position, samples_per_batch
from .training import catch_up, innermost, refuse_engines, shift, stop, take_means

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["BatchSizeCallback"]


class BatchSizeCallback(Attachable):
    """Changes the batch size while Trainer trains, by accumulation: ``args`` describe the smallest batch.

    The unit is the trainer's own batch, ``per_device_train_batch_size * gradient_accumulation_steps * world size``; the
    schedule's sizes become multiples of it. A change takes effect at once where the batches of the epoch so far are whole
    large ones, and else as soon as they are, at the latest with the next epoch; no sample is lost.

    Trainer plans at the beginning, for the unit. So its learning-rate schedule is stepped by samples here and ends where the
    data do; ``max_steps`` means so many steps' worth of data; and ``train(resume_from_checkpoint=...)`` finds its place in
    the data again. A model that takes ``num_items_in_batch`` and ignores it has its micro-batches' gradients summed by
    Trainer; here it gets their mean, with a warning.

    Args:
        schedule: text such as ``"0:32 2ep:256"``, or a ``BatchSchedule``.
        coupling, budget, budget_in, seed, on_change: as for ``BatchController``.
        num_samples: of the training data, for signals that are measured.
    Attributes:
        controller: the ``BatchController``; None before training. Its plans take a unit's samples per device for one
            micro-batch.
    Raises:
        ValueError: when training begins: the schedule goes below the unit; it looks at gradient noise, which Trainer does
            not show; the data set has no length.
    """

    def __init__(
        self,
        schedule: BatchSchedule | str,
        *,
        coupling: str = "auto",
        num_samples: int = 512,
        seed: int = 0,
        budget: float | None = None,
        budget_in: str = "seconds",
        on_change: Callable[[BatchChange], None] | Iterable[Callable[[BatchChange], None]] = (),
    ) -> None:
        listeners = (on_change,) if callable(on_change) else tuple(on_change)
        shared: dict[str, Any] = {
            "coupling": coupling,
            "seed": seed,
            "budget": budget,
            "budget_in": budget_in,
            "on_change": listeners,
        }
        super().__init__(schedule=schedule, num_samples=num_samples, **shared)
        self._shared = shared
        self.controller: BatchController | None = None
        self._unit = self._steps = self._true_step = 0

    @property
    def history(self) -> list[BatchChange]:
        """The changes of this run, and of those that it was resumed from."""
        return [] if self.controller is None else self.controller.history

    def attach(self, trainer: Any) -> Self:
        refuse_engines(trainer, "BatchSizeCallback")
        super().attach(trainer)
        train = trainer.train

        def scheduled(resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
            first = trainer.args.gradient_accumulation_steps
            takes = trainer.model_accepts_loss_kwargs
            self._first_accumulation = first
            try:
                with self._in_units(trainer, resume_from_checkpoint) as checkpoint:
                    return train(checkpoint, *args, **kwargs)
            finally:
                trainer.args.gradient_accumulation_steps, trainer.model_accepts_loss_kwargs = first, takes
                if self.controller is not None:
                    self.controller.detach()

        trainer.train = scheduled
        return self

    @contextlib.contextmanager
    def _in_units(self, trainer: Any, checkpoint: Any) -> Iterator[Any]:
        """The checkpoint with its steps counted in units, by which Trainer finds its place in the data."""
        self._true_step = 0
        if checkpoint is True:
            utils: Any = importlib.import_module("transformers.trainer_utils")
            checkpoint = utils.get_last_checkpoint(trainer.args.output_dir) or True
        saved = None if checkpoint is None or isinstance(checkpoint, bool) else Path(checkpoint) / "trainer_state.json"
        if saved is None or not saved.is_file():
            yield checkpoint
            return
        state = json.loads(saved.read_text(encoding="utf-8"))
        entry = state.get("stateful_callbacks", {}).get(type(self).__name__, {})
        if "attributes" not in entry:
            yield checkpoint
            return
        self._true_step = state["global_step"]
        state["global_step"] = entry["attributes"]["_saved"]["steps"]
        with tempfile.TemporaryDirectory() as folder:
            for file in saved.parent.iterdir():
                if file.name != saved.name:
                    _link(file.resolve(), Path(folder) / file.name)
            (Path(folder) / saved.name).write_text(json.dumps(state), encoding="utf-8")
            yield folder

    def _begin(self, args: Any, state: Any, control: Any, kwargs: dict[str, Any]) -> None:
        trainer, loader = self._trainer, kwargs["train_dataloader"]
        if trainer is None:
            raise ValueError("BatchSizeCallback corrects what Trainer counts: BatchSizeCallback(...).attach(trainer)")
        if not hasattr(loader.dataset, "__len__"):
            raise ValueError(
                "BatchSizeCallback needs to know how long an epoch is, and the training data have no length: use a "
                "map-style data set"
            )
        if self.controller is not None:
            self.controller.detach()
            self.controller = None
        per_batch, at = samples_per_batch(args, loader), position(args, state, loader)
        self._per_batch, self._epoch_samples = per_batch, at.epoch_samples
        self._unit = per_batch * self._first_accumulation
        per_rank = self._unit // args.world_size
        schedule = as_schedule(self._settings["schedule"])
        _check_unit(schedule, self._unit)
        if SignalBook(schedule.signals, Budget(None)).needs_meter:
            raise ValueError(
                f"{schedule!r} looks at gradient noise, whose meter needs micro-batches weighted by their samples, and "
                "Trainer weights them equally. Use a schedule in time or by sharpness, or a loop of your own "
                "(sharpness_adapters.plain)"
            )
        probe = None
        if schedule.signals:
            probe = probe_batches(loader, self._settings["num_samples"], seed=self._settings["seed"])
        self.controller = BatchController(
            schedule,
            innermost(kwargs["optimizer"]),
            model=kwargs["model"],
            num_samples=at.epoch_samples,
            max_micro_batch=per_rank,
            multiple=per_rank,
            probe=probe,
            **self._shared,
        )
        self._steps = at.steps(self._unit)
        take_means(trainer, kwargs["model"], loader)

    def _began(self, args: Any, state: Any, control: Any, kwargs: dict[str, Any]) -> None:
        if self._true_step:
            shift(self._trainer, state, self._true_step - state.global_step)
        self._decide(args)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._decide(args)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.controller is not None
        at = position(args, state, kwargs["train_dataloader"])
        self.controller.advance(at.total - self.controller.samples)
        due = at.steps(self._unit) - self._steps
        self._steps += due
        catch_up(kwargs["optimizer"], kwargs["lr_scheduler"], due)
        if self._steps >= state.max_steps:
            stop(args, state, control)
        self._decide(args)

    def _decide(self, args: Any) -> None:
        assert self.controller is not None
        decided = self.controller.decide(self._can_take)
        args.gradient_accumulation_steps = decided.accumulation * self._first_accumulation

    def _can_take(self, plan: Plan) -> bool:
        """Trainer steps where the number of batches of the epoch so far is a multiple of the accumulation."""
        assert self.controller is not None
        batches = self.controller.samples % self._epoch_samples // self._per_batch
        return batches % (plan.accumulation * self._first_accumulation) == 0

    def _state_dict(self) -> dict[str, Any]:
        if self.controller is None:
            return {}
        return {"controller": self.controller.state_dict(), "steps": self._steps, "unit": self._unit}

    def _load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.controller is not None and state:
            if state["unit"] != self._unit:
                raise ValueError(
                    f"the checkpoint was made with batches of {state['unit']} as the smallest, and the trainer's arguments "
                    f"make {self._unit}, so the place in the data is not known. Resume with the same arguments"
                )
            self.controller.load_state_dict(state["controller"])
            self._steps = int(state["steps"])


def _check_unit(schedule: BatchSchedule, unit: int) -> None:
    """
    Raises:
        ValueError: it goes below.
    """
    least = smallest(schedule)
    least = schedule.initial().batch_size if least is None else least
    if least < unit:
        raise ValueError(
            f"{schedule!r} goes down to batches of {least}, and the trainer's arguments make {unit}: the smallest one is "
            "theirs. Lower per_device_train_batch_size or gradient_accumulation_steps"
        )


def _link(source: Path, target: Path) -> None:
    try:
        os.symlink(source, target, target_is_directory=source.is_dir())
    except OSError:  # no right to make links
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, target)
