"""Sharpness-aware steps: SAM and its relatives around any torch optimizer.

``SharpnessAware`` is the optimizer, a ``Rule`` says how the gradient is made, ``perturbed`` is the move alone.
"""

from .closures import BatchClosure
from .core import SharpnessAware
from .making import Ascent, Uphill
from .perturbed import perturbed
from .rho import ProportionalToLearningRate
from .rules import ASAM, FSAM, GSAM, SAM, WSAM, Descent, KStepSAM, LookSAM, MomentumSAM, RandomSAM, Rule, Step

__all__ = [
    "SharpnessAware",
    "Rule",
    "SAM",
    "ASAM",
    "GSAM",
    "WSAM",
    "FSAM",
    "LookSAM",
    "MomentumSAM",
    "KStepSAM",
    "RandomSAM",
    "BatchClosure",
    "ProportionalToLearningRate",
    "Step",
    "Descent",
    "Uphill",
    "Ascent",
    "perturbed",
]
