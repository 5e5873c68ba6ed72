"""Which symmetric matrix of an objective is meant, and its products: whole or a block, scaled or not."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .errors import did_you_mean
from .gauss_newton import OutputProducts
from .hvp import HVP_MODES
from .layout import WHOLE, Layout
from .memory import MemoryBudget
from .objective import Objective

__all__ = ["MATRICES", "Curvature", "Operator", "from_linear_operator"]

MatVec = Callable[[Tensor], Tensor]

MATRICES = {
    "hessian": "the Hessian",
    "gauss_newton": "the Gauss–Newton matrix",
    "fisher": "the Fisher matrix",
    "empirical_fisher": "the empirical Fisher matrix",
}


@dataclass(frozen=True)
class Operator:
    """A symmetric matrix, known by its products.

    Attributes:
        matvec: ``v -> A v``, shape ``(dim,)`` to ``(dim,)``, one pass over the data each.
        like: a vector of the shape, dtype and device that ``matvec`` takes.
        blocks: coordinates by the name of their parameter: of shards, those that lie here, which may be none.
        description: what it is, for a sentence.
        how, check: how the products are made, and what was compared with them; known after the first, inside of the session.
        session: enter it around many products.
        memory: the budget of what is kept beside them; None for no limit.
        layout: of the vectors: with shards, ``matvec`` takes and gives this rank's, and is collective.
    """

    matvec: MatVec
    like: Tensor
    blocks: Mapping[str, slice]
    description: str
    how: Callable[[], str] = lambda: "given products"
    check: Callable[[], str] = str
    session: Callable[[], AbstractContextManager[None]] = nullcontext
    memory: MemoryBudget | None = None
    layout: Layout = WHOLE

    @property
    def dim(self) -> int:
        return self.layout.length(self.like)

    def restricted(self, names: Sequence[str], *, description: str) -> Operator:
        """The diagonal block of these parameters, taken together, in their order. Collective for shards."""
        slices = [self.blocks[name] for name in names]
        starts = _cumulated([part.stop - part.start for part in slices])
        blocks = {name: slice(a, b) for name, a, b in zip(names, starts, starts[1:], strict=False)}

        def matvec(vector: Tensor) -> Tensor:
            whole = torch.zeros_like(self.like)
            for own, part in zip(blocks.values(), slices, strict=True):
                whole[part] = vector[own]
            product = self.matvec(whole)
            return torch.cat([product[part] for part in slices])

        like = self.like.new_zeros(starts[-1])
        known = list(self.blocks)
        layout = self.layout.of_blocks(
            [part.stop - part.start for part in self.blocks.values()], [known.index(name) for name in names]
        )
        return replace(self, matvec=matvec, like=like, blocks=blocks, description=description, layout=layout)

    def scaled(self, scale: Tensor, *, description: str, shift: Tensor | None = None) -> Operator:
        """``D A D + diag(shift)``, with ``D`` the diagonal matrix of ``scale``, shape ``(dim,)``."""

        def matvec(vector: Tensor) -> Tensor:
            product = scale * self.matvec(scale * vector)
            return product if shift is None else product.addcmul_(shift, vector)

        return replace(self, matvec=matvec, description=description)


@dataclass(frozen=True)
class Curvature:
    """A matrix of second derivatives of an objective, as a key: metrics with equal ones can share products.

    Args:
        matrix: one of ``MATRICES``.
        select: globs of parameter names; the diagonal block of those parameters. None for all of the objective's.
        adaptive: ``D A D`` with ``D = diag |w|``, which does not change when layers of a ReLU network are rescaled.
        hvp: how Hessian products are made, one of ``hvp.HVP_MODES``; None for the objective's choice.
    """

    matrix: str = "hessian"
    select: str | Sequence[str] | None = None
    adaptive: bool = False
    hvp: str | None = None

    def __post_init__(self) -> None:
        if self.matrix not in MATRICES:
            raise ValueError(f"matrix must be one of {tuple(MATRICES)}, got {self.matrix!r}")
        if self.hvp is not None and self.hvp not in HVP_MODES:
            raise ValueError(f"hvp must be None or one of {HVP_MODES}, got {self.hvp!r}")
        if self.select is None or isinstance(self.select, str):
            return
        if not isinstance(self.select, (list, tuple)) or not self.select or not all(isinstance(g, str) for g in self.select):
            raise TypeError(f"select must be None, or one or more globs such as 'layer4.*', got {self.select!r}")
        object.__setattr__(self, "select", tuple(self.select))  # so that it can be a key

    def on(self, objective: Objective) -> Operator:
        """The operator, at the trained weights.

        Raises:
            ValueError: no parameter is selected.
        """
        whole = self._whole(objective)
        operator, origin = whole, objective.origin
        if self.select is not None:
            names = self._names(objective)
            where = self.select if isinstance(self.select, str) else ", ".join(self.select)
            operator = whole.restricted(names, description=f"the block {where} of {whole.description}")
            origin = torch.cat([origin[whole.blocks[name]] for name in names])
        if self.adaptive:
            operator = operator.scaled(origin.abs(), description=f"{operator.description}, scaled by |w| on both sides")
        return operator

    def _whole(self, objective: Objective) -> Operator:
        space = objective.space
        starts = _cumulated(space.numels)
        blocks = {name: slice(a, b) for name, a, b in zip(space.names, starts, starts[1:], strict=False)}
        description = MATRICES[self.matrix]
        if self.matrix == "hessian":
            return Operator(
                objective.hvp,
                objective.origin,
                blocks,
                description,
                how=lambda: objective.hvp_mode or "",
                check=lambda: objective.hvp_check,
                session=lambda: objective.hvp_by(self.hvp),
                memory=objective.memory,
                layout=objective.layout,
            )
        products = OutputProducts(objective, self.matrix)
        return Operator(
            products,
            objective.origin,
            blocks,
            description,
            how=lambda: products.how,
            session=objective.session,
            memory=objective.memory,
            layout=objective.layout,
        )

    def _names(self, objective: Objective) -> list[str]:
        globs = (self.select,) if isinstance(self.select, str) else self.select or ()
        known = objective.space.names
        names = [name for name in known if any(fnmatch.fnmatchcase(name, glob) for glob in globs)]
        if not names:
            hint = did_you_mean(globs[0], known)
            raise ValueError(
                f"select={self.select!r} matches none of the measured parameters: {', '.join(known[:8])}.{hint}"
            )
        return names


def from_linear_operator(linear: Any, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Operator:
    """An operator of someone else's: a ``curvlinops`` one or a ``scipy.sparse.linalg.LinearOperator``, square.

    Both are called by ``@`` with a vector of shape ``(dim,)``: the first with a tensor, the second with an array.

    Args:
        dtype: of the arithmetic; None for float64 with SciPy, for the operator's own elsewhere.
    Raises:
        TypeError: it has no ``shape`` or no ``@``; ValueError: it is not square.
    """
    shape = tuple(getattr(linear, "shape", ()))
    if not shape or not hasattr(linear, "__matmul__"):
        raise TypeError(f"a linear operator has a shape and multiplies by @, and a {type(linear).__name__} does not")
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"a symmetric operator is square, and this one has shape {shape}")
    takes_arrays = type(linear).__module__.split(".")[0] in ("scipy", "numpy")
    own = getattr(linear, "dtype", None)
    if dtype is None:
        dtype = own if isinstance(own, torch.dtype) else torch.float64
    like = torch.zeros(int(shape[0]), dtype=dtype, device=getattr(linear, "device", device))

    def matvec(vector: Tensor) -> Tensor:
        product = linear @ (vector.cpu().numpy() if takes_arrays else vector)
        return torch.as_tensor(product).reshape(-1).to(like)

    name = type(linear).__name__
    return Operator(matvec, like, {}, f"the operator {name}", lambda: f"products of {name}")


def _cumulated(sizes: Sequence[int]) -> list[int]:
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    return starts
