"""Networks trained with different batch sizes, compared seed by seed: one table, and sentences that follow from it."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..report import Kind, SharpnessReport
from .training import Evaluation, Training

__all__ = ["BatchSizeComparison", "Network"]

PAPER_TABLES = {
    "epsilon_box": "the paper's metric in full space",
    "random_subspace": "the paper's metric in random subspaces",
}


@dataclass(frozen=True)
class Network:
    """One trained network: how it was trained, how it does, how sharp its minimum is."""

    seed: int
    batch_size: int
    training: Training
    train: Evaluation
    test: Evaluation
    report: SharpnessReport


Quantity = Callable[[Network], float]


@dataclass(frozen=True)
class Paired:
    """One quantity at the small and at the large batch size, seed by seed; only seeds where both are finite."""

    small: tuple[float, ...]
    large: tuple[float, ...]

    @property
    def differences(self) -> list[float]:
        return [large - small for small, large in zip(self.small, self.large, strict=True)]

    @property
    def mean_difference(self) -> float:
        return statistics.fmean(self.differences)

    @property
    def ratio(self) -> float | None:
        """Of the means; None where it says nothing, because a value is not positive."""
        if min(*self.small, *self.large) <= 0:
            return None
        return statistics.fmean(self.large) / statistics.fmean(self.small)

    @property
    def seed_ratios(self) -> list[float]:
        return [large / small for small, large in zip(self.small, self.large, strict=True)]

    def count(self, sign: int) -> int:
        """In how many seeds the large-batch value is higher (``sign=1``) or lower (``-1``)."""
        return sum(sign * difference > 0 for difference in self.differences)

    def verdict(self, sign: int) -> str:
        """Whether the quantity moves as the paper says, from ``sign`` of (large - small)."""
        if sign * self.mean_difference <= 0:
            return "NOT as in the paper"
        if len(self.differences) == 1:
            return "the paper's order, in the only seed"
        return (
            "as in the paper"
            if self.count(sign) == len(self.differences)
            else "as in the paper on average, not in every seed"
        )


@dataclass(frozen=True)
class BatchSizeComparison:
    """What the numbers of ``networks`` say about Keskar et al. (2017), and what they do not.

    Attributes:
        networks: every batch size with every seed.
        target_loss: the training loss that all of them were trained to.
    """

    networks: Sequence[Network]
    target_loss: float

    @property
    def batch_sizes(self) -> list[int]:
        return sorted({network.batch_size for network in self.networks})

    @property
    def num_seeds(self) -> int:
        return len({network.seed for network in self.networks})

    @property
    def metrics(self) -> list[str]:
        return list(dict.fromkeys(key for network in self.networks for key in network.report))

    def values(self, quantity: Quantity, batch_size: int) -> list[float]:
        """In order of the seeds; NaN where a metric failed."""
        chosen = [network for network in self.networks if network.batch_size == batch_size]
        return [quantity(network) for network in sorted(chosen, key=lambda network: network.seed)]

    def paired(self, quantity: Quantity) -> Paired | None:
        """Smallest against largest batch size; None where no seed has both values."""
        small, large = (self.values(quantity, self.batch_sizes[end]) for end in (0, -1))
        both = [pair for pair in zip(small, large, strict=True) if all(map(math.isfinite, pair))]
        return Paired(*zip(*both, strict=True)) if both else None

    def table(self) -> str:
        """Mean ± sample standard deviation over the seeds, by batch size; then the largest against the smallest."""
        small, large = self.batch_sizes[0], self.batch_sizes[-1]
        head = ["", *(f"batch {size}" for size in self.batch_sizes), f"{large} / {small}", f"higher at {large}"]
        rows = [self._row("train loss", _train_loss), self._row("test accuracy %", _test_percent, in_points=True)]
        rows += [self._row(key, _sharpness(key)) for key in self.metrics]
        widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in [head, *rows]
        ]
        seeds = "one seed" if self.num_seeds == 1 else f"mean ± sample standard deviation over {self.num_seeds} seeds"
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], "", f"{seeds}; loss in nats"])

    def _row(self, label: str, quantity: Quantity, *, in_points: bool = False) -> list[str]:
        cells = [mean_and_spread(self.values(quantity, size)) for size in self.batch_sizes]
        pair = self.paired(quantity)
        if pair is None:
            return [label, *cells, "-", "-"]
        ratio = "-" if pair.ratio is None else f"x {pair.ratio:.3g}"
        change = f"{pair.mean_difference:+.2f} points" if in_points else ratio
        return [label, *cells, change, f"{pair.count(1)} of {len(pair.differences)} seeds"]

    def sentences(self) -> list[str]:
        """What was and was not reproduced, each from the numbers; then what they cannot say."""
        said = [
            self._matched(),
            *(self._sharper(key) for key in self.metrics),
            self._less_accurate(),
            *self._disagreement(),
        ]
        if self.num_seeds == 1:
            said.append("One seed says nothing about the spread: the order may differ in the next. Run more seeds.")
        said += [
            "The paper trained other networks on MNIST, TIMIT and CIFAR, five times each, until the loss fell no more. "
            "The order of small and large batch can be compared with it, the values cannot.",
            "Sharpness is a correlate of generalization, not a cause: a larger learning rate, for one, can lower it and "
            "leave the test accuracy as it was.",
        ]
        return said

    def _matched(self) -> str:
        missed = [network for network in self.networks if not network.training.reached_target]
        if not missed:
            losses = [
                statistics.fmean(self.values(_train_loss, size)) for size in (self.batch_sizes[0], self.batch_sizes[-1])
            ]
            return (
                f"Training loss is matched: all {len(self.networks)} networks reached an epoch's mean loss below "
                f"{self.target_loss:g}; with the final weights it is {losses[0]:.2g} and {losses[1]:.2g}."
            )
        sizes = ", ".join(map(str, sorted({network.batch_size for network in missed})))
        epochs = max(network.training.epochs for network in missed)
        return (
            f"Training loss is NOT matched: {len(missed)} of {len(self.networks)} networks (batch {sizes}) did not "
            f"reach {self.target_loss:g} in {epochs} epochs. Sharpness depends on the loss: what follows mixes the two."
        )

    def _sharper(self, key: str) -> str:
        small, large = self.batch_sizes[0], self.batch_sizes[-1]
        kinds = Counter(str(network.report[key].status.kind) for network in self.networks if key in network.report)
        obtained = ", ".join(kind if count == len(self.networks) else f"{kind} {count}x" for kind, count in kinds.items())
        name = f"{key} ({PAPER_TABLES.get(key, 'not in the tables of the paper')}; {obtained})"
        pair = self.paired(_sharpness(key))
        if pair is None:
            return f"Sharpness: {name} has no value at both batch sizes in any seed: nothing can be said."
        by = f"{pair.count(1)} of {len(pair.differences)} seeds"
        if pair.ratio is not None:
            by += f", {pair.ratio:.2g} times as high"
            if len(pair.differences) > 1:
                by += f" on average (seed by seed {', '.join(f'{ratio:.2g}' for ratio in pair.seed_ratios)})"
        verdict = f": {pair.verdict(1)}" if key in PAPER_TABLES else ""
        return f"Sharpness: {name} is higher at batch {large} than at {small} in {by}{verdict}."

    def _less_accurate(self) -> str:
        small, large = self.batch_sizes[0], self.batch_sizes[-1]
        pair = self.paired(_test_percent)
        assert pair is not None  # an accuracy is always finite
        differences = pair.differences
        change = f"{pair.mean_difference:+.2f} points"
        if len(differences) > 1:
            change += f" ± {statistics.stdev(differences) / math.sqrt(len(differences)):.2f} (paired standard error)"
        verdict = pair.verdict(-1)
        return (
            f"Generalization: test accuracy at batch {large} against {small}: {change}, lower in {pair.count(-1)} of "
            f"{len(differences)} seeds: {verdict}."
        )

    def _disagreement(self) -> list[str]:
        pairs = {key: self.paired(_sharpness(key)) for key in self.metrics}
        higher = [key for key, pair in pairs.items() if pair is not None and pair.mean_difference > 0]
        lower = [key for key, pair in pairs.items() if pair is not None and pair.mean_difference <= 0]
        said = []
        if higher and lower:
            said.append(f"The metrics disagree: {_and(higher)} call the large-batch minima sharper, {_and(lower)} do not.")
        failed = [key for key in self.metrics if any(_kind(network, key) is Kind.FAILED for network in self.networks)]
        if failed:
            said.append(f"{_and(failed)} failed on some networks, which are left out. The reports say why.")
        return said


def _train_loss(network: Network) -> float:
    return network.train.loss


def _test_percent(network: Network) -> float:
    return 100 * network.test.accuracy


def _sharpness(key: str) -> Quantity:
    return lambda network: network.report[key].value if key in network.report else math.nan


def _kind(network: Network, key: str) -> Kind | None:
    return network.report[key].status.kind if key in network.report else None


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def mean_and_spread(values: Sequence[float]) -> str:
    """``34.1±9.7``: three significant digits of the mean, the sample standard deviation to the same place."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "-"
    mean = statistics.fmean(finite)
    spread = statistics.stdev(finite) if len(finite) > 1 else None
    size = abs(mean)
    if size != 0 and not 1e-4 <= size < 1e6:
        return f"{mean:.2e}" if spread is None else f"{mean:.2e}±{spread:.0e}"
    decimals = 2 if size == 0 else max(0, 2 - math.floor(math.log10(size)))
    return f"{mean:.{decimals}f}" if spread is None else f"{mean:.{decimals}f}±{spread:.{decimals}f}"
