"""What the numbers of a record say, in sentences that follow from them: what reproduces, what does not, what depends."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

from ..paired import Paired, and_list
from .record import EPSILONS, Quantity, Record, TrainedNetwork, box, test_accuracy, train_accuracy, train_loss

__all__ = ["sentences", "thresholds", "top_eigenvalue"]

LARGE_SHARE, NEAR_ZERO_SHARE = 0.1, 1e-3  # of the mean largest eigenvalue of the small-batch minima
OURS = box("full", EPSILONS[0], "ours")
CONTROLS = {
    "matched_loss": "at the same training loss",
    "equal_updates": "after as many updates",
    "linear_rate": "at the same training loss, with the large batch's learning rate scaled linearly",
    "sqrt_rate": "at the same training loss, with the large batch's learning rate scaled by the square root",
}


def top_eigenvalue(network: TrainedNetwork) -> float:
    """NaN where it was not measured."""
    return math.nan if network.curvature is None else network.curvature.eigenvalues[0]


def thresholds(record: Record) -> tuple[float, float]:
    """From which eigenvalue on one is large, and up to which near zero; NaN where no spectrum was measured."""
    for study in ("matched_loss", "protocol"):
        if study in record.studies:
            found = [value for value in record.values(study, "small", top_eigenvalue) if math.isfinite(value)]
            if found:
                mean = statistics.fmean(found)
                return LARGE_SHARE * mean, NEAR_ZERO_SHARE * mean
    return math.nan, math.nan


def sentences(record: Record) -> list[str]:
    """In the order of the paper, then the controls, then what cannot be said."""
    said: list[str] = []
    for study in ("protocol", "matched_loss"):
        if study in record.studies:
            said += [_accuracy(record, study), *_sharper(record, study), *_distance(record, study)]
    for part in (_solvers, _unmatched, _spectra, _cones, _threshold, _warm_start, _remedies, _disagreements, _diverged):
        said += part(record)
    return [*said, *_limits(record)]


def _where(record: Record, study: str) -> str:
    if study == "protocol":
        return "By the paper's protocol"
    networks = [network for role in record.roles(study) for network in record.networks(study, role)]
    return "At the same training loss" if all(network.ended for network in networks) else "At training losses that differ"


def _accuracy(record: Record, study: str) -> str:
    where = _where(record, study)
    train = record.paired(study, train_accuracy)
    test = record.paired(study, test_accuracy)
    if train is None or test is None:
        return f"{where}, no seed has both accuracies: nothing can be said."
    return (
        f"{where}, test accuracy of the large batch against the small: {_points(test)}, lower in "
        f"{test.count(-1)} of {test.num_seeds} seeds: {test.verdict(-1)} (training accuracy: {_points(train)})."
    )


def _sharper(record: Record, study: str) -> list[str]:
    where, said = _where(record, study), []
    for space, words in (("full", "full space"), ("subspace", "random subspaces")):
        found = record.paired(study, box(space, EPSILONS[0], "ours"))
        if found is not None:
            said.append(
                f"{where}, the large batch's minima are sharper in {words} in {found.count(1)} of {found.num_seeds} "
                f"seeds{_times(found)}: {found.verdict(1)}."
            )
    return said


def _distance(record: Record, study: str) -> list[str]:
    found = record.paired(study, lambda network: network.distance, reference="large", other="small")
    if found is None or found.ratio is None:
        return []
    where, ratios = _where(record, study), sorted(found.seed_ratios)
    inside = "within" if 3 <= found.ratio <= 10 else "NOT within"
    return [
        f"{where}, the small batch ends {found.ratio:.2g} times as far from the start as the large one (seed by "
        f"seed {ratios[0]:.2g} to {ratios[-1]:.2g}): {inside} the paper's 3 to 10."
    ]


def _solvers(record: Record) -> list[str]:
    """Where the paper's solver says something else than ours."""
    said = []
    for study in ("protocol", "matched_loss"):
        if study not in record.studies:
            continue
        where = _where(record, study)
        networks = [n for role in record.roles(study) for n in record.networks(study, role)]
        stuck = [n for n in networks if (b := n.box("full", EPSILONS[0], "published")) and b.kind == "not converged"]
        published = record.paired(study, box("full", EPSILONS[0], "published"))
        ours = record.paired(study, OURS)
        if stuck:
            roles = and_list([r for r in record.roles(study) if any(n in stuck for n in record.networks(study, r))])
            said.append(
                f"{where}, the paper's call of L-BFGS-B stops where it starts on {len(stuck)} of {len(networks)} "
                f"networks ({roles}) and reports no rise: its 0 is not a flat minimum."
            )
        if published is not None and ours is not None and published.ratio is not None and ours.ratio is not None:
            said.append(
                f"{where}, the ratio of large to small is {published.ratio:.3g} by the paper's solver and "
                f"{ours.ratio:.3g} by ours."
            )
    return said


def _unmatched(record: Record) -> list[str]:
    said = []
    for study in record.studies:
        networks = [n for role in record.roles(study) for n in record.networks(study, role)]
        missed = [n for n in networks if not n.ended]
        if missed:
            conditions = and_list(list(dict.fromkeys(str(n.condition) for n in missed)))
            said.append(
                f"In the study {study}, {len(missed)} of {len(networks)} networks did not come to their ending "
                f"({conditions}): sharpness depends on the loss, so their numbers mix the two."
            )
    return said


def _spectra(record: Record) -> list[str]:
    said = []
    large, near = record.large_eigenvalue, record.near_zero
    for study in ("protocol", "matched_loss"):
        if study not in record.studies:
            continue
        where = _where(record, study)
        counts = record.paired(study, lambda n: _count(n, large))
        shares = [record.values(study, role, lambda n: _share(n, near)) for role in ("large", "small")]
        top = record.paired(study, top_eigenvalue)
        if counts is None or top is None or not all(math.isfinite(v) for values in shares for v in values):
            continue
        near_zero = " % against ".join(f"{100 * statistics.fmean(values):.1f}" for values in shares)
        said.append(
            f"{where}, the largest eigenvalue of the Hessian is higher for the large batch in {top.count(1)} of "
            f"{top.num_seeds} seeds{_times(top)}; there are {statistics.fmean(counts.other):.1f} eigenvalues above "
            f"{large:.3g} against {statistics.fmean(counts.reference):.1f} ({counts.verdict(1)}), and "
            f"{near_zero} % lie within {near:.2g} of zero."
        )
    return said


def _count(network: TrainedNetwork, threshold: float) -> float:
    curvature = network.curvature
    return math.nan if curvature is None or not curvature.nodes else curvature.count_above(threshold)


def _share(network: TrainedNetwork, threshold: float) -> float:
    curvature = network.curvature
    return math.nan if curvature is None or not curvature.nodes else curvature.share_within(threshold)


def _cones(record: Record) -> list[str]:
    for study in ("matched_loss", "protocol"):
        if study not in record.studies:
            continue
        cones = [n.cone for n in record.networks(study, "large") if n.cone is not None]
        if cones:
            random = statistics.fmean(cone.random_share for cone in cones)
            top = statistics.fmean(cone.top_share for cone in cones)
            unlike = "do not resemble a cone, as the paper says" if 2 * random < top else "are NOT told from a cone"
            return [
                f"At a distance of {statistics.fmean(cone.radius for cone in cones):.2g} from the large batch's minima the "
                f"loss rises steeply (by {cones[0].steep:g} % or more) along {100 * random:.1f} % of random directions and "
                f"{100 * top:.0f} % of the {len(cones[0].top_rises)} leading eigenvectors: they {unlike}."
                f"{_whole_space(record, study)}"
            ]
    return []


def _whole_space(record: Record, study: str) -> str:
    networks = record.networks(study, "large")
    steep = _mean([network.steep_dimensions for network in networks])
    if not math.isfinite(steep):
        return ""
    dim = next(network.curvature.dim for network in networks if network.curvature is not None)
    return f" By the Hessian's spectrum {steep:.0f} of {dim:,} dimensions are as steep ({100 * steep / dim:.2g} %)."


def _threshold(record: Record) -> list[str]:
    """Figure 4: whether sharpness rises and accuracy falls with the batch size."""
    said = []
    for study, words in (("batch_sizes", "after as many epochs"), ("batch_sizes_matched", "at the same training loss")):
        if study not in record.studies:
            continue
        sizes = list(record.roles(study))
        sharp = [_mean(record.values(study, size, OURS)) for size in sizes]
        accurate = [_mean(record.values(study, size, test_accuracy)) for size in sizes]
        said.append(
            f"Over the batch sizes {and_list(sizes)}, {words}, mean sharpness {_run(sharp, 1)} "
            f"({', '.join(f'{value:.3g}' for value in sharp)}) and mean test accuracy {_run(accurate, -1)} "
            f"({', '.join(f'{100 * value:.2f}' for value in accurate)} %)."
        )
    return said


def _run(values: Sequence[float], sign: int) -> str:
    steps = [sign * (after - before) for before, after in itertools.pairwise(values)]
    word = "rises" if sign > 0 else "falls"
    if all(step > 0 for step in steps):
        return f"{word} from each to the next, as in the paper"
    if sign * (values[-1] - values[0]) > 0:
        return f"{word} from the first to the last, but not at each step"
    return f"does NOT {word[:-1]}"


def _warm_start(record: Record) -> list[str]:
    if "warm_start" not in record.studies:
        return []
    roles = [role for role in record.roles("warm_start") if role not in ("small", "cold")]
    sharp = [_mean(record.values("warm_start", role, OURS)) for role in ("cold", *roles)]
    falls = all(after < before for before, after in itertools.pairwise(sharp))
    said = [
        f"Warm start: after {and_list(roles)} epoch{'s' * (roles != ['1'])} of small batches, mean sharpness of the large "
        f"batch's minima is {', '.join(f'{value:.3g}' for value in sharp[1:])}, against {sharp[0]:.3g} from a cold start: "
        f"{'it falls from each to the next, as' if falls else 'it does NOT fall at each step, as'} in the paper's Figure 5."
    ]
    gains = {role: record.paired("warm_start", test_accuracy, reference="cold", other=role) for role in ("small", *roles)}
    longest, small = gains[roles[-1]], gains["small"]
    if longest is not None and small is not None:
        parts = [
            f"{_points(gain)} after {role} (higher in {gain.count(1)} of {gain.num_seeds})"
            for role, gain in gains.items()
            if gain is not None and role != "small"
        ]
        recovered = (
            "it recovers it"
            if longest.mean_difference >= small.mean_difference
            else (
                f"it recovers {100 * longest.mean_difference / small.mean_difference:.0f} % of it"
                if small.mean_difference > 0
                else "there is nothing to recover"
            )
        )
        said.append(
            f"Warm start: test accuracy against the cold start is {'; '.join(parts)}; the small batch alone has "
            f"{_points(small)}: {recovered}."
        )
    return said


def _remedies(record: Record) -> list[str]:
    if "remedies" not in record.studies:
        return []
    said = []
    for role in record.roles("remedies"):
        if role in ("small", "none"):
            continue
        accuracy = record.paired("remedies", test_accuracy, reference="none", other=role)
        sharp = record.paired("remedies", OURS, reference="none", other=role)
        small = record.paired("remedies", OURS, reference="small", other=role)
        if accuracy is None or sharp is None or small is None or sharp.ratio is None or small.ratio is None:
            continue
        still = "still sharper than" if small.ratio > 1 else "no sharper than"
        said.append(
            f"Remedy {role}: test accuracy {_points(accuracy)} (higher in {accuracy.count(1)} of {accuracy.num_seeds} "
            f"seeds), sharpness {sharp.ratio:.2g} times that without it, {still} the small batch's ({small.ratio:.2g} "
            "times)."
        )
    return said


def _disagreements(record: Record) -> list[str]:
    """A sentence per quantity whose order of small and large batch depends on what is held equal, or on the metric."""
    quantities: dict[str, Quantity] = {"test accuracy": test_accuracy, "ε-box sharpness": OURS, "λmax": top_eigenvalue}
    reference = "protocol" if "protocol" in record.studies else "matched_loss"
    if reference not in record.studies:
        return []
    said = []
    for study, words in CONTROLS.items():
        if study == reference or study not in record.studies:
            continue
        for name, quantity in quantities.items():
            first, second = record.paired(reference, quantity), record.paired(study, quantity)
            if first is None or second is None or _order(first) * _order(second) >= 0:
                continue
            said.append(
                f"Orders disagree on {name}: by {_protocol(reference)}, the large batch's is {_against(name, first)}; "
                f"{words}, it is {_against(name, second)}. Which looks better depends on what is held equal "
                f"(training losses: {_losses(record, reference)}, against {_losses(record, study)})."
            )
    for study in (reference, *CONTROLS):
        if study not in record.studies:
            continue
        orders = {name: record.paired(study, quantity) for name, quantity in quantities.items() if name != "test accuracy"}
        higher = [name for name, paired in orders.items() if paired is not None and _order(paired) > 0]
        lower = [name for name, paired in orders.items() if paired is not None and _order(paired) < 0]
        if higher and lower:
            said.append(
                f"Metrics disagree in the study {study}: {and_list(higher)} calls the large batch's minima sharper, "
                f"{and_list(lower)} calls them flatter."
            )
    return list(dict.fromkeys(said))


def _protocol(study: str) -> str:
    return "the paper's protocol" if study == "protocol" else "matched loss"


def _losses(record: Record, study: str) -> str:
    small, large = (_mean(record.values(study, role, train_loss)) for role in ("small", "large"))
    return f"{small:.2g} for the small and {large:.2g} for the large batch"


def _diverged(record: Record) -> list[str]:
    bad = [n for n in record.all_networks if not math.isfinite(n.train.loss)]
    if not bad:
        return []
    conditions = and_list(list(dict.fromkeys(str(n.condition) for n in bad)))
    return [f"{len(bad)} networks have no finite loss and no sharpness: {conditions}."]


def _limits(record: Record) -> list[str]:
    said = []
    if len(record.seeds) == 1:
        said.append("One seed says nothing about the spread: the order may differ in the next. Run more seeds.")
    if next(iter(record.problems.values())).network in ("R", "A"):
        said.append(
            "This is a small network on small data: the paper's orders can be compared with it, its values cannot. The gap "
            "in accuracy needs few samples and a deep network here; with BatchNorm, convolutions or two hidden layers it "
            "did not show on the same data, sharper minima did."
        )
    said.append(
        "Sharpness is a correlate of generalization, not a cause: a larger learning rate, for one, can lower it and leave "
        "the test accuracy as it was. Values of Metric 2.1 are lower bounds, and rescaling the layers of a ReLU network "
        "changes them without changing the function."
    )
    return said


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else math.nan


def _order(paired: Paired) -> int:
    """Of the other against the reference: 1 for higher, -1 for lower, 0 within a standard error."""
    mean = paired.mean_difference
    return 0 if abs(mean) <= (paired.standard_error or 0.0) else (1 if mean > 0 else -1)


def _points(paired: Paired) -> str:
    change = f"{100 * paired.mean_difference:+.2f}"
    return f"{change} points" if paired.standard_error is None else f"{change} ± {100 * paired.standard_error:.2f} points"


def _times(paired: Paired) -> str:
    if paired.ratio is None:
        return ""
    by_seed = f" (seed by seed {', '.join(f'{ratio:.3g}' for ratio in paired.seed_ratios)})" if paired.num_seeds > 1 else ""
    return f", {paired.ratio:.3g} times as high{by_seed}"


def _against(name: str, paired: Paired) -> str:
    sign = 1 if paired.mean_difference > 0 else -1
    scale, unit = (100, " points") if name == "test accuracy" else (1, "")
    error = "" if paired.standard_error is None else f" ± {scale * paired.standard_error:.2g}"
    return (
        f"{'higher' if sign > 0 else 'lower'} by {scale * abs(paired.mean_difference):.3g}{error}{unit} (in "
        f"{paired.count(sign)} of {paired.num_seeds} seeds)"
    )
