"""Products with a random matrix of signs ±1 that is never a matrix: packed bits, or nothing at all.

The sign of an element in column ``c`` is bit ``c % 32`` of word ``c // 32 % 4`` that Philox gives for the element in stream
``c // 128``. Packed, that is one 16-bit code per element for every 16 columns, and a byte where 8 or fewer are left: a row
per code, so that each is read contiguously.

On a CPU a code indexes the 65 536 possible sums of its 16 columns, or 65 536 bins: measured at 100 columns, 6 to 12 ns per
element and product, against 20 to 27 of a dense float32 product that reads 30 times as many bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .dispatch import Operation
from .philox import check_segments, signed_key, words
from .vectors import arithmetic_dtype, check_vectors

__all__ = ["num_bytes", "sign_gram", "sign_lift", "sign_pack", "sign_restrict"]

STREAM_COLUMNS = 128
_CODES = STREAM_COLUMNS // 16
_UNPACKED = 2**12  # 1.7 MB of float32 for 100 columns; sums of as many squares of 128 are exact in float32
_DRAWN = 2**15  # the ten rounds of Philox then stay in a core's cache
_READ = 2**17  # a table of 2**16 sums and what is read by it, 1.5 MB at most
_PANEL = 2**20  # elements between two visits of the tables, whose making then costs a hundredth


def num_bytes(columns: int) -> int:
    """Bytes per element of packed signs: 13 for 100 columns."""
    return -(-columns // 8)


def sign_pack(packed: Tensor, segments: Tensor, key: int, columns: int) -> None:
    """Fill ``packed``, uint8 of shape ``(num_bytes(columns) * length,)``, with the signs of all elements.

    Cost: one Philox call per element and 128 columns.
    Raises:
        ValueError: a table or buffer that does not fit.
    """
    _check_columns(columns)
    length = packed.numel() // num_bytes(columns)
    _check_packed(packed, columns, length)
    check_segments(segments, length, packed.device)
    _PACK(packed, segments, signed_key(key), columns)


def sign_lift(
    out: Tensor,
    coefficients: Tensor,
    segments: Tensor,
    key: int,
    *,
    origin: Tensor | None = None,
    packed: Tensor | None = None,
) -> None:
    """Write ``A y``, or ``x + A y`` with an ``origin``, into ``out``.

    Args:
        out: shape ``(length,)``; may be the origin itself.
        coefficients: y, shape ``(columns,)``.
        segments: what the elements are, see ``segment_table``.
        packed: the signs from ``sign_pack``; None draws them again, which takes no memory.
    Cost: packed, ``num_bytes(columns)`` bytes read per element; drawn again, one Philox call and 128 columns.
    Raises:
        ValueError: vectors, table or packed signs do not fit each other.
    """
    check_vectors(out=out) if origin is None else check_vectors(out=out, origin=origin)
    _check_columns(coefficients.numel())
    if coefficients.ndim != 1:
        raise ValueError(f"coefficients must be a vector, got shape {tuple(coefficients.shape)}")
    check_segments(segments, len(out), out.device)
    _check_packed(packed, len(coefficients), len(out))
    _LIFT(out, origin, coefficients.to(out.device, torch.float64), packed, segments, signed_key(key))


def sign_restrict(vector: Tensor, segments: Tensor, key: int, columns: int, *, packed: Tensor | None = None) -> Tensor:
    """``Aᵀ g``: shape ``(length,)`` to ``(columns,)``, float64; in the same order every time.

    Args and cost: as in ``sign_lift``. Sums of up to 2²⁰ elements are taken in the dtype of the vector, over 65 536 sums.
    Raises:
        ValueError: vector, table or packed signs do not fit each other.
    """
    check_vectors(vector=vector)
    _check_columns(columns)
    check_segments(segments, len(vector), vector.device)
    _check_packed(packed, columns, len(vector))
    return torch.as_tensor(_RESTRICT(vector, packed, segments, signed_key(key), columns))


def sign_gram(length: int, segments: Tensor, key: int, columns: int, *, packed: Tensor | None = None) -> Tensor:
    """``AᵀA``, shape ``(columns, columns)``, float64: integers, exact in any order."""
    _check_columns(columns)
    _check_packed(packed, columns, length)
    check_segments(segments, length, segments.device)
    device = segments.device
    total = torch.zeros((num_bytes(columns), 8, num_bytes(columns), 8), dtype=torch.float64, device=device)
    for panel in _panels(length):
        octets = _octets(panel, segments, signed_key(key), columns, packed)
        by_pairs = device.type == "cpu" and _is_wide(octets[0])
        total += _gram_by_pairs(octets) if by_pairs else _gram_by_product(octets)
    size = 8 * num_bytes(columns)
    return total.view(size, size)[:columns, :columns].clone()


# ---------------------------------------------------------------- plain torch


def _pack(packed: Tensor, segments: Tensor, key: int, columns: int) -> None:
    rows = _rows(packed, columns)
    for panel in _panels(packed.numel() // num_bytes(columns)):
        for block in range(0, len(rows), _CODES):
            _draw([row[panel] for row in rows[block : block + _CODES]], segments, panel, key, block // _CODES)


def _lift(
    out: Tensor, origin: Tensor | None, coefficients: Tensor, packed: Tensor | None, segments: Tensor, key: int
) -> None:
    dtype = arithmetic_dtype(out.dtype)
    sums = _sums_of_columns(coefficients).to(dtype)
    for panel in _panels(len(out)):
        in_place = origin is None and out.dtype == dtype
        total = out[panel].zero_() if in_place else torch.zeros(panel.stop - panel.start, dtype=dtype, device=out.device)
        for block in range(0, len(sums), _CODES):
            rows = _codes(packed, segments, panel, key, len(coefficients), block)
            for row, (low, high) in zip(rows, sums[block:], strict=False):
                _look_up(total, row, low, high)
        if not in_place:
            out[panel] = total if origin is None else total.add_(origin[panel])


def _restrict(vector: Tensor, packed: Tensor | None, segments: Tensor, key: int, columns: int) -> Tensor:
    on_cpu = vector.device.type == "cpu"  # adding into bins is not deterministic on an accelerator
    shape = (_num_codes(columns), 2, 256) if on_cpu else (_num_codes(columns), 16)
    total = torch.zeros(shape, dtype=torch.float64, device=vector.device)
    for panel in _panels(len(vector)):
        weights = vector[panel].double()
        for block in range(0, len(total), _CODES):
            rows = _codes(packed, segments, panel, key, columns, block)
            for part, row in zip(total[block:], rows, strict=False):
                if on_cpu:
                    _add_by_byte(part, row, vector[panel], weights)
                else:
                    part += _sums_by_product(row, weights)
    by_column = total @ _byte_signs(vector.device) if on_cpu else total
    return by_column.view(-1)[:columns].clone()


def _look_up(total: Tensor, row: Tensor, low: Tensor, high: Tensor) -> None:
    """Add the sums of the columns of each code; the same terms in either way."""
    if not _is_wide(row):
        terms = [table.index_select(0, byte.int()) for table, byte in zip((low, high), _bytes(row), strict=False)]
        total += terms[0] if len(terms) == 1 else terms[0].add_(terms[1])
        return
    table = low if row.dtype == torch.uint8 else (high[:, None] + low).view(-1)
    for piece in _ranges(slice(0, len(row)), _READ):
        part = total[piece]
        part += table.index_select(0, row[piece].int())


def _add_by_byte(by_byte: Tensor, row: Tensor, vector: Tensor, weights: Tensor) -> None:
    """Add the sums of the elements of each low and each high byte, shape ``(2, 256)``; ``weights`` is the float64 vector."""
    if row.dtype == torch.uint8 or not _is_wide(row):
        for bins, byte in zip(by_byte, _bytes(row), strict=False):
            bins += torch.bincount(byte, weights, 256)
        return
    square = torch.zeros(2**16, dtype=arithmetic_dtype(vector.dtype))
    for piece in _ranges(slice(0, len(row)), _READ):
        square.scatter_add_(0, row[piece].long(), vector[piece].to(square.dtype))
    square = square.view(256, 256)
    by_byte[0] += square.sum(0, dtype=torch.float64)
    by_byte[1] += square.sum(1, dtype=torch.float64)


def _sums_by_product(row: Tensor, weights: Tensor) -> Tensor:
    """``Σ g_i s_ic`` for the 16 columns of each code."""
    bits = torch.arange(16, device=weights.device)[:, None]
    return ((row.int() >> bits & 1) * 2 - 1).double() @ weights


def _gram_by_pairs(octets: list[Tensor]) -> Tensor:
    """How often two bytes meet says all about their 64 pairs of columns: at 100 columns 2.5 times faster than a product."""
    signs = _byte_signs(octets[0].device).float()
    gram = torch.empty((len(octets), 8, len(octets), 8), dtype=torch.float64)
    for i, high in enumerate(octets):
        gram[i, :, i] = signs.T @ (torch.bincount(high, minlength=256)[:, None] * signs)
        shifted = high.int() << 8
        for j, low in enumerate(octets[:i]):
            counts = torch.bincount(shifted + low, minlength=2**16).view(256, 256)
            gram[i, :, j] = signs.T @ counts.float() @ signs  # sums of 2²⁰ signs are exact in float32
            gram[j, :, i] = gram[i, :, j].T
    return gram


def _gram_by_product(octets: list[Tensor]) -> Tensor:
    """From the counts of bits that are both set; powers of two are exact in whatever format a product rounds to."""
    device, size = octets[0].device, 8 * len(octets)
    bit = (1 << torch.arange(8, device=device)).to(torch.uint8)[:, None]
    counts = torch.zeros((size, size), dtype=torch.float64, device=device)
    for parts in zip(*(torch.split(octet, _UNPACKED) for octet in octets), strict=True):
        bits = (torch.stack(parts)[:, None] & bit).float().view(size, -1)
        counts += (bits @ bits.T).double()
    weight = bit.double().view(-1).repeat(len(octets))
    counts /= weight[:, None] * weight
    ones = counts.diagonal()
    gram: Tensor = 4 * counts - 2 * ones[:, None] - 2 * ones + len(octets[0])
    return gram.view(len(octets), 8, len(octets), 8)


def _ranges(whole: slice, size: int) -> Iterator[slice]:
    for first in range(whole.start, whole.stop, size):
        yield slice(first, min(first + size, whole.stop))


def _panels(length: int) -> Iterator[slice]:
    return _ranges(slice(0, length), _PANEL)


def _is_wide(row: Tensor) -> bool:
    """Whether tables of all 16 bits pay for their making; else two of 8 bits."""
    return len(row) >= 2**16


def _num_codes(columns: int) -> int:
    return -(-columns // 16)


def _rows(packed: Tensor, columns: int) -> list[Tensor]:
    """The codes of each 16 columns, shape ``(length,)``: uint16, the last uint8 where at most 8 columns are left."""
    double, single = divmod(num_bytes(columns), 2)
    length = packed.numel() // num_bytes(columns)
    rows = list(packed[: 2 * double * length].view(torch.uint16).view(double, length))
    return [*rows, packed[2 * double * length :]] if single else rows


def _bytes(row: Tensor) -> tuple[Tensor, ...]:
    """The low byte of each code, and the high one where there is one."""
    if row.dtype == torch.uint8:
        return (row,)
    first, second = row.view(torch.uint8).view(-1, 2).unbind(1)
    return (first, second) if sys.byteorder == "little" else (second, first)


def _codes(packed: Tensor | None, segments: Tensor, panel: slice, key: int, columns: int, block: int) -> list[Tensor]:
    """The codes of a panel from number ``block`` on, of 128 columns at most."""
    if packed is not None:
        return [row[panel] for row in _rows(packed, columns)[block : block + _CODES]]
    columns = min(columns - 16 * block, STREAM_COLUMNS)
    drawn = torch.empty(num_bytes(columns) * (panel.stop - panel.start), dtype=torch.uint8, device=segments.device)
    rows = _rows(drawn, columns)
    _draw(rows, segments, panel, key, block // _CODES)
    return rows


def _draw(rows: list[Tensor], segments: Tensor, panel: slice, key: int, stream: int) -> None:
    for piece in _ranges(panel, _DRAWN if segments.device.type == "cpu" else _PANEL):
        halves = (half for word in words(segments, piece, stream, key) for half in (word & 0xFFFF, word >> 16))
        for row, half in zip(rows, halves, strict=False):
            row[piece.start - panel.start : piece.stop - panel.start] = half if row.dtype == torch.uint16 else half & 0xFF


def _octets(panel: slice, segments: Tensor, key: int, columns: int, packed: Tensor | None) -> list[Tensor]:
    """The bytes of 8 columns each, shape ``(panel,)``, uint8."""
    blocks = range(0, _num_codes(columns), _CODES)
    rows = [row for block in blocks for row in _codes(packed, segments, panel, key, columns, block)]
    return [byte.contiguous() for row in rows for byte in _bytes(row)]


@cache
def _byte_signs(device: torch.device) -> Tensor:
    """Bit b of each of the 256 values of a byte as a sign, shape ``(256, 8)``, float64."""
    values = torch.arange(256, device=device)[:, None]
    return ((values >> torch.arange(8, device=device) & 1) * 2 - 1).double()


def _sums_of_columns(coefficients: Tensor) -> Tensor:
    """``Σ ± y_c`` over the columns of the low and of the high byte of each code, shape ``(codes, 2, 256)``, float64."""
    padded = coefficients.new_zeros(16 * _num_codes(len(coefficients)))
    padded[: len(coefficients)] = coefficients
    return (padded.view(-1, 8) @ _byte_signs(coefficients.device).T).view(-1, 2, 256)


# ---------------------------------------------------------------- checks and operators


def _check_columns(columns: int) -> None:
    if columns < 1:
        raise ValueError(f"a subspace needs at least one column, got {columns}")


def _check_packed(packed: Tensor | None, columns: int, length: int) -> None:
    if packed is None:
        return
    size = num_bytes(columns)
    is_buffer = (
        packed.ndim == 1 and packed.dtype == torch.uint8 and packed.is_contiguous() and not packed.storage_offset() % 2
    )
    if not is_buffer or packed.numel() != size * length:
        raise ValueError(
            f"packed must be a vector of {size} bytes per element, aligned to 2, got {packed.dtype}, "
            f"shape {tuple(packed.shape)}"
        )


def _restrict_fake(vector: Tensor, packed: Tensor | None, segments: Tensor, key: int, columns: int) -> Any:
    return vector.new_empty(columns, dtype=torch.float64)


_PACK = Operation(
    "sign_pack",
    "(Tensor(a!) packed, Tensor segments, int key, int columns) -> ()",
    _pack,
    launcher="signs_triton:pack",
    mutates=("packed",),
)
_LIFT = Operation(
    "sign_lift",
    "(Tensor(a!) out, Tensor? origin, Tensor coefficients, Tensor? packed, Tensor segments, int key) -> ()",
    _lift,
    launcher="signs_triton:lift",
    mutates=("out",),
)
_RESTRICT = Operation(
    "sign_restrict",
    "(Tensor vector, Tensor? packed, Tensor segments, int key, int columns) -> Tensor",
    _restrict,
    launcher="signs_triton:restrict",
    fake=_restrict_fake,
)
