"""The fused operations in plain torch on the CPU: time against a copy of one vector and against the formula written down."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.counting import Traffic
from benchmarks.gpu.cases import CASES, Args, Case
from benchmarks.measuring import clock, peak_bytes
from sharpness_plugins.kernels import dispatch

DIM = 2**22  # 17 MB a vector: more than a core's own cache
CACHE = 2**21  # of the model behind memory_bytes
ROUNDS = 15
FUSED = [case for case in CASES if case.name.startswith(("box", "ball", "sam"))]
CPU = torch.device("cpu")


def doubled(args: Args) -> Args:
    return {name: [x.double() for x in value] if isinstance(value, list) else value.double() for name, value in args.items()}


def flat(value: Tensor | list[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in value]) if isinstance(value, list) else value


def fresh(case: Case) -> Args:
    torch.manual_seed(0)
    return case.make(DIM, torch.float32, CPU)


@pytest.mark.benchmark(group="kernels", timer=clock)
@pytest.mark.parametrize("case", FUSED, ids=lambda case: case.name.replace(" ", "_"))
def test_operation(benchmark: Any, monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    """The ratios are to a copy of one vector and, where there is one, to the first of the other ways; timed in turn."""
    monkeypatch.setenv(dispatch.VARIABLE, "torch")
    args, exact = fresh(case), doubled(fresh(case))
    found, expected = case.run(args), case.run(exact)
    for name in case.outputs:
        torch.testing.assert_close(flat(args[name]).double(), flat(exact[name]), rtol=1e-5, atol=1e-6)
    if found is not None and expected is not None:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)

    source, target = torch.zeros(2, DIM).unbind()
    peer = next(iter(case.peers.values()), None)
    copies: list[float] = []
    peers: list[float] = []

    def timed() -> None:
        began = clock()
        target.copy_(source)
        copied = clock()
        case.run(args)
        done = clock()
        copies.append((done - copied) / (copied - began))
        if peer is not None:
            peer(args)
            peers.append((done - copied) / (clock() - done))

    timed()
    benchmark.pedantic(timed, rounds=ROUNDS)
    ratios = {"copies": statistics.median(copies)}
    if peer is not None:
        ratios["other_way"] = statistics.median(peers)
    with Traffic(cache_bytes=CACHE, inside=True) as moved:
        case.run(args)
    counts = {"memory_bytes_per_parameter": moved.memory_bytes / DIM}
    peak = peak_bytes(lambda: case.run(args))
    benchmark.extra_info.update(
        dim=DIM, bytes_moved=case.bytes_per_element * DIM, counts=counts, ratios=ratios, peak_bytes=peak
    )
