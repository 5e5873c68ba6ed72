"""The pictures, checked by what their lines hold."""

import math
import subprocess
import sys

import pytest

from sharpness_plugins.plots import alpha_plot, logarithmic, new_figure, sharpness_plot, warm_start_plot
from sharpness_plugins.report import Kind, MetricResult, SharpnessReport, Status

ALPHAS = [-1.0, 0.0, 1.0, 2.0]


def report(**values):
    return SharpnessReport({key: MetricResult(value) for key, value in values.items()}, loss=0.1)


def line_data(line):
    return list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))


@pytest.fixture
def alpha_figure():
    return alpha_plot(
        ALPHAS,
        train_loss=[1.0, 0.01, 0.02, 8.0],
        test_loss=[2.0, 0.3, 0.4, 9.0],
        train_accuracy=[0.7, 1.0, 0.99, 0.3],
        test_accuracy=[0.6, 0.95, 0.93, 0.2],
        small="batch 16",
        large="batch 500",
        title="a network on some data",
    )


def test_alpha_plot_draws_training_solid_and_test_dashed(alpha_figure):
    losses, accuracies = alpha_figure.axes
    train, test, *marks = losses.get_lines()
    assert line_data(train) == (ALPHAS, [1.0, 0.01, 0.02, 8.0])
    assert line_data(test) == (ALPHAS, [2.0, 0.3, 0.4, 9.0])
    assert [line_data(line)[1] for line in accuracies.get_lines()] == [[70, 100, 99, 30], [60, 95, 93, 20]]
    for axes in (losses, accuracies):
        assert [line.get_linestyle() for line in axes.get_lines()[:2]] == ["-", "--"]
    assert [line_data(mark)[0] for mark in marks] == [[0, 0], [1, 1]]  # both minima are marked
    assert losses.get_yscale() == "log"


def test_alpha_plot_names_its_axes(alpha_figure):
    losses, accuracies = alpha_figure.axes
    assert "nats" in losses.get_ylabel()
    assert "%" in accuracies.get_ylabel()
    assert "batch 16" in losses.get_xlabel()
    assert losses.get_title() == "a network on some data"
    legend = [text.get_text() for text in alpha_figure.legends[0].get_texts()]
    assert legend == ["loss, training", "loss, test", "accuracy, training", "accuracy, test"]


def test_sharpness_plot_has_a_dot_per_report_and_a_line_through_the_means():
    reports = [report(epsilon_box=v, other=w) for v, w in [(10.0, 1.0), (30.0, -1.0), (200.0, 2.0), (400.0, 4.0)]]
    figure = sharpness_plot([16, 16, 500, 500], reports, others={"accuracy [%]": [96.0, 94.0, 93.0, 91.0]}, xlabel="batch")
    box, other, accuracy = figure.axes
    means, dots = box.get_lines()
    assert line_data(means) == ([16, 500], [20, 300])
    assert line_data(dots) == ([16, 16, 500, 500], [10, 30, 200, 400])
    assert (box.get_xscale(), box.get_yscale()) == ("log", "log")
    assert other.get_yscale() == "linear"  # a negative value has no logarithm
    assert line_data(accuracy.get_lines()[0]) == ([16, 500], [95, 92])
    assert [axes.get_xlabel() for axes in figure.axes] == ["batch"] * 3
    assert [axes.get_title() for axes in figure.axes] == ["epsilon_box", "other", ""]


def test_sharpness_plot_leaves_out_what_failed_or_was_not_measured():
    failed = SharpnessReport({"m": MetricResult(math.nan, status=Status(Kind.FAILED, "no luck"))}, loss=0.1)
    figure = sharpness_plot([1, 2, 3], [report(m=1.0), failed, report(another=5.0)])
    means, dots = figure.axes[0].get_lines()
    assert line_data(means) == line_data(dots) == ([1], [1])
    assert line_data(figure.axes[1].get_lines()[0]) == ([3], [5])


def test_sharpness_plot_refuses_unequal_lengths():
    with pytest.raises(ValueError, match="got 2 and 1"):
        sharpness_plot([1, 2], [report(m=1.0)])


def test_sharpness_plot_keeps_apart_what_is_no_part_of_the_line():
    reports = [report(m=v) for v in (1.0, 3.0, 5.0, 2.0, 4.0)]
    figure = sharpness_plot([16, 16, 500, 500, 500], reports, apart={3: "warm", 4: "warm"})
    means, dots, warm = figure.axes[0].get_lines()
    assert line_data(means) == ([16, 500], [2, 5])
    assert line_data(dots) == ([16, 16, 500], [1, 3, 5])
    assert line_data(warm) == ([500, 500], [2, 4])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["warm"]
    assert not sharpness_plot([16, 500], reports[:2]).legends


WARM = {
    "large_accuracy": [[0.88, 0.90], [0.90, 0.94]],
    "small_accuracy": {5: [0.95, 0.93]},
    "sharpness": [[4.0, 6.0], [2.0, 2.0]],
    "end_accuracy": [0.91, 0.93],
    "end_sharpness": [1.0, 3.0],
    "metric": "epsilon_box",
    "small": "batch 8",
    "large": "batch 400",
    "match": "a loss of 1",
    "title": "two seeds",
}


def test_warm_start_plot_shares_the_epochs_between_accuracy_and_sharpness():
    figure = warm_start_plot([0, 5], **WARM)
    above, below = figure.axes
    (small, *_), (large, *_) = above.containers
    assert line_data(small) == ([5], [94])
    assert line_data(large) == ([0, 5], pytest.approx([89, 92]))
    assert line_data(above.get_lines()[-1])[1] == [92, 92]
    (final, _, (bars,)) = below.containers[0]
    assert line_data(final) == ([0, 5], [5, 2])
    halves = [segment[1, 1] - segment[0, 1] for segment in bars.get_segments()]
    assert halves == pytest.approx([2 * math.sqrt(2), 0])  # sample standard deviation up and down
    assert line_data(below.get_lines()[-1])[1] == [2, 2]
    assert (below.get_yscale(), above.get_yscale()) == ("log", "linear")
    assert above.get_shared_x_axes().joined(above, below)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "batch 8 alone, to a loss of 1",
        "batch 8, after so many epochs",
        "batch 400 started there, to a loss of 1",
    ]
    assert "epsilon_box" in below.get_ylabel()
    assert below.get_xlabel() == "epochs at batch 8 before batch 400"


def test_warm_start_plot_leaves_out_what_failed_and_has_no_bars_for_one_seed():
    one_seed = {**WARM, "large_accuracy": [[0.9], [0.91]], "small_accuracy": {5: [0.95]}, "end_sharpness": [math.nan]}
    one_seed |= {"sharpness": [[math.nan], [-1.0]], "end_accuracy": [0.92]}
    above, below = warm_start_plot([0, 5], **one_seed).axes
    assert all(container.has_yerr is False for container in above.containers)
    assert line_data(below.containers[0][0]) == ([5], [-1])
    assert below.get_yscale() == "linear"
    assert len(below.get_lines()) == 1  # no line across without a value


@pytest.mark.parametrize(("top", "labels"), [(90.0, {"10", "20", "50"}), (1e5, {"10", "100", "1000", "10000"})])
def test_a_logarithmic_axis_has_plain_numbers_and_on_a_wide_one_powers_of_ten_alone(top, labels):
    for which in ("x", "y"):
        axes = new_figure().add_subplot()
        axes.plot([2.0, top], [2.0, top])
        logarithmic(axes, which)
        axes.figure.draw_without_rendering()
        axis = axes.xaxis if which == "x" else axes.yaxis
        low, high = axis.get_view_interval()
        shown = {label.get_text() for label in axis.get_ticklabels() if low <= float(label.get_text()) <= high}
        assert shown >= labels
        assert all(label.get_text() == "" for label in axis.get_ticklabels(minor=True))
        assert ("20" in shown) == (top == 90.0)


def test_plots_leave_no_figure_behind_and_need_no_display():
    program = (
        "import sys, io; from sharpness_plugins.plots import sharpness_plot; from sharpness_plugins.report import *;"
        "assert 'matplotlib' not in sys.modules;"
        "f = sharpness_plot([1], [SharpnessReport({'m': MetricResult(1.0)}, 0.1)]); f.savefig(io.BytesIO());"
        "assert 'matplotlib.pyplot' not in sys.modules; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
