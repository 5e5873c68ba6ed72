"""Sums over long vectors that keep their digits.

Measured: float32 ``torch.dot`` and ``vector_norm`` on a CPU lose 3e-4 at 1e7 elements and up to 2 % at 1e8, enough to
move the fourth digit of an eigenvalue while its residual looks like 1e-8. Short float32 sums added up in float64 do not.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dot", "norm", "total"]

_CHUNK = 4096
_BLOCK = 256 * _CHUNK  # bounds the temporary product, and stays in cache


def _partial_sums(x: Tensor) -> Tensor:
    whole = x.numel() - x.numel() % _CHUNK
    head = x[:whole].view(-1, _CHUNK).sum(dim=1).sum(dtype=torch.float64)
    return head + x[whole:].sum(dtype=torch.float64)


def total(x: Tensor) -> Tensor:
    """Sum of a vector of shape ``(n,)``, as a 0-dim float64 tensor on its device; relative error about 1e-7."""
    return torch.stack([_partial_sums(block) for block in torch.split(x, _BLOCK)]).sum()


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner product of two vectors of shape ``(n,)``, as a 0-dim float64 tensor on their device."""
    blocks = zip(torch.split(x, _BLOCK), torch.split(y, _BLOCK), strict=True)
    return torch.stack([_partial_sums(a * b) for a, b in blocks]).sum()


def norm(x: Tensor) -> Tensor:
    """Euclidean norm of a vector of shape ``(n,)``, as a 0-dim float64 tensor on its device."""
    return dot(x, x).sqrt()
