"""Which networks are trained, which of them serve which study, and what is measured on each: no numbers yet."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..recipes import Recipe
from .endings import Ending
from .record import Condition
from .settings import Settings

__all__ = ["MEASUREMENTS", "Plan", "Snapshot", "TrainingKey", "TrainingPlan", "planned"]

MEASUREMENTS = {
    "tables": "Metric 2.1 in both spaces, by all solvers; the spectrum; the test of the cone",
    "brief": "Metric 2.1 in full space by our solver; the largest eigenvalues",
    "watch": "Metric 2.1 in full space by our solver at 1e-3",
    "glance": "loss and accuracy only",
}


@dataclass(frozen=True)
class TrainingPlan:
    """One training: weights are kept at each of ``endings``, and it goes on until the last of them.

    Attributes:
        endings: as text, sorted.
        start: the snapshot that a warm start begins from.
    """

    problem: str
    recipe: Recipe
    learning_rate: float
    remedy: str
    endings: tuple[str, ...]
    start: Snapshot | None = None

    def __str__(self) -> str:
        remedy = f" with {self.remedy}" if self.remedy else ""
        return f"{self.recipe}{remedy}, lr {self.learning_rate:g}"


@dataclass(frozen=True)
class Snapshot:
    """Weights of a training at one of its endings."""

    training: TrainingKey
    ending: str


@dataclass(frozen=True)
class TrainingKey:
    """What tells trainings of one seed apart."""

    problem: str
    recipe: Recipe
    learning_rate: float
    remedy: str = ""

    @classmethod
    def of(cls, condition: Condition) -> TrainingKey:
        return cls(condition.problem, condition.recipe, condition.learning_rate, condition.remedy)


@dataclass(frozen=True)
class Plan:
    """Of one seed; all seeds have the same.

    Attributes:
        studies: study -> role -> condition.
        trainings: in an order in which each comes after what it starts from.
        measurements: snapshot -> a key of ``MEASUREMENTS``.
        watched: (purpose, role) -> snapshots of a trajectory, by epochs.
        curves: studies whose ends are joined.
    """

    studies: Mapping[str, Mapping[str, Condition]]
    trainings: Mapping[TrainingKey, TrainingPlan]
    measurements: Mapping[Snapshot, str]
    watched: Mapping[tuple[str, str], tuple[Snapshot, ...]]
    curves: tuple[str, ...]


def planned(settings: Settings, *, num_train: int, num_warm: int, augments: bool) -> Plan:
    """The plan for these settings.

    Args:
        num_train: training samples, of which a tenth is the paper's large batch.
        num_warm: those of the warm start.
        augments: whether the data can be augmented; else that remedy is left out.
    Raises:
        ValueError: a batch is larger than the training set, or the small one not smaller than the large one.
    """
    small, large = _pair(settings.small_batch, settings.large_batch, num_train)
    studies = {
        study: roles
        for study, roles in _studies(settings, small, large, num_train, augments).items()
        if study in settings.studies
    }
    watched: dict[tuple[str, str], tuple[Snapshot, ...]] = {}
    if "protocol" in studies or "matched_loss" in studies:
        for role, recipe in (("small", small), ("large", large)):
            key = TrainingKey("main", recipe, settings.learning_rate)
            watched["sharpness_against_loss", role] = tuple(Snapshot(key, f"epochs:{e}") for e in settings.watched)
    if "warm_start" in settings.studies:
        studies["warm_start"], iterates = _warm_start(settings, num_warm)
        watched["warm_start", "small"] = iterates
    measurements = {snapshot: "watch" for _, snapshots in watched.items() for snapshot in snapshots}
    for snapshot in watched.get(("warm_start", "small"), ()):
        if not any(purpose != "warm_start" and snapshot in chosen for (purpose, _), chosen in watched.items()):
            measurements[snapshot] = "glance"
    for study, roles in studies.items():
        for condition in roles.values():
            snapshot = Snapshot(TrainingKey.of(condition), condition.ending)
            wanted = "tables" if study in ("protocol", "matched_loss") else "brief"
            if measurements.get(snapshot) != "tables":
                measurements[snapshot] = wanted
    curves = tuple(study for study in ("protocol", "matched_loss") if study in studies)
    return Plan(studies, _trainings(measurements), measurements, watched, curves)


def _pair(small: int | None, large: int | None, num_train: int) -> tuple[Recipe, Recipe]:
    """The paper's batch sizes where none are given: a tenth of the samples, and 256, or less where the tenth is no more."""
    large = max(4, num_train // 10) if large is None else large
    if small is None:
        small = 256 if large > 256 else max(2, large // 16)
    if not small < large <= num_train:
        raise ValueError(
            f"the small batch must be below the large one, and that at most the {num_train} training samples, got {small} "
            f"and {large}. Choose them with --small-batch and --large-batch"
        )
    return Recipe(small), Recipe(large)


def _studies(
    settings: Settings, small: Recipe, large: Recipe, num_train: int, augments: bool
) -> dict[str, dict[str, Condition]]:
    rate, factor = settings.learning_rate, large.batch_size / small.batch_size

    def of(recipe: Recipe, ending: str, *, rate: float = rate, remedy: str = "") -> Condition:
        return Condition("main", recipe, rate, str(Ending.parse(ending)), remedy)

    def pair(ending: str, *, large_rate: float = rate) -> dict[str, Condition]:
        return {"small": of(small, ending), "large": of(large, ending, rate=large_rate)}

    sizes = sorted({small.batch_size, large.batch_size, *(size for size in settings.batch_sizes if size <= num_train)})
    remedies = [remedy for remedy in settings.remedies if augments or remedy != "augmentation"]
    return {
        "protocol": pair(settings.protocol),
        "matched_loss": pair(settings.matched),
        "equal_updates": pair(f"steps:{settings.equal_steps}"),
        "linear_rate": pair(settings.matched, large_rate=rate * factor),
        "sqrt_rate": pair(settings.matched, large_rate=rate * math.sqrt(factor)),
        "batch_sizes": {str(size): of(Recipe(size), f"epochs:{settings.epochs}") for size in sizes},
        "batch_sizes_matched": {str(size): of(Recipe(size), settings.matched) for size in sizes},
        "remedies": {
            "small": of(small, settings.matched_clean),
            "none": of(large, settings.matched_clean),
            **{remedy: of(large, settings.matched_clean, remedy=remedy) for remedy in remedies},
        },
    }


def _warm_start(settings: Settings, num_train: int) -> tuple[dict[str, Condition], tuple[Snapshot, ...]]:
    warm = settings.warm_start
    problem = "main" if (warm.network or settings.network, warm.data or settings.data) == _main(settings) else "warm_start"
    own = warm.small_batch, warm.large_batch
    if problem == "main":
        own = own[0] or settings.small_batch, own[1] or settings.large_batch
    small, large = _pair(*own, num_train)
    ending = str(Ending.parse(warm.ending))

    def of(recipe: Recipe) -> Condition:
        return Condition(problem, recipe, settings.learning_rate, ending)

    after = {epochs: Recipe(large.batch_size, epochs, small.batch_size) for epochs in warm.epochs}
    roles = {"small": of(small), "cold": of(large), **{str(epochs): of(recipe) for epochs, recipe in after.items()}}
    key = TrainingKey.of(roles["small"])
    return roles, tuple(Snapshot(key, f"epochs:{epochs}") for epochs in warm.epochs)


def _main(settings: Settings) -> tuple[str, str]:
    return settings.network, settings.data


def _trainings(snapshots: Sequence[Snapshot] | Mapping[Snapshot, str]) -> dict[TrainingKey, TrainingPlan]:
    endings: dict[TrainingKey, set[str]] = {}
    starts: dict[TrainingKey, Snapshot] = {}
    for snapshot in snapshots:
        key = snapshot.training
        endings.setdefault(key, set()).add(snapshot.ending)
        if key.recipe.is_warm:
            cold = dataclasses.replace(key, recipe=Recipe(key.recipe.warm_batch))
            starts[key] = Snapshot(cold, f"epochs:{key.recipe.warm_epochs}")
            endings.setdefault(cold, set()).add(starts[key].ending)
    ordered = sorted(endings, key=lambda key: key.recipe.is_warm)  # stable: cold starts first
    return {
        key: TrainingPlan(
            key.problem, key.recipe, key.learning_rate, key.remedy, tuple(sorted(endings[key])), starts.get(key)
        )
        for key in ordered
    }
