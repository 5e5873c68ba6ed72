"""Sums over long vectors that keep their digits.

Measured: float32 ``torch.dot``, ``vector_norm`` and matrix-vector products on a CPU lose 3e-4 to 2.5e-3 at 1e7 elements and
up to 2 % at 1e8, enough to move the fourth digit of an eigenvalue while its residual looks like 1e-8. Short float32 sums
added up in float64 do not: the relative error stays at about 1e-7 at any length.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dot", "matvec", "norm", "total"]

_CHUNK = 4096
_BLOCK = 256 * _CHUNK  # bounds the temporary product, and stays in cache
_COLUMNS = 2**15  # per matrix-vector product on a CPU: 5e-8 measured on vectors without a change of sign, 4e-5 for 1e7
_COLUMNS_ELSEWHERE = 1024  # one batched product, whose threads may add up their columns one after the other


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


def matvec(rows: Tensor, vector: Tensor) -> Tensor:
    """``rows @ vector``, shapes ``(m, n)`` and ``(n,)`` to ``(m,)``, in float64 on their device.

    As many inner products, by short matrix products: the rows are read once, at the speed of memory.
    """
    if rows.device.type == "cpu":
        parts = zip(torch.split(rows, _COLUMNS, dim=1), torch.split(vector, _COLUMNS), strict=True)
        return torch.stack([part @ piece for part, piece in parts]).sum(dim=0, dtype=torch.float64)
    return _batched_matvec(rows, vector)


def _batched_matvec(rows: Tensor, vector: Tensor) -> Tensor:
    """The same in one launch, for devices on which a loop over columns would be all launches."""
    whole = vector.numel() - vector.numel() % _COLUMNS_ELSEWHERE
    parts = rows[:, :whole].reshape(len(rows), whole // _COLUMNS_ELSEWHERE, _COLUMNS_ELSEWHERE).transpose(0, 1)
    head = torch.bmm(parts, vector[:whole].view(-1, _COLUMNS_ELSEWHERE, 1)).squeeze(2).sum(dim=0, dtype=torch.float64)
    return head + (rows[:, whole:] @ vector[whole:]).double()
