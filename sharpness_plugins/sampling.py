"""Random numbers: keyed generators, sign columns that any device can regenerate, and global state put back.

The only file that draws. Every stream is keyed by ``(seed, name)``, so that one more metric changes no other, and is
drawn on the CPU, so that devices agree.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "generator_for",
    "generator_states",
    "global_states",
    "key_for",
    "normal",
    "permutation",
    "philox",
    "pieces_of_normal",
    "pieces_of_uniform",
    "rng_states",
    "seed_global",
    "set_generator_states",
    "torch_state",
    "uniform",
]

_MASK = 0xFFFFFFFF
_CHUNK = 2**20  # numbers, a multiple of 16


def key_for(seed: int, *names: str | int) -> int:
    """A 64-bit key that differs for every seed and path of names."""
    text = repr((int(seed), *names)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


def generator_for(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator of its own for ``names`` (a metric's name, say)."""
    return torch.Generator().manual_seed(key_for(seed, *names) >> 1)  # manual_seed takes 63 bits


def normal(dim: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Standard normal vector, shape ``(dim,)``, with the dtype and device of ``like``."""
    return torch.randn(dim, generator=generator, dtype=like.dtype).to(like.device)


def uniform(dim: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Vector uniform in [-1, 1), shape ``(dim,)``, with the dtype and device of ``like``."""
    return torch.rand(dim, generator=generator, dtype=like.dtype).mul_(2).sub_(1).to(like.device)


def pieces_of_normal(dim: int, ranges: Sequence[tuple[int, int]], generator: torch.Generator, like: Tensor) -> Tensor:
    """What ``normal`` would draw at the positions ``[start, stop)`` of each range, in order, without room for the rest."""
    return _pieces(torch.randn, dim, ranges, generator, like)


def pieces_of_uniform(dim: int, ranges: Sequence[tuple[int, int]], generator: torch.Generator, like: Tensor) -> Tensor:
    """What ``uniform`` would draw at the positions ``[start, stop)`` of each range, in order, without room for the rest."""
    return _pieces(torch.rand, dim, ranges, generator, like).mul_(2).sub_(1)


def _pieces(
    draw: Callable[..., Tensor], dim: int, ranges: Sequence[tuple[int, int]], generator: torch.Generator, like: Tensor
) -> Tensor:
    """By chunks of sixteens, which torch draws normal numbers in; of a call that ends between, it draws the last anew."""
    answer, filled, waiting, begin = like.new_empty(sum(b - a for a, b in ranges)), 0, list(ranges), 0
    while begin < dim:
        end = begin + _CHUNK if dim - begin >= _CHUNK + 16 else dim
        chunk = draw(end - begin, generator=generator, dtype=like.dtype)
        while waiting and waiting[0][0] < end:
            start, stop = waiting.pop(0)
            piece = chunk[start - begin : min(stop, end) - begin]
            answer[filled : filled + len(piece)] = piece
            filled += len(piece)
            if stop > end:
                waiting.insert(0, (end, stop))
        begin = end
    return answer


def permutation(num_samples: int, generator: torch.Generator) -> Tensor:
    """The integers below ``num_samples`` in random order, int64: 8 bytes each."""
    return torch.randperm(num_samples, generator=generator)


def philox(counter: tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int], key: int) -> tuple[Tensor | int, ...]:
    """Four 32-bit words (as int64) per counter: Philox4x32-10, the same numbers on every device.

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011); Random123's known answers are a test.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & _MASK, key >> 32 & _MASK
    for _ in range(10):
        # the products wrap modulo 2^64 as int64, and the mask undoes the sign of the shift
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    return c0, c1, c2, c3


def seed_global(seed: int, device: torch.device | None = None) -> None:
    """Seed the global generators that data sets and models draw from: torch's, NumPy's legacy one, Python's."""
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        torch.cuda.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the legacy global state is what augmentations use
    random.seed(seed)


def rng_states(device: torch.device, holders: Iterable[Any] = ()) -> Callable[[], None]:
    """A function that puts the random states back: the global ones, and those of generators that ``holders`` carry.

    Args:
        device: its state is kept beside the CPU's (for CUDA: that one device's).
        holders: objects such as a loader and its samplers.
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    own = generator_states(holders)

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
        set_generator_states(own)

    return restore


def torch_state(device: torch.device) -> tuple[bytes, ...]:
    """The states of torch's generators that a model may draw from; equal before and after if nothing was drawn."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return tuple(state.numpy().tobytes() for state in states)


def global_states() -> dict[str, bytes]:
    """The states of the generators that a whole process shares, by their owners' names: torch (CPU), NumPy, Python."""
    _, numbers, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "NumPy": np.asarray(numbers).tobytes() + repr(rest).encode(),
        "Python": repr(random.getstate()).encode(),
    }


GeneratorStates = list[tuple[Any, Any]]


def generator_states(holders: Iterable[Any]) -> GeneratorStates:
    """The generators (torch's, NumPy's, Python's) that ``holders`` carry as attributes, with their states."""
    own: dict[int, Any] = {}
    for holder in holders:
        for value in getattr(holder, "__dict__", {}).values():
            if isinstance(value, (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)):
                own[id(value)] = value
    return [(generator, _state(generator)) for generator in own.values()]


def set_generator_states(states: GeneratorStates, *, offset: int = 0) -> None:
    """Put the generators back into these states; with an ``offset``, into another one that is as fixed."""
    for generator, state in states:
        if isinstance(generator, torch.Generator):
            generator.set_state(state)
            if offset:
                generator.manual_seed(generator.initial_seed() + offset)
        elif isinstance(generator, np.random.Generator):
            bits = generator.bit_generator
            bits.state = type(bits)(offset).state if offset else state
        elif isinstance(generator, np.random.RandomState):
            generator.set_state(state)
            if offset:
                generator.seed(offset)
        else:
            generator.setstate(state)
            if offset:
                generator.seed(offset)


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()
