"""How a network was trained, and the network that came of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from .. import measure_sharpness
from ..progress import ProgressListener
from ..report import SharpnessReport
from ..schema import ANY, check
from .data import Split
from .training import EVALUATION_BATCH, Evaluation, Training, evaluate

__all__ = ["ExperimentEvent", "ExperimentListener", "Network", "Quantity", "Recipe", "measured", "sharpness"]


@dataclass(frozen=True, order=True)
class Recipe:
    """The batch sizes that a network is trained with: ``warm_epochs`` of ``warm_batch`` first, ``batch_size`` to the end.

    In between the optimizer is a new one, as if training began from those weights. Without a warm start, both are zero.
    """

    batch_size: int
    warm_epochs: int = 0
    warm_batch: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or min(self.warm_epochs, self.warm_batch) < 0:
            raise ValueError(f"batch sizes must be at least 1, and epochs at least 0, got {self}")
        if (self.warm_epochs > 0) != (self.warm_batch > 0):
            raise ValueError(f"a warm start needs both epochs and a batch size, got {self}")

    @property
    def is_warm(self) -> bool:
        return self.warm_epochs > 0

    @property
    def phases(self) -> list[tuple[int, int | None]]:
        """Batch size, and for how many epochs; None for as long as it takes."""
        return [*([(self.warm_batch, self.warm_epochs)] if self.is_warm else []), (self.batch_size, None)]

    def __str__(self) -> str:
        for_so_long = {None: "", 1: " for 1 epoch"}
        return " then ".join(f"batch {size}{for_so_long.get(n, f' for {n} epochs')}" for size, n in self.phases)


@dataclass(frozen=True)
class Network:
    """One trained network: how it was trained, how it does, how sharp its minimum is.

    Attributes:
        phases: what was done in each phase of the recipe.
        train: on the training samples, with the final weights.
    """

    seed: int
    recipe: Recipe
    phases: tuple[Training, ...]
    train: Evaluation
    test: Evaluation
    report: SharpnessReport

    @property
    def reached_target(self) -> bool:
        return self.phases[-1].reached_target

    @property
    def epochs(self) -> int:
        return sum(phase.epochs for phase in self.phases)

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    @property
    def samples(self) -> int:
        return sum(phase.samples for phase in self.phases)

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)

    def __str__(self) -> str:
        """One line, for who watches."""
        missed = "" if self.reached_target else " (target NOT reached)"
        values = ", ".join(f"{key} {result.value:.3g}" for key, result in self.report.items())
        epochs = " + ".join(str(phase.epochs) for phase in self.phases)
        return (
            f"{epochs} epochs, training loss {self.train.loss:.2g}{missed}, test accuracy {self.test.accuracy:.1%}, {values}"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON types only; what is not finite becomes None."""
        return {
            "seed": self.seed,
            "recipe": asdict(self.recipe),
            "phases": [
                {key: value if math.isfinite(value) else None for key, value in asdict(phase).items()}
                for phase in self.phases
            ],
            "train": self.train._asdict(),
            "test": self.test._asdict(),
            "report": self.report.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Network:
        """The inverse of ``to_dict``.

        Raises:
            ValueError: ``data`` is something else, or damaged.
        """
        check(data, _NETWORK, "the network")
        if not data["phases"]:
            raise ValueError("the network.phases are empty, and a training has one at least")
        phases: list[dict[str, Any]] = [
            {key: math.inf if value is None else value for key, value in phase.items()} for phase in data["phases"]
        ]
        return cls(
            data["seed"],
            Recipe(**data["recipe"]),
            tuple(Training(**phase) for phase in phases),
            Evaluation(**data["train"]),
            Evaluation(**data["test"]),
            SharpnessReport.from_dict(data["report"]),
        )


_EVALUATION = {"loss": float, "accuracy": float}
_NETWORK = {
    "seed": int,
    "recipe": {"batch_size": int, "warm_epochs": int, "warm_batch": int},
    "phases": [
        {
            "epochs": int,
            "steps": int,
            "samples": int,
            "seconds": (float, None),
            "epoch_loss": (float, None),
            "reached_target": bool,
        }
    ],
    "train": _EVALUATION,
    "test": _EVALUATION,
    "report": {str: ANY},
}


def measured(
    model: nn.Module,
    split: Split,
    *,
    seed: int,
    recipe: Recipe,
    phases: tuple[Training, ...],
    metrics: Any,
    progress: ProgressListener,
) -> Network:
    """``model`` evaluated on both halves of ``split``, and its sharpness measured on the training samples."""
    report = measure_sharpness(
        model, split.train.batches(EVALUATION_BATCH), metrics, seed=seed, progress=progress, on_interrupt="raise"
    )
    return Network(seed, recipe, phases, evaluate(model, split.train), evaluate(model, split.test), report)


Quantity = Callable[[Network], float]


def sharpness(key: str) -> Quantity:
    """NaN where the metric was not measured."""
    return lambda network: network.report[key].value if key in network.report else math.nan


@dataclass(frozen=True)
class ExperimentEvent:
    """What an experiment is doing; ``finished`` once per network, when ``text`` sums it up."""

    network: int
    num_networks: int
    seed: int
    recipe: Recipe
    text: str
    finished: bool = False

    def __str__(self) -> str:
        return f"network {self.network} of {self.num_networks} (seed {self.seed}, {self.recipe}): {self.text}"


ExperimentListener = Callable[[ExperimentEvent], None]
