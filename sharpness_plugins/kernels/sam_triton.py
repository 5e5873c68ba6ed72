"""The Triton kernels of :mod:`.sam`, and how they are started: one launch for a whole list, through a table of addresses."""

# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import blocks, dispatch
from .blocks import sum_of_partials

__all__ = ["ELEMENTS", "ascent_", "norm", "perturb_", "restore_", "restore_sgd_"]

ELEMENTS = {torch.float32: tl.float32, torch.float64: tl.float64, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def address_of(table, row: tl.constexpr, num_tensors, tensor):
    return tl.load(table + row * num_tensors + tensor)


@triton.jit
def read(address, at, length, WHOLE: tl.constexpr, element: tl.constexpr, dtype: tl.constexpr):
    """From an address, which a multiple of 16 is promised of where the block is WHOLE."""
    pointer = address.to(tl.pointer_type(element))
    loaded = tl.load(tl.multiple_of(pointer, 16) + at) if WHOLE else tl.load(pointer + at, mask=at < length, other=0.0)
    return loaded.to(dtype)


@triton.jit
def write(address, at, value, length, WHOLE: tl.constexpr, element: tl.constexpr):
    pointer = address.to(tl.pointer_type(element))
    if WHOLE:
        tl.store(tl.multiple_of(pointer, 16) + at, value.to(element))
    else:
        tl.store(pointer + at, value.to(element), mask=at < length)


@triton.jit
def squares_block(gradient, weight, eta, at, length, WHOLE: tl.constexpr, element: tl.constexpr, dtype: tl.constexpr):
    u = read(gradient, at, length, WHOLE, element, dtype)
    if eta is not None:
        u = (tl.abs(read(weight, at, length, WHOLE, element, dtype)) + eta) * u
    return u * u


@triton.jit(do_not_specialize=["num_tensors", "num_blocks"])
def squares_kernel(
    table, lengths, places, num_tensors, num_blocks, eta_at, partials,
    BLOCK: tl.constexpr, element: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    eta = None if eta_at is None else tl.load(eta_at).to(dtype)
    sums = tl.zeros([BLOCK], dtype)
    block = program
    while block < num_blocks:
        tensor, first = tl.load(places + 2 * block), tl.load(places + 2 * block + 1) * BLOCK
        length = tl.load(lengths + tensor)
        gradient = address_of(table, 0, num_tensors, tensor)
        weight = address_of(table, 0 if eta_at is None else 1, num_tensors, tensor)
        at = first + tl.arange(0, BLOCK)
        if (first + BLOCK <= length) & ((gradient | weight) % 16 == 0):
            sums += squares_block(gradient, weight, eta, at, length, True, element, dtype)
        else:
            sums += squares_block(gradient, weight, eta, at, length, False, element, dtype)
        block += programs
    tl.store(partials + program, tl.sum(sums).to(tl.float64))


@triton.jit
def perturb_block(
    weight, gradient, backup, scale, moves, eta, at, length,
    WHOLE: tl.constexpr, element: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    w = read(weight, at, length, WHOLE, element, dtype)
    u = read(gradient, at, length, WHOLE, element, dtype)
    write(backup, at, w, length, WHOLE, element)
    if eta is not None:
        t = tl.abs(w) + eta
        u = u * t * t
    write(weight, at, tl.where(moves, w + u * scale, w), length, WHOLE, element)


@triton.jit(do_not_specialize=["num_squares", "num_tensors"])
def perturb_kernel(
    table, lengths, places, num_tensors, squares, num_squares, norm, rho, eta_at,
    MAX_PARTIALS: tl.constexpr, BLOCK: tl.constexpr, element: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    if squares is None:
        size = tl.load(norm)
    else:
        size = tl.sqrt(sum_of_partials(squares, num_squares, MAX_PARTIALS))
        if block == 0:
            tl.store(norm, size)
    moves = (size > 0) & (size < float("inf"))
    scale = (tl.load(rho) / size).to(dtype)
    eta = None if eta_at is None else tl.load(eta_at).to(dtype)
    tensor, first = tl.load(places + 2 * block), tl.load(places + 2 * block + 1) * BLOCK
    length = tl.load(lengths + tensor)
    weight = address_of(table, 0, num_tensors, tensor)
    gradient = address_of(table, 1, num_tensors, tensor)
    backup = address_of(table, 2, num_tensors, tensor)
    at = first + tl.arange(0, BLOCK)
    if (first + BLOCK <= length) & ((weight | gradient | backup) % 16 == 0):
        perturb_block(weight, gradient, backup, scale, moves, eta, at, length, True, element, dtype)
    else:
        perturb_block(weight, gradient, backup, scale, moves, eta, at, length, False, element, dtype)


@triton.jit
def restore_block(weight, backup, at, length, WHOLE: tl.constexpr, element: tl.constexpr):
    write(weight, at, read(backup, at, length, WHOLE, element, element), length, WHOLE, element)


@triton.jit(do_not_specialize=["num_tensors"])
def restore_kernel(table, lengths, places, num_tensors, BLOCK: tl.constexpr, element: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    tensor, first = tl.load(places + 2 * block), tl.load(places + 2 * block + 1) * BLOCK
    length = tl.load(lengths + tensor)
    weight, backup = address_of(table, 0, num_tensors, tensor), address_of(table, 1, num_tensors, tensor)
    at = first + tl.arange(0, BLOCK)
    if (first + BLOCK <= length) & ((weight | backup) % 16 == 0):
        restore_block(weight, backup, at, length, True, element)
    else:
        restore_block(weight, backup, at, length, False, element)


@triton.jit
def restore_sgd_block(
    weight, backup, gradient, buffer, lr, momentum, undamped, weight_decay, at, length,
    DECAY: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, FIRST: tl.constexpr,
    WHOLE: tl.constexpr, element: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    w = read(backup, at, length, WHOLE, element, dtype)
    step = read(gradient, at, length, WHOLE, element, dtype)
    if MAXIMIZE:
        step = -step
    if DECAY:
        step = step + w * weight_decay
    if MOMENTUM:
        m = step
        if not FIRST:
            m = read(buffer, at, length, WHOLE, element, dtype) * momentum + step * undamped
        write(buffer, at, m, length, WHOLE, element)
        step = step + m * momentum if NESTEROV else m
    write(weight, at, w - step * lr, length, WHOLE, element)


@triton.jit(do_not_specialize=["num_tensors"])
def restore_sgd_kernel(
    table, lengths, places, num_tensors, lr, settings,
    DECAY: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, FIRST: tl.constexpr,
    BLOCK: tl.constexpr, element: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    lr, momentum = tl.load(lr).to(dtype), tl.load(settings).to(dtype)
    undamped, weight_decay = tl.load(settings + 1).to(dtype), tl.load(settings + 2).to(dtype)
    tensor, first = tl.load(places + 2 * block), tl.load(places + 2 * block + 1) * BLOCK
    length = tl.load(lengths + tensor)
    weight, backup = address_of(table, 0, num_tensors, tensor), address_of(table, 1, num_tensors, tensor)
    gradient = address_of(table, 2, num_tensors, tensor)
    buffer = address_of(table, 3 if MOMENTUM else 0, num_tensors, tensor)
    at = first + tl.arange(0, BLOCK)
    if (first + BLOCK <= length) & ((weight | backup | gradient | buffer) % 16 == 0):
        restore_sgd_block(
            weight, backup, gradient, buffer, lr, momentum, undamped, weight_decay, at, length,
            DECAY, MOMENTUM, NESTEROV, MAXIMIZE, FIRST, True, element, dtype,
        )  # fmt: skip
    else:
        restore_sgd_block(
            weight, backup, gradient, buffer, lr, momentum, undamped, weight_decay, at, length,
            DECAY, MOMENTUM, NESTEROV, MAXIMIZE, FIRST, False, element, dtype,
        )  # fmt: skip


# Tables are made on the host and sent once, for each stream, whose order makes them arrive before the kernels: gradients
# too usually come back to the addresses they had. The host's copy is kept, since a captured graph sends it at every replay.


class _Sent(NamedTuple):
    host: Tensor
    there: Tensor


def _send(table: Tensor, device: torch.device) -> _Sent:
    if device.type != "cuda":
        return _Sent(table, table.to(device))
    pinned = table.pin_memory()  # from there the host need not wait for the copy
    return _Sent(pinned, pinned.to(device, non_blocking=True))


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@lru_cache(maxsize=64)
def _addresses(addresses: tuple[tuple[int, ...], ...], device: torch.device, stream: int) -> _Sent:
    return _send(torch.tensor(addresses), device)


@lru_cache(maxsize=64)
def _settings(numbers: tuple[float, ...], device: torch.device, stream: int) -> _Sent:
    return _send(torch.tensor(numbers, dtype=torch.float64), device)


@lru_cache(maxsize=64)
def _places(numels: tuple[int, ...], block: int, device: torch.device, stream: int) -> tuple[_Sent, _Sent]:
    """Lengths ``(num_tensors,)``; of every block, its tensor and how many are before it there, ``(num_blocks, 2)``."""
    lengths = torch.tensor(numels)
    counts = (lengths + block - 1).div(block, rounding_mode="floor")
    tensor = torch.repeat_interleave(counts)
    places = torch.stack([tensor, torch.arange(len(tensor)) - (counts.cumsum(0) - counts)[tensor]], dim=1)
    return _send(lengths, device), _send(places, device)


class _List:
    """Parallel lists of tensors without gaps and in one order, as the kernels see them."""

    def __init__(self, *lists: list[Tensor]) -> None:
        like = lists[0][0]
        self.device, self.stream = like.device, _stream(like.device)
        addresses = tuple(tuple(tensor.data_ptr() for tensor in tensors) for tensors in lists)
        table = _addresses(addresses, self.device, self.stream)
        block = blocks.size(like)
        lengths, places = _places(tuple(tensor.numel() for tensor in lists[0]), block, self.device, self.stream)
        self.num_blocks = len(places.there)
        self.arguments = (table.there, lengths.there, places.there, len(lists[0]))
        self.constants = {"BLOCK": block, "element": ELEMENTS[like.dtype]}
        self.dtype = blocks.dtype_of(like)


def _squares(gradients: list[Tensor], weights: list[Tensor], eta: Tensor | None) -> Tensor:
    """Partial sums, at most ``MAX_PARTIALS``."""
    lists = _List(gradients, *([weights] if eta is not None else []))
    programs = min(lists.num_blocks, blocks.MAX_PARTIALS)
    partials = blocks.partial_sums(1, programs, lists.device)
    dispatch.launch(
        squares_kernel, programs, *lists.arguments, lists.num_blocks, eta, partials,
        dtype=lists.dtype, **lists.constants,
    )  # fmt: skip
    return partials[0]


def norm(gradients: list[Tensor], weights: list[Tensor], eta: Tensor | None) -> Tensor:
    return _squares(gradients, weights, eta).sum().sqrt()


def perturb_(
    weights: list[Tensor],
    gradients: list[Tensor],
    backups: list[Tensor],
    norm: Tensor,
    rho: Tensor,
    eta: Tensor | None,
    squares: Tensor | None = None,
) -> None:
    """With ``squares``, the norm is taken from them and written to ``norm``."""
    lists = _List(weights, gradients, backups)
    dispatch.launch(
        perturb_kernel, lists.num_blocks, *lists.arguments, squares, 0 if squares is None else len(squares), norm, rho, eta,
        MAX_PARTIALS=blocks.MAX_PARTIALS, dtype=lists.dtype, **lists.constants,
    )  # fmt: skip


def ascent_(
    weights: list[Tensor], gradients: list[Tensor], backups: list[Tensor], rho: Tensor, eta: Tensor | None
) -> Tensor:
    squares = _squares(gradients, weights, eta)
    found = squares.new_empty(())
    perturb_(weights, gradients, backups, found, rho, eta, squares)
    return found


def restore_(weights: list[Tensor], backups: list[Tensor]) -> None:
    lists = _List(weights, backups)
    dispatch.launch(restore_kernel, lists.num_blocks, *lists.arguments, **lists.constants)


def restore_sgd_(
    weights: list[Tensor],
    backups: list[Tensor],
    gradients: list[Tensor],
    momentum_buffers: list[Tensor],
    lr: Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first_step: bool,
) -> None:
    lists = _List(weights, backups, gradients, *([momentum_buffers] if momentum else []))
    settings = _settings((momentum, 1 - dampening, weight_decay), lists.device, lists.stream).there
    dispatch.launch(
        restore_sgd_kernel, lists.num_blocks, *lists.arguments, lr, settings,
        DECAY=weight_decay != 0, MOMENTUM=momentum != 0, NESTEROV=nesterov, MAXIMIZE=maximize, FIRST=first_step,
        dtype=lists.dtype, **lists.constants,
    )  # fmt: skip
