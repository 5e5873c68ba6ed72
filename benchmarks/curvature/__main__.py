"""Top five of the Hessian beside other libraries: ``python -m benchmarks.curvature --out benchmarks/curvature/record.json``.

Everything in one process on one thread, solvers in turn, several rounds with other starting vectors.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sharpness_plugins import sampling
from sharpness_plugins.krylov import LanczosRequest
from sharpness_plugins.lanczos import lanczos
from sharpness_plugins.objective import Objective

from ..inner_maximisation.memory import resident_now
from .networks import NETWORKS, Network, dense_hessian, digits_cnn
from .peers import SOLVERS, Exact, K, Solver

__all__ = ["compare", "exact", "main", "measured", "table"]

PACKAGES = ("torch", "scipy", "curvlinops-for-pytorch", "hessian-eigenthings", "PyHessian", "timm", "transformers")
MODULES = {"curvlinops": "curvlinops", "hessian-eigenthings": "hessian_eigenthings", "PyHessian": "pyhessian"}
EVERY = 0.01  # seconds between two looks at the memory


def exact(name: str, network: Network) -> Exact:
    """From the dense Hessian in float64; of the large networks from residuals of 1e-4, which leave errors of 1e-7."""
    objective = Objective(network.model, [(network.inputs, network.labels)])
    start = sampling.normal(network.dim, sampling.generator_for(0, "exact"), objective.origin)
    with objective.session():
        run = lanczos(objective.hvp, start, LanczosRequest(k=K, tolerance=1e-4, guard=2, max_basis=60))
    assert run.converged, run.ending
    values = run.values
    if name == "digits_cnn":
        values = torch.linalg.eigvalsh(dense_hessian(digits_cnn(dtype=torch.float64))).flip(0)[:K]
    return Exact(values, run.alphas, run.betas)


def measured(work: Callable[[], tuple[list[float], int]]) -> tuple[list[float], int, float, int]:
    """Eigenvalues, products, processor seconds, and bytes by which the resident set grew at most."""
    gc.collect()
    _return_freed_memory()
    before = highest = resident_now()
    done = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(EVERY):
            highest = max(highest, resident_now())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        began = time.process_time()
        values, products = work()
        seconds = time.process_time() - began
    finally:
        done.set()
        watcher.join()
    return values, products, seconds, highest - before


def compare(name: str, rounds: int, solvers: dict[str, Solver]) -> dict[str, Any]:
    network = NETWORKS[name]()
    truth = exact(name, network)
    runs: dict[str, list[dict[str, float]]] = {solver: [] for solver in solvers}
    for seed in range(rounds):
        for label, solver in solvers.items():
            values, products, seconds, grown = measured(lambda s=solver, r=seed: s(network, r, truth))
            runs[label].append({"products": products, "seconds": seconds, "bytes": grown, "error": truth.error(values)})
            print(name, label, runs[label][-1], flush=True)
    return {"dim": network.dim, "eigenvalues": truth.values.tolist(), "runs": runs}


def table(record: dict[str, Any]) -> str:
    """Markdown. Ratios are medians over the rounds, of two runs that followed each other."""
    lines = []
    for name, found in record["networks"].items():
        lines += [
            f"{name}, {found['dim']:,} parameters, λ = {', '.join(f'{v:.4g}' for v in found['eigenvalues'])}:",
            "",
            "|  | products | largest error | processor time / ours | extra memory [MB] | / ours |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        mine = found["runs"]["ours"]
        for label, runs in found["runs"].items():
            time_ratio = statistics.median(r["seconds"] / m["seconds"] for r, m in zip(runs, mine, strict=True))
            memory_ratio = statistics.median(r["bytes"] / m["bytes"] for r, m in zip(runs, mine, strict=True))
            products = statistics.median(r["products"] for r in runs)
            lines.append(
                f"| {label} | {products:g} | {max(r['error'] for r in runs):.1e} | {time_ratio:.2f} "
                f"| {statistics.median(r['bytes'] for r in runs) / 2**20:.0f} | {memory_ratio:.2f} |"
            )
        lines.append("")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curvature", description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--solvers", nargs="+", choices=list(SOLVERS), default=list(SOLVERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON record; networks that it has already are kept or replaced")
    parser.add_argument("--table", action="store_true", help="print the table of the record and run nothing")
    chosen = parser.parse_args(arguments)
    record: dict[str, Any] = {"networks": {}}
    if chosen.out is not None and chosen.out.exists():
        record = json.loads(chosen.out.read_text())
    if not chosen.table:
        torch.set_num_threads(1)
        there = {
            label: SOLVERS[label]
            for label in SOLVERS
            if label in ("ours", *chosen.solvers)
            and all(importlib.util.find_spec(m) for peer, m in MODULES.items() if label.startswith(peer))
        }
        for name in chosen.networks:
            record["networks"][name] = compare(name, chosen.rounds, there)
            record["versions"] = {"python": platform.python_version(), **_versions()}
            if chosen.out is not None:
                chosen.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))
    return 0


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _return_freed_memory() -> None:
    """Memory that earlier runs freed, but the allocator kept, would hide what the next one takes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


if __name__ == "__main__":
    raise SystemExit(main())
