"""Several ranks whose measurement is stopped, killed and resumed: all of them together, to the numbers of the whole one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import rank_checks
import stop_checks
from rank_checks import network, of, whole
from sharpness_plugins import measure_sharpness
from sharpness_plugins.objective import Objective
from stop_checks import PRODUCTS

SIZES = [2, 4]
ON_FOUR = ["ctrl_c", "workers_that_die_of_ctrl_c", "kills"]

Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Found]:
    """What each rank found, by the number of ranks."""
    names = {2: stop_checks.IN_PROCESS, 4: ON_FOUR}
    return rank_checks.found_by(tmp_path_factory.mktemp("stopped"), names, checks="stop_checks", patience=400)


# ---------------------------------------------------------------------- Ctrl-C


@pytest.mark.parametrize("size", SIZES)
def test_ctrl_c_on_any_rank_or_on_all_returns_one_report_on_all(told, size):
    """Which tells what one process would: whole metrics, Ritz values within their residuals, and what was not measured."""
    objective = Objective(network(), whole())
    exact = torch.linalg.eigvalsh(objective.hvp(torch.eye(objective.dim, dtype=torch.float64)))
    complete = measure_sharpness(network(), whole(), {"box": stop_checks.METRICS["box"]})["box"]
    answers = of(told, size, "ctrl_c")
    assert len(answers[0]) == 3 * len(PRODUCTS)
    for case in zip(*answers, strict=True):
        assert all(one["report"] == case[0]["report"] for one in case)  # seconds and sentences included
        for one in case:
            assert one["stopped"] == "by Ctrl-C"
            assert one["handler"]
            assert one["untouched"]
            (said,) = one["said"]
            assert said.endswith("box is done, topk is what it was then, subspace was not measured")
        results, topk = case[0]["report"]["results"], case[0]["topk"]
        assert results["box"]["value"] == pytest.approx(complete.value, rel=1e-10)
        assert results["box"]["status"]["kind"] == str(complete.status.kind)
        assert results["subspace"]["status"]["kind"] == "not measured"
        assert topk["kind"] == "interrupted"
        assert "not converged" in topk["message"]
        # ranks end an evaluation together: that in which it was pressed, or the next one
        assert topk["hvps"] == topk["details"]["num_matvecs"] in (case[0]["products"] + 1, case[0]["products"] + 2)
        values, residuals = (torch.tensor(topk["details"][n], dtype=torch.float64) for n in ("eigenvalues", "residuals"))
        for value, residual in zip(values, residuals, strict=True):
            assert (exact - value).abs().min() <= residual + 1e-12


@pytest.mark.parametrize("size", SIZES)
def test_workers_of_a_loader_that_die_of_ctrl_c_are_no_failure(told, size):
    for answer in of(told, size, "workers_that_die_of_ctrl_c"):
        assert answer == {"stopped": "by Ctrl-C", "kinds": ["interrupted", "not measured", "not measured"]}


def test_the_clock_of_the_first_rank_counts(told):
    answers = of(told, 2, "the_clock_of_the_first")
    assert answers[0] == answers[1]
    assert answers[0]["stopped"] == ["at the time limit of 0.4 s", "at the time limit of 0.2 s for a metric"]


def start_one(tmp_path: Path, size: int, name: str) -> tuple[list[Any], Path]:
    folder = tmp_path / f"{name} {len(list(tmp_path.iterdir()))}"
    return rank_checks.start(size, folder, [name], checks="stop_checks", timeout=20.0), folder


def end(processes: list[Any]) -> list[int | None]:
    """The exit codes; of those that are left over, of their kill."""
    for process in processes:
        process.join(timeout=120)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def wait_until(holds: Any, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(2e-3)


@pytest.mark.parametrize("how", stop_checks.ENDING)
def test_one_that_asked_for_an_exception_takes_the_others_with_it(tmp_path, how):
    processes, folder = start_one(tmp_path, 2, how)
    assert end(processes) == [0, 0]
    first, second = (found[how]["lost"] for found in rank_checks.results(folder, 2))
    assert first == "rank 1 left the measurement: KeyboardInterrupt"
    assert second == "KeyboardInterrupt"


@pytest.mark.parametrize(("size", "who"), [(2, [1]), (2, [0, 1]), (4, [2]), (4, [3, 1, 0, 2])], ids=str)
def test_real_signals_at_a_random_moment(tmp_path, size, who):
    processes, folder = start_one(tmp_path, size, "interrupted")
    wait_until(lambda: all((folder / f"begun {rank}").exists() for rank in range(size)))
    time.sleep(random.Random(size + len(who)).uniform(0.0, 0.3))
    for rank in who:
        os.kill(processes[rank].pid, signal.SIGINT)
    assert end(processes) == [0] * size
    answers = [found["interrupted"] for found in rank_checks.results(folder, size)]
    assert all(answer == answers[0] for answer in answers)
    assert answers[0]["stopped"] == "by Ctrl-C"
    kinds = {key: result["status"]["kind"] for key, result in answers[0]["report"]["results"].items()}
    assert kinds["box"] not in ("failed", "interrupted", "not measured")
    assert kinds["endless"] in ("interrupted", "not measured")


SCRIPT = """
import datetime, json, torch
import torch.distributed as dist
import rank_checks, stop_checks
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
torch.set_num_threads(1)
found = stop_checks.interrupted(dist.get_rank(), dist.get_world_size())
with open(f"told {dist.get_rank()}", "w") as file:
    json.dump(found, file)
dist.barrier()
dist.destroy_process_group()
"""


def test_ctrl_c_on_torchrun_returns_on_all_its_ranks(tmp_path):
    """It passes the signal on, and waits for 30 seconds."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment) as process:
        wait_until(lambda: process.poll() is not None or all((tmp_path / f"begun {rank}").exists() for rank in range(2)))
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    first, second = (json.loads((tmp_path / f"told {rank}").read_text()) for rank in range(2))
    assert first == second, said
    assert first["stopped"] == "by Ctrl-C"


# ---------------------------------------------------------------------- state files


@pytest.mark.parametrize("size", SIZES)
def test_killed_again_and_again_they_come_to_the_same_numbers_bit_for_bit(told, size):
    """And each kill repeats the evaluation in hand, and the loss at the weights that every start makes."""
    answers = of(told, size, "kills")
    for name, found in answers[0].items():
        assert found["kills"] >= 2
        again = 3 * found["kills"] if name == "others" else 0  # gradients of samples are not kept
        assert found["more"] <= 2 * found["kills"] + again
    for rank, answer in enumerate(answers):
        for name, found in answer.items():
            assert found["same"] == [True, True], name
            assert found["loss"]
            assert found["evaluations of what is done"] == 1  # the loss at the weights
            assert found["numbers"] == answers[0][name]["numbers"]
            assert found["file"] == (rank == 0)


@pytest.mark.parametrize("what", ["kills_with_a_spread_basis", "kills_of_a_sharded_model"])
def test_what_lies_on_several_ranks_is_computed_again_or_gathered(told, what):
    for answer in of(told, 2, what):
        assert answer["same"] == [True, True]
        assert answer["kills"] >= 3
        assert answer["more"] <= 2 * answer["kills"]


def test_ctrl_c_and_a_state_file_make_one_measurement_of_many(told):
    for answer in of(told, 2, "slices_of_time"):
        assert answer["same"]
        assert answer["slices"] >= 2


def test_a_file_of_another_measurement_or_number_of_ranks_is_refused_by_name(told):
    first, second = of(told, 2, "whose_file_it_is")
    for name, found in first.items():
        if name in ("of all", "of all again", "on the first"):
            assert found == second[name] == "nothing"
        elif name != "alone":
            assert second[name] == (
                found if found.startswith("ValueError") else f"RemoteFailureError: rank 0 failed: {found}"
            )
    assert "belongs to another measurement: the data, the number of ranks differ." in first["of one"]
    assert "belongs to another measurement: the data, the number of ranks differ." in first["alone"]
    assert "the data, the loss differ." in first["data"]
    assert "the metrics differs." in first["metrics"]
    assert "is damaged (its head is cut off)" in first["damaged"]
    assert "is no state file of this version" in first["foreign"]
    assert first["nowhere/state"].startswith("FileNotFoundError")
    assert first["not on the first"].startswith("ValueError: rank 1 names a state file, and the one that keeps it is rank 0")


def test_a_full_disk_costs_the_state_and_nothing_else(told):
    first, second = of(told, 2, "a_full_disk")
    assert first["same"] == second["same"] == [True, True]
    assert [said.split(" (")[0].split()[-3:] for said in first["said"]] == [["cannot", "be", "written"]]
    assert second["said"] == []


def test_what_would_take_too_long_to_keep_is_computed_again(told):
    for rank, answer in enumerate(of(told, 2, "what_cannot_be_afforded")):
        assert answer["same"]
        assert answer["evaluations"] == 1 + 15
        assert answer["kept"] < 1000 or rank  # the head, and no gradient of 147 numbers


def test_another_path_is_noticed_and_computed_again(told):
    first, second = of(told, 2, "another_path")
    assert "is computed again" in first["said"][0]
    assert first["same"]
    assert second["same"]


def test_what_a_rank_evaluates_by_itself_stays_its_own(told):
    assert all(answer["same"] for answer in of(told, 2, "what_one_rank_evaluates_by_itself"))


@pytest.mark.parametrize("size", [4])
def test_real_kills_of_all_ranks_and_of_one(tmp_path, size):
    """By SIGKILL: the file is whole, the others end, and the next life goes on."""
    processes, folder = start_one(tmp_path, size, "lived")
    assert end(processes) == [0] * size
    whole = rank_checks.results(folder, size)[0]["lived"]["numbers"]
    state, draws = tmp_path / "state", random.Random(size)
    state.unlink()
    victims: list[list[int]] = [list(range(size)), [size - 1], [0], list(range(size))][: 4 if size == 2 else 2]
    killed = 0
    for who in victims:
        processes, folder = start_one(tmp_path, size, "lived")
        wait_for_changes(state, draws.randint(4, 25))
        for rank in who:
            processes[rank].kill()
        killed += [-signal.SIGKILL] * len(who) == [end(processes)[rank] for rank in who]
        for rank in set(range(size)) - set(who):
            found = json.loads((folder / f"{rank}.json").read_text())["lived"]
            assert "the group of ranks broke while" in found["lost"]
        content = state.read_bytes()
        assert content.startswith(b"sharpness-plugins state 1\n")
    assert killed >= 2  # in the middle
    processes, folder = start_one(tmp_path, size, "lived")
    assert end(processes) == [0] * size
    for found in rank_checks.results(folder, size):
        assert found["lived"]["numbers"] == whole


def wait_for_changes(path: Path, changes: int) -> None:
    """Until the file was seen to change so often, and some moment more."""
    size = None

    def changed() -> bool:
        nonlocal size, changes
        now = path.stat().st_size if path.exists() else None
        changes, size = changes - (now != size), now
        return changes <= 0

    wait_until(changed)
