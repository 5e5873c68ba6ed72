"""A problem is a network and an ε: maximize the loss over ``|e_i| <= ε (|w_i| + 1)``."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpness_plugins.objective import Objective
from sharpness_plugins.regions import Box

from .networks import Network, Recipe, half_named, network

__all__ = ["EPSILONS", "Problem", "check_answer", "problems_of"]

EPSILONS = (5e-4, 1e-3, 5e-3)
VALUE_TOLERANCE = 1e-5
BOX_TOLERANCE = 1e-6  # relative: SciPy's float64 bounds, rounded


@dataclass(frozen=True)
class Problem:
    """One inner maximisation; networks and objectives are made when first asked for, and shared by its ε."""

    recipe: Recipe
    epsilon: float

    @property
    def name(self) -> str:
        return f"{self.recipe.name}@{self.epsilon:g}"

    @property
    def network(self) -> Network:
        return network(self.recipe)

    @property
    def objective(self) -> Objective:
        return _objective(self.recipe)

    @property
    def box(self) -> Box:
        """As ``EpsilonBox`` makes it: of the float32 weights, in float32."""
        return Box(self.epsilon * (self.objective.origin.abs() + 1))

    @property
    def origin_loss(self) -> float:
        """In plain torch, as every value that is compared."""
        return self.network.loss_at(torch.zeros_like(self.objective.origin))


@functools.cache
def _objective(recipe: Recipe) -> Objective:
    made = network(recipe)
    return Objective(made.model, [(made.inputs, made.targets)], criterion=made.criterion)


def problems_of(half: str) -> list[Problem]:
    """Every network of a half at every ε."""
    return [Problem(recipe, epsilon) for recipe in half_named(half) for epsilon in EPSILONS]


def check_answer(problem: Problem, claimed: float, perturbation: Tensor) -> float:
    """The loss at ``perturbation`` by plain torch, after checking that the answer is one.

    Raises:
        AssertionError: the point leaves the box, or its loss is not the claimed one.
    """
    half_width = problem.box.half_width
    if perturbation.shape != half_width.shape or not bool(torch.isfinite(perturbation).all()):
        raise AssertionError(f"{problem.name}: a perturbation of shape {tuple(perturbation.shape)} is not a finite point")
    excess = (perturbation.abs() / half_width).max().item() - 1
    if excess > BOX_TOLERANCE:
        raise AssertionError(f"{problem.name}: the perturbation leaves the box by {excess:.2g} of its half width")
    value = problem.network.loss_at(perturbation)
    if not math.isclose(value, claimed, rel_tol=VALUE_TOLERANCE, abs_tol=1e-8):
        raise AssertionError(f"{problem.name}: the loss there is {value:.9g}, and {claimed:.9g} was claimed")
    return value
