"""What a loader yields: trees of tensors, and how many samples they hold."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

__all__ = [
    "LABEL_KEYS",
    "Batch",
    "all_tensors",
    "count_samples",
    "is_empty",
    "leaves_of",
    "map_leaves",
    "map_tensors",
    "merged",
    "moves_itself",
    "num_bytes",
    "rows_of",
    "tensors_of",
    "thinned",
]

LABEL_KEYS = ("labels", "label", "label_ids")


class Batch(NamedTuple):
    """One batch on the device: position in the pass, contents, number of samples (None where it cannot be told)."""

    position: int
    data: Any
    num_samples: int | None


def map_tensors(batch: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """The same tree with ``fn`` applied to its tensors; containers are new, other leaves are kept."""
    return map_leaves(batch, lambda leaf: fn(leaf) if isinstance(leaf, Tensor) else leaf)


def map_leaves(batch: Any, fn: Callable[[Any], Any]) -> Any:
    if isinstance(batch, (Tensor, PackedSequence)):
        return fn(batch)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_leaves(entry, fn) for entry in batch))
    if isinstance(batch, (list, tuple)):
        entries = [map_leaves(entry, fn) for entry in batch]
        return entries if isinstance(batch, list) else tuple(entries)
    if isinstance(batch, Mapping):
        mapped = {key: map_leaves(entry, fn) for key, entry in batch.items()}
        if type(batch) is dict or not isinstance(batch, MutableMapping):
            return mapped
        same: Any = copy.copy(batch)  # BatchEncoding and friends keep their type
        for key, entry in mapped.items():
            same[key] = entry
        return same
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        twin: Any = copy.copy(batch)
        for f in dataclasses.fields(batch):
            object.__setattr__(twin, f.name, map_leaves(getattr(batch, f.name), fn))  # frozen ones, too
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
        elif not isinstance(leaf, Tensor) and moves_itself(leaf):
            found.extend(tensors_of(vars(leaf)))
        else:
            found.append(leaf)
        return leaf

    map_leaves(batch, keep)
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
    for tensors in (all_tensors(labels), all_tensors(batch)):
        if sizes := [tensor.shape[0] for tensor in tensors if tensor.ndim > 0]:
            return sizes[-1]
    return None


def all_tensors(batch: Any) -> list[Tensor]:
    """The tensors of a tree and, one level deep, of batch objects in it that know how to move themselves."""
    found: list[Tensor] = []

    def keep(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, PackedSequence):
            found.append(leaf.data)
        elif moves_itself(leaf):
            found.extend(tensors_of(vars(leaf)))
        return leaf

    map_leaves(batch, keep)
    return found


def moves_itself(leaf: Any) -> bool:
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
    if isinstance(batch, (list, tuple)) and len(batch) == of and not all_tensors(batch):
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


def num_bytes(batch: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in all_tensors(batch))


def is_empty(batch: Any) -> bool:
    """Whether the batch has rows of tensors, and no row in any."""
    sizes = [tensor.shape[0] for tensor in all_tensors(batch) if tensor.ndim > 0]
    return bool(sizes) and not any(sizes)


def merged(batches: list[Batch], size: int) -> list[Batch]:
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
