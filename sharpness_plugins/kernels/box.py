"""Steps inside a box ``|e_i| <= b_i``, each in one pass over the vectors, with what a solver wants to know about it.

The half widths are never stored: ``b_i = slope * |anchor_i| + offset`` is recomputed wherever it is read. Keskar's box has
the trained weights as anchor and ``slope = offset = epsilon``; explicit half widths are an anchor with slope 1, offset 0; a
uniform box has slope 0. Product and sum are rounded one after the other, so all implementations use the same box.

Vectors are contiguous, of shape ``(dim,)``, one dtype and device. Half precision is computed in float32. Scalars are
tensors of one element on that device, or numbers (a fill each). Nothing here waits for the device: statistics come back
as float64 tensors there, accurate to 1e-6.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import torch
from torch import Tensor

from . import vectors
from .dispatch import Operation

__all__ = [
    "ProjectedStatistic",
    "SecantStatistic",
    "VertexStatistic",
    "box_gap",
    "box_linear_step",
    "box_projected_step",
    "box_secant",
    "box_vertex_step",
]


SMALLEST_WIDTH = torch.finfo(torch.float32).tiny  # in divisions by half widths, so that a way of zero stays zero


class VertexStatistic(IntEnum):
    """Where a statistic of a step from y to the vertex v is found; g is the gradient, b are the half widths."""

    GAP = 0
    """``<g, v - y>``: what a linear function would gain; zero at a local maximum."""
    SLOPE = 1
    """``Σ b_i |g_i|``: the gain from the middle of the box."""
    SIGN_CHANGES = 2
    """Coordinates whose sign differs between y and v, zero being a sign of its own."""
    DISTANCE = 3
    """``‖v - y‖²``, of the whole way, not of the share taken."""
    NORM = 4
    """``‖·‖²`` of the result; for :func:`box_gap`, of y."""


class ProjectedStatistic(IntEnum):
    """Where a statistic of a projected step from y to the result is found."""

    ASCENT = 0
    """``<g, out - y>``."""
    DISTANCE_IN_BOX = 1
    """``Σ ((out_i - y_i) / b_i)²``, in half widths; coordinates of width zero, which cannot move, count nothing."""
    DISTANCE = 2
    """``‖out - y‖²``."""
    NORM = 3
    """``‖out‖²``."""


class SecantStatistic(IntEnum):
    """Where a statistic of a secant is found."""

    DISTANCE_IN_BOX = 0
    """``Σ (s_i / b_i)²`` of the step s, in half widths; coordinates of width zero, which cannot move, count nothing."""
    CURVATURE = 1
    """``<s, Δg>``, the same in any units: negative where f is concave along s."""


def box_vertex_step(
    out: Tensor,
    perturbation: Tensor,
    gradient: Tensor,
    anchor: Tensor,
    slope: Tensor | float,
    offset: Tensor | float,
    share: Tensor | float,
) -> Tensor:
    """Go the ``share`` of the way from ``perturbation`` to the vertex that maximizes the linear function of ``gradient``.

    The vertex is ``v = b·sign(g)``, and ``perturbation`` (y) where the gradient is zero. Writes ``v - (1 - share)(v - y)``:
    exactly v for share 1, and never outside the box for a share in [0, 1] from a point inside.
    Reads three vectors and writes one: 16 bytes per parameter in float32.

    Args:
        out: where to write; may be ``perturbation``.
    Returns:
        The statistics, shape ``(5,)``, float64, indexed by :class:`VertexStatistic`.
    Raises:
        ValueError: the vectors do not fit together.
    """
    vectors.check_vectors(out=out, perturbation=perturbation, gradient=gradient, anchor=anchor)
    slope, offset, share = (vectors.scalar(value, out) for value in (slope, offset, share))
    result: Tensor = _vertex_step(out, perturbation, gradient, anchor, slope, offset, share)
    return result


def box_gap(perturbation: Tensor, gradient: Tensor, anchor: Tensor, slope: Tensor | float, offset: Tensor | float) -> Tensor:
    """The statistics of :func:`box_vertex_step` without the step: 12 bytes per parameter in float32."""
    vectors.check_vectors(perturbation=perturbation, gradient=gradient, anchor=anchor)
    slope, offset = (vectors.scalar(value, anchor) for value in (slope, offset))
    result: Tensor = _gap(perturbation, gradient, anchor, slope, offset)
    return result


def box_linear_step(
    out: Tensor, gradient: Tensor, anchor: Tensor, slope: Tensor | float, offset: Tensor | float, fraction: Tensor | float
) -> Tensor:
    """Write ``fraction·b·z``, where ``z = clip(b·g / (2·mean|b·g|), -1, 1)``: a point that follows the gradient, no vertex.

    Zero for a zero gradient. The mean stays on the device. Two passes: 8 bytes per parameter, then 12, in float32.

    Returns:
        ``Σ b_i |g_i|``, shape ``()``, float64.
    Raises:
        ValueError: the vectors do not fit together.
    """
    vectors.check_vectors(out=out, gradient=gradient, anchor=anchor)
    slope, offset, fraction = (vectors.scalar(value, out) for value in (slope, offset, fraction))
    result: Tensor = _linear_step(out, gradient, anchor, slope, offset, fraction)
    return result


def box_projected_step(
    out: Tensor,
    perturbation: Tensor,
    previous: Tensor | None,
    gradient: Tensor,
    anchor: Tensor,
    slope: Tensor | float,
    offset: Tensor | float,
    length: Tensor | float,
    momentum: Tensor | float = 1.0,
    *,
    signed: bool,
) -> Tensor:
    """A projected gradient step, with the momentum of APGD.

    ``t = Π(y + length·d)`` with ``d = b·sign(g)`` if ``signed``, else ``d = b²·g``, which is the gradient in half widths;
    then ``Π(y + momentum·(t - y) + (1 - momentum)·(y - previous))``, exactly t for momentum 1. Π projects onto the box.
    Reads four vectors and writes one: 20 bytes per parameter in float32; 16 without ``previous``.

    Args:
        out: where to write; may be ``perturbation`` or ``previous``.
        previous: the point before ``perturbation``; None for no momentum, whatever ``momentum`` is.
    Returns:
        The statistics, shape ``(4,)``, float64, indexed by :class:`ProjectedStatistic`.
    Raises:
        ValueError: the vectors do not fit together.
    Source: Croce and Hein, Reliable evaluation of adversarial robustness (2020), Algorithm 1, with length per half width.
    """
    vectors.check_vectors(out=out, perturbation=perturbation, gradient=gradient, anchor=anchor)
    if previous is not None:
        vectors.check_vectors(out=out, previous=previous)
    slope, offset, length, momentum = (vectors.scalar(value, out) for value in (slope, offset, length, momentum))
    result: Tensor = _projected_step(out, perturbation, previous, gradient, anchor, slope, offset, length, momentum, signed)
    return result


def box_secant(
    step_from: Tensor,
    step_to: Tensor,
    gradient_from: Tensor,
    gradient_to: Tensor,
    anchor: Tensor,
    slope: Tensor | float,
    offset: Tensor | float,
) -> Tensor:
    """What a spectral (Barzilai–Borwein) step length is made of, for s = step_to - step_from and Δg likewise.

    Its length per half width is ``DISTANCE_IN_BOX / -CURVATURE``. One pass: 20 bytes per parameter in float32.

    Returns:
        Shape ``(2,)``, float64, indexed by :class:`SecantStatistic`.
    Raises:
        ValueError: the vectors do not fit together.
    Source: Birgin, Martínez and Raydan, Nonmonotone spectral projected gradient methods on convex sets (2000).
    """
    vectors.check_vectors(
        step_from=step_from, step_to=step_to, gradient_from=gradient_from, gradient_to=gradient_to, anchor=anchor
    )
    slope, offset = (vectors.scalar(value, anchor) for value in (slope, offset))
    result: Tensor = _secant(step_from, step_to, gradient_from, gradient_to, anchor, slope, offset)
    return result


# the references: plain torch, piece by piece


def _half_width(anchor: Tensor, slope: Tensor, offset: Tensor, out: Tensor) -> Tensor:
    return torch.abs(anchor, out=out).mul_(slope).add_(offset)


def _vertex_step_reference(
    out: Tensor | None,
    perturbation: Tensor,
    gradient: Tensor,
    anchor: Tensor,
    slope: Tensor,
    offset: Tensor,
    share: Tensor,
) -> Tensor:
    dtype, device = vectors.arithmetic_dtype(anchor.dtype), anchor.device
    sums = vectors.Sums(len(VertexStatistic), device)
    retained = 1 - share
    for piece, (vertex, other, buffer) in vectors.pieces_with_buffers(len(anchor), 3, dtype, device):
        y, g, a = (x[piece].to(dtype) for x in (perturbation, gradient, anchor))
        # by arithmetic, not by masks: on a CPU a comparison or a where takes as long as eight products
        sign = torch.sign(g, out=other)
        _half_width(a, slope, offset, out=vertex).mul_(sign)
        sums.add(VertexStatistic.SLOPE, vertex, g, buffer)
        stays = torch.addcmul(y, y, sign.abs_(), value=-1, out=other)
        vertex.add_(stays)  # exactly y where the gradient is zero, else exactly zero
        sums.count(VertexStatistic.SIGN_CHANGES, torch.sign(vertex, out=other).sub_(torch.sign(y, out=buffer)))
        way = torch.sub(vertex, y, out=other)
        sums.add(VertexStatistic.GAP, way, g, buffer)
        sums.add(VertexStatistic.DISTANCE, way, way, buffer)
        if out is not None:
            y = vertex.sub_(way.mul_(retained))
            out[piece].copy_(y)
        sums.add(VertexStatistic.NORM, y, y, buffer)
    return sums.totals()


def _gap_reference(perturbation: Tensor, gradient: Tensor, anchor: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    return _vertex_step_reference(None, perturbation, gradient, anchor, slope, offset, torch.zeros_like(slope))


def _linear_step_reference(
    out: Tensor, gradient: Tensor, anchor: Tensor, slope: Tensor, offset: Tensor, fraction: Tensor
) -> Tensor:
    dtype, device = vectors.arithmetic_dtype(anchor.dtype), anchor.device
    sums = vectors.Sums(1, device)
    for piece, (width, other) in vectors.pieces_with_buffers(len(anchor), 2, dtype, device):
        _half_width(anchor[piece].to(dtype), slope, offset, out=width)
        sums.add(0, width, torch.abs(gradient[piece].to(dtype), out=other), other)
    total = sums.totals()[0]
    # infinite for a zero gradient: then the largest number, which keeps zeros zero
    per_mean = (len(anchor) / (2 * total)).clamp(max=torch.finfo(dtype).max).to(dtype)
    for piece, (width, point) in vectors.pieces_with_buffers(len(anchor), 2, dtype, device):
        _half_width(anchor[piece].to(dtype), slope, offset, out=width)
        torch.mul(width, gradient[piece].to(dtype), out=point).mul_(per_mean).clamp_(-1, 1)
        out[piece].copy_(point.mul_(width).mul_(fraction))
    return total


def _projected_step_reference(
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
    dtype, device = vectors.arithmetic_dtype(anchor.dtype), anchor.device
    sums = vectors.Sums(len(ProjectedStatistic), device)
    retained = 1 - momentum
    for piece, (width, lowest, moved, way, buffer) in vectors.pieces_with_buffers(len(anchor), 5, dtype, device):
        y, g = perturbation[piece].to(dtype), gradient[piece].to(dtype)
        _half_width(anchor[piece].to(dtype), slope, offset, out=width)
        torch.neg(width, out=lowest)
        direction = torch.sign(g, out=moved) if signed else torch.mul(width, g, out=moved)
        direction.mul_(width).mul_(length).add_(y).clamp_(lowest, width)
        if previous is not None:
            turn = torch.sub(moved, y, out=way).sub_(torch.sub(y, previous[piece].to(dtype), out=buffer))
            moved.sub_(turn.mul_(retained)).clamp_(lowest, width)
        torch.sub(moved, y, out=way)
        out[piece].copy_(moved)
        sums.add(ProjectedStatistic.NORM, moved, moved, buffer)
        sums.add(ProjectedStatistic.ASCENT, way, g, buffer)
        sums.add(ProjectedStatistic.DISTANCE, way, way, buffer)
        way.div_(width.clamp_(min=SMALLEST_WIDTH))
        sums.add(ProjectedStatistic.DISTANCE_IN_BOX, way, way, buffer)
    return sums.totals()


def _secant_reference(
    step_from: Tensor,
    step_to: Tensor,
    gradient_from: Tensor,
    gradient_to: Tensor,
    anchor: Tensor,
    slope: Tensor,
    offset: Tensor,
) -> Tensor:
    dtype, device = vectors.arithmetic_dtype(anchor.dtype), anchor.device
    sums = vectors.Sums(len(SecantStatistic), device)
    for piece, (width, way, buffer) in vectors.pieces_with_buffers(len(anchor), 3, dtype, device):
        torch.sub(step_to[piece].to(dtype), step_from[piece].to(dtype), out=way)
        torch.sub(gradient_to[piece].to(dtype), gradient_from[piece].to(dtype), out=buffer)
        sums.add(SecantStatistic.CURVATURE, way, buffer, buffer)
        way.div_(_half_width(anchor[piece].to(dtype), slope, offset, out=width).clamp_(min=SMALLEST_WIDTH))
        sums.add(SecantStatistic.DISTANCE_IN_BOX, way, way, buffer)
    return sums.totals()


def _statistics(count: int) -> Callable[..., Tensor]:
    """A fake result: ``count`` statistics on the device of the vectors."""
    return lambda first, *args: first.new_empty((count,), dtype=torch.float64)


_vertex_step = Operation(
    "box_vertex_step",
    "(Tensor(a!) out, Tensor perturbation, Tensor gradient, Tensor anchor, Tensor slope, Tensor offset, Tensor share) "
    "-> Tensor",
    _vertex_step_reference,
    launcher="box_triton:box_vertex_step",
    mutates=("out",),
    overwrites=("out",),
    launches=2,
    fake=_statistics(len(VertexStatistic)),
)
_gap = Operation(
    "box_gap",
    "(Tensor perturbation, Tensor gradient, Tensor anchor, Tensor slope, Tensor offset) -> Tensor",
    _gap_reference,
    launcher="box_triton:box_gap",
    launches=2,
    fake=_statistics(len(VertexStatistic)),
)
_linear_step = Operation(
    "box_linear_step",
    "(Tensor(a!) out, Tensor gradient, Tensor anchor, Tensor slope, Tensor offset, Tensor fraction) -> Tensor",
    _linear_step_reference,
    launcher="box_triton:box_linear_step",
    mutates=("out",),
    overwrites=("out",),
    reads_twice=("gradient", "anchor"),
    launches=2,
    fake=lambda out, *args: out.new_empty((), dtype=torch.float64),
)
_projected_step = Operation(
    "box_projected_step",
    "(Tensor(a!) out, Tensor perturbation, Tensor? previous, Tensor gradient, Tensor anchor, Tensor slope, Tensor offset, "
    "Tensor length, Tensor momentum, bool signed) -> Tensor",
    _projected_step_reference,
    launcher="box_triton:box_projected_step",
    mutates=("out",),
    overwrites=("out",),
    launches=2,
    fake=_statistics(len(ProjectedStatistic)),
)
_secant = Operation(
    "box_secant",
    "(Tensor step_from, Tensor step_to, Tensor gradient_from, Tensor gradient_to, Tensor anchor, Tensor slope, "
    "Tensor offset) -> Tensor",
    _secant_reference,
    launcher="box_triton:box_secant",
    launches=2,
    fake=_statistics(len(SecantStatistic)),
)
