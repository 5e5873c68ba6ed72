"""The Triton kernels of :mod:`.box`, and how they are started."""

# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import blocks, dispatch, vectors
from .blocks import first_of, keep_sum, load, sign, store, sum_of_partials
from .box import SMALLEST_WIDTH, ProjectedStatistic, SecantStatistic, VertexStatistic

__all__ = ["box_gap", "box_linear_step", "box_projected_step", "box_secant", "box_vertex_step"]

GAP, SLOPE, SIGN_CHANGES, VERTEX_DISTANCE, VERTEX_NORM = (tl.constexpr(int(i)) for i in VertexStatistic)
ASCENT, DISTANCE_IN_BOX, DISTANCE, NORM = (tl.constexpr(int(i)) for i in ProjectedStatistic)
SMALLEST = tl.constexpr(SMALLEST_WIDTH)
SECANT_IN_BOX, CURVATURE = (tl.constexpr(int(i)) for i in SecantStatistic)


@triton.jit
def half_width(anchor, slope, offset):
    return tl.abs(anchor) * slope + offset


@triton.jit
def clip(x, bound):
    """Into [-bound, bound]; NaN stays NaN, as torch has it."""
    x = tl.where(x > bound, bound, x)
    return tl.where(x < -bound, -bound, x)


@triton.jit
def in_widths(way, width):
    return way / tl.maximum(width, SMALLEST)


@triton.jit
def vertex_block(
    out, perturbation, gradient, anchor, slope, offset, retained, partials, length,
    WRITE: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    at = first_of(BLOCK) + tl.arange(0, BLOCK)
    y = load(perturbation, at, length, WHOLE, dtype)
    g = load(gradient, at, length, WHOLE, dtype)
    width = half_width(load(anchor, at, length, WHOLE, dtype), slope, offset)
    s = sign(g)
    vertex = width * s
    keep_sum(partials, SLOPE, vertex * g)
    vertex = tl.where(s == 0, y, vertex)
    keep_sum(partials, SIGN_CHANGES, (sign(vertex) != sign(y)).to(tl.float32))
    way = vertex - y
    keep_sum(partials, GAP, way * g)
    keep_sum(partials, VERTEX_DISTANCE, way * way)
    if WRITE:
        y = vertex - way * retained
        store(out, at, y, length, WHOLE)
    keep_sum(partials, VERTEX_NORM, y * y)


@triton.jit(do_not_specialize=["length"])
def vertex_kernel(
    out, perturbation, gradient, anchor, slope, offset, share, partials, length,
    WRITE: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    slope, offset, retained = tl.load(slope), tl.load(offset), 1 - tl.load(share)
    if first_of(BLOCK) + BLOCK <= length:
        vertex_block(
            out, perturbation, gradient, anchor, slope, offset, retained, partials, length, WRITE, BLOCK, True, dtype
        )
    else:
        vertex_block(
            out, perturbation, gradient, anchor, slope, offset, retained, partials, length, WRITE, BLOCK, False, dtype
        )


@triton.jit
def slope_block(
    gradient, anchor, slope, offset, length, block, BLOCK: tl.constexpr, WHOLE: tl.constexpr, dtype: tl.constexpr
):
    at = block * BLOCK + tl.arange(0, BLOCK)
    g = load(gradient, at, length, WHOLE, dtype)
    return half_width(load(anchor, at, length, WHOLE, dtype), slope, offset) * tl.abs(g)


@triton.jit(do_not_specialize=["length"])
def slope_kernel(gradient, anchor, slope, offset, partials, length, BLOCK: tl.constexpr, dtype: tl.constexpr):
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    slope, offset = tl.load(slope), tl.load(offset)
    whole = tl.cast(length, tl.int64) // BLOCK
    sums = tl.zeros([BLOCK], dtype)
    block = program
    while block < whole:
        sums += slope_block(gradient, anchor, slope, offset, length, block, BLOCK, True, dtype)
        block += programs
    if program == programs - 1:
        sums += slope_block(gradient, anchor, slope, offset, length, whole, BLOCK, False, dtype)
    tl.store(partials + program, tl.sum(sums).to(tl.float64))


@triton.jit
def linear_block(
    out, gradient, anchor, slope, offset, fraction, per_mean, length,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    at = first_of(BLOCK) + tl.arange(0, BLOCK)
    g = load(gradient, at, length, WHOLE, dtype)
    width = half_width(load(anchor, at, length, WHOLE, dtype), slope, offset)
    store(out, at, clip(width * g * per_mean, 1.0) * width * fraction, length, WHOLE)


@triton.jit(do_not_specialize=["length", "num_partials"])
def linear_kernel(
    out, gradient, anchor, slope, offset, fraction, partials, num_partials, total, length,
    LARGEST: tl.constexpr, MAX_PARTIALS: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    slope, offset, fraction = tl.load(slope), tl.load(offset), tl.load(fraction)
    sum_of_slopes = sum_of_partials(partials, num_partials, MAX_PARTIALS)
    if tl.program_id(0) == 0:
        tl.store(total, sum_of_slopes)
    per_mean = tl.cast(length, tl.float64) / (2 * sum_of_slopes)
    per_mean = tl.where(per_mean > LARGEST, LARGEST, per_mean).to(dtype)
    if first_of(BLOCK) + BLOCK <= length:
        linear_block(out, gradient, anchor, slope, offset, fraction, per_mean, length, BLOCK, True, dtype)
    else:
        linear_block(out, gradient, anchor, slope, offset, fraction, per_mean, length, BLOCK, False, dtype)


@triton.jit
def projected_block(
    out, perturbation, previous, gradient, anchor, slope, offset, step_length, retained, partials, length,
    SIGNED: tl.constexpr, MOMENTUM: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    at = first_of(BLOCK) + tl.arange(0, BLOCK)
    y = load(perturbation, at, length, WHOLE, dtype)
    g = load(gradient, at, length, WHOLE, dtype)
    width = half_width(load(anchor, at, length, WHOLE, dtype), slope, offset)
    direction = sign(g) * width if SIGNED else width * g * width
    moved = clip(direction * step_length + y, width)
    if MOMENTUM:
        turn = moved - y - (y - load(previous, at, length, WHOLE, dtype))
        moved = clip(moved - turn * retained, width)
    store(out, at, moved, length, WHOLE)
    way = moved - y
    keep_sum(partials, ASCENT, way * g)
    keep_sum(partials, DISTANCE, way * way)
    keep_sum(partials, NORM, moved * moved)
    way = in_widths(way, width)
    keep_sum(partials, DISTANCE_IN_BOX, way * way)


@triton.jit(do_not_specialize=["length"])
def projected_kernel(
    out, perturbation, previous, gradient, anchor, slope, offset, step_length, momentum, partials, length,
    SIGNED: tl.constexpr, MOMENTUM: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    slope, offset, step_length, retained = tl.load(slope), tl.load(offset), tl.load(step_length), 1 - tl.load(momentum)
    if first_of(BLOCK) + BLOCK <= length:
        projected_block(
            out, perturbation, previous, gradient, anchor, slope, offset, step_length, retained, partials, length,
            SIGNED, MOMENTUM, BLOCK, True, dtype,
        )  # fmt: skip
    else:
        projected_block(
            out, perturbation, previous, gradient, anchor, slope, offset, step_length, retained, partials, length,
            SIGNED, MOMENTUM, BLOCK, False, dtype,
        )  # fmt: skip


@triton.jit
def secant_block(
    step_from, step_to, gradient_from, gradient_to, anchor, slope, offset, partials, length,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    at = first_of(BLOCK) + tl.arange(0, BLOCK)
    width = half_width(load(anchor, at, length, WHOLE, dtype), slope, offset)
    way = load(step_to, at, length, WHOLE, dtype) - load(step_from, at, length, WHOLE, dtype)
    bent = load(gradient_to, at, length, WHOLE, dtype) - load(gradient_from, at, length, WHOLE, dtype)
    keep_sum(partials, CURVATURE, way * bent)
    way = in_widths(way, width)
    keep_sum(partials, SECANT_IN_BOX, way * way)


@triton.jit(do_not_specialize=["length"])
def secant_kernel(
    step_from, step_to, gradient_from, gradient_to, anchor, slope, offset, partials, length,
    BLOCK: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    slope, offset = tl.load(slope), tl.load(offset)
    if first_of(BLOCK) + BLOCK <= length:
        secant_block(
            step_from, step_to, gradient_from, gradient_to, anchor, slope, offset, partials, length, BLOCK, True, dtype
        )
    else:
        secant_block(
            step_from, step_to, gradient_from, gradient_to, anchor, slope, offset, partials, length, BLOCK, False, dtype
        )


def box_vertex_step(
    out: Tensor, perturbation: Tensor, gradient: Tensor, anchor: Tensor, slope: Tensor, offset: Tensor, share: Tensor
) -> Tensor:
    programs = blocks.count(anchor)
    partials = blocks.partial_sums(len(VertexStatistic), programs, anchor.device)
    dispatch.launch(
        vertex_kernel, programs, out, perturbation, gradient, anchor, slope, offset, share, partials, len(anchor),
        WRITE=True, BLOCK=blocks.size(anchor), dtype=blocks.dtype_of(anchor),
    )  # fmt: skip
    return partials.sum(dim=1)


def box_gap(perturbation: Tensor, gradient: Tensor, anchor: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    programs = blocks.count(anchor)
    partials = blocks.partial_sums(len(VertexStatistic), programs, anchor.device)
    dispatch.launch(
        vertex_kernel, programs, perturbation, perturbation, gradient, anchor, slope, offset, slope, partials, len(anchor),
        WRITE=False, BLOCK=blocks.size(anchor), dtype=blocks.dtype_of(anchor),
    )  # fmt: skip
    return partials.sum(dim=1)


def box_linear_step(
    out: Tensor, gradient: Tensor, anchor: Tensor, slope: Tensor, offset: Tensor, fraction: Tensor
) -> Tensor:
    programs = blocks.count(anchor)
    num_partials = min(programs, blocks.MAX_PARTIALS)
    partials = blocks.partial_sums(1, num_partials, anchor.device)
    total = partials.new_empty(()) if programs else partials.new_zeros(())
    settings = {"BLOCK": blocks.size(anchor), "dtype": blocks.dtype_of(anchor)}
    dispatch.launch(slope_kernel, num_partials, gradient, anchor, slope, offset, partials, len(anchor), **settings)
    dispatch.launch(
        linear_kernel, programs, out, gradient, anchor, slope, offset, fraction, partials, num_partials, total, len(anchor),
        LARGEST=torch.finfo(vectors.arithmetic_dtype(anchor.dtype)).max, MAX_PARTIALS=blocks.MAX_PARTIALS, **settings,
    )  # fmt: skip
    return total


def box_projected_step(
    out: Tensor,
    perturbation: Tensor,
    previous: Tensor | None,
    gradient: Tensor,
    anchor: Tensor,
    slope: Tensor,
    offset: Tensor,
    length: Tensor,
    momentum: Tensor,
    signed: bool,
) -> Tensor:
    programs = blocks.count(anchor)
    partials = blocks.partial_sums(len(ProjectedStatistic), programs, anchor.device)
    dispatch.launch(
        projected_kernel, programs, out, perturbation, perturbation if previous is None else previous, gradient, anchor,
        slope, offset, length, momentum, partials, len(anchor),
        SIGNED=signed, MOMENTUM=previous is not None, BLOCK=blocks.size(anchor), dtype=blocks.dtype_of(anchor),
    )  # fmt: skip
    return partials.sum(dim=1)


def box_secant(
    step_from: Tensor,
    step_to: Tensor,
    gradient_from: Tensor,
    gradient_to: Tensor,
    anchor: Tensor,
    slope: Tensor,
    offset: Tensor,
) -> Tensor:
    programs = blocks.count(anchor)
    partials = blocks.partial_sums(len(SecantStatistic), programs, anchor.device)
    dispatch.launch(
        secant_kernel, programs, step_from, step_to, gradient_from, gradient_to, anchor, slope, offset, partials,
        len(anchor), BLOCK=blocks.size(anchor), dtype=blocks.dtype_of(anchor),
    )  # fmt: skip
    return partials.sum(dim=1)
