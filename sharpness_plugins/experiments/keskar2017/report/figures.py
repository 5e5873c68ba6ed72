"""The report's figures: which there are, what they say, and how they are drawn."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ....plots import BLUE, GREEN, GREY, ORANGE, alpha_plot, error_bars, logarithmic, new_figure, warm_start_plot
from ..record import Curvature, Curve, Quantity, TrainedNetwork, test_accuracy
from .drawing import Drawing
from .published import PAPER, box_ratios
from .reading import Reading, distance, finite, mean, moved_box
from .tables import CONTROLS, REMEDY_NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["all_drawings"]

SHARPNESS = moved_box("full", 1e-3, "ours")
SHARPNESS_LABEL = "ε-box sharpness, ε = 1e-3 [%]"
COLOUR = {"small": BLUE, "large": ORANGE}
MARKER = {"small": "o", "large": "s"}
LINE = {"small": "-", "large": "--"}
SOLVER_NAMES = {"published": "the paper's solver", "lbfgsb": "the same, scaled", "ours": "our solver"}
BARS = "dots: seeds; bars: mean ± sample standard deviation"


def all_drawings(reading: Reading) -> list[Drawing]:
    """In the paper's order; without those that the record has nothing for."""
    makers: tuple[Callable[[Reading], list[Drawing]], ...] = (
        _tables_3,
        _lines,
        _batch_sizes,
        _warm_start,
        _against_loss,
        _spectrum,
        _cone,
        _distances,
        _remedies,
        _controls,
    )
    return [drawing for maker in makers for drawing in maker(reading)]


def _seeds(reading: Reading, study: str) -> str:
    count = len({network.seed for role in reading.roles(study) for network in reading.networks(study, role)})
    return "one seed" if count == 1 else f"{count} seeds"


def _mean_and_deviation(seeds: str) -> str:
    return seeds if seeds == "one seed" else f"mean ± sample standard deviation, {seeds}"


def _note(figure: Figure, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontsize=8, color=GREY)


# --- Table 3 as a picture


def _tables_3(reading: Reading) -> list[Drawing]:
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
                _dots(axes, pair[place], row, role)
        logarithmic(axes, "x")
        axes.axhline(len(PAPER) - 0.5, color=GREY, linewidth=0.8, linestyle=":")
        _category_axis(axes, names)
        axes.set_xlabel(f"{SHARPNESS_LABEL}, full space, logarithmic")
        axes.legend(frameon=False, loc="best")
        _note(
            figure,
            f"paper: mean ± deviation of five trials; here: the paper's protocol, {_seeds(reading, 'protocol')}; {BARS}",
        )
        return figure

    told = "; ".join(
        f"{name}, {_told(small)} % at the small batch and {_told(large)} % at the large"
        for name, (small, large) in found.items()
    )
    return [
        Drawing(
            "table3",
            "Table 3 as a picture: sharpness in full space",
            f"ε-box sharpness at ε = 1e-3 in full space: the paper's six networks (hollow) and here, by each solver (filled); "
            f"{_seeds(reading, 'protocol')}. The networks and the data differ: compare how far apart small and large batch lie, not where.",
            f"In the paper small batches lie between 1 and 30 %, large ones between 205 and 925 %. {told}.",
            draw,
        )
    ]


# --- Figure 3


def _lines(reading: Reading) -> list[Drawing]:
    curves = [curve for curve in reading.record.curves if finite([point.loss for point in curve.train])]
    return [_line(reading, curve, alone=sum(c.kind == curve.kind for c in curves) == 1) for curve in curves]


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
        _note(figure, f"one pair of networks (seed {curve.seed}, {CONTROLS.get(curve.study, curve.study)})")
        return figure

    formula = "α x_l + (1 − α) x_s" if curve.kind == "straight" else "sin(απ/2) x_l + cos(απ/2) x_s"
    at = {alpha: train.loss for alpha, train, _ in points}
    ends = [f"{at[alpha]:.3g} at α = {alpha:g}" for alpha in (-1.0, 0.0, 0.5, 1.0, 2.0) if alpha in at]
    seed = "" if alone else f", seed {curve.seed}"
    return Drawing(
        f"figure3_{curve.kind}" + ("" if alone else f"_seed{curve.seed}"),
        f"Figure 3, {'the straight line' if curve.kind == 'straight' else 'the curve'} through both minima{seed}",
        f"Loss (left axis) and accuracy (right axis) at {formula}: α = 0 is the small-batch minimum, α = 1 the large-batch one "
        f"(seed {curve.seed}, {CONTROLS.get(curve.study, curve.study)}). One pair, so no bars. The loss axis is logarithmic, "
        "the paper's is linear.",
        f"Training loss in nats: {', '.join(ends) or 'at other places than the ends'}.",
        draw,
    )


# --- Figure 4


def _batch_sizes(reading: Reading) -> list[Drawing]:
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
            for (name, legend), colour, marker, line in zip(
                studies.items(), (ORANGE, BLUE), "os", ("-", "--"), strict=False
            ):
                sizes = reading.sizes(name)
                values = [[scale * value for value in reading.values(name, role, quantity)] for _, role in sizes]
                error_bars(
                    axes, [size for size, _ in sizes], values, color=colour, marker=marker, linestyle=line, label=legend
                )
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
        panels[0].legend(frameon=False, loc="best")
        _note(figure, _mean_and_deviation(_seeds(reading, study)))
        return figure

    def told(quantity: Quantity, scale: float) -> str:
        sizes = [(size, scale * mean(reading.values(study, role, quantity))) for size, role in reading.sizes(study)]
        return ", ".join(f"{value:.3g} at {size}" for size, value in sizes if math.isfinite(value)) or "not measured"

    return [
        Drawing(
            "figure4",
            "Figure 4: accuracy and sharpness against batch size",
            f"Test accuracy and ε-box sharpness by batch size, after equal epochs (as in the paper) and at equal training loss; "
            f"{_mean_and_deviation(_seeds(reading, study))}.",
            f"{studies[study].capitalize()}: test accuracy in percent {told(test_accuracy, 100)}; sharpness in percent {told(SHARPNESS, 1)}.",
            draw,
        )
    ]


# --- Figure 5


def _warm_start(reading: Reading) -> list[Drawing]:
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
            match="" if ending is None else _ending(ending.ending),
        )
        above, below = figure.axes[:2]
        above.set_title("")
        below.set_ylabel(f"{SHARPNESS_LABEL}\nof the {large} networks")
        _note(figure, _mean_and_deviation(_seeds(reading, "warm_start")))
        return figure

    told = [
        ", ".join(f"{_told(at, scale=scale)} after {epochs}" for (epochs, _), at in zip(warm, values[quantity], strict=True))
        for quantity, scale in ((test_accuracy, 100), (SHARPNESS, 1))
    ]
    return [
        Drawing(
            "figure5",
            "Figure 5: the warm start",
            f"Above: test accuracy of the {large} networks by the number of {small} epochs before, and of the {small} run itself "
            f"at that moment and at its end. Below: sharpness of the {large} networks; dashed: {small} to the end. "
            f"{_mean_and_deviation(_seeds(reading, 'warm_start')).capitalize()}. The paper's figure is one run without bars.",
            f"By warm epochs: test accuracy in percent {told[0]}; sharpness in percent {told[1]}.",
            draw,
        )
    ]


def _ending(text: str) -> str:
    """``loss:0.005`` in words."""
    kind, _, value = text.partition(":")
    words = {
        "loss": f"a training loss of {value}",
        "epoch_loss": f"an epoch's loss of {value}",
        "plateau": "a plateau of the loss",
    }
    return words.get(kind, f"{value} {kind}")


# --- Figure 6


def _against_loss(reading: Reading) -> list[Drawing]:
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
        axes.legend(frameon=False)
        _note(figure, f"a line per seed, {seeds}")
        return figure

    told = "; ".join(
        f"{sizes[role]} goes from {each[0][0][1]:.3g} % at a loss of {each[0][0][0]:.2g} to {each[0][-1][1]:.3g} % at {each[0][-1][0]:.2g}"
        for role, each in curves.items()
        if each
    )
    return [
        Drawing(
            "figure6",
            "Figure 6: sharpness against loss",
            f"ε-box sharpness against the training loss while training goes on, a line per seed ({seeds}). Read it along a "
            "vertical line: at the same loss, how much sharper is the large batch?",
            f"In the first seed {told}.",
            draw,
        )
    ]


# --- spectrum and cone


def _curved(reading: Reading) -> dict[str, list[TrainedNetwork]]:
    return {
        role: [n for n in reading.networks("matched_loss", role) if n.curvature is not None] for role in ("small", "large")
    }


def _spectrum(reading: Reading) -> list[Drawing]:
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
            left.set_ylim(bottom=min(floors))
            left.legend(frameon=False, loc="upper right")
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
        _note(
            figure,
            f"left: first seed, band: two standard errors; right: {_mean_and_deviation(_seeds(reading, 'matched_loss'))}",
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
            "Left: spectral density at equal training loss, smoothed, with a band of two Monte-Carlo standard errors (first seed); the "
            "axis ends at a tenth of the height of a single eigenvalue. Right: the largest eigenvalues by rank, "
            f"{_mean_and_deviation(_seeds(reading, 'matched_loss'))}. Dotted: from where on eigenvalues are counted as large.",
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


def _cone(reading: Reading) -> list[Drawing]:
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
            f"steep from {steep:g} % on", (1, steep), xycoords=("axes fraction", "data"), xytext=(-2, 3), textcoords="offset points",
            ha="right", va="bottom", color=GREY, fontsize=8,
        )  # fmt: skip
        left.set_xlabel("random directions, steepest first [% of them]")
        right.xaxis.get_major_locator().set_params(integer=True)
        right.set_xlabel("leading eigenvectors, by rank")
        left.set_ylabel("rise of the loss [%], logarithmic")
        if left.get_legend_handles_labels()[0]:
            left.legend(frameon=False, loc="best")
        _note(figure, f"a line per network, {_seeds(reading, 'matched_loss')}; as far out as a corner of the ε-box of 1e-3")
        return figure

    told = "; ".join(
        f"{labels[role]}: at most {max(finite([r for c in each for r in c.random_rises]), default=math.nan):.2g} % along random "
        f"directions, up to {max(finite([r for c in each for r in c.top_rises]), default=math.nan):.3g} % along eigenvectors"
        for role, each in found.items()
        if each
    )
    return [
        Drawing(
            "cone",
            "Rise of the loss along random directions and along the leading eigenvectors",
            f"How much the loss rises over the same distance (that of a corner of the ε-box of 1e-3) along random unit vectors and "
            f"along the Hessian's leading eigenvectors, at equal training loss; a line per network, {_seeds(reading, 'matched_loss')}. "
            "What does not rise is drawn at the lower edge.",
            f"{told}.",
            draw,
        )
    ]


# --- distances, remedies, controls


def _distances(reading: Reading) -> list[Drawing]:
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
                _dots(left, values, row + offset, role, label=f"{role} batch" if row == 0 else None)
        _category_axis(left, [CONTROLS[study] for study in studies])
        left.set_xlim(left=0)
        left.set_xlabel("‖w − w₀‖ at the end")
        left.legend(frameon=False, loc="best")
        for role, each in paths.items():
            for trajectory in each:
                points = [(p.steps, p.distance) for p in trajectory.points if p.steps > 0 and p.distance > 0]
                right.plot(
                    [s for s, _ in points], [d for _, d in points], color=COLOUR[role], marker=MARKER[role], linestyle=LINE[role],
                    markersize=3, linewidth=1, alpha=0.8,
                )  # fmt: skip
        if any(paths.values()):
            logarithmic(right, "x")
            right.set_xlabel("steps, logarithmic")
            right.set_ylabel("‖w − w₀‖ on the way")
            right.grid(alpha=0.3)
        else:
            right.set_axis_off()
        _note(figure, f"{_seeds(reading, studies[0])}; left: {BARS}; right: a line per seed")
        return figure

    told = "; ".join(
        f"{CONTROLS[study]}: {_told(reading.values(study, 'small', distance))} and {_told(reading.values(study, 'large', distance))}"
        for study in studies
    )
    return [
        Drawing(
            "distances",
            "Distances from the initial weights",
            f"Left: distance of the trained from the initial weights by what is held equal, small and large batch; {_seeds(reading, studies[0])}, "
            f"{BARS}. Right: the same on the way, against the number of steps, a line per seed.",
            f"Mean distance at small and large batch, {told}.",
            draw,
        )
    ]


def _remedies(reading: Reading) -> list[Drawing]:
    roles = [role for role in REMEDY_NAMES if reading.has("remedies", role)]
    if len(roles) < 2:
        return []

    def draw() -> Figure:
        figure = new_figure(figsize=(7.2, 0.38 * len(roles) + 1.3))
        left, right = figure.subplots(1, 2, sharey=True)
        for row, role in enumerate(roles):
            kind = {"small": "small", "none": "large"}.get(role, "remedy")
            _dots(left, [100 * value for value in reading.values("remedies", role, test_accuracy)], row, kind)
            _dots(right, reading.values("remedies", role, SHARPNESS), row, kind)
        shown = finite([value for role in roles for value in reading.values("remedies", role, SHARPNESS)])
        if shown and min(shown) > 0:
            logarithmic(right, "x")
        _category_axis(left, [REMEDY_NAMES[role] for role in roles])
        right.grid(axis="x", alpha=0.3)
        left.set_xlabel("test accuracy [%]")
        right.set_xlabel(f"{SHARPNESS_LABEL}, logarithmic")
        _note(figure, f"{_seeds(reading, 'remedies')}; {BARS}")
        return figure

    told = "; ".join(
        f"{REMEDY_NAMES[role]}: {_told(reading.values('remedies', role, test_accuracy), '.2f', 100)} % and "
        f"{_told(reading.values('remedies', role, SHARPNESS))} %"
        for role in roles
    )
    return [
        Drawing(
            "remedies",
            "Remedies: accuracy and sharpness",
            f"Test accuracy and sharpness of the large batch with each remedy, beside the large batch without (orange) and the small "
            f"batch (blue), at equal training loss; {_seeds(reading, 'remedies')}, {BARS}.",
            f"Test accuracy and sharpness, {told}.",
            draw,
        )
    ]


def _controls(reading: Reading) -> list[Drawing]:
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
            _dots(left, differences(study), row, "large")
            _dots(right, ratios(study), row, "large")
        logarithmic(right, "x")
        _category_axis(left, [CONTROLS[study] for study in studies])
        right.grid(axis="x", alpha=0.3)
        left.set_xlabel("test accuracy, large − small [points]")
        right.set_xlabel("ε-box sharpness, large / small, logarithmic")
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", frameon=False)
        _note(figure, f"{_seeds(reading, studies[0])}; {BARS}")
        return figure

    told = "; ".join(
        f"{CONTROLS[study]}: {_told(differences(study), '+.2f')} points and {_told(ratios(study))} times"
        for study in studies
    )
    return [
        Drawing(
            "controls",
            "The paper's comparison with something else held equal",
            f"Large against small batch, seed by seed: difference of test accuracy and ratio of sharpness (ε = 1e-3, full space), by "
            f"what is held equal; {_seeds(reading, studies[0])}, {BARS}. Grey: where the paper's six networks lie. Lines: no difference.",
            f"{told}.",
            draw,
        )
    ]


# --- parts


def _told(values: Sequence[float], form: str = ".3g", scale: float = 1.0) -> str:
    """The mean, for who does not see it."""
    value = scale * mean(values)
    return f"{value:{form}}" if math.isfinite(value) else "no value"


def _dots(axes: Axes, values: Sequence[float], at: float, kind: str, *, label: str | None = None) -> None:
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


def _category_axis(axes: Axes, names: Sequence[str]) -> None:
    """Names from top to bottom."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
