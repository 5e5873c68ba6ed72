"""``sharpness reproduce keskar2017`` from data to record: what it holds, and that neither a kill nor ranks change a byte."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import oracles
from keskar2017_example import example_record, example_studies
from sharpness_plugins.cli import main
from sharpness_plugins.errors import PluginWarning
from sharpness_plugins.experiments.data import Samples, Split
from sharpness_plugins.experiments.keskar2017 import findings, measurements, run
from sharpness_plugins.experiments.keskar2017.cone import ConeTest
from sharpness_plugins.experiments.keskar2017.networks import build
from sharpness_plugins.experiments.keskar2017.record import STUDIES, Curvature, Record, box
from sharpness_plugins.experiments.keskar2017.settings import preset
from sharpness_plugins.experiments.keskar2017.tables import tables
from sharpness_plugins.experiments.lines import along_line
from sharpness_plugins.experiments.training import Evaluation, evaluate
from sharpness_plugins.metrics import EpsilonBox
from sharpness_plugins.sampling import generator_for
from test_keskar2017_data import write_cifar

CONFIG = {"width": 0.05, "draws": 2, "dim": 5, "directions": 4, "density_nodes": 6, "eigenvalues": 2, "batch_sizes": [50]}
COMMAND = ["reproduce", "keskar2017", "--no-report", "--quick", "--seeds", "1", "--config"]


def reproduce(*arguments):
    assert main(["reproduce", "keskar2017", "--no-report", "--quiet", *map(str, arguments)]) == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One seed of everything, small."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "small.json").write_text(json.dumps(CONFIG))
    assert main([*COMMAND, str(folder / "small.json"), "--quiet", "--out", str(folder)]) == 0
    return folder


def program(folder, config, **environment):
    command = [sys.executable, "-m", "sharpness_plugins", *COMMAND, str(config), "--out", str(folder)]
    return subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


# --- the record


def test_every_study_has_its_networks_with_all_that_is_measured_on_them(whole):
    record = Record.read(whole)
    assert set(record.studies) == set(STUDIES)
    for study, roles in record.studies.items():
        for role in roles:
            (network,) = record.networks(study, role)
            assert network.condition.ending.partition(":")[0] in ("epochs", "epoch_loss", "loss", "steps")
            assert math.isfinite(network.box("full", 1e-3, "ours").value)
            assert network.curvature is not None
            if study in ("protocol", "matched_loss"):
                assert len(network.boxes) == 12
                assert network.cone is not None
                assert sum(network.curvature.weights) == pytest.approx(1)
                assert network.curvature.dim == record.problems["main"].dim
    assert list(record.studies["batch_sizes"]) == ["16", "50", "500"]
    assert record.problems["warm_start"].num_train == 800
    assert record.seeds == (0,)


def test_ends_of_every_line_are_the_two_networks(whole):
    record = Record.read(whole)
    assert [(curve.kind, curve.study) for curve in record.curves] == [
        (kind, study) for study in ("protocol", "matched_loss") for kind in ("straight", "curved")
    ]
    for curve in record.curves:
        assert curve.alphas == tuple(-1 + i / 8 for i in range(25))
        for alpha, role in ((0.0, "small"), (1.0, "large")):
            (network,) = record.networks(curve.study, role)
            place = curve.alphas.index(alpha)
            for points, measured in ((curve.train, network.train), (curve.test, network.test)):
                assert points[place].loss == pytest.approx(measured.loss, abs=1e-6)
                assert points[place].accuracy == measured.accuracy


def test_trajectories_begin_at_the_common_start_and_pass_by_the_networks(whole):
    record = Record.read(whole)
    watched = {t.role: t for t in record.trajectories if t.purpose == "sharpness_against_loss"}
    assert [point.epochs for point in watched["small"].points] == [0, 1, 3]
    first = [watched[role].points[0] for role in ("small", "large")]
    assert first[0] == first[1]
    assert first[0].distance == 0
    assert all(point.sharpness > 0 for trajectory in watched.values() for point in trajectory.points)
    (network,) = record.networks("batch_sizes", "16")  # ends after as many epochs as are watched
    last = watched["small"].points[-1]
    assert (last.train, last.distance) == (network.train, network.distance)
    assert last.sharpness == box("full", 1e-3, "ours")(network)
    (warm,) = [t for t in record.trajectories if t.purpose == "warm_start"]
    assert [point.epochs for point in warm.points] == [1]
    (point,) = record.networks("warm_start", "1")
    assert point.warm_steps == 100  # an epoch of 800 samples by 8


def test_what_is_there_is_not_done_again_and_gives_the_same_bytes(whole, capsys):
    before = (whole / "record.json").read_bytes()
    assert main([*COMMAND, str(whole / "small.json"), "--out", str(whole)]) == 0
    assert (whole / "record.json").read_bytes() == before
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "Table 2, the paper's protocol" in printed.out
    assert "Tables 3 and 4, matched training loss" in printed.out


def test_a_metric_that_failed_is_measured_again_and_a_loss_that_overflows_is_kept(tmp_path, monkeypatch):
    def fails(self, objective, rng):
        raise MemoryError("too large")

    settings = dataclasses.replace(
        preset(quick=True), seeds=(0,), width=0.05, studies=("sqrt_rate",), density_nodes=4, eigenvalues=1
    )
    with monkeypatch.context() as patched:
        patched.setattr(EpsilonBox, "__call__", fails)
        with pytest.warns(PluginWarning, match="too large"):
            record = run.reproduce(settings, tmp_path)
    (network,) = record.networks("sqrt_rate", "large")
    assert network.boxes[0].kind == "failed"
    assert math.isnan(network.boxes[0].value)
    told = []
    (network,) = run.reproduce(settings, tmp_path, listener=told.append).networks("sqrt_rate", "large")
    assert network.boxes[0].value > 0
    assert len([event for event in told if event.finished]) == 2  # both networks, and no training
    assert measurements.evaluation(measurements.finite(Evaluation(math.inf, 0.5))).accuracy == 0.5


# --- kills and ranks


def test_after_a_real_kill_the_record_is_the_same_byte_for_byte(whole, tmp_path):
    """Killed within a training, in which a checkpoint is, and then within a measurement."""
    for pattern in ("store/trainings/*/checkpoint.pt", "store/measurement/*/done.json"):
        process = program(tmp_path, whole / "small.json")
        deadline = time.monotonic() + 240
        while not any(tmp_path.glob(pattern)) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (tmp_path / "record.json").exists()
    process = program(tmp_path, whole / "small.json")
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert (tmp_path / "record.json").read_bytes() == (whole / "record.json").read_bytes()
    assert not list(tmp_path.glob("store/trainings/*/checkpoint.pt"))


def test_two_ranks_share_the_work_and_give_the_same_record(whole, tmp_path):
    started = [program(tmp_path, whole / "small.json", RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    told = [process.communicate(timeout=240) for process in started]
    assert [process.returncode for process in started] == [0, 0], told
    assert (tmp_path / "record.json").read_bytes() == (whole / "record.json").read_bytes()
    assert told[1][0] == ""  # rank 1 prints nothing
    done = [line for line in told[0][1].splitlines() if "seed 0" in line]
    units = len(list(tmp_path.glob("store/*/*/done.json")))
    assert 0 < len(done) <= units - units // 2


def test_ctrl_c_says_that_nothing_is_lost(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "train", interrupted)
    assert main(["reproduce", "keskar2017", "--quick", "--quiet", "--out", str(tmp_path)]) == 130
    assert "the same command goes on from there" in capsys.readouterr().err


def test_progress_tells_the_time_left():
    event = run.ReproductionEvent(3, 80, "seed 0, batch 16", "epoch 5", 200.0)
    assert str(event) == "3 of 80 [about 3 min left] seed 0, batch 16: epoch 5"
    units = [run._Unit("training", seed, "a") for seed in range(3)] + [run._Unit("line", 0, "b")]
    clock = run._Clock(units)
    assert clock.seconds_left() is None
    clock.tick(units[0], 10.0)
    assert clock.seconds_left() == 10 + 10 + 10  # nothing is known of lines: as long as anything
    clock.tick(units[3], 1.0)
    clock.tick(units[1], None)  # was there before
    assert clock.seconds_left() == 10


# --- other data


FEW = {"draws": 1, "dim": 3, "directions": 2, "density_nodes": 4, "eigenvalues": 1, "epochs": 1, "max_epochs": 2}
TINY = [
    "--quick",
    "--seeds",
    1,
    "--config",
    "few.json",
    "--width",
    0.03,
    "--small-batch",
    4,
    "--large-batch",
    10,
    "--no-checksum",
]


@pytest.fixture
def few(tmp_path, monkeypatch):
    """In the current directory."""
    monkeypatch.chdir(tmp_path)
    Path("few.json").write_text(json.dumps(FEW))


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("network", "classes", "version", "archive", "mode"),
    [
        ("C1", 10, "binary", False, "batch"),
        ("C2", 10, "python", True, "running"),
        ("C3", 100, "python", False, "running"),
        ("C4", 10, "binary", True, "batch"),
    ],
)
def test_cifar_networks_train_and_measure_end_to_end(tmp_path, network, classes, version, archive, mode):
    write_cifar(tmp_path, classes, version, archive=archive, counts=(4, 5) if classes == 10 else (20, 5))
    out = tmp_path / "out"
    studies = ["--studies", "matched_loss", "remedies"] if network == "C1" else ["--studies", "matched_loss"]
    reproduce(
        "--network",
        network,
        "--data",
        f"cifar{classes}",
        "--folder",
        tmp_path,
        "--batch-norm",
        mode,
        *TINY,
        *studies,
        "--out",
        out,
    )
    record = Record.read(out)
    problem = record.problems["main"]
    assert (problem.network, problem.batch_norm, problem.num_classes) == (network, mode, classes)
    assert (problem.num_train, problem.num_test) == (20, 5)
    for role, size in (("small", 4), ("large", 10)):
        (trained,) = record.networks("matched_loss", role)
        assert trained.condition.recipe.batch_size == size
        assert {found.kind for found in trained.boxes} <= {"lower bound", "estimate", "not converged"}
        assert all(found.value >= 0 for found in trained.boxes)
        assert trained.box("full", 1e-3, "ours").value > 0
    assert len(record.curves) == 2


@pytest.mark.usefixtures("few")
def test_f2_on_features_has_no_augmentation(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for half, count in (("train", 20), ("test", 5)):
        arrays |= {f"{half}_inputs": rng.normal(size=(count, 360)), f"{half}_labels": rng.integers(0, 1973, count)}
    np.savez(tmp_path / "timit.npz", **arrays)
    reproduce("--network", "F2", "--folder", tmp_path, *TINY, "--studies", "remedies", "--out", tmp_path)
    record = Record.read(tmp_path)
    assert list(record.studies["remedies"]) == ["small", "none", "conservative", "adversarial", "sam"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--network", "C1"], "nothing is downloaded"),
        (["--network", "C9"], "there is no network 'C9'"),
        (["--data", "timit", "--network", "C1", "--folder", "."], "images"),
        (["--large-batch", "600"], "at most the 500 training samples"),
        (["--seeds", "0"], "seeds must be at least one"),
        (["--studies", "warm-start"], "Did you mean 'warm_start'"),
        (["--config", "none.json"], "none.json"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    labels = np.zeros(20, int)
    inputs = np.zeros((20, 360))
    np.savez("timit.npz", train_inputs=inputs, train_labels=labels, test_inputs=inputs, test_labels=labels)
    assert main(["reproduce", "keskar2017", "--quiet", "--quick", *arguments]) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert not Path("sharpness-keskar2017").exists()


def test_help_needs_no_torch():
    code = "import sys; from sharpness_plugins.cli import main; main(['reproduce', '-h']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, stdout=subprocess.DEVNULL)


# --- lines


def test_a_curved_line_is_a_quarter_turn():
    """On a linear layer without bias the loss is that of the mixed weights, by hand."""
    generator = torch.Generator().manual_seed(0)
    data = [Samples(torch.randn(9, 4, generator=generator), torch.randint(0, 3, (9,), generator=generator)) for _ in "ab"]
    small, large, mixed = (torch.nn.Linear(4, 3, bias=False) for _ in range(3))
    for kind, shares in (
        ("curved", lambda a: (math.cos(a * math.pi / 2), math.sin(a * math.pi / 2))),
        ("straight", lambda a: (1 - a, a)),
    ):
        alphas = (-1.0, -0.5, 0.0, 0.25, 1.0, 1.5, 2.0)
        train, test = along_line(small, large, Split(*data), alphas=alphas, kind=kind)
        for alpha, found, other in zip(alphas, train, test, strict=True):
            one, two = shares(alpha)
            with torch.no_grad():
                mixed.weight.copy_(one * small.weight + two * large.weight)
            assert found.loss == pytest.approx(evaluate(mixed, data[0]).loss, rel=1e-5)
            assert other.loss == pytest.approx(evaluate(mixed, data[1]).loss, rel=1e-5)
    with pytest.raises(ValueError, match="straight, curved"):
        along_line(small, large, Split(*data), kind="sigmoid")


def test_running_statistics_stay_between_the_ends_of_the_line():
    small, large = (build("C1", inputs=(3, 8, 8), num_classes=10, seed=s, width=0.05, batch_norm="running") for s in (0, 1))
    generator = torch.Generator().manual_seed(0)
    samples = Samples(torch.rand(20, 3, 8, 8, generator=generator), torch.randint(0, 10, (20,), generator=generator))
    for model, scale in ((small, 1.0), (large, 5.0)):
        model.train()
        for _ in range(30):
            model(scale * samples.inputs)
    split = Split(samples, samples)
    for kind in ("straight", "curved"):
        train, _ = along_line(small, large, split, kind=kind)
        assert all(math.isfinite(point.loss) for point in train)  # beyond the ends the variances would become negative
        for place, model in ((8, small), (16, large)):
            assert train[place] == evaluate(model, samples)


# --- the test of the cone


def test_rises_of_a_quadratic_are_half_its_curvature():
    eigenvalues = torch.tensor([50.0, 20.0, 5.0] + [0.01] * 57, dtype=torch.float64)
    matrix = oracles.with_spectrum(eigenvalues)
    weights = torch.linspace(-1, 1, 60, dtype=torch.float64)
    objective = oracles.quadratic(matrix, weights, minimum=weights, offset=0.5)
    result = ConeTest(epsilon=0.01, directions=200, dims=4, steep=0.05)(objective, generator_for(0, "cone"))
    radius = (0.01 * (weights.abs() + 1)).norm().item()
    expected = [100 * 0.5 * value * radius**2 / 1.5 for value in (50.0, 20.0, 5.0, 0.01)]
    assert result.details["radius"] == pytest.approx(radius)
    assert result.details["top_rises"] == pytest.approx(expected, rel=2e-3)
    mean = 100 * 0.5 * eigenvalues.mean().item() * radius**2 / 1.5  # of a random direction
    random = torch.tensor(result.details["random_rises"])
    assert random.mean().item() == pytest.approx(mean, rel=0.2)
    assert result.value == (random >= 0.05).double().mean().item()


def test_of_both_signs_the_worse_is_taken():
    slope = torch.tensor([3.0, -4.0], dtype=torch.float64)
    objective = oracles.objective_of(lambda w: w @ slope, torch.zeros(2, dtype=torch.float64))
    rises = ConeTest(directions=30, dims=1)(objective, generator_for(0, "cone")).details["random_rises"]
    assert min(rises) >= 0


@pytest.mark.parametrize("given", [{"directions": 0}, {"dims": 0}, {"epsilon": 0.0}])
def test_a_cone_without_directions_is_refused(given):
    with pytest.raises(ValueError, match="at least 1"):
        ConeTest(**given)


# --- what is said


def test_sentences_say_what_reproduces_and_what_does_not():
    said = "\n".join(findings.sentences(example_record()))
    assert "At the same training loss, the large batch's minima are sharper in full space in 2 of 2 seeds, 8 times" in said
    assert "test accuracy of the large batch against the small: -1.00 ± 0.00 points, lower in 2 of 2 seeds: as in" in said
    assert "stops where it starts on" in said
    assert "(seed by seed 2 to 2): NOT within the paper's 3 to 10" in said
    assert "Orders disagree" not in said


def test_an_order_that_a_control_turns_round_is_said():
    record = example_record()
    large = example_studies()["equal_updates"]["large"]
    flat = Curvature((0.1,), (0.0,), True, (), (), (), (), (), math.nan, 1000)
    changed = tuple(
        dataclasses.replace(network, curvature=flat) if network.condition == large else network
        for network in record.all_networks
    )
    said = findings.sentences(dataclasses.replace(record, all_networks=changed))
    turned = [sentence for sentence in said if sentence.startswith("Orders disagree")]
    assert len(turned) == 1
    assert "Orders disagree on λmax: by the paper's protocol, the large batch's is higher by 7.5" in turned[0]
    assert "after as many updates, it is lower by 2.4" in turned[0]
    assert any(s.startswith("Metrics disagree in the study equal_updates: ε-box sharpness calls") for s in said)


def test_unmatched_networks_and_one_seed_are_said():
    record = example_record()
    networks = tuple(
        dataclasses.replace(network, ended=False) if network.condition.remedy == "sam" else network
        for network in record.all_networks
        if network.seed == 0
    )
    said = "\n".join(findings.sentences(dataclasses.replace(record, all_networks=networks)))
    assert "In the study remedies, 1 of 6 networks did not come to their ending (batch 500 with sam" in said
    assert "One seed says nothing about the spread" in said
    matched = example_studies()["matched_loss"]["large"]
    networks = tuple(dataclasses.replace(n, ended=n.condition != matched) for n in record.all_networks)
    said = "\n".join(findings.sentences(dataclasses.replace(record, all_networks=networks)))
    assert "At training losses that differ, the large batch's minima are sharper" in said
    assert "At the same training loss" not in said


def test_tables_hold_every_study_and_solver():
    text = "\n".join(tables(example_record()))
    for word in (*STUDIES, "published", "lbfgsb", "ours", "sam", "Table 2", "Tables 3 and 4"):
        assert word in text
    assert "4.00" in text  # φ(ε) / φ(ε/2) of the example
