"""``sharpness demo``: small against large batches on real digits, at matched training loss, as in Keskar et al. (2017).

A setting in which both halves of the paper's claim show within a minute: 500 training samples and a deep ReLU network.
With two hidden layers, convolutions or batch normalization, the half about accuracy did not show on the same data.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import json
import os
import platform
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import measure_sharpness
from ..errors import missing_dependency
from ..plots import alpha_plot, sharpness_plot
from .comparison import BatchSizeComparison, Network
from .data import Split, digits_split
from .networks import relu_mlp
from .training import Evaluation, Training, evaluate, train_to_loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["AlphaCurve", "DemoEvent", "DemoListener", "DemoResult", "DemoSettings", "alpha_curve", "run_demo"]

SCHEMA_VERSION = 1
TEXT_WIDTH = 112  # of the table with four batch sizes
ALPHAS = tuple(-1 + step / 8 for step in range(25))  # the paper's linspace(-1, 2, 25): hits 0 and 1 exactly


@dataclass(frozen=True)
class DemoSettings:
    """Everything the demo's numbers depend on, apart from the versions.

    Attributes:
        seeds: how many; seed s decides the split, the initial weights (the same for every batch size) and the order.
        batch_sizes: at least two; the smallest is compared with the largest.
        target_loss: training stops when an epoch's mean loss is below it, so that all minima are equally deep.
        max_epochs: cap for networks that do not get there.
    """

    seeds: int = 3
    batch_sizes: tuple[int, ...] = (16, 50, 150, 500)
    device: str = "cpu"
    widths: tuple[int, ...] = (64, 256, 256, 256, 256, 10)
    num_train: int = 500
    learning_rate: float = 1e-3
    target_loss: float = 2e-3
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
        if self.max_epochs < 1:
            raise ValueError(f"max_epochs must be at least 1, got {self.max_epochs}")
        object.__setattr__(self, "batch_sizes", tuple(sorted(set(self.batch_sizes))))

    @property
    def title(self) -> str:
        return f"ReLU network {'-'.join(map(str, self.widths))}, {self.num_train} digits"


@dataclass(frozen=True)
class DemoEvent:
    """What the demo is doing; ``finished`` once per network, when ``text`` sums it up."""

    network: int
    num_networks: int
    seed: int
    batch_size: int
    text: str
    finished: bool = False

    def __str__(self) -> str:
        return f"network {self.network} of {self.num_networks} (seed {self.seed}, batch {self.batch_size}): {self.text}"


DemoListener = Callable[[DemoEvent], None]


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
            [network.batch_size for network in self.networks],
            [network.report for network in self.networks],
            others={"test accuracy [%]": [100 * network.test.accuracy for network in self.networks]},
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
            "networks": [
                {
                    "seed": network.seed,
                    "batch_size": network.batch_size,
                    "training": asdict(network.training),
                    "train": network.train._asdict(),
                    "test": network.test._asdict(),
                    "report": network.report.to_dict(),
                }
                for network in self.networks
            ],
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
        head = ["seed", "batch_size", "epochs", "updates", "reached_target", "train_loss", "test_loss", "test_accuracy"]
        for key in metrics:
            head += [key, f"{key}_standard_error", f"{key}_status"]
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(head)
        for network in self.networks:
            training = network.training
            row: list[object] = [
                network.seed,
                network.batch_size,
                training.epochs,
                training.updates,
                training.reached_target,
            ]
            row += [network.train.loss, network.test.loss, network.test.accuracy]
            for key in metrics:
                result = network.report[key]
                row += [result.value, result.standard_error, result.status.kind.value]
            rows.writerow(row)
        return text.getvalue()

    def write(self, folder: Path) -> list[Path]:
        """Table, numbers and pictures; each file appears complete or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        contents: dict[str, bytes] = {
            "results.json": json.dumps(self.to_dict(), indent=2, allow_nan=False).encode(),
            "results.csv": self.to_csv().encode(),
            "table.txt": f"{self}\n".encode(),
        }
        for name, figure in self.figures().items():
            png = io.BytesIO()
            figure.savefig(png, format="png", dpi=150)
            contents[name] = png.getvalue()
        for name, content in contents.items():
            _write_atomically(folder / name, content)
        return [folder / name for name in contents]


def run_demo(
    settings: DemoSettings | None = None, *, metrics: Any = None, listener: DemoListener | None = None
) -> DemoResult:
    """Train every batch size in every seed to the same training loss, and measure each network on its training samples.

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
    num_networks = settings.seeds * len(settings.batch_sizes)
    sizes = settings.batch_sizes[0], settings.batch_sizes[-1]
    with _one_thread():
        for seed in range(settings.seeds):
            split = digits_split(seed, num_train=settings.num_train)
            split = Split(split.train.to(settings.device), split.test.to(settings.device))
            for batch_size in settings.batch_sizes:
                tell = _teller(listener, len(networks) + 1, num_networks, seed, batch_size)
                model, network = _train_and_measure(settings, split, seed, batch_size, metrics, tell)
                networks.append(network)
                if seed == 0 and batch_size in sizes:
                    ends.append(model)
        curve = alpha_curve(ends[0], ends[1], digits_split(0, num_train=settings.num_train), seed=0, batch_sizes=sizes)
    return DemoResult(settings, tuple(networks), curve, _versions(), time.monotonic() - began)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Same numbers on any number of cores, and no slower: the matrices are small.

    On a busy machine two threads wait for each other at every one of them: 71 s for a network that takes 7 s with one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


Tell = Callable[..., None]


def _teller(listener: DemoListener | None, network: int, num_networks: int, seed: int, batch_size: int) -> Tell:
    def tell(text: str, *, finished: bool = False) -> None:
        if listener is not None and text:
            listener(DemoEvent(network, num_networks, seed, batch_size, text, finished))

    return tell


def _train_and_measure(
    settings: DemoSettings, split: Split, seed: int, batch_size: int, metrics: Any, tell: Tell
) -> tuple[nn.Module, Network]:
    began = time.monotonic()
    model = relu_mlp(settings.widths, seed=seed).to(settings.device)
    training = train_to_loss(
        model,
        split.train,
        batch_size=batch_size,
        target_loss=settings.target_loss,
        max_epochs=settings.max_epochs,
        learning_rate=settings.learning_rate,
        seed=seed,
        on_epoch=lambda epochs, loss: tell(f"epoch {epochs}, training loss {loss:.3g}"),
    )
    report = measure_sharpness(
        model, [(split.train.inputs, split.train.labels)], metrics, seed=seed, progress=lambda event: tell(str(event))
    )
    network = Network(seed, batch_size, training, evaluate(model, split.train), evaluate(model, split.test), report)
    tell(_summary(network, time.monotonic() - began), finished=True)
    return model, network


def _summary(network: Network, seconds: float) -> str:
    training: Training = network.training
    missed = "" if training.reached_target else " (target NOT reached)"
    values = ", ".join(f"{key} {result.value:.3g}" for key, result in network.report.items())
    return (
        f"{training.epochs} epochs, training loss {network.train.loss:.2g}{missed}, "
        f"test accuracy {network.test.accuracy:.1%}, {values}, {seconds:.1f} s"
    )


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
    between = copy.deepcopy(small)
    ends = [{name: weight.double() for name, weight in model.state_dict().items()} for model in (small, large)]
    device = next(iter(ends[0].values())).device
    train, test = split.train.to(device), split.test.to(device)
    train_points, test_points = [], []
    for alpha in alphas:
        between.load_state_dict({name: alpha * ends[1][name] + (1 - alpha) * ends[0][name] for name in ends[0]})
        train_points.append(evaluate(between, train))
        test_points.append(evaluate(between, test))
    return AlphaCurve(seed, *batch_sizes, tuple(alphas), tuple(train_points), tuple(test_points))


def _versions() -> dict[str, str]:
    packages = {
        name: version(name) for name in ("sharpness-plugins", "torch", "numpy", "scipy", "scikit-learn", "matplotlib")
    }
    return {"python": platform.python_version(), **packages}


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
