"""``sharpness demo``: small against large batches on real digits, at matched training loss, as in Keskar et al. (2017).

A setting in which both halves of the paper's claim show within a minute: 500 training samples and a deep ReLU network.
With two hidden layers, convolutions or batch normalization, the half about accuracy did not show on the same data.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import missing_dependency
from ..plots import alpha_plot, sharpness_plot
from .comparison import BatchSizeComparison
from .data import Split, digits_split
from .files import csv_text, versions, write_results
from .lines import ALPHAS, along_line
from .networks import relu_mlp
from .recipes import ExperimentEvent, ExperimentListener, Network, Recipe, measured
from .training import Evaluation, Training, one_thread, train_to_loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["AlphaCurve", "DemoResult", "DemoSettings", "alpha_curve", "run_demo"]

SCHEMA_VERSION = 1
TEXT_WIDTH = 112  # of the table with four batch sizes


@dataclass(frozen=True)
class DemoSettings:
    """Everything the demo's numbers depend on, apart from the versions.

    Attributes:
        seeds: how many; seed s decides the split, the initial weights (the same for every batch size) and the order.
        batch_sizes: at least two; the smallest is compared with the largest.
        target_loss: training stops when an epoch's mean loss is below it, so that all minima are equally deep.
        warm_epochs: of the smallest batch before the largest, in the column "warm start"; 0 leaves it out.
        max_epochs: cap for networks that do not get there.
    """

    seeds: int = 3
    batch_sizes: tuple[int, ...] = (16, 100, 500)
    device: str = "cpu"
    widths: tuple[int, ...] = (64, 256, 256, 256, 256, 10)
    num_train: int = 500
    learning_rate: float = 1e-3
    target_loss: float = 2e-3
    warm_epochs: int = 5
    max_epochs: int = 500

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}: it is the number of repetitions")
        if len(set(self.batch_sizes)) < 2:
            raise ValueError(f"batch_sizes must be at least two different numbers to compare, got {self.batch_sizes}")
        if min(self.batch_sizes) < 1 or max(self.batch_sizes) > self.num_train:
            raise ValueError(
                f"batch_sizes must lie between 1 and the {self.num_train} training samples, got {self.batch_sizes}"
            )
        if self.max_epochs < 1 or self.warm_epochs < 0:
            raise ValueError(
                f"max_epochs must be at least 1 and warm_epochs 0, got {self.max_epochs} and {self.warm_epochs}"
            )
        object.__setattr__(self, "batch_sizes", tuple(sorted(set(self.batch_sizes))))

    @property
    def recipes(self) -> list[Recipe]:
        small, large = self.batch_sizes[0], self.batch_sizes[-1]
        warm = [Recipe(large, self.warm_epochs, small)] if self.warm_epochs else []
        return [*map(Recipe, self.batch_sizes), *warm]

    @property
    def title(self) -> str:
        return f"ReLU network {'-'.join(map(str, self.widths))}, {self.num_train} digits"


@dataclass(frozen=True)
class AlphaCurve:
    """Loss and accuracy at ``alpha * x_large + (1 - alpha) * x_small``, as in the paper's Figure 3."""

    seed: int
    small_batch: int
    large_batch: int
    alphas: tuple[float, ...]
    train: tuple[Evaluation, ...]
    test: tuple[Evaluation, ...]

    def figure(self, title: str) -> Figure:
        return alpha_plot(
            self.alphas,
            train_loss=[point.loss for point in self.train],
            test_loss=[point.loss for point in self.test],
            train_accuracy=[point.accuracy for point in self.train],
            test_accuracy=[point.accuracy for point in self.test],
            small=f"batch {self.small_batch}",
            large=f"batch {self.large_batch}",
            title=title,
        )


@dataclass(frozen=True)
class DemoResult:
    """All networks of the demo, and what they say."""

    settings: DemoSettings
    networks: tuple[Network, ...]
    alpha: AlphaCurve
    versions: Mapping[str, str]
    seconds: float

    @property
    def comparison(self) -> BatchSizeComparison:
        return BatchSizeComparison(self.networks, self.settings.target_loss)

    @property
    def failed(self) -> bool:
        """Whether a metric failed on a network."""
        return any(result.status.kind == "failed" for network in self.networks for _, result in network.report.items())

    def __str__(self) -> str:
        title = f"{self.settings.title}, trained to a loss of {self.settings.target_loss:g}"
        sentences = [
            textwrap.fill(sentence, TEXT_WIDTH, initial_indent="- ", subsequent_indent="  ")
            for sentence in self.comparison.sentences()
        ]
        return "\n".join([title, "", self.comparison.table(), "", *sentences])

    def figures(self) -> dict[str, Figure]:
        """By file name."""
        title, seeds = self.settings.title, self.settings.seeds
        by_batch_size = sharpness_plot(
            [network.recipe.batch_size for network in self.networks],
            [network.report for network in self.networks],
            others={"test accuracy [%]": [100 * network.test.accuracy for network in self.networks]},
            apart={i: f"{n.recipe} (warm start)" for i, n in enumerate(self.networks) if n.recipe.is_warm},
            xlabel="batch size [samples]",
            title=f"{title}: each dot one of {seeds} seed{'s' * (seeds > 1)}, line through the means",
        )
        return {
            "alpha_plot.png": self.alpha.figure(f"{title}, seed {self.alpha.seed}"),
            "sharpness_vs_batch_size.png": by_batch_size,
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {
            "schema_version": SCHEMA_VERSION,
            "settings": asdict(self.settings),
            "seeds": list(range(self.settings.seeds)),
            "versions": dict(self.versions),
            "seconds": self.seconds,
            "summary": self.comparison.sentences(),
            "networks": [network.to_dict() for network in self.networks],
            "alpha_plot": {
                "seed": self.alpha.seed,
                "small_batch": self.alpha.small_batch,
                "large_batch": self.alpha.large_batch,
                "alphas": list(self.alpha.alphas),
                "train": [point._asdict() for point in self.alpha.train],
                "test": [point._asdict() for point in self.alpha.test],
            },
        }

    def to_csv(self) -> str:
        """One row per network."""
        metrics = self.comparison.metrics
        head = ["seed", "batch_size", "warm_epochs", "warm_batch", "epochs", "steps", "samples", "seconds"]
        head += ["reached_target", "train_loss", "test_loss", "test_accuracy"]
        for key in metrics:
            head += [key, f"{key}_standard_error", f"{key}_status"]
        rows = []
        for network in self.networks:
            recipe = network.recipe
            row: list[object] = [network.seed, recipe.batch_size, recipe.warm_epochs, recipe.warm_batch]
            row += [network.epochs, network.steps, network.samples, network.seconds, network.reached_target]
            row += [network.train.loss, network.test.loss, network.test.accuracy]
            for key in metrics:
                result = network.report[key]
                row += [result.value, result.standard_error, result.status.kind.value]
            rows.append(row)
        return csv_text(head, rows)

    def write(self, folder: Path) -> list[Path]:
        """Table, numbers and pictures; each file appears complete or not at all."""
        return write_results(folder, data=self.to_dict(), table=str(self), rows=self.to_csv(), figures=self.figures())


def run_demo(
    settings: DemoSettings | None = None, *, metrics: Any = None, listener: ExperimentListener | None = None
) -> DemoResult:
    """Train by every recipe in every seed to the same training loss, and measure each network on its training samples.

    The caller's random generators are left as they were.

    Args:
        metrics: as for ``measure_sharpness``.
        listener: hears of every epoch, batch and finished network.
    Raises:
        ImportError: scikit-learn or matplotlib is missing; said before anything is trained.
    """
    settings = settings or DemoSettings()
    missing_dependency("matplotlib.figure", extra="demo", purpose="the demo's pictures")
    began = time.monotonic()
    networks: list[Network] = []
    ends: list[nn.Module] = []  # smallest and largest batch size of the first seed
    num_networks = settings.seeds * len(settings.recipes)
    sizes = settings.batch_sizes[0], settings.batch_sizes[-1]
    with one_thread():
        for seed in range(settings.seeds):
            split = digits_split(seed, num_train=settings.num_train)
            split = Split(split.train.to(settings.device), split.test.to(settings.device))
            for recipe in settings.recipes:
                tell = _teller(listener, len(networks) + 1, num_networks, seed, recipe)
                model, network = _train_and_measure(settings, split, seed, recipe, metrics, tell)
                networks.append(network)
                if seed == 0 and recipe in map(Recipe, sizes):
                    ends.append(model)
        curve = alpha_curve(ends[0], ends[1], digits_split(0, num_train=settings.num_train), seed=0, batch_sizes=sizes)
    return DemoResult(settings, tuple(networks), curve, versions(), time.monotonic() - began)


Tell = Callable[..., None]


def _teller(listener: ExperimentListener | None, network: int, num_networks: int, seed: int, recipe: Recipe) -> Tell:
    def tell(text: str, *, finished: bool = False) -> None:
        if listener is not None and text:
            listener(ExperimentEvent(network, num_networks, seed, recipe, text, finished))

    return tell


def _train_and_measure(
    settings: DemoSettings, split: Split, seed: int, recipe: Recipe, metrics: Any, tell: Tell
) -> tuple[nn.Module, Network]:
    began = time.monotonic()
    model = relu_mlp(settings.widths, seed=seed).to(settings.device)
    phases: list[Training] = []
    for batch_size, epochs in recipe.phases:
        phases.append(
            train_to_loss(
                model,
                split.train,
                batch_size=batch_size,
                target_loss=settings.target_loss,
                max_epochs=epochs or settings.max_epochs,
                learning_rate=settings.learning_rate,
                seed=seed,
                on_epoch=lambda epochs, loss: tell(f"epoch {epochs}, training loss {loss:.3g}"),
            )
        )
    network = measured(
        model,
        split,
        seed=seed,
        recipe=recipe,
        phases=tuple(phases),
        metrics=metrics,
        progress=lambda event: tell(str(event)),
    )
    tell(f"{network}, {time.monotonic() - began:.1f} s", finished=True)
    return model, network


def alpha_curve(
    small: nn.Module,
    large: nn.Module,
    split: Split,
    *,
    seed: int,
    batch_sizes: tuple[int, int],
    alphas: Sequence[float] = ALPHAS,
) -> AlphaCurve:
    """Loss and accuracy on the straight line through both minima; at 0 and 1 the weights are theirs, bit for bit."""
    train, test = along_line(small, large, split, alphas=alphas)
    return AlphaCurve(seed, *batch_sizes, tuple(alphas), tuple(train), tuple(test))
