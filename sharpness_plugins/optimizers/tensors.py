"""Lists of tensors as the optimizers see them: local, real, and summed over the ranks that share them out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import distributed
from ..kernels import sam

__all__ = ["Sums", "check_movable", "local", "poison"]


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of it, as real numbers, detached and, but for a lazy conjugate, in the same memory."""
    held = distributed.local_part(tensor.detach())
    return torch.view_as_real(held.resolve_conj()) if held.is_complex() else held


class Sums:
    """Sums over weights that ranks share out: by a device mesh, as their placements say, or by a process group.

    Args:
        weights: that the lists given to the methods are parallel to.
        group: of ranks that hold different weights each; None where all hold the same.
    """

    def __init__(self, weights: Sequence[Tensor], group: Any = None) -> None:
        self._parts: dict[tuple[Any, ...], list[int]] = {}
        if group is not None:  # a rank may have no weights, and takes part in the sum
            self._parts[(group,)] = list(range(len(weights)))
        else:
            for index, weight in enumerate(weights):
                self._parts.setdefault(distributed.shard_groups(weight), []).append(index)
        self._device = weights[0].device if weights else torch.device("cpu")

    @property
    def are_shared(self) -> bool:
        """Whether other ranks hold other weights."""
        return any(self._parts)

    def norm(
        self, tensors: Sequence[Tensor], weights: Sequence[Tensor] | None = None, *, eta: float | None = None
    ) -> Tensor:
        """As ``kernels.sam.global_norm``, over all ranks: at most one collective for each kind of placement."""
        if not self.are_shared:
            return sam.global_norm(tensors, weights, eta=eta).to(self._device)
        squares = [torch.zeros((), dtype=torch.float64, device=self._device)]
        for groups, indices in self._parts.items():
            given = None if weights is None else [weights[index] for index in indices]
            norm = sam.global_norm([tensors[index] for index in indices], given, eta=eta)
            squares.append(distributed.sum_over_shards(norm.to(self._device) ** 2, groups))
        return torch.stack(squares).sum().sqrt()

    def inner(self, tensors: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
        """The inner product, shape ``()``, float64."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for groups, indices in self._parts.items():
            products = [tensors[index] * others[index] for index in indices]
            terms = [total.new_zeros(()), *(product.sum(dtype=torch.float64).to(self._device) for product in products)]
            total = total + distributed.sum_over_shards(torch.stack(terms).sum(), groups)
        return total

    def are_finite(self, tensors: Sequence[Tensor]) -> bool:
        """Whether all numbers are, on all ranks. Waits for the device, once as a rule.

        A sum is finite only if its terms are. One that is not may have overflowed, so its terms are looked at then.
        """

        def suspects(count: Callable[[Tensor], Tensor], of: Callable[[Tensor], Tensor] = Tensor.double) -> float:
            total = torch.zeros((), dtype=torch.float64, device=self._device)
            for groups, indices in self._parts.items():
                found = [count(tensors[index]).to(self._device, torch.float64) for index in indices]
                mine = of(torch.stack(found)).sum(dtype=torch.float64) if found else torch.zeros_like(total)
                total = total + distributed.sum_over_shards(mine, groups)
            return float(total)

        def added_up(tensor: Tensor) -> Tensor:
            return tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))

        if suspects(added_up, lambda sums: ~torch.isfinite(sums)) == 0:
            return True
        return suspects(lambda tensor: (~torch.isfinite(tensor)).sum()) == 0


def check_movable(weights: Sequence[Tensor], gradients: Sequence[Tensor], rho: Sequence[float]) -> None:
    """Refuse weights that cannot be moved as they should.

    Raises:
        ValueError: a sparse gradient, or weights in half precision.
    """
    for gradient in gradients:
        if gradient.layout is not torch.strided:
            raise ValueError(f"a gradient is sparse ({gradient.layout}). Use dense gradients: Embedding(..., sparse=False)")
    half = [i for i, weight in enumerate(weights) if weight.dtype in (torch.float16, torch.bfloat16)]
    if half:
        dtype = weights[half[0]].dtype
        cosine, stuck = _rounding([weights[i] for i in half], [gradients[i] for i in half], max(rho[i] for i in half))
        raise ValueError(
            f"a parameter is {dtype}, too coarse for a step of this size: the move that would be made has a cosine of "
            f"{cosine:.3f} with the one intended, and {stuck:.0%} of the weights would not move. Keep the parameters in "
            "float32 and train under autocast."
        )


def _rounding(weights: Sequence[Tensor], gradients: Sequence[Tensor], rho: float) -> tuple[float, float]:
    """Of a SAM step in half precision: the cosine between move and intended move, and the share of weights that stay."""
    norm = sam.global_norm(gradients).float()
    intended = [gradient.float() * (rho / norm.to(gradient.device)) for gradient in gradients]
    moves = [(w.float() + d).to(w.dtype).float() - w.float() for w, d in zip(weights, intended, strict=True)]
    inner = sum(float((d * m).double().sum()) for d, m in zip(intended, moves, strict=True))
    lengths = float(sam.global_norm(intended)) * float(sam.global_norm(moves))
    stuck = sum(int((move == 0).sum()) for move in moves) / max(1, sum(move.numel() for move in moves))
    return (inner / lengths if lengths > 0 else 0.0), stuck


def poison(tensors: Sequence[Tensor], norm: Tensor) -> None:
    """Fill the smallest tensor with NaN if the norm is not finite, without asking whether it is."""
    filled = [tensor for tensor in tensors if tensor.numel()]
    if filled:
        smallest = min(filled, key=Tensor.numel)
        smallest.add_((norm * 0).to(smallest.device))
