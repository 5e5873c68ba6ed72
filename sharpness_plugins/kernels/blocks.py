"""What the Triton kernels on vectors share. Imports Triton: only other Triton files import this one.

A vector is cut into blocks of 8 kB (of the arithmetic's dtype). Whole blocks are read and written without a mask, which
would make every access scalar where the length is not a multiple of 16; the last, ragged block takes a branch of its own.
Sums leave a program as one float64 number each, in its own place, and are added up in an order that never changes.

Lengths are not specialized, so that a kernel is compiled once for all of them. Loops over blocks are ``while``: in Triton
3.6 the interpreter's ``range`` cannot count with its own numbers under NumPy 2.4.
"""

# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import vectors

__all__ = [
    "MAX_PARTIALS",
    "count",
    "dtype_of",
    "first_of",
    "keep_sum",
    "load",
    "partial_sums",
    "sign",
    "size",
    "store",
    "sum_of_partials",
]

BLOCK_BYTES = 2**13  # with 8 warps, two 128-bit accesses of a thread for each vector; with 2**14 box steps spill on sm_90
MAX_PARTIALS = 1024  # every program of the second pass adds them up: 8 kB, from cache

_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def dtype_of(x: Tensor) -> tl.dtype:
    """What the elements of ``x`` are computed in."""
    return _DTYPES[vectors.arithmetic_dtype(x.dtype)]


def size(x: Tensor) -> int:
    """Elements of a block of ``x``."""
    return BLOCK_BYTES // vectors.arithmetic_dtype(x.dtype).itemsize


def count(x: Tensor) -> int:
    """Blocks of ``x``, the ragged one included."""
    return -(-x.numel() // size(x))


def partial_sums(statistics: int, programs: int, device: torch.device) -> Tensor:
    """Room for the sums of each program, shape ``(statistics, programs)``, not filled."""
    return torch.empty((statistics, programs), dtype=torch.float64, device=device)


@triton.jit
def first_of(BLOCK: tl.constexpr):
    """The first element of this program's block."""
    return tl.program_id(0).to(tl.int64) * BLOCK


@triton.jit
def load(pointer, offsets, length, WHOLE: tl.constexpr, dtype: tl.constexpr):
    """Elements in the dtype of the arithmetic; zeros beyond the end of a block that is not WHOLE."""
    loaded = tl.load(pointer + offsets) if WHOLE else tl.load(pointer + offsets, mask=offsets < length, other=0.0)
    return loaded.to(dtype)


@triton.jit
def store(pointer, offsets, value, length, WHOLE: tl.constexpr):
    """The elements up to the end, in the dtype of the vector."""
    value = value.to(pointer.dtype.element_ty)
    if WHOLE:
        tl.store(pointer + offsets, value)
    else:
        tl.store(pointer + offsets, value, mask=offsets < length)


@triton.jit
def sign(x):
    """-1, 0 or 1; 0 for NaN, as torch has it."""
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def sum_of_partials(partials, num_partials, MAX_PARTIALS: tl.constexpr):
    """The sum of at most MAX_PARTIALS float64 numbers, in the same order in every program."""
    index = tl.arange(0, MAX_PARTIALS).to(tl.int64)
    return tl.sum(tl.load(partials + index, mask=index < num_partials, other=0.0))


@triton.jit
def keep_sum(partials, statistic: tl.constexpr, values):
    """This program's part of a statistic, into its place in an array of shape (statistics, programs)."""
    tl.store(partials + statistic * tl.num_programs(0) + tl.program_id(0), tl.sum(values).to(tl.float64))
