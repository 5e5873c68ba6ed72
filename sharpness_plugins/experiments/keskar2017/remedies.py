"""The paper's attempts to mend large-batch training, as steps of a ``Run``; and SAM, which came of the last of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import did_you_mean
from ...optimizers import perturbed
from ..training import Step, plain_step

__all__ = ["REMEDIES", "Adversarial", "Augmentation", "Conservative", "SharpnessAware", "step_for"]


@dataclass(frozen=True)
class Augmentation:
    """Each image turned, sheared and moved at random, and mirrored where that shows the same; then a plain step.

    The paper names translation, rotation, shear and flips, without amounts.

    Args:
        image: (channels, height, width); flat samples are turned into images and back.
        degrees, shear, shift: the largest rotation, shear (as a slope) and translation (as a share of the side), uniform.
    """

    image: tuple[int, int, int]
    flips: bool = False
    degrees: float = 10.0
    shear: float = 0.1
    shift: float = 0.1

    def __call__(self, model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, labels: Tensor) -> Tensor:
        return plain_step(model, optimizer, self.augmented(inputs), labels)

    def augmented(self, inputs: Tensor) -> Tensor:
        """Drawn from torch's default generator, on the CPU, so that devices agree."""
        count = len(inputs)
        angle, slope, right, down = (torch.rand(4, count) * 2 - 1).to(inputs.device)
        angle, slope = angle * math.radians(self.degrees), slope * self.shear
        cosine, sine = angle.cos(), angle.sin()
        mirror = torch.ones_like(angle)
        if self.flips:
            mirror = (torch.randint(0, 2, (count,)) * 2 - 1).to(inputs)
        rows = [
            torch.stack([cosine * mirror, slope - sine, 2 * self.shift * right], dim=1),
            torch.stack([sine * mirror, cosine, 2 * self.shift * down], dim=1),
        ]
        images = inputs.reshape(count, *self.image)
        grid = functional.affine_grid(torch.stack(rows, dim=1).to(inputs), [count, *self.image], align_corners=False)
        return functional.grid_sample(images, grid, align_corners=False).reshape(inputs.shape)


@dataclass(frozen=True)
class Conservative:
    """The proximal step ``argmin f_B(w) + λ/2 ‖w - w_k‖²`` on each batch, by a few steps of the optimizer.

    Args:
        strength: λ.
        iterations: steps of the optimizer for each batch, which the counts of steps do not see.
    Source: Li et al., Efficient mini-batch training for stochastic optimization (2014). The paper's λ and number of
        iterations are these, as remembered, not as read.
    """

    strength: float = 1e-3
    iterations: int = 3

    def __call__(self, model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, labels: Tensor) -> Tensor:
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        anchors = [weight.detach().clone() for weight in weights]
        first: Tensor | None = None
        for _ in range(self.iterations):
            loss = functional.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            for weight, anchor in zip(weights, anchors, strict=True):
                if weight.grad is not None:
                    weight.grad.add_(weight.detach() - anchor, alpha=self.strength)
            optimizer.step()
            first = loss.detach() if first is None else first
        assert first is not None
        return first


@dataclass(frozen=True)
class Adversarial:
    """A step on the mean of the loss of each batch and that of its adversarial examples, the inputs moved by ``±size``.

    Source: Goodfellow et al., Explaining and harnessing adversarial examples, arXiv 1412.6572 (2015), whose share is a half.
    """

    size: float = 0.05
    share: float = 0.5

    def __call__(self, model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, labels: Tensor) -> Tensor:
        moved = inputs.detach().clone().requires_grad_()
        loss = functional.cross_entropy(model(moved), labels)
        optimizer.zero_grad()
        torch.autograd.backward((1 - self.share) * loss)
        assert moved.grad is not None
        worse = inputs + self.size * moved.grad.sign()
        torch.autograd.backward(self.share * functional.cross_entropy(model(worse), labels))
        optimizer.step()
        return loss.detach()


@dataclass(frozen=True)
class SharpnessAware:
    """A step along the gradient taken ``rho`` uphill; the loss returned is that before it.

    Source: Foret et al., Sharpness-aware minimization, arXiv 2010.01412 (2021).
    """

    rho: float = 0.05

    def __call__(self, model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, labels: Tensor) -> Tensor:
        loss = functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        with perturbed(model.parameters(), self.rho, module=model):
            torch.autograd.backward(functional.cross_entropy(model(inputs), labels))
        optimizer.step()
        return loss.detach()


Maker = Callable[["tuple[int, int, int] | None", bool], "Step | None"]
REMEDIES: dict[str, Maker] = {
    "augmentation": lambda image, flips: None if image is None else Augmentation(image, flips),
    "conservative": lambda image, flips: Conservative(),
    "adversarial": lambda image, flips: Adversarial(),
    "sam": lambda image, flips: SharpnessAware(),
}


def step_for(remedy: str, *, image: tuple[int, int, int] | None, flips: bool) -> Step | None:
    """The step of a remedy, ``plain_step`` for none; None where the data do not allow it: only images are augmented.

    Raises:
        ValueError: no such remedy.
    """
    if not remedy:
        return plain_step
    if remedy not in REMEDIES:
        raise ValueError(f"there is no remedy {remedy!r}.{did_you_mean(remedy, REMEDIES)} Remedies: {', '.join(REMEDIES)}")
    return REMEDIES[remedy](image, flips)
