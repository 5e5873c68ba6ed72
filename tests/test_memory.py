"""Memory: batches that stay halved, and a budget that batches, bases and graphs share."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sharpness_plugins import MetricResult, PluginWarning, measure_sharpness
from sharpness_plugins.memory import MemoryBudget, parse_bytes
from sharpness_plugins.metrics import (
    EpsilonBox,
    GaussNewtonTopK,
    GradientNoiseScale,
    HessianTopK,
    HessianTrace,
    RandomSubspace,
)
from sharpness_plugins.objective import Objective

F64 = torch.float64


class Small(nn.Module):
    """A network that runs out of memory above so many samples, and counts how often it did."""

    def __init__(self, most: int | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
        self.most, self.refused = most, Counter[int]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.most is not None and len(x) > self.most:
            self.refused[len(x)] += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.layers(x)


def batches(sizes: tuple[int, ...] = (40, 33)) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(n, 6, generator=generator, dtype=F64), torch.randint(0, 4, (n,), generator=generator)) for n in sizes
    ]


@pytest.mark.parametrize(
    ("kind", "evaluate"),
    [
        ("values", lambda o, v: o.value(v)),
        ("gradients", lambda o, v: o.value_and_grad(v)[1]),
        ("products", lambda o, v: o.hvp(v)),
        ("products of several vectors", lambda o, v: o.hvp(torch.stack([v, 2 * v]))),
        ("Gauss–Newton products", lambda o, v: GaussNewtonTopK(k=1).krylov_need().operator.on(o).matvec(v)),
        ("sketches", lambda o, v: o.sketch(64).gradient(torch.arange(4.0))),
    ],
)
def test_batches_stay_halved_after_memory_ran_out(kind, evaluate):
    whole = Objective(Small(), batches())
    v = torch.linspace(-1, 1, whole.dim, dtype=F64) * 1e-1
    expected = torch.as_tensor(evaluate(whole, v))
    model = Small()
    objective = Objective(model, batches())
    model.most = 12
    torch.testing.assert_close(torch.as_tensor(evaluate(objective, v)), expected, rtol=1e-11, atol=1e-13)
    refused = sum(model.refused.values())
    assert 1 <= refused <= 3, kind  # 40, 20, and for a sketch half of the batch at once
    for _ in range(3):
        evaluate(objective, v)
    assert sum(model.refused.values()) == refused  # never tried again
    assert any("memory ran out" in note for note in objective.notes)


def test_a_whole_measurement_tries_each_size_once_for_each_kind_of_evaluation():
    metrics = [
        EpsilonBox(max_targets=3),
        RandomSubspace(draws=2, dim=5),
        HessianTopK(k=2),
        HessianTrace(),
        GaussNewtonTopK(k=2),
        GradientNoiseScale(inner_product=True),
    ]
    plain = measure_sharpness(Small(), batches(), metrics)
    model = Small()

    class Loader(list):
        """The limit begins when the data were read and the loss was evaluated."""

    loader = Loader(batches())
    begin = {"begin": lambda objective, rng: setattr(model, "most", 12) or MetricResult(0.0)}
    keyed = {str(i): metric for i, metric in enumerate(metrics)}
    report = measure_sharpness(model, loader, {**begin, **keyed})
    assert min(model.refused) > 12
    assert max(model.refused.values()) <= 3  # gradients, products, gradients of samples
    for old, new in zip(plain.values(), list(report.values())[1:], strict=True):
        assert new.value == pytest.approx(old.value, rel=1e-8)


@pytest.mark.parametrize(
    ("amount", "count"),
    [(0, 0), (123, 123), ("4GB", 4 * 10**9), ("4 GiB", 4 * 2**30), ("1.5k", 1500), ("512MiB", 2**29), ("7", 7), ("7 B", 7)],
)
def test_amounts_of_memory(amount, count):
    assert parse_bytes(amount) == count


@pytest.mark.parametrize("amount", ["", "GB", "4 apples", "-1", -1, 1.5, True, "4GBB", "1e9"])
def test_what_is_no_amount_of_memory(amount):
    with pytest.raises(ValueError, match="memory must be bytes"):
        parse_bytes(amount)


def test_a_budget_that_does_not_hold_the_weights_is_refused():
    with pytest.raises(ValueError, match=r"memory='1kB' is less than .* kB, which the weights"):
        measure_sharpness(Small(), batches(), "hessian_topk", memory="1kB")


def test_what_is_held_with_its_owner_is_given_back():
    class Owner:
        pass

    budget = MemoryBudget(1000, device=torch.device("cpu"), vector_bytes=10)
    owner = Owner()
    budget.hold("basis", 500, owner)
    assert (budget.left, budget.peak) == (420, 580)
    with pytest.raises(MemoryError, match="the span takes 500 B, and 420 B of the 1 kB that may be kept are left"):
        budget.require("the span", 500)
    del owner
    assert (budget.left, budget.peak) == (920, 580)
    assert budget.describe()["peaks"] == {"weights and vectors": 80, "basis": 500}


# ---------------------------------------------------------------------- the peak, counted


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations have made and that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class Fresh:
    """A loader whose batches are new tensors at every pass, so that only the cache keeps them."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self):
        for i in range(self.count):
            generator = torch.Generator().manual_seed(i)
            yield torch.randn(64, 32, generator=generator), torch.arange(64) % 10


def wide() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 10))


VECTOR = 4 * sum(p.numel() for p in wide().parameters())
METRICS = [EpsilonBox(max_targets=0), HessianTopK(k=3), "hessian_trace"]
KEYS = ["epsilon_box", "hessian_topk", "hessian_trace"]


def peak_of(**settings: Any) -> tuple[int, Any]:
    model, loader = wide(), Fresh(8)
    with LiveBytes() as live:
        report = measure_sharpness(model, loader, METRICS, **settings)
    return live.peak, report


@pytest.mark.parametrize("vectors", [20, 60])
def test_the_peak_obeys_the_budget(vectors):
    """What is kept, and what one evaluation takes: graphs of one batch, a product and a gradient."""
    budget = vectors * VECTOR
    peak, report = peak_of(memory=budget)
    told = report.provenance["memory"]
    assert told["budget"] == budget
    assert told["peak"] <= budget
    assert told["peaks"]["Krylov basis"] > 0
    with LiveBytes() as live:
        objective = Objective(wide(), Fresh(8), cache_bytes=0, graph_bytes=0)
        objective.hvp(objective.origin)
    assert peak <= budget + live.peak
    assert peak >= 0.5 * told["peak"]  # it is counted, not guessed


def test_more_memory_is_used_and_less_costs_time_not_numbers():
    _, little = peak_of(memory=20 * VECTOR)
    _, much = peak_of(memory=2000 * VECTOR)
    assert little.provenance["batches"] == "read anew at every pass"
    assert much.provenance["batches"] == "cached on cpu"
    assert "graphs" not in little.provenance["memory"]["peaks"]
    assert much.provenance["memory"]["peaks"]["graphs"] > 0
    assert little["hessian_topk"].details["basis_size"] < much["hessian_topk"].details["basis_size"]
    for key in KEYS:
        tolerance = 3 * ((little[key].standard_error or 0) + (much[key].standard_error or 0))
        assert little[key].value == pytest.approx(much[key].value, rel=2e-3, abs=tolerance)


def test_a_basis_that_does_not_fit_fails_by_name_and_the_others_are_measured():
    with pytest.warns(PluginWarning, match=r"a Krylov basis of 33 vectors.*left of the .* that may be kept"):
        report = measure_sharpness(wide(), Fresh(2), [HessianTopK(k=30), HessianTopK(k=1)], memory=20 * VECTOR)
    kinds = [str(result.status.kind) for result in report.values()]
    assert kinds == ["failed", "converged"]


def test_spans_of_other_methods_are_in_the_budget():
    with pytest.warns(PluginWarning, match="the span of 15 products takes"):
        measure_sharpness(wide(), Fresh(2), HessianTrace(method="xtrace"), memory=20 * VECTOR)
