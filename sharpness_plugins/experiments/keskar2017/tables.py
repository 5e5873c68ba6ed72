"""The record as plain tables: the paper's Tables 2 to 4, and the networks of every study."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from ..paired import aligned, mean_and_spread
from .findings import top_eigenvalue
from .record import EPSILONS, SOLVERS, SPACES, Record, TrainedNetwork, box, test_accuracy, train_accuracy, train_loss

__all__ = ["accuracy_table", "box_table", "studies_table", "tables"]

TITLES = {"protocol": "the paper's protocol", "matched_loss": "matched training loss"}


def tables(record: Record) -> list[str]:
    """Those for which there are numbers."""
    found = [accuracy_table(record, study) for study in TITLES if study in record.studies]
    found += [box_table(record, study) for study in TITLES if study in record.studies]
    return [*found, studies_table(record)]


def accuracy_table(record: Record, study: str) -> str:
    """Table 2, with loss, steps and the distance from the start; mean ± standard deviation."""
    rows = [["", "small", "large"]]
    quantities = {
        "training accuracy %": lambda network: 100 * train_accuracy(network),
        "test accuracy %": lambda network: 100 * test_accuracy(network),
        "training loss x 1000": lambda network: 1000 * train_loss(network),
        "steps": lambda network: float(network.steps),
        "distance from the start": lambda network: network.distance,
        "largest eigenvalue": top_eigenvalue,
    }
    for label, quantity in quantities.items():
        rows.append([label, *(mean_and_spread(record.values(study, role, quantity)) for role in ("small", "large"))])
    return "\n".join([f"Table 2, {TITLES[study]}", *aligned(rows)])


def box_table(record: Record, study: str) -> str:
    """Tables 3 and 4: Metric 2.1 by each solver, and φ(ε) / φ(ε/2)."""
    rows = [["", "ε", "solver", "small", "large", "large / small", "φ(ε)/φ(ε/2) small", "large"]]
    for space in SPACES:
        for epsilon in EPSILONS:
            for solver in SOLVERS:
                quantity = box(space, epsilon, solver)
                values = [record.values(study, role, quantity) for role in ("small", "large")]
                if not any(math.isfinite(value) for side in values for value in side):
                    continue
                paired = record.paired(study, quantity)
                ratio = "-" if paired is None or paired.ratio is None else f"x {paired.ratio:.3g}"
                halves = [_ratio(record.networks(study, role), space, solver) for role in ("small", "large")]
                rows.append(
                    [
                        {"full": "full space", "subspace": "subspaces"}[space],
                        f"{epsilon:g}",
                        solver,
                        *map(mean_and_spread, values),
                        ratio,
                        *(halves if epsilon == EPSILONS[0] else ["", ""]),
                    ]
                )
    return "\n".join([f"Tables 3 and 4, {TITLES[study]}", *aligned(rows)])


def _ratio(networks: Sequence[TrainedNetwork], space: str, solver: str) -> str:
    ratios = [ratio for network in networks if math.isfinite(ratio := network.box_ratio(space, solver))]
    return f"{statistics.fmean(ratios):.2f}" if ratios else "-"


def studies_table(record: Record) -> str:
    """Every role of every study: loss, accuracy, steps, sharpness and the largest eigenvalue."""
    rows = [["study", "role", "train loss", "test accuracy %", "steps", "φ(1e-3) full", "λmax", "not ended"]]
    for study, roles in record.studies.items():
        for role in roles:
            networks = record.networks(study, role)
            rows.append(
                [
                    study,
                    role,
                    mean_and_spread([network.train.loss for network in networks]),
                    mean_and_spread([100 * network.test.accuracy for network in networks]),
                    f"{statistics.fmean(network.warm_steps + network.steps for network in networks):.0f}",
                    mean_and_spread([box("full", EPSILONS[0], "ours")(network) for network in networks]),
                    mean_and_spread([top_eigenvalue(network) for network in networks]),
                    str(sum(not network.ended for network in networks) or ""),
                ]
            )
    return "\n".join(["All studies", *aligned(rows)])
