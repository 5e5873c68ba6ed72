"""Networks of the experiments."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import nn

from .training import seeded

__all__ = ["noisy_digits_network", "relu_mlp"]


def relu_mlp(widths: Sequence[int], *, seed: int, unit_variance: bool = False) -> nn.Sequential:
    """Linear layers with ReLU between them: ``widths`` from the inputs to the classes.

    The weights are those after ``torch.manual_seed(seed)``, on the CPU, so they are the same for every device; the
    caller's generators are left as they were.

    Args:
        unit_variance: weights uniform in ``±sqrt(3 / fan_in)``, of variance ``1 / fan_in``, and zero biases, instead of
            torch's own initialization, which has a third of that variance.
    """
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(f"widths must be at least two positive numbers, got {tuple(widths)}. Example: (64, 256, 10)")
    with seeded(seed):
        layers: list[nn.Module] = []
        for num_inputs, num_outputs in itertools.pairwise(widths):
            linear = nn.Linear(num_inputs, num_outputs)
            if unit_variance:
                bound = math.sqrt(3 / num_inputs)
                nn.init.uniform_(linear.weight, -bound, bound)
                nn.init.zeros_(linear.bias)
            layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def noisy_digits_network(seed: int) -> nn.Sequential:
    """The network that goes with ``digits_noisy_split``: two hidden layers of 128, 26 122 weights."""
    return relu_mlp((64, 128, 128, 10), seed=seed, unit_variance=True)
