"""Models whose weights are spread over ranks: of ``fully_shard`` they are measured, others are refused by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sharpness_plugins import distributed

__all__ = ["refuse_sharded", "sharded_by"]

_ENGINES = {"FullyShardedDataParallel": "FSDP1", "DeepSpeedEngine": "DeepSpeed"}


def refuse_sharded(model: nn.Module, what: str) -> None:
    """
    Args:
        what: cannot work, as the subject of the sentence.
    Raises:
        ValueError: ``model``, or a part of it, is sharded in another way than by ``fully_shard`` alone.
    """
    if (engine := sharded_by(model)) is not None:
        raise ValueError(sentence(engine, what))


def sentence(engine: str, what: str) -> str:
    return (
        f"{what} does not work with {engine}, under which every rank holds a part of the weights. Train in one process, "
        "with DistributedDataParallel or with fully_shard (FSDP2)"
    )


def sharded_by(model: nn.Module) -> str | None:
    """By the names of classes, so that nothing is imported to ask; None where weights are whole, or of ``fully_shard``."""
    by_fully_shard: set[int] = set()
    for module in model.modules():
        kinds = [kind.__name__ for kind in type(module).__mro__]
        for kind in kinds:
            if kind in _ENGINES:
                return _ENGINES[kind]
        if "FSDPModule" in kinds:
            by_fully_shard.update(map(id, module.parameters()))
    for parameter in model.parameters():
        if distributed.is_spread(parameter.data) and (id(parameter) not in by_fully_shard or _num_cuts(parameter.data) > 1):
            return "tensor parallelism (DTensor)"
    return None


def _num_cuts(tensor: Tensor) -> int:
    """Dimensions of the mesh along which it is not just repeated."""
    placements: Any = tensor.placements  # type: ignore[attr-defined]
    return sum(not placement.is_replicate() for placement in placements)
