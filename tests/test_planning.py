"""The plan of a measurement against the measurement."""

from __future__ import annotations

import json
import math
import sys
import textwrap

import pytest
import torch
from torch import nn

from sharpness_plugins import ExpectedWork, MeasurementPlan, MetricResult, Range, measure_sharpness, plan_measurement
from sharpness_plugins.cli import main
from sharpness_plugins.maximizers import LBFGSB, apgd
from sharpness_plugins.metrics import (
    AdaptiveTopK,
    EpsilonBox,
    FisherTrace,
    GradientNoiseScale,
    HessianBottom,
    HessianTopK,
    HessianTrace,
    RandomSubspace,
)


def data(shape: tuple[int, ...], sizes: tuple[int, ...], classes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(n, *shape, generator=generator), torch.randint(0, classes, (n,), generator=generator)) for n in sizes
    ]


def seeded(*layers) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(*(layer() for layer in layers))


NETWORKS = {
    "tiny": (lambda: seeded(lambda: nn.Linear(3, 4)), data((3,), (10, 6), 4)),
    "perceptron": (
        lambda: seeded(lambda: nn.Linear(8, 20), nn.ReLU, lambda: nn.Linear(20, 3)),
        data((8,), (64, 64, 32), 3),
    ),
    "convolutions": (
        lambda: seeded(
            lambda: nn.Conv2d(1, 4, 3), lambda: nn.BatchNorm2d(4), nn.Tanh, nn.Flatten, lambda: nn.Linear(144, 5)
        ),
        data((1, 8, 8), (40, 23), 5),
    ),
}
METRICS = {
    "defaults": None,
    "alone": [EpsilonBox(eigenvectors=2), HessianTopK(k=3, check_multiplicity=True)],
    "shared": ["hessian_topk", "hessian_trace", "hessian_frobenius", "spectral_density", "hessian_bottom"],
    "traces": [
        HessianTrace(method="hutchinson"),
        HessianTrace(method="hutch++"),
        HessianTrace(method="xtrace"),
        FisherTrace(num_matvecs=12),
    ],
    "others": [
        "gradient_noise_scale",
        GradientNoiseScale(inner_product=True),
        HessianBottom(certify=True),
        AdaptiveTopK(k=2),
        EpsilonBox(maximizer="lbfgsb"),
        RandomSubspace(draws=2, maximizer=apgd(6)),
        EpsilonBox(maximizer=LBFGSB(published=True)),
    ],
}


@pytest.mark.parametrize("metrics", METRICS)
@pytest.mark.parametrize("network", NETWORKS)
def test_the_counts_of_the_measurement_lie_within_the_plan(network, metrics):
    make, loader = NETWORKS[network]
    plan = plan_measurement(make(), loader, METRICS[metrics])
    report = measure_sharpness(make(), loader, METRICS[metrics])
    assert list(plan.metrics) == list(report)
    assert plan.is_complete
    for key, result in report.items():
        work = plan.metrics[key].work
        for name in ("values", "gradients", "hvps"):
            assert getattr(result.cost, name) in getattr(work, name), (key, name, getattr(result.cost, name), work)
        assert result.cost.passes in plan.metrics[key].passes
    spent = report.cost.passes
    typical = sum(told.passes.typical for told in plan.metrics.values())
    assert spent / 3 < typical + 1 < 3 * spent


@pytest.mark.parametrize("network", ["perceptron", "convolutions"])
def test_the_bytes_are_those_that_the_measurement_keeps(network):
    make, loader = NETWORKS[network]
    for metrics in (None, METRICS["shared"], [HessianTrace(method="xtrace")]):
        plan = plan_measurement(make(), loader, metrics)
        found = measure_sharpness(make(), loader, metrics).provenance["memory"]
        assert plan.budget is not None
        for what, count in plan.bytes.items():
            if what != "Krylov basis" or metrics is None:
                assert found["peaks"].get(what, 0) == pytest.approx(count, rel=0.05), what
        assert 0.5 * found["peak"] <= sum(plan.bytes.values()) <= 2 * found["peak"]


def test_a_shared_run_is_planned_once_and_said():
    make, loader = NETWORKS["perceptron"]
    plan = plan_measurement(make(), loader, ["hessian_topk", "spectral_density", "epsilon_box"])
    payer, reader, box = plan.metrics.values()
    assert payer.work.hvps.low >= 20  # the nodes of the density
    assert reader.work.hvps == (0, 0, 0)
    assert (payer.shares_run_with, box.shares_run_with) == (["spectral_density"], [])
    assert "hessian_topk: shares one Krylov run with spectral_density" in str(plan)


def test_what_does_not_declare_is_said_to_be_unknown():
    make, loader = NETWORKS["perceptron"]

    class Silent:
        def __call__(self, objective, rng):
            return MetricResult(objective.value())

    class Passes(Silent):
        def expected_passes(self, objective):
            return 7.0

    class Declares(Silent):
        def expected_work(self, objective):
            return ExpectedWork(values=Range.exactly(1), vectors=2)

    class Broken(Silent):
        def expected_work(self, objective):
            raise RuntimeError("no idea")

    plan = plan_measurement(make(), loader, [Silent(), Passes(), Declares(), Broken()])
    assert [told.work is None for told in plan.metrics.values()] == [True, True, False, True]
    assert plan.metrics["passes"].passes.typical == 7
    assert plan.metrics["declares"].work.values == (1, 1, 1)
    assert not plan.is_complete
    text = str(plan)
    assert "time: at least" in text
    assert "note: silent does not declare what it takes" in text
    assert "broken could not say what it takes (RuntimeError: no idea)" in text
    assert plan.seconds_per_product is None  # no metric multiplies


def test_seconds_come_from_what_was_timed(monkeypatch):
    make, loader = NETWORKS["perceptron"]
    ticks = iter(range(10_000))
    monkeypatch.setattr("sharpness_plugins.planning.time.perf_counter", lambda: float(next(ticks)))
    plan = plan_measurement(make(), loader, [RandomSubspace(draws=3), HessianTrace(method="hutchinson", num_matvecs=10)])
    assert plan.seconds_per_gradient == 1
    subspace, trace = plan.metrics.values()
    assert subspace.seconds == subspace.work.gradients
    assert trace.seconds.high == pytest.approx(10 * plan.seconds_per_product + trace.work.gradients.high)
    assert plan.seconds.typical >= subspace.seconds.typical + trace.seconds.typical


def test_a_model_without_second_derivatives_is_found_out_before_the_measurement():
    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return g * x.cos()

    class Layer(nn.Module):
        def forward(self, x):
            return Cut.apply(x)

    model = seeded(lambda: nn.Linear(8, 6), Layer, lambda: nn.Linear(6, 3))
    plan = plan_measurement(model, NETWORKS["perceptron"][1], ["hessian_topk", "epsilon_box"])
    assert math.isnan(plan.seconds_per_product)
    assert "note: there is no product with the Hessian" in str(plan)
    assert json.loads(plan.to_json())["seconds_per_product"] is None


def test_a_plan_leaves_no_trace_and_prints():
    make, loader = NETWORKS["convolutions"]
    model = make().train()
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    plan = plan_measurement(model, loader, memory="64MB")
    assert isinstance(plan, MeasurementPlan)
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    lines = str(plan).splitlines()
    assert lines[0].startswith(
        "Plan for Sequential: 773 parameters (float32 on cpu), 63 samples in 2 batches, cached on cpu"
    )
    assert [line.split()[0] for line in lines[4:7]] == ["epsilon_box", "random_subspace", "hessian_topk"]
    assert "of 64 MB" in str(plan)


def test_the_command_line_plans_with_dry_run(tmp_path, capsys, monkeypatch):
    (tmp_path / "planned_setup.py").write_text(
        textwrap.dedent("""
        import torch

        def build():
            x = torch.linspace(-1, 1, 80).reshape(20, 4)
            return {"model": torch.nn.Linear(4, 3), "loader": [(x, torch.arange(20) % 3)], "progress": False}
        """)
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    told = ["measure", "planned_setup.py:build", "--metric", "hessian_topk:k=1", "--dry-run", "--memory", "1GB"]
    assert main(told) == 0
    out = capsys.readouterr().out
    assert out.startswith("Plan for Linear: 15 parameters")
    assert "hessian_topk" in out
    assert main([*told, "--json", "-"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["budget"] == 10**9
    assert plan["metrics"]["hessian_topk"]["hvps"][2] <= 15
    del sys.modules["planned_setup"]
