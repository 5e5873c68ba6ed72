"""How much memory is free where, and what an error says that there was not enough."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch

__all__ = ["free_bytes", "is_out_of_memory"]

_MEMINFO = Path("/proc/meminfo")
_ALLOCATOR_SAYS = ("not enough memory", "can't allocate memory", "out of memory")


def free_bytes(device: torch.device) -> int | None:
    """Free bytes on the device, or of the host for the CPU; None where the system does not tell."""
    if device.type == "cuda":
        # what torch holds in reserve is free to it, too
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + idle)
    if device.type == "cpu":
        with contextlib.suppress(OSError, ValueError, IndexError):
            # unlike free pages, this counts the file cache, which fills the memory of a host that trains
            return 1024 * int(_MEMINFO.read_text().split("MemAvailable:")[1].split()[0])
        if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", ()):
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch could not allocate: its own error for a device, a plain ``RuntimeError`` for the host."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return type(error) is RuntimeError and any(words in str(error) for words in _ALLOCATOR_SAYS)
