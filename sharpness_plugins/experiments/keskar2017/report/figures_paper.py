"""The paper's figures, and its Table 3 as one."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from ....plots import GREEN, GREY, alpha_plot, error_bars, logarithmic, new_figure, warm_start_plot
from ..record import Curve, Quantity, test_accuracy
from .drawing import Drawing
from .figure_parts import (
    COLOUR,
    LINE,
    MARKER,
    SHARPNESS,
    SHARPNESS_LABEL,
    category_axis,
    dots,
    legend,
    mean_and_deviation,
    note,
    seeds,
    told_mean,
)
from .published import PAPER
from .reading import Reading, finite, mean, moved_box, words_of_ending
from .tables import CONTROLS, SOLVER_NAMES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["against_loss", "batch_sizes", "lines", "table3", "warm_start"]


# --- Table 3 as a picture


def table3(reading: Reading) -> list[Drawing]:
    found = {
        f"here: {name}": tuple(reading.values("protocol", role, moved_box("full", 1e-3, key)) for role in ("small", "large"))
        for key, name in SOLVER_NAMES.items()
    }
    found = {name: pair for name, pair in found.items() if finite([*pair[0], *pair[1]])}
    if not found:
        return []

    def draw() -> Figure:
        names = [*(f"paper: {known.name}" for known in PAPER), *found]
        figure = new_figure(figsize=(7.2, 0.36 * len(names) + 1.3))
        axes = figure.add_subplot()
        for place, role in enumerate(("small", "large")):
            cells = [known.boxes("full", 1e-3)[place] for known in PAPER]
            axes.errorbar(
                [cell.mean for cell in cells],
                range(len(cells)),
                xerr=[cell.deviation for cell in cells],
                linestyle="none",
                marker=MARKER[role],
                color=COLOUR[role],
                markerfacecolor="white",
                capsize=2,
                markersize=5,
                label=f"{role} batch",
            )
            for row, pair in enumerate(found.values(), start=len(cells)):
                dots(axes, pair[place], row, role)
        logarithmic(axes, "x")
        axes.axhline(len(PAPER) - 0.5, color=GREY, linewidth=0.8, linestyle=":")
        category_axis(axes, names)
        axes.set_xlabel(f"{SHARPNESS_LABEL}, full space, logarithmic")
        legend(axes)
        bars = "bars: mean ± sample standard deviation"
        note(figure, f"hollow: the paper, five trials; filled: here, {seeds(reading, 'protocol')}, its protocol; {bars}")
        return figure

    told = "; ".join(
        f"here by {name.removeprefix('here: ')} {told_mean(small)} % at the small batch, {told_mean(large)} % at the large"
        for name, (small, large) in found.items()
    )
    return [
        Drawing(
            "table3",
            "Table 3 as a picture: sharpness in full space",
            "ε-box sharpness at ε = 1e-3 in full space: the paper's six networks (hollow) and here, by each solver "
            "(filled); "
            f"{seeds(reading, 'protocol')}. The networks and the data differ: compare how far apart small and large "
            "batch lie, not where.",
            f"In the paper small batches lie between 1 and 30 %, large ones between 205 and 925 %; {told}.",
            draw,
        )
    ]


# --- Figure 3


def lines(reading: Reading) -> list[Drawing]:
    curves = [curve for curve in reading.record.curves if finite([point.loss for point in curve.train])]
    alike = Counter((curve.kind, curve.study) for curve in curves)
    return [_line(reading, curve, alone=alike[curve.kind, curve.study] == 1) for curve in curves]


def _line(reading: Reading, curve: Curve, *, alone: bool) -> Drawing:
    small, large = (reading.batch(curve.study, role) for role in ("small", "large"))
    points = list(zip(curve.alphas, curve.train, curve.test, strict=False))

    def draw() -> Figure:
        figure = alpha_plot(
            [alpha for alpha, _, _ in points],
            train_loss=[train.loss for _, train, _ in points],
            test_loss=[test.loss for _, _, test in points],
            train_accuracy=[train.accuracy for _, train, _ in points],
            test_accuracy=[test.accuracy for _, _, test in points],
            small=small,
            large=large,
        )
        if curve.kind == "curved":
            figure.axes[0].set_xlabel(f"α, for the weights sin(απ/2) · ({large}) + cos(απ/2) · ({small})")
        note(figure, f"one pair of networks (seed {curve.seed}, {CONTROLS.get(curve.study, curve.study)})")
        return figure

    formula = "α xₗ + (1 − α) xₛ" if curve.kind == "straight" else "sin(απ/2) xₗ + cos(απ/2) xₛ"
    at = {alpha: train.loss for alpha, train, _ in points}
    ends = [f"{at[alpha]:.3g} at α = {alpha:g}" for alpha in (-1.0, 0.0, 0.5, 1.0, 2.0) if alpha in at]
    seed = "" if alone else f", seed {curve.seed}"
    return Drawing(
        f"figure3_{curve.kind}_{curve.study}" + ("" if alone else f"_seed{curve.seed}"),
        f"Figure 3, {'the straight line' if curve.kind == 'straight' else 'the curve'} through both minima, "
        f"{CONTROLS.get(curve.study, curve.study)}{seed}",
        f"Loss (left axis) and accuracy (right axis) at {formula}: α = 0 is the small-batch minimum, α = 1 the "
        "large-batch one "
        f"(seed {curve.seed}, {CONTROLS.get(curve.study, curve.study)}). One pair, so no bars. The loss axis is "
        "logarithmic, "
        "the paper's is linear.",
        f"Training loss in nats: {', '.join(ends) or 'at other places than the ends'}.",
        draw,
    )


# --- Figure 4


def batch_sizes(reading: Reading) -> list[Drawing]:
    studies = {
        study: label
        for study, label in (
            ("batch_sizes", "equal epochs, as in the paper"),
            ("batch_sizes_matched", "equal training loss"),
        )
        if any(reading.networks(study, role) for _, role in reading.sizes(study))
    }
    if not studies:
        return []
    study = next(iter(studies))

    def draw() -> Figure:
        figure = new_figure(figsize=(7.2, 3.4))
        panels = figure.subplots(1, 2)
        for axes, quantity, scale, label in (
            (panels[0], test_accuracy, 100, "test accuracy [%]"),
            (panels[1], SHARPNESS, 1, f"{SHARPNESS_LABEL}"),
        ):
            ticks: set[int] = set()
            shown: list[float] = []
            looks = zip(studies.items(), (GREY, GREEN), "oD", ("-", "--"), (0.97, 1.03), strict=False)
            for (name, words), colour, marker, line, aside in looks:
                sizes = reading.sizes(name)
                values = [[scale * value for value in reading.values(name, role, quantity)] for _, role in sizes]
                error_bars(
                    axes, [aside * size for size, _ in sizes], values,
                    color=colour, marker=marker, linestyle=line, label=words,
                )  # fmt: skip
                ticks |= {size for size, _ in sizes}
                shown += finite([value for at in values for value in at])
            axes.set_xscale("log")
            axes.set_xticks(sorted(ticks), [str(size) for size in sorted(ticks)])
            axes.minorticks_off()
            axes.set_xlabel("batch size [samples], logarithmic")
            axes.set_ylabel(label)
            axes.grid(alpha=0.3)
            if quantity is SHARPNESS and shown and min(shown) > 0:
                logarithmic(axes)
                axes.set_ylabel(f"{label}, logarithmic")
        legend(panels[0])
        note(figure, mean_and_deviation(seeds(reading, study)))
        return figure

    def told(quantity: Quantity, scale: float) -> str:
        sizes = [(size, scale * mean(reading.values(study, role, quantity))) for size, role in reading.sizes(study)]
        return ", ".join(f"{value:.3g} at {size}" for size, value in sizes if math.isfinite(value)) or "not measured"

    return [
        Drawing(
            "figure4",
            "Figure 4: accuracy and sharpness against batch size",
            "Test accuracy and ε-box sharpness by batch size, after equal epochs (as in the paper) and at equal "
            "training loss, moved apart a little; "
            f"{mean_and_deviation(seeds(reading, study))}.",
            f"{studies[study].capitalize()}: test accuracy in percent {told(test_accuracy, 100)}; sharpness in "
            f"percent {told(SHARPNESS, 1)}.",
            draw,
        )
    ]


# --- Figure 5


def warm_start(reading: Reading) -> list[Drawing]:
    warm = reading.warm_epochs()
    if len(warm) < 2:
        return []
    on_its_way: dict[int, list[float]] = {}
    for trajectory in reading.trajectories("warm_start", "small"):
        for point in trajectory.points:
            if point.epochs > 0:
                on_its_way.setdefault(point.epochs, []).append(point.test.accuracy)
    small, large = (reading.batch("warm_start", role) for role in ("small", warm[0][1]))
    ending = reading.condition("warm_start", warm[0][1])
    values = {
        quantity: [reading.values("warm_start", role, quantity) for _, role in warm]
        for quantity in (test_accuracy, SHARPNESS)
    }

    def draw() -> Figure:
        figure = warm_start_plot(
            [epochs for epochs, _ in warm],
            large_accuracy=values[test_accuracy],
            small_accuracy=dict(sorted(on_its_way.items())),
            sharpness=values[SHARPNESS],
            end_accuracy=reading.values("warm_start", "small", test_accuracy),
            end_sharpness=reading.values("warm_start", "small", SHARPNESS),
            metric="epsilon_box",
            small=small,
            large=large,
            match="" if ending is None else words_of_ending(ending.ending),
        )
        above, below = figure.axes[:2]
        above.set_title("")
        below.set_ylabel(f"{SHARPNESS_LABEL}\nof the {large} networks")
        note(figure, mean_and_deviation(seeds(reading, "warm_start")))
        return figure

    told = [
        ", ".join(
            f"{told_mean(at, scale=scale)} after {epochs}" for (epochs, _), at in zip(warm, values[quantity], strict=True)
        )
        for quantity, scale in ((test_accuracy, 100), (SHARPNESS, 1))
    ]
    return [
        Drawing(
            "figure5",
            "Figure 5: the warm start",
            f"Above: test accuracy of the {large} networks by the number of {small} epochs before, and of the "
            f"{small} run itself "
            f"at that moment and at its end. Below: sharpness of the {large} networks; dashed: {small} to the end. "
            f"{mean_and_deviation(seeds(reading, 'warm_start')).capitalize()}. The paper's figure is one run without bars. "
            f"Here {reading.ground('warm_start')}.",
            f"By warm epochs: test accuracy in percent {told[0]}; sharpness in percent {told[1]}.",
            draw,
        )
    ]


# --- Figure 6


def against_loss(reading: Reading) -> list[Drawing]:
    found = {role: reading.trajectories("sharpness_against_loss", role) for role in ("small", "large")}
    curves = {
        role: [
            [
                (p.train.loss, p.sharpness)
                for p in t.points
                if p.train.loss > 0 and p.sharpness > 0 and math.isfinite(p.train.loss)
            ]
            for t in each
        ]
        for role, each in found.items()
    }
    curves = {role: [curve for curve in each if curve] for role, each in curves.items()}
    if not any(curves.values()):
        return []
    sizes = {role: f"batch {each[0].batch_size}" for role, each in found.items() if each}
    counts = {role: len(each) for role, each in curves.items() if each}
    seeds = f"{max(counts.values())} seeds" if max(counts.values()) > 1 else "one seed"

    def draw() -> Figure:
        figure = new_figure(figsize=(6.4, 4.0))
        axes = figure.add_subplot()
        for role, each in curves.items():
            for number, curve in enumerate(each):
                axes.plot(
                    [loss for loss, _ in curve],
                    [sharp for _, sharp in curve],
                    color=COLOUR[role],
                    marker=MARKER[role],
                    linestyle=LINE[role],
                    markersize=3.5,
                    linewidth=1,
                    alpha=0.8,
                    label=sizes[role] if number == 0 else None,
                )
        logarithmic(axes, "x")
        logarithmic(axes)
        axes.invert_xaxis()
        axes.set_xlabel("training loss [nats], logarithmic; training goes to the right")
        axes.set_ylabel(f"{SHARPNESS_LABEL}, logarithmic")
        axes.grid(alpha=0.3)
        legend(axes)
        note(figure, f"a line per seed, {seeds}")
        return figure

    told = "; ".join(
        f"{sizes[role]} goes from {each[0][0][1]:.3g} % at a loss of {each[0][0][0]:.2g} to {each[0][-1][1]:.3g} % "
        f"at {each[0][-1][0]:.2g}"
        for role, each in curves.items()
        if each
    )
    return [
        Drawing(
            "figure6",
            "Figure 6: sharpness against loss",
            f"ε-box sharpness against the training loss while training goes on, a line per seed ({seeds}). Read it "
            "along a "
            "vertical line: at the same loss, how much sharper is the large batch?",
            f"In the first seed {told}.",
            draw,
        )
    ]
