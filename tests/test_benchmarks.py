"""The comparison of benchmarks with their baseline, and the baseline itself. No benchmark is run."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

METRIC = "benchmarks/bench_metrics.py::test_metric[epsilon_box-mlp]"
GRADIENT = "benchmarks/bench_objective.py::test_gradient[mlp]"
STORED = {
    METRIC: {
        "counts": {"gradients": 34.0, "hvps": 0.0},
        "ratios": {"reference_gradients": 46.0},
        "memory": {"peak_bytes": 1_000_000},
        "value": 270.9,
        "kind": "lower bound",
    },
    GRADIENT: {"counts": {"gradients": 1.0}, "ratios": {"reference_gradients": 1.1}},
}


def _load_check() -> ModuleType:
    """By its path: another package on this machine may be called ``benchmarks``."""
    spec = importlib.util.spec_from_file_location("benchmarks_check", BENCHMARKS / "check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


check = _load_check()


def changed(name, group, quantity, value):
    found = copy.deepcopy(STORED)
    if quantity is None:
        found[name][group] = value
    else:
        found[name][group][quantity] = value
    return found


def verdicts(findings):
    return {(f.benchmark, f.quantity): f.verdict for f in findings if f.verdict != check.OK}


def test_what_is_as_stored_passes():
    findings = check.compare(STORED, copy.deepcopy(STORED))
    assert check.passes(findings)
    assert len(findings) == 7  # 2 counts, ratio, memory and value; 1 count, ratio
    assert check.table(findings) == "passed: 7 quantities of 2 benchmarks"


@pytest.mark.parametrize(
    ("name", "group", "quantity", "value"),
    [
        (METRIC, "counts", "gradients", 38.0),  # 34 and a tenth are 37.4
        (METRIC, "counts", "hvps", 1.0),  # where there was none, there must be none
        (METRIC, "counts", "gradients", math.nan),
        (GRADIENT, "counts", "gradients", 1.01),  # exact
        (METRIC, "ratios", "reference_gradients", 92.0),
        (GRADIENT, "ratios", "reference_gradients", 2.2),
        (METRIC, "memory", "peak_bytes", 1_200_000),
        (METRIC, "value", None, 260.0),
        (METRIC, "value", None, 280.0),
        (METRIC, "value", None, math.nan),
        (METRIC, "kind", None, "not converged"),
    ],
)
def test_a_regression_fails_and_the_table_names_it(name, group, quantity, value):
    findings = check.compare(STORED, changed(name, group, quantity, value))
    assert verdicts(findings) == {(name, quantity or group): check.WORSE}
    assert not check.passes(findings)
    assert "FAILED: 1 of" in check.table(findings)
    (row,) = [line for line in check.table(findings).splitlines() if line.endswith(check.WORSE)]
    assert row.startswith(name)


@pytest.mark.parametrize(
    ("name", "group", "quantity", "value"),
    [
        (METRIC, "counts", "gradients", 37.0),
        (METRIC, "ratios", "reference_gradients", 70.0),
        (METRIC, "ratios", "reference_gradients", 33.0),
        (METRIC, "memory", "peak_bytes", 1_050_000),
        (METRIC, "value", None, 272.0),
    ],
)
def test_what_is_within_its_slack_passes_in_silence(name, group, quantity, value):
    findings = check.compare(STORED, changed(name, group, quantity, value))
    assert check.passes(findings)
    assert verdicts(findings) == {}


@pytest.mark.parametrize(
    ("name", "group", "quantity", "value"),
    [
        (METRIC, "counts", "gradients", 20.0),
        (METRIC, "ratios", "reference_gradients", 20.0),
        (METRIC, "memory", "peak_bytes", 500_000),
    ],
)
def test_an_improvement_passes_and_asks_to_be_stored(name, group, quantity, value):
    findings = check.compare(STORED, changed(name, group, quantity, value))
    assert check.passes(findings)
    assert verdicts(findings) == {(name, quantity): check.BETTER}
    assert "--update" in check.table(findings)


def test_an_improvement_does_not_hide_a_regression():
    found = changed(METRIC, "counts", "gradients", 20.0)
    found[GRADIENT]["ratios"]["reference_gradients"] = 3.0
    findings = check.compare(STORED, found)
    assert not check.passes(findings)
    worse, better = check.table(findings).splitlines()[2:4]  # the worst first
    assert worse.endswith(check.WORSE)
    assert better.endswith(check.BETTER)


def test_a_missing_and_a_new_benchmark_fail():
    only_one = {METRIC: STORED[METRIC]}
    gone = check.compare(STORED, only_one)
    assert not check.passes(gone)
    assert verdicts(gone) == {(GRADIENT, "the benchmark"): check.MISSING}
    new = check.compare(only_one, STORED)
    assert not check.passes(new)
    assert verdicts(new) == {(GRADIENT, "the benchmark"): check.NEW}


@pytest.mark.parametrize("group", ["counts", "ratios", "memory"])
def test_a_missing_and_a_new_quantity_fail(group):
    found = copy.deepcopy(STORED)
    quantity, _ = found[METRIC][group].popitem()
    assert verdicts(check.compare(STORED, found)) == {(METRIC, quantity): check.MISSING}
    assert verdicts(check.compare(found, STORED)) == {(METRIC, quantity): check.NEW}


def test_a_missing_value_fails():
    found = copy.deepcopy(STORED)
    del found[METRIC]["value"]
    assert verdicts(check.compare(STORED, found)) == {(METRIC, "value"): check.MISSING}


def test_an_entry_keeps_counts_ratios_memory_and_value_and_drops_seconds():
    info = {
        "counts": {"gradients": 34, "passes": 44.00000001},
        "ratios": {"reference_gradients": 46.123456},
        "seconds": 0.53,
        "reference_seconds": 0.0114,
        "peak_bytes": 123456,
        "value": 270.912345,
        "kind": "lower bound",
    }
    assert check.entry_of(info) == {
        "counts": {"gradients": 34.0, "passes": 44.0},
        "ratios": {"reference_gradients": 46.123},
        "memory": {"peak_bytes": 123456},
        "value": 270.91,
        "kind": "lower bound",
    }


@pytest.mark.parametrize(("gradients", "status"), [(34.0, 0), (68.0, 1)])
def test_the_command_exits_with_the_verdict(monkeypatch, capsys, tmp_path, gradients, status):
    info = {"counts": {"gradients": 34.0}, "ratios": {"reference_gradients": 46.0}, "value": 1.0, "kind": "estimate"}
    monkeypatch.setattr(check, "BASELINE", tmp_path / "baseline.json")
    monkeypatch.setattr(check, "run", lambda: {METRIC: info})
    assert check.main(["--update"]) == 0
    capsys.readouterr()
    monkeypatch.setattr(check, "run", lambda: {METRIC: {**info, "counts": {"gradients": gradients}}})
    assert check.main([]) == status
    assert ("FAILED" in capsys.readouterr().out) == bool(status)


def test_other_versions_than_the_baselines_are_said(monkeypatch, capsys, tmp_path):
    info = {"counts": {"passes": 1.0}, "ratios": {}}
    monkeypatch.setattr(check, "BASELINE", tmp_path / "baseline.json")
    monkeypatch.setattr(check, "run", lambda: {METRIC: info})
    monkeypatch.setattr(check.metadata, "version", lambda package: "1.0")
    check.main(["--update"])
    check.main([])
    assert "note" not in capsys.readouterr().out
    monkeypatch.setattr(check.metadata, "version", lambda package: "2.0" if package == "torch" else "1.0")
    assert check.main([]) == 0
    assert capsys.readouterr().out.endswith("note: the baseline was made with torch 1.0, this run with 2.0\n")


def test_a_failing_benchmark_stops_the_command(monkeypatch):
    class Failed:
        returncode = 1

    monkeypatch.setattr(check.subprocess, "run", lambda *args, **kwargs: Failed())
    with pytest.raises(SystemExit, match="nothing was compared or stored"):
        check.main(["--update"])


def test_the_baseline_is_well_formed():
    baseline = json.loads(check.BASELINE.read_text())
    assert baseline["schema_version"] == check.SCHEMA_VERSION
    assert set(baseline) == {"schema_version", "versions", "benchmarks"}
    assert set(baseline["versions"]) == set(check.PACKAGES)
    for name, entry in baseline["benchmarks"].items():
        assert set(entry) <= {"counts", "ratios", "memory", "value", "kind"}, name
        assert entry["counts"]["passes"] > 0, name
        assert set(entry["ratios"]) == (set() if "bench_solvers" in name else {"reference_gradients"}), name
        numbers = [*entry["counts"].values(), *entry["ratios"].values(), *entry.get("memory", {}).values()]
        assert all(math.isfinite(number) and number >= 0 for number in [*numbers, entry.get("value", 0.0)]), name
    assert check.passes(check.compare(baseline["benchmarks"], baseline["benchmarks"]))


def test_the_baseline_names_exactly_the_benchmarks_of_the_suite():
    files = [str(BENCHMARKS / file) for file in check.FILES]
    command = [sys.executable, "-m", "pytest", *files, "--collect-only", "-q", "-p", "no:cacheprovider"]
    collected = subprocess.run(command, cwd=BENCHMARKS.parent, capture_output=True, text=True, check=False)
    assert collected.returncode == 0, collected.stdout + collected.stderr
    names = [line for line in collected.stdout.splitlines() if "::" in line]
    assert sorted(names) == sorted(json.loads(check.BASELINE.read_text())["benchmarks"])
