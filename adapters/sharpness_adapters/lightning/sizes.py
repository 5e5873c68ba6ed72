"""Batch sizes by schedule as a callback: of the loader, between epochs, or by accumulation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.parsing import lightning_hasattr, lightning_setattr
from torch import Tensor
from torch.utils.data import BatchSampler, Sampler

from sharpness_plugins import distributed
from sharpness_plugins.accumulation import Accumulation
from sharpness_plugins.controller import BatchChange, BatchController, as_schedule
from sharpness_plugins.noise_scale import SIGNALS, NoiseScaleMeter
from sharpness_plugins.schedules import BatchSchedule, Plan, plan

from ..lightning_step import training_step_loss
from .probing import transferred_probe
from .steps import total_steps
from .trainer import Groups, check_trainer, epoch_after, samples_of, scale_of

__all__ = ["BatchSizeCallback", "SharedBatchSampler"]


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
        self.schedule: BatchSchedule = as_schedule(schedule)
        self.mode, self.coupling, self.micro_batch = mode, coupling, micro_batch
        self._mode = mode  # what "auto" turns out to be
        self.max_micro_batch, self.multiple = max_micro_batch, multiple
        self.budget, self.budget_in, self.num_samples, self.seed = budget, budget_in, num_samples, seed
        self.probe, self.loss_fn = probe, loss_fn
        self.controller: BatchController | None = None
        self.weights: dict[int, float] = {}
        self._size = _SharedSize(plan(self.schedule.initial().batch_size, **self._limits).micro_batch)
        self._uses_shared_size = False
        self._groups = Groups()
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
        check_trainer(self, trainer)
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
        self._in_hand = batch_idx, samples_of(batch)

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
            self._stack.enter_context(self._meter.micro_batch(num_samples, weight=weight * scale_of(trainer)))

    def on_after_backward(self, trainer: Any, pl_module: LightningModule) -> None:
        self._stack.close()
        if not self._is_last_of_group(trainer):
            return
        if trainer.accumulate_grad_batches > 1:
            total = distributed.sum_of(sum(self.weights.values())) / distributed.world_size()
            self._accumulation.finish()
            self.weights = {index: weight / total for index, weight in self.weights.items()}
        if self._meter is not None:
            self._meter.step(grad_scale=scale_of(trainer))

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert self.controller is not None
        group = self._groups.end_batch(trainer, batch)
        if group is not None:
            self.controller.advance(group)
            self.controller.epoch = epoch_after(trainer, batch_idx)

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
            self._batches = transferred_probe(self._trainer, self._module, loader, owner.num_samples, owner.seed)
        return iter(self._batches)


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
