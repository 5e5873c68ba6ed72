"""Models whose weights lie on several devices: of ``fully_shard`` they are gathered, others are refused by name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from . import distributed
from .distributed import Ranks
from .memory import free_bytes

__all__ = ["check_gathered", "check_supported", "is_fully_sharded", "without_sharding"]

_STATE = "FSDPState."
_INSTEAD = {
    "FullyShardedDataParallel": "shard with torch.distributed.fsdp.fully_shard (FSDP2), or load a full state dict into a "
    "plain copy of the model and measure that",
    "DeepSpeedEngine": "measure engine.module, where ZeRO's stage is 1 or 2; of stage 3, load the gathered weights "
    "(zero_to_fp32) into a plain copy of the model and measure that",
}


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to the model or a part of it."""
    return any(_is_fully_sharded(part) for part in module.modules())


def check_supported(module: nn.Module) -> None:
    """Raise where the weights are spread in a way that cannot be measured here, or do not fit in memory when gathered.

    Raises:
        TypeError: FSDP1, DeepSpeed, tensor parallelism; says what to do.
        MemoryError: the gathered weights take more than is free.
    """
    for part in module.modules():
        for kind in type(part).__mro__:
            if kind.__name__ in _INSTEAD:
                raise TypeError(f"a model inside {kind.__name__} cannot be measured here: {_INSTEAD[kind.__name__]}")
    spread = {name: tensor for name, tensor in module.named_parameters() if distributed.is_spread(tensor)}
    for name, parameter in module.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise TypeError(f"parameter {name!r} is partitioned by DeepSpeed: {_INSTEAD['DeepSpeedEngine']}")
    if not spread:
        return
    sharded = {id(tensor) for part in module.modules() if _is_fully_sharded(part) for tensor in part.parameters()}
    for name, tensor in spread.items():
        placements: Any = getattr(tensor, "placements", ())
        kinds = [type(placement).__name__ for placement in placements]
        if (
            id(tensor) not in sharded
            or kinds.count("Shard") + kinds.count("Replicate") < len(kinds)
            or kinds.count("Shard") > 1
        ):
            raise TypeError(
                f"parameter {name!r} is a distributed tensor placed as {tuple(placements)}, as tensor parallelism does, and "
                "only weights sharded by fully_shard alone can be measured here: gather them (parameter.full_tensor()) into "
                "a plain copy of the model and measure that"
            )
    _check_room(list(spread.values()))


def check_gathered(module: nn.Module, ranks: Ranks) -> None:
    """Raise where a process holds pieces of the weights and does not measure: it would not come when they are gathered.

    Raises:
        ValueError: names the ranks.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if missing := ranks.missing_of(tensor):
            those = "ranks='alone'" if ranks.is_alone else f"ranks {ranks.members}"
            raise ValueError(
                f"the weights are sharded over the ranks, so {those} cannot measure them without ranks {missing}, which "
                "hold pieces of them. Measure on all ranks that the model is sharded over."
            )


def _check_room(tensors: list[Tensor]) -> None:
    needed, device = 2 * sum(4 * tensor.numel() for tensor in tensors), tensors[0].device  # parts, and all in one
    free = free_bytes(device)
    if free is not None and needed > free:
        raise MemoryError(
            f"the weights are sharded, and every rank measures on all of them, which takes {needed / 2**30:.2f} GiB while "
            f"they are gathered, and {free / 2**30:.2f} GiB are free on {device}. Pass device='cpu', or use larger devices."
        )


@contextlib.contextmanager
def without_sharding(modules: Iterable[nn.Module]) -> Iterator[None]:
    """The modules without the hooks of ``fully_shard``, which would put its own weights in the place of others.

    The weights that it holds stay as they are, sharded, and training goes on with them.

    Raises:
        RuntimeError: this version of torch does it in another way.
    """
    tables: list[tuple[Any, dict[Any, Any]]] = []
    try:
        for module in modules:
            if not _is_fully_sharded(module) and not any(_is_of_sharding(hook) for hook in module._forward_hooks.values()):
                continue
            for table in (module._forward_pre_hooks, module._forward_hooks):
                tables.append((table, dict(table)))
                for key in [key for key, hook in table.items() if _is_of_sharding(hook)]:
                    del table[key]
        if tables and not any(len(table) < len(before) for table, before in tables):
            raise RuntimeError(
                "this version of torch does not run fully_shard by the hooks that are known here. Load a full state dict "
                "into a plain copy of the model and measure that."
            )
        yield
    finally:
        for table, before in tables:
            table.clear()
            table.update(before)


def _is_fully_sharded(module: nn.Module) -> bool:
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def _is_of_sharding(hook: Any) -> bool:
    return str(getattr(hook, "__qualname__", "")).startswith(_STATE)
