"""What passes over the data change beside gradients: buffers of modules, put back after all passes but the first."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

__all__ = ["Modules", "buffers_of"]


def buffers_of(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """A function that puts the buffers back, bit for bit and in place.

    Running statistics of batch and instance norm, the vectors of spectral norm, codebooks, counters of either.
    """
    seen = {id(one): one for module in modules for one in module.modules()}
    saved = [
        (one, name, buffer, buffer.detach().clone())
        for one in seen.values()
        for name, buffer in one._buffers.items()
        if buffer is not None and not torch.nn.parameter.is_lazy(buffer)
    ]

    def restore() -> None:
        with torch.no_grad():
            for module, name, buffer, before in saved:
                buffer.copy_(before)
                module._buffers[name] = buffer  # a forward pass may have put another in its place

    return restore


class Modules:
    """The modules that use some parameters: the one given, or those alive that hold one of them.

    Looking costs a pass over all objects of the process, about a tenth of a second, and is done once, and again when
    ``forget`` was called. No module is kept alive.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._model = None if model is None else weakref.ref(model)
        self._found: list[weakref.ref[nn.Module]] | None = None

    def holding(self, parameters: Iterable[Tensor]) -> list[nn.Module]:
        if self._model is not None and (model := self._model()) is not None:
            return [model]
        if self._found is None:
            wanted = {id(parameter) for parameter in parameters}
            # by type: isinstance would ask proxies for their class, which may wake them
            alive = [one for one in gc.get_objects() if issubclass(type(one), nn.Module)]
            self._found = [weakref.ref(m) for m in alive if any(id(p) in wanted for p in _parameters(m))]
        return [module for reference in self._found if (module := reference()) is not None]

    def forget(self) -> None:
        self._found = None


def _parameters(module: nn.Module) -> Iterable[Tensor]:
    if "_parameters" not in vars(module):  # half-made: its __init__ did not run
        return ()
    return module.parameters()
