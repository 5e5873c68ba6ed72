"""The reproduction itself: every training and measurement of the plan, kept and re-used, and the record of them."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ... import files
from ..files import versions
from ..lines import ALPHAS, LINES, along_line
from . import measurements
from .findings import sentences, thresholds
from .grounds import Ground, Grounds, repeatable
from .plan import Plan, Snapshot, TrainingKey, planned
from .record import Curve, Record, TrainedNetwork, Trajectory, TrajectoryPoint
from .settings import Settings
from .sources import source_of
from .store import Store, key_of
from .trainings import file_of, train, training_config

__all__ = ["Ranks", "ReproductionEvent", "ReproductionListener", "reproduce"]

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class ReproductionEvent:
    """What the reproduction is doing; ``finished`` once per unit of work that was done now and not before.

    Attributes:
        unit, num_units: one training, one network measured or one line, and how many there are.
        seconds_left: estimated from the units done, for this process; None before the first.
    """

    unit: int
    num_units: int
    label: str
    text: str
    seconds_left: float | None
    finished: bool = False

    def __str__(self) -> str:
        left = "" if self.seconds_left is None else f" [about {_duration(self.seconds_left)} left]"
        return f"{self.unit} of {self.num_units}{left} {self.label}: {self.text}"


ReproductionListener = Callable[[ReproductionEvent], None]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@dataclass(frozen=True)
class Ranks:
    """Which share of the work this process does; the processes share the folder, and nothing else."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Ranks:
        """As ``torchrun`` sets it."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        return cls(*(int(os.environ.get(name, default)) for name, default in zip(names, ("0", "1", "0"), strict=True)))


@dataclass(frozen=True)
class _Unit:
    """``subject``: a TrainingKey, a Snapshot with the name of its measurement, or a study with a kind of line."""

    kind: str
    seed: int
    subject: Any

    @property
    def label(self) -> str:
        if self.kind == "training":
            return f"seed {self.seed}, {_named(self.subject)}"
        if self.kind == "line":
            return f"seed {self.seed}, {self.subject[1]} line, {self.subject[0]}"
        snapshot = self.subject[0]
        return f"seed {self.seed}, {_named(snapshot.training)}, {snapshot.ending}"


def _named(key: TrainingKey) -> str:
    place = "" if key.problem == "main" else " (warm start's data)"
    remedy = f" with {key.remedy}" if key.remedy else ""
    return f"{key.recipe}{remedy}, lr {key.learning_rate:g}{place}"


def reproduce(
    settings: Settings,
    folder: Path,
    *,
    data_folder: Path | None = None,
    verify: bool = True,
    device: torch.device | str = "cpu",
    ranks: Ranks | None = None,
    command: str = "",
    listener: ReproductionListener | None = None,
) -> Record | None:
    """Do what is not in ``folder`` yet, and write ``folder/record.json``.

    Each training and measurement is kept in ``folder/store`` under all that it depends on. After a kill the next call goes
    on from the last whole epoch, and the record is the same, byte for byte. Under ``torchrun`` the units of work are dealt
    out to the ranks, which share ``folder``; only rank 0 returns the record.

    Args:
        data_folder, verify: see ``sources.load``.
        command: to be named in the record.
        listener: hears of every epoch, measurement and finished unit.
    Raises:
        ValueError, SharpnessError: settings, data or device that make no sense; said before anything is trained.
        ImportError: scikit-learn is missing, for digits.
    """
    ranks = ranks or Ranks()
    where = torch.device(device)
    grounds = Grounds(settings, folder=data_folder, verify=verify, device=where)
    with repeatable(where, threads=1 if grounds.is_small else None):
        work = _Work(settings, grounds, Store(folder / "store"), ranks, listener)
        work.run()
        if ranks.rank != 0:
            return None
        record = work.record(command)
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder / "timings.json", json.dumps(work.seconds, indent=1))
    files.write(folder / "record.json", record.to_json())
    return record


class _Work:
    def __init__(
        self, settings: Settings, grounds: Grounds, store: Store, ranks: Ranks, listener: ReproductionListener | None
    ) -> None:
        self.settings, self.grounds, self.store, self.ranks, self.listener = settings, grounds, store, ranks, listener
        first = settings.seeds[0]
        counts = {problem: len(grounds.at(problem, first).split.train) for problem in ("main", "warm_start")}
        self.plan: Plan = planned(
            settings,
            num_train=counts["main"],
            num_warm=counts["warm_start"],
            augments=source_of(settings.data).image is not None,
        )
        self.units = list(self._units())
        self.seconds: dict[str, float] = {}
        self._keys: dict[tuple[int, TrainingKey], str] = {}

    def _units(self) -> Iterator[_Unit]:
        for seed in self.settings.seeds:
            for key in self.plan.trainings:
                yield _Unit("training", seed, key)
            for snapshot, name in self.plan.measurements.items():
                yield _Unit("measurement", seed, (snapshot, name))
        for study in self.plan.curves:
            for kind in LINES:
                yield _Unit("line", self.settings.seeds[0], (study, kind))

    # --- doing

    def run(self) -> None:
        clock = _Clock(self.units[self.ranks.rank :: self.ranks.world_size])
        for number, unit in enumerate(self.units, 1):
            if (number - 1) % self.ranks.world_size != self.ranks.rank:
                continue

            tell = functools.partial(self._tell, number, unit, clock)
            began = time.monotonic()
            before = self._found(unit)
            if before is None or measurements.failed(before):
                found = self._do(unit, tell)
                clock.tick(unit, time.monotonic() - began)
                tell(self._told(unit, found), finished=True)
            else:
                clock.tick(unit, None)

    def _tell(self, number: int, unit: _Unit, clock: _Clock | None, text: str, *, finished: bool = False) -> None:
        if self.listener is not None and text:
            left = None if clock is None else clock.seconds_left()
            self.listener(ReproductionEvent(number, len(self.units), unit.label, text, left, finished))

    def _do(self, unit: _Unit, tell: Callable[[str], None]) -> Mapping[str, Any]:
        if unit.kind == "training":
            plan = self.plan.trainings[unit.subject]
            start = self._start(unit.seed, unit.subject)
            if start is not None:
                assert plan.start is not None
                self._wait(_Unit("training", unit.seed, plan.start.training), tell)
            return train(self.store, self._ground(unit), plan, start=start, tell=tell)[1]
        began = time.monotonic()
        if unit.kind == "measurement":
            snapshot, name = unit.subject
            self._wait(_Unit("training", unit.seed, snapshot.training), tell)
            found = measurements.measure(self._ground(unit), self._network(unit.seed, snapshot), name, tell=tell)
        else:
            found = self._line(unit, tell)
        config = self._config(unit)
        self.store.finish(unit.kind, key_of(config), config, {**found, "seconds": time.monotonic() - began})
        return found

    def _wait(self, unit: _Unit, tell: Callable[[str], None]) -> None:
        """Until another rank has done it. It is on its way there: units are done in order, and depend on earlier ones."""
        while self._found(unit) is None:
            if self.ranks.world_size == 1:
                raise FileNotFoundError(f"the store lacks what {unit.label} left: it was emptied meanwhile. Run again")
            tell(f"waits for {unit.label}")
            time.sleep(POLL_SECONDS)

    def _line(self, unit: _Unit, tell: Callable[[str], None]) -> dict[str, Any]:
        study, kind = unit.subject
        ends = [Snapshot(TrainingKey.of(c), c.ending) for c in (self.plan.studies[study][r] for r in ("small", "large"))]
        for end in ends:
            self._wait(_Unit("training", unit.seed, end.training), tell)
        small, large = (self._network(unit.seed, end) for end in ends)
        split, size = self._ground(unit).split, self.settings.evaluation_batch
        train_points, test_points = along_line(small, large, split, kind=kind, batch_size=size)
        halves = {"train": train_points, "test": test_points}
        return {half: [measurements.finite(point) for point in points] for half, points in halves.items()}

    def _told(self, unit: _Unit, found: Mapping[str, Any]) -> str:
        if unit.kind == "training":
            stops = found["stops"].values()
            missed = sum(not stop["ended"] for stop in stops)
            epochs = max(stop["epochs"] for stop in stops)
            return f"trained for {epochs} epochs{f', {missed} of {len(stops)} endings NOT reached' if missed else ''}"
        if unit.kind == "line":
            return f"{len(ALPHAS)} points"
        train_half, test_half = measurements.evaluations(found)
        values = [f"{b.space} φ({b.epsilon:g}) {b.value:.3g}" for b in measurements.boxes(found) if b.solver == "ours"]
        return ", ".join([f"training loss {train_half.loss:.2g}, test accuracy {test_half.accuracy:.1%}", *values[:1]])

    # --- where things are

    def _ground(self, unit: _Unit) -> Ground:
        if unit.kind == "line":
            return self.grounds.at("main", unit.seed)
        key = unit.subject if unit.kind == "training" else unit.subject[0].training
        return self.grounds.at(key.problem, unit.seed)

    def _key(self, seed: int, key: TrainingKey) -> str:
        if (seed, key) not in self._keys:
            ground = self.grounds.at(key.problem, seed)
            config = training_config(ground, self.plan.trainings[key], self._start(seed, key))
            self._keys[seed, key] = key_of(config)
        return self._keys[seed, key]

    def _start(self, seed: int, key: TrainingKey) -> tuple[str, str] | None:
        start = self.plan.trainings[key].start
        return None if start is None else (self._key(seed, start.training), start.ending)

    def _config(self, unit: _Unit) -> dict[str, Any]:
        """All that a measurement or a line depends on."""
        common = {"evaluation_batch": self.settings.evaluation_batch}
        if unit.kind == "line":
            study, kind = unit.subject
            conditions = [self.plan.studies[study][role] for role in ("small", "large")]
            ends = [[self._key(unit.seed, TrainingKey.of(c)), c.ending] for c in conditions]
            return {**common, "ends": ends, "kind": kind, "alphas": list(ALPHAS)}
        snapshot, name = unit.subject
        metrics = measurements.metrics_for(name, self.settings)
        return {
            **common,
            "training": self._key(unit.seed, snapshot.training),
            "ending": snapshot.ending,
            "seed": unit.seed,
            "max_samples": self.settings.measure_samples,
            "metrics": {key: repr(metric) for key, metric in metrics.items()},
        }

    def _found(self, unit: _Unit) -> dict[str, Any] | None:
        if unit.kind == "training":
            return self.store.done("trainings", self._key(unit.seed, unit.subject))
        return self.store.done(unit.kind, key_of(self._config(unit)))

    def _network(self, seed: int, snapshot: Snapshot) -> nn.Module:
        key = self._key(seed, snapshot.training)
        weights = self.store.load("trainings", key, file_of(snapshot.ending))
        if weights is None:
            raise FileNotFoundError(
                f"{self.store.place('trainings', key) / file_of(snapshot.ending)} is gone or damaged. Remove its folder, "
                "and the training is done again"
            )
        return measurements.loaded(self.grounds.at(snapshot.training.problem, seed), weights)

    # --- the record

    def record(self, command: str) -> Record:
        """From what is in the store; waits for the other ranks' work."""
        for number, unit in enumerate(self.units, 1):
            self._wait(unit, functools.partial(self._tell, number, unit, None))
        found: dict[_Unit, dict[str, Any]] = {}
        for unit in self.units:
            entry = self._found(unit)
            assert entry is not None
            found[unit] = entry
            self.seconds[f"{unit.kind}: {unit.label}"] = entry["seconds"]
        conditions = dict.fromkeys(condition for roles in self.plan.studies.values() for condition in roles.values())
        networks = tuple(self._trained(condition, seed, found) for condition in conditions for seed in self.settings.seeds)
        problems = dict.fromkeys(condition.problem for condition in conditions)
        first = self.settings.seeds[0]
        record = Record(
            settings=self.settings.to_dict(),
            command=command,
            versions={**versions(), "device": self.grounds.device.type},
            problems={name: self.grounds.at(name, first).problem() for name in problems},
            studies=self.plan.studies,
            all_networks=networks,
            curves=tuple(self._curve(unit, entry) for unit, entry in found.items() if unit.kind == "line"),
            trajectories=tuple(
                self._trajectory(purpose, role, snapshots, seed, found)
                for (purpose, role), snapshots in self.plan.watched.items()
                for seed in self.settings.seeds
            ),
        )
        large, near_zero = thresholds(record)
        record = dataclasses.replace(record, large_eigenvalue=large, near_zero=near_zero)
        return dataclasses.replace(record, sentences=tuple(sentences(record)))

    def _trained(self, condition: Any, seed: int, found: Mapping[_Unit, dict[str, Any]]) -> TrainedNetwork:
        snapshot = Snapshot(TrainingKey.of(condition), condition.ending)
        stop = found[_Unit("training", seed, snapshot.training)]["stops"][condition.ending]
        start = self.plan.trainings[snapshot.training].start
        warm = found[_Unit("training", seed, start.training)]["stops"][start.ending]["steps"] if start is not None else 0
        measured = found[_Unit("measurement", seed, (snapshot, self.plan.measurements[snapshot]))]
        train_half, test_half = measurements.evaluations(measured)
        return TrainedNetwork(
            seed=seed,
            condition=condition,
            epochs=stop["epochs"],
            steps=stop["steps"],
            samples=stop["samples"],
            warm_steps=warm,
            epoch_loss=float("nan") if stop["epoch_loss"] is None else stop["epoch_loss"],
            ended=stop["ended"],
            train=train_half,
            test=test_half,
            distance=measured["distance"],
            boxes=measurements.boxes(measured),
            curvature=measurements.curvature(measured),
            cone=measurements.cone(measured),
        )

    def _curve(self, unit: _Unit, entry: Mapping[str, Any]) -> Curve:
        study, kind = unit.subject
        points = {half: tuple(map(measurements.evaluation, entry[half])) for half in ("train", "test")}
        return Curve(kind, study, unit.seed, ALPHAS, points["train"], points["test"])

    def _trajectory(
        self, purpose: str, role: str, snapshots: tuple[Snapshot, ...], seed: int, found: Mapping[_Unit, dict[str, Any]]
    ) -> Trajectory:
        points = []
        key = snapshots[0].training
        stops = found[_Unit("training", seed, key)]["stops"]
        for snapshot in snapshots:
            measured = found[_Unit("measurement", seed, (snapshot, self.plan.measurements[snapshot]))]
            train_half, test_half = measurements.evaluations(measured)
            boxes = {(b.space, b.epsilon, b.solver): b.value for b in measurements.boxes(measured)}
            stop = stops[snapshot.ending]
            points.append(
                TrajectoryPoint(
                    epochs=stop["epochs"],
                    steps=stop["steps"],
                    train=train_half,
                    test=test_half,
                    distance=measured["distance"],
                    sharpness=boxes.get(("full", 1e-3, "ours"), float("nan")),
                )
            )
        return Trajectory(purpose, role, key.problem, key.recipe.batch_size, seed, tuple(points))


class _Clock:
    """Estimates the time left from the time that units like those to come have taken."""

    def __init__(self, units: list[_Unit]) -> None:
        self._left = list(units)
        self._spent: dict[Any, list[float]] = defaultdict(list)

    def tick(self, unit: _Unit, seconds: float | None) -> None:
        """``seconds``: None where it was done before."""
        self._left.remove(unit)
        if seconds is not None:
            for like in (unit.kind, (unit.kind, unit.subject), "any"):
                self._spent[like].append(seconds)

    def seconds_left(self) -> float | None:
        return sum(map(self._expected, self._left)) if self._spent["any"] else None

    def _expected(self, unit: _Unit) -> float:
        for like in ((unit.kind, unit.subject), unit.kind, "any"):
            if self._spent.get(like):
                return sum(self._spent[like]) / len(self._spent[like])
        return 0.0
