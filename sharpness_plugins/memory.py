"""How much memory is free where."""

from __future__ import annotations

import os

import torch

__all__ = ["free_bytes"]


def free_bytes(device: torch.device) -> int | None:
    """Free bytes on the device, or of the host for the CPU; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "cpu" and "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", ()):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
