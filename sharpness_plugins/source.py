"""A loader that gives the same batches at every pass: which loaders can, and what they are asked to keep."""

from __future__ import annotations

import contextlib
import copy
import itertools
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from . import sampling
from .batches import Batch, count_samples, is_empty, map_leaves, map_tensors, merged, moves_itself, num_bytes, rows_of
from .distributed import Ranks
from .errors import LoaderError, MeasurementWarning
from .fingerprints import Fingerprint
from .memory import free_bytes

if TYPE_CHECKING:
    from .shares import Share

__all__ = ["BatchSource", "checked", "holders_of"]

_MIB = 2**20
_MOST_CACHED = 4 * 2**30
_MOST_HOLDERS = 1000


class BatchSource:
    """A loader read the same way at every pass: seeded, moved to the device, kept there when it fits.

    Before every pass the global generators and those of the loader and its samplers are set to the same state, so that
    a shuffling or augmenting loader repeats itself and the loss is one fixed function. A loader that depends on that
    (its samples differ under another seed), or that changes all the same, is said: in ``notes`` and as a warning.

    The caller preserves the random states around passes (``sampling.rng_states(device, source.holders)``).

    Args:
        loader: anything that can be iterated again and again: a DataLoader, a list of batches.
        device: where batches go.
        max_samples: use the first so many samples of a pass.
        cache_bytes: keep the batches on the device if they take at most this; None for a quarter of the free memory,
            at most 4 GiB.
        upcast_half: turn half-precision inputs into float32, for a model that is measured in float32.
    Raises:
        LoaderError: one-shot, empty, not iterable, or not a loader of batches.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        *,
        device: torch.device,
        max_samples: int | None = None,
        cache_bytes: int | None = None,
        upcast_half: bool = False,
        seed: int = 0,
    ) -> None:
        if max_samples is not None and max_samples < 1:
            raise ValueError(f"max_samples must be at least 1, got {max_samples}")
        if cache_bytes is not None and cache_bytes < 0:
            raise ValueError(f"cache_bytes must be at least 0 (which keeps nothing), got {cache_bytes}")
        self._loader = checked(loader)
        self._device = device
        self._max_samples = max_samples
        self._upcast_half = upcast_half
        self._seed = sampling.key_for(seed, "loader") >> 1
        self.budget = _default_cache_bytes(device) if cache_bytes is None else cache_bytes
        self.holders = holders_of(self._loader)
        self._states = sampling.generator_states(self.holders)
        self.notes: list[str] = []
        self._ranks = Ranks()
        self._share: Share | _Everything = _Everything(self._loader)
        self.uncut: Batch | None = None
        self._cache: list[Batch] | None = None
        self._first = self._all = Fingerprint()
        self._num_pieces = 0
        self.first_rank = 0  # that has data

    @property
    def cached(self) -> bool:
        return self._cache is not None

    @property
    def num_bytes(self) -> int:
        """Of the batches that are kept."""
        return sum(num_bytes(batch.data) for batch in self._cache or ())

    @property
    def num_batches(self) -> int:
        """Over all ranks, as ``num_samples``."""
        return self._all.num_batches

    @property
    def num_samples(self) -> int:
        return self._all.num_samples

    @property
    def own_batches(self) -> int:
        """Of this rank, pieces included."""
        return len(self._first.units)

    def share_out(self, ranks: Ranks, share_of: Callable[..., Share]) -> None:
        """Read this rank's share from now on; collective. ``share_of`` is ``shares.share_of``."""
        self._ranks = ranks
        self._share = share_of(self._loader, ranks, max_samples=self._max_samples, seed=self._seed)
        self._loader, self._max_samples = self._share.loader, self._share.max_samples

    def keep_whole(self) -> None:
        """Cut no batch into pieces: to be said before ``load`` is called again."""
        self._share.cuts, self.uncut = False, None

    def checksum(self) -> str:
        """Of the samples and their batches, up to the rounding of sums."""
        return self._first.checksum()

    def load(self) -> None:
        """The first pass: counts, fills the cache, and checks that a second pass gives the same samples."""
        self.notes = [self._share.note] if self._share.note else []
        with self._ranks.sharing("reading the data"):
            first, second, uncounted = self._passes()
        self._first, parts = first, self._ranks.gather((first.summary(), second and second.summary(), uncounted))
        self._all = Fingerprint.of_all(part for part, _, _ in parts)
        if self._all.num_batches == 0:
            raise LoaderError("the loader is empty: it gave no batch at all. Pass at least one batch.")
        self.first_rank = next(rank for rank, (part, _, _) in enumerate(parts) if part.num_batches)
        self._check_twins([part for part, _, _ in parts])
        if any(uncounted for _, _, uncounted in parts) and self.num_batches > 1:
            self.notes.append(
                "it cannot be told how many samples the batches hold, so all batches weigh the same unless loss_fn returns "
                "(mean, weight)"
            )
        seconds = [part for _, part, _ in parts if part is not None]
        if not seconds:
            return
        if not any(part.num_batches for part in seconds):
            with self._ranks.sharing("reading the data again"):
                if not self.cached:
                    raise LoaderError(
                        f"the loader gave {self.num_batches} batches on the first pass and none on the second, and its "
                        f"batches do not fit in the cache of {self.budget / _MIB:.0f} MiB. Pass a loader that can be "
                        "iterated again, or raise cache_bytes."
                    )
            self.notes.append("the loader can be read only once; the batches of that pass were kept and used")
            return
        if difference := self._all.difference(Fingerprint.of_all(seconds)):
            kind = "the first pass was kept" if self.cached else "every pass repeats the same random seed"
            self._say(f"the loader gives {difference}; {kind}, and the numbers hold for that data only")

    def _passes(self) -> tuple[Fingerprint, Fingerprint | None, bool]:
        """Of the first pass and the second, and whether samples could not be counted."""
        first = Fingerprint()
        kept: list[Batch] | None = [] if self.budget > 0 else None
        taken = 0
        uncounted = False
        may_reuse_its_memory = not isinstance(self._loader, (list, tuple, DataLoader))
        self._num_pieces = 0
        for batch in self._read(self._seed):
            first.add(batch)
            uncounted |= batch.num_samples is None
            taken += num_bytes(batch.data)
            if kept is not None and taken <= self.budget:
                kept.append(batch._replace(data=map_tensors(batch.data, torch.clone)) if may_reuse_its_memory else batch)
            else:
                kept = None
        first.num_batches -= self._num_pieces
        self._cache = kept
        if isinstance(self._loader, (list, tuple)):
            return first, None, uncounted
        second = Fingerprint()
        for batch in self._read(self._seed + 1):
            second.add(batch)
        return first, second, uncounted

    def _check_twins(self, parts: list[Fingerprint]) -> None:
        """Raise where two ranks' own parts hold the same samples, in another order or not."""
        if self._share.how != "own data":
            return
        for (a, one), (b, other) in itertools.combinations(zip(self._ranks.members, parts, strict=True), 2):
            if one.num_samples > 1 and one.sums is not None and one.difference(other) is None:
                raise LoaderError(
                    f"the loaders of ranks {a} and {b} hold the same samples in different orders, so that they would count "
                    "twice. Give every rank the same loader, with the same seed of its sampler, or each its own part."
                )

    def __iter__(self) -> Iterator[Batch]:
        if self._cache is not None:
            yield from self._cache
            return
        again = Fingerprint()
        for batch in self._read(self._seed):
            again.add(batch)
            yield batch
        if again.num_batches == 0 and self.own_batches:
            raise LoaderError(f"the loader gave {self.own_batches} batches on an earlier pass and none now")
        if difference := self._first.difference(again):
            self._say(
                f"the loader changes between passes even with the same seed ({difference}), so the loss is not one fixed "
                "function and the numbers are unreliable. Pass a list of batches, or raise cache_bytes."
            )

    def some(self, max_samples: int, *, least: int = 1) -> list[Batch]:
        """This rank's of ``max_samples`` samples of all ranks, in a few batches.

        Which ones, their contents decide, at random and the same for any order, batching and share. Collective.

        Args:
            least: of one batch, where the rank has so many: BatchNorm has no variance of one sample.
        Cost: a pass over the loader, unless it is cached.
        """
        nothing = torch.empty((2, 0), dtype=torch.float64)
        every: list[Tensor] = self._ranks.gather(torch.cat([nothing, *self._first.units], dim=1))
        numbers, sizes = torch.cat(every, dim=1)
        spread = float(numbers.std(correction=0)) or 1.0
        order = (((numbers - numbers.mean()) / spread * 12.9898).sin() * 43758.5453).frac().argsort()
        taken = torch.zeros(len(order), dtype=torch.bool)
        taken[order[sizes[order].cumsum(0) - sizes[order] < max_samples]] = True
        begin = sum(units.shape[1] for units in every[: self._ranks.rank])
        return self._picked(taken[begin : begin + every[self._ranks.rank].shape[1]], least)

    def _picked(self, taken: Tensor, least: int) -> list[Batch]:
        found: list[Batch] = []
        of_batch = torch.split(taken, [units.shape[1] for units in self._first.units])
        last = max((i for i, units in enumerate(of_batch) if bool(units.any())), default=-1)
        for units, batch in zip(of_batch[: last + 1], self, strict=False):
            rows = units.nonzero().flatten().tolist()
            if not rows:
                continue
            rows += [row for row in range(len(units)) if row not in rows][: max(least - len(rows), 0)]
            if batch.num_samples is None or len(rows) == batch.num_samples or len(units) != batch.num_samples:
                found.append(batch)
            else:
                found.append(batch._replace(data=rows_of(batch.data, rows, batch.num_samples), num_samples=len(rows)))
        return merged(found, max((units.shape[1] for units in self._first.units), default=1))

    def _read(self, seed: int) -> Iterator[Batch]:
        sampling.seed_global(seed)
        sampling.set_generator_states(self._states, offset=seed - self._seed)
        left = self._max_samples
        for position, data in self._share.entries():
            piece = self._share.piece(position)
            if piece is None and left is None:
                continue
            data = self._move(data)
            if is_empty(data):
                continue
            count = count_samples(data)
            if left is not None and count is not None:
                if count > left:
                    data, count = rows_of(data, slice(left), of=count), left
                left -= count
            if piece is not None:
                yield from self._cut(Batch(position, data, count), *piece)
            if left == 0:
                return

    def _cut(self, batch: Batch, piece: int, of: int) -> Iterator[Batch]:
        """The piece of a batch; where it cannot be cut, all of it is the first one."""
        if of == 1:
            yield batch
            return
        if self.uncut is None:
            self.uncut = batch
        rows, count = None, batch.num_samples
        if count is not None:
            begin, end = piece * count // of, (piece + 1) * count // of
            with contextlib.suppress(TypeError):
                rows = rows_of(batch.data, slice(begin, end), of=count)
        if rows is not None and count is not None:
            self._num_pieces += begin > 0 and end > begin
            if end > begin:
                yield batch._replace(data=rows, num_samples=end - begin)
        elif piece == 0:
            yield batch

    def _move(self, data: Any) -> Any:
        def move(leaf: Any) -> Any:
            if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufc":
                leaf = torch.from_numpy(np.array(leaf, dtype=leaf.dtype.newbyteorder("=")))
            if not isinstance(leaf, Tensor):  # PackedSequence, or a batch class of its own, such as a graph's
                return copy.copy(leaf).to(self._device) if moves_itself(leaf) else leaf
            half = self._upcast_half and leaf.dtype in (torch.float16, torch.bfloat16)
            moved = leaf.to(self._device, torch.float32 if half else leaf.dtype)
            return moved.clone() if moved.is_inference() else moved

        return map_leaves(data, move)

    def _say(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)
            warnings.warn(note, MeasurementWarning, stacklevel=2)


def checked(loader: Any) -> Any:
    if isinstance(loader, Iterator):
        raise LoaderError(
            f"loader can be iterated only once (got a {type(loader).__name__}), but a measurement makes many passes. "
            "Pass a DataLoader, or list(loader) if it fits in memory."
        )
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise LoaderError(
            f"loader is a data set ({type(loader).__name__}), which gives samples and not batches. "
            "Wrap it: torch.utils.data.DataLoader(dataset, batch_size=256)."
        )
    if isinstance(loader, (Tensor, np.ndarray, Mapping, str)) or not (
        hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")
    ):
        raise LoaderError(
            f"loader must be an iterable of batches, got a {type(loader).__name__}. "
            "Pass a DataLoader, or a list with the batch in it: [batch]."
        )
    if isinstance(loader, tuple) and len(loader) == 2 and all(isinstance(e, (Tensor, np.ndarray)) for e in loader):
        raise LoaderError(
            "loader is a pair of tensors, which reads as two batches. Pass a list with the pair in it: [(x, y)]."
        )
    return _with_workers_of_its_own(loader)


def _with_workers_of_its_own(loader: Any) -> Any:
    """The same loader, or wrapper around a loader, without persistent workers.

    A second iterator over persistent workers resets them under a training loop that is in the middle of an epoch:
    measured, 10 batches became 13 and 8 of 100 samples were never seen.
    """
    changes: dict[str, Any] = {}
    if isinstance(loader, DataLoader) and loader.persistent_workers:
        changes = {"persistent_workers": False, "_iterator": None}
    for name, inner in getattr(loader, "__dict__", {}).items():
        if isinstance(inner, DataLoader) and (own := _with_workers_of_its_own(inner)) is not inner:
            changes[name] = own
    if not changes:
        return loader
    same = copy.copy(loader)  # keeps a subclass, and the settings that a new DataLoader would have to be told
    same.__dict__.update(changes)
    return same


def holders_of(loader: Any) -> list[Any]:
    """The objects that may carry a generator which a pass over ``loader`` advances: what it is made of, four levels deep."""
    found: dict[int, Any] = {}
    level = [loader]
    for _ in range(5):
        new = {id(part): part for part in level if id(part) not in found}
        level = list(new.values())[: _MOST_HOLDERS - len(found)]
        found.update({id(part): part for part in level})
        level = [part for holder in level for part in _parts(holder)]
    return list(found.values())


def _parts(holder: Any) -> Iterator[Any]:
    for value in getattr(holder, "__dict__", {}).values():
        for part in value if isinstance(value, (list, tuple)) and len(value) <= 64 else (value,):
            if hasattr(part, "__dict__") and not isinstance(part, (Tensor, type, types.ModuleType, types.FunctionType)):
                yield part


class _Everything:
    """All of a loader, for a process alone; ``shares.Share`` is for several."""

    how, note, cuts = "alone", "", False

    def __init__(self, loader: Iterable[Any]) -> None:
        self._loader = loader

    def entries(self) -> Iterator[tuple[int, Any]]:
        return enumerate(self._loader)

    def piece(self, position: int) -> tuple[int, int] | None:
        return 0, 1


def _default_cache_bytes(device: torch.device) -> int:
    free = free_bytes(device)
    return _MOST_CACHED if free is None else min(free // 4, _MOST_CACHED)
