"""Which task trains, and on what: its forward passes since the last optimizer step, seen by hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.task import TrainingTask
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sharpness_plugins.batches import count_samples

__all__ = ["Call", "Recorder", "unnoticed"]

_unnoticed = 0


@contextlib.contextmanager
def unnoticed() -> Iterator[None]:
    """Forward passes inside are ours, and no recorder takes them for training's."""
    global _unnoticed
    _unnoticed += 1
    try:
        yield
    finally:
        _unnoticed -= 1


@dataclass
class Call:
    """One forward pass of training.

    Attributes:
        num_samples: in the batch, on this rank.
        args: of the task; empty where the recorder does not keep them.
        loss: what came out, before the loop divided it; shape ``()``.
        scale: what the loop multiplied it with before the backward pass (accumulation, a GradScaler): the derivative of
            what it called ``backward`` on with respect to ``loss``. None before that backward pass.
    """

    num_samples: int
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    loss: Tensor | None = None
    scale: Tensor | None = None
    autocast: tuple[str, torch.dtype, bool] | None = None
    rng: tuple[Tensor, Tensor | None] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """The autocast state and the random numbers of then; those of now come back afterwards."""
        assert self.rng is not None
        on_accelerator = self.device.type == "cuda"
        autocast = (
            torch.autocast(self.autocast[0], dtype=self.autocast[1], cache_enabled=self.autocast[2])
            if self.autocast is not None
            else contextlib.nullcontext()
        )
        with torch.random.fork_rng(devices=[self.device] if on_accelerator else []), autocast:
            torch.set_rng_state(self.rng[0])
            if self.rng[1] is not None:
                torch.cuda.set_rng_state(self.rng[1], self.device)
            yield


class Recorder:
    """Sees the forward passes of the ``timm.task.TrainingTask`` that trains, and forgets them at each step.

    A global hook waits for the task, whose own hooks take over from there, so that no other module is slowed down.

    Args:
        parameters: the task that has one of these; None for the first task that is called.
        keep_inputs: keep what a second pass needs, until ``take``: a reference to each batch.
    Attributes:
        task: None before its first forward pass.
    """

    def __init__(self, parameters: Collection[Tensor] | None = None, *, keep_inputs: bool = True) -> None:
        self.task: TrainingTask | None = None
        self.keep_inputs = keep_inputs
        self._wanted = None if parameters is None else {id(parameter) for parameter in parameters}
        self._calls: list[Call] = []
        self._parameters: list[Tensor] = []
        self._handles: list[RemovableHandle] = [nn.modules.module.register_module_forward_pre_hook(self._look_for_task)]

    def take(self) -> list[Call]:
        """The passes whose gradients the coming (or just taken) step uses, in order; forgotten here."""
        calls, self._calls = self._calls, []
        return [call for call in calls if call.scale is not None]

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._calls = [], []

    def _look_for_task(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not isinstance(module, TrainingTask) or _unnoticed:
            return
        trainable: list[Tensor] = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if self._wanted is not None and not any(id(parameter) in self._wanted for parameter in trainable):
            return
        if not args:
            raise TypeError("the task was called with keywords only: call it as task(input, target), as timm does")
        self.close()
        self.task, self._parameters = module, trainable
        self._handles = [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._after, with_kwargs=True),
        ]
        self._before(module, args, {})  # its own hooks begin with the next pass

    def _before(self, task: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if _unnoticed or not torch.is_grad_enabled():
            return
        assert isinstance(task, TrainingTask)
        if any(call.scale is not None for call in self._calls) and all(p.grad is None for p in self._parameters):
            self._calls.clear()  # of a step that a GradScaler skipped
        call = Call(count_samples((args, dict(kwargs))) or 0)
        if self.keep_inputs:
            device = torch.device(task.device)
            call.args, call.kwargs, call.device = args, kwargs, device
            if torch.is_autocast_enabled(device.type):
                call.autocast = device.type, torch.get_autocast_dtype(device.type), torch.is_autocast_cache_enabled()
            call.rng = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self._calls.append(call)

    def _after(self, task: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        if _unnoticed or not torch.is_grad_enabled() or not self._calls:
            return
        call, loss = self._calls[-1], result["loss"]
        call.loss = loss.detach().clone()  # timm's loops divide it in place

        def note(gradient: Tensor) -> None:
            call.scale = gradient.detach() if call.scale is None else call.scale + gradient.detach()

        loss.register_hook(note)
