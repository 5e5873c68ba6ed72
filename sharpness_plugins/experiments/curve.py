"""What the warm-start experiment found: points with paired statistics, three currencies, sentences, a figure."""

from __future__ import annotations

import json
import statistics
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import did_you_mean
from ..plots import warm_start_plot
from ..report import Kind
from ..schema import ANY, check, read_json
from .data import Split
from .files import csv_text, write_results
from .match import Match
from .paired import Paired, aligned, and_list, mean_and_spread, pair
from .recipes import Network, Quantity, Recipe, sharpness
from .training import Evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Iterate", "SeedRuns", "WarmStartCurve", "WarmStartSettings"]

SCHEMA_VERSION = 1
TEXT_WIDTH = 112
PLAIN: Mapping[str, Quantity] = {
    "test_accuracy": lambda network: network.test.accuracy,
    "test_loss": lambda network: network.test.loss,
    "train_loss": lambda network: network.train.loss,
    "steps": lambda network: network.steps,
    "samples": lambda network: network.samples,
    "seconds": lambda network: network.seconds,
}


@dataclass(frozen=True)
class WarmStartSettings:
    """What ``warm_start_curve`` was asked for; ``epochs`` are sorted and begin with 0, the cold start."""

    small_batch: int
    large_batch: int
    epochs: tuple[int, ...]
    seeds: tuple[int, ...]
    match: Match
    check_every: int = 10
    max_steps: int = 20_000
    title: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.small_batch < self.large_batch:
            raise ValueError(
                f"small_batch must be at least 1 and below large_batch, got {self.small_batch} and {self.large_batch}"
            )
        if any(epochs < 0 or epochs != int(epochs) for epochs in self.epochs):
            raise ValueError(f"epochs must be whole numbers from 0 on, got {self.epochs}: 0 is the cold start")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be at least one, and each different, got {self.seeds}")
        if min(self.check_every, self.max_steps) < 1:
            raise ValueError(f"check_every and max_steps must be at least 1, got {self.check_every} and {self.max_steps}")
        object.__setattr__(self, "epochs", tuple(sorted({0, *map(int, self.epochs)})))
        object.__setattr__(self, "seeds", tuple(map(int, self.seeds)))

    @property
    def networks_per_seed(self) -> int:
        return len(self.epochs) + 2  # the small batch alone, and the large one after as many epochs

    def check(self, split: Split) -> None:
        """Raises a ValueError where ``split`` has too few training samples for a large batch."""
        if self.large_batch > len(split.train):
            raise ValueError(f"large_batch must be at most the {len(split.train)} training samples, got {self.large_batch}")

    def recipe(self, epochs: int) -> Recipe:
        return Recipe(self.large_batch, epochs, self.small_batch) if epochs else Recipe(self.large_batch)


@dataclass(frozen=True)
class Iterate:
    """The small-batch run after so many epochs, where the large batch takes over."""

    epochs: int
    train: Evaluation
    test: Evaluation


@dataclass(frozen=True)
class SeedRuns:
    """Every network of one seed.

    Attributes:
        points: one per entry of the settings' ``epochs``, the cold start first.
        small: the small batch alone, to the match.
        equal_epochs: the cold large batch after as many epochs as ``small`` took, whatever its loss.
        iterates: the starts of the warm points.
    """

    seed: int
    points: tuple[Network, ...]
    small: Network
    equal_epochs: Network
    iterates: tuple[Iterate, ...]


@dataclass(frozen=True)
class WarmStartCurve:
    """Large-batch networks by the number of small-batch epochs before them; prints as two tables and what they say."""

    settings: WarmStartSettings
    runs: tuple[SeedRuns, ...]
    versions: Mapping[str, str]
    seconds: float

    # --- numbers

    @property
    def metrics(self) -> list[str]:
        return list(dict.fromkeys(key for run in self.runs for network in run.points for key in network.report))

    def networks(self, epochs: int) -> list[Network]:
        """The point after ``epochs`` of small batches, one network per seed.

        Raises:
            ValueError: it is not on the curve.
        """
        if epochs not in self.settings.epochs:
            raise ValueError(
                f"the curve has no point at {epochs} epochs. Points: {', '.join(map(str, self.settings.epochs))}"
            )
        place = self.settings.epochs.index(epochs)
        return [run.points[place] for run in self.runs]

    def values(self, epochs: int, quantity: str) -> list[float]:
        """In the order of the seeds; NaN where a metric failed.

        Args:
            quantity: the key of a metric, or "test_accuracy" (a share), "test_loss", "train_loss", "steps", "samples",
                "seconds"; the last three with the warm start.
        """
        return list(map(self._quantity(quantity), self.networks(epochs)))

    def paired(self, epochs: int, quantity: str) -> Paired | None:
        """Against the cold start, seed by seed; None where no seed has both values."""
        return pair(self.values(0, quantity), self.values(epochs, quantity))

    def _quantity(self, name: str) -> Quantity:
        if name in PLAIN:
            return PLAIN[name]
        known = [*PLAIN, *self.metrics]
        if name not in known:
            raise ValueError(f"no quantity {name!r}.{did_you_mean(name, known)} Quantities: {', '.join(known)}")
        return sharpness(name)

    def _small_against_cold(self, quantity: str, *, equal_epochs: bool) -> Paired | None:
        """Reference: the small batch at the match. Other: the cold large batch at the match, or after as many epochs."""
        get = self._quantity(quantity)
        large = [run.equal_epochs if equal_epochs else run.points[0] for run in self.runs]
        return pair([get(run.small) for run in self.runs], list(map(get, large)))

    @property
    def failed(self) -> bool:
        """Whether a metric failed on a network."""
        return any(result.status.kind is Kind.FAILED for network in self._all() for result in network.report.values())

    def _all(self) -> list[Network]:
        return [network for run in self.runs for network in (*run.points, run.small, run.equal_epochs)]

    # --- text

    def __str__(self) -> str:
        s = self.settings
        title = f"Warm start: batch {s.small_batch}, then batch {s.large_batch} with a new optimizer to {s.match.words}"
        said = [
            textwrap.fill(sentence, TEXT_WIDTH, initial_indent="- ", subsequent_indent="  ") for sentence in self.sentences()
        ]
        head = [s.title, title] if s.title else [title]
        return "\n".join([*head, "", *self._results(), "", *self._currencies(), "", *self._legend(), "", *said])

    def _rows(self) -> list[tuple[str, list[Network], int | None]]:
        """Label, networks by seed, epochs on the curve; a star where a network missed the match."""
        rows: list[tuple[str, list[Network], int | None]] = [
            (str(epochs) if epochs else "0 (cold)", self.networks(epochs), epochs) for epochs in self.settings.epochs
        ]
        rows.append((f"batch {self.settings.small_batch} only", [run.small for run in self.runs], None))
        return [
            (label + " *" * (not all(network.reached_target for network in networks)), networks, epochs)
            for label, networks, epochs in rows
        ]

    def _results(self) -> list[str]:
        head = ["warm epochs", "test accuracy %", "against cold", "t"]
        for key in self.metrics:
            head += [key, "against cold", "t"]
        cold = self.networks(0)
        lines = [head]
        for label, networks, epochs in self._rows():
            accuracy = [100 * network.test.accuracy for network in networks]
            line = [label, mean_and_spread(accuracy)]
            points = pair([100 * network.test.accuracy for network in cold], accuracy)
            line += ["", ""] if epochs == 0 else [_points(points), _t(points)]
            for key in self.metrics:
                values = list(map(sharpness(key), networks))
                change = pair(list(map(sharpness(key), cold)), values)
                line += [mean_and_spread(values)]
                line += ["", ""] if epochs == 0 else [_ratio(change), _t(change)]
            lines.append(line)
        return aligned(lines)

    def _currencies(self) -> list[str]:
        s = self.settings
        head = ["warm epochs", f"steps at {s.small_batch}", f"steps at {s.large_batch}", "steps", "samples", "seconds"]
        lines = [[*head, "train loss"]]
        for label, networks, epochs in self._rows():
            phases = [[phase.steps for phase in network.phases] for network in networks]
            at_small = statistics.fmean(steps[0] if epochs != 0 else 0 for steps in phases)
            at_large = statistics.fmean(steps[-1] if epochs is not None else 0 for steps in phases)
            line = [label, f"{at_small:.0f}", f"{at_large:.0f}"]
            line += [f"{statistics.fmean(network.steps for network in networks):.0f}"]
            line += [f"{statistics.fmean(network.samples for network in networks):.0f}"]
            line += [f"{statistics.fmean(network.seconds for network in networks):.2f}"]
            lines.append([*line, mean_and_spread([network.train.loss for network in networks])])
        return aligned(lines)

    def _legend(self) -> list[str]:
        said = "one seed; against cold: difference in points, or ratio"
        if len(self.runs) > 1:
            said = (
                f"mean ± sample standard deviation over {len(self.runs)} seeds; against cold: mean paired difference in "
                "points ± standard error (in how many seeds higher), or ratio of the means (in how many seeds lower); "
                f"t: Student's, of the paired differences, n - 1 = {len(self.runs) - 1}"
            )
        if not all(network.reached_target for network in self._matched_networks()):
            said += f"; * a network did not reach {self.settings.match.words} in {self.settings.max_steps} steps"
        return textwrap.wrap(said, TEXT_WIDTH)

    def _matched_networks(self) -> list[Network]:
        return [network for run in self.runs for network in (*run.points, run.small)]

    def sentences(self) -> list[str]:
        """What the numbers say, and what they cannot."""
        said = [self._match_sentence()]
        if len(self.settings.epochs) > 1:
            said += [self._accuracy_sentence(), *map(self._sharpness_sentence, self.metrics), self._cost_sentence()]
        said += [f"WARNING: {sentence}" for sentence in self.disagreement()]
        said += self._early_stopping()
        if len(self.runs) == 1:
            said.append("One seed says nothing about the spread: the order may differ in the next. Run more seeds.")
        if self.failed:
            said.append("A metric failed on some networks, which are left out. The reports say why.")
        said.append(
            "Sharpness is a correlate of generalization, not a cause: a larger learning rate, for one, can lower it and "
            "leave the test accuracy as it was."
        )
        return said

    def _match_sentence(self) -> str:
        s, networks = self.settings, self._matched_networks()
        missed = [network for network in networks if not network.reached_target]
        if missed:
            recipes = and_list([str(recipe) for recipe in sorted({network.recipe for network in missed})])
            return (
                f"Training loss is NOT matched: {len(missed)} of {len(networks)} networks did not reach {s.match.value:g} "
                f"in {s.max_steps} steps: {recipes}. Sharpness depends on the loss: what follows mixes the two."
            )
        if s.match.kind == "loss":
            return f"Training loss is matched: all {len(networks)} networks reached {s.match.value:g}."
        losses = sorted(network.train.loss for network in networks)
        return (
            f"Networks are matched in {s.match.kind}, not in loss: training losses lie between {losses[0]:.2g} and "
            f"{losses[-1]:.2g}. Sharpness depends on the loss: what follows mixes the two."
        )

    def _accuracy_sentence(self) -> str:
        return f"Test accuracy is higher than from a cold start {self._where('test_accuracy', 1)}."

    def _sharpness_sentence(self, key: str) -> str:
        if all(self.paired(epochs, key) is None for epochs in self.settings.epochs[1:]):
            return f"Sharpness: {key} has no value to compare: nothing can be said."
        return f"Sharpness: {key} is lower than from a cold start {self._where(key, -1)}."

    def _where(self, quantity: str, sign: int) -> str:
        """At which warm starts the paired difference has this sign and is larger than its standard error."""
        warm = self.settings.epochs[1:]
        pairs = [self.paired(epochs, quantity) for epochs in warm]
        found = [epochs for epochs, paired in zip(warm, pairs, strict=True) if paired and _order(paired) == sign]
        sure = "" if len(self.runs) == 1 else "by more than a standard error "
        if not found:
            return f"{sure}at none of the {len(warm)} warm starts: NOT as in the paper's Figure 5"
        if len(found) == len(warm):
            return f"{sure}at each of the {len(warm)} warm starts: as in the paper's Figure 5"
        return f"{sure}at {len(found)} of {len(warm)} warm starts, after {and_list(list(map(str, found)))} epochs"

    def _cost_sentence(self) -> str:
        epochs = self.settings.epochs[1]
        ratios = []
        for name in ("steps", "samples", "seconds"):
            get = PLAIN[name]
            small = statistics.fmean(get(run.small) for run in self.runs)
            mixed = statistics.fmean(self.values(epochs, name))
            ratios.append(f"{mixed / small:.2g} times the {name}" if small > 0 else f"{mixed:.3g} {name} instead of 0")
        return (
            f"Cost: a warm start of {epochs} epochs and the large batch after it take {and_list(ratios)} of batch "
            f"{self.settings.small_batch} alone."
        )

    def _early_stopping(self) -> list[str]:
        """Where the small-batch run does better on its way than every network at the match."""
        places = range(len(self.settings.epochs) - 1)
        by_place = [statistics.fmean(run.iterates[place].test.accuracy for run in self.runs) for place in places]
        ends = [statistics.fmean(network.test.accuracy for network in networks) for _, networks, _ in self._rows()]
        if not by_place or max(by_place) <= max(ends):
            return []
        best = by_place.index(max(by_place))
        loss = statistics.fmean(run.iterates[best].train.loss for run in self.runs)
        return [
            f"Batch {self.settings.small_batch} is most accurate on its way: {100 * by_place[best]:.1f} % after "
            f"{self.settings.epochs[best + 1]} epochs, at a training loss of {loss:.2g}; at the match no recipe is above "
            f"{100 * max(ends):.1f} %. What comes after is over-fitting, and the recipes differ in what it costs them."
        ]

    def disagreement(self) -> list[str]:
        """A sentence per quantity that orders small and large batch one way at the match and the other at equal epochs.

        Only differences larger than their standard error, which the sentence gives; of a single seed, any.
        """
        s, said = self.settings, []
        epochs = sorted({run.equal_epochs.epochs for run in self.runs})
        span = f"{epochs[0]}" if len(epochs) == 1 else f"{epochs[0]} to {epochs[-1]}"
        for name in ("test_accuracy", *self.metrics):
            matched = self._small_against_cold(name, equal_epochs=False)
            equal = self._small_against_cold(name, equal_epochs=True)
            if matched is None or equal is None or _order(matched) * _order(equal) >= 0:
                continue
            losses = [
                statistics.fmean(network.train.loss for network in networks)
                for networks in ([run.equal_epochs for run in self.runs], [run.small for run in self.runs])
            ]
            said.append(
                f"equal epochs and equal {s.match.kind} disagree on {name}. At {s.match.words}, batch {s.large_batch} is "
                f"{_against(name, matched)} than batch {s.small_batch}; after as many epochs ({span}), it is "
                f"{_against(name, equal)}, at a training loss of {losses[0]:.2g} instead of {losses[1]:.2g}. Which batch "
                "size looks better depends on what is held equal."
            )
        return said

    # --- files

    def figure(self, metric: str | None = None) -> Figure:
        """Test accuracy above, sharpness of the large-batch networks below, over the small-batch epochs.

        Args:
            metric: its key; None for the first.
        """
        s, key = self.settings, metric or self.metrics[0]
        self._quantity(key)
        warm = s.epochs[1:]
        seeds = f"{len(self.runs)} seed{'s' * (len(self.runs) > 1)}"
        return warm_start_plot(
            s.epochs,
            large_accuracy=[self.values(epochs, "test_accuracy") for epochs in s.epochs],
            small_accuracy={
                epochs: [run.iterates[place].test.accuracy for run in self.runs] for place, epochs in enumerate(warm)
            },
            sharpness=[self.values(epochs, key) for epochs in s.epochs],
            end_accuracy=[run.small.test.accuracy for run in self.runs],
            end_sharpness=[sharpness(key)(run.small) for run in self.runs],
            metric=key,
            small=f"batch {s.small_batch}",
            large=f"batch {s.large_batch}",
            match=s.match.words,
            title=f"{s.title}, {seeds}" if s.title else seeds,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON types only; with the sentences, which ``from_dict`` leaves aside."""
        settings = {f.name: getattr(self.settings, f.name) for f in fields(self.settings)}
        settings["match"] = str(self.settings.match)
        settings |= {"epochs": list(self.settings.epochs), "seeds": list(self.settings.seeds)}
        return {
            "schema_version": SCHEMA_VERSION,
            "settings": settings,
            "versions": dict(self.versions),
            "seconds": self.seconds,
            "summary": self.sentences(),
            "runs": [
                {
                    "seed": run.seed,
                    "points": [network.to_dict() for network in run.points],
                    "small": run.small.to_dict(),
                    "equal_epochs": run.equal_epochs.to_dict(),
                    "iterates": [
                        {"epochs": iterate.epochs, "train": iterate.train._asdict(), "test": iterate.test._asdict()}
                        for iterate in run.iterates
                    ],
                }
                for run in self.runs
            ],
        }

    def to_json(self, *, indent: int | None = 2) -> str:
        """Strict JSON (no NaN); ``from_json`` reads it back."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> WarmStartCurve:
        """The inverse of ``to_dict``.

        Raises:
            ValueError: ``data`` is not a curve, of another version, or damaged.
        """
        if not isinstance(data, Mapping) or data.get("schema_version") != SCHEMA_VERSION or "runs" not in data:
            raise ValueError(f"this is not a warm-start curve of schema version {SCHEMA_VERSION}")
        check(data, _SHAPE, "the curve")
        s = data["settings"]
        settings = {**s, "match": Match.parse(s["match"]), "epochs": tuple(s["epochs"]), "seeds": tuple(s["seeds"])}
        runs = tuple(
            SeedRuns(
                run["seed"],
                tuple(map(Network.from_dict, run["points"])),
                Network.from_dict(run["small"]),
                Network.from_dict(run["equal_epochs"]),
                tuple(Iterate(i["epochs"], Evaluation(**i["train"]), Evaluation(**i["test"])) for i in run["iterates"]),
            )
            for run in data["runs"]
        )
        made = cls(WarmStartSettings(**settings), runs, data["versions"], data["seconds"])
        if not runs or any(len(run.points) != len(made.settings.epochs) for run in runs):
            raise ValueError("the curve is damaged: it has no runs, or not one network for each of its epochs")
        return made

    @classmethod
    def from_json(cls, text: str) -> WarmStartCurve:
        """The inverse of ``to_json``. Raises as ``from_dict`` does, also for what is not JSON or too large."""
        return cls.from_dict(read_json(text, "a warm-start curve"))

    def to_csv(self) -> str:
        """One row per network: the points, the small batch alone, and the large batch after as many epochs."""
        head = ["seed", "ended_by", "warm_epochs", "warm_batch", "batch_size", "epochs", "steps", "samples", "seconds"]
        head += ["reached_target", "train_loss", "test_loss", "test_accuracy"]
        for key in self.metrics:
            head += [key, f"{key}_status"]
        rows = []
        for run in self.runs:
            matched = str(self.settings.match)
            ends = [(matched, network) for network in (*run.points, run.small)]
            for ended_by, network in [*ends, (f"epochs:{run.equal_epochs.epochs}", run.equal_epochs)]:
                recipe = network.recipe
                row: list[object] = [run.seed, ended_by, recipe.warm_epochs, recipe.warm_batch, recipe.batch_size]
                row += [network.epochs, network.steps, network.samples, network.seconds, network.reached_target]
                row += [network.train.loss, network.test.loss, network.test.accuracy]
                for key in self.metrics:
                    row += [network.report[key].value, network.report[key].status.kind.value]
                rows.append(row)
        return csv_text(head, rows)

    def write(self, folder: Path) -> list[Path]:
        """Table, numbers and picture; each file appears complete or not at all."""
        return write_results(
            folder,
            data=self.to_dict(),
            table=str(self),
            rows=self.to_csv(),
            figures={"warm_start.png": self.figure()},
        )


def _order(paired: Paired) -> int:
    """Of the other against the reference: 1 for higher, -1 for lower, 0 within a standard error."""
    mean = paired.mean_difference
    return 0 if abs(mean) <= (paired.standard_error or 0.0) else (1 if mean > 0 else -1)


def _points(paired: Paired | None) -> str:
    assert paired is not None  # an accuracy is always finite
    if paired.standard_error is None:
        return f"{paired.mean_difference:+.2f}"
    return f"{paired.mean_difference:+.2f}±{paired.standard_error:.2f} ({paired.count(1)}/{paired.num_seeds})"


def _ratio(paired: Paired | None) -> str:
    if paired is None or paired.ratio is None:
        return "-"
    return f"x {paired.ratio:.2g}" + (f" ({paired.count(-1)}/{paired.num_seeds})" if paired.num_seeds > 1 else "")


def _t(paired: Paired | None) -> str:
    return "-" if paired is None or paired.t is None else f"{paired.t:.1f}"


def _against(name: str, paired: Paired) -> str:
    """``lower by 1.51±0.28 points in 3 of 3 seeds``, with the small batch as reference."""
    sign = 1 if paired.mean_difference > 0 else -1
    scale, unit = (100, " points") if name == "test_accuracy" else (1, "")
    by = f"{scale * abs(paired.mean_difference):.3g}"
    if paired.standard_error is not None:
        by += f"±{scale * paired.standard_error:.2g}"
    return f"{'higher' if sign > 0 else 'lower'} by {by}{unit} ({paired.count(sign)} of {paired.num_seeds} seeds)"


_EVALUATION = {"loss": float, "accuracy": float}
_SHAPE = {
    "schema_version": int,
    "settings": {
        "small_batch": int,
        "large_batch": int,
        "epochs": [int],
        "seeds": [int],
        "match": str,
        "check_every": int,
        "max_steps": int,
        "title": str,
    },
    "versions": {str: str},
    "seconds": float,
    "runs": [
        {
            "seed": int,
            "points": [{str: ANY}],
            "small": {str: ANY},
            "equal_epochs": {str: ANY},
            "iterates": [{"epochs": int, "train": _EVALUATION, "test": _EVALUATION}],
        }
    ],
    ...: ANY,
}
