"""Fabric: the same three for loops that users write themselves; core's controller and monitor, with Fabric's backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from sharpness_plugins import distributed
from sharpness_plugins.batches import count_samples, map_tensors
from sharpness_plugins.controller import BatchController
from sharpness_plugins.losses import unwrap
from sharpness_plugins.monitor import Measurement, gradient_norm
from sharpness_plugins.optimizers import Rule, SharpnessAware
from sharpness_plugins.probe import probe_batches
from sharpness_plugins.schedules import Progress

from .lightning_auto import auto_fabric_callbacks
from .lightning_versions import check_lightning
from .monitoring import Monitoring, values_of
from .sharpening import Radius, Sharpening

check_lightning("lightning.fabric", "sharpness_adapters.fabric")

__all__ = ["FabricSharpnessCallback", "auto_fabric_callbacks", "backward", "batches", "sam_step"]


class FabricSharpnessCallback(Monitoring):
    """Measures in ``Fabric(callbacks=[...])``: its clock is the step of an optimizer that Fabric set up.

    Every rank measures at the same steps; the values go to Fabric's loggers, and stay in ``monitor.history``. With them go
    ``gradient_norm``, the norm of the gradient that the last step took, and after ``sam_step`` its ``surrogate_gap``.
    Where the strategy shards the module before it has an optimizer, write ``module = fabric.setup(module)``.

    Args:
        every: as for ``SharpnessMonitor``. Steps that a ``GradScaler`` skips do not count. Epochs are those that
            ``fabric.call("on_train_epoch_end")`` ends, and samples those that ``on_train_batch_start`` shows.
        probe: a loader whose data set the probe is drawn from, or batches in a list. None takes rank 0's first
            ``num_samples`` that ``fabric.call("on_train_batch_start", batch, batch_idx)`` shows, and measures from then on.
        settings: the others of ``SharpnessCallback``. None as ``loss_fn`` is ``training_step_loss`` for a LightningModule,
            else core's rules.
    """

    def __init__(self, metrics: Any = None, every: str = "200 steps", *, probe: Any = None, **settings: Any) -> None:
        super().__init__(metrics, every, probe=probe, **settings)
        self._fabric: Any = None
        self._module: nn.Module | None = None
        self._optimizer: Optimizer | None = None
        self._has_stepped = False
        self._steps, self._epochs, self._samples, self._seen = 0, 0, 0.0, 0.0
        self._batches: list[Any] = []

    def on_after_setup(self, fabric: Any, module: nn.Module) -> None:
        """Called by ``fabric.setup``; of several modules the first is measured. ``fabric.setup_module`` calls nothing."""
        if self._module is not None:
            return
        self._fabric, self._module = fabric, module
        held = weakref.WeakMethod(self._after_step)
        handle = register_optimizer_step_post_hook(lambda optimizer, *_: (note := held()) and note(optimizer))
        weakref.finalize(self, handle.remove)
        if self.probe is not None:
            with distributed.resolve_ranks("auto").sharing(
                "drawing the probe"
            ):  # what one rank cannot, the others must know
                probe = probe_batches(self.probe, self.num_samples, seed=self.seed)
            self._begin(probe)

    def on_train_batch_start(self, batch: Any, batch_idx: int = 0) -> None:
        size = float(count_samples(batch) or 1)
        self._samples += size * distributed.world_size()
        if self.monitor is None and self._module is not None:
            self._batches.append(batch)
            self._seen += size
            if self._seen >= self.num_samples:
                self._begin(self._of_rank_zero(self._batches))

    def _after_step(self, optimizer: Optimizer) -> None:
        """Of any optimizer, where it was not skipped."""
        if self._optimizer is None and self._module is not None:
            trained = {id(parameter) for parameter in self._module.parameters()}
            if any(id(parameter) in trained for group in optimizer.param_groups for parameter in group["params"]):
                self._optimizer = optimizer
        self._has_stepped |= optimizer is self._optimizer

    def on_after_optimizer_step(self, strategy: Any, optimizer: Optimizer) -> None:
        """Called by the ``step`` of an optimizer that Fabric set up."""
        if self._has_stepped:
            self._has_stepped = False
            self._steps += 1
            self._measure_if_due()

    def on_train_epoch_end(self) -> None:
        self._epochs += 1
        self._measure_if_due()

    def state_dict(self) -> dict[str, Any]:
        """JSON, to be put into the state that ``fabric.save`` is given."""
        monitor = None if self.monitor is None else self.monitor.state_dict()
        return {"monitor": monitor, "steps": self._steps, "epochs": self._epochs, "samples": self._samples}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._steps, self._epochs, self._samples = state["steps"], state["epochs"], state["samples"]
        self._saved = state["monitor"]
        self._restore()

    def _of_rank_zero(self, batches: list[Any]) -> list[Any]:
        """Every rank measures on the same; the ranks' batches are of one size, so all come here at once."""
        if distributed.world_size() == 1:
            return batches
        on_cpu = distributed.from_rank_zero([map_tensors(batch, lambda tensor: tensor.cpu()) for batch in batches])
        return [self._fabric.to_device(batch) for batch in on_cpu]

    def _begin(self, probe: list[Any]) -> None:
        assert self._module is not None
        module, _ = unwrap(self._module)
        signals = {"gradient_norm": gradient_norm(module), "surrogate_gap": self._gap}
        self.monitor = self._make_monitor(module, probe, self._log, signals)
        self._batches = []
        self._restore()

    def _gap(self) -> float | None:
        held = None if self._optimizer is None else vars(self._optimizer).get(_HELD)
        gap = None if held is None else held[1].surrogate_gap
        return None if gap is None else distributed.sum_of(gap) / distributed.world_size()

    def _restore(self) -> None:
        if self.monitor is not None and self._saved is not None:
            self.monitor.load_state_dict(self._saved)
            self._saved = None

    def _measure_if_due(self) -> None:
        if self.monitor is None:
            return
        progress = Progress(self._steps, round(self._samples), float(self._epochs), 0, 0)
        self.monitor.measure_if_due(progress)

    def _log(self, measurement: Measurement) -> None:
        if getattr(self._fabric, "loggers", None):
            self._fabric.log_dict(values_of(measurement, self.prefix), step=measurement.step)


_HELD = "_sharpness_step"  # the attribute of an optimizer that holds what sam_step has put around it


def sam_step(
    optimizer: Optimizer,
    closure: Callable[[], Tensor | None],
    rho: Radius | None = None,
    *,
    adaptive: bool = False,
    rule: str | Rule = "sam",
    interval: int = 1,
    module: nn.Module,
    clip: Callable[[], object] | None = None,
) -> Tensor | None:
    """A sharpness-aware step: ``closure`` runs forward and ``fabric.backward`` for all micro-batches of a step, as often as
    the rule wants gradients.

    The gradients before it do not count; they are the rule's afterwards. Under a ``GradScaler`` all passes are scaled, and
    the step is skipped where one of them overflows. What the rule remembers is saved with the state of ``optimizer``, and
    begins anew where a step asks for another rule.

    Args:
        closure: returns the loss, of which the ``surrogate_gap`` of a ``FabricSharpnessCallback`` is made, or None.
        rho: radius; None for the rule's own: 0.05 for ``sam``, 0.5 for ``asam``.
        adaptive: short for ``rule="asam"``.
        rule: a name that ``sharpness list`` shows, and its settings, ``"gsam:alpha=0.3"``; or a ``Rule``.
        interval: an ascent in each so-many-th step only.
        clip: called before the step, ``lambda: fabric.clip_gradients(module, optimizer, max_norm=1.0)``; clips the rule's
            gradient only.
    Returns:
        what ``closure`` returned the first time, the loss at the weights where the rule evaluates it there.
    """
    sharp = _around(optimizer, Sharpening.read(rule, rho, interval, adaptive=adaptive), unwrap(module)[0])
    loss: Tensor | None = sharp.gradient(closure)
    if clip is not None:
        clip()
    optimizer.step()
    return loss


def _around(optimizer: Any, wanted: Sharpening, module: nn.Module) -> SharpnessAware:
    """The one of the step before, unless that followed another rule; numbers may be other ones in each step."""
    inner: Optimizer = getattr(optimizer, "optimizer", optimizer)
    is_number = wanted.rho is None or isinstance(wanted.rho, (int, float))
    kind = replace(wanted, rho=None) if is_number else wanted
    held: tuple[Sharpening, SharpnessAware] | None = vars(inner).get(_HELD)
    if held is None or held[0] != kind:
        precision = getattr(getattr(optimizer, "_strategy", None), "precision", None)
        held = kind, kind.around(inner, module, scaler=getattr(precision, "scaler", None))
        vars(inner)[_HELD] = held
    if is_number:
        for group in inner.param_groups:
            if not group["rho_is_own"]:
                group["rho"] = wanted.rule.default_rho if wanted.rho is None else wanted.rho
    return held[1]


def batches(fabric: Any, controller: BatchController, loader: Iterable[Any], module: Any = None) -> Iterator[Any]:
    """``controller.batches(loader)`` on Fabric's device, with the ranks' sum only for the last micro-batch of a step.

    Args:
        loader: as it was before ``fabric.setup_dataloaders``, which would share it out to the ranks again.
        module: what ``fabric.setup`` gave, to accumulate without communication.
    """
    for batch in controller.batches(loader):
        moved = fabric.to_device(batch)
        if module is None or controller.at_step:
            yield moved
        else:
            with fabric.no_backward_sync(module):
                yield moved


def backward(fabric: Any, controller: BatchController, loss: Tensor) -> None:
    """``controller.backward(loss)`` through ``fabric.backward``, which mixed precision asks for."""
    scaler = getattr(fabric.strategy.precision, "scaler", None)
    scale = 1.0 if scaler is None else float(scaler.get_scale())
    controller.backward(_Loss(fabric, loss), scale=scale)  # type: ignore[arg-type]


class _Loss:
    """A loss whose backward pass is Fabric's."""

    def __init__(self, fabric: Any, loss: Tensor) -> None:
        self._fabric, self._loss = fabric, loss

    def __mul__(self, weight: float) -> _Loss:
        return _Loss(self._fabric, self._loss * weight)

    def backward(self) -> None:
        self._fabric.backward(self._loss)
