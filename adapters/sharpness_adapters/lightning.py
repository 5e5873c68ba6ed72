"""Lightning: measuring, batch-size schedules and sharpness-aware steps as callbacks of an unchanged Trainer.

For ``lightning.pytorch``; the older package ``pytorch_lightning`` has other classes, and its Trainer is refused by name.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import BatchSampler, DataLoader, Sampler

from sharpness_plugins import distributed, registry, sampling
from sharpness_plugins.accumulation import Accumulation, synchronized
from sharpness_plugins.batches import count_samples
from sharpness_plugins.controller import BatchChange, BatchController
from sharpness_plugins.errors import PluginWarning, missing_dependency
from sharpness_plugins.measure import Metrics, resolve_metrics
from sharpness_plugins.monitor import CSVSink, JSONLSink, Measurement, SharpnessMonitor, Sink
from sharpness_plugins.noise_scale import SIGNALS, NoiseScaleMeter
from sharpness_plugins.optimizers import perturbed
from sharpness_plugins.pacing import Budget, Pace
from sharpness_plugins.probe import probe_batches
from sharpness_plugins.schedules import (
    BatchSchedule,
    Plan,
    Progress,
    parse_schedule,
    plan,
)
from sharpness_plugins.texts import name_and_settings

from .lightning_auto import auto_callbacks, auto_fabric_callbacks

OLDEST = (2, 4)
PROBE_BATCH = 64  # not the loader's, which a schedule changes: the sum of other batches rounds otherwise


def _check_version(found: str) -> None:
    """
    Raises:
        ImportError: it is too old.
    """
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        raise ImportError(
            f"sharpness_adapters.lightning needs lightning>={OLDEST[0]}.{OLDEST[1]}, and {found} is installed. Install it "
            'with: pip install "sharpness-plugins[lightning]"'
        )


try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.trainer.states import TrainerFn
    from lightning.pytorch.utilities.parsing import lightning_hasattr, lightning_setattr
except ModuleNotFoundError:
    missing_dependency(
        "lightning.pytorch",
        extra="lightning",
        purpose="sharpness_adapters.lightning (which is for the package lightning, not pytorch_lightning)",
    )
    raise
_check_version(metadata.version("lightning"))

__all__ = [
    "BatchSizeCallback",
    "SAMCallback",
    "SharedBatchSampler",
    "SharpnessCallback",
    "auto_callbacks",
    "auto_fabric_callbacks",
    "total_steps",
    "training_step_loss",
]


def training_step_loss(module: Any, batch: Any) -> Any:
    """``training_step(batch, 0)`` of a LightningModule, with its logging silenced: a ``loss_fn`` of ``measure_sharpness``.

    Raises:
        TypeError: manual optimization, whose ``training_step`` would step; a step that returned no loss.
    """
    if not module.automatic_optimization:
        raise TypeError(
            f"{type(module).__name__} optimizes by hand, so its training_step would step the optimizer. Pass "
            "loss_fn=lambda module, batch: ... (the scalar mean loss of a batch)."
        )
    with _silenced(module):
        loss = _loss_of(module.training_step(*_step_arguments(module, batch, 0)))
    if loss is None:
        raise TypeError(f"training_step of {type(module).__name__} returned no loss for this batch")
    return loss


def _step_arguments(module: Any, batch: Any, batch_idx: int) -> tuple[Any, ...]:
    """As Lightning passes them: the index only where ``training_step`` takes two arguments."""
    parameters = inspect.signature(module.training_step).parameters.values()
    takes_index = len(parameters) >= 2 or any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
    return (batch, batch_idx) if takes_index else (batch,)


def _loss_of(output: Any) -> Tensor | None:
    loss: Tensor | None = output.get("loss") if isinstance(output, Mapping) else output
    return loss


@contextlib.contextmanager
def _silenced(module: Any) -> Iterator[None]:
    """``log`` and ``log_dict`` do nothing; shadowed in the instance, as a class may have overridden them."""
    shadows = {name: module.__dict__[name] for name in ("log", "log_dict") if name in module.__dict__}
    module.__dict__.update(dict.fromkeys(("log", "log_dict"), lambda *args, **kwargs: None))
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            del module.__dict__[name]
        module.__dict__.update(shadows)


def is_lightning_module(module: Any) -> bool:
    return isinstance(module, LightningModule)


def _check_trainer(owner: Callback, trainer: Any, *, steps: bool = True) -> None:
    name = type(owner).__name__
    if not isinstance(trainer, Trainer):
        raise TypeError(
            f"{name} is a callback of lightning.pytorch.Trainer, and this is a {type(trainer).__module__}.Trainer. Import "
            "Trainer and LightningModule from lightning.pytorch."
        )
    if steps and not trainer.lightning_module.automatic_optimization:
        raise ValueError(
            f"{name} needs automatic optimization, and {type(trainer.lightning_module).__name__} steps its optimizers itself"
        )
    if steps and trainer.strategy.handles_gradient_accumulation:
        raise ValueError(f"{name} cannot work under {type(trainer.strategy).__name__}, which accumulates gradients itself")


class _Groups:
    """Counts samples by optimizer steps: those of all micro-batches of a step, over all ranks.

    Attributes:
        samples: of finished groups.
        is_open: whether a group was begun and not stepped upon.
    """

    def __init__(self) -> None:
        self.samples = 0.0
        self._open = 0.0
        self._steps = 0

    @property
    def is_open(self) -> bool:
        return self._open > 0

    def begin(self, trainer: Any) -> None:
        self._open, self._steps = 0.0, trainer.global_step

    def end_batch(self, trainer: Any, batch: Any) -> float | None:
        """After a micro-batch: the samples of the group where it was the last, else None. Collective at the last."""
        self._open += _samples_of(batch)
        if trainer.global_step == self._steps:
            return None
        group = distributed.sum_of(self._open)
        self.samples += group
        self.begin(trainer)
        return group


def _samples_of(batch: Any) -> float:
    return float(count_samples(batch) or 1)


def _epoch_after(trainer: Any, batch_idx: int) -> float:
    """Epochs behind us after this micro-batch; whole ones where nobody knows how long one is."""
    batches: float = trainer.num_training_batches
    epoch: int = trainer.current_epoch
    if trainer.is_last_batch or batch_idx + 1 == batches:
        return epoch + 1.0
    return epoch + (batch_idx + 1) / batches  # batches may be infinite


def metrics_of(metrics: Any) -> Any:
    """Names with settings, ``"hessian_topk:k=1"``, made metrics; anything else as it is."""
    if isinstance(metrics, str):
        name, settings = name_and_settings(metrics)
        return registry.get_metric(name, **settings)
    return [metrics_of(one) for one in metrics] if isinstance(metrics, (list, tuple)) else metrics


class SharpnessCallback(Callback):
    """Measures sharpness during ``fit``, and once on the validation data in ``validate``.

    Training with it is training without it, bit for bit. Every rank measures at the same steps, on the same probe. The
    values go to the trainer's loggers when they are measured, and as ``sharpness/<metric>`` to ``log`` in every epoch,
    so that ``ModelCheckpoint(monitor="sharpness/hessian_topk")`` and ``EarlyStopping`` find them.

    Args:
        metrics: as for ``measure_sharpness``; a name may carry settings, ``"hessian_topk:k=1"``.
        every, budget, budget_in, batch_norm, seed, criterion: as for ``SharpnessMonitor``. The first measurement is made
            before the first step, whatever the budget, which waits with the next one.
        loss_fn: None for ``training_step_loss``, unless there is a ``criterion``.
        num_samples: of the probe, drawn once from the training data and passed through the module's transfer hooks.
        probe: batches or a loader to draw it from; None for the training loader's data set.
        csv, jsonl: files to append to.
        sinks: callables that are told of each measurement, on every rank.
        prefix: of the names that are logged, which also tells two of these callbacks apart in a checkpoint.
    Attributes:
        monitor: the ``SharpnessMonitor``; None before training.
        is_optional: of an automatic one: a training loader that no probe can be drawn from is a warning only, and it stands
            aside where the user has a ``SharpnessCallback``.
    """

    def __init__(
        self,
        metrics: str | Sequence[Any] | Mapping[str, Any] | None = None,
        every: str = "1ep",
        budget: float | None = 0.02,
        num_samples: int = 512,
        seed: int = 0,
        batch_norm: str = "eval",
        budget_in: str = "seconds",
        csv: str | None = None,
        jsonl: str | None = None,
        prefix: str = "sharpness",
        probe: Any = None,
        loss_fn: Any = None,
        criterion: Any = None,
        sinks: Any = None,
    ) -> None:
        self.metrics: Metrics = resolve_metrics(metrics_of(metrics))
        Pace(every), Budget(budget, budget_in)  # refused here rather than after the data were loaded
        self.every, self.budget, self.budget_in = every, budget, budget_in
        self.num_samples, self.seed, self.batch_norm = num_samples, seed, batch_norm
        self.csv, self.jsonl, self.prefix = csv, jsonl, prefix
        self.probe, self.loss_fn, self.criterion = probe, loss_fn, criterion
        self.sinks: list[Sink] = [sinks] if callable(sinks) else list(sinks or ())
        self.monitor: SharpnessMonitor | None = None
        self.is_optional = False
        self._groups = _Groups()
        self._saved: dict[str, Any] | None = None

    @property
    def state_key(self) -> str:
        return f"SharpnessCallback[{self.prefix}]{' (automatic)' if self.is_optional else ''}"

    def _stands_aside(self, trainer: Any) -> bool:
        given = [one for one in trainer.callbacks if isinstance(one, SharpnessCallback) and not one.is_optional]
        return self.is_optional and bool(given)

    @property
    def last(self) -> Measurement | None:
        """The newest measurement."""
        return None if self.monitor is None else self.monitor.last

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        _check_trainer(self, trainer, steps=False)

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        if self._stands_aside(trainer):
            return
        if self._saved is None and trainer.global_step and self.monitor is not None:
            self._saved = self.state_dict()  # fit goes on where another fit of this trainer ended
        self._groups.begin(trainer)
        try:
            self.monitor = self._monitor(trainer, pl_module, trainer.train_dataloader)
        except Exception as error:
            if not self.is_optional:
                raise
            warnings.warn(f"no sharpness is measured: {type(error).__name__}: {error}", PluginWarning, stacklevel=2)
            return
        if self._saved is not None:
            self.monitor.load_state_dict(self._saved["monitor"])
            self._groups.samples = float(self._saved["samples"])
            self._saved = None
        if not self.monitor.history:  # whatever the budget: who monitors a value must find one
            progress = Progress(trainer.global_step, round(self._groups.samples), float(trainer.current_epoch), 0, 0)
            self.monitor.measure(progress)

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._groups.end_batch(trainer, batch) is not None and self.monitor is not None:
            self._measure_if_due(trainer, _epoch_after(trainer, batch_idx))

    def on_validation_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING and not self._stands_aside(trainer):
            with torch.inference_mode(False):  # around the loader, too: inference tensors have no backward
                monitor = self._monitor(trainer, pl_module, trainer.val_dataloaders)
                progress = Progress(trainer.global_step, round(self._groups.samples), None, 0, 0)
                monitor.measure(progress)
            self.monitor = monitor
        if not trainer.sanity_checking:
            self._log(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
        self._log(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        if self.monitor is None:
            return self._saved or {}
        return {"monitor": self.monitor.state_dict(), "samples": self._groups.samples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = dict(state_dict) or None

    def _monitor(self, trainer: Any, module: LightningModule, loader: Any) -> SharpnessMonitor:
        loss_fn = self.loss_fn
        if loss_fn is None and self.criterion is None:
            loss_fn = training_step_loss
        files = [
            kind(path)
            for kind, path in ((CSVSink, self.csv), (JSONLSink, self.jsonl))
            if path is not None and trainer.is_global_zero
        ]
        return SharpnessMonitor(
            module,
            _probe(trainer, module, loader if self.probe is None else self.probe, self.num_samples, self.seed),
            self.metrics,
            every=self.every,
            budget=self.budget,
            budget_in=self.budget_in,
            loss_fn=loss_fn,
            criterion=self.criterion,
            batch_norm=self.batch_norm,
            seed=self.seed,
            signals=_free_signals(trainer),
            sinks=[*files, _LoggerSink(trainer, self.prefix), *self.sinks],
        )

    def _measure_if_due(self, trainer: Any, epoch: float) -> None:
        assert self.monitor is not None
        progress = Progress(
            trainer.global_step,
            round(self._groups.samples),
            epoch,
            round(self._groups.samples / trainer.global_step) if trainer.global_step else 0,
            0,
        )
        self.monitor.measure_if_due(progress)

    def _log(self, trainer: Any, module: LightningModule) -> None:
        """The last value, in every epoch: a monitor of ours is then never missing."""
        if self.last is None:
            return
        logger = None if trainer.state.fn == TrainerFn.VALIDATING else False  # in fit the loggers have had it
        for name, value in self.last.values.items():
            module.log(f"{self.prefix}/{name}", value, rank_zero_only=False, logger=logger, on_step=False, on_epoch=True)


class _LoggerSink:
    """The trainer's own loggers, at the optimizer step of the measurement."""

    def __init__(self, trainer: Any, prefix: str) -> None:
        self._trainer, self._prefix = trainer, prefix

    def __call__(self, measurement: Measurement) -> None:
        values = {f"{self._prefix}/{name}": value for name, value in measurement.values.items()}
        values |= {f"{self._prefix}/{name}_se": error for name, error in measurement.standard_errors.items()}
        if measurement.loss is not None:
            values[f"{self._prefix}/loss"] = measurement.loss
        for logger in self._trainer.loggers:
            logger.log_metrics(values, step=measurement.step)


def _free_signals(trainer: Any) -> dict[str, Any]:
    """Of the other callbacks, at no cost."""
    found: dict[str, Any] = {}
    for callback in trainer.callbacks:
        if isinstance(callback, SAMCallback):
            found["surrogate_gap"] = callback._gap_over_ranks
            found["gradient_norm"] = lambda sam=callback: sam.gradient_norm
        if isinstance(callback, BatchSizeCallback):
            found["noise_scale"] = callback.noise_scale
    return found


def _probe(trainer: Any, module: LightningModule, loader: Any, num_samples: int, seed: int) -> list[Any]:
    """As ``training_step`` would get them: through the transfer hooks, with random states of their own."""
    batches = _drawn(loader, num_samples, seed)
    restore = sampling.rng_states(trainer.strategy.root_device)
    try:
        sampling.seed_global(sampling.key_for(seed, "probe", "transfer") >> 1)
        return [_transferred(trainer, module, batch) for batch in batches]
    finally:
        restore()


def _drawn(loader: Any, num_samples: int, seed: int) -> list[Any]:
    """From one loader, or from each of several in a mapping or sequence, whose batches then come in one, too."""
    if isinstance(loader, Mapping):
        parts = {name: _drawn(one, num_samples, seed) for name, one in loader.items()}
        return [dict(zip(parts, batch, strict=True)) for batch in zip(*parts.values(), strict=False)]
    if isinstance(loader, (list, tuple)) and loader and all(isinstance(one, DataLoader) for one in loader):
        return [list(batch) for batch in zip(*(_drawn(one, num_samples, seed) for one in loader), strict=False)]
    return probe_batches(loader, num_samples, seed=seed, batch_size=PROBE_BATCH if hasattr(loader, "dataset") else None)


def _transferred(trainer: Any, module: LightningModule, batch: Any) -> Any:
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


class SAMCallback(Callback):
    """Sharpness-aware minimization with an unchanged module and optimizer: the second pass before each optimizer step.

    In ``on_before_optimizer_step`` the weights move to ``w + rho g/‖g‖``, ``training_step`` runs again on every micro-batch
    of the step, silently, and the optimizer gets the gradients made there. So it holds with accumulation, clipping (of the
    second gradient only), several ranks, bf16 and a ``GradScaler``. Put after callbacks that look at the first gradient.

    Args:
        rho, adaptive, eta: as for ``perturbed``.
    Cost: a second forward and backward pass; the micro-batches of a step stay in memory.
    Attributes:
        num_skipped: steps left out because the second gradient overflowed in half precision; the scale is then lowered.
    """

    def __init__(self, rho: float = 0.05, adaptive: bool = False, eta: float = 0.01) -> None:
        if not rho >= 0:
            raise ValueError(f"rho is a radius and not negative, got {rho}")
        self.rho, self.adaptive, self.eta = rho, adaptive, eta
        self.num_skipped = 0
        self._batches: list[tuple[int, Any]] = []
        self._first: dict[int, Tensor] = {}
        self._gap: Tensor | None = None
        self._norm: Tensor | None = None
        self._overflowed = False

    @property
    def surrogate_gap(self) -> float | None:
        """Loss at the perturbed weights minus loss, at the last step, on this rank; None before the first."""
        return None if self._gap is None else float(self._gap)

    @property
    def gradient_norm(self) -> float | None:
        """Norm of the first gradient (of ``T g`` where adaptive) at the last step, over all ranks."""
        return None if self._norm is None else float(self._norm)

    def _gap_over_ranks(self) -> float | None:
        gap = self.surrogate_gap
        return None if gap is None else distributed.sum_of(gap) / distributed.world_size()

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        _check_trainer(self, trainer, steps=stage == "fit")

    def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batches.append((batch_idx, batch))

    def on_before_zero_grad(self, trainer: Any, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._batches = self._batches[-1:]  # the micro-batch in hand begins a group
        self._first.clear()

    def on_before_backward(self, trainer: Any, pl_module: LightningModule, loss: Tensor) -> None:
        if self._batches:
            self._first[self._batches[-1][0]] = loss.detach() * (trainer.accumulate_grad_batches / _scale_of(trainer))

    def on_before_optimizer_step(self, trainer: Any, pl_module: LightningModule, optimizer: Optimizer) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if all(parameter.grad is None for parameter in parameters):
            return
        scale = _scale_of(trainer)
        settings: dict[str, Any] = {"adaptive": self.adaptive, "eta": self.eta, "module": pl_module}
        with torch.enable_grad(), _silenced(pl_module), perturbed(parameters, self.rho, **settings) as ascent:
            self._norm = ascent.norm
            if _scaler_of(trainer) is not None and not torch.isfinite(ascent.norm):
                return  # the scaler has seen it, and skips the step
            self._gap = self._second_pass(trainer, pl_module, scale)
        if _scaler_of(trainer) is not None:
            self._unscale([p.grad for p in parameters if p.grad is not None], scale)
            if self._overflowed:
                for parameter in parameters:
                    parameter.grad = None  # a step without gradients is none

    def _second_pass(self, trainer: Any, module: LightningModule, scale: float) -> Tensor | None:
        weights = _weights_of_group(trainer)
        gap: Tensor | None = None
        for index, (batch_idx, batch) in enumerate(self._batches, 1):
            weight = weights.get(batch_idx, 1 / trainer.accumulate_grad_batches)
            with synchronized(trainer.strategy.model, index == len(self._batches)):
                arguments = _step_arguments(module, batch, batch_idx)
                loss = _loss_of(trainer.strategy.training_step(*arguments))
                if loss is None:
                    continue
                module.backward(loss * (weight * scale))
            if batch_idx in self._first:
                part = (loss.detach() - self._first[batch_idx]) * weight
                gap = part if gap is None else gap + part
        return gap

    def _unscale(self, gradients: list[Tensor], scale: float) -> None:
        for gradient in gradients:
            gradient.mul_(1 / scale)
        finite = [torch.isfinite(gradient).all() for gradient in gradients]
        self._overflowed = bool(finite) and not bool(torch.stack(finite).all())
        self.num_skipped += self._overflowed

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        scaler = _scaler_of(trainer)
        if self._overflowed and scaler is not None:
            scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
        self._overflowed = False

    def on_train_end(self, trainer: Any, pl_module: LightningModule) -> None:
        self._batches, self._first = [], {}


def _scaler_of(trainer: Any) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)


def _scale_of(trainer: Any) -> float:
    scaler = _scaler_of(trainer)
    return 1.0 if scaler is None else float(scaler.get_scale())


def _weights_of_group(trainer: Any) -> Mapping[int, float]:
    """What each micro-batch's mean loss was weighted with, by its index, where a schedule weighs them."""
    for callback in trainer.callbacks:
        if isinstance(callback, BatchSizeCallback):
            return callback.weights
    return {}


class _SharedSize:
    """A micro-batch size that samplers on this rank read: Lightning re-creates samplers, but hands this on."""

    def __init__(self, value: int) -> None:
        self.value = value


class SharedBatchSampler(BatchSampler):
    """Batches of the size that ``batch_size`` holds when an epoch begins; ``BatchSizeCallback.batch_sampler`` makes it."""

    def __init__(self, sampler: Sampler[Any] | Iterable[Any], batch_size: Any, drop_last: bool = False) -> None:
        self.sampler, self.drop_last = sampler, drop_last
        self.batch_size: Any = batch_size  # what Lightning hands to the next one

    def __iter__(self) -> Iterator[list[Any]]:
        return iter(BatchSampler(self.sampler, self.batch_size.value, self.drop_last))

    def __len__(self) -> int:
        return len(BatchSampler(self.sampler, self.batch_size.value, self.drop_last))


class BatchSizeCallback(Callback):
    """Changes the batch size during ``fit`` as a schedule says, and the learning rate with it.

    In mode "loader" the micro-batch changes, between epochs: ``batch_size`` of the datamodule or module is set and the
    training loader made anew, or ``batch_sampler`` of this callback reads it. In mode "accumulate" the loader stays, and
    ``trainer.accumulate_grad_batches`` changes, also within an epoch, where its micro-batches so far make whole groups. In
    both, micro-batches of one step are weighted by their samples, which Lightning alone does not do with a ragged last
    group.

    ``sharpness/batch_size`` and ``sharpness/learning_rate``, the one in effect, are logged at the end of every epoch. A
    decision of rank 0 holds for all. The state of a checkpoint holds the size in use, so a resumed run goes on with it.

    Args:
        schedule: ``"0:256 40ep:5000"``, or any other that ``parse_schedule`` reads, or a ``BatchSchedule``.
        mode: "auto" is "loader" where a ``batch_size`` can be set or ``batch_sampler`` was used, else "accumulate".
        max_micro_batch, multiple, coupling, budget, budget_in, seed: as for ``BatchController``.
        micro_batch: in mode "accumulate", what the loader gives per device; None to ask the loader.
        num_samples, probe: of the probe that a schedule's signals are measured on, as for ``SharpnessCallback``.
        loss_fn: of the signals; None for ``training_step_loss``.
    Attributes:
        controller: the ``BatchController``; None before training.
        weights: of the micro-batches of the last group, by index in the epoch, where they are weighted.
    Raises:
        ValueError: from ``fit``, where ``accumulate_grad_batches`` is set already, or the loader does not follow.
    """

    def __init__(
        self,
        schedule: str | int | Any,
        mode: str = "auto",
        coupling: str = "auto",
        max_micro_batch: int | None = None,
        multiple: int = 1,
        micro_batch: int | None = None,
        budget: float | None = None,
        budget_in: str = "seconds",
        num_samples: int = 512,
        seed: int = 0,
        probe: Any = None,
        loss_fn: Any = None,
    ) -> None:
        if mode not in ("auto", "loader", "accumulate"):
            raise ValueError(f"mode is 'auto', 'loader' or 'accumulate', got {mode!r}")
        self.schedule: BatchSchedule = _parsed(schedule)
        self.mode, self.coupling, self.micro_batch = mode, coupling, micro_batch
        self._mode = mode  # what "auto" turns out to be
        self.max_micro_batch, self.multiple = max_micro_batch, multiple
        self.budget, self.budget_in, self.num_samples, self.seed = budget, budget_in, num_samples, seed
        self.probe, self.loss_fn = probe, loss_fn
        self.controller: BatchController | None = None
        self.weights: dict[int, float] = {}
        self._size = _SharedSize(plan(self.schedule.initial().batch_size, **self._limits).micro_batch)
        self._uses_shared_size = False
        self._groups = _Groups()
        self._saved: dict[str, Any] | None = None
        self._in_hand = (0, 0.0)
        self._meter: NoiseScaleMeter | None = None
        self._given: tuple[int, int] | None = None
        self._stack = contextlib.ExitStack()

    # --- what the user asks

    @property
    def state_key(self) -> str:
        return "BatchSizeCallback"

    @property
    def history(self) -> list[BatchChange]:
        """The changes so far."""
        return [] if self.controller is None else self.controller.history

    @property
    def learning_rates(self) -> list[float]:
        """In effect at the next step, one per parameter group; ``lr`` in the groups is the unscaled one."""
        return [] if self.controller is None else self.controller.learning_rates()

    def batch_sampler(self, sampler: Sampler[Any] | Iterable[Any], drop_last: bool = False) -> SharedBatchSampler:
        """For ``DataLoader(data, batch_sampler=...)``: follows the schedule, also where Lightning re-creates it for ddp."""
        self._uses_shared_size = True
        return SharedBatchSampler(sampler, self._size, drop_last)

    def total_steps(self, num_samples: int, epochs: int, *, world_size: int = 1, drop_last: bool = False) -> int:
        """See ``total_steps``; in mode "accumulate" it needs ``micro_batch``.

        For schedulers such as OneCycleLR, as ``trainer.estimated_stepping_batches`` knows only the size in use.
        """
        if self.mode == "accumulate" and self.micro_batch is None:
            raise ValueError("the steps depend on the loader's batches: say micro_batch=...")
        micro_batch = self.micro_batch if self.mode == "accumulate" else None
        return total_steps(
            self.schedule,
            num_samples,
            epochs,
            world_size=world_size,
            drop_last=drop_last,
            micro_batch=micro_batch,
            max_micro_batch=self.max_micro_batch,
            multiple=self.multiple,
        )

    def noise_scale(self) -> Any:
        """The gradient noise scale where the schedule looks at it; None else."""
        if self._meter is None or self.controller is None:
            return None
        return self._meter.signal("gradient_noise_scale", self.controller.step, self.controller.samples)

    # --- Lightning's hooks, in the order that they are called

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        _check_trainer(self, trainer)
        if trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"accumulate_grad_batches={trainer.accumulate_grad_batches} is set, and BatchSizeCallback sets it. Leave it "
                "out of the Trainer; max_micro_batch bounds the micro-batch."
            )
        self._mode = self.mode
        if self._mode == "auto":
            can = self._uses_shared_size or lightning_hasattr(pl_module, "batch_size")
            self._mode = "loader" if can else "accumulate"
        if self._mode == "loader" and not self._uses_shared_size and not lightning_hasattr(pl_module, "batch_size"):
            raise ValueError(
                "mode 'loader' sets batch_size of the datamodule or module, and neither has one. Give it one that "
                "train_dataloader() uses, or use batch_sampler=callback.batch_sampler(...), or mode='accumulate'."
            )
        self._given = trainer.accumulate_grad_batches, trainer.reload_dataloaders_every_n_epochs
        if self._mode == "loader":
            self._apply(trainer, pl_module, plan(self.schedule.initial().batch_size, **self._limits_of(trainer)))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = dict(state_dict) or None

    def on_fit_start(self, trainer: Any, pl_module: LightningModule) -> None:
        if self._saved is None and trainer.global_step and self.controller is not None:
            self._saved = self.state_dict()  # fit goes on where another fit of this trainer ended
        self.controller = None
        if self._mode == "loader":
            is_resumed = self._saved is not None
            controller = self._make_controller(trainer, pl_module)
            if is_resumed and controller.epoch is not None and controller.epoch == int(controller.epoch):
                controller.decide()  # where it was saved before the end of the epoch was
            if is_resumed or controller.plan.micro_batch != self._size.value:
                trainer.reload_dataloaders_every_n_epochs = 1  # the loader may have been made to estimate steps
            self._apply(trainer, pl_module, controller.plan)

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        if self.controller is None:
            if self.micro_batch is None:
                self.micro_batch = _micro_batch_of(trainer.train_dataloader)
            trainer.accumulate_grad_batches = self._make_controller(trainer, pl_module).plan.accumulation
        self._groups.begin(trainer)

    def on_train_epoch_start(self, trainer: Any, pl_module: LightningModule) -> None:
        assert self.controller is not None
        if self._mode == "loader":
            if self._given is not None:
                trainer.reload_dataloaders_every_n_epochs = self._given[1]
            trainer.accumulate_grad_batches = self.controller.plan.accumulation
            self._check_loader(trainer)

    def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert self.controller is not None
        if not self._groups.is_open:
            self.weights = {}
            if self._mode == "accumulate":
                # Lightning steps, and clears gradients, where the index in the epoch is a multiple of the accumulation
                decided = self.controller.decide(lambda plan: batch_idx % plan.accumulation == 0)
                trainer.accumulate_grad_batches = decided.accumulation
            self._accumulation = self._new_group(trainer)
        self._in_hand = batch_idx, _samples_of(batch)

    def on_before_backward(self, trainer: Any, pl_module: LightningModule, loss: Tensor) -> None:
        accumulation = trainer.accumulate_grad_batches
        batch_idx, num_samples = self._in_hand
        weight = 1.0
        if accumulation > 1:
            weight = self._accumulation.weight(num_samples)
            self.weights[batch_idx] = weight
            if weight * accumulation != 1 and loss.requires_grad:  # Lightning has divided by the accumulation
                loss.register_hook(lambda gradient: gradient * (weight * accumulation))  # type: ignore[no-untyped-call]
        if self._meter is not None:
            self._stack.enter_context(self._meter.micro_batch(num_samples, weight=weight * _scale_of(trainer)))

    def on_after_backward(self, trainer: Any, pl_module: LightningModule) -> None:
        self._stack.close()
        if not self._is_last_of_group(trainer):
            return
        if trainer.accumulate_grad_batches > 1:
            total = distributed.sum_of(sum(self.weights.values())) / distributed.world_size()
            self._accumulation.finish()
            self.weights = {index: weight / total for index, weight in self.weights.items()}
        if self._meter is not None:
            self._meter.step(grad_scale=_scale_of(trainer))

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert self.controller is not None
        group = self._groups.end_batch(trainer, batch)
        if group is not None:
            self.controller.advance(group)
            self.controller.epoch = _epoch_after(trainer, batch_idx)

    def on_train_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
        assert self.controller is not None
        self.controller.epoch = trainer.current_epoch + 1.0
        pl_module.log("sharpness/batch_size", float(self.controller.batch_size), rank_zero_only=False)
        pl_module.log(
            "sharpness/learning_rate", self.learning_rates[0], rank_zero_only=False
        )  # lr in the groups is unscaled
        if self._mode == "loader":
            before = self.controller.plan
            if self.controller.decide().micro_batch != before.micro_batch:
                trainer.reload_dataloaders_every_n_epochs = 1  # for the next epoch
            self._set_size(pl_module, self.controller.plan)

    def state_dict(self) -> dict[str, Any]:
        if self.controller is None:
            return self._saved or {}
        assert self.controller is not None
        return {"controller": self.controller.state_dict(), "epoch": self.controller.epoch, "mode": self._mode}

    def teardown(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        self._leave(trainer)

    def on_exception(self, trainer: Any, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave(trainer)

    # --- how

    def _leave(self, trainer: Any) -> None:
        self._stack.close()
        if self.controller is not None:
            self.controller.detach()
        if self._given is not None:
            trainer.accumulate_grad_batches, trainer.reload_dataloaders_every_n_epochs = self._given
            self._given = None

    @property
    def _limits(self) -> dict[str, Any]:
        if self._mode == "accumulate" and self.micro_batch is not None:
            return {"max_micro_batch": self.micro_batch, "multiple": self.micro_batch}
        return {"max_micro_batch": self.max_micro_batch, "multiple": self.multiple}

    def _limits_of(self, trainer: Any) -> dict[str, Any]:
        return {**self._limits, "world_size": trainer.world_size}

    def _make_controller(self, trainer: Any, module: LightningModule) -> BatchController:
        if len(trainer.optimizers) != 1:
            raise ValueError(f"BatchSizeCallback follows one optimizer, and there are {len(trainer.optimizers)}")
        (optimizer,) = trainer.optimizers
        several = trainer.world_size > 1
        names = {*self.schedule.signals, *(["gradient_noise_scale"] if self.coupling == "adascale" else [])}
        if names & set(SIGNALS):
            self._meter = NoiseScaleMeter(
                [parameter for group in optimizer.param_groups for parameter in group["params"]],
                sum_over_ranks=distributed.sum_over_ranks if several else None,
            )
        controller = BatchController(
            self.schedule,
            optimizer,
            model=module,
            coupling=self.coupling,
            probe=_LazyProbe(self, trainer, module),
            loss_fn=self.loss_fn or training_step_loss,
            meter=self._meter,
            seed=self.seed,
            budget=self.budget,
            budget_in=self.budget_in,
            **self._limits,
        )
        if self._saved is not None:
            if self._saved["mode"] != self._mode:
                raise ValueError(f"the run was saved in mode {self._saved['mode']!r}, and this one is in {self._mode!r}")
            controller.load_state_dict(self._saved["controller"])
            controller.epoch = self._saved["epoch"]
            self._saved = None
        self.controller = controller
        return controller

    def _new_group(self, trainer: Any) -> Accumulation:
        assert self.controller is not None
        return Accumulation(
            self.controller.optimizer,
            world_size=trainer.world_size,
            typical=self.controller.batch_size,
            sum_over_ranks=distributed.sum_of if trainer.world_size > 1 else None,
        )

    def _apply(self, trainer: Any, module: LightningModule, made: Plan) -> None:
        trainer.accumulate_grad_batches = made.accumulation
        self._set_size(module, made)

    def _set_size(self, module: LightningModule, made: Plan) -> None:
        self._size.value = made.micro_batch
        if not self._uses_shared_size:
            lightning_setattr(module, "batch_size", made.micro_batch)

    def _check_loader(self, trainer: Any) -> None:
        assert self.controller is not None
        found, wanted = _micro_batch_of(trainer.train_dataloader), self.controller.plan.micro_batch
        if found != wanted:
            raise ValueError(
                f"the training loader gives batches of {found}, and the schedule wants {wanted} per device: "
                "train_dataloader() does not use batch_size of its datamodule or module. Let it, or use "
                "batch_sampler=callback.batch_sampler(...), or mode='accumulate'."
            )

    def _is_last_of_group(self, trainer: Any) -> bool:
        behind = self._in_hand[0] + 1
        is_whole = behind % trainer.accumulate_grad_batches == 0
        return is_whole or bool(trainer.is_last_batch) or behind == trainer.num_training_batches


class _LazyProbe:
    """Made at the first measurement: in mode "loader" there is no training loader before."""

    def __init__(self, owner: BatchSizeCallback, trainer: Any, module: LightningModule) -> None:
        self._owner, self._trainer, self._module = owner, trainer, module
        self._batches: list[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        if self._batches is None:
            owner = self._owner
            loader = self._trainer.train_dataloader if owner.probe is None else owner.probe
            self._batches = _probe(self._trainer, self._module, loader, owner.num_samples, owner.seed)
        return iter(self._batches)


def _parsed(schedule: str | int | BatchSchedule) -> BatchSchedule:
    return parse_schedule(schedule, registry.schedule_factories()) if isinstance(schedule, (str, int)) else schedule


def _micro_batch_of(loader: Any) -> int:
    """
    Raises:
        ValueError: it does not say.
    """
    size = getattr(loader, "batch_size", None)
    if size is None:
        size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    size = getattr(size, "value", size)
    if not isinstance(size, int):
        raise ValueError(
            f"a {type(loader).__name__} does not tell its batch size. Say micro_batch=..., with mode='accumulate'."
        )
    return size


def total_steps(
    schedule: str | int | BatchSchedule,
    num_samples: int,
    epochs: int,
    *,
    world_size: int = 1,
    micro_batch: int | None = None,
    max_micro_batch: int | None = None,
    multiple: int = 1,
    drop_last: bool = False,
) -> int:
    """Optimizer steps of a ``fit`` under a ``BatchSizeCallback``, by going through its decisions.

    Args:
        num_samples: in the training data, of which each of ``world_size`` ranks gets the same share, rounded up, as
            ``DistributedSampler`` does.
        micro_batch: of the loader, in mode "accumulate"; None in mode "loader".
    Raises:
        ValueError: the schedule looks at signals, which nobody knows in advance.
    """
    wanted = _parsed(schedule)
    if wanted.signals:
        raise ValueError(f"the steps of {wanted!r} depend on {', '.join(wanted.signals)}, which nobody knows in advance")
    limits: dict[str, Any] = {
        "world_size": world_size,
        "max_micro_batch": max_micro_batch if micro_batch is None else micro_batch,
        "multiple": multiple if micro_batch is None else micro_batch,
    }
    share = -(-num_samples // world_size)
    decision = wanted.initial()
    current = base = plan(decision.batch_size, **limits)
    steps = samples = 0
    for epoch in range(epochs):
        index, batches = 0, 1
        while index < batches:
            if index == 0 or micro_batch is not None:
                progress = Progress(steps, samples, epoch + index / batches, current.batch_size, base.batch_size)
                next_decision = wanted(progress, decision.memory)
                made = plan(next_decision.batch_size, **limits)
                if index % made.accumulation == 0:
                    decision, current = next_decision, made
                if index == 0:
                    size = current.micro_batch
                    batches = share // size if drop_last else -(-share // size)
                    if not batches:
                        break
            begin = index
            index = min(index + current.accumulation, batches)
            samples += world_size * (min(index * current.micro_batch, share) - begin * current.micro_batch)
            steps += 1
    return steps
