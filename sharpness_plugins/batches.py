"""What a loader yields: trees of tensors, how many samples they hold, and the same batches at every pass."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from . import sampling
from .errors import LoaderError, MeasurementWarning
from .memory import free_bytes

__all__ = ["Batch", "BatchSource", "count_samples", "map_tensors", "tensors_of"]

_MIB = 2**20
_MOST_CACHED = 4 * 2**30


class Batch(NamedTuple):
    """One batch on the device: position in the pass, contents, number of samples (None where it cannot be told)."""

    position: int
    data: Any
    num_samples: int | None


def map_tensors(batch: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """The same tree with ``fn`` applied to its tensors; containers are new, other leaves are kept."""
    if isinstance(batch, Tensor):
        return fn(batch)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(entry, fn) for entry in batch))
    if isinstance(batch, (list, tuple)):
        entries = [map_tensors(entry, fn) for entry in batch]
        return entries if isinstance(batch, list) else tuple(entries)
    if isinstance(batch, Mapping):
        mapped = {key: map_tensors(entry, fn) for key, entry in batch.items()}
        if type(batch) is dict:
            return mapped
        same = copy.copy(batch)  # BatchEncoding and friends keep their type
        for key, entry in mapped.items():
            same[key] = entry  # type: ignore[index]
        return same
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        changes = {f.name: map_tensors(getattr(batch, f.name), fn) for f in dataclasses.fields(batch) if f.init}
        return dataclasses.replace(batch, **changes)
    return batch


def tensors_of(batch: Any) -> list[Tensor]:
    """The tensors of a tree, in order."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(batch, keep)
    return found


def count_samples(batch: Any) -> int | None:
    """Number of samples: the leading size that the tensors of the batch share, or of the last one (the targets).

    None where no tensor has a leading dimension.
    """
    sizes = [tensor.shape[0] for tensor in tensors_of(batch) if tensor.ndim > 0]
    return sizes[-1] if sizes else None


def _head(batch: Any, count: int, of: int) -> Any:
    return map_tensors(batch, lambda tensor: tensor[:count] if tensor.ndim and tensor.shape[0] == of else tensor)


def _num_bytes(batch: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(batch))


class _Fingerprint:
    """A sum over samples that does not depend on their order or batching, but does on their contents."""

    def __init__(self) -> None:
        self.num_batches = 0
        self.num_samples = 0
        self._sums: list[Tensor] = []

    def add(self, batch: Batch) -> None:
        self.num_batches += 1
        self.num_samples += batch.num_samples or 0
        for position, tensor in enumerate(tensors_of(batch.data)):
            rows = tensor.detach().reshape(tensor.shape[0] if tensor.ndim else 1, -1)
            rows = (rows.real if rows.is_complex() else rows).to(torch.float32)
            # a position-dependent weight: flips and crops of an image keep its plain sum
            weights = torch.sin(torch.arange(1, rows.shape[1] + 1, device=rows.device, dtype=torch.float32) + position)
            per_sample = (rows @ weights).to(torch.float64)
            self._sums.append(torch.stack([per_sample.sum(), per_sample.square().sum(), per_sample.abs().sum()]).cpu())

    def difference(self, other: _Fingerprint) -> str | None:
        """What the second pass gave that the first did not, as a clause; None where they agree."""
        if other.num_samples != self.num_samples:
            return f"{self.num_samples} samples on the first pass and {other.num_samples} on the second"
        if not self._sums or not other._sums:
            return None
        first, second = torch.stack(self._sums).sum(0), torch.stack(other._sums).sum(0)
        # regrouped samples differ by float32 rounding of each row's product, other samples by much more
        tolerance = 1e-6 * torch.stack([first[2], first[1], first[2]])
        if bool(((first - second).abs() > tolerance).any()):
            return "other samples on the second pass than on the first (random augmentation, or shuffling with drop_last)"
        return None


class BatchSource:
    """A loader read the same way at every pass: seeded, moved to the device, kept there when it fits.

    Before every pass the global generators and those of the loader and its samplers are set to the same state, so that
    a shuffling or augmenting loader repeats itself and the loss is one fixed function. A loader that depends on that
    (its samples differ under another seed), or that changes all the same, is said: in ``notes`` and as a warning.

    The caller preserves the random states around passes (``sampling.preserved_rng(device, source.holders)``).

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
        self._loader = _checked(loader)
        self._device = device
        self._max_samples = max_samples
        self._upcast_half = upcast_half
        self._seed = sampling.key_for(seed, "loader") >> 1
        self.budget = _default_cache_bytes(device) if cache_bytes is None else cache_bytes
        self.holders = _holders(self._loader)
        self._states = sampling.generator_states(self.holders)
        self.notes: list[str] = []
        self._cache: list[Batch] | None = None
        self._first = _Fingerprint()

    @property
    def cached(self) -> bool:
        return self._cache is not None

    @property
    def num_batches(self) -> int:
        return self._first.num_batches

    @property
    def num_samples(self) -> int:
        return self._first.num_samples

    def load(self) -> None:
        """The first pass: counts, fills the cache, and checks that a second pass gives the same samples."""
        kept: list[Batch] | None = [] if self.budget > 0 else None
        taken = 0
        for batch in self._read(self._seed):
            self._first.add(batch)
            taken += _num_bytes(batch.data)
            if kept is not None and taken <= self.budget:
                kept.append(batch)
            else:
                kept = None
        if self.num_batches == 0:
            raise LoaderError("the loader is empty: it gave no batch at all. Pass at least one batch.")
        self._cache = kept
        if isinstance(self._loader, (list, tuple)):
            return
        second = _Fingerprint()
        for batch in self._read(self._seed + 1):
            second.add(batch)
        if second.num_batches == 0:
            if not self.cached:
                raise LoaderError(
                    f"the loader gave {self.num_batches} batches on the first pass and none on the second, and its "
                    f"batches do not fit in the cache of {self.budget / _MIB:.0f} MiB. Pass a loader that can be iterated "
                    "again, or raise cache_bytes."
                )
            self.notes.append("the loader can be read only once; the batches of that pass were kept and used")
            return
        if difference := self._first.difference(second):
            kind = "the first pass was kept" if self.cached else "every pass repeats the same random seed"
            self._say(f"the loader gives {difference}; {kind}, and the numbers hold for those samples only")

    def __iter__(self) -> Iterator[Batch]:
        if self._cache is not None:
            yield from self._cache
            return
        again = _Fingerprint()
        for batch in self._read(self._seed):
            again.add(batch)
            yield batch
        if again.num_batches == 0:
            raise LoaderError(f"the loader gave {self.num_batches} batches on an earlier pass and none now")
        if difference := self._first.difference(again):
            self._say(
                f"the loader changes between passes even with the same seed ({difference}), so the loss is not one fixed "
                "function and the numbers are unreliable. Pass a list of batches, or raise cache_bytes."
            )

    def _read(self, seed: int) -> Iterator[Batch]:
        sampling.seed_global(seed)
        sampling.set_generator_states(self._states, offset=seed - self._seed)
        left = self._max_samples
        for position, data in enumerate(self._loader):
            data = self._move(data)
            count = count_samples(data)
            if left is not None and count is not None:
                if count > left:
                    data, count = _head(data, left, of=count), left
                left -= count
            yield Batch(position, data, count)
            if left == 0:
                return

    def _move(self, data: Any) -> Any:
        def move(tensor: Tensor) -> Tensor:
            half = self._upcast_half and tensor.dtype in (torch.float16, torch.bfloat16)
            moved = tensor.to(self._device, torch.float32 if half else tensor.dtype)
            return moved.clone() if moved.is_inference() else moved

        if not tensors_of(data) and hasattr(data, "to"):  # a batch class of its own, such as a graph's
            return copy.copy(data).to(self._device)
        return map_tensors(data, move)

    def _say(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)
            warnings.warn(note, MeasurementWarning, stacklevel=2)


def _checked(loader: Any) -> Any:
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
    if isinstance(loader, (Tensor, Mapping, str)) or not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
        raise LoaderError(
            f"loader must be an iterable of batches, got a {type(loader).__name__}. "
            "Pass a DataLoader, or a list with the batch in it: [batch]."
        )
    if isinstance(loader, tuple) and len(loader) == 2 and all(isinstance(entry, Tensor) for entry in loader):
        raise LoaderError(
            "loader is a pair of tensors, which reads as two batches. Pass a list with the pair in it: [(x, y)]."
        )
    if isinstance(loader, DataLoader) and loader.persistent_workers:
        return _with_workers_of_its_own(loader)
    return loader


def _with_workers_of_its_own(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The same loader without persistent workers.

    A second iterator over persistent workers resets them under a training loop that is in the middle of an epoch:
    measured, 10 batches became 13 and 8 of 100 samples were never seen.
    """
    how: dict[str, Any] = {"batch_sampler": loader.batch_sampler}
    if loader.batch_sampler is None or isinstance(loader.dataset, IterableDataset):
        how = {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
    return DataLoader(
        loader.dataset,
        **how,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn,
        generator=loader.generator,
        multiprocessing_context=loader.multiprocessing_context,
    )


def _holders(loader: Any) -> list[Any]:
    """The objects that may carry a generator which a pass over ``loader`` advances."""
    sampler, batch_sampler = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
    found = [loader, sampler, batch_sampler, getattr(batch_sampler, "sampler", None), getattr(loader, "dataset", None)]
    return [holder for holder in found if holder is not None]


def _default_cache_bytes(device: torch.device) -> int:
    free = free_bytes(device)
    return _MOST_CACHED if free is None else min(free // 4, _MOST_CACHED)
