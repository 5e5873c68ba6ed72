"""Which random numbers belong to which element of a flat vector, whatever its order, padding or sharding.

Philox4x32-10 maps a counter of four 32-bit words and a 64-bit key to four random words. The counter of an element is
(element within its parameter: low word, high word; stream; position of the parameter in the model), so a number depends on
what it belongs to and on nothing else. Which piece of which parameter a vector holds is a table of segments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import sampling

__all__ = ["BLOCK", "check_segments", "grouped", "segment_table", "signed_key", "words"]

BLOCK = 4096
"""Elements that a Triton program works on, from a multiple of as many on."""


def segment_table(
    ordinals: Sequence[int],
    numels: Sequence[int],
    firsts: Sequence[int] | None = None,
    *,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Where the elements of a flat vector come from, shape ``(5, segments)``, int64; empty segments are left out.

    A vector may be empty, as a shard of a small model is.

    The rows: where a segment starts in the vector, which element of its parameter comes first, how many there are, the
    ordinal of the parameter, and how many blocks of ``BLOCK`` elements the segments before it touch.

    Args:
        ordinals: positions of the parameters among those of the model, in the order of the vector.
        numels: how many of their elements the vector holds.
        firsts: the first of these elements; None for whole parameters. A shard holds consecutive elements.
    Raises:
        ValueError: unequal lengths; a number below 0; an ordinal that is no 32-bit word.
    """
    firsts = [0] * len(numels) if firsts is None else firsts
    if not len(ordinals) == len(numels) == len(firsts):
        raise ValueError(f"ordinals, numels and firsts differ in length: {len(ordinals)}, {len(numels)}, {len(firsts)}")
    columns, start, blocks = [], 0, 0
    for ordinal, numel, first in zip(ordinals, numels, firsts, strict=True):
        if not 0 <= ordinal < 2**32 or numel < 0 or first < 0:
            raise ValueError(f"no segment of a parameter: ordinal {ordinal}, {numel} elements from element {first} on")
        if numel:
            columns.append((start, first, numel, ordinal, blocks))
            start += numel
            blocks += (first + numel - 1) // BLOCK - first // BLOCK + 1
    return torch.tensor(columns, dtype=torch.int64).view(-1, 5).T.contiguous().to(device)


def check_segments(segments: Tensor, length: int, device: torch.device) -> None:
    """Refuse what is no table of the segments of a vector.

    Raises:
        ValueError: it has another shape, dtype or device, or (seen on a CPU only) describes another number of elements.
    """
    if segments.ndim != 2 or segments.shape[0] != 5 or segments.dtype != torch.int64 or not segments.is_contiguous():
        raise ValueError(f"segments must be a table from segment_table, got {segments.dtype}, shape {tuple(segments.shape)}")
    if segments.device != device:
        raise ValueError(f"segments must be on {device}, where the vectors are, got {segments.device}")
    if device.type == "cpu" and (described := int(segments[2].sum())) != length:
        raise ValueError(f"the segments describe {described} elements, but the vectors have {length}")


def signed_key(key: int) -> int:
    """The 64 bits of ``key`` as the signed integer that an operator takes."""
    return (key + 2**63) % 2**64 - 2**63


def words(segments: Tensor, piece: slice, stream: int, key: int) -> tuple[Tensor, ...]:
    """The four words of every element of a piece, as int64: one call for however many parameters lie in it."""
    position = torch.arange(piece.start, piece.stop, device=segments.device)
    start, first, _, ordinal, _ = segments
    row = torch.searchsorted(start, position, right=True, out_int32=True) - 1
    element = position + (first - start).index_select(0, row)
    return _philox(element, ordinal.index_select(0, row), stream, key)


def grouped(segments: Tensor, piece: slice, stream: int, key: int, size: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """The four words of every ``size`` elements of a piece, and where each position finds itself among their elements.

    A group starts at a multiple of ``size`` within its parameter, so a segment may begin and end within one.
    """
    start, first, numel, ordinal, _ = segments
    before = torch.cumsum((first + numel - 1) // size - first // size + 1, 0)  # groups up to the end of each segment
    skipped = before - (first + numel - 1) // size - 1  # from a group's number in its parameter to that in the vector
    position = torch.arange(piece.start, piece.stop, device=segments.device)
    row = torch.searchsorted(start, position, right=True, out_int32=True) - 1
    element = position + (first - start).index_select(0, row)
    index = (element // size + skipped.index_select(0, row)) * size + element % size
    lowest, highest = index[[0, -1]].div(size, rounding_mode="floor").tolist()
    group = torch.arange(lowest, highest + 1, device=segments.device)
    row = torch.searchsorted(before, group, right=True, out_int32=True)
    return _philox(group - skipped.index_select(0, row), ordinal.index_select(0, row), stream, key), index - lowest * size


def _philox(number: Tensor, ordinal: Tensor, stream: int, key: int) -> tuple[Tensor, ...]:
    drawn = sampling.philox((number & 0xFFFFFFFF, number >> 32, stream, ordinal), key)
    return tuple(torch.as_tensor(word) for word in drawn)
