"""Networks of the experiments."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn

__all__ = ["relu_mlp"]


def relu_mlp(widths: Sequence[int], *, seed: int) -> nn.Sequential:
    """Linear layers with ReLU between them: ``widths`` from the inputs to the classes, torch's own initialization.

    The weights are those after ``torch.manual_seed(seed)``, on the CPU, so they are the same for every device; the
    caller's generators are left as they were.
    """
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(f"widths must be at least two positive numbers, got {tuple(widths)}. Example: (64, 256, 10)")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the accelerators too
        layers: list[nn.Module] = []
        for num_inputs, num_outputs in itertools.pairwise(widths):
            layers += [nn.Linear(num_inputs, num_outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
