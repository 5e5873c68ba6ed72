"""Any torch optimizer with a sharpness-aware gradient."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import distributed, sampling
from .around import OptimizerAround
from .buffers import Modules, buffers_of
from .closures import Closure, evaluate, parts_of, total
from .making import Ascent, Making, State, Uphill
from .rho import Rho, radius
from .rules import Rule
from .tensors import Sums, local

__all__ = ["SharpnessAware"]

VERSION = 1
_ONE = torch.ones((), dtype=torch.float64)
FORMS = """\
    optimizer.step(closure)                # closure: loss = loss_fn(model, batch); loss.backward(); return loss
or
    loss_fn(model, batch).backward()
    for ascent in optimizer.ascents():
        with ascent:
            loss_fn(model, batch).backward()
    optimizer.step()"""


class SharpnessAware(OptimizerAround):
    """``base`` with the gradient that ``rule`` makes: SAM and its relatives around any first-order optimizer of torch.

    Parameter groups and state *are* those of ``base``, so learning-rate schedulers work on either. With a closure::

        optimizer = SharpnessAware(SGD(model.parameters(), lr=0.1, momentum=0.9), SAM(), rho=0.05, model=model)

        def closure():
            loss = loss_fn(model, batch)
            loss.backward()
            return loss

        optimizer.step(closure)

    evaluates it as often as the rule wants gradients, each time with empty gradients. In a loop written by hand, where the
    first gradient is in ``.grad``::

        scaler.scale(loss_fn(model, batch)).backward()
        with optimizer.perturbed():
            scaler.scale(loss_fn(model, batch)).backward()
        scaler.step(optimizer)
        scaler.update()

    and, for rules that ascend in some steps only, or several times, ``for ascent in optimizer.ascents(): with ascent: ...``.

    Trainers that own the optimizer's step keep their optimizer. An adapter wraps it, never steps the wrapper, and makes the
    gradient just before the trainer calls ``base.step()``, in a hook::

        sharp = SharpnessAware(trainers_optimizer, rule, rho=rho, model=model)       # once
        for ascent in sharp.ascents(scale=scale_of_the_gradients, evaluated=True):   # in the hook before each step
            with ascent:
                replay_the_passes_of_this_step()
        if not sharp.is_finite():                                                    # under a GradScaler
            sharp.give_up()                                                          # and clear .grad, say

    What the rule remembers, and the counters, move on when ``base`` has stepped, and stay where a ``GradScaler`` left the
    step out. ``sharp.next_ascents`` says before a step whether its passes need to be kept for a replay at all, and
    ``sharp.added_state()`` is what to save beside the state of ``base``.

    Micro-batches: ``step([closure, closure, ...])`` adds their gradients up, with one ascent for all; with ``m``, each has
    its own, and a ``BatchClosure`` is cut into parts of ``m`` samples first, so that m depends neither on the batch nor on
    the number of ranks.

    A step whose gradients, first or last, are not finite is left out: the weights stay, ``num_skipped`` grows. Under a
    ``GradScaler`` that is the scaler's task, which finds the overflow of either pass in ``.grad``.

    Args:
        base: an optimizer whose ``step()`` needs no closure.
        rule: where to go for the gradient, and what to make of it.
        rho: radius: a number; a function of the steps taken; a ``ProportionalToLearningRate``; None for the rule's own.
            Groups that bring their own ``"rho"`` keep it.
        m: samples that share an ascent; None for all of a step's.
        interval: an ascent in each so-many-th step only; the others are those of ``base``.
        model: its buffers are put back after each pass but the first; None for all modules that hold one of the parameters.
        perturb: ``"global"``: all ranks ascend along the same gradient; ``"local"``: each along its own, which saves an
            all-reduce for rules that use no first gradient but for the ascent, and makes what ``FSAM`` remembers differ
            between ranks. Under ``DistributedDataParallel`` closures are evaluated accordingly; by hand, the first pass of
            a local ascent is made under ``no_sync``.
        replay_rng: passes of a step draw the same random numbers (dropout masks) as its first one. By hand, call
            ``remember_rng()`` before the first pass.
        process_group: of ranks that hold different parameters each. Not needed for ``DTensor``, whose mesh tells.
        scaler: a ``GradScaler``. ``step(closure)`` then steps through it (``scaler.update()`` remains yours). Rules that
            keep gradients out of its sight need it in any case (``FSAM``, ``WSAM``).
        seed: of rules that draw.
    Attributes:
        num_steps: steps taken.
        num_skipped: steps left out because a gradient was not finite.
        surrogate_gap: see there.
    Memory: a copy of the weights, from the first ascent on; what the rule remembers; where it mixes gradients, the first
        one. What ``.grad`` holds before ``step(closure)`` comes back if the closure fails, so it takes space until then.
    Cost: ``gradients_per_step`` forward and backward passes; 28 bytes per parameter and ascent in float32, and 4 to see that
        the gradient is finite, for which the step waits once for the device.
    Raises:
        TypeError, ValueError: settings that do not fit together.
    """

    _group_keys = ("rho", "rho_is_own")
    _left_out = ("_modules", "_pending", "_rewind", "_room", "_scaler", "_group")

    def __init__(
        self,
        base: Optimizer,
        rule: Rule,
        *,
        rho: Rho | None = None,
        m: int | None = None,
        interval: int = 1,
        model: nn.Module | None = None,
        perturb: str = "global",
        replay_rng: bool = False,
        process_group: Any = None,
        scaler: Any = None,
        seed: int = 0,
    ) -> None:
        _check(base, rule, m, interval, perturb)
        self.rule, self.m, self.interval = rule, m, interval
        self.perturb, self.replay_rng, self.seed = perturb, replay_rng, seed
        self.num_steps = self.num_skipped = 0
        self._rho: Rho = rule.default_rho if rho is None else rho
        self._group, self._scaler = process_group, scaler
        self._state: State = {}
        self._gap: Any = None
        self._norm: Tensor | float | None = None
        self._is_evaluating = False
        super().__init__(base)
        self._modules = Modules(model)
        self._complete_groups()

    def _attach(self) -> None:
        super()._attach()
        vars(self).setdefault("_scaler", None)
        vars(self).setdefault("_group", None)
        self._modules = Modules(None)
        self._pending: Making | None = None
        self._rewind: Callable[[], None] | None = None
        self._room: dict[Tensor, Tensor] = {}

    def _complete_groups(self) -> None:
        for group in self.param_groups:
            if "rho" not in group:
                group["rho"] = radius(self._rho, self.num_steps, group)
                group["rho_is_own"] = False
            group.setdefault("rho_is_own", True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._complete_groups()
        self._modules.forget()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Give up the step in the making, too. Nothing in a closure that ``step`` evaluates: gradients may add up there."""
        if not self._is_evaluating:
            self._pending = None
            super().zero_grad(set_to_none)

    def _own_state(self) -> dict[str, Any]:
        numbers = {parameter: number for number, parameter in enumerate(self._parameters(all_of_them=True))}
        return {
            "version": VERSION,
            "rule": type(self.rule).__name__,
            "settings": repr(self.rule),
            "num_steps": self.num_steps,
            "num_skipped": self.num_skipped,
            "state": {
                name: {numbers[parameter]: tensor for parameter, tensor in tensors.items() if parameter in numbers}
                for name, tensors in self._state.items()
            },
        }

    def _check_own_state(self, own: Mapping[str, Any]) -> None:
        if own["version"] > VERSION:
            raise ValueError(f"the state has version {own['version']}, and this package reads {VERSION}: update it")
        if own["rule"] != type(self.rule).__name__:
            raise ValueError(f"the state is of {own['settings']}, and this optimizer has {self.rule!r}")

    def _load_own_state(self, own: Mapping[str, Any] | None) -> None:
        self._complete_groups()
        self._pending = self._rewind = None
        self._state, self.num_steps, self.num_skipped = {}, 0, 0
        if own is None:
            return
        self.num_steps, self.num_skipped = own["num_steps"], own["num_skipped"]
        parameters = self._parameters(all_of_them=True)
        for name, tensors in own["state"].items():
            self._state[name] = {
                parameters[number]: tensor.detach().to(local(parameters[number]).device, copy=True)
                for number, tensor in tensors.items()
            }

    def added_state(self) -> dict[str, Any]:
        """What ``state_dict`` adds to that of ``base``, and the last signals, for trainers that save that one themselves."""
        return {**self._own_state(), "surrogate_gap": self.surrogate_gap, "gradient_norm": self.gradient_norm}

    def load_added_state(self, added: Mapping[str, Any] | None) -> None:
        """Go on from it, once ``base`` has its own state; None begins anew.

        Raises:
            ValueError: it is of another rule, or of a later version.
        """
        if added is not None:
            self._check_own_state(added)
        self._load_own_state(added)
        self._gap, self._norm = ((added or {}).get(name) for name in ("surrogate_gap", "gradient_norm"))

    def __repr__(self) -> str:
        settings = "".join(
            f", {name}={value!r}" for name, value in (("m", self.m), ("interval", self.interval)) if value not in (None, 1)
        )
        return f"SharpnessAware({self.rule!r}, rho={self._rho!r}{settings}, base={self.base!r})"

    # --- what it costs and tells

    @property
    def gradients_per_step(self) -> float:
        """Forward and backward passes per step, on average."""
        return (self.rule.gradients_per_step + (self.interval - 1)) / self.interval

    @property
    def next_ascents(self) -> int:
        """How many ascents the next step makes: 0 in a step between those of ``interval`` or of the rule."""
        asked, rest = divmod(self.num_steps, self.interval)
        return self.rule.ascents if rest == 0 and asked % self.rule.every == 0 else 0

    @property
    def surrogate_gap(self) -> float | None:
        """The loss after the last ascent minus the loss before it, as closures returned them; costs no pass over data.

        None before the first, and where nothing was returned or nothing evaluated before. Waits for the device. A signal for
        ``SharpnessMonitor(signals={"surrogate_gap": lambda: optimizer.surrogate_gap})``. Adapters, which see the losses that
        this class does not, assign it after the passes.
        """
        return None if self._gap is None else float(self._gap)

    @surrogate_gap.setter
    def surrogate_gap(self, gap: Tensor | float | None) -> None:
        self._gap = gap

    @property
    def gradient_norm(self) -> float | None:
        """Norm of the gradient that the last step's first ascent followed, scaled as that was; None before the first."""
        return None if self._norm is None else float(self._norm)

    # --- a step

    def step(self, closure: Closure | Sequence[Closure] | None = None) -> Any:
        """Make the gradient with ``closure``, or take that which ``perturbed`` or ``ascents`` made, and step ``base``.

        Args:
            closure: computes the loss, calls ``backward`` and returns the loss; it need not clear gradients. Several of them
                add up.
        Returns:
            what the closure returned at the weights; the sum where there are several.
        Raises:
            RuntimeError: without a closure, and without an ascent before it.
        """
        closure = self._before_step(closure)
        loss = self._step(closure)
        self._after_step(closure)
        return loss

    step.hooked = True  # type: ignore[attr-defined]  # by _before_step and _after_step

    def _step(self, closure: Closure | Sequence[Closure] | None) -> Any:
        loss = None if closure is None else self.gradient(closure)
        if self._pending is None:
            raise RuntimeError(
                f"step() would take a plain gradient for that of {self.rule!r}: nothing was evaluated uphill since the last "
                f"step. Write\n{FORMS}"
            )
        if hasattr(self, "found_inf"):
            for name in ("grad_scale", "found_inf"):
                vars(self).pop(name, None)
            raise ValueError(
                f"{self.rule!r} keeps gradients where a GradScaler does not unscale them, so it has to know it: "
                "SharpnessAware(..., scaler=scaler)"
            )
        skipped = self.num_skipped
        if closure is not None and self._scaler is not None and self._scaler.is_enabled():
            self._scaler.step(_Unscaled(self.base))
            self.num_skipped += self._pending is not None and self.num_skipped == skipped
        elif self.is_finite():
            self.base.step()
        else:
            self.num_skipped += 1
            warnings.warn(
                f"step {self.num_steps} was left out, because a gradient is not finite", RuntimeWarning, stacklevel=4
            )
        self._pending = None
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """False: a ``GradScaler`` unscales ``.grad`` itself, and never steps on overflow. True only to be told of one."""
        return not self.rule.is_linear and self._scaler is None

    def gradient(self, closure: Closure | Sequence[Closure]) -> Any:
        """Put into ``.grad`` what ``step(closure)`` would step with, and return what it would return.

        Between the two, clip it, say; then ``step()``. An exception puts the gradients back that were there before.
        """
        parts = parts_of(closure, self.m, cuts=self.next_ascents > 0)
        parameters = self._parameters()
        before = [parameter.grad for parameter in parameters]
        try:
            for parameter in parameters:
                parameter.grad = None
            making = self._begin(None)
            making.returns = False
            self._is_evaluating = True
            loss = self._evaluate(making, parts)
            self._finish(making)
        except BaseException:
            self._pending = None
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = gradient
            raise
        finally:
            self._is_evaluating = False
        return loss

    @contextmanager
    def perturbed(self, *, scale: Tensor | float | None = None) -> Iterator[Ascent]:
        """Inside, the weights stand uphill, for a second forward and backward pass; after it, ``.grad`` is the rule's.

        For rules that make one ascent in each step. The weights come back bit for bit and at their addresses, also after an
        exception, which brings the first gradient back, too.

        Args:
            scale: as for ``ascents``.
        Raises:
            ValueError: this optimizer does not make one ascent in each step.
        """
        if (self.rule.ascents, self.rule.every, self.interval) != (1, 1, 1):
            raise ValueError(
                f"{self.rule!r} with interval={self.interval} does not make one ascent in each step, and a with-block "
                f"cannot be left out or repeated. Write\n{FORMS}"
            )
        ascents = self.ascents(scale=scale)
        with next(ascents) as ascent:
            yield ascent
        next(ascents, None)

    def ascents(self, *, scale: Tensor | float | None = None, evaluated: bool | None = None) -> Iterator[Uphill]:
        """The contexts in which this step's further gradients are made; the first one is in ``.grad``. None in some steps.

        After the loop has ended, ``.grad`` is what ``base`` steps with. Each pass evaluates all micro-batches of the step,
        and leaves its gradients scaled as the first one's are: ``scaler.unscale_`` and clipping come after the loop.

        Args:
            scale: what the losses of this step are multiplied with; None for what the ``scaler`` says, or 1.
            evaluated: whether a pass over the data came before, so that buffers have seen it; None for whether the rule
                needs one. Adapters of trainers that have always made one say True.
        Raises:
            ValueError: ``m`` is set, for which each part needs its own first pass; ``replay_rng`` without
                ``remember_rng()``.
            RuntimeError: one of them was not entered.
        """
        if self.m is not None:
            raise ValueError(
                f"m={self.m} takes a first gradient for each part of a batch. Pass closures: "
                "optimizer.step(BatchClosure(loss_fn, batch)), or optimizer.gradient([closure, closure, ...])"
            )
        if self.replay_rng and self._rewind is None:
            raise ValueError("replay_rng needs optimizer.remember_rng() before the first forward pass of each step")
        making = self._begin(scale)
        making.rewind, self._rewind = self._rewind, None
        making.evaluated = self.rule.needs_gradient if evaluated is None else evaluated
        for number in range(self.next_ascents):
            uphill = making.ascent(number)
            yield uphill
            if not uphill.was_left:
                raise RuntimeError("an ascent was not entered. Write: for ascent in optimizer.ascents(): with ascent: ...")
        self._finish(making)

    def is_finite(self) -> bool:
        """Whether all of ``.grad`` is finite, on all ranks that share the parameters out. Waits for the device."""
        parameters = [parameter for parameter in self._parameters() if parameter.grad is not None]
        gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        dense = [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in gradients]
        return Sums([parameter.detach() for parameter in parameters], self._group).are_finite(dense)

    def give_up(self) -> None:
        """The step in the making is none: a step of ``base`` now is not counted, and what the rule remembers stays."""
        self._pending = None

    def remember_rng(self) -> None:
        """Passes after the first one draw the random numbers that are drawn from here on; see ``replay_rng``."""
        restores = [sampling.rng_states(device) for device in self._devices()]

        def rewind() -> None:
            for restore in restores:
                restore()

        self._rewind = rewind

    # --- its parts

    def _begin(self, scale: Tensor | float | None) -> Making:
        self._pending = None
        parameters = self._parameters()
        radii = self._radii()
        if self.perturb == "local" and self._are_sharded:
            raise ValueError(
                'perturb="local" needs the gradient of one rank, and parameters that are sharded have the mean over all '
                'ranks only. Use perturb="global"'
            )
        replicated = self._replicated
        return Making(
            rule=self.rule,
            parameters=parameters,
            radii=[radii[parameter] for parameter in parameters],
            index=self.num_steps // self.interval,
            state={name: dict(tensors) for name, tensors in self._state.items()},
            scale=self._scale(scale),
            momentum=self._momentum,
            noise=self._noise,
            undo=lambda: buffers_of(self._modules.roots(parameters)),
            rewind=None,
            group=self._group,
            is_local=bool(distributed.world_size() > 1 and (self.perturb == "local" or (self.m and replicated))),
            room=self._room,
            replicas=getattr(replicated[0], "process_group", None) if replicated else None,
        )

    def _finish(self, making: Making) -> None:
        making.finish(plain=self.num_steps % self.interval != 0)
        if making.norms:
            self._norm = making.norms[0]
            self._gap = making.surrogate_gap
        self._pending = making

    def _evaluate(self, making: Making, parts: list[list[Closure]]) -> Any:
        """All passes of a step; the gradients of the last ascents add up in ``.grad``."""
        if self.perturb == "local" and distributed.world_size() > 1 and not self._replicated:
            raise ValueError(
                'perturb="local" evaluates closures without an exchange of gradients first, and no module with no_sync() '
                "was found to do so. Pass model= the DistributedDataParallel, or write the passes by hand: "
                "with optimizer.perturbed(): ..."
            )
        count, first, second = self.next_ascents, [], []
        exchanges = self._are_sharded or not self._is_local  # sharded parameters have no gradient before
        parameters, modules = making.parameters, self._modules.exchanging(making.parameters)
        for number, part in enumerate(parts, 1):
            is_last = number == len(parts)
            made = {parameter: parameter.grad for parameter in making.parameters}
            if self.replay_rng:
                self.remember_rng()
                making.rewind = self._rewind
            if self.rule.needs_gradient or not count:
                for parameter in making.parameters:
                    parameter.grad = None
                first += evaluate(part, parameters, modules, exchanges=exchanges if count else is_last)
                making.evaluated = True
            else:
                making.evaluated = False
            for ascent in range(count):
                ends = ascent + 1 == count
                with making.ascent(ascent, made if ends else None):
                    losses = evaluate(
                        part, parameters, modules, exchanges=is_last or self._are_sharded if ends else exchanges
                    )
                second += losses if ends else []
        self._rewind = None
        if first and second and None not in (*first, *second):
            making.surrogate_gap = total(second) - total(first)
        told = [loss for loss in first or second if loss is not None]
        return told[0] if len(told) == 1 else total(told) if told else None

    def _base_stepped(self) -> None:
        making, self._pending = self._pending, None
        if making is None:
            return
        overflow = getattr(self.base, "found_inf", None)  # a fused optimizer that left the step out by itself
        if overflow is not None and float(overflow) > 0:
            self.num_skipped += 1
            return
        self._state = making.state
        self.num_steps += 1
        if making.decoupled:
            with torch.no_grad():
                for group in self.param_groups:
                    for parameter in group["params"]:
                        if parameter in making.decoupled:
                            local(parameter).sub_(making.decoupled[parameter] * group["lr"])

    @property
    def _is_local(self) -> bool:
        return self.perturb == "local" or self.m is not None

    @property
    def _replicated(self) -> list[nn.Module]:
        return [module for module in self._modules.exchanging(self._parameters()) if hasattr(module, "no_sync")]

    @property
    def _are_sharded(self) -> bool:
        return any(distributed.shard_groups(parameter) for parameter in self._parameters())

    def _parameters(self, *, all_of_them: bool = False) -> list[Tensor]:
        found = dict.fromkeys(parameter for group in self.param_groups for parameter in group["params"])
        return [parameter for parameter in found if all_of_them or parameter.requires_grad]

    def _radii(self) -> dict[Tensor, float]:
        found = {}
        for group in self.param_groups:
            if not group["rho_is_own"] and not isinstance(self._rho, (int, float)):
                group["rho"] = radius(self._rho, self.num_steps, group)
            value = radius(group["rho"], self.num_steps, group)
            found.update(dict.fromkeys(group["params"], value))
        return found

    def _scale(self, scale: Tensor | float | None) -> Tensor:
        if self.rule.is_linear:  # it does not look
            return _ONE
        if scale is None:
            scale = 1.0 if self._scaler is None else float(self._scaler.get_scale())
        device = next(iter(self._devices()), torch.device("cpu"))
        if isinstance(scale, Tensor):
            return scale.detach().to(device, torch.float64)
        return torch.full((), scale, dtype=torch.float64, device=device)

    def _momentum(self, parameter: Tensor) -> Tensor | None:
        state = self.base.state.get(parameter, {})
        found = state.get("momentum_buffer", state.get("exp_avg"))
        return found if isinstance(found, Tensor) else None

    def _noise(self, weights: Sequence[Tensor]) -> list[Tensor]:
        shared = self._are_sharded or self._group is not None
        generator = sampling.generator_for(self.seed, "ascent", self.num_steps, distributed.rank() if shared else 0)
        return [sampling.normal(weight.numel(), generator, weight).view(weight.shape) for weight in weights]

    def _devices(self) -> list[torch.device]:
        return list(dict.fromkeys(local(parameter).device for parameter in self._parameters()))


class _Unscaled:
    """An optimizer as a ``GradScaler`` sees it that unscales ``.grad`` and leaves steps out by itself.

    Fused optimizers do that in their kernel, and the momentum of torch's fused SGD is whatever was in memory when its first
    step is left out (torch 2.14).
    """

    def __init__(self, base: Optimizer) -> None:
        self.param_groups, self.step = base.param_groups, base.step


def _check(base: Optimizer, rule: Rule, m: int | None, interval: int, perturb: str) -> None:
    if not isinstance(base, Optimizer):
        raise TypeError(f"base is an optimizer, built as without sharpness: SGD(model.parameters(), ...); got {base!r}")
    if isinstance(base, (SharpnessAware, torch.optim.LBFGS)):
        raise TypeError(f"base must be a first-order optimizer that steps without a closure, got {type(base).__name__}")
    if any(group.get("maximize") for group in base.param_groups):
        raise ValueError("base has maximize=True, and uphill is where a loss grows: minimize the negative of it instead")
    if not isinstance(rule, Rule):
        raise TypeError(f"rule is an instance such as SAM(); got {rule!r}")
    if m is not None and not (isinstance(m, int) and m >= 1):
        raise ValueError(f"m is a number of samples, at least 1, got {m!r}")
    if not (isinstance(interval, int) and interval >= 1):
        raise ValueError(f"interval is a number of steps, at least 1, got {interval!r}")
    if perturb not in ("global", "local"):
        raise ValueError(f'perturb must be "global" or "local", got {perturb!r}')
