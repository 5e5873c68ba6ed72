"""The built-in metrics, offered through the same hook as a third party's. Importing this module imports no torch."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..registry import MetricSpec, hookimpl

if TYPE_CHECKING:
    from .bottom import HessianBottom
    from .density import SpectralDensity
    from .eigenpairs import AdaptiveTopK, GaussNewtonTopK
    from .epsilon_box import EpsilonBox
    from .hessian import HessianTopK
    from .noise_scale import GradientNoiseScale
    from .preconditioned import PreconditionedTopK
    from .random_subspace import RandomSubspace
    from .trace import FisherTrace, GaussNewtonTrace, HessianFrobenius, HessianTrace

__all__ = [
    "AdaptiveTopK",
    "EpsilonBox",
    "FisherTrace",
    "GaussNewtonTopK",
    "GaussNewtonTrace",
    "GradientNoiseScale",
    "HessianBottom",
    "HessianFrobenius",
    "HessianTopK",
    "HessianTrace",
    "PreconditionedTopK",
    "RandomSubspace",
    "SpectralDensity",
]

_HOME = {
    "EpsilonBox": "epsilon_box",
    "GradientNoiseScale": "noise_scale",
    "HessianTopK": "hessian",
    "RandomSubspace": "random_subspace",
    "HessianBottom": "bottom",
    "SpectralDensity": "density",
    "PreconditionedTopK": "preconditioned",
    **dict.fromkeys(("AdaptiveTopK", "GaussNewtonTopK"), "eigenpairs"),
    **dict.fromkeys(("FisherTrace", "GaussNewtonTrace", "HessianFrobenius", "HessianTrace"), "trace"),
}


@hookimpl
def sharpness_metrics() -> Iterable[MetricSpec]:
    yield MetricSpec(
        "epsilon_box",
        f"{__name__}.epsilon_box:EpsilonBox",
        "worst rise of the loss in a box of half width ε(|w|+1), % (Keskar et al. 2017)",
    )
    yield MetricSpec(
        "random_subspace",
        f"{__name__}.random_subspace:RandomSubspace",
        "the same in random subspaces of 100 dimensions, mean over draws, %",
    )
    yield MetricSpec(
        "hessian_topk",
        f"{__name__}.hessian:HessianTopK",
        "largest eigenvalues of the Hessian, by Lanczos, with residuals",
    )
    yield MetricSpec(
        "hessian_bottom",
        f"{__name__}.bottom:HessianBottom",
        "bounds of the smallest eigenvalue of the Hessian, or itself",
    )
    yield MetricSpec(
        "hessian_trace",
        f"{__name__}.trace:HessianTrace",
        "trace of the Hessian and of its layers, with standard errors",
    )
    yield MetricSpec(
        "hessian_frobenius",
        f"{__name__}.trace:HessianFrobenius",
        "Frobenius norm of the Hessian, with a standard error",
    )
    yield MetricSpec(
        "spectral_density",
        f"{__name__}.density:SpectralDensity",
        "distribution of the eigenvalues of the Hessian, and their root mean square",
    )
    yield MetricSpec(
        "gauss_newton_topk",
        f"{__name__}.eigenpairs:GaussNewtonTopK",
        "largest eigenvalues of the Gauss–Newton matrix (for cross-entropy, of the Fisher matrix)",
    )
    yield MetricSpec(
        "gauss_newton_trace",
        f"{__name__}.trace:GaussNewtonTrace",
        "trace of the Gauss–Newton matrix, with a standard error",
    )
    yield MetricSpec(
        "fisher_trace",
        f"{__name__}.trace:FisherTrace",
        "trace of the Fisher matrix, with the model's labels or those of the data",
    )
    yield MetricSpec(
        "adaptive_topk",
        f"{__name__}.eigenpairs:AdaptiveTopK",
        "largest eigenvalues of the Hessian scaled by |w| on both sides",
    )
    yield MetricSpec(
        "preconditioned_topk",
        f"{__name__}.preconditioned:PreconditionedTopK",
        "largest eigenvalues of the Hessian as an optimizer sees it, and its edge-of-stability ratio",
    )
    yield MetricSpec(
        "gradient_noise_scale",
        f"{__name__}.noise_scale:GradientNoiseScale",
        "batch size whose gradient noise is as long as its gradient, in samples, with a standard error",
    )


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
