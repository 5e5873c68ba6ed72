"""Two halves of trained networks that share nothing: one to choose a solver on, one to confirm the choice.

Other seeds, widths, depths and activations; other samples of the digits (two disjoint pools), other data sets beside them;
and the confirmation half has five architectures that the tuning half has not (BatchNorm and SiLU convolutions, a GRU, a
mixer, a gated residual network). Training runs in float64 on one thread and is then rounded to float32, so that another
order of summation gives the same network to float32 (as far as training is not chaotic); ``references.json`` holds each
network's loss, by which another machine's networks are recognized.

Trained networks are kept in ``$SHARPNESS_BENCH_CACHE`` (or a folder under the user's temporary one), keyed by the recipe.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .architectures import ARCHITECTURES

__all__ = [
    "CONFIRMATION",
    "HALVES",
    "TUNING",
    "Network",
    "Recipe",
    "cache_folder",
    "half_named",
    "network",
    "one_thread",
    "seeded",
    "train",
]

RECIPE_VERSION = 1  # count up where this file or the architectures change what a recipe means
POOL_SEED = 2024
POOL_SIZE = 860  # digits of the tuning half; the other 937 belong to the confirmation half

FULL = 0  # batch size: all samples

Settings = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Recipe:
    """All that decides a trained network.

    Attributes:
        architecture: a key of ``ARCHITECTURES``; ``settings``: its arguments.
        data: a key of ``DATA``; ``num_samples``: as many of them, drawn by ``seed``.
        batch_size: of training; ``FULL`` for all samples at once.
        target_loss: training stops after the first epoch whose mean loss is below this.
        seed: of the initial weights, the choice of samples, and their order.
    """

    name: str
    architecture: str
    settings: Settings
    data: str
    num_samples: int
    batch_size: int
    target_loss: float
    seed: int
    learning_rate: float
    max_epochs: int = 600

    @property
    def key(self) -> str:
        text = repr((RECIPE_VERSION, self)).encode()
        return hashlib.sha256(text).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class Network:
    """A trained network in eval mode and its training data, one batch.

    Attributes:
        criterion: ``(output, targets) ->`` mean loss.
    """

    recipe: Recipe
    model: nn.Module
    inputs: Tensor
    targets: Tensor
    criterion: nn.Module = field(repr=False)

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def dim(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def weights(self) -> Tensor:
        return torch.cat([parameter.detach().reshape(-1) for parameter in self.model.parameters()])

    @torch.no_grad()
    def loss_at(self, perturbation: Tensor) -> float:
        """The mean loss, in float64 on the float32 output, at the weights plus a flat perturbation: plain torch."""
        parameters = dict(self.model.named_parameters())
        pieces = torch.split(perturbation, [parameter.numel() for parameter in parameters.values()])
        moved = {name: p + piece.view_as(p) for (name, p), piece in zip(parameters.items(), pieces, strict=True)}
        output = torch.func.functional_call(self.model, moved, (self.inputs,)).double()
        targets = self.targets.double() if self.targets.is_floating_point() else self.targets
        loss: float = self.criterion(output, targets).item()
        return loss


# ---------------------------------------------------------------------- data


def _digits(recipe: Recipe, pool: slice) -> tuple[Tensor, Tensor]:
    from sklearn import datasets

    pixels, digits = datasets.load_digits(return_X_y=True)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(POOL_SEED))[pool]
    chosen = order[_choice(len(order), recipe)]
    return torch.tensor(pixels / 16)[chosen], torch.tensor(digits, dtype=torch.int64)[chosen]


def _table(name: str, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """One of scikit-learn's tables with standardized columns; integer classes, or targets of one standardized column."""
    from sklearn import datasets

    if name == "friedman":
        features, targets = datasets.make_friedman1(n_samples=600, n_features=10, noise=0.5, random_state=recipe.seed)
    else:
        features, targets = getattr(datasets, f"load_{name}")(return_X_y=True)
    chosen = _choice(len(targets), recipe)
    inputs, answers = torch.tensor(features)[chosen], torch.tensor(targets)[chosen]
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    if name == "wine":
        return inputs, answers
    if name == "breast_cancer":
        return inputs, answers.double()[:, None]
    return inputs, ((answers - answers.mean()) / answers.std())[:, None]


def _choice(num_available: int, recipe: Recipe) -> Tensor:
    if not 0 < recipe.num_samples <= num_available:
        raise ValueError(f"{recipe.name} wants {recipe.num_samples} samples of {recipe.data}, which has {num_available}")
    return torch.randperm(num_available, generator=torch.Generator().manual_seed(recipe.seed))[: recipe.num_samples]


DATA: Mapping[str, tuple[Callable[[Recipe], tuple[Tensor, Tensor]], type[nn.Module]]] = {
    "digits_a": (lambda recipe: _digits(recipe, slice(0, POOL_SIZE)), nn.CrossEntropyLoss),
    "digits_b": (lambda recipe: _digits(recipe, slice(POOL_SIZE, None)), nn.CrossEntropyLoss),
    "breast_cancer": (functools.partial(_table, "breast_cancer"), nn.BCEWithLogitsLoss),
    "diabetes": (functools.partial(_table, "diabetes"), nn.MSELoss),
    "wine": (functools.partial(_table, "wine"), nn.CrossEntropyLoss),
    "friedman": (functools.partial(_table, "friedman"), nn.MSELoss),
}

# ---------------------------------------------------------------------- recipes


def _pair(
    name: str, architecture: str, settings: Settings, data: str, num_samples: int, seed: int, *rates: float
) -> list[Recipe]:
    """A small-batch (16) and a large-batch (all samples) minimum of one network from the same initial weights.

    ``rates``: their learning rates.
    """
    return [
        Recipe(f"{name}-{which}", architecture, settings, data, num_samples, batch_size, 2e-3, seed, rate)
        for which, batch_size, rate in zip(("small", "large"), (16, FULL), rates, strict=True)
    ]


_RECIPE_R = (("widths", (64, 256, 256, 256, 256, 10)),)

# fmt: off
TUNING: tuple[Recipe, ...] = (
    *_pair("mlp", "mlp", (("widths", (64, 100, 50, 10)),), "digits_a", 500, 101, 1e-3, 3e-3),
    *_pair("deep", "mlp", _RECIPE_R, "digits_a", 500, 102, 1e-3, 1e-3),
    Recipe("deep-converged", "mlp", _RECIPE_R, "digits_a", 500, 32, 1e-5, 103, 2e-3),
    *_pair("tanh", "mlp", (("widths", (64, 96, 96, 10)), ("activation", "tanh")), "digits_a", 500, 104, 1e-3, 3e-3),
    *_pair("cnn", "cnn", (("channels", (12, 24)),), "digits_a", 400, 105, 3e-3, 1e-2),
    *_pair("bn_mlp", "mlp", (("widths", (64, 128, 128, 10)), ("batch_norm", True)), "digits_a", 600, 106, 1e-3, 3e-3),
    *_pair("resnet", "resnet", (("num_channels", 8), ("num_blocks", 2)), "digits_a", 400, 107, 3e-3, 1e-2),
    *_pair("vit", "vit", (("width", 32), ("depth", 2), ("patch", 4)), "digits_a", 500, 108, 2e-3, 3e-3),
    *_pair("lstm", "recurrent", (("cell", "lstm"), ("width", 48)), "digits_a", 500, 109, 3e-3, 1e-2),
    Recipe(
        "depthwise-early", "depthwise", (("num_channels", 32), ("num_blocks", 2)), "digits_a", 500, 16, 0.3, 110, 3e-3
    ),
    Recipe(
        "gelu-early", "mlp", (("widths", (64, 128, 128, 128, 10)), ("activation", "gelu")),
        "digits_a", 700, FULL, 0.1, 111, 1e-3,
    ),
    Recipe("binary-converged", "mlp", (("widths", (30, 64, 32, 1)),), "breast_cancer", 500, FULL, 1e-5, 112, 1e-2),
    Recipe(
        "regression", "mlp", (("widths", (10, 64, 64, 1)), ("activation", "tanh")), "diabetes", 442, FULL, 0.15, 113, 1e-2
    ),
)

CONFIRMATION: tuple[Recipe, ...] = (
    *_pair("wide", "mlp", (("widths", (64, 192, 10)),), "digits_b", 600, 201, 2e-3, 5e-3),
    *_pair("deeper", "mlp", (("widths", (64, 160, 160, 160, 160, 160, 10)),), "digits_b", 550, 202, 1e-3, 1e-3),
    Recipe("deeper-converged", "mlp", (("widths", (64, 200, 200, 200, 10)),), "digits_b", 550, 32, 1e-5, 203, 2e-3),
    *_pair("gelu", "mlp", (("widths", (64, 120, 80, 10)), ("activation", "gelu")), "digits_b", 600, 204, 1e-3, 3e-3),
    *_pair("cnn_b", "cnn", (("channels", (16, 20)), ("pool", "mean")), "digits_b", 450, 205, 3e-3, 1e-2),
    *_pair(
        "bn_cnn", "cnn", (("channels", (10, 20)), ("activation", "silu"), ("batch_norm", True)),
        "digits_b", 450, 206, 2e-3, 1e-2,
    ),
    *_pair("resnet_b", "resnet", (("num_channels", 6), ("num_blocks", 3)), "digits_b", 400, 207, 3e-3, 1e-2),
    *_pair("vit_b", "vit", (("width", 24), ("depth", 3), ("patch", 4)), "digits_b", 550, 208, 2e-3, 3e-3),
    Recipe("lstm_b", "recurrent", (("cell", "lstm"), ("width", 32)), "digits_b", 550, 16, 2e-3, 209, 5e-3),
    Recipe("gru", "recurrent", (("cell", "gru"), ("width", 40)), "digits_b", 550, FULL, 2e-3, 210, 1e-2),
    *_pair("mixer", "mixer", (("width", 24), ("depth", 2), ("patch", 2)), "digits_b", 450, 211, 3e-3, 5e-3),
    Recipe(
        "gated-early", "gated", (("num_inputs", 64), ("width", 48), ("depth", 3), ("num_outputs", 10)),
        "digits_b", 700, FULL, 0.1, 212, 1e-3,
    ),
    Recipe("wine-converged", "mlp", (("widths", (13, 48, 24, 3)),), "wine", 178, FULL, 1e-5, 213, 1e-2),
    Recipe(
        "regression_b", "gated", (("num_inputs", 10), ("width", 24), ("depth", 2), ("num_outputs", 1)),
        "friedman", 600, 16, 0.05, 214, 3e-3,
    ),
)
# fmt: on

HALVES: Mapping[str, tuple[Recipe, ...]] = {"tuning": TUNING, "confirmation": CONFIRMATION}


def half_named(name: str) -> tuple[Recipe, ...]:
    """
    Raises:
        ValueError: no such half.
    """
    if name not in HALVES:
        raise ValueError(f"a half is one of {', '.join(HALVES)}, got {name!r}")
    return HALVES[name]


# ---------------------------------------------------------------------- training


def network(recipe: Recipe) -> Network:
    """The trained network: from this process, from the cache folder, or trained now (at most a quarter of a minute)."""
    return _network(recipe)


@functools.cache
def _network(recipe: Recipe) -> Network:
    made = _untrained(recipe)
    file = cache_folder() / f"{recipe.name}-{recipe.key}.pt"
    if file.exists():
        made.model.load_state_dict(torch.load(file, weights_only=True))
    else:
        train(made)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        torch.save(made.model.state_dict(), partial)
        partial.replace(file)  # whoever reads it sees all of it
    return made


def cache_folder() -> Path:
    given = os.environ.get("SHARPNESS_BENCH_CACHE")
    return Path(given) if given else Path(tempfile.gettempdir()) / "sharpness_plugins_bench"


def _untrained(recipe: Recipe) -> Network:
    data, criterion = DATA[recipe.data]
    inputs, targets = data(recipe)
    with seeded(recipe.seed):
        model = ARCHITECTURES[recipe.architecture](**dict(recipe.settings))
    if targets.is_floating_point():
        targets = targets.float()
    return Network(recipe, model.eval(), inputs.float(), targets, criterion())


def train(made: Network) -> float:
    """Adam in float64 until the recipe's loss is reached; leaves the model in float32 and eval mode.

    Returns:
        the last epoch's mean loss, taken while the weights move.
    Raises:
        ArithmeticError: the loss did not fall below its target.
    """
    recipe, model = made.recipe, made.model.double().train()
    inputs, targets = made.inputs.double(), made.targets.double() if made.targets.is_floating_point() else made.targets
    batch_size = recipe.batch_size or len(inputs)
    order = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate)
    epoch_loss, epochs = math.inf, 0
    with one_thread():
        while not epoch_loss < recipe.target_loss:
            if epochs == recipe.max_epochs or math.isnan(epoch_loss):
                raise ArithmeticError(f"{recipe.name} has loss {epoch_loss:.3g} after {epochs} epochs")
            total = 0.0
            for batch in torch.split(torch.randperm(len(inputs), generator=order), batch_size):
                if len(batch) == 1:  # BatchNorm has no variance of one sample
                    continue
                loss = made.criterion(model(inputs[batch]), targets[batch])
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                total += loss.item() * len(batch)
            epoch_loss, epochs = total / len(inputs), epochs + 1
    optimizer.zero_grad()
    model.float().eval()
    return epoch_loss


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's own generator, for weights; put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread of torch: sums are then always added in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
