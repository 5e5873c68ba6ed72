"""Sharpness-aware minimization in timm: any of its optimizers with any rule, by further passes before its step."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.optim import OptimInfo
from timm.task import TrainingTask
from timm.utils import dispatch_clip_grad
from torch import Tensor
from torch.optim import Optimizer

from sharpness_plugins import distributed
from sharpness_plugins.accumulation import synchronized
from sharpness_plugins.optimizers import Rule, SharpnessAware
from sharpness_plugins.registry import available_optimizers, get_rule

from ..sharpening import Radius, Sharpening
from .arguments import script_arguments
from .recording import Call, Recorder, unnoticed

__all__ = ["SecondPass", "register_optimizers", "second_pass_of"]

_OURS = ("rho", "interval", "adaptive", "clip_grad", "clip_mode")
_OF_RULE = "rule_"
_second_passes: weakref.WeakKeyDictionary[Optimizer, weakref.ref[SecondPass]] = weakref.WeakKeyDictionary()
_names: set[str] = set()  # that were registered here


def second_pass_of(optimizer: Optimizer) -> SecondPass | None:
    """What was attached to it, or to the optimizer inside of a Lookahead; None for one without a second pass."""
    found = _second_passes.get(getattr(optimizer, "_base_optimizer", optimizer))
    return None if found is None else found()


class SecondPass:
    """Makes the gradient of an optimizer that of SAM or one of its relatives, just before each of its steps.

    What the task computed since the last step is computed again where the rule leads the weights: all micro-batches, with
    their autocast state, their dropout and the weight that the loop gave each. BatchNorm's running statistics see the first
    pass alone. At ``rho=0`` training is, bit for bit, that of the optimizer. What the rule remembers is saved with the
    optimizer's state.

    Args:
        optimizer: of parameters that a ``timm.task.TrainingTask`` trains.
        rho: radius; None for the rule's own: 0.05 for ``sam``, 0.5 for ``asam``.
        rule: a name that ``sharpness list`` shows, and its settings, ``"gsam:alpha=0.3"``; or a ``Rule``.
        interval: an ascent in each so-many-th step only; the others cost one pass, as those between two of ``looksam`` do.
        adaptive: short for ``rule="asam"``.
        clip_grad, clip_mode: applied to the gradient of the second pass, too, as the loop clips that of the first one
            only; None for the ``--clip-grad`` of the script that runs.
    Cost: a forward and a backward pass per ascent, beside the loop's own, so two per step for ``momentum_sam`` and
        ``random_sam``, too, which need no first one; a copy of the weights, and a reference to each batch of the step.
    Raises:
        RuntimeError: a step without a forward pass of a task before it. ValueError: a step with a closure; clipping, which
            comes before this step, and a rule that mixes in the first gradient.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rho: Radius | None = None,
        *,
        rule: str | Rule = "sam",
        interval: int = 1,
        adaptive: bool = False,
        clip_grad: float | None = None,
        clip_mode: str | None = None,
    ) -> None:
        self._sharpening = Sharpening.read(rule, rho, interval, adaptive=adaptive)
        self.rho, self.rule, self.interval = self._sharpening.rho, self._sharpening.rule, self._sharpening.interval
        self.adaptive = bool(adaptive)
        arguments = script_arguments()
        self.clip_grad = arguments.get("clip_grad") if clip_grad is None else clip_grad
        self.clip_mode = (arguments.get("clip_mode") if clip_mode is None else clip_mode) or "norm"
        if self.clip_grad is not None and self._sharpening.looks_at_first:
            raise ValueError(
                f"{self.rule!r} mixes the first gradient in, and timm's loops have clipped that one (clip_grad="
                f"{self.clip_grad}) before the step, by a factor nobody keeps. Train without --clip-grad, or by a rule "
                "that takes the second gradient as it is: sam, asam, k_step_sam"
            )
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._recorder = Recorder(self._parameters)
        self._sharp: SharpnessAware | None = None
        self._in_step = False
        optimizer.register_step_pre_hook(self._before_step)
        _second_passes[optimizer] = weakref.ref(self)  # which the hook keeps alive
        weakref.finalize(optimizer, self._recorder.close)

    def surrogate_gap(self) -> float | None:
        """The loss uphill minus the loss, of the last ascending step's batch; None before it. Waits for the device."""
        return None if self._sharp is None else self._sharp.surrogate_gap

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Mapping[str, Any]) -> None:
        if any(given is not None for given in (*args[1:], kwargs.get("closure"))):
            raise ValueError("the second pass needs the gradient before step(), so step() cannot take a closure")
        calls = self._recorder.take()
        if not calls and self._in_step:  # a step that calls its base class's runs the hooks twice
            return
        if not calls:
            raise RuntimeError(
                "no forward pass of a timm.task.TrainingTask came before this step, so there is none to repeat uphill. "
                "Train through a task, as train.py does: task(input, target)['loss'].backward()"
            )
        if self._sharp is None:
            self._sharp = self._begin(optimizer)
        self._in_step = True
        with unnoticed(), torch.enable_grad():
            self._make_gradient(self._sharp, calls, getattr(optimizer, "grad_scale", None))

    def _begin(self, optimizer: Optimizer) -> SharpnessAware:
        """At the first step, as nobody knows before it which model is trained; a checkpoint was loaded by then."""
        assert self._recorder.task is not None
        sharp = self._sharpening.around(optimizer, self._recorder.task.get_trainable_module())
        optimizer.register_step_post_hook(self._look_ahead)  # after those of sharp, which counts
        optimizer.register_load_state_dict_post_hook(self._look_ahead)
        return sharp

    def _look_ahead(self, *_: Any) -> None:
        assert self._sharp is not None
        self._in_step = False
        self._recorder.keep_inputs = self._sharp.next_ascents > 0

    def _make_gradient(self, sharp: SharpnessAware, calls: list[Call], grad_scale: Tensor | None) -> None:
        """``grad_scale`` is what a fused optimizer divides by itself: a GradScaler has then left the gradients scaled."""
        task = self._recorder.task
        assert task is not None
        module = task.get_trainable_module()
        is_half = any(call.autocast is not None and call.autocast[1] is torch.float16 for call in calls)
        first = [_aside(parameter.grad) for parameter in self._parameters] if is_half and sharp.next_ascents else []
        scales = torch.stack([call.scale for call in calls if call.scale is not None]).double()
        losses: list[Tensor] = []
        for ascent in sharp.ascents(scale=1.0 if grad_scale is None else grad_scale, evaluated=True):
            with ascent:
                losses = _repeat(task, module, calls)
                if is_half and grad_scale is None:
                    self._unscale(scales.sum())
        if not losses:
            return
        if is_half and not sharp.is_finite():
            self._take_back(sharp, first)
        if self.clip_grad is not None:
            clipped = task.get_clip_parameters(exclude_head="agc" in self.clip_mode)
            dispatch_clip_grad(clipped, self.clip_grad, mode=self.clip_mode)
        before = torch.stack([call.loss for call in calls if call.loss is not None])
        sharp.surrogate_gap = ((torch.stack(losses).double() - before.double()) * scales / scales.sum()).sum()

    def _unscale(self, scale: Tensor) -> None:
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad.div_(scale.to(parameter.grad))

    def _take_back(self, sharp: SharpnessAware, first: list[Tensor | None]) -> None:
        """The second gradient overflowed, which nobody checks: a step with the first one, which a GradScaler has seen."""
        sharp.give_up()
        for parameter, gradient in zip(self._parameters, first, strict=True):
            parameter.grad = gradient


def _aside(gradient: Tensor | None) -> Tensor | None:
    """DistributedDataParallel may keep gradients in memory that the next ones are written to."""
    return gradient.clone() if gradient is not None and distributed.world_size() > 1 else gradient


def _repeat(task: TrainingTask, module: Any, calls: list[Call]) -> list[Tensor]:
    """Forward and backward passes as they were; returns the losses."""
    losses: list[Tensor] = []
    for index, call in enumerate(calls):
        with synchronized(module, index == len(calls) - 1):
            with call.again():
                loss = task(*call.args, **call.kwargs)["loss"]
            losses.append(loss.detach())
            loss.backward(call.scale)
    return losses


def _build(make: Callable[..., Optimizer], rule: str, params: Any, **settings: Any) -> Optimizer:
    ours = {name: settings.pop(name) for name in _OURS if name in settings}
    given = {name[len(_OF_RULE) :]: settings.pop(name) for name in list(settings) if name.startswith(_OF_RULE)}
    optimizer = make(params, **settings)
    SecondPass(optimizer, rule=get_rule(rule, **given) if given else rule, **ours)
    return optimizer


def register_optimizers() -> list[str]:
    """Offer every first-order optimizer of timm with every rule: ``samsgd``, ``gsamadamw``, ``looksamlamb``.

    Rules of plugins, too. Without an underscore, as timm keeps what follows the last one only: ``--opt sam_sgd`` is plain
    ``sgd`` to it. ``rho``, ``interval``, ``adaptive``, ``clip_grad`` and ``clip_mode`` are further settings, and those of
    the rule are told from the optimizer's by ``rule_`` before them: ``--opt-kwargs rho=0.1 rule_alpha=0.3``. A name that
    timm has itself is left to timm.

    Returns:
        the names.
    Raises:
        ImportError: this timm keeps its registry elsewhere.
    """
    registry = _registry()
    known = {name: registry.get_optimizer_info(name) for name in registry.list_optimizers()}
    bases = {name: info for name, info in known.items() if name not in _names and "_" not in name and not info.second_order}
    rules = [rule for rule in available_optimizers() if ":" not in rule]  # of several plugins that use one name
    for rule, (base, info) in itertools.product(rules, bases.items()):
        name = rule.replace("_", "").lower() + base
        if name not in known and name not in _names:
            make: Any = partial(_build, partial(_make, registry, info), rule)
            registry.register(replace(info, name=name, opt_class=make, description=f"{base} with the gradient of {rule}"))
            _names.add(name)
    return sorted(_names)


def _make(registry: Any, info: OptimInfo, params: Any, **settings: Any) -> Optimizer:
    made: Optimizer = registry.get_optimizer_class(info, bind_defaults=False)(params, **settings)
    return made


def _registry() -> Any:
    """timm has no public way to register an optimizer."""
    try:
        from timm.optim._optim_factory import default_registry
    except ImportError as error:
        import timm

        raise ImportError(
            f"timm {timm.__version__} keeps its optimizers where sharpness_adapters.timm does not find them. Known are "
            "timm 1.0.27 to 1.0.31."
        ) from error
    return default_registry
