"""Loaders that Accelerate has prepared."""

from __future__ import annotations

from typing import Any

from torch.utils.data import BatchSampler

from sharpness_plugins.errors import LoaderError, missing_dependency

__all__ = ["set_batch_size"]


def set_batch_size(loader: Any, batch_size: int) -> None:
    """Change the global batch size of a DataLoader that Accelerate prepared, from its next pass on, on every rank.

    Accelerate keeps a copy of the batch size in the sampler that shares batches out; where only the sampler inside is
    changed, two ranks see an empty epoch and then wait for each other for ever. With a schedule::

        controller = BatchController("0:256 40ep:4096", optimizer.optimizer, num_samples=len(loader.dataset))
        for epoch in range(60):
            set_batch_size(loader, controller.decide().batch_size)
            for x, y in loader:
                accelerator.backward(functional.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
                controller.advance(len(x) * accelerator.num_processes)

    Args:
        batch_size: over all ranks.
    Raises:
        LoaderError: the loader's batches are not made by a ``BatchSampler``.
        ValueError: ``batch_size`` cannot be shared out to the ranks; DeepSpeed.
    """
    accelerate = missing_dependency("accelerate", extra="huggingface", purpose="set_batch_size")
    if getattr(accelerate.PartialState(), "distributed_type", None) == accelerate.DistributedType.DEEPSPEED:
        raise ValueError(
            "set_batch_size does not work with DeepSpeed, which was told its batch size in its own configuration and plans "
            "its steps by it. Train in one process or with DistributedDataParallel"
        )
    shard = loader.batch_sampler
    inner = shard.batch_sampler if isinstance(shard, accelerate.data_loader.BatchSamplerShard) else shard
    if not isinstance(inner, BatchSampler) or not isinstance(getattr(inner, "batch_size", None), int):
        raise LoaderError(
            f"the batch size of this loader cannot be changed: its batches come from a {type(inner).__name__}. Pass a "
            "DataLoader with a batch_size"
        )
    ranks = accelerate.PartialState().num_processes
    if batch_size < 1 or batch_size % ranks:
        raise ValueError(f"a batch of {batch_size} cannot be shared out to {ranks} rank(s). Pass a multiple")
    size = batch_size if getattr(shard, "split_batches", False) else batch_size // ranks
    inner.batch_size = size
    if shard is not inner:
        shard.batch_size = size
