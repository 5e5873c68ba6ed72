"""Perturbations at random that are drawn where they are added, and never stored.

An element takes value ``e % 4`` of Philox call ``e // 4`` of its parameter as a normal, or bit ``e % 128`` of call
``e // 128`` as a sign. The noise is float32 whatever the vector is, so that the numbers do not depend on its dtype; the
scale is applied in the dtype of the arithmetic. A negative scale gives the antithetic perturbation.

Two words give two normals by Box and Muller's transformation. Its logarithm, sine and cosine are polynomials, added and
multiplied with a rounding each: the same bits on every device, where the functions of two libraries differ in the last one.
They are least-squares fits, wrong by 4e-8 (relative), 5e-9 and 3e-10.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .dispatch import Operation
from .philox import check_segments, grouped, signed_key
from .vectors import arithmetic_dtype, check_vectors, pieces, scalar

__all__ = ["perturb_normal", "perturb_rademacher"]

NORMALS = 4  # of one Philox call
SIGNS = 128
UNIT = 2.0**-32
QUADRANT = 2**22  # angles in a quarter of a turn
ANGLE = 3.7450703871400037e-07  # π / 2 / QUADRANT
SINE = (-0.16666655242443085, 0.008332165889441967, -0.00019515953317750245)  # (sin a - a) / a³ in a², |a| <= π / 4
COSINE = (0.04166664555668831, -0.0013887342065572739, 2.4435883460682817e-05)  # (cos a - 1 + a² / 2) / a⁴ in a²
LOG_2 = 0.6931471824645996
LOWEST = 0x3F3504F3  # √½, the lowest mantissa of the logarithm's argument
LOG = (  # (log(1 + f) - f) / f², √½ <= 1 + f < √2
    -0.49999985098838806,
    0.3333396017551422,
    -0.2500213384628296,
    0.19962060451507568,
    -0.16562996804714203,
    0.14910638332366943,
    -0.143527552485466,
    0.0880807414650917,
)


def perturb_normal(
    out: Tensor, scale: Tensor | float, segments: Tensor, key: int, *, origin: Tensor | None = None, stream: int = 0
) -> None:
    """Write ``origin + scale z`` with standard normal z, or ``scale z`` without an origin, into ``out``.

    From 32 bits: no value beyond 6.8. The implementations agree bit for bit.

    Args:
        out: shape ``(length,)``; may be the origin itself.
        scale: a number, or a 0-dim tensor on the device; its negative gives the antithetic perturbation.
        segments: what the elements are, see ``segment_table``.
        key: 64 bits, for instance from ``sampling.key_for``.
        stream: another number below 2³² for every further draw.
    Raises:
        ValueError: vectors or table do not fit each other; the stream is no 32-bit word.
    """
    _NORMAL(*_checked(out, scale, segments, key, origin, stream))


def perturb_rademacher(
    out: Tensor, scale: Tensor | float, segments: Tensor, key: int, *, origin: Tensor | None = None, stream: int = 0
) -> None:
    """Write ``origin + scale s`` with signs s = ±1, or ``scale s`` without an origin, into ``out``.

    Args and errors: as in ``perturb_normal``.
    """
    _RADEMACHER(*_checked(out, scale, segments, key, origin, stream))


def _checked(
    out: Tensor, scale: Tensor | float, segments: Tensor, key: int, origin: Tensor | None, stream: int
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, int, int]:
    check_vectors(out=out) if origin is None else check_vectors(out=out, origin=origin)
    check_segments(segments, len(out), out.device)
    if not 0 <= stream < 2**32:
        raise ValueError(f"stream must be a 32-bit word, got {stream}")
    return out, origin, scalar(scale, out), segments, stream, signed_key(key)


# ---------------------------------------------------------------- plain torch


def _normals(words: tuple[Tensor, ...]) -> Tensor:
    """Four normals per call, shape ``(4 * calls,)``, float32."""
    values = []
    for radius_word, angle_word in (words[:2], words[2:]):
        squared_radius = _log(radius_word.float().add_(0.5).mul_(UNIT)).mul_(-2)
        radius = squared_radius.double().sqrt_().float()  # on a CPU torch's float32 root errs in the last bit, one in six
        cosine, sine = _on_circle(angle_word)
        values += [cosine.mul_(radius), sine.mul_(radius)]
    return torch.stack(values, dim=1).view(-1)


def _log(x: Tensor) -> Tensor:
    bits = x.view(torch.int32) - LOWEST
    f = ((bits & 0x7FFFFF) + LOWEST).view(torch.float32).sub_(1)
    return _polynomial(f, LOG).mul_(f).mul_(f).add_(f).add_((bits >> 23).float().mul_(LOG_2))


def _on_circle(word: Tensor) -> tuple[Tensor, Tensor]:
    """A point of the unit circle per word: the quarter by the two highest bits, the angle in it by the next 22."""
    angle = ((word >> 8 & QUADRANT - 1) - QUADRANT // 2).float().mul_(ANGLE)
    square = angle * angle
    sine = _polynomial(square, SINE).mul_(square).mul_(angle).add_(angle)
    cosine = _polynomial(square, COSINE).mul_(square).mul_(square).add_(square.mul_(-0.5)).add_(1)
    swap, flip_sine = word >> 30 & 1 != 0, word >> 31 & 1 != 0
    flip_cosine = swap ^ flip_sine
    turned_cosine, turned_sine = torch.where(swap, sine, cosine), torch.where(swap, cosine, sine)
    return torch.where(flip_cosine, -turned_cosine, turned_cosine), torch.where(flip_sine, -turned_sine, turned_sine)


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    total = torch.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total.mul_(x).add_(coefficient)
    return total


def _signs(words: tuple[Tensor, ...]) -> Tensor:
    """128 signs per call, shape ``(128 * calls,)``, float32."""
    bits = torch.stack(words, dim=1)[:, :, None] >> torch.arange(32, device=words[0].device) & 1
    return bits.view(-1).float().mul_(2).sub_(1)


def _reference(noise_of: Callable[[tuple[Tensor, ...]], Tensor], per_call: int) -> Callable[..., None]:
    def perturb(out: Tensor, origin: Tensor | None, scale: Tensor, segments: Tensor, stream: int, key: int) -> None:
        for piece in pieces(len(out), out.device):
            words, index = grouped(segments, piece, stream, key, per_call)
            step = noise_of(words).index_select(0, index).to(arithmetic_dtype(out.dtype)).mul_(scale)
            out[piece] = step if origin is None else step.add_(origin[piece])

    return perturb


_SCHEMA = "(Tensor(a!) out, Tensor? origin, Tensor scale, Tensor segments, int stream, int key) -> ()"
_NORMAL = Operation(
    "perturb_normal",
    _SCHEMA,
    _reference(_normals, NORMALS),
    launcher="noise_triton:perturb_normal",
    mutates=("out",),
)
_RADEMACHER = Operation(
    "perturb_rademacher",
    _SCHEMA,
    _reference(_signs, SIGNS),
    launcher="noise_triton:perturb_rademacher",
    mutates=("out",),
)
