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

from . import sharded
from .batches import Batch, leaves_of
from .distributed import Ranks, Step, StepKind
from .errors import RanksApartError
from .evaluation import Evaluator, WeightlessError
from .interrupts import surely
from .sharded_space import ShardedSpace, Slot, Unit

__all__ = ["Lent", "Stream", "StreamedEvaluator"]


_TOLD = {"dtype", "shape", "device", "requires_grad", "ndim", "layout", "is_cuda", "is_meta", "is_sparse"}
_TOLD |= {"size", "dim", "numel", "nelement", "element_size", "is_floating_point", "is_complex"}


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
        self._known: dict[int, tuple[StorageWeakRef, torch.dtype, int, int]] = {}  # storages of gathered weights
        self._inside: list[tuple[nn.Module, bool]] = []  # modules that compute now, and whether they put weights in place
        self._in_place: dict[int, dict[str, tuple[Tensor, int]]] = {}  # units that have weights, with their versions
        self._absent = [[_Absent(slot) for slot in unit.slots] for unit in space.units]
        self._grad_mode = True  # around the pass
        self._others = [set(sharded.forward_methods(unit.module)) for unit in space.units]  # that compute beside forward
        widths = [sum(space.width(space.shapes[p].numel()) for p in unit.selected) for unit in space.units]
        sizes = [width * space.origin.element_size() for width in widths]
        sizes += [space.width(own.numel()) * own.element_size() for own in space.whole_constants()]
        # made once: memory that ran out between a step that was agreed on and its collective would leave the others waiting
        self._sent = torch.empty(max(sizes), dtype=torch.uint8, device=space.device)
        self._received = torch.empty(max(sizes) * ranks.size, dtype=torch.uint8, device=space.device)

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
            self._grad_mode = torch.is_grad_enabled()
            for index, unit in enumerate(self._space.units):
                self._take_out(index)
                if index:
                    handles += self._watched(index, unit)
            with saved_tensors_hooks(self._pack, self._unpack):
                self._enter(0)
                try:
                    yield
                except WeightlessError as error:
                    error.lent = self._follow(flat)
                    raise
                self._leave(0)
            self.ranks.next_step(Step(StepKind.END))
        finally:
            surely(lambda: self._end(handles))

    def _end(self, handles: Iterable[RemovableHandle]) -> None:
        for index, unit in enumerate(self._space.units):
            for slot in unit.slots:
                slot.module._parameters[slot.attribute] = slot.parameter
            for name in self._others[index] if index else ():
                vars(unit.module).pop(name, None)
        for handle in handles:
            handle.remove()
        self._in_place.clear()
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
                self._send_weights(step.of, None)
            elif step.kind == StepKind.VECTOR and self.rows is not None:
                vector = torch.split(self.rows[step.row], self._space.numels)
                self._gather(unit, [vector[position] for position in unit.selected], None)
            elif step.kind in (StepKind.GRADIENT, StepKind.PRODUCT):
                part = parts[0 if step.kind == StepKind.GRADIENT else 1 + step.row]
                for position, more in zip(unit.selected, self._add_up(unit, [None] * len(unit.selected), None), strict=True):
                    part[position].add_(more)
            else:
                raise RanksApartError(f"the ranks went different ways: this one follows, and another asks for {step.name}")
        return Lent(totals[0], totals[1:])

    # ------------------------------------------------------------------ modules

    def _watched(self, index: int, unit: Unit) -> list[RemovableHandle]:
        """Hooks that put the weights of a unit in place while it computes, or a part of it without the unit around it.

        A checkpointed part does that: it runs again in the backward pass.
        """

        def enter(module: nn.Module, args: Any) -> None:
            self._inside.append((module, index not in self._in_place))
            if self._inside[-1][1]:
                self._enter(index)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if self._inside and self._inside[-1][0] is module and self._inside.pop()[1]:
                self._leave(index)

        def entering(method: Callable[..., Any]) -> Callable[..., Any]:
            def entered(*args: Any, **kwargs: Any) -> Any:
                enter(unit.module, args)
                answer = method(*args, **kwargs)
                leave(unit.module, args, answer)
                return answer

            return entered

        for name in self._others[index]:
            vars(unit.module)[name] = entering(getattr(unit.module, name))
        handles = []
        for module in dict.fromkeys([unit.module, *(slot.module for slot in unit.slots)]):
            handles.append(module.register_forward_pre_hook(enter, prepend=True))
            handles.append(module.register_forward_hook(leave, always_call=True))
        return handles

    def _enter(self, index: int) -> None:
        unit = self._space.units[index]
        if not unit.slots:
            return
        names = [*(self._space.names[p] for p in unit.selected), *unit.constants]
        weights = dict(zip(names, self._weights(index), strict=True))
        self._in_place[index] = {name: (weight, weight._version) for name, weight in weights.items()}
        for slot in unit.slots:
            slot.module._parameters[slot.attribute] = weights[slot.name]  # type: ignore[assignment]

    def _leave(self, index: int) -> None:
        self._take_out(index)
        for name, (weight, version) in self._in_place.pop(index, {}).items():
            if weight._version != version:
                raise RuntimeError(
                    f"the model writes to its weight {name!r} while it computes (max_norm of an embedding does, and "
                    "in-place operations), so it has no fixed loss to measure"
                )

    def _take_out(self, index: int) -> None:
        """Put what refuses to be used in the place of a unit's weights."""
        for slot, absent in zip(self._space.units[index].slots, self._absent[index], strict=True):
            slot.module._parameters[slot.attribute] = absent  # type: ignore[assignment]

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
        weights: list[Tensor] = []
        if count:
            with torch.set_grad_enabled(self._grad_mode):  # a module may turn it off, and on again inside
                weights += _Gather.apply(self, index, found[:count], *(pieces[p] for p in unit.selected))
        converted = [self._space.convert(tensor, p) for tensor, p in zip(weights, unit.selected, strict=True)]
        return converted + found[count:]

    def _gathered(self, index: int) -> list[Tensor]:
        """The whole weights of a unit, gathered if they are not here."""
        if (held := self._held.get(index)) is not None:
            return held
        if self._recent is None or self._recent[0] != index:
            self._recent = None  # before the next one comes
            self._recent = (index, self._send_weights(index, Step(StepKind.WEIGHTS, index)))
            for i, tensor in enumerate(self._recent[1]):
                reference = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
                self._known[reference.cdata] = (reference, tensor.dtype, index, i)
        return self._recent[1]

    def _send_weights(self, index: int, step: Step | None) -> list[Tensor]:
        """Of a unit, after this step or, where others asked for it, None."""
        assert self._pieces is not None
        unit = self._space.units[index]
        whole = self._gather(unit, [self._pieces[position] for position in unit.selected], step)
        return whole + [self._gather_constant(name) for name in unit.constants]

    # ------------------------------------------------------------------ what autograd saves

    def _pack(self, tensor: Tensor) -> Any:
        """A view of a gathered weight is dropped, unless its numbers are other ones (of another dtype, conjugated, ...)."""
        if tensor.layout is torch.strided and self._known and not tensor.is_conj() and not tensor.is_neg():
            known = self._known.get(tensor.untyped_storage()._cdata)
            if known is not None and known[1] == tensor.dtype:
                _, _, unit, index = known
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
        return self._gather(self._space.units[index], own, Step(StepKind.VECTOR, index, self._product or 0))

    def add_up(self, index: int, whole: Sequence[Tensor]) -> list[Tensor]:
        """This rank's part of the sum over the ranks of a unit's gradients."""
        product = self._product
        step = Step(StepKind.GRADIENT, index) if product is None else Step(StepKind.PRODUCT, index, product)
        return self._add_up(self._space.units[index], whole, step)

    def _gather(self, unit: Unit, own: Sequence[Tensor], step: Step | None) -> list[Tensor]:
        """The whole selected parameters of a unit, from this rank's parts.

        Args:
            step: that is agreed on before; None where others asked for it, and nothing is needed here.
        """
        shapes = [self._space.shapes[position] for position in unit.selected]
        widths = [self._space.width(shape.numel()) for shape in shapes]
        sent, received = self._rooms(sum(widths), self._space.dtype)
        for room, part in zip(torch.split(sent, widths) if widths else (), own, strict=True):
            room[: len(part)].copy_(part.detach())
        with self.ranks.in_one_piece():
            if step is not None:
                self.ranks.next_step(step)
            if unit.selected:
                self.ranks.gathered(sent, received)
        self.collectives += bool(unit.selected)
        if step is None or not unit.selected:
            return []
        columns = torch.split(received.view(self.ranks.size, -1), widths, dim=1)
        # at the beginning of storages of their own
        flat = [rows.clone(memory_format=torch.contiguous_format).view(-1) for rows in columns]
        return [vector[: shape.numel()].view(shape) for vector, shape in zip(flat, shapes, strict=True)]

    def _gather_constant(self, name: str) -> Tensor:
        own, shape = self._space.own_constants[name], self._space.shape_of(name)
        sent, received = self._rooms(self._space.width(shape.numel()), own.dtype)
        sent[: len(own)].copy_(own)
        self.ranks.gathered(sent.view(torch.uint8), received.view(torch.uint8))
        self.collectives += 1
        return received[: shape.numel()].clone().view(shape)

    def _add_up(self, unit: Unit, whole: Sequence[Tensor | None], step: Step | None) -> list[Tensor]:
        """This rank's parts of sums over the ranks; None stands for zeros."""
        numels = [self._space.shapes[position].numel() for position in unit.selected]
        widths = [self._space.width(numel) for numel in numels]
        own, rows = self._rooms(sum(widths), self._space.dtype)
        rows.zero_()
        for columns, tensor in zip(torch.split(rows.view(self.ranks.size, -1), widths, dim=1), whole, strict=True):
            if tensor is not None:
                _spread_out(tensor.detach().reshape(-1), columns)
        with self.ranks.in_one_piece():
            if step is not None:
                self.ranks.next_step(step)
            self.ranks.scattered_sum(rows, own)
        self.collectives += 1
        parts = zip(torch.split(own, widths), unit.selected, strict=True)
        return [part[: self._space.numels[position]].clone() for part, position in parts]

    def _rooms(self, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Where this rank's ``width`` numbers of a collective are, and those of all ranks."""
        count = width * dtype.itemsize
        return self._sent[:count].view(dtype), self._received[: count * self.ranks.size].view(dtype)


class StreamedEvaluator(Evaluator):
    """As ``Evaluator``, at points of which this rank has a shard. All ranks evaluate together, or lend what they have."""

    def __init__(self, module: nn.Module, space: ShardedSpace, seed: int, stream: Stream) -> None:
        super().__init__(module, space, seed)
        self.stream = stream

    def call(self, function: Callable[[nn.Module, Any], Any], flat: Tensor, batch: Batch) -> Any:
        with self.stream.over(flat):
            return super().call(function, flat, batch)


class _Absent:
    """In place of a parameter of a module that does not compute now: says what it is, and has no numbers."""

    def __init__(self, slot: Slot) -> None:
        self._name, self._parameter = slot.name, slot.parameter

    def __getattr__(self, attribute: str) -> Any:
        if attribute in _TOLD:
            return getattr(self._parameter, attribute)
        raise AttributeError(self._refusal())

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        absent = [leaf for leaf in leaves_of((args, kwargs or {})) if isinstance(leaf, cls)]
        raise RuntimeError(absent[0]._refusal() if absent else f"a sharded weight is not here for {function}")

    def _refusal(self) -> str:
        return (
            f"the weight {self._name!r} lies in shards, and is read outside of the forward pass of its module: by the loss, "
            "say, or by a checkpointed function that runs again. Leave penalties of weights out of the loss, wrap modules "
            "in checkpoints and not functions, or measure where the gathered weights fit in memory."
        )


def _spread_out(vector: Tensor, rows: Tensor) -> None:
    """Write the vector into the rows, one after the other, without what is missing of the last ones."""
    width = rows.shape[1]
    for row, piece in zip(rows, torch.split(vector, width) if width else (), strict=False):
        row[: len(piece)].copy_(piece)


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
