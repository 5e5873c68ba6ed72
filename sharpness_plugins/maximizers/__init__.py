"""Solvers of the inner maximisation ``max f(e), e in region``: every answer is the best point seen, a lower bound."""

from __future__ import annotations

from .ascent import (
    AlongGradient,
    AlongSign,
    Ascent,
    Backtracking,
    Direction,
    Halving,
    Spectral,
    StepRule,
    ToVertex,
    apgd,
    spectral_projected_gradient,
)
from .core import BestSoFar, Maximizer, Maximum, Proposals, ValueAndGrad
from .lbfgsb import LBFGSB
from .parking import Parked, from_tree, park, to_tree, unpark
from .starts import MultiStart

__all__ = [
    "AlongGradient",
    "AlongSign",
    "Ascent",
    "Backtracking",
    "BestSoFar",
    "Direction",
    "Halving",
    "LBFGSB",
    "Maximizer",
    "Maximum",
    "MultiStart",
    "Parked",
    "Proposals",
    "Spectral",
    "StepRule",
    "ToVertex",
    "ValueAndGrad",
    "apgd",
    "from_tree",
    "maximizer_named",
    "park",
    "spectral_projected_gradient",
    "to_tree",
    "unpark",
]

_NAMED: dict[str, Maximizer] = {
    "sign_frank_wolfe": MultiStart(),
    "apgd": apgd(),
    "spectral_projected_gradient": spectral_projected_gradient(),
    "lbfgsb": LBFGSB(),
    "lbfgsb_published": LBFGSB(published=True),
}


def maximizer_named(name: str) -> Maximizer:
    """A solver by its name.

    ``sign_frank_wolfe`` (the default: several starts, 24 gradients), ``apgd`` and ``spectral_projected_gradient`` (one
    start, 24 gradients), ``lbfgsb`` (SciPy's, scaled), ``lbfgsb_published`` (SciPy's, as the paper calls it).

    Raises:
        ValueError: no such name.
    """
    if name not in _NAMED:
        raise ValueError(f"maximizer must be one of {', '.join(_NAMED)}, or a maximizer object, got {name!r}")
    return _NAMED[name]
