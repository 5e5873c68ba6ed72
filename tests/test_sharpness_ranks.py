"""T10: two gloo ranks, with DistributedDataParallel and with fully sharded parameters."""

from __future__ import annotations

import datetime
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW

from sharpness_plugins.optimizers import (
    ASAM,
    FSAM,
    GSAM,
    SAM,
    WSAM,
    BatchClosure,
    KStepSAM,
    LookSAM,
    MomentumSAM,
    RandomSAM,
    SharpnessAware,
)

RULES = [SAM(), ASAM(), GSAM(), WSAM(), FSAM(), LookSAM(k=3), MomentumSAM(), RandomSAM(), KStepSAM()]
ALL_REDUCE = distributed.all_reduce
SHARDABLE = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 7)


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def plain(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def batch(number, dtype=torch.float64, size=8):
    generator = torch.Generator().manual_seed(number)
    return torch.randn(size, 5, generator=generator).to(dtype), torch.randint(3, (size,), generator=generator)


def flat(model):
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def closure_of(model, data, calls=None):
    def closure():
        if calls is not None:
            calls.append(1)
        loss = functional.cross_entropy(model(data[0]), data[1])
        loss.backward()
        return loss

    return closure


def loss_of(model):
    return lambda part: functional.cross_entropy(model(part[0]), part[1])


def fourth_powers(weights):
    return lambda: sum((weight**4).sum() for weight in weights).backward()


def halves(data):
    """The rows that two ranks with four each take first, and those that they take then."""
    return [tuple(tensor[chosen] for tensor in data) for chosen in ([0, 1, 4, 5], [2, 3, 6, 7])]


def split(data):
    return [tuple(tensor[bounds] for tensor in data) for bounds in (slice(0, 2), slice(2, 4))]


def rows(data, rank):
    return tuple(tensor[rank * 4 : rank * 4 + 4] for tensor in data)


def replicas(rank: int, found: dict) -> None:
    """300 steps, each rank along its own gradient: the weights of both, bit for bit."""
    for rule in RULES:
        steps = 300 if isinstance(rule, SAM) else 20
        model = DistributedDataParallel(network(torch.float32))
        optimizer = SharpnessAware(SGD(model.parameters(), lr=0.05, momentum=0.9), rule, model=model, perturb="local")
        for number in range(steps):
            optimizer.step(closure_of(model, rows(batch(number, torch.float32), rank)))
        found[f"replica {type(rule).__name__}"] = flat(model)
        found[f"steps {type(rule).__name__}"] = torch.tensor(optimizer.num_steps)


def by_hand(rank: int, found: dict) -> None:
    model = DistributedDataParallel(network())
    twin = DistributedDataParallel(network())
    optimizer = SharpnessAware(SGD(model.parameters(), lr=0.05), GSAM(), model=model, perturb="local")
    other = SharpnessAware(SGD(twin.parameters(), lr=0.05), GSAM(), perturb="local")  # its module is found
    for number in range(5):
        data = rows(batch(number), rank)
        optimizer.step(closure_of(model, data))
        other.zero_grad()
        with twin.no_sync():
            closure_of(twin, data)()
        with other.perturbed():
            closure_of(twin, data)()
        other.step()
    found["by closure"], found["by hand"] = flat(model), flat(twin)


def joint(rank: int, found: dict) -> None:
    """Global perturbation is one process with the whole batch; local is m-SAM with a part for each rank."""
    for rule in RULES:
        name = type(rule).__name__
        for mode in ("global", "local"):
            model, alone = DistributedDataParallel(plain()), plain()
            settings = {"rho": 0.2}
            optimizer = SharpnessAware(
                SGD(model.parameters(), lr=0.05, momentum=0.9), rule, perturb=mode, model=model, **settings
            )
            own_m = None if mode == "global" else 4
            other = SharpnessAware(SGD(alone.parameters(), lr=0.05, momentum=0.9), rule, m=own_m, model=alone, **settings)
            for number in range(6):
                data = batch(number)
                optimizer.step(closure_of(model, rows(data, rank)))
                other.step(BatchClosure(loss_of(alone), data))
            found[f"{mode} {name}"], found[f"{mode} {name} alone"] = flat(model), flat(alone)
    for name, (rows_of, settings) in {  # micro-batches, in DDP's two ways of making gradients
        "copied": (((0, 1), (1, 4)), {}),
        "views": (((0, 3), (3, 4)), {"gradient_as_bucket_view": True}),
    }.items():
        for mode in ("global", "local"):
            model, alone = DistributedDataParallel(plain(), **settings), plain()
            optimizer = SharpnessAware(SGD(model.parameters(), lr=0.05), GSAM(), rho=0.2, perturb=mode, model=model)
            own_m = None if mode == "global" else 4
            other = SharpnessAware(SGD(alone.parameters(), lr=0.05), GSAM(), rho=0.2, m=own_m, model=alone)
            for number in range(4):
                mine = rows(batch(number), rank)
                parts = [tuple(tensor[slice(*bounds)] for tensor in mine) for bounds in rows_of]
                optimizer.step([BatchClosure(loss_of(model), part, weight=len(part[1]) / 4) for part in parts])
                other.step(BatchClosure(loss_of(alone), batch(number)))
            found[f"parts {name} {mode}"], found[f"parts {name} {mode} alone"] = flat(model), flat(alone)
    for ranks_m in (2, 4):  # m does not depend on the number of ranks
        model, alone = DistributedDataParallel(plain()), plain()
        optimizer = SharpnessAware(SGD(model.parameters(), lr=0.05), SAM(), rho=0.2, m=ranks_m, model=model)
        other = SharpnessAware(SGD(alone.parameters(), lr=0.05), SAM(), rho=0.2, m=ranks_m, model=alone)
        for number in range(4):
            data = batch(number)
            optimizer.step(BatchClosure(loss_of(model), rows(data, rank)))
            other.step(BatchClosure(loss_of(alone), data))
        found[f"m={ranks_m}"], found[f"m={ranks_m} alone"] = flat(model), flat(alone)


def exchanges(rank: int, found: dict) -> None:
    """All-reduces of the gradient in a step: one for a local ascent, two for a global one, however many micro-batches."""
    for mode, m, parts in (
        ("local", None, 1),
        ("global", None, 1),
        ("local", None, 3),
        ("global", None, 3),
        ("local", 1, 2),
    ):
        model = DistributedDataParallel(plain())
        counted = []

        def count(state, bucket, counted=counted):
            counted.append(1)
            done = distributed.all_reduce(bucket.buffer() / 2, async_op=True).get_future()
            return done.then(lambda future: future.value()[0])

        model.register_comm_hook(None, count)
        optimizer = SharpnessAware(SGD(model.parameters(), lr=0.05), SAM(), perturb=mode, m=m, model=model)
        for number in range(3):
            counted.clear()
            optimizer.step([closure_of(model, rows(batch(10 * number + part), rank)) for part in range(parts)])
        found[f"exchanges {mode} {m} {parts}"] = torch.tensor(len(counted))


def overflow(rank: int, found: dict) -> None:
    """In one rank's first gradient only: both leave the step out, and both scalers are told."""
    model = DistributedDataParallel(plain(torch.float32))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizer = SharpnessAware(SGD(model.parameters(), lr=0.05), SAM(), perturb="local", model=model, scaler=scaler)
    calls = []

    def closure():
        loss = functional.cross_entropy(model(rows(data, rank)[0]), rows(data, rank)[1])
        scaler.scale(loss).backward()
        if rank == 0 and len(calls) == 2:
            next(model.parameters()).grad[0, 0] = torch.inf
        calls.append(1)

    for number in range(4):
        data = batch(number, torch.float32)
        optimizer.step(closure)
        scaler.update()
    found["overflow"], found["scale"] = flat(model), torch.tensor(scaler.get_scale())
    found["taken"] = torch.tensor([optimizer.num_steps, optimizer.num_skipped])


def count(told: list, name: str, *args, **kwargs):
    told.append(name)
    return ALL_REDUCE(*args, **kwargs)


def sharded(rank: int, found: dict) -> None:
    from torch.distributed import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    reduced = []
    for rule in RULES:
        model, alone = plain(), plain()
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
        optimizer = SharpnessAware(AdamW(model.parameters(), lr=0.01), rule, rho=0.2, model=model)
        other = SharpnessAware(AdamW(alone.parameters(), lr=0.01), rule, rho=0.2, model=alone)
        before = [parameter.to_local().clone() for parameter in model.parameters()]
        addresses = [parameter.to_local().data_ptr() for parameter in model.parameters()]
        for number in range(5):
            data = batch(number)
            if number == 4:
                distributed.all_reduce = partial(count, reduced, type(rule).__name__)
            optimizer.step(closure_of(model, rows(data, rank)))
            distributed.all_reduce = ALL_REDUCE
            other.step(closure_of(alone, data))
        assert not any(torch.equal(a, p.to_local()) for a, p in zip(before, model.parameters(), strict=True) if a.numel())
        assert addresses == [parameter.to_local().data_ptr() for parameter in model.parameters()]
        name = type(rule).__name__
        found[f"sharded {name}"] = torch.cat([p.full_tensor().reshape(-1) for p in model.parameters()]).detach()
        found[f"sharded {name} alone"] = flat(alone)
    found["sharded collectives"] = torch.tensor(reduced.count("SAM"))

    model, alone = plain(), plain()
    fully_shard(model, mesh=mesh)
    optimizer = SharpnessAware(SGD(model.parameters(), lr=0.05), SAM(), rho=0.2, m=2, model=model)  # of each rank
    other = SharpnessAware(SGD(alone.parameters(), lr=0.05), SAM(), rho=0.2, m=4, model=alone)
    joined = SharpnessAware(SGD(model.parameters(), lr=0.05), SAM(), rho=0.2, model=model)
    whole = SharpnessAware(SGD(alone.parameters(), lr=0.05), SAM(), rho=0.2, model=alone)
    for number in range(3):
        data = batch(number)
        optimizer.step(BatchClosure(loss_of(model), rows(data, rank)))
        other.step([BatchClosure(loss_of(alone), half, weight=0.5) for half in halves(data)])
        joined.step([BatchClosure(loss_of(model), part, weight=0.5) for part in split(rows(data, rank))])
        whole.step(BatchClosure(loss_of(alone), data))
    found["sharded parts"] = torch.cat([p.full_tensor().reshape(-1) for p in model.parameters()]).detach()
    found["sharded parts alone"] = flat(alone)

    model = plain()
    fully_shard(model, mesh=mesh)
    optimizer = SharpnessAware(SGD(model.parameters(), lr=0.0), SAM(), rho=0.2, model=model)
    before = [parameter.to_local().clone() for parameter in model.parameters()]
    for number in range(3):
        optimizer.step(closure_of(model, rows(batch(number), rank)))
    assert all(torch.equal(a, p.to_local()) for a, p in zip(before, model.parameters(), strict=True))
    again = SharpnessAware(SGD(model.parameters(), lr=0.0), SAM(), rho=0.2, model=model)
    again.load_state_dict(optimizer.state_dict())
    assert again.num_steps == 3
    try:
        local = SharpnessAware(SGD(model.parameters(), lr=0.0), SAM(), model=model, perturb="local")
        local.step(closure_of(model, rows(batch(0), rank)))
    except ValueError as error:
        found["refused"] = torch.tensor(float("sharded" in str(error)))


def by_process_group(rank: int, found: dict) -> None:
    """Each rank holds one of two weights; the norm is over both."""
    for rule in (SAM(), GSAM(), KStepSAM(k=3, step=0.9), ASAM()):
        weights = [nn.Parameter(torch.tensor(values, dtype=torch.float64)) for values in ([1.0, 2.0], [3.0, -1.0, 0.5])]
        mine = weights[rank]
        optimizer = SharpnessAware(SGD([mine], lr=0.001), rule, rho=0.3, process_group=distributed.group.WORLD)
        both = [nn.Parameter(weight.detach().clone()) for weight in weights]
        whole = SharpnessAware(SGD(both, lr=0.001), rule, rho=0.3)
        for _ in range(4):
            optimizer.step(fourth_powers([mine]))
            whole.step(fourth_powers(both))
        name = type(rule).__name__
        found[f"group {name}"] = (mine.detach() - both[rank].detach()).abs().max()


def work(rank: int, folder: str) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=120)
    )
    torch.set_num_threads(1)
    found: dict = {}
    for part in (replicas, by_hand, joint, exchanges, overflow, by_process_group, *([sharded] if SHARDABLE else [])):
        part(rank, found)
        distributed.barrier()
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks():
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, args=(folder,), nprocs=2)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_t10_replicas_are_bit_identical_after_steps_along_their_own_gradients(ranks, rule):
    name = type(rule).__name__
    assert torch.equal(ranks[0][f"replica {name}"], ranks[1][f"replica {name}"])
    assert torch.isfinite(ranks[0][f"replica {name}"]).all()
    assert ranks[0][f"steps {name}"] == (300 if name == "SAM" else 20)


def test_by_hand_it_is_the_same(ranks):
    for found in ranks:
        assert torch.equal(found["by closure"], found["by hand"])


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_global_is_one_process_with_the_whole_batch(ranks, rule):
    for found in ranks:
        name = type(rule).__name__
        torch.testing.assert_close(found[f"global {name}"], found[f"global {name} alone"], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    "rule", [rule for rule in RULES if not isinstance(rule, FSAM)], ids=lambda rule: type(rule).__name__
)  # what it remembers is each rank's own
def test_local_is_m_sam_with_a_part_for_each_rank(ranks, rule):
    for found in ranks:
        name = type(rule).__name__
        torch.testing.assert_close(found[f"local {name}"], found[f"local {name} alone"], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("mode", ["global", "local"])
@pytest.mark.parametrize("name", ["copied", "views"])
def test_micro_batches_are_the_whole_batch(ranks, name, mode):
    for found in ranks:
        torch.testing.assert_close(
            found[f"parts {name} {mode}"], found[f"parts {name} {mode} alone"], rtol=1e-11, atol=1e-13
        )


@pytest.mark.parametrize("m", [2, 4])
def test_m_does_not_depend_on_the_number_of_ranks(ranks, m):
    for found in ranks:
        torch.testing.assert_close(found[f"m={m}"], found[f"m={m} alone"], rtol=1e-11, atol=1e-13)


def test_one_exchange_of_gradients_or_two(ranks):
    for found in ranks:
        counted = {name.removeprefix("exchanges "): int(number) for name, number in found.items() if "exchanges" in name}
        assert counted == {"local None 1": 1, "global None 1": 2, "local None 3": 1, "global None 3": 2, "local 1 2": 1}


def test_overflow_on_one_rank_is_one_on_both(ranks):
    assert torch.equal(ranks[0]["overflow"], ranks[1]["overflow"])
    for found in ranks:
        assert found["scale"] == 32.0
        assert found["taken"].tolist() == [3, 1]


def test_norms_over_a_process_group_of_ranks_with_different_weights(ranks):
    for found in ranks:
        assert {name: number for name, number in found.items() if name.startswith("group ") and not number < 1e-13} == {}


@pytest.mark.skipif(not SHARDABLE, reason="fully_shard on CPU needs torch 2.7")
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_fully_sharded_is_one_process_with_the_whole_batch(ranks, rule):
    if isinstance(rule, RandomSAM):  # other noise: each rank draws that of its shards
        return
    for found in ranks:
        name = type(rule).__name__
        torch.testing.assert_close(found[f"sharded {name}"], found[f"sharded {name} alone"], rtol=1e-9, atol=1e-12)


@pytest.mark.skipif(not SHARDABLE, reason="fully_shard on CPU needs torch 2.7")
def test_fully_sharded_with_parts_of_a_batch(ranks):
    for found in ranks:
        torch.testing.assert_close(found["sharded parts"], found["sharded parts alone"], rtol=1e-11, atol=1e-13)


@pytest.mark.skipif(not SHARDABLE, reason="fully_shard on CPU needs torch 2.7")
def test_fully_sharded_takes_one_collective_for_the_norm_and_one_to_see_that_all_is_finite(ranks):
    for found in ranks:
        assert found["sharded collectives"] == 2
        assert found["refused"] == 1
