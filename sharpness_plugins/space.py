"""Which parameters are perturbed, and how a flat vector becomes named views of them."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from . import distributed
from .errors import did_you_mean
from .layout import WHOLE, Layout

__all__ = ["ParameterSpace", "Select", "full_dtype"]

Select: TypeAlias = "Callable[[str, nn.Parameter], bool] | str | Sequence[str] | None"

_HALF = (torch.float16, torch.bfloat16)


class ParameterSpace:
    """The trainable parameters that ``select`` names, as one flat vector; the others and the buffers as constants.

    Those that ``fully_shard`` has spread over the ranks are gathered: every rank has all of the vector.

    Frozen parameters (``requires_grad=False``) are left out; tied ones appear once, under their first name, and are
    selected when any of their names matches. Half-precision tensors are represented in float32. Nothing here writes to
    the model: ``state`` builds fresh views for ``torch.func.functional_call``.

    Args:
        model: an unwrapped module.
        select: None for all trainable parameters; a predicate ``(name, parameter) -> bool``; a glob or several
            (``"layer4.*"``), of which one must match.
        device: where the copies live; None leaves every tensor on its own device.
    Attributes:
        names, shapes: of the selected parameters, in model order.
        ordinals: their positions among all of the model's parameters.
        dim: number of selected scalars.
        numels: how many of the scalars of each parameter lie here.
        layout: how vectors of the space lie; where they lie in shards, ``(dim,)`` stands for this rank's shard.
        origin: the trained values, shape ``(dim,)``; a copy.
        replicas: what the model holds here of parameters that lie in shards, and where: see ``ShardedSpace``.
        has_half: whether some parameter or buffer was half precision.
    Raises:
        ValueError: nothing is left to select; a parameter is complex, uninitialized or on the meta device.
    """

    def __init__(self, model: nn.Module, select: Select = None, *, device: torch.device | None = None) -> None:
        aliases: dict[nn.Parameter, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            aliases.setdefault(parameter, []).append(name)
        chosen = {p: names[0] for p, names in aliases.items() if p.requires_grad and _matches(select, p, names)}
        if not chosen:
            raise ValueError(_nothing_selected(select, aliases))
        for name, tensor in [*((names[0], p) for p, names in aliases.items()), *model.named_buffers()]:
            _check_has_values(name, tensor)
        for parameter, name in chosen.items():
            _check_real(name, parameter)

        ordinal = {parameter: i for i, parameter in enumerate(aliases)}
        self.names = list(chosen.values())
        self.shapes = [parameter.shape for parameter in chosen]
        self.ordinals = [ordinal[parameter] for parameter in chosen]
        self.layout, self.numels = self._lay_out([parameter.numel() for parameter in chosen])
        self.dim = sum(parameter.numel() for parameter in chosen)
        if self.dim == 0:
            raise ValueError(f"the selected parameters {self.names} hold no numbers at all, so there is nothing to perturb")
        self.num_parameters = sum(parameter.numel() for parameter in aliases)
        self.num_frozen = sum(parameter.numel() for parameter in aliases if not parameter.requires_grad)

        self._device = device
        self.dtype = torch.float32
        for parameter in chosen:
            self.dtype = torch.promote_types(self.dtype, parameter.dtype)
        self._dtypes = [full_dtype(parameter.dtype) for parameter in chosen]
        self._devices = [device or parameter.device for parameter in chosen]
        self.device = self._devices[0]
        self.origin = torch.cat([self._flat(parameter) for parameter in chosen])
        everything = [*aliases, *model.buffers()]
        self.has_half = any(tensor.dtype in _HALF for tensor in everything)
        self._constants = self._hold({names[0]: p for p, names in aliases.items() if p not in chosen})
        self._buffers = {name: self._constant(buffer) for name, buffer in model.named_buffers()}
        self.replicas: Mapping[str, tuple[tuple[int, ...], Tensor]] = {}
        self._first_names = {name: names[0] for names in aliases.values() for name in names}

    def _lay_out(self, numels: list[int]) -> tuple[Layout, list[int]]:
        """How vectors lie, and how many of the scalars of each parameter lie here."""
        return WHOLE, numels

    def _flat(self, parameter: Tensor) -> Tensor:
        """What lies here of a selected parameter."""
        return distributed.whole(parameter).detach().reshape(-1).to(self.device, self.dtype, copy=True)

    def _hold(self, constants: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those parameters that every evaluation is given as they are."""
        return {name: self._constant(parameter) for name, parameter in constants.items()}

    def _constant(self, tensor: Tensor) -> Tensor:
        constant = (
            distributed.whole(tensor).detach().to(device=self._device or tensor.device, dtype=full_dtype(tensor.dtype))
        )
        return constant.clone() if constant.is_inference() else constant

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Named views of a flat vector of shape ``(dim,)``; differentiable, one concatenation in the backward pass."""
        pieces = torch.split(flat, self.numels)
        return {
            name: piece.view(shape).to(device=device, dtype=dtype)
            for name, piece, shape, dtype, device in zip(
                self.names, pieces, self.shapes, self._dtypes, self._devices, strict=True
            )
        }

    def state(self, flat: Tensor, *, copy_constants: bool = False) -> dict[str, Tensor]:
        """Parameters and buffers for ``functional_call``: views of ``flat``, constants, and clones of the buffers.

        Those that lie in shards are not among them.

        Buffers are cloned because modules write to them (BatchNorm's running statistics, counters); the parameters that
        are not perturbed only on request, for the rare module that writes to its weights (``max_norm`` of an embedding).
        """
        buffers = {name: buffer.clone() for name, buffer in self._buffers.items()}
        constants = {name: c.clone() for name, c in self._constants.items()} if copy_constants else self._constants
        return {**constants, **buffers, **self.split(flat)}

    def checksum(self) -> str:
        """Of names, shapes and values, of the constants and buffers too."""
        found = hashlib.sha256(repr((self.names, self.shapes)).encode())
        for name, tensor in {"": self.origin, **self._constants, **self._buffers}.items():
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            if tensor.numel() and tensor.layout is torch.strided:
                flat = tensor.detach().cpu().reshape(-1).clone(memory_format=torch.contiguous_format)
                found.update(flat.view(torch.uint8).numpy().data)
        return found.hexdigest()

    @property
    def constants(self) -> list[str]:
        """Names of the parameters that are not perturbed."""
        return list(self._constants)

    def constant(self, name: str) -> Tensor:
        return self._constants[name]

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        """The buffers that the model is evaluated with; not the model's own where they were set."""
        return self._buffers

    def set_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        """Evaluate with these instead."""
        self._buffers |= {name: buffer.to(self._buffers[name]) for name, buffer in buffers.items()}

    def check(self, vector: Tensor, role: str) -> Tensor:
        """``vector`` in the dtype and device of the space.

        Raises:
            ValueError: it has another shape than ``(dim,)``.
        """
        if vector.shape != self.origin.shape:
            here = "" if self.layout.is_whole else " that lies on this rank"
            raise ValueError(
                f"{role} must have shape {tuple(self.origin.shape)}, one number per selected parameter{here}, got "
                f"{tuple(vector.shape)}"
            )
        return vector.to(self.device, self.dtype)


def full_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which a tensor is represented: half precision in float32."""
    return torch.float32 if dtype in _HALF else dtype


def _matches(select: Select, parameter: nn.Parameter, names: list[str]) -> bool:
    if select is None:
        return True
    if callable(select):
        return any(select(name, parameter) for name in names)
    globs = [select] if isinstance(select, str) else select
    if not isinstance(globs, Iterable) or not all(isinstance(glob, str) for glob in globs):
        raise TypeError(
            f"select must be None, a predicate (name, parameter) -> bool, or one or more globs such as 'layer4.*', "
            f"got {select if not isinstance(select, Iterable) else [type(glob).__name__ for glob in select]}"
        )
    return any(fnmatch.fnmatchcase(name, glob) for name in names for glob in globs)


def _check_has_values(name: str, tensor: Tensor) -> None:
    kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
    if nn.parameter.is_lazy(tensor):
        raise ValueError(f"{kind} {name!r} is not initialized yet (a lazy module). Run one batch through the model first.")
    if tensor.is_meta:
        raise ValueError(f"{kind} {name!r} is on the meta device and has no values. Load the weights first.")


def _check_real(name: str, parameter: nn.Parameter) -> None:
    if not parameter.is_floating_point():
        raise ValueError(
            f"parameter {name!r} is {parameter.dtype}, and sharpness is defined here for real parameters only. "
            "Leave it out with select=..., or view complex weights as pairs of reals."
        )


def _nothing_selected(select: Select, aliases: dict[nn.Parameter, list[str]]) -> str:
    names = [name for names in aliases.values() for name in names]
    if not names:
        return "the model has no parameters, so there is nothing to perturb"
    trainable = [name for p, alias in aliases.items() if p.requires_grad for name in alias]
    if not trainable:
        return f"all {len(names)} parameters of the model are frozen. Set requires_grad=True on those to perturb."
    shown = ", ".join(trainable[:8]) + (", ..." if len(trainable) > 8 else "")
    hint = ""
    if isinstance(select, str):
        is_module = any(name.startswith(f"{select}.") for name in trainable)
        hint = f" Did you mean {select + '.*'!r}?" if is_module else did_you_mean(select, trainable)
    return f"select={select!r} matches no trainable parameter, so there is nothing to perturb.{hint} Trainable: {shown}"
