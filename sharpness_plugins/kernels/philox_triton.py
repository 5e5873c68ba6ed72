"""Philox4x32-10 in Triton, and where a program finds its elements. Imports Triton: only other Triton files import this one.

A program draws for one block of one segment, cut in the elements of its parameter rather than in positions of the vector:
so its counters are consecutive whatever the vector holds before. Positions are then aligned to nothing, and accesses are
masked and 32 bits wide; they are few beside the hundred instructions of a Philox call.
"""

# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .philox import BLOCK

__all__ = ["SEARCHED", "block_of", "drawn", "philox", "programs"]

SEARCHED = 256  # segments looked through at once


def programs(length: int, segments: Tensor, size: int = BLOCK) -> int:
    """At least as many as there are parts of ``size`` in the blocks, known without asking the device; the ones too many find
    nothing to do."""
    return (length // BLOCK + 2 * segments.shape[1]) * (BLOCK // size)


@triton.jit
def philox(c0, c1, c2, c3, key):
    """Four 32-bit words per counter of four, all uint32; ``key`` is one int64.

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011).
    """
    k0, k1 = (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def drawn(number, stream, ordinal, key):
    """The words of the elements, or groups of elements, of one parameter in one stream; ``number`` is int64."""
    low, high = (number & 0xFFFFFFFF).to(tl.uint32), (number >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    return philox(low, high, zero + tl.cast(stream, tl.uint32), zero + ordinal, tl.cast(key, tl.int64))


@triton.jit
def block_of(segments, num_segments, SIZE: tl.constexpr, BLOCK: tl.constexpr, SEARCHED: tl.constexpr):
    """What this program works on, one of the parts of SIZE elements of a block: the first of them, how far its position in
    the vector lies ahead of it, the range within the part that is in the segment (empty where the program is one too
    many), and the ordinal."""
    program = tl.program_id(0).to(tl.int64) // (BLOCK // SIZE)
    found = tl.zeros([], tl.int32)
    for lowest in range(0, num_segments, SEARCHED):
        index = lowest + tl.arange(0, SEARCHED)
        block = tl.load(segments + 4 * num_segments + index, mask=index < num_segments, other=2**62)
        found += tl.sum((block <= program).to(tl.int32))
    row = segments + (found - 1)
    start, first, numel = tl.load(row), tl.load(row + num_segments), tl.load(row + 2 * num_segments)
    ordinal, block = tl.load(row + 3 * num_segments), tl.load(row + 4 * num_segments)
    lowest = (first // BLOCK + program - block) * BLOCK + tl.program_id(0) % (BLOCK // SIZE) * SIZE
    low = tl.minimum(tl.maximum(first - lowest, 0), SIZE).to(tl.int32)
    high = tl.minimum(tl.maximum(first + numel - lowest, 0), SIZE).to(tl.int32)
    return lowest, start - first, low, high, ordinal.to(tl.uint32)
