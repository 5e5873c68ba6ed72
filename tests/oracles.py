"""Problems whose answers are known in closed form, as a model, a loader and a loss function."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sharpness_plugins import sampling
from sharpness_plugins.objective import Objective


@contextlib.contextmanager
def preserved_rng(device: torch.device, holders: Iterable[Any] = ()) -> Iterator[None]:
    restore = sampling.rng_states(device, holders)
    try:
        yield
    finally:
        restore()


DIAGONAL = (100.0, 10.0, 1.0, 0.1, 0.0, 5.0)
WEIGHTS = (0.5, -2.0, 0.0, 3.0, 1.0, -0.1)


class Point(nn.Module):
    """A model that is its parameter vector; the loss is whatever the loss function makes of it."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weights.clone())

    def forward(self) -> Tensor:
        return self.weight


def objective_of(loss: Callable[[Tensor], Tensor], weights: Tensor) -> Objective:
    """``f(w) = loss(w)``, with one dummy sample."""
    return Objective(Point(weights), [torch.zeros(1)], loss_fn=lambda model, batch: loss(model()))


def quadratic(matrix: Tensor, weights: Tensor, *, minimum: Tensor, offset: float, scale: float = 1.0) -> Objective:
    """``scale * (offset + ½ (w - minimum)ᵀ matrix (w - minimum))``."""

    def loss(w: Tensor) -> Tensor:
        d = w - minimum
        return scale * (offset + 0.5 * d @ matrix @ d)

    return objective_of(loss, weights)


def diagonal_box_gain(h: Tensor, slope: Tensor, half_width: Tensor) -> float:
    """``max Σ g t + ½ h t²`` over ``|t| <= b``: each coordinate at a bound, or inside where it is concave enough."""
    inner = torch.where(h < 0, slope.abs() / h.abs().clamp_min(1e-300), torch.inf)
    t = torch.minimum(half_width, inner)
    return (slope.abs() * t + 0.5 * h * t * t).sum().item()


def orthogonal(dim: int, seed: int) -> Tensor:
    q, _ = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    return q


def with_spectrum(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """A dense symmetric matrix ``Q diag(λ) Qᵀ``."""
    q = orthogonal(len(eigenvalues), seed)
    return (q * eigenvalues) @ q.T


@dataclass(frozen=True)
class Classification:
    """A network, its data, and the dense Hessian by another road than the library's."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor

    def loader(self, *sizes: int) -> list[tuple[Tensor, Tensor]]:
        """Batches of these sizes; the last one takes what is left."""
        sizes = sizes or (len(self.inputs),)
        used = sum(sizes[:-1])
        parts = [*sizes[:-1], len(self.inputs) - used]
        return list(zip(torch.split(self.inputs, parts), torch.split(self.targets, parts), strict=True))

    def flat_loss(self) -> Callable[[Tensor], Tensor]:
        """Mean cross-entropy as a function of the flat weights, by hand and in one batch."""
        names = [name for name, _ in self.model.named_parameters()]
        shapes = [p.shape for p in self.model.parameters()]
        state: dict[str, Any] = dict(self.model.named_buffers())

        def loss(flat: Tensor) -> Tensor:
            pieces = flat.split([shape.numel() for shape in shapes])
            weights = {name: piece.view(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}
            logits = torch.func.functional_call(self.model, {**state, **weights}, (self.inputs,))
            return nn.functional.cross_entropy(logits, self.targets)

        return loss

    def flat_weights(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()])

    def dense_hessian(self) -> Tensor:
        hessian: Tensor = torch.autograd.functional.hessian(self.flat_loss(), self.flat_weights())
        return hessian


def small_classifier(
    dtype: torch.dtype = torch.float64, activation: type[nn.Module] = nn.Tanh, *, num_samples: int = 20
) -> Classification:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 3)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    inputs = torch.randn(num_samples, 4, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, 3, (num_samples,), generator=generator)
    return Classification(model.eval(), inputs, targets)
