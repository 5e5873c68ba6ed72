"""The resident set of this process, in bytes: all memory, NumPy's and SciPy's with torch's."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

__all__ = ["largest_resident", "resident_now"]

_STATUS = Path("/proc/self/status")


def resident_now() -> int:
    """Where the system does not tell: the largest so far, which makes a growth too small and never too large."""
    return _kilobytes("VmRSS") * 1024 if _STATUS.exists() else largest_resident()


def largest_resident() -> int:
    if _STATUS.exists():  # ``ru_maxrss`` of a new process begins with that of the one which started it
        return _kilobytes("VmHWM") * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _kilobytes(entry: str) -> int:
    (line,) = [line for line in _STATUS.read_text().splitlines() if line.startswith(f"{entry}:")]
    return int(line.split()[1])
