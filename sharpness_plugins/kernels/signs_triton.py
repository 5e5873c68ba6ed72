"""The Triton kernels of :mod:`.signs`, and how they are started."""

# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import blocks, dispatch, vectors
from .philox import BLOCK
from .philox_triton import SEARCHED, block_of, drawn, programs
from .signs import num_bytes

__all__ = ["LIFTED_BYTES", "RESTRICTED_BYTES", "lift", "pack", "restrict"]

LIFTED_BYTES = 2 * BLOCK  # of a program whose threads take 8 elements each: float64 spills with 8 warps, or with 16 elements
RESTRICTED_BYTES = 4 * BLOCK  # here the sum over the threads of a program is shared by 16 elements of each


@triton.jit
def shifted(w0, w1, w2, w3):
    """128 bits moved down by 16: a loop can then take the same 16 bits every time."""
    return (w0 >> 16) | (w1 << 16), (w1 >> 16) | (w2 << 16), (w2 >> 16) | (w3 << 16), w3 >> 16


@triton.jit
def read(packed, code, start, at, inside, length, NUM_BYTES: tl.constexpr):
    """Code number ``code`` of each element, from a row of 16 bits or, at the end of an odd number of bytes, of 8."""
    row = packed + 2 * tl.cast(code, tl.int64) * length
    if 2 * code + 1 == NUM_BYTES:
        bits = tl.load(row + start + at, mask=inside, other=0).to(tl.uint32)
    else:
        bits = tl.load(row.to(tl.pointer_type(tl.uint16)) + start + at, mask=inside, other=0).to(tl.uint32)
    return bits


@triton.jit
def sum_of_columns(bits, coefficients):
    """``Σ ± y_c`` of 16 columns."""
    y = tl.load(coefficients)
    total = tl.where((bits & 1) != 0, y, -y)
    for column in tl.static_range(1, 16):
        y = tl.load(coefficients + column)
        total += tl.where((bits & (1 << column)) != 0, y, -y)
    return total


@triton.jit
def sums_of_elements(bits, g, sums):
    """``Σ ± g_i`` in each of 16 columns; what is beyond the end is zero."""
    for column in tl.static_range(16):
        tl.store(sums + column, tl.sum(tl.where((bits & (1 << column)) != 0, g, -g)))


@triton.jit(do_not_specialize=["key"])
def pack_kernel(
    packed, segments, num_segments, length, key,
    NUM_BYTES: tl.constexpr, BLOCK: tl.constexpr, SEARCHED: tl.constexpr,
):  # fmt: skip
    lowest, shift, low, high, ordinal = block_of(segments, num_segments, BLOCK, BLOCK, SEARCHED)
    at = tl.arange(0, BLOCK)
    inside, start = (at >= low) & (at < high), lowest + shift
    for block in range((NUM_BYTES + 15) // 16):
        w0, w1, w2, w3 = drawn(lowest + at, block, ordinal, key)
        for code in range(8 * block, min(8 * block + 8, (NUM_BYTES + 1) // 2)):
            row = packed + 2 * tl.cast(code, tl.int64) * length
            if 2 * code + 1 == NUM_BYTES:
                tl.store(row + start + at, w0.to(tl.uint8), mask=inside)
            else:
                tl.store(row.to(tl.pointer_type(tl.uint16)) + start + at, w0.to(tl.uint16), mask=inside)
            w0, w1, w2, w3 = shifted(w0, w1, w2, w3)


@triton.jit(do_not_specialize=["key"])
def lift_kernel(
    out, origin, coefficients, packed, segments, num_segments, length, key,
    NUM_BYTES: tl.constexpr, MOVED: tl.constexpr, PACKED: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    SEARCHED: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    lowest, shift, low, high, ordinal = block_of(segments, num_segments, SIZE, BLOCK, SEARCHED)
    at = tl.arange(0, SIZE)
    inside, start = (at >= low) & (at < high), lowest + shift
    total = tl.zeros([SIZE], dtype)
    if PACKED:
        for code in range((NUM_BYTES + 1) // 2):
            total += sum_of_columns(read(packed, code, start, at, inside, length, NUM_BYTES), coefficients + 16 * code)
    else:
        for block in range((NUM_BYTES + 15) // 16):
            w0, w1, w2, w3 = drawn(lowest + at, block, ordinal, key)
            for code in range(8 * block, min(8 * block + 8, (NUM_BYTES + 1) // 2)):
                total += sum_of_columns(w0, coefficients + 16 * code)
                w0, w1, w2, w3 = shifted(w0, w1, w2, w3)
    if MOVED:
        total += tl.load(origin + start + at, mask=inside).to(dtype)
    tl.store(out + start + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["key"])
def restrict_kernel(
    sums, vector, packed, segments, num_segments, length, key,
    NUM_BYTES: tl.constexpr, PACKED: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, SEARCHED: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    lowest, shift, low, high, ordinal = block_of(segments, num_segments, SIZE, BLOCK, SEARCHED)
    at = tl.arange(0, SIZE)
    inside, start = (at >= low) & (at < high), lowest + shift
    g = tl.load(vector + start + at, mask=inside, other=0.0).to(dtype)
    sums += tl.program_id(0).to(tl.int64) * (16 * ((NUM_BYTES + 1) // 2))
    if PACKED:
        for code in range((NUM_BYTES + 1) // 2):
            sums_of_elements(read(packed, code, start, at, inside, length, NUM_BYTES), g, sums + 16 * code)
    else:
        for block in range((NUM_BYTES + 15) // 16):
            w0, w1, w2, w3 = drawn(lowest + at, block, ordinal, key)
            for code in range(8 * block, min(8 * block + 8, (NUM_BYTES + 1) // 2)):
                sums_of_elements(w0, g, sums + 16 * code)
                w0, w1, w2, w3 = shifted(w0, w1, w2, w3)


def pack(packed: Tensor, segments: Tensor, key: int, columns: int) -> None:
    size = num_bytes(columns)
    length = packed.numel() // size
    dispatch.launch(
        pack_kernel, programs(length, segments), packed, segments, segments.shape[1], length, key,
        NUM_BYTES=size, BLOCK=BLOCK, SEARCHED=SEARCHED,
    )  # fmt: skip


def lift(
    out: Tensor, origin: Tensor | None, coefficients: Tensor, packed: Tensor | None, segments: Tensor, key: int
) -> None:
    size, dtype = num_bytes(len(coefficients)), vectors.arithmetic_dtype(out.dtype)
    part = LIFTED_BYTES // dtype.itemsize
    padded = torch.zeros(16 * ((size + 1) // 2), dtype=dtype, device=out.device)
    padded[: len(coefficients)] = coefficients
    dispatch.launch(
        lift_kernel, programs(len(out), segments, part), out, out if origin is None else origin, padded,
        segments if packed is None else packed, segments, segments.shape[1], len(out), key,
        NUM_BYTES=size, MOVED=origin is not None, PACKED=packed is not None, SIZE=part, BLOCK=BLOCK, SEARCHED=SEARCHED,
        dtype=blocks.dtype_of(out), num_warps=part // 256,
    )  # fmt: skip


def restrict(vector: Tensor, packed: Tensor | None, segments: Tensor, key: int, columns: int) -> Tensor:
    size, dtype = num_bytes(columns), vectors.arithmetic_dtype(vector.dtype)
    part = RESTRICTED_BYTES // dtype.itemsize
    count = programs(len(vector), segments, part)
    sums = torch.empty((count, 16 * ((size + 1) // 2)), dtype=dtype, device=vector.device)
    dispatch.launch(
        restrict_kernel, count, sums, vector, segments if packed is None else packed, segments, segments.shape[1],
        len(vector), key,
        NUM_BYTES=size, PACKED=packed is not None, SIZE=part, BLOCK=BLOCK, SEARCHED=SEARCHED,
        dtype=blocks.dtype_of(vector),
    )  # fmt: skip
    return sums.sum(0, dtype=torch.float64)[:columns].clone()
