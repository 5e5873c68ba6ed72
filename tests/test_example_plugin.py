"""The example plugin, installed for real and used in a process of its own: nothing is imported by hand."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "adapters" / "examples" / "acme_sharpness"

pytest.importorskip("hatchling", reason="builds the example without the network")
pytest.importorskip("pip", reason="installs the example")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder in which the example is installed, beside nothing else."""
    source, target = tmp_path_factory.mktemp("source") / EXAMPLE.name, tmp_path_factory.mktemp("target")
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps"]
    done = subprocess.run([*pip, "--no-build-isolation", "--target", target, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture
def answer(installed):
    """Runs code in a new process that has the example on its path, and returns what it leaves in ``answer``."""

    def run(code, **environment):
        path = os.pathsep.join(filter(None, [str(installed), os.environ.get("PYTHONPATH")]))
        prelude = "import json, sys, warnings\nfrom sharpness_plugins.errors import PluginWarning\n"
        prelude += "warnings.simplefilter('error', PluginWarning)\n"
        done = subprocess.run(
            [sys.executable, "-c", f"{prelude}{code}\nprint(json.dumps(answer))"],
            env={**os.environ, "PYTHONPATH": path, **environment},
            capture_output=True,
            text=True,
            cwd=installed.parent,  # the repository's own folder is on no path
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


LIST = """
from sharpness_plugins.registry import available_metrics
answer = {key: [o.plugin, o.distribution, o.version, o.spec.summary] for key, o in available_metrics("acme_*").items()}
assert "torch" not in sys.modules
"""


def test_installed_metrics_are_listed_with_their_distribution(answer):
    assert answer(LIST) == {
        "acme_average_rise": [
            "acme",
            "acme-sharpness",
            "0.3.1",
            "Mean rise of the loss under normal perturbations of the weights.",
        ],
        "acme_gradient_norm": [
            "acme",
            "acme-sharpness",
            "0.3.1",
            "Norm of the gradient at the trained weights: how far from a minimum they are.",
        ],
    }


@pytest.mark.parametrize("name", ["acme", "acme-sharpness"])
def test_installed_plugin_can_be_disabled(answer, name):
    assert answer(LIST, SHARPNESS_PLUGINS_DISABLE=name) == {}


def test_installed_metrics_compute_on_an_objective(answer):
    code = """
import torch
from sharpness_plugins.registry import get_metric

class Quadratic:                                   # f(w + e) = 1 + <g, e> + 3 |e|², so the mean rise is 3 sigma² dim
    origin, gradient = torch.zeros(4, dtype=torch.float64), torch.tensor([3.0, 0, -4, 0], dtype=torch.float64)
    def value(self, e=None):
        return 1.0 if e is None else float(1 + self.gradient @ e + 3 * e @ e)
    def value_and_grad(self, e=None):
        return self.value(e), self.gradient

norms = [get_metric("acme_gradient_norm", order=p)(Quadratic(), None).value for p in (1.0, 2.0)]
rises = [
    get_metric("acme:acme_average_rise", sigma=0.1, num_draws=400)(Quadratic(), torch.Generator().manual_seed(s))
    for s in (0, 0, 1)
]
answer = {"norms": norms, "rises": [r.value for r in rises], "error": rises[0].standard_error}
"""
    got = answer(code)
    assert got["norms"] == [7.0, 5.0]
    assert got["rises"][0] == got["rises"][1] != got["rises"][2]
    # 3 sigma² chi²(4): mean 0.12, standard deviation 0.03 sqrt(8). The gradient's share alone would be 0.5 wide.
    assert got["error"] == pytest.approx(0.03 * 8**0.5 / 20, rel=0.25)
    assert abs(got["rises"][0] - 0.12) < 4 * got["error"]


def test_installed_metrics_are_measured_by_name(answer):
    code = """
import torch
from sharpness_plugins import measure_sharpness

torch.manual_seed(0)
model = torch.nn.Linear(3, 1).double()
inputs, targets = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 1, dtype=torch.float64)
loader = [(inputs[:4], targets[:4]), (inputs[4:], targets[4:])]
report = measure_sharpness(
    model, loader, metrics=["acme_gradient_norm", "acme:acme_average_rise"], criterion=torch.nn.functional.mse_loss
)
loss = torch.nn.functional.mse_loss(model(inputs), targets)
gradients = torch.autograd.grad(loss, list(model.parameters()))
answer = {
    "values": [result.value for _, result in report.items()],
    "keys": list(report),
    "expected": float(torch.cat([g.flatten() for g in gradients]).norm()),
    "message": report["acme_gradient_norm"].status.message,
    "curvature": float(1 + (inputs**2).sum(1).mean()),   # trace(H) / 2 of a linear model with mean squared error
}
"""
    got = answer(code)
    assert got["keys"][0] == "acme_gradient_norm"
    assert got["values"][0] == pytest.approx(got["expected"], rel=1e-12)
    assert got["message"] == "value as returned by acme_gradient_norm"
    assert 0.3 * 1e-6 * got["curvature"] < got["values"][1] < 3 * 1e-6 * got["curvature"]


def test_installed_metrics_conform(answer):
    code = """
from sharpness_plugins.testing import check_metric

reports = [check_metric(name) for name in ("acme_gradient_norm", "acme:acme_average_rise")]
answer = [[finding.property for finding in report.findings if finding.verdict == "held"] for report in reports]
"""
    for held in answer(code):
        assert {"no_trace", "batching", "loss_scaling", "edge_cases", "bad_settings", "repr"} <= set(held)
