"""The second pass of a sharpness-aware step without an optimizer: the weights moved uphill, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .buffers import buffers_of
from .making import Ascent, Making
from .rules import ASAM, SAM

__all__ = ["perturbed"]


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
    weights = list(parameters)
    modules = [] if module is None else [module]
    making = Making(
        rule=ASAM(eta=eta) if adaptive else SAM(),
        parameters=weights,
        radii=[rho] * len(weights),
        index=0,
        state={},
        scale=torch.ones(()),
        momentum=lambda _: None,
        noise=list,
        undo=lambda: buffers_of(modules),
        rewind=None,
        group=None,
        is_local=False,
    )
    with making.ascent(0) as ascent:
        yield ascent
