"""Networks trained by different recipes, compared seed by seed: one table, and sentences that follow from it."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..report import Kind
from .paired import Paired, aligned, and_list, mean_and_spread, pair
from .recipes import Network, Quantity, Recipe, sharpness

__all__ = ["BatchSizeComparison"]

PAPER_TABLES = {
    "epsilon_box": "the paper's metric in full space",
    "random_subspace": "the paper's metric in random subspaces",
}


@dataclass(frozen=True)
class BatchSizeComparison:
    """What the numbers of ``networks`` say about Keskar et al. (2017), and what they do not.

    The smallest batch size is compared with the largest, and each warm start with its large batch from a cold start.

    Attributes:
        networks: every recipe with every seed.
        target_loss: the training loss that all of them were trained to.
    """

    networks: Sequence[Network]
    target_loss: float

    @property
    def recipes(self) -> list[Recipe]:
        """Cold starts by batch size, then the warm ones."""
        return sorted({network.recipe for network in self.networks}, key=lambda recipe: (recipe.warm_epochs, recipe))

    @property
    def small(self) -> Recipe:
        return self.recipes[0]

    @property
    def large(self) -> Recipe:
        return [recipe for recipe in self.recipes if not recipe.is_warm][-1]

    @property
    def num_seeds(self) -> int:
        return len({network.seed for network in self.networks})

    @property
    def metrics(self) -> list[str]:
        return list(dict.fromkeys(key for network in self.networks for key in network.report))

    def values(self, quantity: Quantity, recipe: Recipe) -> list[float]:
        """In order of the seeds; NaN where a metric failed."""
        chosen = [network for network in self.networks if network.recipe == recipe]
        return [quantity(network) for network in sorted(chosen, key=lambda network: network.seed)]

    def paired(self, quantity: Quantity, reference: Recipe, other: Recipe) -> Paired | None:
        """None where no seed has both values."""
        return pair(self.values(quantity, reference), self.values(quantity, other))

    def table(self) -> str:
        """Mean ± sample standard deviation over the seeds, by recipe; then the largest batch against the smallest."""
        small, large = self.small.batch_size, self.large.batch_size
        names = ["warm start" if recipe.is_warm else f"batch {recipe.batch_size}" for recipe in self.recipes]
        rows = [["", *names, f"{large} / {small}", f"higher at {large}"]]
        rows += [self._row("train loss x 1000", lambda network: 1000 * network.train.loss)]
        rows += [self._row("test accuracy %", _test_percent, in_points=True)]
        rows += [self._row(key, sharpness(key)) for key in self.metrics]
        seeds = "one seed" if self.num_seeds == 1 else f"mean ± sample standard deviation over {self.num_seeds} seeds"
        return "\n".join([*aligned(rows), "", "; ".join([seeds, "loss in nats", *self._warm_start_is()])])

    def _warm_start_is(self) -> list[str]:
        return [f"warm start: {recipe}" for recipe in self.recipes if recipe.is_warm]

    def _row(self, label: str, quantity: Quantity, *, in_points: bool = False) -> list[str]:
        cells = [mean_and_spread(self.values(quantity, recipe)) for recipe in self.recipes]
        pair = self.paired(quantity, self.small, self.large)
        if pair is None:
            return [label, *cells, "-", "-"]
        ratio = "-" if pair.ratio is None else f"x {pair.ratio:.3g}"
        change = f"{pair.mean_difference:+.2f} points" if in_points else ratio
        return [label, *cells, change, f"{pair.count(1)} of {pair.num_seeds} seeds"]

    def sentences(self) -> list[str]:
        """What was and was not reproduced, each from the numbers; then what they cannot say."""
        said = [
            self._matched(),
            *(self._sharper(key) for key in self.metrics),
            self._less_accurate(),
            *(self._warm_start(recipe) for recipe in self.recipes if recipe.is_warm),
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
        missed = [network for network in self.networks if not network.reached_target]
        if not missed:
            losses = [statistics.fmean(self.values(_train_loss, recipe)) for recipe in (self.small, self.large)]
            return (
                f"Training loss is matched: all {len(self.networks)} networks reached an epoch's mean loss below "
                f"{self.target_loss:g}; with the final weights it is {losses[0]:.2g} and {losses[1]:.2g}."
            )
        recipes = ", ".join(map(str, sorted({network.recipe for network in missed})))
        epochs = max(network.epochs for network in missed)
        return (
            f"Training loss is NOT matched: {len(missed)} of {len(self.networks)} networks ({recipes}) did not "
            f"reach {self.target_loss:g} in {epochs} epochs. Sharpness depends on the loss: what follows mixes the two."
        )

    def _sharper(self, key: str) -> str:
        small, large = self.small.batch_size, self.large.batch_size
        kinds = Counter(str(network.report[key].status.kind) for network in self.networks if key in network.report)
        obtained = ", ".join(kind if count == len(self.networks) else f"{kind} {count}x" for kind, count in kinds.items())
        name = f"{key} ({PAPER_TABLES.get(key, 'not in the tables of the paper')}; {obtained})"
        pair = self.paired(sharpness(key), self.small, self.large)
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
        small, large = self.small.batch_size, self.large.batch_size
        pair = self.paired(_test_percent, self.small, self.large)
        assert pair is not None  # an accuracy is always finite
        return (
            f"Generalization: test accuracy at batch {large} against {small}: {_points(pair)}, lower in {pair.count(-1)} of "
            f"{pair.num_seeds} seeds: {pair.verdict(-1)}."
        )

    def _warm_start(self, recipe: Recipe) -> str:
        """Against its large batch from a cold start: as in the paper's Figure 5, more accurate and less sharp."""
        cold = Recipe(recipe.batch_size)
        accuracy = self.paired(_test_percent, cold, recipe)
        assert accuracy is not None  # an accuracy is always finite
        said = [f"test accuracy {_points(accuracy)}, higher in {accuracy.count(1)} of {accuracy.num_seeds} seeds"]
        said[0] += f": {accuracy.verdict(1)}"
        for key in self.metrics:
            change = self.paired(sharpness(key), cold, recipe)
            if change is not None and change.ratio is not None:
                said.append(f"{key} {change.ratio:.2g} times as high, lower in {change.count(-1)} of {change.num_seeds}")
        steps = [statistics.fmean(self.values(lambda network: network.steps, r)) for r in (recipe, cold, self.small)]
        said.append(f"{steps[0]:.0f} steps against {steps[1]:.0f}, and {steps[2]:.0f} at batch {self.small.batch_size}")
        return f"Warm start ({recipe}) against batch {cold.batch_size} from the start: {'; '.join(said)}."

    def _disagreement(self) -> list[str]:
        pairs = {key: self.paired(sharpness(key), self.small, self.large) for key in self.metrics}
        higher = [key for key, pair in pairs.items() if pair is not None and pair.mean_difference > 0]
        lower = [key for key, pair in pairs.items() if pair is not None and pair.mean_difference <= 0]
        said = []
        if higher and lower:
            said.append(
                f"The metrics disagree: {and_list(higher)} call the large-batch minima sharper, {and_list(lower)} do not."
            )
        failed = [key for key in self.metrics if any(_kind(network, key) is Kind.FAILED for network in self.networks)]
        if failed:
            said.append(f"{and_list(failed)} failed on some networks, which are left out. The reports say why.")
        return said


def _train_loss(network: Network) -> float:
    return network.train.loss


def _test_percent(network: Network) -> float:
    return 100 * network.test.accuracy


def _points(pair: Paired) -> str:
    change = f"{pair.mean_difference:+.2f} points"
    return change if pair.standard_error is None else f"{change} ± {pair.standard_error:.2f} (paired standard error)"


def _kind(network: Network, key: str) -> Kind | None:
    return network.report[key].status.kind if key in network.report else None
