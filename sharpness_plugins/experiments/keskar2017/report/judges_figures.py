"""Judges of what the paper's figures and text say."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

from ...paired import Paired
from ..record import Quantity, test_accuracy
from .published import DISTANCE_RATIO, Published
from .reading import (
    Reading,
    count_above,
    distance,
    largest_eigenvalue,
    mean,
    moved_box,
    random_share,
    share_within,
    steep_share,
    top_share,
)
from .verdicts import Agreement, Judge, Verdict, direction, in_points, in_times, monotone, seeds_of

__all__ = [
    "MOST_STEEP",
    "batch_sizes",
    "distance_ratio",
    "large_eigenvalues",
    "line_ends",
    "near_zero",
    "no_cone",
    "remedy",
    "sharpness_against_loss",
    "warm_accuracy",
    "warm_sharpness",
]

GROWTH = 1.1  # of the ratio of sharpness from early to late in training
MOST_STEEP = 0.1  # share of random directions along which a minimum that is no cone may rise steeply


# --- pictures


def line_ends(reading: Reading, published: Published | None) -> Verdict:
    """Mean rise of the training loss around both ends of the straight line, up to half of its length away."""
    rises: list[tuple[float, float]] = []
    for curve in reading.record.curves:
        if curve.kind != "straight":
            continue
        at = {alpha: point.loss for alpha, point in zip(curve.alphas, curve.train, strict=False)}
        if not {0.0, 1.0} <= at.keys():
            continue
        near = [alpha for alpha in at if 0 < abs(alpha) <= 0.5]
        small = mean([at[alpha] - at[0.0] for alpha in near])
        large = mean([at[1.0 + alpha] - at[1.0] for alpha in near if 1.0 + alpha in at])
        if math.isfinite(small) and math.isfinite(large):
            rises.append((small, large))
    if not rises:
        return Verdict(Agreement.UNKNOWN, reason="there is no straight line with both ends")
    higher = sum(large > small for small, large in rises)
    here = "; ".join(
        f"{small:.3g} nats at the small-batch end, {large:.3g} at the large-batch end" for small, large in rises
    )
    reason = f"the small-batch end rises as much or more on {len(rises) - higher} of {len(rises)} lines"
    agrees = Agreement.YES if higher == len(rises) else Agreement.PARTLY if higher else Agreement.NO
    return Verdict(agrees, f"mean rise {here}", reason)


def batch_sizes(quantity: Quantity, sign: int, unit: Callable[[float], str]) -> Judge:
    def judge(reading: Reading, published: Published | None) -> Verdict:
        points = [(size, mean(reading.values("batch_sizes", role, quantity))) for size, role in reading.sizes("batch_sizes")]
        agrees, reason = monotone(points, sign)
        here = ", ".join(f"{unit(value)} at {size}" for size, value in points if math.isfinite(value)) or "–"
        return Verdict(agrees, here, reason)

    return judge


def warm_sharpness(reading: Reading, published: Published | None) -> Verdict:
    quantity = moved_box("full", 1e-3, "ours")
    points = [(epochs, mean(reading.values("warm_start", role, quantity))) for epochs, role in reading.warm_epochs()]
    agrees, reason = monotone(points, -1)
    here = ", ".join(f"{value:.3g} after {epochs}" for epochs, value in points if math.isfinite(value)) or "–"
    return Verdict(agrees, f"{here} epochs" if points else here, reason)


def warm_accuracy(reading: Reading, published: Published | None) -> Verdict:
    warm = [(epochs, role) for epochs, role in reading.warm_epochs() if epochs]
    if not warm or not reading.has("warm_start", "cold"):
        return Verdict(Agreement.UNKNOWN, reason="it needs a cold start and a warm one")
    epochs, role = warm[-1]
    paired = reading.paired("warm_start", test_accuracy, reference="cold", other=role)
    agrees, reason = direction(paired, 1)
    here = "–" if paired is None else f"after {epochs} epochs {in_points(paired, 1)}"
    gap = reading.paired("warm_start", test_accuracy, reference="cold", other="small")
    if paired is not None and gap is not None and gap.mean_difference > 0:
        here += f"; {100 * paired.mean_difference / gap.mean_difference:.0f} % of the gap to the small batch"
    return Verdict(agrees, here, reason)


def sharpness_against_loss(reading: Reading, published: Published | None) -> Verdict:
    """At half of the initial loss, and at the lowest loss that both batch sizes reach, seed by seed."""
    small, large = (
        {
            t.seed: sorted((p.train.loss, p.sharpness) for p in t.points if _positive(p.train.loss, p.sharpness))
            for t in found
        }
        for found in (reading.trajectories("sharpness_against_loss", role) for role in ("small", "large"))
    )
    early: list[float] = []
    late: list[float] = []
    for seed in sorted(small.keys() & large.keys()):
        both = small[seed], large[seed]
        if min(map(len, both)) < 2:
            continue
        first = min(curve[-1][0] for curve in both)
        last = max(curve[0][0] for curve in both)
        if last >= first / 2:
            continue
        for ratios, loss in ((early, first / 2), (late, last)):
            at = [_interpolated(curve, loss) for curve in both]
            ratios.append(at[1] / at[0])
    if not late:
        return Verdict(
            Agreement.UNKNOWN, reason="there are no two watched trainings of one seed that fall to half their loss"
        )
    ratio, before = mean(late), mean(early)
    here = f"large over small batch: {before:.3g} at half the first loss, {ratio:.3g} at the lowest that both reach"
    if ratio > 1 and ratio > GROWTH * before:
        return Verdict(Agreement.YES, here)
    if ratio > 1:
        return Verdict(Agreement.PARTLY, here, "the large batch is sharper, but by no more than early in training")
    return Verdict(Agreement.NO, here, "the large batch is not sharper at the lowest loss that both reach")


def _positive(*values: float) -> bool:
    return all(math.isfinite(value) and value > 0 for value in values)


def _interpolated(curve: list[tuple[float, float]], loss: float) -> float:
    """Sharpness at ``loss``, linear in both logarithms between neighbours of a curve ascending in loss."""
    for (below, sharp_below), (above, sharp_above) in itertools.pairwise(curve):
        if below <= loss <= above:
            share = 0.0 if above == below else math.log(loss / below) / math.log(above / below)
            return math.exp((1 - share) * math.log(sharp_below) + share * math.log(sharp_above))
    return curve[0][1] if loss < curve[0][0] else curve[-1][1]


# --- spectrum, cone, distance


def large_eigenvalues(reading: Reading, published: Published | None) -> Verdict:
    threshold = reading.record.large_eigenvalue
    paired = reading.paired("matched_loss", count_above(threshold))
    agrees, reason = direction(paired, 1)
    here = "–"
    if paired is not None:
        counts = f"{mean(paired.reference):.3g} and {mean(paired.other):.3g}"
        here = f"above {threshold:.3g}: {counts}; higher in {seeds_of(paired, 1)}"
        top = reading.paired("matched_loss", largest_eigenvalue)
        if top is not None and top.ratio is not None:
            here += f"; the largest {top.ratio:.3g} times as large"
    return Verdict(agrees, here, reason)


def near_zero(reading: Reading, published: Published | None) -> Verdict:
    threshold = reading.record.near_zero
    paired = reading.paired("matched_loss", share_within(threshold))
    agrees, reason = direction(paired, -1)
    if paired is None:
        return Verdict(agrees, reason=reason)
    here = f"within ±{threshold:.2g}: {100 * mean(paired.reference):.3g} % and {100 * mean(paired.other):.3g} %; "
    return Verdict(agrees, f"{here}lower in {seeds_of(paired, -1)}", reason)


def no_cone(reading: Reading, published: Published | None) -> Verdict:
    random, top = (mean(reading.values("matched_loss", "large", share)) for share in (random_share, top_share))
    if not math.isfinite(random):
        return Verdict(Agreement.UNKNOWN, reason="no random directions were tried at large-batch minima")
    here = f"steep along {100 * random:.3g} % of random directions"
    if math.isfinite(top):
        here += f" and {100 * top:.3g} % of the leading eigenvectors"
    whole = mean(reading.values("matched_loss", "large", steep_share))
    if math.isfinite(whole):
        here += f"; by the Hessian's spectrum along {100 * whole:.2g} % of all dimensions"
    if random > MOST_STEEP:
        return Verdict(Agreement.NO, here, f"more than {100 * MOST_STEEP:g} % of random directions are steep")
    if not top > random:
        return Verdict(Agreement.PARTLY, here, "not steep along the leading eigenvectors either, as far as they were tried")
    return Verdict(Agreement.YES, here)


def distance_ratio(reading: Reading, published: Published | None) -> Verdict:
    paired = reading.paired("protocol", distance, reference="large", other="small")
    if paired is None or paired.ratio is None:
        return Verdict(Agreement.UNKNOWN, reason="no seed has both distances")
    low, high = DISTANCE_RATIO
    here = f"{in_times(paired)}".replace("higher", "farther")
    if low <= paired.ratio <= high:
        return Verdict(Agreement.YES, here)
    side = "below" if paired.ratio < low else "above"
    reason = f"{paired.ratio:.3g} lies {side} {low:g} to {high:g}"
    if not published:
        reason += "; other networks and data than the paper's, and other numbers of steps"
    return Verdict(Agreement.PARTLY if paired.ratio > 1 else Agreement.NO, here, reason)


# --- remedies


def _no_help(accuracy: Paired, moved: Agreement, here: str) -> Verdict:
    if accuracy.num_seeds == 1:
        raised = accuracy.mean_difference > 0
        reason = f"the test accuracy is {'higher' if raised else 'no higher'} in the only seed"
        return Verdict(Agreement.NO if raised else Agreement.PARTLY, here, reason)
    raised = moved is Agreement.YES
    return Verdict(Agreement.NO if raised else Agreement.YES, here, "here it does raise the test accuracy")


def remedy(name: str, *, helps: bool) -> Judge:
    def judge(reading: Reading, published: Published | None) -> Verdict:
        accuracy = reading.paired("remedies", test_accuracy, reference="none", other=name)
        quantity = moved_box("full", 1e-3, "ours")
        sharp = reading.paired("remedies", quantity, other=name)
        if accuracy is None:
            return Verdict(Agreement.UNKNOWN, reason="this remedy is not in the record")
        moved, why = direction(accuracy, 1)
        here = f"test accuracy {in_points(accuracy, 1)}"
        if sharp is not None and sharp.ratio is not None:
            here += f"; {sharp.ratio:.3g} times as sharp as the small batch"
        if not helps:
            return _no_help(accuracy, moved, here)
        still = sharp is not None and sharp.mean_difference > 0
        if moved is Agreement.YES and still:
            return Verdict(Agreement.YES, here)
        reasons = [f"accuracy: {why}"] if why else []
        if sharp is None:
            reasons.append("sharpness was not measured")
        elif not still:
            reasons.append("its minima are no sharper than those of the small batch")
        agrees = Agreement.PARTLY if moved is not Agreement.NO else Agreement.NO
        return Verdict(agrees, here, "; ".join(reasons))

    return judge
