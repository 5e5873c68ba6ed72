"""The random subspace that never is a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reductions
from .kernels.philox import segment_table
from .kernels.signs import num_bytes, sign_gram, sign_lift, sign_pack, sign_restrict
from .space import ParameterSpace

__all__ = ["SignSubspace"]


class SignSubspace:
    """The column space of a random matrix ``A`` of signs ±1, ``dim`` by ``num_columns``, times a scale.

    The signs come from Philox4x32-10, keyed by ``key`` and counted by (element within its parameter, block of 128 columns,
    position of the parameter in the model), so they are the same on every device and do not change when other parameters
    are left out. They are kept packed, ``ceil(num_columns / 8)`` bytes per parameter: 13 for 100 columns, where a float32
    matrix takes 400. Drawn again for every product they take none, and on a CPU a product five times as long.

    Args:
        space: where the columns live.
        num_columns: number of columns.
        key: 64-bit key of this draw.
        scale: every entry of A is ± this.
        regenerate: draw the signs again for every product; the same numbers, bit for bit.
    """

    def __init__(
        self, space: ParameterSpace, num_columns: int, key: int, *, scale: float = 1.0, regenerate: bool = False
    ) -> None:
        if num_columns < 1:
            raise ValueError(f"a subspace needs at least one column, got {num_columns}")
        self.num_columns = num_columns
        self.dim = space.dim
        self.scale = scale
        self._key = key
        self._dtype, self._device = space.dtype, space.device
        self._segments = segment_table(space.ordinals, space.numels, device=space.device)
        self._packed: Tensor | None = None
        self._gram: Tensor | None = None
        if not regenerate:
            self._packed = torch.empty(num_bytes(num_columns) * space.dim, dtype=torch.uint8, device=space.device)
            sign_pack(self._packed, self._segments, key, num_columns)

    def lift(self, coefficients: Tensor, origin: Tensor | None = None) -> Tensor:
        """``A y``, or ``x + A y`` with an ``origin``: shape ``(num_columns,)`` to ``(dim,)``."""
        _check_shape(coefficients, self.num_columns)
        if origin is not None:
            _check_shape(origin, self.dim)
            origin = origin.to(self._device, self._dtype).contiguous()
        lifted = torch.empty(self.dim, dtype=self._dtype, device=self._device)
        sign_lift(lifted, self.scale * coefficients.double(), self._segments, self._key, origin=origin, packed=self._packed)
        return lifted

    def restrict(self, vector: Tensor) -> Tensor:
        """``Aᵀ g``: shape ``(dim,)`` to ``(num_columns,)``; partial sums are added up in float64."""
        return (self.scale * self._restricted(vector)).to(self._dtype)

    def _restricted(self, vector: Tensor) -> Tensor:
        _check_shape(vector, self.dim)
        vector = vector.to(self._device, self._dtype).contiguous()
        return sign_restrict(vector, self._segments, self._key, self.num_columns, packed=self._packed)

    def gram(self) -> Tensor:
        """``AᵀA / scale²``, shape ``(num_columns, num_columns)``, float64: integers, exact. Computed once."""
        if self._gram is None:
            self._gram = sign_gram(self.dim, self._segments, self._key, self.num_columns, packed=self._packed)
        return self._gram.clone()

    def coordinates(self, vector: Tensor) -> Tensor:
        """``A⁺ x = (AᵀA)⁻¹ Aᵀ x``, shape ``(dim,)`` to ``(num_columns,)``; solved in float64.

        Raises:
            ValueError: there are more columns than dimensions, so they are not independent.
        """
        if self.num_columns > self.dim:
            raise ValueError(f"a random subspace of {self.num_columns} dimensions does not fit into {self.dim} parameters")
        right = self._restricted(vector).cpu() / self.scale
        solution: Tensor = torch.linalg.lstsq(self.gram().cpu(), right[:, None], driver="gelsd").solution
        return solution[:, 0].to(vector)

    def norm_of(self, coefficients: Tensor) -> float:
        """``‖A y‖``."""
        return reductions.norm(self.lift(coefficients)).item()


def _check_shape(vector: Tensor, length: int) -> None:
    if vector.shape != (length,):
        raise ValueError(f"expected a vector of shape ({length},), got {tuple(vector.shape)}")
