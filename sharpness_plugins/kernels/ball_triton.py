"""The Triton kernels of :mod:`.ball`, and how they are started."""

# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import blocks, dispatch
from .ball import BallStatistic
from .blocks import first_of, keep_sum, load, store, sum_of_partials

__all__ = ["ball_project_", "ball_step"]

GAP, SLOPE, DISTANCE, NORM = (tl.constexpr(int(i)) for i in BallStatistic)


@triton.jit
def squares_block(
    gradient, weight, length, block, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, dtype: tl.constexpr
):
    at = block * BLOCK + tl.arange(0, BLOCK)
    g = load(gradient, at, length, WHOLE, dtype)
    if WEIGHTED:
        g = g * load(weight, at, length, WHOLE, dtype)
    return g * g


@triton.jit(do_not_specialize=["length"])
def squares_kernel(gradient, weight, partials, length, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr):
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    whole = tl.cast(length, tl.int64) // BLOCK
    sums = tl.zeros([BLOCK], dtype)
    block = program
    while block < whole:
        sums += squares_block(gradient, weight, length, block, WEIGHTED, BLOCK, True, dtype)
        block += programs
    if program == programs - 1:
        sums += squares_block(gradient, weight, length, whole, WEIGHTED, BLOCK, False, dtype)
    tl.store(partials + program, tl.sum(sums).to(tl.float64))


@triton.jit
def step_block(
    out, perturbation, gradient, weight, scale, moves, retained, partials, length,
    WEIGHTED: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    at = first_of(BLOCK) + tl.arange(0, BLOCK)
    y = load(perturbation, at, length, WHOLE, dtype)
    g = load(gradient, at, length, WHOLE, dtype)
    vertex = g
    if WEIGHTED:
        t = load(weight, at, length, WHOLE, dtype)
        vertex = g * t * t
    vertex = tl.where(moves, vertex * scale, y)
    way = vertex - y
    keep_sum(partials, GAP, way * g)
    keep_sum(partials, DISTANCE, way * way)
    y = vertex - way * retained
    store(out, at, y, length, WHOLE)
    keep_sum(partials, NORM, y * y)


@triton.jit(do_not_specialize=["length", "num_squares"])
def step_kernel(
    out, perturbation, gradient, weight, rho, share, squares, num_squares, partials, length,
    WEIGHTED: tl.constexpr, MAX_PARTIALS: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    norm = tl.sqrt(sum_of_partials(squares, num_squares, MAX_PARTIALS))
    rho, retained = tl.load(rho).to(tl.float64), 1 - tl.load(share)
    moves = (norm > 0) & (norm < float("inf"))
    scale = (rho / norm).to(dtype)
    first = tl.program_id(0) == 0
    tl.store(partials + SLOPE * tl.num_programs(0) + tl.program_id(0), tl.where(first, rho * norm, 0.0))
    if first_of(BLOCK) + BLOCK <= length:
        step_block(
            out, perturbation, gradient, weight, scale, moves, retained, partials, length, WEIGHTED, BLOCK, True, dtype
        )
    else:
        step_block(
            out, perturbation, gradient, weight, scale, moves, retained, partials, length, WEIGHTED, BLOCK, False, dtype
        )


@triton.jit
def project_block(perturbation, scale, length, BLOCK: tl.constexpr, WHOLE: tl.constexpr, dtype: tl.constexpr):
    at = first_of(BLOCK) + tl.arange(0, BLOCK)
    store(perturbation, at, load(perturbation, at, length, WHOLE, dtype) * scale, length, WHOLE)


@triton.jit(do_not_specialize=["length", "num_squares"])
def project_kernel(
    perturbation, rho, squares, num_squares, norm, length,
    MAX_PARTIALS: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    size = tl.sqrt(sum_of_partials(squares, num_squares, MAX_PARTIALS))
    if tl.program_id(0) == 0:
        tl.store(norm, size)
    rho = tl.load(rho).to(tl.float64)
    scale = tl.where(size > rho, rho / size, 1.0).to(dtype)
    if first_of(BLOCK) + BLOCK <= length:
        project_block(perturbation, scale, length, BLOCK, True, dtype)
    else:
        project_block(perturbation, scale, length, BLOCK, False, dtype)


def _squares(gradient: Tensor, weight: Tensor | None) -> Tensor:
    """Partial sums of ``(T g)²``, at most ``MAX_PARTIALS``."""
    programs = min(blocks.count(gradient), blocks.MAX_PARTIALS)
    partials = blocks.partial_sums(1, programs, gradient.device)
    dispatch.launch(
        squares_kernel, programs, gradient, gradient if weight is None else weight, partials, len(gradient),
        WEIGHTED=weight is not None, BLOCK=blocks.size(gradient), dtype=blocks.dtype_of(gradient),
    )  # fmt: skip
    return partials[0]


def ball_step(
    out: Tensor,
    perturbation: Tensor,
    gradient: Tensor,
    weight: Tensor | None,
    rho: Tensor,
    share: Tensor,
    square: Tensor | None = None,
) -> Tensor:
    squares = _squares(gradient, weight) if square is None else square
    programs = blocks.count(gradient)
    partials = blocks.partial_sums(len(BallStatistic), programs, gradient.device)
    dispatch.launch(
        step_kernel, programs, out, perturbation, gradient, gradient if weight is None else weight, rho, share, squares,
        len(squares), partials, len(gradient),
        WEIGHTED=weight is not None, MAX_PARTIALS=blocks.MAX_PARTIALS, BLOCK=blocks.size(gradient),
        dtype=blocks.dtype_of(gradient),
    )  # fmt: skip
    return partials.sum(dim=1)


def ball_project_(perturbation: Tensor, rho: Tensor) -> Tensor:
    squares = _squares(perturbation, None)
    norm = squares.new_empty(()) if len(squares) else squares.new_zeros(())
    dispatch.launch(
        project_kernel, blocks.count(perturbation), perturbation, rho, squares, len(squares), norm, len(perturbation),
        MAX_PARTIALS=blocks.MAX_PARTIALS, BLOCK=blocks.size(perturbation), dtype=blocks.dtype_of(perturbation),
    )  # fmt: skip
    return norm
