"""The samples that are measured on, as ``training_step`` would get them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader

from sharpness_plugins import sampling
from sharpness_plugins.probe import probe_batches

__all__ = ["transferred_probe"]

PROBE_BATCH = 64  # not the loader's, which a schedule changes: the sum of other batches rounds otherwise


def transferred_probe(trainer: Any, module: LightningModule, loader: Any, num_samples: int, seed: int) -> list[Any]:
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
