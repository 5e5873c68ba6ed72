"""Parameters of which each rank holds a shard, and the modules that need them together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import distributed, sharded
from .distributed import Ranks
from .layout import Layout, Shards
from .space import ParameterSpace, Select, full_dtype

__all__ = ["ShardedSpace", "Slot", "Unit"]


class Slot(NamedTuple):
    """Where a module looks up a parameter."""

    module: nn.Module
    attribute: str
    name: str  # of the parameter: the first of its names
    parameter: nn.Parameter


class Unit(NamedTuple):
    """A module whose parameters are gathered together: those of its own and of what is inside of it, other units left out.

    Attributes:
        slots: where they are looked up.
        selected: positions of perturbed parameters in the space.
        constants: names of the others that lie in shards.
    """

    module: nn.Module
    slots: list[Slot]
    selected: list[int]
    constants: list[str]


class ShardedSpace(ParameterSpace):
    """As ``ParameterSpace``, but every rank holds an equal part of each parameter's entries, one after the other.

    That holds for the parameters that ``fully_shard`` has spread, however it has, for all selected ones, and for the
    vectors. Buffers, and parameters that neither are spread nor selected, lie on every rank.

    Args:
        ranks: those that the parameters are spread over.
    Attributes:
        replicas: of each selected parameter what the model holds of it here, and where that lies among the shards: those of
            the same place must be the same on every rank.
        own_constants: shards of the spread parameters that are not selected, by name.
    """

    def __init__(self, model: nn.Module, select: Select = None, *, device: torch.device | None = None, ranks: Ranks) -> None:
        self._ranks = ranks
        self.own_constants: dict[str, Tensor] = {}
        self._constant_shapes: dict[str, torch.Size] = {}
        super().__init__(model, select, device=device)
        self.units = self._units(model)
        self.replicas = self._replicas(model)

    def width(self, numel: int) -> int:
        """Entries of a parameter of so many on the ranks that have most of it."""
        return -(-numel // self._ranks.size)

    def whole_constants(self) -> list[Tensor]:
        """Of the constants that lie in shards, tensors of their whole shapes and of their dtypes, without numbers."""
        return [own.new_empty(self._constant_shapes[name], device="meta") for name, own in self.own_constants.items()]

    def shape_of(self, name: str) -> torch.Size:
        """Of a whole constant that lies in shards."""
        return self._constant_shapes[name]

    def convert(self, whole: Tensor, position: int) -> Tensor:
        """A whole selected parameter in its own dtype."""
        return whole.to(self._dtypes[position])

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """None: a module's parameters are whole only while it computes."""
        return {}

    def _range(self, numel: int) -> tuple[int, int]:
        width = self.width(numel)
        return min(self._ranks.rank * width, numel), min((self._ranks.rank + 1) * width, numel)

    def _lay_out(self, numels: list[int]) -> tuple[Layout, list[int]]:
        own, ranges, begin = [], [], 0
        for numel in numels:
            start, stop = self._range(numel)
            own.append(stop - start)
            if stop > start:
                ranges.append((begin + start, begin + stop))
            begin += numel
        return Shards(self._ranks, begin, ranges), own

    def _flat(self, parameter: Tensor) -> Tensor:
        return self._own(parameter).to(self.device, self.dtype)

    def _own(self, parameter: Tensor) -> Tensor:
        # one parameter at a time is whole
        return distributed.whole(parameter).detach().reshape(-1)[slice(*self._range(parameter.numel()))].clone()

    def _hold(self, constants: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, parameter in constants.items():
            if distributed.is_spread(parameter):
                self.own_constants[name] = self._own(parameter).to(self.device, full_dtype(parameter.dtype))
                self._constant_shapes[name] = parameter.shape
        return super()._hold({name: p for name, p in constants.items() if name not in self.own_constants})

    def _replicas(self, model: nn.Module) -> dict[str, tuple[tuple[int, ...], Tensor]]:
        chosen, found = set(self.names), {}
        for name, parameter in model.named_parameters():
            if name in chosen:
                found[name] = (distributed.place_of(parameter), distributed.local_part(parameter).detach())
        return found

    def _units(self, model: nn.Module) -> list[Unit]:
        """The model itself first, then the modules that ``fully_shard`` was applied to."""
        positions = {name: position for position, name in enumerate(self.names)}
        slots: dict[nn.Module, list[Slot]] = {}

        def visit(module: nn.Module, prefix: str, unit: nn.Module) -> None:
            if sharded.is_fully_sharded_itself(module):
                unit = module
            mine = slots.setdefault(unit, [])
            for attribute, parameter in module._parameters.items():
                if parameter is not None:
                    slot = Slot(module, attribute, self._first_names[f"{prefix}{attribute}"], parameter)
                    known = any(other.module is module and other.attribute == attribute for other in mine)
                    if not known and (slot.name in positions or slot.name in self.own_constants):
                        mine.append(slot)
            for name, child in module._modules.items():
                if child is not None:
                    visit(child, f"{prefix}{name}.", unit)

        visit(model, "", model)
        found = []
        for module, own in slots.items():
            names = list(dict.fromkeys(slot.name for slot in own))
            selected = [positions[name] for name in names if name in positions]
            found.append(Unit(module, own, selected, [name for name in names if name not in positions]))
        return found
