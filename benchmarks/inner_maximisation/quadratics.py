"""Quadratics whose maximum over the box is known: a diagonal and one strong direction, as a model's loss.

``f(e) = scale (<slope, e> + ½ Σ d_i e_i² + ½ <v, e>²)`` over ``|e_i| <= 1``, ``v`` a Gaussian unit vector, so that the
largest eigenvalue is about 1; ``d_i = ± ratio / √dim``, so that ``ratio`` is ``trace / (λmax √dim)`` where all d_i are
positive. A sign step from zero follows the slope, which is noise; at a ratio of about 10 the diagonal then holds every
coordinate where it is (unless the noise happens to lie along v), and the strong direction is never found.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sharpness_plugins.objective import Objective

__all__ = ["Quadratic"]

GRID = 201
REFINEMENTS = 5


@dataclass(frozen=True, eq=False)
class Quadratic:
    """The vectors, shape ``(dim,)``, float32; ``scale`` makes the maximum 1 over the box of half width 1."""

    slope: Tensor
    diagonal: Tensor
    direction: Tensor
    scale: float

    @staticmethod
    def made(dim: int, ratio: float, *, negative: float = 0.0, seed: int = 0, scale: float | None = None) -> Quadratic:
        """``negative``: the share of the diagonal that is; ``scale``: where it is known (finding it takes memory)."""
        generator = torch.Generator().manual_seed(seed)
        direction = torch.randn(dim, generator=generator)
        direction /= direction.double().norm().float()
        slope = 1e-4 * torch.randn(dim, generator=generator)
        size = ratio / dim**0.5
        diagonal = torch.where(torch.rand(dim, generator=generator) < negative, -size, size)
        if scale is None:
            scale = 1 / Quadratic(slope, diagonal, direction, 1.0).maximum()
        return Quadratic(slope, diagonal, direction, scale)

    @property
    def dim(self) -> int:
        return len(self.slope)

    def value(self, e: Tensor) -> float:
        """In float64."""
        e = e.double()
        along = self.direction.double() @ e
        total = self.slope.double() @ e + 0.5 * (self.diagonal.double() @ (e * e)) + 0.5 * along * along
        return self.scale * total.item()

    def value_and_grad(self, e: Tensor) -> tuple[float, Tensor]:
        """In float32, the sums in float64; holds one vector beside the gradient."""
        along = torch.dot(self.direction, e)
        product = self.diagonal * e
        curved = torch.dot(product, e)
        value = torch.dot(self.slope, e).item() + 0.5 * curved.item() + 0.5 * along.item() ** 2
        return self.scale * value, product.add_(self.slope).add_(self.direction, alpha=along.item()).mul_(self.scale)

    def maximum(self) -> float:
        """``½ s² = max_t (t s - ½ t²)``, and for every t the best e is found coordinate by coordinate: exact but for t."""
        slope, diagonal, direction = self.slope.double(), self.diagonal.double(), self.direction.double()

        def best_given(t: float) -> float:
            pull = slope + t * direction
            interior = torch.where((diagonal < 0) & (pull.abs() < -diagonal), -pull * pull / (2 * diagonal), -torch.inf)
            return torch.maximum(pull.abs() + 0.5 * diagonal, interior).sum().item() - 0.5 * t * t

        reach = direction.abs().sum().item()
        low, high = -reach, reach
        best = -torch.inf
        for points in (GRID, *[21] * REFINEMENTS):
            grid = torch.linspace(low, high, points).tolist()
            best, t = max((best_given(t), t) for t in grid)
            width = (high - low) / (points - 1)
            low, high = t - width, t + width
        return self.scale * best

    def objective(self) -> Objective:
        """At weights of zero, so that ε is the half width."""
        return Objective(_AsModel(self), [torch.zeros(1)], loss_fn=lambda model, batch: model(batch))


class _AsModel(nn.Module):
    def __init__(self, quadratic: Quadratic) -> None:
        super().__init__()
        self.quadratic = quadratic
        self.weights = nn.Parameter(torch.zeros(quadratic.dim))

    def forward(self, batch: Tensor) -> Tensor:
        q, e = self.quadratic, self.weights
        along = torch.dot(q.direction, e)
        return q.scale * (torch.dot(q.slope, e) + 0.5 * torch.dot(q.diagonal * e, e) + 0.5 * along * along)
