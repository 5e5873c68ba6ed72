"""Training to a matched training loss, and evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from .data import Samples

__all__ = ["Evaluation", "Training", "evaluate", "train_to_loss"]


@dataclass(frozen=True)
class Training:
    """How a training ended.

    Attributes:
        epochs: epochs done.
        updates: optimizer steps done.
        epoch_loss: mean training loss over the last epoch, taken while the weights move.
        reached_target: whether ``epoch_loss`` fell below the target. If not, the network is not matched in loss to
            others, and sharpness depends on the loss.
    """

    epochs: int
    updates: int
    epoch_loss: float
    reached_target: bool


class Evaluation(NamedTuple):
    """Mean cross-entropy in nats, and the share of samples classified correctly."""

    loss: float
    accuracy: float


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

    ``seed`` alone decides the order of the samples: runs that differ in ``batch_size`` see the same permutation in
    the same epoch. The last batch of an epoch may be smaller.

    Args:
        on_epoch: is told the number of epochs done and the last one's mean loss.
    Raises:
        ValueError: ``batch_size`` is not between 1 and the number of samples.
        ArithmeticError: the loss became NaN or infinite.
    """
    if not 1 <= batch_size <= len(samples):
        raise ValueError(f"batch_size must lie between 1 and the {len(samples)} training samples, got {batch_size}")
    device = samples.inputs.device
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    epochs = updates = 0
    epoch_loss = math.inf
    model.train()
    while epochs < max_epochs and not epoch_loss < target_loss:
        permutation = torch.randperm(len(samples), generator=order).to(device)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for batch in torch.split(permutation, batch_size):
            loss = functional.cross_entropy(model(samples.inputs[batch]), samples.labels[batch])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            total += loss.detach() * len(batch)
            updates += 1
        epochs += 1
        epoch_loss = total.item() / len(samples)
        if not math.isfinite(epoch_loss):
            raise ArithmeticError(
                f"the training loss became {epoch_loss} in epoch {epochs} at batch size {batch_size}. "
                "Lower the learning rate."
            )
        if on_epoch is not None:
            on_epoch(epochs, epoch_loss)
    return Training(epochs, updates, epoch_loss, epoch_loss < target_loss)


@torch.no_grad()
def evaluate(model: nn.Module, samples: Samples) -> Evaluation:
    """Loss and accuracy in eval mode, in which the model stays.

    Cross-entropy is taken in float64 on the logits: at a loss of 1e-5, float32 is wrong by 0.1 %.
    """
    logits = model.eval()(samples.inputs)
    loss = functional.cross_entropy(logits.double(), samples.labels)
    return Evaluation(loss.item(), (logits.argmax(dim=1) == samples.labels).double().mean().item())
