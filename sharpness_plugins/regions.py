"""Feasible sets of the inner maximisation, and the random subspace that never is a matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from . import reductions, sampling
from .space import ParameterSpace

__all__ = ["Box", "Region", "SignSubspace"]


class Region(Protocol):
    """A closed set of perturbations that contains zero."""

    def project(self, perturbation: Tensor) -> Tensor:
        """The nearest point of the set."""

    def ascent_vertex(self, gradient: Tensor) -> Tensor:
        """The point of the set that maximizes ``<gradient, e>``; zero where the gradient is zero."""

    def contains(self, perturbation: Tensor) -> bool: ...


@dataclass(frozen=True, eq=False)
class Box:
    """``|e_i| <= half_width_i``, shape ``(dim,)``, half widths finite and not negative."""

    half_width: Tensor

    def __post_init__(self) -> None:
        if self.half_width.ndim != 1 or not bool((self.half_width >= 0).logical_and(self.half_width < torch.inf).all()):
            raise ValueError("half_width must be a vector of finite numbers >= 0, shape (dim,)")

    def project(self, perturbation: Tensor) -> Tensor:
        return torch.clamp(perturbation, -self.half_width, self.half_width)

    def ascent_vertex(self, gradient: Tensor) -> Tensor:
        return self.half_width * gradient.sign()

    def contains(self, perturbation: Tensor) -> bool:
        return bool((perturbation.abs() <= self.half_width).all())

    def share_at_bound(self, perturbation: Tensor) -> float:
        """Fraction of the coordinates within a millionth of a bound."""
        return (perturbation.abs() >= (1 - 1e-6) * self.half_width).double().mean().item()


class SignSubspace:
    """The column space of a random matrix ``A`` of signs ±1, ``dim`` by ``num_columns``, times a scale.

    The signs come from Philox4x32-10, keyed by ``key`` and counted by (element within its parameter, block of 128 columns,
    position of the parameter in the model), so they are the same on every device and do not change when other parameters
    are left out. They are kept packed, ``ceil(num_columns / 8)`` bytes per parameter: 13 for 100 columns, where a float32
    matrix takes 400.

    Args:
        space: where the columns live.
        num_columns: number of columns.
        key: 64-bit key of this draw.
        scale: every entry of A is ± this.
    """

    _CHUNK = 2**16
    _UNPACKED = 2**14  # 8 MB of float32 for 128 columns: stays in cache
    _BLOCK_BITS = 128

    def __init__(self, space: ParameterSpace, num_columns: int, key: int, *, scale: float = 1.0) -> None:
        if num_columns < 1:
            raise ValueError(f"a subspace needs at least one column, got {num_columns}")
        self.num_columns = num_columns
        self.dim = space.dim
        self.scale = scale
        self._dtype, self._device = space.dtype, space.device
        num_bytes = -(-num_columns // 8)
        # one row of bytes per 8 columns: each row is read contiguously
        self._bytes = torch.empty((num_bytes, space.dim), dtype=torch.uint8, device=space.device)
        start = 0
        for ordinal, numel in zip(space.ordinals, space.numels, strict=True):
            for first in range(0, numel, self._CHUNK):
                element = torch.arange(first, min(first + self._CHUNK, numel), device=space.device)
                stop = start + len(element)
                self._bytes[:, start:stop] = self._draw(element, ordinal, key, num_bytes)
                start = stop
        # bit b of each of the 256 byte values, as a sign
        values = torch.arange(256, device=space.device)
        self._signs = ((values[:, None] >> torch.arange(8, device=space.device) & 1) * 2 - 1).to(torch.float64)

    def _draw(self, element: Tensor, ordinal: int, key: int, num_bytes: int) -> Tensor:
        rows = []
        for block in range(-(-num_bytes * 8 // self._BLOCK_BITS)):
            words = sampling.philox((element & 0xFFFFFFFF, element >> 32, block, ordinal), key)
            for word in words:
                rows += [(torch.as_tensor(word) >> shift & 0xFF).to(torch.uint8) for shift in (0, 8, 16, 24)]
        return torch.stack(rows[:num_bytes])

    def _padded(self, coefficients: Tensor) -> Tensor:
        _check_shape(coefficients, self.num_columns)
        padded = coefficients.new_zeros(8 * len(self._bytes), dtype=torch.float64)
        padded[: self.num_columns] = coefficients
        return padded.view(-1, 8)

    def _unpacked(self, first: int) -> Tensor:
        """The signs of one small chunk of elements as float32, one row per column of A."""
        codes = self._bytes[:, first : first + self._UNPACKED]
        bits = torch.arange(8, device=self._bytes.device, dtype=torch.uint8)
        return ((codes[:, None, :] >> bits[:, None] & 1).float() * 2 - 1).reshape(8 * len(codes), -1)

    def lift(self, coefficients: Tensor) -> Tensor:
        """``A y``: shape ``(num_columns,)`` to ``(dim,)``. Sixteen table look-ups per parameter for 128 columns."""
        # sums over the 8 columns of a byte, for each of its 256 values
        tables = (self.scale * self._signs @ self._padded(coefficients).T).T.to(self._dtype)
        lifted = torch.empty(self.dim, dtype=self._dtype, device=self._device)
        for first in range(0, self.dim, self._CHUNK):
            codes = self._bytes[:, first : first + self._CHUNK].int()
            out = lifted[first : first + self._CHUNK].zero_()
            for table, code in zip(tables, codes, strict=True):
                out += table.index_select(0, code)  # 10 times faster on a CPU than table[code]
        return lifted

    def restrict(self, vector: Tensor) -> Tensor:
        """``Aᵀ g``: shape ``(dim,)`` to ``(num_columns,)``, accumulated in float64."""
        _check_shape(vector, self.dim)
        if self._device.type != "cpu":  # weighted bincount is not deterministic there
            restricted = sum(
                self._unpacked(first).double() @ vector[first : first + self._UNPACKED].double()
                for first in range(0, self.dim, self._UNPACKED)
            )
            return (self.scale * torch.as_tensor(restricted))[: self.num_columns].to(self._dtype)
        sums = torch.zeros((len(self._bytes), 256), dtype=torch.float64, device=self._device)
        for first in range(0, self.dim, self._CHUNK):
            weights = vector[first : first + self._CHUNK].double()
            for row, code in zip(sums, self._bytes[:, first : first + self._CHUNK], strict=True):
                row += torch.bincount(code, weights=weights, minlength=256)
        return (self.scale * sums @ self._signs).reshape(-1)[: self.num_columns].to(self._dtype)

    def gram(self) -> Tensor:
        """``AᵀA / scale²``, shape ``(num_columns, num_columns)``, float64: integers, exact."""
        gram = torch.zeros((8 * len(self._bytes),) * 2, dtype=torch.float64, device=self._device)
        for first in range(0, self.dim, self._UNPACKED):
            signs = self._unpacked(first)
            gram += (signs @ signs.T).double()  # sums of 2^14 signs are exact in float32
        return gram[: self.num_columns, : self.num_columns]

    def coordinates(self, vector: Tensor) -> Tensor:
        """``A⁺ x = (AᵀA)⁻¹ Aᵀ x``, shape ``(dim,)`` to ``(num_columns,)``; solved in float64.

        Raises:
            ValueError: there are more columns than dimensions, so they are not independent.
        """
        if self.num_columns > self.dim:
            raise ValueError(f"a random subspace of {self.num_columns} dimensions does not fit into {self.dim} parameters")
        right = self.restrict(vector).double() / self.scale**2
        solution: Tensor = torch.linalg.lstsq(self.gram().cpu(), right.cpu()[:, None], driver="gelsd").solution
        return solution[:, 0].to(vector)

    def norm_of(self, coefficients: Tensor) -> float:
        """``‖A y‖``."""
        return reductions.norm(self.lift(coefficients)).item()


def _check_shape(vector: Tensor, length: int) -> None:
    if vector.shape != (length,):
        raise ValueError(f"expected a vector of shape ({length},), got {tuple(vector.shape)}")
