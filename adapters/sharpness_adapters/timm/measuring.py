"""Measuring the task that trains, by the clock of its optimizer; settings come from the environment."""

from __future__ import annotations

import copy
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.task import ClassificationTask, TrainingTask
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from sharpness_plugins import distributed
from sharpness_plugins.batches import map_tensors
from sharpness_plugins.losses import unwrap
from sharpness_plugins.measure import resolve_metrics
from sharpness_plugins.monitor import CSVSink, JSONLSink, Measurement, Reading, SharpnessMonitor, Sink, gradient_norm
from sharpness_plugins.registry import get_metric
from sharpness_plugins.schedules import Duration, Progress
from sharpness_plugins.texts import name_and_settings

from ..timm_plugin import task_loss
from .recording import Call, Recorder, unnoticed
from .second_pass import second_pass_of

__all__ = ["STATE", "Settings", "TaskMonitor", "bare_task", "measured"]

STATE = "sharpness"
"""The key under which the first parameter group keeps our state, so that the checkpoints of any trainer hold it."""

_logger = logging.getLogger("sharpness_plugins.timm")


@dataclass(frozen=True)
class Settings:
    """What to measure, and how often.

    Attributes:
        metrics: names with settings, ``"hessian_topk:k=1"``; empty for no measuring.
        every, budget, seed: as for ``SharpnessMonitor``.
        out: a file that gets each measurement, CSV or (``.jsonl``) JSON lines.
        num_samples: to measure on.
    """

    metrics: tuple[str, ...] = ()
    every: str = "500 steps"
    out: Path | None = None
    num_samples: int = 512
    budget: float | None = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {self.num_samples}")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings:
        """From ``SHARPNESS_METRICS`` (names, separated by blanks), ``SHARPNESS_EVERY``, ``SHARPNESS_OUT``,
        ``SHARPNESS_SAMPLES``, ``SHARPNESS_BUDGET`` (a share of training's time, or ``none``) and ``SHARPNESS_SEED``."""
        read: dict[str, Any] = {
            "metrics": lambda text: tuple(text.split()),
            "every": str,
            "out": Path,
            "num_samples": int,
            "budget": lambda text: None if text.lower() == "none" else float(text),
            "seed": int,
        }
        found: dict[str, Any] = {}
        for name, convert in read.items():
            variable = "SHARPNESS_" + ("SAMPLES" if name == "num_samples" else name.upper())
            if text := environment.get(variable, "").strip():
                try:
                    found[name] = convert(text)
                except ValueError as error:
                    raise ValueError(f"{variable}={text}: {error}") from None
        return cls(**found)

    def resolved(self) -> dict[str, Any]:
        """The metrics, by the keys of the measurements."""
        asked = [name_and_settings(text) for text in self.metrics]
        return resolve_metrics([get_metric(name, **given) for name, given in asked])

    def sinks(self) -> list[Sink]:
        if self.out is None:
            return [_log]
        self.out.parent.mkdir(parents=True, exist_ok=True)
        return [_log, JSONLSink(self.out) if self.out.suffix in (".jsonl", ".json") else CSVSink(self.out)]


def _log(made: Measurement) -> None:
    values = "  ".join(f"{name}: {value:.4g}" for name, value in made.values.items())
    _logger.info(f"Sharpness: step {made.step}  {values}  ({made.seconds:.1f}s)")
    for name, note in made.notes.items():
        _logger.warning(f"Sharpness: {name} at step {made.step}: {note}")


def bare_task(task: TrainingTask) -> TrainingTask:
    """The same task without DDP, compilation and hooks; its parameters are those that are trained, not a teacher's."""
    bare = copy.copy(task)
    bare.__dict__.update({name: OrderedDict() for name, held in vars(task).items() if _is_hooks(name, held)})
    if (module := task.get_trainable_module()) is not task and isinstance(module, nn.Module):
        bare.__dict__.update(task._modules)  # attributes, but no submodules: a teacher, the averaged model
        del bare.__dict__["trainable_module"]
        bare._modules = {"trainable_module": unwrap(module)[0]}
    return bare


def measured(task: TrainingTask) -> dict[str, Any]:
    """``model`` and ``criterion`` where the task's loss is a cross-entropy, which more metrics know; else ``loss_fn``."""
    criterion = _cross_entropy(task)
    if criterion is None:
        return {"model": bare_task(task), "loss_fn": task_loss}
    model = task.get_trainable_module()
    assert model is not None
    return {"model": unwrap(model)[0], "criterion": criterion}


def _cross_entropy(task: TrainingTask) -> nn.CrossEntropyLoss | None:
    """torch's, which is the same as timm's two of its own, and takes classes as well as probabilities."""
    if type(task).forward is not ClassificationTask.forward:
        return None
    criterion = task.criterion
    if isinstance(criterion, LabelSmoothingCrossEntropy):
        return nn.CrossEntropyLoss(label_smoothing=criterion.smoothing)
    if isinstance(criterion, SoftTargetCrossEntropy):
        return nn.CrossEntropyLoss()
    return criterion if type(criterion) is nn.CrossEntropyLoss else None


def _is_hooks(name: str, held: Any) -> bool:
    return "_hooks" in name and isinstance(held, dict)


class TaskMonitor:
    """Counts the steps of the optimizer that a task trains with, and measures the task when it is due.

    Found by itself: the first task that is called, the first optimizer that has parameters of it. It measures on rank 0,
    on the model without its wrappers, so that no rank waits in a collective for another. The state lies in the
    optimizer's first parameter group, which checkpoints hold and ``load_state_dict`` brings back.

    Args:
        probe: what to measure on; None for the first batches of training, as augmented and mixed as they were.
        epoch: tells how many epochs are behind; None where nobody knows how long one is.
    Attributes:
        monitor: None before the first step, and where nothing is to be measured.
    Raises:
        UnknownNameError: there is no such metric. ValueError: ``every`` counts epochs, and nobody knows their length.
    """

    def __init__(
        self, settings: Settings, *, probe: list[Any] | None = None, epoch: Callable[[], float] | None = None
    ) -> None:
        self.settings = settings
        self.monitor: SharpnessMonitor | None = None
        self.step = self.samples = self.base_batch_size = 0
        self._metrics = settings.resolved() if settings.metrics else {}
        self._probe, self._probe_samples = [] if probe is None else probe, math.inf if probe is not None else 0
        self._epoch = epoch
        if self._metrics and epoch is None and _counts_epochs(settings.every):
            raise ValueError(
                f"sharpness is to be measured every {settings.every!r}, but how long an epoch is cannot be seen from "
                "--device-modules: write '500 steps' or '1M samples', or run train.py through sharpness-timm"
            )
        self._recorder = Recorder(keep_inputs=bool(self._metrics) and probe is None)
        self._optimizer: Optimizer | None = None
        self._handle = register_optimizer_step_post_hook(self._after_step)

    def follow(self, optimizer: Optimizer) -> None:
        """Count the steps of this one, from where the checkpoint was that it came from."""
        state = optimizer.param_groups[0].setdefault(STATE, {})
        self._optimizer = optimizer
        self.step, self.samples = state.get("step", 0), state.get("samples", 0)
        self.base_batch_size = state.get("base_batch_size", 0)

    def close(self) -> None:
        """Stop measuring."""
        self._recorder.close()
        self._handle.remove()

    @property
    def last(self) -> Mapping[str, float]:
        """The newest value of each metric and signal; NaN of what was not measured yet."""
        values = dict.fromkeys(self._metrics, math.nan)
        if self.monitor is not None and self.monitor.last is not None:
            values.update({name: value for name, value in self.monitor.last.values.items() if name in values})
        return values

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        task = self._recorder.task
        if task is None or not self._trains(optimizer, task):
            return
        calls = self._recorder.take()
        if not calls:  # the hooks of a step that calls its base class's run twice
            return
        batch_size = sum(call.num_samples for call in calls) * distributed.world_size()
        self.step, self.samples = self.step + 1, self.samples + batch_size
        self.base_batch_size = self.base_batch_size or batch_size
        optimizer.param_groups[0].setdefault(STATE, {}).update(
            step=self.step, samples=self.samples, base_batch_size=self.base_batch_size
        )
        measures = bool(self._metrics) and distributed.rank() == 0  # not known before training, as ranks come after imports
        self._recorder.keep_inputs &= measures
        if not measures or not self._has_probe(calls):
            return
        if self.monitor is None:
            self._open(optimizer, task)
        self._measure(optimizer, batch_size)

    def _trains(self, optimizer: Optimizer, task: TrainingTask) -> bool:
        if self._optimizer is None:
            trained = {id(parameter) for parameter in task.parameters() if parameter.requires_grad}
            if any(id(parameter) in trained for group in optimizer.param_groups for parameter in group["params"]):
                self.follow(optimizer)
        return optimizer is self._optimizer

    def _has_probe(self, calls: Sequence[Call]) -> bool:
        """Whether there is one; until then the batches of training are put aside."""
        while calls and self._probe_samples < self.settings.num_samples:
            call, *calls = calls
            self._probe.append(map_tensors(call.args, _aside))
            self._probe_samples += call.num_samples
        self._recorder.keep_inputs = self._probe_samples < self.settings.num_samples
        return not self._recorder.keep_inputs

    def _open(self, optimizer: Optimizer, task: TrainingTask) -> None:
        # of the step that was just taken: clipped, and SAM's, where there is such
        signals: dict[str, Reading] = {"gradient_norm": gradient_norm(optimizer)}
        if (second_pass := second_pass_of(optimizer)) is not None:
            signals["surrogate_gap"] = second_pass.surrogate_gap
        self.monitor = SharpnessMonitor(
            probe=self._probe,
            metrics=self._metrics,
            every=self.settings.every,
            budget=self.settings.budget,
            seed=self.settings.seed,
            signals={name: read for name, read in signals.items() if name not in self._metrics},
            sinks=self.settings.sinks(),
            **measured(task),
        )
        if "monitor" in optimizer.param_groups[0][STATE]:
            self.monitor.load_state_dict(optimizer.param_groups[0][STATE]["monitor"])

    def _measure(self, optimizer: Optimizer, batch_size: int) -> None:
        assert self.monitor is not None
        epoch = None if self._epoch is None else self._epoch()
        progress = Progress(self.step, self.samples, epoch, batch_size, self.base_batch_size)
        with unnoticed():
            made = self.monitor.measure_if_due(progress)
        if made is not None:
            optimizer.param_groups[0][STATE]["monitor"] = self.monitor.state_dict()


def _aside(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _counts_epochs(every: str) -> bool:
    try:
        return Duration.parse(every).unit == "epochs"
    except ValueError:  # a time, or nothing at all, which the monitor says
        return False
