"""The samples that sharpness is measured on during training: a fixed few, never the training loader itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, Subset

from . import sampling
from .batches import count_samples
from .errors import LoaderError
from .source import BatchSource

__all__ = ["num_probe_samples", "probe_batches"]


def probe_batches(
    loader: Iterable[Any],
    num_samples: int = 512,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    transform: Callable[[Any], Any] | None = None,
) -> list[Any]:
    """``num_samples`` of a loader's data set, drawn once, as batches to measure on.

    Why not the loader: an inner pass over one with persistent workers turned 10 training batches into 13, and without them
    it moves the random numbers of the next epoch. Here the data set is read by a loader of our own without workers, under
    random states of our own, those of generators that data set and transforms hold included; whatever is random in its
    samples is drawn once and stays. The same on every rank.

    Args:
        loader: a DataLoader, whose data set, collate function and batch size are used; with a ``SubsetRandomSampler``, of
            the data set those indices only. An object around a DataLoader, its attribute ``loader``, gets the batches to do
            to them what it does (timm's ``PrefetchLoader`` normalizes). Of an iterable data set the first samples are taken,
            and a sequence of batches gives its first ones.
        num_samples: at most; all if there are fewer. Where batches are taken as they come, the last one may pass it.
        batch_size: of the batches given back; None for the loader's.
        transform: in place of the data set's own ``transform``, without augmentation.
    Memory: the samples.
    Raises:
        LoaderError: there is nothing in it, it is an iterator, or it has no data set to read beside training.
        ValueError: ``num_samples`` or ``batch_size`` is below 1; ``transform`` is given and the data set has none.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    source = _inner(loader)
    reader = _reader(source, num_samples, seed, batch_size, transform)
    has_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    device = torch.device("cuda" if has_cuda else "cpu")
    holders = BatchSource(reader, device=device, cache_bytes=0).holders
    restore = sampling.rng_states(device, holders)
    try:
        sampling.seed_global(sampling.key_for(seed, "probe") >> 1, device)
        sampling.set_generator_states(sampling.generator_states(holders), offset=1)
        batches = list(_first(reader, num_samples))
        if source is not loader:
            through: Any = copy.copy(loader)
            through.loader = batches
            batches = list(through)
    finally:
        restore()
    if not batches:
        raise LoaderError("the loader holds no sample, so there is nothing to measure on")
    return batches


def _inner(loader: Any) -> Any:
    """The DataLoader that it iterates to move or normalize whole batches, as timm's ``PrefetchLoader`` does; else itself."""
    inner = getattr(loader, "loader", None)
    return inner if isinstance(inner, DataLoader) and not isinstance(loader, DataLoader) else loader


def _reader(
    loader: Iterable[Any], num_samples: int, seed: int, batch_size: int | None, transform: Callable[[Any], Any] | None
) -> Iterable[Any]:
    if isinstance(loader, Sequence) and not isinstance(loader, (str, bytes)):
        if transform is not None or batch_size is not None:
            raise ValueError(
                "transform and batch_size are for a data set, and a sequence of batches has none: make the batches so"
            )
        return loader
    dataset = getattr(loader, "dataset", None)
    if dataset is None or isinstance(dataset, Iterator):
        which = f"the data set of this {type(loader).__name__} is a {type(dataset).__name__}, which can be read only once"
        raise LoaderError(
            (f"a {type(loader).__name__} has no data set that could be read beside training" if dataset is None else which)
            + ". Pass a DataLoader, or batches in a list, or make a probe of your own."
        )
    dataset = _with_transform(dataset, transform)
    if not isinstance(dataset, IterableDataset):
        indices = getattr(getattr(loader, "sampler", None), "indices", None)
        among = range(len(dataset)) if indices is None else indices
        order = sampling.permutation(len(among), sampling.generator_for(seed, "probe"))
        dataset = Subset(dataset, [int(among[i]) for i in order[:num_samples].tolist()])
    return DataLoader(
        dataset,
        batch_size=_batch_size(loader, num_samples, batch_size),
        collate_fn=getattr(loader, "collate_fn", None),
        generator=torch.Generator().manual_seed(0),
    )


def _batch_size(loader: Any, num_samples: int, wanted: int | None) -> int | None:
    """None where the data set's own entries are batches."""
    if isinstance(loader, DataLoader) and loader.batch_sampler is None:
        if wanted is not None:
            raise ValueError(
                "batch_size cuts samples into batches, and here the data set gives batches itself: leave it out"
            )
        return None
    known = (
        wanted,
        getattr(loader, "batch_size", None),
        getattr(getattr(loader, "batch_sampler", None), "batch_size", None),
    )
    return min(next((size for size in known if isinstance(size, int)), 32), num_samples)


def _with_transform(dataset: Any, transform: Callable[[Any], Any] | None) -> Any:
    if transform is None:
        return dataset
    inner = dataset
    path: list[Any] = []
    while not hasattr(inner, "transform") and hasattr(inner, "dataset"):  # a Subset of it
        path.append(inner)
        inner = inner.dataset
    if not hasattr(inner, "transform"):
        raise ValueError(f"transform is given, and a {type(dataset).__name__} has no attribute of that name to replace")
    changed = copy.copy(inner)
    changed.transform = transform
    for holder in reversed(path):
        outer = copy.copy(holder)
        outer.dataset = changed
        changed = outer
    return changed


def _first(batches: Iterable[Any], num_samples: int) -> Iterator[Any]:
    """Whole batches until they hold so many samples; the batch that passes it is the last."""
    seen = 0.0
    for batch in batches:
        yield batch
        seen += count_samples(batch) or (len(batch) if isinstance(batch, Sized) else 1)
        if seen >= num_samples:
            return


def num_probe_samples(probe: Iterable[Any]) -> float:
    """0 where it does not say, so that the first measurement is made when due."""
    if isinstance(probe, (list, tuple)):
        return float(sum(count_samples(batch) or 0 for batch in probe))
    dataset = getattr(probe, "dataset", None)
    try:
        return float(len(dataset)) if dataset is not None else 0.0
    except TypeError:
        return 0.0
