"""Hugging Face: Trainer's callbacks for measuring, SAM and batch-size schedules; batch sizes of Accelerate's loaders.

The callbacks need what Trainer does not tell callbacks, so they are attached to it::

    SharpnessCallback(["epsilon_box"], every="1ep").attach(trainer)
    trainer.train()
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler

from sharpness_plugins.batches import map_tensors
from sharpness_plugins.controller import BatchChange, BatchController
from sharpness_plugins.coupling import counts_steps
from sharpness_plugins.errors import LoaderError, missing_dependency
from sharpness_plugins.measure import Metrics
from sharpness_plugins.monitor import Measurement, SharpnessMonitor, Sink
from sharpness_plugins.optimizers import perturbed
from sharpness_plugins.pacing import Budget
from sharpness_plugins.probe import probe_batches
from sharpness_plugins.registry import schedule_factories
from sharpness_plugins.schedules import (
    BatchSchedule,
    Decision,
    Memory,
    Progress,
    Signal,
    parse_schedule,
    sizes,
    smallest,
)
from sharpness_plugins.signals import SignalBook
from sharpness_plugins.space import Select

if TYPE_CHECKING:
    from typing_extensions import Self

    from sharpness_plugins.losses import LossFn

_module = missing_dependency("transformers.trainer_callback", extra="huggingface", purpose="sharpness_adapters.huggingface")
if not hasattr(_module, "ExportableState") or not hasattr(_module.TrainerCallback, "on_pre_optimizer_step"):
    raise ImportError(
        f"sharpness_adapters.huggingface needs transformers>=4.46, and {metadata.version('transformers')} is installed. "
        'Install it with: pip install -U "sharpness-plugins[huggingface]"'
    )

from transformers.trainer_callback import ExportableState, TrainerCallback  # noqa: E402

__all__ = ["BatchSizeCallback", "SAMCallback", "SharpnessCallback", "set_batch_size", "train_in_phases"]

_attached: weakref.WeakKeyDictionary[Any, list[_Attachable]] = weakref.WeakKeyDictionary()


class _Position(NamedTuple):
    """Where Trainer stands in its data. ``samples`` are those of this epoch, over all ranks."""

    epoch: int
    samples: int
    epoch_samples: int
    batch_size: int

    @property
    def total(self) -> int:
        return self.epoch * self.epoch_samples + self.samples

    def steps(self, base: int) -> int:
        """Optimizer steps of ``base`` samples that the data so far are: what a schedule laid out for them has behind it."""
        return self.epoch * -(-self.epoch_samples // base) + self.samples // base


def _position(args: Any, state: Any, loader: Any) -> _Position:
    """From the epoch, a multiple of one over its batches: exact, also at the ragged batch that ends it."""
    per_batch = _samples_per_batch(args, loader)
    try:
        num_batches, num_samples = len(loader), len(loader.dataset)
    except TypeError:  # a stream, whose epochs are as long as training
        samples = state.global_step * per_batch * args.gradient_accumulation_steps
        return _Position(0, samples, 1 << 62, per_batch * args.gradient_accumulation_steps)
    epoch, batches = divmod(round((state.epoch or 0.0) * num_batches), num_batches)
    epoch_samples = min(num_samples, num_batches * per_batch)
    return _Position(
        epoch, min(batches * per_batch, epoch_samples), epoch_samples, per_batch * args.gradient_accumulation_steps
    )


def _samples_per_batch(args: Any, loader: Any) -> int:
    """On all ranks together; of the loader, where it tells, as ``auto_find_batch_size`` leaves ``args`` as they were."""
    told = getattr(loader, "total_batch_size", None)
    return told if isinstance(told, int) else int(args.train_batch_size * args.world_size)


class _Attachable(TrainerCallback, ExportableState):
    """A callback that knows its Trainer, and goes on from a checkpoint of it.

    Trainer saves what ``state()`` says. It restores it only with ``restore_callback_states_from_checkpoint``, and then by
    building the callback anew; without that flag the callback takes its state up itself, and with it, the new one becomes
    the one that was attached.
    """

    def __init__(self, **settings: Any) -> None:
        self._settings = settings
        self._ref: Callable[[], Any] = _nobody

    @property
    def _trainer(self) -> Any:
        return self._ref()

    def attach(self, trainer: Any) -> Self:
        """Add this to ``trainer``'s callbacks. Returns itself.

        Raises:
            ValueError: it, or another of its kind, is among them.
        """
        others = [type(one) for one in trainer.callback_handler.callbacks]
        if type(self) in others:
            raise ValueError(f"the trainer has a {type(self).__name__} already. Take it off with remove_callback first")
        self._ref = weakref.ref(trainer)
        trainer.add_callback(self)
        _attached.setdefault(trainer, []).append(self)
        return self

    def state(self) -> dict[str, Any]:
        """What Trainer puts into its checkpoints: JSON."""
        args = {name: value for name, value in self._settings.items() if _is_json(value)}
        left_out = sorted(self._settings.keys() - args.keys())
        return {"args": args, "attributes": {"_saved": self._state_dict(), "_left_out": left_out}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rebuilt = vars(self).pop("_saved", None)
        left_out = vars(self).pop("_left_out", ())
        if rebuilt is not None:
            self._adopt(args, left_out)
        name = type(self).__name__
        saved = rebuilt
        if saved is None and state.global_step > 0 and name in state.stateful_callbacks:
            found = state.stateful_callbacks[name]
            saved = (found[-1] if isinstance(found, list) else found)["attributes"]["_saved"]
        self._begin(args, state, control, kwargs)
        if saved is not None:
            self._load_state_dict(saved)
        # Trainer looks its callbacks up there when it saves, and a checkpoint from before they were attached has none
        state.stateful_callbacks.setdefault(name, self.state())
        self._began(args, state, control, kwargs)

    def _adopt(self, args: Any, left_out: Iterable[str]) -> None:
        for trainer, callbacks in _attached.items():
            for callback in reversed(callbacks):
                if trainer.args is args and type(callback) is type(self):
                    self.__dict__ = callback.__dict__
                    return
        if left_out:
            raise ValueError(
                f"restore_callback_states_from_checkpoint builds {type(self).__name__} anew from JSON, and "
                f"{', '.join(left_out)} cannot be written as such. Add it with attach(trainer) and not as "
                "callbacks=[...], or leave that flag off: this callback goes on from the checkpoint by itself."
            )

    def _begin(self, args: Any, state: Any, control: Any, kwargs: dict[str, Any]) -> None:
        """Training begins, anew or from a checkpoint, whose state comes next."""

    def _began(self, args: Any, state: Any, control: Any, kwargs: dict[str, Any]) -> None:
        """Training has begun, and the state is what it was."""

    def _state_dict(self) -> dict[str, Any]:
        return {}

    def _load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def _nobody() -> None:
    return None


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


class SharpnessCallback(_Attachable):
    """Measures the model while Trainer trains it, on samples of its own, and logs ``sharpness/<metric>`` through Trainer.

    Training with it is training without it, bit for bit. The loss is the mean over the examples (or tokens), whatever
    Trainer's own is scaled by: with accumulation that of models which ignore ``num_items_in_batch`` is a multiple of it.
    Under mixed precision the model is measured without autocast.

    Given as ``callbacks=[...]`` instead of attached, it does all of this except for logging.

    Args:
        metrics, every, budget, budget_in, loss_fn, criterion, select, batch_norm, seed, signals: as for
            ``SharpnessMonitor``.
        num_samples: of the training data to measure on, drawn once.
        probe: other batches to measure on.
        sinks: told of each measurement, on the first rank, beside Trainer's log.
    Attributes:
        monitor: the ``SharpnessMonitor``; None before training.
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

    @property
    def history(self) -> list[Measurement]:
        """All measurements of this run, and of those that it was resumed from."""
        return [] if self.monitor is None else self.monitor.history

    def _begin(self, args: Any, state: Any, control: Any, kwargs: dict[str, Any]) -> None:
        settings, loader = self._settings, kwargs["train_dataloader"]
        probe = settings["probe"]
        if probe is None:
            probe = probe_batches(loader, settings["num_samples"], seed=settings["seed"])
        sinks: list[Sink] = [self._log, *settings["sinks"]] if state.is_world_process_zero else [self._log]
        self.monitor = SharpnessMonitor(kwargs["model"], probe, sinks=sinks, **self._shared)

    def _began(self, args: Any, state: Any, control: Any, kwargs: dict[str, Any]) -> None:
        if state.global_step == 0:
            self._measure(args, state, kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measure(args, state, kwargs)

    def _measure(self, args: Any, state: Any, kwargs: dict[str, Any]) -> None:
        if self.monitor is None:
            return
        at = _position(args, state, kwargs["train_dataloader"])
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


class SAMCallback(_Attachable):
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
        _refuse_sharded(trainer, "SAMCallback")
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


def _refuse_sharded(trainer: Any, what: str) -> None:
    for engine, name in (("is_deepspeed_enabled", "DeepSpeed"), ("is_fsdp_enabled", "FSDP")):
        if getattr(trainer, engine, False):
            raise ValueError(f"{what} does not work with {name}. Train in one process or with DistributedDataParallel")


class BatchSizeCallback(_Attachable):
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
        _refuse_sharded(trainer, "BatchSizeCallback")
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
        per_batch, at = _samples_per_batch(args, loader), _position(args, state, loader)
        self._unit = per_batch * self._first_accumulation
        per_rank = self._unit // args.world_size
        schedule = _aligned(self._settings["schedule"], self._unit, per_batch, at.epoch_samples)
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
            _innermost(kwargs["optimizer"]),
            model=kwargs["model"],
            num_samples=at.epoch_samples,
            max_micro_batch=per_rank,
            multiple=per_rank,
            probe=probe,
            **self._shared,
        )
        self._steps = at.steps(self._unit)
        _take_means(trainer, kwargs["model"], loader)

    def _began(self, args: Any, state: Any, control: Any, kwargs: dict[str, Any]) -> None:
        if self._true_step:
            _shift(self._trainer, state, self._true_step - state.global_step)
        self._decide(args)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._decide(args)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.controller is not None
        at = _position(args, state, kwargs["train_dataloader"])
        self.controller.advance(at.total - self.controller.samples)
        due = at.steps(self._unit) - self._steps
        self._steps += due
        _catch_up(kwargs["optimizer"], kwargs["lr_scheduler"], due)
        if self._steps >= state.max_steps:
            _stop(args, state, control)
        self._decide(args)

    def _decide(self, args: Any) -> None:
        assert self.controller is not None
        args.gradient_accumulation_steps = self.controller.decide().accumulation * self._first_accumulation

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


class _Aligned:
    """A schedule for batches of whole units, whose changes wait until Trainer's count of the epoch allows them.

    Trainer steps the optimizer where the number of batches of the epoch so far is a multiple of the accumulation.
    """

    def __init__(self, schedule: BatchSchedule, unit: int, per_batch: int, epoch_samples: int) -> None:
        self.schedule, self.unit, self.per_batch, self.epoch_samples = schedule, unit, per_batch, epoch_samples
        self.signals, self.coupling = schedule.signals, schedule.coupling
        self.sizes, self.budget = sizes(schedule), getattr(schedule, "budget", None)

    def initial(self) -> Decision:
        return self.schedule.initial()

    def __call__(self, progress: Progress, memory: Memory) -> Decision:
        decision = self.schedule(progress, memory)
        batches = progress.samples % self.epoch_samples // self.per_batch
        units = max(1, round(decision.batch_size / self.unit))
        if batches % (units * self.unit // self.per_batch):
            return Decision(progress.batch_size, f"{decision.batch_size} waits for a whole one", memory)
        return replace(decision, batch_size=units * self.unit)

    def __repr__(self) -> str:
        return repr(self.schedule)


def _aligned(schedule: BatchSchedule | str, unit: int, per_batch: int, epoch_samples: int) -> _Aligned:
    parsed = _parsed(schedule)
    least = smallest(parsed)
    least = parsed.initial().batch_size if least is None else least
    if least < unit:
        raise ValueError(
            f"{parsed!r} goes down to batches of {least}, and the trainer's arguments make {unit}: the smallest one is "
            "theirs. Lower per_device_train_batch_size or gradient_accumulation_steps"
        )
    return _Aligned(parsed, unit, per_batch, epoch_samples)


def _parsed(schedule: BatchSchedule | str) -> BatchSchedule:
    parsed = parse_schedule(schedule, schedule_factories()) if isinstance(schedule, str) else schedule
    return parsed


def _link(source: Path, target: Path) -> None:
    try:
        os.symlink(source, target, target_is_directory=source.is_dir())
    except OSError:  # no right to make links
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, target)


def _innermost(optimizer: Any) -> Any:
    """Without Accelerate's wrapper, which runs no step hooks of its own."""
    accelerated = missing_dependency("accelerate.optimizer", extra="huggingface", purpose="sharpness_adapters.huggingface")
    while isinstance(optimizer, accelerated.AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _catch_up(optimizer: Any, scheduler: Any, due: int) -> None:
    """Trainer has stepped the learning-rate schedule once for an optimizer step that is worth ``due`` planned ones."""
    if counts_steps(scheduler) and not getattr(optimizer, "step_was_skipped", False):
        for _ in range(due - 1):
            scheduler.step()


def _shift(trainer: Any, state: Any, steps: int) -> None:
    """Go on counting optimizer steps from another number; what Trainer has noted of it moves along."""
    state.global_step += steps
    for note in ("_globalstep_last_logged", "_initial_global_step"):
        if hasattr(trainer, note):
            setattr(trainer, note, getattr(trainer, note) + steps)


def _stop(args: Any, state: Any, control: Any) -> None:
    """The end of training, as Trainer's own flow has it."""
    control.should_training_stop = True
    control.should_save |= args.save_strategy == "steps"
    control.should_evaluate |= args.eval_strategy == "steps" and args.eval_delay <= state.global_step


def _take_means(trainer: Any, model: nn.Module, loader: Any) -> None:
    if _sums_micro_batches(trainer, model, loader):
        trainer.model_accepts_loss_kwargs = False
        warnings.warn(
            f"{type(model).__name__} takes num_items_in_batch and ignores it, so that Trainer would add up the gradients of "
            "micro-batches, and more of them would mean larger steps. Their mean is taken instead.",
            UserWarning,
            stacklevel=2,
        )


def _sums_micro_batches(trainer: Any, model: nn.Module, loader: Any) -> bool:
    """Whether the loss is a mean that does not care for ``num_items_in_batch``, which Trainer takes for a normalized sum."""
    from transformers import Trainer

    is_own = type(trainer).compute_loss is Trainer.compute_loss and trainer.compute_loss_func is None
    if not trainer.model_accepts_loss_kwargs or not is_own or trainer.label_smoother is not None:
        return False
    batch = probe_batches(loader, 1)[0]
    if not isinstance(batch, Mapping) or "labels" not in batch:
        return False
    device = next(model.parameters()).device
    batch = map_tensors(dict(batch), lambda tensor: tensor.to(device))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            losses = [model(**batch, num_items_in_batch=torch.tensor(count, device=device)) for count in (1, 2)]
    finally:
        model.train(was_training)
    one, two = (output["loss"] if isinstance(output, Mapping) else output[0] for output in losses)
    return bool(one == two)


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
        ValueError: signals; ``max_steps``, or a part of an epoch; DeepSpeed or FSDP; data without a length.
    """
    args, parsed = trainer.args, _parsed(schedule)
    _refuse_sharded(trainer, "train_in_phases")
    if parsed.signals:
        raise ValueError(f"{parsed!r} looks at signals, which are not measured between phases. Use BatchSizeCallback")
    if args.max_steps > 0 or args.num_train_epochs != int(args.num_train_epochs):
        raise ValueError("phases are whole epochs: set num_train_epochs to a whole number, and leave max_steps alone")
    if not hasattr(trainer.train_dataset, "__len__"):
        raise ValueError("phases are epochs, and the training data have no length: use a map-style data set")
    trainer.create_optimizer()
    controller = BatchController(
        parsed,
        _innermost(trainer.optimizer),
        num_samples=len(trainer.train_dataset),
        max_micro_batch=max_micro_batch,
        coupling=coupling,
        on_change=on_change,
    )
    phases = _Phases(trainer, controller, min(smallest(parsed) or controller.batch_size, controller.batch_size))
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
            _take_means(self._trainer, kwargs["model"], kwargs["train_dataloader"])
        state.num_train_epochs = self._num_epochs
        if self._state is not None:
            before = self._state
            state.max_steps += before.global_step
            _shift(self._trainer, state, before.global_step)
            state.epoch = float(self.epochs)
            for name in ("log_history", "best_metric", "best_global_step", "best_model_checkpoint"):
                if hasattr(before, name):
                    setattr(state, name, getattr(before, name))
            for _ in range(self._done if counts_steps(kwargs["lr_scheduler"]) else 0):
                kwargs["lr_scheduler"].step()
        self._state = state

    _done = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        at = _position(args, state, kwargs["train_dataloader"])
        state.epoch += self._begun
        due = at.steps(self._base) - self._steps
        self._steps += due
        self._done += due
        self._controller.advance(at.total + self._begun * at.epoch_samples - self._controller.samples)
        _catch_up(kwargs["optimizer"], kwargs["lr_scheduler"], due)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epochs += 1
        before = self._controller.plan
        is_over = control.should_training_stop or self.epochs >= self._num_epochs
        self.goes_on = not is_over and self._controller.decide() != before
        if self.goes_on:
            control.should_training_stop = True
            args.load_best_model_at_end = False  # not before the end


def set_batch_size(loader: Any, batch_size: int) -> None:
    """Change the global batch size of a DataLoader that Accelerate prepared, from its next pass on, on every rank.

    Accelerate keeps a copy of the batch size in the sampler that shares batches out; where only the sampler inside is
    changed, two ranks see an empty epoch and then wait for each other for ever.

    Args:
        batch_size: over all ranks.
    Raises:
        LoaderError: the loader's batches are not made by a ``BatchSampler``.
        ValueError: ``batch_size`` cannot be shared out to the ranks.
    """
    accelerate = missing_dependency("accelerate", extra="huggingface", purpose="set_batch_size")
    shard = loader.batch_sampler
    inner = shard.batch_sampler if isinstance(shard, accelerate.data_loader.BatchSamplerShard) else shard
    if not isinstance(inner, BatchSampler) or not isinstance(getattr(inner, "batch_size", None), int):
        raise LoaderError(
            f"the batch size of this loader cannot be changed: its batches come from a {type(inner).__name__}. Pass a "
            "DataLoader with a batch_size"
        )
    ranks = accelerate.PartialState().num_processes
    if batch_size < 1 or batch_size % ranks:
        raise ValueError(f"a batch of {batch_size} cannot be shared out to {ranks} rank(s). Pass a multiple")
    size = batch_size if getattr(shard, "split_batches", False) else batch_size // ranks
    inner.batch_size = size
    if shard is not inner:
        shard.batch_size = size
