"""What others do, each written from its published description, within an exact budget of gradients.

A peer is ``(fn, box, rng) -> None``: it asks ``fn`` for values and gradients as long as it likes. ``within`` stops it when
the budget is used and hands back the best point that it has seen, so that no peer is charged for what it did not keep.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sharpness_plugins import sampling
from sharpness_plugins.maximizers import LBFGSB, ValueAndGrad
from sharpness_plugins.regions import Box

__all__ = [
    "PYTORCH_MINIMIZE_LARGEST",
    "Peer",
    "apgd",
    "apgd_antipode",
    "apgd_random_points",
    "checkpoints",
    "has_pytorch_minimize",
    "pytorch_minimize",
    "scipy_call",
    "scipy_restarts",
    "sign_pgd",
    "sign_pgd_restarts",
    "within",
]

Peer = Callable[[ValueAndGrad, Box, torch.Generator], None]

APGD_ASCENTS = 0.75  # ρ of Croce and Hein: the share of steps that must ascend
APGD_MOMENTUM = 0.75
PYTORCH_MINIMIZE_LARGEST = 30_000  # parameters; it loops over them in Python, 12 µs each and iteration


class _BudgetUsedError(Exception):
    """Ends a peer from inside of its call of ``fn``."""


def within(peer: Peer, budget: int | None, fn: ValueAndGrad, box: Box, rng: torch.Generator) -> tuple[float, Tensor, int]:
    """The best value that ``peer`` sees in ``budget`` gradients (None: its own end), where, and how many they were."""
    best_value, best, gradients = -math.inf, torch.zeros_like(box.half_width), 0

    def counted(e: Tensor) -> tuple[float, Tensor]:
        nonlocal best_value, best, gradients
        if gradients == budget:
            raise _BudgetUsedError
        value, gradient = fn(e)
        gradients += 1
        if value > best_value:
            best_value, best = value, e.clone()
        return value, gradient

    with contextlib.suppress(_BudgetUsedError):
        peer(counted, box, rng)
    return best_value, best, gradients


def _zero(box: Box) -> Tensor:
    return torch.zeros_like(box.half_width)


def _random_point(box: Box, rng: torch.Generator) -> Tensor:
    return box.half_width * sampling.uniform(len(box.half_width), rng, box.half_width)


# ---------------------------------------------------------------------- SciPy


def scipy_call(*, iterations: int = 10, published: bool = False) -> Peer:
    """L-BFGS-B from zero; ``published``: the call of Keskar et al. (2017), else scaled and with zero tolerances."""

    def peer(fn: ValueAndGrad, box: Box, rng: torch.Generator) -> None:
        LBFGSB(max_iterations=iterations, published=published).maximize(fn, box, _zero(box))

    return peer


def scipy_restarts(*, iterations: int = 10, num_random: int = 0) -> Peer:
    """L-BFGS-B from zero, from the antipode of what that finds, then from random points, ten iterations each."""

    def peer(fn: ValueAndGrad, box: Box, rng: torch.Generator) -> None:
        solver = LBFGSB(max_iterations=iterations)
        found = solver.maximize(fn, box, _zero(box))
        solver.maximize(fn, box, -found.perturbation)
        for _ in range(num_random):
            solver.maximize(fn, box, _random_point(box, rng))

    return peer


# ---------------------------------------------------------------------- sign methods


def sign_pgd(num_gradients: int) -> Peer:
    """Sign steps from zero, of the whole half width at first and linearly less, projected onto the box."""

    def peer(fn: ValueAndGrad, box: Box, rng: torch.Generator) -> None:
        _sign_pgd(fn, box, _zero(box), num_gradients)

    return peer


def sign_pgd_restarts(num_gradients: int, *, per_start: int = 6) -> Peer:
    """The same from zero and then from random points of the box, ``per_start`` gradients each."""

    def peer(fn: ValueAndGrad, box: Box, rng: torch.Generator) -> None:
        start = _zero(box)
        for spent in range(0, num_gradients, per_start):
            _sign_pgd(fn, box, start, min(per_start, num_gradients - spent))
            start = _random_point(box, rng)

    return peer


def _sign_pgd(fn: ValueAndGrad, box: Box, start: Tensor, num_gradients: int) -> None:
    e = start
    for k in range(num_gradients):
        _, gradient = fn(e)
        step = 1 - k / num_gradients
        e = box.project(e + step * box.ascent_vertex(gradient))


# ---------------------------------------------------------------------- APGD


def checkpoints(num_steps: int) -> list[int]:
    """Where APGD may halve its step: ``p_0 = 0, p_1 = .22, p_{j+1} = p_j + max(p_j - p_{j-1} - .03, .06)`` of the steps."""
    hundredths = [0, 22]
    while (following := hundredths[-1] + max(hundredths[-1] - hundredths[-2] - 3, 6)) <= 100:
        hundredths.append(following)
    return sorted({-(-p * num_steps // 100) for p in hundredths})


def apgd(num_gradients: int, start: Tensor | None = None) -> Peer:
    """Auto-PGD with sign steps on the weights, from zero unless said: two half widths first, halved where ascent is slow.

    Source: Croce and Hein, Reliable evaluation of adversarial robustness (2020), algorithm 1, as Andriushchenko et al.,
    A modern look at the relationship between sharpness and generalization (2023), use it on weights.
    """

    def peer(fn: ValueAndGrad, box: Box, rng: torch.Generator) -> None:
        _apgd(fn, box, _zero(box) if start is None else start, num_gradients)

    return peer


def apgd_random_points(num_gradients: int, *, per_start: int) -> Peer:
    """APGD from random points of the box, ``per_start`` gradients each."""

    def peer(fn: ValueAndGrad, box: Box, rng: torch.Generator) -> None:
        for spent in range(0, num_gradients, per_start):
            _apgd(fn, box, _random_point(box, rng), min(per_start, num_gradients - spent))

    return peer


def apgd_antipode(num_gradients: int) -> Peer:
    """APGD from zero with half of the gradients, and from the antipode of what that finds with the others."""

    def peer(fn: ValueAndGrad, box: Box, rng: torch.Generator) -> None:
        half = num_gradients // 2
        best = _apgd(fn, box, _zero(box), half)
        _apgd(fn, box, -best, num_gradients - half)

    return peer


def _apgd(fn: ValueAndGrad, box: Box, start: Tensor, num_gradients: int) -> Tensor:
    num_steps = num_gradients - 1
    step = 2.0
    best_value, gradient = fn(start)
    best, best_gradient = start, gradient
    previous, e = start, start
    value = best_value
    ascents, since = 0, 0  # ``since``: the last checkpoint
    step_then, best_then = step, best_value
    stops = set(checkpoints(num_steps))
    for k in range(num_steps):
        z = box.project(e + step * box.ascent_vertex(gradient))
        if k > 0:
            z = box.project(e + APGD_MOMENTUM * (z - e) + (1 - APGD_MOMENTUM) * (e - previous))
        previous, e = e, z
        before = value
        value, gradient = fn(e)
        ascents += value > before
        if value > best_value:
            best_value, best, best_gradient = value, e, gradient
        if k + 1 in stops:
            slow = ascents < APGD_ASCENTS * (k + 1 - since)
            stuck = step == step_then and best_value == best_then
            step_then, best_then = step, best_value
            if slow or stuck:
                step /= 2
                e, value, gradient = best, best_value, best_gradient
                previous = best
            ascents, since = 0, k + 1
    return best


# ---------------------------------------------------------------------- pytorch-minimize


def pytorch_minimize(iterations: int = 10) -> Peer:
    """pytorch-minimize's ``l-bfgs-b`` from zero, on the unit box and scaled as ``LBFGSB`` scales, with zero tolerances."""
    minimize_constr = _torchmin().minimize_constr

    def peer(fn: ValueAndGrad, box: Box, rng: torch.Generator) -> None:
        first, gradient = fn(_zero(box))
        slope = (box.half_width * gradient).abs().max().item()
        scale = 100 / slope if slope > 0 else 1.0
        pending = [(first, gradient)]  # it asks for the start again

        class Negated(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, u: Tensor) -> Tensor:
                with torch.enable_grad():
                    value, gradient = pending.pop() if pending else fn(box.project(u.detach() * box.half_width))
                ctx.save_for_backward(scale * gradient * box.half_width)
                return u.new_tensor(scale * (first - value))

            @staticmethod
            def backward(ctx: Any, *seeds: Tensor) -> Tensor:
                (slopes,) = ctx.saved_tensors
                return -seeds[0] * slopes

        ones = torch.ones_like(box.half_width)
        options = {"gtol": 0.0, "ftol": 0.0, "history_size": 10}
        minimize_constr(
            Negated.apply, _zero(box), method="l-bfgs-b", bounds=(-ones, ones), max_iter=iterations, options=options
        )

    return peer


def has_pytorch_minimize() -> bool:
    return importlib.util.find_spec("torchmin") is not None


def _torchmin() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it scripts a function at import, which torch deprecates
        return importlib.import_module("torchmin")
