"""What the page says in sentences: the answer, what is missing, and whether the record is consistent with itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...paired import and_list
from ..record import SOLVERS, STUDIES, TrainedNetwork, test_accuracy, train_loss
from .published import box_ratios
from .reading import MOVED, Reading, finite, moved_box, words_of
from .verdicts import Agreement, Claim

__all__ = ["answer", "checks", "count_of_agreement", "missing"]


def answer(reading: Reading, found: Sequence[Claim]) -> list[str]:
    """The first paragraph, in plain words: do large batches end in sharper minima that test worse, and by how much?"""
    said = [_lead(reading, found), _sharpness(reading), _accuracy(reading), _warm_start(reading)]
    return [sentence for sentence in said if sentence]


def _lead(reading: Reading, found: Sequence[Claim]) -> str:
    main = reading.record.problems.get("main")
    where = "" if main is None else f" (network {main.network}; {main.data})"
    verdicts = {claim.key: claim.agrees for claim in found}
    told = "; ".join(f"{word}: {verdicts[key]}" for key, word in (("sharper", "sharper"), ("gap", "worse")))
    return f"Do large batches end in sharper minima that test worse? Here{where}: {told}."


def _sharpness(reading: Reading) -> str:
    study = "protocol" if reading.has("protocol", "small", "large") else "matched_loss"
    paired = reading.paired(study, moved_box("full", 1e-3, "ours"))
    if paired is None:
        return "This record has no sharpness of both a small and a large batch, so the paper's question is open here."
    small, large = (reading.batch(study, role) for role in ("small", "large"))
    seeds = "the only seed" if paired.num_seeds == 1 else f"{paired.count(1)} of {paired.num_seeds} seeds"
    bounds = box_ratios("full", 1e-3).values()
    how = "Trained as in the paper" if study == "protocol" else "Trained to equal loss"
    if study != "protocol" and not reading.matched(study):
        how = "Trained to losses that differ, though they should not"
    if paired.ratio is None:
        return f"{how}, {large} ends in sharper minima than {small} in {seeds}."
    said = (
        f"{how}, {large} ends in minima {paired.ratio:.2g} times as sharp as {small} (higher in {seeds}; in the paper "
        f"{min(bounds):.0f} to {max(bounds):.0f} times)"
    )
    matched = reading.paired("matched_loss", moved_box("full", 1e-3, "ours"))
    if study == "protocol" and matched is not None and matched.ratio is not None and reading.matched("matched_loss"):
        said += f", and {matched.ratio:.2g} times at equal training loss, where the paper did not look"
    return f"{said}."


def _accuracy(reading: Reading) -> str:
    study = "protocol" if reading.has("protocol", "small", "large") else "matched_loss"
    paired = reading.paired(study, test_accuracy)
    if paired is None:
        return ""
    change = 100 * paired.mean_difference
    better = "worse" if change < 0 else "better"
    seeds = "the only seed" if paired.num_seeds == 1 else f"{paired.count(-1)} of {paired.num_seeds} seeds"
    error = "" if paired.standard_error is None else f" ± {100 * paired.standard_error:.2f}"
    return f"It tests {abs(change):.2f}{error} points {better} (lower in {seeds}; in the paper 0.22 to 5.27 points lower)."


def _warm_start(reading: Reading) -> str:
    warm = [(epochs, role) for epochs, role in reading.warm_epochs() if epochs]
    if not warm or not reading.has("warm_start", "cold"):
        return ""
    epochs, role = warm[-1]
    sharp = reading.paired("warm_start", moved_box("full", 1e-3, "ours"), reference="cold", other=role)
    accuracy = reading.paired("warm_start", test_accuracy, reference="cold", other=role)
    if sharp is None or sharp.ratio is None or accuracy is None:
        return ""
    return (
        f"Warm start ({reading.ground('warm_start')}): {epochs} epochs of small batches before the large ones leave "
        f"{sharp.ratio:.2g} of the sharpness of a cold start and change the test accuracy by "
        f"{100 * accuracy.mean_difference:+.2f} points."
    )


def count_of_agreement(found: Sequence[Claim]) -> str:
    by_kind = {kind: [claim.short for claim in found if claim.agrees is kind] for kind in Agreement}
    measured = len(found) - len(by_kind[Agreement.UNKNOWN])
    if not measured:
        return "None of the paper's claims can be judged by this record."
    said = f"Of {measured} claims of the paper that could be judged, {len(by_kind[Agreement.YES])} agree"
    for kind, words in ((Agreement.PARTLY, "agree partly"), (Agreement.NO, "do not")):
        if by_kind[kind]:
            said += f"; {len(by_kind[kind])} {words} ({and_list(by_kind[kind])})"
    return f"{said}."


def missing(reading: Reading) -> list[str]:
    """Everything that a reader might look for and will not find, a sentence each."""
    record, networks = reading.record, reading.record.all_networks
    said = []
    if not record.problems.get("main"):
        said.append("The record does not say which network and data were used.")
    absent = [study for study in STUDIES if not any(reading.networks(study, role) for role in reading.roles(study))]
    said += [f"Not run: {study.replace('_', ' ')} ({STUDIES[study].split('; ')[0]})." for study in absent]
    for study in record.studies:
        if study not in absent:
            lost = [role for role in reading.roles(study) if not reading.networks(study, role)]
            if lost:
                said.append(f"In {study.replace('_', ' ')}, no network of {and_list(lost)} is in the record.")
    said += [
        f"The {kind} line of Figure 3 is not in the record."
        for kind in ("straight", "curved")
        if not any(curve.kind == kind and curve.alphas for curve in record.curves)
    ]
    for purpose, figure in (("sharpness_against_loss", "Figure 6"), ("warm_start", "the small-batch run of Figure 5")):
        for role in ("small", "large") if purpose == "sharpness_against_loss" else ("small",):
            if not reading.trajectories(purpose, role):
                said.append(f"No training with the {role} batch was watched for {figure}.")
    if len(record.seeds) == 1:
        said.append(
            "There is one seed, which says nothing about the spread: no deviations, and differences agree partly at best."
        )
    given_up = [network for network in networks if not network.ended]
    if given_up:
        conditions = sorted({words_of(network.condition) for network in given_up})
        said.append(f"{len(given_up)} of {len(networks)} networks did not come to their ending: {'; '.join(conditions)}.")
    said += _unmeasured(networks)
    return said


def _unmeasured(networks: Sequence[TrainedNetwork]) -> list[str]:
    said = []
    for solver, name in SOLVERS.items():
        found = [box for network in networks for box in network.boxes if box.solver == solver]
        stuck = [box for box in found if box.kind not in MOVED or not math.isfinite(box.value)]
        if not found and networks:
            said.append(f"Nothing was measured by this solver: {name}.")
        elif stuck:
            kinds = and_list(sorted({box.kind for box in stuck}))
            said.append(f"{len(stuck)} of {len(found)} measurements by {name} have no value to use ({kinds}).")
    for what, lacks in (
        ("the Hessian's spectrum", [n for n in networks if n.curvature is None]),
        ("rises along directions (the cone)", [n for n in networks if n.cone is None]),
    ):
        if networks and len(lacks) == len(networks):
            said.append(f"Not measured on any network: {what}.")
    loose = [n for n in networks if n.curvature is not None and not n.curvature.converged]
    if loose:
        said.append(
            f"The largest eigenvalues of {len(loose)} networks did not converge; their residuals are in eigenvalues.csv."
        )
    broken = [n for n in networks if not all(map(math.isfinite, (*n.train, *n.test, n.distance)))]
    if broken:
        said.append(f"{len(broken)} networks have a loss, accuracy or distance that is not finite; they are left out there.")
    return said


def checks(reading: Reading) -> list[str]:
    """Whether numbers that must be equal are."""
    said = []
    gaps = []
    for curve in reading.record.curves:
        for alpha, role in ((0.0, "small"), (1.0, "large")):
            ends = [n for n in reading.networks(curve.study, role) if n.seed == curve.seed]
            at = [p.loss for a, p in zip(curve.alphas, curve.train, strict=False) if a == alpha]
            gaps += [abs(at[0] - ends[0].train.loss)] if at and ends else []
    if finite(gaps):
        worst = max(finite(gaps))
        word = "are" if worst <= 1e-6 else "are NOT"
        said.append(
            f"The ends of Figure 3 {word} the losses measured on the networks: the largest difference is {worst:.1g} nats."
        )
    for study in ("matched_loss", "sqrt_rate", "linear_rate", "warm_start", "remedies", "batch_sizes_matched"):
        found = [network for role in reading.roles(study) for network in reading.networks(study, role)]
        losses = finite([train_loss(network) for network in found])
        if losses:
            ended = sum(network.ended for network in found)
            said.append(
                f"{study.replace('_', ' ').capitalize()}: {ended} of {len(found)} networks reached the loss that "
                "they were to have; "
                f"with the final weights the training losses lie between {min(losses):.2g} and {max(losses):.2g} nats."
            )
    return said
