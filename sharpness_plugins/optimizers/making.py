"""The gradient of one step in the making: up, back, and what the rule makes of the gradients on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .. import distributed
from ..interrupts import surely
from ..kernels import sam
from .rules import Descent, Rule, Step, plus, times
from .tensors import Sums, check_movable, local, poison

__all__ = ["Ascent", "Making", "State", "Uphill"]

State = dict[str, dict[Tensor, Tensor]]  # by name and parameter, local and real
Gradients = Mapping[Tensor, Tensor]


@dataclass(frozen=True)
class Ascent:
    """The move that was made.

    Attributes:
        norm: of the gradient that it followed (of ``T g`` in a ball of another shape), shape ``()``, float64.
    """

    norm: Tensor

    @property
    def is_finite(self) -> Tensor:
        """Whether the weights moved, shape ``()``; a zero or non-finite gradient leaves them where they are."""
        return torch.isfinite(self.norm) & (self.norm > 0)


@dataclass
class Making:
    """What the passes of one step share. ``.grad`` of the parameters goes in and out.

    Attributes:
        parameters: all that require gradients, each once.
        norms: of the ascents so far, and of what is subtracted past the base optimizer; where one is not finite, ``.grad``
            is made to say so.
        radii: ρ of each.
        state: of the rule, a copy that becomes the rule's when the step is taken.
        undo: makes a function that puts back what a pass changes beside gradients; called before each pass but the first.
        rewind: puts random states back to where the first pass began, before each further one.
        group: process group of ranks that hold different parameters.
        room: copies of the weights, by parameter; it outlives the step. Memory that is new in each step would take more time
            on a CPU than all else that an ascent does (33 ms of 58 for 25 million weights, in page faults), and it is needed
            when memory is scarcest, during the second pass.
        is_local: first gradients differ between ranks that take the same step.
        replicas: process group of those; None for all.
        evaluated: whether a pass over the data came before the first ascent.
        returns: whether an exception in an ascent puts the gradients back that it began with.
    """

    rule: Rule
    parameters: list[Tensor]
    radii: list[float]
    index: int
    state: State
    scale: Tensor
    momentum: Callable[[Tensor], Tensor | None]
    noise: Callable[[Sequence[Tensor]], list[Tensor]]
    undo: Callable[[], Callable[[], None]]
    rewind: Callable[[], None] | None
    group: Any
    is_local: bool
    room: dict[Tensor, Tensor] = field(default_factory=dict)
    replicas: Any = None
    evaluated: bool = True
    returns: bool = True
    first: dict[Tensor, Tensor] = field(default_factory=dict)
    points: dict[Tensor, Tensor] = field(default_factory=dict)
    norms: list[Tensor] = field(default_factory=list)
    decoupled: dict[Tensor, Tensor] = field(default_factory=dict)
    surrogate_gap: Any = None

    @property
    def combines(self) -> bool:
        return type(self.rule).combine is not Rule.combine

    def ascent(self, number: int, into: Mapping[Tensor, Tensor | None] | None = None) -> Uphill:
        """The context in which gradient ``number + 2`` is made.

        Args:
            into: gradients that this one is added to; None for none.
        """
        return Uphill(self, number, into or {})

    def place_for(self, parameter: Tensor) -> Tensor:
        """Where to copy the weights to, with whatever it held last."""
        weight, place = local(parameter), self.room.get(parameter)
        described = [(t.shape, t.stride(), t.dtype, t.device) for t in (weight, place) if t is not None]
        if place is None or described[0] != described[1]:
            place = self.room[parameter] = torch.empty_like(weight)
        return place

    def sums(self, parameters: Sequence[Tensor]) -> Sums:
        return Sums([parameter.detach() for parameter in parameters], self.group)

    def step(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], second: Sequence[Tensor] | None) -> Step:
        weights = [local(parameter) for parameter in parameters]
        sums = self.sums(parameters)
        return Step(
            self.index,
            weights,
            gradients,
            second,
            self.scale,
            {name: self._listed(name, parameters, weights) for name in self.rule.state if name in self.state},
            sums.inner,
            sums.norm,
            lambda: self._momenta(parameters, weights),
            lambda: self.noise(weights),
        )

    def keep(self, step: Step, before: Mapping[str, Sequence[Tensor]], parameters: Sequence[Tensor]) -> None:
        """What a hook assigned to the state."""
        given = {id(tensor) for tensor in (*step.gradients, *(step.second or ()))}
        for name, tensors in step.state.items():
            if tensors is before.get(name):
                continue
            if name not in self.rule.state:
                raise ValueError(f"{self.rule!r} keeps {name!r}, which is not in its state = {self.rule.state}")
            own = (tensor.clone() if id(tensor) in given else tensor for tensor in tensors)
            self.state[name] = {**self.state.get(name, {}), **dict(zip(parameters, own, strict=True))}

    def finish(self, *, plain: bool) -> None:
        """Make the gradient that the base optimizer gets of what ``.grad`` holds.

        Args:
            plain: in this step the rule was not asked.
        """
        second = {p: local(p.grad) for p in self.parameters if p.grad is not None}
        with torch.no_grad():
            if self.combines and not plain:
                self._combine(second)
            if self.norms:
                lost = (
                    self.norms[0] if len(self.norms) == 1 else torch.stack([n.to(self.norms[0]) for n in self.norms]).sum()
                )
                if self.is_local:
                    lost = distributed.sum_over_ranks(lost, self.replicas)
                poison([local(p.grad) for p in self.parameters if p.grad is not None], lost)
        self.first.clear()
        self.points.clear()

    def _combine(self, second: dict[Tensor, Tensor]) -> None:
        ascended = bool(self.norms)
        first: Gradients = self.first if ascended else second
        if self.is_local and ascended and self.rule.needs_gradient:  # the second ones are means already
            own = [_or_zeros(first, parameter) for parameter in self.parameters]
            first = dict(zip(self.parameters, distributed.mean_over_ranks(own, self.replicas), strict=True))
        both = [p for p in self.parameters if p in first or p in second]
        gradients = [_or_zeros(first, p) for p in both] if first or not ascended else []
        step = self.step(both, gradients, [_or_zeros(second, p) for p in both] if ascended else None)
        before = dict(step.state)
        made = self.rule.combine(step)
        self.keep(step, before, both)
        if isinstance(made, Descent):
            self.decoupled = dict(zip(both, made.decoupled, strict=True))
            self.norms.append(step.norm(made.decoupled))  # out of sight of who looks at .grad
            made = made.gradients
        for parameter, gradient in zip(both, made, strict=True):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad.is_conj():
                parameter.grad = parameter.grad.resolve_conj()
            target = local(parameter.grad)
            if second.get(parameter) is not gradient:
                target.copy_(gradient)

    def _listed(self, name: str, parameters: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        known = self.state[name]
        return [known[p] if p in known else torch.zeros_like(w) for p, w in zip(parameters, weights, strict=True)]

    def _momenta(self, parameters: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        found = [self.momentum(parameter) for parameter in parameters]
        if self.index > 0 and parameters and all(one is None for one in found):
            raise ValueError(
                f"{type(self.rule).__name__} looks at the momentum of the base optimizer, and it keeps none. Give it one: "
                "SGD(..., momentum=0.9), or Adam"
            )
        return [torch.zeros_like(w) if one is None else local(one) for one, w in zip(found, weights, strict=True)]


def _or_zeros(gradients: Gradients, parameter: Tensor) -> Tensor:
    found = gradients.get(parameter)
    return torch.zeros_like(local(parameter)) if found is None else found


def _nothing() -> None:
    pass


class Uphill:
    """Inside, the weights stand at the end of an ascent, and ``.grad`` is empty; after it, they are back, bit for bit.

    An exception brings the gradients back that were there before, too.
    """

    def __init__(self, making: Making, number: int, into: Mapping[Tensor, Tensor | None]) -> None:
        self._making, self._number, self._into = making, number, into
        self._backups: dict[Tensor, Tensor] = {}
        self.was_left = False

    @torch.no_grad()
    def __enter__(self) -> Ascent:
        making = self._making
        self._before = [parameter.grad for parameter in making.parameters] if making.returns else []
        self._undo = making.undo() if making.evaluated else _nothing
        try:
            norm = self._climb()
            making.norms.append(norm.to(local(making.parameters[0]).device) if making.parameters else norm)
            for parameter in making.parameters:
                parameter.grad = self._into.get(parameter)
            if making.rewind is not None:
                making.rewind()
        except BaseException:  # __exit__ will not be called
            self._go_back(restores_gradients=making.returns)
            raise
        making.evaluated = True
        return Ascent(norm)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        making = self._making
        making.points = {}
        try:
            if kind is None and self._number + 1 < making.rule.ascents:
                making.points = {parameter: local(parameter).clone() for parameter in self._backups}
        finally:
            self._go_back(restores_gradients=kind is not None and making.returns)
        self.was_left = kind is None

    def _go_back(self, *, restores_gradients: bool) -> None:
        surely(self._restore)
        if restores_gradients:
            for parameter, gradient in zip(self._making.parameters, self._before, strict=True):
                parameter.grad = gradient
        self._before, self._backups = [], {}

    @torch.no_grad()
    def _restore(self) -> None:
        sam.restore_([local(parameter) for parameter in self._backups], list(self._backups.values()))
        self._undo()

    def _climb(self) -> Tensor:
        making, rule = self._making, self._making.rule
        chosen = [
            (parameter, radius)
            for parameter, radius in zip(making.parameters, making.radii, strict=True)
            if parameter.grad is not None or not rule.needs_gradient
        ]
        parameters, radii = [parameter for parameter, _ in chosen], [rho * rule.stride for _, rho in chosen]
        gradients = [local(p.grad) for p in parameters if p.grad is not None] if rule.needs_gradient else []
        step = making.step(parameters, gradients, None)
        check_movable(step.weights, gradients or step.weights, radii)
        if self._number == 0 and making.combines:
            for parameter, gradient in zip(parameters, gradients, strict=False):
                known = making.first.get(parameter)
                if known is None:  # DistributedDataParallel may keep gradients in memory that the next ones are written to
                    making.first[parameter] = gradient.clone() if distributed.world_size() > 1 else gradient
                else:
                    making.first[parameter] = known + gradient
        before = dict(step.state)
        shape, direction = rule.metric(step), rule.direction(step)
        making.keep(step, before, parameters)
        direction = [u.to(w.dtype) for u, w in zip(direction, step.weights, strict=True)]
        if making.points:
            return self._climb_on(parameters, step, shape, direction, radii)
        backups = [making.place_for(parameter) for parameter in parameters]
        norm = climb(step.weights, direction, backups, shape, radii, making.sums(parameters))
        self._backups = dict(zip(parameters, backups, strict=True))
        return norm

    def _climb_on(
        self,
        parameters: list[Tensor],
        step: Step,
        shape: Sequence[Tensor] | float | None,
        direction: Sequence[Tensor],
        radii: Sequence[float],
    ) -> Tensor:
        """From the point that the last ascent reached, and back into the ball."""
        making, rule = self._making, self._making.rule
        moved = list(dict.fromkeys([*making.points, *parameters]))
        origins = {parameter: local(parameter).clone() for parameter in moved}
        if isinstance(shape, (int, float)):
            shape = [weight.abs() + shape for weight in step.weights]
        self._backups = origins
        for parameter, point in making.points.items():
            local(parameter).copy_(point)
        scratch = [torch.empty_like(weight) for weight in step.weights]
        norm = climb(step.weights, direction, scratch, shape, radii, making.sums(parameters))
        if rule.stride * rule.ascents > 1 + 1e-9:
            self._project(moved, {} if shape is None else dict(zip(parameters, shape, strict=True)))
        return norm

    def _project(self, moved: list[Tensor], shape: Gradients) -> None:
        """On the ball ``‖δ / (T ρ)‖ <= 1``."""
        making = self._making
        radii = dict(zip(making.parameters, making.radii, strict=True))
        moves = plus([local(p) for p in moved], [self._backups[p] for p in moved], -1.0)
        lengths = []
        for parameter, move in zip(moved, moves, strict=True):
            unit = radii[parameter] * shape.get(parameter, torch.ones((), dtype=move.dtype, device=move.device))
            lengths.append(torch.where(unit == 0, 0.0, move / torch.where(unit == 0, 1.0, unit)))
        length = making.sums(moved).norm(lengths)
        for parameter, move in zip(moved, times(moves, 1 / length.clamp(min=1.0)), strict=True):
            local(parameter).copy_(self._backups[parameter] + move)


def climb(
    weights: Sequence[Tensor],
    direction: Sequence[Tensor],
    backups: Sequence[Tensor],
    shape: Sequence[Tensor] | float | None,
    radii: Sequence[float],
    sums: Sums,
) -> Tensor:
    """Copy the weights to ``backups`` and move them by ``ρ T² u / ‖T u‖``; returns the norm. Nothing moves if it fails."""
    eta: float | None = None
    moves: Sequence[Tensor] = direction
    if shape is None or isinstance(shape, (int, float)):
        eta = shape
        if len(set(radii)) == 1 and not sums.are_shared:
            return sam.sam_ascent_(weights, direction, backups, radii[0], eta=eta)
        norm = sums.norm(direction, weights, eta=eta)
    else:
        scaled = [t * u for t, u in zip(shape, direction, strict=True)]
        moves = [t * u for t, u in zip(shape, scaled, strict=True)]
        norm = sums.norm(scaled)
    done: list[int] = []
    try:
        for rho in dict.fromkeys(radii):
            mine = [index for index, radius in enumerate(radii) if radius == rho]
            w, u, b = ([tensors[index] for index in mine] for tensors in (weights, moves, backups))
            sam.perturb_(w, u, b, norm, rho, eta=eta)
            done += mine
    except BaseException:
        surely(lambda: sam.restore_([weights[index] for index in done], [backups[index] for index in done]))
        raise
    return norm
