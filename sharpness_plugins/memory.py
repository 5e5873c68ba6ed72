"""How much memory is free where, and what an error says that there was not enough."""

from __future__ import annotations

import contextlib
import math
import os
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from . import distributed

__all__ = ["MemoryBudget", "free_bytes", "is_out_of_memory", "parse_bytes", "said_bytes"]

_MEMINFO = Path("/proc/meminfo")
_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# of torchrun, Open MPI, MPICH's relatives and Slurm
_RANKS_HERE = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE")
_ALLOCATOR_SAYS = ("not enough memory", "can't allocate memory", "out of memory")
_UNITS = {"": 1, **{f"{letter}{i}": (1024 if i else 1000) ** n for n, letter in enumerate("kmgt", 1) for i in ("", "i")}}
_AMOUNT = re.compile(r"\s*(?P<number>\d+\.?\d*|\.\d+)\s*(?P<unit>([kmgt]i?)?)b?\s*", re.IGNORECASE | re.ASCII)
_MOST_BATCHES = 4 * 2**30  # bytes, unless a budget is given


def free_bytes(device: torch.device) -> int | None:
    """Free bytes on the device, or for the CPU this rank's part of those of the host; None where the system does not tell.

    Of the host, what is available without swapping, or what the limit of a container leaves, where that is less. The ranks
    on it, which measure at the same time, have equal parts; where no launcher says how many are here, all are taken to be.
    """
    if device.type == "cuda":
        # what torch holds in reserve is free to it, too
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + idle)
    if device.type == "cpu":
        known = [count for count in (_available(), *_left_in_cgroups()) if count is not None]
        return max(min(known), 0) // _ranks_here() if known else None
    return None


def _available() -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        # unlike free pages, this counts the file cache, which fills the memory of a host that trains
        return 1024 * int(_MEMINFO.read_text().split("MemAvailable:")[1].split()[0])
    if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", ()):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _left_in_cgroups() -> Iterator[int]:
    """What each limit on this process leaves: of its own control group and of all around it, in both versions of Linux.

    A container may see itself at the root of the tree and be told a path from outside, which is not there.
    """
    with contextlib.suppress(OSError):
        for line in _OWN_CGROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                roots = [_CGROUPS, _CGROUPS / "unified"]
                names = ("memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                roots = [_CGROUPS / "memory"]
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            else:
                continue
            for root in roots:
                own = root / path.lstrip("/")
                for group in (own, *own.parents):
                    if group.is_relative_to(root) and (left := _left_in(group, *names)) is not None:
                        yield left


def _left_in(group: Path, limit: str, usage: str, cache: str) -> int | None:
    """The limit less what is used, but for files that would be dropped; None without a limit."""
    with contextlib.suppress(OSError, ValueError):
        most, used = int((group / limit).read_text()), int((group / usage).read_text())
        entries = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        return most - used + next((int(entry[1]) for entry in entries if entry[0] == cache), 0)
    return None


def _ranks_here() -> int:
    size = distributed.world_size()
    told = (os.environ.get(name, "") for name in _RANKS_HERE)
    return min(next((int(count) for count in told if count.isdecimal() and int(count)), size), size)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch could not allocate: its own error for a device, a plain ``RuntimeError`` for the host."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return type(error) is RuntimeError and any(words in str(error) for words in _ALLOCATOR_SAYS)


def parse_bytes(amount: int | str) -> int:
    """``4_000_000_000``, ``"4GB"`` (powers of 1000) or ``"4 GiB"`` (of 1024) as bytes.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(amount, int) and not isinstance(amount, bool) and amount >= 0:
        return amount
    match = _AMOUNT.fullmatch(amount) if isinstance(amount, str) else None
    if match is None:
        raise ValueError(f"memory must be bytes as an int or a text such as '4GB' or '512 MiB', got {amount!r}")
    return int(float(match["number"]) * _UNITS[match["unit"].lower()])


def said_bytes(count: float) -> str:
    """``1.5 GB``."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


class MemoryBudget:
    """Bytes on the device that may be kept from one evaluation to the next, shared by all who keep some.

    Those are the copy of the weights and the vectors that solvers work with, the batches, the Krylov basis, and the first
    graphs of Hessian-vector products, who take what the others left. What one evaluation itself takes is not in it: where
    that does not fit, batches are taken apart.

    Args:
        amount: bytes, or a text such as "4GB"; None for half of what is free to this rank now.
        vector_bytes: of one vector of the perturbation's shape.
    Attributes:
        total: None where nothing was asked for and the system does not tell what is free: then there is no limit.
        peak: the most that was kept at once.
    Raises:
        ValueError: ``amount`` is none, or does not even hold the weights and the vectors.
    """

    VECTORS = 8  # the weights, the point, and the most that a maximizer or a step of Lanczos holds

    def __init__(self, amount: int | str | None, *, device: torch.device, vector_bytes: int) -> None:
        self.device, self.is_automatic = device, amount is None
        self.total = None
        if amount is not None:
            self.total = parse_bytes(amount)
        elif (free := free_bytes(device)) is not None:
            self.total = max(free // 2, self.VECTORS * vector_bytes)
        least = self.VECTORS * vector_bytes
        if self.total is not None and self.total < least:
            raise ValueError(
                f"memory={amount!r} is less than {said_bytes(least)}, which the weights and the vectors that every solver "
                "works with take. Allow more, or perturb fewer parameters (select=...)."
            )
        self._held: dict[str, int] = {}
        self._peaks: dict[str, int] = {}
        self.peak = 0
        self.hold("weights and vectors", self.VECTORS * vector_bytes)

    @property
    def left(self) -> float:
        """Bytes that nobody keeps; infinite where there is no limit."""
        return math.inf if self.total is None else max(self.total - sum(self._held.values()), 0)

    @property
    def held(self) -> dict[str, int]:
        """Bytes by who keeps them now."""
        return dict(self._held)

    @property
    def for_batches(self) -> int:
        """What the batches may take: half of what is left, and at most 4 GiB unless a budget was given."""
        most = _MOST_BATCHES if self.is_automatic else math.inf
        return int(min(self.left // 2, most))

    def hold(self, what: str, count: int, owner: Any = None) -> None:
        """``count`` bytes more are kept, until ``release`` or, with an owner, until that is gone."""
        self._held[what] = self._held.get(what, 0) + count
        self._peaks[what] = max(self._peaks.get(what, 0), self._held[what])
        self.peak = max(self.peak, sum(self._held.values()))
        if owner is not None:
            weakref.finalize(owner, self.release, what, count)

    def release(self, what: str, count: int) -> None:
        self._held[what] -= count

    def require(self, what: str, count: int, owner: Any = None) -> None:
        """As ``hold``.

        Raises:
            MemoryError: so much is not left.
        """
        if count > self.left:
            raise MemoryError(
                f"{what} takes {said_bytes(count)}, and {said_bytes(self.left)} of the {said_bytes(self.total or 0)} that "
                "may be kept are left. Allow more (memory=...), or ask for fewer products or parameters (select=...)."
            )
        self.hold(what, count, owner)

    def describe(self) -> dict[str, Any]:
        """JSON."""
        return {"budget": self.total, "automatic": self.is_automatic, "peak": self.peak, "peaks": dict(self._peaks)}
