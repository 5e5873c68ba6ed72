"""Small problems that metrics are checked on, and what must not move a number that claims to be invariant."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import sampling

__all__ = [
    "Problem",
    "batch_norm_classifier",
    "busy_classifier",
    "classifier",
    "edge_cases",
    "loss_scaled",
    "neurons_permuted",
    "normalized_scaled",
    "rebatched",
    "rescaled",
]

F64 = torch.float64
CLASSES = 3


@dataclass(frozen=True)
class Problem:
    """A model, its batches, and how they are measured."""

    name: str
    model: nn.Module
    loader: Any
    settings: dict[str, Any] = field(default_factory=dict)


def classifier() -> Problem:
    """A ReLU network in float64, 147 parameters, some way down towards a minimum."""
    inputs, targets = _data()
    model = nn.Sequential(nn.Linear(5, 10), nn.ReLU(), nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, CLASSES)).double()
    model.load_state_dict(_trained())
    return Problem("a ReLU network", model, [(inputs, targets)])


def busy_classifier() -> Problem:
    """In the middle of training: gradients, a frozen bias, BatchNorm, layers in both modes."""
    problem = batch_norm_classifier()
    model: Any = problem.model
    model.train()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    inputs, targets = _data()
    loss: Any = functional.cross_entropy(model(inputs), targets)
    loss.backward()
    return replace(problem, settings={})


def batch_norm_classifier() -> Problem:
    """Without ε in the normalization, so that its loss does not depend on the length of the weights before it."""
    layers = (nn.Linear(5, 6), nn.BatchNorm1d(6, eps=1e-30), nn.ReLU(), nn.Linear(6, CLASSES))
    model = nn.Sequential(*layers).double()
    _fill(model, seed=2)
    return Problem("a network with BatchNorm in batch mode", model, [_data()], {"batch_norm": "batch"})


def edge_cases() -> Iterator[Problem]:
    """Where formulas divide by nothing and loops run zero times."""
    inputs, targets = _data()
    exact = nn.Linear(3, 1, bias=False).double()
    _fill(exact, seed=3)
    with torch.no_grad():
        answers = exact(inputs[:, :3])
    squared = {"criterion": nn.MSELoss()}
    yield Problem("a gradient of zero", exact, [(inputs[:, :3], answers)], squared)
    single = nn.Linear(1, 1, bias=False).double()
    _fill(single, seed=4)
    yield Problem("one parameter", single, [(inputs[:, :1], answers)], squared)
    network = classifier()
    yield replace(network, name="one sample", loader=[(inputs[:1], targets[:1])])
    yield replace(
        network, name="two batches of one sample", loader=[(inputs[i : i + 1], targets[i : i + 1]) for i in (0, 1)]
    )
    frozen = classifier()
    for parameter in list(frozen.model.parameters())[:4]:
        parameter.requires_grad_(False)
    yield replace(frozen, name="frozen layers")
    single_precision = classifier()
    yield Problem("float32", single_precision.model.float(), [(inputs.float(), targets)])
    flat = nn.Linear(3, 1).double()
    _fill(flat, seed=5)
    with torch.no_grad():
        flat.bias.fill_(10.0)
    yield Problem("no curvature", flat, [(inputs[:, :3], answers)], {"loss_fn": _mean_output})


def _mean_output(model: nn.Module, batch: Any) -> Tensor:
    answer: Tensor = model(batch[0]).mean()
    return answer


def rebatched(problem: Problem) -> Iterator[Problem]:
    """The same samples in other batches."""
    inputs, targets = (torch.cat(tensors) for tensors in zip(*problem.loader, strict=True))
    backwards = torch.arange(len(targets) - 1, -1, -1)
    ragged = (5, 1, 11, len(targets) - 17)

    def cut(order: Tensor, sizes: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
        return list(zip(torch.split(inputs[order], list(sizes)), torch.split(targets[order], list(sizes)), strict=True))

    yield replace(problem, name="ragged batches", loader=cut(backwards.flip(0), ragged))
    yield replace(problem, name="samples in the opposite order", loader=cut(backwards, (len(targets),)))
    yield replace(
        problem,
        name="batches that are not kept in memory",
        loader=cut(backwards, (8, 8, len(targets) - 16)),
        settings={**problem.settings, "cache_bytes": 0},
    )


def rescaled(problem: Problem, factor: float) -> Problem:
    """The first ReLU layer times ``factor``, the next one's weights over it: the same function."""
    model: Any = copy.deepcopy(problem.model)
    first, second = model[0], model[2]
    with torch.no_grad():
        first.weight.mul_(factor)
        first.bias.mul_(factor)
        second.weight.div_(factor)
    return replace(problem, model=model)


def neurons_permuted(problem: Problem, seed: int) -> Problem:
    """The units of the first hidden layer in another order: the same function."""
    model: Any = copy.deepcopy(problem.model)
    first, second = model[0], model[2]
    order = sampling.permutation(first.out_features, sampling.generator_for(seed, "neurons"))
    with torch.no_grad():
        first.weight.copy_(first.weight[order])
        first.bias.copy_(first.bias[order])
        second.weight.copy_(second.weight[:, order])
    return replace(problem, model=model)


def normalized_scaled(problem: Problem, factor: float) -> Problem:
    """What comes before a BatchNorm times ``factor``: the same function."""
    model: Any = copy.deepcopy(problem.model)
    with torch.no_grad():
        model[0].weight.mul_(factor)
        model[0].bias.mul_(factor)
    return replace(problem, model=model)


def loss_scaled(problem: Problem, factor: float) -> Problem:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return factor * functional.cross_entropy(model(batch[0]), batch[1])

    return replace(problem, settings={**problem.settings, "loss_fn": loss})


@lru_cache(maxsize=1)
def _drawn() -> tuple[Tensor, Tensor]:
    generator = sampling.generator_for(0, "conformance data")
    like = torch.empty(0, dtype=F64)
    inputs = sampling.normal(24 * 5, generator, like).view(24, 5)
    scores = inputs[:, :CLASSES] + sampling.normal(24 * CLASSES, generator, like).view(24, CLASSES)
    return inputs, scores.argmax(1)


def _data() -> tuple[Tensor, Tensor]:
    inputs, targets = _drawn()
    return inputs.clone(), targets.clone()


def _fill(model: nn.Module, seed: int) -> None:
    generator = sampling.generator_for(seed, "conformance weights")
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            drawn = sampling.normal(parameter.numel(), generator, parameter).view_as(parameter)
            parameter.copy_(scale * drawn + (1.0 if _is_norm(model, parameter) else 0.0))


def _is_norm(model: nn.Module, parameter: Tensor) -> bool:
    return any(isinstance(module, nn.BatchNorm1d) and module.weight is parameter for module in model.modules())


@lru_cache(maxsize=1)
def _trained() -> dict[str, Tensor]:
    inputs, targets = _data()
    model = nn.Sequential(nn.Linear(5, 10), nn.ReLU(), nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, CLASSES)).double()
    _fill(model, seed=1)
    with torch.enable_grad():
        for _ in range(60):
            parameters = list(model.parameters())
            gradients = torch.autograd.grad(functional.cross_entropy(model(inputs), targets), parameters)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.sub_(0.5 * gradient)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
