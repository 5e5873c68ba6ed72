"""Figures from results. They belong to nobody's global state: save them with ``figure.savefig``, or display them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from .errors import missing_dependency
from .report import MetricResult, SharpnessReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["alpha_plot", "density_plot", "sharpness_plot", "warm_start_plot"]

# Okabe and Ito's palette: told apart in every common form of colour blindness, and in grey by line style and marker
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
UNITS = {
    "epsilon_box": "rise of the loss [%]\n100·(max f − f)/(1 + f)",
    "random_subspace": "rise of the loss [%]\n100·(max f − f)/(1 + f)",
    "hessian_topk": "largest eigenvalue\n[loss per squared weight]",
}


def new_figure(**settings: Any) -> Figure:
    """Without pyplot, whose registry would keep every figure alive and might open windows."""
    matplotlib = missing_dependency("matplotlib.figure", extra="plots", purpose="a plot")
    figure: Figure = matplotlib.Figure(layout="constrained", **settings)
    return figure


def alpha_plot(
    alphas: Sequence[float],
    *,
    train_loss: Sequence[float],
    test_loss: Sequence[float],
    train_accuracy: Sequence[float],
    test_accuracy: Sequence[float],
    small: str = "small batch",
    large: str = "large batch",
    title: str = "",
) -> Figure:
    """Loss (left, logarithmic) and accuracy (right) on the line ``alpha * x_large + (1 - alpha) * x_small``.

    Args:
        train_loss: mean cross-entropy in nats, one per alpha; positive, for the logarithm.
        train_accuracy: shares between 0 and 1.
        small: name of the minimum at ``alpha = 0``.
    Source: Keskar et al. (2017), Figure 3, there with a linear loss axis.
    """
    figure = new_figure(figsize=(7.5, 4.8))
    losses = figure.add_subplot()
    accuracies = losses.twinx()
    for style, marker, kind, loss, accuracy in (
        ("-", "o", "training", train_loss, train_accuracy),
        ("--", "s", "test", test_loss, test_accuracy),
    ):
        losses.plot(alphas, loss, color=BLUE, linestyle=style, marker=marker, markersize=3.5, label=f"loss, {kind}")
        accuracies.plot(
            alphas, [100 * share for share in accuracy], color=ORANGE, linestyle=style, marker=marker, markersize=3.5,
            label=f"accuracy, {kind}",
        )  # fmt: skip
    for alpha, name in ((0, small), (1, large)):
        losses.axvline(alpha, color=GREY, linewidth=1, linestyle=":")
        losses.annotate(
            name, (alpha, 1), xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points",
            ha="center", va="bottom", color=GREY, fontsize="small",
        )  # fmt: skip
    losses.set_yscale("log")
    losses.set_xlabel(f"α, for the weights α · ({large}) + (1 − α) · ({small})")
    losses.set_ylabel("cross-entropy [nats], logarithmic", color=BLUE)
    accuracies.set_ylabel("accuracy [%]", color=ORANGE)
    accuracies.set_ylim(0, 105)
    handles = [*losses.get_lines()[:2], *accuracies.get_lines()]
    figure.legend(handles, [str(line.get_label()) for line in handles], loc="outside lower center", ncols=4, frameon=False)
    losses.set_title(title, pad=18)
    return figure


def sharpness_plot(
    x: Sequence[float],
    reports: Sequence[SharpnessReport],
    *,
    others: Mapping[str, Sequence[float]] | None = None,
    apart: Mapping[int, str] | None = None,
    xlabel: str = "",
    title: str = "",
) -> Figure:
    """One panel per metric: a dot per report, and a line through the means of the reports that share an ``x``.

    Axes are logarithmic where all values are positive and span more than a factor of five. What failed is left out.

    Args:
        x: one number per report: its batch size, epoch, learning rate.
        others: further panels by axis label, one number per report: the test accuracy, for one.
        apart: names for reports, by their place, that are no part of the line: green diamonds with a legend.
    Source: Keskar et al. (2017), Figure 4.
    """
    if len(x) != len(reports) or not reports:
        raise ValueError(f"x and reports must be equally many and at least one, got {len(x)} and {len(reports)}")
    keys = dict.fromkeys(key for report in reports for key in report)
    panels: dict[str, tuple[str, Sequence[float]]] = {
        key: (_unit(key), [report[key].value if key in report else math.nan for report in reports]) for key in keys
    }
    panels.update({label: (label, values) for label, values in (others or {}).items()})
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(figsize=(4.4 * columns, 3.1 * rows))
    for place, (name, (label, values)) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, place)
        _dots_and_means(axes, x, values, apart or {})
        axes.set_xlabel(xlabel)
        axes.set_ylabel(label)
        if name != label:
            axes.set_title(name, fontsize="medium")
    if apart:
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", frameon=False)
    figure.suptitle(title, fontsize="medium")
    return figure


def _dots_and_means(axes: Axes, x: Sequence[float], values: Sequence[float], apart: Mapping[int, str]) -> None:
    finite = [(i, place, value) for i, (place, value) in enumerate(zip(x, values, strict=True)) if math.isfinite(value)]
    places = sorted({place for i, place, _ in finite if i not in apart})
    means = [statistics.fmean(v for i, at, v in finite if at == place and i not in apart) for place in places]
    axes.plot(places, means, color=BLUE, linewidth=1.5)
    for name in ("", *dict.fromkeys(apart.values())):
        dots = [(place, value) for i, place, value in finite if apart.get(i, "") == name]
        axes.plot(
            [place for place, _ in dots], [value for _, value in dots], linestyle="none", markersize=5, alpha=0.7,
            color=GREEN if name else ORANGE, marker="D" if name else "o", label=name or None,
        )  # fmt: skip
    if _wide([place for _, place, _ in finite]):
        axes.set_xscale("log")
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.minorticks_off()
    if _wide([value for _, _, value in finite]):
        logarithmic(axes)
    axes.grid(alpha=0.3)


def logarithmic(axes: Axes, which: Literal["x", "y"] = "y") -> None:
    """20, 50, 100 where the default has 2 × 10¹; powers of ten alone on an axis of more than two of them."""
    ticker = missing_dependency("matplotlib.ticker", extra="plots", purpose="a plot")
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    low, high = sorted(axes.get_xlim() if which == "x" else axes.get_ylim())
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high <= 100 * low else (1,)))
    axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def warm_start_plot(
    epochs: Sequence[int],
    *,
    large_accuracy: Sequence[Sequence[float]],
    small_accuracy: Mapping[int, Sequence[float]],
    sharpness: Sequence[Sequence[float]],
    end_accuracy: Sequence[float],
    end_sharpness: Sequence[float],
    metric: str,
    small: str = "small batch",
    large: str = "large batch",
    match: str = "",
    title: str = "",
) -> Figure:
    """Accuracy (above) and sharpness (below) of warm-started networks over the epochs of small batches before.

    Means with sample standard deviations; no bars for one seed. What is not finite is left out.

    Args:
        large_accuracy: per entry of ``epochs``, one share per seed, of the warm-started networks.
        small_accuracy: of the small-batch run itself after so many epochs.
        sharpness: per entry of ``epochs``, one value per seed, of the warm-started networks.
        end_accuracy: of the small batch alone, trained to the end: a dashed line across; likewise ``end_sharpness``.
        metric: key of the sharpness.
        match: where all trainings end, in words.
    Source: Keskar et al. (2017), Figure 5, there one run and no logarithm.
    """
    figure = new_figure(figsize=(7.5, 6.6))
    above = figure.add_subplot(2, 1, 1)
    below = figure.add_subplot(2, 1, 2, sharex=above)
    as_percent = [[100 * share for share in shares] for shares in small_accuracy.values()]
    alone = f"{small} alone, to {match}" if match else f"{small} alone"
    error_bars(above, list(small_accuracy), as_percent, color=BLUE, marker="s", label=f"{small}, after so many epochs")
    error_bars(
        above, epochs, [[100 * share for share in shares] for shares in large_accuracy], color=ORANGE, marker="o",
        label=f"{large} started there" + (f", to {match}" if match else ""),
    )  # fmt: skip
    error_bars(below, epochs, sharpness, color=ORANGE, marker="o", label=None)
    for axes, values in ((above, [100 * share for share in end_accuracy]), (below, end_sharpness)):
        finite = [value for value in values if math.isfinite(value)]
        if finite:
            axes.axhline(statistics.fmean(finite), color=BLUE, linewidth=1.2, linestyle="--", label=alone)
        axes.grid(alpha=0.3)
    above.tick_params(labelbottom=False)
    above.set_ylabel("test accuracy [%]")
    below.set_ylabel(f"{metric}: {_unit(metric)}")
    below.set_xlabel(f"epochs at {small} before {large}")
    shown = [v for values in (*sharpness, end_sharpness) for v in values if math.isfinite(v)]
    if shown and min(shown) > 0:
        logarithmic(below)
    handles, labels = above.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=1, frameon=False)
    figure.suptitle(title, fontsize="medium")
    return figure


def error_bars(axes: Axes, x: Sequence[float], values: Sequence[Sequence[float]], **style: Any) -> None:
    """Mean and sample standard deviation at every place that has a finite value."""
    kept = [(place, [v for v in at if math.isfinite(v)]) for place, at in zip(x, values, strict=True)]
    kept = [(place, at) for place, at in kept if at]
    axes.errorbar(
        [place for place, _ in kept],
        [statistics.fmean(at) for _, at in kept],
        yerr=[statistics.stdev(at) if len(at) > 1 else 0.0 for _, at in kept]
        if any(len(at) > 1 for _, at in kept)
        else None,
        linewidth=1.5,
        markersize=5,
        capsize=3,
        **style,
    )


def _wide(values: Sequence[float]) -> bool:
    return bool(values) and min(values) > 0 and max(values) > 5 * min(values)


def _unit(key: str) -> str:
    """Of a built-in metric, also under a longer key such as ``epsilon_box(epsilon=0.0005)``."""
    return next((unit for name, unit in UNITS.items() if key.startswith(name)), "value")


def density_plot(result: MetricResult, *, title: str = "") -> Figure:
    """The spectral density of a ``spectral_density`` result, logarithmic, with a band of two Monte-Carlo standard errors.

    Settled eigenvalues are marked below: each weighs one of as many as there are parameters, far below the bulk, which is
    what the logarithm is for. The axis ends at a tenth of the height of one such eigenvalue; without any, at 1e-6 of the
    largest.

    Raises:
        ValueError: the result has no density.
    """
    details = result.details
    if "density" not in details:
        raise ValueError("only a result of spectral_density has a density to draw")
    grid, density, error = details["grid"], details["density"], details["density_error"]
    settled, width = details["settled_eigenvalues"], details["width"]
    one = details["weights"][-1] / (width * math.sqrt(2 * math.pi)) if settled else 1e-5 * max(density)
    floor = one / 10
    figure = new_figure(figsize=(7.5, 4.5))
    axes = figure.add_subplot()
    axes.fill_between(
        grid,
        [max(value - 2 * bar, floor) for value, bar in zip(density, error, strict=True)],
        [max(value + 2 * bar, floor) for value, bar in zip(density, error, strict=True)],
        color=BLUE, alpha=0.25, linewidth=0, label="two standard errors",
    )  # fmt: skip
    axes.plot(grid, [max(value, floor) for value in density], color=BLUE, linewidth=1.5, label="density")
    if settled:
        axes.plot(
            settled, [0.03] * len(settled), transform=axes.get_xaxis_transform(), color=ORANGE, linestyle="none",
            marker="|", markersize=12, markeredgewidth=1.5, label="settled eigenvalues",
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_ylim(floor, 3 * max(density))
    axes.set_xlabel("eigenvalue [loss per squared weight]")
    axes.set_ylabel(f"share of eigenvalues per unit,\nsmoothed over {width:.2g}, logarithmic")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.set_title(title)
    return figure
