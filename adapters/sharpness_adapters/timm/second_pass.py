"""Sharpness-aware minimization in timm: any of its optimizers, with a second pass before its step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.optim import OptimInfo
from timm.utils import dispatch_clip_grad
from torch import Tensor
from torch.optim import Optimizer

from sharpness_plugins.accumulation import synchronized
from sharpness_plugins.optimizers import perturbed

from .arguments import script_arguments
from .recording import Call, Recorder, unnoticed

__all__ = ["SecondPass", "register_optimizers", "second_pass_of"]

PREFIX = "sam"

_second_passes: weakref.WeakKeyDictionary[Optimizer, SecondPass] = weakref.WeakKeyDictionary()


def second_pass_of(optimizer: Optimizer) -> SecondPass | None:
    """What was attached to it, or to the optimizer inside of a Lookahead; None for one without a second pass."""
    return _second_passes.get(getattr(optimizer, "_base_optimizer", optimizer))


class SecondPass:
    """Makes the gradient of an optimizer that of the loss uphill (SAM), just before each of its steps.

    What the task computed since the last step is computed again at ``w + ρ g/‖g‖``: all micro-batches, with their autocast
    state, their dropout and the weight that the loop gave each. BatchNorm's running statistics see the first pass alone.
    At ``rho=0`` training is, bit for bit, that of the optimizer.

    Args:
        optimizer: of parameters that a ``timm.task.TrainingTask`` trains.
        rho: radius of the ball.
        adaptive: ASAM's, which is measured relative to the weights; ``rho`` is 0.5 to 2 then.
        clip_grad, clip_mode: applied to the gradient of the second pass, too, as the loop clips that of the first one
            only; None for the ``--clip-grad`` of the script that runs.
    Cost: a forward and a backward pass per step, a copy of the weights, and a reference to each batch of the step.
    Raises:
        RuntimeError: a step without a forward pass of a task before it. ValueError: a step with a closure.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rho: float = 0.05,
        *,
        adaptive: bool = False,
        clip_grad: float | None = None,
        clip_mode: str | None = None,
    ) -> None:
        if not rho >= 0:
            raise ValueError(f"rho is a radius and not negative, got {rho}")
        arguments = script_arguments()
        self.rho, self.adaptive = float(rho), bool(adaptive)
        self.clip_grad = arguments.get("clip_grad") if clip_grad is None else clip_grad
        self.clip_mode = (arguments.get("clip_mode") if clip_mode is None else clip_mode) or "norm"
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._recorder = Recorder(self._parameters)
        self._in_step = False
        self._gap: Tensor | None = None
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)
        _second_passes[optimizer] = self
        weakref.finalize(optimizer, self._recorder.close)

    def surrogate_gap(self) -> float | None:
        """The loss uphill minus the loss, of the last step's batch; None before the first step. Waits for the device."""
        return None if self._gap is None else self._gap.item()

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
        self._in_step = True
        with unnoticed(), torch.enable_grad():
            self._repeat(calls)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._in_step = False

    def _repeat(self, calls: list[Call]) -> None:
        task = self._recorder.task
        assert task is not None
        module = task.get_trainable_module()
        is_half = any(call.autocast is not None and call.autocast[1] is torch.float16 for call in calls)
        first = [parameter.grad for parameter in self._parameters] if is_half else []
        losses: list[Tensor] = []
        with perturbed(self._parameters, self.rho, adaptive=self.adaptive, module=module):
            for index, call in enumerate(calls):
                with synchronized(module, index == len(calls) - 1):
                    with call.again():
                        loss = task(*call.args, **call.kwargs)["loss"]
                    losses.append(loss.detach())
                    loss.backward(call.scale)
        scales = torch.stack([call.scale for call in calls if call.scale is not None]).double()
        if is_half:
            self._unscale(first, scales.sum())
        if self.clip_grad is not None:
            clipped = task.get_clip_parameters(exclude_head="agc" in self.clip_mode)
            dispatch_clip_grad(clipped, self.clip_grad, mode=self.clip_mode)
        before = torch.stack([call.loss for call in calls if call.loss is not None])
        self._gap = ((torch.stack(losses).double() - before.double()) * scales / scales.sum()).sum()

    def _unscale(self, first: list[Tensor | None], scale: Tensor) -> None:
        """As a GradScaler did with the first gradient; that one stays where the second overflowed, which nobody checks."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        for gradient in gradients:
            gradient.div_(scale.to(gradient))
        if not torch.stack([torch.isfinite(gradient).all() for gradient in gradients]).all():
            for parameter, gradient in zip(self._parameters, first, strict=True):
                parameter.grad = gradient


def _build(make: Callable[..., Optimizer], params: Any, **settings: Any) -> Optimizer:
    ours = {name: settings.pop(name) for name in ("rho", "adaptive", "clip_grad", "clip_mode") if name in settings}
    optimizer = make(params, **settings)
    SecondPass(optimizer, **ours)
    return optimizer


def register_optimizers() -> list[str]:
    """Offer every first-order optimizer of timm with a second pass, as ``sam`` and its name: ``samsgd``, ``samadamw``.

    Without an underscore, as timm keeps what follows the last one only: ``--opt sam_sgd`` is plain ``sgd`` to it.
    ``rho``, ``adaptive``, ``clip_grad`` and ``clip_mode`` are further settings (``--opt-kwargs rho=0.1``).

    Returns:
        the names.
    Raises:
        ImportError: this timm keeps its registry elsewhere.
    """
    registry = _registry()
    names = []
    for base in registry.list_optimizers():
        info: OptimInfo = registry.get_optimizer_info(base)
        if "_" in base or base.startswith(PREFIX) or info.second_order:
            continue
        name = PREFIX + base
        if name not in registry.list_optimizers():
            make: Any = partial(_build, partial(_make, registry, info))
            summary = f"SAM (Foret et al. 2021) around {base}"
            registry.register(replace(info, name=name, opt_class=make, description=summary))
        names.append(name)
    return names


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
