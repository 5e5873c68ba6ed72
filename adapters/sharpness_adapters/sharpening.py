"""``SharpnessAware`` around an optimizer that a trainer steps: what is asked for, and where its state lies."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sharpness_plugins.optimizers import ProportionalToLearningRate, Rule, SharpnessAware
from sharpness_plugins.optimizers.rho import radius
from sharpness_plugins.registry import get_rule
from sharpness_plugins.texts import name_and_settings

__all__ = ["STATE", "Radius", "Sharpening"]

STATE = "sharpness_aware"
"""The key in the first group of a saved optimizer, which any trainer's checkpoints hold, of what the rule remembers."""

Radius = float | Callable[[int], float] | ProportionalToLearningRate
_FIRST_PASS = ("m", "perturb", "replay_rng")


@dataclass(frozen=True)
class Sharpening:
    """Which gradients an optimizer is to get, known before there is one.

    Attributes:
        rho: None for the rule's own.
    """

    rule: Rule
    rho: Radius | None = None
    interval: int = 1
    seed: int = 0

    @classmethod
    def read(
        cls, rule: str | Rule, rho: Radius | None = None, interval: int = 1, *, adaptive: bool = False, eta: float = 0.01
    ) -> Sharpening:
        """From what a callback is told.

        Args:
            rule: as ``create_optimizer`` takes it, ``"gsam:alpha=0.3"``, with ``rho``, ``interval`` and ``seed`` among its
                settings if need be; or a ``Rule``.
            adaptive, eta: short for the rule ``asam:eta=...``.
        Raises:
            ValueError, TypeError: settings that do not fit, or those of a first pass, which trainers make themselves.
            UnknownNameError: there is no such rule.
        """
        if adaptive:
            if rule != "sam":
                raise ValueError(
                    f'adaptive=True is short for rule="asam", and rule={rule!r} was given too. Leave one of them out'
                )
            rule = get_rule("asam", eta=eta)
        settings: dict[str, Any] = {}
        if isinstance(rule, str):
            name, given = name_and_settings(rule)
            if refused := [key for key in _FIRST_PASS if key in given]:
                raise ValueError(
                    f"{refused[0]}={given[refused[0]]!r} says how a step's first pass is made, which the trainer has made "
                    "already when the rule gets to see it. Write the loop yourself, with SharpnessAware.step(closure)"
                )
            settings = {key: given.pop(key) for key in ("rho", "interval", "seed") if key in given}
            rule = get_rule(name, **given)
        for key, value, absent in (("rho", rho, None), ("interval", interval, 1)):
            if value != absent:
                if key in settings:
                    raise ValueError(
                        f"{key}={value!r} was given, and {key}={settings[key]!r} with the rule. Leave one of them out"
                    )
                settings[key] = value
        return cls(rule, **settings)

    def __post_init__(self) -> None:
        if not isinstance(self.rule, Rule):
            raise TypeError(f'rule is a name such as "sam", or an instance such as SAM(); got {self.rule!r}')
        if isinstance(self.rho, (int, float)):
            radius(self.rho, 0, {})
        elif not (self.rho is None or callable(self.rho) or isinstance(self.rho, ProportionalToLearningRate)):
            raise TypeError(f"rho is a number, a function of the step or a ProportionalToLearningRate, got {self.rho!r}")
        if not (isinstance(self.interval, int) and self.interval >= 1):
            raise ValueError(f"interval is a number of steps, at least 1, got {self.interval!r}")

    @property
    def looks_at_first(self) -> bool:
        """Whether more than the direction of the first gradient counts, so that it must not have been clipped."""
        return type(self.rule).combine is not Rule.combine or not self.rule.is_linear

    @property
    def follows_gradient(self) -> bool:
        """Whether the norm of what an ascent followed is that of the gradient, in each step."""
        return type(self.rule).direction is Rule.direction and self.rule.every == self.interval == 1

    def around(self, optimizer: Optimizer, model: nn.Module | None, *, scaler: Any = None) -> SharpnessAware:
        """The core around an optimizer that goes on being stepped, saved and loaded by whoever does so.

        Its saved state has that of the rule in it from here on, and what was saved with the state that it has, or will be
        given, is taken up.
        """
        _pop_radii(optimizer)
        sharp = SharpnessAware(
            optimizer, self.rule, rho=self.rho, interval=self.interval, seed=self.seed, model=model, scaler=scaler
        )
        held = weakref.ref(sharp)  # the optimizer may live longer

        def saved(_: Optimizer, state: dict[str, Any]) -> None:
            if (mine := held()) is not None:
                state["param_groups"][0][STATE] = mine.added_state()

        def loaded(optimizer: Optimizer) -> None:
            if (mine := held()) is not None:
                _pop_radii(optimizer)
                mine.load_added_state(optimizer.param_groups[0].pop(STATE, None))

        optimizer.register_state_dict_post_hook(saved)
        optimizer.register_load_state_dict_post_hook(loaded)
        if (found := optimizer.param_groups[0].pop(STATE, None)) is not None:
            sharp.load_added_state(found)
        return sharp


def _pop_radii(optimizer: Optimizer) -> None:
    """Those that came with a checkpoint; the radius is an argument, as the rule is."""
    for group in optimizer.param_groups:
        if group.get("rho_is_own") is False:
            del group["rho"], group["rho_is_own"]
