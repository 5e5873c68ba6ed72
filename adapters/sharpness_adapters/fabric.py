"""Fabric: the same three for loops that users write themselves; core's controller and monitor, with Fabric's backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from sharpness_plugins import distributed
from sharpness_plugins.batches import count_samples, map_tensors
from sharpness_plugins.controller import BatchController
from sharpness_plugins.losses import unwrap
from sharpness_plugins.monitor import CSVSink, JSONLSink, Measurement, SharpnessMonitor
from sharpness_plugins.optimizers import perturbed
from sharpness_plugins.pacing import Pace
from sharpness_plugins.probe import probe_batches
from sharpness_plugins.schedules import Progress

from .lightning import is_lightning_module, metrics_of, training_step_loss
from .lightning_auto import auto_fabric_callbacks

__all__ = ["FabricSharpnessCallback", "auto_fabric_callbacks", "backward", "batches", "sam_step"]


class FabricSharpnessCallback:
    """Measures in ``Fabric(callbacks=[...])``: its clock is the step of an optimizer that Fabric set up.

    Every rank measures at the same steps; the values go to Fabric's loggers, and stay in ``monitor.history``.

    Args:
        loader: whose data set the probe is drawn from, or batches in a list. None takes rank 0's first ``num_samples`` that
            ``fabric.call("on_train_batch_start", batch, batch_idx)`` shows, and measures from then on.
        every: as for ``SharpnessMonitor``. Epochs are those that ``fabric.call("on_train_epoch_end")`` ends, and samples
            those that ``on_train_batch_start`` shows.
        metrics, budget, budget_in, num_samples, seed, batch_norm, csv, jsonl, prefix, loss_fn, criterion: as for
            ``SharpnessCallback``; None as ``loss_fn`` is ``training_step_loss`` for a LightningModule, else core's rules.
    """

    def __init__(
        self,
        metrics: str | Sequence[Any] | Mapping[str, Any] | None = None,
        every: str = "200 steps",
        budget: float | None = 0.02,
        num_samples: int = 512,
        seed: int = 0,
        batch_norm: str = "eval",
        budget_in: str = "seconds",
        csv: str | None = None,
        jsonl: str | None = None,
        prefix: str = "sharpness",
        loader: Iterable[Any] | None = None,
        loss_fn: Any = None,
        criterion: Any = None,
    ) -> None:
        self._files = [kind(path) for kind, path in ((CSVSink, csv), (JSONLSink, jsonl)) if path is not None]
        self.prefix, self._loader, self._num_samples, self._seed = prefix, loader, num_samples, seed
        Pace(every)  # refused here rather than after the data were loaded
        self._settings: dict[str, Any] = {
            "metrics": metrics_of(metrics),
            "every": every,
            "budget": budget,
            "budget_in": budget_in,
            "batch_norm": batch_norm,
            "seed": seed,
            "criterion": criterion,
        }
        self._loss_fn = loss_fn
        self._fabric: Any = None
        self._module: nn.Module | None = None
        self.monitor: SharpnessMonitor | None = None
        self._steps, self._epochs, self._samples, self._seen = 0, 0, 0.0, 0.0
        self._batches: list[Any] = []
        self._saved: dict[str, Any] | None = None

    def on_after_setup(self, fabric: Any, module: nn.Module) -> None:
        """Called by ``fabric.setup``; of several modules the first is measured."""
        if self._module is None:
            self._fabric, self._module = fabric, module
            if self._loader is not None:
                self._make_monitor(probe_batches(self._loader, self._num_samples, seed=self._seed))

    def on_train_batch_start(self, batch: Any, batch_idx: int = 0) -> None:
        size = float(count_samples(batch) or 1)
        self._samples += size * distributed.world_size()
        if self.monitor is None and self._module is not None:
            self._batches.append(batch)
            self._seen += size
            if self._seen >= self._num_samples:
                self._make_monitor(self._of_rank_zero(self._batches))

    def on_after_optimizer_step(self, strategy: Any, optimizer: Optimizer) -> None:
        """Called by the ``step`` of an optimizer that Fabric set up."""
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

    def _make_monitor(self, probe: list[Any]) -> None:
        assert self._module is not None
        module, _ = unwrap(self._module)
        loss_fn = self._loss_fn
        if loss_fn is None and self._settings["criterion"] is None and is_lightning_module(module):
            loss_fn = training_step_loss
        sinks = [*(self._files if distributed.rank() == 0 else ()), self._log]
        self.monitor = SharpnessMonitor(module, probe, loss_fn=loss_fn, sinks=sinks, **self._settings)
        self._batches = []
        self._restore()

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
            values = {f"{self.prefix}/{name}": value for name, value in measurement.values.items()}
            self._fabric.log_dict(values, step=measurement.step)


def sam_step(
    optimizer: Optimizer,
    closure: Callable[[], Tensor | None],
    rho: float = 0.05,
    *,
    adaptive: bool = False,
    module: nn.Module,
) -> Tensor | None:
    """A sharpness-aware step: ``closure`` runs forward and ``fabric.backward`` for all micro-batches of a step, twice.

    The gradients before it must be zero or None; they are the second ones afterwards. What clips them is the last thing of
    ``closure``, which then clips both. Under a ``GradScaler`` both passes are scaled, which the move does not see.

    Returns:
        what ``closure`` returned the first time, the loss at the weights.
    """
    loss = closure()
    inner, _ = unwrap(module)
    with perturbed(inner.parameters(), rho, adaptive=adaptive, module=inner):
        closure()
    optimizer.step()
    return loss


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
    controller.backward(_Loss(fabric, loss))  # type: ignore[arg-type]


class _Loss:
    """A loss whose backward pass is Fabric's."""

    def __init__(self, fabric: Any, loss: Tensor) -> None:
        self._fabric, self._loss = fabric, loss

    def __mul__(self, weight: float) -> _Loss:
        return _Loss(self._fabric, self._loss * weight)

    def backward(self) -> None:
        self._fabric.backward(self._loss)
