"""Loss and accuracy between two trained networks: the paper's parametric plots."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .data import Samples, Split
from .training import EVALUATION_BATCH, Evaluation, evaluate

__all__ = ["ALPHAS", "LINES", "along_line"]

ALPHAS = tuple(-1 + step / 8 for step in range(25))  # the paper's linspace(-1, 2, 25): hits 0 and 1 exactly
LINES = ("straight", "curved")


def along_line(
    small: nn.Module,
    large: nn.Module,
    split: Split,
    *,
    alphas: Sequence[float] = ALPHAS,
    kind: str = "straight",
    batch_size: int = EVALUATION_BATCH,
) -> tuple[list[Evaluation], list[Evaluation]]:
    """On the training and on the test samples, at ``α x_l + (1-α) x_s``, or at ``sin(απ/2) x_l + cos(απ/2) x_s``.

    At 0 and 1 the weights are those of the two networks, bit for bit. Running statistics of BatchNorm, which are no weights
    and of which the variances must not become negative, are interpolated on the straight line, and not beyond its ends.

    Raises:
        ValueError: ``kind`` is not one of ``LINES``.
    """
    if kind not in LINES:
        raise ValueError(f"kind must be one of {', '.join(LINES)}, got {kind!r}")
    between = copy.deepcopy(small)
    device = next(between.parameters()).device
    halves: list[Samples] = [split.train.to(device), split.test.to(device)]
    points: tuple[list[Evaluation], list[Evaluation]] = ([], [])
    for alpha in alphas:
        between.load_state_dict(_mixed(small, large, alpha, kind))
        for half, found in zip(halves, points, strict=True):
            found.append(evaluate(between, half, batch_size=batch_size))
    return points


def _mixed(small: nn.Module, large: nn.Module, alpha: float, kind: str) -> Mapping[str, Tensor]:
    weights = {name for name, _ in small.named_parameters()}
    ends = small.state_dict(), large.state_dict()
    return {name: _mixture(ends[0][name], ends[1][name], *_shares(alpha, kind, name in weights)) for name in ends[0]}


def _shares(alpha: float, kind: str, is_weight: bool) -> tuple[float, float]:
    if not is_weight:
        alpha = min(max(alpha, 0.0), 1.0)
    if kind == "straight" or not is_weight or alpha in (0, 1):  # the cosine of a quarter turn is 6e-17
        return 1 - alpha, alpha
    return math.cos(alpha * math.pi / 2), math.sin(alpha * math.pi / 2)


def _mixture(small: Tensor, large: Tensor, small_share: float, large_share: float) -> Tensor:
    if not torch.is_floating_point(small):
        return large if large_share == 1 else small
    return (large_share * large.double() + small_share * small.double()).to(small.dtype)
