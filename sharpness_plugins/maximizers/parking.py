"""Points that wait for their turn, small: a vertex of a box is its signs, a quarter of a byte per coordinate."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import vectors
from ..regions import Box, Region

__all__ = ["Parked", "from_tree", "park", "to_tree", "unpark"]

_WEIGHTS = (1, 2, 4, 8, 16, 32, 64, 128)


class _Signs(NamedTuple):
    """Bit planes of a vertex, coordinates that are zero included: 8 coordinates to a byte, the last one padded."""

    positive: Tensor
    negative: Tensor
    dtype: torch.dtype
    dim: int


Parked = _Signs | Tensor


def park(point: Tensor, region: Region) -> Parked:
    """The point, as signs where every coordinate is at a bound of a box or zero; else as it is."""
    if not isinstance(region, Box):
        return point
    dim = point.numel()
    planes = torch.zeros((2, -(-dim // 8)), dtype=torch.uint8, device=point.device)
    off = torch.zeros((), dtype=torch.int64, device=point.device)
    weights = torch.tensor(_WEIGHTS, dtype=torch.uint8, device=point.device)
    for piece in vectors.pieces(dim, point.device):  # whole bytes: the pieces are powers of two
        e, b = point[piece], region.half_width_of(piece)
        off += ((e.abs() != b) & (e != 0)).sum()
        for plane, side in zip(planes, (e > 0, e < 0), strict=True):
            bits = torch.nn.functional.pad(side.to(torch.uint8), (0, -len(side) % 8)).view(-1, 8)
            first = piece.start // 8
            plane[first : first + len(bits)] = (bits * weights).sum(1, dtype=torch.uint8)
    return point if off.item() else _Signs(planes[0], planes[1], point.dtype, dim)


def unpark(parked: Parked, region: Region) -> Tensor:
    """The point again, bit for bit."""
    if isinstance(parked, Tensor):
        return parked
    assert isinstance(region, Box)
    point = torch.empty(parked.dim, dtype=parked.dtype, device=parked.positive.device)
    shifts = torch.arange(8, dtype=torch.uint8, device=point.device)
    for piece in vectors.pieces(parked.dim, point.device):
        out = point[piece]
        codes = slice(piece.start // 8, -(-(piece.start + len(out)) // 8))
        sides = [(plane[codes, None] >> shifts & 1).flatten()[: len(out)] for plane in (parked.positive, parked.negative)]
        out.copy_(sides[0]).sub_(sides[1].to(point.dtype)).mul_(region.half_width_of(piece))
    return point


def to_tree(parked: Parked | None) -> Tensor | list[Tensor] | None:
    """As a state file keeps it."""
    return [parked.positive, parked.negative] if isinstance(parked, _Signs) else parked


def from_tree(tree: Tensor | list[Tensor] | None, like: Tensor) -> Parked | None:
    """The inverse; ``like`` has the dtype and number of coordinates of the point."""
    return _Signs(tree[0], tree[1], like.dtype, like.numel()) if isinstance(tree, list) else tree
