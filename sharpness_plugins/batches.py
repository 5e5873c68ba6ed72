"""What a loader yields: trees of tensors, how many samples they hold, and the same batches at every pass."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, Dataset, IterableDataset

from . import sampling
from .distributed import Ranks
from .errors import LoaderError, MeasurementWarning
from .memory import free_bytes

if TYPE_CHECKING:
    from .shares import Share

__all__ = [
    "LABEL_KEYS",
    "Batch",
    "BatchSource",
    "checked",
    "count_samples",
    "holders_of",
    "is_empty",
    "leaves_of",
    "map_tensors",
    "rows_of",
    "tensors_of",
    "thinned",
]

LABEL_KEYS = ("labels", "label", "label_ids")

_MIB = 2**20
_MOST_CACHED = 4 * 2**30
_FINGERPRINT_ELEMENTS = 2**22  # bounds the float64 copies
_MOST_HOLDERS = 1000


class Batch(NamedTuple):
    """One batch on the device: position in the pass, contents, number of samples (None where it cannot be told)."""

    position: int
    data: Any
    num_samples: int | None


def map_tensors(batch: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """The same tree with ``fn`` applied to its tensors; containers are new, other leaves are kept."""
    return _map_leaves(batch, lambda leaf: fn(leaf) if isinstance(leaf, Tensor) else leaf)


def _map_leaves(batch: Any, fn: Callable[[Any], Any]) -> Any:
    if isinstance(batch, (Tensor, PackedSequence)):
        return fn(batch)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_map_leaves(entry, fn) for entry in batch))
    if isinstance(batch, (list, tuple)):
        entries = [_map_leaves(entry, fn) for entry in batch]
        return entries if isinstance(batch, list) else tuple(entries)
    if isinstance(batch, Mapping):
        mapped = {key: _map_leaves(entry, fn) for key, entry in batch.items()}
        if type(batch) is dict or not isinstance(batch, MutableMapping):
            return mapped
        same: Any = copy.copy(batch)  # BatchEncoding and friends keep their type
        for key, entry in mapped.items():
            same[key] = entry
        return same
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        twin: Any = copy.copy(batch)
        for f in dataclasses.fields(batch):
            object.__setattr__(twin, f.name, _map_leaves(getattr(batch, f.name), fn))  # frozen ones, too
        return twin
    return fn(batch)


def tensors_of(batch: Any) -> list[Tensor]:
    """The tensors of a tree, in order."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(batch, keep)
    return found


def leaves_of(batch: Any) -> list[Any]:
    """All leaves of a tree, in order; of packed sequences and of batch objects that move themselves, what they hold."""
    found: list[Any] = []

    def keep(leaf: Any) -> Any:
        if isinstance(leaf, PackedSequence):
            found.append(leaf.data)
        elif not isinstance(leaf, Tensor) and _moves_itself(leaf):
            found.extend(tensors_of(vars(leaf)))
        else:
            found.append(leaf)
        return leaf

    _map_leaves(batch, keep)
    return found


def count_samples(batch: Any) -> int | None:
    """Number of samples: the leading size of the last tensor of the batch (the targets), or of its labels in a mapping.

    A batch object of its own, such as a graph's, may tell it as ``num_graphs``. None where no tensor has a leading
    dimension.
    """
    graphs = getattr(batch, "num_graphs", None)
    if isinstance(graphs, int):
        return graphs
    labels = [batch[key] for key in LABEL_KEYS if key in batch] if isinstance(batch, Mapping) else []
    for tensors in (_all_tensors(labels), _all_tensors(batch)):
        if sizes := [tensor.shape[0] for tensor in tensors if tensor.ndim > 0]:
            return sizes[-1]
    return None


def _all_tensors(batch: Any) -> list[Tensor]:
    """The tensors of a tree and, one level deep, of batch objects in it that know how to move themselves."""
    found: list[Tensor] = []

    def keep(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, PackedSequence):
            found.append(leaf.data)
        elif _moves_itself(leaf):
            found.extend(tensors_of(vars(leaf)))
        return leaf

    _map_leaves(batch, keep)
    return found


def _moves_itself(leaf: Any) -> bool:
    return callable(getattr(leaf, "to", None)) and hasattr(leaf, "__dict__") and not isinstance(leaf, type)


def thinned(batch: Batch, count: int) -> Batch:
    """About ``count`` of the samples, at least one, evenly spaced; all of them if there are no more, or none can be told."""
    if batch.num_samples is None or batch.num_samples <= count:
        return batch
    every = -(-batch.num_samples // max(count, 1))
    return batch._replace(
        data=rows_of(batch.data, slice(None, None, every), batch.num_samples), num_samples=-(-batch.num_samples // every)
    )


def rows_of(batch: Any, rows: slice | list[int], of: int) -> Any:
    """Some of the ``of`` samples: in every tensor, and in lists of strings and the like beside them."""
    if isinstance(batch, (list, tuple)) and len(batch) == of and not _all_tensors(batch):
        return batch[rows] if isinstance(rows, slice) else type(batch)([batch[row] for row in rows])
    if type(batch) in (list, tuple):
        return type(batch)(rows_of(entry, rows, of) for entry in batch)
    if type(batch) is dict:
        return {key: rows_of(entry, rows, of) for key, entry in batch.items()}

    def cut(leaf: Tensor) -> Tensor:
        if not isinstance(leaf, Tensor):  # a packed sequence
            raise TypeError(f"a {type(leaf).__name__} cannot be cut by samples")
        return leaf[rows] if leaf.ndim and leaf.shape[0] == of else leaf

    return map_tensors(batch, cut)


def _num_bytes(batch: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _all_tensors(batch))


def is_empty(batch: Any) -> bool:
    """Whether the batch has rows of tensors, and no row in any."""
    sizes = [tensor.shape[0] for tensor in _all_tensors(batch) if tensor.ndim > 0]
    return bool(sizes) and not any(sizes)


class _Fingerprint:
    """A sum over samples that does not depend on their order or batching, but does on their contents."""

    def __init__(self) -> None:
        self.num_batches = 0
        self.num_samples = 0
        self._sums: list[Tensor] = []
        self.units: list[Tensor] = []  # of each batch: a number for each sample and 1, or one for all and their count

    def add(self, batch: Batch) -> None:
        self.num_batches += 1
        self.num_samples += batch.num_samples or 0
        numbers: list[Tensor] = []
        for position, tensor in enumerate(_all_tensors(batch.data)):
            if tensor.numel() == 0 or tensor.layout is not torch.strided:
                continue
            rows = tensor.detach().reshape(tensor.shape[0] if tensor.ndim else 1, -1)
            rows = torch.view_as_real(rows).flatten(1) if rows.is_complex() else rows
            # a position-dependent weight: flips and crops of an image keep its plain sum
            weights = torch.sin(torch.arange(1, rows.shape[1] + 1, device=rows.device, dtype=torch.float64) + position)
            parts = torch.split(rows, max(1, _FINGERPRINT_ELEMENTS // rows.shape[1]))
            per_sample = torch.cat(
                [torch.nan_to_num(part.to(torch.float64), nan=0.5, posinf=1.0, neginf=-1.0) @ weights for part in parts]
            ).cpu()
            numbers.append(per_sample)
            self._sums.append(torch.stack([per_sample.sum(), per_sample.square().sum(), per_sample.abs().sum()]))
        if numbers and all(len(per_sample) == batch.num_samples for per_sample in numbers):
            total = torch.stack(numbers).sum(0)
            self.units.append(torch.stack([total, torch.ones_like(total)]))
        else:
            total = torch.stack([per_sample.sum() for per_sample in numbers]).sum() if numbers else torch.tensor(0.0)
            self.units.append(torch.tensor([[total.item()], [batch.num_samples or 1]], dtype=torch.float64))

    @classmethod
    def of_all(cls, parts: Iterable[_Fingerprint]) -> _Fingerprint:
        """Of the samples of all parts together."""
        total = cls()
        for part in parts:
            total.num_batches += part.num_batches
            total.num_samples += part.num_samples
            total._sums += part._sums
        return total

    @property
    def sums(self) -> Tensor | None:
        return torch.stack(self._sums).sum(0) if self._sums else None

    def summary(self) -> _Fingerprint:
        """The same, small enough to be sent round."""
        same = type(self)()
        same.num_batches, same.num_samples = self.num_batches, self.num_samples
        same._sums = [] if self.sums is None else [self.sums]
        return same

    def difference(self, other: _Fingerprint) -> str | None:
        """What another pass gave that the first did not, as a clause; None where they agree."""
        if other.num_samples != self.num_samples:
            return f"{self.num_samples} samples on the first pass and {other.num_samples} on another"
        first, second = self.sums, other.sums
        if first is None or second is None:
            return None
        # samples in another order differ by the rounding of the sums, other samples by much more
        tolerance = 1e-9 * torch.stack([first[2], first[1], first[2]])
        if bool(((first - second).abs() > tolerance).any()):
            return (
                "other data on another pass than on the first (random augmentation, shuffling with drop_last or "
                "max_samples, or padding that depends on the batch)"
            )
        return None


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
        self._first = self._all = _Fingerprint()
        self._num_pieces = 0
        self.first_rank = 0  # that has data

    @property
    def cached(self) -> bool:
        return self._cache is not None

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

    def load(self) -> None:
        """The first pass: counts, fills the cache, and checks that a second pass gives the same samples."""
        self.notes = [self._share.note] if self._share.note else []
        with self._ranks.sharing("reading the data"):
            first, second, uncounted = self._passes()
        self._first, parts = first, self._ranks.gather((first.summary(), second and second.summary(), uncounted))
        self._all = _Fingerprint.of_all(part for part, _, _ in parts)
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
                        f"batches do not fit in the cache of {self.budget / _MIB:.0f} MiB. Pass a loader that can be iterated "
                        "again, or raise cache_bytes."
                    )
            self.notes.append("the loader can be read only once; the batches of that pass were kept and used")
            return
        if difference := self._all.difference(_Fingerprint.of_all(seconds)):
            kind = "the first pass was kept" if self.cached else "every pass repeats the same random seed"
            self._say(f"the loader gives {difference}; {kind}, and the numbers hold for that data only")

    def _passes(self) -> tuple[_Fingerprint, _Fingerprint | None, bool]:
        """Of the first pass and the second, and whether samples could not be counted."""
        first = _Fingerprint()
        kept: list[Batch] | None = [] if self.budget > 0 else None
        taken = 0
        uncounted = False
        may_reuse_its_memory = not isinstance(self._loader, (list, tuple, DataLoader))
        self._num_pieces = 0
        for batch in self._read(self._seed):
            first.add(batch)
            uncounted |= batch.num_samples is None
            taken += _num_bytes(batch.data)
            if kept is not None and taken <= self.budget:
                kept.append(batch._replace(data=map_tensors(batch.data, torch.clone)) if may_reuse_its_memory else batch)
            else:
                kept = None
        first.num_batches -= self._num_pieces
        self._cache = kept
        if isinstance(self._loader, (list, tuple)):
            return first, None, uncounted
        second = _Fingerprint()
        for batch in self._read(self._seed + 1):
            second.add(batch)
        return first, second, uncounted

    def _check_twins(self, parts: list[_Fingerprint]) -> None:
        """Raise where two ranks' own parts hold the same samples, in another order or not."""
        if self._share.how != "own data":
            return
        for (a, one), (b, other) in itertools.combinations(enumerate(parts), 2):
            if one.num_samples > 1 and one.sums is not None and one.difference(other) is None:
                raise LoaderError(
                    f"the loaders of ranks {a} and {b} hold the same samples in different orders, so that they would count "
                    "twice. Give every rank the same loader, with the same seed of its sampler, or each its own part."
                )

    def __iter__(self) -> Iterator[Batch]:
        if self._cache is not None:
            yield from self._cache
            return
        again = _Fingerprint()
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
        return _merged(found, max((units.shape[1] for units in self._first.units), default=1))

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
            self._num_pieces += piece > 0 and end > begin
            if end > begin:
                yield batch._replace(data=rows, num_samples=end - begin)
        elif piece == 0:
            yield batch

    def _move(self, data: Any) -> Any:
        def move(leaf: Any) -> Any:
            if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufc":
                leaf = torch.from_numpy(np.array(leaf, dtype=leaf.dtype.newbyteorder("=")))
            if not isinstance(leaf, Tensor):  # PackedSequence, or a batch class of its own, such as a graph's
                return copy.copy(leaf).to(self._device) if _moves_itself(leaf) else leaf
            half = self._upcast_half and leaf.dtype in (torch.float16, torch.bfloat16)
            moved = leaf.to(self._device, torch.float32 if half else leaf.dtype)
            return moved.clone() if moved.is_inference() else moved

        return _map_leaves(data, move)

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


def _merged(batches: list[Batch], size: int) -> list[Batch]:
    """The same samples in batches of at most ``size``, as far as their tensors fit together; one step each costs most."""
    found: list[Batch] = []
    for batch in batches:
        together = _together(found[-1], batch) if found and _fits(found[-1], batch, size) else None
        if together is None:
            found.append(batch)
        else:
            found[-1] = together
    return found


def _fits(one: Batch, other: Batch, size: int) -> bool:
    return one.num_samples is not None and other.num_samples is not None and one.num_samples + other.num_samples <= size


def _together(one: Batch, other: Batch) -> Batch | None:
    """One batch of both; None where something in them is no tensor with a row for each sample, or has another shape."""
    leaves, others = leaves_of(one.data), leaves_of(other.data)
    if not len(leaves) == len(others) == len(tensors_of(one.data)):
        return None
    for leaf, match in zip(leaves, others, strict=True):
        tensors = isinstance(leaf, Tensor) and isinstance(match, Tensor) and leaf.ndim and match.ndim
        if not tensors or leaf.shape[1:] != match.shape[1:] or (leaf.dtype, leaf.layout) != (match.dtype, torch.strided):
            return None
        if len(leaf) != one.num_samples or len(match) != other.num_samples:
            return None
    joined = (torch.cat(pair) for pair in zip(tensors_of(one.data), tensors_of(other.data), strict=True))
    return one._replace(
        data=map_tensors(one.data, lambda _: next(joined)), num_samples=(one.num_samples or 0) + (other.num_samples or 0)
    )


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
