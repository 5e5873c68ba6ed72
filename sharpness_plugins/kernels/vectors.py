"""What the operations on flat vectors share: their checks, their scalars, and the pieces that plain torch works in."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["Sums", "arithmetic_dtype", "check_vectors", "pieces", "pieces_with_buffers", "scalar"]

_CACHED = 2**15  # float32: 128 kB an array, so that the six in use stay in a core's cache
_LAUNCHED = 2**20  # where a call is a launch: few of them, in pieces that a GPU's second-level cache holds


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """What elements of ``dtype`` are computed in: half precision in float32, the others in themselves."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def pieces(length: int, device: torch.device) -> Iterator[slice]:
    """Consecutive ranges that cover a vector of ``length`` elements, small enough to stay in cache."""
    size = _CACHED if device.type == "cpu" else _LAUNCHED
    for first in range(0, length, size):
        yield slice(first, min(first + size, length))


def pieces_with_buffers(
    length: int, count: int, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """:func:`pieces`, each with ``count`` buffers of its length, not filled: the same memory every time.

    Temporaries would come from the allocator piece by piece, which may give their pages back to the system each time.
    """
    buffers: Tensor | None = None
    for piece in pieces(length, device):
        size = piece.stop - piece.start
        if buffers is None:
            buffers = torch.empty((count, size), dtype=dtype, device=device)
        yield piece, buffers[:, :size].unbind()


def scalar(value: Tensor | float, like: Tensor) -> Tensor:
    """``value`` as a 0-dim tensor on the device of ``like``, in the dtype that its elements are computed in.

    A number becomes a fill of one element, without a synchronization; a tensor of that dtype and device costs nothing.

    Raises:
        ValueError: a tensor of more than one element.
    """
    dtype = arithmetic_dtype(like.dtype)
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=dtype, device=like.device)
    if value.numel() != 1:
        raise ValueError(f"a scalar must have one element, got shape {tuple(value.shape)}")
    return value.detach().reshape(()).to(like.device, dtype)


def check_vectors(**vectors: Tensor) -> None:
    """Refuse what the kernels would read wrongly.

    Raises:
        ValueError: not all are contiguous floating-point vectors of one length, dtype and device.
    """
    first_name, first = next(iter(vectors.items()))
    for name, vector in vectors.items():
        if vector.ndim != 1 or not vector.is_contiguous() or not vector.dtype.is_floating_point:
            raise ValueError(
                f"{name} must be a contiguous floating-point vector, got {vector.dtype}, shape {tuple(vector.shape)}, "
                f"strides {vector.stride()}"
            )
        if (vector.shape, vector.dtype, vector.device) != (first.shape, first.dtype, first.device):
            raise ValueError(
                f"{name} must be like {first_name}: {tuple(first.shape)}, {first.dtype}, {first.device}; got "
                f"{tuple(vector.shape)}, {vector.dtype}, {vector.device}"
            )


class Sums:
    """Inner products added up piece by piece: float32 within a piece, pairwise, float64 across them."""

    def __init__(self, count: int, device: torch.device) -> None:
        self._device = device
        self._parts: list[list[Tensor]] = [[] for _ in range(count)]

    def add(self, index: int, x: Tensor, y: Tensor, buffer: Tensor) -> None:
        """Add ``<x, y>``; the products go to ``buffer``."""
        # torch.dot takes half the time, but was off by 1.2e-6 on a piece: it adds up one after the other
        self._parts[index].append(torch.mul(x, y, out=buffer).sum())

    def count(self, index: int, x: Tensor) -> None:
        """Add how many elements are not zero, for integers; x is overwritten."""
        self._parts[index].append(x.abs_().clamp_(max=1).sum())

    def totals(self) -> Tensor:
        """Shape ``(count,)``, float64."""
        none = torch.zeros(1, device=self._device)
        return torch.stack([torch.stack(parts or [none[0]]).sum(dtype=torch.float64) for parts in self._parts])
