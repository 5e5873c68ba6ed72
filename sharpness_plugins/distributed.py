"""Ranks: how many there are, and what rank 0 decided. The only file that talks to torch.distributed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed
from torch import Tensor

__all__ = [
    "from_rank_zero",
    "local_part",
    "mean_over_ranks",
    "on_every_rank",
    "rank",
    "shard_groups",
    "sum_of",
    "sum_over_ranks",
    "sum_over_shards",
    "world_size",
]


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


def sum_over_ranks(tensor: Tensor, group: Any = None) -> Tensor:
    """The sum over all ranks, which must all call it with the same shape and dtype; ``tensor`` itself stays."""
    if world_size() == 1:
        return tensor
    total = tensor.clone()
    torch.distributed.all_reduce(total, group=group)
    return total


def mean_over_ranks(tensors: Sequence[Tensor], group: Any = None) -> list[Tensor]:
    """The means over all ranks of each, by one collective for each dtype and device; the tensors themselves stay."""
    made = list(tensors)
    kinds: dict[tuple[Any, Any], list[int]] = {}
    for index, tensor in enumerate(tensors):
        kinds.setdefault((tensor.device, tensor.dtype), []).append(index)
    for indices in kinds.values():
        flat = torch.cat([tensors[index].reshape(-1) for index in indices])
        mean = sum_over_ranks(flat, group) / torch.distributed.get_world_size(group)
        for index, part in zip(indices, torch.split(mean, [tensors[index].numel() for index in indices]), strict=True):
            made[index] = part.view(tensors[index].shape)
    return made


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a ``DTensor``, in the same memory; any other tensor itself."""
    return tensor.to_local() if _is_distributed(tensor) else tensor  # type: ignore[attr-defined]


def shard_groups(tensor: Tensor) -> tuple[Any, ...]:
    """The process groups over which a ``DTensor`` is cut in pieces; none for any other tensor.

    Raises:
        ValueError: its pieces are not parts, but terms of a sum.
    """
    if not _is_distributed(tensor):
        return ()
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    if any(placement.is_partial() for placement in placements):
        raise ValueError(f"a tensor is the sum of what its ranks hold ({placements}): redistribute it first")
    return tuple(mesh.get_group(dim) for dim, placement in enumerate(placements) if placement.is_shard())


def sum_over_shards(tensor: Tensor, groups: Sequence[Any]) -> Tensor:
    """The sum over all pieces, by one collective for each group; ``tensor`` itself stays."""
    total = tensor.clone() if groups else tensor
    for group in groups:
        torch.distributed.all_reduce(total, group=group)
    return total


def _is_distributed(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


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
