"""Batches whose size may change in the middle of an epoch, the same on every rank, with every sample once per epoch.

A *group* is the data of one optimizer step: ``micro_batch * accumulation * world_size`` consecutive samples of the
epoch's order, shared out to the ranks. What counts is what was *delivered* to the training loop: batches that workers
prepared ahead are dropped when the size changes or the run stops, and prepared again.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from . import sampling
from .batches import count_samples
from .errors import LoaderError
from .schedules.planner import Plan
from .schema import ANY, check

__all__ = [
    "AccumulatingLoader",
    "MicroBatch",
    "ResizableBatchSampler",
    "ResizableLoader",
    "check_repeatable",
    "check_state",
]

T = TypeVar("T")
_END: Any = object()
_SAMPLER_STATE = {
    "epoch": int,
    "position": int,
    "taken": int,
    "ended": bool,
    "plan": [int],
    "next_plan": [int],
    "num_samples": int,
    "shuffle": bool,
    "seed": int,
    ...: ANY,
}
_LOADER_STATE = {"epoch": int, "delivered": int, "taken": int, "ended": bool, "plan": [int], "next_plan": [int], ...: ANY}


class MicroBatch(NamedTuple):
    """What ``Accumulation.backward(loss, *micro_batch)`` has to know of the batch in hand.

    Attributes:
        num_samples: in this micro-batch, on this rank; any positive weight, such as a count of tokens.
        group_samples: in its group, over all ranks; None where that is known at the end only.
        is_last: whether it ends its group, so that the optimizer steps after it.
    """

    num_samples: float
    group_samples: float | None
    is_last: bool


class _Part(NamedTuple):
    """One micro-batch as a piece of the epoch's order."""

    start: int
    stop: int
    micro_batch: MicroBatch


class ResizableBatchSampler(Sampler[list[Any]]):
    """Lists of indices, one micro-batch of this rank at a time, of a size that ``resize`` changes between groups.

    A change keeps the order of the epoch: no sample is lost or repeated. The last, ragged group of an epoch is shared
    out as evenly as it goes, in equally many micro-batches on every rank; fewer than ``world_size`` samples that cannot
    be given to every rank are left out, and counted in ``dropped``.

    As ``batch_sampler`` of a DataLoader it changes its size late by the prefetched batches, and counts those as
    delivered; ``ResizableLoader`` does neither.

    Iterating continues the epoch where delivery stopped, and begins the next one where it has ended. The order is a
    function of ``seed`` and the epoch, the same on every rank.

    Args:
        source: the number of samples, or a sampler that gives their order (weighted, a subset): it is read whole at the
            beginning of an epoch, with its random numbers keyed by ``seed`` and the epoch.
        plan: the micro-batch, the accumulation and the number of ranks; or a global batch size that ``world_size``
            divides, without accumulation.
        shuffle: False leaves the samples in order; a sampler's own order is never changed.
        drop_last: leave out the ragged group.
    Attributes:
        epoch, position: samples of this epoch whose groups were delivered, over all ranks.
    Raises:
        ValueError: no samples, or fewer than ranks; a plan for other ranks; a batch that an epoch cannot fill
            (``drop_last``).
    """

    def __init__(
        self,
        source: int | Iterable[Any],
        plan: Plan | int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, world_size), got rank {rank} of {world_size}")
        if hasattr(source, "num_replicas"):
            raise ValueError(
                f"{type(source).__name__} gives one rank's samples, but a batch is shared out here. Pass the number of "
                "samples, with rank and world_size."
            )
        self.num_samples = source if isinstance(source, int) else _length(source)
        if self.num_samples < world_size:
            raise ValueError(f"{self.num_samples} samples cannot be shared out to {world_size} rank(s), at least one each")
        self.rank, self.world_size = rank, world_size
        self.shuffle, self.seed, self.drop_last = bool(shuffle), int(seed), bool(drop_last)
        self.epoch = self.position = 0
        self.micro_batch: MicroBatch | None = None
        self._source = None if isinstance(source, int) else source
        self._taken = 0  # micro-batches of the group in progress that were delivered
        self._ended = False
        self._run = 0
        self._order: tuple[tuple[int, int], Sequence[Any] | Tensor] | None = None
        self._plan = self._next_plan = self._checked(plan)

    @property
    def plan(self) -> Plan:
        """That of the group in progress; between groups, of the next one."""
        return self._plan

    @property
    def next_plan(self) -> Plan:
        """That of the groups that were not begun."""
        return self._next_plan

    @property
    def epochs_delivered(self) -> float:
        """Passes over the data that are behind, in groups that were delivered."""
        return self.epoch + (self.position / self.num_samples if self._group(self.position, self._plan) else 1.0)

    @property
    def dropped(self) -> int:
        """Samples of this epoch that are left out at its end; 0 while there is another group."""
        return 0 if self._group(self.position, self._plan) else self.num_samples - self.position

    def resize(self, plan: Plan | int) -> None:
        """Use this plan from the next group on."""
        self._next_plan = self._checked(plan)
        if self._taken == 0:
            self._plan = self._next_plan

    def set_epoch(self, epoch: int) -> None:
        """Begin this epoch; nothing where training is in the middle of it, as it is after a resume."""
        if epoch != self.epoch or self._ended:
            self._begin(epoch)

    def steps_per_epoch(self, plan: Plan | int | None = None) -> int:
        """Groups, which is optimizer steps, of a whole epoch with this plan (None: the next groups' one)."""
        plan = self._next_plan if plan is None else self._checked(plan)
        full = self.num_samples // plan.batch_size
        return full + bool(self._group(full * plan.batch_size, plan))

    def __len__(self) -> int:
        """Micro-batches left in this epoch at the present size; of a whole one before and after it."""
        position, left = (0, 0) if self._ended else (self.position, 0)
        if not self._ended and (parts := self._group(position, self._plan)):
            left = len(parts) - self._taken
            position += self._group_samples(position, self._plan)
        full, rest = divmod(self.num_samples - position, self._next_plan.batch_size)
        return left + full * self._next_plan.accumulation + len(self._group(self.num_samples - rest, self._next_plan))

    def __iter__(self) -> Iterator[list[Any]]:
        return self._deliver(lambda: map(self._indices, self._parts_ahead()))

    def state_dict(self) -> dict[str, Any]:
        """JSON, a few hundred bytes, the same on every rank; to be saved between groups."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "taken": self._taken,
            "ended": self._ended,
            "plan": _plan_to_json(self._plan),
            "next_plan": _plan_to_json(self._next_plan),
            "num_samples": self.num_samples,
            "shuffle": self.shuffle,
            "seed": self.seed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go where that run was. Between groups the number of ranks may be another one: the present plan then stays.

        Raises:
            ValueError: other data, or another order, than in that run; other ranks in the middle of a group; damage.
        """
        check_state(state)
        for name, here in (("num_samples", self.num_samples), ("shuffle", self.shuffle)):
            if state[name] != here:
                raise ValueError(
                    f"the state was saved with {name} = {state[name]}, here it is {here}: the rest of the epoch would be "
                    "other samples. Resume with the same data and settings."
                )
        plan, next_plan = _plan_from_json(state["plan"]), _plan_from_json(state["next_plan"])
        if plan.world_size != self.world_size:
            if state["taken"]:
                raise ValueError(
                    f"the state was saved in the middle of a group shared by {plan.world_size} rank(s), here there are "
                    f"{self.world_size}. Save after an optimizer step to resume on other ranks."
                )
            plan = next_plan = self._next_plan
        self._plan, self._next_plan = self._checked(plan), self._checked(next_plan)
        self.seed, self.epoch, self.position = int(state["seed"]), int(state["epoch"]), int(state["position"])
        self._taken, self._ended = int(state["taken"]), bool(state["ended"])
        self._run += 1

    def _deliver(self, open_feed: Callable[[], Iterator[T]]) -> Iterator[T]:
        """What the feed gives for ``_parts_ahead``, counted as it is handed out; a new feed where the size changes."""
        if self._ended:
            self._begin(self.epoch + 1)
        self._run += 1
        run = self._run
        while True:
            plan, feed = self._next_plan, open_feed()
            for part in self._parts_ahead():
                item = next(feed)
                self._count(part)
                yield item
                if run != self._run:
                    raise RuntimeError(
                        "the batches were iterated again, or set to another epoch, before this iteration had ended"
                    )
                if self._taken == 0 and self._next_plan != plan:
                    break
            else:
                self._ended = True
                return
            del feed  # its workers end before others begin

    def _parts_ahead(self) -> Iterator[_Part]:
        """This rank's micro-batches of the rest of the epoch, as if no size changed any more."""
        position, taken, plan, next_plan = self.position, self._taken, self._plan, self._next_plan
        while parts := self._group(position, plan):
            yield from parts[taken:]
            position += self._group_samples(position, plan)
            taken, plan = 0, next_plan

    def _count(self, part: _Part) -> None:
        self.micro_batch = part.micro_batch
        self._taken += 1
        if part.micro_batch.is_last:
            self.position += self._group_samples(self.position, self._plan)
            self._taken, self._plan = 0, self._next_plan

    def _group_samples(self, position: int, plan: Plan) -> int:
        """Samples of the group that begins there, over all ranks; 0 where none is left."""
        num_samples = min(plan.batch_size, self.num_samples - position)
        if num_samples < self.world_size or (self.drop_last and num_samples < plan.batch_size):
            return 0
        least, uneven = divmod(num_samples, self.world_size)
        # only micro-batches of one sample cannot make up for a sample more on some ranks
        return num_samples - (uneven if -(-(least + bool(uneven)) // plan.micro_batch) > least else 0)

    def _group(self, position: int, plan: Plan) -> list[_Part]:
        """This rank's micro-batches of the group that begins there, none larger than the plan's; empty at the end."""
        num_samples = self._group_samples(position, plan)
        least, uneven = divmod(num_samples, self.world_size)
        count = -(-(least + bool(uneven)) // plan.micro_batch)
        share = least + (self.rank < uneven)
        start = position + least * self.rank + min(self.rank, uneven)
        cuts = [start + share * cut // count for cut in range(count + 1)] if count else []
        return [
            _Part(first, last, MicroBatch(last - first, num_samples, index == count))
            for index, (first, last) in enumerate(itertools.pairwise(cuts), 1)
        ]

    def _indices(self, part: _Part) -> list[Any]:
        key = (self.seed, self.epoch)
        if self._order is None or self._order[0] != key:
            self._order = key, self._draw_order()
        piece = self._order[1][part.start : part.stop]
        return piece.tolist() if isinstance(piece, Tensor) else list(piece)

    def _draw_order(self) -> Sequence[Any] | Tensor:
        if self._source is None:
            if not self.shuffle:
                return range(self.num_samples)
            return sampling.permutation(self.num_samples, sampling.generator_for(self.seed, "order", self.epoch))
        holders = [self._source, *vars(self._source).values()]
        restore = sampling.rng_states(torch.device("cpu"), holders)
        try:
            sampling.seed_global(sampling.key_for(self.seed, "order", self.epoch) >> 1)
            sampling.set_generator_states(sampling.generator_states(holders), offset=self.epoch + 1)
            if callable(set_epoch := getattr(self._source, "set_epoch", None)):
                set_epoch(self.epoch)
            order = list(self._source)
        finally:
            restore()
        if len(order) != self.num_samples:
            raise LoaderError(
                f"{type(self._source).__name__} gave {len(order)} samples in epoch {self.epoch}, and its length was "
                f"{self.num_samples}"
            )
        return order

    def _begin(self, epoch: int) -> None:
        self.epoch, self.position, self._taken, self._ended = int(epoch), 0, 0, False
        self._plan = self._next_plan
        self._run += 1

    def _checked(self, plan: Plan | int) -> Plan:
        if isinstance(plan, int):
            if plan < 1 or plan % self.world_size:
                raise ValueError(
                    f"a batch of {plan} cannot be shared out to {self.world_size} rank(s). Pass a multiple, or a Plan "
                    "(schedules.planner.plan rounds)."
                )
            plan = Plan(plan // self.world_size, 1, self.world_size)
        if plan.batch_size < 1:
            raise ValueError(f"{plan} holds no sample")
        if plan.world_size != self.world_size:
            raise ValueError(f"{plan} is for {plan.world_size} rank(s), here there are {self.world_size}")
        if self.drop_last and plan.batch_size > self.num_samples:
            raise ValueError(
                f"{self.num_samples} samples do not fill one batch of {plan.batch_size}, so with drop_last an epoch would "
                "be empty. Use drop_last=False or a smaller batch."
            )
        return plan


class ResizableLoader:
    """A DataLoader whose batch size may change at any optimizer step, and takes effect with the very next group.

    Keeps the loader's data set, ``collate_fn``, workers and their settings, but reads it through a
    ``ResizableBatchSampler``. When the size changes, batches that workers had prepared are dropped, and the workers
    begin anew at the delivered position: with ``persistent_workers`` that costs what was prepared, else also the start
    of the workers.

    The indices do not depend on the workers. What workers draw at random does: an iteration seeds them by ``seed``,
    rank, epoch and position, and touches no global random state.

    Args:
        loader: of a map-style data set, with a batch size. Its sampler becomes the source of the order; a
            ``DistributedSampler`` gives rank, number of ranks and seed.
        plan: as for ``ResizableBatchSampler``; None for the loader's own batch size on every rank.
    Attributes:
        sampler: the ``ResizableBatchSampler``.
        micro_batch: describes the batch that was yielded last.
    Raises:
        LoaderError: an iterable data set, a batch sampler of its own, or another iteration than DataLoader's:
            ``AccumulatingLoader`` takes those.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        plan: Plan | int | None = None,
        *,
        seed: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        _check_resizable(loader)
        given, source, shuffle = loader.sampler, None, False
        if isinstance(given, DistributedSampler):
            rank = given.rank if rank is None else rank
            world_size = given.num_replicas if world_size is None else world_size
            seed = given.seed if seed is None else seed
            shuffle = given.shuffle
        elif (
            type(given) is RandomSampler and not given.replacement and given.generator is None and given._num_samples is None
        ):
            shuffle = True
        elif type(given) is not SequentialSampler:
            source = given
        world_size = 1 if world_size is None else world_size
        self.sampler = ResizableBatchSampler(
            len(loader.dataset) if source is None else source,  # type: ignore[arg-type]
            Plan(loader.batch_size or 1, 1, world_size) if plan is None else plan,
            shuffle=shuffle,
            seed=seed or 0,
            drop_last=loader.drop_last,
            rank=rank or 0,
            world_size=world_size,
        )
        self._loader = copy.copy(loader)  # keeps a subclass, and the settings that a new DataLoader would have to be told
        self._generator = torch.Generator() if loader.generator is None else None
        self._loader.__dict__.update(
            batch_sampler=_Ahead(self.sampler),
            batch_size=None,
            drop_last=False,
            generator=self._generator or loader.generator,
            _iterator=None,
        )

    @property
    def dataset(self) -> Any:
        return self._loader.dataset

    @property
    def micro_batch(self) -> MicroBatch | None:
        return self.sampler.micro_batch

    @property
    def epochs_delivered(self) -> float:
        """Passes over the data that are behind, in groups that were delivered."""
        return self.sampler.epochs_delivered

    @property
    def plan(self) -> Plan:
        return self.sampler.plan

    def resize(self, plan: Plan | int) -> None:
        """Use this plan from the next group on."""
        self.sampler.resize(plan)

    def set_epoch(self, epoch: int) -> None:
        """Begin this epoch; nothing where training is in the middle of it, as it is after a resume."""
        self.sampler.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The sampler's: what was delivered, not what was prepared."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sampler.load_state_dict(state)

    def __len__(self) -> int:
        """Micro-batches left in this epoch at the present size; of a whole one before and after it."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        return self.sampler._deliver(self._open)

    def _open(self) -> Iterator[Any]:
        if self._generator is not None:
            at = self.sampler
            key = sampling.key_for(at.seed, "workers", at.rank, at.epoch, at.position, at._taken)
            self._generator.manual_seed(key >> 1)
        return iter(self._loader)


class _Ahead:
    """The batch sampler that workers prepare from: reads ahead without counting."""

    def __init__(self, sampler: ResizableBatchSampler) -> None:
        self._sampler = sampler

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[list[Any]]:
        return map(self._sampler._indices, self._sampler._parts_ahead())


class AccumulatingLoader:
    """Any iterable of batches, as micro-batches of fixed size: the batch grows by accumulation alone.

    The mode for iterable data sets, and for batches that somebody else puts together. One batch is read ahead, so that
    the last one is known as such: the tail of the stream is a smaller group, whose size is known at its end only.

    Args:
        loader: can be iterated once per epoch. On several ranks, each its own share.
        plan: its ``micro_batch`` is what the loader gives; only its accumulation may change.
        count: samples (or tokens) of a batch; None to look at its tensors.
        all_ranks: ``bool -> bool``, true on every rank if it was true on all, called once per group: the epoch then
            ends on every rank when one has no more batches. None where every rank has equally many groups.
    Attributes:
        epoch, micro_batch: the latter describes the batch that was yielded last.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        plan: Plan,
        *,
        count: Callable[[Any], float | None] = count_samples,
        all_ranks: Callable[[bool], bool] = bool,
    ) -> None:
        check_repeatable(loader)
        self.epoch = 0
        self.micro_batch: MicroBatch | None = None
        self._loader, self._plan, self._next_plan = loader, plan, plan
        self._num_samples, self._all_ranks = count, all_ranks
        self._delivered = self._taken = self._run = 0
        self._ended = False

    @property
    def plan(self) -> Plan:
        """That of the group in progress; between groups, of the next one."""
        return self._plan

    @property
    def epochs_delivered(self) -> float:
        """Passes over the data that are behind: whole ones, as the length of a stream is not known."""
        return float(self.epoch + self._ended)

    def resize(self, plan: Plan) -> None:
        """Use this plan's accumulation from the next group on.

        Raises:
            ValueError: another micro-batch, which the stream does not give.
        """
        if plan.micro_batch != self._plan.micro_batch:
            raise ValueError(
                f"the loader gives micro-batches of {self._plan.micro_batch}, and {plan} asks for {plan.micro_batch}: "
                "here only the accumulation can change"
            )
        self._next_plan = plan
        if self._taken == 0:
            self._plan = plan

    def set_epoch(self, epoch: int) -> None:
        """Begin this epoch, and tell the loader; nothing where training is in the middle of it."""
        if epoch != self.epoch or self._ended:
            self._begin(epoch)

    def state_dict(self) -> dict[str, Any]:
        """JSON; to be saved between groups."""
        return {
            "epoch": self.epoch,
            "delivered": self._delivered,
            "taken": self._taken,
            "ended": self._ended,
            "plan": _plan_to_json(self._plan),
            "next_plan": _plan_to_json(self._next_plan),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go where that run was: the next iteration reads and drops what had been delivered.

        Raises:
            ValueError: it is no such state, or damaged.
        """
        check_state(state)
        self._begin(int(state["epoch"]))
        self._delivered, self._taken, self._ended = int(state["delivered"]), int(state["taken"]), bool(state["ended"])
        self._plan, self._next_plan = _plan_from_json(state["plan"]), _plan_from_json(state["next_plan"])

    def __iter__(self) -> Iterator[Any]:
        if self._ended:
            self._begin(self.epoch + 1)
        self._run += 1
        run = self._run
        feed = iter(self._loader)
        ahead = next(itertools.islice(feed, self._delivered, None), _END)
        if ahead is _END and self._delivered == 0:
            raise LoaderError(f"the loader gave no batch at all in epoch {self.epoch}")
        while ahead is not _END if self._taken else self._all_ranks(ahead is not _END):
            batch, ahead = ahead, next(feed, _END)
            num_samples = self._num_samples(batch)
            if num_samples is None:
                raise LoaderError(f"it cannot be told how many samples a {type(batch).__name__} holds: pass count=...")
            self._delivered += 1
            self._taken += 1
            is_last = ahead is _END or self._taken >= self._plan.accumulation
            self.micro_batch = MicroBatch(num_samples, None, is_last)
            if is_last:
                self._taken, self._plan = 0, self._next_plan
            yield batch
            if run != self._run:
                raise RuntimeError(
                    "the batches were iterated again, or set to another epoch, before this iteration had ended"
                )
        self._ended = True

    def _begin(self, epoch: int) -> None:
        self.epoch, self._delivered, self._taken, self._ended = epoch, 0, 0, False
        self._plan = self._next_plan
        self._run += 1
        parts = (self._loader, *(getattr(self._loader, name, None) for name in ("sampler", "batch_sampler", "dataset")))
        for part in parts:
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(epoch)


def check_state(state: Any) -> None:
    """ValueError unless it is a state of one of these loaders."""
    shape = _SAMPLER_STATE if isinstance(state, Mapping) and "num_samples" in state else _LOADER_STATE
    check(state, shape, "the state of the loader")
    for name in ("plan", "next_plan"):
        if len(state[name]) != 3 or min(state[name]) < 1:
            raise ValueError(f"the state of the loader.{name} must be three whole numbers from 1, got {state[name]}")
    for name in ("epoch", "position", "delivered", "taken"):
        if state.get(name, 0) < 0:
            raise ValueError(f"the state of the loader.{name} must be at least 0, got {state[name]}")


def check_repeatable(loader: Iterable[Any]) -> None:
    """LoaderError for an iterator."""
    if isinstance(loader, Iterator):
        raise LoaderError(
            f"loader can be iterated only once (got a {type(loader).__name__}), but training makes several passes. "
            "Pass the iterable that it came from."
        )


def _check_resizable(loader: Any) -> None:
    if not isinstance(loader, DataLoader):
        cause = f"a {type(loader).__name__} is no DataLoader"
    elif isinstance(loader.dataset, IterableDataset):
        cause = "an iterable data set decides itself what a batch holds"
    elif type(loader.batch_sampler) is not BatchSampler:
        cause = "its batches come from " + (
            "the data set itself" if loader.batch_sampler is None else f"a {type(loader.batch_sampler).__name__}"
        )
    elif type(loader).__iter__ is not DataLoader.__iter__:
        cause = f"{type(loader).__name__} iterates in a way of its own"
    elif not getattr(loader, "in_order", True):
        cause = "with in_order=False it cannot be told which batch was delivered"
    else:
        return
    raise LoaderError(
        f"the batch size of this loader cannot be changed: {cause}. Pass a DataLoader with a batch_size, or change the "
        "accumulation alone (AccumulatingLoader)."
    )


def _length(source: Any) -> int:
    try:
        return len(source)
    except TypeError as error:
        raise ValueError(
            f"a {type(source).__name__} has no length, so it cannot be shared out. Pass the number of samples, or a "
            "sampler with a length."
        ) from error


def _plan_to_json(plan: Plan) -> list[int]:
    return [plan.micro_batch, plan.accumulation, plan.world_size]


def _plan_from_json(values: Sequence[int]) -> Plan:
    micro_batch, accumulation, world_size = (int(value) for value in values)
    return Plan(micro_batch, accumulation, world_size)
