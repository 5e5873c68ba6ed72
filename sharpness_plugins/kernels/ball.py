"""Steps inside a ball ``‖e/T‖ <= rho``: a norm of the gradient over everything first, then one pass.

T is a vector of positive weights, ``|w| + eta`` for the adaptive ball of ASAM, or None for the Euclidean ball. Vectors,
scalars and statistics are as in :mod:`.box`. In float32 a norm below 1e-19 is zero, because its square is.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

from . import vectors
from .dispatch import Operation

__all__ = ["BallStatistic", "ball_project_", "ball_step"]


class BallStatistic(IntEnum):
    """Where a statistic of a step from y to the maximizer v of ``<g, ·>`` is found."""

    GAP = 0
    """``<g, v - y>``: what a linear function would gain; zero at a local maximum."""
    SLOPE = 1
    """``rho·‖Tg‖``: the gain from the middle of the ball."""
    DISTANCE = 2
    """``‖v - y‖²``, of the whole way, not of the share taken."""
    NORM = 3
    """``‖out‖²``."""


def ball_step(
    out: Tensor,
    perturbation: Tensor,
    gradient: Tensor,
    weight: Tensor | None,
    rho: Tensor | float,
    share: Tensor | float,
    square: Tensor | None = None,
) -> Tensor:
    """Go the ``share`` of the way from ``perturbation`` to ``v = rho·T²g / ‖Tg‖``, which maximizes ``<g, ·>`` in the ball.

    Where ``‖Tg‖`` is zero or not finite, v is ``perturbation``. Writes ``v - (1 - share)(v - y)``, exactly v for share 1.
    Two passes: 4 bytes per parameter, then 12, in float32; 4 more in each with ``weight``.

    Args:
        out: where to write; may be ``perturbation``.
        weight: T, positive; None for 1.
        square: ``‖Tg‖²``, one element, float64, where the vectors are parts of longer ones; then ``SLOPE`` is of the
            whole, the other statistics are of the part, and the first pass falls away.
    Returns:
        The statistics, shape ``(4,)``, float64, indexed by :class:`BallStatistic`.
    Raises:
        ValueError: the vectors do not fit together.
    """
    vectors.check_vectors(out=out, perturbation=perturbation, gradient=gradient)
    if weight is not None:
        vectors.check_vectors(out=out, weight=weight)
    rho, share = vectors.scalar(rho, out), vectors.scalar(share, out)
    square = None if square is None else square.detach().to(out.device, torch.float64).reshape(1)
    result: Tensor = _step(out, perturbation, gradient, weight, rho, share, square)
    return result


def ball_project_(perturbation: Tensor, rho: Tensor | float) -> Tensor:
    """Project onto the Euclidean ball in place: what is longer than ``rho`` is scaled to that length.

    Two passes: 4 bytes per parameter, then 8, in float32.

    Returns:
        The norm before, shape ``()``, float64.
    Raises:
        ValueError: ``perturbation`` is no contiguous vector.
    """
    vectors.check_vectors(perturbation=perturbation)
    result: Tensor = _project(perturbation, vectors.scalar(rho, perturbation))
    return result


def _norm(gradient: Tensor, weight: Tensor | None) -> Tensor:
    dtype, device = vectors.arithmetic_dtype(gradient.dtype), gradient.device
    sums = vectors.Sums(1, device)
    for piece, (buffer,) in vectors.pieces_with_buffers(len(gradient), 1, dtype, device):
        g = gradient[piece].to(dtype)
        if weight is not None:
            g = torch.mul(g, weight[piece].to(dtype), out=buffer)
        sums.add(0, g, g, buffer)
    return sums.totals()[0].sqrt()


def _step_reference(
    out: Tensor,
    perturbation: Tensor,
    gradient: Tensor,
    weight: Tensor | None,
    rho: Tensor,
    share: Tensor,
    square: Tensor | None = None,
) -> Tensor:
    dtype, device = vectors.arithmetic_dtype(gradient.dtype), gradient.device
    norm = _norm(gradient, weight) if square is None else square[0].sqrt()
    moves = (norm > 0).logical_and_(norm < math.inf)
    on_host = device.type == "cpu"  # where to ask costs nothing, and torch.where as much as eight products
    scale = (rho.double() / norm).to(dtype)
    retained = 1 - share
    sums = vectors.Sums(len(BallStatistic), device)
    for piece, (vertex, way, buffer) in vectors.pieces_with_buffers(len(gradient), 3, dtype, device):
        y, g = perturbation[piece].to(dtype), gradient[piece].to(dtype)
        if weight is None:
            torch.mul(g, scale, out=vertex)
        else:
            t = weight[piece].to(dtype)
            torch.mul(g, t, out=vertex).mul_(t).mul_(scale)
        if not on_host:
            torch.where(moves, vertex, y, out=vertex)
        elif not moves.item():
            vertex.copy_(y)
        torch.sub(vertex, y, out=way)
        sums.add(BallStatistic.GAP, way, g, buffer)
        sums.add(BallStatistic.DISTANCE, way, way, buffer)
        y = vertex.sub_(way.mul_(retained))
        out[piece].copy_(y)
        sums.add(BallStatistic.NORM, y, y, buffer)
    statistics = sums.totals()
    statistics[BallStatistic.SLOPE] = rho.double() * norm
    return statistics


def _project_reference(perturbation: Tensor, rho: Tensor) -> Tensor:
    dtype, device = vectors.arithmetic_dtype(perturbation.dtype), perturbation.device
    norm = _norm(perturbation, None)
    scale = torch.where(norm > rho, rho.double() / norm, torch.ones_like(norm)).to(dtype)
    for piece, (buffer,) in vectors.pieces_with_buffers(len(perturbation), 1, dtype, device):
        perturbation[piece].copy_(torch.mul(perturbation[piece].to(dtype), scale, out=buffer))
    return norm


_step = Operation(
    "ball_step",
    "(Tensor(a!) out, Tensor perturbation, Tensor gradient, Tensor? weight, Tensor rho, Tensor share, "
    "Tensor? square=None) -> Tensor",
    _step_reference,
    launcher="ball_triton:ball_step",
    mutates=("out",),
    overwrites=("out",),
    reads_twice=("gradient", "weight"),
    launches=3,
    fake=lambda out, *args: out.new_empty((len(BallStatistic),), dtype=torch.float64),
)
_project = Operation(
    "ball_project_",
    "(Tensor(a!) perturbation, Tensor rho) -> Tensor",
    _project_reference,
    launcher="ball_triton:ball_project_",
    mutates=("perturbation",),
    reads_twice=("perturbation",),
    launches=2,
    fake=lambda perturbation, rho: perturbation.new_empty((), dtype=torch.float64),
)
