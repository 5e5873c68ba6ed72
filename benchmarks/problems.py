"""The networks and data that all benchmarks share, made the same way every time.

Training runs in float64 and the weights are then rounded to float32, so that another order of summation (another
processor, another version of torch) gives the same network to float32.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from sharpness_plugins.experiments.data import Samples, digits_split
from sharpness_plugins.experiments.networks import relu_mlp
from sharpness_plugins.experiments.training import train_to_loss

__all__ = ["MODELS", "Problem", "minimum", "problem"]

RECIPE_R = (64, 256, 256, 256, 256, 10)
MODELS = ("mlp", "cnn", "timm_resnet")


@dataclass(frozen=True)
class Problem:
    """A trained network in eval mode and the batches it is measured on, the last one smaller than the others."""

    name: str
    model: nn.Module
    batches: list[tuple[Tensor, Tensor]]

    @property
    def num_samples(self) -> int:
        return sum(len(labels) for _, labels in self.batches)

    @property
    def dim(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def reference_gradient(self) -> float:
        """The mean loss, and its gradient in the parameters' ``.grad``: plain torch, nothing of this library."""
        self.model.zero_grad()
        total = 0.0
        for inputs, labels in self.batches:
            loss = functional.cross_entropy(self.model(inputs), labels, reduction="sum") / self.num_samples
            torch.autograd.backward(loss)
            total += loss.item()
        return total

    def reference_loss_at(self, perturbation: Tensor) -> float:
        """The mean loss, in float64, at the weights plus a flat perturbation: plain torch."""
        moved = dict(zip([n for n, _ in self.model.named_parameters()], self._moved(perturbation), strict=True))
        with torch.no_grad():
            return (
                sum(
                    functional.cross_entropy(
                        torch.func.functional_call(self.model, moved, (inputs,)).double(), labels, reduction="sum"
                    ).item()
                    for inputs, labels in self.batches
                )
                / self.num_samples
            )

    def reference_hvp(self, vector: Tensor) -> Tensor:
        """The Hessian of the mean loss times a flat vector, by double backward: plain torch."""
        parameters = list(self.model.parameters())
        product = torch.zeros_like(vector)
        for inputs, labels in self.batches:
            loss = functional.cross_entropy(self.model(inputs), labels, reduction="sum") / self.num_samples
            gradients = torch.autograd.grad(loss, parameters, create_graph=True)
            slope = torch.cat([gradient.reshape(-1) for gradient in gradients]) @ vector
            product += torch.cat([part.reshape(-1) for part in torch.autograd.grad(slope, parameters)])
        return product

    def weights(self) -> Tensor:
        return torch.cat([parameter.detach().reshape(-1) for parameter in self.model.parameters()])

    def take_gradient(self) -> Tensor:
        """What ``reference_gradient`` left in ``.grad``, as one flat vector; the model has no gradients afterwards."""
        parts = []
        for parameter in self.model.parameters():
            assert parameter.grad is not None
            parts.append(parameter.grad.reshape(-1))
            parameter.grad = None
        return torch.cat(parts)

    def _moved(self, perturbation: Tensor) -> list[Tensor]:
        parameters = list(self.model.parameters())
        pieces = torch.split(perturbation, [parameter.numel() for parameter in parameters])
        return [p.detach() + piece.view_as(p) for p, piece in zip(parameters, pieces, strict=True)]


@functools.cache
def problem(name: str) -> Problem:
    """One of ``MODELS``: the demo's ReLU network and a small convolutional one on digits, a timm ResNet on noise."""
    return _MAKERS[name]()


@functools.cache
def minimum(batch_size: int, target_loss: float, seed: int) -> Problem:
    """The demo's network on 500 digits (recipe R), trained with one batch size to one epoch loss."""
    samples = digits_split(seed).train
    model = relu_mlp(RECIPE_R, seed=seed).double()
    training = train_to_loss(
        model,
        Samples(samples.inputs.double(), samples.labels),
        batch_size=batch_size,
        target_loss=target_loss,
        max_epochs=300,
        seed=seed,
    )
    assert training.reached_target, training
    name = f"batch {batch_size}, loss {target_loss:g}, seed {seed}"
    return Problem(name, model.float().eval(), [(samples.inputs, samples.labels)])


def _mlp() -> Problem:
    samples = digits_split(0).train
    model = relu_mlp(RECIPE_R, seed=0)
    _train(model, samples.inputs, samples.labels, steps=60)
    return Problem("mlp", model, _batches(samples.inputs, samples.labels, 256))


def _cnn() -> Problem:
    samples = digits_split(0).train
    with _seeded(0):
        model = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 16, 10),
        )
    _train(model, samples.inputs, samples.labels, steps=40)
    return Problem("cnn", model, _batches(samples.inputs, samples.labels, 256))


def _timm_resnet() -> Problem:
    """Three-channel 32x32 noise with a class-dependent mean; running statistics as the training left them."""
    import timm

    num_samples, num_classes = 48, 4
    labels = torch.arange(num_samples) % num_classes
    inputs = torch.randn(num_samples, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    inputs[:, 0] += 0.5 * labels.view(-1, 1, 1)
    with _seeded(0):
        model = timm.create_model("resnet10t", num_classes=num_classes, channels=(16, 16, 32, 32), stem_width=8)
    _train(model, inputs, labels, steps=30)
    return Problem("timm_resnet", model, _batches(inputs, labels, 32))


_MAKERS: dict[str, Callable[[], Problem]] = {"mlp": _mlp, "cnn": _cnn, "timm_resnet": _timm_resnet}


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _train(model: nn.Module, inputs: Tensor, labels: Tensor, *, steps: int) -> None:
    """Full-batch Adam in float64; leaves the model in float32 and eval mode, without gradients."""
    model.double().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(functional.cross_entropy(model(inputs.double()), labels))
        optimizer.step()
    optimizer.zero_grad()
    model.float().eval()


def _batches(inputs: Tensor, labels: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(torch.split(inputs, size), torch.split(labels, size), strict=True))
