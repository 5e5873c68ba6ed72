"""Ranks: how many there are, what rank 0 decided, and the sums of a measurement that they share.

The only file that talks to torch.distributed.
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
import signal
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from types import FrameType
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch.distributed
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .errors import LostRankError, RanksApartError, RemoteFailureError

__all__ = [
    "RANKS",
    "StepKind",
    "MemoryRanOut",
    "Ranks",
    "RanksLike",
    "RanksOf",
    "Shared",
    "Step",
    "from_rank_zero",
    "is_spread",
    "measuring",
    "local_part",
    "mean_over_ranks",
    "on_every_rank",
    "place_of",
    "rank",
    "resolve_ranks",
    "shard_groups",
    "smallest",
    "sum_of",
    "sum_over_ranks",
    "whole",
    "sum_over_shards",
    "world_size",
]

RANKS = ("auto", "same data", "own data", "alone")

RanksLike: TypeAlias = "str | RanksOf | torch.distributed.ProcessGroup | DeviceMesh | Ranks"

_NUMBERS = 4  # that an evaluation may sum beside its vector
_SPEAKERS = 2
_SAID = 3  # a column of a meeting's table, as those that follow
_POINTS = _SAID + 2 * _SPEAKERS
_VALUES = _POINTS + 4
_CLOSING = "the end"
_APART = 1e-4  # of the sum of magnitudes: points that differ by more are other points, not other rounding
_OK, _FAILED, _LEFT, _FULL = 0.0, 1.0, 2.0, 3.0
_STEP = "the next step"
_SAME_EVALUATIONS = "What a metric evaluates may depend only on numbers that are the same on every rank."
_SAME_MODULES = "Which modules of a sharded model compute, and in which order, must be the same for the data of every rank."


def _is_running() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    """This process's, 0 where there is only one."""
    return torch.distributed.get_rank() if _is_running() else 0


def world_size() -> int:
    """Processes that train together, 1 where none were started."""
    return torch.distributed.get_world_size() if _is_running() else 1


def from_rank_zero(value: Any) -> Any:
    """Rank 0's ``value``, small and picklable, on every rank. Collective: every rank must call it."""
    if world_size() == 1:
        return value
    box = [value if rank() == 0 else None]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def sum_over_ranks(tensor: Tensor, group: Any = None) -> Tensor:
    """The sum over all ranks, which must all call it with the same shape and dtype; ``tensor`` itself stays."""
    if world_size() == 1:
        return tensor
    total = tensor.clone()
    torch.distributed.all_reduce(total, group=group)
    return total


def mean_over_ranks(tensors: Sequence[Tensor], group: Any = None) -> list[Tensor]:
    """The means over all ranks of each, by one collective for each dtype and device; the tensors themselves stay."""
    made = list(tensors)
    kinds: dict[tuple[Any, Any], list[int]] = {}
    for index, tensor in enumerate(tensors):
        kinds.setdefault((tensor.device, tensor.dtype), []).append(index)
    for indices in kinds.values():
        flat = torch.cat([tensors[index].reshape(-1) for index in indices])
        mean = sum_over_ranks(flat, group) / torch.distributed.get_world_size(group)
        for index, part in zip(indices, torch.split(mean, [tensors[index].numel() for index in indices]), strict=True):
            made[index] = part.view(tensors[index].shape)
    return made


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a ``DTensor``, in the same memory; any other tensor itself."""
    return tensor.to_local() if is_spread(tensor) else tensor  # type: ignore[attr-defined]


def shard_groups(tensor: Tensor) -> tuple[Any, ...]:
    """The process groups over which a ``DTensor`` is cut in pieces; none for any other tensor.

    Raises:
        ValueError: its pieces are not parts, but terms of a sum.
    """
    if not is_spread(tensor):
        return ()
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    if any(placement.is_partial() for placement in placements):
        raise ValueError(f"a tensor is the sum of what its ranks hold ({placements}): redistribute it first")
    return tuple(mesh.get_group(dim) for dim, placement in enumerate(placements) if placement.is_shard())


def place_of(tensor: Tensor) -> tuple[int, ...]:
    """Which of the pieces of a ``DTensor`` this rank holds; ranks with the same place hold the same. () of other tensors."""
    if not is_spread(tensor):
        return ()
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    return tuple(at for at, placement in zip(mesh.get_coordinate(), placements, strict=True) if placement.is_shard())


def sum_over_shards(tensor: Tensor, groups: Sequence[Any]) -> Tensor:
    """The sum over all pieces, by one collective for each group; ``tensor`` itself stays."""
    total = tensor.clone() if groups else tensor
    for group in groups:
        torch.distributed.all_reduce(total, group=group)
    return total


def sum_of(number: float) -> float:
    """The sum of a number over all ranks, in float64."""
    return _reduced(number) if world_size() > 1 else number


def on_every_rank(holds: bool) -> bool:
    """Whether it holds on all of them."""
    return sum_of(float(holds)) == world_size()


def is_spread(tensor: Tensor) -> bool:
    """Whether it lies on several ranks (a ``DTensor``)."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that lies on several ranks, detached; any other is given back. Collective."""
    return tensor.detach().full_tensor() if is_spread(tensor) else tensor  # type: ignore[attr-defined]


def _reduced(number: float) -> float:
    return sum_over_ranks(torch.tensor(number, dtype=torch.float64, device=_device())).item()


def _device(group: Any = None) -> torch.device:
    """Where the group takes numbers from."""
    return torch.device("cuda", torch.cuda.current_device()) if _needs_cuda(group) else torch.device("cpu")


def _needs_cuda(group: Any = None) -> bool:
    backend, config = torch.distributed.get_backend(group), torch.distributed.get_backend_config(group)
    return backend == "nccl" and "cpu:" not in config


@dataclass(frozen=True)
class RanksOf:
    """The processes of a group measure together, and the others do not call.

    >>> measure_sharpness(model, loader, ranks=RanksOf(group, "own data"))      # doctest: +SKIP

    Args:
        group: a ``torch.distributed.ProcessGroup``, or a ``DeviceMesh`` of one dimension.
        how: what their loaders hold, "auto", "same data" or "own data": see ``measure_sharpness``.
    """

    group: torch.distributed.ProcessGroup | DeviceMesh
    how: str = "auto"

    def __post_init__(self) -> None:
        if self.how not in RANKS[:-1]:
            raise ValueError(f"how must be one of {RANKS[:-1]}, got {self.how!r}")


class Shared:
    """What a rank adds to an evaluation; after it, the sum over the ranks.

    Attributes:
        numbers: at most four, summed in float64.
        vector: summed in its own dtype; None for none, on every rank alike.
    """

    def __init__(self) -> None:
        self.numbers: list[float] = []
        self.vector: Tensor | None = None


class MemoryRanOut(Exception):
    """Of one of the ranks, in the middle of what all of them did."""


class StepKind(IntEnum):
    """What ranks do together in the middle of an evaluation."""

    END, BEGIN, WEIGHTS, GRADIENT, VECTOR, PRODUCT = range(6)


class Step(NamedTuple):
    """A collective of all ranks, or the beginning or end of a pass.

    Attributes:
        of: number of the module whose weights, gradient, ... are exchanged.
        row: of several products.
    """

    kind: StepKind
    of: int = 0
    row: int = 0

    @property
    def name(self) -> str:
        return f"the {self.kind.name.lower()} of " + (f"module {self.of}" if self.kind > StepKind.BEGIN else "a pass")


class _Told(NamedTuple):
    """Of a rank: what it did, what it failed of, whether that ends it, and whether it heard of that failure from another."""

    doing: str
    text: str | None
    leaves: bool
    second_hand: bool


class Speaker(Protocol):
    """What says something of this process at every meeting of the ranks."""

    def says(self) -> tuple[float, float]: ...

    def hear(self, said: Sequence[Sequence[float]]) -> None:
        """What was said there on all ranks, in their order; before any error of that meeting is raised."""


class Ranks:
    """The processes that share a measurement, in lockstep: each evaluation ends in one meeting of all of them.

    A meeting is one all-reduce of a small table of fixed shape, with a row for each rank: what it evaluated and where, its
    numbers, and whether it failed. Where all rows agree, an all-reduce of the vector follows, if the evaluation has one.
    Otherwise every rank raises: the one that failed its own error, the others a RemoteFailureError that names it. So nobody
    waits for a vector that does not come, and ranks that went different ways find out at the next meeting.

    Source: measured with two and four gloo processes, a meeting takes 0.1 to 6 ms, as busy as the machine is.

    Args:
        group: their process group, in which they have the ranks 0 to ``size - 1``; None for the default one.
    Attributes:
        how: one of ``RANKS`` (asked for), or what came of "auto".
        rank, size: 0 and 1 for a process alone, for which nothing is exchanged.
    """

    def __init__(self, how: str = "alone", rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.how, self.rank, self.size, self._group = how, rank, size, group
        self._speakers: list[Speaker] = []
        self._met: BaseException | None = None  # the last error that all ranks know of

    @property
    def is_alone(self) -> bool:
        return self.size == 1

    @property
    def members(self) -> list[int]:
        """Their ranks in the default group, by which errors name them, in the order of their ranks here."""
        if self.is_alone:
            return [rank()]
        if self._group is None:
            return list(range(self.size))
        return [torch.distributed.get_global_rank(self._group, r) for r in range(self.size)]

    @contextlib.contextmanager
    def attended_by(self, speaker: Speaker) -> Iterator[None]:
        """Inside, it says something at every meeting and hears all; one of at most two, in the same order on every rank."""
        if len(self._speakers) == _SPEAKERS:
            raise ValueError(f"{_SPEAKERS} speakers attend the meetings already, and their table has no room for another")
        self._speakers.append(speaker)
        try:
            yield
        finally:
            self._speakers.remove(speaker)

    def missing_of(self, tensor: Tensor) -> list[int]:
        """Ranks of the default group that hold pieces of a ``DTensor``, and do not take part here when it is gathered."""
        holders = [torch.distributed.get_process_group_ranks(group) for group in shard_groups(tensor)]
        return sorted({holder for part in holders for holder in part} - set(self.members))

    @contextlib.contextmanager
    def sharing(self, what: str, where: Sequence[Tensor | None] = ()) -> Iterator[Shared]:
        """An evaluation that every rank makes on its part of the data.

        Args:
            what: the name of the evaluation, the same on every rank.
            where: the vectors that it depends on, at most two, which must be the same on every rank.
        Raises:
            RemoteFailureError: it failed on another rank.
            RanksApartError: another rank evaluates something else, or elsewhere.
            LostRankError: another rank is gone.
        """
        shared = Shared()
        if self.is_alone:
            yield shared
            return
        error: BaseException | None = None
        try:
            yield shared
        except LostRankError:
            raise
        except BaseException as raised:
            if raised is self._met:
                raise
            error = raised
        with self.in_one_piece():
            self._meet(what, shared, where, error)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Around several meetings: what this rank fails of between them, others hear at the next one."""
        try:
            yield
        except LostRankError:
            raise
        except BaseException as error:
            self.leave(error)
            raise

    def leave(self, error: BaseException) -> None:
        """Tell the others at their next meeting, unless they know; raises the error."""
        if not self.is_alone and error is not self._met:
            with self.in_one_piece():
                self._meet("nothing more", Shared(), (), error)

    def gather(self, value: Any) -> list[Any]:
        """A small picklable value of every rank, in their order. Collective."""
        if self.is_alone:
            return [value]
        with self.sharing("exchanging notes"):
            pass  # a rank that has left is heard of here, and not waited for
        return self._noted(value)

    def _noted(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        with self.in_one_piece(), self._exchange("exchanging notes"):
            torch.distributed.all_gather_object(found, value, group=self._group)
        return found

    def smallest(self, number: int | None) -> int | None:
        """The smallest of all ranks' numbers; None where no rank has one. Collective."""
        return min((n for n in self.gather(number) if n is not None), default=None)

    def of(self, source: int, value: Any) -> Any:
        """What rank ``source`` has, where it can be pickled, and else this rank's own. Collective."""
        if self.is_alone:
            return value
        with self.sharing("sending a result"):
            box: list[bytes | None] = [_pickled(value) if self.rank == source else None]
        with self.in_one_piece(), self._exchange("sending a result"):
            torch.distributed.broadcast_object_list(box, src=self.members[source], group=self._group)
        return value if box[0] is None or self.rank == source else pickle.loads(box[0])

    def close(self, what: str, error: Exception | None, value: float = 0.0) -> tuple[Exception, str] | None:
        """Every rank has ended ``what``, with this value or an error: what it failed of on any of them, for all of them.

        A rank that still evaluates is told so, and ends, too. Different values are a failure.

        Raises:
            LostRankError: another rank is gone.
        """
        with self.in_one_piece():
            return self._closed(what, error, value)

    def _closed(self, what: str, error: Exception | None, value: float) -> tuple[Exception, str] | None:
        while not self.is_alone:
            rows = self._rows(_CLOSING, 0, [value], (), error)
            together = bool((rows[:, 0] == rows[0, 0]).all())
            values = rows[:, _VALUES]
            apart = together and bool(((values - values[0]).abs() > _APART * values[0].abs()).any())
            if together and not apart and not bool(rows[:, 2].any()):
                return None
            told = self._told(f"ended {what}" + (f" with {value:.10g}" if apart else ""), error)
            failure = self._failure(told)
            if isinstance(failure, LostRankError):
                raise failure
            error = error or failure
            if together:
                return error, str(failure)
        return None if error is None else (error, _named(error))

    def agree(self, what: str, value: Any) -> None:
        """Raise where ranks have different values.

        Raises:
            RanksApartError: names them.
        """
        found = self.gather(value)
        if any(other != found[0] for other in found):
            shown = "; ".join(f"rank {r}: {other}" for r, other in zip(self.members, found, strict=True))
            raise RanksApartError(f"the ranks must have the same {what}, and have {shown}")

    # ------------------------------------------------------------------ evaluations that talk on the way

    def next_step(self, step: Step | None, *, memory_ran_out: bool = False) -> Step | None:
        """What all ranks do next, inside of ``sharing``: what those that ask for a step ask for; None where none does.

        Args:
            step: None where this rank does what the others do.
            memory_ran_out: of this rank, which ends what all of them do.
        Raises:
            MemoryRanOut: of some rank.
            RemoteFailureError, RanksApartError, LostRankError: as ``sharing``.
        """
        if self.is_alone:
            if memory_ran_out:
                raise MemoryRanOut
            return step
        asks, flag = [0.0] if step is None else [1.0, *step], _FULL if memory_ran_out else _OK
        with self.in_one_piece():
            rows = self._rows(_STEP, 0, asks, (), None, flag=flag)
        flags, asked = rows[:, 2], rows[rows[:, _VALUES] == 1, _VALUES:]
        together = bool((rows[:, 0] == rows[0, 0]).all())
        if together and bool((flags == _FULL).any()):
            raise MemoryRanOut
        if not together or bool(flags.any()) or bool((asked != asked[:1]).any()):
            told = self._told(f"asked for {'nothing' if step is None else step.name}", None)
            self._met = self._failure(told, _SAME_MODULES)
            raise self._met
        if not len(asked):
            return None
        kind, of, row = map(int, asked[0, 1:].tolist())
        return Step(StepKind(kind), of, row)

    def gathered(self, own: Tensor, received: Tensor) -> None:
        """Write the vectors of all ranks, shape ``(n,)`` each, one after the other into ``received``. Collective."""
        if self.is_alone:
            received.copy_(own)
            return
        on = self._device_for(own)
        rows = received if received.device == on else received.to(on)
        with self.in_one_piece(), self._exchange("sending weights"):
            _collective("all_gather_single", "all_gather_into_tensor")(rows, own.to(on), group=self._group)
        if rows is not received:
            received.copy_(rows)

    def scattered_sum(self, rows: Tensor, own: Tensor) -> None:
        """Write this rank's part, shape ``(n,)``, of the sum of what all ranks have, ``(size * n,)`` each. Collective."""
        if self.is_alone:
            own.copy_(rows)
            return
        on = self._device_for(rows)
        part = own if own.device == on else own.to(on)
        with self.in_one_piece(), self._exchange("adding up shards"):
            _collective("reduce_scatter_single", "reduce_scatter_tensor")(part, rows.to(on), group=self._group)
        if part is not own:
            own.copy_(part)

    def _device_for(self, tensor: Tensor) -> torch.device:
        return _device(self._group) if _needs_cuda(self._group) else tensor.device

    @contextlib.contextmanager
    def in_one_piece(self) -> Iterator[None]:
        """Inside, Ctrl-C waits: a rank that leaves in the middle of an exchange has nothing to tell the others with.

        It waits anyway while a collective does, which nothing but the group's timeout interrupts.
        """
        before = signal.getsignal(signal.SIGINT)
        if self.is_alone or not callable(before) or threading.current_thread() is not threading.main_thread():
            yield
            return
        waiting: list[FrameType | None] = []
        signal.signal(signal.SIGINT, lambda number, frame: waiting.append(frame))
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
            for frame in waiting:
                before(signal.SIGINT, frame)

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Inside, ``smallest`` asks these ranks."""
        _measuring.append(self)
        try:
            yield
        finally:
            _measuring.pop()

    # ------------------------------------------------------------------ the meeting

    def _meet(self, what: str, shared: Shared, where: Sequence[Tensor | None], error: BaseException | None) -> None:
        vector = shared.vector
        size = 0 if error is not None or vector is None else vector.numel()
        rows = self._rows(what, size, [] if error is not None else shared.numbers, where, error)
        points = rows[:, _POINTS:_VALUES].reshape(self.size, 2, 2)
        apart = bool(((points[:, :, 0] - points[0, :, 0]).abs() > _APART * points[:, :, 1]).any())
        if apart or bool((rows[:, :2] != rows[0, :2]).any()) or bool(rows[:, 2].any()):
            told = self._told(f"asked for {what}" + (" at a point of its own" if apart else ""), error)
            self._met = error or self._failure(told)
            raise self._met
        shared.numbers = rows[:, _VALUES:].sum(dim=0).tolist()[: len(shared.numbers)]
        if vector is not None:
            shared.vector = self._summed(vector)

    def _rows(
        self,
        what: str,
        size: int,
        numbers: list[float],
        where: Sequence[Tensor | None],
        error: BaseException | None,
        *,
        flag: float = _OK,
    ) -> Tensor:
        """What every rank says: kind, size of its vector, whether it failed; two numbers of each speaker and of each of two
        points; numbers.
        """
        if error is not None:
            flag = _FAILED if isinstance(error, Exception) else _LEFT
        row = [float(zlib.crc32(what.encode())), float(size), flag]
        row += itertools.chain.from_iterable(speaker.says() for speaker in self._speakers)
        row += [0.0] * (_POINTS - len(row))
        row += itertools.chain.from_iterable(map(_digest, where)) if error is None else ()
        row += [0.0] * (_VALUES - len(row)) + numbers + [0.0] * (_NUMBERS - len(numbers))
        table = torch.zeros((self.size, _VALUES + _NUMBERS), dtype=torch.float64, device=_device(self._group))
        table[self.rank] = torch.tensor(row, dtype=torch.float64)
        with self._exchange(what):
            torch.distributed.all_reduce(table, group=self._group)
            rows = table.cpu()
        for i, speaker in enumerate(self._speakers):
            speaker.hear(rows[:, _SAID + 2 * i : _SAID + 2 * i + 2].tolist())
        return rows

    def _summed(self, vector: Tensor) -> Tensor:
        total = vector.to(_device(self._group)) if _needs_cuda(self._group) else vector
        with self._exchange("adding up vectors"):
            total = total.contiguous()
            torch.distributed.all_reduce(total, group=self._group)
            return total.to(vector.device)

    @contextlib.contextmanager
    def _exchange(self, doing: str) -> Iterator[None]:
        """Around a collective: a group that broke is a LostRankError.

        What interrupts a rank inside, other than Ctrl-C, it cannot tell the others any more; they find out when its process
        ends, or by the group's timeout.
        """
        try:
            yield
        except LostRankError:
            raise
        except Exception as error:
            raise LostRankError(
                f"the group of ranks broke while {doing} was shared: {' '.join(str(error).split())[:300]}. Either a rank "
                "died, or did not come within the group's timeout: every rank of the group must measure, or ranks='alone' "
                "on the one that does."
            ) from error
        except BaseException as interrupt:
            self._met = interrupt
            raise

    def _told(self, doing: str, error: BaseException | None) -> list[_Told]:
        second_hand = isinstance(error, (RemoteFailureError, RanksApartError))
        text = None if error is None else str(error) if second_hand else _named(error)
        leaves = error is not None and not isinstance(error, Exception)
        found: list[_Told] = self._noted(_Told(doing, text, leaves, second_hand))
        return found

    def _failure(self, told: list[_Told], advice: str = _SAME_EVALUATIONS) -> Exception:
        """The same on every rank.

        Args:
            advice: where nobody failed, and they only went different ways.
        """
        named = list(zip(self.members, told, strict=True))
        for r, other in named:
            if other.leaves:
                return LostRankError(f"rank {r} left the measurement: {other.text}")
        first_hand = [(r, other.text) for r, other in named if other.text is not None and not other.second_hand]
        if first_hand:
            r, text = first_hand[0]
            everywhere = len(first_hand) == len(told) and len({text for _, text in first_hand}) == 1
            return RemoteFailureError(text if everywhere else f"rank {r} failed: {text}")
        heard = [other.text for other in told if other.text is not None]
        if heard:
            return RemoteFailureError(heard[0])
        return RanksApartError(
            f"the ranks went different ways: {'; '.join(f'rank {r} {other.doing}' for r, other in named)}. {advice}"
        )


_measuring: list[Ranks] = []


def measuring() -> Ranks:
    """The ranks of the measurement that goes on; this process alone where none does."""
    return _measuring[-1] if _measuring else Ranks()


def smallest(number: int | None) -> int | None:
    """The smallest over the ranks of the measurement that goes on, if one does."""
    return measuring().smallest(number)


def resolve_ranks(ranks: RanksLike) -> Ranks:
    """The processes of a group, or this one alone.

    Raises:
        ValueError: it is none of ``RANKS`` and no group, this process is not in the group, or a mesh has several dimensions.
    """
    if isinstance(ranks, Ranks):
        return ranks
    if isinstance(ranks, str):
        if ranks not in RANKS:
            raise ValueError(f"ranks must be one of {RANKS}, a process group or a device mesh, got {ranks!r}")
        return Ranks() if ranks == "alone" or world_size() == 1 else Ranks(ranks, rank(), world_size())
    given, how = (ranks.group, ranks.how) if isinstance(ranks, RanksOf) else (ranks, "auto")
    group = _group_of(given)
    size = torch.distributed.get_world_size(group)
    return Ranks() if size == 1 else Ranks(how, torch.distributed.get_rank(group), size, group)


def _group_of(given: Any) -> Any:
    """The process group that a caller gave, of which this process is a member."""
    if not _is_running():
        raise ValueError(f"ranks must be one of {RANKS} where torch.distributed was not started, got {given!r}")
    mesh = given if isinstance(given, DeviceMesh) else None
    if mesh is not None and mesh.ndim != 1:
        raise ValueError(
            f"ranks is a device mesh of {mesh.ndim} dimensions, and the ranks that measure together are a line of it: name "
            f"one of its dimensions, as in ranks=mesh[name] (here: {mesh.mesh_dim_names})"
        )
    if mesh is not None:
        outside = mesh.get_coordinate() is None
        group = None if outside else mesh.get_group()
    else:
        outside, group = isinstance(given, int) and given == torch.distributed.GroupMember.NON_GROUP_MEMBER, given
        if not outside and not isinstance(given, torch.distributed.ProcessGroup):
            raise ValueError(f"ranks must be one of {RANKS}, a process group or a device mesh, got {given!r}")
    if outside or torch.distributed.get_rank(group) < 0:
        raise ValueError(
            f"ranks is a group that this process (rank {rank()}) is not in. Measure on the processes of the group only; the "
            "others need not wait for them."
        )
    return group


def _collective(name: str, before: str) -> Callable[..., Any]:
    """By its name in this version of torch."""
    found: Callable[..., Any] = getattr(torch.distributed, name, None) or getattr(torch.distributed, before)
    return found


def _pickled(value: Any) -> bytes | None:
    try:
        return pickle.dumps(value)
    except Exception:  # a plugin's result may hold anything
        return None


def _digest(point: Tensor | None) -> tuple[float, float]:
    if point is None:
        return 0.0, 0.0
    point = point.detach()
    sums = torch.stack([point.sum(dtype=torch.float64), point.abs().sum(dtype=torch.float64)])
    sums = torch.nan_to_num(sums, nan=0.0, posinf=0.0, neginf=0.0)  # such points have no value anywhere
    return sums[0].item(), sums[1].item()


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")
