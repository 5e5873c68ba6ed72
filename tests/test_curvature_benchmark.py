"""The comparison of eigensolvers: its truth, its bookkeeping, its table. No peer is run."""

from __future__ import annotations

import importlib.util
import json
import mmap
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import oracles

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
NAME = "benchmarks_under_test"


def load(module: str) -> ModuleType:
    """By its path: another package on this machine may be called ``benchmarks``."""
    if NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(NAME, BENCHMARKS / "__init__.py")
        assert spec is not None
        sys.modules[NAME] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{NAME}.curvature.{module}")


networks, peers, command = load("networks"), load("peers"), load("__main__")


@pytest.fixture
def small(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 4)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    inputs = torch.randn(60, 10, generator=generator, dtype=torch.float64)
    network = networks.Network(model.eval(), inputs, torch.randint(0, 4, (60,), generator=generator))
    monkeypatch.setitem(command.NETWORKS, "small", lambda: network)
    return network


def test_the_dense_hessian_is_that_of_the_mean_loss(small):
    expected = oracles.Classification(small.model, small.inputs, small.labels).dense_hessian()
    torch.testing.assert_close(networks.dense_hessian(small), expected, rtol=1e-9, atol=1e-12)


def test_the_truth_and_the_steps_to_it(small):
    truth = command.exact("small", small)
    hessian = networks.dense_hessian(small)
    expected = torch.linalg.eigvalsh(hessian).flip(0)[: peers.K]
    torch.testing.assert_close(truth.values, expected, rtol=1e-6, atol=0)
    assert truth.error(expected.tolist()) < 1e-6
    assert truth.error([*expected[:4].tolist(), 0.9 * expected[4].item()]) == pytest.approx(0.1, rel=1e-4)
    steps = [truth.steps_to(accuracy) for accuracy in (1e-1, 1e-3, 1e-6)]
    assert steps == sorted(steps)
    assert steps[0] < steps[-1]


def test_a_comparison_counts_and_writes(small, tmp_path, capsys):
    def twice(network, seed, exact):
        values, products = peers.ours(network, seed, exact)
        return values, 2 * products

    found = command.compare("small", 2, {"ours": peers.ours, "twice": twice})
    assert found["dim"] == 304
    for mine, other in zip(found["runs"]["ours"], found["runs"]["twice"], strict=True):
        assert 10 <= mine["products"] <= 60
        assert other["products"] == 2 * mine["products"]
        assert other["error"] == mine["error"] < 1e-3
        assert mine["seconds"] > 0
    record = tmp_path / "record.json"
    record.write_text(json.dumps({"networks": {"small": found}}))
    assert command.main(["--out", str(record), "--table"]) == 0
    assert "small, 304 parameters" in capsys.readouterr().out


def test_ratios_are_medians_of_neighbours():
    def run(seconds, grown):
        return {"products": 20, "seconds": seconds, "bytes": grown * 2**20, "error": 1e-4}

    runs = {"ours": [run(1.0, 100), run(2.0, 100), run(4.0, 100)], "peer": [run(3.0, 200), run(6.0, 250), run(8.0, 300)]}
    printed = command.table({"networks": {"net": {"dim": 7, "eigenvalues": [2.0, 1.0], "runs": runs}}})
    assert "| ours | 20 | 1.0e-04 | 1.00 | 100 | 1.00 |" in printed
    assert "| peer | 20 | 1.0e-04 | 3.00 | 250 | 2.50 |" in printed


def test_memory_that_is_held_for_a_while_is_seen():
    def work():
        fresh = mmap.mmap(-1, 40 * 2**20)  # malloc would give what other tests have freed
        held = torch.frombuffer(fresh, dtype=torch.float32)
        for _ in range(40):
            held.mul_(1.0)
        return [1.0], 3

    values, products, seconds, grown = command.measured(work)
    assert (values, products) == ([1.0], 3)
    assert seconds > 0
    assert 35 * 2**20 <= grown <= 80 * 2**20


def test_the_record_holds_what_the_readme_shows():
    """Each line of the recorded table, as the command prints it."""
    record = json.loads((BENCHMARKS / "curvature" / "record.json").read_text())
    readme = (BENCHMARKS / "curvature" / "README.md").read_text()
    assert command.table(record).strip() in readme
