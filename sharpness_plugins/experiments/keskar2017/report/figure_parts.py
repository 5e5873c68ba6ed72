"""What the report's figures have in common: colours, marks, notes, and dots with their bars."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ....plots import BLUE, GREEN, GREY, ORANGE
from .reading import Reading, finite, mean, moved_box

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "BARS",
    "COLOUR",
    "LINE",
    "MARKER",
    "SHARPNESS",
    "SHARPNESS_LABEL",
    "category_axis",
    "dots",
    "legend",
    "mean_and_deviation",
    "note",
    "seeds",
    "told_mean",
]

SHARPNESS = moved_box("full", 1e-3, "ours")
SHARPNESS_LABEL = "ε-box sharpness, ε = 1e-3 [%]"
COLOUR = {"small": BLUE, "large": ORANGE}
MARKER = {"small": "o", "large": "s"}
LINE = {"small": "-", "large": "--"}
BARS = "dots: seeds; bars: mean ± sample standard deviation"


def seeds(reading: Reading, study: str) -> str:
    count = len({network.seed for role in reading.roles(study) for network in reading.networks(study, role)})
    return "one seed" if count == 1 else f"{count} seeds"


def mean_and_deviation(seeds: str) -> str:
    return seeds if seeds == "one seed" else f"mean ± sample standard deviation, {seeds}"


def note(figure: Figure, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontsize=8, color=GREY)


def told_mean(values: Sequence[float], form: str = ".3g", scale: float = 1.0) -> str:
    """The mean, for who does not see it."""
    value = scale * mean(values)
    return f"{value:{form}}" if math.isfinite(value) else "no value"


def dots(axes: Axes, values: Sequence[float], at: float, kind: str, *, label: str | None = None) -> None:
    """A dot per seed, and mean and sample standard deviation beside them."""
    kept = finite(values)
    if not kept:
        return
    colour, marker = COLOUR.get(kind, GREEN), MARKER.get(kind, "D")
    spread = statistics.stdev(kept) if len(kept) > 1 else None
    axes.plot(
        kept, [at] * len(kept), linestyle="none", marker=marker, color=colour, markersize=3.5, alpha=0.45, markeredgewidth=0
    )
    axes.errorbar(
        [statistics.fmean(kept)], [at], xerr=None if spread is None else [spread], color=colour, marker=marker, markersize=6,
        capsize=3, linestyle="none", label=label,
    )  # fmt: skip


def legend(axes: Axes, place: Any = "best") -> None:
    """Where there is anything to name; older matplotlibs warn of an empty one."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc=place)


def category_axis(axes: Axes, names: Sequence[str]) -> None:
    """Names from top to bottom."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
