"""The Triton kernels of :mod:`.noise`, and how they are started."""

# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import blocks, dispatch
from .noise import ANGLE, COSINE, LOG, LOG_2, LOWEST, NORMALS, QUADRANT, SIGNS, SINE, UNIT
from .philox import BLOCK
from .philox_triton import SEARCHED, block_of, drawn, programs

__all__ = ["perturb_normal", "perturb_rademacher"]

NORMALS_, SIGNS_ = tl.constexpr(NORMALS), tl.constexpr(SIGNS)
UNIT_, QUADRANT_, ANGLE_ = tl.constexpr(UNIT), tl.constexpr(QUADRANT), tl.constexpr(ANGLE)
LOG_2_, LOWEST_ = tl.constexpr(LOG_2), tl.constexpr(LOWEST)
S0, S1, S2 = (tl.constexpr(coefficient) for coefficient in SINE)
C0, C1, C2 = (tl.constexpr(coefficient) for coefficient in COSINE)
L0, L1, L2, L3, L4, L5, L6, L7 = (tl.constexpr(coefficient) for coefficient in LOG)


@triton.jit
def log(x):
    bits = x.to(tl.int32, bitcast=True) - LOWEST_
    f = ((bits & 0x7FFFFF) + LOWEST_).to(tl.float32, bitcast=True) - 1.0
    p = ((((((L7 * f + L6) * f + L5) * f + L4) * f + L3) * f + L2) * f + L1) * f + L0
    return p * f * f + f + (bits >> 23).to(tl.float32) * LOG_2_


@triton.jit
def on_circle(word):
    """A point of the unit circle per word: the quarter by the two highest bits, the angle in it by the next 22."""
    angle = ((word >> 8 & QUADRANT_ - 1).to(tl.int32) - QUADRANT_ // 2).to(tl.float32) * ANGLE_
    square = angle * angle
    sine = ((S2 * square + S1) * square + S0) * square * angle + angle
    cosine = ((C2 * square + C1) * square + C0) * square * square + square * -0.5 + 1.0
    swap, flip_sine = (word >> 30 & 1) != 0, (word >> 31) != 0
    turned_cosine, turned_sine = tl.where(swap, sine, cosine), tl.where(swap, cosine, sine)
    return tl.where(swap != flip_sine, -turned_cosine, turned_cosine), tl.where(flip_sine, -turned_sine, turned_sine)


@triton.jit
def pair(radius_word, angle_word):
    """Two normals of two words."""
    radius = tl.sqrt_rn(log((radius_word.to(tl.float32) + 0.5) * UNIT_) * -2.0)
    cosine, sine = on_circle(angle_word)
    return cosine * radius, sine * radius


@triton.jit
def finish(out, origin, noise, scale, start, low, high, MOVED: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = (at >= low) & (at < high)
    value = noise.to(dtype) * tl.load(scale)
    if MOVED:
        value += tl.load(origin + start + at, mask=inside).to(dtype)
    tl.store(out + start + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["stream", "key"])
def normal_kernel(
    out, origin, scale, segments, num_segments, stream, key,
    MOVED: tl.constexpr, BLOCK: tl.constexpr, SEARCHED: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    lowest, shift, low, high, ordinal = block_of(segments, num_segments, BLOCK, BLOCK, SEARCHED)
    group = lowest // NORMALS_ + tl.arange(0, BLOCK // NORMALS_)
    w0, w1, w2, w3 = drawn(group, stream, ordinal, key)
    z0, z1 = pair(w0, w1)
    z2, z3 = pair(w2, w3)
    noise = tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))
    finish(out, origin, noise, scale, lowest + shift, low, high, MOVED, BLOCK, dtype)


@triton.jit(do_not_specialize=["stream", "key"])
def rademacher_kernel(
    out, origin, scale, segments, num_segments, stream, key,
    MOVED: tl.constexpr, BLOCK: tl.constexpr, SEARCHED: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    lowest, shift, low, high, ordinal = block_of(segments, num_segments, BLOCK, BLOCK, SEARCHED)
    group = lowest // SIGNS_ + tl.arange(0, BLOCK // SIGNS_)
    w0, w1, w2, w3 = drawn(group, stream, ordinal, key)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    bits = words[:, None] >> tl.arange(0, 32).to(tl.uint32)[None, :] & 1
    noise = tl.reshape(tl.where(bits != 0, 1.0, -1.0), [BLOCK])
    finish(out, origin, noise, scale, lowest + shift, low, high, MOVED, BLOCK, dtype)


def perturb_normal(out: Tensor, origin: Tensor | None, scale: Tensor, segments: Tensor, stream: int, key: int) -> None:
    _start(normal_kernel, out, origin, scale, segments, stream, key)


def perturb_rademacher(out: Tensor, origin: Tensor | None, scale: Tensor, segments: Tensor, stream: int, key: int) -> None:
    _start(rademacher_kernel, out, origin, scale, segments, stream, key)


def _start(kernel: Any, out: Tensor, origin: Tensor | None, scale: Tensor, segments: Tensor, stream: int, key: int) -> None:
    dispatch.launch(
        kernel, programs(len(out), segments), out, out if origin is None else origin, scale, segments, segments.shape[1],
        stream, key, MOVED=origin is not None, BLOCK=BLOCK, SEARCHED=SEARCHED, dtype=blocks.dtype_of(out),
    )  # fmt: skip
