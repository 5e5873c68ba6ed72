"""A record read as it is: what was not asked for, failed or is not finite is empty here and never an error."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...paired import Paired, pair
from ..endings import Ending
from ..record import Condition, Curvature, Quantity, Record, TrainedNetwork, Trajectory

__all__ = [
    "MOVED",
    "Reading",
    "count_above",
    "distance",
    "finite",
    "largest_eigenvalue",
    "moved_box",
    "random_share",
    "share_within",
    "short",
    "steep_share",
    "top_share",
    "words_of",
    "words_of_ending",
    "words_of_study",
]

MOVED = ("exact", "converged", "estimate", "lower bound")  # kinds of a number that a solver stands for


@dataclass(frozen=True)
class Reading:
    """Lookups in ``record`` that find nothing instead of failing."""

    record: Record

    def condition(self, study: str, role: str) -> Condition | None:
        return self.record.studies.get(study, {}).get(role)

    def roles(self, study: str) -> list[str]:
        return list(self.record.studies.get(study, {}))

    def networks(self, study: str, role: str) -> list[TrainedNetwork]:
        """In order of the seeds."""
        return [] if self.condition(study, role) is None else self.record.networks(study, role)

    def has(self, study: str, *roles: str) -> bool:
        """Whether every one of ``roles`` has a network."""
        return all(self.networks(study, role) for role in roles)

    def values(self, study: str, role: str, quantity: Quantity) -> list[float]:
        return [quantity(network) for network in self.networks(study, role)]

    def paired(self, study: str, quantity: Quantity, *, reference: str = "small", other: str = "large") -> Paired | None:
        """Seeds that have a finite value in both roles; None where there is no such seed."""
        first, second = (
            {network.seed: quantity(network) for network in self.networks(study, role)} for role in (reference, other)
        )
        seeds = sorted(first.keys() & second.keys())
        return pair([first[seed] for seed in seeds], [second[seed] for seed in seeds])

    def matched(self, study: str) -> bool:
        """Whether every network of a study came to the ending that they were to have in common."""
        return all(network.ended for role in self.roles(study) for network in self.networks(study, role))

    def batch(self, study: str, role: str) -> str:
        """``batch 500``, or what the role is called where it has no condition."""
        condition = self.condition(study, role)
        return role if condition is None else f"batch {condition.recipe.batch_size}"

    def sizes(self, study: str) -> list[tuple[int, str]]:
        """Batch size and role, ascending, of a study with a role per batch size."""
        return sorted((roles.recipe.batch_size, role) for role, roles in self.record.studies.get(study, {}).items())

    def ground(self, study: str) -> str:
        """``network A on …``: what a study was run on."""
        conditions = list(self.record.studies.get(study, {}).values())
        problem = self.record.problems.get(conditions[0].problem) if conditions else None
        return (
            "network and data are not in the record" if problem is None else f"network {problem.network} on {problem.data}"
        )

    def warm_epochs(self) -> list[tuple[int, str]]:
        """Warm epochs and role of Figure 5, ascending; the cold start is (0, "cold")."""
        found = [
            (c.recipe.warm_epochs, role) for role, c in self.record.studies.get("warm_start", {}).items() if role != "small"
        ]
        return sorted((epochs, role) for epochs, role in found if self.has("warm_start", role))

    def trajectories(self, purpose: str, role: str) -> list[Trajectory]:
        return [t for t in self.record.trajectories if (t.purpose, t.role) == (purpose, role) and t.points]


def words_of(condition: Condition) -> str:
    """How a network was trained, for a reader."""
    remedy = f" with {condition.remedy}" if condition.remedy else ""
    return (
        f"{condition.recipe}{remedy}, learning rate {condition.learning_rate:.3g}, until {words_of_ending(condition.ending)}"
    )


def words_of_study(roles: Mapping[str, Condition]) -> str:
    """How its networks were trained: what all have in common once."""
    recipes = list(dict.fromkeys(f"{c.recipe}{f' with {c.remedy}' if c.remedy else ''}" for c in roles.values()))
    rates = list(dict.fromkeys(f"{c.learning_rate:.3g}" for c in roles.values()))
    endings = list(dict.fromkeys(words_of_ending(c.ending) for c in roles.values()))
    return f"{', '.join(recipes)}; learning rate {' and '.join(rates)}; until {' or '.join(endings)}"


def words_of_ending(text: str) -> str:
    """``a training loss of 0.005``; what is no known ending as it is."""
    try:
        return Ending.parse(text).words
    except ValueError:
        return text


def finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def mean(values: Sequence[float]) -> float:
    """Of those that are finite; NaN without any."""
    kept = finite(values)
    return statistics.fmean(kept) if kept else math.nan


def short(value: float) -> str:
    """Three significant digits, without an exponent from a thousand to a million."""
    return f"{value:.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.3g}"


def moved_box(space: str, epsilon: float, solver: str) -> Quantity:
    """The metric's value; NaN where it was not measured, and where the solver failed or never left its start."""

    def quantity(network: TrainedNetwork) -> float:
        found = network.box(space, epsilon, solver)
        return math.nan if found is None or found.kind not in MOVED else found.value

    return quantity


def distance(network: TrainedNetwork) -> float:
    return network.distance


def largest_eigenvalue(network: TrainedNetwork) -> float:
    values = network.curvature.eigenvalues if network.curvature is not None else ()
    return values[0] if values else math.nan


def _has_density(curvature: Curvature | None) -> bool:
    return curvature is not None and bool(curvature.nodes) and len(curvature.nodes) == len(curvature.weights)


def count_above(threshold: float) -> Quantity:
    """Estimated number of the Hessian's eigenvalues above ``threshold``."""

    def quantity(network: TrainedNetwork) -> float:
        if network.curvature is None or not _has_density(network.curvature) or not math.isfinite(threshold):
            return math.nan
        return network.curvature.count_above(threshold)

    return quantity


def share_within(threshold: float) -> Quantity:
    """Estimated share of eigenvalues of magnitude at most ``threshold``."""

    def quantity(network: TrainedNetwork) -> float:
        if network.curvature is None or not _has_density(network.curvature) or not math.isfinite(threshold):
            return math.nan
        return network.curvature.share_within(threshold)

    return quantity


def random_share(network: TrainedNetwork) -> float:
    return math.nan if network.cone is None else network.cone.random_share


def steep_share(network: TrainedNetwork) -> float:
    """Estimated share of all dimensions along which the loss, were it quadratic so far, would rise steeply."""
    if network.curvature is None or network.cone is None or not network.curvature.dim or not network.cone.radius:
        return math.nan
    return network.steep_dimensions / network.curvature.dim


def top_share(network: TrainedNetwork) -> float:
    return math.nan if network.cone is None else network.cone.top_share
