"""Measurements that are stopped in the middle, by real signals and by the clock: what they return, and no trace."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import oracles
from sharpness_plugins import MeasurementStopped, MeasurementWarning, SharpnessMonitor, measure_sharpness, stopping
from sharpness_plugins.cli import main
from sharpness_plugins.maximizers import LBFGSB, BestSoFar, apgd, spectral_projected_gradient
from sharpness_plugins.metrics import EpsilonBox, HessianTopK, HessianTrace
from sharpness_plugins.objective import Objective
from sharpness_plugins.report import Kind, MetricResult, SharpnessReport, Status
from sharpness_plugins.schedules import Progress
from sharpness_plugins.stopping import StopSwitch


@pytest.fixture
def problem() -> oracles.Classification:
    return oracles.small_classifier(num_samples=40)


@pytest.fixture(autouse=True)
def nobody_pressed_before(monkeypatch):
    monkeypatch.setattr(stopping, "_last_interrupt", -math.inf)


@dataclass
class Presses:
    """A progress listener that presses Ctrl-C after so many batches of a metric."""

    metric: str
    batches: int
    seen: int = 0

    def __call__(self, event: Any) -> None:
        self.seen += event.metric == self.metric
        if event.metric == self.metric and self.seen == self.batches:
            signal.raise_signal(signal.SIGINT)


def stopped_in(problem, metrics, metric, batches, **settings) -> SharpnessReport:
    with pytest.warns(MeasurementWarning, match="stopped by Ctrl-C"):
        return measure_sharpness(
            problem.model, problem.loader(13, 27), metrics, progress=Presses(metric, batches), **settings
        )


def whole(problem, metrics, **settings) -> SharpnessReport:
    return measure_sharpness(problem.model, problem.loader(13, 27), metrics, **settings)


def test_finished_metrics_are_whole_and_the_others_are_listed(problem):
    report = stopped_in(problem, ["epsilon_box", "hessian_topk", "hessian_trace"], "hessian_topk", 9)
    complete = whole(problem, ["epsilon_box"])
    assert report["epsilon_box"].value == complete["epsilon_box"].value
    assert report["epsilon_box"].status == complete["epsilon_box"].status
    assert report["hessian_topk"].status.kind is Kind.INTERRUPTED
    assert report["hessian_trace"].status.kind is Kind.NOT_MEASURED
    assert math.isnan(report["hessian_trace"].value)
    assert report.stopped == "by Ctrl-C"
    assert "epsilon_box is done, hessian_topk is what it was then, hessian_trace was not measured" in str(report)
    again = SharpnessReport.from_json(report.to_json())
    assert again.stopped == report.stopped
    assert [r.status for r in again.values()] == [r.status for r in report.values()]


@pytest.mark.parametrize("products", [1, 2, 5, 11, 14, 17, 23])  # 14 and later: after a restart of the basis
@pytest.mark.parametrize("check_multiplicity", [False, True])
def test_ritz_values_of_a_stopped_run_have_honest_error_bars(problem, products, check_multiplicity):
    exact = torch.linalg.eigvalsh(problem.dense_hessian())
    metric = HessianTopK(k=4, tolerance=1e-12, max_basis=9, check_multiplicity=check_multiplicity, num_matvecs=50)
    report = stopped_in(problem, metric, "hessian_topk", 2 * products + 1)  # two batches, in the next product
    result = report["hessian_topk"]
    assert result.status.kind is Kind.INTERRUPTED
    assert result.cost.hvps == result.details["num_matvecs"] == products
    values, residuals = (torch.tensor(result.details[name], dtype=torch.float64) for name in ("eigenvalues", "residuals"))
    assert len(values) == min(4, products)
    for value, residual in zip(values, residuals, strict=True):  # some eigenvalue lies within each residual
        assert (exact - value).abs().min() <= residual + 1e-12
    assert result.value <= exact[-1] + 1e-12
    assert "not converged" in result.status.message


@pytest.mark.parametrize(
    "maximizer",
    ["sign_frank_wolfe", apgd(), spectral_projected_gradient(), LBFGSB(), BestSoFar(apgd())],
    ids=lambda m: m if isinstance(m, str) else type(m).__name__,
)
@pytest.mark.parametrize("gradients", [1, 2, 3])
def test_a_stopped_maximizer_returns_the_best_point_that_it_saw(problem, maximizer, gradients, monkeypatch):
    seen = []
    evaluate = Objective.value_and_grad

    def watched(self, perturbation=None):
        value, gradient = evaluate(self, perturbation)
        seen.append(value)
        return value, gradient

    monkeypatch.setattr(Objective, "value_and_grad", watched)
    metric = EpsilonBox(epsilon=0.1, maximizer=maximizer, max_targets=0)
    result = stopped_in(problem, metric, "epsilon_box", 2 * gradients + 1)["epsilon_box"]
    assert result.status.kind is Kind.INTERRUPTED
    assert len(seen) == gradients == result.details["gradients_in_solver"]
    assert result.details["max_loss"] == max(seen)
    assert "lower bound" in result.status.message


@pytest.mark.parametrize("values", [2, 3, 6])
def test_a_box_that_is_stopped_among_its_starts_has_the_best_of_those(problem, values, monkeypatch):
    seen = []
    evaluate = Objective.value

    def watched(self, perturbation=None):
        value = evaluate(self, perturbation)
        seen.extend([value] * (perturbation is not None))  # not that of the trained weights, before the metrics
        if len(seen) == values:
            signal.raise_signal(signal.SIGINT)
        return value

    monkeypatch.setattr(Objective, "value", watched)
    with pytest.warns(MeasurementWarning, match="stopped by Ctrl-C"):
        report = measure_sharpness(problem.model, problem.loader(13, 27), EpsilonBox(epsilon=0.1, sketch_samples=10))
    result = report["epsilon_box"]
    assert result.status.kind is Kind.INTERRUPTED
    assert len(seen) == values
    assert result.details["max_loss"] == max(seen)
    assert result.value == pytest.approx(100 * (max(seen) - report.loss) / (1 + report.loss))
    assert result.value > 0
    assert f"lower bound: the best of the starts tried until then ({values})" in result.status.message
    assert result.details["gradients_in_solver"] == 0


def test_a_box_that_is_stopped_before_its_solver_has_a_gradient_has_the_best_of_its_starts(problem, monkeypatch):
    seen = []
    evaluate = Objective.value

    def watched(self, perturbation=None):
        seen.append(evaluate(self, perturbation))
        return seen[-1]

    def stopped(self, perturbation=None):
        signal.raise_signal(signal.SIGINT)
        stopping.check()

    monkeypatch.setattr(Objective, "value", watched)
    monkeypatch.setattr(Objective, "value_and_grad", stopped)
    with pytest.warns(MeasurementWarning, match="stopped by Ctrl-C"):
        report = measure_sharpness(problem.model, problem.loader(13, 27), EpsilonBox(epsilon=0.1, sketch_samples=10))
    assert report["epsilon_box"].details["max_loss"] == max(seen)
    assert len(seen) > 6


def test_a_box_that_is_stopped_below_a_start_that_it_has_not_come_to_has_that_start(problem, monkeypatch):
    """Pairs of classes come first, whatever single ones promise."""
    values, gradients = [], []
    evaluate, differentiate = Objective.value, Objective.value_and_grad

    def promising(self, perturbation=None):
        values.append(evaluate(self, perturbation) + 5.0 * (perturbation is not None and len(values) == 1))
        return values[-1]

    def stopping_after_one(self, perturbation=None):
        value, gradient = differentiate(self, perturbation)  # which says that it was stopped, the next time
        gradients.append(value)
        signal.raise_signal(signal.SIGINT)
        return value, gradient

    monkeypatch.setattr(Objective, "value", promising)
    monkeypatch.setattr(Objective, "value_and_grad", stopping_after_one)
    with pytest.warns(MeasurementWarning, match="stopped by Ctrl-C"):
        report = measure_sharpness(problem.model, problem.loader(13, 27), EpsilonBox(epsilon=0.1, sketch_samples=10))
    result = report["epsilon_box"]
    assert result.details["max_loss"] == values[1] > gradients[0]
    assert "then stopped, below the best of the starts tried, class" in result.status.message
    assert len(result.details["start_values"]) == result.details["gradients_in_solver"] == 1
    assert SharpnessReport.from_json(report.to_json())["epsilon_box"].value == result.value


def test_a_box_whose_starts_go_down_is_bounded_by_the_trained_weights(problem, monkeypatch):
    evaluate = Objective.value

    def falling(self, perturbation=None):
        if perturbation is None:
            return evaluate(self)
        stopping.check()
        signal.raise_signal(signal.SIGINT)
        return self.loss - 0.5

    monkeypatch.setattr(Objective, "value", falling)
    with pytest.warns(MeasurementWarning, match="stopped by Ctrl-C"):
        report = measure_sharpness(problem.model, problem.loader(13, 27), EpsilonBox(epsilon=0.1, sketch_samples=10))
    result = report["epsilon_box"]
    assert (result.value, result.details["max_loss"], result.details["perturbation_norm"]) == (0.0, report.loss, 0.0)
    assert "lower bound: no start tried until then (1) lies above the trained weights" in result.status.message


def test_a_metric_that_has_nothing_yet_is_not_measured(problem):
    for metric, batches in ((EpsilonBox(max_targets=0), 1), (HessianTopK(), 1), (HessianTrace(), 31)):
        (result,) = stopped_in(problem, metric, metric.name, batches).values()
        assert result.status.kind is Kind.NOT_MEASURED
        assert math.isnan(result.value)
        assert "no number yet" in result.status.message
        stopping._last_interrupt = -math.inf


def test_a_stopped_trace_is_the_mean_over_its_probes(problem):
    products = 20  # 15 in the basis, 5 outside
    result = stopped_in(problem, HessianTrace(num_matvecs=30), "hessian_trace", 2 * products + 1)["hessian_trace"]
    assert result.status.kind is Kind.INTERRUPTED
    assert result.details["num_probes"] == 5
    fewer = whole(problem, HessianTrace(num_matvecs=30, method="deflated"))["hessian_trace"]
    exact = problem.dense_hessian().trace().item()
    assert result.standard_error > 0
    assert abs(result.value - exact) < 6 * result.standard_error
    assert fewer.details["num_probes"] == 15


@pytest.mark.parametrize(
    ("method", "products", "said"),
    [
        ("hutch++", 14, "Hutchinson's estimate by 10 products that were to find the range, 14 made"),
        ("hutch++", 25, "Hutch++ with 5 of 10 probes, 25 made"),
        ("xtrace", 14, "Hutchinson's estimate by 14 products that were to find the range, 14 made"),
        ("xtrace", 26, "XTrace with 11 of 15 test vectors, 26 made"),
    ],
)
def test_a_stopped_trace_by_a_low_rank_says_what_it_is(problem, method, products, said):
    metric = HessianTrace(num_matvecs=30, method=method)
    result = stopped_in(problem, metric, "hessian_trace", 2 * products + 1)["hessian_trace"]
    assert result.status.kind is Kind.INTERRUPTED
    assert said in result.status.message
    assert result.cost.hvps == result.details["num_matvecs"] == products
    assert result.standard_error > 0
    assert abs(result.value - problem.dense_hessian().trace().item()) < 6 * result.standard_error


def test_a_stopped_subspace_is_the_mean_over_its_draws(problem):
    complete = whole(problem, "random_subspace")["random_subspace"]
    spent = [draw["gradients_in_solver"] for draw in complete.details["solver"]]
    result = stopped_in(problem, "random_subspace", "random_subspace", 2 * (spent[0] + spent[1] + spent[2] + 3))[
        "random_subspace"
    ]
    assert result.details["values"] == complete.details["values"][:3]  # without the half of the fourth
    assert result.details["draws"] == 3
    assert result.value == pytest.approx(sum(complete.details["values"][:3]) / 3)
    assert result.standard_error > 0
    half = stopped_in_first_draw(problem)
    assert half.details["draws"] == 1
    assert half.standard_error is None
    assert 0 < half.value <= complete.details["values"][0]


def stopped_in_first_draw(problem):
    stopping._last_interrupt = -math.inf
    return stopped_in(problem, "random_subspace", "random_subspace", 7)["random_subspace"]


def test_a_stopped_density_has_the_nodes_that_were_made(problem):
    result = stopped_in(problem, "spectral_density", "spectral_density", 2 * 8 + 1)["spectral_density"]
    assert result.status.kind is Kind.INTERRUPTED
    assert len(result.details["nodes"]) == 8
    assert sum(result.details["weights"]) == pytest.approx(1)
    exact = problem.dense_hessian().square().sum().div(len(problem.dense_hessian())).sqrt().item()
    assert abs(result.value - exact) < 5 * result.standard_error


def test_a_shared_run_that_is_stopped_gives_the_metric_in_hand_what_it_had(problem):
    report = stopped_in(problem, ["hessian_topk", "hessian_trace", "spectral_density"], "hessian_topk", 15)
    kinds = [result.status.kind for result in report.values()]
    assert kinds == [Kind.INTERRUPTED, Kind.NOT_MEASURED, Kind.NOT_MEASURED]
    assert len(report["hessian_topk"].details["eigenvalues"]) == 5


def test_a_second_ctrl_c_is_a_keyboard_interrupt_at_once(problem):
    def twice(event):
        if event.metric is not None:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("nothing comes after it")

    with pytest.raises(KeyboardInterrupt):
        whole(problem, "epsilon_box", progress=twice)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_two_in_a_row_stop_a_script_that_measures_in_a_loop(problem):
    stopped_in(problem, "epsilon_box", "epsilon_box", 30)
    with pytest.raises(KeyboardInterrupt):
        whole(problem, "epsilon_box", progress=Presses("epsilon_box", 1))


def test_ctrl_c_before_the_first_metric_raises(problem):
    class Loader(list):
        def __iter__(self):
            signal.raise_signal(signal.SIGINT)
            return super().__iter__()

    with pytest.raises(KeyboardInterrupt):
        measure_sharpness(problem.model, Loader(problem.loader()), "epsilon_box")


def test_asked_to_raise_it_raises_and_leaves_no_trace(problem):
    before = copy.deepcopy(problem.model.state_dict())
    random = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        whole(problem, "hessian_topk", progress=Presses("hessian_topk", 5), on_interrupt="raise")
    assert torch.equal(torch.get_rng_state(), random)
    for name, tensor in problem.model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_monitor_lets_ctrl_c_stop_the_training(problem):
    def presses(objective, rng):
        signal.raise_signal(signal.SIGINT)
        return MetricResult(objective.value())

    monitor = SharpnessMonitor(problem.model, problem.loader(), {"presses": presses}, every="1 step", budget=None)
    with pytest.raises(KeyboardInterrupt):
        monitor.measure(Progress(step=1, samples=40, epoch=0.0, batch_size=40, base_batch_size=40))


def test_whoever_handles_the_signal_keeps_it(problem):
    heard = []
    before = signal.signal(signal.SIGINT, lambda *_: heard.append("theirs"))
    try:
        report = whole(problem, "epsilon_box", progress=Presses("epsilon_box", 5))
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == ["theirs"]
    assert report.stopped is None
    assert report["epsilon_box"].status.kind is Kind.LOWER_BOUND


def test_measuring_in_a_thread_leaves_the_signal_alone(problem):
    found = []
    thread = threading.Thread(target=lambda: found.append(whole(problem, "epsilon_box", time_limit=300)))
    thread.start()
    thread.join()
    assert found[0].stopped is None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_third_partys_metric_may_return_what_it_has(problem):
    def mean_of_losses(objective, rng):
        seen = []
        try:
            seen.extend(objective.value() for _ in range(10))
        except MeasurementStopped:
            return MetricResult(sum(seen) / len(seen), status=Status(Kind.ESTIMATE, f"{len(seen)} losses"))
        raise AssertionError("it was to be stopped")

    def unprepared(objective, rng):
        for _ in range(10):
            with_exceptions_held(objective)
        return MetricResult(1.0)

    def with_exceptions_held(objective):
        try:
            objective.value()
        except Exception as error:
            raise AssertionError("no Exception, so that nothing holds it up by accident") from error

    prepared = stopped_in(problem, {"mean": mean_of_losses}, "mean", 7)["mean"]
    assert prepared.status.message == "stopped by Ctrl-C, and this is what it had, estimate: 3 losses"
    stopping._last_interrupt = -math.inf
    assert stopped_in(problem, {"it": unprepared}, "it", 7)["it"].status.kind is Kind.NOT_MEASURED


# ---------------------------------------------------------------------- the clock


class Clock:
    """Advances by a second with every batch."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def listen(self, event: Any) -> None:
        self.now += event.metric is not None


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("sharpness_plugins.measure.StopSwitch", lambda **settings: StopSwitch(**settings, clock=clock))
    return clock


def test_a_time_limit_stops_the_metric_in_hand_and_those_after_it(problem, clock):
    report = whole(problem, ["hessian_topk", "epsilon_box"], time_limit=9, progress=clock.listen)
    assert report["hessian_topk"].status.kind is Kind.INTERRUPTED
    assert report["hessian_topk"].cost.hvps == 4
    assert report["epsilon_box"].status.kind is Kind.NOT_MEASURED
    assert report.stopped == "at the time limit of 9 s"


def test_a_time_limit_for_each_metric_leaves_the_next_one_its_own(problem, clock):
    metrics = ["hessian_topk", HessianTopK(k=2), "random_subspace"]
    report = whole(problem, metrics, metric_time_limit=11, progress=clock.listen)
    kinds = [result.status.kind for result in report.values()]
    assert kinds == [Kind.INTERRUPTED] * 3
    assert [result.cost.hvps for result in report.values()] == [5, 5, 0]  # the shared run was begun anew
    assert report.stopped == "at the time limit of 11 s for a metric"


def test_a_metric_that_ends_in_time_is_not_marked(problem, clock):
    report = whole(
        problem, ["hessian_topk", "epsilon_box"], time_limit=10_000, metric_time_limit=5000, progress=clock.listen
    )
    assert report.stopped is None
    assert report["hessian_topk"].status.kind is Kind.CONVERGED


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="alarms are POSIX's")
def test_a_plugin_that_hangs_between_evaluations_is_interrupted(problem, monkeypatch):
    monkeypatch.setattr(stopping, "_GRACE", 0.05)

    def sleeps(objective, rng):
        time.sleep(600)

    def spins(objective, rng):
        while True:
            with contextlib.suppress(Exception):
                objective.loss  # noqa: B018

    report = whole(problem, {"sleeps": sleeps, "spins": spins, "topk": "hessian_topk"}, metric_time_limit=0.1)
    for key in ("sleeps", "spins"):
        assert report[key].status.kind is Kind.NOT_MEASURED
        assert "hung" in report[key].status.message
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"on_interrupt": "ask"}, "on_interrupt must be one of"),
        ({"time_limit": 0}, "time_limit must be a positive number of seconds"),
        ({"metric_time_limit": math.nan}, "metric_time_limit must be a positive number"),
    ],
)
def test_wrong_settings_are_refused_before_the_data_is_read(problem, settings, match):
    class Untouched(list):
        def __iter__(self):
            raise AssertionError("the loader was read")

    with pytest.raises(ValueError, match=match):
        measure_sharpness(problem.model, Untouched(), "epsilon_box", **settings)


# ---------------------------------------------------------------------- real processes

SETUP = """
    import torch
    from torch import nn

    def build():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))
            x = torch.randn(512, 16)
        return model, [(part, torch.arange(len(part)) % 4) for part in x.split(64)]
"""


def started(tmp_path, *arguments):
    (tmp_path / "setup_file.py").write_text(textwrap.dedent(SETUP))
    command = [sys.executable, "-m", "sharpness_plugins", "measure", "setup_file.py:build", *arguments]
    return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_ctrl_c_on_the_command_line_prints_the_table_and_ends_with_130(tmp_path):
    state = tmp_path / "state"
    many = "random_subspace:draws=100000,dim=10"
    process = started(
        tmp_path, "--metric", "hessian_topk:k=2", "--metric", many, "--state-file", "state", "--json", "out.json"
    )
    deadline = time.monotonic() + 120
    while not (state.exists() and b"in the subspace" in state.read_bytes()):  # the first metric is done
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "sharpness: interrupted"
    assert "hessian_topk" in out
    assert "stopped by Ctrl-C" in out
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    kinds = [result["status"]["kind"] for result in results.values()]
    assert kinds[0] == "converged"
    assert kinds[1] in ("interrupted", "not measured")


def test_a_time_limit_on_the_command_line_ends_with_2(tmp_path, capsys, monkeypatch):
    (tmp_path / "limited_setup.py").write_text(textwrap.dedent(SETUP))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main(["measure", "limited_setup.py:build", "--metric", "random_subspace:draws=10000", "--time-limit", "0.3"]) == 2
    assert "stopped at the time limit of 0.3 s" in capsys.readouterr().out
    del sys.modules["limited_setup"]


RANKS = """
    import os, sys, time
    import torch
    sys.path.insert(0, {tests!r})
    import oracles
    from sharpness_plugins import measure_sharpness

    def child(rank):
        # rank 1 is slow, and would reach the limit at other evaluations than rank 0
        torch.distributed.init_process_group("gloo", init_method="file://{folder}/store", rank=rank, world_size=2)
        problem, slow = oracles.small_classifier(num_samples=40), lambda event: time.sleep(0.01 * rank)
        many = "random_subspace"
        report = measure_sharpness(
            problem.model, problem.loader(13, 27), ["hessian_topk", many, "epsilon_box"], progress=slow, **{limits}
        )
        told = [(str(r.status.kind), r.value) for r in report.values()]
        os.write(1, f"{{rank}}|{{report.stopped}}|{{told}}\\n".encode())  # at once, or two ranks' lines would mix
        torch.distributed.barrier()

    children = []
    for rank in range(2):
        if (pid := os.fork()) == 0:
            child(rank)
            os._exit(0)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_ranks_stop_at_the_same_evaluation(tmp_path):
    program = textwrap.dedent(RANKS).format(tests=str(Path(__file__).parent), folder=tmp_path, limits={"time_limit": 0.3})
    told = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=200, cwd=tmp_path, check=False
    )
    assert told.returncode == 0, told.stderr
    first, second = (line.split("|", 1)[1] for line in sorted(told.stdout.splitlines()))
    assert first == second
    assert first.startswith("at the time limit of 0.3 s|")
    assert "('not measured', nan)]" in first


@pytest.mark.parametrize("seed", range(3))
def test_signals_at_random_moments_leave_no_trace(problem, seed):
    """A thread sends real signals; whatever comes out, the model and the random states are what they were."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double().train()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    generator = torch.Generator().manual_seed(seed)
    for delay in torch.rand(6, generator=generator).mul(0.3).tolist():
        stopping._last_interrupt = -math.inf
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", MeasurementWarning)
                measure_sharpness(model, problem.loader(13, 27), ["epsilon_box", "hessian_topk", "hessian_trace"])
        except KeyboardInterrupt:  # before the first metric
            pass
        finally:
            try:
                timer.join()
            except KeyboardInterrupt:
                timer.join()
        assert model.training
        assert all(module.training for module in model)
        assert torch.equal(torch.get_rng_state(), random)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name])
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
