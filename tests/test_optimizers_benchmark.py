"""The benchmark of the optimizers: its training, its counts, its tables. What takes minutes is in its record."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.optim import SGD

from sharpness_plugins.optimizers import SAM, SharpnessAware

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
NAME = "benchmarks_under_test"


def load(module: str) -> ModuleType:
    """By its path: another package on this machine may be called ``benchmarks``."""
    if NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(NAME, BENCHMARKS / "__init__.py")
        assert spec is not None
        sys.modules[NAME] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{NAME}.optimizers.{module}")


remedy, stepping, command = load("remedy"), load("stepping"), load("__main__")
RECORD = json.loads((BENCHMARKS / "optimizers" / "record.json").read_text())


def test_an_arm_trains_counts_its_passes_and_is_measured():
    found = remedy.train(remedy.Arm(250, SAM(), 0.05, m=100), 0, metrics=["epsilon_box"], max_epochs=2)
    assert (found.steps, found.gradients, found.reached) == (4, 8, False)
    assert found.sharpness["epsilon_box"] > 0
    assert 0.05 < found.test_accuracy < 1


def test_the_order_is_the_same_for_each_batch_size():
    small, large = (next(iter(remedy.order_of(500, size, 3))) for size in (16, 500))
    assert torch.equal(torch.cat(small), large[0])
    assert [len(batch) for batch in small] == [16] * 31 + [4]


def test_a_step_counts_what_it_moves():
    """By hand, in bytes a weight: norm 4, copy 8, move 12, return 8, finite 4, SGD 32."""
    shapes = [torch.Size((256, 64)), torch.Size((1024,))]
    work = stepping.steppers(shapes)
    size = sum(shape.numel() for shape in shapes)
    for one in (work["ours"], work["SGD alone"]):
        one()
    alone, mine = (stepping.counted(work[name], size) for name in ("SGD alone", "ours"))
    assert alone == {"bytes": 32, "syncs": 0}
    assert mine["bytes"] - alone["bytes"] == pytest.approx(36, abs=1)
    assert mine["syncs"] == 1


def test_a_closure_of_the_step_costs_no_pass():
    parameters, evaluate = stepping._at([torch.Size((3, 2))])
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = SharpnessAware(SGD(parameters, lr=0.1), SAM())
    optimizer.step(evaluate)
    gradient = parameters[0].grad
    assert gradient is not None
    torch.testing.assert_close(parameters[0].detach(), before[0] - 0.1 * gradient)


def _column(arm: str, quantity: str) -> list[float]:
    runs = sorted(RECORD["remedy"][arm], key=lambda run: run["seed"])
    return [run["sharpness"]["epsilon_box"] if quantity == "epsilon_box" else run[quantity] for run in runs]


@pytest.mark.parametrize("arm", [name for name in remedy.ARMS if not name.startswith("batch")])
def test_what_is_recorded_is_flatter_and_no_worse_than_the_plain_large_batch(arm):
    """Each rule, over six seeds at equal training loss: what the README says of the record."""
    assert all(run["reached"] for run in RECORD["remedy"][arm])
    assert len(RECORD["remedy"][arm]) == 6
    for mine, plain in zip(_column(arm, "epsilon_box"), _column("batch 500", "epsilon_box"), strict=True):
        assert mine < plain
    assert sum(_column(arm, "test_accuracy")) >= sum(_column("batch 500", "test_accuracy"))


def test_the_record_holds_what_the_readme_shows():
    readme = (BENCHMARKS / "optimizers" / "README.md").read_text()
    tables = command.tables(RECORD)
    assert set(tables) == {"remedy", "stepping"}
    for text in tables.values():
        assert text in readme
