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
    """The modules that use some parameters: the one given, or those alive that hold one of them, outermost first.

    Looking costs a pass over all objects of the process, a few tenths of a second, and is done once, and again after
    ``forget``. No module is kept alive.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._model = None if model is None else weakref.ref(model)
        self.forget()

    def forget(self) -> None:
        self._roots: list[weakref.ref[nn.Module]] | None = None
        self._exchanging: list[weakref.ref[nn.Module]] | None = None

    def roots(self, parameters: Iterable[Tensor]) -> list[nn.Module]:
        """They and what is in them are all."""
        if self._model is not None and (model := self._model()) is not None:
            return [model]
        if self._roots is None:
            self._roots = [weakref.ref(module) for module in _outermost(_holding(parameters))]
        return _alive(self._roots)

    def exchanging(self, parameters: Iterable[Tensor]) -> list[nn.Module]:
        """Those that average gradients over ranks, and can be told not to."""
        if self._exchanging is None:
            inside = [one for root in self.roots(parameters) for one in root.modules()]
            able = [one for one in inside if hasattr(one, "no_sync") or hasattr(one, "set_requires_gradient_sync")]
            self._exchanging = [weakref.ref(module) for module in _outermost(able)]
        return _alive(self._exchanging)


def _holding(parameters: Iterable[Tensor]) -> list[nn.Module]:
    wanted = {id(parameter) for parameter in parameters}
    # by type: isinstance would ask proxies for their class, which may wake them
    modules = [one for one in gc.get_objects() if issubclass(type(one), nn.Module)]
    made = [one for one in modules if "_modules" in vars(one)]  # whose __init__ has run
    return [one for one in made if any(id(parameter) in wanted for parameter in one.parameters())]


def _outermost(modules: Iterable[nn.Module]) -> list[nn.Module]:
    found = {id(module): module for module in modules}
    inner = {id(one) for module in found.values() for one in module.modules() if one is not module}
    return [module for key, module in found.items() if key not in inner]


def _alive(references: list[weakref.ref[nn.Module]]) -> list[nn.Module]:
    return [module for reference in references if (module := reference()) is not None]
