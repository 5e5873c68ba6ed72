"""The example of the plain adapter, run as its reader would."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "adapters" / "examples" / "plain_digits.py"


def test_it_trains_with_a_warm_start_measures_and_plots(tmp_path):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    pytest.importorskip("matplotlib", reason="it plots")
    folder = tmp_path / "new"
    told = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", str(EXAMPLE), str(folder)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        timeout=300,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    with (folder / "plain_digits.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    # 3 epochs of 63 batches of 16, then 7 of 4 batches of 256, and the first measurement after the first step
    assert [int(row["step"]) for row in rows] == [1, 63, 126, 189, *range(193, 218, 4)]
    assert [int(row["samples"]) for row in rows] == [16, *range(1000, 10_001, 1000)]
    assert all(float(row["epsilon_box"]) > 0 for row in rows)
    assert float(rows[-1]["loss"]) < 0.5 < float(rows[0]["loss"])
    assert "batch size 16 -> 256: 3 epochs reached" in told.stdout
    assert "Sequential after 217 steps, 10,000 samples, 10 epochs" in told.stdout
    accuracy = float(told.stdout.split("Test accuracy ")[1].split(" %")[0])
    assert accuracy > 85
    assert (folder / "plain_digits.png").read_bytes().startswith(b"\x89PNG")
