"""Figures from results. They belong to nobody's global state: save them with ``figure.savefig``, or display them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .errors import missing_dependency
from .report import SharpnessReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["alpha_plot", "sharpness_plot"]

# Okabe and Ito's palette: told apart in every common form of colour blindness, and in grey by line style and marker
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
UNITS = {
    "epsilon_box": "rise of the loss [%]\n100·(max f − f)/(1 + f)",
    "random_subspace": "rise of the loss [%]\n100·(max f − f)/(1 + f)",
    "hessian_topk": "largest eigenvalue\n[loss per squared weight]",
}


def _figure(**settings: Any) -> Figure:
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
    figure = _figure(figsize=(7.5, 4.8))
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
    xlabel: str = "",
    title: str = "",
) -> Figure:
    """One panel per metric: a dot per report, and a line through the means of the reports that share an ``x``.

    Axes are logarithmic where all values are positive and span more than a factor of five. What failed is left out.

    Args:
        x: one number per report: its batch size, epoch, learning rate.
        others: further panels by axis label, one number per report: the test accuracy, for one.
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
    figure = _figure(figsize=(4.4 * columns, 3.1 * rows))
    for place, (name, (label, values)) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, place)
        _dots_and_means(axes, x, values)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(label)
        if name != label:
            axes.set_title(name, fontsize="medium")
    figure.suptitle(title, fontsize="medium")
    return figure


def _dots_and_means(axes: Axes, x: Sequence[float], values: Sequence[float]) -> None:
    finite = [(place, value) for place, value in zip(x, values, strict=True) if math.isfinite(value)]
    places = sorted({place for place, _ in finite})
    means = [statistics.fmean(value for at, value in finite if at == place) for place in places]
    axes.plot(places, means, color=BLUE, linewidth=1.5, label="mean")
    axes.plot(
        [p for p, _ in finite],
        [v for _, v in finite],
        color=ORANGE,
        linestyle="none",
        marker="o",
        markersize=5,
        alpha=0.7,
    )
    if _wide(places):
        axes.set_xscale("log")
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.minorticks_off()
    if _wide([value for _, value in finite]):
        axes.set_yscale("log")
        ticker = missing_dependency("matplotlib.ticker", extra="plots", purpose="a plot")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))  # 20, 50, 100 where the default has 2 × 10¹
        axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.grid(alpha=0.3)


def _wide(values: Sequence[float]) -> bool:
    return bool(values) and min(values) > 0 and max(values) > 5 * min(values)


def _unit(key: str) -> str:
    """Of a built-in metric, also under a longer key such as ``epsilon_box(epsilon=0.0005)``."""
    return next((unit for name, unit in UNITS.items() if key.startswith(name)), "value")
