"""Faults, tried for real: what fails is told, and nothing that belongs to the user is lost.

Plugins that do not load are in test_registry, loaders between measurements in test_batches, files in test_files, hostile
JSON in test_fuzz_json, checkpoints in test_fuzz and test_cli, ranks in the tests of several processes.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from sharpness_plugins import (
    JSONLSink,
    Kind,
    LoaderError,
    MetricResult,
    NonFiniteLossError,
    PluginWarning,
    SharpnessMonitor,
    SharpnessReport,
    cli,
    measure_sharpness,
    sampling,
)
from sharpness_plugins.metrics import HessianTopK
from sharpness_plugins.schedules import Progress

POSIX = pytest.mark.skipif(os.name != "posix", reason="about signals and processes of POSIX")

# --- training goes on, bit for bit


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(48, 4, generator=generator)
    return inputs, (inputs[:, :3] + 0.3 * torch.randn(48, 3, generator=generator)).argmax(1)


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    inputs, targets = data()
    return list(zip(inputs.split(16), targets.split(16), strict=True))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.norm(self.first(x))))


class WritesToItsInput(Plain):
    def forward(self, x):
        return super().forward(x.mul_(0.9))


class CountsInABuffer(Plain):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x) + 1e-3 * self.calls


class SeedsTheWorld(Plain):
    def forward(self, x):
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002
        return super().forward(x + 0.01 * torch.randn_like(x))


class DrawsEverywhere(Plain):
    def forward(self, x):
        noise = random.random() + float(np.random.rand())  # noqa: NPY002
        return super().forward(x + 0.01 * noise * torch.rand_like(x))


class TakesItsOwnDerivative(Plain):
    """Needs ``inference_mode`` off, and gradients on."""

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(super().forward(x).sum(), x, create_graph=True)
        return super().forward(x + 0.1 * slope)


class RaisesInEvalMode(Plain):
    def forward(self, x):
        if not self.training:
            raise RuntimeError("no weights for inference")
        return super().forward(x)


@dataclass(frozen=True)
class Bad:
    """A metric that does something else than measuring."""

    what: str

    name: ClassVar[str] = "bad"

    def __call__(self, objective, rng):
        if self.what == "recurses":
            return self(objective, rng)
        objective.value_and_grad()
        if self.what == "raises":
            raise ZeroDivisionError("division by zero")
        if self.what == "exits":
            sys.exit(0)
        if self.what == "is out of memory":
            raise MemoryError("cannot allocate 1 TB")
        if self.what == "draws and seeds":
            random.random()
            np.random.seed(1)  # noqa: NPY002
            torch.manual_seed(1)
            torch.rand(3)
            return MetricResult(1.0)
        if self.what == "leaves training mode":
            objective.module.eval()
            objective.module.norm.train()
            torch.set_grad_enabled(False)
            return MetricResult(1.0)
        return {"NaN": MetricResult(float("nan")), "infinite": MetricResult(float("inf")), "a string": "sharp"}[self.what]


class RaisesInTheMiddle:
    def __iter__(self):
        yield batches()[0]
        raise OSError("stale file handle")


class EndsEarly:
    passes = 0

    def __iter__(self):
        self.passes += 1
        yield from batches()[: 2 + self.passes % 2]


class IsAnother:
    passes = 0

    def __iter__(self):
        self.passes += 1
        return iter([(x + self.passes, y) for x, y in batches()])


class NoBatches:
    def __iter__(self):
        return iter(["not", "tensors"])


class RaisingStream(IterableDataset):
    def __iter__(self):
        yield data()[0][0], data()[1][0]
        raise ConnectionResetError("connection reset by peer")


def nan_batch() -> list[tuple[torch.Tensor, torch.Tensor]]:
    found = batches()
    found[1][0][3, 2] = float("nan")
    return found


def failing_sink(measurement):
    raise ConnectionError("the tracking server is away")


FAULTS: dict[str, dict[str, Any]] = {
    **{f"a metric that {what}": {"metrics": {"bad": Bad(what)}} for what in ("raises", "exits", "recurses")},
    **{f"a metric that {what}": {"metrics": {"bad": Bad(what)}} for what in ("is out of memory", "draws and seeds")},
    "a metric that leaves training mode": {"metrics": {"bad": Bad("leaves training mode")}},
    **{f"a metric that returns {what}": {"metrics": {"bad": Bad(what)}} for what in ("NaN", "infinite", "a string")},
    "a probe that raises in the middle": {"probe": RaisesInTheMiddle, "told": "OSError: stale file handle"},
    "a probe that ends early now and then": {"probe": EndsEarly, "warns": True},
    "a probe that changes": {"probe": IsAnother, "warns": True},
    "a probe without batches": {"probe": NoBatches, "told": "LossRuleError"},
    "a probe that is empty": {"probe": list, "told": "LoaderError"},
    "a stream that breaks": {"probe": lambda: DataLoader(RaisingStream(), batch_size=1), "told": "connection reset"},
    "a sample that is NaN": {"probe": nan_batch, "told": "NonFiniteLossError"},
    "labels out of range": {"probe": lambda: [(x, y + 7) for x, y in batches()], "told": "LossRuleError"},
    "inputs of another shape": {"probe": lambda: [(x[:, :2], y) for x, y in batches()], "told": "RuntimeError"},
    "a model that writes to its input": {"model": WritesToItsInput},
    "a model that counts in a buffer": {"model": CountsInABuffer},
    "a model that seeds the world": {"model": SeedsTheWorld},
    "a model that draws everywhere": {"model": DrawsEverywhere},
    "a model that takes its own derivative": {"model": TakesItsOwnDerivative},
    "a model that raises in eval mode": {"model": RaisesInEvalMode, "told": "no weights for inference"},
    "a sink that raises": {"sinks": [failing_sink], "warns": True},
}
if os.name == "posix":
    FAULTS["a sink on a full disk"] = {"sinks": [JSONLSink("/dev/full")], "warns": True}


def trained(fault: dict[str, Any], *, monitored: bool) -> tuple[list[torch.Tensor], dict[str, bytes], SharpnessMonitor]:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    model = fault.get("model", Plain)()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    metrics = {"good": HessianTopK(k=1), **fault.get("metrics", {})}
    probe = fault.get("probe", batches)()
    monitor = SharpnessMonitor(
        model, probe, metrics, every="3 steps", budget=None, sinks=fault.get("sinks", ()), signals={"lr": lambda: 0.1}
    )
    loader = DataLoader(TensorDataset(*data()), batch_size=16, shuffle=True)
    step = 0
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            step += 1
            if monitored:
                monitor.measure_if_due(Progress(step, 16 * step, step / 3, 16, 16))
    tensors = [*model.state_dict().values(), *(parameter.grad for parameter in model.parameters())]
    tensors += [entry["momentum_buffer"] for entry in optimizer.state.values()]
    assert torch.is_grad_enabled()
    assert all(module.training for module in model.modules())
    return [tensor.clone() for tensor in tensors], sampling.global_states(), monitor


@pytest.mark.parametrize("what", FAULTS)
def test_training_goes_on_bit_for_bit_and_the_fault_is_in_the_history(what):
    fault = FAULTS[what]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tensors, states, monitor = trained(fault, monitored=True)
    plain, plain_states, _ = trained(fault, monitored=False)
    assert all(map(torch.equal, tensors, plain))
    assert states == plain_states
    assert [made.step for made in monitor.history] == [1, 3, 6], "no measurement is missing"
    for made in monitor.history:
        assert made.values["lr"] == 0.1, "what cost nothing is recorded"
        if "told" in fault:
            assert fault["told"] in made.notes["probe"]
            assert made.loss is None
        else:
            assert np.isfinite(made.values["good"]), "one bad metric costs only itself"
        if "bad" in made.values and not np.isfinite(made.values["bad"]):
            assert made.notes["bad"].startswith("failed: ")
    if fault.get("warns") or "told" in fault or "failed" in str(monitor.history[0].notes.get("bad")):
        assert said, "a fault is said"
    json.dumps(monitor.state_dict(), allow_nan=False)


# --- measuring alone: the error is the user's own, and nothing is left behind


@pytest.mark.parametrize(
    ("probe", "error", "says"),
    [
        (RaisesInTheMiddle(), OSError, "stale file handle"),
        (nan_batch(), NonFiniteLossError, r"on batch 1 of 3"),
        (DataLoader(RaisingStream(), batch_size=1), ConnectionResetError, "reset by peer"),
    ],
)
def test_a_failing_loader_raises_its_own_error_and_leaves_the_model_and_the_random_states(probe, error, says):
    model = Plain()
    before, states = [tensor.clone() for tensor in model.state_dict().values()], sampling.global_states()
    with pytest.raises(error, match=says):
        measure_sharpness(model, probe)
    assert all(map(torch.equal, model.state_dict().values(), before))
    assert model.training
    assert sampling.global_states() == states


WORKER = """
import os, signal, sys, time
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from sharpness_plugins import measure_sharpness

class Bad(Dataset):
    def __len__(self):
        return 48

    def __getitem__(self, index):
        if index == 0:
            os.kill(os.getpid(), signal.SIGKILL) if sys.argv[1] == "dies" else time.sleep(4)
        return torch.ones(4), index % 3

model = nn.Linear(4, 3)
before = [p.clone() for p in model.parameters()]
try:
    measure_sharpness(model, DataLoader(Bad(), batch_size=8, num_workers=1, timeout=int(sys.argv[2])), "hessian_topk")
except RuntimeError as error:
    assert all(map(torch.equal, model.parameters(), before)) and model.training
    print(f"error: {error}", flush=True)
    os._exit(0)  # torch waits for what is left of the worker
"""


@POSIX
@pytest.mark.parametrize(("what", "timeout", "says"), [("dies", 0, "DataLoader worker"), ("blocks", 1, "DataLoader")])
def test_a_worker_that_dies_or_blocks_past_the_loaders_limit_is_an_error(what, timeout, says):
    command = [sys.executable, "-c", WORKER, what, str(timeout)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert f"error: {says}" in done.stdout, done.stderr


def test_an_iterator_is_refused_before_it_is_read():
    def endless():
        raise AssertionError("read")
        yield

    with pytest.raises(LoaderError, match="can be iterated only once"):
        measure_sharpness(Plain(), endless())


@pytest.mark.parametrize("what", ["raises", "exits", "recurses", "NaN", "infinite", "a string"])
def test_one_bad_metric_costs_only_itself(what):
    with pytest.warns(PluginWarning, match="metric 'bad' failed"):
        report = measure_sharpness(Plain(), batches(), {"bad": Bad(what), "good": HessianTopK(k=1)})
    assert report["bad"].status.kind is Kind.FAILED
    assert report["good"].status.kind is Kind.CONVERGED
    assert SharpnessReport.from_json(report.to_json())["good"].value == report["good"].value


# --- processes that hang, are interrupted or killed

HANGING = """
import sys, time
from sharpness_plugins import metric

if "{where}" == "import":
    print("hanging", flush=True)
    time.sleep(60)

@metric("hangs")
def hangs(objective):
    print("hanging", flush=True)
    while True:
        {loop}
"""
SETUP = """
import torch
from torch import nn

def setup():
    return nn.Sequential(nn.Linear(4, 3)), [(torch.ones(6, 4), torch.arange(6) % 3)]
"""


@POSIX
@pytest.mark.parametrize(
    ("where", "loop", "command"),
    [
        ("import", "pass", ["list"]),
        ("metric", "objective.value()", ["measure", "setup.py:setup", "--metric", "hangs"]),
    ],
    ids=["an import", "a metric"],
)
def test_ctrl_c_ends_what_hangs(tmp_path: Path, where, loop, command):
    info = tmp_path / "sp_hanging-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sp-hanging\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[sharpness_plugins]\nhanging = sp_hanging\n")
    (tmp_path / "sp_hanging.py").write_text(HANGING.format(where=where, loop=loop))
    (tmp_path / "setup.py").write_text(SETUP)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    with subprocess.Popen(
        [sys.executable, "-m", "sharpness_plugins", *command],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout.readline() == "hanging\n"
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, errors
    assert "interrupted" in errors
    assert "Traceback" not in errors


@POSIX
def test_a_report_on_a_full_disk_is_one_sentence_and_was_printed(tmp_path, capsys):
    (tmp_path / "setup.py").write_text(SETUP)
    setup = f"{tmp_path / 'setup.py'}:setup"
    assert cli.main(["measure", setup, "--metric", "hessian_topk", "--json", "/dev/full", "--quiet"]) == 1
    told = capsys.readouterr()
    assert "hessian_topk" in told.out, "the numbers are not lost"
    assert "No space left on device" in told.err
    assert "Traceback" not in told.err
