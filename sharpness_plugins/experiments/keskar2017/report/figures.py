"""All figures of the report, in the paper's order."""

from __future__ import annotations

from collections.abc import Callable

from .drawing import Drawing
from .figures_beyond import cone, controls, distances, remedies, spectrum
from .figures_paper import against_loss, batch_sizes, lines, table3, warm_start
from .reading import Reading

__all__ = ["all_drawings"]


def all_drawings(reading: Reading) -> list[Drawing]:
    """In the paper's order; without those that the record has nothing for."""
    makers: tuple[Callable[[Reading], list[Drawing]], ...] = (
        table3,
        lines,
        batch_sizes,
        warm_start,
        against_loss,
        spectrum,
        cone,
        distances,
        remedies,
        controls,
    )
    return [drawing for maker in makers for drawing in maker(reading)]
