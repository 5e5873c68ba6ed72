"""What every rank of a group does in ``test_ranks``: checks by name that return JSON, and who starts the ranks."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from sharpness_plugins import BatchController, SharpnessMonitor, basis, measure_sharpness
from sharpness_plugins.basis import STORAGES
from sharpness_plugins.errors import LostRankError
from sharpness_plugins.gauss_newton import OutputProducts
from sharpness_plugins.krylov import LanczosRequest
from sharpness_plugins.lanczos import lanczos
from sharpness_plugins.metrics import (
    EpsilonBox,
    GaussNewtonTrace,
    GradientNoiseScale,
    HessianTopK,
    HessianTrace,
    PreconditionedTopK,
    RandomSubspace,
    SpectralDensity,
)
from sharpness_plugins.objective import Objective
from sharpness_plugins.report import MetricResult
from sharpness_plugins.schedules import Progress, SharpnessSwitch

F64 = torch.float64
NUM_SAMPLES = 90
CUTS = {2: [0, 90, 90], 4: [0, 40, 40, 53, 90]}  # of the samples in another order; a rank has none
METRICS = {
    "epsilon_box": EpsilonBox(maximizer="lbfgsb_published"),
    "epsilon_box_starts": EpsilonBox(sketch_samples=40),
    "random_subspace": RandomSubspace(dim=5, draws=2),
    "hessian_topk": HessianTopK(k=2),
    "hessian_trace": HessianTrace(),
    "density": SpectralDensity(),
    "gauss_newton_trace": GaussNewtonTrace(),
    "gradient_noise_scale": GradientNoiseScale(inner_product=True),
}
CRITERION = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=F64), ignore_index=1)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(NUM_SAMPLES, 5, generator=generator, dtype=F64)
    return inputs, torch.randint(3, (NUM_SAMPLES,), generator=generator)


def network(*, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(1)
    middle = [nn.BatchNorm1d(6)] if norm else []
    return nn.Sequential(nn.Linear(5, 6), *middle, nn.Tanh(), nn.Linear(6, 3)).double()


def whole(size: int = NUM_SAMPLES) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*(tensor.split(size) for tensor in data()), strict=True))


def own_part(rank: int, world_size: int) -> list[tuple[Tensor, Tensor]]:
    """In another order and other batches; one rank has nothing."""
    inputs, targets = data()
    order = torch.randperm(NUM_SAMPLES, generator=torch.Generator().manual_seed(5))
    mine = order[CUTS[world_size][rank] : CUTS[world_size][rank + 1]]
    return [(inputs[rows], targets[rows]) for rows in mine.split(13) if len(rows)]


def padded(rank: int, world_size: int) -> DataLoader:
    """90 samples on four ranks are 92 with the sampler's repeats."""
    dataset = TensorDataset(*data())
    return DataLoader(dataset, batch_size=7, sampler=DistributedSampler(dataset, world_size, rank, shuffle=True, seed=3))


def loaders(rank: int, world_size: int) -> dict[str, Any]:
    own_order = torch.Generator().manual_seed(rank)
    return {
        "own parts": own_part(rank, world_size),
        "a list": whole(20),
        "one batch": whole(),
        "a shuffled loader": DataLoader(TensorDataset(*data()), batch_size=16, shuffle=True, num_workers=0),
        "a padded sampler": padded(rank, world_size),
        "an order of each rank": DataLoader(TensorDataset(*data()), batch_size=9, shuffle=True, generator=own_order),
    }


def vectors(objective: Objective) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    e, v = (torch.randn(objective.dim, generator=generator, dtype=F64) for _ in range(2))
    return 0.1 * e, v


def evaluated(objective: Objective) -> dict[str, Any]:
    """Everything that an objective gives."""
    e, v = vectors(objective)
    loss, gradient = objective.value_and_grad(e)
    with objective.session():
        rows = [objective.hvp(v, e), objective.hvp(torch.stack([v, e]))[1]]
        matrices = [OutputProducts(objective, name)(v) for name in ("gauss_newton", "fisher", "empirical_fisher")]
    sketch = objective.sketch(30)
    probabilities = sketch.probabilities()
    assert probabilities is not None
    along = sketch.gradient(probabilities)
    assert along is not None
    numbers = [objective.loss, objective.value(e), loss, objective.num_samples, objective.total_weight, sketch.share]
    return {
        "numbers": numbers,
        "vectors": [vector.tolist() for vector in (gradient, *rows, *matrices, probabilities, along)],
    }


def told(report: Any) -> dict[str, Any]:
    """A report, but for what takes another time or another path in every process."""
    found: dict[str, Any] = report.to_dict()
    return found


@contextlib.contextmanager
def quiet() -> Iterator[list[str]]:
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    said += [str(warning.message) for warning in caught]


def raised(work: Callable[[], Any]) -> str:
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


# ---------------------------------------------------------------------- the same numbers


def check_evaluations(rank: int, world_size: int) -> dict[str, Any]:
    found = {}
    for name, loader in loaders(rank, world_size).items():
        model = DistributedDataParallel(network())
        objective = Objective(model, loader, criterion=CRITERION)
        found[name] = evaluated(objective) | {"read": objective.ranks.how, "batches": objective.num_batches}
    return found


def check_metrics(rank: int, world_size: int) -> dict[str, Any]:
    chosen = METRICS if world_size == 2 else {key: METRICS[key] for key in ("epsilon_box_starts", "gradient_noise_scale")}
    report = measure_sharpness(network(), own_part(rank, world_size), chosen)
    return told(report)


def check_first_samples(rank: int, world_size: int) -> list[float]:
    """30 samples of all, however they are shared out."""
    found = []
    for loader in (whole(20), whole(), DataLoader(TensorDataset(*data()), batch_size=16), padded(rank, world_size)):
        objective = Objective(network(), loader, max_samples=30)
        found += [objective.num_samples, objective.loss]
    ones = [(x[None], y[None]) for x, y in zip(*data(), strict=True)]
    for most in (1, 3):  # fewer than there are ranks, or no multiple of them
        objective = Objective(network(), ones, max_samples=most)
        found += [objective.num_samples, objective.loss]
    return found


def check_batch_statistics(rank: int, world_size: int) -> dict[str, Any]:
    """Batches are dealt out whole, so that their statistics are those of one process; running statistics are rank 0's."""
    model = network(norm=True)
    norm: Any = model[1]
    norm.running_mean += rank
    found = {"loss": [], "notes": []}
    for loader in (whole(18), whole()):
        objective = Objective(model, loader, batch_norm="batch")
        found["loss"] += [objective.loss, objective.value_and_grad()[1].norm().item()]
    objective = Objective(model, whole(18))
    found["loss"].append(objective.loss)
    found["notes"] = objective.notes
    found["left"] = norm.running_mean.mean().item()
    return found


def check_synchronized_statistics(rank: int, world_size: int) -> dict[str, Any]:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network(norm=True))
    objective = Objective(model, whole(18), criterion=CRITERION)
    refused = raised(lambda: Objective(model, whole(18), criterion=CRITERION, batch_norm="batch"))
    return {"kind": type(model[1]).__name__, "refused": refused, **evaluated(objective)}


def spread(model: nn.Module, batch: Any) -> Tensor:
    """No mean over samples."""
    return model(batch[0]).std()


def check_losses_that_have_no_pieces(rank: int, world_size: int) -> list[float]:
    objective = Objective(network(), whole(), loss_fn=spread)
    return [objective.loss, *objective.value_and_grad()[1].tolist()]


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = network()
        self.seen = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen += len(inputs)
        return self.inner(inputs)


def check_work(rank: int, world_size: int) -> dict[str, Any]:
    """Samples that the model saw in one gradient, and collectives of the group."""
    model = Counting()
    objective = Objective(model, whole(20))
    calls: Counter[str] = Counter()
    with counted(calls):
        model.seen = 0
        objective.value_and_grad()
        found = {"seen": model.seen, "gradient": dict(calls)}
        calls.clear()
        objective.value()
        found["value"] = dict(calls)
        calls.clear()
        objective.hvp(torch.ones(3, objective.dim, dtype=F64))
        found["products"] = dict(calls)
    return found


@contextlib.contextmanager
def counted(calls: Counter[str]) -> Iterator[None]:
    before = {name: getattr(dist, name) for name in ("all_reduce", "all_gather_object", "broadcast_object_list", "barrier")}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return before[name](*args, **kwargs)

        return call

    for name in before:
        setattr(dist, name, counting(name))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(dist, name, function)


def check_shared_basis(rank: int, world_size: int) -> dict[str, Any]:
    """Each rank keeps its part of every vector, here also of short ones."""
    objective = Objective(network(), own_part(rank, world_size))
    basis.WORTH_SHARING, before = 0, basis.WORTH_SHARING
    found: dict[str, Any] = {}
    try:
        for storage in STORAGES if world_size == 2 else STORAGES[:1]:
            request = LanczosRequest(k=3, max_basis=7, storage=storage, keep_basis=True, check_multiplicity=True)
            with objective.session():
                start = torch.ones(objective.dim, dtype=F64)
                run = lanczos(objective.hvp, start, request)
                found[storage] = [*run.values.tolist(), *(run.vectors.abs() @ start).tolist(), run.num_matvecs]
                found[f"{storage} removed"] = run.remove(start).tolist()
                assert run._basis is not None
                found[f"{storage} bytes"] = run._basis.nbytes / len(run._basis)
        metrics = [HessianTrace(method="hutch++"), HessianTrace(method="xtrace"), SpectralDensity()]
        report = measure_sharpness(network(), own_part(rank, world_size), metrics[: 3 if world_size == 2 else 1])
        found["metrics"] = [result.value for result in report.results.values()]
        with quiet():
            broken = measure_sharpness(network(), Breaking(rank, 12), "hessian_topk", cache_bytes=0)
        found["broken"] = broken["hessian_topk"].status.message
    finally:
        basis.WORTH_SHARING = before
    return found


# ---------------------------------------------------------------------- what differs is found


def check_wrong_guesses(rank: int, world_size: int) -> dict[str, str]:
    other = [(inputs + rank, targets) for inputs, targets in whole(20)]
    mixed = whole(20) if rank else other[:2]
    turned = whole(10)[:: 1 if rank else -1]
    mine = own_part(rank, world_size)
    return {
        "mixed": raised(lambda: Objective(network(), mixed if world_size > 2 else other)),
        "turned": raised(lambda: Objective(network(), turned)),
        "not the same": raised(lambda: Objective(network(), mine, ranks="same data")),
        "not its own": raised(lambda: Objective(network(), whole(20), ranks="own data")),
        "declared": raised(lambda: Objective(network(), whole(20), ranks="same data")),
        "declared own": raised(lambda: Objective(network(), mine, ranks="own data")),
        "empty": raised(lambda: Objective(network(), [])),
        "nonsense": raised(lambda: Objective(network(), mine, ranks="mine")),
    }


def check_other_models(rank: int, world_size: int) -> dict[str, Any]:
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0] += rank
    select = "0.*" if rank else None
    return {
        "weights": raised(lambda: Objective(model, whole(20))),
        "selection": raised(lambda: Objective(network(), whole(20), select=select)),
        "seed": raised(lambda: measure_sharpness(network(), whole(20), "hessian_topk", seed=rank)),
        "settings": raised(lambda: measure_sharpness(network(), whole(20), HessianTopK(k=1 + rank))),
        "metrics": raised(lambda: measure_sharpness(network(), whole(20), ["hessian_topk", "epsilon_box"][: 1 + rank % 2])),
        "alone": Objective(model, whole(20), ranks="alone").loss,
    }


# ---------------------------------------------------------------------- failures


class Planned:
    """A metric that does what each rank was told."""

    def __init__(self, name: str, work: Callable[[Objective], float]) -> None:
        self.name, self.work = name, work

    def __call__(self, objective: Objective, rng: torch.Generator) -> MetricResult:
        return MetricResult(self.work(objective))


def failing(where: str, rank: int) -> Callable[[Objective], float]:
    def work(objective: Objective) -> float:
        for step in range(3):
            if rank == 1 and where == str(step):
                raise KeyError(f"boom {step}")
            objective.value() if step % 2 else objective.value_and_grad()
        if rank == 1 and where == "end":
            raise KeyError("boom end")
        return 1.0

    return work


def swallowing(rank: int) -> Callable[[Objective], float]:
    def work(objective: Objective) -> float:
        if rank == 1:
            raise KeyError("swallowed")
        with contextlib.suppress(Exception):
            objective.value()
        return 1.0

    return work


def more_work(rank: int) -> Callable[[Objective], float]:
    def work(objective: Objective) -> float:
        for _ in range(1 + rank):
            objective.value()
        return 1.0

    return work


def other_work(rank: int) -> Callable[[Objective], float]:
    return lambda objective: objective.value() if rank else objective.value_and_grad()[0]


def elsewhere(rank: int) -> Callable[[Objective], float]:
    return lambda objective: objective.value(torch.full((objective.dim,), 0.1 * rank, dtype=F64))


def check_metrics_that_fail_on_one_rank(rank: int, world_size: int) -> dict[str, Any]:
    metrics: list[Any] = [Planned(f"fails_{where}", failing(where, rank)) for where in ("0", "1", "2", "end")]
    metrics += [
        Planned("swallows", swallowing(rank)),
        Planned("does_more", more_work(rank)),
        Planned("does_other", other_work(rank)),
        Planned("elsewhere", elsewhere(rank)),
        Planned("other_value", lambda objective: float(rank)),
        Planned("fails_everywhere", lambda objective: 1 / 0),
        Planned("unlike", lambda objective: objective.value(torch.zeros(3 + rank))),
        Planned("good", lambda objective: objective.value()),
    ]
    with quiet() as said:
        report = measure_sharpness(network(), whole(20), metrics)
    return {
        "results": {key: [str(result.status.kind), result.status.message] for key, result in report.results.items()},
        "good": report["good"].value,
        "warnings": len(said),
        "next": measure_sharpness(network(), whole(20), "hessian_topk")["hessian_topk"].value,
    }


class Breaking(list):
    """Raises in the middle of its second pass on rank 1."""

    def __init__(self, rank: int, at: int) -> None:
        super().__init__(whole(20))
        self.rank, self.at, self.passes = rank, at, 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        for number, batch in enumerate(super().__iter__()):
            if self.rank == 1 and self.passes == self.at and number == 3:
                raise OSError("disk gone")
            yield batch


def check_loaders_that_fail_on_one_rank(rank: int, world_size: int) -> dict[str, Any]:
    measured = raised(lambda: Objective(network(), Breaking(rank, 1), cache_bytes=0))
    with quiet():
        report = measure_sharpness(
            network(), Breaking(rank, 8), ["hessian_topk", Planned("good", lambda o: o.value())], cache_bytes=0
        )
    return {
        "first pass": measured,
        "later": report["hessian_topk"].status.message,
        "next": report["good"].value,
        "of a model": raised(lambda: Objective(network() if rank else nn.ReLU(), whole(20))),
        "of a loss": raised(lambda: Objective(network(), whole(20), loss_fn=None if rank else (lambda m, b: 1 / 0))),
    }


# ---------------------------------------------------------------------- training


class Clock:
    """Another time on every rank."""

    def __init__(self, rank: int) -> None:
        self.rank, self.now = rank, 0.0

    def __call__(self) -> float:
        self.now += 1.0 + 5.0 * self.rank * (self.now % 3 < 1)
        return self.now


def trained(rank: int, world_size: int, *, monitored: bool, every: str = "4 steps") -> dict[str, Any]:
    model = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    probe = whole(30)
    monitor = SharpnessMonitor(
        model,
        probe,
        {"top": HessianTopK(k=1), "box": EpsilonBox(maximizer="lbfgsb_published")} if monitored else (),
        every=every,
        budget=None,
        clock=Clock(rank),
    )
    inputs, targets = data()
    at_last: list[Any] = []
    for step in range(1, 10):
        rows = torch.arange(rank, NUM_SAMPLES, world_size)[step % 5 :: 3]
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs[rows]), targets[rows]).backward()
        optimizer.step()
        if monitored and monitor.measure_if_due(Progress(step, 30 * step, None, 30, 30)) is not None:
            at_last = [p.detach().tolist() for p in model.parameters()]
    return {
        "weights": torch.cat([p.detach().flatten() for p in model.parameters()]).tolist(),
        "values": [dict(made.values) for made in monitor.history],
        "steps": [made.step for made in monitor.history],
        "at_last": at_last,
        "rng": torch.rand(1).item(),
    }


def check_monitor(rank: int, world_size: int) -> dict[str, Any]:
    torch.manual_seed(4)
    without = trained(rank, world_size, monitored=False)
    torch.manual_seed(4)
    with_one = trained(rank, world_size, monitored=True)
    timed = trained(rank, world_size, monitored=True, every="10 s")  # by the clocks, which differ
    return {
        "same": without["weights"] == with_one["weights"] and without["rng"] == with_one["rng"],
        "values": with_one["values"],
        "steps": with_one["steps"],
        "at_last": with_one["at_last"],
        "timed": timed["steps"],
    }


def check_signals(rank: int, world_size: int) -> dict[str, Any]:
    """A schedule that looks at a metric, which all ranks measure together, on half of the probe each."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    switch = SharpnessSwitch(8, 16, "hessian_topk:k=1", rule="plateau", deadline="99ep", every="4 steps")
    controller = BatchController(switch, optimizer, model=model, probe=whole(6)[:1], budget=1.0, clock=Clock(rank))
    loader = DataLoader(TensorDataset(*data()), batch_size=8)
    found, seen = [], Counter()
    model.register_forward_hook(lambda module, args, output: seen.update([len(args[0])]))
    for _ in range(5):
        for inputs, targets in controller.batches(loader):
            controller.backward(functional.cross_entropy(model(inputs), targets))
            if controller.at_step:
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= world_size
                optimizer.step()
                optimizer.zero_grad()
                found += [[controller.step, entry.step, entry.value] for entry in controller.signals.values()]
    return {"signals": found, "weights": model[0].weight.flatten().tolist(), "largest": max(seen)}


# ---------------------------------------------------------------------- sharded models


def sharded(model: nn.Sequential, **settings: Any) -> nn.Sequential:
    """As one group of its own, a group of two modules, and the rest."""
    fully_shard(model[0], **settings)
    fully_shard(list(model[-2:]), **settings)
    fully_shard(model, **settings)
    return model


def check_fully_sharded(rank: int, world_size: int) -> dict[str, Any]:
    objective = Objective(sharded(network(norm=True)), own_part(rank, world_size), criterion=CRITERION)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    low = Objective(sharded(network().float(), mp_policy=policy), [(x.float(), y) for x, y in whole(20)])
    return evaluated(objective) | {"notes": objective.notes, "low": [low.loss, low.value_and_grad()[1].norm().item()]}


def check_training_fully_sharded(rank: int, world_size: int) -> dict[str, Any]:
    """AdamW, with and without measurements between its steps, one of which fails."""
    found = []
    report: Any = None
    for measured in (False, True):
        model = sharded(network())
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        inputs, targets = data()
        for step in range(6):
            rows = torch.arange(rank, NUM_SAMPLES, world_size)[step::6]
            functional.cross_entropy(model(inputs[rows]), targets[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
            if measured and step in (1, 3):
                metrics = [HessianTopK(k=1), PreconditionedTopK(optimizer), Planned("fails", failing("1", rank))]
                with quiet():
                    report = measure_sharpness(model, whole(20), metrics)
                assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
            if step == 3:
                weights = [parameter.full_tensor().tolist() for parameter in model.parameters()]
        found.append([parameter.full_tensor().tolist() for parameter in model.parameters()])
    low, policy = network().float(), MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(low[0], mp_policy=policy)
    fully_shard(low, mp_policy=policy)  # the outer group stays gathered after a forward pass
    data_of_low = [(x.float(), y) for x, y in whole(20)]
    losses = [Objective(low, data_of_low).loss]
    with torch.no_grad():
        low(data_of_low[0][0])
    gathered = sum(not isinstance(parameter.data, DTensor) for parameter in low.parameters())
    losses.append(Objective(low, data_of_low).loss)
    gradients = []
    for measured in (False, True):
        loss = functional.cross_entropy(low(data_of_low[0][0]).float(), data_of_low[0][1])
        if measured:
            losses.append(Objective(low, data_of_low).loss)
        loss.backward()
        gradients.append([parameter.grad.full_tensor().tolist() for parameter in low.parameters()])  # type: ignore[union-attr]
        low.zero_grad()
    return {
        "gathered": gathered,
        "losses": losses,
        "gradients": gradients[0] == gradients[1],
        "same": found[0] == found[1],
        "weights": weights,
        "values": {key: result.value for key, result in report.results.items()},
        "failed": report["fails"].status.message,
    }


def check_other_sharding(rank: int, world_size: int) -> dict[str, str]:
    mesh = init_device_mesh("cpu", (world_size,))
    parallel = parallelize_module(network(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = FullyShardedDataParallel(network(), device_id=torch.device("cpu"))
    engine = type("DeepSpeedEngine", (nn.Module,), {})()
    return {
        "tensor parallel": raised(lambda: Objective(parallel, whole(20))),
        "FSDP1": raised(lambda: Objective(first, whole(20))),
        "DeepSpeed": raised(lambda: Objective(engine, whole(20))),
        "alone": raised(lambda: Objective(sharded(network()), whole(20), ranks="alone")),
        "pipeline": raised(lambda: Objective(network()[rank : rank + 1] if rank != 1 else network()[2:], whole(20))),
    }


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


# ---------------------------------------------------------------------- ranks that die


def die_by_signal(rank: int) -> Callable[[Objective], float]:
    def work(objective: Objective) -> float:
        objective.value()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return objective.value()

    return work


def die_by_exit(rank: int) -> Callable[[Objective], float]:
    def work(objective: Objective) -> float:
        objective.value()
        if rank == 1:
            os._exit(3)
        return objective.value()

    return work


def be_interrupted(rank: int) -> Callable[[Objective], float]:
    def work(objective: Objective) -> float:
        objective.value()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return objective.value()

    return work


def stay_away(rank: int) -> Callable[[Objective], float]:
    def work(objective: Objective) -> float:
        if rank == 1:
            time.sleep(30)
        return objective.value()

    return work


DEATHS = {"signal": die_by_signal, "exit": die_by_exit, "Ctrl-C twice": be_interrupted, "stay away": stay_away}


def lose_a_rank(rank: int, world_size: int, how: str) -> str:
    metrics = [Planned("deadly", DEATHS[how](rank)), Planned("good", lambda objective: objective.value())]
    try:
        measure_sharpness(network(), whole(20), metrics)
    except LostRankError as error:
        return str(error)
    return "nothing"


# ---------------------------------------------------------------------- who starts them


def on_rank(rank: int, world_size: int, folder: str, names: list[str], timeout: float, checks: str) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
    )
    found: dict[str, Any] = {}
    for name in names:
        began = time.monotonic()
        try:
            if name in DEATHS:
                found[name] = lose_a_rank(rank, world_size, name)
            else:
                found[name] = importlib.import_module(checks).CHECKS[name](rank, world_size)
        except Exception:
            found[name] = {"error": traceback.format_exc()}
        found[f"{name} seconds"] = time.monotonic() - began
        Path(folder, f"{rank}.json").write_text(json.dumps(found))
    if set(names) & set(DEATHS) or any(isinstance(answer, dict) and "lost" in answer for answer in found.values()):
        os._exit(0)  # a broken group may not be destroyed
    dist.barrier()
    dist.destroy_process_group()


def start(
    world_size: int, folder: Path, names: list[str], *, timeout: float = 60.0, checks: str = "rank_checks"
) -> list[Any]:
    """Processes that run checks of a module, by their names."""
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "rank_checks"])
    folder.mkdir()
    processes = [
        context.Process(target=on_rank, args=(rank, world_size, str(folder), names, timeout, checks))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def results(folder: Path, world_size: int) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)]


def found_by(
    folder: Path, names: dict[int, list[str]], *, checks: str = "rank_checks", timeout: float = 60.0, patience: float
) -> dict[int, list[dict[str, Any]]]:
    """What each rank found in its checks, by the number of ranks.

    Args:
        names: of the checks, by the number of ranks.
        timeout: of the group, in seconds.
        patience: how long each of the processes may take, in seconds.
    """
    found = {}
    for size, chosen in names.items():
        processes = start(size, folder / str(size), chosen, timeout=timeout, checks=checks)
        for process in processes:
            process.join(timeout=patience)
        assert [process.exitcode for process in processes] == [0] * size
        found[size] = results(folder / str(size), size)
    return found


def of(told: dict[int, list[dict[str, Any]]], size: int, name: str) -> list[Any]:
    """What the ranks found in one check, which must not have failed."""
    answers = [rank[name] for rank in told[size]]
    for answer in answers:
        assert not (isinstance(answer, dict) and "error" in answer), answer["error"]
    return answers
