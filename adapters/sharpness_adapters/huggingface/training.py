"""What Trainer does by itself, told of batches of other sizes than it planned for."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sharpness_plugins.batches import map_tensors
from sharpness_plugins.coupling import counts_steps
from sharpness_plugins.errors import missing_dependency
from sharpness_plugins.probe import probe_batches

from ..sharded import sentence

__all__ = ["catch_up", "innermost", "refuse_engines", "shift", "stop", "take_means"]


def refuse_engines(trainer: Any, what: str) -> None:
    """
    Raises:
        ValueError: DeepSpeed, or FSDP in its first version.
    """
    if getattr(trainer, "is_deepspeed_enabled", False):
        raise ValueError(sentence("DeepSpeed", what))
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if getattr(trainer, "is_fsdp_enabled", False) and getattr(plugin, "fsdp_version", 1) != 2:
        raise ValueError(sentence("FSDP1", what))


def innermost(optimizer: Any) -> Any:
    """Without Accelerate's wrapper, which runs no step hooks of its own."""
    accelerated = missing_dependency("accelerate.optimizer", extra="huggingface", purpose="sharpness_adapters.huggingface")
    while isinstance(optimizer, accelerated.AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def catch_up(optimizer: Any, scheduler: Any, due: int) -> None:
    """Trainer has stepped the learning-rate schedule once for an optimizer step that is worth ``due`` planned ones."""
    if counts_steps(scheduler) and not getattr(optimizer, "step_was_skipped", False):
        for _ in range(due - 1):
            scheduler.step()


def shift(trainer: Any, state: Any, steps: int) -> None:
    """Go on counting optimizer steps from another number; what Trainer has noted of it moves along."""
    state.global_step += steps
    for note in ("_globalstep_last_logged", "_initial_global_step"):
        if hasattr(trainer, note):
            setattr(trainer, note, getattr(trainer, note) + steps)


def stop(args: Any, state: Any, control: Any) -> None:
    """The end of training, as Trainer's own flow has it."""
    control.should_training_stop = True
    control.should_save |= args.save_strategy == "steps"
    control.should_evaluate |= args.eval_strategy == "steps" and args.eval_delay <= state.global_step


def take_means(trainer: Any, model: nn.Module, loader: Any) -> None:
    if _sums_micro_batches(trainer, model, loader):
        trainer.model_accepts_loss_kwargs = False
        warnings.warn(
            f"{type(model).__name__} takes num_items_in_batch and ignores it, so that Trainer would add up the gradients of "
            "micro-batches, and more of them would mean larger steps. Their mean is taken instead.",
            UserWarning,
            stacklevel=2,
        )


def _sums_micro_batches(trainer: Any, model: nn.Module, loader: Any) -> bool:
    """Whether the loss is a mean that does not care for ``num_items_in_batch``, which Trainer takes for a normalized sum."""
    from transformers import Trainer

    is_own = type(trainer).compute_loss is Trainer.compute_loss and trainer.compute_loss_func is None
    if not trainer.model_accepts_loss_kwargs or not is_own or trainer.label_smoother is not None:
        return False
    batch = probe_batches(loader, 1)[0]
    if not isinstance(batch, Mapping) or "labels" not in batch:
        return False
    device = next(model.parameters()).device
    batch = map_tensors(dict(batch), lambda tensor: tensor.to(device))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            losses = [model(**batch, num_items_in_batch=torch.tensor(count, device=device)) for count in (1, 2)]
    finally:
        model.train(was_training)
    one, two = (output["loss"] if isinstance(output, Mapping) else output[0] for output in losses)
    return bool(one == two)
