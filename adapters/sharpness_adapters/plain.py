"""A training loop of one's own: measuring and batch-size schedules around it, and not a line of it changed."""

from __future__ import annotations

import copy
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from sharpness_plugins import distributed
from sharpness_plugins.batches import count_samples
from sharpness_plugins.controller import BatchChange, BatchController, as_schedule
from sharpness_plugins.errors import LoaderError, MeasurementWarning
from sharpness_plugins.measure import Metrics, resolve_metrics
from sharpness_plugins.monitor import CSVSink, JSONLSink, Measurement, Reading, SharpnessMonitor, Sink, gradient_norm
from sharpness_plugins.noise_scale import NoiseScaleMeter
from sharpness_plugins.optimizers import SharpnessAware
from sharpness_plugins.probe import probe_batches
from sharpness_plugins.samplers import ResizableLoader
from sharpness_plugins.schedules import BatchSchedule, Progress, sizes
from sharpness_plugins.space import Select

from .sharded import refuse_sharded

if TYPE_CHECKING:
    from sharpness_plugins.losses import LossFn

__all__ = ["Run", "attach"]

_Path = str | os.PathLike[str]
_SHOWN = 40  # measurements in the report; the history has all


@contextmanager
def attach(
    model: nn.Module,
    optimizer: Optimizer,
    loader: Iterable[Any],
    *,
    metrics: Metrics = None,
    every: str = "1ep",
    schedule: BatchSchedule | str | None = None,
    criterion: Callable[..., Any] | None = None,
    loss_fn: LossFn | None = None,
    select: Select = None,
    batch_norm: str = "eval",
    probe: Iterable[Any] | None = None,
    probe_samples: int = 512,
    budget: float | None = 0.02,
    budget_in: str = "seconds",
    signals: Mapping[str, Reading | NoiseScaleMeter] | None = None,
    sinks: Sink | Iterable[Sink] = (),
    log: _Path | Iterable[_Path] = (),
    coupling: str = "auto",
    scheduler: Any = None,
    on_change: Callable[[BatchChange], None] | Iterable[Callable[[BatchChange], None]] = (),
    seed: int = 0,
) -> Iterator[Run]:
    """Measures, and changes the batch size, while the loop inside trains as it always did::

        with attach(model, optimizer, loader, metrics=["hessian_topk"], every="1ep", schedule="0:8 10ep:256") as run:
            for epoch in range(30):
                for x, y in loader:
                    loss = functional.cross_entropy(model(x), y)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        print(run.report())

    The clock is ``optimizer.step()``, through torch's hooks: right under accumulation, and where a ``GradScaler`` skips
    steps. In the meantime ``loader`` itself counts what it delivers and, with a schedule, delivers batches of the size that
    the schedule wants, also from workers that had prepared others. A pass under ``torch.no_grad()``, as for a training
    accuracy, is not training, nor is one of ``measure_sharpness``: it is delivered as ever and not counted. Everything is
    as before afterwards, also after an exception.

    With a schedule the loader's samples come in an order keyed by its seed and the epoch, and an epoch that the loop leaves
    in the middle goes on with its next ``for``. A loop that accumulates ``k`` batches trains with ``k`` times what the
    schedule says. Batches larger than memory need a loop that knows of accumulation: ``BatchController(...,
    max_micro_batch=...)``. An engine that counts the batches of an epoch once is told at the beginning of each one: Ignite
    in a handler of ``EPOCH_STARTED``::

        run.controller.decide()
        engine.state.epoch_length = len(run.loader)
        engine.state.iteration = (engine.state.epoch - 1) * len(run.loader)

    Args:
        model, metrics, criterion, loss_fn, select, batch_norm, seed: as for ``measure_sharpness``; ``()`` measures nothing.
        optimizer: one that runs no step hooks (a wrapper, such as timm's Lookahead) needs ``run.step()`` after each step.
        loader: the training loader. Something other than an object of a Python class, such as a list of batches, cannot
            count: iterate ``run.loader`` then.
        every: how often to measure: ``"1ep"``, ``"500 steps"``, ``"1M samples"``, ``"10 min"``.
        schedule: a ``BatchSchedule`` or its text; needs a DataLoader with a batch size.
        probe: batches to measure on; None for ``probe_samples`` of the loader's data set (``probe_batches``).
        budget, budget_in: the share of training that measuring may take, as for ``SharpnessMonitor``; None for no limit.
        signals: recorded with each measurement, as for ``SharpnessMonitor``; None for the gradient's norm, and of a
            ``SharpnessAware`` the surrogate gap.
        sinks: called with each ``Measurement``.
        log: files that take the measurements: ``.csv`` or ``.jsonl``.
        coupling, scheduler, on_change: as for ``BatchController``.
    Raises:
        LoaderError: a loader whose batch size cannot be changed; one that no probe can be drawn from.
        UnknownNameError, ValueError, TypeError: bad settings, before anything is touched; a model of FSDP1, DeepSpeed or
            tensor parallelism.
    """
    if probe is loader:
        raise ValueError("the probe is the training loader, which measuring would disturb. Leave it out, or pass another")
    refuse_sharded(model, "attach")
    wish = None if schedule is None else as_schedule(schedule)
    if wish is not None:
        _check_resizable(loader)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"a {type(optimizer).__name__} runs no step hooks, so its learning rate cannot follow the batch size: "
                "attach to the optimizer that it wraps"
            )
    measures = metrics is None or callable(metrics) or isinstance(metrics, str) or bool(metrics)
    chosen = resolve_metrics(metrics) if measures else {}
    if signals is None:
        signals = {name: read for name, read in _free_signals(model, optimizer).items() if name not in chosen}
    if probe is None and (measures or (wish is not None and wish.signals)):
        known = None if wish is None else sizes(wish)  # the largest batch fits, and small ones are slow
        with distributed.resolve_ranks("auto").sharing("drawing the probe"):  # what one rank cannot, the others must know
            probe = probe_batches(
                loader, probe_samples, seed=seed, batch_size=known and max(1, known[1] // distributed.world_size())
            )
    optimizer = _stepping(optimizer)
    monitor = SharpnessMonitor(
        model,
        () if probe is None else probe,
        chosen,
        every=every,
        budget=budget,
        budget_in=budget_in,
        loss_fn=loss_fn,
        criterion=criterion,
        select=select,
        batch_norm=batch_norm,
        seed=seed,
        signals=signals,
        sinks=[
            *([sinks] if callable(sinks) else sinks),
            *map(_file_sink, [log] if isinstance(log, (str, os.PathLike)) else log),
        ],
    )
    if wish is None:
        if scheduler is not None or coupling != "auto":
            raise ValueError("scheduler and coupling follow a batch-size schedule, and there is none: leave them out")
        run = Run(model, optimizer, loader, monitor)
    else:
        controller = BatchController(
            wish,
            optimizer,
            model=model,
            coupling=coupling,
            probe=probe,
            loss_fn=loss_fn,
            criterion=criterion,
            scheduler=scheduler,
            seed=seed,
            on_change=on_change,
        )
        run = Run(model, optimizer, loader, monitor, controller)
    try:
        yield run
        run._warn()
    finally:
        run._detach()


def _stepping(optimizer: Optimizer) -> Optimizer:
    """The one whose steps are the clock: inside of ``SharpnessAware``, which may leave one out, and of Accelerate's wrapper,
    which looks like an optimizer and has no place for hooks.
    """
    while isinstance(optimizer, Optimizer):
        inner = getattr(optimizer, "optimizer", None)
        if isinstance(optimizer, SharpnessAware):
            optimizer = optimizer.base
        elif isinstance(inner, Optimizer) and not hasattr(optimizer, "_optimizer_step_post_hooks"):
            optimizer = inner
        else:
            break
    return optimizer


def _free_signals(model: nn.Module, optimizer: Any) -> dict[str, Reading]:
    """What training shows by itself: the norm of the last step's gradient, of the first where it is sharpness-aware."""
    aware = getattr(optimizer, "optimizer", optimizer)
    if isinstance(aware, SharpnessAware):
        return {"gradient_norm": lambda: aware.gradient_norm, "surrogate_gap": lambda: _over_ranks(aware.surrogate_gap)}
    return {"gradient_norm": gradient_norm(optimizer if isinstance(optimizer, Optimizer) else model)}


def _over_ranks(value: float | None) -> float | None:
    """The mean; every rank asks at the same step."""
    return None if value is None else distributed.sum_of(value) / distributed.world_size()


def _become(thing: object, kind: type) -> None:
    """Set its class, also where that shows another one, as Accelerate's loaders do.

    Raises:
        TypeError: it cannot have this class.
    """
    object.__dict__["__class__"].__set__(thing, kind)


def _file_sink(path: _Path) -> Sink:
    kinds: dict[str, Callable[[_Path], Sink]] = {".csv": CSVSink, ".jsonl": JSONLSink}
    if (kind := Path(path).suffix.lower()) not in kinds:
        raise ValueError(f"log takes files that end in .csv or .jsonl, got {os.fspath(path)!r}")
    return kinds[kind](path)


def _check_resizable(loader: Iterable[Any]) -> None:
    try:
        ResizableLoader(loader)  # type: ignore[arg-type]
    except LoaderError as error:
        raise LoaderError(
            f"{error} attach leaves the loop as it is, so it cannot accumulate: write the loop with "
            "BatchController.batches, or leave schedule out."
        ) from None


class Run:
    """What ``attach`` gives.

    Attributes:
        loader: what to iterate: the user's own, unless it is of a type that cannot count.
        monitor, controller: who measures, and who changes the batch size; the latter None without a schedule.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loader: Iterable[Any],
        monitor: SharpnessMonitor,
        controller: BatchController | None = None,
    ) -> None:
        self.monitor, self.controller = monitor, controller
        self._model = model
        self._step = self._samples = 0
        self._passes, self._taken, self._length = 0.0, 0, None  # passes behind, batches of this one, of how many
        self._at_last_step = self._base = 0
        self._depth = 0
        self._was_counted = False  # the last step, by its hooks
        self._handles = []
        self._kind = type(loader)
        self._given = loader
        self.loader = self._stand_in(loader)
        if hasattr(optimizer, "register_step_post_hook"):
            untraced = torch.compiler.disable  # a compiled step is compiled between the hooks
            self._handles = [
                optimizer.register_step_pre_hook(untraced(self._before_step)),  # type: ignore[no-untyped-call]
                optimizer.register_step_post_hook(untraced(self._after_step)),  # type: ignore[no-untyped-call]
            ]

    _length: int | None
    _handles: list[Any]

    # --- what the user asks

    @property
    def history(self) -> list[Measurement]:
        """The measurements so far."""
        return self.monitor.history

    @property
    def changes(self) -> list[BatchChange]:
        """The changes of the batch size so far."""
        return [] if self.controller is None else self.controller.history

    @property
    def progress(self) -> Progress:
        """How far training has come."""
        if self.controller is not None:
            return self.controller.progress
        epoch = None
        if self._taken or self._passes:
            epoch = self._passes + (min(self._taken / self._length, 1.0) if self._length else 0.0)
        size = self._samples - self._at_last_step
        return Progress(self._step, self._samples, epoch, batch_size=size, base_batch_size=self._base or size)

    def step(self) -> None:
        """Say that the optimizer has stepped, after each step of one that runs no hooks. A step that its hooks have counted
        is not counted again: timm's Lookahead runs none until its first ``zero_grad``.
        """
        if not self._was_counted:
            self._tick()
        self._was_counted = False

    def measure(self) -> Measurement:
        """Measure now, whatever is due."""
        return self.monitor.measure(self.progress)

    def state_dict(self) -> dict[str, Any]:
        """JSON: what to save with the states of model and optimizer, after a step."""
        return {
            "monitor": self.monitor.state_dict(),
            "controller": None if self.controller is None else self.controller.state_dict(),
            "step": self._step,
            "samples": self._samples,
            "passes": self._passes + (self._taken / self._length if self._length else 0.0),
            "base": self._base,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go where that run was; before the first batch. With a schedule, the loader goes on in the middle of its epoch.

        Raises:
            ValueError: one of the runs has a schedule and the other has none, or another.
        """
        if (state["controller"] is None) != (self.controller is None):
            raise ValueError(
                "the state was saved with"
                + ("out a schedule, and here is one" if state["controller"] is None else " a schedule, and here is none")
                + ": resume with the same arguments"
            )
        if self.controller is not None:
            self.controller.load_state_dict(state["controller"])
        self.monitor.load_state_dict(state["monitor"])
        self._step, self._samples, self._passes = int(state["step"]), int(state["samples"]), float(state["passes"])
        self._at_last_step, self._taken, self._base = self._samples, 0, int(state["base"])

    def report(self) -> str:
        """A table of what was measured, and sentences on it and on the changes of the batch size."""
        shown = self.history[-_SHOWN:]
        left_out = len(self.history) - len(shown)
        lines = [self._title(), ""]
        if shown:
            lines += [*_table(shown, [self._batch_size_at(made.step) for made in shown] if self.controller else []), ""]
        if left_out:
            lines.append(f"{left_out} earlier measurements are in run.history.")
        lines += [f"{change}." for change in self.changes]
        for name, (step, note) in {n: (made.step, note) for made in shown for n, note in made.notes.items()}.items():
            lines.append(f"{'nothing measured' if name == 'probe' else name} (step {step}): {note}")
        budget = self.monitor.budget
        if self.history and budget.trained:
            allowed = "" if budget.share is None else f", of {100 * budget.share:g} % allowed"
            took = (
                f"{budget.spent:.3g} s"
                if budget.unit == "seconds"
                else f"as much as {budget.spent:.4g} gradients of samples"
            )
            lines.append(f"Measuring took {took}, {100 * budget.share_spent:,.1f} % of training{allowed}.")
        if waits := self.monitor.why_waiting:
            lines.append(f"{waits[0].upper()}{waits[1:]}")
        return "\n".join(lines).rstrip()

    def _title(self) -> str:
        progress = self.progress
        epochs = "" if progress.epoch is None else f", {progress.epoch:.4g} epochs"
        return f"{type(self._model).__name__} after {progress.step:,} steps, {progress.samples:,} samples{epochs}"

    def _batch_size_at(self, step: int) -> int:
        """Of the optimizer step that led there."""
        assert self.controller is not None
        done = [change for change in self.changes if change.veto is None]
        size = done[0].old.batch_size if done else self.controller.batch_size
        for change in done:
            if change.step < step:
                size = change.new.batch_size
        return size

    # --- the clock

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._depth += 1

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """After the outermost, where a subclass's step calls its base's, which runs the hooks again before it is done."""
        self._depth -= 1
        if self._depth <= 0:
            self._depth = 0
            self._was_counted = True
            self._tick()

    def _tick(self) -> None:
        self._step += 1
        self._base = self._base or self._samples
        monitor = self.monitor
        reads_data = monitor.pace.unit in ("samples", "epochs") or monitor.budget.unit == "samples"
        if self.controller is None and reads_data and not self._samples:
            raise RuntimeError(
                "the optimizer has stepped, and the loader that attach was given has delivered no batch: samples and epochs "
                "cannot be counted. Iterate run.loader, or measure every so many steps or minutes."
            )
        monitor.measure_if_due(self.progress)
        self._at_last_step = self._samples

    # --- the loader

    def _stand_in(self, loader: Iterable[Any]) -> Iterable[Any]:
        """The loader, of a class of its own for the time being, whose ``iter`` is ours; else an object around it."""
        kind, run = self._kind, self
        if not hasattr(kind, "__iter__"):
            raise LoaderError(f"the training loader must be an iterable of batches, got a {kind.__name__}")
        whole = copy.copy(loader) if self.controller is not None else None

        def deliver(self: Any) -> Iterator[Any]:
            plain: Iterator[Any] = kind.__iter__(self)
            return run._counted(plain) if self is loader and _is_training() else plain

        def deliver_resized(self: Any) -> Iterator[Any]:
            if self is not loader or not _is_training():
                plain: Iterator[Any] = kind.__iter__(self)
                return plain
            assert run.controller is not None
            assert whole is not None
            return run._stepping(run.controller.batches(whole))

        def length(self: Any) -> int:
            """Batches of a whole epoch at the present size."""
            if self is not loader or not _is_training():
                plain: int = kind.__len__(self)  # type: ignore[attr-defined]
                return plain
            assert run.controller is not None
            plan = run.controller.plan
            return ResizableLoader(whole, plan, world_size=plan.world_size).sampler.steps_per_epoch()  # type: ignore[arg-type]

        body: dict[str, Any] = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        if self.controller is None:
            body["__iter__"] = deliver
        else:
            body |= {"__iter__": deliver_resized, "__len__": length}
        try:
            stand_in = types.new_class(kind.__name__, (kind,), exec_body=lambda own: own.update(body))
            _become(loader, stand_in)
        except TypeError:  # a list, a generator: nothing to stand in for
            return _Counting(loader, self._counted)
        return loader

    def _counted(self, batches: Iterable[Any]) -> Iterator[Any]:
        """A pass of training over the loader."""
        self._passes += self._taken / self._length if self._length else 0.0  # the pass before was left in the middle
        self._taken, self._length = 0, self._num_batches()
        for batch in batches:
            num_samples = count_samples(batch)
            self._taken += 1
            self._samples += (1 if num_samples is None else num_samples) * distributed.world_size()
            self._depth = 0  # a step that raised has not come to its post-hook
            yield batch
        self._passes, self._taken = self._passes + 1, 0

    def _stepping(self, batches: Iterable[Any]) -> Iterator[Any]:
        for batch in batches:
            self._depth = 0
            yield batch

    def _num_batches(self) -> int | None:
        """In a whole pass; of an iterable data set None, as torch warns later of a length that turns out wrong."""
        if isinstance(self._given, DataLoader) and isinstance(self._given.dataset, IterableDataset):
            return None
        try:
            return self._kind.__len__(self._given)  # type: ignore[attr-defined, no-any-return]
        except (AttributeError, TypeError):
            return None

    # --- the end

    def _warn(self) -> None:
        if self.progress.samples and not self._step:
            warnings.warn(
                "no step of the optimizer was seen, so nothing was measured: call run.step() after each of its steps",
                MeasurementWarning,
                stacklevel=4,
            )
        elif not self.history and (why := self.monitor.why_waiting):
            warnings.warn(f"nothing was measured: {why}", MeasurementWarning, stacklevel=4)

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        if self.controller is not None:
            self.controller.detach()
        if self.loader is self._given:
            _become(self._given, self._kind)


def _is_training() -> bool:
    """Whether who asks the loader is about to train: with gradients, and not to measure on it."""
    asker = sys._getframe(2).f_globals.get("__name__", "")
    return torch.is_grad_enabled() and not asker.startswith("sharpness_plugins.")


class _Counting:
    """Around an iterable that cannot count by itself."""

    def __init__(self, loader: Iterable[Any], count: Callable[[Iterable[Any]], Iterator[Any]]) -> None:
        self._loader, self._count = loader, count

    def __iter__(self) -> Iterator[Any]:
        return self._count(self._loader) if _is_training() else iter(self._loader)

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]


def _table(history: list[Measurement], batch_sizes: list[int]) -> list[str]:
    names = list(dict.fromkeys(name for made in history for name in made.values))
    head = ["step", "samples", "epoch", *(["batch size"] if batch_sizes else []), "loss", *names, "seconds"]
    rows = [head]
    for position, made in enumerate(history):
        rows.append(
            [
                str(made.step),
                str(made.samples),
                "-" if made.epoch is None else f"{made.epoch:.4g}",
                *([str(batch_sizes[position])] if batch_sizes else []),
                "-" if made.loss is None else f"{made.loss:.4g}",
                *(_number(made, name) for name in names),
                f"{made.seconds:.2g}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [text[0], "-" * len(text[0]), *text[1:]]


def _number(made: Measurement, name: str) -> str:
    value = made.values.get(name)
    if value is None:
        return "-"
    error = made.standard_errors.get(name)
    return f"{value:.4g}" + ("" if error is None else f" ±{error:.1g}")
