"""The batch-size controller: asks the schedule, applies its decisions, tells everybody, and comes back exactly."""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DistributedSampler

from . import distributed, registry, sampling
from .accumulation import Accumulation, synchronized
from .batches import count_samples
from .coupling import AdaScale, CouplingRule, LearningRateCoupling, SampleHorizon, default_rule
from .errors import LoaderError
from .noise_scale import NoiseScaleMeter
from .pacing import Budget
from .samplers import AccumulatingLoader, ResizableLoader, check_repeatable
from .schedules import (
    BatchSchedule,
    Decision,
    Plan,
    Progress,
    Signal,
    check_world_size,
    parse_schedule,
    plan,
)
from .signals import SignalBook, SignalContext

if TYPE_CHECKING:
    from .losses import LossFn

__all__ = ["BatchChange", "BatchController", "as_schedule"]

SCHEMA = 1
HISTORY_KEPT = 16  # changes in a checkpoint, without signals, which keeps it below 10 kB; listeners hear of all
_END: Any = object()


@dataclass(frozen=True)
class BatchChange:
    """A change of the batch size, or one that a veto stopped.

    Attributes:
        step, samples, epoch: how far training had come.
        seconds: wall time of training, measuring included, pauses between resumed runs left out.
        old, new: what was used before, and what is used from now on; where ``veto`` stopped it, what was refused.
        reason: the schedule's own.
        veto: who refused and why; None for a change that took place.
        signals: what the schedule saw.
    """

    step: int
    samples: int
    epoch: float | None
    seconds: float
    old: Plan
    new: Plan
    reason: str
    veto: str | None = None
    signals: Mapping[str, Signal] = field(default_factory=dict)

    def __str__(self) -> str:
        epoch = "" if self.epoch is None else f", epoch {self.epoch:.4g}"
        where = f"step {self.step}, {self.samples} samples{epoch}, {self.seconds:.1f} s"
        if self.veto is not None:
            return f"{where}: batch size stays {self.old.batch_size}, not {self.new.batch_size}: {self.veto}"
        return f"{where}: batch size {self.old.batch_size} -> {self.new.batch_size}: {self.reason}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> BatchChange:
        signals = {name: Signal(**signal) for name, signal in saved["signals"].items()}
        return cls(**{**saved, "old": Plan(**saved["old"]), "new": Plan(**saved["new"]), "signals": signals})


def as_schedule(schedule: BatchSchedule | str | int) -> BatchSchedule:
    """The schedule that a text or a number names, with those of plugins; a schedule as it is.

    Raises:
        ValueError, TypeError: the text is none.
    """
    return parse_schedule(schedule, registry.schedule_factories()) if isinstance(schedule, (str, int)) else schedule


class BatchController:
    """Trains with the batch size that a schedule wants, in a loop that is otherwise the user's::

        controller = BatchController("0:256 40ep:5000", optimizer, max_micro_batch=512)
        for epoch in range(60):
            for x, y in controller.batches(loader):
                loss = functional.cross_entropy(model(x), y)
                controller.backward(loss)
                if controller.at_step:
                    optimizer.step()
                    optimizer.zero_grad()

    Whoever delivers the data otherwise (a trainer's own loop) asks ``decide()`` before each optimizer step for the plan to
    use, and says ``advance(num_samples)`` after it.

    Args:
        schedule: a ``BatchSchedule``, or its text.
        optimizer: its steps are the clock, so that steps which a ``GradScaler`` skips do not count.
        model: what signals are measured on; under ``DistributedDataParallel`` also what accumulates without a sum over the
            ranks until the last micro-batch.
        num_samples: in the training data, over all ranks; taken from the loader where it has a length.
        max_micro_batch: the most samples per device and backward pass, which is a question of memory.
        multiple: the micro-batch is one of these, 8 for instance.
        coupling: how the learning rate follows the batch size: a rule's name, or "auto" for the schedule's own, or else by
            optimizer (square root for Adam and its kin, linear for SGD).
        probe: a loader of its own for signals that are measured; never the training loader.
        loss_fn, criterion: as for ``measure_sharpness``.
        meter: of the gradient noise scale, fed by ``backward``; None makes one where the schedule looks at it. It needs two
            micro-batches or two ranks to see anything.
        scheduler: a learning-rate scheduler that counts optimizer steps at the first batch size. It is stepped here then, by
            samples, so that it ends where the training data do; don't step it elsewhere.
        scaler: a ``torch.amp.GradScaler`` that ``backward`` shall scale the loss with.
        seed: of what is measured and, with ``torch.initial_seed()``, of the order of the samples; a ``DistributedSampler``
            keeps its own.
        budget: the largest share of training that measuring may take; None for the schedule's own. ``budget_in`` counts it
            in "seconds" or in "samples"; only the second makes a resumed run measure at the very same steps.
        on_change: listeners, called with each ``BatchChange`` on every rank.
    Attributes:
        plan: in use.
        history: changes, and those that were refused.
        at_step: whether the optimizer steps on the batch in hand.
        epoch: set by a trainer whose epochs are not ``num_samples`` (padded, say); None to count here.
    Raises:
        UnknownNameError: the schedule looks at a signal that nobody offers.
        ValueError: the schedule begins below the number of ranks, or is not one.
    """

    def __init__(
        self,
        schedule: BatchSchedule | str,
        optimizer: Optimizer,
        *,
        model: nn.Module | None = None,
        num_samples: int | None = None,
        max_micro_batch: int | None = None,
        multiple: int = 1,
        coupling: str = "auto",
        probe: Iterable[Any] | None = None,
        loss_fn: LossFn | None = None,
        criterion: Callable[..., Any] | None = None,
        meter: NoiseScaleMeter | None = None,
        scheduler: Any = None,
        scaler: Any = None,
        seed: int = 0,
        budget: float | None = None,
        budget_in: str = "seconds",
        on_change: Callable[[BatchChange], None] | Iterable[Callable[[BatchChange], None]] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.schedule = as_schedule(schedule)
        self.optimizer = optimizer
        self.history: list[BatchChange] = []
        self.at_step = False
        self.epoch: float | None = None
        self._model, self._probe, self._loss_fn, self._criterion = model, probe, loss_fn, criterion
        self._scaler, self._seed, self._clock = scaler, seed, clock
        self._num_samples = num_samples
        self._max_micro_batch, self._multiple = max_micro_batch, multiple
        self._listeners = (on_change,) if callable(on_change) else tuple(on_change)
        check_world_size(self.schedule, distributed.world_size())
        first = self.schedule.initial()
        self._memory = first.memory
        self.plan = self._planned(first.batch_size)
        self._base = self.plan.batch_size
        rule = self._rule(coupling)
        requests = {**self.schedule.signals, **({rule.signal: None} if isinstance(rule, AdaScale) else {})}
        share = getattr(self.schedule, "budget", None) if budget is None else budget
        self._book = SignalBook(requests, Budget(share, budget_in, clock), probe)
        if self._book.measured and (model is None or probe is None):
            raise ValueError(
                f"the schedule looks at {self._book.measured[0]!r}, which is measured on a model and on data of its own: "
                "pass BatchController(..., model=model, probe=probe_batches(loader))"
            )
        if meter is None and self._book.needs_meter:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            several = distributed.world_size() > 1
            meter = NoiseScaleMeter(parameters, sum_over_ranks=distributed.sum_over_ranks if several else None)
        self._meter = meter
        self._accumulation = Accumulation(
            optimizer,
            world_size=distributed.world_size(),
            typical=self._base,
            sum_over_ranks=distributed.sum_of,
        )
        self._step = self._tokens = 0
        self._samples = 0.0
        self._counts_tokens = False
        self._peak_learning_rate = 0.0
        self._seconds, self._resumed_at = 0.0, clock()
        self._loader: ResizableLoader | AccumulatingLoader | None = None
        self._source: object = None
        self._mark: dict[str, Any] | None = None  # the loader's state after the last finished global batch
        self._seen = 0.0  # samples of the batch in delivery; of a whole one, over all ranks
        self._is_whole = False  # it was delivered, and is not counted yet
        self._in_step = False
        self._asked_at: tuple[int, float] | None = None
        self._horizon = None if scheduler is None else SampleHorizon(scheduler, self._base)
        self._owed = 0.0  # samples that the scheduler was not told of, as no step was taken on them
        self._coupling = LearningRateCoupling(optimizer, rule)
        self._handles = [
            optimizer.register_step_pre_hook(_weakly(self._before_step)),
            optimizer.register_step_post_hook(_weakly(self._after_step)),
        ]

    def _rule(self, asked: str) -> CouplingRule:
        """By name; the schedule's own where the user leaves it to us, and else the optimizer's."""
        name = self.schedule.coupling or default_rule(self.optimizer) if asked == "auto" else asked
        if name == "adascale":
            return AdaScale(self._base, power=0.5 if default_rule(self.optimizer) == "sqrt" else 1.0)
        return registry.get_coupling(name)

    # --- where training stands

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self._step

    @property
    def samples(self) -> int:
        """Samples consumed by finished global batches, over all ranks."""
        return round(self._samples)

    @property
    def batch_size(self) -> int:
        """The global one in use: what the plan makes of the schedule's wish."""
        return self.plan.batch_size

    @property
    def signals(self) -> Mapping[str, Signal]:
        """The newest of each."""
        return dict(self._book.newest)

    def table(self) -> str:
        """What each batch size took, in steps, samples and seconds: savings in one are often losses in another.

        A resumed run knows its last changes; what came before them is one row.
        """
        changes = [change for change in self.history if change.veto is None]
        starts = [(0, 0, 0.0), *((change.step, change.samples, change.seconds) for change in changes)]
        ends = [*starts[1:], (self._step, self.samples, self.seconds)]
        plans = [*(change.old for change in changes), self.plan]
        rows = [("batch size", "steps", "samples", "seconds", "began because")]
        reasons = ["", *(change.reason for change in changes)]
        for made, start, end, reason in zip(plans, starts, ends, reasons, strict=True):
            took = [after - before for before, after in zip(start, end, strict=True)]
            rows.append((f"{made.batch_size}", f"{took[0]}", f"{took[1]}", f"{took[2]:.1f}", reason))
        rows.append(("all", f"{self._step}", f"{self.samples}", f"{self.seconds:.1f}", ""))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        cells = [[cell.rjust(width) for cell, width in zip(row, widths, strict=False)] for row in rows]
        return "\n".join("  ".join([*line, row[4]]).rstrip() for line, row in zip(cells, rows, strict=True))

    @property
    def measured_share(self) -> float:
        """What measuring has taken, as a share of what training has, in the unit of the budget."""
        return self._book.budget.share_spent

    @property
    def seconds(self) -> float:
        """Wall time since training began, measuring included, pauses between resumed runs left out."""
        return self._seconds + self._clock() - self._resumed_at

    @property
    def progress(self) -> Progress:
        """What the schedule sees now."""
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        self._peak_learning_rate = max(self._peak_learning_rate, learning_rate)
        return Progress(
            step=self._step,
            samples=self.samples,
            epoch=self._epoch(),
            batch_size=self.plan.batch_size,
            base_batch_size=self._base,
            tokens=self._tokens if self._counts_tokens or not self._step else None,
            learning_rate=learning_rate / self._peak_learning_rate if self._peak_learning_rate else None,
            signals=self.signals,
        )

    def _epoch(self) -> float | None:
        if self.epoch is not None:
            return self.epoch
        if self._loader is not None:
            return self._loader.epochs_delivered
        if not self._samples:
            return 0.0
        return self._samples / self._num_samples if self._num_samples else None

    def learning_rates(self) -> list[float]:
        """In effect at the next step, one per parameter group; the optimizer's own are without the coupling."""
        return self._coupling.learning_rates()

    # --- deciding

    def decide(self, can_take: Callable[[Plan], bool] | None = None) -> Plan:
        """Measure what is due, ask the schedule, and apply what it says: the plan for the next optimizer step.

        With several ranks, rank 0's decision holds; every rank must call it at the same step.

        Args:
            can_take: whether a trainer can go over to a plan at this moment. One that cannot keeps the old size, and the
                schedule is asked again at the next step as if it had not been.
        """
        if self._book.requests:
            self._measure()
        self._asked_at = self._step, self._samples
        progress = self.progress
        decision = self.schedule(progress, self._memory)
        if self._book.requests or self._planned(decision.batch_size) != self.plan:
            decision = distributed.from_rank_zero(decision)  # without signals, every rank comes to the same by itself
        new = self._planned(decision.batch_size)
        if new != self.plan:
            waits = can_take is not None and not can_take(new)
            if waits or not self._change(new, decision, progress):
                return self.plan
        self._memory = json.loads(json.dumps(dict(decision.memory)))
        if self._book.requests and new == self.plan:
            self._coupling.set(self.plan.batch_size / self._base, distributed.from_rank_zero(self.signals))
        return self.plan

    def _measure(self) -> None:
        context = SignalContext(
            model=self._model,
            optimizer=self.optimizer,
            probe=self._probe,
            loss_fn=self._loss_fn,
            criterion=self._criterion,
            meter=self._meter,
            step=self._step,
            samples=self.samples,
            seed=self._seed,
        )
        self._book.measure_due(self.progress, context)

    def _planned(self, batch_size: int) -> Plan:
        return plan(
            batch_size,
            world_size=distributed.world_size(),
            max_micro_batch=self._max_micro_batch,
            multiple=self._multiple,
        )

    def _change(self, new: Plan, decision: Decision, progress: Progress) -> bool:
        """Whether it took place. A veto leaves everything as it is, the schedule's memory included, so it asks again."""
        change = BatchChange(
            step=progress.step,
            samples=progress.samples,
            epoch=progress.epoch,
            seconds=self.seconds,
            old=self.plan,
            new=new,
            reason=decision.reason,
            signals={name: progress.signals[name] for name in self._book.requests if name in progress.signals},
        )
        change = distributed.from_rank_zero(replace(change, veto=self._veto(change)))
        is_news = change.veto is None or not self.history or self.history[-1].veto != change.veto
        if change.veto is None:
            if self._loader is not None:
                self._loader.resize(new)  # before anything else, as it may refuse
            self.plan = new
            if decision.restart_optimizer:
                self.optimizer.state.clear()
            self._coupling.set(new.batch_size / self._base, change.signals)
        if is_news:
            self.history.append(change)
            for listener in self._listeners:
                listener(change)
            for _ in registry.call_hook("sharpness_batch_size_changed", change=change):
                pass
        return change.veto is None

    def _veto(self, change: BatchChange) -> str | None:
        if distributed.rank() != 0:
            return None
        for plugin, reason in registry.call_hook("sharpness_before_batch_change", change=change):
            if reason:
                return f"{plugin}: {reason}"
        return None

    # --- delivering

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The micro-batches of one epoch, or of the rest of the one that a resumed run was in.

        Call ``backward(loss)`` on each, and step the optimizer where ``at_step`` says so. Under DDP, ranks exchange
        gradients only then.

        Args:
            loader: a DataLoader with a batch size, whose size is changed; or any other iterable of batches, which are taken
                as they are, so that only their number per step changes. The same object in every epoch.
        Raises:
            LoaderError: an iterator, which gives one epoch only.
            ValueError: another loader than in the epoch before.
        """
        self._bind(loader)
        assert self._loader is not None
        delivery = iter(self._loader)
        while True:
            self._settle()
            self._seen = 0.0
            if self._asked_at != (self._step, self._samples):  # not again after the end of an epoch
                self.decide()
            self._mark = self._loader.state_dict()
            self.at_step = False
            while not self.at_step:
                batch = next(delivery, _END)
                if batch is _END:
                    self._mark = self._loader.state_dict()
                    if self._horizon is not None:
                        self._horizon.end_epoch()
                    return
                self._receive()
                with synchronized(self._model, self.at_step):
                    yield batch

    def _receive(self) -> None:
        """Take note of the micro-batch that the loader has just given."""
        assert self._loader is not None
        assert self._loader.micro_batch is not None
        num_samples, group_samples, self.at_step = self._loader.micro_batch
        self._seen += num_samples
        if self.at_step:
            self._seen = distributed.sum_of(self._seen) if group_samples is None else group_samples
            self._is_whole = True

    def _bind(self, loader: Iterable[Any]) -> None:
        if self._loader is not None:
            if loader is not self._source:
                raise ValueError(
                    "batches() was given another loader than before. A controller follows one: pass the same object in "
                    "every epoch, and make another controller for other data"
                )
            return
        ranks = {"rank": distributed.rank(), "world_size": distributed.world_size()}
        try:
            made: ResizableLoader | AccumulatingLoader
            own = isinstance(getattr(loader, "sampler", None), DistributedSampler)
            made = ResizableLoader(loader, self.plan, seed=None if own else self._order_seed(), **ranks)  # type: ignore[arg-type]
        except LoaderError:
            size = _batch_size_of(loader)
            self._max_micro_batch = self._multiple = size
            self.plan = self._planned(self.plan.batch_size)
            made = AccumulatingLoader(loader, self.plan, all_ranks=distributed.on_every_rank)
        if self._mark is not None:
            made.load_state_dict(self._mark)
            made.resize(self.plan)
            if made.plan != self.plan:
                raise ValueError(f"the loader goes on with {made.plan}, and the state was saved with {self.plan}")
        self._loader, self._source = made, loader
        if self._horizon is not None and isinstance(made, ResizableLoader):
            self._horizon.steps_per_epoch = made.sampler.steps_per_epoch(self._planned(self._base))

    def _order_seed(self) -> int:
        """Of the order of the samples: another for every ``torch.manual_seed``, the same on every rank."""
        seed: int = distributed.from_rank_zero(sampling.key_for(self._seed, "order", torch.initial_seed()) >> 1)
        return seed

    def backward(self, loss: Tensor, *, scale: float = 1.0) -> None:
        """Backward pass of the micro-batch in hand; ``loss`` is the mean over its samples.

        After the last one, ``.grad`` is the gradient of the mean over the whole batch, on all ranks.

        Args:
            scale: by what ``loss.backward`` will multiply by itself, as the losses of trainers with a ``GradScaler`` of
                their own do.
        """
        if self._loader is None or (micro_batch := self._loader.micro_batch) is None:
            raise RuntimeError("backward() weighs a batch that batches() gave, and it gave none yet")
        weight = self._accumulation.weight(micro_batch.num_samples, micro_batch.group_samples)
        scale = scale if self._scaler is None else self._scaler.get_scale()
        weighted = loss * weight if self._scaler is None else self._scaler.scale(loss * weight)
        meter = self._meter
        with meter.micro_batch(micro_batch.num_samples, weight=weight * scale) if meter is not None else nullcontext():
            weighted.backward()
        if micro_batch.is_last:
            self._accumulation.finish()
            if meter is not None:
                meter.step(grad_scale=scale)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._loader is not None and self._seen and not self.at_step:
            raise RuntimeError(
                f"optimizer.step() came after {self._seen:g} samples of a batch of {self.plan.batch_size}, so the gradient "
                "is not the batch's. Step only where controller.at_step is true"
            )

        self._in_step = True

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._in_step:  # once, where a subclass's step calls its base's, which runs the hooks again
            self._in_step = False
            self._step += 1
            self._settle()
            self._step_scheduler()

    def _settle(self) -> None:
        """The batch that was delivered whole is behind us, stepped upon or skipped."""
        if self._loader is not None and self._is_whole:
            self._samples += self._seen
            self._owed += self._seen
            self._mark = self._loader.state_dict()
            self._is_whole = False

    def _step_scheduler(self) -> None:
        if self._horizon is not None:
            self._horizon.step(self._owed)
            self._owed = 0.0

    def advance(self, num_samples: float) -> None:
        """Say that a step has consumed so many samples, over all ranks, where ``batches`` does not deliver them."""
        if self._loader is not None:
            raise RuntimeError("batches() counts the samples that it delivers: advance() would count them twice")
        self._samples += _not_negative("num_samples", num_samples)
        self._owed += num_samples
        self._step_scheduler()

    def count_tokens(self, num_tokens: int) -> None:
        """Say that so many tokens were consumed, over all ranks, for schedules that are written in tokens."""
        self._tokens += int(_not_negative("num_tokens", num_tokens))
        self._counts_tokens = True

    def detach(self) -> None:
        """Leave the optimizer alone from now on."""
        self._coupling.detach()
        for handle in self._handles:
            handle.remove()

    # --- coming back

    def state_dict(self) -> dict[str, Any]:
        """JSON below 10 kB, the same on every rank: where training stands after the last whole batch.

        Save it with the states of model, optimizer and learning-rate scheduler. A batch that is accumulating is not in it,
        and is delivered again after a resume.
        """
        return {
            "schema": SCHEMA,
            "schedule": repr(self.schedule),
            "memory": dict(self._memory),
            "plan": asdict(self.plan),
            "base_batch_size": self._base,
            "step": self._step,
            "samples": self._samples,
            "epoch": self.epoch,
            "tokens": self._tokens if self._counts_tokens else None,
            "peak_learning_rate": self._peak_learning_rate,
            "seconds": self.seconds,
            "signals": self._book.state_dict(),
            "coupling": self._coupling.state_dict(),
            "horizon": None if self._horizon is None else self._horizon.state_dict(),
            "meter": None if self._meter is None else self._meter.state_dict(),
            "loader": self._mark,
            "history": [replace(change, signals={}).to_dict() for change in self.history[-HISTORY_KEPT:]],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go where that run was; before the first ``batches``, which continues its epoch with its very next batch.

        Raises:
            ValueError: another version, another schedule, or limits that make another batch of the same wish. Nothing is
                changed then.
        """
        if state.get("schema") != SCHEMA:
            raise ValueError(f"the state has schema {state.get('schema')!r}, and this version reads {SCHEMA}")
        if state["schedule"] != repr(self.schedule):
            raise ValueError(
                f"the state was saved by {state['schedule']}, and this controller has {self.schedule!r}: its memory would "
                "mean something else. Resume with the same schedule, or start a new controller."
            )
        saved = Plan(**state["plan"])
        if self._planned(saved.batch_size).batch_size != saved.batch_size:
            raise ValueError(
                f"the state goes on with batches of {saved.batch_size}, and here they would have "
                f"{self._planned(saved.batch_size).batch_size} (max_micro_batch={self._max_micro_batch}, "
                f"multiple={self._multiple}, {distributed.world_size()} ranks). Resume with limits that allow it."
            )
        self._memory, self._base = dict(state["memory"]), int(state["base_batch_size"])
        self.plan = saved if saved.world_size == distributed.world_size() else self._planned(saved.batch_size)
        self._step, self._samples, self.epoch = int(state["step"]), float(state["samples"]), state["epoch"]
        self._tokens, self._counts_tokens = int(state["tokens"] or 0), state["tokens"] is not None
        self._peak_learning_rate = float(state["peak_learning_rate"])
        self._seconds, self._resumed_at = float(state["seconds"]), self._clock()
        self._book.load_state_dict(state["signals"])
        self._coupling.load_state_dict(state["coupling"])
        if self._horizon is not None and state["horizon"] is not None:
            self._horizon.load_state_dict(state["horizon"])
        if self._meter is not None and state["meter"] is not None:
            self._meter.load_state_dict(state["meter"])
        self.history = [BatchChange.from_dict(change) for change in state["history"]]
        self._mark = state["loader"]
        self._loader = self._source = None  # batches() binds anew, at the saved position
        self._seen, self._is_whole, self.at_step, self._asked_at = 0.0, False, False, None


def _weakly(method: Callable[[Optimizer, Any, Any], None]) -> Callable[[Optimizer, Any, Any], None]:
    """A hook that does not keep its owner: in a cycle of references, persistent workers take 5 s each to end."""
    held = weakref.WeakMethod(method)

    def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if (owner := held()) is not None:
            owner(optimizer, args, kwargs)

    return hook


def _not_negative(name: str, number: float) -> float:
    if not number >= 0:
        raise ValueError(f"training does not go backwards: {name} is {number}")
    return number


def _batch_size_of(loader: Iterable[Any]) -> int:
    """Samples in the batches that a loader gives, which are taken as they are."""
    check_repeatable(loader)
    told = (getattr(holder, "batch_size", None) for holder in (loader, getattr(loader, "batch_sampler", None)))
    size = next((size for size in told if isinstance(size, int)), None)
    if size is None and isinstance(loader, Sequence) and len(loader):
        size = count_samples(loader[0])
    if not size:
        raise LoaderError(
            f"a {type(loader).__name__} does not say how many samples its batches hold, so nobody knows how many make a "
            "batch of the size wanted. Give it an attribute batch_size."
        )
    return size
