"""What the built-in metrics claim of their numbers; ``testing.check_metric`` holds them to it."""

from __future__ import annotations

__all__ = ["OF_THE_BOX", "of_curvature"]

OF_THE_BOX = frozenset({"neuron_permutation"})
_ADAPTIVE = frozenset({"layer_rescaling", "batch_norm_scaling"})


def of_curvature(adaptive: bool, loss: str | None = "loss_scaling") -> frozenset[str]:
    """Of a curvature matrix, or of ``D H D`` with ``D = diag |w|``, which no rescaling of weights moves."""
    claims = frozenset({"neuron_permutation"}) | (_ADAPTIVE if adaptive else frozenset())
    return claims if loss is None else claims | {loss}
