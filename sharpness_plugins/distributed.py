"""Ranks: how many there are, and what rank 0 decided. The only file that talks to torch.distributed."""

from __future__ import annotations

from typing import Any

import torch.distributed
from torch import Tensor

__all__ = ["from_rank_zero", "on_every_rank", "rank", "sum_of", "sum_over_ranks", "world_size"]


def _is_running() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    """This process's, 0 where there is only one."""
    return torch.distributed.get_rank() if _is_running() else 0


def world_size() -> int:
    """Processes that train together, 1 where none were started."""
    return torch.distributed.get_world_size() if _is_running() else 1


def from_rank_zero(value: Any) -> Any:
    """Rank 0's ``value``, small and picklable, on every rank. Collective: every rank must call it."""
    if world_size() == 1:
        return value
    box = [value if rank() == 0 else None]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum over all ranks, which must all call it with the same shape and dtype; ``tensor`` itself stays."""
    if world_size() == 1:
        return tensor
    total = tensor.clone()
    torch.distributed.all_reduce(total)
    return total


def sum_of(number: float) -> float:
    """The sum of a number over all ranks, in float64."""
    return _reduced(number) if world_size() > 1 else number


def on_every_rank(holds: bool) -> bool:
    """Whether it holds on all of them."""
    return sum_of(float(holds)) == world_size()


def _reduced(number: float) -> float:
    on_accelerator = torch.distributed.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_accelerator else torch.device("cpu")
    return sum_over_ranks(torch.tensor(number, dtype=torch.float64, device=device)).item()
