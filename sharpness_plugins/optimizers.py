"""Sharpness-aware steps: the weights moved uphill for a second gradient, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .kernels import sam

__all__ = ["Ascent", "perturbed"]


@dataclass(frozen=True)
class Ascent:
    """The move that ``perturbed`` made.

    Attributes:
        norm: of the gradient that it followed (of ``T g`` where adaptive), shape ``()``, float64.
    """

    norm: Tensor

    @property
    def is_finite(self) -> Tensor:
        """Whether the weights moved, shape ``()``; a zero or non-finite gradient leaves them where they are."""
        return torch.isfinite(self.norm) & (self.norm > 0)


@contextmanager
def perturbed(
    parameters: Iterable[Tensor], rho: float, *, adaptive: bool = False, eta: float = 0.01, module: nn.Module | None = None
) -> Iterator[Ascent]:
    """Inside, the weights stand at ``w + ρ g/‖g‖`` for a second forward and backward pass; after it, at ``w`` again.

    ``g`` is what ``.grad`` holds at the beginning, over all parameters together; scaled by a ``GradScaler`` or not, the move
    is the same. ``.grad`` is None then, and holds the gradient at the perturbed weights in the end. The weights come back
    bit for bit and at their addresses, also after an exception, which brings the first gradient back, too::

        loss_fn(model, batch).backward()
        with perturbed(model.parameters(), rho=0.05, module=model):
            loss_fn(model, batch).backward()
        optimizer.step()

    Args:
        parameters: those without a gradient stay where they are.
        rho: radius of the ball.
        adaptive: ASAM's ball, in which the weights move by ``ρ T²g/‖T g‖`` with ``T = |w| + eta``.
        module: its buffers (BatchNorm's running statistics) are put back, so that a step is one forward pass to them.
    Memory: a copy of the weights, and the first gradient until the second is made.
    Cost: two passes over the weights, beside the passes over the data.
    Raises:
        ValueError: ``rho`` is negative; parameters in half precision, which a step of this size does not move; gradients
            that are sparse.
    Source: Foret et al., Sharpness-aware minimization, arXiv 2010.01412 (2021), equation 2; Kwon et al., ASAM, arXiv
        2102.11600 (2021).
    """
    if not rho >= 0:
        raise ValueError(f"rho is a radius and not negative, got {rho}")
    weights = [parameter for parameter in parameters if parameter.grad is not None]
    _check(weights)
    buffers = [] if module is None else [(buffer, buffer.clone()) for buffer in module.buffers()]
    gradients = [weight.grad for weight in weights]
    backups = [torch.empty_like(weight) for weight in weights]
    first = [gradient for gradient in gradients if gradient is not None]
    with torch.no_grad():
        norm = sam.sam_ascent_(weights, first, backups, rho, eta=eta if adaptive else None)
    for weight in weights:
        weight.grad = None
    try:
        yield Ascent(norm)
    except BaseException:
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        raise
    finally:
        with torch.no_grad():
            sam.restore_(weights, backups)
            for buffer, before in buffers:
                buffer.copy_(before)


def _check(weights: list[Tensor]) -> None:
    for weight in weights:
        if weight.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"a parameter is {weight.dtype}, in which most weights do not move by rho/‖g‖ times a gradient. Keep "
                "the parameters in float32 and train under autocast."
            )
        if weight.grad is not None and weight.grad.layout is not torch.strided:
            raise ValueError(
                f"a gradient is sparse ({weight.grad.layout}). Use dense gradients: Embedding(..., sparse=False)"
            )
