"""Figures of what the paper says without one, and of the controls that it lacks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ....plots import GREY, error_bars, logarithmic, new_figure
from ..record import Curvature, TrainedNetwork, test_accuracy
from .drawing import Drawing
from .figure_parts import (
    BARS,
    COLOUR,
    LINE,
    MARKER,
    SHARPNESS,
    category_axis,
    dots,
    legend,
    mean_and_deviation,
    note,
    seeds,
    told_mean,
)
from .published import PAPER, box_ratios
from .reading import Reading, distance, finite, mean
from .tables import CONTROLS, REMEDY_NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["cone", "controls", "distances", "remedies", "spectrum"]


# --- spectrum and cone


def _curved(reading: Reading) -> dict[str, list[TrainedNetwork]]:
    return {
        role: [n for n in reading.networks("matched_loss", role) if n.curvature is not None] for role in ("small", "large")
    }


def spectrum(reading: Reading) -> list[Drawing]:
    found = _curved(reading)
    densities = {role: next((n for n in each if n.curvature and n.curvature.grid), None) for role, each in found.items()}
    tops = {
        role: [n.curvature.eigenvalues for n in each if n.curvature and n.curvature.eigenvalues]
        for role, each in found.items()
    }
    if not any(tops.values()) and not any(densities.values()):
        return []
    labels = {role: reading.batch("matched_loss", role) for role in found}
    threshold = reading.record.large_eigenvalue

    def draw() -> Figure:
        figure = new_figure(figsize=(7.2, 3.6))
        left, right = figure.subplots(1, 2, width_ratios=(1.4, 1))
        floors: list[float] = []
        for role, network in densities.items():
            if network is not None and network.curvature is not None:
                floors.append(_draw_density(left, network.curvature, role, f"{labels[role]}, seed {network.seed}"))
        if floors:
            left.set_yscale("log")
            left.set_ylim(bottom=max(floors))
            legend(left, "upper right")
        if math.isfinite(threshold):
            left.axvline(threshold, color=GREY, linewidth=0.8, linestyle=":")
            right.axhline(threshold, color=GREY, linewidth=0.8, linestyle=":")
        left.set_xlabel("eigenvalue [nats per squared weight]")
        left.set_ylabel("share of eigenvalues per unit,\nsmoothed, logarithmic")
        shown: list[float] = []
        for role, each in tops.items():
            if each:
                ranks = range(1, max(map(len, each)) + 1)
                values = [[values[rank - 1] for values in each if len(values) >= rank] for rank in ranks]
                error_bars(
                    right,
                    list(ranks),
                    values,
                    color=COLOUR[role],
                    marker=MARKER[role],
                    linestyle=LINE[role],
                    label=labels[role],
                )
                shown += finite([value for at in values for value in at])
        if shown and min(shown) > 0:
            logarithmic(right)
        right.xaxis.get_major_locator().set_params(integer=True)
        right.set_xlabel("rank")
        right.set_ylabel("eigenvalue [nats per squared weight]")
        for axes in (left, right):
            axes.grid(alpha=0.3)
        note(
            figure,
            f"left: first seed, band: two standard errors; right: {mean_and_deviation(seeds(reading, 'matched_loss'))}",
        )
        return figure

    told = "; ".join(
        f"{labels[role]}: largest eigenvalue {mean([values[0] for values in each]):.3g} on average"
        for role, each in tops.items()
        if each
    )
    return [
        Drawing(
            "density",
            "The spectrum of the Hessian at both minima",
            "Left: spectral density at equal training loss, smoothed, with a band of two Monte-Carlo standard errors "
            "(first seed); the "
            "axis ends at a tenth of the height of a single eigenvalue. Right: the largest eigenvalues by rank, "
            f"{mean_and_deviation(seeds(reading, 'matched_loss'))}. Dotted: from where on eigenvalues are counted "
            "as large.",
            told or "Densities of both minima, without the largest eigenvalues.",
            draw,
        )
    ]


def _draw_density(axes: Axes, curvature: Curvature, role: str, label: str) -> float:
    """Returns a tenth of the height of one eigenvalue, below which there is nothing to see."""
    floor = 0.1 / (max(curvature.dim, 1) * curvature.width * math.sqrt(2 * math.pi)) if curvature.width > 0 else 1e-9
    points = [
        point
        for point in zip(curvature.grid, curvature.density, curvature.density_error, strict=False)
        if all(map(math.isfinite, point))
    ]
    grid = [place for place, _, _ in points]
    axes.fill_between(
        grid,
        [max(value - 2 * error, floor) for _, value, error in points],
        [max(value + 2 * error, floor) for _, value, error in points],
        color=COLOUR[role],
        alpha=0.25,
        linewidth=0,
    )
    heights = [max(value, floor) for _, value, _ in points]
    axes.plot(grid, heights, color=COLOUR[role], linestyle=LINE[role], linewidth=1.4, label=label)
    return floor


def cone(reading: Reading) -> list[Drawing]:
    found = {
        role: [n.cone for n in reading.networks("matched_loss", role) if n.cone is not None] for role in ("small", "large")
    }
    cones = [cone for each in found.values() for cone in each]
    if not any(finite([*cone.random_rises, *cone.top_rises]) for cone in cones):
        return []
    labels = {role: reading.batch("matched_loss", role) for role in found}
    steep = cones[0].steep
    lowest = min([rise for cone in cones for rise in (*cone.random_rises, *cone.top_rises) if rise > 0], default=1.0)

    def draw() -> Figure:
        figure = new_figure(figsize=(7.2, 3.5))
        left, right = figure.subplots(1, 2, sharey=True)
        for role, each in found.items():
            for number, cone in enumerate(each):
                style: dict[str, Any] = {"color": COLOUR[role], "linestyle": LINE[role], "linewidth": 1, "alpha": 0.8}
                rises = sorted(finite(cone.random_rises), reverse=True)
                shares = [100 * (place + 1) / len(rises) for place in range(len(rises))]
                left.plot(
                    shares, [max(rise, lowest / 2) for rise in rises], label=labels[role] if number == 0 else None, **style
                )
                tops = [(rank, max(rise, lowest / 2)) for rank, rise in enumerate(cone.top_rises, 1) if math.isfinite(rise)]
                right.plot([r for r, _ in tops], [y for _, y in tops], marker=MARKER[role], markersize=3, **style)
        for axes in (left, right):
            logarithmic(axes)
            axes.axhline(steep, color=GREY, linewidth=0.9, linestyle=":")
            axes.grid(alpha=0.3)
        left.annotate(
            f"steep from {steep:g} % on", (1, steep), xycoords=("axes fraction", "data"), xytext=(-2, 3),
            textcoords="offset points", ha="right", va="bottom", color=GREY, fontsize=8,
        )  # fmt: skip
        left.set_xlabel("random directions, steepest first [% of them]")
        right.xaxis.get_major_locator().set_params(integer=True)
        right.set_xlabel("leading eigenvectors, by rank")
        left.set_ylabel("rise of the loss [%], logarithmic")
        legend(left)
        note(figure, f"a line per network, {seeds(reading, 'matched_loss')}; as far out as a corner of the ε-box of 1e-3")
        return figure

    told = "; ".join(
        f"{labels[role]}: at most {max(finite([r for c in each for r in c.random_rises]), default=math.nan):.2g} % "
        "along random "
        f"directions, up to {max(finite([r for c in each for r in c.top_rises]), default=math.nan):.3g} % along "
        "eigenvectors"
        for role, each in found.items()
        if each
    )
    return [
        Drawing(
            "cone",
            "Rise of the loss along random directions and along the leading eigenvectors",
            "How much the loss rises over the same distance (that of a corner of the ε-box of 1e-3) along random "
            "unit vectors and "
            "along the Hessian's leading eigenvectors, at equal training loss; a line per network, "
            f"{seeds(reading, 'matched_loss')}. "
            "What does not rise is drawn at the lower edge.",
            f"{told}.",
            draw,
        )
    ]


# --- distances, remedies, controls


def distances(reading: Reading) -> list[Drawing]:
    studies = [study for study in CONTROLS if reading.has(study, "small") or reading.has(study, "large")]
    paths = {role: reading.trajectories("sharpness_against_loss", role) for role in ("small", "large")}
    if not studies:
        return []

    def draw() -> Figure:
        figure = new_figure(figsize=(7.2, max(2.8, 0.5 * len(studies) + 1.2)))
        left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
        for offset, role in ((-0.14, "small"), (0.14, "large")):
            for row, study in enumerate(studies):
                values = reading.values(study, role, distance)
                dots(left, values, row + offset, role, label=f"{role} batch" if row == 0 else None)
        category_axis(left, [CONTROLS[study] for study in studies])
        ends = [value for study in studies for role in COLOUR for value in finite(reading.values(study, role, distance))]
        if ends and min(ends) > 0 and max(ends) > 5 * min(ends):
            logarithmic(left, "x")
            left.set_xlim(left=0.7 * min(ends))
        else:
            left.set_xlim(left=0)
        left.set_xlabel("‖w − w₀‖ at the end")
        legend(left)
        for role, each in paths.items():
            for trajectory in each:
                points = [(p.steps, p.distance) for p in trajectory.points if p.steps > 0 and p.distance > 0]
                right.plot(
                    [s for s, _ in points], [d for _, d in points], color=COLOUR[role], marker=MARKER[role],
                    linestyle=LINE[role], markersize=3, linewidth=1, alpha=0.8,
                )  # fmt: skip
        if any(paths.values()):
            logarithmic(right, "x")
            right.set_xlabel("steps, logarithmic")
            right.set_ylabel("‖w − w₀‖ on the way")
            right.grid(alpha=0.3)
        else:
            right.set_axis_off()
        note(figure, f"{seeds(reading, studies[0])}; left: {BARS}; right: a line per seed")
        return figure

    told = "; ".join(
        f"{CONTROLS[study]}: {told_mean(reading.values(study, 'small', distance))} and "
        f"{told_mean(reading.values(study, 'large', distance))}"
        for study in studies
    )
    return [
        Drawing(
            "distances",
            "Distances from the initial weights",
            "Left: distance of the trained from the initial weights by what is held equal, small and large batch; "
            f"{seeds(reading, studies[0])}; "
            f"{BARS}. Right: the same on the way, against the number of steps, a line per seed.",
            f"Mean distance at small and large batch, {told}.",
            draw,
        )
    ]


def remedies(reading: Reading) -> list[Drawing]:
    roles = [role for role in REMEDY_NAMES if reading.has("remedies", role)]
    if len(roles) < 2:
        return []

    def draw() -> Figure:
        figure = new_figure(figsize=(7.2, 0.38 * len(roles) + 1.3))
        left, right = figure.subplots(1, 2, sharey=True)
        for row, role in enumerate(roles):
            kind = {"small": "small", "none": "large"}.get(role, "remedy")
            dots(left, [100 * value for value in reading.values("remedies", role, test_accuracy)], row, kind)
            dots(right, reading.values("remedies", role, SHARPNESS), row, kind)
        shown = finite([value for role in roles for value in reading.values("remedies", role, SHARPNESS)])
        if shown and min(shown) > 0:
            logarithmic(right, "x")
        category_axis(left, [REMEDY_NAMES[role] for role in roles])
        right.grid(axis="x", alpha=0.3)
        left.set_xlabel("test accuracy [%]")
        right.set_xlabel("ε-box, ε = 1e-3 [%], logarithmic")
        note(figure, f"{seeds(reading, 'remedies')}; {BARS}")
        return figure

    told = "; ".join(
        f"{REMEDY_NAMES[role]}: {told_mean(reading.values('remedies', role, test_accuracy), '.2f', 100)} % and "
        f"{told_mean(reading.values('remedies', role, SHARPNESS))} %"
        for role in roles
    )
    return [
        Drawing(
            "remedies",
            "Remedies: accuracy and sharpness",
            "Test accuracy and sharpness of the large batch with each remedy, beside the large batch without "
            "(orange) and the small "
            f"batch (blue), at equal training loss; {seeds(reading, 'remedies')}; {BARS}.",
            f"Test accuracy and sharpness, {told}.",
            draw,
        )
    ]


def controls(reading: Reading) -> list[Drawing]:
    studies = [study for study in CONTROLS if reading.has(study, "small", "large")]
    if len(studies) < 2:
        return []

    def differences(study: str) -> list[float]:
        paired = reading.paired(study, test_accuracy)
        return [] if paired is None else [100 * difference for difference in paired.differences]

    def ratios(study: str) -> list[float]:
        paired = reading.paired(study, SHARPNESS)
        return [] if paired is None or paired.ratio is None else paired.seed_ratios

    def draw() -> Figure:
        figure = new_figure(figsize=(7.2, 0.42 * len(studies) + 1.5))
        left, right = figure.subplots(1, 2, sharey=True)
        gaps = [known.test[1].mean - known.test[0].mean for known in PAPER]
        bounds = box_ratios("full", 1e-3).values()
        left.axvspan(min(gaps), max(gaps), color=GREY, alpha=0.15, linewidth=0, label="the paper's six networks")
        right.axvspan(min(bounds), max(bounds), color=GREY, alpha=0.15, linewidth=0)
        left.axvline(0, color=GREY, linewidth=0.9)
        right.axvline(1, color=GREY, linewidth=0.9)
        for row, study in enumerate(studies):
            dots(left, differences(study), row, "large")
            dots(right, ratios(study), row, "large")
        logarithmic(right, "x")
        category_axis(left, [CONTROLS[study] for study in studies])
        right.grid(axis="x", alpha=0.3)
        left.set_xlabel("test accuracy, large − small [points]")
        right.set_xlabel("ε-box, large / small, logarithmic")
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", frameon=False)
        note(figure, f"{seeds(reading, studies[0])}; {BARS}")
        return figure

    told = "; ".join(
        f"{CONTROLS[study]}: {told_mean(differences(study), '+.2f')} points and {told_mean(ratios(study))} times"
        for study in studies
    )
    return [
        Drawing(
            "controls",
            "The paper's comparison with something else held equal",
            "Large against small batch, seed by seed: difference of test accuracy and ratio of sharpness (ε = 1e-3, "
            "full space), by "
            f"what is held equal; {seeds(reading, studies[0])}; {BARS}. Grey: where the paper's six networks lie. "
            "Lines: no difference.",
            f"{told}.",
            draw,
        )
    ]
