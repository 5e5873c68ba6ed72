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

__all__ = ["probe_batches"]


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
    random states of our own; whatever is random in its samples is drawn once and stays.

    Args:
        loader: a DataLoader, whose data set, collate function and batch size are used; of an iterable data set the first
            samples are taken. A sequence of batches gives its first ones.
        num_samples: at most; all if there are fewer.
        batch_size: of the batches given back; None for the loader's.
        transform: in place of the data set's own ``transform``, without augmentation.
    Memory: the samples.
    Raises:
        LoaderError: there is nothing in it, it is an iterator, or it has no data set to read beside training.
        ValueError: ``num_samples`` is below 1; ``transform`` is given and the data set has none.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    restore = sampling.rng_states(torch.device("cpu"), [loader])
    try:
        sampling.seed_global(sampling.key_for(seed, "probe") >> 1)
        batches = list(_first(_reader(loader, num_samples, seed, batch_size, transform), num_samples))
    finally:
        restore()
    if not batches:
        raise LoaderError("the loader holds no sample, so there is nothing to measure on")
    return batches


def _reader(
    loader: Iterable[Any], num_samples: int, seed: int, batch_size: int | None, transform: Callable[[Any], Any] | None
) -> Iterable[Any]:
    if isinstance(loader, Sequence) and not isinstance(loader, (str, bytes)):
        if transform is not None:
            raise ValueError("transform replaces a data set's own, and a sequence of batches has none: transform them first")
        return loader
    dataset = getattr(loader, "dataset", None)
    if dataset is None:
        raise LoaderError(
            f"a {type(loader).__name__} has no data set that could be read beside training. Pass a DataLoader, or batches "
            "in a list."
        )
    dataset = _with_transform(dataset, transform)
    if not isinstance(dataset, IterableDataset):
        order = sampling.permutation(len(dataset), sampling.generator_for(seed, "probe"))
        dataset = Subset(dataset, order[:num_samples].tolist())
    size = batch_size or getattr(loader, "batch_size", None) or 32
    return DataLoader(
        dataset,
        batch_size=min(size, num_samples),
        collate_fn=getattr(loader, "collate_fn", None),
        generator=torch.Generator().manual_seed(0),
    )


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
