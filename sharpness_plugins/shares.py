"""Which of a loader's batches a rank reads, so that all ranks together read every sample once."""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from . import sampling
from .batches import count_samples, is_empty, leaves_of
from .distributed import Ranks
from .errors import LoaderError
from .source import checked, holders_of

__all__ = ["Share", "share_of"]

# of those, batches are dealt out: the last ones, that do not go round, are at most an eighth of the work
_ENOUGH_BATCHES = 8
# Accelerate's, by the names of their types: what they do beside reading is to move batches, and to talk to other ranks
_READ_PLAINLY = ("DataLoaderShard", "DataLoaderDispatcher")

Indices = list[Any]


class Share:
    """A loader, and which of its batches, or which of the pieces of a batch, are this rank's.

    Batches are dealt out in turn. The last ones, of which there are not enough for all, are cut into as many pieces as there
    are ranks, while ``cuts`` allows it: a loader of one batch is shared, too.

    Attributes:
        loader: to be read; of a plain DataLoader, a copy that reads this rank's batches only.
        max_samples: to be taken of what is read; None where that was seen to.
        how: "same data" (shared out), "own data" (all of what is read), or "alone".
        note: for the reader of the numbers, or an empty string.
    """

    def __init__(
        self,
        loader: Any,
        *,
        how: str = "alone",
        ranks: Ranks | None = None,
        max_samples: int | None = None,
        positions: Sequence[int] | None = None,
        num_batches: int | None = None,
        note: str = "",
    ) -> None:
        self.loader, self.how, self.max_samples, self.note = loader, how, max_samples, note
        self._rank, self._size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
        self._positions = positions
        deals = how == "same data" and num_batches is not None and num_batches < _ENOUGH_BATCHES * self._size
        self._first_cut = num_batches - num_batches % self._size if deals and num_batches is not None else None
        self.cuts = self._first_cut is not None and self._first_cut != num_batches

    def entries(self) -> Iterator[tuple[int, Any]]:
        """What is read, with its position in the data of all ranks."""
        if self._positions is None:
            yield from enumerate(self.loader)
        else:
            yield from zip(self._positions, self.loader, strict=False)

    def piece(self, position: int) -> tuple[int, int] | None:
        """``(i, n)``: piece ``i`` of ``n`` of this batch is this rank's; ``(0, 1)`` is all of it; None is nothing of it."""
        if self.how != "same data":
            return 0, 1
        if self.is_cut(position):
            return (self._rank + position) % self._size, self._size
        return (0, 1) if position % self._size == self._rank else None

    def is_cut(self, position: int) -> bool:
        return self.cuts and self._first_cut is not None and position >= self._first_cut


class _Digest(NamedTuple):
    """What tells loaders apart.

    Attributes:
        contents: of a few samples, or the length of a data set whose sampler is made for ranks; empty where there are none.
        order: of the indices of all batches; empty where they are not known.
    """

    contents: str
    order: str


def share_of(loader: Iterable[Any], ranks: Ranks, *, max_samples: int | None, seed: int) -> Share:
    """This rank's share of a loader; ``ranks.how`` says what the loaders of the ranks hold, and is settled here.

    * A DataLoader with a map-style data set that is the same on all ranks: its samplers tell which samples each rank would
      read. Where they agree, batches are dealt out. Where they do not (``DistributedSampler``, shuffles of their own), each
      rank keeps its samples but for those that another one has before it: the repeats that fill up the last batches are left
      out.
    * What Accelerate has prepared is read as it was before: in one process, without the repeats that make its ranks even.
    * Other loaders: "same data" where their first batches are equal, "own data" where all of them differ.

    The caller preserves the random states.

    Args:
        max_samples: over all ranks.
    Raises:
        LoaderError: what the ranks' loaders hold is not what ``ranks.how`` says, or cannot be told.
    """
    with ranks.sharing("looking at the loaders"):
        loader = _as_prepared_from(checked(loader))
        states = sampling.generator_states(holders_of(loader))
        sampling.seed_global(seed)
        inner = _indexed(loader)
        plan = [] if inner is None else _planned(inner)
        sampling.set_generator_states(states)
        own = _digest_of_dataset(inner, plan)
        if own is None:
            _check_not_dispatched(loader)
            inner, own = None, _digest_of_first(loader)
        sampling.set_generator_states(states)
        count = _num_batches(loader, max_samples)
    digests: list[_Digest] = ranks.gather(own)
    told = [digest for digest in digests if digest.contents]
    if all(digest.order for digest in digests) and len({digest.contents for digest in digests}) == 1 and inner is not None:
        same_order = len({digest.order for digest in digests}) == 1
        parts = [plan] if same_order else ranks.gather(plan)
        unique = same_order or _marked(inner) or not any(_has_repeats(part) for part in parts)
        if unique and not (same_order and ranks.how == "own data"):
            return _of_plans(loader, inner, parts, ranks, max_samples)
    _check_not_dispatched(loader)
    equal = [r for r, d in zip(ranks.members, digests, strict=True) if d.contents and told.count(d) > 1]
    ranks.how = _settled(ranks.how, equal, ranks.size)
    if ranks.how == "same data":
        return Share(loader, how=ranks.how, ranks=ranks, max_samples=max_samples, num_batches=count)
    if max_samples is not None:
        max_samples = max_samples // ranks.size + (ranks.rank < max_samples % ranks.size)
    return Share(loader, how=ranks.how, ranks=ranks, max_samples=max_samples)


def _settled(how: str, equal: list[int], size: int) -> str:
    """What the loaders hold, from the ranks whose loaders give what another's gives, too."""
    named = ", ".join(map(str, equal))
    if how == "auto":
        if equal and len(equal) < size:
            raise LoaderError(
                f"the loaders of ranks {named} give the same first batch and those of other ranks do not, so it cannot be "
                "told how they share the data. Give every rank the same loader, or each its own part."
            )
        return "same data" if equal else "own data"
    if how == "same data" and len(equal) < size:
        raise LoaderError(
            "ranks='same data', but the loaders of the ranks do not give the same batches in the same order, so they cannot "
            "be shared out. Use the same seed for every rank's sampler, or ranks='own data' if each has its own part."
        )
    if how == "own data" and equal:
        raise LoaderError(
            f"ranks='own data', but the loaders of ranks {named} give the same first batch, so samples would count more "
            "than once. Use ranks='same data', which shares them out."
        )
    return how


# ---------------------------------------------------------------------- loaders whose samples are known by their indices


def _indexed(loader: Any) -> DataLoader[Any] | None:
    """The DataLoader, inside wrappers, whose batch sampler says what it reads; None where there is none, or several."""
    if isinstance(loader, DataLoader):
        plain = type(loader).__iter__ is DataLoader.__iter__ or type(loader).__name__ in _READ_PLAINLY
        known = plain and loader.batch_sampler is not None and isinstance(loader.batch_sampler, Sized)
        return loader if known and not isinstance(loader.dataset, IterableDataset) else None
    inner = [value for value in getattr(loader, "__dict__", {}).values() if isinstance(value, DataLoader)]
    return _indexed(inner[0]) if len(inner) == 1 else None


def _as_prepared_from(loader: Any) -> Any:
    """The loader of an iterable data set that Accelerate gives to the ranks in turn, with repeats so that all get alike."""
    shard: Any = getattr(loader, "dataset", None)
    if type(loader).__name__ not in _READ_PLAINLY or type(shard).__name__ != "IterableDatasetShard":
        return loader
    return DataLoader(
        shard.dataset,
        batch_size=loader.batch_size,
        collate_fn=loader.collate_fn,
        drop_last=loader.drop_last,
        num_workers=loader.num_workers,
        multiprocessing_context=loader.multiprocessing_context,
        worker_init_fn=loader.worker_init_fn,
    )


def _check_not_dispatched(loader: Any) -> None:
    if type(loader).__name__ == "DataLoaderDispatcher":
        raise LoaderError(
            "the loader sends what rank 0 reads to the other ranks (Accelerate's dispatch_batches), and fills its last "
            "batch up with samples that were there before, which would count twice. Here they cannot be told by their "
            "indices, as those of a map-style data set that all ranks hold: pass the loader as it was before "
            "accelerator.prepare, or use dispatch_batches=False."
        )


def _planned(loader: DataLoader[Any]) -> list[Indices]:
    """The indices of every batch of a pass."""
    if type(loader).__iter__ is DataLoader.__iter__:
        torch.empty((), dtype=torch.int64).random_(
            generator=loader.generator
        )  # the seed of workers is drawn before the order
    sampler: Any = loader.batch_sampler
    while hasattr(sampler, "num_processes") and hasattr(sampler, "batch_sampler"):
        sampler = sampler.batch_sampler  # Accelerate's part of a rank, in an order that it makes the same at every pass
    return [list(batch) for batch in itertools.islice(sampler, len(sampler))]


def _marked(loader: DataLoader[Any]) -> bool:
    """Whether a sampler is made for ranks, so that what is there twice fills up a batch."""
    holders: list[Any] = [loader.sampler]
    batches: Any = loader.batch_sampler
    while batches is not None:
        holders += [batches, getattr(batches, "sampler", None)]
        batches = getattr(batches, "batch_sampler", None)  # inside of Accelerate's
    return any(hasattr(holder, "num_replicas") or hasattr(holder, "num_processes") for holder in holders)


def _has_repeats(plan: list[Indices]) -> bool:
    indices = [index for batch in plan for index in batch]
    return len(set(indices)) < len(indices)


def _of_plans(
    loader: Any, inner: DataLoader[Any], parts: list[list[Indices]], ranks: Ranks, max_samples: int | None
) -> Share:
    """The share by the indices that each rank would read; one list where all of them would read the same."""
    if len(parts) == 1:
        ranks.how, (plan,) = "same data", _cut(parts, max_samples)
        whole = Share(loader, how=ranks.how, ranks=ranks, num_batches=len(plan))
        mine = [position for position in range(len(plan)) if whole.piece(position) is not None]
        reading = _reading(loader, inner, [plan[position] for position in mine])
        return Share(reading, how=ranks.how, ranks=ranks, num_batches=len(plan), positions=mine)
    each = [{index for batch in part for index in batch} for part in parts]
    ranks.how = "own data" if any(indices != each[0] for indices in each) else "same data"
    given = sum(len(batch) for part in parts for batch in part)
    unique = _cut(parts, None, drop_repeats=True)
    taken = sum(len(batch) for part in unique for batch in part)
    notes = []
    if given > taken and ranks.how == "own data":
        notes.append(f"{given - taken} samples that the samplers of several ranks give were read once")
    if _marked(inner) and taken < len(inner.dataset):  # type: ignore[arg-type]
        notes.append(f"the samplers of the ranks leave out {len(inner.dataset) - taken} samples of the data set")  # type: ignore[arg-type]
    plan = _cut(parts, max_samples, drop_repeats=True)[ranks.rank]
    positions = range(ranks.rank, ranks.size * len(plan) + ranks.rank, ranks.size)
    return Share(_reading(loader, inner, plan), how="own data", ranks=ranks, positions=positions, note="; ".join(notes))


def _cut(parts: list[list[Indices]], max_samples: int | None, *, drop_repeats: bool = False) -> list[list[Indices]]:
    """The first samples of all, taken in turn from the parts, in the batches in which they are."""
    columns = [[(number, index) for number, batch in enumerate(part) for index in batch] for part in parts]
    kept: list[list[Indices]] = [[[] for _ in part] for part in parts]
    seen: set[Any] = set()
    in_turn = ((r, *entry) for row in itertools.zip_longest(*columns) for r, entry in enumerate(row) if entry is not None)
    left = max_samples
    for r, number, index in in_turn:
        if left == 0:
            break
        if drop_repeats and index in seen:
            continue
        seen.add(index)
        kept[r][number].append(index)
        left = None if left is None else left - 1
    return [[batch for batch in part if batch] for part in kept]


def _reading(loader: Any, inner: DataLoader[Any], plan: list[Indices]) -> Any:
    """The same loader, or wrapper around it, that reads these batches."""
    if loader is not inner:
        same = copy.copy(loader)
        same.__dict__.update(
            {
                name: _reading(value, inner, plan)
                for name, value in vars(loader).items()
                if value is inner or (isinstance(value, DataLoader) and _indexed(value) is inner)
            }
        )
        return same
    if type(inner).__iter__ is not DataLoader.__iter__:
        return DataLoader(
            inner.dataset,
            batch_sampler=plan,
            collate_fn=inner.collate_fn,
            num_workers=inner.num_workers,
            multiprocessing_context=inner.multiprocessing_context,
            worker_init_fn=inner.worker_init_fn,
        )
    same = copy.copy(inner)
    same.__dict__.update(batch_sampler=plan, _iterator=None)  # a DataLoader refuses to be told by assignment
    return same


def _digest_of_dataset(loader: DataLoader[Any] | None, plan: list[Indices]) -> _Digest | None:
    """Of three samples and of all indices; None where samples cannot be had one by one."""
    count = 0 if loader is None else len(loader.dataset)  # type: ignore[arg-type]
    if loader is None or not count:
        return None
    order = hashlib.sha256(repr(plan).encode()).hexdigest()
    if _marked(loader):  # a data set that draws at random would not look the same
        return _Digest(f"{count} samples for the ranks", order)
    try:
        contents = _hashed([loader.dataset[i] for i in (0, count // 2, count - 1)], str(count))
    except Exception:  # its indices are names, say; what is broken will be said when it is read
        return None
    return _Digest(contents, order)


# ---------------------------------------------------------------------- others


def _digest_of_first(loader: Any) -> _Digest:
    """Of the first batch and, of a list, the last."""
    if isinstance(loader, (list, tuple)):
        ends = [loader[0], loader[-1], len(loader)] if loader else []
    else:
        ends = list(itertools.islice(loader, 1))
    return _Digest("" if not ends or is_empty(ends) else _hashed(ends), "")


def _num_batches(loader: Any, max_samples: int | None) -> int | None:
    """How many batches of a list will be read; None for what only a pass would tell."""
    if not isinstance(loader, (list, tuple)):
        return None
    left = max_samples
    for number, batch in enumerate(loader, 1):
        count = count_samples(batch)
        if count is None and max_samples is not None:
            return None
        if left is not None and count is not None:
            left -= count
            if left <= 0:
                return number
    return len(loader)


def _hashed(tree: Any, *more: str) -> str:
    found = hashlib.sha256(repr(more).encode())
    for leaf in leaves_of(tree):
        if isinstance(leaf, Tensor):
            if leaf.layout is not torch.strided:
                continue
            found.update(repr((leaf.dtype, tuple(leaf.shape))).encode())
            found.update(
                leaf.detach()
                .cpu()
                .reshape(-1)
                .clone(memory_format=torch.contiguous_format)
                .view(torch.uint8)
                .numpy()
                .tobytes()
            )
        elif isinstance(leaf, np.ndarray):
            found.update(leaf.tobytes())
        elif isinstance(leaf, (str, bytes, int, float)):
            found.update(repr(leaf).encode())
    return found.hexdigest()
