"""The plugin of this package itself: what it offers, through the same hooks as a third party's. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

from .metrics import sharpness_metrics
from .registry import CouplingSpec, ScheduleSpec, SignalSpec, hookimpl

if TYPE_CHECKING:
    from .coupling import CouplingRule
    from .signals import MeterSignal

__all__ = ["sharpness_batch_schedules", "sharpness_lr_couplings", "sharpness_metrics", "sharpness_signals"]

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


def _rule(name: str) -> CouplingRule:
    from .coupling import RULES

    return RULES[name]


def _meter_signal(name: str) -> MeterSignal:
    from .signals import MeterSignal

    return MeterSignal(name)
