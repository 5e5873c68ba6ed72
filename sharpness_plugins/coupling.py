"""The learning rate and momentum that belong to another batch size, and schedulers that count samples.

``kappa`` is the batch size over the one that the learning rate was tuned for. The factors are applied inside
``optimizer.step()`` only, so that schedulers and checkpoints see the values that they know: multiplying ``lr`` in
``param_groups`` is undone by 3 of 9 torch schedulers, ``initial_lr`` by 7 of 9.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from .errors import did_you_mean
from .schedules.core import Signal

__all__ = [
    "RULES",
    "AdaScale",
    "CouplingRule",
    "LearningRateCoupling",
    "Multipliers",
    "SampleHorizon",
    "adam_sde",
    "counts_steps",
    "default_rule",
    "linear",
    "momentum",
    "none",
    "sqrt",
]


@dataclass(frozen=True)
class Multipliers:
    """Factors for the settings of an optimizer during its step; a mean's memory never falls below none at all.

    Attributes:
        one_minus_beta1: of the first moment, ``betas[0]``.
        one_minus_beta2: of the second moment: ``betas[1]`` and following, or RMSprop's ``alpha``.
        one_minus_momentum: of the heavy ball, ``momentum``.
        epsilon: of the guard in the denominator, ``eps``.
    """

    learning_rate: float = 1.0
    one_minus_beta1: float = 1.0
    one_minus_beta2: float = 1.0
    one_minus_momentum: float = 1.0
    epsilon: float = 1.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be multiplied by something positive and finite, got {value}")


CouplingRule: TypeAlias = Callable[[float, Mapping[str, Signal]], "Multipliers | None"]
"""``kappa, signals -> Multipliers``, pure; None where a signal that it needs is not known."""


def none(kappa: float, signals: Mapping[str, Signal]) -> Multipliers:
    """The learning rate stays."""
    return Multipliers()


def linear(kappa: float, signals: Mapping[str, Signal]) -> Multipliers:
    """``lr * kappa``: SGD's noise ``lr / B`` stays. Source: Goyal et al., arXiv 1706.02677 (2017)."""
    return Multipliers(learning_rate=kappa)


def sqrt(kappa: float, signals: Mapping[str, Signal]) -> Multipliers:
    """``lr * sqrt(kappa)``, for adaptive optimizers. Source: Granziol et al., JMLR 23 (2022); timm's train.py does so."""
    return Multipliers(learning_rate=math.sqrt(kappa))


def adam_sde(kappa: float, signals: Mapping[str, Signal]) -> Multipliers:
    """Keeps the stochastic differential equation that Adam and RMSprop discretize.

    ``lr sqrt(kappa)``, ``1 - beta -> kappa (1 - beta)`` with ``beta >= 0``, ``eps / sqrt(kappa)``.
    Source: Malladi et al., On the SDEs and scaling rules for adaptive gradient algorithms, arXiv 2205.10287 (2022).
    """
    root = math.sqrt(kappa)
    return Multipliers(learning_rate=root, one_minus_beta1=kappa, one_minus_beta2=kappa, epsilon=1 / root)


def momentum(kappa: float, signals: Mapping[str, Signal]) -> Multipliers:
    """SGD's noise ``lr / (B (1 - momentum))`` stays: ``1 - momentum -> (1 - momentum) / kappa``, and ``lr`` as it is.

    Source: Smith et al., Don't decay the learning rate, increase the batch size, arXiv 1711.00489 (2017).
    """
    return Multipliers(one_minus_momentum=1 / kappa)


@dataclass(frozen=True)
class AdaScale:
    """``lr`` times the gain ``r = (N / B0 + 1) / (N / (kappa B0) + 1)``, with ``N`` the gradient noise scale in samples.

    ``r`` runs from 1 (no noise: a larger batch is of no use) to ``kappa`` (nothing but noise: the linear rule).
    Unknown noise (None): the factors stay while the batch size does, and are 1, the safe side, once it changes.

    Args:
        base_batch_size: ``B0``, the one that the learning rate was tuned for.
        power: of the gain; 0.5 for adaptive optimizers, as AdaptDL does.
    Source: Johnson et al., AdaScale SGD, arXiv 2007.05105 (2020), in terms of ``N = tr Sigma / |G|^2``.
    """

    base_batch_size: int
    power: float = 1.0
    signal: str = "gradient_noise_scale"

    def __post_init__(self) -> None:
        _check_batch_size("base_batch_size", self.base_batch_size)
        if not 0 < self.power <= 1:
            raise ValueError(f"power must lie in (0, 1], got {self.power}")

    def __call__(self, kappa: float, signals: Mapping[str, Signal]) -> Multipliers | None:
        if kappa == 1:
            return Multipliers()
        noise = signals[self.signal].value if self.signal in signals else None
        if noise is None or noise < 0:
            return None
        share = noise / self.base_batch_size
        return Multipliers(learning_rate=((share + 1) / (share / kappa + 1)) ** self.power)


RULES: Mapping[str, CouplingRule] = {
    "none": none,
    "linear": linear,
    "sqrt": sqrt,
    "adam_sde": adam_sde,
    "momentum": momentum,
}
"""By name; beside them ``"adascale"`` and ``"auto"``, which depend on the optimizer."""


def default_rule(optimizer: Optimizer) -> str:
    """``"sqrt"`` where steps are normalized by the gradients' own size, ``"linear"`` for SGD, ``"none"`` for L-BFGS.

    Told by the settings: ``dampening`` is SGD's (LARS and other kin of it included, as in timm); ``betas`` (Adam and its
    kin, Lion) or ``eps`` (RMSprop, Adagrad, Adadelta, Adafactor, Muon) are those of normalized steps.
    """
    names = set().union(*optimizer.param_groups)
    if "line_search_fn" in names:
        return "none"
    return "sqrt" if "dampening" not in names and names & {"betas", "eps"} else "linear"


_coupled: weakref.WeakSet[Optimizer] = weakref.WeakSet()


class LearningRateCoupling:
    """Scales an optimizer's learning rate, moments' memory and epsilon with the batch size, inside its step.

    The step runs on a twin of the optimizer that shares parameters and state and has scaled settings; the optimizer's
    own ``param_groups`` never hold a scaled value, not even after a step that raised. So it composes with every
    scheduler, and ``lr`` in logs is the unscaled one: ``learning_rates()`` gives the one in effect. At ``kappa`` 1
    nothing happens at all.

    Args:
        optimizer: runs step hooks, as every ``torch.optim.Optimizer`` does whose constructor was called.
        rule: a name of ``RULES``, ``"adascale"``, ``"auto"`` (``default_rule``), or a function of ``kappa`` and signals.
        base_batch_size: the global batch size that the learning rate was tuned for; only AdaScale has to know it.
    Attributes:
        kappa, multipliers: in use.
    Raises:
        ValueError: the rule is unknown, or changes a setting that the optimizer does not have; the optimizer is coupled
            already.
        TypeError: the optimizer runs no hooks (a wrapper, such as timm's Lookahead: couple the one inside).
    """

    def __init__(
        self, optimizer: Optimizer, rule: str | CouplingRule = "auto", *, base_batch_size: int | None = None
    ) -> None:
        if not getattr(type(optimizer).step, "hooked", False) or not hasattr(optimizer, "_optimizer_step_pre_hooks"):
            raise TypeError(
                f"{type(optimizer).__name__} runs no step hooks, so its learning rate cannot be scaled. Couple the "
                "optimizer that it wraps."
            )
        if inner := [name for name, value in vars(optimizer).items() if isinstance(value, Optimizer)]:
            raise TypeError(
                f"{type(optimizer).__name__} steps another optimizer ({inner[0]}), which would not see the scaled learning "
                "rate. Couple that one."
            )
        if optimizer in _coupled:
            raise ValueError(
                "the optimizer is coupled already, and would be scaled twice. Call detach() on the first coupling."
            )
        self.optimizer = optimizer
        self._rule = self._resolve(rule, base_batch_size)
        self.kappa, self.multipliers = 1.0, Multipliers()
        if isinstance(rule, str) and (found := self._rule(2.0, {})) is not None:
            self._check(found)
        self._twin: Optimizer = object.__new__(type(optimizer))
        self._given: list[dict[str, Any]] = []
        self._tensors: dict[tuple[int, str], Tensor] = {}
        untraced = torch.compiler.disable  # a compiled step is compiled between the hooks
        self._handles = [
            optimizer.register_step_pre_hook(untraced(self._before_step)),  # type: ignore[no-untyped-call]
            optimizer.register_step_post_hook(untraced(self._after_step)),  # type: ignore[no-untyped-call]
        ]
        _coupled.add(optimizer)

    def set(self, kappa: float, signals: Mapping[str, Signal] | None = None) -> Multipliers:
        """From the next step on, go by these.

        Args:
            kappa: the global batch size in use over the one that the learning rate was tuned for.
        """
        if not (kappa > 0 and math.isfinite(kappa)):
            raise ValueError(f"kappa must be positive and finite, got {kappa}")
        found = self._rule(kappa, signals or {})
        if found is None:
            found = self.multipliers if kappa == self.kappa else Multipliers()
        self._check(found)
        self.kappa, self.multipliers = kappa, found
        return found

    def learning_rates(self) -> list[float]:
        """In effect at the next step, one per parameter group. Waits for the device where they are tensors."""
        return [float(group["lr"]) * self.multipliers.learning_rate for group in self.optimizer.param_groups]

    def detach(self) -> None:
        """Leave the optimizer alone from now on."""
        for handle in self._handles:
            handle.remove()
        _coupled.discard(self.optimizer)

    def state_dict(self) -> dict[str, Any]:
        """JSON."""
        return {"kappa": self.kappa, "multipliers": asdict(self.multipliers)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        multipliers = Multipliers(**state["multipliers"])
        self._check(multipliers)
        self.kappa, self.multipliers = float(state["kappa"]), multipliers

    def _resolve(self, rule: str | CouplingRule, base_batch_size: int | None) -> CouplingRule:
        if not isinstance(rule, str):
            return rule
        natural = default_rule(self.optimizer)
        if rule == "adascale":
            if base_batch_size is None:
                raise ValueError("adascale weighs the noise against the base batch: pass base_batch_size")
            return AdaScale(base_batch_size, power=0.5 if natural == "sqrt" else 1.0)
        name = natural if rule == "auto" else rule
        if name not in RULES:
            known = [*RULES, "adascale", "auto"]
            raise ValueError(
                f"no learning-rate rule is named {rule!r}.{did_you_mean(rule, known)} There are {', '.join(known)}."
            )
        return RULES[name]

    def _check(self, multipliers: Multipliers) -> None:
        for index, group in enumerate(self.optimizer.param_groups):
            for field, settings in _SETTINGS.items():
                if getattr(multipliers, field) != 1 and not any(_fits(name, group) for name in settings):
                    raise ValueError(
                        f"the learning-rate rule changes {field}, and parameter group {index} of "
                        f"{type(self.optimizer).__name__} has none ({' or '.join(settings)}). Use another rule."
                    )

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        if (
            self.multipliers == Multipliers() or optimizer is self._twin
        ):  # a step that calls its base class's runs hooks twice
            return None
        self._given = [self._scaled(index, group) for index, group in enumerate(optimizer.param_groups)]
        twin = self._twin.__dict__
        twin.clear()
        twin.update(optimizer.__dict__, param_groups=[dict(group) for group in self._given])
        return (self._twin, *args[1:]), kwargs

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """What the step has set on the twin, such as a counter in its groups, belongs to the optimizer."""
        if args[0] is not self._twin or optimizer is self._twin:
            return
        for name, value in self._twin.__dict__.items():
            if name != "param_groups" and optimizer.__dict__.get(name) is not value:
                optimizer.__dict__[name] = value
        for group, given, used in zip(optimizer.param_groups, self._given, self._twin.param_groups, strict=True):
            group.update({name: used[name] for name in used if used[name] is not given.get(name) and name not in _SCALED})

    def _scaled(self, index: int, group: dict[str, Any]) -> dict[str, Any]:
        by = self.multipliers
        scaled = {**group, "lr": self._times(group["lr"], by.learning_rate, (index, "lr"))}
        if "betas" in group:
            first, *others = group["betas"]  # Adan has three
            scaled["betas"] = (_memory(first, by.one_minus_beta1), *(_memory(beta, by.one_minus_beta2) for beta in others))
        if _fits("momentum", group):
            scaled["momentum"] = _memory(group["momentum"], by.one_minus_momentum)
        if _fits("alpha", group):
            scaled["alpha"] = _memory(group["alpha"], by.one_minus_beta2)
        if _fits("eps", group):
            scaled["eps"] = self._times(group["eps"], by.epsilon, (index, "eps"))
        return scaled

    def _times(self, value: Any, factor: float, key: tuple[int, str]) -> Any:
        if factor == 1:
            return value
        if not isinstance(value, Tensor) or value.requires_grad:
            return value * factor
        known = self._tensors.get(key)  # one tensor for good, as compiled and captured steps expect of a learning rate
        if known is None or (known.shape, known.dtype, known.device) != (value.shape, value.dtype, value.device):
            known = self._tensors[key] = torch.empty_like(value)
        return torch.mul(value, factor, out=known)


_SCALED = {"lr", "betas", "momentum", "alpha", "eps"}
_SETTINGS = {  # each with what must be there for a rule that changes it; RMSprop has no first moment, which is as well
    "learning_rate": ("lr",),
    "one_minus_beta1": ("betas", "alpha"),
    "one_minus_beta2": ("betas", "alpha"),
    "one_minus_momentum": ("momentum",),
    "epsilon": ("eps",),
}


def _fits(name: str, group: Mapping[str, Any]) -> bool:
    if name == "alpha":  # ASGD's is the power of a decay
        return name in group and "eps" in group
    return name in group and not (name == "eps" and isinstance(group[name], (tuple, list)))  # Adafactor's are two guards


def _memory(beta: Any, factor: float) -> Any:
    if factor == 1:
        return beta
    shorter = 1 - factor * (1 - beta)
    return shorter.clamp(min=0) if isinstance(shorter, Tensor) else max(shorter, 0.0)


class SampleHorizon:
    """Drives a scheduler that counts optimizer steps by samples: a step of ``n`` samples is ``n / base_batch_size`` of its.

    A schedule that was laid out for the base batch size then ends where the training data do, whatever the batch size
    became: a linear decay to 0 ends at 0, not at 0.375 of its start as when the batch grows fourfold after 2 of 4 epochs.
    At the base batch size it is the scheduler, step by step. Calls ``scheduler.step()`` as often as due, none or several
    times.

    Args:
        scheduler: any that is stepped without a metric, also chained and sequential ones. Don't step it elsewhere.
        base_batch_size: global batch size that its steps are counted in.
        steps_per_epoch: optimizer steps of an epoch at that size (``ResizableBatchSampler.steps_per_epoch``), which
            ``end_epoch()`` completes and nothing exceeds: exact also with ragged batches and ``drop_last``. None to
            count samples only.
    Raises:
        TypeError: the scheduler waits for a metric, so it has no horizon.
    """

    def __init__(self, scheduler: Any, base_batch_size: int, *, steps_per_epoch: int | None = None) -> None:
        if not counts_steps(scheduler):
            raise TypeError(
                f"{type(scheduler).__name__} does not count steps, so it needs no horizon in samples: step it itself"
            )
        if steps_per_epoch is not None and steps_per_epoch < 1:
            raise ValueError(f"steps_per_epoch must be at least 1, got {steps_per_epoch}")
        self.scheduler = scheduler
        self.base_batch_size = _check_batch_size("base_batch_size", base_batch_size)
        self.steps_per_epoch = steps_per_epoch
        self._samples: float = 0
        self._steps = 0

    def step(self, num_samples: float) -> None:
        """After an optimizer step on so many samples, over all ranks."""
        if num_samples < 0:
            raise ValueError(f"num_samples must not be negative, got {num_samples}")
        self._samples += num_samples
        self._go_to(int(self._samples / self.base_batch_size + 1e-9))

    def end_epoch(self) -> None:
        """After the last step of an epoch; nothing without ``steps_per_epoch``."""
        if self.steps_per_epoch is not None:
            self._go_to(self.steps_per_epoch)
            self._samples, self._steps = 0, 0

    def state_dict(self) -> dict[str, Any]:
        """JSON; the scheduler's own state is saved by whoever has it."""
        return {"samples": self._samples, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._samples, self._steps = state["samples"], int(state["steps"])

    def _go_to(self, steps: int) -> None:
        if self.steps_per_epoch is not None:
            steps = min(steps, self.steps_per_epoch)
        while self._steps < steps:
            self._steps += 1
            self.scheduler.step()


def counts_steps(scheduler: Any) -> bool:
    """Whether the learning rate is a function of the number of ``step()`` calls, so that other steps give another course.

    True for torch's schedulers, chained ones and wrappers included, except for ``ReduceLROnPlateau``. Of a scheduler that
    is called once per epoch it says the same, and nobody need be warned.
    """
    if inner := getattr(scheduler, "_schedulers", None) or getattr(scheduler, "schedulers", None):
        return any(counts_steps(part) for part in inner)
    if (wrapped := getattr(scheduler, "scheduler", None)) is not None:
        return counts_steps(wrapped)
    return hasattr(scheduler, "last_epoch") and not isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)


def _check_batch_size(name: str, value: int) -> int:
    if isinstance(value, bool) or value != int(value) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value}")
    return int(value)
