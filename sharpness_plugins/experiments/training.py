"""Training to a matched training loss, and evaluation."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from .data import Samples

__all__ = [
    "ADAM",
    "Evaluation",
    "OptimizerFactory",
    "Run",
    "Step",
    "Training",
    "evaluate",
    "one_thread",
    "plain_step",
    "seeded",
    "train_to_loss",
]

OptimizerFactory: TypeAlias = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Step: TypeAlias = Callable[[nn.Module, torch.optim.Optimizer, Tensor, Tensor], Tensor]

ADAM: OptimizerFactory = functools.partial(torch.optim.Adam, lr=1e-3, fused=True)  # 1.6 times as fast on small batches
EVALUATION_BATCH = 4096


@dataclass(frozen=True)
class Training:
    """What a training did, and how it ended.

    Attributes:
        epochs: whole epochs done.
        steps: optimizer steps done.
        samples: samples seen, each as often as it was used.
        seconds: wall time of the steps, without evaluations and measurements.
        epoch_loss: mean training loss over the last whole epoch, taken while the weights move; infinite before the first.
        reached_target: whether it came to where it should end. If not, the network is not matched to others, and
            sharpness depends on the loss.
    """

    epochs: int
    steps: int
    samples: int
    seconds: float
    epoch_loss: float
    reached_target: bool


class Evaluation(NamedTuple):
    """Mean cross-entropy in nats, and the share of samples classified correctly."""

    loss: float
    accuracy: float


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, labels: Tensor) -> Tensor:
    """One step down the gradient of the mean cross-entropy; returns the loss before it."""
    loss = functional.cross_entropy(model(inputs), labels)
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()
    return loss.detach()


class Run:
    """A training that can be stopped after any step and carried on: a model, a fresh optimizer, an order of the samples.

    ``seed`` alone decides the order: runs that differ in ``batch_size`` see the same permutation in the same epoch.

    Args:
        optimizer: makes one from the parameters.
        drop_last: leave out what is left of an epoch below ``batch_size``; else the last batch is smaller.
        step: what is done with each batch; returns its mean loss, detached.
    Raises:
        ValueError: ``batch_size`` is not between 1 and the number of samples.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: Samples,
        *,
        batch_size: int,
        optimizer: OptimizerFactory = ADAM,
        seed: int = 0,
        drop_last: bool = False,
        step: Step = plain_step,
    ) -> None:
        if not 1 <= batch_size <= len(samples):
            raise ValueError(f"batch_size must lie between 1 and the {len(samples)} training samples, got {batch_size}")
        self.model, self.samples, self.batch_size = model, samples, batch_size
        self.steps_per_epoch = len(samples) // batch_size if drop_last else math.ceil(len(samples) / batch_size)
        self.epochs = self.steps = self.samples_seen = 0
        self.seconds, self.epoch_loss = 0.0, math.inf
        self._optimizer = optimizer(model.parameters())
        self._step = step
        self._order = torch.Generator().manual_seed(seed)
        self._batches = self._endless()
        self._total, self._count = torch.zeros((), dtype=torch.float64, device=samples.inputs.device), 0

    def _endless(self) -> Iterator[Tensor]:
        while True:
            permutation = torch.randperm(len(self.samples), generator=self._order).to(self.samples.inputs.device)
            yield from torch.split(permutation, self.batch_size)[: self.steps_per_epoch]

    @property
    def steps_to_epoch_end(self) -> int:
        """From 1 to a whole epoch."""
        return self.steps_per_epoch - self.steps % self.steps_per_epoch

    def advance(self, num_steps: int) -> None:
        """So many optimizer steps more, in train mode.

        Raises:
            ArithmeticError: an epoch's mean loss became NaN or infinite.
        """
        began = time.perf_counter()
        self.model.train()
        for _ in range(num_steps):
            batch = next(self._batches)
            loss = self._step(self.model, self._optimizer, self.samples.inputs[batch], self.samples.labels[batch])
            self._total += loss * len(batch)
            self._count += len(batch)
            self.steps += 1
            self.samples_seen += len(batch)
            if self.steps % self.steps_per_epoch == 0:
                self._end_epoch()
        self.seconds += time.perf_counter() - began

    def _end_epoch(self) -> None:
        self.epochs += 1
        self.epoch_loss = self._total.item() / self._count
        self._total.zero_()
        self._count = 0
        if not math.isfinite(self.epoch_loss):
            raise ArithmeticError(
                f"the training loss became {self.epoch_loss} in epoch {self.epochs} at batch size {self.batch_size}. "
                "Lower the learning rate."
            )

    def state_dict(self) -> dict[str, Any]:
        """All that the training goes on from, without the default generators that dropout draws from.

        References, not copies; loadable by ``torch.load(..., weights_only=True)`` after ``torch.save``.

        Raises:
            RuntimeError: within an epoch, whose order of the samples is not kept.
        """
        if self._count:
            raise RuntimeError(f"a training is kept between epochs, and step {self.steps} is within one")
        counts = {name: getattr(self, name) for name in ("epochs", "steps", "samples_seen", "seconds", "epoch_loss")}
        return {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "order": self._order.get_state(),
            **counts,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``, bit for bit as if there had been no pause."""
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._order.set_state(state["order"].cpu())
        self._batches = self._endless()
        for name in ("epochs", "steps", "samples_seen", "seconds", "epoch_loss"):
            setattr(self, name, state[name])

    def training(self, *, reached_target: bool) -> Training:
        """What was done up to now."""
        return Training(self.epochs, self.steps, self.samples_seen, self.seconds, self.epoch_loss, reached_target)


def train_to_loss(
    model: nn.Module,
    samples: Samples,
    *,
    batch_size: int,
    target_loss: float,
    max_epochs: int,
    learning_rate: float = 1e-3,
    seed: int = 0,
    on_epoch: Callable[[int, float], None] | None = None,
) -> Training:
    """Adam on shuffled mini-batches until an epoch's mean cross-entropy is below ``target_loss``.

    The last batch of an epoch may be smaller; ``seed`` decides the order as in ``Run``.

    Args:
        on_epoch: is told the number of epochs done and the last one's mean loss.
    Raises:
        ValueError, ArithmeticError: see ``Run``.
    """
    optimizer = functools.partial(torch.optim.Adam, lr=learning_rate)
    run = Run(model, samples, batch_size=batch_size, optimizer=optimizer, seed=seed)
    while run.epochs < max_epochs and not run.epoch_loss < target_loss:
        run.advance(run.steps_per_epoch)
        if on_epoch is not None:
            on_epoch(run.epochs, run.epoch_loss)
    return run.training(reached_target=run.epoch_loss < target_loss)


@torch.no_grad()
def evaluate(model: nn.Module, samples: Samples, *, batch_size: int = EVALUATION_BATCH) -> Evaluation:
    """Loss and accuracy in eval mode, in which the model stays; ``batch_size`` matters to batch statistics alone.

    Cross-entropy is taken in float64 on the logits: at a loss of 1e-5, float32 is wrong by 0.1 %.
    """
    model.eval()
    loss = right = 0.0
    for inputs, labels in samples.batches(batch_size):
        logits = model(inputs)
        loss += functional.cross_entropy(logits.double(), labels, reduction="sum").item()
        right += (logits.argmax(dim=1) == labels).sum().item()
    return Evaluation(loss / len(samples), right / len(samples))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Same numbers on any number of cores, and no slower where the matrices are small.

    On a busy machine two threads wait for each other at every one of them: 71 s for a network that takes 7 s with one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's default generators start from ``seed`` inside, and are outside what they were.

    An accelerator that nobody has used yet is left asleep: ``torch.manual_seed`` would seed it for good.
    """
    accelerators = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=list(accelerators)):
        torch.default_generator.manual_seed(seed)
        if accelerators:
            torch.cuda.manual_seed_all(seed)
        yield
