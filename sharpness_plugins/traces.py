"""Traces and Frobenius norms of symmetric operators, by products with random vectors, with standard errors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from scipy.special import stdtrit
from torch import Tensor

from . import reductions, steps
from .basis import Basis
from .errors import MeasurementStopped
from .krylov import LanczosResult
from .layout import WHOLE, Layout
from .memory import MemoryBudget

__all__ = ["Estimate", "Probes", "hutch_pp", "mean_of", "on_sphere", "signs", "xtrace"]

MatVec = Callable[[Tensor], Tensor]
Blocks = Mapping[str, slice]

_EXHAUSTED = 10  # times the rounding unit: what is left of a vector in the span of the others
_ROWS = 4  # Ritz vectors that are made at a time


@dataclass(frozen=True)
class Estimate:
    """A mean over probes.

    Attributes:
        standard_error: 0 where the number is exact; NaN where a single probe tells none.
        degrees: of freedom of the standard error; 0 where the number is exact.
        instead: what it is, where the run was stopped before it came to what was asked for; else empty.
    """

    value: float
    standard_error: float
    degrees: int
    instead: str = ""

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Student's interval, which few probes need: with 4 of them it is 3.2 standard errors wide on each side."""
        if self.standard_error == 0:
            return self.value, self.value
        if self.degrees < 1:
            return -math.inf, math.inf
        reach = float(stdtrit(self.degrees, 0.5 + level / 2)) * self.standard_error
        return self.value - reach, self.value + reach


def mean_of(samples: Tensor, offset: float = 0.0) -> Estimate:
    """``offset`` plus the mean of samples of shape ``(p,)``; exactly ``offset`` without samples."""
    count = len(samples)
    if not count:
        return Estimate(offset, 0.0, 0)
    error = samples.std().item() / count**0.5 if count > 1 else math.nan
    return Estimate(offset + samples.mean().item(), error, count - 1)


def signs(like: Tensor, generator: torch.Generator, layout: Layout = WHOLE) -> Tensor:
    """A vector of ±1 with the shape, dtype and device of ``like``: of all probes the one with the smallest variance."""
    return torch.where(layout.uniform(generator, like) < 0, -1.0, 1.0).to(like)


def on_sphere(like: Tensor, generator: torch.Generator, layout: Layout = WHOLE) -> Tensor:
    """A vector uniform on the sphere of radius √dim, with the shape, dtype and device of ``like``."""
    vector = layout.normal(generator, like)
    scale: Tensor = layout.length(like) ** 0.5 / layout.norm(vector)
    return vector * scale.to(vector)


class Probes:
    """Products of an operator with random vectors outside of a Krylov basis; several metrics read the same ones.

    With ``Q`` the basis, ``T = Qᵀ A Q`` and ``P = I − Q Qᵀ``, a probe is ``v = P g`` with ``g`` of signs, its product
    ``z = A v``. Then ``tr T + E vᵀz`` is the trace, and its variance that of ``P A P`` alone: with half of 30 products in
    the basis, the error of Hutchinson's estimate falls tenfold on the digits network, and the eigenvalues are free.
    ``‖T‖² + E(2 ‖z‖² − ‖P z‖²)`` is the squared Frobenius norm, and ``tr(QTQᵀ)_l + E v_l·(2 z − P z)_l`` the trace of
    the block of coordinates ``l``; the blocks add up to the trace. Nothing but these numbers is kept.

    Args:
        like: a vector with the dtype and device of the operator's.
        run: whose basis is taken away (``keep_basis``); None for none.
        blocks: coordinates by name.
        layout: of the vectors, and of those of the run.
    Cost: one product a probe, two sweeps over the basis for ``v`` and two for ``P z``.
    Source: Hutchinson (1990); Chen and Hallman, Krylov-aware stochastic trace estimation (2023).
    """

    def __init__(
        self,
        matvec: MatVec,
        like: Tensor,
        generator: torch.Generator,
        *,
        run: LanczosResult | None = None,
        blocks: Blocks | None = None,
        layout: Layout = WHOLE,
    ) -> None:
        self._matvec, self._like, self._generator, self._run, self._layout = matvec, like, generator, run, layout
        self._blocks = dict(blocks or {})
        self._rows: list[Tensor] = []  # vᵀz, the part of the squared norm, and one number for each block
        self._exact_blocks: Tensor | None = None
        self._scope = steps.child("probes")
        self._stopped = False
        self._is_whole = run is not None and run.num_kept >= layout.length(like)

    @property
    def num_made(self) -> int:
        return len(self._rows)

    def take(self, count: int) -> Tensor:
        """The numbers of the first ``count`` probes, made as far as they are not there yet; none for a whole basis.

        Fewer where the measurement is stopped in the middle, but at least two, which tell a standard error.

        Raises:
            ArithmeticError: a product is not finite.
        """
        if self._is_whole:
            count = 0
        while len(self._rows) < count and not self._stopped:
            try:
                self._rows.append(self._probe())
            except MeasurementStopped:
                if len(self._rows) < 2:
                    raise
                self._stopped = True
        width = 2 + len(self._blocks)
        return torch.stack(self._rows[:count]) if count else torch.empty((0, width), dtype=torch.float64)

    def trace(self, count: int) -> Estimate:
        return mean_of(self.take(count)[:, 0], 0.0 if self._run is None else self._run.projected.trace().item())

    def squared_norm(self, count: int) -> Estimate:
        """Of the squared Frobenius norm."""
        return mean_of(self.take(count)[:, 1], 0.0 if self._run is None else self._run.projected.square().sum().item())

    def traces_of_blocks(self, count: int) -> dict[str, Estimate]:
        rows, exact = self.take(count), self._in_basis()
        return {name: mean_of(rows[:, 2 + i], exact[i].item()) for i, name in enumerate(self._blocks)}

    def _probe(self) -> Tensor:
        v = signs(self._like, self._generator, self._layout)
        with self._scope.entered():
            return steps.step("probe", lambda: self._numbers(v), about=v).cpu()

    def _numbers(self, v: Tensor) -> Tensor:
        if self._run is not None:
            v = self._run.remove(v)
        z = self._matvec(v)
        outside = z if self._run is None else self._run.remove(z)
        twice = 2 * z - outside
        numbers = [
            reductions.dot(v, z),
            2 * reductions.dot(z, z) - reductions.dot(outside, outside),
            *(reductions.dot(v[part], twice[part]) for part in self._blocks.values()),
        ]
        row = self._layout.sums(torch.stack(numbers)).cpu()
        if not row.isfinite().all():
            raise ArithmeticError(
                f"product {self.num_made + 1} with a random vector is not finite; look for infinite second derivatives"
            )
        return row

    def _in_basis(self) -> Tensor:
        """Traces of the blocks of ``Q T Qᵀ``, shape ``(num_blocks,)``."""
        if self._exact_blocks is None:
            found = torch.zeros(len(self._blocks), dtype=torch.float64)
            if self._run is not None:
                theta, s = torch.linalg.eigh(self._run.projected)
                for some, values in zip(torch.split(s.T, _ROWS), torch.split(theta, _ROWS), strict=True):
                    for value, vector in zip(values, self._run.combine(some), strict=True):
                        shares = [reductions.dot(vector[part], vector[part]) for part in self._blocks.values()]
                        found += value * torch.stack(shares).cpu() if shares else 0.0
            self._exact_blocks = self._layout.sums(found)
        return self._exact_blocks


def hutch_pp(
    matvec: MatVec,
    like: Tensor,
    num_matvecs: int,
    generator: torch.Generator,
    *,
    memory: MemoryBudget | None = None,
    layout: Layout = WHOLE,
) -> Estimate:
    """Trace by Hutch++: a third of the products find a range, a third its trace, a third probe the rest.

    Memory: ``num_matvecs / 3`` vectors.
    Stopped in the middle: the mean over the probes so far, at least two; before those, Hutchinson's estimate by the products
    that were to find the range.
    Raises:
        MemoryError: they do not fit in the budget.
        ValueError: fewer than 6 products, which leave no standard error.
    Source: Meyer, Musco, Musco and Woodruff, Hutch++: optimal stochastic trace estimation (2021).
    """
    if num_matvecs < 6:
        raise ValueError(f"Hutch++ needs at least 6 products, got {num_matvecs}")
    rank = num_matvecs // 3
    span, count = _Span(matvec, like, rank, memory, layout), num_matvecs - 2 * rank
    plain: list[Tensor] = []
    probes: list[Tensor] = []
    inside = 0.0
    try:
        while len(span) < rank:
            omega = signs(like, generator, layout)
            y = matvec(omega)
            plain.append(layout.dot(omega, y).cpu())
            if not span.add(y):
                break
        inside = _whole(span).trace().item()
        for _ in range(count if len(span) < layout.length(like) else 0):
            v = span.remove(signs(like, generator, layout))
            probes.append(layout.dot(v, matvec(v)).cpu())
    except MeasurementStopped:
        if len(probes) < 2:
            return _hutchinson(plain)
        return replace(mean_of(torch.stack(probes), inside), instead=f"Hutch++ with {len(probes)} of {count} probes")
    return mean_of(torch.stack(probes) if probes else torch.empty(0, dtype=torch.float64), inside)


def xtrace(
    matvec: MatVec,
    like: Tensor,
    num_matvecs: int,
    generator: torch.Generator,
    *,
    memory: MemoryBudget | None = None,
    layout: Layout = WHOLE,
) -> Estimate:
    """Trace by XTrace: as Hutch++, with every test vector used for the range and, left out of it, as a probe.

    The test vectors are uniform on a sphere, and what a probe has left beside the range is scaled back to the length that it
    has on average: measured, as accurate as signs or up to a sixth more. The standard error is that of exchangeable, not of
    independent estimates, and optimistic: its 95 % interval covers 89 to 95 % on networks of digits. Poor where the trace is
    a small difference of large parts (an untrained network), as everything that rests on a low rank.

    Memory: ``num_matvecs / 2`` vectors.
    Stopped in the middle: that of the test vectors whose range is known, where those are more than half; else Hutchinson's
    estimate by the products with test vectors, at least two.

    Raises:
        MemoryError: they do not fit in the budget.
        ValueError: fewer than 4 products.
    Source: Epperly, Tropp and Webber, XTrace: making the most of every sample in stochastic trace estimation (2024).
    """
    if num_matvecs < 4:
        raise ValueError(f"XTrace needs at least 4 products, got {num_matvecs}")
    count, dim = num_matvecs // 2, layout.length(like)
    span, before = _Span(matvec, like, count, memory, layout), generator.get_state()
    quadratic: list[Tensor] = []
    columns = torch.zeros((count, count), dtype=torch.float64)  # R of the QR decomposition of the products
    try:
        for i in range(count):
            omega = on_sphere(like, generator, layout)
            y = matvec(omega)
            quadratic.append(layout.dot(omega, y).cpu())
            if not span.add(y):  # the range is exhausted, and the trace on it is the trace
                return Estimate(_whole(span).trace().item(), 0.0, 0)
            columns[: i + 1, i] = span.coefficients
        h = span.projected()
        if len(h) <= count // 2:
            raise MeasurementStopped
    except MeasurementStopped:
        return _hutchinson(quadratic)
    wanted, count = count, len(h)  # fewer where it was stopped: the first columns span the first vectors of the basis
    columns = columns[:count, :count]
    again = torch.Generator().manual_seed(0)
    again.set_state(before)  # the same test vectors, which need not be stored
    w = torch.stack([span.coordinates(on_sphere(like, again, layout))[:count] for _ in range(count)], dim=1)
    s = torch.linalg.inv(columns).T  # what of the span only column i contributes
    s = s / s.norm(dim=0)
    x = w - s * (s * w).sum(dim=0)
    without = h.trace() - (s * (h @ s)).sum(dim=0)
    probed = torch.stack(quadratic[:count]) - 2 * (x * columns).sum(dim=0) + (x * (h @ x)).sum(dim=0)
    found = mean_of(without + probed * (dim - count + 1) / (dim - x.square().sum(dim=0)))
    return found if count == wanted else replace(found, instead=f"XTrace with {count} of {wanted} test vectors")


def _hutchinson(samples: list[Tensor]) -> Estimate:
    """What products with random vectors tell by themselves.

    Raises:
        MeasurementStopped: fewer than two, which have no standard error.
    """
    if len(samples) < 2:
        raise MeasurementStopped
    said = f"Hutchinson's estimate by {len(samples)} products that were to find the range"
    return replace(mean_of(torch.stack(samples)), instead=said)


def _whole(span: _Span) -> Tensor:
    """``Qᵀ A Q``.

    Raises:
        MeasurementStopped: not all of it could be made.
    """
    h = span.projected()
    if len(h) < len(span):
        raise MeasurementStopped
    return h


class _Span:
    """An orthonormal basis, grown vector by vector, and an operator in it."""

    def __init__(self, matvec: MatVec, like: Tensor, size: int, memory: MemoryBudget | None, layout: Layout) -> None:
        self._matvec, self._like, self._layout = matvec, like, layout
        size = min(size, layout.length(like))
        if memory is not None:
            memory.require(f"the span of {size} products", size * like.nbytes, self)
        self._basis = Basis(size, like, layout=layout)
        self._filled = 0
        self.coefficients = torch.empty(0, dtype=torch.float64)

    def __len__(self) -> int:
        return self._filled

    def add(self, vector: Tensor) -> bool:
        """Append a vector; False where it lies in the span already. ``coefficients`` are those of the vector."""
        length = self._layout.norm(vector).item()
        if not math.isfinite(length):
            raise ArithmeticError("a product is not finite; look for infinite second derivatives")
        left, known = vector, torch.zeros(self._filled, dtype=torch.float64)
        for _ in range(2 if self._filled else 0):
            left, lacked, _ = self._orthogonalized(left)
            known += lacked
        size = self._layout.norm(left).item()
        exhausted = size <= _EXHAUSTED * torch.finfo(vector.dtype).eps * length * max(self._filled, 1) ** 0.5
        if exhausted or self._filled == len(self._basis):
            return False
        left, _, square = self._orthogonalized(left / size) if self._filled else (left / size, None, torch.tensor(1.0))
        self._basis.store(self._filled, left / square.sqrt().to(left))
        self.coefficients = torch.cat([known, torch.tensor([size], dtype=torch.float64)])
        self._filled += 1
        return True

    def remove(self, vector: Tensor) -> Tensor:
        """``vector`` without its part in the span."""
        for _ in range(2 if self._filled else 0):
            vector, _, _ = self._orthogonalized(vector)
        return vector

    def coordinates(self, vector: Tensor) -> Tensor:
        """``Qᵀ vector``, shape ``(len,)``, float64 on the CPU."""
        return self._orthogonalized(vector)[1]

    def projected(self) -> Tensor:
        """``Qᵀ A Q``, symmetric; one product for each vector. Of fewer, the first ones, where the measurement is stopped."""
        found: list[Tensor] = []
        with contextlib.suppress(MeasurementStopped):
            for i in range(self._filled):
                product = self._matvec(self._basis.row(i))
                found.append(self.coordinates(product))
        h = torch.stack(found)[:, : len(found)] if found else torch.zeros((0, 0), dtype=torch.float64)
        return (h + h.T) / 2

    def _orthogonalized(self, vector: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nothing = torch.zeros(self._filled, dtype=torch.float64, device=vector.device)
        left, lacked, square = self._basis.orthogonalize(vector, self._filled, nothing, self._filled)
        return left, lacked.cpu(), square
