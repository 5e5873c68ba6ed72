"""The paper's six networks, and small ones for the digits that ship with scikit-learn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from ...errors import did_you_mean
from ..networks import relu_mlp
from ..training import seeded

__all__ = ["BATCH_NORMS", "NETWORKS", "NetworkKind", "build", "kind_of"]

BATCH_NORMS = ("batch", "running")


@dataclass(frozen=True)
class NetworkKind:
    """One of ``NETWORKS``.

    Attributes:
        description: for a reader; of the network as published, at width 1.
        data: the data sets that it is for.
        has_batch_norm: whether the choice of statistics matters to it.
        takes_images: samples of shape (channels, height, width), not flat ones.
        like_keras: whether the initial weights are Keras', instead of those that ``make`` leaves.
    """

    description: str
    data: tuple[str, ...]
    has_batch_norm: bool
    make: Callable[[_Shape], nn.Sequential]
    takes_images: bool = False
    like_keras: bool = True


@dataclass(frozen=True)
class _Shape:
    """What a network is built for, and how."""

    inputs: tuple[int, ...]
    num_classes: int
    seed: int
    width: float
    batch_norm: str

    def wide(self, channels: int) -> int:
        return max(1, round(self.width * channels))

    def normalized(self, channels: int, kind: type[nn.BatchNorm1d] | type[nn.BatchNorm2d]) -> nn.Module:
        """Without running statistics a BatchNorm layer takes those of the batch in tests, too."""
        return kind(channels, track_running_stats=self.batch_norm == "running")


def build(
    name: str,
    *,
    inputs: Sequence[int],
    num_classes: int,
    seed: int,
    width: float = 1.0,
    batch_norm: str = "batch",
) -> nn.Sequential:
    """One of ``NETWORKS`` with the weights of ``seed``; the caller's generators are left as they were.

    The six networks of the paper begin, as in Keras then, with weights uniform in ``±sqrt(6 / (fan_in + fan_out))`` and
    zero biases; BatchNorm's constants are PyTorch's. R and A are those of ``sharpness demo`` and ``sharpness warm-start``.

    Args:
        inputs: shape of one sample: ``(784,)`` or ``(1, 28, 28)`` for F1, ``(3, 32, 32)`` for C1.
        width: factor on the hidden channels, for quick trials.
        batch_norm: "batch" takes the statistics of the batch at hand, also in tests, as Keras' mode 2 did in the paper's
            code; "running" is what PyTorch users know. Accuracy and sharpness differ by construction.
    Raises:
        ValueError: no such network or mode, or inputs that do not fit it.
    """
    kind = kind_of(name)
    if batch_norm not in BATCH_NORMS:
        raise ValueError(f"batch_norm must be one of {', '.join(BATCH_NORMS)}, got {batch_norm!r}")
    if not 0 < width < math.inf:
        raise ValueError(f"width must be a positive number, got {width}: it is a factor on the hidden channels")
    with seeded(seed):
        network = kind.make(_Shape(tuple(inputs), num_classes, seed, width, batch_norm))
        if kind.like_keras:
            _like_keras(network)
    return network


def kind_of(name: str) -> NetworkKind:
    """Raises a ValueError that names the networks there are."""
    if name not in NETWORKS:
        raise ValueError(f"there is no network {name!r}.{did_you_mean(name, NETWORKS)} Networks: {', '.join(NETWORKS)}")
    return NETWORKS[name]


def _like_keras(network: nn.Sequential) -> None:
    for layer in network:
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _fully_connected(depth: int) -> Callable[[_Shape], nn.Sequential]:
    def make(shape: _Shape) -> nn.Sequential:
        layers: list[nn.Module] = [nn.Flatten()]
        channels = math.prod(shape.inputs)
        for _ in range(depth):
            wide = shape.wide(512)
            layers += [nn.Linear(channels, wide), shape.normalized(wide, nn.BatchNorm1d), nn.ReLU()]
            channels = wide
        return nn.Sequential(*layers, nn.Linear(channels, shape.num_classes))

    return make


def _relu(*hidden: int, unit_variance: bool = False) -> Callable[[_Shape], nn.Sequential]:
    def make(shape: _Shape) -> nn.Sequential:
        widths = (math.prod(shape.inputs), *map(shape.wide, hidden), shape.num_classes)
        return relu_mlp(widths, seed=shape.seed, unit_variance=unit_variance)

    return make


def _images(shape: _Shape, smallest: int) -> tuple[int, int, int]:
    if len(shape.inputs) != 3 or min(shape.inputs[1:]) < smallest:
        raise ValueError(
            f"this network takes images (channels, height, width) of at least {smallest} pixels each way, got samples "
            f"of shape {shape.inputs}"
        )
    channels, height, width = shape.inputs
    return channels, height, width


def _shallow(shape: _Shape) -> nn.Sequential:
    channels, height, width = _images(shape, 8)
    layers: list[nn.Module] = []
    for _ in range(2):
        wide = shape.wide(64)
        layers += [nn.Conv2d(channels, wide, 5, padding=2), shape.normalized(wide, nn.BatchNorm2d), nn.ReLU()]
        layers += [nn.MaxPool2d(3, stride=2, ceil_mode=True)]  # windows from the corner on, as "same" pads an even size
        channels, height, width = wide, math.ceil((height - 3) / 2) + 1, math.ceil((width - 3) / 2) + 1
    layers += [nn.Flatten()]
    channels *= height * width
    for hidden in (384, 192):
        wide = shape.wide(hidden)
        layers += [nn.Linear(channels, wide), shape.normalized(wide, nn.BatchNorm1d), nn.ReLU(), nn.Dropout(0.5)]
        channels = wide
    return nn.Sequential(*layers, nn.Linear(channels, shape.num_classes))


def _deep(shape: _Shape) -> nn.Sequential:
    channels, height, width = _images(shape, 32)
    layers: list[nn.Module] = []
    for filters, dropouts in (
        (64, (0.3, 0)),
        (128, (0.4, 0)),
        (256, (0.4, 0.4, 0)),
        (512, (0.4, 0.4, 0)),
        (512, (0.4, 0.4, 0)),
    ):
        for dropout in dropouts:
            wide = shape.wide(filters)
            layers += [nn.Conv2d(channels, wide, 3, padding=1), shape.normalized(wide, nn.BatchNorm2d), nn.ReLU()]
            layers += [nn.Dropout(dropout)] if dropout else []
            channels = wide
        layers += [nn.MaxPool2d(2)]
        height, width = height // 2, width // 2
    hidden = shape.wide(512)
    layers += [nn.Flatten(), nn.Dropout(0.5), nn.Linear(channels * height * width, hidden)]
    layers += [shape.normalized(hidden, nn.BatchNorm1d), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(hidden, shape.num_classes))


def _small_conv(shape: _Shape) -> nn.Sequential:
    channels, height, width = _images(shape, 4)
    first, second, hidden = shape.wide(16), shape.wide(32), shape.wide(64)
    return nn.Sequential(
        *(nn.Conv2d(channels, first, 3, padding=1), shape.normalized(first, nn.BatchNorm2d), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(first, second, 3, padding=1), shape.normalized(second, nn.BatchNorm2d), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(second * (height // 4) * (width // 4), hidden), nn.ReLU()),
        nn.Linear(hidden, shape.num_classes),
    )


NETWORKS = {
    "R": NetworkKind("ReLU network 64-256-256-256-256-10", ("digits",), False, _relu(256, 256, 256, 256), like_keras=False),
    "A": NetworkKind(
        "ReLU network 64-128-128-10",
        ("digits-noisy", "digits"),
        False,
        _relu(128, 128, unit_variance=True),
        like_keras=False,
    ),
    "small-conv": NetworkKind(
        "two convolutions of 16 and 32 filters, one hidden layer of 64", ("digits",), True, _small_conv
    ),
    "F1": NetworkKind("fully connected, 5 hidden layers of 512", ("mnist", "digits"), True, _fully_connected(5)),
    "F2": NetworkKind("fully connected, 7 hidden layers of 512", ("timit",), True, _fully_connected(7)),
    "C1": NetworkKind("shallow convolutional, like AlexNet", ("cifar10",), True, _shallow, takes_images=True),
    "C2": NetworkKind("deep convolutional, like VGG", ("cifar10",), True, _deep, takes_images=True),
    "C3": NetworkKind("C1 with 100 classes", ("cifar100",), True, _shallow, takes_images=True),
    "C4": NetworkKind("C2 with 100 classes", ("cifar100",), True, _deep, takes_images=True),
}
