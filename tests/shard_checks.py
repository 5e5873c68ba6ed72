"""What every rank does in ``test_sharded``: models of ``fully_shard`` whose gathered weights do not fit in memory."""

from __future__ import annotations

import os
import signal
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import rank_checks
from rank_checks import F64, NUM_SAMPLES, whole
from sharpness_plugins import measure_sharpness, plan_measurement
from sharpness_plugins.errors import SharpnessError
from sharpness_plugins.objective import Objective
from sharpness_plugins.report import MetricResult


def own_part(rank: int, world_size: int) -> list[tuple[Tensor, Tensor]]:
    """Few batches, in another order; a rank has none."""
    inputs, targets = rank_checks.data()
    order = torch.randperm(NUM_SAMPLES, generator=torch.Generator().manual_seed(5))
    cuts = rank_checks.CUTS[world_size]
    return [(inputs[rows], targets[rows]) for rows in order[cuts[rank] : cuts[rank + 1]].split(45) if len(rows)]


# ---------------------------------------------------------------------- models


class Residual(nn.Module):
    """Two layers, whose weights the second time are those of the first."""

    def __init__(self, width: int, *, repeats: int = 1, checkpointed: bool = False) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(width, 12), nn.LayerNorm(12), nn.Linear(12, width, bias=False)
        self.repeats, self.checkpointed = repeats, checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.repeats):
            x = checkpoint(self._once, x, use_reentrant=False) if self.checkpointed else self._once(x)
        return x

    def _once(self, x: Tensor) -> Tensor:
        return x + self.second(torch.tanh(self.norm(self.first(x))))


class Tokens(nn.Module):
    """A transformer over the five inputs, whose embedding is its head, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 8)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, activation="gelu") for _ in range(2)
        )
        self.head = nn.Linear(8, 3, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding((x > 0).long() + (x > 1).long()) * (1 + x[..., None])
        for block in self.blocks:
            h = block(h)
        return self.head(h.mean(dim=1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.LSTM(1, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x[..., None])[0][:, -1])


class Views(nn.Module):
    """Uses its weights as complex numbers, negated, and inside of ``no_grad``; a method beside ``forward`` computes, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale, self.shift = nn.Linear(5, 6), nn.Parameter(torch.rand(4, 2)), nn.Parameter(torch.rand(6, 2))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad(), torch.enable_grad():
            return self.head(torch.tanh(self._waved(x)))  # type: ignore[no-any-return]

    def features(self, x: Tensor) -> Tensor:
        return self._waved(x)

    def _waved(self, x: Tensor) -> Tensor:
        waves = torch.fft.rfft(self.first(x)) * torch.view_as_complex(self.scale)
        return torch.fft.irfft(waves, n=6) * torch.view_as_complex(self.shift).conj().imag


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.views = nn.Linear(5, 5), Views()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        return self.views(x) + self.views.features(x).sum(dim=1, keepdim=True)  # type: ignore[no-any-return]


def shard_views(model: Outer) -> nn.Module:
    fully_shard(model.views)
    register_fsdp_forward_method(model.views, "features")
    return fully_shard(model)


def _residual(**settings: Any) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), Residual(6, **settings), Residual(6), nn.Linear(6, 3))


def _frozen() -> nn.Sequential:
    model = _residual()
    for parameter in (*model[2].parameters(), model[4].weight):
        parameter.requires_grad_(False)
    return model


def _convolutional() -> nn.Sequential:
    layers = [nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(20, 3))


def shard(model: nn.Module, **settings: Any) -> nn.Module:
    """Its blocks, and the rest."""
    for part in model.modules():
        if isinstance(part, (Residual, nn.TransformerEncoderLayer, nn.LSTM)):
            fully_shard(part, **settings)
    return fully_shard(model, **settings)


def shard_groups(model: nn.Sequential) -> nn.Sequential:
    fully_shard(model[0])
    fully_shard([model[2], model[4]])
    return fully_shard(model)


def shard_one(model: nn.Sequential) -> nn.Sequential:
    """All other parameters lie on every rank."""
    fully_shard(model[2])
    return model


def shard_columns(model: nn.Module) -> nn.Module:
    size = dist.get_world_size()
    return shard(model, shard_placement_fn=lambda p: Shard(1) if p.ndim > 1 and p.shape[1] % size == 0 else None)


def shard_twice(model: nn.Module) -> nn.Module:
    """Over pairs of ranks, the same on each pair."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("replicate", "shard"))
    return shard(model, mesh=mesh)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], nn.Module]]] = {
    "blocks": (_residual, shard),
    "groups": (_residual, shard_groups),
    "one block only": (_residual, shard_one),
    "columns": (_residual, shard_columns),
    "pairs": (_residual, shard_twice),
    "frozen": (_frozen, shard),
    "called twice": (lambda: _residual(repeats=2), shard),
    "checkpointed": (lambda: _residual(checkpointed=True), shard),
    "tied transformer": (Tokens, shard),
    "recurrent": (Recurrent, shard),
    "convolutional": (_convolutional, shard),
    "views and methods": (Outer, shard_views),
    "bfloat16 policy": (_residual, lambda model: shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))),
}


def plain(name: str) -> nn.Module:
    torch.manual_seed(2)
    model = MODELS[name][0]().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return model


def sharded(name: str) -> nn.Module:
    return MODELS[name][1](plain(name))


def too_little(model: nn.Module) -> int:
    """Bytes that hold the shards of the vectors, and no whole ones."""
    every, perturbed = (
        sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad or all_of_them)
        for all_of_them in (True, False)
    )
    return int(0.8 * (every + 7 * perturbed))


def in_shards(model: nn.Module, loader: Any, **settings: Any) -> Objective:
    objective = Objective(model, loader, memory=too_little(model), **settings)
    assert not objective.layout.is_whole
    return objective


# ---------------------------------------------------------------------- vectors


def own(objective: Objective, vector: Tensor) -> Tensor:
    """This rank's shard of a whole vector."""
    return torch.cat([vector[..., start:stop] for start, stop in objective.layout.ranges], dim=-1)  # type: ignore[attr-defined]


def assembled(objective: Objective, shard: Tensor) -> list[float]:
    """The whole vector."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (objective.layout.ranges, shard))  # type: ignore[attr-defined]
    answer = torch.full((objective.dim,), torch.nan, dtype=shard.dtype)
    for ranges, part in found:
        begin = 0
        for start, stop in ranges:
            answer[start:stop] = part[begin : begin + stop - start]
            begin += stop - start
    return answer.tolist()  # type: ignore[no-any-return]


def evaluated(objective: Objective, *, differences: bool = False) -> dict[str, Any]:
    """What an objective gives, whole."""
    generator = torch.Generator().manual_seed(7)
    e, v = (torch.randn(objective.dim, generator=generator, dtype=F64) for _ in range(2))
    e *= 0.1
    is_whole = objective.layout.is_whole
    mine = (lambda vector: vector) if is_whole else (lambda vector: own(objective, vector))
    joined = (lambda vector: vector.tolist()) if is_whole else (lambda vector: assembled(objective, vector))
    loss, gradient = objective.value_and_grad(mine(e))
    with objective.session():
        products = objective.hvp(mine(torch.stack([v, e])), mine(e))
        along = objective.hvp(mine(v))
    by_differences = {}
    if differences:
        with objective.hvp_by("central differences"):
            by_differences = {"differences": joined(objective.hvp(mine(v)))}
    sketch = objective.sketch(30)
    probabilities = sketch.probabilities()
    assert probabilities is not None
    raised = sketch.gradient(probabilities)
    assert raised is not None
    exact = [gradient, *products, along, raised]
    return {
        "numbers": [objective.loss, objective.value(mine(e)), loss, objective.total_weight, sketch.share],
        "vectors": [*(joined(vector) for vector in exact), probabilities.tolist()],
        **by_differences,
    }


# ---------------------------------------------------------------------- checks

EVALUATED = {2: [name for name in MODELS if name != "pairs"], 4: ["blocks", "pairs", "tied transformer"]}


def check_evaluations(rank: int, world_size: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in EVALUATED[world_size]:
        objective = in_shards(sharded(name), own_part(rank, world_size), criterion=rank_checks.CRITERION)
        for hold in (0, 2**40) if name in ("blocks", "checkpointed") else (0,):
            objective._evaluator.stream.hold_bytes = hold  # type: ignore[attr-defined]
            found[f"{name}, {hold}"] = evaluated(objective, differences=not hold and name in BY_DIFFERENCES) | {
                "mode": objective.hvp_mode,
                "check": objective.hvp_check,
            }
    return found


BY_DIFFERENCES = ("blocks", "frozen", "tied transformer")
LOADERS = ("one batch", "a shuffled loader", "a padded sampler")


def check_methods_of_gathered_weights(rank: int, world_size: int) -> dict[str, Any]:
    """Of a model that was trained on before, whose registered method is there afterwards."""
    model = sharded("views and methods")
    method = vars(model.views)["features"]
    inputs, targets = rank_checks.data()
    functional.cross_entropy(model(inputs), targets).backward()
    objective = Objective(model, own_part(rank, world_size), criterion=rank_checks.CRITERION)
    assert objective.layout.is_whole
    return evaluated(objective) | {"is there": vars(model.views)["features"] is method}


def check_other_loaders(rank: int, world_size: int) -> dict[str, Any]:
    """Of lists, loaders and samplers, on selected parameters."""
    found = {}
    loaders = rank_checks.loaders(rank, world_size)
    for name in LOADERS:
        loader = loaders[name]
        objective = in_shards(sharded("blocks"), loader, criterion=rank_checks.CRITERION, select=["2.*", "0.weight"])
        found[name] = evaluated(objective) | {"names": objective.space.names}
    return found


def check_weightless(rank: int, world_size: int) -> dict[str, Any]:
    """A batch, and parts of batches, of which every target is ignored."""
    inputs, targets = rank_checks.data()
    targets[:30] = 1  # which the criterion ignores
    batches = [(inputs[rows], targets[rows]) for rows in torch.arange(NUM_SAMPLES).split(30)]
    objective = in_shards(sharded("blocks"), batches, criterion=rank_checks.CRITERION)
    for parts in (objective._gradient_parts, objective._product_parts):
        parts.size = 10
    return evaluated(objective)


class Narrow(nn.Module):
    """Runs out of memory on one rank with more than 25 samples."""

    def __init__(self, model: nn.Module, rank: int, *, backward: bool = False) -> None:
        super().__init__()
        self.model, self.rank, self.backward = model, rank, backward

    def forward(self, x: Tensor) -> Tensor:
        if self.rank == 1 and len(x) > 25 and not self.backward:
            raise torch.OutOfMemoryError("out of memory, by a test")
        output = self.model(x)
        if self.rank == 1 and len(x) > 25 and output.requires_grad:
            output.register_hook(_runs_out)
        return output


def _runs_out(gradient: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("out of memory, by a test")


def check_out_of_memory(rank: int, world_size: int) -> dict[str, Any]:
    found = {}
    for backward in (False, True):
        model = fully_shard(Narrow(sharded("blocks"), rank, backward=backward))
        objective = in_shards(model, whole(45), criterion=rank_checks.CRITERION)
        found[str(backward)] = evaluated(objective) | {"notes": objective.notes}
    model = fully_shard(Narrow(sharded("blocks"), rank))
    found["no way"] = raised(lambda: in_shards(model, whole(45), loss_fn=_uncountable))
    return found


def check_out_of_memory_while_lending(rank: int, world_size: int) -> dict[str, Any]:
    """Of the rank that has no data; in parts of one sample, once in vain."""
    objective = in_shards(sharded("blocks"), own_part(rank, world_size), criterion=rank_checks.CRITERION)
    stream, found = objective._evaluator.stream, {}  # type: ignore[attr-defined]
    lend, left = stream.lend, [0]

    def lending(flat: Tensor) -> Any:
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("out of memory, by a test")
        return lend(flat)

    stream.lend = lending
    for times in (2, 20):
        left[0] = times
        found[str(times)] = raised(objective.value_and_grad)
        left[0] = 0
        found[f"{times}, then"] = objective.value_and_grad()[0] - objective.loss
        found.setdefault("notes", objective.notes)
    return found


def _uncountable(model: nn.Module, batch: Any) -> Tensor:
    if len(batch[0]) < 45:
        raise torch.OutOfMemoryError("out of memory, by a test")
    return functional.cross_entropy(model(batch[0]), batch[1])


class Failing(nn.Module):
    """Fails on one rank, in the forward pass or the backward pass, once it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.how = nn.ModuleList(plain("blocks")), ""

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number == 2 and self.how == "forward":
                raise ValueError("it fails in the middle")
            if number == 2 and self.how == "backward":
                x.register_hook(_fails)
        return x


def _fails(gradient: Tensor) -> Tensor:
    raise ValueError("it fails on the way back")


def raised(work: Callable[[], Any]) -> str:
    try:
        work()
    except SharpnessError as error:
        return f"{type(error).__name__}: {error}"
    except Exception as error:
        return f"other {type(error).__name__}: {error}"
    return "nothing"


def check_failures(rank: int, world_size: int) -> dict[str, Any]:
    """After each of them everything works as before."""
    model = shard(Failing())
    weights = list(model.parameters())
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    objective = in_shards(model, whole(18), criterion=rank_checks.CRITERION)
    found: dict[str, Any] = {"before": objective.value_and_grad()[0]}
    v = torch.ones_like(objective.origin)
    objective.hvp(v)
    for how in ("forward", "backward"):
        for name, work in {"gradient": objective.value_and_grad, "product": lambda: objective.hvp(v)}.items():
            model.how = how if rank == 1 else ""
            found[f"{name}, {how}"] = raised(work)
            model.how = ""
            found[f"after {name}, {how}"] = objective.value_and_grad()[0]
    found["as before"] = [p is q for p, q in zip(model.parameters(), weights, strict=True)] + [
        hooks == [len(module._forward_pre_hooks) for module in model.modules()]
    ]
    return found


class Breaking:
    """A loader that raises on one rank in its third pass."""

    def __init__(self, rank: int) -> None:
        self._rank, self._passes = rank, 0

    def __iter__(self) -> Iterator[Any]:
        self._passes += 1
        for number, batch in enumerate(whole(18)):
            if self._rank == 1 and self._passes > 4 and number == 2:
                raise OSError("the disk is gone")
            yield batch


def check_a_loader_that_breaks(rank: int, world_size: int) -> str:
    def work() -> None:
        model = sharded("blocks")
        objective = in_shards(model, Breaking(rank), cache_bytes=0, criterion=rank_checks.CRITERION, ranks="same data")
        for _ in range(4):
            objective.value_and_grad()

    return raised(work)


class Choosing(nn.Module):
    """Its way depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks, self.head = nn.Linear(5, 6), nn.ModuleList([Residual(6), Residual(6)]), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for block in self.blocks if x[0, 0] > 0 else reversed(self.blocks):
            h = block(h)
        return self.head(h)  # type: ignore[no-any-return]


def check_different_ways(rank: int, world_size: int) -> str:
    inputs, targets = rank_checks.data()
    inputs[:, 0] = 1.0 if rank == 0 else -1.0
    model = shard(Choosing().double())
    return raised(lambda: in_shards(model, [(inputs[rank::world_size], targets[rank::world_size])]))


def penalized(model: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1]) + sum(0.1 * p.square().sum() for p in model.parameters())


class Writing(nn.Module):
    """Changes a weight before it uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.head.weight.mul_(2)
        return self.head(torch.tanh(self.inner(x)))  # type: ignore[no-any-return]


def check_refusals(rank: int, world_size: int) -> dict[str, str]:
    different = plain("blocks")
    with torch.no_grad():
        different[0].bias += 0.1 * rank  # type: ignore[index,operator]
    return {
        "penalty": raised(lambda: in_shards(sharded("blocks"), whole(45), loss_fn=penalized)),
        "writing": raised(lambda: in_shards(fully_shard(Writing().double()), whole(45))),
        "different": raised(lambda: in_shards(shard_one(different), whole(45))),  # type: ignore[arg-type]
    }


def check_ranks_of_their_own(rank: int, world_size: int) -> list[Any]:
    """Each rank alone, with a model that is sharded over itself, and data of its own."""
    mesh = init_device_mesh("cpu", (world_size, 1), mesh_dim_names=("models", "shards"))
    model, (inputs, targets) = shard(plain("blocks"), mesh=mesh["shards"]), rank_checks.data()
    rows = slice(30 * rank, 30 * rank + 30)
    found = []
    for ranks in ("alone", mesh["shards"]):
        # of one rank the shards are all there is, and fewer parameters make room for them
        objective = in_shards(model, [(inputs[rows], targets[rows])], ranks=ranks, select="3.*")
        v = torch.linspace(-1, 1, objective.dim, dtype=F64)
        found += [[objective.loss, objective.value_and_grad()[1].tolist(), objective.hvp(v).tolist()]]
    return found


# ---------------------------------------------------------------------- second derivatives


class Once(torch.autograd.Function):
    """tanh, without a second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return gradient * (1 - y * y)


class Wrong(torch.autograd.Function):
    """tanh, whose second derivative is taken to be zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return gradient * (1 - y * y).detach()


class Through(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)  # type: ignore[no-any-return]


def between(middle: nn.Module, *, dtype: torch.dtype = F64) -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(5, 6), middle, nn.Linear(6, 3)).to(dtype)


def check_second_derivatives(rank: int, world_size: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, middle, mode in (
        ("exact", nn.Tanh(), "auto"),
        ("once", Through(Once), "auto"),
        ("once, exact asked for", Through(Once), "double backward"),
        ("wrong", Through(Wrong), "auto"),
        ("kinks, exact", nn.ReLU(), "auto"),
        ("kinks, differences", nn.ReLU(), "central differences"),
        ("differences", nn.Tanh(), "central differences"),
        ("retained", nn.Tanh(), "retained double backward"),
    ):
        objective: Any = None

        def work(name: str = name, middle: nn.Module = middle, mode: str = mode) -> None:
            nonlocal objective
            # in float32 the steps are long enough to meet kinks
            dtype = torch.float32 if name == "kinks, differences" else F64
            batches = [(inputs.to(dtype), targets) for inputs, targets in own_part(rank, world_size)]
            objective = in_shards(fully_shard(between(middle, dtype=dtype)), batches, hvp=mode)
            v = torch.linspace(-1, 1, objective.dim, dtype=dtype)
            found[name] = {"product": assembled(objective, objective.hvp(own(objective, v)))}

        error = raised(work)
        found.setdefault(name, {})["error"] = error
        if objective is not None:
            found[name] |= {"mode": objective.hvp_mode, "check": objective.hvp_check}
    return found


# ---------------------------------------------------------------------- memory, traces, ends


def check_memory(rank: int, world_size: int) -> dict[str, Any]:
    """Bytes of gathered weights that live at the same time, at most."""
    torch.manual_seed(0)
    blocks = [Residual(40) for _ in range(8)]
    model = shard(nn.Sequential(nn.Linear(5, 40), *blocks, nn.Linear(40, 3)).double())
    objective = in_shards(model, own_part(rank, world_size))
    stream = objective._evaluator.stream  # type: ignore[attr-defined]
    gather, live, peak = stream._gather, {}, [0]

    def watched(unit: Any, shards: Any, step: Any) -> list[Tensor]:
        found: list[Tensor] = gather(unit, shards, step)
        for tensor in found:
            storage = tensor.untyped_storage()
            key = id(storage)
            live[key] = (weakref.ref(tensor), storage.nbytes(), torch.multiprocessing.reductions.StorageWeakRef(storage))
        peak[0] = max(peak[0], sum(size for _, size, reference in live.values() if not reference.expired()))
        return found

    stream._gather = watched
    v = torch.ones_like(objective.origin)
    answer: dict[str, Any] = {
        "whole": 8 * objective.dim,
        "block": 8 * sum(parameter.numel() for parameter in blocks[0].parameters()),
        "root": 8 * (6 * 40 + 41 * 3),
    }
    for hold in (0, 2**40):
        stream.hold_bytes = hold
        for name, work in {
            "value": objective.value,
            "gradient": objective.value_and_grad,
            "product": lambda: objective.hvp(v),
        }.items():
            live.clear()
            peak[0], before = 0, stream.collectives
            work()
            answer[f"{name}, {hold}"] = [peak[0], stream.collectives - before]
    answer["vectors"] = objective.memory.held["weights and vectors"]
    return answer


def check_training(rank: int, world_size: int) -> dict[str, Any]:
    """AdamW, with and without measurements between its steps, of which some fail; gradients are left alone, too."""
    found = []
    values: Any = None
    for measured in (False, True):
        model = sharded("blocks")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        inputs, targets = rank_checks.data()
        for step in range(5):
            rows = torch.arange(rank, NUM_SAMPLES, world_size)[step::5]
            functional.cross_entropy(model(inputs[rows]), targets[rows]).backward()
            if measured and step in (1, 3):
                metrics = [First(), Second(), Fails(rank)]
                with rank_checks.quiet():
                    report = measure_sharpness(model, whole(20), metrics, memory=too_little(model))
                values = {key: [result.value, result.status.message] for key, result in report.results.items()}
                assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        found.append([parameter.full_tensor().tolist() for parameter in model.parameters()])
    return {"same": found[0] == found[1], "values": values}


def check_plan(rank: int, world_size: int) -> dict[str, Any]:
    """Of two metrics, one of which cannot be measured in shards."""
    model = sharded("blocks")
    plan = plan_measurement(model, whole(45), ["hessian_trace", "random_subspace"], memory=too_little(model))
    works = {key: metric.work for key, metric in plan.metrics.items()}
    return {"notes": plan.notes, "hvps": works["hessian_trace"].hvps.typical, "none": works["random_subspace"].passes.high}  # type: ignore[union-attr]


class First:
    name = "first"
    works_on_shards = True

    def __call__(self, objective: Objective, rng: torch.Generator) -> MetricResult:
        return MetricResult(objective.layout.norm(objective.value_and_grad()[1]).item())


class Second:
    name = "second"
    works_on_shards = True

    def __call__(self, objective: Objective, rng: torch.Generator) -> MetricResult:
        v = objective.layout.normal(rng, objective.origin)
        return MetricResult(objective.layout.dot(v, objective.hvp(v)).item())


class Fails:
    name = "fails"
    works_on_shards = True

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def __call__(self, objective: Objective, rng: torch.Generator) -> MetricResult:
        if self._rank == 1:
            raise ValueError("on this rank")
        return MetricResult(objective.value_and_grad()[0])


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


def die_in_the_middle(rank: int, world_size: int) -> str:
    model = shard(Failing())
    objective = in_shards(model, whole(18))
    if rank == 1:
        model.layers[3].register_forward_pre_hook(lambda module, args: os.kill(os.getpid(), signal.SIGKILL))  # type: ignore[index]
    return raised(objective.value_and_grad)


CHECKS["death"] = die_in_the_middle
