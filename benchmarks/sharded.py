"""What measuring in shards costs beside measuring gathered weights, on two gloo processes of this machine.

``python -m benchmarks.sharded [--width 256] [--blocks 8]`` prints, for a transformer of ``fully_shard``: bytes of a vector
on a rank, the most bytes of gathered weights that live at the same time, collectives of weights, and seconds of a gradient
and of a Hessian-vector product, each beside the same with gathered weights, in the same processes. The products of both are
compared first.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.reductions import StorageWeakRef

from sharpness_plugins.memory import MemoryBudget, said_bytes
from sharpness_plugins.objective import Objective

TOKENS, CLASSES = 32, 10


class Transformer(nn.Module):
    def __init__(self, width: int, num_blocks: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(16, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, activation="gelu")
            for _ in range(num_blocks)
        )
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=1))


def measured(rank: int, world_size: int, folder: str, width: int, num_blocks: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Transformer(width, num_blocks)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    batches = [(torch.randn(16, TOKENS, 16), torch.randint(CLASSES, (16,))) for _ in range(2)]
    numel = sum(parameter.numel() for parameter in model.parameters())
    found: dict[str, dict[str, Any]] = {}
    products = {}
    for name, memory in {"gathered": None, "in shards": int(4 * numel * (MemoryBudget.VECTORS - 2))}.items():
        objective = Objective(model, batches, memory=memory)
        assert objective.layout.is_whole == (name == "gathered")
        generator = torch.Generator().manual_seed(1)
        vector = objective.layout.normal(generator, objective.origin)
        for hold in (None,) if name == "gathered" else (2**40, 0):
            row = name if hold is None else f"{name}, {'held' if hold else 'not held'} for the backward pass"
            peak, work = [0], [0]
            if hold is not None:
                stream = objective._evaluator.stream  # type: ignore[attr-defined]
                stream.hold_bytes = hold
                watch(stream, peak)
            with objective.session():
                products[row] = objective.layout.dot(vector, objective.hvp(vector)).item()
                if hold is not None:
                    work[0] = stream.collectives
                    objective.hvp(vector)
                    work[0] = stream.collectives - work[0]
                found[row] = {
                    "a vector": said_bytes(objective.origin.nbytes),
                    "gathered at a time": said_bytes(peak[0] or objective.origin.nbytes),
                    "weight collectives of a product": work[0],
                    "gradient, s": timed(objective.value_and_grad),
                    "product, s": timed(lambda: objective.hvp(vector)),  # noqa: B023
                }
    assert max(products.values()) - min(products.values()) < 1e-4 * abs(products["gathered"]), products
    if rank == 0:
        print(f"{numel} weights, {num_blocks} blocks of width {width}, {world_size} processes, torch {torch.__version__}")
        for row, numbers in found.items():
            print(f"{row:<45}" + "   ".join(f"{key}: {value}" for key, value in numbers.items()))
    dist.barrier()
    dist.destroy_process_group()


def watch(stream: Any, peak: list[int]) -> None:
    """The most bytes of gathered weights and vectors that live when another unit's come."""
    gather, live = type(stream)._gather.__get__(stream), []

    def watched(unit: Any, shards: Any, step: Any) -> list[Tensor]:
        whole: list[Tensor] = gather(unit, shards, step)
        live[:] = [(size, storage) for size, storage in live if not storage.expired()]
        live.extend((t.untyped_storage().nbytes(), StorageWeakRef(t.untyped_storage())) for t in whole)
        peak[0] = max(peak[0], sum(size for size, _ in live))
        return whole

    stream._gather = watched


def timed(work: Any, *, repeats: int = 3) -> str:
    """The least of a few."""
    seconds = []
    for _ in range(repeats):
        dist.barrier()
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return f"{min(seconds):.3f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=8)
    arguments = parser.parse_args()
    torch.multiprocessing.spawn(measured, (2, tempfile.mkdtemp(), arguments.width, arguments.blocks), nprocs=2)
