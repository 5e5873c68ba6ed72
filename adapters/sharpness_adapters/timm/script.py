"""A train.py of timm, run as it is with a few of its names replaced: data loaders, the epoch, the tasks."""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import timm.data
import timm.task
import torch
from timm.data import AugMixDataset
from timm.loss import SoftTargetCrossEntropy
from torch.nn import functional
from torch.optim import Optimizer
from torch.utils.data import BatchSampler, IterableDataset

from sharpness_plugins import distributed
from sharpness_plugins.controller import BatchController
from sharpness_plugins.losses import unwrap
from sharpness_plugins.probe import probe_batches
from sharpness_plugins.schedules import Plan
from sharpness_plugins.signals import MeterSignal, find_signal

from . import deactivate
from .arguments import check_optimizer_name, set_script
from .measuring import STATE, Settings, TaskMonitor, measured
from .second_pass import register_optimizers

__all__ = ["ScriptError", "ScriptOptions", "run_script"]

EPOCH = {"epoch", "model", "loader", "optimizer", "args", "task", "lr_scheduler"}
TASKS = ("ClassificationTask", "LogitDistillationTask", "FeatureDistillationTask", "TokenDistillationTask")


class ScriptError(Exception):
    """The script, or what it was told, cannot be used; the message says why."""


@dataclass(frozen=True)
class ScriptOptions:
    """What ``sharpness-timm`` was told.

    Attributes:
        schedule, coupling, max_micro_batch: as for ``BatchController``; no schedule leaves batch sizes alone.
        settings: of measuring.
    """

    schedule: str | None = None
    coupling: str = "auto"
    max_micro_batch: int | None = None
    settings: Settings = Settings(every="1ep")  # noqa: RUF009  # frozen

    @classmethod
    def read(cls, arguments: argparse.Namespace, environment: Mapping[str, str]) -> ScriptOptions:
        """The command line's, and where it says nothing the environment's."""
        try:
            settings = Settings.from_environment({"SHARPNESS_EVERY": "1ep", **environment})
            told: dict[str, Any] = {
                "metrics": tuple(arguments.metric) if arguments.metric else None,
                "every": arguments.every,
                "out": arguments.out,
                "num_samples": arguments.samples,
            }
            settings = replace(settings, **{name: value for name, value in told.items() if value is not None})
            if arguments.budget is not None:
                settings = replace(settings, budget=None if arguments.budget == "none" else float(arguments.budget))
        except ValueError as error:
            raise ScriptError(str(error)) from None
        return cls(arguments.schedule, arguments.coupling, arguments.max_micro_batch, settings)


def run_script(path: str, arguments: Sequence[str], options: ScriptOptions) -> None:
    """Run ``main()`` of the script with these arguments.

    Raises:
        ScriptError: it is not a train.py that is understood, and nothing of it was run but its definitions; or the schedule
            does not fit what it was told.
    """
    module = _load(Path(path), arguments)
    names = _Names(module, options)
    set_script(module)
    try:
        register_optimizers()
        deactivate()  # measuring by the environment alone; here it is by the options
        try:
            check_optimizer_name()
        except ValueError as error:
            raise ScriptError(str(error)) from None
        with names.replaced():
            module.main()
    finally:
        set_script(None)
        names.close()


def _load(path: Path, arguments: Sequence[str]) -> ModuleType:
    if not path.is_file():
        raise ScriptError(f"there is no script {path}")
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ScriptError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where workers look for what it defines
    spec.loader.exec_module(module)
    _check(module, path)
    return module


def _check(module: ModuleType, path: Path) -> None:
    """Before anything is replaced: everything that will be is there, and is used."""
    missing = [name for name in ("main", "train_one_epoch", "create_loader", "_parse_args") if not hasattr(module, name)]
    if missing:
        raise ScriptError(f"{path} is not a train.py of timm that is understood: it has no {', '.join(missing)}")
    takes = set(inspect.signature(module.train_one_epoch).parameters)
    if not takes >= EPOCH:
        raise ScriptError(
            f"{path} is not a train.py of timm that is understood: its train_one_epoch has no argument "
            f"{', '.join(sorted(EPOCH - takes))}. Known is that of timm 1.0.27 and later."
        )
    if module.create_loader is not timm.data.create_loader:
        raise ScriptError(f"{path} is not a train.py of timm that is understood: its create_loader is not timm's")
    unused = {"train_one_epoch", "create_loader"} - set(module.main.__code__.co_names)
    if unused:
        raise ScriptError(
            f"{path} is not a train.py of timm that is understood: its main() does not call {' and '.join(sorted(unused))}"
        )


class _Names:
    """What the names of the script stand for while it runs."""

    def __init__(self, module: ModuleType, options: ScriptOptions) -> None:
        self._module, self._options = module, options
        self._training_data: Any = None
        self._run: _Run | None = None

    @contextlib.contextmanager
    def replaced(self) -> Iterator[None]:
        new: dict[str, Any] = {
            "create_loader": self._create_loader(self._module.create_loader),
            "train_one_epoch": self._train_one_epoch(self._module.train_one_epoch),
        }
        new |= {name: _on_any_device(getattr(self._module, name)) for name in TASKS if hasattr(self._module, name)}
        before = {name: getattr(self._module, name) for name in new}
        vars(self._module).update(new)
        try:
            yield
        finally:
            vars(self._module).update(before)

    def close(self) -> None:
        if self._run is not None:
            self._run.close()

    def _create_loader(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        def create_loader(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            if given.get("is_training"):
                self._training_data = given["dataset"]
            return original(*args, **kwargs)

        return create_loader

    def _train_one_epoch(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        def train_one_epoch(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            given = bound.arguments
            if self._run is None:
                self._run = _Run(self._options, given, self._probe(given))
            self._run.begin_epoch(given)
            metrics = original(*bound.args, **bound.kwargs)
            metrics.update(self._run.end_epoch())
            return metrics

        return train_one_epoch

    def _probe(self, given: Mapping[str, Any]) -> list[Any] | None:
        """Samples of the training data as they are evaluated; None where batches of training have to do."""
        if not self._options.settings.metrics and self._options.schedule is None:
            return None
        dataset = self._training_data
        if dataset is None or isinstance(dataset, (IterableDataset, AugMixDataset)):
            return None
        args, model = given["args"], unwrap(given["task"].get_trainable_module())[0]
        config = timm.data.resolve_data_config(vars(args), model=model)  # type: ignore[no-untyped-call]
        clean = timm.data.create_loader(
            copy.copy(dataset),
            batch_size=args.batch_size,
            is_training=False,
            use_prefetcher=False,
            num_workers=0,
            persistent_workers=False,
            **{name: config[name] for name in ("input_size", "interpolation", "mean", "std", "crop_pct")},
        )
        batches = probe_batches(clean, self._options.settings.num_samples, seed=self._options.settings.seed)
        if "criterion" not in measured(given["task"]) and isinstance(given["task"].criterion, SoftTargetCrossEntropy):
            classes = int(args.num_classes)
            batches = [[x, functional.one_hot(y.long(), classes).float()] for x, y in batches]
        return batches


def _on_any_device(task: type[Any]) -> type[Any]:
    """The task, which train.py gives ``device_ids`` of CPUs, too, where DDP wants none."""

    def prepare_distributed(self: Any, device_ids: list[Any] | None = None, **settings: Any) -> Any:
        on_cpu = device_ids is not None and all(torch.device(device).type == "cpu" for device in device_ids)
        return task.prepare_distributed(self, device_ids=None if on_cpu else device_ids, **settings)

    return type(task.__name__, (task,), {"prepare_distributed": prepare_distributed, "__module__": task.__module__})


class _Run:
    """One training run: the size of the batches of each epoch, and the columns of its summary.

    A change takes place between epochs, as train.py counts an epoch's batches at its beginning.
    """

    def __init__(self, options: ScriptOptions, given: Mapping[str, Any], probe: list[Any] | None) -> None:
        loader, optimizer, args = given["loader"], given["optimizer"], given["args"]
        self._loader = loader
        self._optimizer: Optimizer = getattr(optimizer, "_base_optimizer", optimizer)  # a Lookahead runs no hooks
        self._world_size = distributed.world_size()
        self._base = Plan(args.batch_size, args.grad_accum_steps, self._world_size)
        self._base_updates = -(-len(loader) // args.grad_accum_steps)
        dataset = getattr(loader, "dataset", None)
        self._num_samples = len(loader) * args.batch_size * self._world_size
        if dataset is not None and not isinstance(dataset, IterableDataset):
            self._num_samples = len(dataset)
        self._learning_rate = math.nan
        self._controller = None if options.schedule is None else self._control(options, options.schedule, given, probe)
        try:
            self._monitor = TaskMonitor(options.settings, probe=probe, epoch=self._epochs_behind)
        except ValueError as error:
            raise ScriptError(str(error)) from error
        self._monitor.follow(self._optimizer)
        self._handle = self._optimizer.register_step_pre_hook(self._before_step)
        self._plan, self._epoch, self._updates, self._step_at_beginning = self._base, 0, self._base_updates, 0

    def _control(
        self, options: ScriptOptions, schedule: str, given: Mapping[str, Any], probe: list[Any] | None
    ) -> BatchController:
        args = given["args"]
        self._check_loader()
        is_mixed = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
        limit = options.max_micro_batch or (args.batch_size if args.grad_accum_steps > 1 else None)
        try:
            controller = BatchController(
                schedule,
                self._optimizer,
                num_samples=self._num_samples,
                max_micro_batch=limit,
                multiple=2 if is_mixed else 1,  # Mixup pairs the samples of a batch
                coupling=options.coupling,
                probe=probe,
                seed=options.settings.seed,
                **measured(given["task"]),
            )
        except (ValueError, TypeError) as error:
            raise ScriptError(f"--schedule {schedule!r}: {error}") from error
        if controller.batch_size != self._base.batch_size:
            raise ScriptError(
                f"the schedule begins with batches of {controller.batch_size}, and train.py with {self._base.batch_size} "
                f"(--batch-size {args.batch_size}, --grad-accum-steps {args.grad_accum_steps}, {self._world_size} "
                "processes), for which its learning rate is meant. Give both the same."
            )
        for name in controller.schedule.signals:
            if isinstance(find_signal(name), MeterSignal):
                raise ScriptError(f"--schedule {schedule!r} looks at {name}, which nobody measures in train.py's loop")
        if (state := self._state().get("controller")) is not None:
            controller.load_state_dict(state)
        return controller

    def _check_loader(self) -> None:
        loader = self._torch_loader()
        if isinstance(loader.dataset, IterableDataset):
            raise ScriptError(
                "the batch size of an iterable data set cannot be changed: it decides itself what a batch holds"
            )
        if type(loader.batch_sampler) is not BatchSampler:
            raise ScriptError(
                f"the batch size cannot be changed where batches come from a {type(loader.batch_sampler).__name__}: leave "
                "out --use-multi-epochs-loader and --train-img-sizes"
            )

    def _torch_loader(self) -> Any:
        return getattr(self._loader, "loader", self._loader)  # a PrefetchLoader holds it

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = self._optimizer.param_groups[0].setdefault(STATE, {})
        return state

    def begin_epoch(self, given: dict[str, Any]) -> None:
        """Decide, and put into the arguments of ``train_one_epoch`` what it is to go by."""
        self._epoch, self._step_at_beginning = int(given["epoch"]), self._monitor.step
        if self._controller is None:
            return
        self._plan = self._controller.decide()
        if self._plan.micro_batch * self._world_size > self._num_samples:
            raise ScriptError(
                f"the schedule asks for batches of {self._plan.batch_size}, and an epoch has {self._num_samples} samples, "
                "which do not fill one (train.py drops what is left over). Set --max-micro-batch"
            )
        self._torch_loader().batch_sampler.batch_size = self._plan.micro_batch
        args = copy.copy(given["args"])
        args.batch_size, args.grad_accum_steps = self._plan.micro_batch, self._plan.accumulation
        given["args"] = args
        self._updates = -(-len(self._loader) // self._plan.accumulation)
        if given["lr_scheduler"] is not None:
            given["lr_scheduler"] = _BaseUpdates(given["lr_scheduler"], self._epoch, self._updates, self._base_updates)

    def _epochs_behind(self) -> float:
        done: int = self._monitor.step - self._step_at_beginning
        behind: float = self._epoch + done / self._updates
        return behind

    def end_epoch(self) -> dict[str, float]:
        """Columns of the summary, the same ones after every epoch."""
        columns: dict[str, float] = {"batch_size": self._plan.batch_size, "lr_effective": self._learning_rate}
        if self._controller is not None:
            self._controller.advance(self._num_samples)  # with what was dropped, so that an epoch counts as one
            self._state()["controller"] = self._controller.state_dict()
        columns |= {"updates": self._monitor.step, "samples": self._monitor.samples}
        return {**columns, **{f"sharpness_{name}": value for name, value in self._monitor.last.items()}}

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """The groups that the step goes by: the coupling, whose hook ran before, gives scaled ones."""
        rates = [float(group["lr"]) for group in args[0].param_groups]
        self._learning_rate = sum(rates) / len(rates)

    def close(self) -> None:
        self._handle.remove()
        self._monitor.close()
        if self._controller is not None:
            self._controller.detach()


class _BaseUpdates:
    """A timm scheduler that counts updates of the first batch size, told of those of another."""

    def __init__(self, scheduler: Any, epoch: int, updates: int, base_updates: int) -> None:
        self._scheduler, self._epoch, self._updates, self._base_updates = scheduler, epoch, updates, base_updates

    def step_update(self, num_updates: int, metric: float | None = None) -> None:
        done = num_updates - self._epoch * self._updates
        mapped = self._epoch * self._base_updates + round(done * self._base_updates / self._updates)
        self._scheduler.step_update(num_updates=mapped, metric=metric)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)
