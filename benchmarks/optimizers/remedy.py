"""Recipe R with sharpness-aware steps: does the large batch's minimum become flat, and does it generalize?

500 of scikit-learn's digits, a ReLU network 64-256-256-256-256-10, Adam 1e-3, from the same initial weights and in the same
order of samples, until an epoch's mean loss at the weights is below 2e-3. Sharpness is on the training samples.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.optim import Optimizer

from sharpness_plugins import measure_sharpness
from sharpness_plugins.experiments.data import Samples, digits_split
from sharpness_plugins.experiments.networks import relu_mlp
from sharpness_plugins.experiments.paired import mean_and_spread, pair
from sharpness_plugins.experiments.training import evaluate
from sharpness_plugins.optimizers import (
    ASAM,
    FSAM,
    GSAM,
    SAM,
    WSAM,
    BatchClosure,
    LookSAM,
    MomentumSAM,
    Rule,
    SharpnessAware,
)

__all__ = ["ARMS", "Arm", "Trained", "order_of", "table", "train"]

WIDTHS = (64, 256, 256, 256, 256, 10)
SMALL, LARGE = 16, 500
TARGET, MAX_EPOCHS = 2e-3, 1500
METRICS = ("epsilon_box", "hessian_topk")


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        rule: None for Adam alone.
        m, interval: as for ``SharpnessAware``.
    """

    batch_size: int
    rule: Rule | None = None
    rho: float | None = None
    m: int | None = None
    interval: int = 1

    def optimizer(self, model: nn.Module) -> Optimizer:
        base = torch.optim.Adam(model.parameters(), lr=1e-3)
        if self.rule is None:
            return base
        return SharpnessAware(base, self.rule, rho=self.rho, m=self.m, interval=self.interval, model=model)


ARMS: Mapping[str, Arm] = {
    "batch 16": Arm(SMALL),
    "batch 500": Arm(LARGE),
    "SAM, rho .05": Arm(LARGE, SAM(), 0.05),
    "SAM, rho .2": Arm(LARGE, SAM(), 0.2),
    "ASAM, rho .5": Arm(LARGE, ASAM(eta=0.0), 0.5),
    "m-SAM, m 50, rho .2": Arm(LARGE, SAM(), 0.2, m=50),
    "GSAM, rho .2": Arm(LARGE, GSAM(), 0.2),
    "WSAM, rho .05": Arm(LARGE, WSAM(), 0.05),
    "F-SAM, rho .2": Arm(LARGE, FSAM(), 0.2),
    "LookSAM, k 5, rho .2": Arm(LARGE, LookSAM(k=5), 0.2),
    "SAM each 2nd step, rho .2": Arm(LARGE, SAM(), 0.2, interval=2),
    "momentum-SAM, rho .3": Arm(LARGE, MomentumSAM(), 0.3),
}


@dataclass(frozen=True)
class Trained:
    """What came of one arm and seed; ``gradients`` are passes over a batch, forward and backward."""

    seed: int
    steps: int
    gradients: int
    reached: bool
    train_loss: float
    test_accuracy: float
    sharpness: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class _Counted(BatchClosure):
    """A batch's loss, and in ``passes`` the share of the batch of each pass."""

    def __init__(self, model: nn.Module, samples: Samples, chosen: torch.Tensor, passes: list[float]) -> None:
        def loss_of(rows: torch.Tensor) -> torch.Tensor:
            passes.append(len(rows) / len(chosen))
            return functional.cross_entropy(model(samples.inputs[rows]), samples.labels[rows])

        super().__init__(loss_of, chosen)


def order_of(num_samples: int, batch_size: int, seed: int) -> Iterable[list[torch.Tensor]]:
    """Epoch by epoch, the batches: the same permutations for each batch size."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield list(torch.split(torch.randperm(num_samples, generator=generator), batch_size))


def train(arm: Arm, seed: int, *, metrics: Sequence[str] = METRICS, max_epochs: int = MAX_EPOCHS) -> Trained:
    split = digits_split(seed)
    model = relu_mlp(WIDTHS, seed=seed)
    optimizer = arm.optimizer(model)
    passes: list[float] = []
    steps, epoch_loss = 0, math.inf
    for epoch, batches in enumerate(order_of(len(split.train), arm.batch_size, seed)):
        if epoch == max_epochs or epoch_loss < TARGET:
            break
        total = 0.0
        for chosen in batches:
            optimizer.zero_grad()
            total += float(optimizer.step(_Counted(model, split.train, chosen, passes))) * len(chosen)
            steps += 1
        at_the_weights = arm.rule is None or arm.rule.needs_gradient  # else closures return the loss uphill
        epoch_loss = total / len(split.train) if at_the_weights else evaluate(model, split.train).loss
    report = measure_sharpness(model, split.train.batches(LARGE), list(metrics), seed=seed, progress=False)
    train_loss, (_, accuracy) = evaluate(model, split.train).loss, evaluate(model, split.test)
    values = {key: result.value for key, result in report.items()}
    return Trained(seed, steps, round(sum(passes)), epoch_loss < TARGET, train_loss, accuracy, values)


Quantity = Callable[[Mapping[str, Any]], float]


def _column(runs: Sequence[Mapping[str, Any]], quantity: Quantity) -> list[float]:
    return [quantity(run) for run in sorted(runs, key=lambda run: run["seed"])]


def _sharpness(key: str) -> Quantity:
    return lambda run: float(run["sharpness"][key])


def _percent(run: Mapping[str, Any]) -> float:
    return 100 * float(run["test_accuracy"])


def _thousandths(run: Mapping[str, Any]) -> float:
    return 1000 * float(run["train_loss"])


def table(record: Mapping[str, Sequence[Mapping[str, Any]]], reference: str = "batch 500") -> str:
    """Markdown: mean ± sample standard deviation over the seeds, and what each arm gains on the plain large batch."""
    head = ["", "train loss x 1000", "ε-box sharpness %", "λmax", "test accuracy %", "gain, points (t; seeds)", "flatter in"]
    lines = [_row([*head, "steps", "gradients"]), _row(["---", *["---:"] * 8])]
    plain = record[reference]
    for name, runs in record.items():
        loss, sharp, top, accuracy = (
            _column(runs, q) for q in (_thousandths, _sharpness("epsilon_box"), _sharpness("hessian_topk"), _percent)
        )
        gain, flatter = "", ""
        if name != reference:
            better = pair(_column(plain, _percent), accuracy)
            lower = pair(_column(plain, _sharpness("epsilon_box")), sharp)
            assert better is not None
            assert lower is not None
            t = "" if better.t is None else f"{better.t:.1f}; "
            gain = f"{better.mean_difference:+.2f} ({t}{better.count(1)}/{better.num_seeds})"
            flatter = f"{lower.count(-1)}/{lower.num_seeds}"
        missed = sum(not run["reached"] for run in runs)
        label = name + (f" ({missed} did not reach the loss)" if missed else "")
        means = [f"{sum(run[key] for run in runs) / len(runs):.0f}" for key in ("steps", "gradients")]
        lines.append(_row([label, *map(mean_and_spread, (loss, sharp, top, accuracy)), gain, flatter, *means]))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
