"""A complete record of invented numbers, for tests of what reads one: two seeds, every study, curve and trajectory."""

from __future__ import annotations

import math

from sharpness_plugins.experiments.keskar2017.record import (
    EPSILONS,
    SOLVERS,
    SPACES,
    BoxValue,
    Condition,
    Cone,
    Curvature,
    Curve,
    Problem,
    Record,
    TrainedNetwork,
    Trajectory,
    TrajectoryPoint,
)
from sharpness_plugins.experiments.recipes import Recipe
from sharpness_plugins.experiments.training import Evaluation

SMALL, LARGE, WARM = Recipe(16), Recipe(500), Recipe(400, 12, 8)
SEEDS = (0, 1)


def example_record() -> Record:
    studies = example_studies()
    conditions = list(dict.fromkeys(condition for roles in studies.values() for condition in roles.values()))
    alphas = tuple(-1 + step / 8 for step in range(25))
    return Record(
        settings={"network": "R", "data": "digits", "seeds": [0, 1]},
        command="sharpness reproduce keskar2017 --seeds 2",
        versions={"python": "3.12.0", "torch": "2.6.0", "device": "cpu"},
        problems={
            "main": Problem("R", "ReLU network 64-256x4-10", "none", 216586, "digits", "ab" * 32, 500, 1297, 10),
            "warm_start": Problem("A", "ReLU network 64-128x2-10", "none", 26122, "digits-noisy", "cd" * 32, 800, 800, 10),
        },
        studies=studies,
        all_networks=tuple(_network(seed, condition) for condition in conditions for seed in SEEDS),
        curves=tuple(_curve(kind, alphas) for kind in ("straight", "curved")),
        trajectories=(
            *(_trajectory("sharpness_against_loss", role, "main", seed) for role in ("small", "large") for seed in SEEDS),
            *(_trajectory("warm_start", "small", "warm_start", seed) for seed in SEEDS),
        ),
        large_eigenvalue=0.5,
        near_zero=1e-3,
        sentences=("The large batch is sharper at matched loss in 2 of 2 seeds: as in the paper.",),
    )


def example_studies() -> dict[str, dict[str, Condition]]:
    def pair(ending: str, rate: float = 1e-3) -> dict[str, Condition]:
        return {"small": Condition("main", SMALL, 1e-3, ending), "large": Condition("main", LARGE, rate, ending)}

    warm = {
        "small": Condition("warm_start", Recipe(8), 1e-3, "loss:0.005"),
        "cold": Condition("warm_start", Recipe(400), 1e-3, "loss:0.005"),
        "12": Condition("warm_start", WARM, 1e-3, "loss:0.005"),
    }
    matched = pair("epoch_loss:0.002")
    remedies = ("augmentation", "conservative", "adversarial", "sam")
    return {
        "protocol": pair("plateau:10"),
        "matched_loss": matched,
        "equal_updates": pair("steps:640"),
        "linear_rate": pair("epoch_loss:0.002", 0.03125),
        "sqrt_rate": pair("epoch_loss:0.002", 0.00559),
        "batch_sizes": {str(b): Condition("main", Recipe(b), 1e-3, "epochs:100") for b in (16, 50, 500)},
        "batch_sizes_matched": {str(b): Condition("main", Recipe(b), 1e-3, "epoch_loss:0.002") for b in (16, 50, 500)},
        "warm_start": warm,
        "remedies": {
            "small": matched["small"],
            "none": matched["large"],
            **{remedy: Condition("main", LARGE, 1e-3, "epoch_loss:0.002", remedy) for remedy in remedies},
        },
    }


def _network(seed: int, condition: Condition) -> TrainedNetwork:
    large = condition.recipe.batch_size >= 400
    worst = (320.0 if large else 40.0) * (1 + seed) * (0.5 if condition.remedy or condition.recipe.is_warm else 1.0)
    return TrainedNetwork(
        seed,
        condition,
        epochs=100 if large else 20,
        steps=100 if large else 640,
        samples=50_000 if large else 10_000,
        warm_steps=100 * condition.recipe.warm_epochs,
        epoch_loss=0.002,
        ended=True,
        train=Evaluation(0.0018, 1.0),
        test=Evaluation(0.21, 0.94 if large else 0.95),
        distance=5.0 if large else 10.0,
        boxes=tuple(_box(space, epsilon, solver, worst) for space in SPACES for epsilon in EPSILONS for solver in SOLVERS),
        curvature=Curvature(
            eigenvalues=(10.0, 5.0) if large else (2.5, 1.0),
            residuals=(1e-3, 1e-3),
            converged=True,
            nodes=(0.0, 0.1, 1.0),
            weights=(0.9, 0.09, 0.01),
            grid=(-1.0, 0.0, 1.0, 2.0),
            density=(0.0, 0.9, 0.1, 0.0),
            density_error=(0.0, 0.01, 0.01, 0.0),
            width=0.5,
            dim=1000,
        ),
        cone=Cone(0.47, random_rises=(0.01,) * 20, top_rises=(30.0, 5.0, 0.4, 0.1), steep=1.0),
    )


def _box(space: str, epsilon: float, solver: str, worst: float) -> BoxValue:
    value = worst * (epsilon / 1e-3) ** 2 * (0.05 if space == "subspace" else 1.0)
    if solver == "published" and worst < 100:
        return BoxValue(space, epsilon, solver, 0.0, None, "not converged", "It stopped where it started", 1.0)
    error = 0.1 * value if space == "subspace" else None
    kind = "estimate" if space == "subspace" else "lower bound"
    return BoxValue(space, epsilon, solver, value, error, kind, "the best of several starts", 24.0)


def _curve(kind: str, alphas: tuple[float, ...]) -> Curve:
    train = tuple(Evaluation(0.0018 + 4 * (alpha * (1 - alpha)) ** 2, 1 / (1 + abs(alpha))) for alpha in alphas)
    test = tuple(Evaluation(point.loss + 0.2, 0.95 * point.accuracy) for point in train)
    return Curve(kind, "matched_loss", 0, alphas, train, test)


def _trajectory(purpose: str, role: str, problem: str, seed: int) -> Trajectory:
    points = tuple(
        TrajectoryPoint(
            epochs=epochs,
            steps=32 * epochs,
            train=Evaluation(2.3 / (1 + epochs) ** 2, 1 - 0.9 / (1 + epochs)),
            test=Evaluation(2.3 / (1 + epochs), 0.95 - 0.8 / (1 + epochs)),
            distance=float(epochs),
            sharpness=math.nan if purpose == "warm_start" else 10.0 * epochs * (8 if role == "large" else 1),
        )
        for epochs in (0, 1, 2, 5, 12)
    )
    return Trajectory(purpose, role, problem, {"small": 16, "large": 500}[role], seed, points)
