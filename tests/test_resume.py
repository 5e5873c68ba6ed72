"""Measurements that are killed and go on from their state file: to the same numbers, and only from their own file."""

from __future__ import annotations

import errno
import json
import math
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sharpness_plugins import (
    MeasurementWarning,
    PluginWarning,
    StateFileError,
    measure_sharpness,
    resuming,
    state_file,
    steps,
    stopping,
)
from sharpness_plugins.distributed import Ranks
from sharpness_plugins.layout import Shards
from sharpness_plugins.metrics import EpsilonBox, HessianTopK, RandomSubspace
from sharpness_plugins.objective import Objective
from sharpness_plugins.report import Kind, MetricResult, SharpnessReport
from sharpness_plugins.state_file import StateFile
from sharpness_plugins.stopping import StopSwitch

RESTARTING = HessianTopK(k=5, max_basis=10, tolerance=1e-6, check_multiplicity=True, hvp="forward over reverse")
LBFGSB = EpsilonBox(maximizer="lbfgsb", max_targets=0)
SETS: dict[str, list[Any]] = {
    "box": ["epsilon_box", EpsilonBox(eigenvectors=2, max_targets=3)],
    "subspace": [RandomSubspace(draws=3)],
    "alone": ["hessian_topk", LBFGSB],
    "shared": ["hessian_topk", "hessian_trace", "spectral_density", "hessian_bottom"],
    "restarts": [RESTARTING],
    "matrices": ["gauss_newton_topk", "fisher_trace", "adaptive_topk", "gradient_noise_scale"],
}


class Kill(KeyboardInterrupt):
    """As sudden as a kill: nothing catches it."""


def problem_of(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)
    x = torch.randn(50, 12, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(0, 4, (50,), generator=generator)
    return model, [(x[:20], y[:20]), (x[20:], y[20:])]


def told(report: SharpnessReport) -> dict[str, Any]:
    """All that a report says of its metrics but the seconds."""
    results = {key: dict(entry) for key, entry in report.to_dict()["results"].items()}
    for entry in results.values():
        entry["cost"] = {**entry["cost"], "seconds": None}
    return results


class Counter:
    """Counts batches, and kills at one of them."""

    def __init__(self, monkeypatch) -> None:
        self.count, self.limit, self._check = 0, math.inf, stopping.check
        monkeypatch.setattr(stopping, "check", self)

    def __call__(self) -> None:
        self.count += 1
        if self.count >= self.limit:
            raise Kill
        self._check()

    def until_done(self, lives: list[int], measure) -> tuple[SharpnessReport, int, int]:
        """The report of the run that was not killed, the batches of all, and the kills."""
        total = 0
        for kills, limit in enumerate([*lives, math.inf]):
            self.count, self.limit = 0, limit
            try:
                report = measure()
            except Kill:
                total += self.count
            else:
                return report, total + self.count, kills
        raise AssertionError("unreachable")


@pytest.fixture
def counter(monkeypatch) -> Counter:
    return Counter(monkeypatch)


IN_FLOAT32 = ("box", "shared")


@pytest.mark.parametrize(
    ("name", "dtype"), [(n, torch.float64) for n in SETS] + [(n, torch.float32) for n in IN_FLOAT32], ids=str
)
def test_a_measurement_killed_again_and_again_comes_to_the_same_numbers(name, dtype, counter, tmp_path):
    model, loader = problem_of(dtype)
    whole = measure_sharpness(model, loader, SETS[name])
    needed, counter.count = counter.count, 0
    lives = torch.randint(10, 60, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    path = tmp_path / "state"
    resumed, made, kills = counter.until_done(lives, lambda: measure_sharpness(model, loader, SETS[name], state_file=path))
    assert told(resumed) == told(whole)
    assert resumed.loss == whole.loss
    assert replace(resumed.cost, seconds=0) == replace(whole.cost, seconds=0)
    assert resumed.provenance["hvp_mode"] == whole.provenance["hvp_mode"]
    # a kill costs the evaluation in hand, and the loss at the weights that every start makes: two batches each
    again = 6 if name == "matrices" else 0  # gradients of samples are not kept
    assert kills >= 1
    assert made <= needed + kills * (2 + 2) + again


def test_every_single_moment(counter, tmp_path):
    """Killed at each batch of the measurement in turn."""
    model, loader = problem_of()
    metrics = [HessianTopK(k=2, max_basis=6, tolerance=1e-4), "hessian_trace", EpsilonBox(max_targets=2)]
    whole = measure_sharpness(model, loader, metrics)
    for moment in range(5, counter.count, 7):
        path = tmp_path / f"state {moment}"
        resumed, _, _ = counter.until_done(
            [moment], lambda path=path: measure_sharpness(model, loader, metrics, state_file=path)
        )
        assert told(resumed) == told(whole), moment


def test_what_is_done_is_not_evaluated_again(counter, tmp_path):
    model, loader = problem_of()
    path = tmp_path / "state"
    first = measure_sharpness(model, loader, SETS["shared"], state_file=path)
    counter.count = 0
    again = measure_sharpness(model, loader, SETS["shared"], state_file=path)
    assert counter.count == 2  # the loss at the weights, in two batches
    assert told(again) == told(first)
    assert path.stat().st_size < 100_000  # the steps are gone


def test_a_third_partys_metric_resumes_from_its_evaluations(counter, tmp_path):
    model, loader = problem_of()
    calls = []

    def descends(objective, rng):
        """Draws, evaluates values, gradients and products."""
        calls.append("third")
        point, found = torch.zeros_like(objective.origin), []
        for _ in range(6):
            noise = torch.randn(objective.dim, generator=rng, dtype=point.dtype)
            value, gradient = objective.value_and_grad(point)
            point = point - 0.1 * gradient + 1e-3 * noise
            found.append(value + objective.value(point) + objective.hvp(noise, point).sum().item())
        return MetricResult(sum(found), details={"found": found, "norm": gradient.norm()})

    def other(objective, rng):
        calls.append("other")
        return MetricResult(objective.value())

    metrics = {"other": other, "descends": descends}
    whole = measure_sharpness(model, loader, metrics)
    needed, counter.count = counter.count, 0
    calls.clear()
    resumed, made, kills = counter.until_done(
        [10, 14, 18], lambda: measure_sharpness(model, loader, metrics, state_file=tmp_path / "state")
    )
    assert told(resumed) == told(whole)
    assert calls.count("other") == 1
    assert calls.count("third") == kills + 1 == 4
    assert made <= needed + kills * (2 + 2)


def test_details_that_no_file_can_hold_are_measured_again(tmp_path):
    model, loader = problem_of()
    calls = []

    def odd(objective, rng):
        calls.append(1)
        return MetricResult(objective.value(), details={"object": object()})

    for _ in range(2):
        measure_sharpness(model, loader, {"odd": odd}, state_file=tmp_path / "state")
    assert len(calls) == 2


def test_a_metric_that_failed_is_tried_again(tmp_path):
    model, loader = problem_of()
    fails = [True]

    def sometimes(objective, rng):
        value = objective.value()
        if fails:
            raise RuntimeError("not today")
        return MetricResult(value)

    with pytest.warns(PluginWarning, match="not today"):
        measure_sharpness(model, loader, {"sometimes": sometimes, "topk": "hessian_topk"}, state_file=tmp_path / "state")
    fails.clear()
    report = measure_sharpness(
        model, loader, {"sometimes": sometimes, "topk": "hessian_topk"}, state_file=tmp_path / "state"
    )
    assert report["sometimes"].value == report.loss


def test_in_slices_of_time_it_comes_to_the_same_numbers(monkeypatch, tmp_path):
    """Time limits and a state file make one measurement of many short jobs."""
    model, loader = problem_of()
    metrics = ["epsilon_box", "hessian_topk", "hessian_trace"]
    whole = measure_sharpness(model, loader, metrics)
    now = [0.0]

    def listen(event):
        now[0] += event.metric is not None

    monkeypatch.setattr(
        "sharpness_plugins.measure.StopSwitch", lambda **settings: StopSwitch(**settings, clock=lambda: now[0])
    )
    slices = 0
    while True:
        report = measure_sharpness(model, loader, metrics, time_limit=15, state_file=tmp_path / "state", progress=listen)
        slices += 1
        if report.stopped is None:
            break
        assert any(result.status.kind in (Kind.INTERRUPTED, Kind.NOT_MEASURED) for result in report.values())
        assert slices < 40
    assert slices > 5
    assert told(report) == told(whole)


# ---------------------------------------------------------------------- whose file it is


def changed(what: str) -> dict[str, Any]:
    """Arguments of a measurement, with one thing other than in the first one."""
    model, loader = problem_of()
    arguments: dict[str, Any] = {"model": model, "loader": loader, "metrics": HessianTopK(k=2)}
    if what == "weights":
        with torch.no_grad():
            model[2].bias[0] += 1e-7
    elif what == "data":
        arguments["loader"] = [(loader[0][0] + 1e-4, loader[0][1]), loader[1]]
    elif what == "batches":
        arguments["loader"] = [loader[1], loader[0]]
    elif what == "targets":
        arguments["loader"] = [(loader[0][0], loader[0][1].flip(0)), loader[1]]
    elif what == "metrics":
        arguments["metrics"] = HessianTopK(k=2, tolerance=0.02)
    elif what == "keys":
        arguments["metrics"] = {"mine": HessianTopK(k=2)}
    elif what == "seed":
        arguments["seed"] = 1
    elif what == "activation":
        model[1] = nn.Sigmoid()
    elif what == "select":
        arguments["select"] = "0.*"
    elif what == "loss":
        arguments["criterion"] = nn.CrossEntropyLoss(label_smoothing=0.1)
    elif what == "dtype":
        arguments["model"], arguments["loader"] = model.float(), [(x.float(), y) for x, y in loader]
    return arguments


@pytest.mark.parametrize(
    "what",
    ["weights", "data", "batches", "targets", "metrics", "keys", "seed", "activation", "select", "loss", "dtype"],
)
def test_the_file_of_another_measurement_is_refused_and_stays(what, tmp_path):
    path = tmp_path / "state"
    measure_sharpness(**changed("nothing"), state_file=path)
    before = path.read_bytes()
    measure_sharpness(**changed("nothing"), state_file=path)  # itself is welcome
    with pytest.raises(StateFileError, match="belongs to another measurement"):
        measure_sharpness(**changed(what), state_file=path)
    assert path.read_bytes() == before


def test_the_refusal_names_what_differs(tmp_path):
    measure_sharpness(**changed("nothing"), state_file=tmp_path / "state")
    arguments = changed("weights")
    with torch.no_grad():
        arguments["model"][2].bias[0] += 1.0
    with pytest.raises(StateFileError, match=r"the weights, the loss differ\. Measure what it belongs to"):
        measure_sharpness(**arguments, state_file=tmp_path / "state")


def test_another_version_is_refused(tmp_path, monkeypatch):
    measure_sharpness(**changed("nothing"), state_file=tmp_path / "state")
    monkeypatch.setattr(resuming.metadata, "version", lambda name: "99.0")
    with pytest.raises(StateFileError, match="the version of sharpness_plugins differs"):
        measure_sharpness(**changed("nothing"), state_file=tmp_path / "state")


@pytest.mark.parametrize("content", [b"", b"my thesis\n", b"\x80\x04\x95", b"sharpness-plugins state 2\n", "weights"])
def test_a_foreign_file_is_refused_and_stays(content, tmp_path):
    path = tmp_path / "state"
    if content == "weights":
        torch.save(problem_of()[0].state_dict(), path)
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    with pytest.raises(StateFileError, match=r"no state file of this version .* left alone"):
        measure_sharpness(**changed("nothing"), state_file=path)
    assert path.read_bytes() == before


def test_a_folder_and_a_place_that_is_none_are_refused(tmp_path):
    with pytest.raises(StateFileError, match="is a folder"):
        measure_sharpness(**changed("nothing"), state_file=tmp_path)
    with pytest.raises(FileNotFoundError):
        measure_sharpness(**changed("nothing"), state_file=tmp_path / "nowhere" / "state")


def test_a_file_in_use_is_refused(tmp_path):
    path = tmp_path / "state"
    measure_sharpness(**changed("nothing"), state_file=path)
    program = "import fcntl, sys; f = open(sys.argv[1], 'r+b'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", program, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(StateFileError, match="in use by another process"):
            measure_sharpness(**changed("nothing"), state_file=path)
        other.communicate(b"\n")
    measure_sharpness(**changed("nothing"), state_file=path)


def killed_file(tmp_path: Path, counter: Counter) -> tuple[Path, dict[str, Any]]:
    """A file with many records, and what the whole measurement tells."""
    model, loader = problem_of()
    metrics = ["hessian_topk", HessianTopK(k=2, max_basis=6, tolerance=1e-5)]
    whole = told(measure_sharpness(model, loader, metrics))
    counter.count, counter.limit = 0, 70
    with pytest.raises(Kill):
        measure_sharpness(model, loader, metrics, state_file=tmp_path / "state")
    counter.limit = math.inf
    return tmp_path / "state", whole


def resumed(path: Path) -> dict[str, Any]:
    model, loader = problem_of()
    return told(
        measure_sharpness(model, loader, ["hessian_topk", HessianTopK(k=2, max_basis=6, tolerance=1e-5)], state_file=path)
    )


def test_a_file_that_is_cut_off_or_damaged_anywhere_never_leads_to_another_number(tmp_path, counter):
    path, whole = killed_file(tmp_path, counter)
    content = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(0, len(content), (8,), generator=generator).tolist()
    refused = 0
    for i, place in enumerate(places):
        spoilt = bytearray(content)
        if i % 2:
            del spoilt[place:]
        else:
            spoilt[place] ^= 0x41
        path.write_bytes(bytes(spoilt))
        try:
            assert resumed(path) == whole
        except StateFileError:
            refused += 1
    assert refused < len(places) / 2  # only where the head is hit


def test_nothing_in_the_file_is_unpickled(tmp_path, counter, monkeypatch):
    path, whole = killed_file(tmp_path, counter)

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    import pickle

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert resumed(path) == whole


def test_a_record_that_lies_about_its_sizes_is_damage(tmp_path):
    path = tmp_path / "state"
    file = StateFile(path, {"of": "me"})
    header = {"key": "a", "label": None, "tree": {"tensor": 0}, "drop": [], "tensors": [["float64", [2**40], 8]]}
    text = json.dumps(header).encode()
    import struct
    import zlib

    payload = bytes(8)
    with path.open("ab") as raw:
        raw.write(struct.pack("<4sQQI", b"rec\n", len(text), 8, zlib.crc32(payload, zlib.crc32(text))) + text + payload)
    file.close()
    with pytest.raises(StateFileError, match="damaged"):
        StateFile(path, {"of": "me"})


def test_a_full_disk_costs_the_state_and_nothing_else(tmp_path, monkeypatch):
    model, loader = problem_of()
    whole = measure_sharpness(model, loader, ["hessian_topk", "epsilon_box"])
    path, left = tmp_path / "state", [20_000]
    write = state_file._write

    def limited(file, data):
        if len(data) > left[0]:
            write(file, bytes(data)[: left[0]])
            left[0] = 0
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= len(data)
        write(file, data)

    monkeypatch.setattr(state_file, "_write", limited)
    with pytest.warns(MeasurementWarning, match="cannot be written .*No space left.*it goes on"):
        report = measure_sharpness(model, loader, ["hessian_topk", "epsilon_box"], state_file=path)
    assert told(report) == told(whole)
    monkeypatch.setattr(state_file, "_write", write)
    assert told(measure_sharpness(model, loader, ["hessian_topk", "epsilon_box"], state_file=path)) == told(whole)


def test_another_path_is_noticed_and_computed_again(tmp_path, counter):
    model, loader = problem_of()
    shift = [0.0]

    def moody(objective, rng):
        """Not deterministic, as no metric should be."""
        values = [objective.value(torch.full_like(objective.origin, 1e-3 * i + shift[0])) for i in range(8)]
        return MetricResult(sum(values))

    counter.limit = 12
    with pytest.raises(Kill):
        measure_sharpness(model, loader, {"moody": moody}, state_file=tmp_path / "state")
    counter.limit, shift[0] = math.inf, 1e-4
    with pytest.warns(MeasurementWarning, match="computed again"):
        report = measure_sharpness(model, loader, {"moody": moody}, state_file=tmp_path / "state")
    assert report["moody"].value == measure_sharpness(model, loader, {"moody": moody})["moody"].value


# ---------------------------------------------------------------------- what keeping costs


def test_the_file_stays_within_the_size_that_is_stated(tmp_path, counter):
    model, loader = problem_of()
    path, vector = tmp_path / "state", 8 * Objective(model, loader).dim
    sizes = []
    check = stopping.check

    def watched() -> None:
        check()
        if path.exists():
            sizes.append(path.stat().st_size)

    def greedy(objective, rng):
        for i in range(60):
            objective.value_and_grad(torch.full_like(objective.origin, 1e-3 * i))
        return MetricResult(0.0)

    stopping.check = watched
    try:
        metrics = {"greedy": greedy, "topk": RESTARTING, "box": "epsilon_box"}
        measure_sharpness(model, loader, metrics, state_file=path)
    finally:
        stopping.check = check
    most = 32 * vector + 16 * 2**16
    assert max(sizes) <= 2 * most + 2**22 + vector


def test_keeping_is_left_out_where_it_would_take_too_long(tmp_path):
    like = torch.zeros(2**16, dtype=torch.float64)
    recorder = steps.Recorder(StateFile(tmp_path / "state", {}), work=dict, set_work=lambda work: None, like=like)
    recorder._allowance = 0.0
    scope = recorder.root("metric 0")
    with scope.entered():
        for _ in range(3):
            steps.step("gradient", lambda: torch.zeros(2**16, dtype=torch.float64))
    assert recorder._file.live_bytes == 0  # nothing took so long that it was worth it
    recorder._computed += 100.0
    with scope.entered():
        steps.step("gradient", lambda: torch.zeros(2**16, dtype=torch.float64))
    assert recorder._file.live_bytes > 2**19
    recorder.close()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_trees_come_back_bit_for_bit(dtype, tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(3, 5, generator=generator).mul(10).to(dtype)
    tree = {"a": [1, 0.1 + 0.2, -0.0, math.inf, None, "ü", True], 3: (tensor, tensor[:0]), "n": math.nan, "s": tensor[0, 0]}
    file = StateFile(tmp_path / "state", {"of": "me"})
    file.write("k", tree)
    file.write("gone", [tensor])
    file.write("k2", 1, drop=["go"])
    file.compact()
    file.close()
    file = StateFile(tmp_path / "state", {"of": "me"})
    assert "gone" not in file
    assert file.read("k2") == 1
    back = file.read("k")
    assert isinstance(back, Mapping)
    assert repr(back["a"]) == repr(tree["a"])
    assert torch.equal(back[3][0], tensor)
    assert back[3][0].dtype is dtype
    assert back[3][1].shape == (0, 5)
    assert math.isnan(back["n"])
    assert back["s"].shape == ()
    file.close()


def test_vectors_in_shards_are_refused(tmp_path):
    objective = Objective(*problem_of())
    objective.layout = Shards(Ranks(), objective.dim, [(0, objective.dim)])
    with (
        pytest.raises(ValueError, match="a state file holds whole vectors, and here each rank has a shard"),
        resuming.kept_in(tmp_path / "state", objective, {}, 0),
    ):
        pass
    assert not (tmp_path / "state").exists()


# ---------------------------------------------------------------------- real kills

PROGRAM = """
    import json, os, random, signal, sys, time
    import torch
    sys.path.insert(0, {tests!r})
    import test_resume
    from sharpness_plugins import measure_sharpness, state_file

    model, loader = test_resume.problem_of(torch.float32)
    metrics = ["epsilon_box", test_resume.RandomSubspace(draws=2), "hessian_topk", "hessian_trace", test_resume.RESTARTING]
    whole = test_resume.told(measure_sharpness(model, loader, metrics))

    def life(path, out, spoil=None):
        child = os.fork()
        if child == 0:
            if spoil is not None:
                spoil()
            report = measure_sharpness(model, loader, metrics, state_file=path)
            with open(out, "w") as file:
                json.dump(test_resume.told(report), file)
            os._exit(0)
        return child

    def killed_at_write(number):
        # the process dies in the middle of its nth write, half of it written
        def spoil():
            left, write = [number], state_file._write
            def half(file, data):
                left[0] -= 1
                if left[0] == 0:
                    write(file, bytes(data)[: len(data) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                write(file, data)
            state_file._write = half
        return spoil

    def wait_for(path, changes, child):
        # until the file was seen to change so often, and some moment more
        size = None
        while changes and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            now = os.path.getsize(path) if os.path.exists(path) else None
            changes, size = changes - (now != size), now
            time.sleep(1e-3)
        time.sleep(random.uniform(0, 5e-3))

    def to_the_end(path, out, lives):
        kills = 0
        for changes, spoil in [*lives, (None, None)]:
            child = life(path, out, spoil)
            if changes is not None:
                wait_for(path, changes, child)
                os.kill(child, signal.SIGKILL)  # a zombie, if it has ended meanwhile
            _, status = os.waitpid(child, 0)
            kills += os.WIFSIGNALED(status)
            if not os.WIFSIGNALED(status):
                assert status == 0, status
                break
        with open(out) as file:
            assert json.load(file) == json.loads(json.dumps(whole)), "other numbers"
        return kills

    random.seed(int(sys.argv[1]))
    moments = [(random.randint(2, 30), None) for _ in range(5)]
    kills = to_the_end("state", "out.json", moments)
    writes = [(None, killed_at_write(n)) for n in (2, 3, 20, 41)]
    print(json.dumps([kills, to_the_end("state 2", "out 2.json", writes)]))
"""


def test_real_kills_at_random_moments_and_in_the_middle_of_writes(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM).format(tests=str(Path(__file__).parent)))
    done = subprocess.run(
        [sys.executable, str(program), "0"], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    at_random, in_writes = json.loads(done.stdout)
    assert at_random >= 2
    assert in_writes == 4
