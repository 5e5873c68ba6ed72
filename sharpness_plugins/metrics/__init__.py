"""The built-in metrics, offered through the same hook as a third party's. Importing this module imports no torch."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..registry import MetricSpec, hookimpl

if TYPE_CHECKING:
    from .epsilon_box import EpsilonBox
    from .hessian import HessianTopK
    from .random_subspace import RandomSubspace

__all__ = ["EpsilonBox", "HessianTopK", "RandomSubspace"]

_HOME = {"EpsilonBox": "epsilon_box", "HessianTopK": "hessian", "RandomSubspace": "random_subspace"}


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


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
