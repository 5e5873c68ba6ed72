"""Paper, here, agrees? Every claim of the paper with the rule by which a record agrees with it."""

from __future__ import annotations

from ..record import SOLVERS, test_accuracy
from . import judges_figures, judges_tables
from .judges_figures import MOST_STEEP
from .judges_tables import FIT_POINTS, ORDER_FACTOR, half_range, sharper
from .published import DISTANCE_RATIO, box_ratios, published_for
from .reading import Reading, moved_box
from .verdicts import DIRECTION, Claim, Statement, span

__all__ = ["CLAIMS", "claims"]


def claims(reading: Reading) -> list[Claim]:
    """All of ``CLAIMS`` about a record; those that it holds nothing about are "not measured"."""
    published = published_for(reading.record)
    return [statement.claim(reading, published) for statement in CLAIMS]


def _statements() -> tuple[Statement, ...]:
    accuracy_drop = "test accuracy 0.22 to 5.27 points lower at the large batch, on all six networks"
    ratios = {
        (space, epsilon): span(box_ratios(space, epsilon).values())
        for space in ("full", "subspace")
        for epsilon in (1e-3, 5e-4)
    }
    ours, published = (SOLVERS.get(name, name) for name in ("ours", "published"))
    in_range = (
        "the ratio of the means lies in the paper's range (for the paper's own network: within a factor "
        f"{ORDER_FACTOR:g} of its number); partly: above 1"
    )
    low, high = half_range()
    return (
        Statement("gap", "Table 2", "large batches test worse", accuracy_drop, DIRECTION, judges_tables.accuracy_gap),
        Statement(
            "fit",
            "Table 2",
            "both batch sizes fit the training data",
            "training accuracy 98.35 to 99.99 % at both batch sizes",
            f"the mean training accuracies differ by at most {FIT_POINTS:g} points",
            judges_tables.training_fit,
        ),
        Statement(
            "sharper",
            "Table 3",
            "large-batch minima are sharper in full space",
            f"{ratios['full', 1e-3]} times as sharp at the large batch, ε = 1e-3",
            f"{DIRECTION} ({ours})",
            sharper("full", "ours"),
        ),
        Statement(
            "sharper_published",
            "Table 3",
            "the paper's own solver says the same",
            f"{ratios['full', 1e-3]} times as sharp at the large batch, ε = 1e-3",
            f"{DIRECTION}; at most partly where it stopped at its start or found less than half of what ours does "
            f"({published})",
            sharper("full", "published"),
        ),
        Statement(
            "order",
            "Table 3",
            "the ratio is of the paper's order",
            f"{ratios['full', 1e-3]} times at ε = 1e-3, {ratios['full', 5e-4]} at 5e-4",
            in_range,
            judges_tables.ratio_order,
        ),
        Statement(
            "half_epsilon",
            "Table 3",
            "sharpness scales with ε as in the paper",
            f"φ(ε)/φ(ε/2) from {low:.3g} to {high:.3g}; 4 would be a quadratic, 2 a slope",
            "the mean ratio lies in the paper's range at both batch sizes; partly: at one",
            judges_tables.half_epsilon,
        ),
        Statement(
            "subspace",
            "Table 4",
            "large-batch minima are sharper in random subspaces",
            f"{ratios['subspace', 1e-3]} times as sharp at the large batch, ε = 1e-3",
            DIRECTION,
            sharper("subspace", "ours"),
        ),
        Statement(
            "below_full",
            "Tables 3, 4",
            "random subspaces see less than the full space",
            "every number in a random subspace is below the one in full space",
            "so for the means at both batch sizes; partly: at one",
            judges_tables.below_full,
        ),
        Statement(
            "line",
            "Figure 3",
            "the loss rises faster around the large-batch end of the line",
            "on the line through both minima, the large-batch one is strikingly sharper",
            "mean rise of the training loss at α = 1 ± d above that at 0 ± d, over the grid's 0 < d ≤ ½, on every line",
            judges_figures.line_ends,
        ),
        Statement(
            "accuracy_by_size",
            "Figure 4",
            "test accuracy falls with the batch size",
            "it falls, with a marked drop above 500 samples (C1) or 15 000 (F2)",
            "every mean is below the one of the next smaller batch; partly: the last is below the first",
            judges_figures.batch_sizes(test_accuracy, -1, lambda value: f"{100 * value:.2f} %"),
        ),
        Statement(
            "sharpness_by_size",
            "Figure 4",
            "sharpness grows with the batch size",
            "it grows",
            "every mean is above the one of the next smaller batch; partly: the last is above the first",
            judges_figures.batch_sizes(moved_box("full", 1e-3, "ours"), 1, lambda value: f"{value:.3g} %"),
        ),
        Statement(
            "warm_sharpness",
            "Figure 5",
            "a warm start lowers sharpness, the longer the more",
            "after enough small-batch epochs the large batch's minima are less sharp; one run, no error bars",
            "the means fall from each number of warm epochs to the next; partly: from the first to the last",
            judges_figures.warm_sharpness,
        ),
        Statement(
            "warm_accuracy",
            "Figure 5",
            "a warm start recovers accuracy",
            "after enough small-batch epochs the large batch tests better",
            f"longest warm start against the cold one: {DIRECTION}",
            judges_figures.warm_accuracy,
        ),
        Statement(
            "loss",
            "Figure 6",
            "the ratio of sharpness grows as the loss falls",
            "similar sharpness early; as the loss falls, it rises for the large batch and does not for the small",
            "the ratio of large to small batch at the lowest loss that both reach is above 1 and by more than a "
            "tenth above that at half of the "
            "first loss; partly: above 1",
            judges_figures.sharpness_against_loss,
        ),
        Statement(
            "large_eigenvalues",
            "in the text",
            "large-batch minima have more large eigenvalues",
            "a significant number of large positive eigenvalues of the Hessian at the large batch",
            f"number above a tenth of the small batch's mean largest one: {DIRECTION}",
            judges_figures.large_eigenvalues,
        ),
        Statement(
            "near_zero",
            "in the text",
            "small-batch minima have more eigenvalues near zero",
            "numerous small eigenvalues of the Hessian at the small batch",
            f"share within a thousandth of the small batch's mean largest one: {DIRECTION}",
            judges_figures.near_zero,
        ),
        Statement(
            "cone",
            "in the text",
            "sharp minima are no cones",
            "the loss rises steeply along a small subspace only",
            f"steep along at most {100 * MOST_STEEP:g} % of random directions at the large batch, and along a larger "
            "share of the leading eigenvectors; partly: the first alone",
            judges_figures.no_cone,
        ),
        Statement(
            "distances",
            "in the text",
            "small batches end farther from the start",
            f"‖xₛ − x₀‖ is {DISTANCE_RATIO[0]:g} to {DISTANCE_RATIO[1]:g} times ‖xₗ − x₀‖",
            f"the ratio of the means lies between {DISTANCE_RATIO[0]:g} and {DISTANCE_RATIO[1]:g}; partly: above 1",
            judges_figures.distance_ratio,
        ),
        *(
            Statement(
                name,
                "Appendix E",
                f"{words} helps accuracy and leaves minima sharp",
                "higher test accuracy at the large batch, and minima that are still sharp",
                f"test accuracy: {DIRECTION}; and sharper on average than the small batch's minima",
                judges_figures.remedy(name, helps=True),
            )
            for name, words in (("augmentation", "augmentation"), ("conservative", "conservative training"))
        ),
        Statement(
            "adversarial",
            "Appendix E",
            "adversarial training does not help",
            "no gain in test accuracy",
            "the mean gain in test accuracy, seed by seed, does not exceed two standard errors",
            judges_figures.remedy("adversarial", helps=False),
        ),
    )


CLAIMS = _statements()
