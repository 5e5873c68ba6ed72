"""Accumulated gradients against the gradient of the one batch."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from sharpness_plugins.accumulation import Accumulation, synchronized
from sharpness_plugins.samplers import AccumulatingLoader, ResizableLoader
from sharpness_plugins.schedules import Plan

SHAPES = [[16, 16, 16, 2], [1, 7, 3], [5], [1] * 9, [2, 30]]


def network(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)


def data(num_samples, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_samples, 6, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(4, (num_samples,), generator=generator)


def gradients(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).detach().clone()


def whole(model, x, y):
    """The gradient of the mean over all samples, from one batch."""
    model.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    found = gradients(model)
    model.zero_grad()
    return found


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ragged_micro_batches_give_the_gradient_of_the_one_batch(shape, dtype, tolerance, known):
    model, (x, y) = network(dtype), data(sum(shape), dtype)
    expected = whole(model, x, y)
    accumulation = Accumulation(model.parameters(), typical=48.0)
    for _ in range(2):  # a group leaves nothing behind
        for index, (inputs, targets) in enumerate(zip(x.split(shape), y.split(shape), strict=True), 1):
            loss = functional.cross_entropy(model(inputs), targets)
            accumulation.backward(loss, len(targets), sum(shape) if known else None, index == len(shape))
        assert relative(gradients(model), expected) < tolerance
        model.zero_grad()


def test_the_mean_of_means_is_another_gradient():
    model, (x, y) = network(), data(50)
    expected = whole(model, x, y)
    for inputs, targets in zip(x.split(16), y.split(16), strict=True):
        (functional.cross_entropy(model(inputs), targets) / 4).backward()
    assert relative(gradients(model), expected) > 0.1


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_tokens_weigh_what_they_are(known):
    """The mean over the targets that count, of which every micro-batch has another number."""
    model, (x, y) = network(), data(60)
    y[torch.arange(60) % 7 < 3] = -100
    y[:20] = -100
    y[3] = 1
    expected = whole(model, x, y)
    counts = [int((targets != -100).sum()) for targets in y.split(20)]
    assert counts[0] == 1
    accumulation = Accumulation(model.parameters())
    for index, (inputs, targets) in enumerate(zip(x.split(20), y.split(20), strict=True), 1):
        loss = functional.cross_entropy(model(inputs), targets)
        accumulation.backward(loss, counts[index - 1], float(sum(counts)) if known else None, index == 3)
    assert relative(gradients(model), expected) < 1e-12


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_a_plain_loop_multiplies_by_the_weight(known):
    model, (x, y) = network(), data(40)
    expected = whole(model, x, y)
    accumulation = Accumulation(torch.optim.SGD(model.parameters(), lr=0.1))
    for inputs, targets in zip(x.split(16), y.split(16), strict=True):
        (
            functional.cross_entropy(model(inputs), targets) * accumulation.weight(len(targets), 40 if known else None)
        ).backward()
    accumulation.finish()
    accumulation.finish()  # nothing more to do
    assert relative(gradients(model), expected) < 1e-12


def test_from_a_loader_the_optimizer_takes_the_steps_of_full_batches():
    """Sizes change in the middle of the epoch; the steps are those of the whole groups."""
    x, y = data(50)
    losses = []
    for plans in ([Plan(4, 3), Plan(3, 7)], [Plan(12, 1), Plan(21, 1)]):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        accumulation = Accumulation(optimizer)
        loader = ResizableLoader(DataLoader(TensorDataset(x, y), batch_size=1, shuffle=True), plans[0])
        steps = 0
        for inputs, targets in loader:
            accumulation.backward(functional.cross_entropy(model(inputs), targets), *loader.micro_batch)
            if loader.micro_batch.is_last:
                optimizer.step()
                optimizer.zero_grad()
                steps += 1
                loader.resize(plans[steps >= 2])
        assert steps == 4  # 12 + 12 + 21 + 5
        losses.append(functional.cross_entropy(model(x), y).detach())
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_scaled_losses_and_a_skipped_step(known):
    """With a GradScaler: unscaled, the gradient is that of the batch, also after a group that overflowed."""
    model, (x, y) = network(torch.float32), data(20, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    accumulation = Accumulation(optimizer, scaler=scaler, typical=20.0)
    for overflow in (False, True, False):
        expected, before = whole(model, x, y), [parameter.detach().clone() for parameter in model.parameters()]
        for index, (inputs, targets) in enumerate(zip(x.split(8), y.split(8), strict=True), 1):
            loss = functional.cross_entropy(model(inputs), targets) * (float("inf") if overflow else 1.0)
            accumulation.backward(loss, len(targets), 20 if known else None, index == 3)
        scaler.unscale_(optimizer)
        assert overflow or relative(gradients(model), expected) < 1e-6
        scaler.step(optimizer)
        scaler.update()
        stayed = all(torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))
        assert stayed == overflow
        optimizer.zero_grad()


def test_every_gradient_that_is_there_is_rescaled_once():
    """Frozen parameters, groups that came later, sparse gradients."""
    table, extra, frozen = (
        nn.Embedding(9, 3, sparse=True).double(),
        nn.Parameter(torch.ones(3).double()),
        nn.Parameter(torch.ones(1)),
    )
    optimizer = torch.optim.SGD([table.weight, frozen], lr=0.1)
    accumulation = Accumulation(optimizer)
    optimizer.add_param_group({"params": [extra]})
    rows = torch.tensor([0, 4, 4, 8, 1])
    for part in rows.split(2):
        accumulation.backward((table(part) * extra).sum(1).mean(), len(part))
    accumulation.finish()
    assert frozen.grad is None
    expected = torch.zeros(9, 3).double().index_add_(0, rows, torch.full((5, 3), 1 / 5, dtype=torch.float64))
    torch.testing.assert_close(table.weight.grad.to_dense(), expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(extra.grad, table(rows).mean(0).detach(), rtol=1e-14, atol=0)


def test_what_does_not_add_up_is_refused():
    model = network()
    accumulation = Accumulation(model.parameters())
    with pytest.raises(ValueError, match="num_samples must be positive and finite, got 0"):
        accumulation.weight(0)
    with pytest.raises(ValueError, match="group_samples must be positive"):
        accumulation.weight(1, float("nan"))
    assert accumulation.weight(3, 4) == 0.75
    with pytest.raises(ValueError, match="said to hold 4 samples, and now has 5"):
        accumulation.weight(2, 4)
    with pytest.raises(ValueError, match="a group of 4 samples goes on as one of 6"):
        accumulation.weight(1, 6)
    with pytest.raises(ValueError, match="goes on as one of unknown"):
        accumulation.weight(1)
    accumulation.reset()
    assert accumulation.weight(1, 6) == 1 / 6
    with pytest.raises(ValueError, match="known or summed"):
        Accumulation(model.parameters(), world_size=2).weight(1)
    assert Accumulation(model.parameters(), world_size=2).weight(1, 4) == 0.5
    with pytest.raises(ValueError, match="world_size"):
        Accumulation(model.parameters(), world_size=0)
    with pytest.raises(ValueError, match="typical"):
        Accumulation(model.parameters(), typical=0)


def test_modules_that_do_not_synchronize_need_nothing():
    told = []

    class Sharded(nn.Module):
        def set_requires_gradient_sync(self, on):
            told.append(on)

    for module in (nn.Linear(1, 1), Sharded()):
        for is_last in (False, True):
            with synchronized(module, is_last):
                pass
    assert told == [False, True]


def sum_over_ranks(value):
    total = torch.tensor(value, dtype=torch.float64)
    distributed.all_reduce(total)
    return float(total)


def all_ranks(mine):
    return sum_over_ranks(float(mine)) == distributed.get_world_size()


def on_two_ranks(rank, folder):
    """Trains by both loaders under DDP, and saves what was delivered, the gradients, and how often ranks exchanged them."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    x, y = data(45)
    found = {"map": [], "stream": []}
    model = DistributedDataParallel(network())
    exchanged = []

    def hook(state, bucket):
        exchanged.append(1)
        future = distributed.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    model.register_comm_hook(None, hook)
    loader = ResizableLoader(
        DataLoader(TensorDataset(x, y, torch.arange(45)), batch_size=4, shuffle=True), Plan(4, 1, 2), rank=rank, world_size=2
    )
    # rank 1 has fewer batches in its stream, and smaller ones
    stream = AccumulatingLoader(torch.arange(45).split(5)[: 9 - 2 * rank], Plan(5, 3, 2), all_ranks=all_ranks)
    streamed = (((x[i], y[i], i) if rank == 0 else (x[i[:3]], y[i[:3]], i[:3])) for i in stream)
    known = Accumulation(model.parameters(), world_size=2)
    unknown = Accumulation(model.parameters(), world_size=2, typical=30.0, sum_over_ranks=sum_over_ranks)
    for name, source, batches, accumulation in (("map", loader, loader, known), ("stream", stream, streamed, unknown)):
        group = []
        for inputs, targets, indices in batches:
            micro_batch = source.micro_batch._replace(num_samples=len(indices))
            with synchronized(model, micro_batch.is_last):
                accumulation.backward(functional.cross_entropy(model(inputs), targets), *micro_batch)
            group.append(indices.tolist())
            if micro_batch.is_last:
                found[name].append((group, gradients(model)))
                group = []
                model.zero_grad()
                if name == "map":
                    source.resize([Plan(3, 3, 2), Plan(2, 2, 2)][len(found[name]) > 1])
    found["exchanged"] = len(exchanged)
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def test_two_ranks_have_the_gradient_of_the_one_batch():
    # DDP imports torch's compiler, 4 s of it: once, in the process that both ranks are forked from
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch._dynamo"])
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(on_two_ranks, (folder,), nprocs=2, start_method="forkserver")
        ranks = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2)]
    x, y = data(45)
    model = network()
    for name in ("map", "stream"):
        assert len(ranks[0][name]) == len(ranks[1][name]) > 1
        for (first, gradient), (second, same) in zip(ranks[0][name], ranks[1][name], strict=True):
            indices = torch.tensor([index for part in first + second for index in part])
            assert torch.equal(gradient, same)
            assert relative(gradient, whole(model, x[indices], y[indices])) < 1e-12
    groups = [[len(part) for part in group] for group, _ in ranks[0]["map"]]
    assert groups == [[4], [3, 3, 3], [2, 2], [2, 2], [2]]  # 8 + 18 + 8 + 8, and 2 + 1
    delivered = sorted(i for rank in ranks for group, _ in rank["map"] for part in group for i in part)
    assert delivered == list(range(45))
    assert [[len(part) for part in group] for group, _ in ranks[1]["stream"]] == [[3, 3, 3], [3, 3, 3], [3]]
    assert ranks[0]["exchanged"] == len(ranks[0]["map"]) + len(ranks[0]["stream"])  # once per group, one bucket
