"""Models whose weights lie on several devices: those of ``fully_shard`` can be measured, others are refused by name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed
from .distributed import Ranks
from .memory import MemoryBudget, free_bytes, parse_bytes

__all__ = [
    "check_gathered",
    "check_supported",
    "fits_gathered",
    "forward_methods",
    "is_fully_sharded",
    "is_fully_sharded_itself",
    "reshard",
    "without_sharding",
]

_STATE = "FSDPState."
_INSTEAD = {
    "FullyShardedDataParallel": "shard with torch.distributed.fsdp.fully_shard (FSDP2), or load a full state dict into a "
    "plain copy of the model and measure that",
    "DeepSpeedEngine": "measure engine.module, where ZeRO's stage is 1 or 2; of stage 3, load the gathered weights "
    "(zero_to_fp32) into a plain copy of the model and measure that",
}


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to the model or a part of it."""
    return any(is_fully_sharded_itself(part) for part in module.modules())


def reshard(module: nn.Module) -> None:
    """Give every rank its part again of weights that a pass without a backward has left gathered.

    They would be those that ``fully_shard`` computes with, which its ``mp_policy`` may have rounded. The next pass gathers
    them again, also a backward pass that is still to come.
    """
    for part in module.modules():
        if is_fully_sharded_itself(part):
            part.reshard()  # type: ignore[operator]


def check_supported(module: nn.Module) -> None:
    """Raise where the weights are spread in a way that cannot be measured here.

    Raises:
        TypeError: FSDP1, DeepSpeed, tensor parallelism; says what to do.
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
    sharded = {id(tensor) for part in module.modules() if is_fully_sharded_itself(part) for tensor in part.parameters()}
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


def fits_gathered(module: nn.Module, memory: int | str | None, device: torch.device | None) -> bool:
    """Whether a rank has room for all of the weights, and for the vectors that solvers work with, in whole.

    Args:
        memory: what may be kept; None for what is free.
        device: where they would be; None for where the weights are.
    """
    parameters = list(module.parameters())
    spread = [parameter for parameter in parameters if distributed.is_spread(parameter)]
    if not spread:
        return True
    perturbed = sum(_bytes(parameter) for parameter in parameters if parameter.requires_grad)
    needed = sum(map(_bytes, parameters)) + (MemoryBudget.VECTORS - 1) * perturbed
    free = free_bytes(device or spread[0].device) if memory is None else parse_bytes(memory)
    return free is None or needed <= free


def _bytes(parameter: Tensor) -> int:
    return parameter.numel() * max(parameter.element_size(), 4)


def forward_methods(module: nn.Module) -> list[str]:
    """Names of methods that ``register_fsdp_forward_method`` has made gather the weights."""
    if not is_fully_sharded_itself(module):
        return []
    return [name for name, value in vars(module).items() if _is_wrapped(value)]


@contextlib.contextmanager
def without_sharding(modules: Iterable[nn.Module]) -> Iterator[None]:
    """The modules without the hooks of ``fully_shard``, which would put its own weights in the place of others.

    The weights that it holds stay as they are, sharded, and training goes on with them.

    Raises:
        RuntimeError: this version of torch does it in another way.
    """
    tables: list[tuple[Any, dict[Any, Any]]] = []
    methods: list[tuple[nn.Module, str, Any]] = []
    try:
        for module in modules:
            for name in forward_methods(module):
                methods.append((module, name, vars(module)[name]))
                del vars(module)[name]
            if not is_fully_sharded_itself(module) and not any(
                _is_of_sharding(hook) for hook in module._forward_hooks.values()
            ):
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
        for module, name, method in methods:
            vars(module)[name] = method


def is_fully_sharded_itself(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to the module."""
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def _is_wrapped(value: Any) -> bool:
    code = getattr(getattr(value, "__func__", None), "__code__", None)
    return code is not None and code.co_name == "wrapped_method" and "fsdp" in code.co_filename


def _is_of_sharding(hook: Any) -> bool:
    return str(getattr(hook, "__qualname__", "")).startswith(_STATE)
