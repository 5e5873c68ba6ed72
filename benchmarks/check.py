"""Run the benchmarks and compare them with the stored baseline: ``python -m benchmarks.check`` from the top folder.

Exits with 1 when a count, a ratio, a memory peak or a value got worse by more than its slack, or when a benchmark is
missing or not stored yet. ``--update`` stores what was found instead.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["Finding", "compare", "entry_of", "passes", "table"]

HERE = Path(__file__).parent
BASELINE = HERE / "baseline.json"
SCHEMA_VERSION = 1
FILES = ("bench_metrics.py", "bench_objective.py", "bench_solvers.py")  # the others are run by hand: they take ten minutes
PACKAGES = ("sharpness-plugins", "torch", "numpy", "scipy", "timm", "scikit-learn", "pytest-benchmark")

# by how much a quantity may exceed what is stored, as a share of it
COUNT_SLACK = {"bench_objective.py": 0.0}  # one call does a fixed amount of work
SOLVER_COUNT_SLACK = 0.10  # a solver may stop a step later in other rounding: 15 products may become 16, 34 gradients 37
RATIO_SLACK = 0.75  # repeated runs on a shared machine differ by up to 30 %; this catches what takes twice as long
MEMORY_SLACK = 0.10
VALUE_TOLERANCE = 0.02  # both ways: a value that moved means another answer, not another cost

_COUNTS = {
    "gradients": "gradients",
    "values": "values",
    "hvps": "HVPs",
    "passes": "passes",
    "bytes_per_parameter": "bytes per parameter",
    "launches": "launches",
}
_RATIOS = {"reference_gradients": "reference gradients", "dense_products": "dense products"}

BETTER, OK, WORSE, MISSING, NEW = "better", "ok", "WORSE", "MISSING", "NEW"


@dataclass(frozen=True)
class Finding:
    """One quantity of one benchmark: stored, found, and what that means."""

    benchmark: str
    quantity: str
    stored: float | str | None
    found: float | str | None
    verdict: str
    allowed: str = ""


def compare(stored: Mapping[str, Any], found: Mapping[str, Any]) -> list[Finding]:
    """Every quantity of two mappings from benchmark names to entries (see ``entry_of``)."""
    findings: list[Finding] = []
    for name in [*stored, *(name for name in found if name not in stored)]:
        if name not in found:
            findings.append(Finding(name, "the benchmark", "stored", None, MISSING))
        elif name not in stored:
            findings.append(Finding(name, "the benchmark", None, "found", NEW))
        else:
            findings.extend(_compared(name, stored[name], found[name]))
    return findings


def _compared(name: str, stored: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[Finding]:
    if stored.get("kind") != found.get("kind"):
        yield Finding(name, "kind", stored.get("kind"), found.get("kind"), WORSE, "the same")
    slacks = {"counts": _count_slack(name), "ratios": RATIO_SLACK, "memory": MEMORY_SLACK}
    for group, slack in slacks.items():
        before, now = stored.get(group, {}), found.get(group, {})
        for quantity in [*before, *(q for q in now if q not in before)]:
            yield _cost(name, quantity, before.get(quantity), now.get(quantity), slack)
    if "value" in stored or "value" in found:
        yield _value(name, stored.get("value"), found.get("value"))


def _count_slack(name: str) -> float:
    return next((slack for file, slack in COUNT_SLACK.items() if file in name), SOLVER_COUNT_SLACK)


def _cost(name: str, quantity: str, stored: float | None, found: float | None, slack: float) -> Finding:
    if stored is None or found is None:
        return Finding(name, quantity, stored, found, NEW if stored is None else MISSING)
    limit = stored * (1 + slack) + 1e-9
    verdict = BETTER if found < stored / (1 + slack) - 1e-9 else OK
    if not found <= limit:  # also where it is NaN
        verdict = WORSE
    return Finding(name, quantity, stored, found, verdict, f"at most {limit:.4g}")


def _value(name: str, stored: float | None, found: float | None) -> Finding:
    if stored is None or found is None:
        return Finding(name, "value", stored, found, NEW if stored is None else MISSING)
    same = math.isclose(stored, found, rel_tol=VALUE_TOLERANCE, abs_tol=1e-9)
    return Finding(name, "value", stored, found, OK if same else WORSE, f"within {100 * VALUE_TOLERANCE:g} %")


def passes(findings: Sequence[Finding]) -> bool:
    return all(finding.verdict in (OK, BETTER) for finding in findings)


def table(findings: Sequence[Finding]) -> str:
    """What is not as stored, the worst first, and a sentence that says what to do."""
    order = [WORSE, MISSING, NEW, BETTER]
    shown = sorted((f for f in findings if f.verdict != OK), key=lambda f: order.index(f.verdict))
    rows = [["benchmark", "quantity", "stored", "found", "allowed", ""]]
    rows += [[f.benchmark, f.quantity, _cell(f.stored), _cell(f.found), f.allowed, f.verdict] for f in shown]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    said = [lines[0], "-" * max(map(len, lines)), *lines[1:], ""] if shown else []
    return "\n".join([*said, _verdict(findings)])


def _verdict(findings: Sequence[Finding]) -> str:
    numbers = f"{len(findings)} quantities of {len({f.benchmark for f in findings})} benchmarks"
    if not passes(findings):
        bad = sum(f.verdict not in (OK, BETTER) for f in findings)
        return f"FAILED: {bad} of {numbers}. If this is meant, store it: python -m benchmarks.check --update"
    if any(f.verdict == BETTER for f in findings):
        return f"passed: {numbers}, some better than stored. Keep that: python -m benchmarks.check --update"
    return f"passed: {numbers}"


def _cell(value: float | str | None) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:.5g}"


def entry_of(extra_info: Mapping[str, Any]) -> dict[str, Any]:
    """What is stored of one benchmark: what a machine does not change, and ratios to its own reference gradient."""
    entry: dict[str, Any] = {"counts": _rounded(extra_info["counts"]), "ratios": _rounded(extra_info["ratios"])}
    if "peak_bytes" in extra_info:
        entry["memory"] = {"peak_bytes": extra_info["peak_bytes"]}
    if "value" in extra_info:
        entry |= {"value": _rounded(extra_info)["value"], "kind": extra_info["kind"]}
    return entry


def _rounded(numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {name: float(f"{value:.5g}") for name, value in numbers.items() if isinstance(value, (int, float))}


def run() -> dict[str, dict[str, Any]]:
    """The whole suite in a process of its own: names with their ``extra_info``.

    Raises:
        SystemExit: a benchmark failed its own checks.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        command = [
            sys.executable,
            "-m",
            "pytest",
            *(str(HERE / file) for file in FILES),
            "--benchmark-enable",
            f"--benchmark-json={results}",
        ]
        command += ["-q", "-p", "no:cacheprovider", "--benchmark-columns=median,rounds"]
        status = subprocess.run(command, cwd=HERE.parent, check=False).returncode
        if status != 0:
            sys.exit(f"the benchmarks themselves failed (pytest exited with {status}); nothing was compared or stored")
        entries = json.loads(results.read_text())["benchmarks"]
    return {entry["fullname"]: entry["extra_info"] for entry in entries}


def columns(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The tables of the README, one for each file."""
    groups: dict[str, list[list[str]]] = {}
    for fullname, info in found.items():
        file, name = fullname.split("::")
        counts, ratios = info["counts"], info["ratios"]
        cells = {
            "": name.removeprefix("test_"),
            **{label: f"{counts[key]:.3g}" if key in counts else "" for key, label in _COUNTS.items()},
            **{label: f"{ratios[key]:.3g}" if key in ratios else "" for key, label in _RATIOS.items()},
            "overhead": f"{info['overhead']:.2f}" if "overhead" in info else "",
            "peak MB": f"{info['peak_bytes'] / 1e6:.3g}" if "peak_bytes" in info else "",
            "value": f"{info['value']:.4g}" if "value" in info else "",
            "share of best": f"{info['share_of_best']:.3f}" if "share_of_best" in info else "",
        }
        rows = groups.setdefault(file, [list(cells)])
        rows.append(list(cells.values()))
    return "\n\n".join(_markdown(rows) for rows in groups.values())


def _markdown(rows: list[list[str]]) -> str:
    kept = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    head, *body = [[row[i] for i in kept] for row in rows]
    rule = ["---", *["---:"] * (len(kept) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *body])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--update", action="store_true", help="store what was found as the new baseline")
    parser.add_argument("--table", action="store_true", help="print all numbers as Markdown, as in the README")
    options = parser.parse_args(arguments)
    found = run()
    entries = {name: entry_of(info) for name, info in found.items()}
    if options.table:
        print(columns(found))
    versions = {package: metadata.version(package) for package in PACKAGES}
    if options.update:
        baseline = {"schema_version": SCHEMA_VERSION, "versions": versions, "benchmarks": entries}
        BASELINE.write_text(json.dumps(baseline, indent=1, sort_keys=True) + "\n")
        print(f"stored {len(entries)} benchmarks in {BASELINE.name}")
        return 0
    baseline = json.loads(BASELINE.read_text())
    findings = compare(baseline["benchmarks"], entries)
    print(table(findings))
    for package, version in versions.items():
        if baseline["versions"].get(package) != version:
            print(f"note: the baseline was made with {package} {baseline['versions'].get(package)}, this run with {version}")
    return 0 if passes(findings) else 1


if __name__ == "__main__":
    sys.exit(main())
