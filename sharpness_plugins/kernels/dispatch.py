"""Which implementation of an operation runs: plain torch or Triton, by the device of its tensors and one variable.

``SHARPNESS_PLUGINS_KERNELS`` is read at every call. ``auto`` (the default): Triton for tensors on a GPU that it supports,
where it can be imported; plain torch for the rest. ``torch``: plain torch everywhere. ``triton``: Triton or an error; under
``TRITON_INTERPRET=1``, which has to be set before Triton is imported, its interpreter runs the kernels on CPU tensors.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import errors

__all__ = ["CHOICES", "VARIABLE", "Implementation", "Operation", "available", "launch", "operation", "uses_triton"]

VARIABLE = "SHARPNESS_PLUGINS_KERNELS"
CHOICES = ("auto", "torch", "triton")
NAMESPACE = "sharpness_plugins"


def uses_triton(device: torch.device) -> bool:
    """Whether operations on tensors of ``device`` run as Triton kernels.

    Raises:
        ValueError: the variable has another value than the three, or asks for Triton on a device that it cannot run on.
        ImportError: it asks for Triton, which is not installed.
    """
    choice = os.environ.get(VARIABLE, "auto")
    if choice == "torch":
        return False
    if choice == "auto":
        return device.type == "cuda" and _supported(device)
    if choice != "triton":
        raise ValueError(f"{VARIABLE} must be one of {', '.join(CHOICES)}, got {choice!r}")
    errors.missing_dependency("triton", extra=None, purpose=f"{VARIABLE}=triton")
    if device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return True
    raise ValueError(
        f"{VARIABLE}=triton, but the tensors are on {device}: Triton kernels need a GPU, or TRITON_INTERPRET=1 (set before "
        f"Triton is imported) to run in its interpreter on the CPU. Set {VARIABLE} to auto or torch"
    )


@cache
def _supported(device: torch.device) -> bool:
    # Triton refuses GPUs before Volta when it compiles; AMD's all report more
    return importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (7, 0)


@dataclass(frozen=True)
class Implementation:
    """One way to run an operation, called like the operation itself."""

    name: str
    run: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        with torch.no_grad():
            return self.run(*args)


class Operation:
    """A ``torch.library`` operator with two implementations, chosen at each call by :func:`uses_triton`.

    It has no derivative: it runs under ``no_grad``. ``torch.compile`` keeps it whole.

    Args:
        name: of the operator, ``torch.ops.sharpness_plugins.<name>``.
        schema: its arguments and results, as torch writes them: ``"(Tensor(a!) out, Tensor gradient) -> Tensor"``.
        mutates: the arguments that the schema marks as written to.
        overwrites: those of them that are not read before.
        reads_twice: the arguments that a second pass reads again.
        launches: of the Triton form, its sum over the programs included.
        reference: plain torch, for any device; the oracle of the other.
        launcher: ``"module:function"`` within this package, which starts the Triton kernels; imported when first needed.
        fake: the result's shape and dtype from those of the arguments; None where nothing is returned.
    Attributes:
        overload: the registered operator.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        reference: Callable[..., Any],
        *,
        launcher: str,
        mutates: Sequence[str] = (),
        overwrites: Sequence[str] = (),
        reads_twice: Sequence[str] = (),
        launches: int = 1,
        fake: Callable[..., Any] | None = None,
    ) -> None:
        self.name = name
        self.reference = reference
        self.overwrites, self.reads_twice, self.launches = tuple(overwrites), tuple(reads_twice), launches
        self._launcher = launcher
        definition = torch.library.custom_op(f"{NAMESPACE}::{name}", self._run, mutates_args=tuple(mutates), schema=schema)
        definition.register_fake(fake or _returns_nothing)
        self.overload = getattr(getattr(torch.ops, NAMESPACE), name).default
        _OPERATIONS[name] = self

    def launcher(self) -> Callable[..., Any]:
        """What starts the Triton kernels; imports Triton."""
        return _attribute(self._launcher)

    def _run(self, *args: Any) -> Any:
        return (self.launcher() if uses_triton(next(_tensors(args)).device) else self.reference)(*args)

    def __call__(self, *args: Any) -> Any:
        with torch.no_grad():
            return self.overload(*args)


_OPERATIONS: dict[str, Operation] = {}


def operation(name: str) -> Operation:
    """The operation of that name.

    Raises:
        UnknownNameError: there is none.
    """
    if name not in _OPERATIONS:
        hint = errors.did_you_mean(name, _OPERATIONS)
        raise errors.UnknownNameError(f"no operation is called {name!r}.{hint} There are: {', '.join(sorted(_OPERATIONS))}")
    return _OPERATIONS[name]


def available(name: str, device: torch.device | str = "cpu") -> list[Implementation]:
    """The implementations of an operation that can run on ``device`` here, the reference first.

    For tests and benchmarks, which compare them; the variable plays no part.
    """
    found, device = operation(name), torch.device(device)
    ways = [Implementation("torch", found.reference)]
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted or (device.type == "cuda" and _supported(device)):
        ways.append(Implementation("triton", found.launcher()))
    return ways


def launch(kernel: Any, programs: int, *args: Any, num_warps: int = 8, **constants: Any) -> None:
    """Start a Triton kernel as ``programs`` programs on the device of its first tensor; nothing for none.

    Products and sums are rounded one by one (no fused multiply-add), as plain torch does, whatever Triton's default is.
    """
    if not programs:
        return
    device = next(_tensors(args)).device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](*args, num_warps=num_warps, enable_fp_fusion=False, **constants)


@cache
def _attribute(path: str) -> Callable[..., Any]:
    module, _, function = path.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(f".{module}", __package__), function)
    return found


def _tensors(args: Sequence[Any]) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from _tensors(arg)


def _returns_nothing(*args: Any) -> None:
    return None
