"""How much memory is free where."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch

__all__ = ["free_bytes"]

_MEMINFO = Path("/proc/meminfo")


def free_bytes(device: torch.device) -> int | None:
    """Free bytes on the device, or of the host for the CPU; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "cpu":
        with contextlib.suppress(OSError, ValueError, IndexError):
            # unlike free pages, this counts the file cache, which fills the memory of a host that trains
            return 1024 * int(_MEMINFO.read_text().split("MemAvailable:")[1].split()[0])
        if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", ()):
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
