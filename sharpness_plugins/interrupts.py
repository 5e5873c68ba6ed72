"""What must be done to its end, whatever interrupts."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["surely"]


def surely(restore: Callable[[], object]) -> None:
    """Run ``restore`` to its end, again if Ctrl-C falls into it, and only then let that out."""
    interrupt: KeyboardInterrupt | None = None
    while True:
        try:
            restore()
            break
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt
