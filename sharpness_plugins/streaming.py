"""Weights that lie in shards, while a model computes with them: each module's are gathered when it begins.

Derivatives go through the gathering, also second ones: its adjoint adds up what all ranks have and leaves each its shard,
whose adjoint gathers again. What autograd saves of gathered weights for the backward pass is dropped, and gathered once more
when that comes. Every collective is announced by ``Ranks.next_step``, so that a rank which has no data takes part, one that
fails is heard of, and ranks that would wait for different things find out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.hooks import RemovableHandle

from .batches import Batch
from .distributed import Ranks, Step, StepKind
from .errors import RanksApartError
from .evaluation import Evaluator, WeightlessError
from .interrupts import surely
from .sharded_space import ShardedSpace, Unit

__all__ = ["Lent", "Stream", "StreamedEvaluator"]


class Lent(NamedTuple):
    """What came to this rank's shard from the others' data.

    Attributes:
        gradient: shape ``(dim,)``.
        products: with the rows, shape ``(k, dim)``.
    """

    gradient: Tensor
    products: Tensor


class _Saved(NamedTuple):
    """In place of a view of a gathered weight."""

    unit: int
    position: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Stream:
    """Puts gathered weights into a model for as long as each of its modules computes, and takes part where others do.

    Args:
        space: the parameters, and the units that they are gathered in.
    Attributes:
        hold_bytes: of gathered weights that may be kept from the forward pass of a batch to its backward pass; the same on
            every rank.
        rows: the vectors that second derivatives are multiplied with, shape ``(k, dim)``.
        collectives: of weights, gradients and vectors, so far.
    """

    def __init__(self, space: ShardedSpace, ranks: Ranks) -> None:
        self._space, self.ranks, self.hold_bytes = space, ranks, 0
        self.rows: Tensor | None = None
        self.collectives = 0
        self._product: int | None = None  # the row of the second backward pass that goes on
        self._pieces: tuple[Tensor, ...] | None = None
        self._held: dict[int, list[Tensor]] = {}
        self._left = 0  # of hold_bytes
        self._recent: tuple[int, list[Tensor]] | None = None  # the unit that was gathered last
        self._known: dict[int, tuple[StorageWeakRef, int, int]] = {}  # storages of gathered weights
        self._inside: list[tuple[nn.Module, bool]] = []  # modules that compute now, and whether they put weights in place
        self._outside: list[list[Tensor | nn.Parameter]] = [[] for _ in space.units]  # what stood where weights are now

    # ------------------------------------------------------------------ a pass

    @contextlib.contextmanager
    def over(self, flat: Tensor) -> Iterator[None]:
        """A pass over some data with the weights ``flat``, shape ``(dim,)``; others' that have none is ``lend``.

        Raises:
            WeightlessError: as the evaluation inside; the others have ended their passes by then, and ``lent`` is set.
        """
        if self._pieces is not None:
            raise RuntimeError("a model whose weights are sharded is evaluated while it is being evaluated")
        handles: list[RemovableHandle] = []
        try:
            self._pieces, self._left = torch.split(flat, self._space.numels), self.hold_bytes
            for index, unit in enumerate(self._space.units[1:], 1):
                # of what is inside, too: a checkpointed part runs again in the backward pass, without the unit around it
                for module in dict.fromkeys([unit.module, *(slot.module for slot in unit.slots)]):
                    handles.append(module.register_forward_pre_hook(self._entering(index), prepend=True))
                    handles.append(module.register_forward_hook(self._leaving(index), always_call=True))
            with saved_tensors_hooks(self._pack, self._unpack):
                self._enter(0)
                try:
                    yield
                except WeightlessError as error:
                    error.lent = self._follow(flat)
                    raise
            self.ranks.next_step(Step(StepKind.END))
        finally:
            surely(lambda: self._end(handles))

    def _end(self, handles: Iterable[RemovableHandle]) -> None:
        for index, outside in enumerate(self._outside):
            if outside:
                self._leave(index)
        for handle in handles:
            handle.remove()
        self._pieces, self._recent = None, None
        self._inside.clear()
        self._held.clear()
        self._known.clear()

    def lend(self, flat: Tensor) -> Lent:
        """This rank's part in a pass of the others, with the weights ``flat``."""
        self._pieces = torch.split(flat.detach(), self._space.numels)
        try:
            return self._follow(flat)
        finally:
            self._pieces = None

    @contextlib.contextmanager
    def multiplying(self, row: int) -> Iterator[None]:
        """A second backward pass, with that one of ``rows``."""
        self._product = row
        try:
            yield
        finally:
            self._product = None

    def _follow(self, flat: Tensor) -> Lent:
        count = 0 if self.rows is None else len(self.rows)
        totals = flat.new_zeros((1 + count, len(flat))).detach()
        parts = [torch.split(total, self._space.numels) for total in totals]
        while (step := self.ranks.next_step(None)) is not None and step.kind != StepKind.END:
            unit = self._space.units[step.of]
            if step.kind == StepKind.WEIGHTS:
                self._send_weights(unit)
            elif step.kind == StepKind.VECTOR:
                assert self.rows is not None
                vector = torch.split(self.rows[step.row], self._space.numels)
                self._gather(unit, [vector[position] for position in unit.selected])
            elif step.kind in (StepKind.GRADIENT, StepKind.PRODUCT):
                nothing = [flat.new_zeros(self._space.shapes[position]) for position in unit.selected]
                part = parts[0 if step.kind == StepKind.GRADIENT else 1 + step.row]
                for position, more in zip(unit.selected, self._add_up(unit, nothing), strict=True):
                    part[position].add_(more)
            else:
                raise RanksApartError("the ranks went different ways: one begins a pass inside of a pass of another")
        return Lent(totals[0], totals[1:])

    # ------------------------------------------------------------------ modules

    def _entering(self, index: int) -> Any:
        def enter(module: nn.Module, args: Any) -> None:
            self._inside.append((module, not self._outside[index]))
            if self._inside[-1][1]:
                self._enter(index)

        return enter

    def _leaving(self, index: int) -> Any:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if self._inside and self._inside[-1][0] is module and self._inside.pop()[1]:
                self._leave(index)

        return leave

    def _enter(self, index: int) -> None:
        unit = self._space.units[index]
        if not unit.slots:
            return
        weights = dict(
            zip([*(self._space.names[p] for p in unit.selected), *unit.constants], self._weights(index), strict=True)
        )
        for slot in unit.slots:
            self._outside[index].append(slot.module._parameters[slot.attribute])  # type: ignore[arg-type]
            slot.module._parameters[slot.attribute] = weights[slot.name]  # type: ignore[assignment]

    def _leave(self, index: int) -> None:
        # fewer than slots where it was interrupted
        for slot, parameter in zip(self._space.units[index].slots, self._outside[index], strict=False):
            slot.module._parameters[slot.attribute] = parameter  # type: ignore[assignment]
        self._outside[index] = []

    def _weights(self, index: int) -> list[Tensor]:
        """The whole weights of a unit, the selected ones differentiable."""
        unit, pieces = self._space.units[index], self._pieces
        assert pieces is not None
        found = self._gathered(index)
        taken = sum(tensor.nbytes for tensor in found)
        if index not in self._held and taken <= self._left:
            self._held[index] = found
            self._left -= taken
        count = len(unit.selected)
        weights: list[Tensor] = (
            list(_Gather.apply(self, index, found[:count], *(pieces[p] for p in unit.selected))) if count else []
        )
        converted = [self._space.convert(tensor, p) for tensor, p in zip(weights, unit.selected, strict=True)]
        return converted + found[count:]

    def _gathered(self, index: int) -> list[Tensor]:
        """The whole weights of a unit, gathered if they are not here."""
        if (held := self._held.get(index)) is not None:
            return held
        if self._recent is None or self._recent[0] != index:
            self._recent = None  # before the next one comes
            self.ranks.next_step(Step(StepKind.WEIGHTS, index))
            self._recent = (index, self._send_weights(self._space.units[index]))
            for i, tensor in enumerate(self._recent[1]):
                reference = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
                self._known[reference.cdata] = (reference, index, i)
        return self._recent[1]

    def _send_weights(self, unit: Unit) -> list[Tensor]:
        assert self._pieces is not None
        found = self._gather(unit, [self._pieces[position].detach() for position in unit.selected])
        return found + [self._gather_constant(name) for name in unit.constants]

    # ------------------------------------------------------------------ what autograd saves

    def _pack(self, tensor: Tensor) -> Any:
        if tensor.layout is torch.strided and self._known:
            known = self._known.get(tensor.untyped_storage()._cdata)
            if known is not None:
                _, unit, index = known
                return _Saved(unit, index, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
        return tensor

    def _unpack(self, saved: Any) -> Tensor:
        if not isinstance(saved, _Saved):
            return saved  # type: ignore[no-any-return]
        weight = self._gathered(saved.unit)[saved.position]
        return weight.as_strided(saved.size, saved.stride, saved.offset)

    # ------------------------------------------------------------------ collectives

    def gather_vector(self, index: int, own: Sequence[Tensor]) -> list[Tensor]:
        """The whole of a row, for the second backward pass of a unit."""
        self.ranks.next_step(Step(StepKind.VECTOR, index, self._product or 0))
        return self._gather(self._space.units[index], own)

    def add_up(self, index: int, whole: Sequence[Tensor]) -> list[Tensor]:
        """This rank's part of the sum over the ranks of a unit's gradients."""
        product = self._product
        self.ranks.next_step(Step(StepKind.GRADIENT, index) if product is None else Step(StepKind.PRODUCT, index, product))
        return self._add_up(self._space.units[index], whole)

    def _gather(self, unit: Unit, own: Sequence[Tensor]) -> list[Tensor]:
        """The whole selected parameters of a unit, from this rank's parts."""
        if not unit.selected:
            return []
        shapes = [self._space.shapes[position] for position in unit.selected]
        widths = [self._space.width(shape.numel()) for shape in shapes]
        sent = torch.cat([_padded(part.detach(), width) for part, width in zip(own, widths, strict=True)])
        self.collectives += 1
        columns = torch.split(self.ranks.gathered(sent), widths, dim=1)
        # contiguous, and at the beginning of storages of their own
        flat = [rows.clone(memory_format=torch.contiguous_format).view(-1) for rows in columns]
        return [vector[: shape.numel()].view(shape) for vector, shape in zip(flat, shapes, strict=True)]

    def _gather_constant(self, name: str) -> Tensor:
        own, shape = self._space.own_constants[name], self._space.shape_of(name)
        self.collectives += 1
        rows = self.ranks.gathered(_padded(own, self._space.width(shape.numel())))
        return rows.reshape(-1)[: shape.numel()].view(shape)

    def _add_up(self, unit: Unit, whole: Sequence[Tensor]) -> list[Tensor]:
        size = self.ranks.size
        widths = [self._space.width(tensor.numel()) for tensor in whole]
        columns = [
            _padded(tensor.detach().reshape(-1), size * width).view(size, width)
            for tensor, width in zip(whole, widths, strict=True)
        ]
        self.collectives += 1
        parts = torch.split(self.ranks.scattered_sum(torch.cat(columns, dim=1)), widths)
        return [part[: self._space.numels[position]] for part, position in zip(parts, unit.selected, strict=True)]


class StreamedEvaluator(Evaluator):
    """As ``Evaluator``, at points of which this rank has a shard. All ranks evaluate together, or lend what they have."""

    def __init__(self, module: nn.Module, space: ShardedSpace, seed: int, stream: Stream) -> None:
        super().__init__(module, space, seed)
        self.stream = stream

    def call(self, function: Callable[[nn.Module, Any], Any], flat: Tensor, batch: Batch) -> Any:
        with self.stream.over(flat):
            return super().call(function, flat, batch)


def _padded(vector: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(vector, (0, length - len(vector)))


class _Gather(torch.autograd.Function):
    """Whole weights from the shards of all ranks."""

    @staticmethod
    def forward(ctx: Any, stream: Stream, index: int, whole: list[Tensor], *own: Tensor) -> tuple[Tensor, ...]:
        ctx.stream, ctx.index = stream, index
        return tuple(tensor.detach() for tensor in whole)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return (None, None, None, *_AddUp.apply(ctx.stream, ctx.index, *gradients))


class _AddUp(torch.autograd.Function):
    """Shards of the sum over the ranks: the adjoint of gathering."""

    @staticmethod
    def forward(ctx: Any, stream: Stream, index: int, *whole: Tensor) -> tuple[Tensor, ...]:
        ctx.stream, ctx.index = stream, index
        return tuple(stream.add_up(index, whole))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *own: Tensor) -> tuple[Any, ...]:
        return (None, None, *ctx.stream.gather_vector(ctx.index, own))
