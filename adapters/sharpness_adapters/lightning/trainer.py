"""What all callbacks ask of Lightning's Trainer."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer

from sharpness_plugins import distributed
from sharpness_plugins.batches import count_samples

from ..sharded import sentence

SHARDED = ("DeepSpeedStrategy", "FSDPStrategy")
__all__ = ["Groups", "check_trainer", "epoch_after", "is_last_of_group", "samples_of", "scale_of", "scaler_of"]


def check_trainer(owner: Callback, trainer: Any, *, steps: bool = True) -> None:
    name = type(owner).__name__
    if not isinstance(trainer, Trainer):
        raise TypeError(
            f"{name} is a callback of lightning.pytorch.Trainer, and this is a {type(trainer).__module__}.Trainer. Import "
            "Trainer and LightningModule from lightning.pytorch."
        )
    for kind in type(trainer.strategy).__mro__:
        if kind.__name__ in SHARDED:
            raise ValueError(sentence(type(trainer.strategy).__name__, name))
    if steps and not trainer.lightning_module.automatic_optimization:
        raise ValueError(
            f"{name} needs automatic optimization, and {type(trainer.lightning_module).__name__} steps its optimizers itself"
        )


class Groups:
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
        self._open += samples_of(batch)
        if trainer.global_step == self._steps:
            return None
        group = distributed.sum_of(self._open)
        self.samples += group
        self.begin(trainer)
        return group


def samples_of(batch: Any) -> float:
    return float(count_samples(batch) or 1)


def epoch_after(trainer: Any, batch_idx: int) -> float:
    """Epochs behind us after this micro-batch; whole ones where nobody knows how long one is."""
    batches: float = trainer.num_training_batches
    epoch: int = trainer.current_epoch
    if trainer.is_last_batch or batch_idx + 1 == batches:
        return epoch + 1.0
    return epoch + (batch_idx + 1) / batches  # batches may be infinite


def is_last_of_group(trainer: Any, batch_idx: int) -> bool:
    """Whether the optimizer steps upon this micro-batch."""
    behind = batch_idx + 1
    is_whole = behind % trainer.accumulate_grad_batches == 0
    return is_whole or bool(trainer.is_last_batch) or behind == trainer.num_training_batches


def scaler_of(trainer: Any) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)


def scale_of(trainer: Any) -> float:
    scaler = scaler_of(trainer)
    return 1.0 if scaler is None else float(scaler.get_scale())
