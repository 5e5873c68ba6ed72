"""The steps of a measurement, which a state file keeps, so that a resumed measurement takes only those that are left.

A measurement is one deterministic function of its evaluations. So to resume it, it runs again from the start, and every
step that was kept is answered from the file: every metric, a third party's too, comes to the same number, bit for bit. What
was not kept is computed again, to the same answer; that is why steps may be left out where keeping them would take too long.
"""

from __future__ import annotations

import contextlib
import functools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from . import stopping
from .distributed import Ranks
from .errors import MeasurementWarning
from .state_file import StateFile, bytes_of, digest

__all__ = ["Recorder", "Scope", "child", "evaluation", "root_child", "step", "stoppable"]

T = TypeVar("T")
P = ParamSpec("P")
S = TypeVar("S", bound="_Evaluating")

_SHARE = 0.05  # of the time of the evaluations: what keeping them may take
_ALLOWANCE = 1.0  # seconds, beside that
_MOST_VECTORS = 32
_SMALL = 2**16  # bytes; always kept
_FIRST_RATE = 2e8  # bytes a second, until the first write
_FLUSH_EVERY = 30.0  # seconds

_CURRENT: ContextVar[Scope | None] = ContextVar("scope", default=None)


class _Kept(NamedTuple):
    """A step in the file: its answer, and the work of every rank until then."""

    answer: Any
    work: list[Any]


_NOTHING, _OTHER = "nothing", "of other numbers"


class Recorder:
    """Keeps steps in a file, at a bounded cost: about 5 % of the time of the evaluations and a second, and 32 vectors.

    On several ranks that measure together, which take the same steps, the first one has the file, and the others the answers
    that it finds there: what was in the file at the beginning is recalled on all of them, or on none. To keep a step then
    takes a meeting and a gathering beside the writing; what is affordable, the first one says at every meeting.

    Args:
        file: where to; None on all ranks but the first.
        work: tells the state of what counts the work, as a tree; ``set_work`` puts it back.
        like: a vector of the shape and dtype of the perturbations, on their device.
        ranks: those that measure together.
    """

    def __init__(
        self,
        file: StateFile | None,
        *,
        work: Callable[[], Any],
        set_work: Callable[[Any], None],
        like: Tensor,
        ranks: Ranks | None = None,
    ) -> None:
        self._file = file
        self._ranks = ranks or Ranks()
        self._at_first: set[str] = self._ranks.of(0, set() if file is None else set(file.keys))
        self._work, self._set_work = work, set_work
        self._device = like.device
        self._limit = _MOST_VECTORS * like.numel() * like.element_size() + 16 * _SMALL
        self._computed = self._spent = self._exchanged = 0.0
        self._exchanges = 0
        self._began: float | None = None  # the step in hand
        self._heard = 0.0  # bytes
        self._allowance = _ALLOWANCE
        self._written = 0
        self._flushed = time.monotonic()

    def root(self, name: str) -> Scope:
        return Scope(self, name)

    def close(self) -> None:
        """Keep what is live."""
        with self._bearing_a_full_disk():
            if self._file is not None:
                self._file.compact()
        if self._file is not None:
            self._file.close()
        self._file = None

    def keeps(self, ranks: Ranks) -> bool:
        """Whether it keeps what these ranks evaluate; what a rank evaluates by itself the others do not."""
        return self._ranks.is_alone or ranks is self._ranks

    def recall(self, key: str, kind: str, about: Any = None) -> tuple[bool, Any]:
        """Whether there is such a step, of these numbers and tensors, and its answer; the same on every rank."""
        if not self._may_have(key):
            return False, None
        with self._ranks.in_one_piece():
            with self._ranks.sharing(f"the kept {key}"):
                found = self._found(key, kind, about)
            found = self._ranks.of(0, found)
        if found == _OTHER:
            self._forget(key.split("/")[0] + "/")
        if not isinstance(found, _Kept):
            return False, None
        self._set_work(found.work[self._ranks.rank])
        return True, _to(found.answer, self._device)

    def _may_have(self, key: str) -> bool:
        if self._ranks.is_alone:
            return self._file is not None and key in self._file
        return key in self._at_first  # what was kept since then the first rank alone knows

    def _found(self, key: str, kind: str, about: Any) -> _Kept | str:
        """What the file has."""
        if self._file is None or key not in self._file:
            return _NOTHING
        told: list[Any] = [kind, None]
        with self._timed(), contextlib.suppress(TypeError):  # a third party's arguments
            told = [kind, digest(about)]
        *label, work = self._file.label(key)
        if label != told:
            return _OTHER
        with self._timed():
            return _Kept(self._file.read(key), work)

    def _forget(self, prefix: str) -> None:
        """Another path than the one that was kept: what lies on it is of no use."""
        self._at_first = {key for key in self._at_first if not key.startswith(prefix)}
        if self._file is None:
            return
        path = self._file.path
        with self._bearing_a_full_disk():
            self._file.drop(prefix)
        warnings.warn(
            f"the evaluations are others than those in the state file {path} (another processor, number of "
            "threads or version of a plugin?), so what it had of the metric in hand is computed again",
            MeasurementWarning,
            stacklevel=2,
        )

    def keep(
        self, key: str, kind: str, answer: Any, about: Any = None, *, must: bool = False, drop: Sequence[str] = ()
    ) -> None:
        """Write an answer, if that can be afforded; ``must`` for what is small or replaces more than it adds."""
        if stopping.is_stopped() or (self._file is None and self._ranks.is_alone):  # stopped, it is not the whole answer
            return
        with self._bearing_a_full_disk(), contextlib.suppress(TypeError):  # a third party's details, say, go into no file
            size = bytes_of(answer)
            if not must and not self._affords(size):
                return
            work = self._work_of_all(key)
            if self._file is None:
                return
            self._file.write(key, answer, [kind, digest(about), work], drop=drop)
            self._written += size
            if time.monotonic() - self._flushed > _FLUSH_EVERY:
                self._file.flush()
                self._flushed = time.monotonic()

    def _work_of_all(self, key: str) -> list[Any]:
        """Each rank has its batches, its micro-batches and its way of products."""
        if self._ranks.is_alone:
            return [self._work()]
        began = time.perf_counter()
        with self._ranks.in_one_piece():
            with self._ranks.sharing(f"keeping {key}"):
                own = self._work()
            found = self._ranks.gather(own)
        self._exchanged += time.perf_counter() - began
        self._exchanges += 1
        return found

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Around what a step computes."""
        self._began = time.perf_counter()
        try:
            yield
        finally:
            self._computed += time.perf_counter() - self._began
            self._began = None

    def says(self) -> tuple[float, float]:
        return self._room(), 0.0

    def hear(self, said: Sequence[Sequence[float]]) -> None:
        self._heard = said[0][0]

    def _affords(self, size: int) -> bool:
        return size <= max(self._room(), _SMALL) if self._ranks.is_alone else size <= self._heard

    def _room(self) -> float:
        """Bytes that can be kept now; below zero for nothing at all."""
        if self._file is None:
            return -1.0
        rate = self._written / (self._spent - self._exchanged) if self._written > 10 * _SMALL else _FIRST_RATE
        exchange = self._exchanged / max(self._exchanges, 1)
        computed = self._computed + (0.0 if self._began is None else time.perf_counter() - self._began)
        seconds = _SHARE * computed + self._allowance - self._spent - exchange
        return min(seconds * rate, self._limit - self._file.live_bytes) if seconds >= 0 else -1.0

    @contextlib.contextmanager
    def _bearing_a_full_disk(self) -> Iterator[None]:
        """Timed; where the file cannot be written, nothing is kept any more, and the measurement goes on."""
        try:
            with self._timed():
                yield
        except OSError as error:
            if self._file is None:
                return
            warnings.warn(
                f"the state file {self._file.path} cannot be written ({error}), so from here on this measurement cannot be "
                "resumed; it goes on",
                MeasurementWarning,
                stacklevel=4,
            )
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._spent += time.perf_counter() - began


class Scope:
    """Steps in their order; their keys begin with its path. Enter it again, and the order goes on."""

    def __init__(self, recorder: Recorder | None, path: str) -> None:
        self._recorder, self.path, self._count = recorder, path, 0

    @contextlib.contextmanager
    def entered(self) -> Iterator[Scope]:
        token = _CURRENT.set(self if self._recorder is not None else _CURRENT.get())
        try:
            yield self
        finally:
            _CURRENT.reset(token)

    def child(self, name: str) -> Scope:
        self._count += 1
        return Scope(self._recorder, f"{self.path}/{self._count}:{name}")

    def keeps(self, ranks: Ranks) -> bool:
        return self._recorder is not None and self._recorder.keeps(ranks)

    def step(self, kind: str, compute: Callable[[], T], about: Any) -> T:
        recorder = self._recorder
        assert recorder is not None
        self._count += 1
        key = f"{self.path}/{self._count}"
        there, answer = recorder.recall(key, kind, about)
        if there:
            return answer  # type: ignore[no-any-return]
        token = _CURRENT.set(None)
        try:
            with recorder.computing():
                made = compute()
        finally:
            _CURRENT.reset(token)
        recorder.keep(key, kind, made, about)
        return made

    def run(self, compute: Callable[[], T], *, generator: torch.Generator | None = None) -> T:
        """The answer of all the steps in ``compute``, kept in their place: a tree, and smaller than they are.

        Args:
            generator: that ``compute`` draws from.
        """
        recorder = self._recorder
        if recorder is None:
            return compute()
        there, kept = recorder.recall(self.path, "scope")
        if there:
            answer, state = kept
            if generator is not None:
                generator.set_state(state.cpu())
            return answer  # type: ignore[no-any-return]
        with self.entered():
            made = compute()
        state = None if generator is None else generator.get_state()
        recorder.keep(self.path, "scope", (made, state), must=True, drop=[f"{self.path}/"])
        return made

    def save(self, state: Callable[[], Any]) -> None:
        """What the steps so far have led to, as a tree, in their place."""
        if self._recorder is not None:
            kept = {"count": self._count, "state": state()}
            self._recorder.keep(f"{self.path}/@", "state", kept, must=True, drop=[f"{self.path}/"])

    def saved(self) -> Any | None:
        """What ``save`` kept last; the order of steps goes on from there."""
        if self._recorder is None:
            return None
        there, kept = self._recorder.recall(f"{self.path}/@", "state")
        if not there:
            return None
        self._count = kept["count"]
        return kept["state"]


def step(kind: str, compute: Callable[[], T], *, about: Any = None) -> T:
    """``compute()``, or what it gave before the measurement was resumed.

    Args:
        kind: a word for what it is.
        about: numbers and tensors that the answer depends on; where they differ from before, it is computed.
    """
    scope = _CURRENT.get()
    return compute() if scope is None else scope.step(kind, compute, about)


def child(name: str) -> Scope:
    """Room for steps of its own, within those of the measurement around; it keeps nothing where there is none."""
    scope = _CURRENT.get()
    return Scope(None, name) if scope is None else scope.child(name)


def root_child(name: str) -> Scope:
    """The same beside the metrics, for what several of them share."""
    scope = _CURRENT.get()
    return Scope(None if scope is None else scope._recorder, name)


class _Evaluating(Protocol):
    ranks: Ranks


def evaluation(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
    """A method of an objective that is one step, and does not begin where the measurement is to stop."""

    @functools.wraps(method)
    def evaluated(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with stopping.evaluating():
            scope = _CURRENT.get()
            if scope is None or not scope.keeps(self.ranks):
                return method(self, *args, **kwargs)
            return scope.step(method.__name__, lambda: method(self, *args, **kwargs), [*args, *kwargs.values()])

    return evaluated


def stoppable(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
    """A method of an objective that does not begin where the measurement is to stop, and is not kept."""

    @functools.wraps(method)
    def evaluated(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with stopping.evaluating():
            return method(self, *args, **kwargs)

    return evaluated


def _to(tree: Any, device: torch.device) -> Any:
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, (list, tuple)):
        return type(tree)(_to(entry, device) for entry in tree)
    return {key: _to(entry, device) for key, entry in tree.items()} if isinstance(tree, dict) else tree
