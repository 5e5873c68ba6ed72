"""Paper, here, agrees? Every claim of the paper with the rule by which a record agrees with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from ...paired import Paired
from ..record import SOLVERS, Quantity, test_accuracy, train_accuracy
from .published import DISTANCE_RATIO, Published, box_ratios, half_epsilon_ratios, published_for
from .reading import (
    MOVED,
    Reading,
    count_above,
    distance,
    finite,
    largest_eigenvalue,
    mean,
    moved_box,
    random_share,
    share_within,
    top_share,
)

__all__ = ["CLAIMS", "Agreement", "Claim", "Statement", "claims"]

STANDARD_ERRORS = 2.0  # that a mean paired difference must exceed
ORDER_FACTOR = 3.0  # that a number may be off where the paper gives one number and not a range
MOST_STEEP = 0.1  # share of random directions along which a minimum that is no cone may rise steeply
FIT_POINTS = 2.0  # the paper's own networks differ by up to 1.64 points in training accuracy
DIRECTION = (
    "the mean difference, seed by seed, has the paper's sign and exceeds two standard errors; partly: it has the sign alone"
)


class Agreement(str, Enum):
    """The text is what the table shows."""

    YES = "yes"
    PARTLY = "partly"
    NO = "no"
    UNKNOWN = "not measured"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Claim:
    """One statement of the paper, judged.

    Attributes:
        key: a name without spaces.
        where: in the paper.
        short: the statement as the end of a sentence, for summaries.
        paper: what it says, with its numbers.
        rule: when ``here`` agrees with it.
        here: what was found.
        reason: why it does not agree, or not wholly; empty where it does.
    """

    key: str
    where: str
    short: str
    paper: str
    rule: str
    here: str
    agrees: Agreement
    reason: str = ""


@dataclass(frozen=True)
class Statement:
    """What of a claim does not depend on the record."""

    key: str
    where: str
    short: str
    paper: str
    rule: str
    judge: Callable[[Reading, Published | None], Verdict]

    def claim(self, reading: Reading, published: Published | None) -> Claim:
        verdict = self.judge(reading, published)
        paper = verdict.paper or self.paper
        reason = "" if verdict.agrees is Agreement.YES else verdict.reason
        return Claim(self.key, self.where, self.short, paper, self.rule, verdict.here, verdict.agrees, reason)


@dataclass(frozen=True)
class Verdict:
    """``paper`` where the paper's number depends on the network."""

    agrees: Agreement
    here: str = "–"
    reason: str = ""
    paper: str = ""


def claims(reading: Reading) -> list[Claim]:
    """All of ``CLAIMS`` about a record; those that it holds nothing about are "not measured"."""
    published = published_for(reading.record)
    return [statement.claim(reading, published) for statement in CLAIMS]


# --- rules


def direction(paired: Paired | None, sign: int) -> tuple[Agreement, str]:
    if paired is None:
        return Agreement.UNKNOWN, "no seed has both values"
    if sign * paired.mean_difference <= 0:
        return Agreement.NO, f"the order is the other one on average, and the paper's in {_of(paired, sign)}"
    if paired.standard_error is None:
        return Agreement.PARTLY, "the paper's order in the only seed, which says nothing about the spread"
    if paired.mean_difference * sign > STANDARD_ERRORS * paired.standard_error:
        return Agreement.YES, ""
    return Agreement.PARTLY, f"the paper's order on average, within two standard errors, and in {_of(paired, sign)}"


def monotone(points: Iterable[tuple[float, float]], sign: int) -> tuple[Agreement, str]:
    """Whether the second entry goes up (1) or down (-1) from each point to the next."""
    values = [value for _, value in sorted(points) if math.isfinite(value)]
    if len(values) < 2:
        return Agreement.UNKNOWN, "fewer than two points have a value"
    steps = [sign * (after - before) for before, after in zip(values, values[1:], strict=False)]
    wrong = sum(step <= 0 for step in steps)
    if not wrong:
        return Agreement.YES, ""
    if sign * (values[-1] - values[0]) > 0:
        return Agreement.PARTLY, f"{wrong} of {len(steps)} steps from one mean to the next go the other way; the ends do not"
    return Agreement.NO, "the last mean lies on the other side of the first"


def _of(paired: Paired, sign: int) -> str:
    return f"{paired.count(sign)} of {paired.num_seeds} seed{'s' * (paired.num_seeds > 1)}"


def _points(paired: Paired, sign: int) -> str:
    change = f"{100 * paired.mean_difference:+.2f}"
    if paired.standard_error is not None:
        change += f" ± {100 * paired.standard_error:.2f}"
    return f"{change} points; {'higher' if sign > 0 else 'lower'} in {_of(paired, sign)}"


def _times(paired: Paired) -> str:
    """``8.1 times (seed by seed 7.0 to 9.2); higher in 5 of 5 seeds``."""
    if paired.ratio is None:
        return f"difference {paired.mean_difference:+.3g}; higher in {_of(paired, 1)}"
    said = f"{paired.ratio:.3g} times"
    if paired.num_seeds > 1:
        said += f" (seed by seed {min(paired.seed_ratios):.3g} to {max(paired.seed_ratios):.3g})"
    return f"{said}; higher in {_of(paired, 1)}"


def _span(values: Iterable[float]) -> str:
    kept = list(values)
    return f"{min(kept):.3g} to {max(kept):.3g}"


def _unmoved(reading: Reading, study: str, quantity: tuple[str, float, str]) -> str:
    """How many of a solver's numbers are none, or an empty string."""
    found = [network.box(*quantity) for role in ("small", "large") for network in reading.networks(study, role)]
    stuck = [value for value in found if value is not None and value.kind not in MOVED]
    if not stuck:
        return ""
    return f"this solver stopped where it started, or failed, on {len(stuck)} of {len(found)} networks, which are left out"


# --- accuracy


def _gap(reading: Reading, published: Published | None) -> Verdict:
    paper = ""
    if published is not None:
        small, large = published.test
        paper = f"test accuracy {large.mean - small.mean:+.2f} points at the large batch"
    paired = reading.paired("protocol", test_accuracy)
    agrees, reason = direction(paired, -1)
    return Verdict(agrees, "–" if paired is None else _points(paired, -1), reason, paper)


def _fit(reading: Reading, published: Published | None) -> Verdict:
    paper = ""
    if published is not None:
        paper = f"training accuracy {published.train[0]} % and {published.train[1]} %"
    values = [100 * mean(reading.values("protocol", role, train_accuracy)) for role in ("small", "large")]
    if not all(map(math.isfinite, values)):
        return Verdict(Agreement.UNKNOWN, reason="the protocol's networks are not in the record", paper=paper)
    here = f"training accuracy {values[0]:.2f} % and {values[1]:.2f} %"
    close = abs(values[0] - values[1]) <= FIT_POINTS
    reason = f"they differ by {abs(values[0] - values[1]):.2f} points: one of the two is less trained"
    return Verdict(Agreement.YES if close else Agreement.NO, here, reason, paper)


# --- sharpness


def _sharper(space: str, solver: str) -> Callable[[Reading, Published | None], Verdict]:
    def judge(reading: Reading, published: Published | None) -> Verdict:
        paper = ""
        if published is not None:
            small, large = published.boxes(space, 1e-3)
            paper = f"{large.mean / small.mean:.3g} times as sharp ({small} and {large} %)"
        quantity = moved_box(space, 1e-3, solver)
        paired = reading.paired("protocol", quantity)
        agrees, reason = direction(paired, 1)
        stuck = _unmoved(reading, "protocol", (space, 1e-3, solver))
        here = "–" if paired is None else _times(paired)
        matched = reading.paired("matched_loss", quantity)
        if matched is not None and matched.ratio is not None:
            here += f"; at matched loss {matched.ratio:.3g} times"
        if stuck and agrees is Agreement.YES:
            return Verdict(Agreement.PARTLY, here, stuck, paper)
        return Verdict(agrees, here, "; ".join(filter(None, [reason, stuck])), paper)

    return judge


def _order(reading: Reading, published: Published | None) -> Verdict:
    found: dict[float, float] = {}
    for epsilon in (1e-3, 5e-4):
        paired = reading.paired("protocol", moved_box("full", epsilon, "ours"))
        if paired is not None and paired.ratio is not None:
            found[epsilon] = paired.ratio
    paper = ""
    bounds = {epsilon: (min(r.values()), max(r.values())) for epsilon in (1e-3, 5e-4) for r in [box_ratios("full", epsilon)]}
    if published is not None:
        known = {epsilon: box_ratios("full", epsilon)[published.name] for epsilon in bounds}
        bounds = {epsilon: (ratio / ORDER_FACTOR, ratio * ORDER_FACTOR) for epsilon, ratio in known.items()}
        paper = f"{known[1e-3]:.3g} times at ε = 1e-3, {known[5e-4]:.3g} at 5e-4"
    if not found:
        return Verdict(Agreement.UNKNOWN, reason="no ratio can be formed", paper=paper)
    here = ", ".join(f"{ratio:.3g} times at ε = {_epsilon(epsilon)}" for epsilon, ratio in found.items())
    outside = [
        f"{ratio:.3g} at ε = {_epsilon(epsilon)} lies {'below' if ratio < bounds[epsilon][0] else 'above'} "
        f"{bounds[epsilon][0]:.3g} to {bounds[epsilon][1]:.3g}"
        for epsilon, ratio in found.items()
        if not bounds[epsilon][0] <= ratio <= bounds[epsilon][1]
    ]
    if not outside:
        return Verdict(Agreement.YES, here, paper=paper)
    agrees = Agreement.PARTLY if min(found.values()) > 1 else Agreement.NO
    why = "" if published else "; other networks and data than the paper's"
    return Verdict(agrees, here, "; ".join(outside) + why, paper)


def _epsilon(epsilon: float) -> str:
    return {1e-3: "1e-3", 5e-4: "5e-4"}.get(epsilon, f"{epsilon:g}")


def _half_epsilon(reading: Reading, published: Published | None) -> Verdict:
    paper = ""
    lowest, highest = _half_range()
    if published is not None:
        ratios = [half_epsilon_ratios("full", place)[published.name] for place in (0, 1)]
        paper = f"φ(ε)/φ(ε/2) = {ratios[0]:.3g} (small batch) and {ratios[1]:.3g} (large); over all networks {lowest:.3g} to {highest:.3g}"
    found = {}
    for role in ("small", "large"):
        values = [network.box_ratio("full", "ours") for network in reading.networks("protocol", role)]
        if finite(values):
            found[role] = mean(values)
    if not found:
        return Verdict(Agreement.UNKNOWN, reason="it needs both ε, and positive values", paper=paper)
    here = ", ".join(f"{value:.3g} ({role} batch)" for role, value in found.items())
    outside = [role for role, value in found.items() if not lowest <= value <= highest]
    if not outside:
        return Verdict(Agreement.YES, here, paper=paper)
    agrees = Agreement.PARTLY if len(outside) < len(found) else Agreement.NO
    above = [f"{role} batch" for role in outside if found[role] > highest]
    below = [f"{role} batch" for role in outside if found[role] < lowest]
    why = []
    if above:
        why.append(
            f"{' and '.join(above)} above: within the box the loss rises faster than a quadratic, beyond its curvature"
        )
    if below:
        why.append(f"{' and '.join(below)} below: the gradient dominates or the loss saturates: no minimum at this scale")
    return Verdict(agrees, here, "; ".join(why), paper)


def _half_range() -> tuple[float, float]:
    values = [ratio for place in (0, 1) for ratio in half_epsilon_ratios("full", place).values()]
    return min(values), max(values)


def _below_full(reading: Reading, published: Published | None) -> Verdict:
    shares: dict[str, float] = {}
    for role in ("small", "large"):
        full, subspace = (
            mean(reading.values("protocol", role, moved_box(space, 1e-3, "ours"))) for space in ("full", "subspace")
        )
        if math.isfinite(full) and math.isfinite(subspace) and full > 0:
            shares[role] = subspace / full
    paper = ""
    if published is not None:
        known = [published.boxes("subspace", 1e-3)[i].mean / published.boxes("full", 1e-3)[i].mean for i in (0, 1)]
        paper = f"subspace / full space = {known[0]:.2g} (small batch) and {known[1]:.2g} (large) at ε = 1e-3"
    if not shares:
        return Verdict(Agreement.UNKNOWN, reason="it needs both spaces", paper=paper)
    here = ", ".join(f"{share:.2g} ({role} batch)" for role, share in shares.items())
    above = [role for role, share in shares.items() if share >= 1]
    reason = (
        "100 columns of signs move every weight by about ten times ε, which the paper's columns, of a scale that it does not "
        f"give, may not: {' and '.join(above)} batch above"
    )
    agrees = Agreement.YES if not above else Agreement.PARTLY if len(above) < len(shares) else Agreement.NO
    return Verdict(agrees, here, reason, paper)


# --- pictures


def _line(reading: Reading, published: Published | None) -> Verdict:
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


def _batch_sizes(quantity: Quantity, sign: int, unit: Callable[[float], str]) -> Callable[..., Verdict]:
    def judge(reading: Reading, published: Published | None) -> Verdict:
        points = [(size, mean(reading.values("batch_sizes", role, quantity))) for size, role in reading.sizes("batch_sizes")]
        agrees, reason = monotone(points, sign)
        here = ", ".join(f"{unit(value)} at {size}" for size, value in points if math.isfinite(value)) or "–"
        return Verdict(agrees, here, reason)

    return judge


def _warm_sharpness(reading: Reading, published: Published | None) -> Verdict:
    quantity = moved_box("full", 1e-3, "ours")
    points = [(epochs, mean(reading.values("warm_start", role, quantity))) for epochs, role in reading.warm_epochs()]
    agrees, reason = monotone(points, -1)
    here = ", ".join(f"{value:.3g} after {epochs}" for epochs, value in points if math.isfinite(value)) or "–"
    return Verdict(agrees, f"{here} epochs" if points else here, reason)


def _warm_accuracy(reading: Reading, published: Published | None) -> Verdict:
    warm = [(epochs, role) for epochs, role in reading.warm_epochs() if epochs]
    if not warm or not reading.has("warm_start", "cold"):
        return Verdict(Agreement.UNKNOWN, reason="it needs a cold start and a warm one")
    epochs, role = warm[-1]
    paired = reading.paired("warm_start", test_accuracy, reference="cold", other=role)
    agrees, reason = direction(paired, 1)
    here = "–" if paired is None else f"after {epochs} epochs {_points(paired, 1)}"
    gap = reading.paired("warm_start", test_accuracy, reference="cold", other="small")
    if paired is not None and gap is not None and gap.mean_difference > 0:
        here += f"; {100 * paired.mean_difference / gap.mean_difference:.0f} % of the gap to the small batch"
    return Verdict(agrees, here, reason)


def _sharpness_against_loss(reading: Reading, published: Published | None) -> Verdict:
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
    if ratio > 1 and ratio > before:
        return Verdict(Agreement.YES, here)
    if ratio > 1:
        return Verdict(Agreement.PARTLY, here, "the large batch is sharper, but by no more than early in training")
    return Verdict(Agreement.NO, here, "the large batch is not sharper at the lowest loss that both reach")


def _positive(*values: float) -> bool:
    return all(math.isfinite(value) and value > 0 for value in values)


def _interpolated(curve: list[tuple[float, float]], loss: float) -> float:
    """Sharpness at ``loss``, linear in both logarithms between neighbours of a curve ascending in loss."""
    for (below, sharp_below), (above, sharp_above) in zip(curve, curve[1:], strict=False):
        if below <= loss <= above:
            share = 0.0 if above == below else math.log(loss / below) / math.log(above / below)
            return math.exp((1 - share) * math.log(sharp_below) + share * math.log(sharp_above))
    return curve[0][1] if loss < curve[0][0] else curve[-1][1]


# --- spectrum, cone, distance


def _large_eigenvalues(reading: Reading, published: Published | None) -> Verdict:
    threshold = reading.record.large_eigenvalue
    paired = reading.paired("matched_loss", count_above(threshold))
    agrees, reason = direction(paired, 1)
    here = "–"
    if paired is not None:
        here = (
            f"above {threshold:.3g}: {mean(paired.reference):.3g} and {mean(paired.other):.3g}; higher in {_of(paired, 1)}"
        )
        top = reading.paired("matched_loss", largest_eigenvalue)
        if top is not None and top.ratio is not None:
            here += f"; the largest {top.ratio:.3g} times as large"
    return Verdict(agrees, here, reason)


def _near_zero(reading: Reading, published: Published | None) -> Verdict:
    threshold = reading.record.near_zero
    paired = reading.paired("matched_loss", share_within(threshold))
    agrees, reason = direction(paired, -1)
    if paired is None:
        return Verdict(agrees, reason=reason)
    here = f"within ±{threshold:.2g}: {100 * mean(paired.reference):.3g} % and {100 * mean(paired.other):.3g} %; "
    return Verdict(agrees, f"{here}lower in {_of(paired, -1)}", reason)


def _cone(reading: Reading, published: Published | None) -> Verdict:
    random, top = (mean(reading.values("matched_loss", "large", share)) for share in (random_share, top_share))
    if not math.isfinite(random):
        return Verdict(Agreement.UNKNOWN, reason="no random directions were tried at large-batch minima")
    here = f"steep along {100 * random:.3g} % of random directions"
    if math.isfinite(top):
        here += f" and {100 * top:.3g} % of the leading eigenvectors"
    if random > MOST_STEEP:
        return Verdict(Agreement.NO, here, f"more than {100 * MOST_STEEP:g} % of random directions are steep")
    if not top > random:
        return Verdict(Agreement.PARTLY, here, "not steep along the leading eigenvectors either, as far as they were tried")
    return Verdict(Agreement.YES, here)


def _distances(reading: Reading, published: Published | None) -> Verdict:
    paired = reading.paired("protocol", distance, reference="large", other="small")
    if paired is None or paired.ratio is None:
        return Verdict(Agreement.UNKNOWN, reason="no seed has both distances")
    low, high = DISTANCE_RATIO
    here = f"{_times(paired)}".replace("higher", "farther")
    if low <= paired.ratio <= high:
        return Verdict(Agreement.YES, here)
    side = "below" if paired.ratio < low else "above"
    reason = f"{paired.ratio:.3g} lies {side} {low:g} to {high:g}"
    if not published:
        reason += "; other networks and data than the paper's, and other numbers of steps"
    return Verdict(Agreement.PARTLY if paired.ratio > 1 else Agreement.NO, here, reason)


# --- remedies


def _remedy(name: str, *, helps: bool) -> Callable[[Reading, Published | None], Verdict]:
    def judge(reading: Reading, published: Published | None) -> Verdict:
        accuracy = reading.paired("remedies", test_accuracy, reference="none", other=name)
        quantity = moved_box("full", 1e-3, "ours")
        sharp = reading.paired("remedies", quantity, other=name)
        if accuracy is None:
            return Verdict(Agreement.UNKNOWN, reason="this remedy is not in the record")
        moved, why = direction(accuracy, 1)
        here = f"test accuracy {_points(accuracy, 1)}"
        if sharp is not None and sharp.ratio is not None:
            here += f"; {sharp.ratio:.3g} times as sharp as the small batch"
        if not helps:
            raised = moved is Agreement.YES
            return Verdict(Agreement.NO if raised else Agreement.YES, here, "here it does raise the test accuracy")
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


def _statements() -> tuple[Statement, ...]:
    accuracy_drop = "test accuracy 0.22 to 5.27 points lower at the large batch, on all six networks"
    ratios = {
        (space, epsilon): _span(box_ratios(space, epsilon).values())
        for space in ("full", "subspace")
        for epsilon in (1e-3, 5e-4)
    }
    ours, published = (SOLVERS.get(name, name) for name in ("ours", "published"))
    in_range = f"the ratio of the means lies in the paper's range (for the paper's own network: within a factor {ORDER_FACTOR:g} of its number); partly: above 1"
    low, high = _half_range()
    return (
        Statement("gap", "Table 2", "large batches test worse", accuracy_drop, DIRECTION, _gap),
        Statement(
            "fit", "Table 2", "both batch sizes fit the training data", "training accuracy 98.35 to 99.99 % at both batch sizes",
            f"the mean training accuracies differ by at most {FIT_POINTS:g} points", _fit,
        ),
        Statement(
            "sharper", "Table 3", "large-batch minima are sharper in full space",
            f"{ratios['full', 1e-3]} times as sharp at the large batch, ε = 1e-3", f"{DIRECTION} ({ours})", _sharper("full", "ours"),
        ),
        Statement(
            "sharper_published", "Table 3", "the paper's own solver finds so, too",
            f"{ratios['full', 1e-3]} times as sharp at the large batch, ε = 1e-3",
            f"{DIRECTION}; at most partly where it stopped at its start ({published})", _sharper("full", "published"),
        ),
        Statement(
            "order", "Table 3", "the ratio is of the paper's order",
            f"{ratios['full', 1e-3]} times at ε = 1e-3, {ratios['full', 5e-4]} at 5e-4", in_range, _order,
        ),
        Statement(
            "half_epsilon", "Table 3", "sharpness scales with ε as in the paper",
            f"φ(ε)/φ(ε/2) from {low:.3g} to {high:.3g}; 4 would be a quadratic, 2 a slope",
            "the mean ratio lies in the paper's range at both batch sizes; partly: at one", _half_epsilon,
        ),
        Statement(
            "subspace", "Table 4", "large-batch minima are sharper in random subspaces",
            f"{ratios['subspace', 1e-3]} times as sharp at the large batch, ε = 1e-3", DIRECTION, _sharper("subspace", "ours"),
        ),
        Statement(
            "below_full", "Tables 3, 4", "random subspaces see less than the full space",
            "every number in a random subspace is below the one in full space",
            "so for the means at both batch sizes; partly: at one", _below_full,
        ),
        Statement(
            "line", "Figure 3", "the loss rises faster around the large-batch end of the line",
            "on the line through both minima, the large-batch one is strikingly sharper",
            "mean rise of the training loss at α = 1 ± d above that at 0 ± d, over the grid's 0 < d ≤ ½, on every line", _line,
        ),
        Statement(
            "accuracy_by_size", "Figure 4", "test accuracy falls with the batch size",
            "it falls, with a marked drop above 500 samples (C1) or 15 000 (F2)",
            "every mean is below the one of the next smaller batch; partly: the last is below the first",
            _batch_sizes(test_accuracy, -1, lambda value: f"{100 * value:.2f} %"),
        ),
        Statement(
            "sharpness_by_size", "Figure 4", "sharpness grows with the batch size", "it grows",
            "every mean is above the one of the next smaller batch; partly: the last is above the first",
            _batch_sizes(moved_box("full", 1e-3, "ours"), 1, lambda value: f"{value:.3g} %"),
        ),
        Statement(
            "warm_sharpness", "Figure 5", "a warm start lowers sharpness, the longer the more",
            "after enough small-batch epochs the large batch's minima are less sharp; one run, no error bars",
            "the means fall from each number of warm epochs to the next; partly: from the first to the last", _warm_sharpness,
        ),
        Statement(
            "warm_accuracy", "Figure 5", "a warm start recovers accuracy",
            "after enough small-batch epochs the large batch tests better", f"longest warm start against the cold one: {DIRECTION}", _warm_accuracy,
        ),
        Statement(
            "loss", "Figure 6", "the ratio of sharpness grows as the loss falls",
            "similar sharpness early; as the loss falls, it rises for the large batch and does not for the small",
            "the ratio of large to small batch at the lowest loss that both reach is above 1 and above that at half of the "
            "first loss; partly: above 1", _sharpness_against_loss,
        ),
        Statement(
            "large_eigenvalues", "text", "large-batch minima have more large eigenvalues",
            "a significant number of large positive eigenvalues of the Hessian at the large batch",
            f"number above a tenth of the small batch's mean largest one: {DIRECTION}", _large_eigenvalues,
        ),
        Statement(
            "near_zero", "text", "small-batch minima have more eigenvalues near zero",
            "numerous small eigenvalues of the Hessian at the small batch",
            f"share within a thousandth of the small batch's mean largest one: {DIRECTION}", _near_zero,
        ),
        Statement(
            "cone", "text", "sharp minima are no cones", "the loss rises steeply along a small subspace only",
            f"steep along at most {100 * MOST_STEEP:g} % of random directions at the large batch, and along a larger share of the "
            "leading eigenvectors; partly: the first alone", _cone,
        ),
        Statement(
            "distances", "text", "small batches end farther from the start",
            f"‖x_s − x₀‖ is {DISTANCE_RATIO[0]:g} to {DISTANCE_RATIO[1]:g} times ‖x_l − x₀‖",
            f"the ratio of the means lies between {DISTANCE_RATIO[0]:g} and {DISTANCE_RATIO[1]:g}; partly: above 1", _distances,
        ),
        *(
            Statement(
                name, "Appendix E", f"{name.replace('_', ' ')} {'training ' if name != 'augmentation' else ''}helps accuracy and leaves minima sharp",
                "higher test accuracy at the large batch, and minima that are still sharp",
                f"test accuracy: {DIRECTION}; and sharper on average than the small batch's minima", _remedy(name, helps=True),
            )
            for name in ("augmentation", "conservative")
        ),
        Statement(
            "adversarial", "Appendix E", "adversarial training does not help", "no gain in test accuracy",
            "the mean gain in test accuracy, seed by seed, does not exceed two standard errors", _remedy("adversarial", helps=False),
        ),
    )  # fmt: skip


CLAIMS = _statements()
