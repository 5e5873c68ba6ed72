"""Lanczos with thick restart and full re-orthogonalization: a run from one starting vector."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import distributed, sampling, steps
from .basis import Basis, bytes_per_vector
from .errors import MeasurementStopped
from .krylov import HALF_ROUNDING, Ending, LanczosRequest, LanczosResult
from .layout import WHOLE, Layout
from .memory import MemoryBudget, free_bytes, said_bytes

__all__ = ["MatVec", "basis_of_use", "lanczos"]

MatVec = Callable[[Tensor], Tensor]

_ASYMMETRY = 1e-2  # of the largest |value|; float32 products of deep networks are within 1e-5
_GUARD_TOLERANCE = 1e-2  # enough to know that nothing larger is still hidden
_GUARD_SHARE = 0.03  # of the distance to the wanted: as safe as 1 % of the value, and cheaper before a flat bulk
_ROUNDING = 10  # times the rounding unit times the largest |value|: what is below that is rounding of the products
_SPARE = 8  # vectors for the search of hidden copies, beside those that it leaves alone


def lanczos(
    matvec: MatVec,
    start: Tensor,
    request: LanczosRequest,
    *,
    generator: torch.Generator | None = None,
    memory: MemoryBudget | None = None,
    layout: Layout = WHOLE,
) -> LanczosResult:
    """The eigenvalues of a symmetric operator that ``request`` asks for, by thick-restart Lanczos, re-orthogonalized.

    Stops as soon as the wanted pairs and their guards have converged, the space is exhausted, or the budget is. Where the
    Krylov space is invariant before enough pairs are found, it goes on from a new random vector, orthogonal to it.

    Cost: one ``matvec`` a step (one pass over the data each, for a Hessian). Beside it, two sweeps over the vectors found
    so far: a tenth of the products of ResNet-18 on a CPU. One transfer to the host a step, of the coefficients.
    Memory: the basis, allocated once (0.6 GB for ResNet-18 in float32 with 14 vectors), and three vectors more; when it is
    full, the best Ritz vectors stay and the others make room.

    Args:
        matvec: ``v -> A v``, shape ``(dim,)`` to ``(dim,)``, ``A`` symmetric. It may keep what it returns, and must not keep
            ``v``.
        start: shape ``(dim,)``, not zero. Its dtype and device are those of the arithmetic.
        generator: of the new random vectors; must not draw ``start`` again.
        memory: the budget that the basis shares with what else is kept.
        layout: of the vectors. With shards, each rank keeps its shard of the basis; a step takes a sum over the ranks of one
            number, and one of the coefficients.
    Raises:
        ValueError: ``k`` exceeds ``dim``; ``start`` is zero or not finite, or in half precision.
        MemoryError: not even the smallest basis fits; says how many bytes it takes.
        ArithmeticError: a product is not finite, or the operator is not symmetric.
    Source: Wu and Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems (2000); Paige (1976) on why
        to re-orthogonalize; Parlett, The Symmetric Eigenvalue Problem (1998), on the error bars.
    """
    dim = layout.length(start)
    if request.k > dim:
        raise ValueError(f"k must be between 1 and the number of parameters, {dim}, got {request.k}")
    if start.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the arithmetic must be in float32 or float64, and the start vector is {start.dtype}")
    length = layout.norm(start).item()
    if not 0 < length < math.inf:
        raise ValueError(f"the start vector must be finite and not zero, its norm is {length}")
    generator = generator or sampling.generator_for(0, "lanczos")
    return _Run(matvec, start / length, request, generator, memory, layout).result()


@dataclass(frozen=True)
class _Ritz:
    """Ritz pairs of the basis, those of the wanted ends first."""

    values: Tensor
    coordinates: Tensor  # columns
    residuals: Tensor
    open_residuals: Tensor  # the part of them that more products lessen
    chosen: Tensor  # positions of the k wanted, in the order of the answer
    guards: Tensor
    rounding: float

    @property
    def needed(self) -> Tensor:
        return torch.cat([self.chosen, self.guards])


class _Run:
    """State of one run: a basis, the operator in it, and the vector that comes next."""

    def __init__(
        self,
        matvec: MatVec,
        start: Tensor,
        request: LanczosRequest,
        generator: torch.Generator,
        memory: MemoryBudget | None,
        layout: Layout,
    ) -> None:
        self._matvec, self._request, self._generator, self._layout = matvec, request, generator, layout
        self._dim = layout.length(start)
        self._wanted = min(request.wanted, self._dim)
        self._epsilon = torch.finfo(start.dtype).eps
        # rounding a unit vector to half precision puts so much of A times it out of reach
        self._storage_error = HALF_ROUNDING if request.storage == "half" else 0.0
        self._scope = steps.child("lanczos")
        saved = self._scope.saved()
        with self._scope.entered():
            size = (
                saved["size"]
                if saved
                else steps.step("size", lambda: _basis_size(start, request, self._wanted, memory, layout))
            )
        self._basis = Basis(size, start, request.storage, layout)
        if memory is not None and self._basis.device == memory.device:
            memory.hold("Krylov basis", self._basis.nbytes, self._basis)
        self._projected = torch.zeros((len(self._basis),) * 2, dtype=torch.float64)
        self._vector = self._basis.store(0, start)
        self._filled = 1
        self._couplings = torch.zeros(1, dtype=torch.float64)  # of the newest vector with the others, by symmetry
        self._used = 0
        # A times the basis, outside of the basis: beta in the last column, and what was given up for a new direction
        self._beta = self._asymmetry = 0.0
        self._given_up: list[Tensor] = []
        self._locked = 0  # rows that the search for hidden eigenvalues leaves alone
        self._num_hidden = 0
        self._alphas: list[float] = []
        self._betas: list[float] = []
        self._restarted = False
        if saved:
            self._set_state(saved)

    def result(self) -> LanczosResult:
        with self._scope.entered():
            return self._run()

    def _run(self) -> LanczosResult:
        while True:
            try:
                following = self._step()
            except MeasurementStopped:
                if self._filled < 2:
                    raise
                return self._result(self._before(), Ending.STOPPED)
            ritz = self._ritz()
            ending, searching = self._judge(ritz)
            if ending is not None:
                return self._result(ritz, ending)
            is_full = self._filled == len(self._basis)
            if searching:
                self._search(ritz)
            else:
                self._extend(ritz, following)
            if (searching or is_full) and not self._basis.is_spread:  # the products so far are no longer needed
                self._scope.save(self._state)

    def _state(self) -> dict[str, Any]:
        """All that the next step goes on from, as a tree."""
        return {
            "size": len(self._basis),
            "rows": self._basis.state(self._filled),
            "projected": self._projected[: self._filled, : self._filled],
            "couplings": self._couplings,
            "given_up": list(self._given_up),
            "alphas": list(self._alphas),
            "betas": list(self._betas),
            "counts": [self._used, self._locked, self._num_hidden],
            "restarted": self._restarted,
            "generator": self._generator.get_state(),
        }

    def _set_state(self, state: dict[str, Any]) -> None:
        rows, projected = state["rows"], state["projected"].cpu()
        self._basis.set_state(rows)
        self._filled = len(rows)
        self._vector = self._basis.row(self._filled - 1)
        self._projected[: self._filled, : self._filled] = projected
        self._couplings = state["couplings"].cpu()
        self._given_up = [outside.cpu() for outside in state["given_up"]]
        self._alphas, self._betas = state["alphas"], state["betas"]
        self._used, self._locked, self._num_hidden = state["counts"]
        self._restarted = state["restarted"]
        self._generator.set_state(state["generator"].cpu())

    def _step(self) -> Tensor:
        """One product, orthogonalized against the basis; sets its column of the projected operator."""
        last = self._filled - 1
        w = self._matvec(self._vector)
        self._used += 1
        coupled = self._couplings.nonzero()
        expected = self._couplings.to(w.device, copy=True)
        expected[last] = self._layout.dot(self._vector, w)
        first = int(coupled[0]) if len(coupled) else last
        # to where the next vector is kept, if there is room: to copy it costs as much as a sweep over two vectors
        out = self._basis.room(self._filled, self._vector)
        w, lacked, square = self._basis.orthogonalize(w, self._filled, expected, first, out=out)
        told = torch.cat([expected, lacked, square[None]]).cpu()  # the one transfer of the step
        if not torch.isfinite(told).all():
            raise ArithmeticError(
                f"product {self._used} with the operator is not finite; look for infinite second derivatives"
            )
        lacked = told[self._filled : -1]
        column = told[: self._filled] + lacked
        self._projected[last, : self._filled] = self._projected[: self._filled, last] = column
        self._beta = told[-1].sqrt().item()
        if not self._restarted:
            self._alphas.append(column[last].item())
        asymmetry = lacked[:last].abs()
        for outside in self._given_up:  # these couplings are known to be at most so large
            asymmetry[: len(outside)] -= outside.abs()
        self._asymmetry = asymmetry.max().item() if last else 0.0
        return w

    def _before(self) -> _Ritz:
        """Ritz pairs without the newest vector, whose product was not made; how far it couples is what they lack."""
        outside = self._couplings[:-1]
        self._filled -= 1
        theta, s = torch.linalg.eigh(self._projected[: self._filled, : self._filled])
        self._betas = self._betas[: max(len(self._alphas) - 1, 0)]
        scale = theta.abs().max().item()
        return self._pairs(theta, s, (outside @ s).abs() + self._storage_error * scale, scale)

    def _ritz(self) -> _Ritz:
        theta, s = torch.linalg.eigh(self._projected[: self._filled, : self._filled])
        scale = theta.abs().max().item()
        if self._asymmetry > _ASYMMETRY * scale:
            raise ArithmeticError(
                f"the operator is not symmetric (uᵀAv and vᵀAu differ by {self._asymmetry:.2g}, its largest Ritz value is "
                f"{scale:.2g}), so it has no such eigenvalues: an operation of the model has a wrong second derivative, or "
                "its products are not repeatable"
            )
        if self._beta <= _ROUNDING * self._epsilon * scale * self._filled**0.5:
            self._beta = 0.0  # the space is invariant
        if self._filled == self._dim:
            self._beta, self._given_up = 0.0, []
        return self._pairs(theta, s, self._beta * s[-1].abs() + self._storage_error * scale, scale)

    def _pairs(self, theta: Tensor, s: Tensor, open_residuals: Tensor, scale: float) -> _Ritz:
        order = _order(theta, self._request)
        theta, s, open_residuals = theta[order], s[:, order], open_residuals[order]
        residuals = open_residuals
        for outside in self._given_up:
            residuals = residuals + (outside @ s[: len(outside)]).abs()
        chosen = torch.arange(min(self._request.k, len(theta)))
        if self._request.which == "BE":
            chosen = chosen[torch.argsort(theta[chosen], descending=True)]
        guards = torch.arange(len(chosen), min(self._wanted, len(theta)))
        rounding = max(_ROUNDING * self._epsilon, 2 * self._storage_error) * scale
        return _Ritz(theta, s, residuals, open_residuals, chosen, guards, rounding)

    def _judge(self, ritz: _Ritz) -> tuple[Ending | None, bool]:
        """Why to end here, if so; and whether to search the complement of what was found."""
        if self._filled == self._dim:
            return Ending.WHOLE_SPACE, False
        if self._used < self._request.min_matvecs:
            return None, False
        exhausted = self._used == self._request.num_matvecs
        limits, residuals = self._limits(ritz), ritz.residuals[ritz.needed]
        if not self._request.check_multiplicity:
            met = residuals <= limits.clamp(min=ritz.rounding)
            if self._filled >= self._wanted and bool(met.all()):
                return Ending.CONVERGED if bool((residuals <= limits).all()) else Ending.ROUNDING, False
            return Ending.BUDGET if exhausted else None, False
        # half of each limit is left to what the search gives up; in the search, the complement stands for the guards
        needed = ritz.chosen if self._locked else ritz.needed
        met = ritz.open_residuals[needed] <= (limits[: len(needed)] / 2).clamp(min=ritz.rounding)
        if self._filled < self._wanted or not bool(met.all()):
            return Ending.BUDGET if exhausted else None, False
        resolved, hidden = self._complement(ritz)
        self._num_hidden += hidden
        if hidden or not resolved:
            return Ending.UNSEARCHED if exhausted else None, bool(hidden) or not self._locked
        k = len(ritz.chosen)
        return Ending.CONVERGED if bool((residuals[:k] <= limits[:k]).all()) else Ending.ROUNDING, False

    def _limits(self, ritz: _Ritz) -> Tensor:
        """What the residuals of the needed pairs must not exceed."""
        values, num_chosen = ritz.values[ritz.needed].abs(), len(ritz.chosen)
        limits = self._request.tolerance * values
        if len(ritz.guards):
            apart = (ritz.values[ritz.guards][:, None] - ritz.values[ritz.chosen]).abs().min(dim=1).values
            enough = torch.maximum(_GUARD_TOLERANCE * values[num_chosen:], _GUARD_SHARE * apart)
            limits[num_chosen:] = limits[num_chosen:].maximum(enough)
        return limits

    def _complement(self, ritz: _Ritz) -> tuple[bool, int]:
        """Whether the ends of the operator beside the locked vectors are known, and how many of the wanted were there.

        A value there is one of the wanted when it exceeds the least of those that were locked by more than their accuracy.
        """
        if not self._locked:
            return False, 0
        theta, s = torch.linalg.eigh(self._projected[self._locked : self._filled, self._locked : self._filled])
        locked = torch.linalg.eigvalsh(self._projected[: self._locked, : self._locked])
        hidden = 0
        for end, count in self._request.ends:
            keys, least = _keys(theta, end), _keys(locked, end).sort(descending=True).values[count - 1].item()
            best = int(keys.argmax())
            size = max(theta[best].abs().item(), abs(least))
            if self._beta * s[-1, best].abs().item() > max(_GUARD_TOLERANCE * size, ritz.rounding):
                return False, 0
            hidden += keys[best].item() - least > max(self._request.tolerance**2 * size, ritz.rounding)
        return True, hidden

    def _search(self, ritz: _Ritz) -> None:
        """Lock what was found and look beside it, from a new random vector."""
        rotation = ritz.coordinates[:, ritz.needed]
        outside = self._beta * rotation[-1]
        self._rotate(rotation)
        self._given_up.append(outside)
        self._locked = self._filled
        self._restarted = True
        self._append(self._fresh_direction(), torch.zeros(self._filled, dtype=torch.float64))

    def _extend(self, ritz: _Ritz, following: Tensor) -> None:
        """Append the next direction of the Krylov space, after making room where the basis is full."""
        couplings = torch.zeros(self._filled, dtype=torch.float64)
        couplings[-1] = self._beta
        if self._filled == len(self._basis):
            rotation = self._best(ritz)
            couplings = self._beta * rotation[-1]
            self._rotate(rotation)
            self._restarted = True
        if not self._beta:
            self._restarted = True
            self._append(self._fresh_direction(), couplings)
            return
        if not self._restarted:
            self._betas.append(self._beta)
        self._append(following.div_(self._beta), couplings)

    def _append(self, direction: Tensor, couplings: Tensor) -> None:
        self._vector = self._basis.store(self._filled, direction)
        self._couplings = torch.cat([couplings, torch.zeros(1, dtype=torch.float64)])
        self._filled += 1

    def _best(self, ritz: _Ritz) -> Tensor:
        """The rotation to the Ritz vectors that stay: the wanted, and one more for each that has converged (up to half of
        those to spare), as ARPACK does it: measured, up to a third fewer products than with any fixed number.

        What is locked stays as it is.
        """
        size, locked = len(self._basis), self._locked
        if not locked:
            k = len(ritz.chosen)
            converged = int((ritz.residuals[ritz.needed] <= self._limits(ritz))[:k].sum())
            kept = k + max(min(converged, (size - k) // 2), 1)
            return ritz.coordinates[:, : min(max(kept, self._wanted), size - 1)]
        theta, s = torch.linalg.eigh(self._projected[locked:size, locked:size])
        s = s[:, _order(theta, self._request)]
        rotation = torch.zeros((size, locked + (size - locked + 1) // 2), dtype=torch.float64)
        rotation[:locked, :locked] = torch.eye(locked)
        rotation[locked:, locked:] = s[:, : rotation.shape[1] - locked]
        return rotation

    def _rotate(self, rotation: Tensor) -> None:
        self._basis.rotate(rotation)
        kept = rotation.shape[1]
        projected = rotation.T @ self._projected[: self._filled, : self._filled] @ rotation
        self._projected[:kept, :kept] = (projected + projected.T) / 2
        self._given_up = [rotation[: len(outside)].T @ outside for outside in self._given_up]
        self._filled = kept

    def _fresh_direction(self) -> Tensor:
        """A random unit vector orthogonal to the basis, which does not span the space."""
        nothing = torch.zeros(self._filled, dtype=torch.float64, device=self._vector.device)
        while True:
            w = self._layout.normal(self._generator, self._vector)
            length = self._layout.norm(w)
            for _ in range(2):
                w, _, square = self._basis.orthogonalize(w, self._filled, nothing, self._filled)
            if square.sqrt() > 1e-3 * length:  # else what is left is mostly rounding; draw again
                w = w / square.sqrt().to(w.dtype)
                w, _, square = self._basis.orthogonalize(w, self._filled, nothing, self._filled)
                return w / square.sqrt().to(w.dtype)

    def _result(self, ritz: _Ritz, ending: Ending) -> LanczosResult:
        chosen = ritz.chosen
        ranked = torch.argsort(ritz.values, descending=True)
        return LanczosResult(
            request=self._request,
            values=ritz.values[chosen],
            residuals=ritz.residuals[chosen],
            bounds=_bounds(ritz)[chosen],
            ending=ending,
            num_matvecs=self._used,
            num_hidden=self._num_hidden,
            ritz_values=ritz.values[ranked],
            ritz_residuals=ritz.residuals[ranked],
            projected=self._projected[: self._filled, : self._filled].clone(),
            alphas=torch.tensor(self._alphas, dtype=torch.float64),
            betas=torch.tensor(self._betas, dtype=torch.float64),
            basis_size=len(self._basis),
            _chosen=chosen,
            _coordinates=ritz.coordinates,
            _basis=self._basis if self._request.keep_basis else None,
        )


def _keys(theta: Tensor, end: str) -> Tensor:
    """The larger, the more wanted."""
    return {"LA": theta, "SA": -theta, "LM": theta.abs()}[end]


def _order(theta: Tensor, request: LanczosRequest) -> Tensor:
    """Positions of Ritz values, the most wanted first; for both ends, alternating between them."""
    ends = [end for end, _ in request.ends]
    ranked = torch.argsort(_keys(theta, ends[0]), descending=True)
    if len(ends) == 1:
        return ranked
    half = (len(ranked) + 1) // 2
    alternating = torch.empty_like(ranked)
    alternating[::2], alternating[1::2] = ranked[:half], ranked[half:].flip(0)
    return alternating


def _bounds(ritz: _Ritz) -> Tensor:
    """``min(r, r²/gap)``, the gap being the distance to what the next Ritz value stands for (Parlett, theorem 11.7.1)."""
    distance = (ritz.values[:, None] - ritz.values).abs() - ritz.residuals
    gap = distance.fill_diagonal_(math.inf).min(dim=1).values
    r = ritz.residuals
    return torch.where(gap > r, r * (r / gap), r).clamp(min=ritz.rounding)


def basis_of_use(request: LanczosRequest, dim: int) -> int:
    """Vectors that a run stores where memory holds them."""
    most = request.max_basis if request.max_basis is not None else 2 * request.k + 4
    if request.check_multiplicity:
        most = max(most, min(request.wanted, dim) + _SPARE)
    return min(max(most, min(request.wanted, dim) + 2), dim)


def _basis_size(
    start: Tensor, request: LanczosRequest, wanted: int, memory: MemoryBudget | None = None, layout: Layout = WHOLE
) -> int:
    """Vectors to allocate: as many as are of use, or as fit."""
    dim, per_vector = layout.length(start), bytes_per_vector(start, request.storage, layout)
    smallest, size = min(wanted + 2, dim), basis_of_use(request, dim)
    free, budget, how = request.basis_bytes, request.basis_bytes, "free"
    if budget is None:
        on_host = request.storage == "host" and start.device.type != "cpu"
        left = None if memory is None or memory.total is None or on_host else int(memory.left)
        # the run must restart at the same steps on all ranks
        left = distributed.smallest(left)
        if memory is not None and left is not None and not memory.is_automatic:
            free = budget = left
            how = f"left of the {said_bytes(memory.total or 0)} that may be kept"
        else:
            free = distributed.smallest(free_bytes(torch.device("cpu") if request.storage == "host" else start.device))
            known = [bound for bound in (None if free is None else free // 2, left) if bound is not None]
            budget = min(known, default=None)  # the products need memory, too
    if free is None or budget is None or size * per_vector <= budget:
        return size
    if smallest * per_vector > free:
        raise MemoryError(
            f"a Krylov basis of {smallest} vectors, the fewest for {wanted} Ritz pairs, takes "
            f"{said_bytes(smallest * per_vector)} and {said_bytes(free)} are {how}. "
            "Ask for fewer eigenvalues, or for fewer parameters (select=...)."
        )
    return max(budget // per_vector, smallest)
