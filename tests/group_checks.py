"""What four ranks do in ``test_groups``, two groups of two at the same time: checks by name that return JSON."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import rank_checks
from rank_checks import CRITERION, Planned, evaluated, failing, quiet, raised, sharded, told, vectors
from sharpness_plugins import RanksOf, measure_sharpness, plan_measurement
from sharpness_plugins.metrics import GradientNoiseScale, HessianTopK, HessianTrace
from sharpness_plugins.objective import Objective

LINES = ([3, 1], [2, 0])  # in descending order; the first rank of the one is none of the other's
METRICS = {"topk": HessianTopK(k=3), "trace": HessianTrace(), "noise": GradientNoiseScale()}


def line_of(rank: int) -> int:
    return 0 if rank in LINES[0] else 1


def network(line: int) -> nn.Sequential:
    """Another model for each group."""
    model = rank_checks.network()
    with torch.no_grad():
        model[2].weight *= 1 + line
    return model


def samples(line: int) -> tuple[Tensor, Tensor]:
    """Other data for each group."""
    inputs, targets = rank_checks.data()
    return (inputs[:40], targets[:40]) if line == 0 else (inputs[40:], targets[40:])


def batches(line: int, member: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """All of a group's data, or the unequal part of one of its members."""
    inputs, targets = samples(line)
    rows = slice(None) if member is None else (slice(0, 11), slice(11, None))[member]
    return list(zip(inputs[rows].split(9), targets[rows].split(9), strict=True))


def groups() -> list[Any]:
    """Of the lines; torch before 2.12 or so sorts the ranks of a group."""
    as_given = {"sort_ranks": False} if "sort_ranks" in inspect.signature(dist.new_group).parameters else {}
    return [dist.new_group(line, **as_given) for line in LINES]  # all four make both


def check_objectives(rank: int, world_size: int) -> dict[str, Any]:
    line = line_of(rank)
    group = groups()[line]
    member = dist.get_rank(group)
    mesh = DeviceMesh("cpu", torch.tensor(LINES), mesh_dim_names=("groups", "line"))["line"]
    given = {
        "group": Objective(network(line), batches(line), criterion=CRITERION, ranks=group),
        "own data": Objective(network(line), batches(line, member), criterion=CRITERION, ranks=RanksOf(group, "own data")),
        "mesh": Objective(network(line), batches(line), criterion=CRITERION, ranks=mesh),
    }
    found: dict[str, Any] = {}
    for name, objective in given.items():
        found[name] = evaluated(objective) | {"read": objective.ranks.how, "size": objective.ranks.size}
    given_order = "sort_ranks" in inspect.signature(dist.new_group).parameters
    return found | {"order": dist.get_process_group_ranks(group), "as given": given_order}


def check_reports(rank: int, world_size: int) -> dict[str, Any]:
    """A different number of metrics in each group: they never meet."""
    line = line_of(rank)
    group = groups()[line]
    metrics = dict(list(METRICS.items())[line:])
    report = measure_sharpness(network(line), batches(line), metrics, ranks=group)
    plan = plan_measurement(network(line), batches(line), metrics, ranks=RanksOf(group))
    return {"report": told(report), "plan": plan.about["ranks"]}


def check_failures(rank: int, world_size: int) -> dict[str, Any]:
    """On rank 1, which is in the first group."""
    line = line_of(rank)
    group = groups()[line]
    metrics = [
        Planned("fails", failing("1", rank)),
        Planned("elsewhere", rank_checks.elsewhere(rank // 2)),
        HessianTopK(k=1),
    ]
    with quiet() as said:
        report = measure_sharpness(network(line), batches(line), metrics, ranks=group)
    loader = rank_checks.Breaking(rank, 1)
    return {
        "messages": {key: result.status.message for key, result in report.results.items()},
        "value": report["hessian_topk"].value,
        "warnings": len(said),
        "loader": raised(lambda: Objective(network(line), loader, cache_bytes=0, ranks=group)),
    }


def check_outsiders(rank: int, world_size: int) -> dict[str, Any]:
    """Rank 3 is in no group, and calls all the same; the others measure."""
    three = dist.new_group([0, 1, 2])
    mesh = DeviceMesh("cpu", [0, 1, 2])
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))

    def measured(ranks: Any) -> Any:
        return raised(lambda: measure_sharpness(network(0), batches(0), HessianTopK(k=1), ranks=ranks))

    return {
        "group": measured(three),
        "mesh": measured(mesh),
        "with its data": measured(RanksOf(three, "same data")),
        "square": measured(square),
        "nonsense": measured(3),
        "alone in it": raised(lambda: RanksOf(three, "alone")),
    }


def check_shards(rank: int, world_size: int) -> dict[str, Any]:
    """A model sharded over one group, over rows of a square of ranks, over all of them, and over one process."""
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    row, line = square["columns"], rank // 2
    of_row = Objective(sharded(network(line), mesh=row), batches(line), criterion=CRITERION, ranks=row)
    hybrid = Objective(sharded(network(0), mesh=square), batches(line), criterion=CRITERION, ranks=row.get_group())
    of_all = sharded(network(0))
    by_itself = fully_shard(network(line), mesh=DeviceMesh("cpu", torch.arange(4)[:, None], mesh_dim_names=("a", "b"))["b"])
    return {
        "of row": evaluated(of_row),
        "hybrid": [hybrid.loss, *hybrid.hvp(vectors(hybrid)[1]).tolist()],
        "of all": raised(lambda: Objective(of_all, batches(line), ranks=row)),
        "across": raised(lambda: Objective(sharded(network(0), mesh=row), batches(0), ranks=square["rows"])),
        "alone": raised(lambda: Objective(of_all, batches(line), ranks="alone")),
        "by itself": Objective(by_itself, batches(line), criterion=CRITERION, ranks="alone").loss,
    }


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}
