"""The script that proves the kernels on a GPU, as far as it runs without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sharpness_plugins.kernels import ball, box, dispatch, noise, sam, signs

ROOT = Path(__file__).parent.parent


def run(*arguments: str, code: str = "import benchmarks.gpu.run as script") -> subprocess.CompletedProcess[str]:
    """In a process of its own, from the top folder, with no GPU to be seen."""
    command = [sys.executable, "-c", f"import sys\n{code}\nsys.exit(script.main(sys.argv[1:]))", *arguments]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    file = tmp_path_factory.mktemp("gpu") / "report.json"
    done = run("--dry-run", "--out", str(file))
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


def operations_of(room):
    return [value.name for value in vars(room).values() if isinstance(value, dispatch.Operation)]


def test_every_operation_is_checked_and_timed(report):

    operations = {name.strip("_") for name in dispatch._OPERATIONS} - {
        "sam_norm",
        "sam_perturb",
        "sign_pack",
    }  # parts of others
    assert len({ball, box, noise, sam, signs}) == 5  # which register them
    for kind in ("checks", "timings"):
        named = {entry["case"].split()[0].strip("_") for entry in report[kind]}
        assert operations <= named, kind
    assert report["dry_run"]
    assert report["copy_gigabytes_per_second"] > 0


def test_all_results_are_right(report):
    assert all(check["right"] and check["repeatable"] for check in report["checks"])
    assert {check["dtype"] for check in report["checks"]} == {"torch.float32", "torch.float64", "torch.bfloat16"}


def test_peers_are_timed_beside_the_operation(report):
    timed = {entry["implementation"] for entry in report["timings"] if entry["case"] == "box_vertex_step"}
    assert timed == {"torch", "eager", "foreach"}
    assert all(entry["milliseconds"] > 0 for entry in report["timings"])


def test_without_a_gpu_it_says_so():
    done = run()
    assert (done.returncode, done.stderr.strip()) == (2, "no CUDA device")


def test_a_wrong_result_is_told():
    spoil = "import benchmarks.gpu.run as script\nscript.off_by = lambda found, exact: 1.0"
    done = run("--dry-run", "--only", "box_gap", code=spoil)
    assert done.returncode == 0  # it has no output, only statistics
    done = run("--dry-run", "--only", "ball_project_", code=spoil)
    assert done.returncode == 1
    assert "WRONG: Check(case='ball_project_'" in done.stderr


def test_an_unknown_case_is_told():
    done = run("--dry-run", "--only", "nothing")
    assert done.returncode == 2
    assert "no case has 'nothing' in its name" in done.stderr
