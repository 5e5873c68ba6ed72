"""The plugin of this package itself: what it offers, through the same hooks as a third party's. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

from .metrics import sharpness_metrics
from .registry import CouplingSpec, OptimizerSpec, ScheduleSpec, SignalSpec, hookimpl

if TYPE_CHECKING:
    from .coupling import CouplingRule
    from .signals import MeterSignal

__all__ = [
    "sharpness_batch_schedules",
    "sharpness_lr_couplings",
    "sharpness_metrics",
    "sharpness_optimizers",
    "sharpness_signals",
]

_SCHEDULES = {
    "fixed": ("Fixed", "one batch size"),
    "steps": ("Steps", 'batch sizes by training progress, as text: "0:256 40ep:5000"'),
    "warm_start": ("WarmStart", "a small batch first, a large one later (Keskar et al. 2017)"),
    "double": ("Double", "times two, or another factor, at equal distances"),
    "from_learning_rate": ("FromLearningRate", "grows where the learning-rate schedule decays (Smith et al. 2018; Seesaw)"),
    "noise_scale": ("NoiseScale", "follows the gradient noise scale (McCandlish et al. 2018)"),
    "norm_test": ("NormTest", "grows where gradient noise passes the norm test (Byrd et al. 2012)"),
    "inner_product_test": ("InnerProductTest", "grows where noise along the gradient does (Bollapragada et al. 2018)"),
    "sharpness_switch": ("SharpnessSwitch", "from small to large when a metric of sharpness says so, or at a deadline"),
    "then": ("Then", "one schedule, and from some point on another"),
    "max": ("Max", "the largest of several"),
    "min": ("Min", "the smallest of several"),
    "cap": ("Cap", "a schedule, up to a limit"),
    "hold": ("Hold", "a schedule that keeps each size for a while"),
    "monotone": ("Monotone", "a schedule that never goes back"),
}
_COUPLINGS = {
    "none": "the learning rate stays",
    "linear": "times the batch size, for SGD (Goyal et al. 2017)",
    "sqrt": "times its square root, for adaptive optimizers",
    "adam_sde": "square root, and the moments' memory with it (Malladi et al. 2022)",
    "momentum": "momentum in place of the learning rate (Smith et al. 2018)",
}
_OPTIMIZERS = {
    "sam": ("SAM", "the gradient uphill (Foret et al. 2021)"),
    "asam": ("ASAM", "SAM in a ball relative to the weights (Kwon et al. 2021)"),
    "gsam": ("GSAM", "SAM that lowers the surrogate gap, too (Zhuang et al. 2022)"),
    "wsam": ("WSAM", "sharpness as a weighted regularizer (Yue et al. 2023)"),
    "fsam": ("FSAM", "uphill along the batch's noise only (Li et al. 2024)"),
    "looksam": ("LookSAM", "SAM in each k-th step, its direction reused between (Liu et al. 2022)"),
    "momentum_sam": ("MomentumSAM", "one gradient per step, against the momentum (Becker et al. 2024)"),
    "k_step_sam": ("KStepSAM", "k ascents per step (projected gradient ascent)"),
    "random_sam": ("RandomSAM", "the gradient at a random point of the sphere: a baseline"),
}
_SIGNALS = {
    "gradient_noise_scale": "tr Σ / |G|² in samples, from the gradients of training",
    "gradient_variance": "tr Σ, from the gradients of training",
    "gradient_norm_squared": "|G|² without the noise, from the gradients of training",
    "inner_product_noise": "gᵀΣg / |G|⁴ in samples, from the gradients of training",
}


@hookimpl
def sharpness_batch_schedules() -> Iterable[ScheduleSpec]:
    for name, (attribute, summary) in _SCHEDULES.items():
        yield ScheduleSpec(name, f"sharpness_plugins.schedules:{attribute}", summary)


@hookimpl
def sharpness_signals() -> Iterable[SignalSpec]:
    for name, summary in _SIGNALS.items():
        yield SignalSpec(name, partial(_meter_signal, name), summary)


@hookimpl
def sharpness_lr_couplings() -> Iterable[CouplingSpec]:
    for name, summary in _COUPLINGS.items():
        yield CouplingSpec(name, partial(_rule, name), summary)
    yield CouplingSpec(
        "adascale", "sharpness_plugins.coupling:AdaScale", "by the gain that the noise scale allows (AdaScale)"
    )


@hookimpl
def sharpness_optimizers() -> Iterable[OptimizerSpec]:
    for name, (attribute, summary) in _OPTIMIZERS.items():
        yield OptimizerSpec(name, f"sharpness_plugins.optimizers:{attribute}", summary)


def _rule(name: str) -> CouplingRule:
    from .coupling import RULES

    return RULES[name]


def _meter_signal(name: str) -> MeterSignal:
    from .signals import MeterSignal

    return MeterSignal(name)
