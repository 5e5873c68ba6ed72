"""Judges of what the paper's Tables 2 to 4 say."""

from __future__ import annotations

import math

from ..record import test_accuracy, train_accuracy
from .published import Published, box_ratios, half_epsilon_ratios
from .reading import (
    MOVED,
    Reading,
    finite,
    mean,
    moved_box,
)
from .verdicts import Agreement, Judge, Verdict, direction, in_points, in_times

__all__ = [
    "FIT_POINTS",
    "ORDER_FACTOR",
    "accuracy_gap",
    "below_full",
    "half_epsilon",
    "half_range",
    "ratio_order",
    "sharper",
    "training_fit",
]

ORDER_FACTOR = 3.0  # that a number may be off where the paper gives one number and not a range
LEAST_SHARE = 0.5  # of what our solver finds, below which another one is called weak
FIT_POINTS = 2.0  # the paper's own networks differ by up to 1.64 points in training accuracy


def _unmoved(reading: Reading, study: str, space: str, solver: str) -> str:
    """On how many networks a solver found nothing, or little of what ours finds; an empty string where on none."""
    networks = [network for role in ("small", "large") for network in reading.networks(study, role)]
    found = [network.box(space, 1e-3, solver) for network in networks]
    ours = [moved_box(space, 1e-3, "ours")(network) for network in networks]
    stuck = [value for value in found if value is not None and value.kind not in MOVED]
    weak = [
        value
        for value, best in zip(found, ours, strict=True)
        if value is not None and value.kind in MOVED and value.value < LEAST_SHARE * best
    ]
    said = []
    if stuck:
        said.append(
            f"this solver stopped where it started, or failed, on {len(stuck)} of {len(found)} networks, which are left out"
        )
    if weak:
        said.append(
            f"on {len(weak)} of {len(found)} networks it found less than half of what ours does, so the ratio is in part "
            "the solver's"
        )
    return "; ".join(said)


# --- accuracy


def accuracy_gap(reading: Reading, published: Published | None) -> Verdict:
    paper = ""
    if published is not None:
        small, large = published.test
        paper = f"test accuracy {large.mean - small.mean:+.2f} points at the large batch"
    paired = reading.paired("protocol", test_accuracy)
    agrees, reason = direction(paired, -1)
    return Verdict(agrees, "–" if paired is None else in_points(paired, -1), reason, paper)


def training_fit(reading: Reading, published: Published | None) -> Verdict:
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


def sharper(space: str, solver: str) -> Judge:
    def judge(reading: Reading, published: Published | None) -> Verdict:
        paper = ""
        if published is not None:
            small, large = published.boxes(space, 1e-3)
            paper = f"{large.mean / small.mean:.3g} times as sharp ({small} and {large} %)"
        quantity = moved_box(space, 1e-3, solver)
        paired = reading.paired("protocol", quantity)
        agrees, reason = direction(paired, 1)
        stuck = _unmoved(reading, "protocol", space, solver)
        here = "–" if paired is None else in_times(paired)
        matched = reading.paired("matched_loss", quantity)
        if matched is not None and matched.ratio is not None and reading.matched("matched_loss"):
            here += f"; at matched loss {matched.ratio:.3g} times"
        if stuck and agrees is Agreement.YES:
            return Verdict(Agreement.PARTLY, here, stuck, paper)
        return Verdict(agrees, here, "; ".join(filter(None, [reason, stuck])), paper)

    return judge


def ratio_order(reading: Reading, published: Published | None) -> Verdict:
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


def half_epsilon(reading: Reading, published: Published | None) -> Verdict:
    paper = ""
    lowest, highest = half_range()
    if published is not None:
        ratios = [half_epsilon_ratios("full", place)[published.name] for place in (0, 1)]
        paper = f"φ(ε)/φ(ε/2) = {ratios[0]:.3g} (small batch) and {ratios[1]:.3g} (large); "
        paper += f"over all networks {lowest:.3g} to {highest:.3g}"
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


def half_range() -> tuple[float, float]:
    values = [ratio for place in (0, 1) for ratio in half_epsilon_ratios("full", place).values()]
    return min(values), max(values)


def below_full(reading: Reading, published: Published | None) -> Verdict:
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
        "100 columns of signs move every weight by about ten times ε, which the paper's columns, of a scale that it "
        "does not "
        f"give, may not: {' and '.join(above)} batch above"
    )
    agrees = Agreement.YES if not above else Agreement.PARTLY if len(above) < len(shares) else Agreement.NO
    return Verdict(agrees, here, reason, paper)
